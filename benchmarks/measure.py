"""What all benchmarks share: timing side by side, medians with intervals, and tables that say where they come from.

A machine's speed drifts, by much more than the differences of interest. So variants take turns, in random order
within every repeat, and only ratios of times from one and the same repeat are reported.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import timm
import torch
from tqdm import tqdm

import seqcompress

Step: TypeAlias = Callable[[], object]
Times: TypeAlias = dict[str, dict[str, list[float]]]


class Ratio(NamedTuple):
    """Median over repeats of a ratio of two times, with a 95 % confidence interval for that median."""

    median: float
    low: float
    high: float


def interleaved_times(
    groups: Mapping[str, Mapping[str, Step]], *, repeats: int, min_seconds: float, device: torch.device, title: str
) -> Times:
    """Seconds for one call of every step, for every repeat: ``times[group][variant][repeat]``.

    Variants of a group are compared with each other, so they run back to back, in an order drawn anew every time.
    Where steps are shorter than ``min_seconds``, a repeat is the mean of several such turns; on CUDA it is one turn
    of several calls, because the host may run ahead of the device from one call to the next, as it does in training.
    """
    order = random.Random(0)
    asynchronous = device.type == "cuda"
    counts = {}
    for group, variants in tqdm(groups.items(), desc=f"{title}: warm-up", unit="group"):
        for step in variants.values():
            _seconds(step, 1, device)
        fastest = min(_seconds(step, 1, device) for step in variants.values())
        counts[group] = math.ceil(min_seconds / fastest)

    times: Times = {group: {name: [] for name in variants} for group, variants in groups.items()}
    for _ in tqdm(range(repeats), desc=title, unit="repeat"):
        for group in order.sample(list(groups), len(groups)):
            turns: dict[str, list[float]] = {name: [] for name in groups[group]}
            for _ in range(1 if asynchronous else counts[group]):
                for name in order.sample(list(turns), len(turns)):
                    calls = counts[group] if asynchronous else 1
                    turns[name].append(_seconds(groups[group][name], calls, device))
            for name, seconds in turns.items():
                times[group][name].append(sum(seconds) / len(seconds))
    return times


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Median of the repeats' own ratios; the interval is that of order statistics, free of any distribution."""
    ratios = sorted(above / below for above, below in zip(numerator, denominator, strict=True))
    outside, rank = 0.5 ** len(ratios), 0  # P(Binomial(n, 1/2) <= rank)
    while outside <= 0.025 and rank < len(ratios) // 2:
        rank += 1
        outside += math.comb(len(ratios), rank) * 0.5 ** len(ratios)
    rank = max(0, rank - 1)
    return Ratio(statistics.median(ratios), ratios[rank], ratios[-1 - rank])


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes that one call of ``step`` allocates at its peak, above what was allocated before it (CUDA only)."""
    step()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions, without anything that names the machine."""
    described = {"processor": _processor(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    described["clock"] = "CPU time" if uses_cpu_time(device) else "wall clock"
    if device.type == "cuda":
        described["device"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return {
        **described,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "seqcompress": seqcompress.__version__,
    }


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of equal keys as a Markdown table, its first column left-aligned and the others right-aligned."""
    header = list(rows[0])
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *[list(row.values()) for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_report(path: Path, text: str, results: Mapping[str, Any]) -> None:
    """Write ``path``.md and ``path``.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")


def uses_cpu_time(device: torch.device) -> bool:
    """Whether times are of CPU use instead of the wall clock: with one thread, other processes disturb it less."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def _seconds(step: Step, calls: int, device: torch.device) -> float:
    clock = time.process_time if uses_cpu_time(device) else time.perf_counter
    _synchronize(device)
    start = clock()
    for _ in range(calls):
        step()
    _synchronize(device)
    return (clock() - start) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
