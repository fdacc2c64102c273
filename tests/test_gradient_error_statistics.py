"""The estimators against known answers: unbiased, with intervals that hold what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor

from seqcompress.gradients.statistics import Estimate, GradientMoments, Sketch, interquartile_mean, jackknife

BIAS2 = 1.0
TRACE = 9.0  # of the base gradient's covariance
EXTRA = 0.25  # variance that the strategy adds, relative to TRACE
COST = 0.5


def _spread(parameters: int, power: float) -> Tensor:
    """Standard deviations of independent coordinates, falling by a power law."""
    spread = torch.arange(1.0, parameters + 1) ** -power
    return spread * math.sqrt(TRACE) / spread.norm()


class _Simulation:
    """Repeats an analysis of gradients with known moments."""

    def __init__(self, parameters: int, power: float, *, batches: int, trials: int, bias2: float = BIAS2) -> None:
        self.parameters, self.batches, self.trials = parameters, batches, trials
        self.spread = _spread(parameters, power)
        self.mean = torch.randn(parameters) * 2 / math.sqrt(parameters)
        bias = torch.randn(parameters)
        self.bias = bias * math.sqrt(bias2) / bias.norm()
        variance = TRACE * (1 + EXTRA)
        self.truth = {
            "bias2": bias2,
            "variance": variance,
            "ca_mse": bias2 + COST * variance,
            "base_norm2": float(self.mean.square().sum()),
            "difference": COST * variance + bias2 - TRACE,
        }

    def run(self, **settings: int | bool) -> dict[str, list[Estimate]]:
        found: dict[str, list[Estimate]] = {name: [] for name in self.truth}
        for _ in range(self.trials):
            moments = GradientMoments(self.parameters, **settings)  # type: ignore[arg-type]
            for base, other in self.draw():
                moments.begin([base])
                moments.add("other", [other])
                moments.close()
            bias2, variance = moments.bias2("other"), moments.variance("other")
            ca_mse = bias2 + jackknife(fmean, [COST] * self.batches) * variance
            found["bias2"].append(bias2)
            found["variance"].append(variance)
            found["ca_mse"].append(ca_mse)
            found["base_norm2"].append(moments.base_norm2())
            found["difference"].append(ca_mse - moments.base_variance())
        return found

    def draw(self) -> list[tuple[Tensor, Tensor]]:
        noise = torch.randn(2, self.batches, self.parameters) * self.spread
        base = self.mean + noise[0]
        return list(zip(base, base + self.bias + math.sqrt(EXTRA) * noise[1], strict=True))

    def errors(self, values: list[float], name: str) -> float:
        """How many standard errors the mean of the trials is off."""
        return (fmean(values) - self.truth[name]) / (stdev(values) / math.sqrt(len(values)))


def _coverage(estimates: list[Estimate], truth: float) -> float:
    return fmean(low <= truth <= high for low, high in (estimate.interval for estimate in estimates))


# The gradient as it is; then sketched, with few directions that matter and with more than the sketch has numbers.
SETTINGS = [(60, 0.25, 64), (600, 0.4, 256), (600, 0.0, 512)]


@pytest.mark.parametrize(
    ("parameters", "power", "sketch_size"), [*SETTINGS[:2], pytest.param(*SETTINGS[2], marks=pytest.mark.soak)]
)
def test_estimates_are_unbiased_and_intervals_cover_the_truth(parameters: int, power: float, sketch_size: int) -> None:
    simulation = _Simulation(parameters, power, batches=12, trials=400)
    found = simulation.run(sketch_size=sketch_size)
    for name, estimates in found.items():
        assert abs(simulation.errors([estimate.value for estimate in estimates], name)) < 4, name
        assert 0.90 <= _coverage(estimates, simulation.truth[name]) <= 0.99, name


def test_the_naive_estimate_of_the_bias_is_too_large_by_the_variance_over_the_batches() -> None:
    simulation = _Simulation(60, 0.25, batches=12, trials=400)
    naive = []
    for _ in range(simulation.trials):
        differences = torch.stack([other - base for base, other in simulation.draw()])
        naive.append(float(differences.mean(dim=0).square().sum()))
    assert simulation.errors(naive, "bias2") > 10
    assert fmean(naive) == pytest.approx(BIAS2 + EXTRA * TRACE / 12, rel=0.02)


def test_without_bias_the_estimate_is_negative_about_half_the_time_and_the_interval_holds_zero() -> None:
    simulation = _Simulation(60, 0.25, batches=12, trials=400, bias2=0.0)
    bias2 = simulation.run(sketch_size=64)["bias2"]
    assert abs(simulation.errors([estimate.value for estimate in bias2], "bias2")) < 4
    assert 0.4 < fmean(estimate.value < 0 for estimate in bias2) < 0.7
    assert _coverage(bias2, 0.0) >= 0.95  # the jackknife is cautious here


def test_from_sketches_alone_the_error_is_that_which_is_stated() -> None:
    # One sketch is the same in all trials: many sketches need many sizes. Here, of vectors that are all the same.
    errors, stated = [], []
    for size in range(200, 320, 2):
        vector = torch.randn(2000)
        moments = GradientMoments(2000, sketch_size=size, sketch_only=True)
        for _ in range(3):
            moments.begin([vector])
            moments.close()
        errors.append(moments.base_norm2().value / float(vector.square().sum()) - 1)
        stated.append(moments.sketch_error)
    spread = math.sqrt(fmean((error / claim) ** 2 for error, claim in zip(errors, stated, strict=True)))
    assert stated[0] == pytest.approx(math.sqrt(2 / 200))
    assert 0.75 < spread < 1.25


def test_sketches_alone_agree_with_exact_sums() -> None:
    simulation = _Simulation(3000, 0.5, batches=8, trials=1)
    batches = simulation.draw()
    exact, sketched = (GradientMoments(3000, sketch_size=2000, sketch_only=only) for only in (False, True))
    for moments in (exact, sketched):
        for base, other in batches:
            moments.begin([base])
            moments.add(0, [other])
            moments.close()
    assert exact.sketch_error == 0.0
    assert sketched.variance(0).value == pytest.approx(exact.variance(0).value, rel=0.1)
    assert sketched.bias2(0).value == pytest.approx(exact.bias2(0).value, rel=0.2)


@pytest.mark.parametrize("sketch_size", [8, 1000])
def test_streamed_sums_equal_the_formulas_of_the_method(sketch_size: int) -> None:
    batches = 5
    base, other = torch.randn(2, batches, 30, dtype=torch.float64)
    moments = GradientMoments(30, sketch_size=sketch_size)
    for first, second in zip(base, other, strict=True):
        moments.begin([first[:10].view(2, 5), first[10:]])
        moments.add("s", [second[:10].view(2, 5), second[10:]])
        moments.close()
    differences = other - base
    bias2 = (differences.sum(0).square().sum() - differences.square().sum()) / (batches * (batches - 1))
    variance = (other.square().sum() - other.sum(0).square().sum() / batches) / (batches - 1)
    norm2 = (base.sum(0).square().sum() - base.square().sum()) / (batches * (batches - 1))
    assert moments.bias2("s").value == pytest.approx(float(bias2), rel=1e-12)
    assert moments.variance("s").value == pytest.approx(float(variance), rel=1e-12)
    assert moments.base_norm2().value == pytest.approx(float(norm2), rel=1e-12)


def test_leave_one_out_values_are_estimates_without_a_batch() -> None:
    base, other = torch.randn(2, 5, 30, dtype=torch.float64)

    def moments_of(chosen: list[int]) -> GradientMoments:
        moments = GradientMoments(30, sketch_size=1000)
        for index in chosen:
            moments.begin([base[index]])
            moments.add("s", [other[index]])
            moments.close()
        return moments

    every = moments_of([0, 1, 2, 3, 4])
    without = [moments_of([index for index in range(5) if index != left]) for left in range(5)]
    reads: list[Callable[[GradientMoments], Estimate]] = [
        lambda moments: moments.bias2("s"),
        lambda moments: moments.variance("s"),
        lambda moments: moments.base_norm2(),
    ]
    for read in reads:
        (row,) = read(every).leave_one_out
        assert row == pytest.approx([read(moments).value for moments in without], rel=1e-10)


def test_a_batch_that_was_not_closed_does_not_count() -> None:
    moments = GradientMoments(3, sketch_size=2)
    batches = torch.randn(5, 2, 3)
    values = []
    for base, other in batches:
        moments.begin([base])
        moments.add("s", [other])
        if moments.num_batches == 4:
            values.append(moments.variance("s"))
            break
        moments.close()
        values = [moments.variance("s")] if moments.num_batches == 4 else values
    assert values[0] == values[1]


def test_equal_gradients_have_exactly_no_bias() -> None:
    moments = GradientMoments(1000, sketch_size=100)
    for gradient in torch.randn(4, 1000):
        moments.begin([gradient])
        moments.add("s", [gradient.clone()])
        moments.close()
    assert moments.bias2("s").value == 0.0
    assert moments.bias2("s").interval == (0.0, 0.0)
    assert moments.variance("s") == moments.base_variance()


def test_half_precision_gradients_are_summed_in_full() -> None:
    gradients = torch.randn(200, 50).half()
    moments = GradientMoments(50, sketch_size=10)
    for gradient in gradients:
        moments.begin([gradient])
        moments.close()
    expected = gradients.double().var(dim=0).sum()
    assert moments.base_variance().value == pytest.approx(float(expected), rel=1e-5)


def test_a_sketch_keeps_dot_products_on_average() -> None:
    first, second = torch.randn(2, 5000)
    estimates = []
    for size in range(300, 500, 2):
        sketch = Sketch(5000, size)
        estimates.append(float((sketch([first]) * sketch([second])).sum()))
    expected = float(first @ second)
    assert abs(fmean(estimates) - expected) < 4 * stdev(estimates) / math.sqrt(len(estimates))
    assert Sketch(5000, 5000)([first]).equal(first.unsqueeze(0))
    assert Sketch(5000, 300)([first]).equal(Sketch(5000, 300)([first]))


def test_the_interval_of_a_mean_is_students() -> None:
    estimate = jackknife(fmean, [1.0, 2.0, 3.0, 4.0])
    half = 3.182446305284263 * math.sqrt(5 / 3 / 4)
    assert estimate.interval == pytest.approx((2.5 - half, 2.5 + half), rel=1e-9)
    assert jackknife(fmean, [1.0, 2.0]).interval == (-math.inf, math.inf)


def test_the_interval_of_a_difference_is_that_of_the_pairs() -> None:
    noisy = torch.randn(20).tolist()
    shifted = [value + 1 for value in noisy]
    difference = jackknife(fmean, shifted) - jackknife(fmean, noisy)
    assert difference.interval == pytest.approx((1.0, 1.0), abs=1e-9)


def test_the_interquartile_mean_ignores_a_quarter_on_each_side() -> None:
    assert interquartile_mean([1.0, 2.0, 3.0, 1000.0]) == 2.5
    assert interquartile_mean([7.0]) == 7.0
    assert interquartile_mean([1.0, 4.0]) == 2.5
    assert interquartile_mean([5.0, 0.0, 1.0, 2.0, 3.0]) == pytest.approx((0.75 * 1 + 2 + 0.75 * 3) / 2.5)


def test_the_interval_of_the_interquartile_mean_covers_the_middle() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(400, 16, generator=generator).div(3).exp().tolist()  # skewed, as times are
    # The middle half of this distribution has the mean exp(s^2/2) (Phi(z - s) - Phi(-z - s)) / 0.5.
    z, s = 0.6744897501960817, 1 / 3
    phi = torch.special.ndtr(torch.tensor([z - s, -z - s], dtype=torch.float64)).tolist()
    truth = math.exp(s * s / 2) * (phi[0] - phi[1]) / 0.5
    assert 0.90 <= _coverage([jackknife(interquartile_mean, sample) for sample in samples], truth) <= 0.99
