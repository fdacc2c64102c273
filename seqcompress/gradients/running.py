"""Running training steps that leave no trace: compressed as asked, from one random state a batch, timed, and undone.

What a run changes is found and put back by [Snapshot][seqcompress.gradients.state.Snapshot]. This file knows nothing of
what the gradients are for: whoever runs a batch says what takes them.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from seqcompress.compression import blank_per_view_of, compressed_embeds
from seqcompress.compressors import SubsetStream
from seqcompress.compressors.random_states import RandomStates
from seqcompress.encoders import CompressedPatchEmbed, Compression
from seqcompress.encoders.sharding import whole
from seqcompress.gradients.measured_encoder import MeasuredEncoder
from seqcompress.gradients.state import Snapshot
from seqcompress.messages import described
from seqcompress.schedules import Constant
from seqcompress.strategy import Strategy
from seqcompress.training.cost import Flops

__all__ = ["Clock", "GradientConsumer", "Runner", "objects_in", "running", "seed_of"]

_BASE = Strategy()

GradientConsumer: TypeAlias = Callable[[list[Tensor]], None]
"""What takes the gradient of one run. It is the run's own: the next run makes a new one."""


@contextmanager
def running(
    encoders: Sequence[MeasuredEncoder],
    parameters: Sequence[nn.Parameter],
    step: Callable[[Any], Tensor],
    after_backward: Callable[[], object] | None,
    roots: Iterable[object],
    *,
    seed: int,
    timed: bool = False,
    first: int = 0,
    warm_up: bool = True,
    must_be_finite: bool = True,
    reported: set[str] | None = None,
    strict: bool = False,
) -> Iterator[Runner]:
    """Run steps that leave no trace: in the end everything is as it was found, also after an error.

    Args:
        encoders: what is compressed, differently in every run.
        parameters: with respect to these the gradient is taken.
        step: as in [gradient_error][seqcompress.gradient_error].
        after_backward: likewise.
        roots: what is put back beside what ``step`` can get at; may contain None.
        seed: decides the random state of a batch's runs, together with its number.
        timed: measure seconds, of complete steps; else FLOPs.
        first: number of the first batch.
        warm_up: run the first batch once more before, and warn if its loss is not the same.
        must_be_finite: a loss or a gradient with infinite values or NaN is an error. Else such a gradient is used as
            it is, and one of a loss that is not finite is NaN.
        reported: names of what could not be put back that the user was told of, none of them twice.
        strict: raise what would be a warning.
    """
    random_states = RandomStates()
    with _compressed(encoders) as compression:
        runner = Runner(
            compression,
            encoders,
            parameters,
            step,
            after_backward,
            Snapshot(roots, [step, after_backward]),
            seed=seed,
            timed=timed,
            number=first,
            warm_up=warm_up,
            must_be_finite=must_be_finite,
            reported=set() if reported is None else reported,
            strict=strict,
        )
        try:
            yield runner
        finally:
            _complete(runner.put_back, random_states.restore)


def _nothing(gradient: list[Tensor]) -> None:
    """What the time alone is taken of."""


class _StepResult(NamedTuple):
    """One step that was run."""

    loss: float
    seconds: float
    flops: int


@dataclass
class Runner:
    """Runs the steps. Each begins with everything as it was found, and a random state of its batch.

    Its fields are what ``running`` is given; ``number`` is that of the next batch.
    """

    compression: Compression
    encoders: Sequence[MeasuredEncoder]
    parameters: Sequence[nn.Parameter]
    step: Callable[[Any], Tensor]
    after_backward: Callable[[], object] | None
    state: Snapshot
    seed: int
    timed: bool
    number: int
    warm_up: bool
    must_be_finite: bool
    reported: set[str]
    strict: bool

    def __post_init__(self) -> None:
        self._embeds: list[CompressedPatchEmbed] = [measured.embed for measured in self.encoders]
        self._order = random.Random(self.seed)
        self._flops = Flops(measured.encoder for measured in self.encoders)
        self._batch = Snapshot(())

    def measure(self, batch: Any, consumers: Mapping[Strategy, GradientConsumer]) -> dict[Strategy, float]:
        """Run one batch under strategies, the base among them and first, and let their gradients be used.

        Returns:
            Seconds or FLOPs of each.
        """
        self._batch = Snapshot([batch])
        others = [strategy for strategy in consumers if strategy != _BASE]
        timed = [_BASE, *others] if self.timed else []
        warm_up = [self._run(batch, each, complete=self.timed) for each in timed or [_BASE]] if self.warm_up else []
        base = self._run(batch, _BASE, consume=consumers[_BASE])  # incomplete: its gradient must stay as it is
        if warm_up and (difference := _difference(warm_up[0].loss, base.loss)):
            self._warn_or_raise(difference)
        spent: dict[Strategy, float] = {_BASE: base.flops}
        for strategy in self._order.sample(timed, len(timed)) if self.timed else others:
            consume = _nothing if strategy == _BASE else consumers[strategy]
            ran = self._run(batch, strategy, consume=consume, complete=self.timed)
            spent[strategy] = ran.seconds if self.timed else ran.flops
        self.put_back()
        self._report_changes()
        self._batch = Snapshot(())  # lets go of the batch
        self.number += 1
        self.warm_up = False
        return spent

    def put_back(self) -> None:
        """Leave everything as it was found, the batch too."""
        self._batch.restore()
        self.state.restore()

    def _report_changes(self) -> None:
        changed = [name for name in self.state.not_restored() if name not in self.reported]
        if changed:
            self.reported.update(changed)
            self._warn_or_raise(
                f"measuring has changed what it cannot put back: {', '.join(changed)}. What step changes should be "
                "tensors, random generators, lists, dicts, or attributes of objects of one's own."
            )

    def _warn_or_raise(self, problem: str) -> None:
        if self.strict:
            raise ValueError(problem)
        warnings.warn(problem, stacklevel=6)

    def _run(
        self, batch: Any, strategy: Strategy, *, consume: GradientConsumer = _nothing, complete: bool = False
    ) -> _StepResult:
        """One step; a complete one goes on after the backward pass."""
        self.put_back()
        self.state.clear_gradients()
        self.compression.strategy = strategy
        seed = seed_of(self.seed, self.number)
        RandomStates.seed(seed)
        self.state.seed(seed)
        for embed in self._embeds:
            embed.forward_counts.clear()
        where = f"step on batch {self.number} under {strategy!s}"
        clock = Clock(self.parameters[0].device)
        with torch.enable_grad(), clock, _GradientWatch(self.parameters) as watch:
            loss = self.step(batch)
            if watch.parameters:
                raise ValueError(f"{where} must leave the backward pass to the analysis, got one that calls backward")
            _check_loss(loss, where)
            loss.backward()
        value = float(loss.detach())
        del loss
        if self.must_be_finite and not math.isfinite(value):
            raise ValueError(f"{where} must return a finite loss, got {value}")
        if not any(forward.graph for embed in self._embeds for forward in embed.forward_counts):
            raise ValueError(f"{where} must run the encoder in train mode, got a loss that did not pass through it")
        views = self.compression.views
        for size in {(forward.view[2], forward.view[3]) for embed in self._embeds for forward in embed.forward_counts}:
            if views is not None and views.full_size(size) != size:
                raise ValueError(
                    f"{where} must get full views, got some of {size[0]} x {size[1]} px that scale_views made smaller: "
                    f"no gradient without compression can be had from them"
                )
        self._check_gradients(watch, where)
        gradient = self._gradient(where)  # whatever the loss: all ranks of a sharded model gather it
        consume(gradient if math.isfinite(value) else self._no_gradient())
        flops = self._flops(embed.forward_counts for embed in self._embeds)
        if complete and self.after_backward is not None:
            with clock:
                self.after_backward()
        return _StepResult(value, clock.seconds, flops)

    def _gradient(self, where: str) -> list[Tensor]:
        gradient = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in self.parameters
        ]
        gradient = [part.to_dense() if part.is_sparse else whole(part) for part in gradient]
        if self.must_be_finite and not bool(torch.stack([part.isfinite().all() for part in gradient]).all()):
            raise ValueError(f"{where} must give a finite gradient, got infinite values or NaN")
        return gradient

    def _no_gradient(self) -> list[Tensor]:
        """Of a loss that is not finite."""
        return [parameter.new_full(parameter.shape, math.nan) for parameter in map(whole, self.parameters)]

    def _check_gradients(self, watch: _GradientWatch, where: str) -> None:
        """Raise ValueError unless the gradients are there that the backward pass has made."""
        made = watch.parameters
        gone = sum(parameter.grad is None for parameter in made)
        if gone:
            raise ValueError(
                f"{where} must leave its gradients in .grad, got {gone} of {len(made)} that were gone after the "
                "backward pass: something takes them there, such as an optimizer that steps in a parameter's hook"
            )
        if all(parameter.grad is None for parameter in self.parameters):
            raise ValueError(f"{where} must give model a gradient, got none on any of its parameters that require grad")


class _GradientWatch:
    """Notes which parameters get a gradient while a ``with`` block runs, whether it is still there or not."""

    def __init__(self, watched: Iterable[nn.Parameter]) -> None:
        self._watched = watched
        self._by_id: dict[int, nn.Parameter] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that got one."""
        return list(self._by_id.values())

    def __enter__(self) -> _GradientWatch:
        self._hooks = [each.register_post_accumulate_grad_hook(self._note) for each in self._watched]
        return self

    def __exit__(self, *raised: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, parameter: Tensor) -> None:
        self._by_id[id(parameter)] = parameter  # type: ignore[assignment]


class Clock:
    """Adds up the seconds spent in ``with`` blocks; waits for a CUDA device at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    def __enter__(self) -> None:
        self._synchronize()
        self._start = time.perf_counter()

    def __exit__(self, *raised: object) -> None:
        self._synchronize()
        self.seconds += time.perf_counter() - self._start

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _difference(first: float, second: float) -> str | None:
    """What is wrong with a step that gave these losses for the same batch, if anything is."""
    if not math.isfinite(first + second) or math.isclose(first, second, rel_tol=1e-2, abs_tol=1e-6):
        return None
    return (
        f"step is not reproducible: the same batch and random state gave the losses {first:.6g} and {second:.6g} "
        "without compression. It changes something that was not found: pass that to protect=."
    )


def _check_loss(loss: object, where: str) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else described(loss)
        raise ValueError(f"{where} must return a scalar loss, got {got}")
    if not loss.requires_grad:
        raise ValueError(f"{where} must return a loss that can be differentiated, got one without a graph")


class _PacedStream(SubsetStream):
    """Takes one number from the random state at every forward, so that the base takes as many as any strategy."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._next = super().next_seed()

    def next_seed(self) -> int:
        return self._next


@contextmanager
def _compressed(encoders: Sequence[MeasuredEncoder]) -> Iterator[Compression]:
    """Compress the encoders with a compression of their own; afterwards they are as they were."""
    stream = _PacedStream()
    found = compressed_embeds(*(measured.encoder.model for measured in encoders))
    views = next((embed.compression.views for embed in found), None)
    compression = Compression(Constant(_BASE), stream, copy.deepcopy(views))
    undo: list[Callable[[], object]] = []
    try:
        for measured in encoders:
            embeds = compressed_embeds(measured.encoder.model)
            if embeds:
                embed = embeds[0]
                undo.append(_Reset(embed))
                embed.compression, embed.forward_counts = compression, Counter()
                embed.drops_tokens, embed.when = measured.is_student, measured.when
            else:
                blank_per_view = blank_per_view_of(measured.encoder, measured.role)
                embed = measured.encoder.attach(compression, drops_tokens=measured.is_student, when=measured.when)
                embed.blank_per_view = blank_per_view
                undo.append(_Detach(embed))
            if measured.is_student:
                undo.append(embed.register_forward_pre_hook(stream, prepend=True).remove)
        yield compression
    finally:
        _complete(*reversed(undo))


def _complete(*undo: Callable[[], object]) -> None:
    """Do all of it, each of which may be done twice: Ctrl-C on the way waits until everything is as it was."""
    interrupt = None
    for each in undo:
        try:
            each()
        except KeyboardInterrupt as error:
            interrupt = error
            each()
    if interrupt is not None:
        raise interrupt


class _Reset:
    """Gives an embedding that was compressed before its own compression back."""

    def __init__(self, embed: CompressedPatchEmbed) -> None:
        self._embed = embed
        self._kept = {name: getattr(embed, name) for name in ("compression", "drops_tokens", "when", "forward_counts")}

    def __call__(self) -> None:
        for name, value in self._kept.items():
            setattr(self._embed, name, value)


@dataclass(frozen=True)
class _Detach:
    """Takes the compressors out of an encoder that had none."""

    embed: CompressedPatchEmbed

    def __call__(self) -> None:
        self.embed.encoder.detach()
        self.embed.release()


def objects_in(protect: object) -> list[object]:
    """The objects that ``protect=`` names."""
    return list(protect) if isinstance(protect, (list, tuple)) else [protect]


def seed_of(seed: int, number: int) -> int:
    """A seed of its own for the number of a batch, or of whatever else is counted."""
    digest = hashlib.blake2b(repr((seed, number)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
