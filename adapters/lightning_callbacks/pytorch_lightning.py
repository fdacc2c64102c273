"""The callback for ``pytorch_lightning``."""

from __future__ import annotations

from pytorch_lightning.callbacks import Callback

from seqcompress.adapters.lightning import SequenceCompression

__all__ = ["SequenceCompressionCallback"]


class SequenceCompressionCallback(SequenceCompression, Callback):
    """See [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression]."""
