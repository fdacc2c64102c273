"""Plans for those who choose none: schedules made for a model's own patch and view size."""

from __future__ import annotations

from collections.abc import Callable

from seqcompress.schedules import Online, Schedule, Stepwise
from seqcompress.strategy import Strategy

__all__ = ["DEFAULT", "PRESETS", "double_patch"]


def double_patch(patch: int, side: int) -> int:
    """A patch size near twice the model's own, and no larger than the view: one that divides the view, if one does.

    Between 1.7 and 2.3 times the model's own, unless the view is smaller than that.

    Args:
        patch: the model's patch size, in pixels.
        side: side of the view, in pixels.

    Examples:
        >>> double_patch(16, 224), double_patch(4, 28), double_patch(8, 8)
        (32, 7, 8)
    """
    fitting = [size for size in range(patch + 1, side + 1) if side % size == 0 and 1.7 <= size / patch <= 2.3]
    return min(fitting, key=lambda size: abs(size - 2 * patch), default=min(2 * patch, side))


def _default(large: int) -> Stepwise:
    return Stepwise({0.0: Strategy(0.5, large), 0.98: Strategy()})


def _gentle(large: int) -> Schedule:
    return Stepwise({0.0: Strategy(0.0, large), 0.25: Strategy(0.5), 0.75: Strategy()})


def _strong(large: int) -> Schedule:
    return Stepwise({0.0: Strategy(0.5, large)})


def _online(large: int) -> Schedule:
    return Online(_default(large))


DEFAULT = "default"
PRESETS: dict[str, Callable[[int], Schedule]] = {
    DEFAULT: _default,
    "gentle": _gentle,
    "strong": _strong,
    "online": _online,
}
