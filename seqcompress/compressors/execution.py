"""How torch is running the code that asks: for real, again in a backward pass, for shapes alone, or for a graph."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["has_values", "in_backward", "in_function_transform", "is_exporting", "is_fake"]


def in_backward() -> bool:
    """Whether gradient checkpointing is running a forward again."""
    return torch._C._current_graph_task_id() != -1


def in_function_transform() -> bool:
    """Whether ``torch.func.grad``, ``vmap`` or their like is running this code."""
    return torch._C._functorch.maybe_current_level() is not None


def is_exporting() -> bool:
    """Whether ``torch.export`` is; before torch 2.7, which told no more, whether anything is compiled."""
    exporting = getattr(torch.compiler, "is_exporting", None)
    return torch.compiler.is_compiling() if exporting is None else bool(exporting())


def is_fake() -> bool:
    """Whether tensors that are made now have no values (``FakeTensorMode``)."""
    return type(torch.empty(0, device="cpu")) is not Tensor


def has_values(tensor: Tensor) -> bool:
    """Whether its values can be looked at."""
    return not (tensor.device.type == "meta" or is_fake() or in_function_transform())
