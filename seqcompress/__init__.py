"""Cheaper self-supervised pretraining of Vision Transformers.

Wrap a backbone in one line and train it on shortened sequences:
``seqcompress.compress(backbone, seqcompress.Strategy(token_dropout=0.5, patch_size=32))``.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

__version__ = "0.1.0"


def _public_names() -> dict[str, str]:
    """Each public name with the module that it comes from, as the stub beside this file says."""
    stub = pkgutil.get_data(__name__, "__init__.pyi") or b""
    return {name: module for module, name in re.findall(r"^from (\S+) import (\w+) as", stub.decode(), re.MULTILINE)}


# Imported on first use: Lightning imports this package at the start of every Trainer (the entry points of its
# callbacks), and must not pay for timm where nothing is compressed.
_MODULES = _public_names()

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _MODULES[name] == __name__:  # a module of this package
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
