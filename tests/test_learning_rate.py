"""The paper's polynomial decay, by steps or by the share of the budget."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import PolynomialLR

from seqcompress import PolynomialDecayLR, SequenceScheduler, Stepwise, Strategy, compress


def _optimizer(*rates: float) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (1.0,)])


def _rates(scheduler: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 0.5])
def test_it_is_torchs_polynomial_decay_when_every_step_costs_the_same(power: float) -> None:
    ours = PolynomialDecayLR(_optimizer(0.3), total_steps=20, power=power)
    theirs = PolynomialLR(_optimizer(0.3), total_iters=20, power=power)
    assert _rates(ours, 25) == pytest.approx(_rates(theirs, 25), abs=1e-9)


def test_the_power_is_two_unless_told_otherwise() -> None:
    assert _rates(PolynomialDecayLR(_optimizer(), 4), 6) == pytest.approx([1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0])


def test_the_warm_up_rises_linearly_and_the_decay_begins_at_the_peak() -> None:
    rates = _rates(PolynomialDecayLR(_optimizer(), total_steps=8, warmup_steps=3), 9)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.64, 0.36, 0.16, 0.04, 0.0])


def test_parameter_groups_keep_their_own_peaks() -> None:
    optimizer = _optimizer(1.0, 0.1)
    scheduler = PolynomialDecayLR(optimizer, total_steps=2)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.025])


def test_it_follows_the_share_of_the_budget() -> None:
    share = [0.0, 0.1, 0.2, 0.6, 1.0].__getitem__
    rates = _rates(PolynomialDecayLR(_optimizer(), total_steps=4, share=share), 6)
    assert rates == pytest.approx([1.0, 0.81, 0.64, 0.16, 0.0, 0.0])


def test_it_follows_a_sequence_scheduler(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy()}))
    scheduler = SequenceScheduler(vit, total_steps=10)
    rates = _rates(PolynomialDecayLR(_optimizer(), 10, share=scheduler.budget_share), 11)
    assert rates == pytest.approx([(1 - scheduler.budget_share(step)) ** 2 for step in range(11)])
    assert rates[5] > 0.7  # by steps it would be 0.25: cheap steps hardly move it
    assert rates[10] == 0.0


@pytest.mark.parametrize("share", [None, lambda step: (step / 10) ** 2])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(share: Any) -> None:
    uninterrupted = _rates(PolynomialDecayLR(_optimizer(), 10, warmup_steps=2, share=share), 10)
    optimizer = _optimizer()
    first = PolynomialDecayLR(optimizer, 10, warmup_steps=2, share=share)
    begin = _rates(first, 4)
    state, optimizer_state = first.state_dict(), optimizer.state_dict()
    assert "_share" not in state
    assert "share" not in state

    other = _optimizer()
    resumed = PolynomialDecayLR(other, 10, warmup_steps=2, share=share)
    other.load_state_dict(optimizer_state)
    resumed.load_state_dict(state)
    assert begin + _rates(resumed, 6) == pytest.approx(uninterrupted)


@pytest.mark.parametrize("own", [{"total_steps": 20}, {"warmup_steps": 1}, {"power": 1.0}])
def test_going_on_with_a_state_of_another_length_is_told(own: Any) -> None:
    state = PolynomialDecayLR(_optimizer(), 10).state_dict()
    (name, value), *_ = own.items()
    other = PolynomialDecayLR(_optimizer(), **{"total_steps": 10, **own})
    with pytest.warns(UserWarning, match=rf"saved state's {name}=[\d.]+, not with the scheduler's own {value}"):
        other.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PolynomialDecayLR(_optimizer(), 10).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("total_steps", 0), ("total_steps", -3), ("total_steps", 2.5), ("total_steps", "10"), ("total_steps", True),
        ("total_steps", None), ("warmup_steps", -1), ("warmup_steps", 10), ("warmup_steps", 1.0),
        ("warmup_steps", None), ("warmup_steps", True), ("power", 0), ("power", -1.0), ("power", math.nan),
        ("power", math.inf), ("power", "2"), ("power", None), ("power", True),
        ("total_steps", 2**64), ("power", 10**400), ("share", 0.5), ("share", "budget"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_one_error_that_names_it_and_changes_nothing(name: str, value: Any) -> None:
    optimizer = _optimizer(0.3)
    with pytest.raises((ValueError, TypeError), match=f"{name} must be") as raised:
        PolynomialDecayLR(optimizer, **{"total_steps": 10, name: value})
    assert ("a number of very many digits" if value == 10**400 else repr(value)) in str(raised.value)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert "initial_lr" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("total_steps", 0), ("total_steps", 10**400), ("warmup_steps", 10), ("power", 1e299j), ("power", math.nan),
        ("last_epoch", -1), ("last_epoch", 10**400), ("last_epoch", "5"), ("_step_count", None),
        ("base_lrs", [1e299]), ("base_lrs", [math.nan]), ("base_lrs", []), ("base_lrs", "0"), ("_last_lr", [10**400]),
        ("_last_lr", [torch.tensor(math.inf)]),
    ],
)  # fmt: skip
def test_a_state_of_nonsense_is_one_error_that_names_the_field_and_changes_nothing(name: str, value: Any) -> None:
    optimizer = _optimizer(0.3)
    scheduler = PolynomialDecayLR(optimizer, 10)
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match=f"state_dict is not a PolynomialDecayLR's: {name} must be"):
        scheduler.load_state_dict({**before, name: value})
    with pytest.raises(ValueError, match="state_dict must be a PolynomialDecayLR's, got None"):
        scheduler.load_state_dict(None)  # type: ignore[arg-type]
    assert scheduler.state_dict() == before


def test_a_state_sets_nothing_but_what_a_state_has() -> None:
    optimizer = _optimizer(0.3)
    scheduler = PolynomialDecayLR(optimizer, 10)
    others = {"optimizer": None, "_share": "budget", "step": print, "get_lr": print}
    scheduler.load_state_dict({**scheduler.state_dict(), **others})
    assert scheduler.optimizer is optimizer
    assert vars(scheduler).keys().isdisjoint({"step", "get_lr"})
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.3 * 0.81)]


def test_a_model_in_place_of_the_optimizer_is_one_error_that_names_the_argument() -> None:
    model = nn.Linear(2, 2)
    expected = r"optimizer must be a torch\.optim\.Optimizer, got "
    with pytest.raises(TypeError, match=expected):
        PolynomialDecayLR(model, total_steps=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=expected + r"\[\]"):
        PolynomialDecayLR([], total_steps=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [math.nan, -0.1, 1.1])
def test_a_share_of_the_budget_that_is_none_is_refused_by_its_name(share: float) -> None:
    with pytest.raises(ValueError, match=rf"share must return a share of the budget in \[0, 1\], got {share} after 0"):
        PolynomialDecayLR(_optimizer(), 10, share=lambda step: share)


def test_a_budget_that_is_spent_by_the_end_of_the_warm_up_leaves_a_rate_of_zero() -> None:
    scheduler = PolynomialDecayLR(_optimizer(), 4, warmup_steps=2, share=lambda step: min(1.0, step / 2))
    assert _rates(scheduler, 4)[2:] == [0.0, 0.0]
