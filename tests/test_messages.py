"""What a message shows of a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from seqcompress import Strategy
from seqcompress.messages import described


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
        ("x" * 99, "a str"),
        (list(range(1000)), "a list"),
        (nn.Sequential(nn.Linear(1, 1)), "a Sequential"),
        (torch.zeros(3, 3), "a Tensor"),
        (Rude(), "a Rude"),
    ],
)
def test_what_is_short_is_shown_and_anything_else_by_its_type(value: Any, expected: str) -> None:
    assert described(value) == expected
