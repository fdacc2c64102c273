"""How fast is a compressed encoder? Forward + backward of a ViT, over a grid of dropout and patch size.

Every figure is a ratio of times from one run. Each point of the grid compares, on the same weights:

- ours: the compressed model on full-size views;
- the native limit: the plain model on views so small that it has exactly as many tokens, with nothing to choose,
  to drop or to resample: nothing can be faster that runs the same blocks;
- timm: its own patch dropout (``patch_drop_rate``) and ``set_input_size(patch_size=...)`` on full-size views, the
  rate set such that it keeps exactly as many tokens;
- uncompressed: the plain model on full-size views.

Then the price of a model that is compressed while no compression is active, in train and in eval mode.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from measure import Ratio, Step, Times, environment, interleaved_times, markdown_table, peak_memory, ratio, write_report
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import seqcompress
from seqcompress import Strategy

IMAGE_SIZE = 224
DROPOUTS = (0.0, 0.5, 0.75, 0.9)
PATCH_SIZES = (16, 32, 56)


def train_step(model: nn.Module, views: Tensor, amp: bool, strategy: Strategy | None = None) -> None:
    """Forward + backward, at ``strategy`` if the model is compressed."""
    if strategy is not None:
        seqcompress.set_strategy(model, strategy)
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.autocast(views.device.type, torch.bfloat16, enabled=amp):
        loss = model(views).square().mean()
    loss.backward()


def eval_step(model: nn.Module, views: Tensor, amp: bool) -> None:
    """Forward in eval mode."""
    model.eval()
    with torch.no_grad(), torch.autocast(views.device.type, torch.bfloat16, enabled=amp):
        model(views)


def sharing_blocks(model: VisionTransformer) -> VisionTransformer:
    """A copy that runs the very same blocks: all variants then work on the same memory."""
    return copy.deepcopy(model, {id(model.blocks): model.blocks})


def native(model: VisionTransformer, patches: int) -> tuple[VisionTransformer, tuple[int, int]]:
    """The plain model for views of exactly this many patches, and the size of such views."""
    rows = next(side for side in range(math.isqrt(patches), 0, -1) if patches % side == 0)
    height, width = model.patch_embed.patch_size
    size = (rows * height, patches // rows * width)
    small = sharing_blocks(model)
    small.set_input_size(img_size=size)
    return small, size


def by_timm(model: VisionTransformer, patch_size: int, patches: int) -> VisionTransformer:
    """The model with timm's own means to get to this many patches."""
    own = sharing_blocks(model)
    own.set_input_size(patch_size=(patch_size, patch_size))
    of = own.patch_embed.num_patches
    if patches < of:
        own.patch_drop = PatchDropout(1 - (patches + 0.5) / of, num_prefix_tokens=own.num_prefix_tokens)
    return own


def grid_steps(
    model: VisionTransformer, batch_size: int, amp: bool, device: torch.device
) -> dict[str, dict[str, Step]]:
    """The steps to compare at every point of the grid, and the uncompressed one."""
    views = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    ours = seqcompress.compress(sharing_blocks(model), Strategy())
    steps: dict[str, dict[str, Step]] = {"base": {"uncompressed": partial(train_step, model, views, amp)}}
    for patch_size in PATCH_SIZES:
        for dropout in DROPOUTS:
            strategy = Strategy(dropout, patch_size)
            patches = seqcompress.num_tokens(model, strategy, IMAGE_SIZE) - model.num_prefix_tokens
            small, size = native(model, patches)
            steps[str(strategy)] = {
                "ours": partial(train_step, ours, views, amp, strategy),
                "native": partial(train_step, small, torch.randn(batch_size, 3, *size, device=device), amp),
                "timm": partial(train_step, by_timm(model, patch_size, patches), views, amp),
            }
    return steps


def inactive_steps(
    model: VisionTransformer, batch_size: int, amp: bool, device: torch.device
) -> dict[str, dict[str, Step]]:
    """Plain and compressed model while no compression is active, for one batch and for a single view."""
    ours = seqcompress.compress(sharing_blocks(model), Strategy())
    steps: dict[str, dict[str, Step]] = {}
    for size in sorted({batch_size, 1}, reverse=True):
        views = torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        for mode, step in (("train, forward + backward", train_step), ("eval, forward", eval_step)):
            steps[f"{mode}, batch {size}"] = {
                "plain": partial(step, model, views, amp),
                "ours": partial(step, ours, views, amp),
            }
    return steps


def grid_results(
    model: VisionTransformer, times: Times, memory: Mapping[str, Mapping[str, int]]
) -> list[dict[str, Any]]:
    """One record for each point of the grid."""
    uncompressed = times["base"]["uncompressed"]
    results = []
    for point, variants in times.items():
        if point == "base":
            continue
        strategy = Strategy.parse(point)
        results.append(
            {
                **strategy.to_dict(),
                "tokens": seqcompress.num_tokens(model, strategy, IMAGE_SIZE),
                "speedup": ratio(uncompressed, variants["ours"])._asdict(),
                "share_of_native_limit": ratio(variants["native"], variants["ours"])._asdict(),
                "timm_share_of_native_limit": ratio(variants["native"], variants["timm"])._asdict(),
                "speed_over_timm": ratio(variants["timm"], variants["ours"])._asdict(),
            }
        )
        if memory:
            base = memory["base"]["uncompressed"]
            results[-1]["peak_memory"] = {name: peak / base for name, peak in memory[point].items()}
    return results


def report(
    options: argparse.Namespace,
    described: Mapping[str, str],
    grid: list[dict[str, Any]],
    inactive: Mapping[str, Ratio],
) -> str:
    """The tables as Markdown."""
    precision = "bfloat16 autocast" if options.amp else "float32"
    rows = []
    for point in grid:
        row = {
            "dropout": f"{point['token_dropout']:g}",
            "patch": str(point["patch_size"]),
            "tokens": str(point["tokens"]),
            "speed-up": f"{point['speedup']['median']:.2f}x",
            "share of the native limit": _percent(Ratio(**point["share_of_native_limit"])),
            "timm's share": _percent(Ratio(**point["timm_share_of_native_limit"])),
            "speed over timm": f"{point['speed_over_timm']['median']:.2f}x",
        }
        if "peak_memory" in point:
            row |= {f"memory, {name}": f"{100 * share:.1f} %" for name, share in point["peak_memory"].items()}
        rows.append(row)
    shares = [point["share_of_native_limit"]["median"] for point in grid]
    overheads = [
        {"inactive": name, "time over the plain model's": _percent(Ratio(*(bound - 1 for bound in overhead)), 2)}
        for name, overhead in inactive.items()
    ]
    memory_note = (
        "\n- **memory**: what a step allocates at its peak, above the weights, relative to the uncompressed step."
        if any("peak_memory" in point for point in grid)
        else ""
    )
    return f"""# Encoder: {options.model} at {IMAGE_SIZE} px, {options.device}, {precision}, batch {options.batch_size}

Written by `benchmarks/encoder.py`. Ratios of times taken in one run, in which all variants took turns in random order:
medians of {options.repeats} repeats, in brackets 95 % intervals of the median.
{", ".join(f"{key} {value}" for key, value in described.items())}.

## Compression active: forward + backward

- **speed-up**: over the uncompressed model.
- **share of the native limit**: our speed relative to that of the plain model on views so small that it has exactly
  as many tokens. Median over the grid {100 * statistics.median(shares):.1f} %, least {100 * min(shares):.1f} %.
- **timm**: `patch_drop_rate` with `set_input_size(patch_size=...)`, keeping exactly as many tokens. Its patch size
  is for good: the kernel is resampled once, before training, not per step.{memory_note}

{markdown_table(rows)}

## No compression active

How much more time the compressed model takes than the plain one, at the base strategy.

{markdown_table(overheads)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a ViT with patch 16 of timm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--min-seconds", type=float, default=0.2, help="repeat shorter steps within a measurement")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--output", type=Path, help="where to write, without suffix; default: results/encoder-DEVICE")
    options = parser.parse_args()
    if options.repeats < 6:
        parser.error(f"--repeats must be at least 6 for a 95 % interval, got {options.repeats}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)

    model = timm.create_model(options.model, num_classes=0).to(device)
    if not isinstance(model, VisionTransformer) or model.patch_embed.patch_size != (16, 16):
        parser.error(f"--model must be a VisionTransformer of timm with patch size 16, got {options.model}")
    measure = partial(interleaved_times, repeats=options.repeats, min_seconds=options.min_seconds, device=device)
    inactive_times = measure(inactive_steps(model, options.batch_size, options.amp, device), title="inactive")
    points = grid_steps(model, options.batch_size, options.amp, device)
    times = measure(points, title="grid")
    memory = {}
    if device.type == "cuda":
        memory = {
            name: {key: peak_memory(step, device) for key, step in steps.items()} for name, steps in points.items()
        }

    grid = grid_results(model, times, memory)
    inactive = {name: ratio(variants["ours"], variants["plain"]) for name, variants in inactive_times.items()}
    described = environment(device)
    text = report(options, described, grid, inactive)
    output = options.output or Path(__file__).parent / "results" / f"encoder-{device.type}"
    setup = {"model": options.model, "image_size": IMAGE_SIZE, "batch_size": options.batch_size, "amp": options.amp}
    write_report(
        output,
        text,
        {
            "environment": described,
            "setup": {**setup, "device": device.type, "repeats": options.repeats},
            "active": grid,
            "inactive": {name: overhead._asdict() for name, overhead in inactive.items()},
        },
    )
    print(text)


def _percent(share: Ratio, digits: int = 1) -> str:
    median, low, high = (f"{100 * value:.{digits}f}" for value in share)
    return f"{median} % [{low}, {high}]"


if __name__ == "__main__":
    main()
