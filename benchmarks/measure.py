"""What all benchmarks share: timing side by side, medians with intervals, and tables that say where they come from.

A machine's speed drifts, by much more than the differences of interest. So variants take turns, in random order
within every turn, and what is compared is compared within a turn; groups of variants among themselves, within a repeat.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import timm
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import seqcompress
from seqcompress.json_files import write_json, write_text

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells of each time it starts

Step: TypeAlias = Callable[[], object]
Times: TypeAlias = dict[str, dict[str, list[float]]]
CUDA_TURN = 0.1  # seconds of calls without waiting for the device


class Stopwatch:
    """Adds up seconds by part of a step. On CUDA it never makes the host wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as ``name``."""
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            begun = now(self._device)
            yield
            self._seconds[name] += now(self._device) - begun

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading."""
        _synchronize(self._device)
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        read = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return read


@dataclass(frozen=True)
class InParts:
    """A step that tells a stopwatch where its parts begin and end."""

    run: Callable[[Stopwatch], object]
    stopwatch: Stopwatch

    def __call__(self) -> None:
        self.run(self.stopwatch)


class Ratio(NamedTuple):
    """Median over turns of a ratio of two times, with a 95 % confidence interval for that median."""

    median: float
    low: float
    high: float


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of every benchmark that times steps of a model; ``name`` is that of its results."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--min-seconds", type=float, default=0.2, help="of a repeat, for steps that are compared; 0: one turn each"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the encoders")
    parser.add_argument("--output", type=Path, help=f"where to write, without suffix; default: results/{name}-DEVICE")
    parser.set_defaults(name=name)


def prepare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> torch.device:
    """Check these options, fill in where to write, and set torch up; returns the device."""
    if options.repeats < 6:
        parser.error(f"--repeats must be at least 6 for a 95 % interval, got {options.repeats}")
    device = torch.device(options.device)
    options.output = options.output or Path(__file__).parent / "results" / f"{options.name}-{device.type}"
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return device


def conditions(options: argparse.Namespace) -> str:
    """What a report's title says of these options."""
    precision = "bfloat16 autocast" if options.amp else "float32"
    how = ", torch.compile" if options.compile else ""
    return f"{options.device}, {precision}, batch {options.batch_size}{how}"


def setup_of(options: argparse.Namespace) -> dict[str, Any]:
    """The same for a report's JSON."""
    return {name: getattr(options, name) for name in ("batch_size", "amp", "compile", "device", "repeats")}


def interleaved_times(
    groups: Mapping[str, Mapping[str, Step]], *, repeats: int, min_seconds: float, device: torch.device, title: str
) -> Times:
    """Seconds for one call of every step, turn by turn: ``times[group][variant][turn]``.

    Variants of a group are compared with each other: in a turn each of them runs once, in an order drawn anew every
    time. In every repeat a group has as many turns as fill ``min_seconds``, so that short steps, which cost little, are
    known better. On CUDA a turn of short steps is several calls of each, because the host may run ahead of the device
    from one call to the next, as it does in training.
    Of a step ``InParts`` each part is reported as well, as a variant "name: part".
    """
    order = random.Random(0)
    turns, calls = {}, {}
    for group, variants in tqdm(groups.items(), desc=f"{title}: warm-up", unit="group"):
        taken = [_seconds(step, 1, device) for step in variants.values()]
        if device.type == "cuda" or sum(taken) < min_seconds:  # the first calls take longer
            taken = [_seconds(step, 1, device) for step in variants.values()]
        together = min(CUDA_TURN, min_seconds) if device.type == "cuda" else 0
        calls[group] = max(1, math.ceil(together / min(taken)))
        turns[group] = max(1, round(min_seconds / (calls[group] * sum(taken))))
        for step in variants.values():
            if isinstance(step, InParts):
                step.stopwatch.read()

    times: Times = {group: defaultdict(list) for group in groups}
    for _ in tqdm(range(repeats), desc=title, unit="repeat"):
        for group in order.sample(list(groups), len(groups)):
            for _ in range(turns[group]):
                for name in order.sample(list(groups[group]), len(groups[group])):
                    step = groups[group][name]
                    times[group][name].append(_seconds(step, calls[group], device))
                    for part, elapsed in step.stopwatch.read().items() if isinstance(step, InParts) else ():
                        times[group][f"{name}: {part}"].append(elapsed / calls[group])
    return times


def by_repeat(times: Sequence[float], repeats: int) -> list[float]:
    """The mean of every repeat's turns: to compare groups with each other, which have different numbers of them."""
    turns = len(times) // repeats
    return [statistics.mean(times[start : start + turns]) for start in range(0, len(times), turns)]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Median of the turns' own ratios; the interval is that of order statistics, free of any distribution."""
    ratios = sorted(above / below for above, below in zip(numerator, denominator, strict=True))
    outside, rank = 1, 0  # 2 ** n * P(Binomial(n, 1/2) <= rank), as floats are too small for it
    while outside / 2 ** len(ratios) <= 0.025 and rank < len(ratios) // 2:
        rank += 1
        outside += math.comb(len(ratios), rank)
    rank = max(0, rank - 1)
    return Ratio(statistics.median(ratios), ratios[rank], ratios[-1 - rank])


def percent(share: Ratio, digits: int = 1) -> str:
    """A ratio and its interval in percent."""
    median, low, high = (f"{100 * value:.{digits}f}" for value in share)
    return f"{median} % [{low}, {high}]"


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes that one call of ``step`` has allocated at its peak, above what was allocated before it.

    The step must leave its gradients at None: only then are weights, optimizer state and views all there is before it,
    and gradients count. On a CPU it is what torch's allocator reports; what libraries take for themselves is not in it.
    """
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    recorded = profiled.profiler.kineto_results.events()
    allocations = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]")
    return max(accumulate(size for _, size in allocations))


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
    write_text(text, path.with_suffix(".md"))
    write_json(results, path.with_suffix(".json"))


def uses_cpu_time(device: torch.device) -> bool:
    """Whether times are of CPU use instead of the wall clock: with one thread, other processes disturb it less."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def now(device: torch.device) -> float:
    """Seconds on the clock in use, as soon as the device has done all it was given."""
    _synchronize(device)
    return time.process_time() if uses_cpu_time(device) else time.perf_counter()


def _seconds(step: Step, calls: int, device: torch.device) -> float:
    start = now(device)
    for _ in range(calls):
        step()
    return (now(device) - start) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
