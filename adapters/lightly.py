"""What Lightly's users call: the core's ``accelerate``, which needs nothing of Lightly's."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from seqcompress.pairs import accelerate
from seqcompress.versions import check_version

__all__ = ["accelerate"]

try:
    _installed = version("lightly")
except PackageNotFoundError:  # Lightly's code may be there without being installed
    pass
else:
    check_version("lightly", _installed)
