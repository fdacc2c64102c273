"""All benchmarks, one after the other, each in a process of its own, with settings that suit the device.

Results go to ``benchmarks/results/NAME-DEVICE.md`` and ``.json``; of a quick look, to ``build/benchmarks``. One that
fails does not stop the others. Each can be run on its own, with more options: see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
QUICK = ("--model", "vit_tiny_patch16_224", "--batch-size", "4", "--repeats", "6", "--min-seconds", "0")
# On a CPU, all of it takes about 70 minutes.
ENCODER = ("--batch-size", "4", "--repeats", "8", "--min-seconds", "4")
STEP = ("--batch-size", "4", "--repeats", "6", "--strategies", "drop 0.75", "patch 32", "drop 0.5, patch 32")
BATCH = ("--model", "vit_tiny_patch16_224", "--batch-size", "2", "--repeats", "6", "--min-seconds", "0")
BREAKDOWN = ("--batch-size", "4", "--repeats", "6", "--min-seconds", "4")
PARTS = ("--batch-size", "32", "--repeats", "14", "--min-seconds", "1")
VIEWS = ("--repeats", "14")
FAST = ("--model", "vit_base_patch16_224", "--batch-size", "256", "--amp", "--repeats", "30")
# An encoder so small that a core runs it about as fast as another core makes its views, as a fast GPU does with ViT-B.
SMALL = ("--model", "vit_tiny_patch16_224", "--width", "64", "--depth", "4", "--method", "simclr", "--steps", "4")
# With 16 cores, workers make about a thousand images a second: one strategy and few repeats, to end in ten minutes.
LOADED = ("--model", "vit_base_patch16_224", "--batch-size", "128", "--amp", "--strategies", "drop 0.5, patch 32")
FEW = ("--repeats", "6")


def benchmarks(device: str, quick: bool) -> dict[str, list[str]]:
    """Names of results, and the arguments that lead to them."""
    on = ["--device", device]

    def settings(slow: Sequence[str], fast: Sequence[str] = FAST) -> list[str]:
        return [*on, *(QUICK if quick else slow if device == "cpu" else fast)]

    compiled = {"": []} if device == "cpu" else {"": [], "-compile": ["--compile"]}
    steps = {
        f"{name}-{device}{suffix}": [f"{name}.py", *settings(slow), *more]
        for name, slow in (("encoder", ENCODER), ("training_step", STEP))
        for suffix, more in compiled.items()
    }
    if find_spec("solo") is not None:
        steps[f"training_step-solo-learn-{device}"] = [*steps[f"training_step-{device}"], "--host", "solo-learn"]
    return {
        **steps,
        f"batch-{device}": ["batch.py", *settings(BATCH)],
        f"breakdown-{device}": ["breakdown.py", *settings(BREAKDOWN)],
        f"parts-{device}": ["parts.py", *settings(PARTS)],
        "views-cpu": ["views.py", *(("--repeats", "6", "--min-seconds", "0.05") if quick else VIEWS)],
        f"end_to_end-{device}": ["end_to_end.py", *settings((*SMALL, *FEW), (*LOADED, *FEW))],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a look: ViT-Ti, small batches, few repeats")
    parser.add_argument("--output", type=Path, help="folder to write to")
    options = parser.parse_args()
    output = options.output or (FOLDER.parent / "build" / "benchmarks" if options.quick else FOLDER / "results")
    if find_spec("solo") is None:
        print("Without the steps of solo-learn, which is not installed.", flush=True)

    failed = []
    for name, (script, *arguments) in benchmarks(options.device, options.quick).items():
        command = [sys.executable, str(FOLDER / script), *arguments, "--output", str(output / name)]
        print(f"\n$ {shlex.join(command)}", flush=True)
        if subprocess.run(command).returncode != 0:
            failed.append(name)
    if failed:
        print(f"Failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
