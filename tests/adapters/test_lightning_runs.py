"""How the Lightning callback treats runs: who drives, for how long, what is counted and what is said."""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from seqcompress import (
    OnlineScheduler,
    SequenceScheduler,
    Strategy,
    compress,
    get_strategy,
    relative_cost,
    restore,
    set_strategy,
)
from seqcompress.adapters.lightly import accelerate
from seqcompress.encoders import find_encoder
from seqcompress.schedules import Linear, Stepwise
from seqcompress.training.cost import encoder_flops

RELAXING = Linear(Strategy(0.75), Strategy())
TOKENS_OF_8_STEPS = [5, 7, 8, 9, 11, 13, 14, 17]  # 1 + round(4 + 1.5 * step), and the end's
QUARTERS = Stepwise({0.0: Strategy(0.75), 0.5: Strategy(0.5), 0.75: Strategy()})  # 5, 5, 9 and 17 tokens
BUDGET = "seqcompress/budget"

Build = Callable[..., Any]
Images = DataLoader[Any]


def batches(number: int, size: int = 4) -> Images:
    return DataLoader(TensorDataset(torch.ones(number * size, 3, 32, 32)), batch_size=size)


class Stream(IterableDataset[Any]):
    """So many batches of 4 images, without a length, or with one that does not hold."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Any:
        return iter([(torch.ones(3, 32, 32),)] * (4 * self.number))


class Promising(Stream):
    """Says that there are twice as many."""

    def __len__(self) -> int:
        return 8 * self.number


def spent(vit: Any, *strategies: Strategy) -> float:
    """Units of steps of a pair of encoders, 4 views each, in millions."""
    return sum(
        4 * (3 * relative_cost(vit, strategy, 32) + relative_cost(vit, strategy.without_dropout(), 32)) / 1e6
        for strategy in strategies
    )


# Who drives


def own_schedule(module: Any) -> Any:
    return SequenceScheduler(module, RELAXING, total_steps=16)


def own_online_schedule(module: Any) -> Any:
    views = torch.ones(2, 3, 32, 32)
    scheduler = OnlineScheduler(
        module.backbone, lambda batch: module.backbone(views).square().mean(), [Strategy(0.5)], total_steps=8
    )
    scheduler.use(Strategy(0.5))
    return scheduler


@pytest.mark.parametrize("when", ["configure_optimizers", "on_train_start"])
def test_encoders_with_a_scheduler_of_the_users_own_are_left_to_it_and_logged(
    make_pair: Build, make_trainer: Build, told: list[str], when: str
) -> None:
    module, trainer = accelerate(make_pair(), QUARTERS), make_trainer()
    before = getattr(module, when)

    def begin() -> Any:
        module.own = own_schedule(module)
        return before()

    setattr(module, when, begin)
    module.on_train_batch_end = lambda *_: module.own.step()
    trainer.fit(module, batches(4))
    expected = [RELAXING(step / 16) for step in range(8)]
    assert module.tokens == [1 + round((1 - strategy.token_dropout) * 16) for strategy in expected]
    assert trainer.callback_metrics[BUDGET].item() == pytest.approx(spent(module.backbone, *expected), rel=1e-5)
    assert "seqcompress: backbone: driven by a SequenceScheduler, and left to it; only logged here" in told
    assert not [line for line in told if "ended before" in line]


def test_an_online_scheduler_of_the_users_own_is_left_alone(make_pair: Build, make_trainer: Build) -> None:
    module = make_pair()
    compress(module.backbone, Strategy(0.75))
    module.on_train_start = lambda: setattr(module, "own", own_online_schedule(module))
    make_trainer(max_epochs=1).fit(module, batches(4))
    assert module.tokens == [9] * 4


def test_a_strategy_that_is_set_by_hand_stays(make_pair: Build, make_trainer: Build) -> None:
    module = accelerate(make_pair(), QUARTERS)
    module.on_train_epoch_start = lambda: set_strategy(module, Strategy(0.5 if module.current_epoch else 0.25))
    make_trainer().fit(module, batches(2))
    assert module.tokens == [13] * 2 + [9] * 2


def test_a_scheduler_that_comes_after_the_callback_is_refused(make_pair: Build, make_trainer: Build) -> None:
    module = accelerate(make_pair(), QUARTERS)
    module.on_train_batch_end = lambda *_: own_schedule(module)
    with pytest.raises(RuntimeError, match="driven by the Lightning callback already"):
        make_trainer().fit(module, batches(4))


def test_an_encoder_is_free_again_after_a_fit_and_after_one_that_failed(make_pair: Build, make_trainer: Build) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError

    module = accelerate(make_pair(), RELAXING)
    module.on_train_batch_end = fail
    with pytest.raises(ArithmeticError):
        make_trainer().fit(module, batches(4))
    own_schedule(module)
    del module.on_train_batch_end
    make_trainer(max_epochs=1).fit(module, batches(4))
    own_schedule(module)


def test_a_copy_that_takes_the_encoders_place_goes_on_with_its_plan_and_its_budget(
    make_pair: Build, make_trainer: Build
) -> None:
    ends = []
    for replacing in (False, True):
        module, trainer = accelerate(make_pair(), QUARTERS), make_trainer()

        def replace(batch: Any, batch_idx: int, module: Any = module, replacing: bool = replacing) -> None:
            if replacing and batch_idx == 1:
                module.backbone = copy.deepcopy(module.backbone)
                module.backbone.blocks[0].register_forward_pre_hook(
                    lambda block, args: module.tokens.append(args[0].shape[1])
                )

        module.on_train_batch_end = lambda outputs, batch, batch_idx, replace=replace: replace(batch, batch_idx)
        trainer.fit(module, batches(4))
        strategies = [get_strategy(module.backbone), get_strategy(module.backbone_momentum)]
        ends.append((trainer.callback_metrics[BUDGET].item(), strategies, module))
    assert ends[0][2].tokens == [5] * 4 + [9] * 2 + [17] * 2
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-6)
    assert ends[1][1] == ends[0][1] == [Strategy(), Strategy()]


def test_a_teacher_that_is_made_of_the_student_in_mid_run_is_a_teacher(make_pair: Build, make_trainer: Build) -> None:
    plan = Stepwise({0.0: Strategy(0.75, 16), 0.5: Strategy(0.75), 0.75: Strategy()})
    module = accelerate(make_pair(), plan)
    teacher_tokens: list[int] = []

    def reset(outputs: Any, batch: Any, batch_idx: int) -> None:  # as Lightly's SMoG does
        if module.global_step == 2:
            module.backbone_momentum = copy.deepcopy(module.backbone).requires_grad_(False)
            module.backbone_momentum.blocks[0].register_forward_pre_hook(
                lambda block, args: teacher_tokens.append(args[0].shape[1])
            )

    module.on_train_batch_end = reset
    make_trainer().fit(module, batches(4))
    assert module.teacher_tokens[:2] == [5] * 2
    assert teacher_tokens == [5] * 2 + [17] * 4


def test_a_schedule_is_run_once_and_the_next_fit_is_a_plain_one_that_says_so(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    module = accelerate(make_pair(), Stepwise({0.0: Strategy(0.75), 0.5: Strategy(0.5)}))
    make_trainer().fit(module, batches(2))
    told.clear()
    make_trainer().fit(module, batches(2))
    assert module.tokens == [5] * 2 + [9] * 2 + [17] * 4
    assert told == [
        "seqcompress: backbone: trains plain, at base (17 tokens a view), as its schedule has been run to its end; for "
        "another run of it, call compress(model, plan) again and fit without ckpt_path, the weights alone loaded"
    ]
    accelerate(module, QUARTERS)
    make_trainer(max_epochs=1).fit(module, batches(4))
    assert module.tokens[8:] == [5] * 2 + [9, 17]


def test_a_fast_dev_run_uses_up_no_schedule(make_pair: Build, make_trainer: Build, told: list[str]) -> None:
    module = accelerate(make_pair(), QUARTERS)
    make_trainer(fast_dev_run=True).fit(module, batches(4))
    make_trainer(max_epochs=1).fit(module, batches(4))
    assert module.tokens == [17] + [5] * 2 + [9, 17]  # a run of one step is its last
    assert not [line for line in told if "ended before" in line]


def test_a_module_that_was_unpickled_is_driven_where_nothing_else_of_this_package_was_imported(
    make_pair: Build, make_trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = accelerate(make_pair(), Stepwise({0.0: Strategy(0.5), 0.5: Strategy()}))
    monkeypatch.delitem(sys.modules, "seqcompress.compression")  # of which a pickle knows nothing
    make_trainer(max_epochs=1).fit(module, batches(2))
    assert module.tokens == [9, 17]


def test_a_constant_strategy_stays_and_is_said_at_the_start_of_every_fit(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    module = accelerate(make_pair(), Strategy(0.5))
    for _ in range(2):
        make_trainer(max_epochs=1).fit(module, batches(2))
    assert module.tokens == [9] * 4
    share = (3 * relative_cost(module.backbone, Strategy(0.5), 32) + 1) / 4
    assert (
        told
        == [
            f"seqcompress: backbone: trains at drop 0.5 (9 tokens a view), about {share:.0%} of the plain run's budget"
            "; its teacher gets nothing of it"
        ]
        * 2
    )


def test_two_encoders_with_plans_of_their_own_are_both_driven(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    module = make_pair()
    compress(module.backbone, QUARTERS)
    compress(module.backbone_momentum, Stepwise({0.0: Strategy(0.5), 0.5: Strategy()}), when="train")
    make_trainer().fit(module, batches(2))
    assert module.tokens == [5, 5, 9, 17]
    assert module.teacher_tokens == [9, 9, 17, 17]
    assert [line.split(",")[0] for line in told] == [
        "seqcompress: backbone: trains at drop 0.75 (5 tokens a view) now",
        "seqcompress: backbone_momentum: trains at drop 0.5 (9 tokens a view) now",
    ]


# For how long


@pytest.mark.parametrize("lengths", [(4, 2, 2, 2), (1, 4, 4, 4)], ids=["shorter", "longer"])
def test_loaders_whose_length_changes_reach_every_stage_in_its_epoch(
    make_pair: Build, make_trainer: Build, lengths: tuple[int, ...]
) -> None:
    module = accelerate(make_pair(), QUARTERS)
    module.train_dataloader = lambda: batches(lengths[module.current_epoch])
    make_trainer(max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(module)
    assert module.tokens == [
        tokens for tokens, length in zip((5, 5, 9, 17), lengths, strict=True) for _ in range(length)
    ]


@pytest.mark.parametrize("loader", [Promising(4), Stream(4)], ids=["half of what was promised", "no length"])
def test_later_epochs_are_as_long_as_the_first_one_was(make_pair: Build, make_trainer: Build, loader: Any) -> None:
    module = accelerate(make_pair(), RELAXING)
    make_trainer(max_epochs=2).fit(module, DataLoader(loader, batch_size=4))
    assert module.tokens[4:] == TOKENS_OF_8_STEPS[4:]


def test_an_epoch_of_unknown_length_is_the_plans_beginning(make_pair: Build, make_trainer: Build) -> None:
    module = accelerate(make_pair(), Stepwise({0.0: Strategy(0.75), 0.25: Strategy(0.5), 0.75: Strategy()}))
    make_trainer(max_epochs=2).fit(module, DataLoader(Stream(4), batch_size=4))
    assert module.tokens == [5] * 4 + [9] * 2 + [17] * 2


def test_an_epoch_that_trains_nothing_is_not_counted(pl: Any, make_pair: Build, make_trainer: Build) -> None:
    module = accelerate(make_pair(), QUARTERS)
    module.norm = nn.BatchNorm1d(1)  # has one more epoch added, for its statistics
    steps: list[Strategy] = []
    module.on_before_optimizer_step = lambda *_: steps.append(get_strategy(module))
    averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    make_trainer(max_epochs=4, callbacks=[averaging]).fit(module, batches(2))
    assert steps[:8] == [Strategy(0.75)] * 4 + [Strategy(0.5)] * 2 + [Strategy()] * 2
    assert module.tokens[:8] == [5] * 4 + [9] * 2 + [17] * 2
    assert set(module.tokens[8:]) == {17}


@pytest.mark.parametrize("factors", [{0: 1, 1: 2}, {0: 2, 2: 4}])
def test_accumulation_that_changes_leaves_the_plan_its_length(
    pl: Any, make_pair: Build, make_trainer: Build, factors: dict[int, int]
) -> None:
    module = accelerate(make_pair(), QUARTERS)
    accumulating = pl.callbacks.GradientAccumulationScheduler(scheduling=factors)
    make_trainer(max_epochs=4, callbacks=[accumulating]).fit(module, batches(4))
    assert module.tokens == [5] * 8 + [9] * 4 + [17] * 4


@pytest.mark.parametrize(("first", "then"), [(8, 4), (4, 8)])
def test_a_run_that_goes_on_with_another_batch_size_has_its_stages_in_the_same_epochs(
    make_pair: Build, make_trainer: Build, tmp_path: Path, first: int, then: int
) -> None:
    module, trainer = accelerate(make_pair(), QUARTERS), make_trainer(max_epochs=4)
    module.on_train_epoch_end = lambda: setattr(trainer, "should_stop", module.current_epoch == 1)
    trainer.fit(module, batches(16 // first, first))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = accelerate(make_pair(), QUARTERS)
    make_trainer(max_epochs=4).fit(resumed, batches(16 // then, then), ckpt_path=str(tmp_path / "half.ckpt"))
    assert module.tokens == [5] * (2 * 16 // first)
    assert resumed.tokens == [9] * (16 // then) + [17] * (16 // then)


def test_whichever_limit_comes_first_is_the_length(make_pair: Build, make_trainer: Build) -> None:
    for limits in ({"max_epochs": 100, "max_steps": 8}, {"max_epochs": 2, "max_steps": 1000}):
        module = accelerate(make_pair(), RELAXING)
        make_trainer(**limits).fit(module, batches(4))
        assert module.tokens == TOKENS_OF_8_STEPS


def test_a_run_that_ends_after_a_time_reaches_full_length_in_it(make_pair: Build, make_trainer: Build) -> None:
    module = accelerate(make_pair(), QUARTERS)
    make_trainer(fast_dev_run=True).fit(make_pair(), batches(1))  # first steps take a while, of torch's imports too
    relative_cost(module.backbone, Strategy(), 32)
    trainer = make_trainer(max_epochs=-1, max_time={"seconds": 5})
    trainer.fit(module, DataLoader(Stream(10**4), batch_size=4))
    assert module.tokens == sorted(module.tokens)
    assert module.tokens[-1] == 17  # how many steps there are before depends on what else the machine does


RANK_WITH_A_TIME_LIMIT = """
import sys, time
import torch
import {package} as pl
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset
from seqcompress import Stepwise, Strategy, compress, relative_cost


class Alone(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
        self.tokens = []
        self.vit.blocks[0].register_forward_pre_hook(lambda block, args: self.tokens.append(args[0].shape[1]))

    def training_step(self, batch, batch_idx):
        if self.global_rank:
            time.sleep(0.05)  # the slower one, whose clock is behind as well
        return self.vit(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.vit.parameters(), lr=1e-3)

class Late(pl.Callback):
    def on_train_start(self, trainer, module):
        if trainer.global_rank:
            time.sleep(3)  # the clock starts after this

module = Alone()
compress(module.vit, Stepwise({{0.0: Strategy(0.75), 0.3: Strategy(0.5), 0.6: Strategy()}}))
relative_cost(module.vit, Strategy(), 32)  # takes a moment the first time
trainer = pl.Trainer(
    strategy="ddp", accelerator="cpu", devices=2, max_epochs=-1, max_time=dict(seconds=8), logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Late()],
)
trainer.fit(module, DataLoader(TensorDataset(torch.ones(32, 3, 32, 32)), batch_size=4))
torch.save(module.tokens, f"{{sys.argv[1]}}/rank{{trainer.global_rank}}.pt")
"""


@pytest.mark.parametrize("package", ["lightning.pytorch"])
def test_ranks_follow_one_clock_through_a_run_that_ends_after_a_time(
    package: str, tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    script = tmp_path / "train.py"
    script.write_text(RANK_WITH_A_TIME_LIMIT.format(package=package))
    run_ranks([sys.executable, script, tmp_path], cwd=tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first == second == sorted(first)  # how many steps there are depends on what else the machine does
    assert first[-1] == 17
    assert len(set(first)) > 1


@pytest.mark.parametrize("limits", [{"max_epochs": -1}, {"max_epochs": 1}], ids=["no limit", "no length"])
def test_a_constant_strategy_needs_no_length(make_pair: Build, make_trainer: Build, limits: dict[str, int]) -> None:
    module, trainer = accelerate(make_pair(), Strategy(0.5)), make_trainer(**limits)
    module.on_train_batch_end = lambda *_: setattr(trainer, "should_stop", len(module.tokens) == 3)
    trainer.fit(module, DataLoader(Stream(100), batch_size=4))
    assert module.tokens == [9] * 3


def test_a_run_that_ends_before_its_plan_says_where_and_how_to_add_what_is_missing(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    module, trainer = accelerate(make_pair(), QUARTERS), make_trainer(max_epochs=4)
    module.on_train_batch_end = lambda *_: setattr(trainer, "should_stop", len(module.tokens) == 5)
    trainer.fit(module, batches(2))
    (line,) = [line for line in told if "ended" in line]
    assert line == (
        "seqcompress: backbone: the run ended before its plan, at 62% of it and drop 0.5 (9 tokens a view): it never "
        "trained at base (17 tokens a view), and its figures are worse for it; to add what is missing, let "
        "trainer.fit(module, ckpt_path=...) go on to the end, or call compress(model, Strategy()) and fit for some "
        "more epochs"
    )


def test_a_loader_that_gives_half_of_what_it_promises_for_one_epoch_is_told_of(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    make_trainer(max_epochs=1).fit(accelerate(make_pair(), QUARTERS), DataLoader(Promising(4), batch_size=4))
    assert len([line for line in told if "ended before its plan, at 50% of it and drop 0.75 (5 tokens" in line]) == 1


def test_a_run_to_the_end_of_its_plan_says_nothing_at_its_end(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    make_trainer().fit(accelerate(make_pair(), RELAXING), batches(4))
    assert len(told) == 1


def test_a_longer_run_goes_on_from_its_place_in_the_new_length_and_says_so(
    make_pair: Build, make_trainer: Build, told: list[str], tmp_path: Path
) -> None:
    module, trainer = accelerate(make_pair(), QUARTERS), make_trainer(max_epochs=4)
    module.on_train_epoch_end = lambda: setattr(trainer, "should_stop", module.current_epoch == 2)
    trainer.fit(module, batches(2))
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    told.clear()
    longer = accelerate(make_pair(), QUARTERS)
    make_trainer(max_epochs=8).fit(longer, batches(2), ckpt_path=str(tmp_path / "three.ckpt"))
    assert longer.tokens == [5] * 2 + [9] * 4 + [17] * 4
    assert (
        "seqcompress: backbone: the checkpoint was at 75% of its run (base), which is 38% of this one: goes on from "
        "its step, at drop 0.75"
    ) in told


@pytest.mark.parametrize(("stop", "accumulated"), [(7, 1), (1, 3)], ids=["last step", "accumulated"])
def test_a_run_that_goes_on_where_it_stopped_is_not_told_to_be_elsewhere(
    make_pair: Build, make_trainer: Build, told: list[str], tmp_path: Path, stop: int, accumulated: int
) -> None:
    tokens = []
    for resumes in (False, True):
        module = accelerate(make_pair(), RELAXING)
        trainer = make_trainer(max_epochs=2, accumulate_grad_batches=accumulated)

        def save(*_: Any, trainer: Any = trainer) -> None:
            if trainer.global_step == stop and not (tmp_path / "stopped.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

        module.on_train_batch_start = save
        trainer.fit(module, batches(4), ckpt_path=str(tmp_path / "stopped.ckpt") if resumes else None)
        tokens.append(module.tokens)
    assert tokens[1] == tokens[0][-len(tokens[1]) :]
    assert 0 < len(tokens[1]) < 8
    assert not [line for line in told if "the checkpoint was at" in line]


def test_a_run_that_was_broken_off_by_another_hook_is_not_told_to_be_elsewhere(
    pl: Any, make_pair: Build, make_trainer: Build, told: list[str], tmp_path: Path
) -> None:
    class Stopping(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:  # before ours has counted the batch
            if trainer.global_step == 5:
                raise KeyError("batch")

        def on_exception(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "broken.ckpt")

    with pytest.raises(KeyError):
        make_trainer(callbacks=[Stopping()]).fit(accelerate(make_pair(), RELAXING), batches(4))
    module = accelerate(make_pair(), RELAXING)
    make_trainer().fit(module, batches(4), ckpt_path=str(tmp_path / "broken.ckpt"))
    assert module.tokens == TOKENS_OF_8_STEPS[5:]
    assert not [line for line in told if "the checkpoint was at" in line]


def test_a_checkpoint_of_the_end_has_nothing_left_of_its_schedule(
    make_pair: Build, make_trainer: Build, told: list[str], tmp_path: Path
) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(accelerate(make_pair(), QUARTERS), batches(4))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    longer = accelerate(make_pair(), QUARTERS)
    make_trainer(max_epochs=3).fit(longer, batches(4), ckpt_path=str(tmp_path / "end.ckpt"))
    assert longer.tokens == [17] * 8
    assert "as its schedule has been run to its end" in told[-1]


def test_a_run_that_goes_on_is_told_what_its_rest_takes_and_what_has_changed(
    make_pair: Build, make_trainer: Build, told: list[str], tmp_path: Path
) -> None:
    middle, plan = str(tmp_path / "middle.ckpt"), Stepwise({0.0: Strategy(0.75), 0.5: Strategy(0.5)})
    trainer = make_trainer(max_epochs=2, limit_train_batches=2)
    trainer.fit(accelerate(make_pair(), plan), batches(2))
    trainer.save_checkpoint(middle)
    state = torch.load(middle, weights_only=False)
    (callback,) = (kept for name, kept in state["callbacks"].items() if "SequenceCompression" in name)
    callback["progress"] = 0.5  # of a run that was broken off
    torch.save(state, middle)
    told.clear()
    make_trainer(max_epochs=4).fit(accelerate(make_pair(), plan), batches(2), ckpt_path=middle)
    share = (3 * relative_cost(make_pair().backbone, Strategy(0.5), 32) + 1) / 4  # the teacher's is as ever
    assert any(f"about {share:.0%} of the plain run's budget from here on" in line for line in told), told
    told.clear()
    constant = accelerate(make_pair(), Strategy(0.25))
    make_trainer(max_epochs=4).fit(constant, batches(2), ckpt_path=middle)
    assert any("schedule drop 0.25 (was 0: drop 0.75; 0.5: drop 0.5)" in line for line in told), told


@pytest.mark.parametrize(("plan", "times"), [(Strategy(0.5), 1), (QUARTERS, 0)], ids=["constant", "run to its end"])
def test_a_checkpoint_of_a_plan_says_so_to_a_module_that_has_none(
    make_pair: Build, make_trainer: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture, plan: Any, times: int
) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(accelerate(make_pair(), plan), batches(2))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    make_trainer(max_epochs=2).fit(make_pair(), batches(2), ckpt_path=str(tmp_path / "end.ckpt"))
    assert caplog.text.count("this module is not compressed: it trains plain") == times


def test_a_frozen_student_is_said_to_run_plain(make_pair: Build, make_trainer: Build, told: list[str]) -> None:
    module = make_pair()
    accelerate(module, Strategy(0.5))
    module.backbone.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        make_trainer(max_epochs=1).fit(module, batches(2))
    assert "it is frozen, and runs plain until it is trained" in told[0]


# What is tried, counted and said


def test_batch_sizes_are_tried_at_the_longest_sequences(
    pl: Any, make_pair: Build, make_trainer: Build, recwarn: pytest.WarningsRecorder
) -> None:
    module = accelerate(make_pair(), QUARTERS)
    module.batch_size = 1
    module.train_dataloader = lambda: batches(4, module.batch_size)
    module.val_dataloader = lambda: batches(1)
    finder = pl.callbacks.BatchSizeFinder(mode="power", steps_per_trial=1, max_trials=2, init_val=1)
    make_trainer(max_epochs=1, callbacks=[finder]).fit(module)
    tried = len(module.tokens) - 4
    assert module.tokens == [17] * tried + [5, 5, 9, 17]
    assert tried >= 2
    assert not [warning for warning in recwarn if "nobody drives" in str(warning.message)]


def test_what_an_interrupted_fit_has_spent_stays_spent(make_pair: Build, make_trainer: Build) -> None:
    module, trainer = accelerate(make_pair(), Strategy(0.5)), make_trainer(max_epochs=3)

    def interrupt(*_: Any) -> None:
        if len(module.tokens) == 3:
            raise KeyboardInterrupt

    module.on_train_batch_end = interrupt
    with pytest.raises(SystemExit):
        trainer.fit(module, batches(2))
    trainer.fit(module, batches(2))
    steps = len(module.tokens)
    assert steps > 5
    assert trainer.callback_metrics[BUDGET].item() == pytest.approx(
        spent(module.backbone, *[Strategy(0.5)] * steps), rel=1e-5
    )


@pytest.mark.parametrize("meanwhile", ["nothing", "interrupted", "replaced"])
def test_a_unit_stays_what_it_was_when_images_grow(make_pair: Build, make_trainer: Build, meanwhile: str) -> None:
    module, trainer = accelerate(make_pair(), Strategy(0.5)), make_trainer(max_epochs=3)
    of_a_step = spent(module.backbone, Strategy(0.5))

    def views() -> Images:
        pixels = 64 if module.current_epoch else 32
        return DataLoader(TensorDataset(torch.ones(4, 3, pixels, pixels)), batch_size=4)

    def change() -> None:
        if module.current_epoch == 0:
            module.backbone.set_input_size(64)
            module.backbone_momentum.set_input_size(64)
            module.backbone_momentum.requires_grad_(False)  # timm 1.0.26 has made its positions anew
        elif module.current_epoch == 1 and meanwhile == "replaced":
            module.backbone = copy.deepcopy(module.backbone)
        elif module.current_epoch == 1 and meanwhile == "interrupted" and len(module.tokens) == 2:
            raise KeyboardInterrupt

    module.train_dataloader, module.on_train_epoch_end = views, change
    trainer.reload_dataloaders_every_n_epochs = 1
    module.configure_optimizers = lambda: torch.optim.SGD(module.backbone.blocks.parameters(), lr=0.05)
    with pytest.raises(SystemExit) if meanwhile == "interrupted" else nullcontext():
        trainer.fit(module)
    if meanwhile == "interrupted":
        trainer.fit(module)
    full, half, whole = (encoder_flops(find_encoder(module.backbone), tokens) for tokens in (17, 33, 65))
    assert module.tokens == [9, 33, 33]
    assert trainer.callback_metrics[BUDGET].item() == pytest.approx(
        of_a_step + 2 * 4 * (3 * half + whole) / full / 1e6, rel=1e-4
    )


def test_another_module_of_the_same_trainer_has_a_budget_of_its_own(make_pair: Build, make_trainer: Build) -> None:
    trainer = make_trainer(max_epochs=1)
    for _ in range(2):
        trainer.fit_loop.epoch_progress.reset()
        module = accelerate(make_pair(), Strategy(0.5))
        trainer.fit(module, batches(2))
        units = trainer.callback_metrics[BUDGET].item()
        assert len(module.tokens) == 2
        assert units == pytest.approx(spent(module.backbone, *[Strategy(0.5)] * 2), rel=1e-5)


class Looking(Block):
    """Looks at its tokens, as none of those can be that have no data."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert x.sum().item() < torch.inf
        return super().forward(x, *args, **kwargs)


def test_a_budget_that_cannot_be_counted_is_said_once_and_training_goes_on(
    make_pair: Build, make_trainer: Build, tiny_vit: Build, note_tokens: Build, told: list[str]
) -> None:
    module = make_pair()
    module.backbone = tiny_vit(block_fn=Looking, global_pool="avg")
    module.tokens = note_tokens(module.backbone)
    trainer = make_trainer(log_every_n_steps=1)
    trainer.fit(accelerate(module, RELAXING), batches(4))
    assert module.tokens == TOKENS_OF_8_STEPS
    assert len([line for line in told if "could not count the budget" in line]) == 1
    assert trainer.callback_metrics["seqcompress/tokens"] == TOKENS_OF_8_STEPS[-1]
    assert BUDGET not in trainer.callback_metrics


def test_the_start_of_a_fit_says_what_will_happen_in_one_line(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    module = accelerate(make_pair(), Stepwise({0.0: Strategy(0.5, 16), 0.25: Strategy()}))
    make_trainer().fit(module, batches(2))
    start = spent(module.backbone, Strategy(0.5, 16)) / spent(module.backbone, Strategy())
    assert told == [
        "seqcompress: backbone: trains at drop 0.5, patch 16 (3 tokens a view) now, base (17 tokens a view) in the "
        f"end, about {0.25 * start + 0.75:.0%} of the plain run's budget; its teacher gets the patch size"
    ]


def test_an_encoder_is_called_by_its_own_name_however_deep_its_patch_embedding_lies(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    module = make_pair()
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    module.backbone = transformers.ViTModel(
        transformers.ViTConfig(**settings, image_size=32, patch_size=8), add_pooling_layer=False
    )
    module.training_step = lambda batch, batch_idx: module.backbone(batch[0]).last_hidden_state.square().mean()
    compress(module.backbone, Strategy(0.5))
    make_trainer(max_epochs=1).fit(module, batches(2))
    assert told[0].startswith("seqcompress: backbone: trains at drop 0.5 (9 tokens a view)")


def test_the_expected_share_of_the_budget_is_that_of_the_run(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    module, trainer = accelerate(make_pair(), RELAXING), make_trainer(max_epochs=5)
    trainer.fit(module, batches(10))
    (share,) = re.findall(r"about (\d+)%", told[0])
    real = trainer.callback_metrics[BUDGET].item() / spent(module.backbone, *[Strategy()] * 50)
    assert float(share) == pytest.approx(100 * real, abs=1)


def test_a_plain_run_says_nothing_of_a_teacher_or_a_budget(
    make_pair: Build, make_trainer: Build, told: list[str]
) -> None:
    make_trainer(max_epochs=1).fit(accelerate(make_pair(), Strategy()), batches(2))
    assert told == ["seqcompress: backbone: trains at base (17 tokens a view)"]


def test_while_all_of_a_student_is_frozen_the_tokens_it_runs_at_are_logged(
    pl: Any, make_pair: Build, make_trainer: Build
) -> None:
    logged: list[float] = []

    class Unfreeze(pl.callbacks.BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.backbone)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.make_trainable(pl_module.backbone)

    class Note(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            logged.append(trainer.callback_metrics["seqcompress/tokens"].item())

    module = make_pair()
    compress(module.backbone, Strategy(0.75))
    module.head = nn.Linear(32, 1)  # what is trained before
    loss = module.training_step
    module.training_step = lambda batch, batch_idx: loss(batch, batch_idx) + 0 * module.head.weight.sum()
    make_trainer(max_epochs=2, log_every_n_steps=1, callbacks=[Unfreeze(), Note()]).fit(module, batches(2))
    assert (module.tokens, logged) == ([17, 17, 5, 5], [17, 5])


def test_one_callback_comes_by_itself_and_what_it_says_is_shown(pl: Any, make_trainer: Build) -> None:
    callbacks = [callback for callback in make_trainer().callbacks if "seqcompress" in type(callback).__module__]
    assert [type(callback).__name__ for callback in callbacks] == ["SequenceCompressionCallback"]
    assert logging.getLogger(f"{pl.__name__}.seqcompress").getEffectiveLevel() == logging.INFO


def test_a_search_for_the_learning_rate_is_no_run_and_no_checkpoint_to_go_on_from(
    pl: Any, make_pair: Build, make_trainer: Build, images: Any, told: list[str], recwarn: Any
) -> None:
    finder = pl.callbacks.LearningRateFinder(num_training_steps=3)
    module, trainer = accelerate(make_pair(), QUARTERS), make_trainer(max_epochs=2, callbacks=[finder])
    module.lr = 0.05
    trainer.fit(module, images)
    assert module.tokens[-8:] == [5, 5, 5, 5, 9, 9, 17, 17]
    accelerate(restore(module), QUARTERS)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, images)
    assert module.tokens[-8:] == [9, 9, 9, 9, 17, 17, 17, 17]
    assert not [line for line in told if "run to its end" in line]
    assert not [warning for warning in recwarn if "nobody drives" in str(warning.message)]
