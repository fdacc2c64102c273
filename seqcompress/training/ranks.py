"""What the processes of a distributed run agree on: on the CPU, so that no device has to wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["Ranks"]


class Ranks:
    """The processes that train together; one alone, where there is no process group.

    A group of its own is made where the default one takes no tensors on the CPU, at the first thing that is agreed on,
    and anew when the default one has been replaced. A copy makes its own.
    """

    def __init__(self) -> None:
        self._world: Any = None
        self._group: Any = None

    @property
    def are_several(self) -> bool:
        """Whether there is anybody to agree with."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def own(self) -> int:
        """The number of this process."""
        return dist.get_rank() if self.are_several else 0

    def agreed(self, number: int) -> int:
        """Rank 0's number. Collective."""
        if not self.are_several:
            return number
        agreed = torch.tensor([number], device="cpu")
        dist.broadcast(agreed, src=0, group=self._on_the_cpu())
        return int(agreed.item())

    def mean(self, values: Tensor) -> Tensor:
        """The mean of all ranks' tensors, which are on the CPU and may be overwritten. Collective."""
        if not self.are_several:
            return values
        dist.all_reduce(values, group=self._on_the_cpu())
        return values / dist.get_world_size()

    def _on_the_cpu(self) -> Any:
        if self._world is not dist.group.WORLD:  # none yet, or that one was destroyed since
            self._world, self._group = dist.group.WORLD, _group_on_the_cpu()
        return self._group

    def __getstate__(self) -> dict[str, Any]:
        return {"_world": None, "_group": None}  # a process group cannot be copied


def _group_on_the_cpu() -> Any:
    """The default process group if it takes tensors on the CPU, else one beside it that waits as long."""
    world: Any = dist.group.WORLD
    if "gloo" in dist.get_backend() or "mpi" in dist.get_backend():
        return world
    try:
        timeout = world._get_backend(torch.device("cuda")).options._timeout  # there is no public way to read it
    except (AttributeError, RuntimeError):
        timeout = None
    return dist.new_group(backend="gloo", timeout=timeout)
