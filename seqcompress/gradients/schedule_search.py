"""The schedule that gradient error asks for: at each stage of training, the strategy with the least CA-MSE."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from seqcompress.checks import checked_progress
from seqcompress.gradients.report import GradientErrorReport, StrategyError
from seqcompress.messages import described
from seqcompress.schedules import Stepwise
from seqcompress.strategy import Strategy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["best_schedule", "explain_schedule", "plot_gradient_error"]

Reports = Mapping[float, GradientErrorReport]

_logger = logging.getLogger(__name__)


def best_schedule(reports: Reports, monotone: bool = True) -> Stepwise:
    """The schedule with the least CA-MSE at every stage.

    At each stage a strategy has a regret: the logarithm of its CA-MSE over the least one. Strategies that the data
    cannot tell from the best ([tied][seqcompress.GradientErrorReport.tied]) are compared by confidence instead: by
    the upper ends of their intervals, so that of two that may both be the best, the one that is less likely to be bad
    is taken. The schedule has the least sum of regrets over the stages. Bias cannot be negative, so where its estimate
    is, CA-MSE counts with a bias of 0.

    Args:
        reports: progress in [0, 1] mapped to the report of that point of training. Each stage's strategy holds from
            its progress on, the first from 0. Equal strategies that follow each other become one stage.
        monotone: sequences never become cheaper over training. The cost of a strategy is then its mean over the
            reports, the choice is among the strategies that all reports have, and exact (by dynamic programming).

    Raises:
        TypeError: ``reports`` does not map progress to reports.
        ValueError: no report, a progress outside [0, 1], or reports of encoders with different patch sizes.

    Stages that the data could not decide are logged as warnings; see
    [explain_schedule][seqcompress.explain_schedule].
    """
    stages = _chosen(reports, monotone)
    undecided = [progress for progress, report in _sorted(reports) if len(report.tied()) > 1]
    if undecided:
        at = ", ".join(f"{progress:g}" for progress in undecided)
        _logger.warning("the batches could not decide the best strategy at progress %s: see explain_schedule", at)
    return _stepwise(stages)


def explain_schedule(reports: Reports, monotone: bool = True) -> str:
    """Why [best_schedule][seqcompress.best_schedule] takes what it takes, stage by stage, and what is undecided.

    Args:
        reports: gradient errors, by progress in [0, 1].
        monotone: whether sequences must not become cheaper over training.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there is no report, or those there are cannot be compared.
    """
    lines = []
    for progress, strategy in _chosen(reports, monotone).items():
        report = reports[progress]
        best, tied = report.best(), report.tied()
        kind = "relative CA-MSE" if report.shown_prefix else "CA-MSE"
        line = f"from {progress:g}: {strategy!s}, {kind} {_shown(report, strategy)}"
        if strategy != best:
            line += f"; least is {best!s} with {_shown(report, best)}"
            if strategy not in tied:
                line += ", but sequences must not become cheaper over training"
        if len(tied) > 1:
            line += f"; undecided between {' / '.join(map(str, tied))}: measure more batches"
        lines.append(line)
    return "\n".join(lines)


def plot_gradient_error(reports: Reports, path: str | os.PathLike[str] | None = None, monotone: bool = True) -> Figure:
    """Draw CA-MSE, bias2 and variance of every strategy over progress, and the schedule found.

    Args:
        reports: gradient errors, by progress in [0, 1].
        path: a picture file to be written; its ending names the format.
        monotone: whether sequences must not become cheaper over training.

    Returns:
        matplotlib's figure.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there is no report, or those there are cannot be compared.
        ImportError: matplotlib is not installed.
    """
    from seqcompress.gradients.plots import draw_stages, save

    chosen = _chosen(reports, monotone)
    figure = draw_stages({progress: reports[progress] for progress in chosen}, chosen)
    if path is not None:
        save(figure, path)
    return figure


def _chosen(reports: Reports, monotone: bool) -> dict[float, Strategy]:
    """The strategy of each stage, in the order of progress."""
    stages = _sorted(reports)
    regrets = [_regrets(report) for _, report in stages]
    if monotone:
        common = [strategy for strategy in regrets[0] if all(strategy in regret for regret in regrets)]
        costs = {strategy: fmean(report[strategy].cost for _, report in stages) for strategy in common}
        path = _least_regret(regrets, costs)
    else:
        path = [min(regret, key=lambda strategy: regret[strategy]) for regret in regrets]
    return {progress: strategy for (progress, _), strategy in zip(stages, path, strict=True)}


def _least_regret(regrets: list[dict[Strategy, float]], costs: Mapping[Strategy, float]) -> list[Strategy]:
    """The sequence of strategies with the least sum of regrets whose cost never falls."""
    paths: dict[Strategy, tuple[float, list[Strategy]]] = {strategy: (0.0, []) for strategy in costs}
    for regret in regrets:
        paths = {
            to: min(
                ((total + regret[to], [*path, to]) for end, (total, path) in paths.items() if costs[end] <= costs[to]),
                key=lambda found: found[0],
            )
            for to in costs
        }
    return min(paths.values(), key=lambda found: found[0])[1]


def _regrets(report: GradientErrorReport) -> dict[Strategy, float]:
    errors = {entry.strategy: _positive_ca_mse(entry) for entry in report.entries}
    floor = max(1e-12 * max(errors.values()), math.ulp(0.0))
    errors = {strategy: max(error, floor) for strategy, error in errors.items()}
    least = min(errors.values())
    # A strategy that is surely not the best has a regret, even where negative estimates of bias make them look alike.
    regrets = {strategy: max(math.log(error / least), 1e-6) for strategy, error in errors.items()}
    regrets[report.best()] = 0.0
    upper = {strategy: max(report[strategy].ca_mse_interval[1], floor) for strategy in report.tied()}
    if all(map(math.isfinite, upper.values())):
        safest = min(upper.values())
        regrets.update({strategy: math.log(end / safest) for strategy, end in upper.items()})
    return regrets


def _positive_ca_mse(entry: StrategyError) -> float:
    return max(entry.bias2, 0.0) + entry.cost * max(entry.variance, 0.0)


def _stepwise(stages: Mapping[float, Strategy]) -> Stepwise:
    merged = dict(stages)
    for (_, before), (progress, strategy) in pairwise(stages.items()):
        if strategy == before:
            del merged[progress]
    first = min(merged)
    return Stepwise({0.0 if progress == first else progress: strategy for progress, strategy in merged.items()})


def _sorted(reports: Reports) -> list[tuple[float, GradientErrorReport]]:
    if isinstance(reports, GradientErrorReport):
        raise TypeError("reports must map progress to GradientErrorReport, such as {0.0: report}, got one report alone")
    if not isinstance(reports, Mapping):
        raise TypeError(f"reports must map progress to GradientErrorReport, got {described(reports)}")
    for progress, report in reports.items():
        if not isinstance(report, GradientErrorReport):
            got = f"{described(report)} at {progress}"
            raise TypeError(f"reports must map progress to GradientErrorReport, got {got}")
    if not reports:
        raise ValueError("reports must have at least one stage, got none")
    for progress in reports:
        checked_progress(progress, "reports: progress")
    sizes = {report.own_patch_size for report in reports.values()}
    if len(sizes) > 1:
        raise ValueError(f"reports must be of one encoder, got own patch sizes {sorted(map(str, sizes))}")
    return sorted(reports.items())


def _shown(report: GradientErrorReport, strategy: Strategy) -> str:
    entry, name = report[strategy], f"{report.shown_prefix}ca_mse"
    low, high = getattr(entry, f"{name}_interval")
    return f"{getattr(entry, name):.3g} ({low:.3g} to {high:.3g})"
