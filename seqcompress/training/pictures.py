"""Pictures of what a run will take. Needs matplotlib, which no other module of the core imports by itself."""

from __future__ import annotations

import os
from typing import Any

from seqcompress.json_files import replacing
from seqcompress.training.forecast import CostMap, Forecast

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
except ImportError:
    raise ImportError("plotting needs matplotlib: pip install 'seqcompress[plot]'") from None

__all__ = ["Figure", "colormaps", "draw_costs", "draw_forecast", "save"]

_NAMED_STAGES = 8  # at most so many are named in the picture: names of more would lie over each other


def draw_forecast(run: Forecast, steps_are_known: bool) -> Figure:
    """Tokens of a view and cost of a step over the run."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    tokens, costs = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    scale = 1 if steps_are_known else 1 / run.total_steps
    edges = [*(stage.first * scale for stage in run.stages), run.total_steps * scale]
    students = [stage.tokens for stage in run.stages]
    tokens.axhline(run.full.tokens, color="grey", linestyle=":", label="plain")
    if run.full.teacher_tokens is not None:
        teachers = [stage.teacher_tokens for stage in run.stages]
        tokens.stairs(teachers, edges, baseline=None, color="tab:orange", linestyle="--", linewidth=2, label="teacher")
    tokens.stairs(students, edges, baseline=None, color="tab:blue", linewidth=2.5, label="student")
    tokens.set(ylabel="tokens of a view", ylim=(0, 1.25 * run.full.tokens))
    tokens.legend(loc="lower right", frameon=False)
    if len(run.stages) <= _NAMED_STAGES:
        for number, (stage, begin) in enumerate(zip(run.stages, edges, strict=False)):
            place = {"xy": (begin, (1.05 + 0.09 * (number % 2)) * run.full.tokens), "fontsize": 9}
            tokens.annotate(f" {stage.strategy}", **place)
            tokens.axvline(begin, color="grey", linewidth=0.5, zorder=0)
    relative = [stage.cost for stage in run.stages]
    costs.stairs(relative, edges, fill=True, color="tab:blue", alpha=0.35)
    costs.axhline(1, color="grey", linestyle=":")
    costs.set(ylabel="cost of a step\n(plain run: 1)", ylim=(0, 1.1), xlim=(0, edges[-1]))
    costs.set_xlabel("step" if steps_are_known else "share of training that is done")
    figure.suptitle(f"plan {run.name}: {run.verdict()}")
    return figure


def draw_costs(grid: CostMap) -> Figure:
    """Relative cost of a forward pass over token dropout and patch size, with the tokens of a view."""
    figure = Figure(figsize=(3 + 1.3 * len(grid.sizes), 1.8 + 0.6 * len(grid.dropouts)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid.costs, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="Blues")
    for row, (costs, tokens) in enumerate(zip(grid.costs, grid.tokens, strict=True)):
        for column, (cost, count) in enumerate(zip(costs, tokens, strict=True)):
            ink = "white" if cost > 0.6 else "black"
            axes.text(column, row, f"{cost:.2f}\n{count} tokens", ha="center", va="center", color=ink, fontsize=9)
    axes.set_xticks(range(len(grid.sizes)), list(map(str, grid.sizes)))
    axes.set_yticks(range(len(grid.dropouts)), [f"{dropout:g}" for dropout in grid.dropouts])
    axes.set(xlabel="patch size (pixels)", ylabel="token dropout")
    figure.colorbar(image, label="FLOPs of a forward pass\n(plain encoder: 1)")
    return figure


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a picture, whole or not at all, in the format that the path's ending names."""
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150)
