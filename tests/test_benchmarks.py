"""Benchmarks run as their users run them, and their tables say what was measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seqcompress import Strategy, set_strategy

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODEL = "test_vit"  # timm's smallest, 6 blocks x 64, with patches of 16 px
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    """The modules of the benchmarks, which lie beside each other and are no package."""
    names = ("breakdown", "encoder", "end_to_end", "measure", "models", "parts", "photographs", "recipes", "views")
    names = (*names, "solo_learn_step", "training_step")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield SimpleNamespace(**{name: import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def double() -> Iterator[None]:
    """Batch norm of two samples that are almost the same blows rounding up: not at 64 bits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a short run of ``training_step.py`` leaves behind."""
    output = tmp_path_factory.mktemp("results") / "step"
    settings = ("--device", "cpu", "--model", MODEL, "--batch-size", "2", "--repeats", "6", "--min-seconds", "0")
    methods = ("--methods", "simclr", "dino", "--dino-dim", "64", "--strategies", "drop 0.5, patch 32")
    command = [sys.executable, BENCHMARKS / "training_step.py", *settings, *methods, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = output.with_suffix(".md").read_text()
    assert done.stdout.strip() == text.strip()
    return json.loads(output.with_suffix(".json").read_text()), text


@pytest.mark.soak
def test_a_batch_that_follows_the_length_is_timed_by_stages(tmp_path: Path) -> None:
    settings = ("--device", "cpu", "--model", MODEL, "--batch-size", "2", "--repeats", "6", "--min-seconds", "0")
    command = [sys.executable, BENCHMARKS / "batch.py", *settings, "--output", tmp_path / "batch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "batch.json").read_text())["stages"]
    assert [(stage["tokens"], stage["factor"]) for stage in stages] == [(25, 4), (50, 2), (99, 1), (197, 1)]
    assert [stage["merge"]["median"] == 1 for stage in stages] == [False, False, True, True]  # the same step
    assert stages[-1]["memory"] == stages[-1]["memory_at_factor"] == 1
    assert stages[0]["memory"] < stages[0]["memory_at_factor"]
    assert "| drop 0.5, patch 32 | 25 | 4 |" in (tmp_path / "batch.md").read_text()


@pytest.mark.parametrize(
    ("method", "strategy"), [("moco-v3", Strategy(0.5, 32)), ("simclr", Strategy()), ("dino", Strategy(0.5, 32))]
)
def test_a_step_in_parts_has_the_gradients_of_the_whole_step(
    benchmarks: SimpleNamespace, double: None, method: str, strategy: Strategy
) -> None:
    options = argparse.Namespace(model=MODEL, batch_size=2, dino_dim=64, amp=False)

    def gradients(name: str, *arguments: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        training = benchmarks.training_step.compressed(benchmarks.training_step.plain_training(method, options, CPU))
        set_strategy(training.student, strategy)
        getattr(training, name)(*arguments)
        modules = {"student": training.student, "recipe": training.recipe}
        return {
            f"{of}.{name}": parameter.grad
            for of, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }

    whole = gradients("backward")
    parts = gradients("backward_in_parts", benchmarks.measure.Stopwatch(CPU))
    assert whole.keys() == parts.keys()
    assert sum(name.startswith("student.") for name in whole) > 70
    assert sum(name.startswith("recipe.") for name in whole) >= 6
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-4
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-6, atol=1e-9)


def test_a_step_in_parts_moves_student_and_teacher(benchmarks: SimpleNamespace) -> None:
    options = argparse.Namespace(model=MODEL, batch_size=2, dino_dim=64, amp=False)
    training = benchmarks.training_step.plain_training("dino", options, CPU)
    with torch.no_grad():
        for parameter in training.student.parameters():
            parameter.add_(1.0)
    before = [training.student.pos_embed.detach().clone(), training.teacher.pos_embed.clone()]
    stopwatch = benchmarks.measure.Stopwatch(CPU)
    training.step_in_parts(stopwatch)
    assert set(stopwatch.read()) == set(benchmarks.recipes.PARTS)
    assert stopwatch.read() == {}
    assert not torch.equal(training.student.pos_embed, before[0])
    torch.testing.assert_close(training.teacher.pos_embed, before[1] + 0.01, rtol=0, atol=1e-5)
    assert all(parameter.grad is None for parameter in training.student.parameters())


def test_plain_and_compressed_trainings_share_every_parameter(benchmarks: SimpleNamespace) -> None:
    options = argparse.Namespace(model=MODEL, batch_size=2, dino_dim=64, amp=False)
    plain = benchmarks.training_step.plain_training("dino", options, CPU)
    ours = benchmarks.training_step.compressed(plain)
    for encoder, copied in ((plain.student, ours.student), (plain.teacher, ours.teacher)):
        assert encoder is not copied
        assert all(one is other for one, other in zip(encoder.parameters(), copied.parameters(), strict=True))


def test_the_limit_is_a_plain_vit_with_natively_as_many_tokens(benchmarks: SimpleNamespace) -> None:
    options = argparse.Namespace(model=MODEL, batch_size=2, dino_dim=64, amp=False)
    plain = benchmarks.training_step.plain_training("dino", options, CPU)
    short = benchmarks.training_step.natively_short(plain, Strategy(0.5, 16))
    lengths: dict[str, list[int]] = {"student": [], "teacher": []}
    for role, seen in lengths.items():
        encoder = getattr(short, role)
        encoder.blocks[0].register_forward_pre_hook(lambda block, args, seen=seen: seen.append(args[0].shape[1]))
    stopwatch = benchmarks.measure.Stopwatch(CPU)
    short.encoders_in_parts(stopwatch)
    prefix = plain.student.num_prefix_tokens
    assert lengths == {"student": [98 + prefix, 18 + prefix], "teacher": [196 + prefix]}
    assert set(stopwatch.read()) == {"student", "teacher"}
    assert short.student.blocks[0].mlp.fc1.weight is plain.student.blocks[0].mlp.fc1.weight


def test_parts_add_up_to_the_whole_step(results: tuple[dict[str, Any], str]) -> None:
    for method in results[0]["methods"].values():
        for record in (method["base"], *method["strategies"]):
            assert sum(part["median"] for part in record["parts"].values()) == pytest.approx(1, abs=0.1)
            assert record["parts_together_over_whole"]["median"] == pytest.approx(1, abs=0.4)


def test_results_say_what_was_measured_and_where(results: tuple[dict[str, Any], str]) -> None:
    content, text = results
    assert content["setup"] == {
        "image_size": 224,
        "host": "lightly",
        "model": MODEL,
        "dino_dim": 64,
        "device": "cpu",
        "batch_size": 2,
        "amp": False,
        "compile": False,
        "repeats": 6,
    }
    assert {"processor", "torch", "timm", "lightly", "seqcompress"} <= content["environment"].keys()
    simclr, dino = (content["methods"][name] for name in ("simclr", "dino"))
    parts = {"student", "heads", "loss", "optimizer"}
    assert simclr["base"]["parts"].keys() == parts
    assert dino["base"]["parts"].keys() == parts | {"teacher", "momentum update"}
    ((simclr_record,), (dino_record,)) = simclr["strategies"], dino["strategies"]
    prefix = simclr_record["tokens"]["student"][0] - 24  # half of the 49 patches of 32 px
    assert simclr_record["tokens"] == {"student": [24 + prefix]}
    assert dino_record["tokens"] == {"student": [24 + prefix, 4 + prefix], "teacher": [49 + prefix]}
    for record in (simclr_record, dino_record):
        assert (record["token_dropout"], record["patch_size"]) == (0.5, 32)
        assert set(record["share_of_native_limit"]) == set(record["tokens"])
        assert 0.02 < record["peak_memory"] < 0.8
        for figure in ("speedup", "amdahl_limit", "share_of_amdahl_limit"):
            assert 0 < record[figure]["low"] <= record[figure]["median"] <= record[figure]["high"]
        assert f"{record['speedup']['median']:.2f}x" in text
        assert f"{record['amdahl_limit']['median']:.2f}x" in text
    assert "64 outputs of its head" in text
    assert simclr["turns"] == dino["turns"] == 6


def test_peak_memory_is_that_of_activations_and_gradients_together(benchmarks: SimpleNamespace) -> None:
    inputs, weight = torch.randn(64, 1000), torch.zeros(1000, 500, requires_grad=True)

    def step() -> None:
        (inputs @ weight).exp().sum().backward()
        weight.grad = None

    mib = 4 / 2**20
    # The last to be made is the weight's gradient, from that of the product, beside the exponential's result.
    expected = mib * (1000 * 500 + 64 * 500)
    found = benchmarks.measure.peak_memory(step, CPU) / 2**20
    assert expected <= found <= expected + mib * 64 * 500 + 0.01
    assert benchmarks.measure.peak_memory(lambda: torch.zeros(1000), CPU) == 4000


def test_an_encoders_step_leaves_no_gradients(benchmarks: SimpleNamespace) -> None:
    vit = benchmarks.models.vit(MODEL)
    benchmarks.encoder.train_step(vit, torch.zeros(1, 3, 224, 224), False)
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_short_steps_have_more_turns_and_are_compared_by_repeats(
    benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def taking(seconds: float) -> Callable[[], None]:
        return lambda: clock.append(clock[-1] + seconds)

    measure = benchmarks.measure
    monkeypatch.setattr(measure, "now", lambda device: clock[-1])
    groups = {"long": {"a": taking(3.0)}, "short": {"a": taking(0.25), "b": taking(0.125)}}
    times = measure.interleaved_times(groups, repeats=6, min_seconds=1.5, device=CPU, title="test")
    assert times == {"long": {"a": [3.0] * 6}, "short": {"a": [0.25] * 24, "b": [0.125] * 24}}
    assert measure.by_repeat([1.0, 3.0, 10.0, 20.0], 2) == [2.0, 15.0]


@pytest.mark.parametrize(("turns", "outside"), [(6, 0), (20, 5), (100, 39), (4000, 1937)])
def test_an_interval_leaves_out_as_many_turns_as_the_binomial_distribution_says(
    turns: int, outside: int, benchmarks: SimpleNamespace
) -> None:
    numbers = [float(number) for number in range(1, turns + 1)]
    median, low, high = benchmarks.measure.ratio(numbers, [1.0] * turns)
    assert (median, low, high) == ((turns + 1) / 2, 1 + outside, turns - outside)


def test_a_median_needs_six_repeats_for_its_interval(
    benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--repeats", "5"])
    with pytest.raises(SystemExit):
        benchmarks.training_step.main()
    assert "--repeats must be at least 6 for a 95 % interval, got 5" in capsys.readouterr().err


QUICK = ("--repeats", "6", "--min-seconds", "0")
SMALL = ("--device", "cpu", "--model", MODEL, "--batch-size", "2", *QUICK)


def _results_of(script: str, *arguments: str, folder: Path) -> dict[str, Any]:
    output = folder / "found"
    command = [sys.executable, BENCHMARKS / script, *arguments, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == output.with_suffix(".md").read_text().strip()
    return json.loads(output.with_suffix(".json").read_text())


@pytest.fixture
def results_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., dict[str, Any]]]:
    """What a short run of a benchmark leaves behind, in this process: importing takes longer than most runs."""

    def run(module: Any, *arguments: str) -> dict[str, Any]:
        output = tmp_path / "found"
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments, "--output", str(output)])
        module.main()
        assert capsys.readouterr().out.strip() == output.with_suffix(".md").read_text().strip()
        return json.loads(output.with_suffix(".json").read_text())

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_views_are_compared_with_themselves_at_full_size(
    benchmarks: SimpleNamespace, results_of: Callable[..., dict[str, Any]]
) -> None:
    found = results_of(benchmarks.views, *QUICK, "--images", "2", "--only", "torchvision v")
    assert [row["pipeline"] for row in found["views"]] == ["torchvision v1", "torchvision v2, tensors"]
    for row in found["views"]:
        assert row["views_per_image"] == 1
        assert list(row["speedup"])[:3] == ["patch 28", "patch 32", "patch 56"]
    differences = found["differences"]
    assert 0 < differences["scaled, files decoded whole"] < differences["scaled"] < 0.3 < differences["another crop"]


def test_an_encoder_is_compared_at_every_point_and_while_nothing_is_compressed(
    benchmarks: SimpleNamespace, results_of: Callable[..., dict[str, Any]]
) -> None:
    found = results_of(benchmarks.encoder, *SMALL)["models"][MODEL]
    points = [(row["token_dropout"], row["patch_size"]) for row in found["active"]]
    assert points == [(r, p) for p in (16, 32, 56) for r in (0.0, 0.5, 0.75, 0.9)][1:]
    for row in found["active"]:
        assert row["turns"] == 6
        assert 0 < row["peak_memory"]["ours"] < 1
        assert row["speedup"]["median"] > 0
    memory = {(row["token_dropout"], row["patch_size"]): row["peak_memory"]["native"] for row in found["active"]}
    assert memory[0.5, 16] > memory[0.75, 16] > memory[0.9, 16]
    steps = [row["step"] for row in found["inactive"]]
    assert steps == [
        "train, forward + backward, batch 2",
        "train, forward + backward, batch 1",
        "eval, forward, batch 1",
    ]


def test_fronts_are_a_part_of_their_encoders(
    benchmarks: SimpleNamespace, results_of: Callable[..., dict[str, Any]]
) -> None:
    rows = results_of(benchmarks.breakdown, *SMALL)["breakdown"]
    assert [row["token_dropout"] for row in rows] == [0.75, 0.9]
    for row in rows:
        assert all(0 < row["front"][name]["median"] < 1 for name in ("ours", "timm", "native"))
        assert row["most_to_gain_over_timm"]["median"] > 0


def test_parts_are_compared_with_what_they_replace(
    benchmarks: SimpleNamespace, results_of: Callable[..., dict[str, Any]]
) -> None:
    found = results_of(benchmarks.parts, *SMALL)
    parts = [(row["part"], row["instead"]) for row in found["parts"] if row["part"] != "momentum update"]
    assert parts == [
        ("kept patches, channels last", "copying the views"),
        ("larger patches", "resampling the kernel"),
        ("larger patches", "views made smaller"),
        ("positions", "timm's interpolation"),
    ]
    assert all(row["times_ours"]["median"] > 0 for row in found["parts"])


@dataclass
class SimulatedLoader:
    """Workers that take ``seconds`` for a batch each, on a clock of its own."""

    num_workers: int
    seconds: float
    batch_size: int = 8
    now: float = 0.0

    def __iter__(self) -> Iterator[int]:
        ready: list[float] = []
        taken = [self.now] * self.num_workers * 2
        for number in range(10_000):
            free = ready[number - self.num_workers] if number >= self.num_workers else self.now
            ready.append(max(free, taken[number]) + self.seconds)
            self.now = max(self.now, ready[number])
            taken.append(self.now)
            yield number

    def train(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("workers", [1, 4, 15])
@pytest.mark.parametrize("of_step", [0.01, 0.5, 0.9, 1.5, 4.0])
def test_rates_are_those_of_a_steady_state_however_many_workers(
    benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, workers: int, of_step: float
) -> None:
    loader = SimulatedLoader(workers, 0.16)
    step = of_step * loader.seconds / workers
    monkeypatch.setattr(benchmarks.end_to_end.time, "perf_counter", lambda: loader.now)
    monkeypatch.setattr(benchmarks.end_to_end.seqcompress, "set_strategy", lambda *arguments: None)
    monkeypatch.setattr(benchmarks.end_to_end.Variant, "_train", lambda self, batch: loader.train(step))
    training = SimpleNamespace(student=None)
    steps = benchmarks.end_to_end.steps_of(6, workers)
    rates = benchmarks.end_to_end.Variant(training, Strategy(), loader, "simclr", CPU, steps).rates()
    assert rates["loader"] == pytest.approx(8 * workers / 0.16)
    assert rates["step"] == pytest.approx(8 / step)
    assert rates["together"] == pytest.approx(min(rates["loader"], rates["step"]), rel=0.03)


def test_the_step_by_itself_runs_on_views_of_its_own_strategy(
    benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Growing(SimulatedLoader):
        def __iter__(self) -> Iterator[int]:
            return iter([224] * self.num_workers + [112] * 1000)

    sides: list[int] = []
    monkeypatch.setattr(benchmarks.end_to_end.seqcompress, "set_strategy", lambda *arguments: None)
    monkeypatch.setattr(benchmarks.end_to_end.Variant, "_train", lambda self, batch: sides.append(batch))
    variant = benchmarks.end_to_end.Variant(
        SimpleNamespace(student=None), Strategy(), Growing(3, 0.16), "simclr", CPU, steps=9
    )
    variant.rates()
    assert sides[-9:] == [112] * 9


@pytest.mark.soak
def test_loader_and_step_are_measured_alone_and_together(tmp_path: Path) -> None:
    settings = ("--method", "simclr", "--steps", "1", "--images", "4", "--num-workers", "1")
    found = _results_of("end_to_end.py", *SMALL, *settings, folder=tmp_path)["end_to_end"]
    assert [(row["strategy"], row["views"]) for row in found] == [
        ("base", "full"),
        ("drop 0.75", "full"),
        ("patch 32", "full"),
        ("patch 32", "scaled"),
        ("drop 0.5, patch 32", "full"),
        ("drop 0.5, patch 32", "scaled"),
    ]
    assert found[0]["speedup"]["together"]["median"] == 1.0
    assert all(row["waiting"]["median"] < 1 for row in found)
