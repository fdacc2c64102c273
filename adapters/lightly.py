"""What Lightly's users call: the core's ``accelerate``, which needs nothing of Lightly's."""

from __future__ import annotations

from seqcompress.pairs import accelerate

__all__ = ["accelerate"]
