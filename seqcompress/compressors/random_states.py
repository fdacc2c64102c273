"""The global random states that a training step or an augmentation may use, to be put back."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

__all__ = ["RandomStates", "numpy_if_loaded"]


class RandomStates:
    """The global random states of torch on the CPU and on CUDA, of numpy if it is in use, and of Python."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._numpy = numpy.random.get_state() if (numpy := numpy_if_loaded()) else None

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._numpy is not None:
            numpy_if_loaded().random.set_state(self._numpy)

    @staticmethod
    def seed(seed: int) -> None:
        """Set all of them from one number."""
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        if numpy := numpy_if_loaded():
            numpy.random.seed(seed % 2**32)


def numpy_if_loaded() -> Any:
    """The module, or None where nothing has imported it."""
    return sys.modules.get("numpy")
