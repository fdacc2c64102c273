"""Randomized token dropout: keep a uniformly random subset of the patches of every view.

Source: Lin et al., NeurIPS 2024 (arXiv 2410.22364). Position information does not depend on which patches
stay, so the subset is drawn before anything is embedded and only the kept patches are.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["SubsetStream", "num_kept", "random_subset"]


def num_kept(num_patches: int, token_dropout: float) -> int:
    """How many of ``num_patches`` patch tokens stay: at least one."""
    return max(1, round((1.0 - token_dropout) * num_patches))


def random_subset(batch: int, num_patches: int, kept: int, *, seed: int, device: torch.device) -> Tensor:
    """Uniformly random subsets without replacement, independent for every sample.

    Args:
        batch: number of samples B.
        num_patches: number of patches N to choose from.
        kept: number of patches K that stay.
        seed: decides the subsets; the same seed gives the same ones.
        device: where they are drawn.

    Returns:
        Indices of the kept patches, in no particular order, int64 of shape (B, K).
    """
    generator = torch.Generator(device).manual_seed(seed)
    scores = torch.rand(batch, num_patches, generator=generator, device=device)  # (B, N)
    return scores.topk(kept, dim=1, sorted=False).indices  # (B, K)


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
        self._anchor: tuple[int, int] | None = None
        self._forwards: dict[int, int] = {}

    def anchor(self, seed: int, step: int) -> None:
        """From now on draw what belongs to ``step`` of the run that ``seed`` names."""
        self._anchor = (seed, step)
        self._forwards.clear()

    def next_seed(self) -> int:
        """The seed of the forward that is about to run. Takes one number from torch's CPU random state."""
        tag = int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())
        if self._anchor is None:
            parts: tuple[int, ...] = (tag, _rank())
        else:
            parts = (*self._anchor, self._forwards.setdefault(tag, len(self._forwards)), _rank())
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
