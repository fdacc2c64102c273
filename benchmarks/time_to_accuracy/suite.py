"""The runs that the claim rests on, in order of worth. Does those that are missing; the same command goes on.

python benchmarks/time_to_accuracy/suite.py cpu --data DIR            # CIFAR-10
python benchmarks/time_to_accuracy/suite.py photographs --data DIR    # Imagenette at 96 px, on a CPU
python benchmarks/time_to_accuracy/suite.py gpu --data DIR --minutes 9    # Imagenette at 224 px, a part at a time
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from run import CHECKPOINTS, ONLINE, RESULTS, UNFINISHED, Settings

from seqcompress.presets import double_patch

RUN = Path(__file__).with_name("run.py")

# The plain method's settings, tuned on training images that are held out (results/time_to_accuracy/tuning).
CIFAR = Settings(lr=1e-3, batch=64, momentum=0.8, crop=0.4)
CIFAR_SIMCLR = replace(CIFAR, method="simclr", momentum=0.95)  # it has no teacher, so that momentum means nothing
CIFAR_DINO = replace(
    CIFAR, method="dino", batch=32, momentum=0.95, local_views=0, teacher_temperature=0.04, head_norm="yes"
)
IMAGENETTE = Settings(  # MoCo-v3 in stable-pretraining's table, which the plain run is to be compared with
    dataset="imagenette",
    images=9469,
    image_size=224,
    patch_size=16,
    depth=12,
    width=384,
    heads=6,
    batch=256,
    lr=1.5e-4,
    weight_decay=0.1,
    crop=0.2,
    hidden=4096,
    out=256,
    prototypes=16384,
    precision="bfloat16",
)
# That table's heads and teachers, too; its SimCLR has a temperature of 0.5, and 0.2 here.
IMAGENETTE_SIMCLR = replace(IMAGENETTE, method="simclr", hidden=2048)
IMAGENETTE_DINO = replace(IMAGENETTE, method="dino", hidden=2048, prototypes=65536, momentum=0.996)
PHOTOGRAPHS = {"dataset": "imagenette", "images": 9469, "image_size": 96, "patch_size": 12, "crop": 0.2}
SMALL_PHOTOGRAPHS = replace(CIFAR, **PHOTOGRAPHS)
LARGER_ENCODER = replace(SMALL_PHOTOGRAPHS, depth=6, width=128, heads=4)

NONE = "none"
DEFAULT = "0: drop 0.5, patch {0}; 0.98: base"  # spelled out, as a preset may change: short, and a full-length end
SHORT = "drop 0.5, patch {0}"  # to the very end
STAGED = "0: drop 0.5, patch {0}; 0.5: patch {0}; 0.75: drop 0.5; 0.95: base"  # longer and longer, as the paper has it
EARLIER = "0: drop 0.5, patch {0}; 0.95: base"  # the default plan before: a longer end
ENDS = tuple(f"0: drop 0.5, patch {{0}}; {end}: base" for end in (0.9, 0.8))
PEERS = ("0: patch {0}; 0.75: base", "0: patch {1}; 0.34: patch {0}; 0.67: base")  # FastDINOv2, progressive resizing
FOUND = "0: drop 0.5, patch {0}; 0.5: patch {0}"  # by gradient error, at checkpoints of MoCo-v3 under EARLIER
FOUND_ANEW = "0: drop 0.5, patch {0}; 0.25: patch {0}"  # with other batches
OTHERS = (
    FOUND,
    "drop 0.5",
    "0: drop 0.5; 0.95: base",
    "patch {0}",
    "0: patch {0}; 0.95: base",
    "drop 0.75, patch {0}",
    "patch {1}",
    "0: patch {0}; 0.25: drop 0.5; 0.75: base",  # the preset "gentle"
    FOUND_ANEW,
)


def cpu() -> Iterator[Settings]:
    """CIFAR-10, 10,000 images of 32 px, a ViT of 4 blocks x 64 with 64 tokens."""
    simclr, dino = CIFAR_SIMCLR, CIFAR_DINO
    # Short lengths of each plan first, so that their curves overlap and there is a ratio soon.
    for seed in (0, 1, 2):
        yield from _lengths(replace(CIFAR, seed=seed), (NONE,), (0.8, 0.4, 0.2))
        yield from _lengths(replace(CIFAR, seed=seed), (DEFAULT,), (0.1, 0.2, 0.4, 0.05))
        yield from _lengths(replace(CIFAR, seed=seed), (FOUND,), (0.1, 0.2, 0.4))
        yield from _lengths(replace(simclr, seed=seed), (NONE,), (0.4, 0.2))
        yield from _lengths(replace(simclr, seed=seed), (DEFAULT,), (0.1, 0.2, 0.05, 0.025))
        yield from _lengths(replace(simclr, seed=seed), (FOUND,), (0.1, 0.2, 0.05, 0.025))
        yield from _lengths(replace(CIFAR, seed=seed), (EARLIER,), (0.1, 0.2, 0.4, 0.05))
        yield from _lengths(replace(simclr, seed=seed), (EARLIER,), (0.1, 0.2, 0.05))
    for seed in (0, 1, 2):
        yield from _lengths(replace(dino, seed=seed), (NONE,), (0.4, 0.2))
        yield from _lengths(replace(dino, seed=seed), (DEFAULT,), (0.1, 0.2, 0.05, 0.025, 0.0125))
    yield from _lengths(CIFAR, (NONE,), (1.6, 3.2, 6.4))
    yield from _lengths(CIFAR, (DEFAULT, FOUND), (0.8, 1.6))
    yield from _lengths(CIFAR, (*PEERS, *ENDS, STAGED, SHORT, *OTHERS, ONLINE), (0.4,))
    yield from _lengths(dino, (NONE,), (0.8,))
    yield from _lengths(dino, (EARLIER, FOUND), (0.1, 0.2, 0.05))
    yield from _lengths(CIFAR, (EARLIER,), (0.8,))
    for seed in (1, 2):
        yield from _lengths(replace(CIFAR, seed=seed), ("patch {0}", SHORT), (0.4,))
        yield from _lengths(replace(CIFAR, seed=seed), (NONE,), (1.6,))
        yield from _lengths(replace(CIFAR, seed=seed), (DEFAULT,), (1.6, 0.8))
        yield from _lengths(replace(CIFAR, seed=seed), (FOUND,), (0.8,))
        yield from _lengths(replace(dino, seed=seed), (EARLIER, FOUND), (0.1, 0.2, 0.05))
    yield from _lengths(CIFAR, (SHORT,), (1.6,))
    yield from _lengths(simclr, (SHORT, STAGED), (0.2,))
    yield from _lengths(simclr, (DEFAULT, FOUND, ONLINE), (0.4,))
    yield from _lengths(replace(CIFAR, views="scaled"), (DEFAULT,), (0.2,))
    for method in (simclr, dino):
        yield from _lengths(method, (NONE, DEFAULT, FOUND), (0.8, 1.6))
    for seed in (1, 2):
        yield from _lengths(replace(CIFAR, seed=seed), (*ENDS, *PEERS, *OTHERS, STAGED, ONLINE), (0.4,))
    yield from _lengths(CIFAR, (*ENDS, *PEERS, *OTHERS, ONLINE), (0.8,))


def photographs() -> Iterator[Settings]:
    """Imagenette, 9,469 photographs at 96 px, the same ViT with 64 tokens, on a CPU."""
    for seed in (0, 1, 2):
        first = replace(SMALL_PHOTOGRAPHS, seed=seed)
        yield from _lengths(first, (DEFAULT,), (0.1, 0.2))
        yield from _lengths(first, (NONE,), (0.4, 0.2))
        yield from _lengths(first, (DEFAULT,), (0.05, 0.025))
        yield from _lengths(first, (FOUND,), (0.1, 0.05, 0.025))
        yield from _lengths(first, (EARLIER,), (0.1, 0.2, 0.05, 0.025))
    yield from _lengths(SMALL_PHOTOGRAPHS, (NONE,), (0.8,))
    yield from _lengths(SMALL_PHOTOGRAPHS, (DEFAULT,), (0.4,))
    yield from _lengths(SMALL_PHOTOGRAPHS, (SHORT, STAGED, FOUND, ONLINE), (0.2, 0.4))
    for seed in (0, 1, 2):
        scaled = replace(SMALL_PHOTOGRAPHS, views="scaled", seed=seed)
        yield from _lengths(scaled, (DEFAULT,), (0.1, 0.2, 0.05, 0.025))
    yield from _lengths(LARGER_ENCODER, (NONE,), (0.2, 0.1))
    yield from _lengths(LARGER_ENCODER, (DEFAULT,), (0.1, 0.05, 0.025))
    for seed in (0, 1, 2):
        yield from _lengths(replace(SMALL_PHOTOGRAPHS, seed=seed), (DEFAULT,), (0.4,))
    for method in (CIFAR_SIMCLR, CIFAR_DINO):
        first = replace(method, **PHOTOGRAPHS)
        yield from _lengths(first, (DEFAULT, NONE), (0.1, 0.2, 0.4))
    yield from _lengths(SMALL_PHOTOGRAPHS, (NONE, DEFAULT), (0.8, 1.6))


def gpu() -> Iterator[Settings]:
    """Imagenette, 9,469 photographs of 224 px, ViT-S/16, bfloat16. The yardstick's 200 epochs are 15.2 M."""
    yield from _lengths(IMAGENETTE, (NONE,), (3.0, 1.5))  # two, between which a ratio can be read
    yield from _lengths(IMAGENETTE, (DEFAULT,), (1.5, 1.0, 0.75))
    yield from _lengths(replace(IMAGENETTE, views="scaled"), (DEFAULT,), (1.0,))
    yield from _lengths(IMAGENETTE, (NONE, DEFAULT), (1.5, 3.0, 6.0))
    for method in (IMAGENETTE_SIMCLR, IMAGENETTE_DINO):
        yield from _lengths(method, (NONE, DEFAULT), (0.75, 1.5, 3.0))
    for seed in (1, 2):
        yield from _lengths(replace(IMAGENETTE, seed=seed), (NONE, DEFAULT), (0.75, 1.5, 3.0, 6.0))
    yield from _lengths(IMAGENETTE, (SHORT, STAGED, *PEERS, *OTHERS), (1.5, 3.0))
    yield from _lengths(IMAGENETTE, (ONLINE, *ENDS), (1.5,))
    yield from _lengths(IMAGENETTE, (NONE, DEFAULT), (15.2,))


SUITES = {"cpu": cpu, "photographs": photographs, "gpu": gpu}


def unique(rows: Iterable[Settings]) -> list[Settings]:
    """Each run once, where it comes first."""
    return list(dict.fromkeys(rows))


def smoke(row: Settings) -> Settings:
    """The same run at a size that takes a second, to find what is wrong with the command."""
    small = replace(
        row, dataset=f"smoke-{row.dataset}", images=32, batch=8, judged_images=20, depth=1, width=32, heads=2
    )
    side = 4 * row.patch_size
    budget = 0.04 if row.plan == ONLINE else 0.004 * min(1.0, row.budget)  # it is to measure
    return replace(small, image_size=side, hidden=32, out=16, prototypes=64, budget=budget)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    rows = unique(SUITES[options.suite]())
    rows = [row for row in rows if all(word in f"{row.name} {row.views}" for word in options.only)]
    with tempfile.TemporaryDirectory() as scratch:
        if options.smoke:
            rows = unique(smoke(row) for row in rows)
            options.output, options.checkpoints = Path(scratch) / "results", Path(scratch) / "checkpoints"
        missing = [row for row in rows if not (options.output / f"{row.name}.json").is_file()]
        print(f"{len(rows)} runs, {len(missing)} missing", flush=True)
        if options.list:
            for row in rows:
                print("missing" if row in missing else "   done", row.name)
            return 0
        return _do(missing, options)


def _do(missing: list[Settings], options: argparse.Namespace) -> int:
    """Run what is missing, ``--jobs`` at a time, until ``--minutes`` are over."""
    until = time.monotonic() + 60 * options.minutes
    waiting: queue.Queue[Settings] = queue.Queue()
    for row in missing:
        waiting.put(row)
    failed: list[str] = []
    running: list[subprocess.Popen[bytes]] = []
    starting, ended = threading.Lock(), threading.Event()  # the suite itself, by a signal

    def work(number: int) -> None:
        while (left := (until - time.monotonic()) / 60) > 0:
            try:
                row = waiting.get_nowait()
            except queue.Empty:
                return
            command = [sys.executable, str(RUN), *_options(row), "--data", str(options.data)]
            command += ["--output", str(options.output), "--checkpoints", str(options.checkpoints)]
            if math.isfinite(left):
                command += ["--minutes", str(left)]
            with starting:
                if ended.is_set():
                    return
                process = subprocess.Popen(command, env=_environment(number))
                running.append(process)
            status = process.wait()
            if status not in (0, UNFINISHED) and not ended.is_set():
                failed.append(row.name)
                print(f"{row.name}: failed with status {status}; going on with the next", flush=True)

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(options.jobs)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.5)
    finally:  # no run goes on by itself when the suite is ended
        with starting:
            ended.set()
            for process in running:
                process.terminate()
        signal.signal(signal.SIGTERM, before)
    done = sum((options.output / f"{row.name}.json").is_file() for row in missing)
    print(f"{done} of {len(missing)} done" + (f", failed: {', '.join(failed)}" if failed else ""), flush=True)
    return 1 if failed else 0


def _environment(job: int) -> dict[str, str]:
    """One thread for each run, and one GPU where there are several."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if "CUDA_VISIBLE_DEVICES" not in os.environ and torch.cuda.device_count() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(job % torch.cuda.device_count())
    return environment


def _options(row: Settings) -> list[str]:
    """A run's settings as its command takes them."""
    options = []
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if value != field.default:
            options += [f"--{field.name.replace('_', '-')}", str(value)]
    return options


def _lengths(row: Settings, plans: Iterable[str], budgets: Iterable[float]) -> Iterator[Settings]:
    """Each length of each plan, with patch sizes that are about two and four times the encoder's own."""
    large = double_patch(row.patch_size, row.image_size)
    plans = [plan.format(large, double_patch(large, row.image_size)) for plan in plans]
    for budget in budgets:
        for plan in plans:
            yield replace(row, plan=plan, budget=budget)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="\n".join(f"{name}: {suite.__doc__}" for name, suite in SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data", type=Path, required=True, help="folder with train and test (or val), as ImageFolder")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="runs whose name, or views, have all of these"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after this time")
    parser.add_argument("--smoke", action="store_true", help="all runs at a size of seconds; nothing is kept")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing, and do nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder for checkpoints (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
