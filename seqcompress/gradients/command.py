"""The command line: gradient error at stages of one's own training, and the schedule that follows, in a folder."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from seqcompress.compressors.random_states import RandomStates
from seqcompress.gradients.measured_encoder import measured_encoders, own_patch_size_of
from seqcompress.gradients.measurement import gradient_error
from seqcompress.gradients.report import CostKind, GradientErrorReport, canonical
from seqcompress.gradients.schedule_search import best_schedule, explain_schedule, plot_gradient_error
from seqcompress.gradients.training_step import TrainingStep
from seqcompress.json_files import FieldError, is_file, read_json, take, take_version, write_json, write_text
from seqcompress.locations import LocationError, loaded, location, module_name
from seqcompress.messages import described
from seqcompress.strategy import Strategy

__all__ = ["main"]

_VERSION = 1
_INTERRUPTED = 130  # what shells report for Ctrl-C


def main(argv: Sequence[str] | None = None, *, prog: str = "seqcompress-gradient-error") -> int:
    """Run the command. Everything that can be checked is, before anything is measured.

    Args:
        argv: the arguments; those of the process if None.
        prog: the command's name in its help.

    Returns:
        0, or 130 after Ctrl-C, or 1 if the results cannot be written (a full disk), after a message.

    Raises:
        SystemExit: with 2 for arguments that are wrong, after a message; with 0 after ``--help``.
    """
    parser = _parser(prog)
    arguments = parser.parse_args(argv)
    try:
        _run(arguments)
    except _UsageError as error:
        parser.error(str(error))
    except _WriteError as error:
        _say(f"{prog}: error: {error}")
        return 1
    except KeyboardInterrupt:
        _say(f"interrupted; the same command goes on after the stages that are complete in {arguments.output}")
        return _INTERRUPTED
    return 0


class _UsageError(Exception):
    """Something that the user must change about the command."""


class _WriteError(Exception):
    """Results cannot be written."""


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _WriteError(f"argument --output: {error}; stages that are complete in the folder stay so") from None


@dataclass(frozen=True)
class _Stage:
    progress: float
    checkpoint: Path

    def __str__(self) -> str:
        return f"{self.progress:.12g}"

    def file(self, folder: Path, kind: str) -> Path:
        return folder / f"stage-{self}.{kind}"


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measure the gradient error of strategies at stages of a training, and find the schedule that "
        "follows. Each stage's report (JSON, CSV, picture) is written as soon as it is there. The same command goes "
        "on where it was interrupted.",
    )
    parser.add_argument(
        "function",
        metavar="FUNCTION",
        type=location,
        help="takes a checkpoint's path and returns a seqcompress.TrainingStep: package.module:function or "
        "path/to/file.py:function",
    )
    parser.add_argument(
        "--checkpoints",
        metavar="PROGRESS=FILE",
        nargs="+",
        type=_checkpoint,
        required=True,
        help="checkpoints, each with the share of training that was done, in [0, 1]; a single one may come without",
    )
    parser.add_argument(
        "--token-dropout",
        metavar="R",
        nargs="+",
        type=_token_dropout,
        default=[0.0, 0.25, 0.5, 0.75, 0.9],
        help="token dropouts of the grid (default: 0 0.25 0.5 0.75 0.9)",
    )
    parser.add_argument(
        "--patch-size",
        metavar="P",
        nargs="+",
        type=_at_least(1),
        default=[None],
        help="patch sizes of the grid, in pixels (default: the model's own)",
    )
    parser.add_argument(
        "--batches", metavar="K", type=_at_least(2), default=32, help="batches a stage (default: %(default)s)"
    )
    parser.add_argument(
        "--cost",
        choices=get_args(CostKind),
        default="measured",
        help="of a strategy: time of the whole step, or FLOPs of the encoders (default: %(default)s)",
    )
    parser.add_argument(
        "--sketch",
        metavar="N",
        type=_at_least(2),
        help="keep N numbers a gradient, where whole ones need too much memory",
    )
    parser.add_argument(
        "--monotone",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let sequences never become cheaper again over training (default)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=_at_least(0),
        default=0,
        help="of random views and subsets; global random states begin with it at every stage (default: %(default)s)",
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--overwrite", action="store_true", help="measure these stages again, if they are complete in the folder"
    )
    return parser


def _run(arguments: argparse.Namespace) -> None:
    stages = _checked_stages(arguments.checkpoints)
    if arguments.seed >= 2**63:
        raise _UsageError(f"argument --seed: must be below 2**63, got {arguments.seed}")
    strategies = sorted(
        {Strategy(dropout, size) for dropout in arguments.token_dropout for size in arguments.patch_size},
        key=lambda strategy: (strategy.token_dropout, strategy.patch_size or 0),
    )
    _check_pictures()
    where, name = arguments.function
    try:
        function = loaded(where, name)
    except LocationError as error:
        raise _UsageError(f"argument FUNCTION: {error}") from None
    folder: Path = arguments.output
    _check_writable(folder)
    records = _Records(folder)
    settings = {
        stage: {
            "function": f"{module_name(where)}:{name}",
            "checkpoint_sha256": _digest(stage.checkpoint),
            "strategies": list(map(str, strategies)),
            "batches": arguments.batches,
            "cost": arguments.cost,
            "sketch": arguments.sketch,
            "seed": arguments.seed,
        }
        for stage in stages
    }
    known = {stage: None if arguments.overwrite else records.report(stage, settings[stage]) for stage in stages}

    reports: dict[float, GradientErrorReport] = {}
    for number, stage in enumerate(stages, 1):
        where = f"stage {number} of {len(stages)}, progress {stage}"
        report = known[stage]
        if report is not None:
            _say(f"{where}: read back from {stage.file(folder, 'json')}")
        else:
            _say(f"{where}: {stage.checkpoint}")
            started = time.perf_counter()
            report = _measured(function, stage, strategies, arguments)
            with _writing():
                records.add(stage, report, settings[stage], time.perf_counter() - started)
        with _writing():
            report.to_csv(stage.file(folder, "csv"))
            report.plot(stage.file(folder, "png"))
        reports[stage.progress] = report

    schedule = best_schedule(reports, arguments.monotone)
    summary = _summary(stages, reports, arguments.monotone, records.seconds(stages))
    with _writing():
        schedule.to_json(folder / "schedule.json")
        plot_gradient_error(reports, folder / "schedule.png", arguments.monotone)
        write_text(summary, folder / "summary.txt")
    _print(summary, folder / "summary.txt")
    _say(f"reports, pictures and schedule: {folder}")


def _measured(
    function: Callable[[Path], object], stage: _Stage, strategies: Sequence[Strategy], arguments: argparse.Namespace
) -> GradientErrorReport:
    # At every stage the same, measured or read back before, so that all see the same images where the function does.
    RandomStates.seed(arguments.seed)
    torch.manual_seed(arguments.seed)  # a CUDA device that is not in use yet, too
    training = function(stage.checkpoint)
    if not isinstance(training, TrainingStep):
        raise _UsageError(f"argument FUNCTION: must return a TrainingStep, got {described(training)}")
    _check_grid(training, strategies)
    report = gradient_error(
        training.model,
        training.step,
        _FirstBatches(training.batches, arguments.batches),
        strategies,
        teacher=training.teacher,
        after_backward=training.after_backward,
        protect=training.protect,
        cost=arguments.cost,
        sketch=arguments.sketch,
        seed=arguments.seed,
    )
    if not report.complete:
        raise KeyboardInterrupt
    return report


def _check_grid(training: TrainingStep, strategies: Iterable[Strategy]) -> None:
    try:
        encoders = measured_encoders(training.model, training.teacher)
        own_patch_size = own_patch_size_of(encoders)
        for encoder in encoders:
            encoder.check([canonical(strategy, own_patch_size) for strategy in strategies])
    except (TypeError, ValueError) as error:
        raise _UsageError(f"argument FUNCTION with this grid: {error}") from None


class _FirstBatches:
    """The first so many batches; it is an error if there are fewer."""

    def __init__(self, batches: Iterable[Any], count: int) -> None:
        self._batches, self._count = batches, count
        with contextlib.suppress(TypeError):  # has no length: then it shows at the end
            self._check(len(batches))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._batches)
        for number in range(self._count):
            try:
                yield next(iterator)  # under no name, so that no batch lives longer than it is used
            except StopIteration:
                self._check(number)

    def _check(self, available: int) -> None:
        if available < self._count:
            raise _UsageError(f"argument --batches: the training step has {available}, got {self._count}")


class _Records:
    """Which stages are complete in a folder, under which settings and in how many seconds: its ``analysis.json``.

    Several commands may measure stages into one folder at a time: each change is read, made and written while no other
    can be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "analysis.json"
        self._stages = self._read()
        self._seconds = {name: float(record["seconds"]) for name, record in self._stages.items()}

    def report(self, stage: _Stage, settings: Mapping[str, Any]) -> GradientErrorReport | None:
        """The report of a stage, if it is complete."""
        path = stage.file(self._folder, "json")
        if str(stage) not in self._stages or not path.exists():
            return None
        record = self._stages[str(stage)]
        others = [name for name, value in settings.items() if record.get(name) != value]
        if others:
            raise _UsageError(
                f"argument --output: {path} was measured with other settings ({', '.join(others)}): "
                "choose another folder, or measure again with --overwrite"
            )
        try:
            return GradientErrorReport.from_json(path)
        except (OSError, ValueError) as error:
            raise _UsageError(f"argument --output: {error}") from None

    def add(self, stage: _Stage, report: GradientErrorReport, settings: Mapping[str, Any], seconds: float) -> None:
        """Write a stage's report, and down that it is complete: never a new report under settings of an old one."""
        record = {"checkpoint": str(stage.checkpoint), **settings, "seconds": round(seconds, 3)}
        with _locked(self._folder / ".analysis.lock"):
            if self._change(stage, None):
                self._write()
            report.to_json(stage.file(self._folder, "json"))
            self._change(stage, record)
            self._write()
            self._seconds[str(stage)] = seconds

    def seconds(self, stages: Iterable[_Stage]) -> float:
        """How long these stages took."""
        return math.fsum(self._seconds[str(stage)] for stage in stages)

    def _change(self, stage: _Stage, record: dict[str, Any] | None) -> bool:
        """Change one stage of what the file says now; whether there was anything."""
        self._stages = self._read()
        before = self._stages.pop(str(stage), None)
        if record is not None:
            self._stages[str(stage)] = record
        return before is not None

    def _read(self) -> dict[str, Any]:
        try:
            return _read_stages(self._path) if self._path.exists() else {}
        except (OSError, ValueError) as error:
            raise _UsageError(f"argument --output: {error}") from None

    def _write(self) -> None:
        write_json({"seqcompress_analysis": _VERSION, "stages": self._stages}, self._path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when a process ends, however it does."""
    with path.open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_stages(path: Path) -> dict[str, Any]:
    fields, origin = read_json(path, "analysis")
    try:
        take_version(fields, "seqcompress_analysis", _VERSION)
        stages = take(fields, "stages")
        if not isinstance(stages, dict):
            raise FieldError("stages", f"must be an object, got {described(stages)}")
        for name, record in stages.items():
            seconds = record.get("seconds") if isinstance(record, dict) else None
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e12:
                raise FieldError(f"stages.{name}", "must be an object with a number of seconds")
    except FieldError as error:
        raise ValueError(f"{origin}: {error}") from None
    return stages


def _summary(
    stages: Sequence[_Stage], reports: Mapping[float, GradientErrorReport], monotone: bool, seconds: float
) -> str:
    parts = [f"Progress {stage}: {stage.checkpoint}\n\n{reports[stage.progress]}" for stage in stages]
    schedule = ["Schedule, in which sequences never become cheaper again" if monotone else "Schedule"]
    schedule += ["", explain_schedule(reports, monotone)]
    if len(stages) == 1:
        schedule.append("One stage says nothing about the others: this strategy is kept from beginning to end.")
    steps = math.fsum(map(_steps, reports.values()))
    kind = "time" if reports[stages[0].progress].cost_kind == "measured" else "the encoders' FLOPs"
    spent = (
        f"What it took: {seconds:.0f} s. Forward and backward passes were worth {steps:.0f} training steps without "
        f"compression, by {kind}:\na share of {steps:.0f} / N of a run of N such steps."
    )
    return "\n\n\n".join([*parts, "\n".join(schedule), spent]) + "\n"


def _steps(report: GradientErrorReport) -> float:
    """Training steps without compression that the runs of a stage were worth."""
    everything = math.fsum(entry.cost for entry in report.entries)
    if report.cost_kind == "measured":  # all once more to warm up, and the base twice a batch
        return (report.num_batches + 1) * everything + report.num_batches
    return report.num_batches * everything + 1


def _checkpoint(text: str) -> tuple[float | None, Path]:
    before, equals, after = text.partition("=")
    try:
        progress = float(before) if equals else None
    except ValueError:  # a file's name may have a "=" in it
        progress = None
    if progress is not None and not 0 <= progress <= 1:
        raise argparse.ArgumentTypeError(f"progress must be in [0, 1], got {before}")
    path = Path(text if progress is None else after)
    if _is_folder(path):
        raise argparse.ArgumentTypeError(
            f"{path} is a folder: a checkpoint must be one file. Of a sharded one, name a file in it, whose content "
            "tells it from others; FUNCTION gets that path and may load the folder around it"
        )
    if not is_file(path):
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return progress, path


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # can be no path at all
        return False


def _token_dropout(text: str) -> float:
    try:
        return Strategy(float(text)).token_dropout
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    number.__name__ = "whole number"
    return number


def _checked_stages(checkpoints: Sequence[tuple[float | None, Path]]) -> list[_Stage]:
    """In the order of progress."""
    stages: dict[str, _Stage] = {}
    for progress, path in checkpoints:
        if progress is None and len(checkpoints) > 1:
            raise _UsageError(f"argument --checkpoints: must be PROGRESS=FILE where there are several, got {path}")
        stage = _Stage(progress or 0.0, path)
        if str(stage) in stages:
            raise _UsageError(f"argument --checkpoints: progress {stage} is there twice")
        stages[str(stage)] = stage
    return sorted(stages.values(), key=lambda stage: stage.progress)


def _check_pictures() -> None:
    try:
        importlib.import_module("seqcompress.gradients.plots")
    except ImportError as error:
        raise _UsageError(str(error)) from None


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _UsageError(f"argument --output: {error}") from None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise _UsageError(f"argument --checkpoints: {error}") from None
    return digest.hexdigest()


def _print(summary: str, file: Path) -> None:
    try:
        print(summary, end="", flush=True)
    except OSError as error:
        # What waits in the buffer would fail again as Python ends, and be told by it in lines of its own.
        with Path(os.devnull).open("w") as nowhere, contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise _WriteError(f"standard output: {error}; the same summary is in {file}") from None


def _say(line: str) -> None:
    """Beside the progress bars; what is printed is the summary alone. Nobody has to be there to read it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
