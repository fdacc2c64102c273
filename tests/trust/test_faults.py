"""Killed, interrupted, out of room, without permission, with half of a file: nothing is lost, nothing half done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from seqcompress import (
    GradientErrorReport,
    OnlineScheduler,
    Schedule,
    SequenceScheduler,
    Stepwise,
    Strategy,
    compress,
    get_strategy,
    gradient_error,
    is_compressed,
    rehearse,
    restore,
    scale_views,
)
from seqcompress.gradients import plots
from seqcompress.gradients.command import main

WRITERS = Path(__file__).with_name("writers.py")
QUICK = ("truncating", "analysis", "schedule.json", "report.json", "report.csv", "summary.txt")
SLOW = (*QUICK, "report.png", "schedule.png")
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills and limits processes as POSIX does")


@posix
@pytest.mark.parametrize(
    ("times", "writers"), [(10, QUICK), pytest.param(200, SLOW, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_a_writer_that_is_killed_or_refused_leaves_the_whole_file_that_was_there(
    times: int, writers: tuple[str, ...]
) -> None:
    told = subprocess.run([sys.executable, WRITERS, str(times), *writers], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    rows = [line.split() for line in told.stdout.splitlines()]
    lost = {(what, name): int(count) for what, name, _, count in rows}
    assert lost.pop(("killed", "truncating")) > 0  # it would show
    assert {what for what, _ in lost} == {"killed", "full", "readonly"}
    assert len(lost) == len(writers) - 1 + 2 * 5
    assert set(lost.values()) == {0}


FUNCTION = """
import torch
from timm.models.vision_transformer import VisionTransformer
from seqcompress import TrainingStep


def at(checkpoint):
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    return TrainingStep(vit, lambda views: vit(views).square().mean(), list(torch.randn(2, 2, 3, 16, 16)))
"""


def _analysis(folder: Path, output: Path) -> list[str]:
    (folder / "trains_of_faults_test.py").write_text(FUNCTION)
    (folder / "x.pt").touch()
    function = f"{folder / 'trains_of_faults_test.py'}:at"
    grid = ["--token-dropout", "0", "0.5", "--batches", "2", "--cost", "flops"]
    return [function, "--checkpoints", str(folder / "x.pt"), *grid, "--output", str(output)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_standard_output_is_one_line_that_says_where_the_summary_is(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "seqcompress.gradients", *_analysis(tmp_path, tmp_path / "results")]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("python -m seqcompress.gradients: error: standard output: [Errno 28] No space left")
    assert last.endswith(f"the same summary is in {tmp_path / 'results' / 'summary.txt'}")
    assert "Traceback" not in ended.stderr
    assert "What it took" in (tmp_path / "results" / "summary.txt").read_text()


@posix
def test_a_read_only_folder_is_one_line_before_anything_is_measured(capfd: pytest.CaptureFixture[str]) -> None:
    assert plots is not None  # imported while everything may be read
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        folder.chmod(0o755)
        (folder / "results").mkdir(mode=0o555)
        arguments = _analysis(folder, folder / "results")
        process = os.fork()
        if not process:
            if os.getuid() == 0:  # who may write anywhere
                os.setgid(65534)
                os.setuid(65534)
            code = 3
            try:
                main(arguments)
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            finally:
                os._exit(code)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 2
        assert list((folder / "results").iterdir()) == []
    assert "argument --output: [Errno 13] Permission denied" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("read", [Schedule.from_json, GradientErrorReport.from_json])
def test_a_file_that_was_cut_off_anywhere_is_one_value_error_with_its_name(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    if read == Schedule.from_json:
        Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy()}).to_json(path)
    else:
        vit, batches = _vit(), torch.randn(3, 2, 3, 16, 16)
        gradient_error(vit, lambda views: vit(views).square().mean(), batches, [Strategy(0.5)]).to_json(path)
    whole = path.read_bytes().rstrip()
    assert read(path) is not None
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.json"):
            read(path)


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=0).train()


class Interrupted(TorchDispatchMode):
    """Ctrl-C at one of torch's operations, the backward pass's included."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


class Operation(NamedTuple):
    """Something that takes long: what it does, to which models, and whether an interrupt is passed on."""

    do: Callable[[], object]
    models: list[nn.Module]


STAGES = Stepwise({0.0: Strategy(0.5, 8), 0.5: Strategy(0.5)})
VIEWS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _compressing() -> Operation:
    vit, teacher = _vit(), _vit()
    return Operation(lambda: compress(vit, STAGES, teacher=teacher), [vit, teacher])


def _planning_anew() -> Operation:
    vit = compress(_vit(), Strategy(0.75))
    return Operation(lambda: compress(vit, STAGES), [vit])


def _measuring() -> Operation:
    vit = _vit()
    return Operation(
        lambda: gradient_error(
            vit, lambda views: vit(views).square().mean(), [VIEWS, -VIEWS], [Strategy(0.5, 8)], cost="flops"
        ),
        [vit],
    )


def _measuring_online() -> Operation:
    vit = compress(_vit(), Strategy(0.5))
    vit(VIEWS).square().mean().backward()
    online = OnlineScheduler(
        vit, lambda views: vit(views).square().mean(), [Strategy(0.5, 8)], total_steps=90, compute_share=1
    )
    for _ in range(100):
        if online.measured_share or online.last_step > 20:
            break
        vit(VIEWS).square().mean().backward()
        online.step(VIEWS)
    assert online.measured_share
    vit(VIEWS).square().mean().backward()
    vit.zero_grad()
    online._sequence.step = lambda: None  # type: ignore[method-assign]  # it was stepped, and only measures
    return Operation(lambda: online._measure(VIEWS), [vit])


def _rehearsing() -> Operation:
    vit = compress(_vit(), STAGES)
    scheduler = SequenceScheduler(vit, total_steps=8)
    return Operation(lambda: (rehearse(scheduler, lambda: vit(VIEWS).sum().backward()), vit.zero_grad()), [vit])


OPERATIONS = [_compressing, _planning_anew, _measuring, _measuring_online, _rehearsing]


def _state(models: list[nn.Module]) -> list[Any]:
    """All of a model that an interrupt might leave behind, gradients of a step that was broken off excepted."""
    state: list[Any] = []
    for model in models:
        for name, module in model.named_modules():
            hooks = len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)
            state.append((name, type(module), module.training, hooks, sorted(vars(module))))
        state += [(name, value.requires_grad, value.tolist()) for name, value in model.named_parameters()]
        state.append(get_strategy(model) if is_compressed(model) else None)
        state.append(model.patch_embed.compression.plan if is_compressed(model) else None)
    return state


@pytest.mark.parametrize("times", [4, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("make", OPERATIONS)
def test_an_interrupt_at_any_of_its_operations_leaves_everything_as_it_was(
    make: Callable[[], Operation], times: int
) -> None:
    operation, counting = make(), Interrupted(0)
    with counting:
        operation.do()
    operations = -counting._left
    assert operations > 20
    stopped = 0
    for at in sorted({round(operations * (number + 0.5) / times) for number in range(times)}):
        operation = make()
        before, random = _state(operation.models), torch.get_rng_state()
        try:
            with Interrupted(at):
                operation.do()
        except KeyboardInterrupt:
            stopped += 1
            assert _state(operation.models) == before
        if make is not _rehearsing:  # whose step is one of training
            assert torch.equal(torch.get_rng_state(), random)
        operation.do()  # and it can be done again
        for model in operation.models:
            restore(model).eval()
            with torch.no_grad():
                assert torch.equal(model(VIEWS), _vit().eval()(VIEWS))
    assert stopped >= min(times, operations) / 2  # gradient_error ends with what it has


class _Dies(FakeData):
    """Whose worker is killed at its first image, once, while the run waits for the other one's.

    Later, batches may be left that torch can no longer fetch, and in the middle of a step it says so in other words.
    """

    def __init__(self, marker: str, **settings: Any) -> None:
        super().__init__(size=48, image_size=(3, 64, 64), **settings)
        self.marker = Path(marker)

    def __getitem__(self, index: int) -> Any:
        if torch.utils.data.get_worker_info() is not None and not self.marker.exists():
            if index == 4:
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            while not self.marker.exists():
                time.sleep(0.01)
            time.sleep(0.5)
        return super().__getitem__(index)


@posix
def test_workers_that_die_are_an_error_and_the_next_ones_make_the_views_of_their_step(tmp_path: Path) -> None:
    vit = compress(_vit(), Stepwise({0.0: Strategy(0.0, 8), 0.9: Strategy()}))
    images = _Dies(
        str(tmp_path / "died"),
        transform=v2.Compose([v2.RandomResizedCrop(16), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]),
    )
    loader: DataLoader[Any] = DataLoader(images, batch_size=4, num_workers=2)
    scale_views(loader, vit)
    scheduler, made = SequenceScheduler(vit, total_steps=24), []

    def epoch() -> Iterator[Any]:
        for views, _ in loader:
            assert vit(views).isfinite().all()
            made.append(views.shape[-1])
            scheduler.step()
            yield views

    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(epoch())
    before, scheduler_state = len(made), json.dumps(scheduler.state_dict())
    assert scheduler.last_step == before < 12
    assert json.dumps(scheduler.state_dict()) == scheduler_state
    assert len(list(epoch())) == 12
    assert 8 in made[before + 2 :]
    assert set(made) == {8, 16}
