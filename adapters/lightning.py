"""The Lightning callback that drives compressed encoders. It comes by itself.

Both Lightning packages load callbacks from entry points into every Trainer. Whatever LightningModule holds
encoders that ``compress`` or ``accelerate`` has wrapped gets its schedule advanced and its budget counted; for
any other, the callback does nothing. Importing this module imports neither torch, timm nor Lightning.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from seqcompress.strategy import Strategy
    from seqcompress.training.budget import Budget
    from seqcompress.training.rehearsal import Foresight
    from seqcompress.training.sequence_scheduler import SequenceScheduler

__all__ = ["SequenceCompression"]

_logger = logging.getLogger(__name__)

_SHOWN_AS = {  # in the progress bar: a terminal is narrow, it would cut a longer name, and then there is no number
    "seqcompress/token_dropout": "seq_drop",
    "seqcompress/patch_size": "seq_patch",
    "seqcompress/tokens": "seq_tokens",
    "seqcompress/budget": "seq_budget",
}
_SECONDS_SHOWN = 0.5  # nobody reads numbers that change faster, and the budget takes a moment to count


class SequenceCompression:
    """What the callbacks of both Lightning packages have in common: all but their base class.

    At every batch the strategy is the schedule's at ``global_step / estimated_stepping_batches``, which is the
    same on every rank; under manual optimization it is the share of the batches that is done.

    Logged to whatever logger there is, with all that the Trainer logs at its ``log_every_n_steps``:
    ``seqcompress/token_dropout``, ``seqcompress/patch_size`` (pixels), ``seqcompress/tokens`` (the student's, in a
    view of the size the encoder was built for) and ``seqcompress/budget`` (millions of units, all ranks together);
    and once more at the end of training. ``trainer.callback_metrics`` has them from those steps, from the end of
    every full epoch and from before every validation. The progress bar shows them as ``seq_drop``, ``seq_patch``,
    ``seq_tokens`` and ``seq_budget``. Other steps compute none of it, and none of it is ever on the device.

    On a device with memory of its own, the second step is run at the schedule's most expensive strategy, as soon
    as the optimizer has its state: a run that will not fit stops there and not at three quarters. The log says what
    the longest sequences need; if they do not fit, torch's error is raised as ever, and the log says, on CUDA
    devices and by estimate from the first step, what they need and what would fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scheduler: SequenceScheduler | None = None
        self._budget: Budget | None = None
        self._readings: _Readings | None = None
        self._logged: bool | None = None  # whether the Trainer logs the latest step; None before the first one
        self._shown = float("-inf")  # when the progress bar got its numbers
        self._loaded: dict[str, Any] = {}
        self._foresight: Foresight | None = None  # until the rehearsal is over
        self._rehearsing: Strategy | None = None
        self._ranks = 1
        self._looked = False

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Have full views made at first: workers start before it is known how far training has come."""
        if _is_compressed(pl_module):
            from seqcompress.compression import compressed_embeds
            from seqcompress.strategy import Strategy

            for embed in compressed_embeds(pl_module):
                if embed.compression.views is not None:
                    embed.compression.views.ask_for(Strategy())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget what an interrupted fit may have left."""
        self._forget()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Look again: the module may compress or restore its encoders between epochs, or as training starts."""
        self._looked = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put the strategy of this step in force."""
        if self._logged:
            _withdraw(trainer)
        if not self._looked:
            self._looked = True
            self._look(trainer, pl_module, batch_idx)
        if self._scheduler is None:
            return
        step = _steps_done(trainer, pl_module, batch_idx)
        if self._scheduler.last_step != step:
            self._scheduler.step(step)
        if self._foresight is not None:
            if step > 0:
                self._rehearsing = self._scheduler.most_expensive()
                self._scheduler.use(self._rehearsing)
            self._foresight.begin()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Note what the step has needed so far."""
        if self._foresight is not None:
            self._foresight.note_backward()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what this step was run at, and what has been spent so far, if this step is one to be logged."""
        if self._scheduler is None or self._readings is None:
            return
        self._readings.note()
        self._logged = bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)
        if self._logged or trainer.is_last_batch or trainer.global_step == trainer.max_steps:
            metrics = self._publish(trainer, self._readings)
            if self._logged:
                for name, value in metrics.items():
                    pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
        elif time.monotonic() - self._shown >= _SECONDS_SHOWN and _has_progress_bar(trainer):
            self._show(trainer, self._readings.values())
        if self._foresight is None:
            return
        if self._rehearsing is None:
            self._foresight.fitted(self._scheduler.strategy)
        else:
            if trainer.is_global_zero:
                _logger.info("seqcompress: %s", self._foresight.rehearsal(self._rehearsing))
            if self._rehearsing != self._scheduler.strategy:
                self._scheduler.step(self._scheduler.last_step)
            self._foresight = self._rehearsing = None

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Let checkpoints and early stopping, which follow, see how far training has come."""
        if self._readings is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._publish(trainer, self._readings)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Say why and what would help, if the longest sequences do not fit, or not even the first ones."""
        if self._foresight is None or self._scheduler is None:
            return
        from seqcompress.training.rehearsal import is_out_of_memory

        if is_out_of_memory(exception):
            self._foresight.ran_out(self._rehearsing or self._scheduler.strategy)
            _logger.error("seqcompress: %s", self._foresight.shortage())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Log how training ended, and let go of the model; the strategy stays where the schedule left it."""
        if self._scheduler is not None:
            if self._readings is not None and self._logged is False and trainer.log_every_n_steps:
                step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
                trainer._logger_connector.log_metrics(self._publish(trainer, self._readings), step=max(0, step))
            self._scheduler.step(_steps_done(trainer, pl_module))
            self._loaded = self.state_dict()
        self._forget()

    def _look(self, trainer: Any, pl_module: Any, batch_idx: int) -> None:
        """Find the compressed encoders, and take up the schedule where it stands."""
        if self._scheduler is not None and self._scheduler.is_current:
            return
        self._loaded = self.state_dict()
        self._forget()
        if not _is_compressed(pl_module):
            return
        from seqcompress.training.budget import Budget
        from seqcompress.training.sequence_scheduler import SequenceScheduler

        self._scheduler = SequenceScheduler(pl_module, total_steps=_total_steps(trainer))
        self._budget = Budget(pl_module)
        self._ranks = trainer.world_size
        self._readings = _Readings(self._scheduler, self._budget, self._ranks)
        if self._loaded:
            self._scheduler.load_state_dict({**self._scheduler.state_dict(), "seed": self._loaded["seed"]})
            self._budget.load_state_dict({"units": self._loaded["units"] / self._ranks})
        self._scheduler.step(_steps_done(trainer, pl_module, batch_idx))
        if not self._loaded:
            self._foresight = self._foresight_on(pl_module.device)

    def _foresight_on(self, device: Any) -> Foresight | None:
        if self._scheduler is None or device.type == "cpu":
            return None
        from seqcompress.training.rehearsal import DeviceMemory, Foresight

        return Foresight(self._scheduler, DeviceMemory.of(device))

    def _publish(self, trainer: Any, readings: _Readings) -> dict[str, Tensor]:
        """Put the metrics where the Trainer keeps those of the latest step."""
        import torch

        values = readings.values()
        # On the CPU: of numbers, Lightning makes tensors on the device, and each of these waits for the device.
        metrics = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
        # The public properties would read whatever else was logged, and wait for the device too.
        trainer._logger_connector._callback_metrics.update(metrics)
        trainer._logger_connector._logged_metrics.update(metrics)
        self._show(trainer, values)
        return metrics

    def _show(self, trainer: Any, values: dict[str, float]) -> None:
        shown = {_SHOWN_AS[name]: value for name, value in values.items()}
        trainer._logger_connector._progress_bar_metrics.update(shown)
        self._shown = time.monotonic()

    def _forget(self) -> None:
        self._scheduler = self._budget = self._readings = self._foresight = self._rehearsing = None
        self._logged, self._shown = None, float("-inf")

    def state_dict(self) -> dict[str, Any]:
        """Seed of the random subsets and units spent by all ranks. The step is the Trainer's own."""
        if self._scheduler is None or self._budget is None:
            return self._loaded
        return {"seed": self._scheduler.state_dict()["seed"], "units": self._budget.units * self._ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._loaded = dict(state_dict)


class _Readings:
    """What there is to tell about a run: the strategy of its latest step, and what has been spent."""

    def __init__(self, scheduler: SequenceScheduler, budget: Budget, ranks: int) -> None:
        from seqcompress.encoders import find_encoder

        self._student = next((embed for embed in scheduler.embeds if embed.drops_tokens), scheduler.embeds[0])
        self._family, self._encoder = find_encoder(self._student.encoder)
        self._budget = budget
        self._ranks = ranks
        self.note()

    def note(self) -> None:
        """A step is done."""
        self._strategy = self._student.strategy

    def values(self) -> dict[str, float]:
        """The metrics of the latest step."""
        from seqcompress.training.cost import num_tokens

        patch_size = self._strategy.patch_size or min(self._family.patch_size(self._encoder))
        tokens = num_tokens(self._encoder, self._strategy, self._family.image_size(self._encoder))
        numbers = (self._strategy.token_dropout, patch_size, tokens, self._budget.millions * self._ranks)
        return dict(zip(_SHOWN_AS, map(float, numbers), strict=True))


def _withdraw(trainer: Any) -> None:
    """Take the metrics of an earlier step from Lightning: where a step is logged since training stops, they are old."""
    for name in _SHOWN_AS:
        if (result := trainer._results.get(f"on_train_batch_end.{name}")) is not None:
            result.has_reset = True


def _has_progress_bar(trainer: Any) -> bool:
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def _is_compressed(module: Any) -> bool:
    # Where the compressors were never imported, nothing can be compressed: not even a look is taken.
    if "seqcompress.compression" not in sys.modules:
        return False
    from seqcompress.compression import is_compressed

    return is_compressed(module)


def _total_steps(trainer: Any) -> int:
    total = trainer.estimated_stepping_batches  # infinite without a limit, -1 for a loader without a length
    if not 0 < total < float("inf"):
        raise ValueError(
            "a schedule needs to know how long training is: set max_epochs or max_steps of the Trainer "
            f"(max_steps for a loader without a length), got max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps}"
        )
    return int(total)


def _steps_done(trainer: Any, pl_module: Any, batch_idx: int = 0) -> int:
    if pl_module.automatic_optimization or trainer.max_steps != -1:
        return trainer.global_step
    # Manual optimization may step its optimizers several times in a batch, or once in several batches.
    return trainer.current_epoch * trainer.num_training_batches + batch_idx
