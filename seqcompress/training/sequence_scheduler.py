"""Advance a schedule, step by step, like a learning-rate scheduler."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from seqcompress.checks import checked_count
from seqcompress.compression import (
    Plan,
    check_plan,
    compressed_embeds_of,
    named_encoders,
    resolve_plan,
    with_partners,
)
from seqcompress.encoders import CompressedPatchEmbed, Compression, is_frozen
from seqcompress.json_files import json_text
from seqcompress.messages import described, resume_notice
from seqcompress.schedules import Constant, Online, Schedule
from seqcompress.strategy import Strategy
from seqcompress.training.cost import StepCosts, batch_factor, sequence_length
from seqcompress.training.ranks import Ranks

__all__ = ["SequenceScheduler"]

_LOOKED_AT = 10_000  # steps of a run at which a schedule is asked for its cost, at most


class SequenceScheduler:
    """Moves the strategy of compressed encoders along a schedule. Used like a ``torch.optim.lr_scheduler``.

    The constructor applies the schedule's beginning; call ``step()`` once after every training step. The last of
    ``total_steps`` steps is run at the schedule's end, and there it stays as long as the scheduler lives. One drives an
    encoder at a time: while this one lives, no second one can be made for it.

    In a distributed run, making a scheduler and ``step()`` are collective, to be called by all ranks: they follow rank
    0's seed and count, so that every rank uses the same strategy at the same step. Where ranks may step alone (uneven
    inputs), pass the number: ``step(i)`` waits for nobody.

    The random subsets of a step depend on the seed of the run, the step, the rank and which forward of the step it is.
    With the state saved and loaded, a resumed run draws what it would have drawn had it not stopped, in the middle of
    gradient accumulation too. Where the script has another schedule or number of steps than the checkpoint, the script
    holds, from the step that was reached, as under Lightning; and that is said.

    Args:
        model_or_models: compressed encoders, or modules that contain them.
        schedule: any plan that [compress][seqcompress.compress] takes; ``None`` for the one it was given.
        total_steps: number of steps of the whole run, at least 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing is compressed, or the schedule does not suit the encoders.
        FileNotFoundError: the schedule is the path of a file that does not exist.
        RuntimeError: another scheduler, which is alive, drives the encoders. In each case, nothing has been changed.

    Examples:
        >>> import timm
        >>> from seqcompress import Strategy, compress, get_strategy
        >>> from seqcompress.schedules import Linear
        >>> vit = compress(timm.create_model("vit_tiny_patch16_224"), Linear(Strategy(0.8), Strategy()))
        >>> scheduler = SequenceScheduler(vit, total_steps=100)
        >>> for _ in range(50):
        ...     scheduler.step()
        >>> get_strategy(vit)
        Strategy(token_dropout=0.4, patch_size=None)
    """

    def __init__(
        self, model_or_models: nn.Module | Sequence[nn.Module], schedule: Plan | None = None, *, total_steps: int
    ) -> None:
        self._embeds = compressed_embeds_of(model_or_models)
        total_steps = checked_count(total_steps, "total_steps", at_least=1)
        _refuse_copied_teachers(self._embeds)
        plans = {embed.compression.plan for embed in self._embeds}
        if schedule is not None:
            plans = {resolve_plan(schedule, named_encoders(self._embeds))}
        if len(plans) > 1:
            raise ValueError(f"schedule must be given for encoders that were compressed with {len(plans)} plans")
        (plan,) = plans
        check_plan(self._embeds, plan)
        if schedule is None and any(embed.compression.batch is not None for embed in self._embeds):
            warnings.warn(
                "seqcompress: batch='merge' is for Lightning's Trainer: in a loop of your own, run as many batches at "
                "once as the scheduler's batch_factor says",
                stacklevel=2,
            )
        self._driven = [(embed, embed.compression) for embed in self._embeds]
        self._check_free()
        plan = _without_measuring(plan)
        # Said at the first step: a state that is loaded before may go on elsewhere.
        self._is_run_again = schedule is None and any(compression.finished for compression in self._compressions)
        self._claim()
        self._told_of_the_end = False
        self._spent_of: object = None
        self._spent_after: tuple[list[int], list[float]] = ([], [])
        self._ranks = Ranks()
        self._seed = self._ranks.of_rank_0(torch.initial_seed() % 2**63)
        self._plan = plan
        self._apply(plan, total_steps, last_step=0)

    @property
    def embeds(self) -> tuple[CompressedPatchEmbed, ...]:
        """The compressed patch embeddings that are driven."""
        return tuple(self._embeds)

    @property
    def schedule(self) -> Schedule:
        """The schedule that is followed."""
        return self._schedule

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self._total_steps

    @property
    def last_step(self) -> int:
        """Steps that are done."""
        return self._last_step

    @property
    def progress(self) -> float:
        """Share of the steps that is done, in [0, 1]."""
        return min(1.0, self._last_step / self._total_steps)

    @property
    def strategy(self) -> Strategy:
        """The schedule's, of the step to come: in force, until ``use`` or ``set_strategy`` put another in its place."""
        return self._schedule.at_step(self._last_step, self._total_steps)

    @property
    def batch_factor(self) -> int:
        """How many batches the next update can take at once, with no more tokens than one of uncompressed views has.

        A power of two, 1 under the base strategy, and the same on every rank. To make use of it, train on that many
        batches in one forward, and count them all: ``scheduler.step(scheduler.last_step + factor)``. A step stays one
        batch, so the run sees the same views, costs the same and ends at the same step, in fewer updates. The factor
        never reaches past the next change of lengths, or past the end. It goes by the student's tokens, whose
        activations the backward pass keeps; what heads and losses keep grows with the number of views.
        """
        step, in_force = self._last_step, self._compressions[0].strategy
        if in_force != self.strategy:  # rehearsed, or set by hand
            return self._factor(in_force)
        factor = min(self._factor(in_force), 1 << (max(1, self._total_steps - step).bit_length() - 1))
        lengths = self._lengths(in_force)
        while any(self._lengths(self._schedule.at_step(step + n, self._total_steps)) != lengths for n in range(factor)):
            factor //= 2
        return factor

    def _lengths(self, strategy: Strategy) -> list[int]:
        return [sequence_length(embed.encoder, strategy) for embed in self._embeds]

    def _factor(self, strategy: Strategy) -> int:
        students = [embed for embed in self._embeds if embed.drops_tokens] or self._embeds
        return min(batch_factor(embed, strategy) for embed in students)

    def step(self, step: int | None = None) -> None:
        """Go on to the next step, or to a given one.

        Args:
            step: number of steps done, at least 0, the same on every rank; by default, one more than before, as rank 0
                counts.

        Raises:
            TypeError: ``step`` is not a whole number.
            ValueError: ``step`` is out of range.
            RuntimeError: the encoders have been restored or compressed anew, or other ranks did not call ``step()``.
        """
        step = self._ranks.of_rank_0(self._last_step + 1) if step is None else checked_count(step, "step", at_least=0)
        if self._is_run_again and (self._last_step, step) == (0, 1) and self._total_steps > 1:
            warnings.warn(
                "seqcompress: the schedule of the encoders has been run to its end before, and is run again, from its "
                "beginning",
                stacklevel=2,
            )
        self._is_run_again = False
        self._apply(self._schedule, self._total_steps, step)
        for compression in self._compressions:
            compression.count_step()
        if step > self._total_steps and not self._told_of_the_end:
            self._told_of_the_end = True
            warnings.warn(
                f"seqcompress: step {step} is past total_steps={self._total_steps}: the encoders stay at the end of "
                f"their schedule ({self.strategy})",
                stacklevel=2,
            )

    @property
    def is_current(self) -> bool:
        """Whether the encoders are still compressed as they were when this scheduler was made."""
        return all(embed.compression is compression and embed.is_live for embed, compression in self._driven)

    def follow(self, schedule: Plan) -> None:
        """Follow another plan from here on; the steps that are done stay done.

        Raises:
            TypeError: ``schedule`` is not a plan.
            ValueError: it does not suit the encoders.
            RuntimeError: the encoders were restored or compressed anew. In each case, nothing has been changed.
        """
        if schedule is None:
            raise TypeError("schedule must be a plan, got None")
        plan = _without_measuring(resolve_plan(schedule, named_encoders(self._embeds)))
        forwards = [compression.stream.forwards for compression in self._compressions]
        self._apply(plan, self._total_steps, self._last_step, forwards)

    def use(self, strategy: Strategy) -> None:
        """Put another strategy in force, until the next step.

        Raises:
            TypeError: ``strategy`` is not a Strategy.
            ValueError: it does not suit the encoders.
            RuntimeError: the encoders were restored or compressed anew.
        """
        check_plan(self._embeds, Constant(strategy))
        self._put_in_force(strategy)

    def _put_in_force(self, strategy: Strategy) -> None:
        self._check_current()
        for compression in self._compressions:
            compression.strategy = strategy

    def _check_current(self) -> None:
        if not self.is_current:
            raise RuntimeError("the encoders were restored or compressed anew: make a new SequenceScheduler")

    @property
    def _compressions(self) -> list[Compression]:
        """What is driven, each once."""
        return list(dict.fromkeys(compression for _, compression in self._driven))

    def _check_free(self) -> None:
        for compression in self._compressions:
            compression.check_free(self)

    def _claim(self) -> None:
        self._check_free()  # all or none
        for compression in self._compressions:
            compression.claim(self, f"a {type(self).__name__}")

    # A copy has copies of the encoders, and drives those.
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._claim()

    def most_expensive(self) -> Strategy:
        """The strategy of the schedule with the longest sequences: the one that needs the most memory."""
        embed = self._embeds[0]

        def tokens(strategy: Strategy) -> tuple[int, ...]:
            return tuple(
                sequence_length(embed.encoder, each) for each in (embed.strategy_for_full_views(strategy), strategy)
            )

        return max(self._schedule.strategies(), key=tokens)

    def budget_share(self, step: int) -> float:
        """Share of the run's budget that is spent after ``step`` steps, as this schedule spends it.

        Computed from the encoders' relative cost, at 10,000 steps of a longer run; for a learning rate that follows the
        budget, see [PolynomialDecayLR][seqcompress.PolynomialDecayLR].
        """
        step = min(checked_count(step, "step", at_least=0), self._total_steps)
        steps, spent = self._spent()
        after = min(bisect_right(steps, step), len(steps) - 1)
        begin, end = steps[after - 1], steps[after]
        share = (spent[after - 1] + (spent[after] - spent[after - 1]) * (step - begin) / (end - begin)) / spent[-1]
        return min(1.0, share)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep. Plain values only."""
        return {
            "plan": self._plan.to_json(),
            "forwards": [compression.stream.forwards for compression in self._compressions],
            "schedule": self._schedule.to_json(),
            "total_steps": self._total_steps,
            "last_step": self._last_step,
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: from its step, with its random subsets, and apply the strategy at once.

        Schedule and number of steps are this scheduler's own, whatever the state has; a warning says so if they differ.
        The exceptions: a schedule that came by ``follow`` goes on, if the run began with the same plan as this one; and
        what was run to its end stays at the end.

        Raises:
            ValueError: the state is not a SequenceScheduler's, or does not suit the encoders; the message
                names the field.
            RuntimeError: the encoders were restored or compressed anew. In each case, nothing has been changed.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"state must be a SequenceScheduler's state_dict(), got {described(state)}")
        for name in ("schedule", "total_steps", "last_step", "seed"):
            if name not in state:
                raise ValueError(f"state must have the field {name!r}, got {described(list(state))}")
        try:
            schedule = _read_schedule(state["schedule"], "schedule")
            plan = _read_schedule(state.get("plan", state["schedule"]), "plan")
            forwards = [checked_count(count, "forwards", at_least=0) for count in _listed(state.get("forwards", []))]
            total_steps = checked_count(state["total_steps"], "total_steps", at_least=1)
            last_step = checked_count(state["last_step"], "last_step", at_least=0)
            seed = checked_count(state["seed"], "seed", at_least=0)
            check_plan(self._embeds, schedule)
        except (TypeError, ValueError, OSError) as error:
            raise ValueError(f"state is not a SequenceScheduler's: {error}") from None
        self._check_current()
        changes: dict[str, tuple[object, object]] = {}
        if plan != self._plan:
            changes["schedule"] = (schedule, self._plan)
            schedule = self._plan
        if total_steps != self._total_steps:
            changes["total_steps"] = (total_steps, self._total_steps)
        self._seed = seed
        ended = last_step >= total_steps
        self._apply(schedule, min(last_step, self._total_steps) if ended else self._total_steps, last_step, forwards)
        if changes:
            left = " of a schedule that was run to its end: for another run of it, compress(model, plan) anew"
            warnings.warn(f"seqcompress: {resume_notice(changes, self.strategy)}{left if ended else ''}", stacklevel=2)

    def _apply(self, schedule: Schedule, total_steps: int, last_step: int, forwards: Sequence[int] = ()) -> None:
        self._put_in_force(schedule.at_step(last_step, total_steps))
        self._schedule, self._total_steps, self._last_step = schedule, total_steps, last_step
        for model, compression in enumerate(self._compressions):
            compression.finished = last_step >= total_steps
            compression.steps_left = max(0, total_steps - last_step)
            before = forwards[model] if model < len(forwards) else 0
            compression.stream.anchor(self._seed, last_step, model, before)
            if compression.views is not None:
                compression.views.ask_ahead(lambda more: schedule.at_step(last_step + more, total_steps))

    def _spent(self) -> tuple[list[int], list[float]]:
        """Numbers of steps, from 0 to all, and the cost of as many."""
        key = (self._schedule, self._total_steps)
        if self._spent_of != key:
            running = (embed for embed in with_partners(self._embeds) if embed.is_live)
            cost = StepCosts((embed.encoder, embed.drops_tokens) for embed in running)
            steps = [*range(0, self._total_steps, -(-self._total_steps // _LOOKED_AT)), self._total_steps]
            spent = [0.0]
            for done, until in pairwise(steps):
                spent.append(spent[-1] + (until - done) * cost(self._schedule.at_step(done, self._total_steps)))
            self._spent_of, self._spent_after = key, (steps, spent)
        return self._spent_after


def _refuse_copied_teachers(embeds: Sequence[CompressedPatchEmbed]) -> None:
    frozen = [embed.drops_tokens and is_frozen(embed.encoder.model) for embed in embeds]
    if any(frozen) and not all(frozen):
        raise ValueError(
            "model_or_models holds a frozen copy of a compressed student, which would drop tokens as a student does: "
            "make a teacher of it by compress(student, plan, teacher=...)"
        )


def _without_measuring(plan: Schedule) -> Schedule:
    """What can be followed of a plan: of an online one, its preset."""
    if not isinstance(plan, Online):
        return plan
    warnings.warn(
        "seqcompress: a SequenceScheduler measures nothing, and follows the preset of an online plan; to have it "
        "measured, make an OnlineScheduler(model, loss, total_steps=...)",
        stacklevel=3,
    )
    return plan.preset


def _read_schedule(text: Any, name: str) -> Schedule:
    try:
        return Schedule.from_json(json_text(text, name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"forwards must be a list of whole numbers, got {described(value)}")
    return value
