"""Randomized token dropout: keep a uniformly random subset of the patches of every view.

Source: Lin et al., NeurIPS 2024 (arXiv 2410.22364). Position information does not depend on which patches
stay, so the subset is drawn before anything is embedded and only the kept patches are.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from seqcompress.compressors.execution import in_backward
from seqcompress.compressors.tables import Table

__all__ = [
    "SubsetStream",
    "first_rows",
    "gather_patches",
    "num_kept",
    "random_subset",
    "rows_of_patches",
]

_REMEMBERED = 10_000  # forwards; far more than ever wait for their backward pass at once


def num_kept(num_patches: int, token_dropout: float) -> int:
    """How many of ``num_patches`` patch tokens stay: at least one."""
    return max(1, round((1.0 - token_dropout) * num_patches))


def random_subset(batch: int, num_patches: int, kept: int, *, seed: int | None, device: torch.device) -> Tensor:
    """Uniformly random subsets without replacement, independent for every sample.

    Args:
        batch: number of samples B.
        num_patches: number of patches N to choose from.
        kept: number of patches K that stay.
        seed: decides the subsets; the same seed gives the same ones. ``None`` draws from the device's random state.
        device: where they are drawn.

    Returns:
        Indices of the kept patches, in no particular order, int64 of shape (B, K).
    """
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    scores = torch.rand(batch, num_patches, generator=generator, device=device, dtype=torch.float32)  # (B, N)
    return scores.topk(kept, dim=1, sorted=False).indices  # (B, K)


def gather_patches(views: Tensor, kept: Tensor, patch_rows: Tensor, patch: tuple[int, int]) -> Tensor:
    """Read only the kept patches from views.

    Args:
        views: pixels of shape (B, C, gh * h, gw * w), contiguous or in channels-last format: any other is copied.
        kept: indices of patches, counted row by row, of shape (B, K).
        patch_rows: which rows each patch consists of, from ``rows_of_patches``.
        patch: height h and width w of a patch, in pixels.

    Returns:
        Pixels of shape (B, K, C, h, w).
    """
    batch, channels = views.shape[:2]
    channels_last = not views.is_contiguous() and views.is_contiguous(memory_format=torch.channels_last)
    if channels_last:
        # There the w pixels of a row lie with those of all other channels: the rows of one channel are all rows.
        views, patch_rows = views.permute(0, 2, 3, 1), patch_rows[:, : patch[0]]  # (B, H, W, C), (N, h)
    # A row of a patch is w pixels that lie side by side: selecting such rows copies whole pieces of memory.
    length = patch[1] * (channels if channels_last else 1)
    rows = views.reshape(batch * patch_rows.numel(), length)  # (B * C * gh * h * gw, w) or (B * gh * h * gw, w * C)
    index = F.embedding(kept, patch_rows)  # (B, K, C * h) or (B, K, h)
    index = index + first_rows(batch, patch_rows.numel(), views.device)  # what checkpointing has kept stays as it is
    pixels = rows.index_select(0, index.flatten())
    if channels_last:
        return pixels.view(*kept.shape, *patch, channels).movedim(-1, 2)
    return pixels.view(*kept.shape, channels, *patch)


@Table
def first_rows(batch: int, in_a_view: int, device: torch.device) -> Tensor:
    """Where each view's rows begin among those of the batch: (B, 1, 1)."""
    return (in_a_view * torch.arange(batch, device=device)).view(-1, 1, 1)


@Table
def rows_of_patches(channels: int, grid: tuple[int, int], patch: tuple[int, int], device: torch.device) -> Tensor:
    """For each patch of a view, which of its rows of w pixels it consists of: (N, C * h)."""
    rows = torch.arange(channels * grid[0] * patch[0] * grid[1], device=device)
    rows = rows.view(channels, grid[0], patch[0], grid[1]).permute(1, 3, 0, 2)  # (gh, gw, C, h)
    return rows.reshape(grid[0] * grid[1], -1)


class SubsetStream:
    """The seeds of one model's random subsets.

    On its own, every seed comes from torch's global CPU random state, as in dropout: ``torch.manual_seed``
    decides it, and gradient checkpointing, which puts that state back before it runs a forward again, gets
    the same subset again.

    A [SequenceScheduler][seqcompress.SequenceScheduler] anchors the stream at ``(seed, step)``: then a seed
    depends on the anchor and on which forward of the step it is, so that a resumed run draws what it would
    have drawn had it not stopped. A forward is told from its re-run under gradient checkpointing by one
    number that each of them takes from the global random state: the same number, the same forward.

    The rank of the process in its group goes into every seed: ranks draw different subsets.
    """

    def __init__(self) -> None:
        self._anchor: tuple[int, int, int] | None = None
        self._forwards: dict[int, int] = {}  # the latest of this step: their numbers by their tags
        self._count = 0

    @property
    def forwards(self) -> int:
        """Forwards of the step so far, those that run again not counted."""
        return self._count

    def anchor(self, seed: int, step: int, model: int = 0, forwards: int = 0) -> None:
        """From now on draw what belongs to ``step`` of the run that ``seed`` names, for its ``model``-th model.

        After so many ``forwards`` of that step, where a run goes on in the middle of it.
        """
        self._anchor = (seed, step, model)
        self._forwards.clear()
        self._count = forwards

    def next_seed(self) -> int:
        """The seed of the forward that is about to run. Takes one number from torch's CPU random state.

        Raises:
            RuntimeError: gradient checkpointing runs a forward again without its random state.
        """
        tag = int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())
        if tag not in self._forwards:
            if in_backward():
                raise RuntimeError("gradient checkpointing of a compressed encoder needs preserve_rng_state=True")
            if len(self._forwards) == _REMEMBERED:  # where no step is ever taken
                del self._forwards[next(iter(self._forwards))]
            self._forwards[tag] = self._count
            self._count += 1
        parts = (tag,) if self._anchor is None else (*self._anchor, self._forwards[tag])
        digest = hashlib.blake2b(repr((*parts, _rank())).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
