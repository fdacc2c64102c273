"""The callbacks for ``pytorch_lightning``."""

from __future__ import annotations

from pytorch_lightning.callbacks import Callback

from seqcompress.adapters.lightning import SequenceCompression
from seqcompress.adapters.solo_learn import SoloLearn

__all__ = ["SequenceCompressionCallback", "SoloLearnCallback"]


class SequenceCompressionCallback(SequenceCompression, Callback):
    """See [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression]."""


class SoloLearnCallback(SoloLearn, Callback):
    """See [SoloLearn][seqcompress.adapters.solo_learn.SoloLearn]."""
