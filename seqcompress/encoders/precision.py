"""Single precision to its last digit, while tokens are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_precision"]


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no bfloat16 in place of float32, whatever the user allows; put back as it was.

    A GPU takes TF32 for convolutions by default, and not for the matrix products that stand in for them here: equal
    tokens would differ by a thousandth.
    """
    before = [(place, place.fp32_precision) for place in _places()]
    matmul, convolution = _read(torch.get_float32_matmul_precision), _read(lambda: torch.backends.cudnn.allow_tf32)
    try:
        if matmul not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        if convolution:
            torch.backends.cudnn.allow_tf32 = False
        for place in _places():
            if place.fp32_precision not in ("none", "ieee"):
                place.fp32_precision = "ieee"
        yield
    finally:
        if matmul not in (None, "highest"):
            torch.set_float32_matmul_precision(matmul)
        if convolution:
            torch.backends.cudnn.allow_tf32 = True
        for place, precision in before:
            if place.fp32_precision != precision:
                place.fp32_precision = precision


def _places() -> list[Any]:
    """Where each kind of product has a precision of its own (since torch 2.9)."""
    backends: Any = torch.backends
    kinds = [
        (backends.cuda, "matmul"),
        (backends.cudnn, "conv"),
        (backends.mkldnn, "matmul"),
        (backends.mkldnn, "conv"),
    ]
    places = [getattr(backend, kind, None) for backend, kind in kinds]
    return [place for place in places if hasattr(place, "fp32_precision")]


def _read(setting: Any) -> Any:
    """An older setting, or None where the user has mixed older and newer ones, which torch then refuses to read."""
    try:
        return setting()
    except RuntimeError:
        return None
