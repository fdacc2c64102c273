"""Find out at the start whether a run fits into memory at its longest sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from seqcompress.sequence_scheduler import SequenceScheduler
from seqcompress.strategy import Strategy

__all__ = ["Rehearsal", "rehearse"]


@dataclass(frozen=True)
class Rehearsal:
    """What the most expensive step of a run needs.

    Attributes:
        strategy: the strategy it was tried at.
        peak_bytes: most memory that torch had in use on the device, or None on the CPU.
        total_bytes: the device's memory, or None on the CPU.
    """

    strategy: Strategy
    peak_bytes: int | None
    total_bytes: int | None

    def __str__(self) -> str:
        if self.peak_bytes is None or self.total_bytes is None:
            return f"the longest sequences ({self.strategy}) fit"
        gib = 2**30
        return (
            f"the longest sequences ({self.strategy}) need {self.peak_bytes / gib:.2f} GiB "
            f"of {self.total_bytes / gib:.2f} GiB"
        )


def rehearse(scheduler: SequenceScheduler, step: Callable[[], object]) -> Rehearsal:
    """Run one training step at the most expensive strategy of a schedule.

    A schedule that relaxes needs more and more memory: without a rehearsal, a job that fits at its first step
    may die at three quarters. Call this once before the loop, at the full batch size.

    The strategy and torch's random states are as before afterwards. Gradients stay where ``step`` left them.

    Args:
        scheduler: the run's scheduler.
        step: runs forward and backward on one batch, without the optimizer.

    Returns:
        What the step needed.

    Raises:
        TypeError: an argument has the wrong type.
        MemoryError: it does not fit; the message says at which strategy and what was in use.
    """
    if not isinstance(scheduler, SequenceScheduler):
        raise TypeError(f"scheduler must be a SequenceScheduler, got {scheduler!r}")
    if not callable(step):
        raise TypeError(f"step must be a function without arguments, got {step!r}")
    embed = scheduler.embeds[0]
    before = embed.compression.strategy
    device = next(embed.parameters()).device
    strategy = scheduler.most_expensive()
    cuda = [device] if device.type == "cuda" else []
    tallies = [embed.tally.copy() for embed in scheduler.embeds]
    with torch.random.fork_rng(devices=cuda):
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        scheduler.use(strategy)
        try:
            step()
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"{does_not_fit(strategy)} torch says: {error}") from error
        finally:
            scheduler.use(before)
            for embed, tally in zip(scheduler.embeds, tallies, strict=True):
                embed.tally = tally
    return Rehearsal(strategy, *memory_use(device))


def does_not_fit(strategy: Strategy) -> str:
    """What to tell a user whose run will not fit, and what would help."""
    return (
        f"the longest sequences of this schedule ({strategy}) do not fit into memory. Lower the batch size, use "
        "gradient checkpointing, or end the schedule at a stronger compression."
    )


def memory_use(device: torch.device) -> tuple[int | None, int | None]:
    """Peak and total bytes of a CUDA device; None for others."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
