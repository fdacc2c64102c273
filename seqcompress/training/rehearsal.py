"""Find out at the start whether a run fits into memory at its longest sequences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from seqcompress.compression import with_partners
from seqcompress.compressors.random_states import RandomStates
from seqcompress.encoders import Encoder
from seqcompress.messages import described
from seqcompress.strategy import Strategy
from seqcompress.training.cost import sequence_length
from seqcompress.training.ranks import Ranks
from seqcompress.training.sequence_scheduler import SequenceScheduler

__all__ = ["Rehearsal", "rehearse"]

_NO_MEMORY = ("out of memory", "can't allocate memory")  # as torch says on a device and on the CPU


@dataclass(frozen=True)
class Rehearsal:
    """What the most expensive step of a run needs.

    Attributes:
        strategy: the strategy it was tried at.
        peak_bytes: most memory that torch had in use on the device, or None where that is not known, as on the CPU.
        total_bytes: the device's memory, or None where that is not known.
    """

    strategy: Strategy
    peak_bytes: int | None
    total_bytes: int | None

    def __str__(self) -> str:
        if self.peak_bytes is None or self.total_bytes is None:
            return f"the longest sequences ({self.strategy}) fit"
        return f"the longest sequences ({self.strategy}) need {_size(self.peak_bytes)} of {_size(self.total_bytes)}"


def rehearse(scheduler: SequenceScheduler, step: Callable[[], object]) -> Rehearsal:
    """Run one training step at the most expensive strategy of a schedule.

    A schedule that relaxes needs more and more memory: without a rehearsal, a job that fits at its first step
    may die at three quarters. Call this once at the start, at the full batch size, on every rank; best after the first
    step of an optimizer that keeps a state, which takes memory too.

    Afterwards the strategy, what a Budget counts, and the random states of torch (CPU and CUDA), NumPy and Python
    are as before, whether it fits or not. Whatever else ``step`` changes stays changed: gradients, so clear them before
    you train on; running statistics of batch norm; buffers such as DINO's centre or a queue of keys; generators of your
    own. So leave the momentum update out of ``step``. All of that is harmless at the start of a run and not in its
    middle: do not rehearse as a run goes on from a checkpoint.

    Args:
        scheduler: the run's scheduler.
        step: runs forward, loss and backward on one batch, without the optimizer and the momentum update.

    Returns:
        What the step needed on this rank.

    Raises:
        TypeError: an argument has the wrong type.
        MemoryError: it does not fit. The message says at which strategy and, on CUDA devices, how much memory was in
            use as torch ran out.
    """
    if not all(hasattr(scheduler, name) for name in ("embeds", "most_expensive", "use")):  # an OnlineScheduler has, too
        swapped = ": the scheduler comes first, then the step" if isinstance(step, SequenceScheduler) else ""
        raise TypeError(f"scheduler must be a SequenceScheduler, got {described(scheduler)}{swapped}")
    if isinstance(step, nn.Module) or not callable(step):
        raise TypeError(f"step must be a function without arguments, got {described(step)}")
    longest = scheduler.most_expensive()
    encoder = scheduler.embeds[0].encoder
    device = next(encoder.model.parameters()).device
    with _all_else_as_before(scheduler):
        scheduler.use(longest)
        forget_peak(device)
        try:
            step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Its traceback holds the frames of the step, and these its activations.
            raise MemoryError(shortage(longest, encoder, device, error)) from error.with_traceback(None)
        return memory_needed(longest, device)


def forget_peak(device: torch.device) -> None:
    """Have ``memory_needed`` say what is needed from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_needed(strategy: Strategy, device: torch.device) -> Rehearsal:
    """What was needed since then, by torch's own books: what other processes take is not in them."""
    if device.type != "cuda":
        return Rehearsal(strategy, None, None)
    total = torch.cuda.get_device_properties(device).total_memory
    return Rehearsal(strategy, torch.cuda.max_memory_allocated(device), total)


def shortage(strategy: Strategy, encoder: Encoder, device: torch.device, error: BaseException) -> str:
    """What to tell a user whose training step does not fit.

    Args:
        strategy: of the step.
        encoder: what was trained.
        device: where.
        error: what torch has said.
    """
    tokens, ranks = sequence_length(encoder, strategy), Ranks()
    who = f"rank {ranks.rank}: " if ranks.is_distributed else ""
    need = memory_needed(strategy, device)
    reached = ""
    if need.peak_bytes is not None and need.total_bytes is not None:
        reached = f": torch ran out at {_size(need.peak_bytes)} of {_size(need.total_bytes)}"
    return (
        f"{who}a training step at '{strategy}' ({tokens} tokens a view) does not fit into memory{reached}. Lower the "
        "batch size, use gradient checkpointing, or let no stage of the schedule have such long sequences. torch says: "
        f"{error}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory was too small. Not every device, and not every library, has a type for it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)
    )


@contextmanager
def _all_else_as_before(scheduler: SequenceScheduler) -> Iterator[None]:
    """Put back strategy, random states and tallies."""
    strategies = {embed.compression: embed.compression.strategy for embed in scheduler.embeds}
    embeds = with_partners(scheduler.embeds)
    tallies = [embed.forward_counts.copy() for embed in embeds]
    random_states = RandomStates()
    streams = {embed.compression: copy.deepcopy(embed.compression.stream) for embed in scheduler.embeds}
    try:
        yield
    finally:
        random_states.restore()
        for compression, stream in streams.items():
            compression.strategy, compression.stream = strategies[compression], stream
        for embed, tally in zip(embeds, tallies, strict=True):
            embed.forward_counts = tally


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
