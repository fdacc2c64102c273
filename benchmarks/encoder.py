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
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from measure import (
    Ratio,
    Step,
    Times,
    add_options,
    conditions,
    environment,
    interleaved_times,
    markdown_table,
    peak_memory,
    percent,
    prepare,
    ratio,
    setup_of,
    write_report,
)
from models import IMAGE_SIZE, compiled, native, native_size, sharing_parameters, vit
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import seqcompress
from seqcompress import Strategy

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
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


def by_timm(model: VisionTransformer, patch_size: int, patches: int) -> VisionTransformer:
    """The model with timm's own means to get to this many patches."""
    own = sharing_parameters(model)
    own.set_input_size(patch_size=(patch_size, patch_size))
    of = own.patch_embed.num_patches
    if patches < of:
        own.patch_drop = PatchDropout(1 - (patches + 0.5) / of, num_prefix_tokens=own.num_prefix_tokens)
    return own


def grid_steps(
    model: VisionTransformer, options: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, Step]]:
    """The steps to compare at every point of the grid, and the uncompressed one."""
    ready = partial(compiled, really=options.compile)
    views = torch.randn(options.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    ours = ready(seqcompress.compress(sharing_parameters(model), Strategy()))
    steps: dict[str, dict[str, Step]] = {
        "base": {"uncompressed": partial(train_step, ready(model), views, options.amp)}
    }
    for patch_size in PATCH_SIZES:
        for dropout in DROPOUTS:
            strategy = Strategy(dropout, patch_size)
            patches = seqcompress.num_tokens(model, strategy, IMAGE_SIZE) - model.num_prefix_tokens
            size = native_size(patches)
            few = torch.randn(options.batch_size, 3, *size, device=device)
            steps[str(strategy)] = {
                "ours": partial(train_step, ours, views, options.amp, strategy),
                "native": partial(train_step, ready(native(model, size)), few, options.amp),
                "timm": partial(train_step, ready(by_timm(model, patch_size, patches)), views, options.amp),
            }
    return steps


def inactive_steps(
    model: VisionTransformer, options: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, Step]]:
    """Plain and compressed model while no compression is active, for one batch and for a single view."""
    ready = partial(compiled, really=options.compile)
    plain, ours = ready(model), ready(seqcompress.compress(sharing_parameters(model), Strategy()))
    steps: dict[str, dict[str, Step]] = {}
    for size in sorted({options.batch_size, 1}, reverse=True):
        views = torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        for mode, step in (("train, forward + backward", train_step), ("eval, forward", eval_step)):
            steps[f"{mode}, batch {size}"] = {
                "plain": partial(step, plain, views, options.amp),
                "ours": partial(step, ours, views, options.amp),
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


def results_of(model: VisionTransformer, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything about one model."""
    measure = partial(interleaved_times, repeats=options.repeats, min_seconds=options.min_seconds, device=device)
    inactive_times = measure(inactive_steps(model, options, device), title="inactive")
    points = grid_steps(model, options, device)
    times = measure(points, title="grid")
    memory = {}
    if device.type == "cuda":
        memory = {
            name: {key: peak_memory(step, device) for key, step in steps.items()} for name, steps in points.items()
        }
    return {
        "active": grid_results(model, times, memory),
        "inactive": {
            name: ratio(variants["ours"], variants["plain"])._asdict() for name, variants in inactive_times.items()
        },
    }


def report(options: argparse.Namespace, described: Mapping[str, str], models: Mapping[str, dict[str, Any]]) -> str:
    """The tables as Markdown."""
    memory_note = (
        "\n- **memory**: what a step allocates at its peak, above the weights, relative to the uncompressed step."
        if options.device.startswith("cuda")
        else ""
    )
    sections = "\n".join(_section(name, results) for name, results in models.items())
    return f"""# Encoder: {", ".join(models)} at {IMAGE_SIZE} px, {conditions(options)}

Written by `benchmarks/encoder.py`. Ratios of times taken in one run, in which all variants took turns in random order:
medians of {options.repeats} repeats, in brackets 95 % intervals of the median.
{", ".join(f"{key} {value}" for key, value in described.items())}.

Compression active, forward + backward:

- **speed-up**: over the uncompressed model.
- **share of the native limit**: our speed relative to that of the plain model on views so small that it has exactly
  as many tokens.
- **timm**: `patch_drop_rate` with `set_input_size(patch_size=...)`, keeping exactly as many tokens. Its patch size
  is for good: the kernel is resampled once, before training, not per step.{memory_note}

No compression active: how much more time the compressed model takes than the plain one, at the base strategy.

{sections}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=MODELS, help="ViTs with patch 16 of timm")
    add_options(parser, "encoder")
    options = parser.parse_args()
    device = prepare(parser, options)

    models = {}
    for name in options.model:
        try:
            model = vit(name).to(device)
        except ValueError as error:
            parser.error(str(error))
        models[name] = results_of(model, options, device)
        torch.compiler.reset()  # compiled code holds on to the models that it is for
    described = environment(device)
    text = report(options, described, models)
    setup = {"image_size": IMAGE_SIZE, **setup_of(options)}
    write_report(options.output, text, {"environment": described, "setup": setup, "models": models})
    print(text)


def _section(name: str, results: dict[str, Any]) -> str:
    rows = []
    for point in results["active"]:
        row = {
            "dropout": f"{point['token_dropout']:g}",
            "patch": str(point["patch_size"]),
            "tokens": str(point["tokens"]),
            "speed-up": f"{point['speedup']['median']:.2f}x",
            "share of the native limit": percent(Ratio(**point["share_of_native_limit"])),
            "timm's share": percent(Ratio(**point["timm_share_of_native_limit"])),
            "speed over timm": f"{point['speed_over_timm']['median']:.2f}x",
        }
        if "peak_memory" in point:
            row |= {f"memory, {name}": f"{100 * share:.1f} %" for name, share in point["peak_memory"].items()}
        rows.append(row)
    shares = [point["share_of_native_limit"]["median"] for point in results["active"]]
    overheads = [
        {"inactive": name, "time over the plain model's": percent(Ratio(*(bound - 1 for bound in more.values())), 2)}
        for name, more in results["inactive"].items()
    ]
    return f"""## {name}

Share of the native limit: median over the grid {100 * statistics.median(shares):.1f} %,
least {100 * min(shares):.1f} %.

{markdown_table(rows)}

{markdown_table(overheads)}
"""


if __name__ == "__main__":
    main()
