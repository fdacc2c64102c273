"""Where does the time of an encoder go while tokens are dropped, and what is left to gain?

Forward + backward at the model's own patch size, of ours, of timm's ``patch_drop_rate`` and of the plain ViT that has
so few tokens by nature, each cut in front of the first block:

- front: patches are embedded and get their positions, some are dropped;
- blocks: everything behind.

The blocks are the same for all three, so the native ViT's front is the least there can be. Of our front, choosing the
subset and embedding the patches that stay are timed by themselves as well, and so is timm's embedding of all patches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from encoder import by_timm
from measure import (
    InParts,
    Ratio,
    Step,
    Stopwatch,
    add_options,
    conditions,
    environment,
    interleaved_times,
    markdown_table,
    percent,
    prepare,
    ratio,
    setup_of,
    write_report,
)
from models import IMAGE_SIZE, PATCH_SIZE, native, native_size, sharing_parameters, vit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import seqcompress
from seqcompress import Strategy
from seqcompress.compressors import random_subset
from seqcompress.compressors.token_dropout import gather_patches, rows_of_patches

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
DROPOUTS = (0.75, 0.9)
WHOLE = ("ours", "timm", "native")


def train_in_parts(model: VisionTransformer, views: Tensor, amp: bool, stopwatch: Stopwatch) -> None:
    """Forward + backward, cut in front of the blocks."""
    autocast = partial(torch.autocast, views.device.type, torch.bfloat16, enabled=amp)
    with stopwatch.part("front"), autocast():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(views))))
    with stopwatch.part("blocks"):
        cut = tokens.detach().requires_grad_()
        with autocast():
            loss = model.forward_head(model.norm(model.blocks(cut))).square().mean()
        loss.backward()
    with stopwatch.part("front"):
        tokens.backward(cut.grad)
    model.zero_grad()


def embed(model: VisionTransformer, tokens: Callable[[], Tensor], amp: bool) -> None:
    """Forward + backward of an embedding alone."""
    with torch.autocast(model.pos_embed.device.type, torch.bfloat16, enabled=amp):
        embedded = tokens()
    embedded.backward(torch.ones_like(embedded))
    model.zero_grad()


def steps_to_compare(
    model: VisionTransformer, dropout: float, options: argparse.Namespace, device: torch.device
) -> dict[str, Step]:
    """Everything at one point of the grid that takes turns."""
    strategy, grid, patch = Strategy(dropout), model.patch_embed.grid_size, (PATCH_SIZE, PATCH_SIZE)
    total, kept = (
        seqcompress.num_tokens(model, s, IMAGE_SIZE) - model.num_prefix_tokens for s in (Strategy(), strategy)
    )
    views = torch.randn(options.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    few = torch.randn(options.batch_size, 3, *native_size(kept), device=device)
    ours = seqcompress.compress(sharing_parameters(model), strategy)
    whole = {"ours": (ours, views), "timm": (by_timm(model, PATCH_SIZE, kept), views)}
    whole["native"] = (native(model, native_size(kept)), few)

    seeds, proj = count(), model.patch_embed.proj
    rows = rows_of_patches(views.shape[1], grid, patch, device)

    def subset() -> Tensor:
        return random_subset(len(views), total, kept, seed=next(seeds), device=device)

    def kept_patches(subset: Tensor) -> Tensor:
        return F.linear(gather_patches(views, subset, rows, patch).flatten(2), proj.weight.flatten(1), proj.bias)

    return {
        **{
            name: InParts(partial(train_in_parts, encoder.train(), seen, options.amp), Stopwatch(device))
            for name, (encoder, seen) in whole.items()
        },
        "subset": subset,
        "ours, embedding": partial(embed, model, partial(kept_patches, subset()), options.amp),
        "timm, embedding": partial(embed, model, partial(model.patch_embed, views), options.amp),
    }


def results_of(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Shares of time at one point of the grid."""
    ours, timm, limit = (times[name] for name in WHOLE)
    return {
        "turns": len(ours),
        "front": {name: ratio(times[f"{name}: front"], times[name])._asdict() for name in WHOLE},
        "ours": {
            "subset": ratio(times["subset"], ours)._asdict(),
            "embedding": ratio(times["ours, embedding"], ours)._asdict(),
        },
        "timm": {"embedding": ratio(times["timm, embedding"], timm)._asdict()},
        "share_of_native_limit": {"ours": ratio(limit, ours)._asdict(), "timm": ratio(limit, timm)._asdict()},
        "most_to_gain_over_timm": ratio(
            timm, [sum(parts) for parts in zip(times["timm: blocks"], times["native: front"], strict=True)]
        )._asdict(),
    }


def report(options: argparse.Namespace, described: Mapping[str, str], results: list[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    fronts, gains = [], []
    for result in results:
        point = {"model": result["model"], "dropout": f"{result['token_dropout']:g}", "turns": str(result["turns"])}
        fronts.append(
            {
                **point,
                "front, native": percent(Ratio(**result["front"]["native"])),
                "front, timm": percent(Ratio(**result["front"]["timm"])),
                "embedding all": percent(Ratio(**result["timm"]["embedding"])),
                "front, ours": percent(Ratio(**result["front"]["ours"])),
                "embedding the kept": percent(Ratio(**result["ours"]["embedding"])),
                "subset": percent(Ratio(**result["ours"]["subset"])),
            }
        )
        gained = (bound - 1 for bound in result["most_to_gain_over_timm"].values())
        gains.append(
            {
                **point,
                "timm's share of the native limit": percent(Ratio(**result["share_of_native_limit"]["timm"])),
                "ours": percent(Ratio(**result["share_of_native_limit"]["ours"])),
                "faster than timm at most by": percent(Ratio(*gained)),
            }
        )
    return f"""# Where an encoder's time goes, at {IMAGE_SIZE} px and patches of {PATCH_SIZE} px, {conditions(options)}

Written by `benchmarks/breakdown.py`. Ratios of times taken in one run, in which all variants took turns in random
order: medians over the turns, in brackets 95 % intervals of the median.
{", ".join(f"{key} {value}" for key, value in described.items())}.

Forward + backward, in percent of its own step, for the plain ViT that has so few tokens by nature, timm's
`patch_drop_rate` and ours:

- **front**: patches are embedded and get their positions, some are dropped; all but the blocks and what follows them.
- **embedding all, the kept**: of timm's front and of ours, the embedding; timed by itself.
- **subset**: of our front, choosing what stays; timed by itself.

{markdown_table(fronts)}

What remains to be gained: timm's blocks, with the native ViT's front in place of timm's, would be faster than timm by

{markdown_table(gains)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=MODELS, help="ViTs with patch 16 of timm")
    add_options(parser, "breakdown")
    options = parser.parse_args()
    if options.compile:
        parser.error("--compile must be left out: cut in front of the blocks, they are what they were")
    device = prepare(parser, options)

    results = []
    for name in options.model:
        try:
            model = vit(name).to(device)
        except ValueError as error:
            parser.error(str(error))
        times = interleaved_times(
            {str(Strategy(dropout)): steps_to_compare(model, dropout, options, device) for dropout in DROPOUTS},
            repeats=options.repeats,
            min_seconds=options.min_seconds,
            device=device,
            title=name,
        )
        for point, found in times.items():
            strategy = Strategy.parse(point)
            tokens = seqcompress.num_tokens(model, strategy, IMAGE_SIZE)
            results.append({"model": name, **strategy.to_dict(), "tokens": tokens, **results_of(found)})
    described = environment(device)
    text = report(options, described, results)
    write_report(options.output, text, {"environment": described, "setup": setup_of(options), "breakdown": results})
    print(text)


if __name__ == "__main__":
    main()
