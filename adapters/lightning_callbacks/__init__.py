"""The callback, once for each of the two Lightning packages: each has a base class of its own.

Both packages load what the functions here return into every Trainer. Importing this module imports neither torch,
timm nor Lightning.
"""

from __future__ import annotations

from typing import Any

__all__ = ["lightning_callbacks", "pytorch_lightning_callbacks"]


def lightning_callbacks() -> list[Any]:
    """Entry point for ``lightning.pytorch``."""
    from seqcompress.adapters.lightning_callbacks.lightning_pytorch import SequenceCompressionCallback

    return [SequenceCompressionCallback()]


def pytorch_lightning_callbacks() -> list[Any]:
    """Entry point for ``pytorch_lightning``."""
    from seqcompress.adapters.lightning_callbacks.pytorch_lightning import SequenceCompressionCallback

    return [SequenceCompressionCallback()]
