"""How long a Trainer's run is, and how far it has come. Imports neither torch nor Lightning."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["RunLength"]

_MOMENTS = 10**6  # in the time of a run


class RunLength:
    """How long a run is and how far it has come, as its Trainer counts.

    Args:
        trainer: the Trainer, in training.
        pl_module: what it trains.
        timer_class: the class of callbacks that end a run after a time.
        weight_averaging_class: the class of callbacks that may add an epoch in which nothing is trained.
        batches: see the attribute.

    Attributes:
        batches: how many the last epoch had, if these were fewer than its loader had promised.
    """

    def __init__(
        self, trainer: Any, pl_module: Any, timer_class: Any, weight_averaging_class: Any, batches: int | None
    ) -> None:
        self._trainer, self._pl_module = trainer, pl_module
        self._timers = [
            timer
            for timer in trainer.callbacks
            if isinstance(timer, timer_class) and timer.time_remaining("train") is not None
        ]
        self._averaging = [callback for callback in trainer.callbacks if isinstance(callback, weight_averaging_class)]
        self._time = 0.0  # share of it that had passed as the step began
        self._steps_before = int(trainer.global_step)  # of all optimizers, as the batch before began
        self._steps_a_batch = 1  # more where a module steps several by hand
        self.batches = batches

    @property
    def _epochs(self) -> float:
        """Epochs that train; infinite without a limit."""
        limit = self._trainer.max_epochs
        limits = [float("inf") if limit in (None, -1) else limit]
        return min([*limits, *(callback.swa_end + 1 for callback in self._averaging)])

    @property
    def _batches_an_epoch(self) -> float:
        """Infinite for a stream whose first epoch has not ended."""
        expected: float = self._trainer.num_training_batches
        return expected if self.batches is None else min(expected, self.batches)

    def check(self) -> None:
        """Raise ValueError unless a schedule can go by this length."""
        trainer = self._trainer
        by_epochs = self._epochs < float("inf") and (self._batches_an_epoch < float("inf") or self._epochs > 1)
        if not by_epochs and trainer.max_steps == -1 and not self._timers:
            raise ValueError(
                "a schedule needs to know how long training is: set max_epochs, max_steps or max_time of the Trainer "
                f"(for a loader without a length, max_steps, max_time or more than one epoch), got "
                f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}"
            )

    def first_of_step(self, batch: int) -> int:
        """The batch of this epoch with which the optimizer step of ``batch`` begins."""
        if not self._pl_module.automatic_optimization:
            return batch
        return batch - batch % int(self._trainer.accumulate_grad_batches)

    def begin_step(self, batch: int) -> float:
        """Progress, in [0, 1], at which the optimizer step of a batch of this epoch is to be run."""
        if self._timers:
            self._time = self.share_of_time()
        steps = int(self._trainer.global_step)
        if steps > self._steps_before:
            self._steps_a_batch, self._steps_before = steps - self._steps_before, steps
        return self.share(self.first_of_step(batch))

    def share(self, batches: int) -> float:
        """Share of the run that is done, in [0, 1], after some batches of this epoch."""
        trainer, shares = self._trainer, [0.0, self._time]
        if trainer.max_steps != -1:
            shares.append(trainer.global_step / trainer.max_steps if trainer.max_steps else 1.0)
        if self._epochs < float("inf"):
            of_this = min(1.0, batches / self._batches_an_epoch) if self._batches_an_epoch else 1.0
            shares.append((trainer.current_epoch + of_this) / self._epochs if self._epochs else 1.0)
        return min(1.0, max(shares))

    def step_and_total(self, batches: int) -> tuple[int, int]:
        """The same in steps, those done and all, as if every epoch were as long as this one."""
        trainer, counts = self._trainer, [(round(self._time * _MOMENTS), _MOMENTS)]
        if trainer.max_steps > 0:
            # The last batch's steps are over before another begins.
            total = max(1, int(trainer.max_steps) - self._steps_a_batch + 1)
            counts.append((int(trainer.global_step), total))
        if 0 < self._epochs < float("inf"):
            epochs, steps, done = int(self._epochs), _MOMENTS, 0  # of a length that the first epoch will show
            if 0 < self._batches_an_epoch < float("inf"):
                each = int(trainer.accumulate_grad_batches) if self._pl_module.automatic_optimization else 1
                steps = math.ceil(self._batches_an_epoch / each)
                done = min(steps, batches // each)
            counts.append((trainer.current_epoch * steps + done, epochs * steps))
        # The nearest to its end; of equal ones, the shortest.
        return max(counts, key=lambda count: (count[0] / count[1], -count[1]))

    def share_of_time(self) -> float:
        """Share of the time that has passed, the same on every rank; 0 without a limit."""
        if not self._timers:
            return 0.0
        shares = []
        for timer in self._timers:
            elapsed, remaining = timer.time_elapsed("train"), timer.time_remaining("train")
            shares.append(elapsed / (elapsed + remaining) if elapsed + remaining > 0 else 1.0)
        share = min(1.0, max(shares))
        return float(self._trainer.strategy.broadcast(share)) if self._trainer.world_size > 1 else share

    def pace(self) -> float:
        """About what a batch adds to the share; rather more than less."""
        trainer = self._trainer
        paces = [self._time / max(1, trainer.fit_loop.total_batch_idx)]
        if trainer.max_steps > 0:
            paces.append(1 / trainer.max_steps)
        if 0 < self._epochs < float("inf") and self._batches_an_epoch:
            paces.append(1 / (self._epochs * self._batches_an_epoch))
        return max(paces)

    def note_epoch(self, batches: int) -> None:
        """An epoch is over, after so many batches."""
        trainer = self._trainer
        if trainer.should_stop or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps):
            return  # it was broken off
        if trainer.world_size > 1:
            batches = int(trainer.strategy.broadcast(batches))
        self.batches = batches if 0 < batches < trainer.num_training_batches else None
