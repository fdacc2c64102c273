"""The callback for ``lightning.pytorch``."""

from __future__ import annotations

import logging

from lightning.pytorch.callbacks import BatchSizeFinder, Callback, StochasticWeightAveraging, Timer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from seqcompress.adapters.solo_learn import SoloLearn

__all__ = ["SequenceCompressionCallback"]


class SequenceCompressionCallback(SoloLearn, Callback):
    """See [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression], and what solo-learn adds to it."""

    host = logging.getLogger("lightning.pytorch.seqcompress")
    timers = Timer
    averaging = StochasticWeightAveraging
    finders = BatchSizeFinder
    silent = DummyLogger
    plain = (SingleDeviceStrategy, DDPStrategy)
