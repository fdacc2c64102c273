"""What encoders know of views that are made smaller for them, and how the strategy reaches those who make them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch

from seqcompress.compressors.patch_scaling import grid_size
from seqcompress.strategy import Strategy

__all__ = ["ScaledViews", "scaled_size"]

Size = tuple[int, int]


class Follower(Protocol):
    """Has views made, in this process or another."""

    def follow(self) -> None: ...

    def sizes(self) -> set[Size]: ...


def scaled_size(size: Size, patch_size: int | None, base: Size) -> Size:
    """Size of the view that has as many base patches as the full view has larger ones.

    Args:
        size: height and width of the full view, in pixels.
        patch_size: of the strategy, in pixels; ``None`` for the encoder's own.
        base: height and width of the encoder's own patches.

    Raises:
        ValueError: the patch is larger than a side of the view.
    """
    if patch_size is None or patch_size <= max(base):
        return size  # smaller patches need all the pixels there are
    grid = grid_size(size, (patch_size, patch_size))
    return grid[0] * base[0], grid[1] * base[1]


_VIEWS_A_STEP = 50  # more than the forwards of any step, those of all views through student and teacher


class ScaledViews:
    """The agreement between encoders and the loaders that make views for them.

    The patch size that views are to be made for lies in shared memory, where workers look after every batch. Batches
    that are under way at a change still have the size of before: encoders take a view of any size that was asked for
    as the full view at another resolution, so that the number of tokens is always the strategy's.

    A copy of a model has a copy of its own, which no loader follows.

    Args:
        base: height and width of the encoders' own patches, in pixels.
    """

    def __init__(self, base: Size) -> None:
        self._followers: WeakSet[Any] = WeakSet()  # nothing is kept alive here: neither loaders nor their data sets
        self.base = base
        self.lookahead = 0
        self.shared = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()  # in pixels; 0 for full views
        self._full: set[Size] = set()
        self._asked_for: dict[Size, Size] = {}
        self._last: int | None = None
        self._stopped = False
        self._now = Strategy()
        self._full_in_a_row = 0

    def add(self, follower: Follower | None, full: Iterable[Size], lookahead: int) -> None:
        """Expect views of these sizes.

        Args:
            follower: what makes them; asked for sizes that are not known. Those of this process learn of changes.
            full: sizes of its views at the encoder's own patch size.
            lookahead: steps between the making of a view and its use.
        """
        if follower is not None:
            self.join(follower)
        self._full.update(full)
        self._stopped = False
        self.lookahead = max(self.lookahead, lookahead)
        self._make(int(self.shared) or None if self._last is None else self._suitable(self._last))

    def join(self, follower: Follower) -> None:
        """Tell this one of changes, too, as long as it lives."""
        self._followers.add(follower)

    def full_size(self, view: Size) -> Size:
        """Size of the full view that a view stands for: its own, unless a smaller one was asked for."""
        return self._asked_for.get(view, view)

    def observe(self, view: Size) -> None:
        """A view of this size has come to an encoder; where those that were asked for do not, all are full from now."""
        if view not in self._asked_for and view not in self._full and self._asked_for and not self._stopped:
            self._look_again()
            if view not in self._asked_for and view not in self._full:
                self.stop(
                    f"views of {px(view)} reach the encoder, which no loader was asked for: if they are cropped or "
                    "resized once more on their way, put that into the data set, or give that module to scale_views"
                )
        if not self._stopped and self._is_larger_than_asked_for(view):
            self.stop(
                f"views of {px(view)} keep coming where smaller ones are asked for: if they are cropped or resized to "
                "that size once more on their way, put that into the data set, or give that module to scale_views"
            )

    def _is_larger_than_asked_for(self, view: Size) -> bool:
        """Whether none but full views have come for longer than those take that are under way."""
        wanted = int(self.shared)
        if not wanted or view not in self._full or scaled_size(view, wanted, self.base) == view:
            self._full_in_a_row = 0
            return False
        self._full_in_a_row += 1
        return self._full_in_a_row > _VIEWS_A_STEP * (self.lookahead + 2)

    def replace(self, before: set[Size], now: set[Size]) -> None:
        """The owner of a data set has given its crops other sizes."""
        self._full = (self._full - before) | now
        self._asked_for = {size: full for size, full in self._asked_for.items() if size not in now}
        if self._last is not None:
            self._share(self._suitable(self._last))

    def stop(self, why: str) -> None:
        """Go on with full views, and say so: a wrong guess costs speed, never data."""
        self._stopped = True
        self._make(None)
        warnings.warn(f"seqcompress: {why}. Training goes on with full views.", stacklevel=3)

    def _look_again(self) -> None:
        for follower in list(self._followers):
            follower.sizes()

    def expect_views_for(self, patch_size: int | None) -> None:
        """Views for this patch size may arrive from now on."""
        for full in self._full:
            size = scaled_size(full, patch_size, self.base)
            if size != full:
                self._asked_for[size] = full

    def conflict(self, patch_size: int, full: Iterable[Size] = ()) -> str | None:
        """Why views cannot be made for this patch size, or None if they can."""
        made: dict[Size, Size] = {}
        known = self._full.union(full)
        for view in sorted(known):
            try:
                size = scaled_size(view, patch_size, self.base)
            except ValueError as error:
                return str(error)
            other = view if size == view else size if size in known else made.get(size, self._asked_for.get(size))
            if other not in (None, view):
                return f"views of {px(view)} made for patch_size {patch_size} would look like those of {px(other)}"
            made[size] = view
        return None

    def ask_for(self, *strategies: Strategy) -> None:
        """From now on have views made that suit all of these: small ones only if each of them has larger patches."""
        self._now = strategies[0]
        smallest = min(strategy.patch_size or 0 for strategy in strategies)
        if smallest == self._last:
            return
        self._last = smallest
        self._make(self._suitable(smallest))

    def ask_ahead(self, strategy_after: Callable[[int], Strategy]) -> None:
        """``ask_for`` what is in force now and during the steps until a view that is made now is used.

        Args:
            strategy_after: the strategy after so many more steps.
        """
        self.ask_for(*map(strategy_after, range(self.lookahead + 1)))

    def wanted_now(self) -> int | None:
        """The patch size for which a view is to be made that is used at once; None for a full one."""
        return self._suitable(self._now.patch_size or 0)

    def _suitable(self, patch_size: int) -> int | None:
        small = patch_size > max(self.base) and not self._stopped and not self.conflict(patch_size)
        return patch_size if small else None

    def _share(self, patch_size: int | None) -> None:
        self.expect_views_for(patch_size)
        self.shared.fill_(patch_size or 0)

    def _make(self, patch_size: int | None) -> None:
        self._share(patch_size)
        for follower in list(self._followers):
            follower.follow()

    def __deepcopy__(self, memo: dict[int, Any]) -> ScaledViews:
        other = ScaledViews(self.base)
        other.lookahead, other._full, other._asked_for = self.lookahead, set(self._full), dict(self._asked_for)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_followers": None, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._followers = WeakSet()
        self.shared = self.shared.cpu()  # a file keeps the number only, on whatever device
        if not self.shared.is_shared():  # what is shared already, a worker must not copy
            self.shared.share_memory_()


def px(size: Sequence[int] | None) -> str:
    """A size for people."""
    return "?" if size is None else f"{size[0]} x {size[1]} px"
