"""What measures under Lightning: the module's own training step, run on the batch that was just trained on.

Used by [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression] where a plan is online; nothing else
imports it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from seqcompress import OnlineScheduler
from seqcompress.encoders import CompressedPatchEmbed

__all__ = ["FILE", "TrainerOnlineScheduler", "reason_not_to"]

FILE = "seqcompress_schedule.json"
"""Name of the file, in the run's folder, that has what was found: a plan for the next run."""


class TrainerOnlineScheduler(OnlineScheduler):
    """An online schedule that follows a Trainer's count of steps. Who made it drives; this one only measures.

    Args:
        trainer: the Trainer, in training.
        pl_module: what it trains.
        embeds: the compressed patch embeddings of the encoders with the plan.
        step_and_total: steps done, and all steps of the run.
        silent_logger_class: a logger of the Lightning package's that writes nothing.
        tell: takes what users are to know, in lines, and whether something is wrong.

    Raises:
        ValueError: the encoders have nothing to be measured by.
    """

    def __init__(
        self,
        trainer: Any,
        pl_module: Any,
        embeds: Sequence[CompressedPatchEmbed],
        step_and_total: tuple[int, int],
        silent_logger_class: Callable[[], Any],
        tell: Callable[..., None],
    ) -> None:
        self._tell = tell
        self._given: _Given | None = None
        self._module_step = _ModuleStep(trainer, pl_module, silent_logger_class)
        students = [embed.encoder.model for embed in embeds if embed.drops_tokens] or [embeds[0].encoder.model]
        # Not all that optimizers keep: that is twice the weights, and changes only when they step.
        groups = [optimizer.param_groups for optimizer in trainer.optimizers]
        roots = [pl_module.training_step, pl_module, *groups]
        super().__init__(students, self._module_step, total_steps=step_and_total[1], protect=roots)

    def tell(self, line: str, *, is_problem: bool = False) -> None:
        """To whoever made it."""
        self._tell(line, is_problem=is_problem)

    def before_step(self, batch: Any) -> None:
        """A step begins, which may change what it is given."""
        self._given = _Given(batch)

    def after_step(self, batch: Any, batch_idx: int, step_and_total: tuple[int, int], accumulated: int) -> None:
        """A step is done: measure, if it is time to, with what it was given."""
        self._module_step.batch_idx = batch_idx
        given, self._given = self._given, None
        if given is not None:
            batch, self._module_step.writes_in_batches = given.batch, given.is_written_in
        done, total = step_and_total
        done = done if total == self.total_steps else round(done / total * self.total_steps)
        self.step(batch, done, accumulated=accumulated)

    def metrics(self) -> dict[str, float]:
        """For a logger: decisions and moves so far, what measuring takes, and CA-MSE of what is in force."""
        made = self.decisions
        numbers = {
            "decisions": float(len(made)),
            "moves": float(self._moves),
            "share_of_time": self.measured_share_of_time,
        }
        if made:
            numbers["ca_mse"] = getattr(made[-1].report[made[-1].after], f"{made[-1].report.shown_prefix}ca_mse")
        return {f"seqcompress/online_{name}": number for name, number in numbers.items()}

    @property
    def _moves(self) -> int:
        return sum(decision.after != decision.before for decision in self.decisions)

    def outcome(self) -> str:
        """One line at the end of a run."""
        made = self.decisions
        what = f"decided {len(made)} times and moved {self._moves} times"
        if not made:
            what = "was too short for a decision"
        if not self.is_measuring and not made:
            what = "could not be measured, and followed its preset"
        return f"the run {what}; measuring took {self.measured_share_of_time:.1%} of the time of training"


def reason_not_to(trainer: Any, pl_module: Any, plain: Any) -> str | None:
    """Why a module's own training step cannot be run again without a trace; None if nothing is known to forbid it.

    Args:
        trainer: the Trainer.
        pl_module: what it trains.
        plain: the classes of strategies that leave parameters and gradients whole.
    """
    if not pl_module.automatic_optimization:
        return "its training_step optimizes by hand"
    if not isinstance(trainer.strategy, plain):
        return f"{type(trainer.strategy).__name__} does not leave it whole gradients"
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        return "its training_step draws its own batches"
    return None


class _Given:
    """A batch as a training step was given it: dictionaries and lists are copies, and tensors are not."""

    def __init__(self, batch: Any) -> None:
        self._tensors: list[tuple[Tensor, int]] = []
        self.batch = self._taken(batch)

    @property
    def is_written_in(self) -> bool:
        """Whether a tensor has been changed in place since."""
        return any(tensor._version != version for tensor, version in self._tensors)

    def _taken(self, part: Any) -> Any:
        if isinstance(part, Tensor) and not part.is_inference():
            self._tensors.append((part, part._version))
        if type(part) is dict:
            return {key: self._taken(item) for key, item in part.items()}
        if type(part) in (list, tuple):
            return type(part)(self._taken(item) for item in part)
        return part


class _ModuleStep:
    """The loss of a batch by a LightningModule's ``training_step``, which logs nothing meanwhile."""

    def __init__(self, trainer: Any, pl_module: Any, silent_logger_class: Callable[[], Any]) -> None:
        self._trainer, self._pl_module, self._silent_logger_class = trainer, pl_module, silent_logger_class
        self._scale: float | None = None
        self.batch_idx = 0
        self.writes_in_batches = False

    def __call__(self, batch: Any) -> Tensor:
        if self.writes_in_batches:
            raise ValueError("its training_step changes the tensors of its batch in place")
        module, step = self._pl_module, self._pl_module.training_step
        takes = inspect.signature(step).parameters.values()
        several = len(takes) > 1 or any(one.kind is one.VAR_POSITIONAL for one in takes)
        with self._quiet(), self._schedules_kept(), self._trainer.precision_plugin.train_step_context():
            output = step(batch, self.batch_idx) if several else step(batch)
        loss = output["loss"] if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise ValueError(f"{type(module).__name__}.training_step must return a loss to be measured, got none")
        return loss * self._loss_scale()

    def _loss_scale(self) -> float:
        """As in training with 16 bits, where small gradients vanish; the same all the time, as scales are compared."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return 1.0
        now = float(scaler.get_scale())
        self._scale = now if self._scale is None else min(now, self._scale)
        return self._scale

    @contextmanager
    def _schedules_kept(self) -> Iterator[None]:
        """Put back learning-rate schedules that a step advances by itself."""
        schedulers = [config.scheduler for config in self._trainer.lr_scheduler_configs]
        kept = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]
        before = [getattr(scheduler, "last_epoch", None) for scheduler in schedulers]
        try:
            yield
        finally:
            for scheduler, state, last in zip(schedulers, kept, before, strict=True):
                if getattr(scheduler, "last_epoch", None) != last:
                    scheduler.load_state_dict(state)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Let nothing of a step reach the Trainer's metrics and loggers."""
        module, trainer = self._pl_module, self._trainer
        loggers = trainer.loggers
        own = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
        if loggers:
            trainer.loggers = [self._silent_logger_class() for _ in loggers]
        module.log = module.log_dict = _ignore
        try:
            yield
        finally:
            if loggers:
                trainer.loggers = loggers
            for name in ("log", "log_dict"):
                delattr(module, name)
            vars(module).update(own)


def _ignore(*args: object, **settings: object) -> None:
    """What ``log`` is while nothing is to be logged."""
