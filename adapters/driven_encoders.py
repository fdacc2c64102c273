"""Encoders that a Trainer drives by the plan they have in common, and what there is to say of it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqcompress.encoders import CompressedPatchEmbed, Compression
    from seqcompress.schedules import Online, Schedule
    from seqcompress.strategy import Strategy

__all__ = ["DrivenEncoders", "compressed_together", "embeds_by_path", "share_of_plain_budget"]

CALLBACK = "the Lightning callback"
_SAMPLES = 200  # of a schedule, to say what it will cost


def embeds_by_path(pl_module: Any) -> dict[str, CompressedPatchEmbed]:
    """The compressed patch embeddings that a module holds, by their names in it; each once."""
    from seqcompress.encoders import CompressedPatchEmbed

    return {path: module for path, module in pl_module.named_modules() if isinstance(module, CompressedPatchEmbed)}


def compressed_together(embeds: dict[str, CompressedPatchEmbed]) -> Iterable[dict[str, CompressedPatchEmbed]]:
    """Those that were compressed together."""
    groups: dict[Compression, dict[str, CompressedPatchEmbed]] = {}
    for path, embed in embeds.items():
        groups.setdefault(embed.compression, {})[path] = embed
    return groups.values()


class DrivenEncoders:
    """The encoders that were compressed together, and their plan.

    Args:
        number: of this group in its module, for random subsets of its own.
        group: the compressed patch embeddings by path; at least one.
    """

    def __init__(self, number: int, group: dict[str, CompressedPatchEmbed]) -> None:
        self._number = number
        self._group = group
        self.embeds = tuple(group.values())
        self.compression = self.embeds[0].compression
        self.plan: Schedule = self.compression.plan
        self.strategy = self.compression.strategy
        self._step: int | None = None
        self.forwards = 0  # of the step that is taken up, where a run goes on in the middle of it

    @property
    def name(self) -> str:
        """Where the module has the encoder; the student, of a pair."""
        of_students = ((path, embed) for path, embed in self._group.items() if embed.drops_tokens)
        path, embed = next(of_students, next(iter(self._group.items())))
        names = (name for name, module in embed.encoder.model.named_modules() if module is embed)
        within = next(names, path.rpartition(".")[2])
        return path.removesuffix(within).rstrip(".") or "the encoder"

    @property
    def student(self) -> Any:
        """The encoder that drops tokens; the only one, if it is a teacher's."""
        return self._student_embed.encoder

    @property
    def _student_embed(self) -> CompressedPatchEmbed:
        from seqcompress.encoders import student_among

        return student_among(self.embeds)

    @property
    def is_constant(self) -> bool:
        """Whether the plan is a Strategy, which needs nobody to advance it; a schedule of one stage does."""
        from seqcompress.schedules import Constant

        return isinstance(self.plan, Constant) and not self.is_online

    @property
    def is_online(self) -> bool:
        """Whether the plan asks for measuring; what it follows then is what was found so far."""
        from seqcompress.schedules import Online

        return isinstance(self.compression.plan, Online)

    @property
    def is_finished(self) -> bool:
        """Whether the plan has been run to its end."""
        return self.compression.finished

    @property
    def is_others(self) -> bool:
        """Whether something else drives them. A callback that is left over from another Trainer does not."""
        return self.compression.driven_by not in (None, CALLBACK)

    def take(self, driver: object) -> None:
        """Drive a schedule from now on. A constant plan needs no driver, so that others may come."""
        if not self.is_constant:
            self.compression.release(self.compression.driver)
            self.compression.claim(driver, CALLBACK)

    def release(self, driver: object) -> None:
        """Let others drive; until then, a schedule leaves the encoder plain."""
        self.compression.release(driver)

    def ends_at(self, progress: float) -> bool:
        """Whether nothing of the plan is left at this progress."""
        return self.plan(progress) == self.plan(1.0)

    def finish(self) -> None:
        """The plan has been run to its end, which every later fit is told. A constant one has none."""
        self.compression.finished = not self.is_constant
        self.compression.warns_when_finished = False

    def most_expensive(self, accumulated: int = 1) -> Strategy:
        """The strategy of the plan with the longest sequences; with the most tokens at once, of merged batches."""
        from seqcompress.adapters.merging import most_together
        from seqcompress.training.cost import batch_factor

        def tokens(strategy: Strategy) -> tuple[int, int]:
            together = most_together(batch_factor(self._student_embed, strategy), accumulated)
            return together * self.tokens(self._student_embed.strategy_for_full_views(strategy)), self.tokens(strategy)

        return max((*self.plan.strategies(), *self.compression.plan.strategies()), key=tokens)

    def follow(self, step_and_total: tuple[int, int], step: int, seed: int, pace: float) -> None:
        """Put in force what the plan has at this place of the run, and have views made for what comes next.

        Args:
            step_and_total: steps done, and all steps of the run.
            step: decides the random subsets, with the seed; those of a step's batches follow each other.
            seed: of the run, the same on every rank.
            pace: which share of the run a batch is.
        """
        if self.is_others:  # who has come since, which a constant plan allows
            return
        self.compression.count_step()
        if step != self._step:
            self.compression.stream.anchor(seed, step, self._number, self.forwards)
            self._step, self.forwards = step, 0
        done, total = step_and_total
        self.strategy = self.plan.at_step(done, total)
        self.use(self.strategy)
        views = self.compression.views
        if views is not None and not self.is_constant:
            views.ask_ahead(lambda batches: self.plan.at_step(done + math.ceil(batches * pace * total - 1e-6), total))

    def have_first_views_made(self) -> None:
        """Have loaders make views for the beginning: their workers start before training does."""
        if not self.is_constant:
            self.compression.ask_views_for(self.plan(0.0))

    def use(self, strategy: Strategy) -> None:
        """Put a strategy of the plan in force until the next step."""
        if not self.is_constant:
            self.compression.strategy = strategy

    def tokens(self, strategy: Strategy) -> int:
        """The student's, in a view of the size it was built for."""
        from seqcompress.training.cost import sequence_length

        return sequence_length(self.student, strategy)

    def outlook(self, progress: float, share: float | None, names: list[str]) -> str:
        """One line: what will happen to the encoders of these names."""
        from seqcompress.encoders import is_frozen
        from seqcompress.strategy import Strategy

        who, start, end = " and ".join(names), self.plan(progress), self.plan(1.0)
        if self.is_others:
            return f"{who}: driven by {self.compression.driven_by}, and left to it; only logged here"
        if self.is_finished:
            return (
                f"{who}: trains plain, at {self._at(Strategy())}, as its schedule has been run to its end; for another "
                "run of it, call compress(model, plan) again and fit without ckpt_path, the weights alone loaded"
            )
        from seqcompress.schedules import Online

        planned = set(self.plan.strategies())
        what = f"{who}: trains at {self._at(start)}"
        if len(planned) > 1:
            what += f" now, {self._at(end)} in the end"
        if planned != {Strategy()}:
            if share is not None:
                what += f", about {share:.0%} of the plain run's budget{' from here on' if progress else ''}"
            if self._student_embed.can_be_masked and any(strategy.token_dropout for strategy in planned):
                what += "; views that are masked keep all tokens, and cost more"
            teachers = [embed for embed in self.embeds if not embed.drops_tokens]
            if teachers:
                scales = any(strategy.patch_size is not None for strategy in planned)
                what += f"; its teacher gets {'the patch size' if scales else 'nothing of it'}"
        if self._student_embed.when == "grad" and is_frozen(self.student.model):
            what += "; it is frozen, and runs plain until it is trained"
        elif not self.student.model.training:
            what += "; it is in eval mode, and runs plain until train() is called on it"
        if isinstance(plan := self.compression.plan, Online):
            what += f"; this is a preset, until gradient error is measured to be less elsewhere, {_limits(plan)}"
        return what

    def shortfall(self, progress: float) -> str:
        """One line: what is missing of a plan whose run has ended at this progress."""
        end = self.plan(1.0)
        return (
            f"{self.name}: the run ended before its plan, at {progress:.0%} of it and {self._at(self.strategy)}: it "
            f"never trained at {self._at(end)}, and its figures are worse for it; to add what is missing, let "
            "trainer.fit(module, ckpt_path=...) go on to the end, or call compress(model, "
            f"{_written(end)}) and fit for some more epochs"
        )

    def _at(self, strategy: Strategy) -> str:
        return f"{strategy} ({self.tokens(strategy)} tokens a view)"


def share_of_plain_budget(driven: list[DrivenEncoders], progress: float) -> float:
    """What the rest of a run at the plan that these have in common takes, relative to plain training."""
    from seqcompress.strategy import Strategy
    from seqcompress.training.cost import StepCosts

    cost = StepCosts((embed.encoder, embed.drops_tokens) for encoders in driven for embed in encoders.embeds)
    moments = ((number + 0.5) / _SAMPLES for number in range(_SAMPLES))
    spent = sum(cost(driven[0].plan(progress + (1 - progress) * moment)) for moment in moments)
    return spent / _SAMPLES / cost(Strategy())


def _limits(plan: Online) -> str:
    time_too = "" if plan.time_share is None else f" and at most {plan.time_share:.0%} of its time"
    return f"in at most {plan.compute_share:.0%} of the compute of training{time_too}"


def _written(strategy: Strategy) -> str:
    from seqcompress.strategy import Strategy

    return "Strategy()" if strategy == Strategy() else repr(str(strategy))
