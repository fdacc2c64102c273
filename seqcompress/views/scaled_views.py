"""What encoders know of views that are made smaller for them, and how the strategy reaches those who make them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from seqcompress.compressors.patch_scaling import grid_size
from seqcompress.strategy import Strategy

__all__ = ["ScaledViews", "scaled_size"]

Size = tuple[int, int]


class Pipeline(Protocol):
    """Makes views, for whatever patch size."""

    def apply(self, patch_size: int | None) -> None: ...

    def overlaps(self, other: Any) -> bool: ...


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
        self._here: list[Pipeline] = []
        self.base = base
        self.lookahead = 0
        self.shared = torch.zeros((), dtype=torch.int64).share_memory_()  # in pixels; 0 for full views
        self._full: set[Size] = set()
        self._asked_for: dict[Size, Size] = {}
        self._last: int | None = None

    def add(self, pipeline: Pipeline | None, full: Iterable[Size], lookahead: int) -> None:
        """Expect views of these sizes.

        Args:
            pipeline: what makes them, if it does so in this process; it is then told of every change.
            full: sizes of its views at the encoder's own patch size.
            lookahead: steps between the making of a view and its use.
        """
        if pipeline is not None:  # in place of an earlier loader's on the same data set
            self._here = [other for other in self._here if not pipeline.overlaps(other)] + [pipeline]
        self._full.update(full)
        self.lookahead = max(self.lookahead, lookahead)
        self._make(int(self.shared) or None)  # what was asked for with the schedule's next steps in view

    def drop(self, pipeline: Pipeline) -> None:
        """Tell this pipeline no more."""
        self._here = [other for other in self._here if other is not pipeline]

    def full_size(self, view: Size) -> Size:
        """Size of the full view that a view stands for: its own, unless a smaller one was asked for."""
        return self._asked_for.get(view, view)

    def note(self, patch_size: int | None) -> None:
        """Views for this patch size may arrive from now on."""
        for full in self._full:
            size = scaled_size(full, patch_size, self.base)
            if size != full:
                self._asked_for[size] = full

    def conflict(self, patch_size: int) -> str | None:
        """Why views cannot be made for this patch size, or None if they can."""
        made: dict[Size, Size] = {}
        for full in sorted(self._full):
            try:
                size = scaled_size(full, patch_size, self.base)
            except ValueError as error:
                return str(error)
            other = full if size == full else size if size in self._full else made.get(size, self._asked_for.get(size))
            if other not in (None, full):
                return f"views of {_px(full)} made for patch_size {patch_size} would look like those of {_px(other)}"
            made[size] = full
        return None

    def ask_for(self, *strategies: Strategy) -> None:
        """From now on have views made that suit all of these: small ones only if each of them has larger patches."""
        smallest = min(strategy.patch_size or 0 for strategy in strategies)
        if smallest == self._last:
            return
        self._last = smallest
        self._make(None if smallest <= max(self.base) or self.conflict(smallest) else smallest)

    def _make(self, patch_size: int | None) -> None:
        self.note(patch_size)
        self.shared.fill_(patch_size or 0)
        for pipeline in self._here:
            pipeline.apply(patch_size)

    def __del__(self) -> None:
        for pipeline in self._here:  # neither model nor loader is left
            pipeline.apply(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ScaledViews:
        other = ScaledViews(self.base)
        other.lookahead, other._full, other._asked_for = self.lookahead, set(self._full), dict(self._asked_for)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_here": [], "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.shared = self.shared.cpu().share_memory_()  # a file keeps the number only, on whatever device


def _px(size: Size | None) -> str:
    return "?" if size is None else f"{size[0]} x {size[1]} px"
