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
    from seqcompress.sequence_scheduler import SequenceScheduler
    from seqcompress.strategy import Strategy

__all__ = ["SequenceCompression", "lightning_callbacks", "pytorch_lightning_callbacks"]

_logger = logging.getLogger(__name__)


def lightning_callbacks() -> list[Any]:
    """Entry point for ``lightning.pytorch``."""
    from seqcompress.adapters.lightning_callbacks.lightning_pytorch import SequenceCompressionCallback

    return [SequenceCompressionCallback()]


def pytorch_lightning_callbacks() -> list[Any]:
    """Entry point for ``pytorch_lightning``."""
    from seqcompress.adapters.lightning_callbacks.pytorch_lightning import SequenceCompressionCallback

    return [SequenceCompressionCallback()]


class SequenceCompression:
    """What the callbacks of both Lightning packages have in common: all but their base class.

    At every batch the strategy is the schedule's at ``global_step / estimated_stepping_batches``, which is the
    same on every rank. Logged after every batch, to whatever logger there is and to the progress bar:
    ``seqcompress/token_dropout``, ``seqcompress/patch_size`` (pixels), ``seqcompress/tokens`` (student's
    tokens in a view of the size the encoder was built for) and ``seqcompress/budget`` (millions of units).

    On a device with memory of its own, the very first batch is run at the schedule's most expensive strategy:
    a run that will not fit stops there and not at three quarters.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scheduler: SequenceScheduler | None = None
        self._budget: Budget | None = None
        self._loaded: dict[str, Any] = {}
        self._rehearsing: Strategy | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the compressed encoders and take up the schedule where it stood."""
        if not _is_compressed(pl_module):
            return
        from seqcompress.budget import Budget
        from seqcompress.sequence_scheduler import SequenceScheduler

        self._scheduler = SequenceScheduler(pl_module, total_steps=_total_steps(trainer))
        self._budget = Budget(pl_module)
        if self._loaded:
            self._scheduler.load_state_dict({**self._scheduler.state_dict(), "seed": self._loaded["seed"]})
            self._budget.load_state_dict(self._loaded["budget"])
        self._scheduler.step(trainer.global_step)
        if pl_module.device.type != "cpu" and not self._loaded:
            longest = self._scheduler.most_expensive()
            self._rehearsing = None if longest == self._scheduler.strategy else longest

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put the strategy of this step in force."""
        if self._scheduler is None:
            return
        if self._scheduler.last_step != trainer.global_step:
            self._scheduler.step(trainer.global_step)
        if self._rehearsing is not None:
            self._scheduler.use(self._rehearsing)

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
            "seqcompress/token_dropout": strategy.token_dropout,
            "seqcompress/patch_size": float(strategy.patch_size or min(family.patch_size(encoder))),
            "seqcompress/tokens": float(num_tokens(encoder, strategy, family.image_size(encoder))),
            "seqcompress/budget": self._budget.millions,
        }
        for name, value in values.items():
            shown = name in ("seqcompress/tokens", "seqcompress/budget")
            pl_module.log(name, value, on_step=True, on_epoch=False, prog_bar=shown, batch_size=1)
        if self._rehearsing is not None:
            from seqcompress.rehearsal import Rehearsal, memory_use

            _logger.info("seqcompress: %s", Rehearsal(self._rehearsing, *memory_use(pl_module.device)))
            self._rehearsing = None
            self._scheduler.step(self._scheduler.last_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Say why, if it was the longest sequences that did not fit."""
        if self._rehearsing is not None and "out of memory" in str(exception).lower():
            _logger.error(
                "seqcompress: the longest sequences of this schedule (%s) do not fit into memory. Lower the batch "
                "size, use gradient checkpointing, or end the schedule at a stronger compression.",
                self._rehearsing,
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the model; the strategy stays where the schedule left it."""
        if self._scheduler is not None:
            self._scheduler.step(trainer.global_step)
            self._loaded = self.state_dict()
        self._scheduler = self._budget = self._rehearsing = None

    def state_dict(self) -> dict[str, Any]:
        """Seed of the random subsets and budget spent. The step is the Trainer's own."""
        if self._scheduler is None or self._budget is None:
            return self._loaded
        return {"seed": self._scheduler.state_dict()["seed"], "budget": self._budget.state_dict()}

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
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise ValueError("a schedule needs to know how long training is: set max_epochs or max_steps of the Trainer")
    return max(1, int(total))
