"""Arguments that are numbers: each is what it should be, or one error names it, its value and what was expected."""

from __future__ import annotations

import numbers
import operator
from typing import Any

from seqcompress.messages import described

__all__ = ["checked_count", "checked_progress", "checked_share", "whole_number"]

_MANY = 2**64  # more than anything counts; below it, numbers fit into files and random seeds


def whole_number(value: Any) -> int:
    """A whole number of Python's, NumPy's or torch's, and no truth value of theirs.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        raise TypeError
    return operator.index(value)


def checked_count(value: Any, name: str, *, at_least: int) -> int:
    """An argument that counts something, as a whole number.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is less than ``at_least``, or 2**64 or more.
    """
    try:
        count = whole_number(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {described(value)}") from None
    if not at_least <= count < _MANY:
        expected = "below 2**64" if count >= _MANY else f"of at least {at_least}"
        raise ValueError(f"{name} must be a whole number {expected}, got {described(value)}")
    return count


def checked_progress(value: Any, name: str) -> float:
    """An argument that is a share of training, as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not in [0, 1]. Both messages begin with ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in [0, 1], got {described(value)}")
    number: Any = value
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {described(value)}")
    return float(number) + 0.0  # turns -0.0 into 0.0


def checked_share(value: Any, name: str) -> float:
    """An argument that is a share of something, and not none of it.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not in (0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in (0, 1], got {described(value)}")
    number: Any = value
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {described(value)}")
    return float(number)
