"""Pictures of gradient error. Needs matplotlib, which is imported when this module is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from seqcompress.strategy import Strategy
from seqcompress.training.pictures import Figure, colormaps, save

if TYPE_CHECKING:
    from seqcompress.gradients.report import GradientErrorReport

__all__ = ["draw_report", "draw_stages", "save"]

_NAMES = {"ca_mse": "CA-MSE", "bias2": "bias²", "variance": "variance"}


def draw_report(report: GradientErrorReport) -> Figure:
    """Errors of all strategies by rising cost, with 95 % intervals, and cost over dropout and patch size."""
    figure = Figure(figsize=(4 + 0.5 * len(report.entries) + 4, 4.8), layout="constrained")
    errors, costs = figure.subplots(1, 2)
    prefix, scale = _scale([report])
    entries = sorted(report.entries, key=lambda entry: entry.cost)
    for shift, (name, label) in enumerate(_NAMES.items()):
        values = [getattr(entry, prefix + name) for entry in entries]
        intervals = [getattr(entry, f"{prefix}{name}_interval") for entry in entries]
        places = [place + 0.15 * (shift - 1) for place in range(len(entries))]
        errors.errorbar(places, values, _margins(values, intervals), fmt="os^"[shift], capsize=2, label=label)
    _set_scale(errors, [getattr(entry, prefix + name) for entry in entries for name in _NAMES])
    tied = report.tied()
    marks = dict.fromkeys(tied, " =") | {tied[0]: " *"}
    labels = [f"{entry.strategy!s}{marks.get(entry.strategy, '')}" for entry in entries]
    errors.set_xticks(range(len(entries)), labels, rotation=45, ha="right", rotation_mode="anchor")
    errors.set(ylabel=scale, title=f"{report.num_batches} batches   * best" + "   = tied" * (len(tied) > 1))
    errors.legend(loc="lower left", bbox_to_anchor=(0, 1.07), ncols=3, frameon=False)  # above: no point is under it
    _draw_costs(costs, report)
    return figure


def draw_stages(reports: Mapping[float, GradientErrorReport], chosen: Mapping[float, Strategy]) -> Figure:
    """Errors of every strategy over progress, and what was chosen at each stage."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    prefix, scale = _scale(list(reports.values()))
    strategies = list(dict.fromkeys(strategy for report in reports.values() for strategy in report.strategies))
    colors = _colors(strategies)
    panels = figure.subplots(1, 3)
    for axes, (name, label) in zip(panels, _NAMES.items(), strict=True):
        drawn = []
        for strategy in strategies:
            measured = {progress: report[strategy] for progress, report in reports.items() if strategy in report}
            values = [getattr(entry, prefix + name) for entry in measured.values()]
            intervals = [getattr(entry, f"{prefix}{name}_interval") for entry in measured.values()]
            line = {"marker": ".", "capsize": 2, "label": str(strategy), "color": colors[strategy]}
            axes.errorbar(list(measured), values, _margins(values, intervals), **line)
            drawn += values
        path_values = [getattr(reports[progress][strategy], prefix + name) for progress, strategy in chosen.items()]
        axes.plot(list(chosen), path_values, color="black", linewidth=5, alpha=0.2, label="schedule", zorder=0)
        _set_scale(axes, drawn)
        axes.set(xlabel="progress", title=label)
    panels[0].set_ylabel(scale)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    stages = " → ".join(dict.fromkeys(f"{strategy!s}" for strategy in chosen.values()))
    figure.suptitle(f"schedule: {stages}")
    return figure


def _colors(strategies: list[Strategy]) -> dict[Strategy, Any]:
    """One hue a patch size, darker for less dropout."""
    hues = ("Greys", "Oranges", "Blues", "Greens", "Purples", "Reds")
    sizes = sorted({strategy.patch_size for strategy in strategies}, key=lambda size: size or 0)
    return {
        strategy: colormaps[hues[sizes.index(strategy.patch_size) % len(hues)]](0.9 - 0.65 * strategy.token_dropout)
        for strategy in strategies
    }


def _draw_costs(axes: Any, report: GradientErrorReport) -> None:
    dropouts = sorted({strategy.token_dropout for strategy in report.strategies})
    sizes = sorted({strategy.patch_size for strategy in report.strategies}, key=lambda size: size or 0)
    grid = [[math.nan] * len(sizes) for _ in dropouts]
    for entry in report.entries:
        row, column = dropouts.index(entry.strategy.token_dropout), sizes.index(entry.strategy.patch_size)
        grid[row][column] = entry.cost
        axes.text(column, row, f"{entry.cost:.2f}", ha="center", va="center")
    axes.imshow(
        grid,
        aspect="auto",
        origin="lower",
        vmin=0,
        vmax=1.6 * max(entry.cost for entry in report.entries),
        cmap="Blues",
    )
    axes.set_yticks(range(len(dropouts)), [f"{dropout:g}" for dropout in dropouts])
    axes.set_xticks(range(len(sizes)), [str(size or report.own_patch_size or "own") for size in sizes])
    axes.set(xlabel="patch size", ylabel="token dropout", title=f"relative cost of a step, {report.cost_kind}")


def _scale(reports: list[GradientErrorReport]) -> tuple[str, str]:
    if all(report.shown_prefix for report in reports):
        return "relative_", "relative to the base's ‖E g‖²"
    return "", "absolute"


def _margins(values: list[float], intervals: list[tuple[float, float]]) -> list[list[float]]:
    lows = [value - low for value, (low, _) in zip(values, intervals, strict=True)]
    highs = [high - value for value, (_, high) in zip(values, intervals, strict=True)]
    return [[margin if math.isfinite(margin) else 0.0 for margin in margins] for margins in (lows, highs)]


def _set_scale(axes: Any, values: list[float]) -> None:
    """Logarithmic; around 0 linear, if there is anything that is not positive."""
    if min(values) > 0:
        axes.set_yscale("log")
    elif max(map(abs, values)) > 0:
        linear = max(map(abs, values)) / 1000
        axes.set_yscale("symlog", linthresh=linear)
        axes.set_ylim(bottom=min(-linear, 2 * min(values)))
    axes.grid(alpha=0.3)
