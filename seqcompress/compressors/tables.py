"""Tensors that depend on a few numbers only: made once, and never under a mode that would change what they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from typing import Any, Generic, ParamSpec

import torch
from torch import Tensor

from seqcompress.compressors.execution import in_function_transform, is_fake

__all__ = ["Table"]

_Arguments = ParamSpec("_Arguments")


class Table(Generic[_Arguments]):
    """Function decorator: the 64 latest tensors are kept.

    Under ``FakeTensorMode``, a tensor that was kept would be refused and one that is made has no values; under a
    function transform (``torch.func.grad``), one that is made belongs to that transform. Neither is kept. Nor is one
    that is kept ever an inference tensor, even if inference mode asks first.
    """

    def __init__(self, function: Callable[_Arguments, Tensor]) -> None:
        self._function = function
        self._kept: Any = lru_cache(maxsize=64)(function)
        update_wrapper(self, function)

    def __call__(self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Tensor:
        with torch.inference_mode(False):
            if is_fake() or in_function_transform():
                return self._function(*args, **kwargs)
            table: Tensor = self._kept(*args, **kwargs)
            return table

    def cache_info(self) -> Any:
        """As of ``functools.lru_cache``."""
        return self._kept.cache_info()
