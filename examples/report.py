"""What a pair of runs measured, as a table, a picture and a JSON file."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import torch
from evaluation import Point

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from seqcompress.json_files import write_json

UNITS = "1 unit: one forward pass of the uncompressed encoder on one view; a backward pass counts as two."


@dataclass(frozen=True)
class Run:
    """One pretraining, measured."""

    name: str
    plan: str
    curve: Sequence[Point]
    tokens_per_view: float
    """Mean length of the student's sequences, prefix token included."""
    linear_probe: float

    @property
    def end(self) -> Point:
        return self.curve[-1]


@dataclass(frozen=True)
class Report:
    """A plain and an accelerated run that differ in nothing else."""

    title: str
    plain: Run
    accelerated: Run
    note: str
    arguments: dict[str, Any]

    def table(self) -> str:
        """What each run reached and what it cost, and what that allows to be said."""
        runs = (self.plain, self.accelerated)
        budget, time = (f"{self._less(spent):.1f}x less" for spent in ("units", "seconds"))
        rows = [
            ("", "plain", "accelerated", ""),
            ("k-NN accuracy at the end", *(f"{run.end.knn:.3f}" for run in runs), ""),
            ("linear-probe accuracy at the end", *(f"{run.linear_probe:.3f}" for run in runs), ""),
            ("budget (M units)", *(f"{run.end.units / 1e6:.4f}" for run in runs), budget),
            ("wall-clock of training (s)", *(f"{run.end.seconds:.1f}" for run in runs), time),
            ("student's tokens per view", *(f"{run.tokens_per_view:.1f}" for run in runs), ""),
        ]
        width = max(len(row[0]) for row in rows)
        lines = [f"{name:<{width}}  {plain:>11}  {fast:>11}  {less:>10}".rstrip() for name, plain, fast, less in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        notes = [fill(text, 100) for text in (UNITS, self.verdict(), self.note) if text]
        return "\n".join([self.title, "", *lines, "", *notes])

    def verdict(self) -> str:
        """What two complete runs allow to be said.

        Only their ends are compared: on the way the learning rate has not decayed, and accuracies there say little.
        """
        plain, accelerated = ((run.end.knn, run.linear_probe) for run in (self.plain, self.accelerated))
        if all(own >= other for own, other in zip(accelerated, plain, strict=True)):
            budget, time = (f"1/{self._less(spent):.1f}" for spent in ("units", "seconds"))
            found = f"The accelerated run ended no less accurate, for {budget} of the budget and {time} of the time."
        else:
            found = "The accelerated run ended less accurate in k-NN or linear probe: weigh its saving against that."
        return (
            f"{found} That is one pair of runs with one seed, the plain one not tuned. What equal accuracy costs is "
            "read from the ends of complete runs of several lengths (--epochs) and seeds (--seed), plain and "
            "accelerated."
        )

    def figure(self) -> Figure:
        """Accuracy over budget and over wall-clock; the ends of the runs, which may be compared, stand out."""
        figure, panels = plt.subplots(1, 2, sharey=True, figsize=(9.6, 4.4), layout="constrained")
        for axis, spent, scale, label in (
            (panels[0], "units", 1e6, "budget (M units)"),
            (panels[1], "seconds", 1.0, "wall-clock of training (s)"),
        ):
            for run, marker in ((self.plain, "o"), (self.accelerated, "s")):
                x = [getattr(point, spent) / scale for point in run.curve]
                (line,) = axis.plot(x, [point.knn for point in run.curve], marker=".", alpha=0.35)
                label_of_run = f"{run.name} ({run.plan}), end: {run.end.knn:.3f}"
                axis.plot(x[-1], run.end.knn, marker, color=line.get_color(), markersize=9, label=label_of_run)
            axis.set(xlabel=label)
            axis.grid(alpha=0.3)
        panels[0].set(ylabel="k-NN accuracy")
        panels[1].legend(loc="lower right")
        figure.suptitle(self.title)
        on_the_way = "Faint: on the way, where the learning rate has not decayed; compare only the ends."
        caption = "\n".join(filter(None, (UNITS, on_the_way, self.note)))
        figure.supxlabel(caption, fontsize=7, wrap=True)
        return figure

    def plot(self, path: Path) -> None:
        figure = self.figure()
        figure.savefig(path, dpi=150)
        plt.close(figure)

    def _less(self, spent: str) -> float:
        """How many times less the accelerated run spent."""
        return float(getattr(self.plain.end, spent) / getattr(self.accelerated.end, spent))

    def to_json(self, path: Path) -> None:
        content = {
            "arguments": self.arguments,
            "runs": {run.name: asdict(run) for run in (self.plain, self.accelerated)},
            "note": self.note,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("seqcompress", "torch", "timm", "lightly", "scikit-learn")},
            },
            "hardware": {
                "machine": platform.machine(),
                "cpus": os.cpu_count(),
                "torch_threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            },
        }
        write_json(content, path)
