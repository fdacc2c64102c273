"""What a pair of runs measured, as a table, a picture and a JSON file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from evaluation import Point, Speedup, speedup_at_equal_accuracy

mpl.use("Agg")
from matplotlib import pyplot as plt


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

    @property
    def speedup(self) -> Speedup | None:
        return speedup_at_equal_accuracy(self.plain.curve, self.accelerated.curve)

    def table(self) -> str:
        runs = (self.plain, self.accelerated)
        speedup = self.speedup
        at = f" at k-NN {speedup.accuracy:.3f}" if speedup else " at equal accuracy"
        rows = [
            ("", "plain", "accelerated"),
            ("budget (M units)", *(f"{run.end.units / 1e6:.4f}" for run in runs)),
            ("wall-clock, training (s)", *(f"{run.end.seconds:.1f}" for run in runs)),
            ("student's tokens per view", *(f"{run.tokens_per_view:.1f}" for run in runs)),
            ("k-NN accuracy", *(f"{run.end.knn:.3f}" for run in runs)),
            ("  highest on the way", *(f"{max(point.knn for point in run.curve):.3f}" for run in runs)),
            ("linear-probe accuracy", *(f"{run.linear_probe:.3f}" for run in runs)),
            (f"speed-up{at}, budget", "1.00x", f"{speedup.budget:.2f}x" if speedup else "not reached"),
            (f"speed-up{at}, wall-clock", "1.00x", f"{speedup.wall_clock:.2f}x" if speedup else "not reached"),
        ]
        width = max(len(row[0]) for row in rows)
        lines = [f"{name:<{width}}  {plain:>11}  {accelerated:>11}" for name, plain, accelerated in rows]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join([self.title, "", *lines, *(["", self.note] if self.note else [])])

    def plot(self, path: Path) -> None:
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for run, marker in ((self.plain, "o"), (self.accelerated, "s")):
            budget = [point.units / 1e6 for point in run.curve]
            axes.plot(budget, [point.knn for point in run.curve], marker=marker, label=f"{run.name} ({run.plan})")
        axes.set(title=self.title, xlabel="budget (M units)", ylabel="k-NN accuracy")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        if self.note:
            figure.supxlabel(self.note, fontsize=7, wrap=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)

    def to_json(self, path: Path) -> None:
        content = {
            "arguments": self.arguments,
            "runs": {run.name: asdict(run) for run in (self.plain, self.accelerated)},
            "speedup_at_equal_accuracy": asdict(self.speedup) if self.speedup else None,
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
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
