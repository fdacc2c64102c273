"""The callback for ``lightning.pytorch``."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from seqcompress.adapters.lightning import SequenceCompression

__all__ = ["SequenceCompressionCallback"]


class SequenceCompressionCallback(SequenceCompression, Callback):
    """See [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression]."""
