"""Advance a schedule, step by step, like a learning-rate scheduler."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from seqcompress.compression import Plan, check_plan, compressed_embeds_of, resolve_plan
from seqcompress.compressors import CompressedPatchEmbed
from seqcompress.encoders import find_encoder
from seqcompress.schedules import Constant, Schedule
from seqcompress.strategy import Strategy
from seqcompress.training.cost import num_tokens, relative_cost

__all__ = ["SequenceScheduler"]


class SequenceScheduler:
    """Moves the strategy of compressed encoders along a schedule. Used like a ``torch.optim.lr_scheduler``.

    The constructor applies the schedule's beginning; call ``step()`` once after every training step. After
    ``total_steps`` steps the schedule stays at its end.

    In a distributed run ``step()`` is collective, to be called by all ranks: they follow rank 0's count, so
    that every rank uses the same strategy at the same step.

    The random subsets of a step depend on the seed of the run, the step and the rank only. With the state
    saved and loaded, a resumed run draws what it would have drawn had it not stopped.

    Args:
        model_or_models: compressed encoders, or modules that contain them.
        schedule: any plan that [compress][seqcompress.compress] takes; ``None`` for the one it was given.
        total_steps: number of steps of the whole run, at least 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing is compressed, or the schedule does not suit the encoders; nothing has been changed.

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
        total_steps = _checked_count(total_steps, "total_steps", at_least=1)
        plans = {embed.compression.plan for embed in self._embeds}
        if schedule is not None:
            plans = {resolve_plan(schedule, *find_encoder(self._embeds[0].encoder))}
        if len(plans) > 1:
            raise ValueError(f"schedule must be given for encoders that were compressed with {len(plans)} plans")
        (plan,) = plans
        check_plan(self._embeds, plan)
        self._driven = [(embed, embed.compression) for embed in self._embeds]
        self._group: Any = None
        self._seed = torch.initial_seed()
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
        """The strategy in force."""
        return self._schedule(self.progress)

    def step(self, step: int | None = None) -> None:
        """Go on to the next step, or to a given one.

        Args:
            step: number of steps done. Whoever gives it makes sure that it is the same on every rank.
        """
        if step is None:
            self._apply(self._schedule, self._total_steps, self._agreed(self._last_step + 1))
        else:
            self._apply(self._schedule, self._total_steps, _checked_count(step, "step", at_least=0))

    @property
    def is_current(self) -> bool:
        """Whether the encoders are still compressed as they were when this scheduler was made."""
        return all(embed.compression is compression and embed.is_live for embed, compression in self._driven)

    def use(self, strategy: Strategy) -> None:
        """Put another strategy in force, until the next step.

        Raises:
            TypeError: ``strategy`` is not a Strategy.
            ValueError: it does not suit the encoders.
            RuntimeError: the encoders were restored or compressed anew.
        """
        check_plan(self._embeds, Constant(strategy))
        self._put(strategy)

    def _put(self, strategy: Strategy) -> None:
        if not self.is_current:
            raise RuntimeError("the encoders were restored or compressed anew: make a new SequenceScheduler")
        for _, compression in self._driven:
            compression.strategy = strategy

    def most_expensive(self) -> Strategy:
        """The strategy of the schedule with the longest sequences: the one that needs the most memory."""
        family, encoder = find_encoder(self._embeds[0].encoder)
        size = family.image_size(encoder)
        return max(self._schedule.strategies(), key=lambda strategy: num_tokens(encoder, strategy, size))

    def budget_share(self, step: int) -> float:
        """Share of the run's budget that is spent after ``step`` steps, as this schedule spends it.

        Computed from the encoders' relative cost; for a learning rate that follows the budget, see
        [PolynomialDecayLR][seqcompress.PolynomialDecayLR].
        """
        spent = self._spent()
        return spent[min(_checked_count(step, "step", at_least=0), self._total_steps)] / spent[-1]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep. Plain values only."""
        return {
            "schedule": self._schedule.to_json(),
            "total_steps": self._total_steps,
            "last_step": self._last_step,
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, schedule and number of steps included, and apply its strategy at once.

        Raises:
            ValueError: the state is not a SequenceScheduler's, or does not suit the encoders; the message
                names the field, and nothing has been changed.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"state must be a SequenceScheduler's state_dict(), got {state!r}")
        for name in ("schedule", "total_steps", "last_step", "seed"):
            if name not in state:
                raise ValueError(f"state must have the field {name!r}, got {sorted(state)}")
        try:
            if not isinstance(state["schedule"], str):
                raise TypeError(f"schedule must be a schedule's JSON text, got {state['schedule']!r}")
            schedule = Schedule.from_json(state["schedule"])
            total_steps = _checked_count(state["total_steps"], "total_steps", at_least=1)
            last_step = _checked_count(state["last_step"], "last_step", at_least=0)
            seed = _checked_count(state["seed"], "seed", at_least=0)
            check_plan(self._embeds, schedule)
        except (TypeError, ValueError, OSError) as error:
            raise ValueError(f"state is not a SequenceScheduler's: {error}") from None
        self._seed = seed
        self._apply(schedule, total_steps, last_step)

    def _apply(self, schedule: Schedule, total_steps: int, last_step: int) -> None:
        self._put(schedule(min(1.0, last_step / total_steps)))
        self._schedule, self._total_steps, self._last_step = schedule, total_steps, last_step
        for model, compression in enumerate(dict.fromkeys(compression for _, compression in self._driven)):
            compression.stream.anchor(self._seed, last_step, model)
            if compression.views is not None:
                until = last_step + compression.views.lookahead
                coming = [*range(last_step, until, max(1, compression.views.lookahead // 8)), until]
                compression.views.ask_for(*(schedule(min(1.0, step / total_steps)) for step in coming))

    def _agreed(self, step: int) -> int:
        """Rank 0's step. Agreed on the CPU, so that no device has to wait."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return step
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        agreed = torch.tensor([step])
        dist.broadcast(agreed, src=0, group=self._group)
        return int(agreed.item())

    def _spent(self) -> list[float]:
        """Cost of the first 0, 1, ... ``total_steps`` steps."""
        key = (self._schedule, self._total_steps)
        if getattr(self, "_spent_of", None) != key:
            costs: dict[Strategy, float] = {}
            spent = [0.0]
            for done in range(self._total_steps):
                strategy = self._schedule(done / self._total_steps)
                if strategy not in costs:
                    costs[strategy] = sum(_cost(embed, strategy) for embed in self._embeds)
                spent.append(spent[-1] + costs[strategy])
            self._spent_of, self._spent_after = key, spent
        return self._spent_after


def _cost(embed: CompressedPatchEmbed, strategy: Strategy) -> float:
    family, encoder = find_encoder(embed.encoder)
    if embed.drops_tokens:
        return 3 * relative_cost(encoder, strategy, family.image_size(encoder))
    return relative_cost(encoder, strategy.without_dropout(), family.image_size(encoder))


def _checked_count(value: Any, name: str, *, at_least: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if isinstance(value, bool) or count < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}")
    return count
