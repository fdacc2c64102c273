"""A strategy is a small immutable value that checks itself and reads back what it prints."""

from __future__ import annotations

import copy
import math
import pickle
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqcompress import Strategy

dropouts = st.floats(0.0, 1.0, exclude_max=True)
patch_sizes = st.none() | st.integers(1, 10_000)
any_strategy = st.builds(Strategy, dropouts, patch_sizes)


@given(any_strategy)
def test_parse_reads_back_what_str_wrote(strategy: Strategy) -> None:
    assert Strategy.parse(str(strategy)) == strategy


@given(any_strategy)
def test_from_dict_reads_back_what_to_dict_wrote(strategy: Strategy) -> None:
    assert Strategy.from_dict(strategy.to_dict()) == strategy


@given(any_strategy)
def test_text_is_short(strategy: Strategy) -> None:
    assert len(str(strategy)) <= 45


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (Strategy(), "base"),
        (Strategy(0.5), "drop 0.5"),
        (Strategy(patch_size=32), "patch 32"),
        (Strategy(0.25, 7), "drop 0.25, patch 7"),
    ],
)
def test_text_names_only_what_is_compressed(strategy: Strategy, text: str) -> None:
    assert str(strategy) == text


def test_parse_is_lenient_about_spaces() -> None:
    assert Strategy.parse("  drop  0.5,  patch 32 ") == Strategy(0.5, 32)


@given(any_strategy, any_strategy)
def test_strategies_compare_and_hash_by_value(one: Strategy, other: Strategy) -> None:
    fields_equal = (one.token_dropout, one.patch_size) == (other.token_dropout, other.patch_size)
    assert (one == other) is fields_equal
    assert hash(one) == hash(Strategy(one.token_dropout, one.patch_size))


def test_negative_zero_is_no_dropout() -> None:
    assert math.copysign(1.0, Strategy(-0.0).token_dropout) == 1.0
    assert str(Strategy(-0.0)) == "base"


@pytest.mark.parametrize("field", ["token_dropout", "patch_size", "something_new"])
def test_strategies_are_immutable(field: str) -> None:
    strategy = Strategy(0.5, 16)
    with pytest.raises(AttributeError, match=field):
        setattr(strategy, field, 0.25)
    with pytest.raises(AttributeError, match=field):
        delattr(strategy, field)
    assert strategy == Strategy(0.5, 16)


@given(any_strategy)
def test_copies_and_pickles_are_equal(strategy: Strategy) -> None:
    assert copy.deepcopy(strategy) == strategy
    assert pickle.loads(pickle.dumps(strategy)) == strategy


@given(st.floats(allow_nan=True, allow_infinity=True).filter(lambda value: not 0 <= value < 1))
def test_dropout_out_of_range_is_named_with_its_value(value: float) -> None:
    with pytest.raises(ValueError, match="token_dropout") as raised:
        Strategy(token_dropout=value)
    assert repr(value) in str(raised.value)


@given(st.integers(max_value=0))
def test_patch_size_out_of_range_is_named_with_its_value(value: int) -> None:
    with pytest.raises(ValueError, match="patch_size") as raised:
        Strategy(patch_size=value)
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 0.5j, Decimal("0.5"), object()])
def test_dropout_of_a_wrong_type_is_named_with_its_value(value: Any) -> None:
    with pytest.raises(TypeError, match="token_dropout") as raised:
        Strategy(token_dropout=value)
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("value", ["16", 16.0, 16.5, True, False, math.nan, (16, 16), Fraction(16), torch.tensor(True)])
def test_patch_size_of_a_wrong_type_is_named_with_its_value(value: Any) -> None:
    with pytest.raises(TypeError, match="patch_size") as raised:
        Strategy(patch_size=value)
    assert repr(value) in str(raised.value)


def test_a_fraction_that_rounds_up_to_one_is_out_of_range() -> None:
    with pytest.raises(ValueError, match="token_dropout"):
        Strategy(Fraction(10**30 - 1, 10**30))


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    strategy = Strategy(np.float32(0.5), np.int64(16))
    assert (type(strategy.token_dropout), type(strategy.patch_size)) == (float, int)
    assert strategy == Strategy(0.5, 16)


@given(st.text(max_size=30))
def test_parse_raises_nothing_but_value_error_on_any_text(text: str) -> None:
    try:
        strategy = Strategy.parse(text)
    except ValueError as error:
        assert repr(text) in str(error)  # noqa: PT017
    else:
        assert Strategy.parse(str(strategy)) == strategy


def test_parse_takes_both_orders_and_text_has_one() -> None:
    strategies = [Strategy.parse(text) for text in ("patch 16, drop 0.5", "drop 0.5, patch 16")]
    assert strategies == [Strategy(0.5, 16)] * 2
    assert [str(strategy) for strategy in strategies] == ["drop 0.5, patch 16"] * 2


@pytest.mark.parametrize(
    "text",
    ["", "drop", "drop 1", "drop 1.5", "drop nan", "drop -0.5", "drop e", "patch 0", "patch -1", "patch 1.5",
     "drop 0.5, drop 0.5", "patch 8, drop 0.5, patch 8", "drop 0.5, base", "drop 0.5 patch 16",
     "base, drop 0.5", "drop 0.5, patch", "Base", "drop 0.5,"],
)  # fmt: skip
def test_parse_refuses_text_that_no_strategy_has(text: str) -> None:
    with pytest.raises(ValueError, match="text") as raised:
        Strategy.parse(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("text", [None, 3, b"base", Strategy()])
def test_parse_refuses_what_is_no_text(text: Any) -> None:
    with pytest.raises(TypeError, match="text") as raised:
        Strategy.parse(text)
    assert repr(text) in str(raised.value)


def test_from_dict_names_an_unknown_field() -> None:
    with pytest.raises(ValueError, match="'dropout'"):
        Strategy.from_dict({"dropout": 0.5})


@pytest.mark.parametrize("fields", [None, [], "base", 3])
def test_from_dict_refuses_what_is_no_mapping(fields: Any) -> None:
    with pytest.raises(TypeError, match="token_dropout and patch_size"):
        Strategy.from_dict(fields)


@given(any_strategy)
def test_a_teacher_shares_the_patch_size_only(strategy: Strategy) -> None:
    assert strategy.without_dropout() == Strategy(0.0, strategy.patch_size)
