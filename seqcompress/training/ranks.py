"""What the processes of a distributed run agree on: on the CPU, so that no device has to wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["Ranks"]


class Ranks:
    """The processes that train together; one alone, where there is no process group.

    A group of its own is made where the default one takes no tensors on the CPU, at the first thing that is agreed on,
    and anew when the default one has been replaced. It waits as long as torch lets such a group wait, 30 minutes: how
    long the default one waits, torch tells by no public name. A copy makes its own.
    """

    # Of all, and for good: with torch 2.6, a process that lets go of what was sent before torch's own thread does may
    # never end, as each waits for the other.
    _number = torch.zeros(1, dtype=torch.int64, device="cpu")
    _sent: Tensor | None = None

    def __init__(self) -> None:
        self._world: Any = None
        self._group: Any = None

    @property
    def is_distributed(self) -> bool:
        """Whether there is anybody to agree with."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def rank(self) -> int:
        """The number of this process."""
        return dist.get_rank() if self.is_distributed else 0

    def of_rank_0(self, number: int) -> int:
        """Rank 0's number. Collective.

        Raises:
            RuntimeError: the others did not come, as for ``mean``.
        """
        if not self.is_distributed:
            return number
        agreed = Ranks._number.fill_(number)
        self._run_collective(lambda group: dist.broadcast(agreed, src=0, group=group))
        return int(agreed.item())

    def mean(self, values: Tensor) -> Tensor:
        """The mean of all ranks' tensors, which are on the CPU and may be overwritten. Collective."""
        if not self.is_distributed:
            return values
        Ranks._sent = values
        self._run_collective(lambda group: dist.all_reduce(values, group=group))
        return values / dist.get_world_size()

    def _run_collective(self, do: Callable[[Any], object]) -> None:
        if self._world is not dist.group.WORLD:  # none yet, or that one was destroyed since
            self._world, self._group = dist.group.WORLD, _group_on_the_cpu()
        try:
            do(self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} waited in vain for the others to agree on the next step: every rank must make the "
                "scheduler and call its step() as often (or pass it the number of the step, which waits for nobody), "
                "and where one is busy alone for long, all must be told to wait as long: "
                f"init_process_group('cpu:gloo,cuda:nccl', timeout=...). torch says: {error}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"_world": None, "_group": None}  # a process group cannot be copied


def _group_on_the_cpu() -> Any:
    """The default process group if it takes tensors on the CPU, else one beside it."""
    takes_them = "cpu:" in dist.get_backend_config()
    return dist.group.WORLD if takes_them else dist.new_group(backend="gloo")
