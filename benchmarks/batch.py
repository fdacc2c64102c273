"""What does a batch buy that follows the length? Views a second of MoCo-v3 by stages, at one batch and at several.

While sequences are short, several batches have no more tokens than one of full sequences. Two things can be done with
them, and both are timed, in one run in which all variants take turns:

- **merge**: gradients of several batches are averaged for an update anyway, and the batches are run together. Time is
  that of forward and backward passes; the rest of an update is the same.
- **grow**: an update takes all of them. Time is that of whole steps: the optimizer and the momentum update, which do
  not depend on the batch, come once instead of several times.

Peak memory, above weights, optimizer state and views, is relative to that of the plain step at one batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from measure import (
    add_options,
    conditions,
    environment,
    interleaved_times,
    markdown_table,
    peak_memory,
    prepare,
    ratio,
    setup_of,
    write_report,
)
from models import IMAGE_SIZE
from recipes import Training, Views
from training_step import compressed, plain_training

import seqcompress
from seqcompress import Strategy
from seqcompress.encoders import find_encoder
from seqcompress.training.cost import batch_factor

STAGES = (Strategy(0.5, 32), Strategy(0.0, 32), Strategy(0.5), Strategy())


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A record for each stage."""
    encoder = find_encoder(
        plain_training("moco-v3", argparse.Namespace(**{**vars(options), "batch_size": 2}), device).student
    )
    stages = {stage: batch_factor(encoder, stage) for stage in STAGES}
    most = argparse.Namespace(**{**vars(options), "batch_size": options.batch_size * max(stages.values())})
    training = compressed(plain_training("moco-v3", most, device))
    variants = {
        (stage, factor, kind): _variant(training, stage, factor * options.batch_size, kind)
        for stage, fit in stages.items()
        for factor in dict.fromkeys((1, fit))
        for kind in ("merge", "grow")
    }
    names = {f"{stage}, {factor}, {kind}": run for (stage, factor, kind), run in variants.items()}
    times = interleaved_times(
        {"all": names}, repeats=options.repeats, min_seconds=options.min_seconds, device=device, title="batch"
    )["all"]
    plain = peak_memory(variants[Strategy(), 1, "grow"], device)
    records = []
    for stage, fit in stages.items():
        record: dict[str, Any] = {
            "strategy": str(stage),
            "tokens": seqcompress.num_tokens(training.student, stage, IMAGE_SIZE),
            "factor": fit,
            "memory": peak_memory(variants[stage, 1, "grow"], device) / plain,
            "memory_at_factor": peak_memory(variants[stage, fit, "grow"], device) / plain,
        }
        for kind in ("merge", "grow"):
            one, all_at_once = times[f"{stage}, 1, {kind}"], times[f"{stage}, {fit}, {kind}"]
            record[kind] = ratio([fit * seconds for seconds in one], all_at_once)._asdict()
        records.append(record)
    return records


def _variant(training: Training, strategy: Strategy, batch: int, kind: str) -> Callable[[], None]:
    views = Views(*([view[:batch] for view in views] for views in training.views))
    return partial(_run, replace(training, views=views), strategy, kind)


def _run(training: Training, strategy: Strategy, kind: str) -> None:
    seqcompress.set_strategy(training.student, strategy)
    if kind == "grow":
        training.step()
    else:
        training.backward()
        training.optimizer.zero_grad()


def report(options: argparse.Namespace, described: dict[str, str], records: list[dict[str, Any]]) -> str:
    """The table as Markdown."""

    def gain(values: dict[str, float]) -> str:
        return f"{values['median']:.2f}x [{values['low']:.2f}, {values['high']:.2f}]"

    rows = [
        {
            "stage": record["strategy"],
            "tokens": str(record["tokens"]),
            "batches at once": str(record["factor"]),
            "merge: views a second": gain(record["merge"]) if record["factor"] > 1 else "",
            "grow: views a second": gain(record["grow"]) if record["factor"] > 1 else "",
            "memory at one": f"{100 * record['memory']:.0f} %",
            "at all": f"{100 * record['memory_at_factor']:.0f} %",
        }
        for record in records
    ]
    return f"""# Batch that follows the length: MoCo-v3, {options.model} at {IMAGE_SIZE} px, {conditions(options)}

Written by `benchmarks/batch.py`, which says what is timed. Views a second are relative to the same stage at one batch,
medians over turns, in brackets 95 % intervals of the median; memory is relative to the plain step at one batch.
{", ".join(f"{key} {value}" for key, value in described.items())}.

{markdown_table(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a ViT with patch 16 of timm")
    add_options(parser, "batch")
    options = parser.parse_args()
    device = prepare(parser, options)
    described = environment(device)
    records = measure(options, device)
    text = report(options, described, records)
    write_report(
        options.output,
        text,
        {"environment": described, "setup": setup_of(options) | {"model": options.model}, "stages": records},
    )
    print(text)


if __name__ == "__main__":
    main()
