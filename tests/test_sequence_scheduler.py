"""The scheduler moves the strategy along a schedule, as a learning-rate scheduler moves the rate."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seqcompress import (
    Budget,
    Constant,
    Linear,
    SequenceScheduler,
    Stepwise,
    Strategy,
    compress,
    get_strategy,
    num_tokens,
    relative_cost,
    restore,
    set_strategy,
)

STAGES = Stepwise({0.0: Strategy(0.5, 16), 0.25: Strategy(0.0, 16), 0.5: Strategy(0.5), 0.75: Strategy()})


def test_it_applies_the_beginning_follows_the_schedule_and_stays_at_the_end(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), STAGES)
    set_strategy(vit, Strategy(0.9))
    scheduler = SequenceScheduler(vit, total_steps=8)
    followed = []
    for _ in range(8):
        assert scheduler.strategy == get_strategy(vit)
        followed.append(get_strategy(vit))
        scheduler.step()
    assert followed == [STAGES(step / 8) for step in range(8)]
    with pytest.warns(UserWarning, match=r"step 9 is past total_steps=8: .* \(base\)"):
        scheduler.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        scheduler.step()
    assert get_strategy(vit) == STAGES(1.0)
    assert (scheduler.last_step, scheduler.progress) == (10, 1.0)


def test_a_ramp_ends_exactly(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), Linear(Strategy(0.9), Strategy()))
    scheduler = SequenceScheduler(vit, total_steps=7)
    for _ in range(7):
        scheduler.step()
    assert get_strategy(vit) == Strategy()


@pytest.mark.parametrize("plan", [STAGES, Strategy(0.5, 16), "strong"])
def test_a_schedule_of_its_own_takes_the_place_of_the_plan(plan: Any, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.9)
    scheduler = SequenceScheduler(vit, plan, total_steps=4)
    assert get_strategy(vit) == Strategy(0.5, 16)
    assert scheduler.schedule(0.0) == Strategy(0.5, 16)


def test_it_drives_pairs_and_several_encoders_together(tiny_vit: Any) -> None:
    student, teacher, other = tiny_vit(), tiny_vit(), tiny_vit()
    compress(student, STAGES, teacher=teacher)
    compress(other, STAGES)
    scheduler = SequenceScheduler([nn.ModuleDict({"student": student, "teacher": teacher}), other], total_steps=4)
    assert len(scheduler.embeds) == 3
    scheduler.step()
    assert get_strategy(student) == get_strategy(other) == get_strategy(teacher) == Strategy(0.0, 16)
    scheduler.step()
    assert (get_strategy(student), get_strategy(teacher)) == (Strategy(0.5), Strategy())


def test_step_may_be_given_as_a_number(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), STAGES)
    scheduler = SequenceScheduler(vit, total_steps=100)
    for step, strategy in [(60, Strategy(0.5)), (10, Strategy(0.5, 16)), (1000, Strategy())]:
        scheduler.step(step)
        assert (scheduler.last_step, get_strategy(vit)) == (step, strategy)


def test_another_strategy_can_be_put_in_force_until_the_next_step(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), STAGES)
    scheduler = SequenceScheduler(vit, total_steps=100)
    scheduler.use(Strategy(0.25))
    assert get_strategy(vit) == Strategy(0.25)
    scheduler.step()
    assert get_strategy(vit) == Strategy(0.5, 16)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (STAGES, Strategy()),
        (Constant(Strategy(0.5, 10)), Strategy(0.5, 10)),
        (Linear(Strategy(0.5, 16), Strategy(0.0, 16)), Strategy(0.0, 16)),
        (Linear(Strategy(), Strategy(0.5, 16)), Strategy()),
        # halfway to 0.8 at 4 px is more than either end
        (Linear(Strategy(0.8, 16), Strategy(0.8, 10)), Strategy(0.8, 10)),
        (Linear(Strategy(0.0, 10), Strategy(0.9, 10)), Strategy(0.0, 10)),
        (Linear(Strategy(0.0, 16), Strategy(0.9, 10)), Strategy(0.45, 10)),
    ],
)
def test_the_most_expensive_strategy_has_the_longest_sequences(
    schedule: Any, expected: Strategy, tiny_vit: Any
) -> None:
    assert SequenceScheduler(compress(tiny_vit(), schedule), total_steps=10).most_expensive() == expected


def test_budget_share_is_the_relative_cost_added_up(tiny_vit: Any) -> None:
    student, teacher = tiny_vit(), tiny_vit()
    compress(student, STAGES, teacher=teacher)
    scheduler = SequenceScheduler([student, teacher], total_steps=8)
    costs = []
    for step in range(8):
        strategy = STAGES.at_step(step, 8)
        costs.append(3 * relative_cost(student, strategy, 32) + relative_cost(teacher, strategy.without_dropout(), 32))
    for step in range(9):
        assert scheduler.budget_share(step) == pytest.approx(sum(costs[:step]) / sum(costs))
    assert scheduler.budget_share(20) == 1.0


def test_budget_share_counts_a_teacher_that_the_scheduler_was_not_given(tiny_vit: Any) -> None:
    student, teacher = tiny_vit().train(), tiny_vit().train()
    scheduler = SequenceScheduler(compress(student, STAGES, teacher=teacher), total_steps=8)
    budget, views, spent = Budget(student), torch.randn(1, 3, 32, 32), []
    for _ in range(8):
        student(views)
        teacher.requires_grad_(False)(views)
        spent.append(budget.units)
        scheduler.step()
    shares = [scheduler.budget_share(step) for step in range(1, 9)]
    assert shares == pytest.approx([units / spent[-1] for units in spent])


def test_another_plan_is_followed_from_here_on(tiny_vit: Any) -> None:
    scheduler = SequenceScheduler(compress(tiny_vit(), STAGES), total_steps=8)
    scheduler.step(3)
    scheduler.follow("drop 0.25")
    assert (scheduler.strategy, scheduler.last_step) == (Strategy(0.25), 3)
    with pytest.raises(TypeError, match="plan must be a Strategy or a Schedule"):
        scheduler.follow(3)
    assert scheduler.strategy == Strategy(0.25)


def test_budget_share_of_a_constant_plan_is_the_share_of_steps(tiny_vit: Any) -> None:
    scheduler = SequenceScheduler(compress(tiny_vit(), token_dropout=0.5), total_steps=5)
    assert [scheduler.budget_share(step) for step in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_budget_share_of_a_long_ramp_is_counted_at_once(tiny_vit: Any) -> None:
    plan = Linear(Strategy(0.9), Strategy())
    scheduler = SequenceScheduler(compress(tiny_vit(img_size=128), plan), total_steps=100_000)
    begin = time.process_time()
    share = scheduler.budget_share(50_000)
    assert time.process_time() - begin < 5  # hours, were each step's strategy run
    short = SequenceScheduler(compress(tiny_vit(img_size=128), plan), total_steps=1000)
    assert share == pytest.approx(short.budget_share(500), rel=2e-3)


@pytest.mark.parametrize("steps", [4, 5, 8, 16, 17, 100])
@pytest.mark.parametrize("plan", ["default", "gentle", "strong"])
def test_every_stage_of_a_short_run_gets_a_step_and_the_last_step_is_run_at_the_end(
    plan: str, steps: int, tiny_vit: Any
) -> None:
    vit = compress(tiny_vit(), plan)
    scheduler, trained = SequenceScheduler(vit, total_steps=steps), []
    for _ in range(steps):
        trained.append(get_strategy(vit))
        scheduler.step()
    assert list(dict.fromkeys(trained)) == list(scheduler.schedule.strategies())
    assert trained[-1] == scheduler.schedule(1.0) == get_strategy(vit)


@pytest.mark.parametrize("plan", [Linear(Strategy(0.8), Strategy()), Stepwise({0.0: Strategy(0.8), 1.0: Strategy()})])
def test_the_last_step_of_any_run_is_run_at_the_end(plan: Any, tiny_vit: Any) -> None:
    for steps in (1, 2, 7):
        vit = compress(tiny_vit(), plan)
        scheduler = SequenceScheduler(vit, total_steps=steps)
        scheduler.step(steps - 1)
        assert get_strategy(vit) == Strategy()
        scheduler.step(0)
        assert get_strategy(vit) == (Strategy(0.8) if steps > 1 else Strategy())


# Checkpoints


def test_a_state_survives_torch_save_with_weights_only(tiny_vit: Any, tmp_path: Any) -> None:
    scheduler = SequenceScheduler(compress(tiny_vit(), STAGES), total_steps=8)
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == scheduler.state_dict()


_MISSING = object()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", _MISSING),
        ("schedule", "{"),
        ("schedule", None),
        ("schedule", "nowhere.json"),
        ("schedule", Constant(Strategy(0.0, 64)).to_json()),
        ("schedule", Constant(Strategy(0.5)).to_json().replace("0.5", "5")),
        ("total_steps", _MISSING),
        ("total_steps", 0),
        ("total_steps", 2.5),
        ("total_steps", "8"),
        ("total_steps", True),
        ("last_step", _MISSING),
        ("last_step", -1),
        ("last_step", None),
        ("last_step", 0.5),
        ("seed", _MISSING),
        ("seed", "abc"),
        ("seed", None),
        ("seed", 0.5),
        ("plan", "{"),
        ("plan", 3),
        ("forwards", 3),
        ("forwards", [-1]),
        *((name, value) for name in ("total_steps", "last_step", "seed") for value in (2**64, 10**400, 1e299)),
    ],
)
def test_a_bad_state_is_one_error_that_names_the_field_and_changes_nothing(
    field: str, value: Any, tiny_vit: Any
) -> None:
    vit = compress(tiny_vit(), STAGES)
    scheduler = SequenceScheduler(vit, total_steps=8)
    scheduler.step(5)
    before = scheduler.state_dict()
    state = {**before, field: value}
    if value is _MISSING:
        del state[field]
    with pytest.raises(ValueError, match="state") as raised:
        scheduler.load_state_dict(state)
    assert field in str(raised.value) or "patch_size" in str(raised.value)
    assert scheduler.state_dict() == before
    assert get_strategy(vit) == Strategy(0.5)


def test_a_state_names_no_file(tmp_path: Path, tiny_vit: Any) -> None:
    scheduler = SequenceScheduler(compress(tiny_vit(), STAGES), total_steps=8)
    STAGES.to_json(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="schedule must be JSON text of an object, got"):
        scheduler.load_state_dict({**scheduler.state_dict(), "schedule": str(tmp_path / "plan.json")})


def test_the_largest_numbers_of_a_state_break_nothing(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), Linear(Strategy(0.5), Strategy()))
    scheduler = SequenceScheduler(vit, total_steps=2**64 - 1)
    scheduler.load_state_dict({**scheduler.state_dict(), "last_step": 2**63, "seed": 2**64 - 1})
    assert scheduler.progress == pytest.approx(0.5)
    assert 0 < scheduler.budget_share(2**63) < 1
    vit.train()(torch.randn(1, 3, 32, 32))
    scheduler.step()
    assert scheduler.last_step == 2**63 + 1


@pytest.mark.parametrize("state", [None, 3, [], "state", {}, {1: 2, "schedule": "{}"}])
def test_what_is_no_state_is_refused(state: Any, tiny_vit: Any) -> None:
    scheduler = SequenceScheduler(compress(tiny_vit(), STAGES), total_steps=8)
    with pytest.raises(ValueError, match="state must"):
        scheduler.load_state_dict(state)
    assert scheduler.last_step == 0


# Errors


@pytest.mark.parametrize(
    ("value", "kind"), [(0, ValueError), (-1, ValueError), (True, TypeError), (1.5, TypeError), ("10", TypeError),
                        (torch.tensor(True), TypeError),
                        (None, TypeError), (float("nan"), TypeError)]
)  # fmt: skip
def test_a_bad_number_of_steps_is_named_with_its_value(value: Any, kind: type[Exception], tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), STAGES)
    set_strategy(vit, Strategy(0.25))
    with pytest.raises(kind, match="total_steps must be a whole number") as raised:
        SequenceScheduler(vit, total_steps=value)
    assert repr(value) in str(raised.value)
    assert get_strategy(vit) == Strategy(0.25)


def test_another_schedule_is_followed_from_here_on_and_one_that_does_not_suit_changes_nothing(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), STAGES)
    scheduler = SequenceScheduler(vit, total_steps=8)
    scheduler.step(3)
    with pytest.raises(ValueError, match="patch_size"):
        scheduler.follow(Constant(Strategy(0.0, 64)))
    assert (scheduler.schedule, scheduler.strategy) == (STAGES, STAGES.at_step(3, 8))
    scheduler.follow(Stepwise({0.0: Strategy(), 0.25: Strategy(0.75)}))
    assert (scheduler.last_step, get_strategy(vit)) == (3, Strategy(0.75))
    restore(vit)
    with pytest.raises(RuntimeError, match="make a new SequenceScheduler"):
        scheduler.follow(STAGES)


@pytest.mark.parametrize(("value", "kind"), [(-1, ValueError), (0.5, TypeError), ("1", TypeError), (True, TypeError)])
def test_a_bad_step_is_named_with_its_value(value: Any, kind: type[Exception], tiny_vit: Any) -> None:
    scheduler = SequenceScheduler(compress(tiny_vit(), STAGES), total_steps=8)
    for call in (scheduler.step, scheduler.budget_share):
        with pytest.raises(kind, match="step must be a whole number") as raised:
            call(value)
        assert repr(value) in str(raised.value)
    assert scheduler.last_step == 0


@pytest.mark.parametrize(
    ("schedule", "kind", "words"),
    [
        (3, TypeError, "3"),
        ("fast", (ValueError, FileNotFoundError), "'fast'"),
        (Strategy(0.0, 64), ValueError, "patch_size .*64"),
        (Linear(Strategy(), Strategy(0.0, 48)), ValueError, "patch_size .*48"),
    ],
)
def test_a_bad_schedule_is_named_and_changes_nothing(schedule: Any, kind: Any, words: str, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.25)
    with pytest.raises(kind, match=words):
        SequenceScheduler(vit, schedule, total_steps=8)
    assert get_strategy(vit) == Strategy(0.25)


def test_a_schedule_must_suit_every_encoder(tiny_vit: Any) -> None:
    large, small = compress(tiny_vit(img_size=64), token_dropout=0.5), compress(tiny_vit(), token_dropout=0.5)
    with pytest.raises(ValueError, match=r"patch_size .*64"):
        SequenceScheduler([large, small], Constant(Strategy(0.0, 64)), total_steps=8)
    assert get_strategy(large) == get_strategy(small) == Strategy(0.5)


def test_encoders_of_different_plans_need_a_schedule(tiny_vit: Any) -> None:
    models = [compress(tiny_vit(), token_dropout=0.5), compress(tiny_vit(), token_dropout=0.25)]
    with pytest.raises(ValueError, match="schedule must be given"):
        SequenceScheduler(models, total_steps=8)
    assert [get_strategy(model) for model in models] == [Strategy(0.5), Strategy(0.25)]


@pytest.mark.parametrize("many", [False, True])
def test_plain_models_are_refused(many: bool, tiny_vit: Any) -> None:
    vit = tiny_vit()
    with pytest.raises(ValueError, match="model_or_models must be compressed first"):
        SequenceScheduler([vit, vit] if many else vit, total_steps=8)


@pytest.mark.parametrize("models", ["vit", None, 3, [None]])
def test_what_is_no_model_is_named(models: Any) -> None:
    with pytest.raises(TypeError, match="model_or_models") as raised:
        SequenceScheduler(models, total_steps=8)
    assert repr(models) in str(raised.value)


def _updates(scheduler: SequenceScheduler) -> list[tuple[int, int, str]]:
    """The rest of a run whose batch follows the length: first step, factor and strategy of each update."""
    updates = []
    while scheduler.last_step < scheduler.total_steps:
        factor = scheduler.batch_factor
        updates.append((scheduler.last_step, factor, str(scheduler.strategy)))
        scheduler.step(scheduler.last_step + factor)
    return updates


def test_a_batch_that_follows_the_length_keeps_to_stages_and_ends_exactly(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), STAGES)  # 3, 5, 9 and 17 tokens
    updates = _updates(scheduler := SequenceScheduler(vit, total_steps=46))
    # The stages begin at steps 0, 12, 23 and 35: 17 // 3 = 5, rounded down to 4; 17 // 5 = 3, to 2; 17 // 9 = 1.
    assert updates == [
        *((step, 4, "drop 0.5, patch 16") for step in (0, 4, 8)),
        *((step, 2, "patch 16") for step in (12, 14, 16, 18, 20)),
        (22, 1, "patch 16"),
        *((step, 1, "drop 0.5") for step in range(23, 35)),
        *((step, 1, "base") for step in range(35, 46)),
    ]
    assert (scheduler.last_step, scheduler.progress) == (46, 1.0)


def test_no_update_of_a_growing_batch_reaches_into_the_next_stage(tiny_vit: Any) -> None:
    updates = _updates(SequenceScheduler(compress(tiny_vit(), STAGES), total_steps=50))
    # The stages begin at steps 13, 25 and 38: two batches would fit at step 12 under either strategy.
    assert updates[:5] == [
        *((step, 4, "drop 0.5, patch 16") for step in (0, 4, 8)),
        (12, 1, "drop 0.5, patch 16"),
        (13, 2, "patch 16"),
    ]


@pytest.mark.parametrize("total_steps", [1, 2, 3, 5, 11, 100])
@pytest.mark.parametrize("plan", ["default", "strong", Linear(Strategy(0.9), Strategy()), Strategy(0.75, 16)])
def test_no_update_of_a_growing_batch_has_more_tokens_than_a_plain_one(
    plan: Any, total_steps: int, tiny_vit: Any
) -> None:
    vit = compress(tiny_vit(), plan)
    scheduler = SequenceScheduler(vit, total_steps=total_steps)
    schedule, done = scheduler.schedule, 0
    for step, factor, _ in _updates(scheduler):
        assert step == done
        for own in range(step, step + factor):
            assert factor * num_tokens(vit, schedule.at_step(own, total_steps), 32) <= 17
        done += factor
    assert done == total_steps


def test_a_growing_batch_goes_on_where_its_checkpoint_stopped(tiny_vit: Any) -> None:
    whole, stopped, resumed = (SequenceScheduler(compress(tiny_vit(), STAGES), total_steps=46) for _ in range(3))
    stopped.step(20)
    resumed.load_state_dict(stopped.state_dict())
    expected = _updates(whole)
    assert _updates(resumed) == [update for update in expected if update[0] >= 20]


@pytest.mark.parametrize("plan", [STAGES, Linear(Strategy(0.9), Strategy())])
def test_a_growing_batch_spends_what_a_constant_one_spends(plan: Any, tiny_vit: Any) -> None:
    spent, shares = [], []
    for grows in (False, True):
        vit = compress(tiny_vit(), plan).train()
        scheduler, budget = SequenceScheduler(vit, total_steps=50), Budget(vit)
        while scheduler.last_step < 50:
            factor = scheduler.batch_factor if grows else 1
            vit(torch.zeros(factor, 3, 32, 32))
            scheduler.step(scheduler.last_step + factor)
            if scheduler.last_step == 25:
                shares.append(budget.units)
        spent.append(budget.units)
    assert spent[1] == pytest.approx(spent[0])
    assert shares[1] == pytest.approx(shares[0]) == pytest.approx(scheduler.budget_share(25) * spent[0])


def test_a_policy_that_nobody_follows_in_a_loop_of_ones_own_is_told(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), STAGES, batch="merge")
    with pytest.warns(UserWarning, match=r"batch='merge' is for Lightning's Trainer: .* batch_factor says"):
        SequenceScheduler(vit, total_steps=46)


def test_the_factor_is_that_of_a_strategy_that_is_set_by_hand_and_of_the_student(tiny_vit: Any) -> None:
    vit, teacher = tiny_vit(), tiny_vit()
    scheduler = SequenceScheduler(compress(vit, STAGES, teacher=teacher), total_steps=46)
    assert scheduler.batch_factor == 4  # the teacher has 5 tokens
    scheduler.use(Strategy(0.8, 16))  # 2 tokens
    assert scheduler.batch_factor == 8
    scheduler.use(Strategy())
    assert scheduler.batch_factor == 1


def test_a_scheduler_whose_encoders_are_compressed_anew_takes_no_state(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), STAGES)
    scheduler = SequenceScheduler(vit, total_steps=8)
    state = scheduler.state_dict()
    compress(restore(vit), STAGES)
    with pytest.raises(RuntimeError, match="compressed anew"):
        scheduler.load_state_dict({**state, "seed": state["seed"] + 1})
    assert scheduler.state_dict() == state


def test_to_follow_no_plan_is_refused(tiny_vit: Any) -> None:
    scheduler = SequenceScheduler(compress(tiny_vit(), STAGES), total_steps=8)
    with pytest.raises(TypeError, match="schedule must be a plan, got None"):
        scheduler.follow(None)  # type: ignore[arg-type]
