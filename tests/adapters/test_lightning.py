"""The Lightning callback, under the Trainers of both packages."""

from __future__ import annotations

import csv
import importlib
import math
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset

from seqcompress import Strategy, compress, get_strategy, relative_cost, restore
from seqcompress.adapters import trainer_metrics
from seqcompress.adapters.lightly import accelerate
from seqcompress.adapters.lightning import SequenceCompression
from seqcompress.schedules import Constant, Linear, Schedule, Stepwise

RELAXING = Linear(Strategy(0.75), Strategy())
TOKENS_OF_8_STEPS = [5, 7, 8, 9, 11, 13, 14, 17]  # 1 + round(4 + 1.5 * step), and the end's
STAGES = Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy(0.5)})

Build = Callable[..., Any]
Images = DataLoader[Any]


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request: pytest.FixtureRequest) -> Any:
    """One Lightning package after the other, not only in the soak."""
    return importlib.import_module(request.param)


def our_callbacks(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.callbacks if type(callback).__name__ == "SequenceCompressionCallback"]


def metrics(folder: str) -> dict[str, list[float]]:
    """The columns of a CSVLogger, without the rows that are empty there."""
    with (Path(folder) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_every_trainer_has_the_callback_once_and_of_its_own_package(pl: Any, make_trainer: Build) -> None:
    (callback,) = our_callbacks(make_trainer())
    assert isinstance(callback, pl.Callback)


def test_plain_modules_train_as_without_the_callback(make_pair: Build, make_trainer: Build, images: Images) -> None:
    ends = []
    for with_callback in (True, False):
        module, trainer = make_pair(), make_trainer()
        if not with_callback:
            trainer.callbacks.remove(our_callbacks(trainer)[0])
        trainer.fit(module, images)
        assert not [name for name in trainer.callback_metrics if "seqcompress" in name]
        ends.append((module.losses, module.state_dict(), torch.get_rng_state()))
    (losses, weights, state), (other_losses, other_weights, other_state) = ends
    assert losses == other_losses
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())
    assert torch.equal(state, other_state)


def test_checkpoints_of_plain_modules_hold_nothing_of_the_callback(
    make_pair: Build, make_trainer: Build, images: Images, tmp_path: Path
) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make_pair(), images)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert not torch.load(tmp_path / "plain.ckpt", weights_only=True)["callbacks"]


@pytest.mark.parametrize("package", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.soak)])
def test_making_a_trainer_imports_neither_timm_nor_the_compressors(package: str, tmp_path: Path) -> None:
    script = f"""
import sys
from {package} import Trainer
trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
print([type(callback).__name__ for callback in trainer.callbacks])
print([name for name in sys.modules if name.partition(".")[0] == "timm" or name == "seqcompress.compression"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    callbacks, imported = done.stdout.splitlines()[-2:]
    assert "SequenceCompressionCallback" in callbacks
    assert imported == "[]"


def test_every_step_has_the_tokens_of_the_schedule(make_pair: Build, make_trainer: Build, images: Images) -> None:
    module = accelerate(make_pair(), RELAXING)
    make_trainer(max_epochs=2).fit(module, images)
    assert module.tokens == TOKENS_OF_8_STEPS
    assert module.teacher_tokens == [17] * 8


def test_validation_sees_every_token(make_pair: Build, make_trainer: Build, images: Images) -> None:
    module = accelerate(make_pair(), RELAXING)
    make_trainer(max_epochs=2).fit(module, images, images)
    assert module.validation_tokens == [17] * (2 + 8)  # sanity check, two epochs
    assert module.tokens == TOKENS_OF_8_STEPS


def test_accumulated_batches_of_one_step_share_its_strategy(
    make_pair: Build, make_trainer: Build, images: Images
) -> None:
    module = accelerate(make_pair(), RELAXING)
    make_trainer(max_epochs=4, accumulate_grad_batches=2).fit(module, images)
    assert module.tokens == [tokens for tokens in TOKENS_OF_8_STEPS for _ in range(2)]


def test_max_steps_is_the_length_of_the_schedule_where_it_ends_the_run(
    make_pair: Build, make_trainer: Build, images: Images
) -> None:
    module = accelerate(make_pair(), RELAXING)
    make_trainer(max_epochs=-1, max_steps=8).fit(module, images)
    assert module.tokens == TOKENS_OF_8_STEPS


def test_a_schedule_that_has_been_run_to_its_end_leaves_the_encoder_plain(
    make_pair: Build, make_trainer: Build, images: Images
) -> None:
    module = accelerate(make_pair(), Stepwise({0.0: Strategy(0.75), 0.5: Strategy(0.25)}))
    make_trainer().fit(module, images)
    assert module.tokens == [5] * 4 + [13] * 4
    assert get_strategy(module) == Strategy()


def test_what_each_step_ran_at_and_has_cost_goes_to_the_logger(
    pl: Any, make_pair: Build, make_trainer: Build, images: Images, tmp_path: Path
) -> None:
    module = accelerate(make_pair(), STAGES)
    logger = pl.loggers.CSVLogger(tmp_path)
    make_trainer(logger=logger, log_every_n_steps=1).fit(module, images)

    vit, views = module.backbone, 4
    early = views * (3 * relative_cost(vit, Strategy(0.5, 16), 32) + relative_cost(vit, Strategy(0, 16), 32))
    late = views * (3 * relative_cost(vit, Strategy(0.5), 32) + 1)
    spent = [early * step for step in (1, 2, 3, 4)] + [early * 4 + late * step for step in (1, 2, 3, 4)]
    logged = metrics(logger.log_dir)
    assert logged["seqcompress/token_dropout"] == [0.5] * 8
    assert logged["seqcompress/patch_size"] == [16] * 4 + [8] * 4
    assert logged["seqcompress/tokens"] == [3] * 4 + [9] * 4
    assert logged["seqcompress/budget"] == pytest.approx([units / 1e6 for units in spent], rel=1e-6)


def test_an_uncompressed_step_costs_three_units_a_student_view_and_one_a_teacher_view(
    make_pair: Build, make_trainer: Build, images: Images
) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(accelerate(make_pair(), Strategy()), images, images)
    assert trainer.callback_metrics["seqcompress/budget"].item() * 1e6 == pytest.approx(16 * (3 + 1), rel=1e-6)


def test_the_progress_bar_shows_strategy_tokens_and_budget(
    make_pair: Build, make_trainer: Build, images: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(max_epochs=1, enable_progress_bar=True)
    module = accelerate(make_pair(), Strategy(0.5))
    trainer.fit(module, images)
    vit = module.backbone
    shown = {
        "seq_drop": 0.5,
        "seq_patch": 8,
        "seq_tokens": 9,
        "seq_budget": 16 * (3 * relative_cost(vit, Strategy(0.5), 32) + 1) / 1e6,
    }
    assert trainer.progress_bar_metrics == pytest.approx(shown, rel=1e-6)
    printed = capsys.readouterr()
    assert re.search(r"seq_tokens[:=]\s*9\.0", printed.out + printed.err)


def test_the_numbers_of_a_step_stand_beside_what_else_is_logged_at_it(
    pl: Any, make_pair: Build, make_trainer: Build, images: Images, tmp_path: Path
) -> None:
    module, logger = accelerate(make_pair(), RELAXING), pl.loggers.CSVLogger(tmp_path)
    module.on_train_batch_end = lambda *_: module.log("loss", torch.tensor(module.losses[-1]))
    make_trainer(logger=logger, log_every_n_steps=3).fit(module, images)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [
            (int(row["step"]), row["loss"] and float(row["loss"]), float(row["seqcompress/tokens"]))
            for row in csv.DictReader(file)
        ]
    assert rows == [
        *((step, pytest.approx(module.losses[step]), TOKENS_OF_8_STEPS[step]) for step in (2, 5)),
        (7, "", TOKENS_OF_8_STEPS[7]),  # how it ended: not a step to be logged, so nothing else is there
    ]


def test_a_trainer_that_logs_nothing_logs_nothing_at_the_end(
    pl: Any, make_pair: Build, make_trainer: Build, images: Images, tmp_path: Path
) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = make_trainer(logger=logger, log_every_n_steps=0)
    trainer.fit(accelerate(make_pair(), RELAXING), images)
    assert logger.experiment.metrics == []
    assert not (Path(logger.log_dir) / "metrics.csv").exists()
    assert trainer.callback_metrics["seqcompress/tokens"] == TOKENS_OF_8_STEPS[-1]


def test_a_step_that_is_logged_since_training_is_stopped_has_its_own_numbers(
    pl: Any, make_pair: Build, make_trainer: Build, images: Images, tmp_path: Path
) -> None:
    module, logger = accelerate(make_pair(), RELAXING), pl.loggers.CSVLogger(tmp_path)
    trainer = make_trainer(logger=logger, log_every_n_steps=3)

    def log_and_stop(*_: Any) -> None:
        module.log("loss", torch.tensor(module.losses[-1]))
        trainer.should_stop = len(module.losses) == 7

    module.on_train_batch_end = log_and_stop
    trainer.fit(module, images)
    logged = metrics(logger.log_dir)
    assert logged["loss"] == pytest.approx([module.losses[step] for step in (2, 5, 6)])
    assert logged["seqcompress/tokens"] == [TOKENS_OF_8_STEPS[step] for step in (2, 5, 6)]
    budget = float(trainer.callback_metrics["seqcompress/budget"])
    assert logged["seqcompress/budget"][-1] == pytest.approx(budget, rel=1e-6)


class UsedOfTorch(TorchFunctionMode):
    """Notes every function of torch that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_that_is_neither_logged_nor_ends_an_epoch_makes_no_tensor(
    make_pair: Build, make_trainer: Build, images: Images
) -> None:
    module = accelerate(make_pair(), RELAXING)
    trainer = make_trainer(log_every_n_steps=3)
    (callback,) = our_callbacks(trainer)
    made: list[list[str]] = []

    def noting(hook: Any) -> Any:
        def noted(*args: Any) -> None:
            with UsedOfTorch() as used:
                hook(*args)
            made.append(used.names)

        return noted

    for name in ("on_train_batch_start", "on_after_backward", "on_train_batch_end"):
        setattr(callback, name, noting(getattr(callback, name)))
    trainer.fit(module, images)
    (start, backward, end) = (made[hook::3] for hook in range(3))
    assert start[1:] == backward[1:] == [[]] * 7  # at the first step, the encoders are looked for
    assert [step for step, names in enumerate(end) if names] == [2, 3, 5, 7]
    assert all("tensor" in end[step] for step in (2, 3, 5, 7))


def test_logging_makes_no_tensor_on_the_device(make_pair: Build, make_trainer: Build, images: Images) -> None:
    module = accelerate(make_pair(), Strategy(0.5))
    logged: list[tuple[str, Any]] = []
    module.log = lambda name, value, **_: logged.append((name, value))
    make_trainer(log_every_n_steps=1).fit(module, images)
    assert [name.partition("/")[2] for name, _ in logged] == ["token_dropout", "patch_size", "tokens", "budget"] * 8
    # Of a number, Lightning would make a tensor on the module's device.
    assert all(isinstance(value, Tensor) and value.device.type == "cpu" for _, value in logged)


def test_what_runs_at_validation_and_at_the_end_of_an_epoch_sees_the_latest_numbers(
    pl: Any, make_pair: Build, make_trainer: Build, images: Images
) -> None:
    class Watching(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[str, float]] = []

        def see(self, trainer: Any, when: str) -> None:
            if not trainer.sanity_checking:
                self.seen.append((when, float(trainer.callback_metrics["seqcompress/tokens"])))

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.see(trainer, "validation")

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.see(trainer, "epoch")

    watching = Watching()
    module = accelerate(make_pair(), RELAXING)
    make_trainer(callbacks=[watching], max_epochs=None, max_steps=7, val_check_interval=2).fit(module, images, images)
    steps = [("validation", 1), ("validation", 3), ("epoch", 3), ("validation", 5), ("epoch", 6)]
    assert watching.seen == [(when, module.tokens[step]) for when, step in steps]


@pytest.mark.parametrize(("seconds", "shown"), [(0, TOKENS_OF_8_STEPS), (math.inf, [5, 5, 5, 9, 9, 9, 9, 17])])
def test_the_progress_bar_has_numbers_from_the_first_step_and_new_ones_after_a_while(
    make_pair: Build, make_trainer: Build, images: Images, monkeypatch: Any, seconds: float, shown: list[int]
) -> None:
    monkeypatch.setattr(trainer_metrics, "_SECONDS_SHOWN", seconds)
    module, trainer = accelerate(make_pair(), RELAXING), make_trainer(enable_progress_bar=True)
    seen: list[float] = []
    module.on_train_batch_end = lambda *_: seen.append(trainer.progress_bar_metrics["seq_tokens"])
    trainer.fit(module, images)
    assert seen == shown


@pytest.mark.parametrize("schedule", [STAGES, Linear(Strategy(0.75), Strategy(0.25))], ids=["stages", "linear"])
@pytest.mark.parametrize("stop", [3, 6], ids=["within an epoch", "in the second stage"])
def test_a_resumed_run_is_the_run_that_never_stopped(
    pl: Any, make_pair: Build, make_trainer: Build, images: Images, tmp_path: Path, schedule: Schedule, stop: int
) -> None:
    whole = accelerate(make_pair(), schedule)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = make_trainer(enable_checkpointing=True, callbacks=[saving])
    first.fit(whole, images)

    torch.manual_seed(1234)  # another process begins with another random state
    resumed = accelerate(make_pair(), schedule)
    torch.manual_seed(5678)
    second = make_trainer()
    second.fit(resumed, images, ckpt_path=str(tmp_path / f"step={stop}.ckpt"))

    assert resumed.tokens == whole.tokens[stop:]
    assert resumed.losses == whole.losses[stop:]
    assert all(torch.equal(weight, whole.state_dict()[name]) for name, weight in resumed.state_dict().items())
    budget = "seqcompress/budget"
    assert second.callback_metrics[budget].item() == pytest.approx(first.callback_metrics[budget].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 10**400), ("seed", -1), ("seed", 1.5), ("units", 1e299), ("units", math.nan), ("progress", 2),
     ("progress", "0.5"), ("batches", 0), ("batches", True)],
)  # fmt: skip
def test_numbers_of_a_checkpoint_that_no_run_can_go_on_with_are_one_error(
    make_pair: Build, make_trainer: Build, images: Images, tmp_path: Path, name: str, value: Any
) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(accelerate(make_pair(), RELAXING), images)
    (callback,) = our_callbacks(trainer)
    before = callback.state_dict()
    with pytest.raises(ValueError, match=f"callback must have a number from .* as '{name}', got"):
        callback.load_state_dict({**before, name: value})
    with pytest.raises(ValueError, match="must be a mapping, got None"):
        callback.load_state_dict(None)
    assert callback.state_dict() == before
    callback.load_state_dict(before)


def test_other_seeds_drop_other_tokens(make_pair: Build, make_trainer: Build, images: Images) -> None:
    losses = []
    for seed in (5, 5, 6):
        module = accelerate(make_pair(), Strategy(0.75))
        torch.manual_seed(seed)
        make_trainer(max_epochs=1).fit(module, images)
        losses.append(module.losses)
    assert losses[0] == losses[1]
    assert all(loss != other for loss, other in zip(losses[0], losses[2], strict=True))


def test_a_compressed_checkpoint_loads_into_a_plain_model(
    make_pair: Build, make_trainer: Build, images: Images, tmp_path: Path, tiny_vit: Build
) -> None:
    module = accelerate(make_pair(), Strategy(0.5, 16))
    trainer = make_trainer()
    trainer.fit(module, images)
    trainer.save_checkpoint(tmp_path / "compressed.ckpt")
    saved = torch.load(tmp_path / "compressed.ckpt", weights_only=True)["state_dict"]
    make_pair().load_state_dict(saved, strict=True)
    plain = tiny_vit(global_pool="avg")
    plain.load_state_dict({name[9:]: value for name, value in saved.items() if name.startswith("backbone.")})
    views = images.dataset[:4][0]
    assert torch.equal(plain.eval()(views), module.backbone.eval()(views))


def test_a_trainer_goes_on_counting_in_a_second_fit(make_pair: Build, make_trainer: Build, images: Images) -> None:
    module, trainer = accelerate(make_pair(), Strategy()), make_trainer(max_epochs=1)
    trainer.fit(module, images)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, images)
    assert trainer.callback_metrics["seqcompress/budget"].item() * 1e6 == pytest.approx(2 * 16 * 4, rel=1e-6)


def test_an_interrupted_fit_leaves_nothing_to_the_next_module(
    make_pair: Build, make_trainer: Build, images: Images
) -> None:
    class StopError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StopError

    broken = accelerate(make_pair(), Strategy(0.5))
    broken.on_train_batch_end = stop
    trainer = make_trainer(max_epochs=1)
    with pytest.raises(StopError):
        trainer.fit(broken, images)
    plain = make_pair()
    trainer.fit(plain, images)
    assert set(plain.tokens) == {17}
    assert not [name for name in trainer.callback_metrics if "seqcompress" in name]


class Endless(IterableDataset[Tensor]):
    """Images without end."""

    def __iter__(self) -> Any:
        while True:
            yield (torch.zeros(3, 32, 32),)


@pytest.mark.parametrize(
    ("limits", "loader"),
    [
        ({"max_epochs": -1}, "images"),
        ({"max_epochs": 1}, DataLoader(Endless(), batch_size=4)),
    ],
    ids=["no limit", "epochs without a length"],
)
def test_a_run_of_unknown_length_is_refused(
    make_pair: Build, make_trainer: Build, images: Images, limits: dict[str, int], loader: Any
) -> None:
    module = accelerate(make_pair(), RELAXING)
    with pytest.raises(ValueError, match="set max_epochs, max_steps or max_time of the Trainer"):
        make_trainer(**limits).fit(module, images if loader == "images" else loader)
    assert module.tokens == []


def test_a_loader_without_length_does_with_max_steps(make_pair: Build, make_trainer: Build) -> None:
    module = accelerate(make_pair(), RELAXING)
    make_trainer(max_epochs=None, max_steps=8).fit(module, DataLoader(Endless(), batch_size=4))
    assert module.tokens == TOKENS_OF_8_STEPS


@pytest.mark.parametrize("steps", [1, 2], ids=["one optimizer step a batch", "two optimizer steps a batch"])
def test_manual_optimization_follows_the_schedule(
    make_pair: Build, make_trainer: Build, images: Images, steps: int
) -> None:
    module = accelerate(make_pair(manual_steps=steps), RELAXING)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, images)
    assert trainer.global_step == 8 * steps
    assert module.tokens == TOKENS_OF_8_STEPS
    assert get_strategy(module) == Strategy()


def test_the_last_batch_of_several_optimizers_is_at_the_end_of_the_schedule(
    make_pair: Build, make_trainer: Build, images: Images
) -> None:
    module = accelerate(make_pair(manual_steps=2), RELAXING)  # 8 batches
    make_trainer(max_epochs=-1, max_steps=16).fit(module, images)
    assert len(module.tokens) == 8
    assert (module.tokens[0], module.tokens[-1]) == (TOKENS_OF_8_STEPS[0], 17)


def test_mixed_precision_follows_the_schedule(make_pair: Build, make_trainer: Build, images: Images) -> None:
    module = accelerate(make_pair(), Linear(Strategy(0.75, 16), Strategy()))
    trainer = make_trainer(precision="bf16-mixed")
    trainer.fit(module, images)
    assert module.tokens == [2, 2, 3, 3, *TOKENS_OF_8_STEPS[4:]]  # 4 patches of 16 px, then 16 of 8 px
    assert module.losses[-1] < module.losses[0]


def test_encoders_outside_of_a_pair_are_driven_too(make_pair: Build, make_trainer: Build, images: Images) -> None:
    module = make_pair()
    compress(module.backbone, RELAXING)
    make_trainer().fit(module, images)
    assert module.tokens == TOKENS_OF_8_STEPS
    assert module.teacher_tokens == [17] * 8


DISTRIBUTED = """
import sys
import torch, timm
from torch.utils.data import DataLoader, TensorDataset
import {package} as pl
from seqcompress import Strategy, compress
from seqcompress.schedules import Linear


class Alone(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0
        )
        self.tokens, self.kept = [], []
        self.vit.blocks[0].register_forward_pre_hook(self.note)

    def note(self, block, args):
        self.tokens.append(args[0].shape[1])
        # Equal views at all places: tokens differ in their positions only.
        positions = torch.cdist(args[0][0, 1:], self.seen_positions())
        self.kept.append(sorted(positions.argmin(1).tolist()))

    def seen_positions(self):
        blank = self.vit.patch_embed.embed(torch.ones(1, 3, 32, 32))[0]
        return blank + self.vit.pos_embed[0, 1:]

    def training_step(self, batch, batch_idx):
        return self.vit(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.vit.parameters(), lr=1e-3)

pl.seed_everything(0, verbose=False)
module = Alone()
compress(module.vit, Linear(Strategy(0.75), Strategy()))
trainer = pl.Trainer(
    strategy="ddp", accelerator="cpu", devices=2, max_epochs=2, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, DataLoader(TensorDataset(torch.ones(32, 3, 32, 32)), batch_size=4))
torch.save(
    dict(tokens=module.tokens, kept=module.kept, budget=trainer.callback_metrics["seqcompress/budget"].item()),
    f"{{sys.argv[1]}}/rank{{trainer.global_rank}}.pt",
)
"""


@pytest.mark.parametrize("package", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.soak)])
def test_ranks_share_the_strategies_and_drop_different_tokens(
    package: str, tmp_path: Path, tiny_vit: Build, run_ranks: Callable[..., list[str]]
) -> None:
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED.format(package=package))
    run_ranks([sys.executable, script, tmp_path], cwd=tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first["tokens"] == second["tokens"] == TOKENS_OF_8_STEPS
    assert all(len(set(kept)) == tokens - 1 for kept, tokens in zip(first["kept"], first["tokens"], strict=True))
    assert all(kept != other for kept, other in zip(first["kept"][:6], second["kept"][:6], strict=True))
    # Both ranks' views count: 8 steps of 2 x 4 views.
    vit = tiny_vit(depth=1)
    spent = sum(2 * 4 * 3 * relative_cost(vit, RELAXING.at_step(step, 8), 32) for step in range(8))
    assert first["budget"] * 1e6 == second["budget"] * 1e6 == pytest.approx(spent, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_no_hook_of_a_step_waits_for_the_device(
    pl: Any, make_pair: Build, make_trainer: Build, images: Images, tmp_path: Path
) -> None:
    trainer = make_trainer(accelerator="gpu", logger=pl.loggers.CSVLogger(tmp_path), log_every_n_steps=1)
    (callback,) = our_callbacks(trainer)
    calls: list[str] = []

    def without_waiting(hook: Any) -> Any:
        def run(*args: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                hook(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            calls.append(hook.__name__)

        return run

    hooks = ["on_train_batch_start", "on_after_backward", "on_train_batch_end"]
    for name in hooks:
        setattr(callback, name, without_waiting(getattr(callback, name)))
    module = accelerate(make_pair(), STAGES)
    module.on_train_batch_start = lambda *_: module.log("on the device", torch.ones((), device="cuda"), prog_bar=True)
    trainer.fit(module, images)
    assert calls == hooks * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_second_step_runs_at_the_most_expensive_strategy(
    make_pair: Build, make_trainer: Build, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    module = accelerate(make_pair(), RELAXING)
    with caplog.at_level("INFO"):
        make_trainer(accelerator="gpu").fit(module, images)
    assert module.tokens == [TOKENS_OF_8_STEPS[0], 17, *TOKENS_OF_8_STEPS[2:]]
    assert "the longest sequences (base) need" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_run_that_will_not_fit_says_so_at_its_second_step(
    make_pair: Build, make_trainer: Build, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    module = accelerate(make_pair(), RELAXING)

    def hungry(block: Any, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[1] == 17:
            torch.empty(2**50, device=args[0].device)

    module.backbone.blocks[0].register_forward_pre_hook(hungry)
    with pytest.raises(torch.OutOfMemoryError):
        make_trainer(accelerator="gpu").fit(module, images)
    assert module.tokens == [TOKENS_OF_8_STEPS[0], 17]
    assert re.search(r"'base' \(17 tokens a view\) does not fit into memory: torch ran out at .* MiB of", caplog.text)


@pytest.fixture
def train_on_a_device(pl: Any, make_trainer: Build, images: Images, caplog: pytest.LogCaptureFixture) -> Build:
    """Trains a module for two steps an epoch, as on a device with memory of its own; gives the log."""

    def train(module: Any, fits: bool = True, **settings: Any) -> str:
        class OnADevice(SequenceCompression, pl.Callback):
            def _has_own_memory(self, device: Any) -> bool:
                return True

        trainer = make_trainer(callbacks=[OnADevice()], limit_train_batches=2, max_epochs=4, **settings)
        trainer.callbacks.remove(our_callbacks(trainer)[0])
        with caplog.at_level("INFO"), nullcontext() if fits else pytest.raises(torch.OutOfMemoryError):
            trainer.fit(module, images)
        return caplog.text

    return train


def run_out_of_memory_at(vit: Any, tokens: int) -> None:
    def hook(block: Any, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[1] == tokens:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    vit.blocks[1].register_forward_pre_hook(hook)


@pytest.mark.parametrize("plan", [RELAXING, Constant(Strategy())], ids=["relaxing", "constant"])
def test_what_the_longest_sequences_need_is_logged_once(
    make_pair: Build, train_on_a_device: Build, plan: Schedule
) -> None:
    module = accelerate(make_pair(), plan)
    log = train_on_a_device(module)
    assert log.count("the longest sequences (base) fit") == 1  # a processor's memory is in nobody's books
    assert module.tokens[1] == 17


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_rehearsal_is_logged_as_what_it_ran_at(
    pl: Any, make_pair: Build, train_on_a_device: Build, tmp_path: Path, every: int
) -> None:
    module, logger = accelerate(make_pair(), RELAXING), pl.loggers.CSVLogger(tmp_path)
    train_on_a_device(module, logger=logger, log_every_n_steps=every)
    assert module.tokens == [TOKENS_OF_8_STEPS[0], 17, *TOKENS_OF_8_STEPS[2:]]
    logged = module.tokens[every - 1 :: every] + (module.tokens[-1:] if 8 % every else [])
    assert metrics(logger.log_dir)["seqcompress/tokens"] == logged


@pytest.mark.parametrize(
    ("tokens", "strategy", "seen"),
    [(5, "drop 0.75", [5]), (17, "base", [5, 17]), (11, "drop 0.375", [5, 17, 8, 9, 11])],
    ids=["the first step", "the rehearsal", "in mid-run"],
)
def test_the_log_says_at_which_strategy_a_step_did_not_fit(
    make_pair: Build, train_on_a_device: Build, tokens: int, strategy: str, seen: list[int]
) -> None:
    module = accelerate(make_pair(), RELAXING)
    run_out_of_memory_at(module.backbone, tokens)
    log = train_on_a_device(module, fits=False)
    assert module.tokens == seen
    assert log.count(f"a training step at '{strategy}' ({tokens} tokens a view) does not fit into memory") == 1


def test_running_out_of_memory_in_validation_is_not_taken_for_a_training_step(
    make_pair: Build, make_trainer: Build, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    module = accelerate(make_pair(), Constant(Strategy(0.5)))
    run_out_of_memory_at(module.backbone, 17)
    with caplog.at_level("INFO"), pytest.raises(torch.OutOfMemoryError):
        make_trainer(num_sanity_val_steps=0).fit(module, images, images)
    assert module.tokens == [9] * 4 + [17]
    assert "does not fit" not in caplog.text


def test_a_constant_plan_needs_no_rehearsal_and_stays(make_pair: Build, make_trainer: Build, images: Images) -> None:
    module = accelerate(make_pair(), Constant(Strategy(0.5)))
    make_trainer().fit(module, images)
    assert module.tokens == [9] * 8


def test_a_schedule_of_one_stage_is_driven_like_any_other(
    make_pair: Build, make_trainer: Build, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    module = accelerate(make_pair(), Stepwise({0.0: Strategy(0.5)}))
    with caplog.at_level("INFO"):
        make_trainer(max_epochs=2).fit(module, images)
    assert module.tokens == [9] * 8
    assert "trains at drop 0.5 (9 tokens a view), about " in caplog.text
    make_trainer().fit(module, images)
    assert module.tokens[8:] == [17] * 8  # run to its end, as every schedule is


def test_encoders_that_are_accelerated_as_training_starts_follow_their_schedule(
    make_pair: Build, make_trainer: Build, images: Images
) -> None:
    module = make_pair()
    module.on_train_start = lambda: accelerate(module, RELAXING)
    make_trainer(max_epochs=2).fit(module, images)
    assert module.tokens == TOKENS_OF_8_STEPS


def test_encoders_may_be_restored_between_epochs(make_pair: Build, make_trainer: Build, images: Images) -> None:
    module = accelerate(make_pair(), Constant(Strategy(0.5)))
    module.on_train_epoch_start = lambda: restore(module) if module.current_epoch else None
    make_trainer(max_epochs=2).fit(module, images)
    assert module.tokens == [9] * 4 + [17] * 4


def test_encoders_may_be_planned_anew_between_epochs_and_the_budget_goes_on(
    make_pair: Build, make_trainer: Build, images: Images
) -> None:
    module = accelerate(make_pair(), Constant(Strategy(0.5)))
    module.on_train_epoch_start = lambda: accelerate(module, Strategy(0.75)) if module.current_epoch else None
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, images)
    assert module.tokens == [9] * 4 + [5] * 4
    half, quarter = (relative_cost(module.backbone, Strategy(dropout), 32) for dropout in (0.5, 0.75))
    units = sum(16 * (3 * cost + 1) for cost in (half, quarter))
    assert float(trainer.callback_metrics["seqcompress/budget"]) == pytest.approx(units / 1e6, rel=1e-4)
