"""How much one forward pass is shortened: the one value that everything else passes around."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seqcompress.checks import whole_number
from seqcompress.messages import described

_PART = re.compile(r"drop (?P<token_dropout>[0-9.e+-]+)|patch (?P<patch_size>[0-9]+)")
_LARGEST_PATCH = 2**31 - 1  # no view has more; sides are multiplied, and written as text


@dataclass(frozen=True)
class Strategy:
    """One way to shorten a sequence, ``s = (token_dropout, patch_size)``.

    Immutable, hashable, compared by value. ``Strategy()`` is the base strategy: no compression.

    Args:
        token_dropout: share of the patch tokens that is dropped at random, in [0, 1).
        patch_size: side of a patch in pixels, at least 1 and below 2**31; ``None`` means the model's own.

    Raises:
        TypeError: an argument is not a number (``token_dropout``) or not an integer (``patch_size``).
        ValueError: an argument is out of its range or not a number (NaN).

    Examples:
        >>> strategy = Strategy(token_dropout=0.5, patch_size=32)
        >>> str(strategy)
        'drop 0.5, patch 32'
        >>> Strategy.parse("drop 0.5, patch 32") == strategy
        True
    """

    token_dropout: float = 0.0
    patch_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_dropout", _checked_dropout(self.token_dropout))
        if self.patch_size is not None:
            object.__setattr__(self, "patch_size", _checked_patch_size(self.patch_size))

    def __str__(self) -> str:
        parts = []
        if self.token_dropout:
            parts.append(f"drop {self.token_dropout!r}")
        if self.patch_size is not None:
            parts.append(f"patch {self.patch_size}")
        return ", ".join(parts) or "base"

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Read back what ``str(strategy)`` wrote; its two parts may come in either order.

        Raises:
            TypeError: ``text`` is not a string.
            ValueError: ``text`` is not a strategy's text, or names a value out of range.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string such as 'drop 0.5, patch 32', got {described(text)}")
        parts = " ".join(text.split()).split(", ")
        found = [] if parts == ["base"] else [_PART.fullmatch(part) for part in parts]
        fields = {match.lastgroup: match[match.lastgroup] for match in found if match and match.lastgroup}
        if len(fields) < len(found):  # a part is of another kind, or there twice
            raise ValueError(
                f"text must read 'base', 'drop 0.5', 'patch 32' or 'drop 0.5, patch 32', got {described(text)}"
            )
        size = fields.get("patch_size")
        try:
            return cls(float(fields.get("token_dropout", "0")), None if size is None else int(size))
        except ValueError as error:
            raise ValueError(f"text {described(text)} is not a strategy: {error}") from None

    def without_dropout(self) -> Strategy:
        """The part of this strategy that a teacher shares: its patch size."""
        return Strategy(0.0, self.patch_size)

    def to_dict(self) -> dict[str, float | int | None]:
        """The two fields as plain JSON values."""
        return {"token_dropout": self.token_dropout, "patch_size": self.patch_size}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Strategy:
        """Inverse of [to_dict][seqcompress.Strategy.to_dict]; a missing field takes its default.

        Raises:
            TypeError: ``fields`` is not a mapping, or a value has the wrong type.
            ValueError: a field is unknown or out of range.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"a strategy must be an object with token_dropout and patch_size, got {described(fields)}")
        unknown = sorted(str(name) for name in fields if name not in ("token_dropout", "patch_size"))
        if unknown:
            raise ValueError(f"unknown field {described(unknown[0])}: a strategy has token_dropout and patch_size")
        return cls(**fields)


def _checked_dropout(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"token_dropout must be a number in [0, 1), got {described(value)}")
    number: Any = value
    # Checked before and after: a fraction may be below 1 and its nearest float not.
    if not 0 <= number < 1 or float(number) == 1.0:
        raise ValueError(f"token_dropout must be in [0, 1), got {described(value)}")
    return float(number) + 0.0  # turns -0.0 into 0.0


def _checked_patch_size(value: Any) -> int:
    try:
        size = whole_number(value)
    except TypeError:
        raise TypeError(f"patch_size must be a whole number of pixels or None, got {described(value)}") from None
    if size < 1:
        raise ValueError(f"patch_size must be at least 1 pixel, got {described(value)}")
    if size > _LARGEST_PATCH:
        raise ValueError(f"patch_size must be at most {_LARGEST_PATCH} pixels, got {described(value)}")
    return size
