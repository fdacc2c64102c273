"""Measuring how far the gradient under a strategy is from the uncompressed one, and what a step costs.

Definitions: Lin et al., NeurIPS 2024 (arXiv 2410.22364) for CA-MSE; the paired, debiased estimators are this project's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, get_args

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from seqcompress.checks import whole_number
from seqcompress.compressors.random_states import RandomStates
from seqcompress.gradients.measured_encoder import (
    checked_strategies,
    measured_encoders,
    own_patch_size_of,
    refuse_flattened,
)
from seqcompress.gradients.report import CostKind, GradientErrorReport, canonical
from seqcompress.gradients.running import GradientConsumer, objects_in, running
from seqcompress.gradients.state import Generators
from seqcompress.gradients.statistics import GradientMoments, interquartile_mean, jackknife
from seqcompress.messages import described
from seqcompress.strategy import Strategy

__all__ = ["NO_GRADIENT", "SKETCH_SIZE", "gradient_error"]

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
    try:
        seed = whole_number(seed)
    except TypeError:
        raise TypeError(f"seed must be a whole number, got {described(seed)}") from None
    try:
        sketch = None if sketch is None else whole_number(sketch)
    except TypeError:
        raise TypeError(f"sketch must be a whole number or None, got {described(sketch)}") from None
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
