"""The callback for ``lightning.pytorch``."""

from __future__ import annotations

import logging

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from seqcompress.adapters.solo_learn import SoloLearn

__all__ = ["SequenceCompressionCallback"]


class SequenceCompressionCallback(SoloLearn, Callback):
    """See [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression], and what solo-learn adds to it."""

    logger = logging.getLogger("lightning.pytorch.seqcompress")
    timer_class = Timer
    weight_averaging_class = StochasticWeightAveraging
    finder_classes = (BatchSizeFinder, LearningRateFinder)
    silent_logger_class = DummyLogger
    whole_gradient_strategies = (SingleDeviceStrategy, DDPStrategy)
