"""An online plan under Lightning: what measures is the module's own step, and the run must not notice."""

from __future__ import annotations

import copy
import csv
import gc
import importlib.util
import json
import re
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from seqcompress import Schedule, Strategy, compress
from seqcompress.adapters.lightly import accelerate
from seqcompress.gradients import online
from seqcompress.presets import PRESETS
from seqcompress.schedules import Constant, Online, Stepwise

PRESET = Stepwise({0.0: Strategy(0.75), 0.5: Strategy(0.5), 0.75: Strategy()})
MUCH = Online(PRESET, compute_share=1.0, time_share=None)  # a decision every twenty steps or so

SHORTENED = [5] * 20 + [9] * 10 + [17] * 10  # the preset's tokens in 40 steps

Build = Callable[..., Any]


def loader(batches: int) -> DataLoader[Any]:
    pixels = torch.randn(4 * batches, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(pixels), batch_size=4)


@pytest.fixture
def make_busy(make_pair: Build) -> Build:
    """A pair whose step does all that a step may do: it logs, draws, and keeps a queue, statistics and a teacher."""

    def build(plan: Any) -> Any:
        module = make_pair()
        module.norm = nn.BatchNorm1d(32)
        module.register_buffer("queue", torch.zeros(8, 32))
        module.best = None
        step = module.training_step

        def training_step(batch: list[Tensor], batch_idx: int) -> Tensor:
            noisy = batch[0] + 0.1 * torch.randn_like(batch[0])
            loss: Tensor = step([noisy], batch_idx)
            features = module.norm(module.backbone(noisy))
            module.queue = torch.cat((module.queue[4:], features.detach()))
            loss = loss + 0.1 * (features @ module.queue.T).square().mean()
            module.best = loss.item() if module.best is None else min(module.best, loss.item())
            module.log("own_loss", loss, on_step=True, on_epoch=True)
            module.log_dict({"own_steps": float(len(module.losses)), "own_best": module.best})
            if module.logger is not None:
                module.logger.log_metrics({"own_direct": float(batch_idx)}, step=module.global_step)
            return loss

        module.training_step = training_step
        return accelerate(module, plan)

    return build


@pytest.fixture
def always_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the best of the others, however little speaks for it."""
    monkeypatch.setattr(online, "_CONFIDENCE", 0.0)


def columns(folder: str | Path) -> dict[str, list[float]]:
    with (Path(folder) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def same(first: Any, second: Any) -> bool:
    """Whether weights, optimizers and lists of two modules are the same to the last bit."""
    momenta = [
        [state["momentum_buffer"] for state in module.optimizers().optimizer.state.values()]
        for module in (first, second)
    ]
    weights = [[*module.state_dict().values()] for module in (first, second)]
    return all(len(mine) == len(others) and all(map(torch.equal, mine, others)) for mine, others in (momenta, weights))


def test_measuring_leaves_no_trace_in_a_run_and_its_log(
    pl: Any, make_busy: Build, make_trainer: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "_CONFIDENCE", 2.0)  # never moves
    runs = []
    for name, plan in (("online", MUCH), ("plain", PRESET)):
        module = make_busy(plan)
        logger = pl.loggers.CSVLogger(tmp_path, name=name)
        trainer = make_trainer(max_epochs=5, logger=logger, log_every_n_steps=1)
        trainer.fit(module, loader(8), loader(1))
        runs.append((module, columns(trainer.log_dir), torch.get_rng_state()))
    (measured, log, state), (plain, plain_log, plain_state) = runs
    assert log.pop("seqcompress/online_decisions")[-1] >= 1
    assert same(measured, plain)
    assert torch.equal(state, plain_state)
    assert (measured.losses, measured.tokens, measured.best) == (plain.losses, plain.tokens, plain.best)
    assert {name: log[name] for name in plain_log} == plain_log
    assert len(log["own_loss_step"]) == len(log["own_direct"]) == 40
    assert sorted(log.keys() - plain_log.keys()) == [
        f"seqcompress/online_{name}" for name in ("ca_mse", "moves", "share_of_time")
    ]


@pytest.mark.parametrize("way", ["replaced", "taken out", "written in"])
def test_what_is_measured_is_the_batch_that_the_step_was_given(
    make_pair: Build, make_trainer: Build, tmp_path: Path, told: list[str], way: str
) -> None:
    module, seen = make_pair(), tmp_path / "seen.txt"  # a file, as lists are put back
    step = module.training_step

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if way == "written in":
            views = batch["views"].mul_(0.5)
        elif way == "replaced":
            views = batch["views"] = 0.5 * batch["views"]
        else:
            views = 0.5 * batch.pop("views")
        with seen.open("a") as file:
            print(views.std().item(), file=file)
        return step([views], batch_idx)

    module.training_step = training_step
    pixels = torch.randn(8, 4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    batches = DataLoader([{"views": views} for views in pixels], batch_size=None, collate_fn=copy.deepcopy)
    trainer = make_trainer(max_epochs=5)
    trainer.fit(accelerate(module, MUCH), batches)
    runs = [float(line) for line in seen.read_text().splitlines()]
    assert set(runs) == {(0.5 * views).std().item() for views in pixels}
    reason = (
        "cannot be measured, and goes on with its preset: its training_step changes the tensors of its batch in place"
    )
    assert len([line for line in told if reason in line]) == (way == "written in")
    assert (trainer.callback_metrics["seqcompress/online_decisions"] >= 1) == (way != "written in")
    assert (len(runs) > 40) == (way != "written in")


@pytest.mark.usefixtures("always_moves")
def test_what_is_found_is_followed_and_kept_as_a_plan_for_the_next_run(
    pl: Any, make_pair: Build, make_trainer: Build, told: list[str], tmp_path: Path
) -> None:
    module = accelerate(make_pair(), MUCH)
    trainer = make_trainer(max_epochs=5, logger=pl.loggers.CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(module, loader(8))
    file = Path(trainer.log_dir) / "seqcompress_schedule.json"
    found = Schedule.from_json(file)
    lengths = [1 + round((1 - found.at_step(step, 40).token_dropout) * 16 / scaled(found, step)) for step in range(40)]
    assert module.tokens == lengths
    assert found != PRESET
    assert found.at_step(0, 40) == Strategy(0.75)  # the preset, until it moves
    assert [found.at_step(step, 40) for step in range(30, 40)] == [Strategy()] * 10  # the preset's end, at any rate
    moves = [line for line in told if re.search(r"step \d+: .* -> ", line)]
    log = columns(trainer.log_dir)
    assert len(moves) == log["seqcompress/online_moves"][-1] == log["seqcompress/online_decisions"][-1] >= 1
    assert told[-1].startswith(f"seqcompress: backbone: the run decided {len(moves)} time")
    assert str(file) in told[-1]

    following = accelerate(make_pair(), file)
    make_trainer(max_epochs=5).fit(following, loader(8))
    assert following.tokens == module.tokens


def scaled(schedule: Schedule, step: int) -> float:
    return ((schedule.at_step(step, 40).patch_size or 8) / 8) ** 2


@pytest.mark.usefixtures("always_moves")
def test_a_resumed_run_is_the_run_that_never_stopped(
    pl: Any, make_busy: Build, make_trainer: Build, tmp_path: Path
) -> None:
    def begin() -> Any:
        module = make_busy(MUCH)
        module.on_train_batch_start = lambda *_: torch.manual_seed(module.global_step) and None
        return module

    whole = begin()
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    make_trainer(max_epochs=20, enable_checkpointing=True, callbacks=[saving]).fit(whole, loader(2))
    first = Schedule.from_json(tmp_path / "seqcompress_schedule.json")
    states = {stop: saved_state(pl, tmp_path / f"step={stop}.ckpt") for stop in range(2, 30, 2)}
    stop = next(stop for stop, state in states.items() if json.loads(state["events"]))  # within a decision

    torch.manual_seed(1234)
    resumed = begin()
    resumed.queue += 1.0
    make_trainer(max_epochs=20).fit(resumed, loader(2), ckpt_path=str(tmp_path / f"step={stop}.ckpt"))
    assert Schedule.from_json(tmp_path / "seqcompress_schedule.json") == first
    assert len(first.stages) > 2  # type: ignore[attr-defined]
    assert resumed.losses == whole.losses[stop:]
    assert same(resumed, whole)


def saved_state(pl: Any, file: Path) -> dict[str, Any]:
    callbacks = torch.load(file, weights_only=True)["callbacks"]
    return next(state["online"] for state in callbacks.values() if "online" in state)


def by_hand(module: Any) -> None:
    module.automatic_optimization, module.manual_steps = False, 1


def with_an_iterator(module: Any) -> None:
    module.draws, step = iter(range(10**6)), module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) + 0.0 * next(module.draws)


def with_a_count_out_of_reach(module: Any) -> None:
    calls: SimpleQueue[int] = SimpleQueue()
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        calls.put(1)
        return step(batch, batch_idx) * (1.0 + calls.qsize())  # type: ignore[no-any-return]

    module.training_step = training_step


def without_gradient(module: Any) -> None:
    def configure_optimizers() -> Any:
        return torch.optim.SGD(module.head.parameters(), lr=0.1)

    module.head = nn.Linear(1, 1)
    step = module.training_step
    module.backbone.requires_grad_(False)
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) + module.head(torch.ones(1, 1)).sum()
    module.configure_optimizers = configure_optimizers


@pytest.mark.parametrize(
    ("change", "tokens", "reason"),
    [
        (by_hand, SHORTENED, "its training_step optimizes by hand"),
        (with_an_iterator, SHORTENED, "measuring has changed what it cannot put back: module.draws"),
        (with_a_count_out_of_reach, SHORTENED, "step is not reproducible"),
        (without_gradient, [17] * 40, "must have parameters that require grad, got none"),
    ],
)
def test_where_a_step_cannot_be_measured_the_preset_goes_on_and_one_line_says_why(
    make_pair: Build,
    make_trainer: Build,
    told: list[str],
    change: Callable[[Any], None],
    tokens: list[int],
    reason: str,
) -> None:
    module = accelerate(make_pair(), MUCH)
    change(module)
    make_trainer(max_epochs=5).fit(module, loader(8))
    assert module.tokens == tokens
    lines = [line for line in told if "cannot be measured, and goes on with its preset" in line]
    assert len(lines) == 1
    assert reason in lines[0]
    assert "\n" not in lines[0]


def test_by_default_a_run_that_is_too_short_is_the_preset_and_says_so(
    make_pair: Build, make_trainer: Build, told: list[str], tmp_path: Path
) -> None:
    module = accelerate(make_pair(), "online")
    make_trainer(max_epochs=5).fit(module, loader(4))
    assert module.tokens == [3] * 19 + [17]
    assert "in at most 3% of the compute of training and at most 3% of its time" in told[0]
    assert "the run was too short for a decision; measuring took 0.0% of the time of training" in told[-1]
    assert Schedule.from_json(tmp_path / "seqcompress_schedule.json") == PRESETS["default"](16)


def test_a_folder_that_cannot_be_made_ends_no_run_and_is_told_of_once(
    make_pair: Build, make_trainer: Build, tmp_path: Path, told: list[str]
) -> None:
    (tmp_path / "file").write_text("where the run's folder should be")
    trainer = make_trainer(max_epochs=1, default_root_dir=tmp_path / "file" / "run")
    trainer.fit(accelerate(make_pair(), "online"), loader(4))
    assert trainer.global_step == 4
    assert sum("could not write the schedule: NotADirectoryError" in line for line in told) == 1
    assert "is a plan for the next" not in told[-1]


def test_encoders_that_were_compressed_apart_follow_their_presets(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    module = make_pair()
    compress(module.backbone, MUCH)
    compress(module.backbone_momentum, MUCH, when="train")
    make_trainer(max_epochs=5).fit(module, loader(8))
    assert module.tokens == module.teacher_tokens == SHORTENED
    assert sum("compressed apart" in line for line in told) == 1


def test_with_accumulated_gradients_one_batch_of_every_step_is_measured(
    make_busy: Build, make_trainer: Build, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "_CONFIDENCE", 2.0)
    modules = []
    for plan in (MUCH, PRESET):
        module = make_busy(plan)
        trainer = make_trainer(max_epochs=5, accumulate_grad_batches=2)
        trainer.fit(module, loader(12))
        modules.append(module)
    assert trainer.global_step == 30
    assert any("the run decided" in line for line in told)
    assert same(*modules)
    assert modules[0].losses == modules[1].losses


def test_a_preset_of_the_base_alone_says_that_it_is_measured(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    module = accelerate(make_pair(), Online(Constant(Strategy())))
    make_trainer(max_epochs=1).fit(module, loader(2))
    assert told[0] == (
        "seqcompress: backbone: trains at base (17 tokens a view); this is a preset, until gradient error is measured "
        "to be less elsewhere, in at most 3% of the compute of training and at most 3% of its time"
    )


@pytest.mark.soak
def test_a_teacher_that_the_step_makes_anew_is_measured_in_the_place_of_the_old_one_which_is_let_go(
    make_pair: Build, make_trainer: Build, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "_CONFIDENCE", 2.0)
    preset = Stepwise({0.0: Strategy(0.75, 16), 0.5: Strategy(0.5), 0.9: Strategy()})
    ends, teachers = [], weakref.WeakSet[Any]()
    for plan in (Online(preset, 1.0, None), preset):
        module = accelerate(make_pair(), plan)
        step = module.training_step

        def training_step(batch: Any, batch_idx: int, module: Any = module, step: Build = step) -> Tensor:
            if module.global_step > 0 and module.global_step % 6 == 0:  # as Lightly's SMoG does
                module.backbone_momentum = copy.deepcopy(module.backbone).requires_grad_(False)
                teachers.add(module.backbone_momentum)
            return step(batch, batch_idx)

        module.training_step = training_step
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(max_epochs=10).fit(module, loader(8))
        assert not [warning for warning in caught if "by what this script says" in str(warning.message)]
        ends.append(module)
    assert sum(" stay at " in line for line in told) == 2
    assert not [line for line in told if "cannot be measured" in line]
    assert same(*ends)
    gc.collect()
    assert set(teachers) == {module.backbone_momentum for module in ends}


@pytest.mark.parametrize("how", ["group", "schedule"])
def test_a_learning_rate_that_the_step_itself_changes_is_put_back(
    make_busy: Build, make_trainer: Build, told: list[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(online, "_CONFIDENCE", 2.0)
    ends = []
    for plan in (MUCH, PRESET):
        module = make_busy(plan)
        configure, step = module.configure_optimizers, module.training_step

        def configure_optimizers(configure: Build = configure) -> Any:
            optimizer = configure()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)]

        def training_step(batch: Any, batch_idx: int, module: Any = module, step: Build = step) -> Tensor:
            if how == "schedule":
                module.lr_schedulers().step()
            else:
                module.optimizers().param_groups[0]["lr"] *= 0.99
            return step(batch, batch_idx)  # type: ignore[no-any-return]

        module.configure_optimizers, module.training_step = configure_optimizers, training_step
        make_trainer(max_epochs=5).fit(module, loader(8))
        ends.append((module.optimizers().param_groups[0]["lr"], module.lr_schedulers().last_epoch, module))
    assert any("the run decided" in line for line in told)
    assert ends[0][0] == ends[1][0] == pytest.approx(0.05 * 0.99**45)
    assert ends[0][1] == ends[1][1]
    assert same(ends[0][2], ends[1][2])


DISTRIBUTED = """
import json, sys
import {package} as pl
import torch
from pathlib import Path
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset
from seqcompress import Stepwise, Strategy, accelerate
from seqcompress.gradients import online
from seqcompress.schedules import Online

online._CONFIDENCE = 0.0

class Alone(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
        self.tokens, self.seen = [], []
        self.vit.blocks[0].register_forward_pre_hook(lambda block, args: self.tokens.append(args[0].shape[1]))

    def training_step(self, batch, batch_idx):
        loss = self.vit(batch[0])[:, 0].sin().square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.vit.parameters(), lr=1e-2)

pl.seed_everything(0, verbose=False)
module = accelerate(Alone(), Online(Stepwise({{0.0: Strategy(0.75), 0.9: Strategy()}}), 1.0, None))
trainer = pl.Trainer(
    strategy="ddp", accelerator="cpu", devices=2, max_epochs=4, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
)
images = torch.randn(160, 3, 32, 32, generator=torch.Generator().manual_seed(1))
trainer.fit(module, DataLoader(TensorDataset(images), batch_size=4))
weights = [float(value.detach().double().sum()) for value in module.parameters()]
numbers = {{name: float(value) for name, value in trainer.callback_metrics.items() if "online" in name}}
numbers.pop("seqcompress/online_share_of_time")
Path(sys.argv[1], f"{{trainer.global_rank}}.json").write_text(json.dumps([module.tokens, weights, numbers]))
"""


@pytest.mark.parametrize("package", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.soak)])
def test_two_ranks_measure_and_move_together(package: str, tmp_path: Path, run_ranks: Callable[..., list[str]]) -> None:
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED.format(package=package))
    run_ranks([sys.executable, script, tmp_path], cwd=tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    tokens, _, numbers = first
    assert len(tokens) == 80
    assert numbers["seqcompress/online_moves"] >= 1
    assert len(set(tokens[:72])) > 1
    assert tokens[72:] == [17] * 8
    found = Schedule.from_json(tmp_path / "seqcompress_schedule.json")
    assert len(found.stages) == numbers["seqcompress/online_moves"] + 2  # type: ignore[attr-defined]


# Lightly's parts

PARTS = Path(__file__).with_name("test_lightly.py")
_spec = importlib.util.spec_from_file_location("lightlys_parts", PARTS)
assert _spec is not None
assert _spec.loader is not None
parts = importlib.util.module_from_spec(_spec)
sys.modules["lightlys_parts"] = parts
_spec.loader.exec_module(parts)

SOON = Online(Constant(Strategy()), 1.0, None)  # the base and one neighbour: a decision in ten steps


@pytest.mark.parametrize("kind", [parts.SimCLR, parts.MoCo, parts.DINO, parts.BenchmarkDINO])
def test_lightlys_methods_are_measured_and_do_not_notice(
    pl: Any, kind: Any, make_trainer: Build, tiny_vit: Build, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.method = kind(tiny_vit(dynamic_img_size=True, global_pool="avg"))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            views = [view + 0.1 * torch.randn_like(view) for view in batch]
            loss: Tensor = self.method.loss(views)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    monkeypatch.setattr(online, "_CONFIDENCE", 2.0)
    views = parts.crops(32, 32, 16, 16, batch=32)
    data = DataLoader(TensorDataset(*views), batch_size=8)
    modules = []
    for plan in (SOON, Strategy()):
        torch.manual_seed(1)
        module = accelerate(Module(), plan)
        make_trainer(max_epochs=5).fit(module, data)
        modules.append(module)
    assert not [line for line in told if "cannot be measured" in line]
    assert sum("stay at base" in line for line in told) >= 1
    assert same(*modules)
