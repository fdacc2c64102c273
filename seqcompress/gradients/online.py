"""A schedule that finds itself while the run goes on: gradient error of neighbouring strategies, measured in between.

CA-MSE decides, as in Lin et al., NeurIPS 2024 (arXiv 2410.22364); there, it is measured on a plain run made before.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqcompress.checks import checked_count, checked_share
from seqcompress.compression import compressed_embeds_of
from seqcompress.encoders import CompressedPatchEmbed, Forward
from seqcompress.gradients.decisions import (
    MeasuredBatch,
    OnlineDecision,
    checked_flops,
    read_begun,
    read_decision,
    read_events,
    read_list,
    read_sketches,
)
from seqcompress.gradients.ladder import by_cost, compared, default_ladder, forwards_under
from seqcompress.gradients.measured_encoder import (
    checked_strategies,
    measured_encoders,
    own_patch_size_of,
    refuse_flattened,
)
from seqcompress.gradients.measurement import NO_GRADIENT, SKETCH_SIZE
from seqcompress.gradients.report import GradientErrorReport, canonical
from seqcompress.gradients.running import Clock, objects_in, running, seed_of
from seqcompress.gradients.statistics import Estimate, Sketch, interquartile_mean, jackknife, norm2_of_mean, variance
from seqcompress.json_files import json_text
from seqcompress.messages import described, resume_notice
from seqcompress.schedules import Constant, Online, Schedule, Stepwise
from seqcompress.strategy import Strategy
from seqcompress.training.cost import Flops
from seqcompress.training.ranks import Ranks
from seqcompress.training.sequence_scheduler import SequenceScheduler

__all__ = ["OnlineDecision", "OnlineScheduler"]

_BASE = Strategy()
_BATCHES = 4  # a decision
_CONFIDENCE = 0.8
_MOST_COMPARED = 4  # the base, the strategy in force, and a neighbour on either side
_SHARE = 0.03
_MOST_PRICES = 1_000  # where no step is like another


class _Action(IntEnum):
    """What to do after a step, the same on all ranks."""

    WAIT = 0
    START = 1
    CONTINUE = 2
    DISCARD = 3


_logger = logging.getLogger(__name__)


class OnlineScheduler:
    """Finds its schedule during the run: every so often, it measures neighbouring strategies and may move to one.

    Strategies form a ladder, ordered by cost. The run begins at the strategy that its encoders were compressed with.
    As soon as the compute allows it, the strategy in force, its cheaper and its dearer neighbour and the base are run
    on the batches of the next 4 steps, like in [gradient_error][seqcompress.gradient_error], and the scheduler decides:
    it moves to a neighbour or to the base if its CA-MSE is less than that of the strategy in force with a probability
    of at least 80 %, one-sided, from the jackknife of the paired difference; to the best, if several are. Otherwise it
    stays. Every decision begins anew. (The base is measured anyway, and a worse rung may lie before it.)

    Why 4 consecutive batches: gradients from older weights would make the bias look small and the variance large. One
    decision needs little evidence, because more decisions follow. Between two neighbours that are equal, up to 20 % of
    the decisions move, which costs little and can be undone. A better neighbour that was missed is found later: in
    simulations with normally distributed gradients, two decisions from 4 batches each found it about as often as one
    from 8.

    Measuring leaves no trace in the run: everything is put back as gradient_error does it, and the run draws the
    random subsets that it would have drawn. Random states of measuring come from the seed of the run, the step and the
    rank. In a distributed run, gradients are averaged over the ranks, whether ``step`` does so or not, so that variance
    is that of the whole batch; and all ranks follow rank 0 as to when to measure and where to move.

    Where the encoders were compressed with an [Online][seqcompress.schedules.Online] plan, such as "online", the run
    follows the plan's preset until the first decision to move, and ends with the preset's last stage in any case;
    nothing is measured in there. Measuring then keeps to the plan's share of the time as well. Where a step cannot be
    measured or put back, it is put back as far as it can be, the reason is told once, and the preset goes on.

    A run that is too short for a decision says so at its first step.

    What was found is ``schedule``, at any time: a [Stepwise][seqcompress.schedules.Stepwise] to save as JSON. Decisions
    are logged (level INFO, rank 0) and kept in ``decisions``.

    Args:
        model_or_models: compressed encoders, or modules that contain them. Gradients are those of their parameters.
        step: returns the scalar loss of a batch, and does not call backward; as for gradient_error, and with the views
            of a training step.
        strategies: the ladder, in any order; the base and the first strategy always belong to it. By default, a
            dropout of 0, 0.5 and 0.75 at the model's own patch size and at about twice that, as far as each costs at
            most 3/4 of the next dearer one.
        total_steps: number of steps of the whole run, at least 1. Nothing is measured after these.
        compute_share: measuring takes at most this share of what training has taken so far, in (0, 1]. Both in the
            encoders' FLOPs, three for a forward that is differentiated against one for another, and so is the cost in
            CA-MSE: reproducible, and blind to the rest of a step. By default, that of an online plan, or 0.03.
        protect: as for gradient_error.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing is compressed or requires grad, a strategy does not suit the encoders, or an argument is out
            of range; nothing has been changed.

    Examples:
        >>> import timm, torch
        >>> from seqcompress import Strategy, compress
        >>> vit = compress(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1), Strategy(0.5, 32))
        >>> def loss(views):
        ...     return vit(views).square().mean()
        >>> scheduler = OnlineScheduler(vit, loss, total_steps=1000)
        >>> print(*scheduler.ladder, sep="; ")
        drop 0.75, patch 32; drop 0.5, patch 32; patch 32; drop 0.5; base
        >>> for views in torch.randn(3, 2, 3, 64, 64):
        ...     loss(views).backward()  # and the optimizer's step
        ...     scheduler.step(views)
        >>> scheduler.decisions  # 3 % of 3 steps is not enough to measure anything
        ()
    """

    def __init__(
        self,
        model_or_models: nn.Module | Sequence[nn.Module],
        step: Callable[[Any], Tensor],
        strategies: Iterable[Strategy] | None = None,
        *,
        total_steps: int,
        compute_share: float | None = None,
        protect: object = (),
    ) -> None:
        embeds = compressed_embeds_of(model_or_models)
        if not callable(step):
            raise TypeError(f"step must be a function, got {described(step)}")
        plan = _online_plan_of(embeds)
        if compute_share is None:
            compute_share = _SHARE if plan is None else plan.compute_share
        compute_share = checked_share(compute_share, "compute_share")
        models = [model_or_models] if isinstance(model_or_models, nn.Module) else list(model_or_models)
        parameters = [value for value in nn.ModuleList(models).parameters() if value.requires_grad]
        if not parameters:
            raise ValueError("model_or_models must have parameters that require grad, got none")
        encoders = measured_encoders(nn.ModuleList(models))
        refuse_flattened(nn.ModuleList(models), encoders)
        own = own_patch_size_of(encoders)
        starts = list(dict.fromkeys(canonical(embed.compression.plan(0.0), own) for embed in embeds))
        if len(starts) > 1:
            raise ValueError(f"model_or_models must begin with one strategy, got {' / '.join(map(str, starts))}")
        preset = _canonical(Constant(starts[0]) if plan is None else plan.preset, own)
        flops = Flops(measured.encoder for measured in encoders)
        wanted = default_ladder(encoders, flops) if strategies is None else checked_strategies(strategies)
        ladder = list(dict.fromkeys(canonical(strategy, own) for strategy in (*wanted, *preset.strategies(), _BASE)))
        for encoder in encoders:
            encoder.check_strategies(ladder)
        if any(embed.compression.views is not None for embed in embeds) and any(rung.patch_size for rung in ladder):
            raise ValueError(
                "model_or_models must not have scale_views for an online schedule with patch sizes: gradient error is "
                "measured on full views"
            )
        self._sequence = SequenceScheduler(model_or_models, preset, total_steps=total_steps)
        for compression in {embed.compression for embed in self.embeds}:
            compression.claim(self._sequence, "an OnlineScheduler")
        self._ladder = tuple(by_cost(ladder, encoders, flops))
        self._compute_share = compute_share
        self._plan, self._preset = plan, preset
        self._loss = step
        self._roots = [*models, *(measured.encoder.model for measured in encoders), *objects_in(protect)]
        self._parameters = parameters
        self._encoders = encoders
        self._tallied = [measured.embed for measured in encoders]  # to look for them takes longer than all else
        self._own_patch_size = own
        self._flops = flops
        self._sketch = Sketch(sum(parameter.numel() for parameter in parameters), SKETCH_SIZE)
        self._decisions: list[OnlineDecision] = []
        self._events: list[MeasuredBatch] = []
        self._trained = self._measured = 0.0
        self._counted = self._tallies()
        self._begun: list[Counter[Forward]] = [Counter() for _ in self._tallied]  # of a step, before it was resumed
        self._prices: dict[tuple[object, ...], int] = {}
        self._resumed_at = time.perf_counter()  # less what was measured since
        self._seconds_before = self._seconds_trained = self._seconds_measured = 0.0
        self._gave_up: int | None = None  # the step
        self._reported: set[str] = set()
        self._is_blind = self._has_looked_ahead = False
        self._ranks = Ranks()

    @property
    def embeds(self) -> tuple[CompressedPatchEmbed, ...]:
        """The compressed patch embeddings that are driven."""
        return self._sequence.embeds

    @property
    def schedule(self) -> Schedule:
        """What was found so far."""
        return self._sequence.schedule

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self._sequence.total_steps

    @property
    def last_step(self) -> int:
        """Steps that are done."""
        return self._sequence.last_step

    @property
    def progress(self) -> float:
        """Share of the steps that is done, in [0, 1]."""
        return self._sequence.progress

    @property
    def strategy(self) -> Strategy:
        """The schedule's, of the step to come: in force, until ``use`` or ``set_strategy`` put another in its place."""
        return self._sequence.strategy

    def use(self, strategy: Strategy) -> None:
        """Put another strategy in force until the next step; see [SequenceScheduler][seqcompress.SequenceScheduler]."""
        self._sequence.use(strategy)

    @property
    def ladder(self) -> tuple[Strategy, ...]:
        """The strategies among which it moves, from the cheapest to the dearest."""
        return self._ladder

    @property
    def decisions(self) -> tuple[OnlineDecision, ...]:
        """All decisions so far, to stay and to move."""
        return tuple(self._decisions)

    @property
    def measured_share(self) -> float:
        """FLOPs of measuring so far, relative to those of training so far."""
        return self._measured / self._trained if self._trained else 0.0

    @property
    def measured_share_of_time(self) -> float:
        """Seconds of measuring so far, relative to those of all else until the last step; of a resumed run in all."""
        return self._seconds_measured / self._seconds_trained if self._seconds_trained else 0.0

    @property
    def is_measuring(self) -> bool:
        """Whether it may measure again; not, once a step could not be measured under an online plan."""
        return self._gave_up is None

    def tell(self, line: str, *, is_problem: bool = False) -> None:
        """Say something to the user, on rank 0: to this module's logger. For hosts that have loggers of their own."""
        _logger.log(logging.WARNING if is_problem else logging.INFO, "%s", line)

    def step(self, batch: Any, step: int | None = None, *, accumulated: int = 1) -> None:
        """Go on to the next step, or to a given one; measure, if the share allows it, and decide.

        Args:
            batch: what the step that was just done has trained on: what the function ``step`` takes.
            step: number of steps done, as for a SequenceScheduler. Measuring is collective all the same.
            accumulated: batches whose gradients the optimizer's step has averaged, ``batch`` being the last of these.
                The variance of the whole step is then taken to be that of one batch, divided by their number.

        Raises:
            ValueError: while measuring, the model is in eval mode, or gradients are not there after the backward pass.
                The model and the random states are as before.
            RuntimeError: the encoders were restored or compressed anew, or another process could not measure.
        """
        self._sequence.step(step)
        self._seconds_trained = self._seconds_before + time.perf_counter() - self._resumed_at
        tallies = self._tallies()
        done = self._forwards_since(tallies)
        self._counted, self._begun = tallies, [Counter() for _ in tallies]
        self._trained += self._price(done)
        if not self.is_measuring:
            return
        action = self._ranks.of_rank_0(self._next_action(done, accumulated))
        if action in (_Action.START, _Action.DISCARD):
            self._events = []
        if action in (_Action.START, _Action.CONTINUE):
            self._measure(batch)
            if len(self._events) == _BATCHES:
                self._decide(accumulated)

    def most_expensive(self) -> Strategy:
        """The dearest strategy of the ladder. Measuring needs the memory of the base at any time."""
        return self._ladder[-1]

    def budget_share(self, step: int) -> float:
        """Not known before the run is over.

        Raises:
            RuntimeError: always. Let a learning rate follow the steps.
        """
        raise RuntimeError("an OnlineScheduler does not know what the rest of the run will cost: count steps instead")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep: plain values, and one tensor for the batches of an open decision.

        Names and shapes are the same at every step, as torch.distributed.checkpoint wants it. The tensor has up to
        32,768 numbers for each of 4 strategies and 3 batches.
        """
        sketches = torch.zeros(_BATCHES - 1, _MOST_COMPARED, *self._sketch.shape, device="cpu")
        for row, event in zip(sketches, self._events, strict=False):
            for kept, sketch in zip(row, event.sketches.values(), strict=False):
                kept.copy_(sketch)
        events = [
            {"sketches": list(map(str, event.sketches)), "flops": [float(event.flops[each]) for each in event.sketches]}
            for event in self._events
        ]
        decisions = [
            {
                "step": decision.step,
                "before": str(decision.before),
                "after": str(decision.after),
                "report": decision.report.to_json(),
                "share": decision.share,
            }
            for decision in self._decisions
        ]
        begun = self._forwards_since(self._tallies())
        return {
            **self._sequence.state_dict(),
            "ladder": json.dumps([str(strategy) for strategy in self._ladder]),
            "compute_share": self._compute_share,
            "trained": self._trained,
            "measured": self._measured,
            "seconds_trained": self._seconds_trained,
            "seconds_measured": self._seconds_measured,
            "gave_up": -1 if self._gave_up is None else self._gave_up,
            "events": json.dumps(events),
            "sketches": sketches,
            "decisions": json.dumps(decisions),
            "begun": json.dumps([[[*forward, calls] for forward, calls in tally.items()] for tally in begun]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: from its step, with what was found and measured so far, and apply its strategy.

        Ladder, compute share and number of steps are this scheduler's own, whatever the state has; a warning says so if
        they differ. Strategies that the run was at join the ladder, and the batches of an open decision are dropped
        where other strategies are to be compared. With the same ladder, share and length, it measures and decides from
        then on what it would have, had the run not stopped.

        Raises:
            ValueError: the state is not an OnlineScheduler's, or does not suit the encoders; the message says what is
                wrong, and nothing has been changed.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"state must be an OnlineScheduler's state_dict(), got {described(state)}")
        try:
            ladder = tuple(map(Strategy.parse, read_list(state["ladder"], "ladder")))
            for encoder in self._encoders:
                encoder.check_strategies(ladder)
            if _BASE not in ladder or list(ladder) != by_cost(dict.fromkeys(ladder), self._encoders, self._flops):
                raise ValueError(f"ladder must be of rising cost, with the base, got {' / '.join(map(str, ladder))}")
            share = checked_share(state["compute_share"], "compute_share")
            trained, measured = (checked_flops(state[name], name) for name in ("trained", "measured"))
            seconds = [checked_flops(state[name], name) for name in ("seconds_trained", "seconds_measured")]
            gave_up = None if state["gave_up"] == -1 else checked_count(state["gave_up"], "gave_up", at_least=0)
            total = checked_count(state["total_steps"], "total_steps", at_least=1)
            last = checked_count(state["last_step"], "last_step", at_least=0)
            checked_count(state["seed"], "seed", at_least=0)
            decisions = [read_decision(fields, last) for fields in read_list(state["decisions"], "decisions")]
            sketches = read_sketches(state["sketches"], (_BATCHES - 1, _MOST_COMPARED, *self._sketch.shape))
            events = read_events(read_list(state["events"], "events"), sketches)
            begun = read_begun(read_list(state["begun"], "begun"), self._tallied)
            schedule = Schedule.from_json(json_text(state["schedule"], "schedule"))
            for strategy in (*schedule.strategies(), *(decision.after for decision in decisions)):
                if strategy not in ladder:
                    raise ValueError(f"schedule and decisions must be of strategies of the ladder, got {strategy!s}")
            now = schedule.at_step(last, total)
            if any(set(event.sketches) != set(compared(ladder, now)) for event in events):
                raise ValueError(f"events must be of {now!s}, its neighbours and the base")
            own = self._sequence.total_steps
            sequence = {name: state[name] for name in self._sequence.state_dict() if name in state}
            self._sequence.load_state_dict(
                {**sequence, "total_steps": own, "plan": self._sequence.state_dict()["plan"]}
            )
        except KeyError as error:
            raise ValueError(f"state is not an OnlineScheduler's: it must have the field {error}") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"state is not an OnlineScheduler's: {error}") from None
        changes: dict[str, tuple[object, object]] = {}
        if set(ladder) != set(self._ladder):
            changes["ladder"] = ("; ".join(map(str, ladder)), "; ".join(map(str, self._ladder)))
            been = (*self._ladder, *schedule.strategies(), *(decision.after for decision in decisions))
            self._ladder = tuple(by_cost(dict.fromkeys(been), self._encoders, self._flops))
            events = [event for event in events if set(event.sketches) == set(compared(self._ladder, now))]
        if share != self._compute_share:
            changes["compute_share"] = (share, self._compute_share)
        if self._plan is None:
            self._preset = Stepwise({0.0: schedule(0.0)})
        if total != own:
            changes["total_steps"] = (total, own)
            self._sequence.follow(_found(self._preset, decisions, own, gave_up))
        if changes:
            warnings.warn(f"seqcompress: {resume_notice(changes, self.strategy)}", stacklevel=2)
        self._trained, self._measured = trained, measured
        self._decisions, self._events = decisions, events
        self._gave_up = gave_up
        self._seconds_before, self._seconds_measured = seconds
        self._seconds_trained, self._resumed_at = self._seconds_before, time.perf_counter()
        self._counted, self._begun = self._tallies(), begun

    def _forwards_since(self, tallies: Sequence[Counter[Forward]]) -> list[Counter[Forward]]:
        """Those of the step that is not yet done, also from before a run was broken off in it."""
        return [now - before + begun for now, before, begun in zip(tallies, self._counted, self._begun, strict=True)]

    def _compared(self) -> list[Strategy]:
        return compared(self._ladder, self.strategy)

    def _tallies(self) -> list[Counter[Forward]]:
        return [embed.forward_counts.copy() for embed in self._tallied]

    def _price(self, done: Sequence[Counter[Forward]], strategy: Strategy | None = None) -> int:
        """FLOPs of a step's forwards, or of the same under another strategy: counted once of all steps alike."""
        key = (strategy, *(frozenset(tally.items()) for tally in done))
        if key not in self._prices:
            if len(self._prices) >= _MOST_PRICES:
                self._prices.clear()
            self._prices[key] = self._flops(
                done if strategy is None else forwards_under(strategy, self._encoders, done)
            )
        return self._prices[key]

    def _next_action(self, done: Sequence[Counter[Forward]], accumulated: int) -> _Action:
        """Whether the shares allow to measure a step like this one; at first, as many as a decision needs."""
        is_over = self.last_step >= self.total_steps or self.progress >= _end_of(self._preset)
        if is_over or not any(forward.graph for tally in done for forward in tally):
            return _Action.WAIT
        costs = {strategy: self._price(done, strategy) for strategy in self._compared()}
        is_open = bool(self._events) and set(self._events[0].sketches) == set(costs)  # else, the preset has moved on
        one, extra = sum(costs.values()) / accumulated, self._extra(costs) / accumulated
        needed = one * (1 if is_open else _BATCHES) + extra
        if self._measured + needed > self._compute_share * self._trained:
            self._say_if_too_short(done, accumulated)
            return _Action.WAIT
        if self._plan is not None and self._plan.time_share is not None:
            seconds = self._seconds_trained
            pace = self._seconds_measured / self._measured if self._measured else seconds / self._trained
            expected = pace * (one * (_BATCHES - (len(self._events) if is_open else 0)) + extra)
            # What is begun is ended if the whole run can afford it: its first batch tells what the others will take.
            until_then = seconds / self.progress if is_open else seconds
            if self._seconds_measured + expected > self._plan.time_share * until_then:
                return _Action.DISCARD if is_open else _Action.WAIT
        return _Action.CONTINUE if is_open else _Action.START

    def _say_if_too_short(self, done: Sequence[Counter[Forward]], accumulated: int) -> None:
        """At the first step, of which all others are taken to be: once, if no decision will be affordable."""
        if self._has_looked_ahead or self._measured:
            return
        self._has_looked_ahead = True
        stages, end = self._preset.stages, min(1.0, _end_of(self._preset))
        ends = [*(begin for begin, _ in stages[1:]), end]
        trained, steps = 0.0, math.inf  # FLOPs of a step's share of the run so far; steps that allow a decision
        for (begin, strategy), until in zip(stages, ends, strict=True):
            if begin >= end:
                break
            trained += (until - begin) * self._price(done, strategy)
            costs = {each: self._price(done, each) for each in compared(self._ladder, strategy)}
            needed = (_BATCHES * sum(costs.values()) + self._extra(costs)) / accumulated
            steps = min(steps, needed / (self._compute_share * trained))
        if steps > self.total_steps and self._ranks.rank == 0:
            kept = self._preset if len(stages) > 1 else stages[0][1]
            self.tell(
                f"{self.total_steps} steps are too few for a decision, and the run keeps to {kept!s}: "
                f"{self._compute_share:.3g} of its compute allow one from about {math.ceil(steps)} steps on",
                is_problem=True,
            )

    def _extra(self, flops: Mapping[Strategy, float]) -> float:
        """The base's second run on the first batch of all, which tells whether ``step`` can be put back."""
        return 0.0 if self._measured else flops[_BASE]

    def _measure(self, batch: Any) -> None:
        if any(measured.encoder.is_flattened for measured in self._encoders):  # since this was made
            if not self._is_blind and self._ranks.rank == 0:
                _logger.warning(
                    "nothing is measured, and %s stays: FullyShardedDataParallel leaves no process a whole gradient; "
                    "shard with fully_shard instead",
                    self.strategy,
                )
            self._is_blind = True
            return
        self._prices.clear()  # somebody may have replaced a head since
        compared = self._compared()
        sketches: dict[Strategy, Tensor] = {}

        def keep(strategy: Strategy, gradient: list[Tensor]) -> None:
            sketches[strategy] = self._sketch(gradient)

        problem, flops = None, {}
        clock = Clock(self._parameters[0].device)
        try:
            for encoder in self._encoders:
                encoder.check(compared)
            with (
                clock,
                running(
                    self._encoders,
                    self._parameters,
                    self._loss,
                    None,
                    self._roots,
                    seed=seed_of(self._sequence.state_dict()["seed"], self._ranks.rank),
                    first=self.last_step,
                    warm_up=not self._measured,
                    must_be_finite=False,  # a bad batch on one rank must not leave the others waiting
                    reported=self._reported,
                    strict=self._plan is not None,
                ) as runner,
            ):
                flops = runner.measure(batch, {strategy: partial(keep, strategy) for strategy in compared})
        except Exception as error:  # whatever a step raises that was never meant to be run twice
            if self._plan is None:
                self._ranks.mean(torch.ones((), device="cpu"))  # so that nobody is left waiting
                raise
            problem = (str(error).splitlines() or [""])[0] or type(error).__name__
        self._seconds_measured += clock.seconds
        self._resumed_at += clock.seconds
        if float(self._ranks.mean(torch.tensor(float(problem is not None), device="cpu"))) > 0:
            if self._plan is None:
                raise RuntimeError("another process could not measure its step, and has raised what ended it")
            self._give_up(problem or "another process could not")
            return
        self._measured += sum(flops.values()) + self._extra(flops)
        sketches = {strategy: self._ranks.mean(sketch) for strategy, sketch in sketches.items()}
        bad = [strategy for strategy, sketch in sketches.items() if not bool(sketch.isfinite().all())]
        if bad:  # known to all ranks, as sketches are means over them
            if self._ranks.rank == 0:
                what = f"its loss or gradient is not finite under {' / '.join(map(str, bad))}"
                self.tell(f"step {self.last_step}: this measurement is dropped: {what}", is_problem=True)
            return
        self._events.append(MeasuredBatch(sketches, flops))

    def _give_up(self, problem: str) -> None:
        self._gave_up, self._events = self.last_step, []
        self._follow_what_was_found()
        if self._ranks.rank == 0:
            self.tell(f"cannot be measured, and goes on with its preset: {problem}", is_problem=True)

    def _follow_what_was_found(self) -> None:
        self._sequence.follow(_found(self._preset, self._decisions, self.total_steps, self._gave_up))

    def _decide(self, accumulated: int = 1) -> None:
        sketches = [sketch for event in self._events for sketch in event.sketches.values()]  # the same on all ranks
        if not any(map(torch.any, sketches)):
            if self._plan is None:
                self._events = []
                raise ValueError(NO_GRADIENT)
            self._give_up(NO_GRADIENT)
            return
        before = self.strategy
        decision = OnlineDecision(self.last_step, before, before, self._report(accumulated), self.measured_share)
        others = [strategy for strategy in self._compared() if strategy != before]
        better = [strategy for strategy in others if decision.chance(strategy) >= _CONFIDENCE]
        after = min(better or [before], key=lambda strategy: decision.report[strategy].ca_mse)
        after = self._ladder[self._ranks.of_rank_0(self._ladder.index(after))]
        decision = OnlineDecision(self.last_step, before, after, decision.report, decision.share)
        self._decisions.append(decision)
        self._events = []
        self._follow_what_was_found()
        if self._ranks.rank == 0:
            self.tell(str(decision))

    def _report(self, accumulated: int) -> GradientErrorReport:
        base = [event.sketches[_BASE] for event in self._events]
        estimates = {}
        for strategy in self._compared():
            sketches = [event.sketches[strategy] for event in self._events]
            estimates[strategy] = {
                "bias2": norm2_of_mean([mine - other for mine, other in zip(sketches, base, strict=True)]),
                "variance": _divided(variance(sketches), accumulated),
                "cost": jackknife(
                    interquartile_mean, [event.flops[strategy] / event.flops[_BASE] for event in self._events]
                ),
            }
        return GradientErrorReport.from_estimates(
            estimates,
            norm2_of_mean(base),
            num_batches=len(self._events),
            cost_kind="flops",
            own_patch_size=self._own_patch_size,
            sketch_error=self._sketch.relative_error,
        )


def _online_plan_of(embeds: Sequence[CompressedPatchEmbed]) -> Online | None:
    """The plan that asks to be measured, if they were compressed with one."""
    plans = dict.fromkeys(embed.compression.plan for embed in embeds)
    plan = next((plan for plan in plans if isinstance(plan, Online)), None)
    if plan is not None and len(plans) > 1:
        raise ValueError(f"model_or_models must have one plan where one is online, got {len(plans)}")
    return plan


def _canonical(preset: Stepwise | Constant, own_patch_size: int | None) -> Stepwise:
    stages = preset.stages if isinstance(preset, Stepwise) else ((0.0, preset.strategy),)
    return Stepwise({begin: canonical(strategy, own_patch_size) for begin, strategy in stages})


def _end_of(preset: Stepwise) -> float:
    """From where on nothing is measured: the last of several stages is the end of any run."""
    return preset.stages[-1][0] if len(preset.stages) > 1 else math.inf


def _found(
    preset: Stepwise, decisions: Sequence[OnlineDecision], total_steps: int, gave_up: int | None = None
) -> Stepwise:
    """The preset until the first move, what was decided from there on, and the preset's end."""
    moves = {made.step / total_steps: made.after for made in decisions if made.after != made.before}
    found = {begin: strategy for begin, strategy in preset.stages if begin < min(moves, default=2.0)}
    found.update((progress, after) for progress, after in moves.items() if progress < min(1.0, _end_of(preset)))
    if moves and gave_up is not None:
        back = gave_up / total_steps
        found[min(1.0, back)] = preset(min(1.0, back))
        found.update((begin, strategy) for begin, strategy in preset.stages if begin > back)
    found.update(preset.stages[-1:] if len(preset.stages) > 1 else ())
    return Stepwise(found)


def _divided(estimate: Estimate, number: int) -> Estimate:
    rows = tuple(tuple(value / number for value in row) for row in estimate.leave_one_out)
    return Estimate(estimate.value / number, rows)
