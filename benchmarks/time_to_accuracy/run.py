"""One training run, from its first step to its last accuracy, as one small JSON file.

    python benchmarks/time_to_accuracy/run.py --data DIR --method mocov3 --plan default --budget 0.4

``DIR/train`` and ``DIR/test`` (or ``DIR/val``) are folders in ImageFolder's layout. Whatever ends the run, the same
command goes on from its last checkpoint. The step is a user's own: one ``compress`` and one SequenceScheduler.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import Images, Views, as_input, load_images
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from methods import METHODS, Method, MethodSettings
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import seqcompress
from seqcompress import Budget, OnlineScheduler, Schedule, SequenceScheduler, Strategy
from seqcompress.json_files import replacing, write_text
from seqcompress.presets import DEFAULT, PRESETS, double_patch

RATES = {"constant": 0.0, "sqrt": 0.5, "linear": 1.0}  # powers of the batch by which the learning rate follows it
UNFINISHED = 3  # exit status of a run that --minutes has stopped
ONLINE = "online"
CHECKPOINTS = Path.home() / ".cache" / "seqcompress" / "time_to_accuracy"
RESULTS = Path(__file__).parent.parent / "results" / "time_to_accuracy"


@dataclass(frozen=True)
class Settings:
    """All that decides what comes out of a run. Two runs with the same settings are the same run.

    Attributes:
        dataset: name of the data, for tables.
        method: mocov3, simclr or dino.
        plan: what the encoders are compressed by: none, a preset's name, a strategy such as "drop 0.5, patch 8",
            strategies by the progress at which they begin, such as "0: drop 0.5, patch 8; 0.9: base", or online for a
            schedule that finds itself, with as many steps as the default plan affords.
        budget: length of the run in millions of units: forward passes of the plain encoder on one view, a forward with
            backward being three.
        images: number of training images, as many of each class.
        image_size: of the images and of their views, in pixels.
        patch_size: of the encoder, in pixels.
        depth: number of its blocks.
        width: of its tokens.
        heads: of its attention.
        batch: images a step.
        lr: the learning rate at its peak.
        weight_decay: of AdamW.
        warmup: share of the run in which the learning rate rises.
        momentum: of the teacher, at the start; it rises to 1 by a cosine.
        teacher: "scaled" as the student's patches are, or "full" for one that sees full sequences all the time.
        crop: smallest share of an image's area in a view; for DINO's large ones no less than 0.25.
        hidden: width of the heads.
        out: of the projections.
        prototypes: of DINO's head.
        local_views: DINO's small views of an image.
        teacher_temperature: of DINO's teacher, after a rise from 0.04 in the first tenth of the run.
        head_norm: "no", or "yes" for batch norm in DINO's head.
        precision: float32 or bfloat16 (autocast).
        seed: of weights, order and views.
        views: "full", or "scaled" for views that are made smaller where patches are larger.
        grow: "no", or the rule by which the learning rate follows a batch that grows while sequences are short, as far
            as the encoder's tokens stay as many: "sqrt", "linear" or "constant".
        micro: micro-batches whose gradients are averaged for an update; each has its own negatives.
        merge: "no", or "yes" for micro-batches that are run together while sequences are short.
        judged_on: "test", or "held-out" for training images that are not trained on, which settings are tuned on.
        judged_images: number of images that are judged on, or None for all (of held-out ones, a fifth as many as are
            trained on).
    """

    dataset: str = "cifar10"
    method: str = "mocov3"
    plan: str = "none"
    budget: float = 0.4
    images: int = 10_000
    image_size: int = 32
    patch_size: int = 4
    depth: int = 4
    width: int = 64
    heads: int = 2
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    momentum: float = 0.99
    teacher: str = "scaled"
    crop: float = 0.2
    hidden: int = 256
    out: int = 128
    prototypes: int = 1024
    local_views: int = 6
    teacher_temperature: float = 0.07
    head_norm: str = "no"
    precision: str = "float32"
    seed: int = 0
    views: str = "full"
    grow: str = "no"
    micro: int = 1
    merge: str = "no"
    judged_on: str = "test"
    judged_images: int | None = None

    def __post_init__(self) -> None:
        _check(self.method in METHODS, "method", self.method, f"one of {', '.join(METHODS)}")
        _check(self.precision in ("float32", "bfloat16"), "precision", self.precision, "float32 or bfloat16")
        _check(self.judged_on in ("test", "held-out"), "judged_on", self.judged_on, "test or held-out")
        _check(self.teacher in ("scaled", "full"), "teacher", self.teacher, "scaled or full")
        _check(
            self.plan != "online" or self.teacher == "scaled", "plan", self.plan, "another for a teacher that is full"
        )
        _check(self.views in ("full", "scaled"), "views", self.views, "full or scaled")
        _check(self.grow in ("no", *RATES), "grow", self.grow, f"no, {', '.join(RATES)}")
        _check(self.merge in ("no", "yes"), "merge", self.merge, "no or yes")
        _check(self.head_norm in ("no", "yes"), "head_norm", self.head_norm, "no or yes")
        _check(self.local_views >= 0, "local_views", self.local_views, "a number of views")
        _check(self.teacher_temperature > 0, "teacher_temperature", self.teacher_temperature, "a number above 0")
        _check(self.micro > 0 and self.batch % self.micro == 0, "micro", self.micro, "a divisor of batch")
        _check(self.grow == "no" or self.micro == 1, "micro", self.micro, "1 where the batch grows")
        _check(self.plan != "online" or self.grow == self.merge == "no", "plan", self.plan, "another to grow or merge")
        _check(0 < self.budget < math.inf, "budget", self.budget, "a number of millions of units above 0")
        _check(1 < self.batch <= self.images, "batch", self.batch, "at least 2 and at most as many as images")
        _check(0 <= self.warmup < 1, "warmup", self.warmup, "a share in [0, 1)")
        _check(0 < self.crop <= 1, "crop", self.crop, "a share in (0, 1]")
        parse_plan(self.plan)

    @property
    def name(self) -> str:
        """Of the run's files: what one looks for first, and a digest of all settings."""
        # Only what differs from the defaults, so that a setting that is added later leaves earlier runs their names.
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        text = json.dumps(given, sort_keys=True)
        plan = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in self.plan).strip("-")
        plan = "-".join(part for part in plan.split("-") if part)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.dataset}_{self.method}_{plan}_{self.budget:g}M_seed{self.seed}_{digest}"


def parse_plan(text: str) -> str | Strategy | Schedule:
    """What ``Settings.plan`` says, as ``compress`` takes it.

    Raises:
        ValueError: it is none of the forms that a plan may have.
    """
    if text == "none":
        return Strategy()
    return text if text in PRESETS else Schedule.parse(text)


class Training:
    """A run, and all that a checkpoint keeps of it."""

    def __init__(self, settings: Settings, images: Images, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.images, self.device = settings, images, device
        encoder = VisionTransformer(
            img_size=settings.image_size,
            patch_size=settings.patch_size,
            embed_dim=settings.width,
            depth=settings.depth,
            num_heads=settings.heads,
            num_classes=0,
            dynamic_img_size=True,  # DINO's local views are smaller
        )
        flops = {}  # of one view, counted before anything is compressed
        method_settings = MethodSettings(
            hidden=settings.hidden,
            out=settings.out,
            prototypes=settings.prototypes,
            local_views=settings.local_views,
            teacher_temperature=settings.teacher_temperature,
            head_norm=settings.head_norm == "yes",
        )
        method: Method = METHODS[settings.method](encoder, method_settings)
        self.views = Views(method.views(settings.image_size, settings.crop))
        for size in set(self.views.sizes):
            flops[size] = _flops(encoder, size)
        self.method = method.to(device).train()
        self.views_cost = [3 * flops[size] / flops[settings.image_size] for size in self.views.sizes]

        # The user's lines, and what follows the schedule.
        plan = parse_plan(settings.plan)
        if settings.plan == ONLINE:  # with no limit that goes by the clock: what comes out is to hang on settings alone
            online = PRESETS[ONLINE](double_patch(settings.patch_size, settings.image_size))
            plan = dataclasses.replace(online, time_share=None)
        scaled_teacher = method.backbone_momentum if settings.teacher == "scaled" else None
        seqcompress.compress(method.backbone, plan, teacher=scaled_teacher)
        encoders = driven = [method.backbone, *([] if scaled_teacher is None else [scaled_teacher])]
        if method.backbone_momentum is not scaled_teacher:
            encoders = [*driven, seqcompress.compress(method.backbone_momentum, Strategy())]  # plain, but counted
        if settings.views == "scaled":
            seqcompress.scale_views(self.views, method)
        self.total_steps = self._steps_for_budget()
        self.now = {"progress": 0.0}
        self.loss_of = self._loss_function(method)
        self.online = None
        if settings.plan == ONLINE:
            self.online = OnlineScheduler(method, self.loss_of, total_steps=self.total_steps)
        self.sequence_scheduler = self.online or SequenceScheduler(driven, total_steps=self.total_steps)
        self.budget = Budget(encoders)

        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        self.lr_scheduler = CosineWarmupScheduler(
            self.optimizer, warmup_epochs=round(settings.warmup * self.total_steps), max_epochs=self.total_steps
        )
        self.steps_done = 0
        """In batches: an update takes several where the batch grows."""
        self.updates = 0
        self.begun = 0.0  # share of the method's own schedule that was over before the first step
        self.seconds = {"wall": 0.0, "cpu": 0.0, "views": 0.0}
        self.curve: list[dict[str, float]] = []
        self.loss = torch.tensor(math.nan)
        self._order: tuple[int, torch.Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches only."""
        return len(self.images) // self.settings.batch

    def computed_units(self, schedule: Schedule, steps: int) -> float:
        """Units of the whole run by arithmetic: 3 for each of the student's views and 1 for each of the teacher's."""
        backbone, size = self.method.backbone, self.settings.image_size
        counts: dict[Strategy, int] = {}
        for step in range(steps):
            strategy = schedule(step / steps)
            counts[strategy] = counts.get(strategy, 0) + 1
        units = 0.0
        for strategy, count in counts.items():
            seen_by_teacher = strategy.without_dropout() if self.settings.teacher == "scaled" else Strategy()
            teacher = seqcompress.relative_cost(backbone, seen_by_teacher, size)
            spent = self.method.teacher_views * teacher
            for view, cost in zip(self.views.sizes, self.views_cost, strict=True):
                spent += cost * seqcompress.relative_cost(backbone, strategy, view)
            units += count * self.settings.batch * spent
        return units

    @property
    def units(self) -> float:
        """Spent so far, with what an online schedule has spent on measuring."""
        return self.budget.units * (1 + (self.online.measured_share if self.online else 0.0))

    def _loss_function(self, method: Method) -> Callable[[list[torch.Tensor]], torch.Tensor]:
        """The loss of a batch of views; it leads to no more of the run than measuring has to keep a copy of."""
        place, precision, now = self.device.type, self.settings.precision, self.now

        def loss(views: list[torch.Tensor]) -> torch.Tensor:
            with torch.autocast(place, torch.bfloat16, enabled=precision == "bfloat16"):
                return method.loss(views, now["progress"])

        return loss

    def _steps_for_budget(self) -> int:
        # An encoder is driven by one scheduler, whose length is not known yet.
        planned = copy.deepcopy(self.method.backbone)
        known = DEFAULT if self.settings.plan == ONLINE else None  # what will be found is not
        schedule = SequenceScheduler(planned, known, total_steps=1).schedule
        units_per_step = self.computed_units(schedule, 1000) / 1000
        return max(2, round(self.settings.budget * 1e6 / units_per_step))

    def step(self) -> None:
        """One step of training, as a user would write it."""
        began, began_cpu = time.perf_counter(), time.process_time()
        factor, merged = self._factors()
        views = [self.batch(step) for step in range(self.steps_done, self.steps_done + factor)]
        views = [torch.cat(alike) for alike in zip(*views, strict=True)]
        if self.device.type == "cpu":
            self.seconds["views"] += time.process_time() - began_cpu
        progress = self.now["progress"] = self.begun + (1 - self.begun) * self.steps_done / self.total_steps
        parts = self.settings.micro // merged
        losses = []
        for part in zip(*(view.chunk(parts) for view in views), strict=True):
            loss = self.loss_of(list(part)) / parts
            loss.backward()
            losses.append(loss.detach())
        self.method.after_backward(progress)
        for group in self.optimizer.param_groups:
            group["lr"] *= factor ** RATES.get(self.settings.grow, 0.0)  # until the scheduler sets it anew
        self.optimizer.step()
        self.optimizer.zero_grad()
        momentum = cosine_schedule(self.steps_done, self.total_steps, self.settings.momentum, 1.0)
        self.method.update_teacher(momentum**factor)  # as far as in as many updates
        for _ in range(factor):
            self.lr_scheduler.step()
        self.steps_done += factor
        self.updates += 1
        if self.online:
            self.online.step(views)
        else:
            self.sequence_scheduler.step(self.steps_done)
        self.loss = torch.stack(losses).sum()
        if self.updates % 50 == 0 and not math.isfinite(self.loss):  # reading it makes a GPU wait
            raise RuntimeError(f"the loss is {self.loss.item()} after {self.steps_done} steps: try a smaller --lr")
        self.seconds["wall"] += time.perf_counter() - began
        self.seconds["cpu"] += time.process_time() - began_cpu

    def _factors(self) -> tuple[int, int]:
        """Batches of this update, and how many micro-batches are run together."""
        fit = 1 if self.online else self.sequence_scheduler.batch_factor
        together = max(number for number in (1, 2, 4, 8, 16) if number <= fit and self.settings.micro % number == 0)
        return (1 if self.settings.grow == "no" else fit), (together if self.settings.merge == "yes" else 1)

    def batch(self, step: int) -> list[torch.Tensor]:
        """The views of a step, each (B, 3, height, width)."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.settings.seed + epoch)
            self._order = epoch, torch.randperm(len(self.images), generator=generator)
        chosen = self._order[1][batch * self.settings.batch :][: self.settings.batch]
        pixels = self.images.pixels[chosen.to(self.images.pixels.device)]
        generator = torch.Generator(self.device).manual_seed(1_000_003 * self.settings.seed + step)
        return self.views(pixels, generator)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "sequence_scheduler": self.sequence_scheduler.state_dict(),
            "budget": self.budget.state_dict(),
            "steps_done": self.steps_done,
            "updates": self.updates,
            "seconds": self.seconds,
            "curve": self.curve,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same run."""
        if Settings(**state["settings"]) != self.settings:
            raise ValueError("checkpoint is of a run with other settings")
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.sequence_scheduler.load_state_dict(state["sequence_scheduler"])
        self.budget.load_state_dict(state["budget"])
        self.steps_done, self.seconds, self.curve = state["steps_done"], dict(state["seconds"]), list(state["curve"])
        self.updates = state.get("updates", self.steps_done)


class Judge:
    """k-NN and a linear probe, scikit-learn's, on frozen features of full views."""

    def __init__(self, bank: Images, judged: Images) -> None:
        self.bank, self.judged = bank, judged

    def knn(self, encoder: nn.Module, most: int | None = None) -> float:
        """Accuracy of the label that most of the 20 nearest have, by cosine of standardized features."""
        classifier = KNeighborsClassifier(20, metric="cosine", weights="distance", algorithm="brute")
        return self._accuracy(classifier, encoder, most)

    def both(self, encoder: nn.Module) -> dict[str, float]:
        """Accuracies of k-NN and of logistic regression."""
        bank, judged = self._features(encoder, self.bank), self._features(encoder, self.judged)
        nearest = KNeighborsClassifier(20, metric="cosine", weights="distance", algorithm="brute")
        probe = LogisticRegression(C=0.1, max_iter=1000)
        return {
            name: _fitted_accuracy(classifier, bank, self.bank, judged, self.judged)
            for name, classifier in (("knn", nearest), ("linear", probe))
        }

    def _accuracy(self, classifier: Any, encoder: nn.Module, most: int | None) -> float:
        bank, judged = (images if most is None else images.part(0, most) for images in (self.bank, self.judged))
        return _fitted_accuracy(
            classifier, self._features(encoder, bank), bank, self._features(encoder, judged), judged
        )

    @torch.no_grad()
    def _features(self, encoder: nn.Module, images: Images) -> np.ndarray:
        training, device = encoder.training, next(encoder.parameters()).device
        encoder.eval()  # full sequences: eval mode is never compressed
        features = [encoder(as_input(batch.to(device))).float().cpu() for batch in images.pixels.split(250)]
        encoder.train(training)
        return torch.cat(features).numpy()


def _fitted_accuracy(classifier: Any, bank: np.ndarray, known: Images, judged: np.ndarray, asked: Images) -> float:
    classifier = make_pipeline(StandardScaler(), classifier).fit(bank, known.labels.numpy())
    return float(classifier.score(judged, asked.labels.numpy()))


def run(
    settings: Settings,
    data: Path,
    output: Path = RESULTS,
    checkpoints: Path = CHECKPOINTS,
    *,
    device: str | None = None,
    minutes: float = math.inf,
    until: float = 1.0,
    save_every: float = 60.0,
    points: int = 5,
) -> Path | None:
    """Do a run, or what is left of it.

    Args:
        settings: of the run.
        data: folder with ``train`` and ``test`` or ``val``.
        output: folder for the JSON file.
        checkpoints: folder for what an interrupted run goes on from; it is deleted once the run is done.
        device: as torch names it; ``None`` for a GPU if there is one.
        minutes: save and stop after this time.
        until: save and stop after this share of the run, which branches.py goes on from.
        save_every: seconds between checkpoints.
        points: number of points of the curve.

    Returns:
        The JSON file, or ``None`` if the run was stopped before its end.

    Raises:
        ValueError: ``until`` is not in (0, 1], the checkpoint is of another run, or the images do not suffice.
    """
    _check(0 < until <= 1, "until", until, "a share in (0, 1]")
    result, checkpoint = output / f"{settings.name}.json", checkpoints / f"{settings.name}.pt"
    if result.is_file() and until == 1:
        return result
    end = time.monotonic() + 60 * minutes
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    train, held_out, judged = _data(settings, data, checkpoints)
    training = Training(settings, train.to(on), on)
    if checkpoint.is_file():
        training.load_state_dict(torch.load(checkpoint, map_location=on, weights_only=True))
        print(f"{settings.name}: goes on after {training.steps_done} steps", flush=True)
    bank, few = train, min(1000, len(train) // 2)
    if not len(held_out):  # all images are trained on: the curve is judged on some of them, by the others
        held_out, bank = train.part(0, few), train.part(few, len(train))
    along_the_way = Judge(bank, held_out)
    marks = [round(training.total_steps * number / points) for number in range(1, points + 1)]
    marks = [mark for mark in marks if mark > training.steps_done]
    last = max(1, round(until * training.total_steps))
    saved = time.monotonic()
    while training.steps_done < last:
        training.step()
        at_a_mark = bool(marks) and training.steps_done >= marks[0]
        if at_a_mark or training.updates % 10 == 9:
            _wait_for(on, training.seconds)
        if at_a_mark:
            marks = [mark for mark in marks if mark > training.steps_done]
            training.curve.append(_point(training, along_the_way))
            print(f"{settings.name}: {_told(training)}", flush=True)
        now = time.monotonic()
        if now > end or now - saved > save_every or training.steps_done >= last:
            _wait_for(on, training.seconds)
            _save(training.state_dict(), checkpoint)
            saved = now
        if now > end:
            break
    if training.steps_done < training.total_steps:
        print(f"{settings.name}: stopped after {training.steps_done} of {training.total_steps} steps", flush=True)
        return None
    _write(_report(training, Judge(train, judged).both(training.method.backbone), len(judged)), result)
    checkpoint.unlink(missing_ok=True)
    print(f"{settings.name}: {json.loads(result.read_text())['accuracy']}", flush=True)
    return result


def _data(settings: Settings, data: Path, cache: Path) -> tuple[Images, Images, Images]:
    """Images to train on, training images held out for the curve, and images to judge on at the end."""
    held_out = max(1, settings.images // 5)
    tuned_on = settings.judged_images or held_out if settings.judged_on == "held-out" else 0
    number = _at_most(data, settings.images + max(held_out, tuned_on))
    everything = load_images(data / "train", settings.image_size, number, cache)
    train = everything.part(0, settings.images)
    held_out_images = everything.part(settings.images, settings.images + held_out)
    if settings.judged_on == "held-out":
        left = len(everything) - settings.images
        if left < (settings.judged_images or 1):
            raise ValueError(f"images must leave {settings.judged_images or 'some'} to be held out, leave {left}")
        return train, held_out_images, everything.part(settings.images, settings.images + tuned_on)
    folder = next((data / name for name in ("test", "val") if (data / name).is_dir()), None)
    if folder is None:
        raise ValueError(f"data must be a folder with 'train' and 'test' or 'val', got {data}")
    number = settings.judged_images or _count(folder)
    test = load_images(folder, settings.image_size, number, cache)
    return train, held_out_images, test


def _at_most(data: Path, number: int) -> int:
    if not (data / "train").is_dir():
        raise ValueError(f"data must be a folder with 'train' and 'test' or 'val', got {data}")
    return min(number, _count(data / "train"))


def _count(folder: Path) -> int:
    return sum(1 for path in folder.glob("*/*") if path.is_file())


def _wait_for(device: torch.device, seconds: dict[str, float]) -> None:
    """On a GPU, which works while the clock is read, wait for what it still has to do."""
    if device.type == "cuda":
        began = time.perf_counter()
        torch.cuda.synchronize()
        seconds["wall"] += time.perf_counter() - began


def _point(training: Training, judge: Judge) -> dict[str, float]:
    return {
        "step": training.steps_done,
        "units": round(training.units),
        "wall": round(training.seconds["wall"], 2),
        "cpu": round(training.seconds["cpu"], 2),
        "loss": round(training.loss.item(), 5),
        "knn": judge.knn(training.method.backbone, 1000),
    }


def _told(training: Training) -> str:
    point = training.curve[-1]
    share = training.steps_done / training.total_steps
    return (
        f"{share:4.0%}, {point['units'] / 1e6:.3f} M, {point['wall']:.0f} s ({point['cpu']:.0f} s of CPU), "
        f"{training.sequence_scheduler.strategy}, loss {point['loss']:.3f}, k-NN {point['knn']:.3f}"
    )


def _of_measuring(online: OnlineScheduler) -> dict[str, Any]:
    return {
        "measured_share": round(online.measured_share, 5),
        "measured_share_of_time": round(online.measured_share_of_time, 5),
        "decisions": [str(decision) for decision in online.decisions],
    }


def _report(training: Training, accuracy: dict[str, float], judged: int) -> dict[str, Any]:
    schedule = training.sequence_scheduler.schedule
    settings = training.settings
    packages = ("torch", "torchvision", "timm", "lightly", "scikit-learn")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        "settings": dataclasses.asdict(settings),
        "schedule": json.loads(schedule.to_json()),
        "steps": training.total_steps,
        "updates": training.updates,
        "epochs": round(training.total_steps / training.steps_per_epoch, 3),
        "units": round(training.units),
        "units_computed": round(training.computed_units(schedule, training.total_steps)),
        **(_of_measuring(training.online) if training.online else {}),
        "seconds": {name: round(value, 1) for name, value in training.seconds.items()},
        "accuracy": {name: round(value, 5) for name, value in accuracy.items()},
        "judged_images": judged,
        "curve": training.curve,
        "device": training.device.type,
        "hardware": _hardware(training.device),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "versions": {"seqcompress": seqcompress.__version__, "python": platform.python_version(), **versions},
    }


def _commit() -> str | None:
    """Of the checkout that this file lies in; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _save(state: dict[str, Any], path: Path) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        torch.save(state, beside)


def _write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(report, indent=1) + "\n", path)


def _flops(encoder: nn.Module, size: int) -> int:
    """Of one view's forward through the plain encoder; without data, where attention is counted on any device."""
    without_data = copy.deepcopy(encoder).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        without_data(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each setting."""
    told = dict(part.split(": ", 1) for part in _attributes(Settings.__doc__ or ""))
    for field in dataclasses.fields(Settings):
        kind = {"int": int, "float": float, "str": str, "int | None": int}[str(field.type)]
        told_of = told[field.name].replace("%", "%%")
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=f"{told_of} (%(default)s)"
        )


def _attributes(docstring: str) -> list[str]:
    lines = docstring.partition("Attributes:\n")[2].rstrip().splitlines()
    parts: list[str] = []
    for line in lines:
        if line.startswith(" " * 12):
            parts[-1] += " " + line.strip()
        else:
            parts.append(line.strip())
    return parts


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train and test (or val)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder for checkpoints (%(default)s)")
    parser.add_argument("--device", help="cuda or cpu; a GPU if there is one")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after this time")
    parser.add_argument("--until", type=float, default=1.0, help="save and stop after this share of the run")
    add_settings(parser)
    options = vars(parser.parse_args(arguments))
    places = {name: options.pop(name) for name in ("data", "output", "checkpoints", "device", "minutes", "until")}
    try:
        settings = Settings(**options)
        done = run(settings, places.pop("data"), places.pop("output"), places.pop("checkpoints"), **places)
    except ValueError as error:
        parser.error(str(error))
    return 0 if done else UNFINISHED


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
