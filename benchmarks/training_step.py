"""How fast is a whole training step? MoCo-v3, SimCLR and DINO with a ViT, plain and under several strategies.

Compression makes encoders faster and nothing else, so Amdahl's law says how fast a step can become: as fast as if
student and teacher were plain ViTs with natively as many tokens, and heads, loss, optimizer and momentum update took
what they take in the plain step. All of it is measured in one run, in which all variants take turns:

- whole steps, plain and under each strategy;
- the same steps in parts, for the breakdown;
- student and teacher alone, as plain ViTs on views so small that they have exactly as many tokens.

With ``--host solo-learn``, whole steps of solo-learn's own methods and configs instead, in its Trainer.

The views are ready on the device: benchmarks/views.py and benchmarks/end_to_end.py are about making them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import solo_learn_step
import torch
from lightly.models.utils import deactivate_requires_grad
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
    peak_memory,
    percent,
    prepare,
    ratio,
    setup_of,
    write_report,
)
from models import IMAGE_SIZE, compiled, native, native_size, sharing_parameters, vit
from recipes import DINO, PARTS, MoCoV3, Recipe, SimCLR, Training, Views
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import seqcompress
from seqcompress import Strategy

TITLES = {"moco-v3": "MoCo-v3", "simclr": "SimCLR", "dino": "DINO"}
STRATEGIES = ("drop 0.5", "drop 0.75", "patch 32", "drop 0.5, patch 32")
ENCODERS = ("student", "teacher")


def plain_training(method: str, options: argparse.Namespace, device: torch.device, **settings: Any) -> Training:
    """A method without compression; ``settings`` are those of the ViT."""
    student = vit(options.model, dynamic_img_size=method == "dino", **settings).to(device)
    recipe: Recipe
    if method == "moco-v3":
        recipe = MoCoV3(student.embed_dim)
    elif method == "simclr":
        recipe = SimCLR(student.embed_dim)
    else:
        recipe = DINO(student.embed_dim, options.dino_dim)
    recipe.to(device)
    views = recipe.views(options.batch_size, device)
    teacher = None
    if views.teacher:
        teacher = copy.deepcopy(student)
        deactivate_requires_grad(teacher)
    trained = [
        parameter for module in (student, recipe) for parameter in module.parameters() if parameter.requires_grad
    ]
    # Weights stay about where they are, however often a step is repeated.
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.05)
    return Training(recipe, student, teacher, optimizer, views, options.amp)


def compressed(training: Training) -> Training:
    """The same training, of the same parameters, with encoders that are compressed."""
    student, teacher = (None if encoder is None else sharing_parameters(encoder) for encoder in _encoders(training))
    assert student is not None
    seqcompress.compress(student, Strategy(), teacher=teacher)
    return replace(training, student=student, teacher=teacher)


def natively_short(training: Training, strategy: Strategy) -> Training:
    """The same training, of the same blocks, with encoders and views that have so few tokens by nature."""
    shortened: list[VisionTransformer | None] = []
    noise: list[list[Tensor]] = []
    for encoder, views, seen in zip(_encoders(training), training.views, _seen(strategy), strict=True):
        sizes = [] if encoder is None else [native_size(patches) for patches in _patches(encoder, seen, views)]
        shortened.append(None if encoder is None else native(encoder, sizes[0]))
        noise.append(
            [torch.randn(len(view), 3, *size, device=view.device) for view, size in zip(views, sizes, strict=True)]
        )
    student, teacher = shortened
    assert student is not None
    return replace(training, student=student, teacher=teacher, views=Views(*noise))


def steps_to_compare(
    training: Training, strategies: Sequence[Strategy], compile_encoders: bool, device: torch.device
) -> dict[str, Step]:
    """Everything that takes turns."""

    def ready(training: Training) -> Training:
        for encoder in _encoders(training):
            if encoder is not None:
                compiled(encoder, really=compile_encoders)
        return training

    plain, ours = ready(training), ready(compressed(training))
    steps: dict[str, Step] = {
        "base": plain.step,
        "base, in parts": InParts(plain.step_in_parts, Stopwatch(device)),
    }
    for strategy in strategies:
        short = ready(natively_short(training, strategy))
        steps[str(strategy)] = partial(_step_under, strategy, ours)
        steps[f"{strategy}, in parts"] = InParts(partial(_step_in_parts_under, strategy, ours), Stopwatch(device))
        steps[f"{strategy}, native"] = InParts(short.encoders_in_parts, Stopwatch(device))
    return steps


def measure(method: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything about one method."""
    if options.host == "solo-learn":
        return solo_learn_step.measure(method, options.strategies, options, device)
    training = plain_training(method, options, device)
    steps = steps_to_compare(training, options.strategies, options.compile, device)
    times = interleaved_times(
        {method: steps}, repeats=options.repeats, min_seconds=options.min_seconds, device=device, title=method
    )[method]
    names = [name for name, step in steps.items() if not isinstance(step, InParts)]
    memory = {name: peak_memory(steps[name], device) for name in names}
    return results_of(training, options.strategies, times, memory)


def results_of(
    training: Training, strategies: Sequence[Strategy], times: Mapping[str, list[float]], memory: Mapping[str, int]
) -> dict[str, Any]:
    """Breakdown of the plain step, and for each strategy what it gains of what it could."""
    base = _parts(times, "base, in parts")
    base_total = _sum(base.values())
    rest = _sum(seconds for part, seconds in base.items() if part not in ENCODERS)

    def breakdown(parts: Mapping[str, list[float]], whole: list[float]) -> dict[str, Any]:
        total = _sum(parts.values())
        return {
            "parts": {part: ratio(seconds, total)._asdict() for part, seconds in parts.items()},
            "parts_of_base_step": {part: ratio(seconds, base_total)._asdict() for part, seconds in parts.items()},
            "parts_together_over_whole": ratio(total, whole)._asdict(),
        }

    records = []
    for strategy in strategies:
        name = str(strategy)
        parts = _parts(times, f"{name}, in parts")
        limit = _parts(times, f"{name}, native")
        least = _sum([rest, *limit.values()])
        encoders = {
            role: (encoder, seen, views)
            for role, encoder, seen, views in zip(
                ENCODERS, _encoders(training), _seen(strategy), training.views, strict=True
            )
            if encoder is not None
        }
        records.append(
            {
                "strategy": name,
                **strategy.to_dict(),
                "tokens": {
                    role: [patches + encoder.num_prefix_tokens for patches in _patches(encoder, seen, views)]
                    for role, (encoder, seen, views) in encoders.items()
                },
                "speedup": ratio(times["base"], times[name])._asdict(),
                "amdahl_limit": ratio(times["base"], least)._asdict(),
                "share_of_amdahl_limit": ratio(least, times[name])._asdict(),
                "share_of_native_limit": {role: ratio(limit[role], parts[role])._asdict() for role in encoders},
                "peak_memory": memory[name] / memory["base"],
                **breakdown(parts, times[name]),
            }
        )
    return {"turns": len(times["base"]), "base": breakdown(base, times["base"]), "strategies": records}


def report(options: argparse.Namespace, described: Mapping[str, str], methods: Mapping[str, dict[str, Any]]) -> str:
    """The tables as Markdown."""
    titled = {TITLES[method]: results for method, results in methods.items()}
    if options.host == "solo-learn":
        return solo_learn_step.report(options, described, titled)
    shares = [
        record["share_of_amdahl_limit"]["median"] for method in methods.values() for record in method["strategies"]
    ]
    sections = "\n".join(_section(title, results, options) for title, results in titled.items())
    return f"""# Training step: {options.model} at {IMAGE_SIZE} px, {conditions(options)}

Written by `benchmarks/training_step.py`. Ratios of times taken in one run, in which all variants took turns in random
order: medians over the turns, in brackets 95 % intervals of the median.
{", ".join(f"{key} {value}" for key, value in described.items())}.

Heads and losses are Lightly's, at the sizes of the papers; the optimizer is AdamW as torch sets it up (all parameters
at once on CUDA, one after the other on a CPU). Views are ready on the device. Token dropout is the student's, patch
size both encoders'.

- **speed-up**: of the whole step, over the plain one.
- **Amdahl's limit**: the speed-up if student and teacher took the time of plain ViTs with natively as many tokens, and
  everything else what it takes in the plain step. **Share of it**: median of all
  {100 * statistics.median(shares):.1f} %, least {100 * min(shares):.1f} %.
- **student, teacher**: their speed relative to those plain ViTs.
- **memory**: what a step has allocated at its peak, above weights, optimizer state and views, in percent of the plain
  step's. Gradients are in it, which are as large as the weights, however few tokens there are.
- The second table says where the time goes: each part in percent of its own step.

{sections}"""


def _section(title: str, results: dict[str, Any], options: argparse.Namespace) -> str:
    gains, breakdowns = [], [{"step": "base", "time, of the plain step's": "100 %"} | _shares(results["base"])]
    for record in results["strategies"]:
        tokens = {role: " + ".join(map(str, numbers)) for role, numbers in record["tokens"].items()}
        gain = {
            "strategy": record["strategy"],
            "tokens": " / ".join(tokens.values()),
            "speed-up": f"{record['speedup']['median']:.2f}x",
            "Amdahl's limit": f"{record['amdahl_limit']['median']:.2f}x",
            "share of it": percent(Ratio(**record["share_of_amdahl_limit"])),
        }
        gain |= {role: percent(Ratio(**share)) for role, share in record["share_of_native_limit"].items()}
        gain["memory"] = f"{100 * record['peak_memory']:.1f} %"
        gains.append(gain)
        time = f"{100 / record['speedup']['median']:.1f} %"
        breakdowns.append({"step": record["strategy"], "time, of the plain step's": time} | _shares(record))
    views = "two views of 224 px"
    if title == TITLES["dino"]:
        views += f" and six of 96 px; {options.dino_dim} outputs of its head"
    return f"""## {title}

{views.capitalize()}. {results["turns"]} turns.

{markdown_table(gains)}

{markdown_table(breakdowns)}
"""


def _shares(breakdown: Mapping[str, Any]) -> dict[str, str]:
    return {part: f"{100 * share['median']:.1f} %" for part, share in breakdown["parts"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=("lightly", "solo-learn"), default="lightly", help="whose training steps")
    parser.add_argument("--model", default="vit_small_patch16_224", help="a ViT with patch 16 of timm; Lightly only")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=[*TITLES])
    parser.add_argument("--strategies", nargs="+", type=Strategy.parse, default=[*map(Strategy.parse, STRATEGIES)])
    parser.add_argument("--dino-dim", type=int, default=65536, help="outputs of DINO's head; Lightly only")
    add_options(parser, "training_step")
    options = parser.parse_args()
    if options.host == "solo-learn":
        options.name = "training_step-solo-learn"
        if options.compile:
            parser.error("--compile must be left out for --host solo-learn, which compiles nothing")
    device = prepare(parser, options)

    described = {**environment(device), options.host: _version_of(options.host)}
    setup = {"image_size": IMAGE_SIZE, "host": options.host, **setup_of(options)}
    if options.host == "lightly":
        setup |= {"model": options.model, "dino_dim": options.dino_dim}
    methods: dict[str, dict[str, Any]] = {}
    for method in options.methods:
        torch.manual_seed(0)
        try:
            methods[method] = measure(method, options, device)
        except (ValueError, ModuleNotFoundError) as error:
            parser.error(str(error))
        torch.compiler.reset()  # compiled code holds on to the models that it is for
        # After every method, so that a long run which is stopped leaves what it has.
        text = report(options, described, methods)
        write_report(options.output, text, {"environment": described, "setup": setup, "methods": methods})
    print(text)


def _version_of(host: str) -> str:
    try:
        return version(host)
    except PackageNotFoundError:  # on the path, but not installed
        return "from its source"


def _encoders(training: Training) -> tuple[VisionTransformer, VisionTransformer | None]:
    """Student and teacher, for mypy."""
    student, teacher = training.student, training.teacher
    assert isinstance(student, VisionTransformer)
    assert isinstance(teacher, VisionTransformer | None)
    return student, teacher


def _seen(strategy: Strategy) -> tuple[Strategy, Strategy]:
    """What of a strategy student and teacher get."""
    return strategy, strategy.without_dropout()


def _patches(encoder: VisionTransformer, strategy: Strategy, views: Sequence[Tensor]) -> list[int]:
    """How many patches of each of these views, (B, 3, S, S), reach the blocks."""
    prefix = encoder.num_prefix_tokens
    return [seqcompress.num_tokens(encoder, strategy, view.shape[-1]) - prefix for view in views]


def _step_under(strategy: Strategy, training: Training) -> None:
    seqcompress.set_strategy(training.student, strategy)
    training.step()


def _step_in_parts_under(strategy: Strategy, training: Training, stopwatch: Stopwatch) -> None:
    with stopwatch.part("student"):
        seqcompress.set_strategy(training.student, strategy)
    training.step_in_parts(stopwatch)


def _parts(times: Mapping[str, list[float]], name: str) -> dict[str, list[float]]:
    return {part: times[f"{name}: {part}"] for part in PARTS if f"{name}: {part}" in times}


def _sum(parts: Any) -> list[float]:
    """Seconds of several parts together, repeat by repeat."""
    return [sum(seconds) for seconds in zip(*parts, strict=True)]


if __name__ == "__main__":
    main()
