"""Weights that FullyShardedDataParallel has flattened: of what shape they are, and how to get past the wrappers.

``fully_shard`` needs nothing of this: its parameters tell the shape of the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "is_flattened",
    "is_tensor_parallel",
    "is_wrapped",
    "past_wrappers",
    "shapes_of",
    "whole",
    "wrapped_by_fsdp",
]


def wrapped_by_fsdp(module: nn.Module) -> nn.Module | None:
    """What ``FullyShardedDataParallel`` wraps, or None for a module of any other kind."""
    return module.module if isinstance(module, _wrapper()) else None


@contextmanager
def past_wrappers(model: nn.Module) -> Iterator[None]:
    """Have a model run its blocks directly: around them, FullyShardedDataParallel would gather weights of its own."""
    put_back = []
    wrapper = _wrapper()
    try:
        for module in list(model.modules()) if wrapper else ():
            for name, child in list(module.named_children()):
                if isinstance(child, wrapper) and not isinstance(module, wrapper):
                    put_back.append((module, name, child))
                    module.register_module(name, child.module)
        yield
    finally:
        for module, name, child in put_back:
            module.register_module(name, child)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Those of its parameters and buffers as they are now, by their names in the model without wrappers."""
    with past_wrappers(model):
        return {name: value.shape for name, value in _weights(model)}


def is_flattened(shapes: dict[str, torch.Size], whole: dict[str, torch.Size]) -> bool:
    """Whether parameters of these shapes are pieces of what they were."""
    return any(name.rpartition(".")[2] == "_flat_param" for name in shapes) or any(
        len(shapes.get(name, shape)) < len(shape) for name, shape in whole.items()
    )


def is_wrapped(model: nn.Module) -> bool:
    """Whether FullyShardedDataParallel is around something in it, or around itself."""
    wrapper = _wrapper()
    return any(isinstance(module, wrapper) for module in model.modules())


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether processes compute parts of one sample's features: weights are split otherwise than by ``fully_shard``."""
    distributed, fsdp = sys.modules.get("torch.distributed.tensor"), sys.modules.get("torch.distributed.fsdp")
    if distributed is None:  # never imported, so no weights are split
        return False
    sharding = () if fsdp is None else getattr(fsdp, "FSDPModule", ())
    sharded = {
        id(weight) for module in model.modules() if isinstance(module, sharding) for weight in module.parameters()
    }
    return any(
        id(weight) not in sharded or sum(placement.is_shard() for placement in weight.placements) > 1
        for weight in model.parameters()
        if isinstance(weight, distributed.DTensor)
    )


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process may hold a part, as under ``fully_shard``; then it is collective."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def _wrapper() -> Any:
    """The class that wraps, as isinstance takes it: none where it was never imported, so that nothing is wrapped."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else fsdp.FullyShardedDataParallel


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
