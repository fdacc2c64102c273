"""What an online schedule has measured and decided, and how it is read back from a checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqcompress.checks import checked_count
from seqcompress.encoders import CompressedPatchEmbed, Forward
from seqcompress.gradients.report import GradientErrorReport
from seqcompress.json_files import json_text
from seqcompress.messages import described
from seqcompress.strategy import Strategy
from seqcompress.training.cost import sequence_length

__all__ = [
    "MeasuredBatch",
    "OnlineDecision",
    "checked_flops",
    "read_begun",
    "read_decision",
    "read_events",
    "read_list",
    "read_sketches",
]


@dataclass(frozen=True)
class OnlineDecision:
    """One decision of an [OnlineScheduler][seqcompress.OnlineScheduler].

    Attributes:
        step: training steps that were done.
        before: the strategy until then.
        after: the strategy from then on; the same one if nothing was surely better.
        report: what was measured: CA-MSE and more of the neighbours and the base, with intervals.
        share: FLOPs of all measuring so far, relative to those of all training so far.
    """

    step: int
    before: Strategy
    after: Strategy
    report: GradientErrorReport
    share: float

    def chance(self, strategy: Strategy) -> float:
        """Probability that a strategy's CA-MSE is less than that of ``before``, compared batch by batch."""
        return (self.report[self.before].ca_mse_estimate - self.report[strategy].ca_mse_estimate).chance_of_positive

    def __str__(self) -> str:
        name = f"{self.report.shown_prefix}ca_mse"
        kind = "relative CA-MSE" if self.report.shown_prefix else "CA-MSE"
        errors = []
        for entry in sorted(self.report.entries, key=lambda entry: entry.cost):
            low, high = getattr(entry, f"{name}_interval")
            errors.append(f"{entry.strategy!s} {getattr(entry, name):.3g} ({low:.3g} to {high:.3g})")
        verb = f"{self.before!s} -> {self.after!s}" if self.after != self.before else f"stay at {self.before!s}"
        return f"step {self.step}: {verb}; {kind} {', '.join(errors)}; {self.share:.2%} of the compute spent"


class MeasuredBatch(NamedTuple):
    """One batch that was measured: sketch of the gradient and FLOPs, by strategy."""

    sketches: dict[Strategy, Tensor]
    flops: dict[Strategy, float]


def checked_flops(value: Any, name: str, above: float = -1.0) -> float:
    """A number of FLOPs: more than all machines will ever do would overflow when it is added up or divided."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not max(above, 0) <= value <= 1e40:
        raise ValueError(f"{name} must be a number from 0 to 1e40, got {described(value)}")
    if value <= above:
        raise ValueError(f"{name} must be above {above:g}, got {described(value)}")
    return float(value)


def read_list(text: Any, name: str) -> list[Any]:
    """What JSON text of a list holds."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be JSON text, got {described(text)}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} must be JSON text of a list, got other text") from None
    if not isinstance(content, list):
        raise ValueError(f"{name} must be JSON text of a list, got {described(content)}")
    return content


def read_decision(fields: Mapping[str, Any], last_step: int) -> OnlineDecision:
    """One decision, made at a step that is done."""
    step = checked_count(fields["step"], "decisions' step", at_least=0)
    if step > last_step:
        raise ValueError(f"decisions' step must be at most last_step, got {step} after {last_step}")
    share = fields["share"]
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1e40:
        raise ValueError(f"decisions' share must be a number of at least 0, got {described(share)}")
    return OnlineDecision(
        step=step,
        before=Strategy.parse(fields["before"]),
        after=Strategy.parse(fields["after"]),
        report=GradientErrorReport.from_json(json_text(fields["report"], "decisions' report")),
        share=float(share),
    )


def read_begun(fields: list[Any], embeds: Sequence[CompressedPatchEmbed]) -> list[Counter[Forward]]:
    """Forwards of a step that was broken off, an encoder each: (B, C, H, W), tokens, two truth values, calls."""
    tallies: list[Counter[Forward]] = []
    for embed, entries in zip(embeds, fields, strict=False):
        tallies.append(Counter())
        for view, tokens, graph, masked, calls in entries:
            batch, channels, height, width = view
            sizes = (batch, channels, height, width, tokens, calls)
            if not (
                all(isinstance(size, int) and 0 <= size < 2**31 for size in sizes)
                and isinstance(graph, bool)
                and isinstance(masked, bool)
                and max(height, width) <= 2**16
                and 1 <= tokens <= sequence_length(embed.encoder, Strategy(), (height, width))
            ):
                raise ValueError(f"begun must be a step's forwards, got one of {described(sizes)}")
            tallies[-1][Forward((batch, channels, height, width), tokens, graph, masked)] += calls
    if len(fields) != len(embeds):
        raise ValueError(f"begun must be a step's forwards, got those of {len(fields)} encoders")
    return tallies


def read_sketches(sketches: Any, shape: tuple[int, ...]) -> Tensor:
    """Gradients' sketches, a strategy and batch each."""
    if not isinstance(sketches, Tensor) or sketches.shape != torch.Size(shape) or not sketches.is_floating_point():
        got = f"shape {tuple(sketches.shape)}" if isinstance(sketches, Tensor) else described(sketches)
        raise ValueError(f"sketches must be a tensor of shape {shape}, got {got}")
    if not bool(sketches.isfinite().all()):
        raise ValueError("sketches must be finite, got infinite values or NaN")
    return sketches.detach().cpu()


def read_events(fields: list[Any], sketches: Tensor) -> list[MeasuredBatch]:
    """The batches of an open decision: their strategies and FLOPs, beside their sketches."""
    if len(fields) > len(sketches):
        raise ValueError(f"events must be at most {len(sketches)}, got {len(fields)}")
    events = []
    for entry, rows in zip(fields, sketches, strict=False):
        strategies, flops = list(map(Strategy.parse, entry["sketches"])), entry["flops"]
        if not isinstance(flops, list) or len(flops) != len(strategies) or len(strategies) > len(rows):
            raise ValueError(f"events' flops must be one number a strategy, got {described(flops)}")
        numbers = [checked_flops(value, "events' flops", above=0.0) for value in flops]
        events.append(
            MeasuredBatch(
                {strategy: row.clone() for strategy, row in zip(strategies, rows, strict=False)},
                dict(zip(strategies, numbers, strict=True)),
            )
        )
    return events
