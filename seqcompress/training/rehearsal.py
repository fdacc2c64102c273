"""Find out at the start whether a run fits into memory at its longest sequences, and what would if it does not."""

from __future__ import annotations

import copy
import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from seqcompress.compression import described
from seqcompress.encoders import CompressedPatchEmbed, Forward
from seqcompress.strategy import Strategy
from seqcompress.training.cost import sequence_length
from seqcompress.training.random_states import RandomStates
from seqcompress.training.ranks import Ranks
from seqcompress.training.sequence_scheduler import SequenceScheduler

__all__ = ["Rehearsal", "rehearse"]

_DROPOUTS = [percent / 100 for percent in range(5, 100, 5)]  # what is considered instead of sequences that do not fit


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
    may die at three quarters. Call this once at the start, at the full batch size; best after the first step of
    an optimizer that keeps a state, which takes memory too.

    If it does not fit, ``step`` runs up to 5 times more, with more and more or fewer tokens dropped, to find the
    longest sequences that do. Not so where several processes train together: they would wait for each other.

    Afterwards the strategy, what a Budget counts, and the random states of torch (CPU and CUDA), NumPy and Python
    are as before, whether it fits or not. Whatever else ``step`` changes stays changed, once for every time that it
    ran: gradients, so clear them before you train on; running statistics of batch norm; buffers such as DINO's
    centre or a queue of keys; generators of your own. So leave the momentum update out of ``step``. All of that is
    harmless at the start of a run and not in its middle: do not rehearse as a run goes on from a checkpoint.

    Args:
        scheduler: the run's scheduler.
        step: runs forward, loss and backward on one batch, without the optimizer and the momentum update.

    Returns:
        What the step needed.

    Raises:
        TypeError: an argument has the wrong type.
        MemoryError: it does not fit. The message says at which strategy, about how much it needs (on CUDA devices),
            the longest sequences that fit, and about which batch would.
    """
    if not all(hasattr(scheduler, name) for name in ("embeds", "most_expensive", "use")):  # an OnlineScheduler has, too
        swapped = ": the scheduler comes first, then the step" if isinstance(step, SequenceScheduler) else ""
        raise TypeError(f"scheduler must be a SequenceScheduler, got {described(scheduler)}{swapped}")
    if isinstance(step, nn.Module) or not callable(step):
        raise TypeError(f"step must be a function without arguments, got {described(step)}")
    return rehearse_in(DeviceMemory.of(_device(scheduler)), scheduler, step)


class Memory(Protocol):
    """The books of whoever hands out memory."""

    @property
    def total(self) -> int:
        """Bytes that there are."""

    @property
    def held(self) -> int:
        """Bytes in use now."""

    @property
    def peak(self) -> int:
        """Most bytes in use since the last ``restart``."""

    def restart(self) -> None:
        """Begin a new peak."""

    def tidy(self) -> None:
        """Give back what is not in use."""


class DeviceMemory:
    """Torch's own books on the memory of a CUDA device; what other processes take is not in them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory | None:
        """None for devices other than CUDA's."""
        return cls(device) if device.type == "cuda" else None

    @property
    def total(self) -> int:
        return torch.cuda.get_device_properties(self._device).total_memory

    @property
    def held(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def tidy(self) -> None:
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step that fits, and from it an estimate for more tokens or fewer.

    What is there before the step (weights, the optimizer's state) stays as it is. What the step adds is taken to
    grow in proportion to the tokens that pass forward and backward, all views of the batch together. So it does
    in the batch, and nearly in the length: what a loss needs on top makes the estimate for longer sequences too
    high, attention that is not fused makes it too low, the more so the further away they are.

    Attributes:
        held: bytes in use before the step.
        peak: most bytes in use during the step, more than ``held``.
        tokens: those that passed forward and backward, at least 1.
    """

    held: int
    peak: int
    tokens: int

    def needed(self, tokens: float) -> float:
        """Bytes in use at the peak of a step with so many tokens."""
        return self.held + (self.peak - self.held) * tokens / self.tokens

    def tokens_within(self, limit: float) -> float:
        """Tokens of a step that takes ``limit`` bytes; the inverse of ``needed``."""
        return self.tokens * (limit - self.held) / (self.peak - self.held)


@dataclass(frozen=True)
class Shortage:
    """What a run needs that does not fit, and what would fit. None is for what is not known.

    Attributes:
        strategy: of the longest sequences, which do not fit.
        needed_bytes: what they need, estimated; None as well where the estimate cannot be right.
        reached_bytes: what was in use as torch ran out.
        total_bytes: the device's memory.
        measured: strategy of the step from which the estimates are made.
        fitting: the strategy with the longest sequences that fit; ``measured`` itself if it was ``tried``.
        fitting_tokens: its tokens in a view of the size the encoder was built for.
        tried: whether ``fitting`` was tried, not estimated.
        batch_share: the batch that fits, relative to this one, estimated.
        not_even: a strategy with shorter sequences that do not fit either.
    """

    strategy: Strategy
    needed_bytes: float | None = None
    reached_bytes: int | None = None
    total_bytes: int | None = None
    measured: Strategy | None = None
    fitting: Strategy | None = None
    fitting_tokens: int | None = None
    tried: bool = False
    batch_share: float | None = None
    not_even: Strategy | None = None

    def __str__(self) -> str:
        sentences = [f"the longest sequences of this schedule ({self.strategy}) do not fit into memory."]
        if self.reached_bytes is not None and self.total_bytes is not None:
            ran_out = f"torch ran out at {_size(self.reached_bytes)} of {_size(self.total_bytes)}."
            need = "" if self.needed_bytes is None else f"they need about {_size(self.needed_bytes)}; "
            sentences.append(_capital(need + ran_out))
        if self.not_even is not None:
            sentences.append(f"Not even '{self.not_even}' fits.")
        batch = "" if self.batch_share is None else f" to about {math.floor(100 * self.batch_share)} % of this one"
        end = "a stronger compression"
        if self.fitting is not None:
            end = f"'{self.fitting}' ({self.fitting_tokens} tokens)"
        sentences.append(f"Lower the batch size{batch}, use gradient checkpointing, or end the schedule at {end}.")
        if self.tried:
            sentences.append("The last was tried; what is 'about' is estimated from it.")
        elif self.needed_bytes is not None:
            sentences.append(f"Estimated from a step at '{self.measured}'.")
        return " ".join(sentences)


class Foresight:
    """Looks on while training steps run, and foresees from them what the longest sequences need.

    Call ``begin`` before every step, and ``fitted`` or ``ran_out`` after it; where an optimizer's step belongs to it,
    ``note_backward`` in between.

    Args:
        scheduler: whose encoders run the steps.
        memory: of their device; None gives no figures in bytes.
    """

    def __init__(self, scheduler: SequenceScheduler, memory: Memory | None) -> None:
        self._scheduler = scheduler
        self._memory = memory
        self._before: list[Counter[Forward]] = []
        self._held = 0  # before the latest step
        self._peak: int | None = None  # up to the end of its backward
        self._reached: int | None = None
        self._too_long: Strategy | None = None
        self._fitted: Strategy | None = None
        self._forwards: list[Counter[Forward]] = []  # those of the latest step that fitted
        self._activations = 0

    def begin(self) -> None:
        """A step is about to run."""
        self._before = [embed.tally.copy() for embed in self._scheduler.embeds]
        self._peak = None
        if self._memory is not None:
            self._memory.restart()
            self._held = self._memory.held

    def note_backward(self) -> None:
        """Forward and backward are done: what the optimizer takes from now on does not grow with the sequences."""
        if self._memory is not None:
            self._peak = self._memory.peak

    def fitted(self, strategy: Strategy) -> None:
        """The step, under ``strategy``, is done."""
        self._fitted = strategy
        tallies = (embed.tally for embed in self._scheduler.embeds)
        self._forwards = [tally - before for tally, before in zip(tallies, self._before, strict=True)]
        if self._memory is not None:
            self._activations = (self._peak or self._memory.peak) - self._held

    def ran_out(self, strategy: Strategy) -> None:
        """The step, under ``strategy``, did not fit."""
        self._too_long = strategy
        if self._memory is not None:
            self._reached = max(self._reached or 0, self._memory.peak)

    def rehearsal(self, strategy: Strategy) -> Rehearsal:
        """What the step needed."""
        if self._memory is None:
            return Rehearsal(strategy, None, None)
        return Rehearsal(strategy, self._memory.peak, self._memory.total)

    def shorter(self) -> list[Strategy]:
        """What may be run instead of the longest sequences: at the same patch size, from long to short."""
        longest = self._scheduler.most_expensive()
        by_tokens: dict[int, Strategy] = {}
        for dropout in _DROPOUTS:
            strategy = Strategy(dropout, longest.patch_size)
            by_tokens.setdefault(self._tokens_of_a_view(strategy), strategy)
        full = self._tokens_of_a_view(longest)
        return [strategy for tokens, strategy in by_tokens.items() if tokens < full]

    def shortage(self, *, tried: bool = False) -> Shortage:
        """What to tell a user whose run does not fit.

        Args:
            tried: the latest step that fitted is the longest that does; otherwise, that is estimated.
        """
        longest = self._scheduler.most_expensive()
        total = None if self._memory is None else self._memory.total
        if self._fitted is None:
            not_even = None if self._too_long == longest else self._too_long
            return Shortage(longest, None, self._reached, total, not_even=not_even)
        tokens, measured = self._tokens(longest), self._measured()
        needed: float | None = None
        room: float | None = None
        fitting: Strategy | None = None
        fitting_tokens: int | None = None
        if measured is not None and self._reached is not None:
            room = measured.tokens_within(self._reached)
            needed = measured.needed(tokens) if room < tokens else None
        if tried:
            fitting, room = self._fitted, self._tokens(self._fitted)
        elif room is not None and room < tokens:
            fitting = next(filter(lambda strategy: self._tokens(strategy) <= room, self.shorter()), None)
        # Memory goes with the tokens of the whole batch: so many fewer tokens a view, or so many fewer views.
        share = room / tokens if room is not None and 0.01 * tokens <= room < tokens else None
        if fitting is not None:
            fitting_tokens = self._tokens_of_a_view(fitting)
        return Shortage(
            longest, needed, self._reached, total, self._fitted, fitting, fitting_tokens, tried, batch_share=share
        )

    def _measured(self) -> StepMemory | None:
        tokens = 0 if self._fitted is None else self._tokens(self._fitted)
        if tokens == 0 or self._activations <= 0:
            return None
        # What is held may have changed since then: the optimizer's state has come.
        return StepMemory(self._held, self._held + self._activations, tokens)

    def _tokens(self, strategy: Strategy) -> int:
        """Tokens that pass forward and backward in the latest step that fitted, were it run under ``strategy``."""
        tokens = 0
        for embed, forwards in zip(self._scheduler.embeds, self._forwards, strict=True):
            mine = strategy if embed.drops_tokens else strategy.without_dropout()
            for forward, calls in forwards.items():
                if forward.graph:
                    size = _full_size(embed, (forward.view[2], forward.view[3]))
                    tokens += calls * forward.view[0] * sequence_length(embed.encoder, mine, size)
        return tokens

    def _tokens_of_a_view(self, strategy: Strategy) -> int:
        return sequence_length(self._scheduler.embeds[0].encoder, strategy)


def rehearse_in(memory: Memory | None, scheduler: SequenceScheduler, step: Callable[[], object]) -> Rehearsal:
    """``rehearse``, in a given memory."""
    foresight = Foresight(scheduler, memory)
    longest = scheduler.most_expensive()
    with _without_a_trace(scheduler):
        failure = _try(step, longest, scheduler, foresight)
        if failure is None:
            return foresight.rehearsal(longest)
        told = ""
        if not Ranks().are_several:
            try:
                _find_what_fits(step, scheduler, foresight, memory)
            except Exception as error:  # whatever it is, that the run does not fit is what matters
                told = f" Shorter sequences could not be tried: {error!r}."
        shortage = foresight.shortage(tried=True)
        raise MemoryError(f"{shortage}{told} torch says: {failure}") from failure


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory was too small. Not every device, and not every library, has a type for it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def _find_what_fits(
    step: Callable[[], object], scheduler: SequenceScheduler, foresight: Foresight, memory: Memory | None
) -> None:
    """Halve what may be the longest sequences that fit, until they are found."""
    strategies = foresight.shorter()
    low, high = 0, len(strategies)
    while low < high:
        middle = (low + high) // 2
        gc.collect()
        if memory is not None:
            memory.tidy()
        if _try(step, strategies[middle], scheduler, foresight) is None:
            high = middle
        else:
            low = middle + 1


def _try(
    step: Callable[[], object], strategy: Strategy, scheduler: SequenceScheduler, foresight: Foresight
) -> RuntimeError | None:
    """Run a step under a strategy; the error if it ran out of memory."""
    scheduler.use(strategy)
    foresight.begin()
    try:
        step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        foresight.ran_out(strategy)
        # Its traceback holds the frames of the step, and these its activations.
        return error.with_traceback(None)
    foresight.fitted(strategy)
    return None


@contextmanager
def _without_a_trace(scheduler: SequenceScheduler) -> Iterator[None]:
    """Put back strategy, random states and tallies."""
    before = scheduler.embeds[0].compression.strategy
    tallies = [embed.tally.copy() for embed in scheduler.embeds]
    random_states = RandomStates()
    streams = {embed.compression: copy.deepcopy(embed.compression.stream) for embed in scheduler.embeds}
    try:
        yield
    finally:
        random_states.restore()
        scheduler.use(before)
        for compression, stream in streams.items():
            compression.stream = stream
        for embed, tally in zip(scheduler.embeds, tallies, strict=True):
            embed.tally = tally


def _device(scheduler: SequenceScheduler) -> torch.device:
    return next(scheduler.embeds[0].parameters()).device


def _full_size(embed: CompressedPatchEmbed, view: tuple[int, int]) -> tuple[int, int]:
    views = embed.compression.views
    return view if views is None else views.full_size(view)


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
