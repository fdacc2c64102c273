"""Do shorter sequences make shorter days? Files in, weights out: a DataLoader with workers and whole training steps.

JPEG files are read, decoded, augmented by Lightly's transforms, moved to the device and trained on. For each strategy,
with full views and with views that follow it (``seqcompress.scale_views``), three rates are taken in turn:

- loader: batches are taken from the loader and thrown away;
- step: training on one batch over and over;
- together: training on what the loader makes.

Whichever of the first two is slower has the other waiting for it.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from lightly.transforms import DINOTransform, MoCoV2Transform, SimCLRTransform
from measure import (
    Ratio,
    add_options,
    conditions,
    environment,
    markdown_table,
    percent,
    prepare,
    ratio,
    setup_of,
    write_report,
)
from models import compiled
from photographs import SIZE, write_photographs
from recipes import Training, Views
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from tqdm import tqdm
from training_step import TITLES, compressed, plain_training

import seqcompress
from seqcompress import Strategy

TRANSFORMS = {"moco-v3": MoCoV2Transform, "simclr": SimCLRTransform, "dino": DINOTransform}
STRATEGIES = (Strategy(0.75), Strategy(0.0, 32), Strategy(0.5, 32))
RATES = ("loader", "step", "together")
PREFETCHED = 2  # batches a worker, torch's default
MIN_ROUNDS = 3  # batches a worker in one measurement


def seconds(call: Any, device: torch.device) -> float:
    """Wall-clock time of a call: what workers do in other processes counts as soon as it is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@dataclass
class Variant:
    """A training at one strategy, with a loader of its own."""

    training: Training
    strategy: Strategy
    loader: DataLoader[Any]
    method: str
    device: torch.device
    steps: int

    def warm_up(self) -> None:
        """Train once, so that what a first step takes is not measured."""
        seqcompress.set_strategy(self.training.student, self.strategy)
        self._train(next(iter(self.loader)))

    def rates(self) -> dict[str, float]:
        """Images per second of both together, of the loader, and of the step.

        How far workers are ahead depends on what was done with their batches until then. So as many batches as they
        can be ahead are taken first, in the same way as those that are measured.
        """
        assert self.loader.batch_size is not None
        seqcompress.set_strategy(self.training.student, self.strategy)
        batches = iter(self.loader)
        ahead, steps = ahead_of(self.loader), self.steps
        taken = {}
        for name, take in (("together", self._train), ("loader", lambda batch: None)):
            for count in (ahead, steps):
                taken[name] = seconds(partial(self._take, count, batches, take), self.device)
        batch = next(batches)  # a late one: the first of every worker are full views
        taken["step"] = seconds(partial(self._take, steps, repeat(batch), self._train), self.device)
        return {name: steps * self.loader.batch_size / taken[name] for name in RATES}

    @staticmethod
    def _take(count: int, batches: Iterator[Any], take: Callable[[Any], None]) -> None:
        for batch in islice(batches, count):
            take(batch)

    def _train(self, batch: Any) -> None:
        views = [view.to(self.device, non_blocking=True) for view in batch[0]]
        replace(self.training, views=views_for(self.method, views)).step()


def ahead_of(loader: DataLoader[Any]) -> int:
    """How many batches can be ready or in the making before anyone takes them."""
    return loader.num_workers * PREFETCHED


def steps_of(least: int, workers: int) -> int:
    """Steps of one measurement: of whole rounds, as workers that started together go on finishing together."""
    return workers * max(MIN_ROUNDS, math.ceil(least / workers))


def views_for(method: str, views: list[Tensor]) -> Views:
    """A loader's views as the recipes want them."""
    if method == "moco-v3":
        return Views(views, views)
    both = torch.cat(views[:2])
    return Views([both], []) if method == "simclr" else Views([both, torch.cat(views[2:])], [both])


def variants(options: argparse.Namespace, folder: Path, device: torch.device) -> dict[tuple[str, str], Variant]:
    """By strategy and by the size of the views."""
    training = compressed(plain_training(options.method, options, device, **options.settings))
    encoders = torch.nn.ModuleList([module for module in (training.student, training.teacher) if module is not None])
    workers = options.num_workers
    steps = steps_of(options.steps, workers)

    def loader() -> DataLoader[Any]:
        dataset = ImageFolder(str(folder), transform=TRANSFORMS[options.method]())
        images = options.batch_size * (2 * (workers * PREFETCHED + steps) + 1)
        return DataLoader(
            dataset,
            options.batch_size,
            sampler=RandomSampler(dataset, replacement=True, num_samples=images),
            num_workers=workers,
            prefetch_factor=PREFETCHED,
            pin_memory=device.type == "cuda",
        )

    full, scaled = loader(), seqcompress.scale_views(loader(), encoders)
    for encoder in encoders:
        compiled(encoder, really=options.compile)
    made: dict[tuple[str, str], Variant] = {}
    for strategy in (Strategy(), *options.strategies):
        for name, chosen in (("full", full), ("scaled", scaled)) if strategy.patch_size else (("full", full),):
            made[str(strategy), name] = Variant(training, strategy, chosen, options.method, device, steps)
    return made


def report(options: argparse.Namespace, described: Mapping[str, str], results: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    rows = [
        {
            "strategy": result["strategy"],
            "views": result["views"],
            "loader": _times(result["speedup"]["loader"]),
            "step": _times(result["speedup"]["step"]),
            "together": _times(result["speedup"]["together"]),
            "loader's rate / step's": f"{result['loader_over_step']['median']:.2f}",
            "the step waits": percent(Ratio(**result["waiting"]), 0),
        }
        for result in results
    ]
    return f"""# Loader and step together: {TITLES[options.method]}, {options.title}, {conditions(options)}

Written by `benchmarks/end_to_end.py`. Workers: {options.num_workers}; JPEG files of {SIZE[0]} x {SIZE[1]} px, Lightly's
transforms. Wall-clock rates of one run, in which all variants took turns in random order: medians of {options.repeats}
repeats of their ratios. Uncompressed and with full views, {results[0]["images_per_second"]:.3g} images a second were
trained on.
{", ".join(f"{key} {value}" for key, value in described.items())}.

- **loader, step, together**: images per second, over those of the uncompressed run; each of the first two alone, then
  both as in training.
- **the step waits**: share of its time that training stands still for want of views; in brackets 95 % intervals of the
  median.

{markdown_table(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "end_to_end")
    parser.add_argument("--model", default="vit_small_patch16_224", help="a ViT with patch 16 of timm")
    parser.add_argument("--width", type=int, help="of the ViT's tokens; for encoders that are to be small")
    parser.add_argument("--depth", type=int, help="number of the ViT's blocks")
    parser.add_argument("--method", choices=list(TITLES), default="moco-v3")
    parser.add_argument("--dino-dim", type=int, default=65536, help="outputs of DINO's head")
    parser.add_argument("--strategies", nargs="+", type=Strategy.parse, default=STRATEGIES, help="besides the base")
    parser.add_argument("--num-workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--images", type=int, default=256, help="different files")
    parser.add_argument("--steps", type=int, default=6, help="least steps of one measurement")
    options = parser.parse_args()
    if options.num_workers < 1:
        parser.error(f"--num-workers must be at least 1, got {options.num_workers}")
    device = prepare(parser, options)
    options.settings = {
        **({} if options.width is None else {"embed_dim": options.width, "num_heads": max(1, options.width // 32)}),
        **({} if options.depth is None else {"depth": options.depth}),
    }
    options.title = options.model + "".join(f", {name} {value}" for name, value in options.settings.items())

    order = random.Random(0)
    rates: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_photographs(Path(temporary), options.images)
        made = variants(options, folder, device)
        for variant in tqdm(made.values(), desc="end to end: warm-up", unit="variant"):
            variant.warm_up()
        for _ in tqdm(range(options.repeats), desc="end to end", unit="repeat"):
            for key in order.sample(list(made), len(made)):
                for name, rate in made[key].rates().items():
                    rates[key][name].append(rate)

    base = rates["base", "full"]
    results = []
    for (strategy, views), found in ((key, rates[key]) for key in made):
        lost = [alone - both for alone, both in zip(found["step"], found["together"], strict=True)]
        results.append(
            {
                "strategy": strategy,
                "views": views,
                "images_per_second": statistics.median(found["together"]),
                "speedup": {name: ratio(found[name], base[name])._asdict() for name in RATES},
                "loader_over_step": ratio(found["loader"], found["step"])._asdict(),
                "waiting": ratio(lost, found["step"])._asdict(),
            }
        )
    described = {**environment(device), "clock": "wall clock"}
    text = report(options, described, results)
    setup = {**setup_of(options), "model": options.title, "method": options.method, "workers": options.num_workers}
    write_report(options.output, text, {"environment": described, "setup": setup, "end_to_end": results})
    print(text)


def _times(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f}x [{found['low']:.2f}, {found['high']:.2f}]"


if __name__ == "__main__":
    main()
