"""Everything that writes files, killed, out of room and without permission; run by test_faults.py as a program.

usage: writers.py TIMES [WRITER ...]

A child process writes two versions of a file in turns, and is killed so many times while it is at those WRITERS; then
each of all but one writer is refused once for want of room, and once for want of permission. What is there afterwards
must be one of the two versions, whole. One line is printed for each: what happened, the writer, how often, and how
often something else was there.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from seqcompress import GradientErrorReport, Linear, Stepwise, Strategy, plot_gradient_error
from seqcompress.gradients.command import _Records, _Stage
from seqcompress.gradients.statistics import Estimate
from seqcompress.json_files import write_text

Write = Callable[[Path, bool], object]  # one of two versions

SCHEDULES = (Linear(Strategy(0.5, 32), Strategy()), Stepwise({n / 100: Strategy(n / 200) for n in range(100)}))


def _report(batches: int) -> GradientErrorReport:
    def estimate(value: float) -> Estimate:
        return Estimate(value, (tuple(value + 0.01 * (number % 3) for number in range(batches)),))

    return GradientErrorReport.from_estimates(
        {
            strategy: {"bias2": estimate(cost / 9), "variance": estimate(1.0), "cost": estimate(cost)}
            for strategy, cost in ((Strategy(), 1.0), (Strategy(0.5), 0.5), (Strategy(0.5, 32), 0.2))
        },
        estimate(1.0),
        num_batches=batches,
        cost_kind="flops",
        own_patch_size=16,
    )


REPORTS = _report(3), _report(400)
TEXTS = REPORTS[0].to_json(), REPORTS[1].to_json()


def _naive(path: Path, second: bool) -> None:
    with path.open("w") as file:
        json.dump(json.loads(TEXTS[second]), file, indent=2)


def _records(path: Path, second: bool) -> None:
    path.mkdir(exist_ok=True)
    _Records(path).add(_Stage(0.5, Path("x.pt")), REPORTS[second], {"batches": REPORTS[second].num_batches}, 1.0)


def _records_are_whole(path: Path) -> bool:
    """Whether what is said to be complete is, under the settings that are said."""
    stage, found = _Stage(0.5, Path("x.pt")), []
    for report in REPORTS:
        try:
            read = _Records(path).report(stage, {"batches": report.num_batches})
        except Exception as error:
            found.append("measured with other settings" in str(error))
        else:
            found.append(read is None or read == report)
    names = {each.name for each in path.iterdir() if not each.name.endswith((".unfinished.json", ".lock"))}
    return all(found) and names <= {"analysis.json", "stage-0.5.json"}


WRITERS: dict[str, Write] = {
    "schedule.json": lambda path, second: SCHEDULES[second].to_json(path),
    "report.json": lambda path, second: REPORTS[second].to_json(path),
    "report.csv": lambda path, second: REPORTS[second].to_csv(path),
    "summary.txt": lambda path, second: write_text(str(REPORTS[second]) * (1000 if second else 1), path),
    "report.png": lambda path, second: REPORTS[second].plot(path),
    "schedule.png": lambda path, second: plot_gradient_error({0.0: REPORTS[0], 0.5 + 0.1 * second: REPORTS[0]}, path),
}
KILLED: dict[str, Write] = {"truncating": _naive, "analysis": _records, **WRITERS}


def _expected(write: Write, name: str) -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path, versions = Path(folder) / name, []
        for second in (False, True):
            write(path, second)
            versions.append(path.read_bytes())
    assert versions[0] != versions[1]
    return versions[0], versions[1]


@contextlib.contextmanager
def _child(do: Callable[[], None]) -> Iterator[int]:
    """A forked process, which ends here and nowhere else."""
    sys.stdout.flush()
    process = os.fork()
    if not process:
        try:
            do()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    yield process


def _for_ever(write: Write, path: Path, begun: int) -> Callable[[], None]:
    def do() -> None:
        os.write(begun, b".")
        while True:
            for second in (True, False):
                write(path, second)

    return do


def kill(times: int, names: list[str], folder: Path) -> None:
    """SIGKILL at random moments of a run of writes."""
    dice = random.Random(0)
    for name in names:
        path, write = folder / name, KILLED[name]
        versions = () if name == "analysis" else _expected(write, name)
        started = time.perf_counter()
        write(path, False)
        longest = min(1.0, max(0.02, 2 * (time.perf_counter() - started)))
        torn = 0
        waiting, begun = os.pipe()
        tries = max(times, 40) if name == "truncating" else times  # which is to show that a torn file is seen
        for _ in range(tries):
            with _child(_for_ever(write, path, begun)) as process:
                os.read(waiting, 1)
                time.sleep(dice.uniform(0, longest))
                os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
            assert os.WIFSIGNALED(status), f"{name}: ended by itself"
            torn += not (_records_are_whole(path) if name == "analysis" else path.read_bytes() in versions)
        print("killed", name, tries, torn, flush=True)


def full(folder: Path) -> None:
    """No room for more than a few bytes: an error, and what was there stays, alone."""
    _refused("full", folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)), "File too large")


def readonly() -> None:
    """A folder that may not be written: likewise."""

    def enter() -> None:
        path.chmod(0o555)
        if os.getuid() == 0:  # who may write anywhere
            os.setgid(65534)
            os.setuid(65534)

    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        path = Path(parent) / "results"
        path.mkdir()
        _refused("readonly", path, enter, "Permission denied")
        path.chmod(0o755)


def _refused(what: str, folder: Path, enter: Callable[[], None], words: str) -> None:
    for name, write in WRITERS.items():
        if name == "schedule.png":  # written as the other picture is
            continue
        path = folder / name
        write(path, False)
        before, names = path.read_bytes(), sorted(folder.iterdir())

        def do(write: Write = write, path: Path = path) -> None:
            enter()
            try:
                write(path, True)
            except OSError as error:
                if words in str(error):
                    return
                raise
            raise AssertionError("it was written")

        with _child(do) as process:
            _, status = os.waitpid(process, 0)
        lost = os.waitstatus_to_exitcode(status) != 0 or path.read_bytes() != before
        print(what, name, 1, int(lost or sorted(folder.iterdir()) != names), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        REPORTS[0].plot(Path(scratch) / "warm.png")  # fonts are looked up once
        kill(int(sys.argv[1]), sys.argv[2:], Path(scratch))
    with tempfile.TemporaryDirectory() as scratch:
        full(Path(scratch))
    readonly()
