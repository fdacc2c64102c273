"""Tables and figures from the runs' JSON files alone.

    python benchmarks/time_to_accuracy/report.py

writes ``summary.json`` beside the JSON files, and tables and figures into the documentation.

A speed-up is read between two curves through the ends of complete runs, accuracy over budget, at the greatest accuracy
that both of them reach. It is read between points, never outside them. Its interval is a bootstrap's over seeds and
over what chance the test images leave in an accuracy; with one seed, the chance of training itself is not in it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from seqcompress import Schedule, Strategy
from seqcompress.json_files import write_text
from seqcompress.presets import DEFAULT, PRESETS, double_patch

RESULTS = Path(__file__).parent.parent / "results" / "time_to_accuracy"
DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = (DOCS / "evidence.md", DOCS / "evidence-runs.md", DOCS.parent / "README.md")
METRICS = {"knn": "k-NN", "linear": "linear probe"}
METHODS = {"mocov3": "MoCo-v3", "simclr": "SimCLR", "dino": "DINO"}
PAPER = {"mocov3": "4x", "simclr": "3.3x", "dino": "2.5x"}  # ImageNet-1k, as the abstract says

_SCALED_VIEWS = ", scaled views"  # behind a plan whose views become smaller
_OF_SPEEDUP = ("data", "encoder", "method", "plan", "measure", "at accuracy", "M units", "seconds")
_ACROSS = (("units", "millions of units"), ("seconds", "seconds"))  # what accuracies are drawn over
_JUDGED_BY = (*METRICS, "loss")  # by what branches are judged
_CRITERIA = ("criterion", "rank correlation with k-NN", "with the linear probe", "with the loss")

# What may differ between runs of one comparison: their length, plan (with its views and teacher) and seed.
_FREE = ("budget", "plan", "views", "teacher", "seed")
# Settings that the first runs had not yet, and what they were for them.
_SINCE = {"teacher": "scaled", "views": "full", "local_views": 6, "teacher_temperature": 0.07, "head_norm": "no"}
Key = tuple[Any, ...]
Curves = Mapping[int, Sequence["Point"]]  # by seed


@dataclass(frozen=True)
class Point:
    """The end of a complete run.

    Attributes:
        units: spent on the encoders.
        seconds: of training: wall-clock on a GPU, and on a CPU the time of its one core, which other processes of the
            machine change less.
        accuracy: at the end, by name of the measure.
        images: that it was judged on.
        length: for which the run was planned.
    """

    units: float
    seconds: float
    accuracy: dict[str, float]
    images: int = 10_000
    length: float = 0.0

    def error(self, metric: str) -> float:
        """Standard error of an accuracy, from the number of test images alone."""
        accuracy = self.accuracy[metric]
        return math.sqrt(accuracy * (1 - accuracy) / self.images)

    def by_chance(self, metric: str, dice: random.Random) -> Point:
        """The point as other test images might have shown it."""
        return replace(self, accuracy={metric: dice.gauss(self.accuracy[metric], self.error(metric))})


@dataclass(frozen=True)
class Speedup:
    """What two curves spent to reach the same accuracy, each of them a pair: the plain one's, the accelerated one's."""

    accuracy: float
    budgets: tuple[float, float]
    times: tuple[float, float]

    @property
    def units(self) -> float:
        """How many times less budget the accelerated one took."""
        return self.budgets[0] / self.budgets[1]

    @property
    def seconds(self) -> float:
        """How many times less time it took."""
        return self.times[0] / self.times[1]


def load(folder: Path) -> list[dict[str, Any]]:
    """All runs in a folder, those with the smallest budget first."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*_seed*.json"))]
    for run in runs:
        run["settings"] = {**_SINCE, **run["settings"]}
    return sorted(runs, key=lambda run: run["settings"]["budget"])


def comparisons(runs: Iterable[dict[str, Any]]) -> dict[Key, dict[str, dict[int, list[Point]]]]:
    """Runs that may be compared: for each plan and each seed, a curve."""
    found: dict[Key, dict[str, dict[int, list[Point]]]] = {}
    for run in runs:
        settings = run["settings"]
        curves = found.setdefault(_comparable(run), {})
        point = Point(run["units"], _seconds(run), run["accuracy"], run["judged_images"], settings["budget"])
        curves.setdefault(_plan_of(settings), {}).setdefault(settings["seed"], []).append(point)
    return found


def _comparable(run: Mapping[str, Any]) -> Key:
    """The same for runs that may be compared."""
    same = sorted((name, value) for name, value in run["settings"].items() if name not in _FREE)
    return (*same, ("hardware", run["hardware"]), ("threads", run["threads"]))


def speedup(plain: Sequence[Point], accelerated: Sequence[Point], metric: str) -> Speedup | None:
    """Compare two curves at the greatest accuracy that both reach.

    Between points, accuracy follows the logarithm of what was spent in a straight line. ``None`` if the curves have
    fewer than two points, or one lies above the other altogether: then nothing can be read between points.
    """
    if len(plain) < 2 or len(accelerated) < 2:
        return None
    curves = (plain, accelerated)
    accuracy = min(max(point.accuracy[metric] for point in curve) for curve in curves)
    if any(accuracy < min(point.accuracy[metric] for point in curve) for curve in curves):
        return None
    budgets, times = (
        (_spent(plain, metric, accuracy, what), _spent(accelerated, metric, accuracy, what))
        for what in ("units", "seconds")
    )
    return Speedup(accuracy, budgets, times)


def intervals(
    plain: Curves, accelerated: Curves, metric: str, draws: int = 2000
) -> tuple[list[float], list[float]] | None:
    """95 % intervals of the speed-ups in units and in seconds, as geometric means over the seeds that both curves have.

    ``None`` if in more than 5 % of the draws a seed's curves do not overlap: what lies beyond can then not be read.
    """
    seeds = sorted(plain.keys() & accelerated.keys())
    dice, found = random.Random(0), []
    for _ in range(draws):
        read = [
            speedup(
                *([point.by_chance(metric, dice) for point in curves[seed]] for curves in (plain, accelerated)), metric
            )
            for seed in dice.choices(seeds, k=len(seeds))
        ]
        pairs = [pair for pair in read if pair is not None]
        if len(pairs) == len(seeds):
            found.append(
                (_geometric_mean([pair.units for pair in pairs]), _geometric_mean([pair.seconds for pair in pairs]))
            )
    if len(found) < 0.95 * draws:
        return None
    units, seconds = (_middle([pair[number] for pair in found]) for number in (0, 1))
    return units, seconds


def _middle(values: Sequence[float]) -> list[float]:
    """Within which 95 % lie."""
    ordered = sorted(values)
    return [round(ordered[round(share * (len(ordered) - 1))], 4) for share in (0.025, 0.975)]


def _spent(curve: Sequence[Point], metric: str, accuracy: float, what: str) -> float:
    """What a curve had spent when it first reached an accuracy that lies between its points."""
    points = sorted(curve, key=lambda point: point.units)
    first = next(number for number, point in enumerate(points) if point.accuracy[metric] >= accuracy)
    if first == 0:
        return getattr(points[0], what)
    before, after = points[first - 1], points[first]
    low, high = before.accuracy[metric], after.accuracy[metric]
    share = (accuracy - low) / (high - low)
    logs = [math.log(getattr(point, what)) for point in (before, after)]
    return math.exp(logs[0] + share * (logs[1] - logs[0]))


def groups(plain: Curves, accelerated: Curves) -> list[tuple[Curves, Curves]]:
    """Seeds that are read together, at the lengths that all of them have; then those that have more, with theirs."""
    seeds = sorted(plain.keys() & accelerated.keys())
    found = []
    while seeds:
        both: list[Curves] = []
        more = set[int]()
        for curves in (plain, accelerated):
            lengths = {seed: {point.length for point in curves[seed]} for seed in seeds}
            common = set.intersection(*lengths.values())
            both.append({seed: [point for point in curves[seed] if point.length in common] for seed in seeds})
            more.update(seed for seed in seeds if lengths[seed] > common)
        found.append((both[0], both[1]))
        if len(more) == len(seeds):
            more.remove(min(seeds, key=lambda seed: len(plain[seed]) + len(accelerated[seed])))
        seeds = sorted(more)
    return found


def compared(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for every plan and measure that can be compared with the plain method, one for each group of seeds.

    The interval is None where chance would too often part the curves: no ratio is told of these.
    """
    rows = [
        row
        for key, curves in comparisons(runs).items()
        for plan, metric in itertools.product(curves, METRICS)
        if plan != "none"
        for pair in groups(curves.get("none", {}), curves[plan])
        if (row := _row(key, plan, metric, *pair))
    ]
    return sorted(rows, key=_row_order)


def by_length(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that read as if the plain method's longest run were each of its lengths but the shortest, in turn.

    Each holds that length, in millions of units, as ``plain``, and the seeds of that length are read together. Where
    there is but one such length, it says no more than ``compared``, and is left out; so is a row whose accelerated runs
    end below what nine tenths of that length bring.
    """
    rows = []
    for key, curves in comparisons(runs).items():
        plain = curves.get("none", {})
        lengths = sorted({point.length for curve in plain.values() for point in curve})[1:]
        for plan, length, metric in itertools.product(curves, lengths if len(lengths) > 1 else (), METRICS):
            if plan == "none":
                continue
            until = {seed: [point for point in curve if point.length <= length] for seed, curve in plain.items()}
            until = {seed: curve for seed, curve in until.items() if any(point.length == length for point in curve)}
            for pair in groups(until, curves[plan])[:1]:
                row = _row(key, plan, metric, *pair)
                if row is not None and row["units"][0] >= 0.9e6 * length:
                    rows.append({**row, "plain": length})
    return sorted(rows, key=_row_order)


def _row_order(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return row["dataset"], list(METHODS).index(row["method"]), row["encoder"]


def _row(key: Key, plan: str, metric: str, plain: Curves, accelerated: Curves) -> dict[str, Any] | None:
    """What can be read of the seeds that both have; None if that is nothing."""
    pairs = {seed: speedup(plain[seed], accelerated[seed], metric) for seed in plain.keys() & accelerated.keys()}
    read = {seed: pair for seed, pair in sorted(pairs.items()) if pair is not None}
    if not read:
        return None
    settings = dict(key)
    interval = intervals(*({seed: curves[seed] for seed in read} for curves in (plain, accelerated)), metric)
    return {
        "method": settings["method"],
        "plan": plan,
        "dataset": settings["dataset"],
        "encoder": encoder(settings),
        "hardware": settings["hardware"],
        "seeds": list(read),
        "metric": metric,
        "accuracy": round(_mean([pair.accuracy for pair in read.values()]), 6),
        # Geometric means, so that the mean of ratios is the ratio of means.
        "speedup_units": round(_geometric_mean([pair.units for pair in read.values()]), 4),
        "speedup_wall": round(_geometric_mean([pair.seconds for pair in read.values()]), 4),
        "units": [round(_geometric_mean(each)) for each in zip(*(pair.budgets for pair in read.values()), strict=True)],
        "seconds": [
            round(_geometric_mean(each), 1) for each in zip(*(pair.times for pair in read.values()), strict=True)
        ],
        "speedup_units_by_seed": {str(seed): round(pair.units, 4) for seed, pair in read.items()},
        "interval": interval and interval[0],
        "interval_wall": interval and interval[1],
    }


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of what has been compared, the rows whose ratio can be told."""
    return [row for row in rows if row["interval"] is not None]


def unread(runs: Sequence[dict[str, Any]], rows: Iterable[dict[str, Any]]) -> list[str]:
    """Where no ratio can be read, although there are curves of two points: one lies above the other, or may do so."""
    lines = [
        f"- {_label(row)}, seeds {', '.join(map(str, row['seeds']))}: no ratio, since in more than 5 % of the "
        "bootstrap's draws curves do not overlap (these runs alone would say "
        f"{row['speedup_units']:.2f}x)."
        for row in rows
        if row["interval"] is None
    ]
    for key, curves in comparisons(runs).items():
        settings, plain = dict(key), curves.get("none", {})
        for plan, seeds in curves.items():
            for seed, metric in itertools.product(sorted(seeds), METRICS):
                pair = plain.get(seed, []), seeds[seed]
                if plan == "none" or min(map(len, pair)) < 2 or speedup(*pair, metric):
                    continue
                reach = [sorted(100 * point.accuracy[metric] for point in curve) for curve in pair]
                where = _label({**settings, "encoder": encoder(settings), "plan": plan, "metric": metric})
                (low, *_, high), (lowest, *_, highest) = reach
                lines.append(
                    f"- {where}, seed {seed}: no ratio, since the curves do not overlap "
                    f"(plain {low:.1f} to {high:.1f}, {plan} {lowest:.1f} to {highest:.1f})."
                )
    return lines


def _label(row: Mapping[str, Any]) -> str:
    where = f"{row['dataset']}, {row['encoder']}, {METHODS[row['method']]}"
    return f"{where}, {row['plan']}, {METRICS[row['metric']]}"


def encoder(settings: dict[str, Any]) -> str:
    """Short for the size of a ViT."""
    shape = f"{settings['depth']} x {settings['width']}"
    return f"ViT {shape}, patch {settings['patch_size']}, {settings['image_size']} px"


def runs_table(runs: Sequence[dict[str, Any]]) -> str:
    """All runs: what they spent and what they reached, means over seeds with the spread."""
    rows = []
    same: dict[Key, list[dict[str, Any]]] = {}
    for run in runs:
        settings = sorted((name, value) for name, value in run["settings"].items() if name != "seed")
        same.setdefault((run["hardware"], *settings), []).append(run)
    order = sorted(
        same.values(),
        key=lambda group: (*_run_order(group[0]["settings"]), group[0]["settings"]["plan"], group[0]["units"]),
    )
    for group in order:
        settings = group[0]["settings"]
        cells = [
            settings["dataset"],
            encoder(settings),
            METHODS[settings["method"]],
            _plan(_plan_of(settings)),
            f"{group[0]['units'] / 1e6:.3g} M",
            f"{group[0]['epochs']:.3g}",
            str(group[0]["steps"]),
            f"{_mean([_seconds(run) for run in group]):.0f}",
            *(_spread([100 * run["accuracy"][metric] for run in group]) for metric in METRICS),
            _seeds(group),
        ]
        rows.append(cells)
    headings = ("data", "encoder", "method", "plan", "budget", "epochs", "steps", "seconds", *METRICS.values(), "seeds")
    return _table(headings, rows)


def plans_table(runs: Sequence[dict[str, Any]], least: int = 4) -> str:
    """Plans at an equal budget, for each comparison at the budget that most have been run for, if so many have.

    Each is shown at the seeds that all of them have; those that have more are shown again, at theirs.
    """
    headings = ("data", "method", "budget", "plan", "steps", "at full length: of the steps, of the budget")
    lines: list[list[str]] = []
    found: dict[Key, dict[float, dict[str, dict[int, dict[str, Any]]]]] = {}
    for run in runs:
        settings = run["settings"]
        plans = found.setdefault(_comparable(run), {}).setdefault(settings["budget"], {})
        plans.setdefault(_plan_of(settings), {})[settings["seed"]] = run
    for budgets in found.values():
        budget, plans = max(budgets.items(), key=lambda item: (len(item[1]), item[0]))
        if len(plans) < least or "none" not in plans:
            continue
        for together, seeds in _at_common_seeds(plans):
            plain = together["none"][seeds[0]]
            rows = []
            for plan, by_seed in together.items():
                group = [by_seed[seed] for seed in seeds]
                full = _full_length(group[0])
                of_budget = full * plain["units"] / plain["steps"] / group[0]["units"]
                accuracies = [[100 * run["accuracy"][metric] for run in group] for metric in METRICS]
                cells = [_plan(plan), str(group[0]["steps"]), f"{full / group[0]['steps']:.0%}, {of_budget:.0%}"]
                rows.append((sum(map(_mean, accuracies)), [*cells, *map(_spread, accuracies), _seeds(group)]))
            where = [plain["settings"]["dataset"], METHODS[plain["settings"]["method"]], f"{budget:g} M"]
            lines += [[*where, *cells] for _, cells in sorted(rows, reverse=True)]
    return _table((*headings, *METRICS.values(), "seeds"), lines)


def _at_common_seeds(
    plans: Mapping[str, Mapping[int, dict[str, Any]]],
) -> Iterator[tuple[Mapping[str, Mapping[int, dict[str, Any]]], list[int]]]:
    """Plans with the seeds that all of them have; then those that have more, while the plain run is among them."""
    while len(plans) > 1 and "none" in plans:
        common = set.intersection(*map(set, plans.values()))
        if common:
            yield plans, sorted(common)
        more = {plan: by_seed for plan, by_seed in plans.items() if by_seed.keys() > common}
        if len(more) == len(plans):
            return
        plans = more


def _full_length(run: Mapping[str, Any]) -> int:
    """Steps of a run that nothing shortened."""
    schedule = Schedule.from_json(json.dumps(run["schedule"]))
    return sum(schedule(step / run["steps"]) == Strategy() for step in range(run["steps"]))


def _seeds(runs: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(map(str, sorted(run["settings"]["seed"] for run in runs)))


def speedups_table(rows: Sequence[dict[str, Any]]) -> str:
    """Speed-ups at equal accuracy, beside the paper's."""
    if not rows:
        return "No two curves of complete runs overlap yet, so no ratio can be read."
    ratios = ("less budget", "less budget of each seed", "less time", "paper, ImageNet-1k")
    return _ratios_table((*_OF_SPEEDUP, *ratios), rows)


def short_table(rows: Sequence[dict[str, Any]]) -> str:
    """The default plan's, with full and with smaller views: those with the most seeds of each comparison."""
    most: dict[Key, dict[str, Any]] = {}
    for row in rows:
        if row["plan"] in (DEFAULT, DEFAULT + _SCALED_VIEWS):
            key = row["dataset"], row["method"], row["encoder"], row["plan"], row["metric"]
            most[key] = max(most.get(key, row), row, key=lambda row: len(row["seeds"]))
    ratios = ("less budget", "less time", "seeds", "paper, ImageNet-1k")
    return _ratios_table((*_OF_SPEEDUP, *ratios), most.values())


def by_length_table(rows: Sequence[dict[str, Any]]) -> str:
    """How speed-ups change with the length of the plain run."""
    what = ("data", "encoder", "method", "plan", "plain run", "measure", "at accuracy")
    return _ratios_table((*what, "less budget", "less budget of each seed", "less time"), rows)


def _ratios_table(headings: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Of what has been compared, the columns with these headings."""
    lines = []
    for row in rows:
        cells = {
            "data": row["dataset"],
            "encoder": row["encoder"],
            "method": METHODS[row["method"]],
            "plan": _plan(row["plan"]),
            "plain run": f"{row.get('plain', 0):g} M",
            "measure": METRICS[row["metric"]],
            "at accuracy": f"{100 * row['accuracy']:.1f}",
            "M units": " → ".join(f"{units / 1e6:.3g}" for units in row["units"]),
            "seconds": " → ".join(f"{seconds:.0f}" for seconds in row["seconds"]),
            "less budget": _times(row["speedup_units"], row["interval"]),
            "less time": _times(row["speedup_wall"], row["interval_wall"]),
            "seeds": ", ".join(map(str, row["seeds"])),
            "less budget of each seed": "; ".join(
                f"{seed}: {ratio:.2f}x" for seed, ratio in row["speedup_units_by_seed"].items()
            ),
            "paper, ImageNet-1k": PAPER[row["method"]],
        }
        lines.append([cells[heading] for heading in headings])
    return _table(headings, lines)


def tuning_table(runs: Sequence[dict[str, Any]]) -> str:
    """What was tried on held-out training images."""
    rows = []
    varied = ("batch", "lr", "warmup", "weight_decay", "momentum", "crop")
    of_dino = ("prototypes", "local_views", "teacher_temperature", "head_norm")
    order = sorted(
        runs,
        key=lambda run: (
            *_run_order(run["settings"]),
            *(run["settings"][name] for name in ("plan", "budget", *varied, *of_dino, "seed")),
            run["judged_images"],
        ),
    )
    for run in order:
        settings = run["settings"]
        cells = [
            settings["dataset"],
            METHODS[settings["method"]],
            _plan(_plan_of(settings)),
            f"{settings['budget']:g} M",
            *(f"{settings[name]:g}" for name in varied),
            ", ".join(str(settings[name]) for name in of_dino) if settings["method"] == "dino" else "",
            str(settings["seed"]),
            f"{run['judged_images']:,}",
            *(f"{100 * run['accuracy'][metric]:.1f}" for metric in METRICS),
        ]
        rows.append(cells)
    names = ("batch", "learning rate", "warm-up", "weight decay", "teacher", "crop", "DINO's own", "seed", "judged on")
    return _table(("data", "method", "plan", "budget", *names, *METRICS.values()), rows)


def branches_table(found: Mapping[str, Any]) -> str:
    """Of branches from one checkpoint: what each strategy reached, and how well criteria had told their order."""
    settings = found["checkpoint_of"]
    seeds = max(len(branches) for branches in found["branches"].values())
    intro = (
        f"From {found['progress']:.0%} of a run of {METHODS[settings['method']]}, "
        f"{_plan(_plan_of(settings))}, {settings['budget']:g} M, "
        f"on for {found['budget']:g} M; {seeds} branch{'es' if seeds > 1 else ''} for each strategy, judged on "
        f"{found['judged_images']:,} held-out images."
    )
    rows = []
    for name, branches in found["branches"].items():
        reached = [
            _spread([scale * branch[what] for branch in branches.values()], digits)
            for what, scale, digits in (*((metric, 100, 1) for metric in METRICS), ("loss", 1, 3))
        ]
        rows.append([name, f"{found['cost'][name]:.2f}", str(next(iter(branches.values()))["steps"]), *reached])
    correlations = [
        [name, *("{:.2f} ({:.2f} to {:.2f})".format(*row[what]) for what in _JUDGED_BY)]
        for name, row in found["correlation"].items()
    ]
    strategies = _table(("strategy", "cost of a step", "steps", *METRICS.values(), "loss"), rows)
    return "\n\n".join((intro, strategies, _table(_CRITERIA, correlations)))


def predictions_table(branches: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """How well each criterion tells what helps: rank correlations, mean over checkpoints with their spread.

    With what branches reached, and with k-NN at the end of whole runs under one strategy each, where there are three of
    them or more: few, and the same ones for checkpoints of one method.
    """
    wholes = [whole_runs(found, runs) for found in branches]
    rows = []
    for name in branches[0]["correlation"]:
        of = [(found, whole) for found, whole in zip(branches, wholes, strict=True) if name in found["correlation"]]
        cells = [_spread([found["correlation"][name][what][0] for found, _ in of], 2) for what in _JUDGED_BY]
        told = [
            rank_correlation([found["criteria"][name][strategy] for strategy in whole], list(whole.values()))
            for found, whole in of
            if len(whole) > 2
        ]
        rows.append([name, *cells, _spread(told, 2) if told else ""])
    return _table((*_CRITERIA, "with k-NN of whole runs"), rows)


def whole_runs(branches: Mapping[str, Any], runs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """k-NN of runs under one of the branches' strategies from beginning to end, otherwise as the checkpoint's run."""
    asked = {**_SINCE, **branches["checkpoint_of"], "plan": None}
    alike = [run for run in runs if {**run["settings"], "plan": None} == asked]
    alike = [run for run in alike if (run["hardware"], run["threads"]) == (branches["hardware"], 1)]
    found = {run["settings"]["plan"]: run["accuracy"]["knn"] for run in alike}
    if "none" in found:
        found["base"] = found.pop("none")
    return {name: found[name] for name in branches["branches"] if name in found}


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; not a number where one of them has no order."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return math.nan
    return float(spearmanr(one, other).statistic)


def gradients_table(folder: Path) -> str:
    """What ``python -m seqcompress gradients`` has found at checkpoints, from its CSV files, by the kind of the run."""
    lines = []
    for path in sorted(folder.glob("*/stage-*.csv")):
        with path.open(newline="") as file:
            rows = {row["strategy"]: row for row in csv.DictReader(file)}
        least = min(rows, key=lambda name: float(rows[name]["relative_ca_mse"]))
        tied = [name for name, row in rows.items() if row["tied"] == "True" and name != least]
        told = {
            name: "{:.3g} ({:.3g} to {:.3g})".format(
                *(float(row[f"relative_ca_mse{end}"]) for end in ("", "_low", "_high"))
            )
            for name, row in rows.items()
        }
        share = float(path.stem.partition("-")[2])
        cells = [path.parent.name, f"{share:g}", f"{least}: {told[least]}", "; ".join(tied) or "none"]
        lines.append([*cells, told["base"], told["drop 0.5, patch 8"]])
    headings = ("checkpoints of", "at", "least relative CA-MSE", "not told from it", "of the base")
    return _table((*headings, "of `drop 0.5, patch 8`"), lines)


def choices_table(measured: Sequence[Mapping[str, Any]]) -> str:
    """Which strategy each criterion puts first at checkpoints, by the run and its progress."""
    names = dict.fromkeys(name for found in measured for name in found["criteria"] if name != "cost")
    lines = []
    for found in sorted(measured, key=lambda found: (_plan_of(found["checkpoint_of"]), found["progress"])):
        settings = found["checkpoint_of"]
        values = [found["criteria"].get(name, {"": 0.0}) for name in names]
        cells = [METHODS[settings["method"]], _plan(_plan_of(settings)), f"{found['progress']:.0%}"]
        lines.append([*cells, *(max(of_one, key=of_one.__getitem__) for of_one in values)])
    return _table(("method", "plan", "at", *names), lines)


def load_branches(folder: Path) -> list[dict[str, Any]]:
    """All that branches.py has found, and compared."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("[!.]*.json"))]
    return [each for each in found if "criteria" in each]


def tables(folder: Path, runs: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What goes into the documentation, by the names of the places.

    Args:
        folder: of all results.
        runs: those that lie in it.
        rows: what ``compared`` has found in them.
    """
    branches, measured = load_branches(folder / "branches"), load_branches(folder / "criteria")
    speedups = "\n\n".join(part for part in (speedups_table(summary(rows)), "\n".join(unread(runs, rows))) if part)
    return {
        "speed-ups": speedups,
        "speed-ups of the default plan": short_table(summary(rows)),
        "by length": by_length_table(summary(by_length(runs))),
        "plans": plans_table(runs),
        "runs": runs_table(runs),
        "tuning": tuning_table(load(folder / "tuning")),
        "gradients": gradients_table(folder / "gradients"),
        "choices": choices_table(measured) if measured else "Nothing has been measured yet.",
        "predictions": predictions_table(branches, runs) if branches else "No branches have been run yet.",
        "branches": "\n\n".join(map(branches_table, branches)) or "No branches have been run yet.",
    }


def figures(runs: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Accuracy over budget and over time, one figure for each comparison, of the plans that have a curve."""
    pyplot = _pyplot()
    written: list[Path] = []
    drawn = Counter[str]()
    for key, plans in comparisons(runs).items():
        settings = dict(key)
        curves = {plan: seeds for plan, seeds in plans.items() if any(len(curve) > 1 for curve in seeds.values())}
        if not curves:
            continue
        figure, grid = pyplot.subplots(2, 2, figsize=(9, 6.5), sharey="row", layout="constrained")
        for row, (metric, name) in zip(grid, METRICS.items(), strict=True):
            for axis, (what, label) in zip(row, _ACROSS, strict=True):
                for plan, seeds in sorted(curves.items(), key=lambda item: item[0] != "none"):
                    _draw(axis, seeds.values(), what, metric, plan)
                _scale(axis, label)
            row[0].set_ylabel(f"{name}, %")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(f"{METHODS[settings['method']]}, {settings['dataset']}, {encoder(settings)}")
        stem = f"evidence-{settings['dataset']}-{settings['method']}"
        drawn[stem] += 1
        path = folder / f"{stem}{f'-{drawn[stem]}' if drawn[stem] > 1 else ''}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written


def overview(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """k-NN over budget and over time, plain and at the default plan: a column for each comparison that has both.

    Where there are runs at the default plan with smaller views, these, too.
    """
    pyplot = _pyplot()
    shown = [(dict(key), plans) for key, plans in comparisons(runs).items() if {"none", DEFAULT} <= plans.keys()]
    shown.sort(key=lambda item: _run_order(item[0]))
    if not shown:
        return
    figure, grid = pyplot.subplots(
        2, len(shown), figsize=(3 * len(shown), 5.5), sharey="col", layout="constrained", squeeze=False
    )
    for column, (settings, plans) in zip(grid.T, shown, strict=True):
        for axis, (what, label) in zip(column, _ACROSS, strict=True):
            for number, plan in enumerate(("none", DEFAULT, DEFAULT + _SCALED_VIEWS)):
                if plan in plans:
                    _draw(axis, plans[plan].values(), what, "knn", plan, color=f"C{number}")
            _scale(axis, label)
        column[0].set_title(f"{METHODS[settings['method']]}, {settings['dataset']}\n{encoder(settings)}", size="medium")
    for row in grid:
        row[0].set_ylabel("k-NN, %")
    drawn = {label: line for axis in grid.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _scale(axis: Any, label: str) -> None:
    from matplotlib import ticker

    axis.set(xscale="log", xlabel=label)
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.grid(alpha=0.3)


def _draw(
    axis: Any, seeds: Iterable[Sequence[Point]], what: str, metric: str, plan: str, color: str | None = None
) -> None:
    """The mean over seeds and how far they spread, no less than the standard error that the test images leave."""
    at: dict[float, list[Point]] = {}
    for curve in seeds:
        for point in curve:
            at.setdefault(float(f"{point.units:.3g}"), []).append(point)
    points = [at[units] for units in sorted(at)]
    across = [_mean([getattr(point, what) for point in group]) / (1e6 if what == "units" else 1) for group in points]
    values = [[100 * point.accuracy[metric] for point in group] for group in points]
    middle = [_mean(group) for group in values]
    low, high = [], []
    for mean, group, (first, *_) in zip(middle, values, points, strict=True):
        low.append(max(mean - min(group), 100 * first.error(metric)))
        high.append(max(max(group) - mean, 100 * first.error(metric)))
    axis.errorbar(across, middle, yerr=[low, high], marker="o", capsize=3, color=color, label=_plan(plan))


def _seconds(run: dict[str, Any]) -> float:
    return run["seconds"]["cpu" if run["device"] == "cpu" and run["threads"] == 1 else "wall"]


def _run_order(settings: dict[str, Any]) -> tuple[str, int, str]:
    return _row_order({**settings, "encoder": encoder(settings)})


def _plan_of(settings: dict[str, Any]) -> str:
    """The plan, by its name if it is the default, and whether views, the batch, and not the teacher, follow it."""
    plan = settings["plan"]
    if plan == str(PRESETS[DEFAULT](double_patch(settings["patch_size"], settings["image_size"]))):
        plan = DEFAULT
    plan += _SCALED_VIEWS if settings.get("views", "full") == "scaled" else ""
    plan += ", teacher at full length" if settings.get("teacher", "scaled") == "full" else ""
    return plan + (f", batch that grows ({settings['grow']})" if settings.get("grow", "no") != "no" else "")


def _plan(text: str) -> str:
    return "plain" if text == "none" else text


def _mean(values: Sequence[float]) -> float:
    return min(max(math.fsum(values) / len(values), min(values)), max(values))  # rounded, it may lie outside


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(_mean([math.log(value) for value in values]))


def _spread(values: Sequence[float], digits: int = 1) -> str:
    middle, least, most = (
        f"{round(value, digits) + 0.0:.{digits}f}" for value in (_mean(values), min(values), max(values))
    )
    return middle if len(values) == 1 else f"{middle} ({least} to {most})"


def _table(headings: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


def _times(value: float, interval: Sequence[float]) -> str:
    return f"{value:.2f}x ({interval[0]:.2f} to {interval[1]:.2f})"


def fill(page: Path, tables: dict[str, str]) -> None:
    """Put tables between a page's markers ``<!-- NAME -->`` and ``<!-- end NAME -->``."""
    text = page.read_text()
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text, flags=re.DOTALL)
    write_text(text, page)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="pages to put the tables into")
    options = parser.parse_args(arguments)
    runs = load(options.results)
    if not runs:
        parser.error(f"--results must hold JSON files of runs, found none in {options.results}")
    rows = compared(runs)
    written = tables(options.results, runs, rows)
    write_text(json.dumps(summary(rows), indent=1) + "\n", options.results / "summary.json")
    for page in filter(Path.is_file, options.pages):
        fill(page, written)
    images = options.pages[0].parent / "images"
    if options.pages[0].is_file():
        images.mkdir(exist_ok=True)
        figures(runs, images)
        overview(runs, images / "evidence.png")
    print("\n\n".join(written.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
