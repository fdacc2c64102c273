"""The Lightning callback that drives compressed encoders. It comes by itself.

Both Lightning packages load callbacks from entry points into every Trainer. Whatever LightningModule holds
encoders that ``compress`` or ``accelerate`` has wrapped gets its schedule advanced and its budget counted; for
any other, the callback does nothing. Importing this module imports neither torch, timm nor Lightning.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqcompress.budget import Budget
    from seqcompress.rehearsal import Foresight
    from seqcompress.sequence_scheduler import SequenceScheduler
    from seqcompress.strategy import Strategy

__all__ = ["SequenceCompression"]

_logger = logging.getLogger(__name__)


class SequenceCompression:
    """What the callbacks of both Lightning packages have in common: all but their base class.

    At every batch the strategy is the schedule's at ``global_step / estimated_stepping_batches``, which is the
    same on every rank; under manual optimization it is the share of the batches that is done.

    Logged after every batch, to whatever logger there is: ``seqcompress/token_dropout``,
    ``seqcompress/patch_size`` (pixels), ``seqcompress/tokens`` (the student's, in a view of the size the encoder
    was built for) and ``seqcompress/budget`` (millions of units, all ranks together). The progress bar shows them
    as ``seq_drop``, ``seq_patch``, ``seq_tokens`` and ``seq_budget``.

    On a device with memory of its own, the second step is run at the schedule's most expensive strategy, as soon
    as the optimizer has its state: a run that will not fit stops there and not at three quarters. The log says what
    the longest sequences need; if they do not fit, torch's error is raised as ever, and the log says, on CUDA
    devices and by estimate from the first step, what they need and what would fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scheduler: SequenceScheduler | None = None
        self._budget: Budget | None = None
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
        """Log what this step was run at, and what has been spent so far."""
        if self._scheduler is None or self._budget is None:
            return
        from seqcompress.compression import get_strategy
        from seqcompress.cost import num_tokens
        from seqcompress.families import find_encoder

        student = next((embed for embed in self._scheduler.embeds if embed.drops_tokens), self._scheduler.embeds[0])
        family, encoder = find_encoder(student.encoder)
        strategy = get_strategy(encoder)
        values = {
            ("token_dropout", "seq_drop"): strategy.token_dropout,
            ("patch_size", "seq_patch"): float(strategy.patch_size or min(family.patch_size(encoder))),
            ("tokens", "seq_tokens"): float(num_tokens(encoder, strategy, family.image_size(encoder))),
            ("budget", "seq_budget"): self._budget.millions * self._ranks,
        }
        for (name, short), value in values.items():
            pl_module.log(f"seqcompress/{name}", value, on_step=True, on_epoch=False, batch_size=1)
            # A terminal is narrow: the progress bar would cut a longer name, and then there is no number.
            pl_module.log(short, value, on_step=True, on_epoch=False, batch_size=1, prog_bar=True, logger=False)
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

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Say why and what would help, if the longest sequences do not fit, or not even the first ones."""
        if self._foresight is None or self._scheduler is None:
            return
        from seqcompress.rehearsal import is_out_of_memory

        if is_out_of_memory(exception):
            self._foresight.ran_out(self._rehearsing or self._scheduler.strategy)
            _logger.error("seqcompress: %s", self._foresight.shortage())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the model; the strategy stays where the schedule left it."""
        if self._scheduler is not None:
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
        from seqcompress.budget import Budget
        from seqcompress.sequence_scheduler import SequenceScheduler

        self._scheduler = SequenceScheduler(pl_module, total_steps=_total_steps(trainer))
        self._budget = Budget(pl_module)
        self._ranks = trainer.world_size
        if self._loaded:
            self._scheduler.load_state_dict({**self._scheduler.state_dict(), "seed": self._loaded["seed"]})
            self._budget.load_state_dict({"units": self._loaded["units"] / self._ranks})
        self._scheduler.step(_steps_done(trainer, pl_module, batch_idx))
        if not self._loaded:
            self._foresight = self._foresight_on(pl_module.device)

    def _foresight_on(self, device: Any) -> Foresight | None:
        if self._scheduler is None or device.type == "cpu":
            return None
        from seqcompress.rehearsal import DeviceMemory, Foresight

        return Foresight(self._scheduler, DeviceMemory.of(device))

    def _forget(self) -> None:
        self._scheduler = self._budget = self._foresight = self._rehearsing = None

    def state_dict(self) -> dict[str, Any]:
        """Seed of the random subsets and units spent by all ranks. The step is the Trainer's own."""
        if self._scheduler is None or self._budget is None:
            return self._loaded
        return {"seed": self._scheduler.state_dict()["seed"], "units": self._budget.units * self._ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._loaded = dict(state_dict)


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
