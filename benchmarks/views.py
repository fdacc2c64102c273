"""How fast are augmented views made? One core, real JPEG files, the transforms that Lightly and solo-learn users have.

While patches are scaled, ``seqcompress.scale_views`` has a loader make smaller views. Each pipeline is compared with
itself at full size, file by file, in one run:

- scaled: views of as many patches of 16 px as the strategy's larger patches are in the full view;
- files decoded whole: the same without decoding JPEG files at a fraction of their size.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as v1
import torchvision.transforms.v2 as v2
from lightly.transforms import BYOLTransform, DINOTransform, MoCoV2Transform, SimCLRTransform
from measure import Ratio, by_repeat, environment, interleaved_times, markdown_table, ratio, write_report
from photographs import SIZE, write_photographs
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from seqcompress.compressors import resize_pinv
from seqcompress.compressors.patch_scaling import resample_views
from seqcompress.views.transforms import ScaledTransforms

BASE = (16, 16)
PATCH_SIZES = (28, 32, 56)
WHOLE = ", files decoded whole"
BATCH = 64  # images, for what is done once a batch
SOLO_LEARN = "scripts/pretrain/imagenet-100/augmentations"


def torchvision_pipeline(v: Any, *to_tensor: Any) -> Any:
    """MoCo v2's augmentation, from torchvision's own transforms; ``v`` is its first or its second version."""
    return v.Compose(
        [
            v.RandomResizedCrop(224, scale=(0.2, 1.0)),
            v.RandomApply([v.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v.RandomGrayscale(p=0.2),
            v.RandomApply([v.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            v.RandomHorizontalFlip(),
            *to_tensor,
            v.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def pipelines() -> dict[str, Callable[[Any], Any]]:
    """Transforms from an image to one or several views, with their usual settings."""
    found: dict[str, Callable[[Any], Any]] = {
        "Lightly SimCLR": SimCLRTransform(),
        "Lightly MoCo v2": MoCoV2Transform(),
        "Lightly BYOL": BYOLTransform(),
        "Lightly DINO": DINOTransform(),
        "torchvision v1": torchvision_pipeline(v1, v1.ToTensor()),
        "torchvision v2, tensors": v2.Compose(
            [v2.ToImage(), torchvision_pipeline(v2, v2.ToDtype(torch.float32, scale=True))]
        ),
    }
    return {**found, **solo_learn_pipelines()}


def solo_learn_pipelines() -> dict[str, Callable[[Any], Any]]:
    """Those of solo-learn's own ImageNet-100 configs, if it can be imported."""
    try:
        import solo
        from omegaconf import OmegaConf
        from solo.data import pretrain_dataloader as data
    except ImportError:
        return {}
    found = {}
    for name in ("symmetric.yaml", "asymmetric.yaml"):
        crops = [
            data.NCropAugmentation(data.build_transform_pipeline("imagenet100", view), view.num_crops)
            for view in OmegaConf.load(Path(solo.__file__).parents[1] / SOLO_LEARN / name)
        ]
        found[f"solo-learn {name.removesuffix('.yaml')}"] = data.FullTransformPipeline(crops)
    return found


def steps_of(dataset: ImageFolder) -> dict[str, Callable[[], object]]:
    """Making the views of one image, for every patch size; each goes through the same files in the same order."""
    steps: dict[str, Callable[[], object]] = {}
    for patch_size in (None, *PATCH_SIZES):
        for whole in (False, True) if patch_size else (True,):
            scaled = ImageFolder(dataset.root, transform=copy.deepcopy(dataset.transform))
            ScaledTransforms(scaled, BASE).apply(patch_size)
            if whole:
                scaled.loader = default_loader
            name = f"patch {patch_size or BASE[0]}" + (WHOLE if whole and patch_size else "")
            steps[name] = partial(_next_views, scaled, count())
    return steps


def following(dataset: ImageFolder, repeats: int = 50) -> float:
    """CPU seconds that a worker spends between two batches: it reads the pipeline's settings and sets them."""
    scaled = ImageFolder(dataset.root, transform=copy.deepcopy(dataset.transform))
    times = []
    for _ in range(repeats):
        start = time.process_time()
        ScaledTransforms(scaled, BASE).apply(32)
        times.append(time.process_time() - start)
    return statistics.median(times)


def _next_views(dataset: ImageFolder, number: Any) -> object:
    return dataset[next(number) % len(dataset)]


class Region(v1.RandomResizedCrop):
    """A crop at a given place of the image, whatever the image's size is."""

    def __init__(self, size: int, place: tuple[float, float, float]) -> None:
        super().__init__(size)
        self.place = place

    def get_params(self, image: Any, scale: Any, ratio: Any) -> tuple[int, int, int, int]:
        side, top, left = (round(share * min(image.size)) for share in self.place)
        return top, left, side, side


def differences(folder: Path, images: int) -> dict[str, float]:
    """How far smaller views are from full ones whose patches are resampled by the encoder, relative to their spread.

    Root mean square over crops of 30 % to 100 % of an image's height, without other augmentation, at patch 32. For
    comparison: how far two different crops of the same image are from each other.
    """
    place = random.Random(0)
    shrink = resize_pinv(BASE[0], 32, torch.float32, torch.device("cpu"))
    errors: dict[str, list[float]] = {"scaled": [], f"scaled{WHOLE}": [], "another crop": []}
    for number in range(images):
        views: list[dict[str, Tensor]] = []
        for _ in range(2):
            # Whole pixels in an image of half the height, too: otherwise the crops would not be equal.
            half = min(SIZE) // 2
            side = place.randint(round(0.3 * half), half)
            region = Region(224, (side / half, *(place.randint(0, half - side) / half for _ in range(2))))
            dataset = ImageFolder(str(folder), transform=v1.Compose([region, v1.ToTensor()]))
            transforms = ScaledTransforms(dataset, BASE)
            full = resample_views(dataset[number][0][None], (7, 7), shrink, shrink)[0]
            transforms.apply(32)
            scaled = dataset[number][0]
            dataset.loader = default_loader
            views.append({"full": full, "scaled": scaled, f"scaled{WHOLE}": dataset[number][0]})
        first, second = views
        for name in errors:
            other = second["full"] if name == "another crop" else first[name]
            errors[name].append(float((other - first["full"]).square().mean().sqrt() / first["full"].std()))
    return {name: statistics.mean(shares) for name, shares in errors.items()}


def report(described: dict[str, str], repeats: int, rows: list[dict[str, Any]], apart: dict[str, float]) -> str:
    """The tables as Markdown."""
    table = [
        {
            "pipeline": row["pipeline"],
            "views an image": str(row["views_per_image"]),
            "full size: views/s": f"{row['full_views_per_second']:.0f}",
            **{name: _times(Ratio(**found)) for name, found in row["speedup"].items()},
            "between batches": f"{1000 * row['seconds_between_batches']:.1f} ms, {100 * _share(row):.1f} %",
        }
        for row in rows
    ]
    differing = [{"compared with the full view": name, "difference": f"{100 * x:.1f} %"} for name, x in apart.items()]
    return f"""# Augmented views per second and core, by patch size

Written by `benchmarks/views.py`. JPEG files of {SIZE[0]} x {SIZE[1]} px, read, decoded, augmented and made tensors;
times of one run, in which all variants took turns in random order: medians of {repeats} repeats of their ratios, in
brackets 95 % intervals of the median. Views per second at full size are for orientation: they hold for this machine at
that hour. Between two batches a worker reads the pipeline's settings and sets them anew; the share is that of the time
for a batch of {BATCH} images at patch 32.
{", ".join(f"{key} {value}" for key, value in described.items())}.

## How many times as many views per second as at full size

{markdown_table(table)}

## How much smaller views differ from full ones

At patch 32, from full views whose patches the encoder resamples; relative to the spread of their pixels. Crops of 30 to
100 % of the image's height at equal places, otherwise not augmented.

{markdown_table(differing)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--images", type=int, default=32, help="different files")
    parser.add_argument("--min-seconds", type=float, default=1.5, help="of a repeat, for each pipeline")
    parser.add_argument("--only", help="pipelines whose name contains this")
    parser.add_argument("--output", type=Path, help="where to write, without suffix; default: results/views-cpu")
    options = parser.parse_args()
    if options.repeats < 6:
        parser.error(f"--repeats must be at least 6 for a 95 % interval, got {options.repeats}")
    chosen = {name: made for name, made in pipelines().items() if options.only is None or options.only in name}
    if not chosen:
        parser.error(f"--only must be part of a pipeline's name: {', '.join(pipelines())}; got {options.only!r}")
    torch.set_num_threads(1)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)

    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_photographs(Path(temporary), options.images)
        datasets = {name: ImageFolder(str(folder), transform=transform) for name, transform in chosen.items()}
        times = interleaved_times(
            {name: steps_of(dataset) for name, dataset in datasets.items()},
            repeats=options.repeats,
            min_seconds=options.min_seconds,
            device=device,
            title="views",
        )
        apart = differences(folder, options.images)
        rows = []
        for name, variants in times.items():
            views = datasets[name][0][0]
            # Images take different times: means of several, all of which went through every variant.
            variants = {variant: by_repeat(seconds, options.repeats) for variant, seconds in variants.items()}
            full = variants[f"patch {BASE[0]}"]
            made = len(views) if isinstance(views, list) else 1
            scaled = [f"patch {size}{how}" for how in ("", WHOLE) for size in PATCH_SIZES]
            speedup = {variant: ratio(full, variants[variant])._asdict() for variant in scaled}
            rows.append(
                {
                    "pipeline": name,
                    "views_per_image": made,
                    "full_views_per_second": made / statistics.median(full),
                    "speedup": speedup,
                    "seconds_between_batches": following(datasets[name]),
                }
            )
    described = environment(device)
    text = report(described, options.repeats, rows, apart)
    output = options.output or Path(__file__).parent / "results" / "views-cpu"
    setup = {"file_size": SIZE, "images": options.images, "repeats": options.repeats}
    write_report(output, text, {"environment": described, "setup": setup, "views": rows, "differences": apart})
    print(text)


def _share(row: dict[str, Any]) -> float:
    """Of the time between batches in that of a batch at patch 32."""
    views_per_second = row["full_views_per_second"] * row["speedup"]["patch 32"]["median"]
    return float(row["seconds_between_batches"] * views_per_second / (BATCH * row["views_per_image"]))


def _times(found: Ratio) -> str:
    return f"{found.median:.2f}x [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    main()
