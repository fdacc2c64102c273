"""Unbiased moments of a gradient from few batches, with jackknife intervals. Knows nothing of models.

Everything rests on two facts. The dot product of two *different* batches' gradients has the expectation
``||E g||^2``, without the noise that ``||mean g||^2`` carries; and the sum of a batch's dot products with all others
is what the estimate loses when that batch is left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "LEVEL",
    "Estimate",
    "GradientMoments",
    "Interval",
    "Sketch",
    "interquartile_mean",
    "jackknife",
    "norm2_of_mean",
    "variance",
]

Interval: TypeAlias = tuple[float, float]
Gradient: TypeAlias = Sequence[Tensor]

LEVEL = 0.95
"""Level of all confidence intervals."""


@dataclass(frozen=True)
class Estimate:
    """A number that was estimated from batches, and what it would have been without each of them.

    Arithmetic between estimates from the same batches acts on the leave-one-out values as well. So the interval of
    a difference is that of the paired differences, and the interval of a product knows how its factors vary together.

    Args:
        value: the estimate.
        leave_one_out: for each batch, the estimate without it. Several rows are independent approximations of
            the same values; there is none for fewer than 3 batches.
    """

    value: float
    leave_one_out: tuple[tuple[float, ...], ...] = ()

    def __add__(self, other: Estimate) -> Estimate:
        return self._combined(other, lambda a, b: a + b)

    def __sub__(self, other: Estimate) -> Estimate:
        return self._combined(other, lambda a, b: a - b)

    def __mul__(self, other: Estimate) -> Estimate:
        return self._combined(other, lambda a, b: a * b)

    def __truediv__(self, other: Estimate) -> Estimate:
        return self._combined(other, lambda a, b: a / b if b else math.nan)

    @property
    def variance(self) -> float:
        """Delete-one jackknife variance; infinite for fewer than 3 batches.

        The noise of approximated rows adds to the squares of their mean deviations. Products of the two rows'
        deviations have no such part, as their noises are independent, but scatter more. The mean of the two is taken:
        rather too wide an interval than too narrow a one.
        """
        if not self.leave_one_out or not all(math.isfinite(value) for row in self.leave_one_out for value in row):
            return math.inf
        try:
            variance = self._variance()
        except OverflowError:
            return math.inf
        return variance if math.isfinite(variance) else math.inf

    def _variance(self) -> float:
        rows = [[value - fmean(row) for value in row] for row in self.leave_one_out]
        batches = len(rows[0])
        squares = fmean(fmean(row) ** 2 for row in zip(*rows, strict=True))
        if len(rows) == 2:
            products = fmean(first * second for first, second in zip(*rows, strict=True))
            squares = (squares + max(0.0, products)) / 2
        return (batches - 1) * squares

    @property
    def chance_of_positive(self) -> float:
        """Probability that the true value is above 0, by Student's t; one half for fewer than 3 batches."""
        if math.isinf(self.variance) or not self.value:
            return 0.5
        if not self.variance:
            return 1.0 if self.value > 0 else 0.0
        within = _t_within(abs(self.value) / math.sqrt(self.variance), len(self.leave_one_out[0]) - 1)
        return 0.5 + math.copysign(within / 2, self.value)

    @property
    def interval(self) -> Interval:
        """The 95 % confidence interval, by Student's t."""
        if math.isinf(self.variance):
            return (-math.inf, math.inf)
        half = _t_quantile(len(self.leave_one_out[0]) - 1) * math.sqrt(self.variance)
        return (self.value - half, self.value + half)

    def _combined(self, other: Estimate, operation: Callable[[float, float], float]) -> Estimate:
        mine, others = self.leave_one_out, other.leave_one_out
        rows = max(len(mine), len(others)) if mine and others else 0
        return Estimate(
            operation(self.value, other.value),
            tuple(tuple(map(operation, mine[row % len(mine)], others[row % len(others)])) for row in range(rows)),
        )


def jackknife(statistic: Callable[[Sequence[float]], float], values: Sequence[float]) -> Estimate:
    """Estimate of a statistic of one number a batch."""
    without = tuple(statistic([*values[:batch], *values[batch + 1 :]]) for batch in range(len(values)))
    return Estimate(statistic(values), (without,) if len(values) > 2 else ())


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean of the middle half: robust like the median, and smooth enough for a jackknife."""
    low, high = len(values) / 4, 3 * len(values) / 4
    weights = [max(0.0, min(rank + 1, high) - max(rank, low)) for rank in range(len(values))]
    return math.fsum(weight * value for weight, value in zip(weights, sorted(values), strict=True)) / (high - low)


class Sketch:
    """A random linear map of gradients to few numbers that keeps their dot products, on average.

    A count sketch (Charikar, Chen, Farach-Colton, 2002): random signs, then sums of coordinates that share a bucket.
    Buckets are those of a random rotation of each piece of coordinates, so that nothing of the gradient has to be
    stored. It has two independent halves; twice the dot product of two gradients' halves is an estimate of its own.

    Args:
        num_parameters: length of a gradient.
        size: most numbers to keep. A gradient that is not longer is kept as it is, and dot products are exact.
    """

    def __init__(self, num_parameters: int, size: int) -> None:
        self.exact = num_parameters <= size
        self._width = num_parameters if self.exact else size // 2

    @property
    def relative_error(self) -> float:
        """Standard deviation of a squared norm's estimate from all of a sketch, relative to the squared norm."""
        return 0.0 if self.exact else math.sqrt(1 / self._width)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a sketch: one half a row, or the whole gradient in one row."""
        return (1 if self.exact else 2, self._width)

    def __call__(self, gradient: Gradient) -> Tensor:
        """The sketch, on the CPU, of this shape."""
        if self.exact:
            return torch.cat([part.flatten().to("cpu", _wide(part)) for part in gradient]).unsqueeze(0)
        return torch.stack([self._half(gradient, seed) for seed in range(2)]).mul_(math.sqrt(0.5)).cpu()

    def _half(self, gradient: Gradient, seed: int) -> Tensor:
        shifts, width = random.Random(seed), self._width
        device = gradient[0].device
        generator = torch.Generator(device).manual_seed(seed)
        buckets = torch.zeros(width, device=device)
        for part in gradient:
            signs = torch.empty(part.numel(), dtype=torch.int8, device=device).random_(0, 2, generator=generator)
            signed = part.flatten().float() * signs.mul_(2).sub_(1)
            for piece in signed.split(width):
                start = shifts.randrange(width)
                fitting = min(len(piece), width - start)
                buckets[start : start + fitting] += piece[:fitting]
                buckets[: len(piece) - fitting] += piece[fitting:]
        return buckets


class GradientMoments:
    """Streams the gradients of a base and of other strategies on the same batches, and keeps none of them.

    Estimates are exact, from one running sum of gradients a strategy and the dot products of each gradient with the sum
    of those before. Leave-one-out values also need those after: they come from sketches, one a batch and strategy.

    Args:
        num_parameters: length of a gradient.
        sketch_size: see [Sketch][seqcompress.gradients.statistics.Sketch].
        sketch_only: take everything from the sketches, so that running sums are of their size too.
    """

    def __init__(self, num_parameters: int, *, sketch_size: int, sketch_only: bool = False) -> None:
        self.sketch = Sketch(num_parameters, sketch_size)
        self.num_batches = 0
        self._sketch_only = sketch_only or self.sketch.exact
        self._base = _Series()
        self._base_sketches: list[Tensor] = []
        self._gradients: dict[Hashable, _Series] = {}
        self._differences: dict[Hashable, _Series] = {}  # from the base's gradients
        self._base_sum: list[Tensor] = []
        self._sums: dict[Hashable, list[Tensor]] = {}  # of the differences
        self._sketches: dict[Hashable, list[Tensor]] = {}  # of the gradients

    @property
    def sketch_error(self) -> float:
        """Standard deviation that sketching adds to a squared norm of a mean, relative to it; 0 for exact sums."""
        return self.sketch.relative_error if self._sketch_only else 0.0

    def begin(self, gradient: Gradient) -> None:
        """Open a batch with the base's gradient."""
        sketch = self.sketch(gradient)
        # A copy: what is kept must not lie in memory of others, such as the buckets of DistributedDataParallel.
        self._open = self._vector([part.clone() for part in gradient] if not self._sketch_only else (), sketch)
        if not self._base_sum:
            self._base_sum = [torch.zeros_like(part, dtype=_wide(part)) for part in self._open]
        square, before = _Dot(), _Dot()
        for part, total in zip(self._open, self._base_sum, strict=True):
            square.add(part, part)
            before.add(part, total)
        self._base.add(before.value, square.value)
        self._base_sketches.append(sketch)

    def add(self, name: Hashable, gradient: Gradient) -> None:
        """Add the gradient of one strategy on the batch that is open."""
        sketch = self.sketch(gradient)
        sums = self._sums.setdefault(name, [torch.zeros_like(total) for total in self._base_sum])
        square, before, difference_before = _Dot(), _Dot(), _Dot()
        vector = self._vector(gradient, sketch)
        for part, base, total, base_total in zip(vector, self._open, sums, self._base_sum, strict=True):
            difference = part.to(total.dtype) - base
            square.add(part, part)
            before.add(part, total)  # gradients sum to what the base's do, and the differences
            before.add(part, base_total)
            difference_before.add(difference, total)
            total += difference
        self._gradients.setdefault(name, _Series()).add(before.value, square.value)
        self._differences.setdefault(name, _Series()).add(difference_before.value)
        self._sketches.setdefault(name, []).append(sketch)

    def close(self) -> None:
        """Close the batch: it counts from now on. A batch that was not closed never does."""
        for total, part in zip(self._base_sum, self._open, strict=True):
            total += part
        self.num_batches += 1
        del self._open

    def base_norm2(self) -> Estimate:
        """``||E g_0||^2``."""
        return self._base.norm2_of_mean(self._base_sketches[: self.num_batches])

    def base_variance(self) -> Estimate:
        """``E ||g_0 - E g_0||^2``."""
        return self._base.variance(self._base_sketches[: self.num_batches])

    def bias2(self, name: Hashable) -> Estimate:
        """``||E g_s - E g_0||^2``."""
        pairs = zip(self._sketches[name][: self.num_batches], self._base_sketches, strict=False)
        return self._differences[name].norm2_of_mean([sketch - base for sketch, base in pairs])

    def variance(self, name: Hashable) -> Estimate:
        """``E ||g_s - E g_s||^2``."""
        return self._gradients[name].variance(self._sketches[name][: self.num_batches])

    def _vector(self, gradient: Gradient, sketch: Tensor) -> Gradient:
        return [sketch] if self._sketch_only else gradient


class _Series:
    """One vector a batch: its dot products with itself, and with the sum of those before."""

    def __init__(self) -> None:
        self._before: list[float] = []
        self._squares: list[float] = []

    def add(self, before: float, square: float = math.nan) -> None:
        self._before.append(before)
        self._squares.append(square)

    def norm2_of_mean(self, sketches: Sequence[Tensor]) -> Estimate:
        """Mean dot product of two different batches: unbiased for the squared norm of the mean."""
        batches = len(sketches)
        value = 2 * math.fsum(self._before[:batches]) / (batches * (batches - 1))
        return _from_sketches(_norm2_of_mean, sketches, value)

    def variance(self, sketches: Sequence[Tensor]) -> Estimate:
        """Mean squared norm less the squared norm of the mean: the sample variance, with K - 1."""
        value = fmean(self._squares[: len(sketches)]) - self.norm2_of_mean(sketches).value
        return _from_sketches(_variance, sketches, value)


def norm2_of_mean(sketches: Sequence[Tensor]) -> Estimate:
    """Unbiased squared norm of the mean of vectors that only their sketches are left of, one a batch."""
    return _from_sketches(_norm2_of_mean, sketches)


def variance(sketches: Sequence[Tensor]) -> Estimate:
    """Their unbiased variance likewise: mean squared distance from their mean, with K - 1."""
    return _from_sketches(_variance, sketches)


Statistic: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Of the mean squared norm of vectors, and the unbiased squared norm of their mean."""


def _norm2_of_mean(squares: Tensor, norms2: Tensor) -> Tensor:
    return norms2


def _variance(squares: Tensor, norms2: Tensor) -> Tensor:
    return squares - norms2


def _from_sketches(statistic: Statistic, sketches: Sequence[Tensor], value: float | None = None) -> Estimate:
    """A statistic with its leave-one-out values; those are moved to where their mean is the value, if one is known."""
    batches, rows = len(sketches), len(sketches[0])
    total = torch.zeros_like(sketches[0], dtype=torch.float64)
    for sketch in sketches:
        total += sketch
    squares = torch.stack([sketch.double().square().sum(dim=1) for sketch in sketches], dim=1) * rows  # (rows, K)
    others = torch.stack([(sketch * (total - sketch)).sum(dim=1) for sketch in sketches], dim=1) * rows
    pairs = others.sum(dim=1, keepdim=True)
    if value is None:
        value = float(statistic(squares.mean(dim=1), pairs[:, 0] / (batches * (batches - 1))).mean())
    if batches < 3:
        return Estimate(value)
    without = statistic(
        (squares.sum(dim=1, keepdim=True) - squares) / (batches - 1),
        (pairs - 2 * others) / ((batches - 1) * (batches - 2)),
    )
    without += value - without.mean(dim=1, keepdim=True)
    return Estimate(value, tuple(map(tuple, without.tolist())))


class _Dot:
    """A dot product of vectors in parts, in double precision; waits for the device only when it is asked for."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, first: Tensor, second: Tensor) -> None:
        wide = _wide(first, torch.float64)
        self._parts.append(torch.dot(first.flatten().to(wide), second.flatten().to(wide)))

    @property
    def value(self) -> float:
        return math.fsum(torch.stack(self._parts).tolist())


def _wide(part: Tensor, wanted: torch.dtype = torch.float32) -> torch.dtype:
    """At least ``wanted``, where the device has it."""
    return torch.float32 if part.device.type == "mps" else torch.promote_types(part.dtype, wanted)


@lru_cache
def _t_quantile(freedom: int) -> float:
    """Student's t that a share of (1 + LEVEL) / 2 lies below, for whole degrees of freedom."""
    low, high = 0.0, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < LEVEL else (low, middle)
    return high


def _t_within(t: float, freedom: int) -> float:
    """Probability of [-t, t]: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for order in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * order / (order + 1)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
