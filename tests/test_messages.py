"""What a message shows of a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from seqcompress import Strategy
from seqcompress.messages import described, resume_notice
from seqcompress.schedules import Constant, Linear, Online, Stepwise

STAGES = Stepwise({0.0: Strategy(0.5, 32), 0.5: Strategy(0.0, 32), 0.75: Strategy(0.5), 0.95: Strategy()})
MANY_STAGES = Stepwise({stage / 20: Strategy(0.9 - stage / 40) for stage in range(20)})


class Rude:
    def __repr__(self) -> str:
        raise KeyError("no")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "None"),
        ("fast", "'fast'"),
        (0.5, "0.5"),
        ([], "[]"),
        (Strategy(0.5, 32), "Strategy(token_dropout=0.5, patch_size=32)"),
        (10**39, str(10**39)),
        (10**40, "a number of very many digits"),
        pytest.param(-(10**5000), "a number of very many digits", id="str() refuses it"),
        ([10**5000], "a list"),
        ("x" * 99, f"'{'x' * 96}..."),
        (list(range(1000)), f"{repr(list(range(1000)))[:97]}..."),
        ({"plan": "x" * 200}, f"{{'plan': '{'x' * 87}..."),
        (Constant(Strategy(0.5, 32)), "Constant(strategy=Strategy(token_dropout=0.5, patch_size=32))"),
        (Linear(Strategy(0.9, 32), Strategy()), "linear from drop 0.9, patch 32 to base"),
        (STAGES, "0: drop 0.5, patch 32; 0.5: patch 32; 0.75: drop 0.5; 0.95: base"),
        (Online(STAGES), "online, at first 0: drop 0.5, patch 32; 0.5: patch 32; 0.75: drop 0.5; 0.95: base"),
        (MANY_STAGES, f"{str(MANY_STAGES)[:97]}..."),
        ([torch.zeros(3, 3)] * 2, "a list of 2"),
        (nn.Sequential(nn.Linear(1, 1)), "a Sequential"),
        (torch.zeros(3, 3), "a Tensor of shape (3, 3)"),
        (Rude(), "a Rude"),
    ],
)
def test_a_value_is_shown_on_one_line_and_what_has_several_by_its_type(value: Any, expected: str) -> None:
    assert described(value) == expected


def test_what_a_resumed_run_says_shows_both_schedules() -> None:
    said = resume_notice({"schedule": (STAGES, Constant(Strategy(0.5))), "total_steps": (10, 30)}, Strategy(0.5))
    assert said.endswith(f": schedule drop 0.5 (was {STAGES}), total_steps 30 (was 10); now at drop 0.5")
