"""What does a run take more that finds its schedule? A training with the plan "online" beside one that is given it.

    python benchmarks/time_to_accuracy/online_cost.py --data DIR --budget 0.4

Both are trainings of ``run.py``, of the same seed, and take turns step by step. Before each of its steps, the second is
put under the strategy that the first was at, so that both do the same work but for measuring. They must end with the
same weights, or this fails. A step's time is all of it, views included: CPU time of one core, or wall-clock on a GPU.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from images import Images, load_images
from run import CHECKPOINTS, ONLINE, Settings, Training
from suite import CIFAR
from tqdm import tqdm

from seqcompress.presets import DEFAULT

sys.path.append(str(Path(__file__).parent.parent))
from measure import environment, now, write_report

RESULTS = Path(__file__).parent.parent / "results"
_BLOCK = 20  # steps that are drawn together for the interval


def measure(settings: Settings, images: Images, device: torch.device) -> dict[str, Any]:
    """Do both trainings.

    Returns:
        ``steps``, ``decisions`` in words, and shares of the time of the training that is given its schedule:
        ``measuring`` (steps that measured), ``bookkeeping`` (all others) with its 95 % interval over blocks of steps,
        and ``together``.

    Raises:
        RuntimeError: the two have other weights in the end.
    """
    finding, given = (Training(replace(settings, plan=plan), images, device) for plan in (ONLINE, DEFAULT))
    scheduler = finding.online
    assert scheduler is not None
    assert finding.total_steps == given.total_steps
    seconds: dict[str, list[float]] = {"given": [], "measuring": [], "bookkeeping": []}
    for step in tqdm(range(finding.total_steps), unit="step"):
        given.sequence_scheduler.use(scheduler.strategy)
        share, taken = scheduler.measured_share, {}
        for training in (finding, given) if step % 2 else (given, finding):
            begun = now(device)
            training.step()
            taken[training] = now(device) - begun
        has_measured = scheduler.measured_share > share  # it falls otherwise
        more = taken[finding] - taken[given]
        seconds["given"].append(taken[given])
        seconds["measuring"].append(more if has_measured else 0.0)
        seconds["bookkeeping"].append(0.0 if has_measured else more)
    weights, others = finding.method.state_dict(), given.method.state_dict()
    different = [name for name, value in weights.items() if not torch.equal(value, others[name])]
    if different:
        raise RuntimeError(f"measuring has changed the run: {', '.join(different[:5])} differ")
    whole = sum(seconds["given"])
    shares = {name: sum(seconds[name]) / whole for name in ("measuring", "bookkeeping")}
    return {
        "steps": finding.total_steps,
        "seconds_of_a_step": statistics.mean(seconds["given"]),
        "decisions": [str(decision) for decision in scheduler.decisions],
        **shares,
        "bookkeeping_interval": _interval(seconds["bookkeeping"], seconds["given"]),
        "together": sum(shares.values()),
    }


def _interval(more: list[float], whole: list[float]) -> tuple[float, float]:
    """95 % of a share, from blocks of steps drawn anew: a machine's speed drifts from step to step."""
    blocks = [
        (sum(more[begin : begin + _BLOCK]), sum(whole[begin : begin + _BLOCK])) for begin in range(0, len(more), _BLOCK)
    ]
    draw, shares = random.Random(0), []
    for _ in range(2000):
        drawn = draw.choices(blocks, k=len(blocks))
        shares.append(sum(above for above, _ in drawn) / sum(below for _, below in drawn))
    shares.sort()
    return shares[50], shares[-51]


def report(settings: Settings, described: dict[str, str], result: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    low, high = result["bookkeeping_interval"]
    rows = {
        "steps": f"{result['steps']:,}",
        "a step": f"{1000 * result['seconds_of_a_step']:.1f} ms",
        "decisions": str(len(result["decisions"])),
        "steps that measure": f"{result['measuring']:.2%}",
        "bookkeeping in all other steps": f"{result['bookkeeping']:.2%} [{low:.2%}, {high:.2%}]",
        "together": f"{result['together']:.2%}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    decisions = "\n".join(f"- {decision}" for decision in result["decisions"])
    encoder = f"ViT {settings.depth} x {settings.width}"
    return f"""# What an online plan takes: {settings.method}, {encoder}, {settings.dataset}

Written by `benchmarks/time_to_accuracy/online_cost.py`, which says what is timed. Percentages are of the time of the
same training that is given its schedule; both ended with the same weights.
{", ".join(f"{key} {value}" for key, value in described.items())}.

| | |
| --- | ---: |
{table}

{decisions}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train, as ImageFolder")
    parser.add_argument("--method", default="mocov3")
    parser.add_argument("--budget", type=float, default=0.4, help="millions of units (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="where to write, without suffix")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    settings = replace(CIFAR, method=options.method, budget=options.budget)
    images = load_images(options.data / "train", settings.image_size, settings.images, CHECKPOINTS).to(device)
    described = environment(device)
    result = measure(settings, images, device)
    text = report(settings, described, result)
    output = options.output or RESULTS / f"online-cost-{device.type}"
    write_report(output, text, {"environment": described, "setup": asdict(settings), **result})
    print(text)


if __name__ == "__main__":
    main()
