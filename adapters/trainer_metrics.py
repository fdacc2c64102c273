"""What a Trainer logs and shows of compressed encoders, and where it keeps that. Imports neither torch nor Lightning.

Used by [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression]; nothing else imports it. What is
logged has to be where the Trainer looks for it without waiting for the device: much of that Lightning keeps private.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from seqcompress.adapters.online import TrainerOnlineScheduler
    from seqcompress.encoders import CompressedPatchEmbed
    from seqcompress.strategy import Strategy

__all__ = ["Readings", "TrainerMetrics", "run_at"]

_SHOWN_AS = {  # in the progress bar: a terminal is narrow, it would cut a longer name, and then there is no number
    "seqcompress/token_dropout": "seq_drop",
    "seqcompress/patch_size": "seq_patch",
    "seqcompress/tokens": "seq_tokens",
    "seqcompress/budget": "seq_budget",
    "seqcompress/batch_factor": "seq_batch",
}
_SECONDS_SHOWN = 0.5  # nobody reads numbers that change faster, and the budget takes a moment to count


class Readings:
    """What there is to tell about a run: the strategy of its latest step, and what has been spent.

    Args:
        embeds: the compressed patch embeddings of the module; at least one.
        millions: counts the units that all ranks have spent; None where that cannot be counted.
        online: what measures for an online plan, if there is one.
    """

    def __init__(
        self,
        embeds: list[CompressedPatchEmbed],
        millions: Callable[[], float | None],
        online: TrainerOnlineScheduler | None,
    ) -> None:
        from seqcompress.encoders import student_among

        self._student = student_among(embeds)
        self._millions = millions
        self._online = online
        self.take_reading()

    def take_reading(self, together: int | None = None) -> None:
        """A step is done, by batches so many of which were run at once."""
        from seqcompress.strategy import Strategy

        is_training = self._student.encoder.model.training  # in eval mode it runs plain
        self._strategy, self._together = self._student.strategy if is_training else Strategy(), together

    def values(self) -> dict[str, float]:
        """The metrics of the latest step."""
        from seqcompress.training.cost import sequence_length

        encoder, strategy = self._student.encoder, run_at(self._student, self._strategy)
        patch_size = strategy.patch_size or min(encoder.patch_size)
        tokens = sequence_length(encoder, self._student.strategy_for_full_views(strategy))
        numbers = {
            "seqcompress/token_dropout": strategy.token_dropout,
            "seqcompress/patch_size": patch_size,
            "seqcompress/tokens": tokens,
            "seqcompress/budget": self._millions(),
            "seqcompress/batch_factor": self._together,
        }
        return {name: float(number) for name, number in numbers.items() if number is not None}

    def online_values(self) -> dict[str, float]:
        """Those of an online plan, which are logged and not shown."""
        return {} if self._online is None else self._online.metrics()


class TrainerMetrics:
    """Puts readings where a Trainer keeps what it logs and shows; for one fit."""

    def __init__(self) -> None:
        self._logged: bool | None = None  # whether the Trainer logs the latest step; None before the first one
        self._shown = float("-inf")  # when the progress bar got its numbers

    def log(self, trainer: Any, pl_module: Any, readings: Readings) -> None:
        """Log a step that is done if the Trainer does, publish it where others look next, or show it after a while."""
        self._logged = False
        self._logged = bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)
        if self._logged or trainer.is_last_batch or trainer.global_step == trainer.max_steps:
            metrics = self.publish(trainer, readings)
            if self._logged:
                for name, value in metrics.items():
                    pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
        elif time.monotonic() - self._shown >= _SECONDS_SHOWN and _has_progress_bar(trainer):
            self._show(trainer, readings.values())

    def log_the_end(self, trainer: Any, readings: Readings) -> None:
        """Log how training ended, unless its last step was logged."""
        if self._logged is not False or not trainer.log_every_n_steps:
            return
        step = max(0, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        metrics = {name: value.item() for name, value in self.publish(trainer, readings).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
            logger.save()

    def publish(self, trainer: Any, readings: Readings) -> dict[str, Tensor]:
        """Put the metrics where the Trainer keeps those of the latest step."""
        import torch

        values = readings.values()
        # On the CPU: of numbers, Lightning makes tensors on the device, and each of these waits for the device.
        metrics = {
            name: torch.tensor(value, dtype=torch.float32, device="cpu")
            for name, value in {**values, **readings.online_values()}.items()
        }
        # The public properties would read whatever else was logged, and wait for the device too.
        trainer._logger_connector._callback_metrics.update(metrics)
        trainer._logger_connector._logged_metrics.update(metrics)
        self._show(trainer, values)
        return metrics

    def withdraw(self, trainer: Any) -> None:
        """Take those of an earlier step from Lightning: where a step is logged since training stops, they are old."""
        if not self._logged:
            return
        for name, result in trainer._results.items():
            if name.startswith("on_train_batch_end.seqcompress/"):
                result.has_reset = True

    def _show(self, trainer: Any, values: dict[str, float]) -> None:
        shown = {_SHOWN_AS[name]: value for name, value in values.items()}
        trainer._logger_connector._progress_bar_metrics.update(shown)
        self._shown = time.monotonic()


def run_at(embed: CompressedPatchEmbed, strategy: Strategy | None = None) -> Strategy:
    """The strategy, by default the one in force; a student builds no graph and runs plain while all of it is frozen."""
    from seqcompress.encoders import is_frozen
    from seqcompress.strategy import Strategy

    is_plain = embed.when == "grad" and is_frozen(embed.encoder.model)
    return Strategy() if is_plain else strategy or embed.strategy


def _has_progress_bar(trainer: Any) -> bool:
    return trainer.is_global_zero and trainer.progress_bar_callback is not None
