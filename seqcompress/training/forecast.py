"""What a run will take under a plan, before it begins: tokens and cost, step by step and in all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from textwrap import shorten
from typing import TYPE_CHECKING

from torch import nn

from seqcompress.checks import checked_count
from seqcompress.compression import Plan, check_plan_for, check_roles, resolve_plan
from seqcompress.encoders import find_encoder
from seqcompress.schedules import Constant, Schedule
from seqcompress.strategy import Strategy
from seqcompress.training.cost import StepCosts, ViewCosts, sequence_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CostMap", "Forecast", "Stage", "cost_map", "forecast", "plot_schedule"]

_LOOKED_AT = 10_000  # steps of a run at which a schedule is asked, at most
_LONGEST_NAME = 50  # of a plan, in letters
_ROWS = 11  # of a schedule that changes at every step, those that are shown


@dataclass(frozen=True)
class Stage:
    """Steps of a run that are alike.

    Attributes:
        first: number of steps done where it begins.
        steps: how many it has.
        strategy: the student's.
        tokens: of a view of the student, prefix tokens included.
        teacher_tokens: of a view of the teacher; None without one.
        cost: of one step's encoders, relative to the plain run's.
    """

    first: int
    steps: int
    strategy: Strategy
    tokens: int
    teacher_tokens: int | None
    cost: float


@dataclass(frozen=True)
class Forecast:
    """A run under a plan.

    Attributes:
        name: of the plan.
        stages: from the first step to the last.
        full: the plain run, as one stage of as many steps.
        view: height and width of the view, in pixels.
    """

    name: str
    stages: tuple[Stage, ...]
    full: Stage
    view: tuple[int, int]

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.full.steps

    @property
    def plain_steps(self) -> float:
        """Steps of the plain run that cost as much as this one."""
        return sum(stage.steps * stage.cost for stage in self.stages)

    @property
    def share(self) -> float:
        """What the run costs, relative to the plain run of as many steps."""
        return self.plain_steps / self.total_steps

    def verdict(self) -> str:
        """One line: what the run costs."""
        return f"{self.share:.1%} of the plain run's budget ({1 / self.share:.2f}x less)"

    def __str__(self) -> str:
        has_teacher = self.full.teacher_tokens is not None
        headings = ["from step", "steps", "strategy", "tokens", *["teacher's"] * has_teacher, "cost of a step"]
        rows = [
            [
                f"{stage.first:,}",
                f"{stage.steps:,}",
                str(stage.strategy),
                str(stage.tokens),
                *[str(stage.teacher_tokens)] * has_teacher,
                f"{stage.cost:.3f}",
            ]
            for stage in self._shown()
        ]
        left_out = len(self.stages) - len(rows)
        lines = _aligned([headings, *rows], left=2)
        if left_out:
            lines.append(f"... and {left_out:,} stages between these")
        return "\n".join(
            [
                f"Plan {self.name}, {self.total_steps:,} steps, views of {_size(self.view)} px; "
                f"a plain view has {self.full.tokens} tokens.",
                "",
                *lines,
                "",
                f"In all: {self.verdict()}, as much as {self.plain_steps:,.0f} plain steps.",
                "Counted in the encoders' FLOPs. Heads, optimizer and the making of views",
                "are not in it, so wall-clock saves less.",
            ]
        )

    def _shown(self) -> Sequence[Stage]:
        if len(self.stages) <= _ROWS + 1:
            return self.stages
        last = len(self.stages) - 1
        return [self.stages[number * last // (_ROWS - 1)] for number in range(_ROWS)]


def forecast(
    plan: Plan | None, model: nn.Module, *, teacher: nn.Module | None = None, total_steps: int = 1000
) -> Forecast:
    """What a run of a model costs under a plan, in its encoders, for views of the size that it was built for.

    Args:
        plan: whatever [compress][seqcompress.compress] takes.
        model: a supported ViT, compressed or not. Nothing is done to it.
        teacher: a momentum encoder that sees as many views without a backward pass, with patches scaled as the
            student's and no token dropped.
        total_steps: steps of the run, at least 1.

    Raises:
        TypeError: an argument has the wrong type, or a model is not supported.
        ValueError: an argument is out of range, or the plan does not suit a model.
        FileNotFoundError: the plan is the path of a schedule file that does not exist.
    """
    total_steps = checked_count(total_steps, "total_steps", at_least=1)
    encoder = find_encoder(model)
    teacher_encoder = None if teacher is None else find_encoder(teacher, "teacher")
    found = {"model": encoder} if teacher_encoder is None else {"model": encoder, "teacher": teacher_encoder}
    check_roles(found)
    schedule = resolve_plan(plan, found.items())

    cost = StepCosts((one, name == "model") for name, one in found.items())

    def stage(first: int, steps: int, strategy: Strategy) -> Stage:
        teachers = None if teacher_encoder is None else sequence_length(teacher_encoder, strategy.without_dropout())
        tokens, share = sequence_length(encoder, strategy), cost(strategy) / cost(Strategy())
        return Stage(first, steps, strategy, tokens, teachers, share)

    begins = _begins(schedule, total_steps)
    stages = tuple(
        stage(first, until - first, schedule.at_step(first, total_steps))
        for first, until in pairwise([*begins, total_steps])
    )
    return Forecast(_name(plan, schedule), stages, stage(0, total_steps, Strategy()), encoder.image_size)


def plot_schedule(
    plan: Plan,
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    teacher: nn.Module | None = None,
    total_steps: int | None = None,
) -> Figure:
    """Draw what a plan does to a model over training: tokens of a view, cost of a step, what the whole run costs.

    Costs are FLOPs of the encoders for views of the size that they were built for, relative to the plain run's.
    ``python -m seqcompress plan`` says the same as text.

    Args:
        plan: whatever [compress][seqcompress.compress] takes.
        model: a supported ViT, compressed or not. Nothing is done to it.
        path: a picture file to be written; its ending names the format.
        teacher: a momentum encoder that runs beside the model, without token dropout and without a backward pass.
        total_steps: steps of the run, for the horizontal axis; without them it is the share of training.

    Returns:
        matplotlib's figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: an argument has the wrong type, or a model is not supported.
        ValueError: an argument is out of range, or the plan does not suit a model.
        FileNotFoundError: the plan is the path of a schedule file that does not exist.
    """
    from seqcompress.training.pictures import draw_forecast, save

    steps = 1000 if total_steps is None else total_steps
    figure = draw_forecast(
        forecast(plan, model, teacher=teacher, total_steps=steps), steps_are_known=total_steps is not None
    )
    if path is not None:
        save(figure, path)
    return figure


@dataclass(frozen=True)
class CostMap:
    """Tokens and relative cost of an encoder's forward, for each of some token dropouts and patch sizes.

    Attributes:
        dropouts: the rows.
        sizes: the columns, in pixels.
        costs: of one forward pass of a view, relative to the plain one.
        tokens: of a view.
        view: height and width of the view, in pixels.
    """

    dropouts: tuple[float, ...]
    sizes: tuple[int, ...]
    costs: tuple[tuple[float, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    view: tuple[int, int]

    def __str__(self) -> str:
        rows = [
            [f"drop {dropout:g}", *(f"{cost:.3f} ({count})" for cost, count in zip(costs, tokens, strict=True))]
            for dropout, costs, tokens in zip(self.dropouts, self.costs, self.tokens, strict=True)
        ]
        return "\n".join(
            [
                f"FLOPs of the encoder for a view of {_size(self.view)} px, relative to the plain one, and its tokens:",
                "",
                *_aligned([["", *(f"patch {size}" for size in self.sizes)], *rows], left=0),
            ]
        )


def cost_map(model: nn.Module, dropouts: Sequence[float], sizes: Sequence[int] | None = None) -> CostMap:
    """What each strategy of a grid costs.

    Args:
        model: a supported ViT, compressed or not.
        dropouts: token dropouts, each in [0, 1).
        sizes: patch sizes in pixels; by default the model's own and what divides the view, up to four times as large.

    Raises:
        TypeError: the model is not supported.
        ValueError: a strategy of the grid does not suit it.
    """
    encoder = find_encoder(model)
    own, side = max(encoder.patch_size), min(encoder.image_size)
    if sizes is None:
        sizes = [size for size in range(own, 4 * own + 1) if size == own or side % size == 0]
    rows = tuple(dict.fromkeys(sorted(dropouts)))
    columns = tuple(dict.fromkeys(sorted(sizes)))
    grid = [[Strategy(dropout, None if size == own else size) for size in columns] for dropout in rows]
    for strategies in grid:
        for strategy in strategies:
            check_plan_for(encoder, Constant(strategy), "model")
    cost = ViewCosts(encoder, drops_tokens=True)
    return CostMap(
        rows,
        columns,
        tuple(tuple(map(cost, strategies)) for strategies in grid),
        tuple(tuple(sequence_length(encoder, strategy) for strategy in strategies) for strategies in grid),
        encoder.image_size,
    )


def _begins(schedule: Schedule, total_steps: int) -> list[int]:
    """The steps at which the strategy is another than before: every one, but of very long ramps a choice."""
    looked_at = [*range(0, total_steps, -(-total_steps // _LOOKED_AT)), total_steps - 1]
    begins = [0]
    for before, after in pairwise(looked_at):
        low, high, strategy = before, after, schedule.at_step(before, total_steps)
        if schedule.at_step(high, total_steps) == strategy:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            if schedule.at_step(middle, total_steps) == strategy:
                low = middle
            else:
                high = middle
        begins.append(high)
        if schedule.at_step(after, total_steps) != schedule.at_step(high, total_steps):
            begins.append(after)  # what lies between two changes so near is counted as the first of them
    return begins


def _name(plan: Plan | None, schedule: Schedule) -> str:
    if plan is None or isinstance(plan, str):
        return f'"{"default" if plan is None else shorten(plan, _LONGEST_NAME, placeholder=" ...")}"'
    if isinstance(schedule, Constant):
        return f'"{schedule.strategy}"'
    return f"of the kind {schedule.kind}"


def _size(view: tuple[int, int]) -> str:
    height, width = view
    return str(height) if height == width else f"{height} x {width}"


def _aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows of a table; all columns are flush right but the one numbered ``left``."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
