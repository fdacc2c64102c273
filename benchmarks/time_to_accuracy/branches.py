"""Does gradient error predict what helps? From a checkpoint, training goes on under each strategy, for equal compute.

    python benchmarks/time_to_accuracy/run.py --data DIR --plan none --budget 0.4 --until 0.5 ...
    python benchmarks/time_to_accuracy/branches.py ~/.cache/seqcompress/time_to_accuracy/NAME.pt --data DIR

Every branch has the optimizer's own state, a learning rate that falls from where it stood to its end, and full
sequences in its last fifth; it is judged on full views of training images that are held out. The strategies' order by
what they reached is then held against their order by gradient error at the checkpoint, and by other forms of it.
The command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from images import Images
from lightly.utils.scheduler import cosine_schedule
from report import branches_table, choices_table, rank_correlation
from run import CHECKPOINTS, RESULTS, Judge, Settings, Training, _data, _hardware, _write
from torch import Tensor

import seqcompress
from seqcompress import Constant, Strategy, TrainingStep

BASE = Strategy()
FULL_END = 0.8  # from here on, branches run on full sequences
REACHED = ("knn", "linear", "loss")


@dataclass
class Sums:
    """What is added up over batches of a strategy's gradients g and the plain ones g0, for unbiased moments."""

    batches: int = 0
    total: Tensor | float = 0.0
    plain_total: Tensor | float = 0.0
    difference: Tensor | float = 0.0
    squares: float = 0.0
    plain_squares: float = 0.0
    difference_squares: float = 0.0
    products: float = 0.0

    def add(self, gradient: Tensor, plain: Tensor) -> None:
        """One batch, both gradients on the same views."""
        self.batches += 1
        self.total = self.total + gradient
        self.plain_total = self.plain_total + plain
        self.difference = self.difference + (gradient - plain)
        self.squares += _dot(gradient, gradient)
        self.plain_squares += _dot(plain, plain)
        self.difference_squares += _dot(gradient - plain, gradient - plain)
        self.products += _dot(gradient, plain)

    def moments(self) -> dict[str, float]:
        """Unbiased squared norms of the mean gradients, their inner product, squared bias, and variance."""
        pairs = self.batches * (self.batches - 1)
        norm2 = (_dot(self.total, self.total) - self.squares) / pairs
        return {
            "norm2": norm2,
            "plain_norm2": (_dot(self.plain_total, self.plain_total) - self.plain_squares) / pairs,
            "inner": (_dot(self.total, self.plain_total) - self.products) / pairs,
            "bias2": (_dot(self.difference, self.difference) - self.difference_squares) / pairs,
            "variance": self.squares / self.batches - norm2,
        }


def _dot(one: Any, other: Any) -> float:
    return float(torch.dot(one.double(), other.double()))


def criteria(moments: Mapping[str, float], cost: float) -> dict[str, float]:
    """What each criterion says of a strategy: the greater, the more it promises.

    *CA-MSE* is the paper's. The next lets the gradient have any length, as AdamW does: the least over a >= 0 of
    ``||a E g - E g0||^2 + a^2 c variance``. *Rate* is by how much a step of the best size lowers the full loss, for the
    same compute. All but cost are over the plain gradient's squared norm.
    """
    inner = max(0.0, moments["inner"])
    length2 = max(0.0, moments["norm2"])  # its unbiased estimate may lie below
    plain = moments["plain_norm2"]
    free = inner**2 / (length2 + cost * moments["variance"])
    rate = inner**2 / (cost * (length2 + moments["variance"]))
    return {
        "cost": -cost,
        "CA-MSE": -(moments["bias2"] + cost * moments["variance"]) / plain,
        "CA-MSE, any length": free / plain - 1,
        "rate": rate / plain,
    }


def training_from(state: Mapping[str, Any], settings: Settings, train: Images, device: torch.device) -> Training:
    """A training with these settings, whose networks and optimizer are those of a checkpoint."""
    training = Training(settings, train.to(device), device)
    training.method.load_state_dict(state["method"])
    training.optimizer.load_state_dict(state["optimizer"])
    rates = training.lr_scheduler.get_last_lr()
    for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
        group["lr"], group["initial_lr"] = rate, settings.lr
    return training


@dataclass(frozen=True)
class BranchPoint:
    """Where branches begin.

    Attributes:
        state: the checkpoint.
        settings: of its run, with the learning rate and the teacher's share of itself of that moment.
        progress: of that run.
    """

    state: Mapping[str, Any]
    settings: Settings
    progress: float

    @classmethod
    def of(cls, state: Mapping[str, Any], train: Images) -> BranchPoint:
        """The moment at which a checkpoint was made."""
        settings = Settings(**state["settings"])
        total = Training(settings, train, torch.device("cpu")).total_steps
        lr = state["optimizer"]["param_groups"][0]["lr"]
        momentum = cosine_schedule(min(state["steps_done"], total - 1), total, settings.momentum, 1.0)
        now = replace(settings, lr=lr, momentum=momentum, warmup=0.0, views="full")
        return cls(state, now, state["steps_done"] / total)

    def branch(self, strategy: Strategy, budget: float, seed: int, train: Images, device: torch.device) -> Training:
        """A training that goes on from here under a strategy, and ends on full sequences."""
        plan = "none" if strategy == BASE else f"0: {strategy}; {FULL_END}: base"
        # Images in another order, and other views, than the run has seen.
        settings = replace(self.settings, plan=plan, budget=budget, seed=1000 * (1 + seed) + self.settings.seed)
        training = training_from(self.state, settings, train, device)
        training.begun = self.progress
        return training

    def measure(
        self, strategy: Strategy, batches: int, adapt: int, train: Images, device: torch.device
    ) -> dict[str, dict[str, float]]:
        """Moments of a strategy's gradients here, as they are and divided by the root of AdamW's second moment.

        Args:
            strategy: to measure.
            batches: number of batches.
            adapt: steps under the strategy before it is measured, at the checkpoint's learning rate.
            train: images to make batches of.
            device: to run on.
        """
        settings = replace(self.settings, plan="none" if strategy == BASE else str(strategy), seed=500)
        training = training_from(self.state, settings, train, device)
        training.begun = self.progress
        for _ in range(adapt):
            training.step()
            for group in training.optimizer.param_groups:
                group["lr"] = settings.lr
        _by_hand(training, strategy)
        kept = {name: tensor.clone() for name, tensor in training.method.state_dict().items()}
        parameters = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
        size = _second_moment(training, parameters).sqrt() + training.optimizer.defaults["eps"]
        sums = {"": Sums(), " over AdamW's": Sums()}
        for batch in range(batches):
            views = training.batch(adapt + batch)
            found = []
            for each in (strategy, BASE):
                training.method.load_state_dict(kept)  # running means have moved
                seqcompress.set_strategy(training.method, each)
                training.method.zero_grad()
                training.method.loss(views, self.progress).backward()
                training.method.after_backward(self.progress)
                found.append(
                    torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
                )
            sums[""].add(*found)
            sums[" over AdamW's"].add(*(gradient / size for gradient in found))
        return {kind: of.moments() for kind, of in sums.items()}


def at(checkpoint: Path) -> TrainingStep:
    """The training step at a checkpoint, for ``python -m seqcompress gradients``; ``DATA`` names the images' folder.

    Views are some that the run has not seen, and gradients are the encoder's, through the heads.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    train, _, _ = _data(Settings(**state["settings"]), Path(os.environ["DATA"]), checkpoint.parent)
    point = BranchPoint.of(state, train)
    training = training_from(state, replace(point.settings, plan="none", seed=500), train, torch.device("cpu"))
    training.now["progress"] = point.progress
    seqcompress.restore(training.method)  # out of the scheduler's hands

    def after_backward() -> None:
        training.method.after_backward(point.progress)
        training.optimizer.step()
        training.method.update_teacher(point.settings.momentum)

    return TrainingStep(
        model=training.method.backbone,
        teacher=training.method.backbone_momentum,
        step=training.loss_of,
        batches=map(training.batch, itertools.count()),
        after_backward=after_backward,
    )


def _by_hand(training: Training, strategy: Strategy) -> None:
    """Take the encoders out of the scheduler's hands."""
    seqcompress.restore(training.method)
    seqcompress.compress(training.method.backbone, strategy, teacher=training.method.backbone_momentum)


def _second_moment(training: Training, parameters: Sequence[Tensor]) -> Tensor:
    """AdamW's, without the bias of its beginning."""
    _, beta2 = training.optimizer.defaults["betas"]
    found = []
    for parameter in parameters:
        state = training.optimizer.state.get(parameter, {})
        if state:
            found.append((state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))).flatten())
        else:
            found.append(torch.ones_like(parameter).flatten())
    return torch.cat(found)


@torch.no_grad()
def full_loss(training: Training, images: Images) -> float:
    """The method's loss on full views of images."""
    training.method.train()
    _by_hand(training, BASE)
    generator = torch.Generator(training.device).manual_seed(0)
    batches = images.pixels.to(training.device).split(training.settings.batch)
    losses = [
        training.method.loss(training.views(batch, generator), 1.0).item()
        for batch in batches
        if len(batch) == training.settings.batch
    ]
    return math.fsum(losses) / len(losses)


def correlations(
    criterion: Mapping[str, float], reached: Mapping[str, Sequence[float]], draws: int = 2000
) -> tuple[float, float, float]:
    """Rank correlation of what a criterion promises with what was reached, and its 95 % interval.

    The interval is a bootstrap's over strategies and, within each, over the branches' seeds.

    Args:
        criterion: by strategy.
        reached: by strategy, one number for each seed; greater is better.
        draws: of the bootstrap.
    """
    names = sorted(reached)
    value = rank_correlation([criterion[name] for name in names], [_mean(reached[name]) for name in names])
    dice, found = random.Random(0), []
    while len(found) < draws:
        drawn = dice.choices(names, k=len(names))
        if len(set(drawn)) > 2:
            means = {name: _mean(dice.choices(reached[name], k=len(reached[name]))) for name in names}
            found.append(rank_correlation([criterion[name] for name in drawn], [means[name] for name in drawn]))
    found = sorted(rho for rho in found if not math.isnan(rho)) or [math.nan]  # all have reached the same
    return value, found[round(0.025 * (len(found) - 1))], found[round(0.975 * (len(found) - 1))]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def strategies_for(patch: int) -> list[str]:
    """Those that are tried if none are named: dropout, twice and four times the patch, and two of both."""
    two, four = f"patch {2 * patch}", f"patch {4 * patch}"
    return ["base", "drop 0.5", "drop 0.75", "drop 0.9", two, f"drop 0.5, {two}", four]


def branches(options: argparse.Namespace) -> Path:
    """Do what is missing; returns the JSON file."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    state = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
    held_out = replace(Settings(**state["settings"]), judged_on="held-out", judged_images=options.judged_images)
    train, _, judged = _data(held_out, options.data, options.checkpoints)
    point = BranchPoint.of(state, train)
    names = options.strategies or strategies_for(point.settings.patch_size)
    strategies = {name: Strategy.parse(name) for name in names}
    asked: dict[str, Any] = {
        "checkpoint_of": dataclasses.asdict(Settings(**state["settings"])),
        "steps_done": state["steps_done"],
        "progress": round(point.progress, 4),
        "budget": options.branch,
        "judged_images": len(judged),
        "batches": options.batches,
        "adapt": options.adapt,
        "full_end": FULL_END,
        "hardware": _hardware(device),
    }
    if not options.seeds:
        asked["strategies"] = names
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{Settings(**state['settings']).name}_at{point.progress:.2f}_{options.branch:g}M_{digest}.json"
    path = options.output / ("branches" if options.seeds else "criteria") / name
    found = json.loads(path.read_text()) if path.is_file() else {**asked, "moments": {}, "branches": {}}
    for kind, adapt in (("", 0), *([(f" after {options.adapt} steps", options.adapt)] if options.adapt else [])):
        for name, strategy in strategies.items():
            if name not in found["moments"].setdefault(kind, {}):
                found["moments"][kind][name] = point.measure(strategy, options.batches, adapt, train, device)
                _write(found, path)
                print(f"{name}: gradients{kind} measured", flush=True)
    judge = Judge(train, judged)
    for seed in range(options.seeds):
        for name, strategy in strategies.items():
            if str(seed) not in found["branches"].setdefault(name, {}):
                training = point.branch(strategy, options.branch, seed, train, device)
                while training.steps_done < training.total_steps:
                    training.step()
                reached = {**judge.both(training.method.backbone), "loss": full_loss(training, judged)}
                spent = {"steps": training.total_steps, "units": round(training.budget.units)}
                found["branches"][name][str(seed)] = {**spent, **{what: round(reached[what], 5) for what in REACHED}}
                _write(found, path)
                print(f"{name}, seed {seed}: {found['branches'][name][str(seed)]}", flush=True)
    _compare(found, point, train)
    _write(found, path)
    print("\n" + (branches_table(found) if found["branches"] else choices_table([found])))
    return path


def _compare(found: dict[str, Any], point: BranchPoint, train: Images) -> None:
    """Hold criteria against branches, with the strategies of earlier commands at the same checkpoint, too."""
    plain = Training(replace(point.settings, plan="none"), train, torch.device("cpu"))

    def units(strategy: Strategy) -> float:
        return plain.computed_units(Constant(strategy), 1)

    found["cost"] = {name: units(Strategy.parse(name)) / units(BASE) for name in found["moments"][""]}
    predicted: dict[str, dict[str, float]] = {}
    for kind, measured in found["moments"].items():
        for name, of_strategy in measured.items():
            for over, moments in of_strategy.items():
                for criterion, value in criteria(moments, found["cost"][name]).items():
                    label = criterion if criterion == "cost" else criterion + over + kind
                    predicted.setdefault(label, {})[name] = value
    found["criteria"] = predicted
    if not found["branches"]:
        return
    better: dict[str, Callable[[float], float]] = {"loss": lambda value: -value}
    found["correlation"] = {
        label: {
            what: correlations(
                values,
                {
                    name: [better.get(what, float)(branch[what]) for branch in by_seed.values()]
                    for name, by_seed in found["branches"].items()
                },
            )
            for what in REACHED
        }
        for label, values in predicted.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="of a run that was stopped (run.py --until, or --minutes)")
    parser.add_argument("--data", type=Path, required=True, help="folder with train and test (or val)")
    parser.add_argument("--strategies", nargs="+", metavar="STRATEGY", help="such as 'drop 0.5, patch 8'")
    parser.add_argument("--branch", type=float, default=0.02, help="millions of units for each branch (%(default)s)")
    parser.add_argument(
        "--seeds", type=int, default=3, help="branches for each strategy; 0: criteria alone (%(default)s)"
    )
    parser.add_argument("--batches", type=int, default=16, help="for gradient error (%(default)s)")
    parser.add_argument("--adapt", type=int, default=20, help="measure again after so many steps; 0: not (%(default)s)")
    parser.add_argument("--judged-images", type=int, help="held-out training images; a fifth of those trained on")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file, in its 'branches'")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder for the images (%(default)s)")
    parser.add_argument("--device", help="cuda or cpu; a GPU if there is one")
    options = parser.parse_args(arguments)
    try:
        _check_options(options)
        branches(options)
    except ValueError as error:
        parser.error(str(error))
    return 0


def _check_options(options: argparse.Namespace) -> None:
    for name, least in (("seeds", 0), ("batches", 2), ("adapt", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(options, name)}")
    if not options.checkpoint.is_file():
        raise ValueError(f"checkpoint must be a file, got {options.checkpoint}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
