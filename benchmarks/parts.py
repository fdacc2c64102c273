"""What single changes to a step brought: the part as it is, beside what it replaces, in turns, one process.

- kept patches: reading them in place, and copying the views first, for views in solo-learn's channels-last format;
- larger patches: resampling the view's patches, resampling the kernel (timm's, as FlexiViT does), and embedding a view
  that the loader made smaller;
- positions: two matrix products, and timm's interpolation, forward and backward;
- momentum update: all parameters at once in place, and solo-learn's loop, if it can be imported.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightly.models.modules import MoCoProjectionHead
from measure import (
    Ratio,
    add_options,
    conditions,
    environment,
    interleaved_times,
    markdown_table,
    prepare,
    ratio,
    setup_of,
    write_report,
)
from models import IMAGE_SIZE, PATCH_SIZE, vit
from timm.layers.patch_embed import PatchEmbedResamplerFixedOrigSize
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from seqcompress.adapters.solo_learn import ForeachMomentumUpdater
from seqcompress.compressors import random_subset, resize_pinv
from seqcompress.compressors.patch_scaling import resample_positions, resample_views
from seqcompress.compressors.token_dropout import gather_patches, rows_of_patches

OURS = "ours"
GRID = (IMAGE_SIZE // PATCH_SIZE, IMAGE_SIZE // PATCH_SIZE)
LARGE = 2 * PATCH_SIZE


def kept_patches(model: Any, views: Tensor, kept: Tensor) -> dict[str, Callable[[], object]]:
    """Reading a quarter of the patches out of views in channels-last format."""
    last = views.contiguous(memory_format=torch.channels_last)
    patch = (PATCH_SIZE, PATCH_SIZE)
    rows = rows_of_patches(views.shape[1], GRID, patch, views.device)
    return {
        OURS: lambda: gather_patches(last, kept, rows, patch),
        "copying the views": lambda: gather_patches(last.contiguous(), kept, rows, patch),
    }


def larger_patches(model: Any, views: Tensor, kept: Tensor) -> dict[str, Callable[[], object]]:
    """Embedding whole views in patches of twice the side, forward and backward to the base kernel."""
    proj = model.patch_embed.proj
    shrink = resize_pinv(PATCH_SIZE, LARGE, views.dtype, views.device)
    resampler = PatchEmbedResamplerFixedOrigSize(orig_size=(PATCH_SIZE, PATCH_SIZE)).to(views.device)
    grid = (GRID[0] // 2, GRID[1] // 2)
    small = F.avg_pool2d(views, 2)

    def embed(make: Callable[[], tuple[Tensor, Tensor]]) -> None:
        pixels, kernel = make()
        F.conv2d(pixels, kernel, proj.bias, stride=kernel.shape[-2:]).sum().backward()
        model.zero_grad()

    return {
        OURS: partial(embed, lambda: (resample_views(views, grid, shrink, shrink), proj.weight)),
        "resampling the kernel": partial(embed, lambda: (views, resampler(proj.weight, (LARGE, LARGE)))),
        "views made smaller": partial(embed, lambda: (small, proj.weight)),
    }


def positions(model: Any, views: Tensor, kept: Tensor) -> dict[str, Callable[[], object]]:
    """Positions for a grid of half the side, forward and backward."""
    grid = (GRID[0] // 2, GRID[1] // 2)
    full = model.pos_embed.detach()[:, model.num_prefix_tokens :].requires_grad_()

    def backward(resample: Callable[[Tensor], Tensor]) -> None:
        torch.autograd.grad(resample(full).sum(), full)

    by_timm = partial(resample_abs_pos_embed, new_size=list(grid), old_size=list(GRID), num_prefix_tokens=0)
    return {
        OURS: partial(backward, lambda full: resample_positions(full, GRID, grid)),
        "timm's interpolation": partial(backward, by_timm),
    }


def momentum_update(model: Any, views: Tensor, kept: Tensor) -> dict[str, Callable[[], object]]:
    """Encoder and MoCo-v3's projection head."""
    try:
        from solo.utils.momentum import MomentumUpdater
    except ImportError:
        return {}
    head = MoCoProjectionHead(model.embed_dim, 4096, 256, num_layers=3, batch_norm=True).to(views.device)
    online = nn.ModuleList([model, head])
    average = copy.deepcopy(online).requires_grad_(False)
    theirs = MomentumUpdater(0.99)
    return {
        OURS: partial(ForeachMomentumUpdater(theirs).update, online, average),
        "solo-learn's loop": partial(theirs.update, online, average),
    }


PARTS = {
    "kept patches, channels last": kept_patches,
    "larger patches": larger_patches,
    "positions": positions,
    "momentum update": momentum_update,
}


def report(options: argparse.Namespace, described: Mapping[str, str], results: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    rows = [
        {
            "part": result["part"],
            "instead of ours": result["instead"],
            "turns": str(result["turns"]),
            "takes, times as long": "{:.2f} [{:.2f}, {:.2f}]".format(*Ratio(**result["times_ours"])),
        }
        for result in results
    ]
    return f"""# Parts of a step: {options.model} at {IMAGE_SIZE} px, {conditions(options)}

Written by `benchmarks/parts.py`. Ratios of times taken in one run, in which all variants took turns in random order:
medians over the turns, in brackets 95 % intervals of the median.
{", ".join(f"{key} {value}" for key, value in described.items())}.

{markdown_table(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "parts")
    parser.add_argument("--model", default="vit_small_patch16_224", help="a ViT with patch 16 of timm")
    options = parser.parse_args()
    device = prepare(parser, options)

    model = vit(options.model).to(device)
    views = torch.randn(options.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    patches = GRID[0] * GRID[1]
    kept = random_subset(options.batch_size, patches, patches // 4, seed=0, device=device)
    groups = {name: part(model, views, kept) for name, part in PARTS.items()}
    times = interleaved_times(
        {name: variants for name, variants in groups.items() if variants},
        repeats=options.repeats,
        min_seconds=options.min_seconds,
        device=device,
        title="parts",
    )
    results = [
        {"part": name, "instead": variant, "turns": len(taken), "times_ours": ratio(taken, variants[OURS])._asdict()}
        for name, variants in ((name, times[name]) for name in groups if name in times)
        for variant, taken in sorted(variants.items())
        if variant != OURS
    ]
    described = environment(device)
    text = report(options, described, results)
    setup = {**setup_of(options), "model": options.model}
    write_report(options.output, text, {"environment": described, "setup": setup, "parts": results})
    print(text)


if __name__ == "__main__":
    main()
