"""Measuring how far the gradient under a strategy is from the uncompressed one, and what a step costs.

Definitions: Lin et al., NeurIPS 2024 (arXiv 2410.22364) for CA-MSE; the paired, debiased estimators are this project's.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from seqcompress.compression import blank_per_view_of, check_roles, compressed_embeds, find_pair, is_compressed
from seqcompress.compressors import SubsetStream
from seqcompress.compressors.random_states import RandomStates
from seqcompress.encoders import CompressedPatchEmbed, Compression, Encoder, When
from seqcompress.encoders.sharding import is_wrapped, whole
from seqcompress.gradients.report import CostKind, GradientErrorReport, canonical
from seqcompress.gradients.state import Generators, Snapshot
from seqcompress.gradients.statistics import GradientMoments, interquartile_mean, jackknife
from seqcompress.messages import described
from seqcompress.schedules import Constant
from seqcompress.strategy import Strategy
from seqcompress.training.cost import Flops

__all__ = ["gradient_error"]

Batch = TypeVar("Batch")

NO_GRADIENT = (
    "step must give model a gradient, got one of zeros under every strategy on every batch: something may take it in "
    "the backward pass, such as an optimizer that steps in a parameter's hook"
)
SKETCH_SIZE = 2**15  # for leave-one-out values; models with fewer parameters need no sketch
_BASE = Strategy()


def gradient_error(
    model: nn.Module,
    step: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    strategies: Iterable[Strategy],
    *,
    teacher: nn.Module | None = None,
    after_backward: Callable[[], object] | None = None,
    protect: object = (),
    cost: CostKind = "measured",
    sketch: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> GradientErrorReport:
    """Measure bias, variance and cost of the gradient under strategies, against no compression.

    Every batch is run under every strategy with the same random state, so with the same images and views. The base
    strategy is always measured. Gradients are those of the whole loss with respect to the parameters of ``model`` that
    require grad; a parameter that gets none counts as zero.

    Nothing is changed: before every run and at the end, also after an error or an interrupt, everything that ``step``
    may change is put back:

    - ``model`` and ``teacher``;
    - what ``step`` and ``after_backward`` can reach through what they are bound to, their closures, arguments and
      global names, and through the functions that they call: names bound anew; tensors and their gradients, arrays;
      lists, dicts, sets; modules, optimizers, their schedulers, random generators; attributes of objects of one's own,
      eight deep, and of their classes;
    - a batch changed in place, the random generators that ``batches`` holds, and the global random states of torch,
      NumPy and Python.

    What was seen to change and cannot be put back, such as an iterator, is named in a warning. Meanwhile memory holds a
    copy of all that, one gradient-sized sum a strategy, the gradients of two runs, and 32,768 numbers a batch and
    strategy.

    Args:
        model: an encoder, compressed or not, or a module that holds compressed encoders, such as a LightningModule
            with its heads. Must be in train mode.
        step: returns the scalar loss of a batch, and does not call backward. Where it makes views at random, it should
            do so before the first forward through the encoder: dropout inside of blocks takes a share of the
            random stream that depends on the length of the sequence.
        batches: at least 2 batches, at least 3 for intervals; 8 and more are sensible. Read one at a time.
        strategies: what to compare with the base.
        teacher: as in [compress][seqcompress.compress]: shares the patch size but not the dropout.
        after_backward: what completes a training step, such as the optimizer's step and the momentum update. Timed,
            and undone; not called where ``cost`` is "flops".
        protect: an object of any class, or a list of them, to put back as well: what ``step`` changes and cannot be
            found from it.
        cost: "measured" for the time of the whole step: strategies take turns in random order, within every batch, and
            the interquartile mean of the batches' ratios to the base is taken; the first batch is run once more before,
            to warm up, and the base once more in every batch. "flops" for the encoders' FLOPs in these
            steps, three for a forward that is differentiated against one for another; no time is measured.
        sketch: keep no gradient-sized sums, but only this many numbers of every gradient (a random sketch). Memory
            no longer depends on the model beyond the gradients of one batch, and squared norms of mean gradients
            get an error with a standard deviation of ``sqrt(2 / sketch)`` of their values that is not part of the
            intervals: 0.6 % at 65,536. Exact for models with no more parameters than that.
        seed: decides random views and subsets.
        progress: show a progress bar with the time left (needs tqdm). By default, on a terminal if tqdm is installed.

    Returns:
        What was measured. After an interrupt (Ctrl-C), what was measured from the batches that were complete, if there
        were 2, with ``complete=False``.

    Raises:
        TypeError: an argument has the wrong type, or ``model`` is not supported.
        ValueError: an argument is out of range; the model is in eval mode or nothing in it requires grad; a
            strategy does not suit it; there are fewer than 2 batches; a loss does not come from the model or is not a
            finite scalar, or gradients are not there after the backward pass (the message names strategy and batch), or
            are all zero.
        ImportError: ``progress=True`` without tqdm.

    Examples:
        >>> import timm, torch
        >>> from seqcompress import Strategy, gradient_error
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10)
        >>> batches = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(3)]
        >>> def step(batch):
        ...     return torch.nn.functional.cross_entropy(vit(batch[0]), batch[1])
        >>> report = gradient_error(vit, step, batches, [Strategy(0.5)], cost="flops")
        >>> report[Strategy(0.5)].cost < report[Strategy()].cost
        True
    """
    for name, function in (("step", step), ("after_backward", after_backward)):
        if not callable(function) and (name == "step" or function is not None):
            raise TypeError(f"{name} must be a function, got {described(function)}")
    if cost not in get_args(CostKind):
        raise ValueError(f"cost must be 'measured' or 'flops', got {described(cost)}")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be a whole number, got {described(seed)}")
    if sketch is not None and (isinstance(sketch, bool) or not isinstance(sketch, int)):
        raise TypeError(f"sketch must be a whole number or None, got {described(sketch)}")
    if sketch is not None and sketch < 2:
        raise ValueError(f"sketch must be at least 2, got {described(sketch)}")
    wanted = checked_strategies(strategies)
    encoders = measured_encoders(model, teacher)
    if any(isinstance(module, DistributedDataParallel) and module.static_graph for module in model.modules()):
        raise ValueError(
            "model must not be a DistributedDataParallel with static_graph=True: gradient error runs other graphs than "
            "training; measure with one without it"
        )
    refuse_flattened(model, encoders)
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable, got {described(batches)}")
    own_patch_size = own_patch_size_of(encoders)
    others = list(dict.fromkeys(canonical(strategy, own_patch_size) for strategy in wanted))
    others = [strategy for strategy in others if strategy != _BASE]
    for encoder in encoders:
        encoder.check(others)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model must have parameters that require grad, got none")
    bar = _progress_bar(batches, progress)
    roots = [model, teacher, *objects_in(protect)]

    moments = GradientMoments(
        sum(parameter.numel() for parameter in parameters),
        sketch_size=sketch or SKETCH_SIZE,
        sketch_only=sketch is not None,
    )
    consumers: dict[Strategy, GradientConsumer] = {
        _BASE: moments.begin,
        **{strategy: partial(moments.add, strategy) for strategy in others},
    }
    costs: dict[Strategy, list[float]] = {strategy: [] for strategy in consumers}
    complete = True
    with (
        _as_before(batches) as generators,
        running(encoders, parameters, step, after_backward, roots, timed=cost == "measured", seed=seed) as runner,
    ):
        try:
            for batch in bar(_drawn(batches, generators)):
                spent = runner.measure(batch, consumers)
                del batch  # before the next is made
                for strategy, amount in spent.items():
                    costs[strategy].append(amount / spent[_BASE])
                moments.close()
        except KeyboardInterrupt:
            if moments.num_batches < 2:
                raise
            complete = False
    if moments.num_batches < 2:
        raise ValueError(f"batches must be at least 2, got {moments.num_batches}")
    return _report(moments, costs, cost, own_patch_size, complete)


def refuse_flattened(model: nn.Module, encoders: Sequence[MeasuredEncoder]) -> None:
    """Raise ValueError for weights whose gradients cannot be put together again."""
    if is_wrapped(model) or any(measured.encoder.is_flattened for measured in encoders):
        raise ValueError(
            "model must have whole gradients on every process to be measured, got one in FullyShardedDataParallel: "
            "shard it with fully_shard instead, or measure without sharding"
        )


class _PacedStream(SubsetStream):
    """Takes one number from the random state at every forward, so that the base takes as many as any strategy."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._next = super().next_seed()

    def next_seed(self) -> int:
        return self._next


@dataclass(frozen=True)
class MeasuredEncoder:
    """An encoder, and how it is to be compressed for the measurement."""

    encoder: Encoder
    is_student: bool
    when: When

    @property
    def embed(self) -> CompressedPatchEmbed:
        """Its patch embedding, while it is compressed."""
        return compressed_embeds(self.encoder.model)[0]

    @property
    def role(self) -> str:
        """The name of the argument that it came as."""
        return "model" if self.is_student else "teacher"

    def check(self, strategies: Sequence[Strategy]) -> None:
        """Raise ValueError if a strategy cannot be measured on it now."""
        if self.is_student and not self.encoder.model.training:
            raise ValueError("model must be in train mode: in eval mode nothing is compressed; call model.train()")
        self.check_strategies(strategies)

    def check_strategies(self, strategies: Iterable[Strategy]) -> None:
        """The same in any mode."""
        for strategy in strategies:
            try:
                self.encoder.check([strategy if self.is_student else strategy.without_dropout()])
            except ValueError as error:
                raise ValueError(f"strategies: {strategy!s} does not suit the {self.role}: {error}") from None


def measured_encoders(model: nn.Module, teacher: nn.Module | None = None) -> list[MeasuredEncoder]:
    """The encoders of one analysis: those that were compressed together, or ``model`` and ``teacher``."""
    if teacher is None and isinstance(model, nn.Module) and is_compressed(model):
        embeds = [partner for embed in compressed_embeds(model) for partner in embed.partners()]
        return [MeasuredEncoder(embed.encoder, embed.drops_tokens, embed.when) for embed in dict.fromkeys(embeds)]
    found = find_pair(model, teacher)
    check_roles(found)
    return [
        MeasuredEncoder(encoder, name == "model", "grad" if name == "model" else "train")
        for name, encoder in found.items()
    ]


@contextmanager
def _compressed(encoders: Sequence[MeasuredEncoder]) -> Iterator[Compression]:
    """Compress the encoders with a compression of their own; afterwards they are as they were."""
    stream = _PacedStream()
    found = compressed_embeds(*(measured.encoder.model for measured in encoders))
    views = next((embed.compression.views for embed in found), None)
    compression = Compression(Constant(_BASE), _BASE, stream, copy.deepcopy(views))
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


GradientConsumer: TypeAlias = Callable[[list[Tensor]], None]
"""What takes the gradient of one run. It is the run's own: the next run makes a new one."""


def _nothing(gradient: list[Tensor]) -> None:
    """What the time alone is taken of."""


class _StepResult(NamedTuple):
    """One step that was run."""

    loss: float
    seconds: float
    flops: int


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


def _report(
    moments: GradientMoments,
    costs: dict[Strategy, list[float]],
    cost_kind: CostKind,
    own_patch_size: int | None,
    complete: bool,
) -> GradientErrorReport:
    batches = moments.num_batches
    base_norm2 = moments.base_norm2()
    estimates = {}
    for strategy, ratios in costs.items():
        base = strategy == _BASE
        estimates[strategy] = {
            "bias2": jackknife(math.fsum, [0.0] * batches) if base else moments.bias2(strategy),
            "variance": moments.base_variance() if base else moments.variance(strategy),
            "cost": jackknife(interquartile_mean, ratios[:batches]),
        }
    errors = [each[name].value for each in estimates.values() for name in ("bias2", "variance")]
    if not any((base_norm2.value, *errors)):
        raise ValueError(NO_GRADIENT)
    return GradientErrorReport.from_estimates(
        estimates,
        base_norm2,
        num_batches=batches,
        cost_kind=cost_kind,
        own_patch_size=own_patch_size,
        complete=complete,
        sketch_error=moments.sketch_error,
    )


@contextmanager
def _as_before(batches: object) -> Iterator[Generators]:
    """The random generators of the batches' own, which end as they began."""
    at_first = Generators(batches)
    try:
        yield Generators(batches)
    finally:
        at_first.restore()


def _drawn(batches: Iterable[Batch], generators: Generators) -> Iterator[Batch]:
    """The batches, made in the random state that their maker left, not in one of a run."""
    iterator = iter(batches)
    states = RandomStates()
    generators.keep()
    while True:
        states.restore()
        generators.restore()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        states = RandomStates()
        generators.keep()
        yield batch
        del batch


def _progress_bar(batches: Iterable[Any], wanted: bool | None) -> Callable[[Iterator[Any]], Iterable[Any]]:
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        return lambda iterator: iterator
    try:
        from tqdm import tqdm
    except ImportError:
        if wanted:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from None
        return lambda iterator: iterator
    try:
        total = len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a data loader of an iterable dataset
        total = None
    return lambda iterator: tqdm(iterator, total=total, desc="gradient error", unit="batch")


def checked_strategies(strategies: Iterable[Strategy]) -> list[Strategy]:
    """A list of them, for sure."""
    if isinstance(strategies, (str, Strategy)) or not isinstance(strategies, Iterable):
        raise TypeError(f"strategies must be several of them, such as a list, got {described(strategies)}")
    checked = list(strategies)
    for strategy in checked:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"strategies must be of type Strategy, got {described(strategy)}")
    return checked


def own_patch_size_of(encoders: Sequence[MeasuredEncoder]) -> int | None:
    """Side of the patches that all these encoders have without compression; None if they differ or are not square."""
    sides = {side for measured in encoders for side in measured.encoder.patch_size}
    return sides.pop() if len(sides) == 1 else None


def objects_in(protect: object) -> list[object]:
    """The objects that ``protect=`` names."""
    return list(protect) if isinstance(protect, (list, tuple)) else [protect]


def seed_of(seed: int, number: int) -> int:
    """A seed of its own for the number of a batch, or of whatever else is counted."""
    digest = hashlib.blake2b(repr((seed, number)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
