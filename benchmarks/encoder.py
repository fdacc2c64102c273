"""How fast is a compressed encoder? Forward + backward of a ViT, over a grid of dropout and patch size.

Every figure is a ratio of times from one run. Each point of the grid compares, on the same weights:

- ours: the compressed model on full-size views;
- the native limit: the plain model on views so small that it has exactly as many tokens, with nothing to choose,
  to drop or to resample: nothing can be faster that runs the same blocks;
- timm: its own patch dropout (``patch_drop_rate``) and ``set_input_size(patch_size=...)`` on full-size views, the
  rate set such that it keeps exactly as many tokens (ViTs of others have nothing of the kind);
- uncompressed: the plain model on full-size views.

Then the price of a model that is compressed while no compression is active, in train and in eval mode: at the base
strategy ours, timm and the limit are all the plain model.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from measure import (
    Ratio,
    Step,
    Times,
    add_options,
    by_repeat,
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
from models import (
    IMAGE_SIZE,
    OF_OTHERS,
    PATCH_SIZE,
    any_native,
    any_vit,
    compiled,
    features,
    native_size,
    sharing_parameters,
)
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models.eva import Eva
from torch import Tensor, nn
from tqdm import tqdm

import seqcompress
from seqcompress import Strategy

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
ALL_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
DROPOUTS = (0.0, 0.5, 0.75, 0.9)
PATCH_SIZES = (16, 32, 56)


def train_step(model: nn.Module, views: Tensor, amp: bool, strategy: Strategy | None = None) -> None:
    """Forward + backward, at ``strategy`` if there is one; gradients are None between steps."""
    if strategy is not None:
        seqcompress.set_strategy(model, strategy)
    model.train()
    with torch.autocast(views.device.type, torch.bfloat16, enabled=amp):
        loss = features(model(views)).square().mean()
    loss.backward()
    model.zero_grad()


def eval_step(model: nn.Module, views: Tensor, amp: bool) -> None:
    """Forward in eval mode."""
    model.eval()
    with torch.no_grad(), torch.autocast(views.device.type, torch.bfloat16, enabled=amp):
        model(views)


def by_timm(model: nn.Module, patch_size: int, patches: int) -> nn.Module:
    """The model with timm's own means to get to this many patches."""
    own = sharing_parameters(model)
    own.set_input_size(patch_size=(patch_size, patch_size))
    of = own.patch_embed.num_patches
    if patches < of:
        patch_dropout = PatchDropoutWithIndices if isinstance(model, Eva) else PatchDropout
        own.patch_drop = patch_dropout(1 - (patches + 0.5) / of, num_prefix_tokens=own.num_prefix_tokens)
    return own


def grid(name: str, model: nn.Module) -> Iterator[tuple[Strategy, int]]:
    """The strategies to compare for a model, and the patches that each keeps."""
    prefix = seqcompress.num_tokens(model, Strategy(), IMAGE_SIZE) - ALL_PATCHES
    for patch_size, dropout in product(PATCH_SIZES, DROPOUTS):
        strategy = Strategy(dropout, patch_size)
        patches = seqcompress.num_tokens(model, strategy, IMAGE_SIZE) - prefix
        if name in OF_OTHERS and dropout:  # their positions need no interpolation where the limit's view is square
            of = seqcompress.num_tokens(model, Strategy(0.0, patch_size), IMAGE_SIZE) - prefix
            patches = round(math.sqrt(patches)) ** 2
            strategy = Strategy(round(1 - patches / of, 3), patch_size)
        if patches < ALL_PATCHES:
            yield strategy, patches


def steps_to_compare(
    name: str, model: nn.Module, options: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, Step]]:
    """The steps to compare: where no compression is active, and at every point of the grid, named by its strategy."""
    ready = partial(compiled, really=options.compile)
    idle, ours = (ready(seqcompress.compress(sharing_parameters(model), Strategy())) for _ in range(2))
    views = torch.randn(options.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    steps = {
        case: inactive_steps(mode, ready(model), idle, views[:size], options.amp)
        for case, (mode, size) in inactive(options.batch_size).items()
    }
    for strategy, patches in grid(name, model):
        size = native_size(patches)
        few = torch.randn(options.batch_size, 3, *size, device=device)
        steps[str(strategy)] = {
            "ours": partial(train_step, ours, views, options.amp, strategy),
            "native": partial(train_step, ready(any_native(name, model, size)), few, options.amp),
        }
        if name not in OF_OTHERS:
            own = by_timm(model, strategy.patch_size, patches)
            steps[str(strategy)]["timm"] = partial(train_step, ready(own), views, options.amp)
    return steps


def inactive(batch_size: int) -> dict[str, tuple[str, int]]:
    """Mode and batch size of each case without compression; the first is the uncompressed step of the grid."""
    return {
        f"train, forward + backward, batch {batch_size}": ("train", batch_size),
        "train, forward + backward, batch 1": ("train", 1),
        "eval, forward, batch 1": ("eval", 1),
    }


def inactive_steps(mode: str, plain: nn.Module, idle: nn.Module, views: Tensor, amp: bool) -> dict[str, Step]:
    """A step of the plain model, and of the compressed one while no compression is active."""
    step = {"train": train_step, "eval": eval_step}[mode]
    return {"plain": partial(step, plain, views, amp), "ours": partial(step, idle, views, amp)}


def narrow_steps(name: str, device: torch.device) -> dict[str, dict[str, Step]]:
    """The inactive steps of an encoder so narrow, on a view so small, that what is added to them can be seen."""
    plain = any_vit(name, native_size(1), narrow=True).to(device)
    idle = seqcompress.compress(sharing_parameters(plain), Strategy())
    view = torch.randn(1, 3, *native_size(1), device=device)
    return {mode: inactive_steps(mode, plain, idle, view, amp=False) for mode in ("train", "eval")}


def grid_results(
    model: nn.Module, times: Times, memory: Mapping[str, Mapping[str, int]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One record for each point of the grid."""
    base = next(iter(inactive(options.batch_size)))
    uncompressed = by_repeat(times[base]["plain"], options.repeats)
    results = []
    for point, variants in times.items():
        if "native" not in variants:
            continue
        strategy = Strategy.parse(point)
        results.append(
            {
                **strategy.to_dict(),
                "tokens": seqcompress.num_tokens(model, strategy, IMAGE_SIZE),
                "turns": len(variants["ours"]),
                "speedup": ratio(uncompressed, by_repeat(variants["ours"], options.repeats))._asdict(),
                "share_of_native_limit": ratio(variants["native"], variants["ours"])._asdict(),
                "peak_memory": {name: peak / memory[base]["plain"] for name, peak in memory[point].items()},
            }
        )
        if "timm" in variants:
            results[-1] |= {
                "timm_share_of_native_limit": ratio(variants["native"], variants["timm"])._asdict(),
                "speed_over_timm": ratio(variants["timm"], variants["ours"])._asdict(),
            }
    return results


def inactive_results(times: Times, narrow: Times, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each case without compression."""
    results = []
    for name, (mode, _) in inactive(options.batch_size).items():
        plain, ours = times[name]["plain"], times[name]["ours"]
        added = [after - before for before, after in zip(narrow[mode]["plain"], narrow[mode]["ours"], strict=True)]
        results.append(
            {
                "step": name,
                "turns": len(ours),
                "time": ratio(ours, plain)._asdict(),
                "added_microseconds": ratio(added, [1e-6] * len(added))._asdict(),
                "added_share": ratio(added, [statistics.median(plain)] * len(added))._asdict(),
            }
        )
    return results


def results_of(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything about one model."""
    model = any_vit(name).to(device)
    measure = partial(interleaved_times, repeats=options.repeats, min_seconds=options.min_seconds, device=device)
    narrow_times = measure(narrow_steps(name, device), title="inactive")
    steps = steps_to_compare(name, model, options, device)
    times = measure(steps, title="grid")
    memory = {
        point: {name: peak_memory(step, device) for name, step in variants.items()}
        for point, variants in tqdm(steps.items(), desc="memory", unit="group")
    }
    return {
        "active": grid_results(model, times, memory, options),
        "inactive": inactive_results(times, narrow_times, options),
    }


def report(options: argparse.Namespace, described: Mapping[str, str], models: Mapping[str, dict[str, Any]]) -> str:
    """The tables as Markdown."""
    sections = "\n".join(_section(name, results) for name, results in models.items())
    return f"""# Encoder: {", ".join(models)} at {IMAGE_SIZE} px, {conditions(options)}

Written by `benchmarks/encoder.py`. Ratios of times taken in one run, in which variants took turns in random order:
medians over the turns of each row, in brackets 95 % intervals of the median.
{", ".join(f"{key} {value}" for key, value in described.items())}.

Compression active, forward + backward:

- **speed-up**: over the uncompressed model, by the means of every repeat's turns.
- **share of the native limit**: our speed relative to that of the plain model on views so small that it has exactly
  as many tokens.
- **timm**: `patch_drop_rate` with `set_input_size(patch_size=...)`, keeping exactly as many tokens. Its patch size
  is for good: the kernel is resampled once, before training, not per step.
- **memory**: what a step has allocated at its peak, above weights and views, in percent of the uncompressed step's.
  Gradients are in it, which are as large as the weights, however few tokens there are.
- **turns**: how often each variant ran.

No compression active, at the base strategy:

- **time over the plain model's**: of the compressed model, measured directly.
- **added**: the same steps of an encoder of the same depth, but 32 wide and on views of one patch, so short that what
  the compressed model adds can be seen: some Python, whose time depends neither on width nor on the number of views.
  **Of the step**: how much that is of this row's median time.

{sections}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=MODELS, help=f"timm's names, or {' or '.join(OF_OTHERS)}")
    add_options(parser, "encoder")
    options = parser.parse_args()
    device = prepare(parser, options)

    models = {}
    for name in options.model:
        try:
            models[name] = results_of(name, options, device)
        except (ValueError, ImportError) as error:
            parser.error(str(error))
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
            "turns": str(point["turns"]),
            "speed-up": f"{point['speedup']['median']:.2f}x",
            "share of the native limit": percent(Ratio(**point["share_of_native_limit"])),
        }
        if "speed_over_timm" in point:
            row |= {
                "timm's share": percent(Ratio(**point["timm_share_of_native_limit"])),
                "speed over timm": f"{point['speed_over_timm']['median']:.2f}x",
            }
        row |= {f"memory, {name}": f"{100 * share:.1f} %" for name, share in point["peak_memory"].items()}
        rows.append(row)
    shares = [point["share_of_native_limit"]["median"] for point in results["active"]]
    overheads = [
        {
            "inactive": case["step"],
            "turns": str(case["turns"]),
            "time over the plain model's": percent(Ratio(*(bound - 1 for bound in case["time"].values())), 2),
            "added, microseconds": "{:.0f} [{:.0f}, {:.0f}]".format(*case["added_microseconds"].values()),
            "of the step": percent(Ratio(**case["added_share"]), 3),
        }
        for case in results["inactive"]
    ]
    return f"""## {name}

Share of the native limit: median over the grid {100 * statistics.median(shares):.1f} %,
least {100 * min(shares):.1f} %.

{markdown_table(rows)}

{markdown_table(overheads)}
"""


if __name__ == "__main__":
    main()
