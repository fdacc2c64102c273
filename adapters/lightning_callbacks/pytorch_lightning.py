"""The callback for ``pytorch_lightning``."""

from __future__ import annotations

import logging

from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
)
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from seqcompress.adapters.lightly_train import LightlyTrain
from seqcompress.adapters.solo_learn import SoloLearn

__all__ = ["SequenceCompressionCallback"]


class SequenceCompressionCallback(LightlyTrain, SoloLearn, Callback):
    """See [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression], and what two hosts add to it."""

    logger = logging.getLogger("pytorch_lightning.seqcompress")
    timer_class = Timer
    weight_averaging_class = StochasticWeightAveraging
    finder_classes = (BatchSizeFinder, LearningRateFinder)
    silent_logger_class = DummyLogger
    whole_gradient_strategies = (SingleDeviceStrategy, DDPStrategy)
