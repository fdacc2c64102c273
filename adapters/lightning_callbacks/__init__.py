"""The callback, once for each of the two Lightning packages: each has a base class of its own.

Both packages load what the functions here return into every Trainer. Importing this module imports neither torch,
timm nor Lightning.
"""

from __future__ import annotations

import warnings
from typing import Any

from seqcompress.versions import SUPPORTED, check_version, is_too_old

__all__ = ["lightning_callbacks", "pytorch_lightning_callbacks"]


def lightning_callbacks() -> list[Any]:
    """Entry point for ``lightning.pytorch``."""
    import lightning

    if _is_too_old("lightning", lightning.__version__):
        return []
    from seqcompress.adapters.lightning_callbacks.lightning_pytorch import SequenceCompressionCallback

    return [SequenceCompressionCallback()]


def pytorch_lightning_callbacks() -> list[Any]:
    """Entry point for ``pytorch_lightning``."""
    import pytorch_lightning

    if _is_too_old("pytorch-lightning", pytorch_lightning.__version__):  # type: ignore[attr-defined]
        return []
    from seqcompress.adapters.lightning_callbacks.pytorch_lightning import SequenceCompressionCallback

    return [SequenceCompressionCallback()]


def _is_too_old(package: str, version: str) -> bool:
    """Whether to stay away, with a word: an error would end the runs of those, too, who compress nothing."""
    if is_too_old(package, version):
        warnings.warn(
            f"seqcompress: {package} {version} is not supported, {package} >= {SUPPORTED[package].oldest} is: no "
            "callback is added, and schedules are not advanced",
            stacklevel=2,
        )
        return True
    check_version(package, version)
    return False
