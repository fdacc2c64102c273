"""The paper's polynomial decay of the learning rate, as a torch scheduler."""

from __future__ import annotations

import numbers
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from seqcompress.checks import checked_count
from seqcompress.messages import described

__all__ = ["PolynomialDecayLR"]

_MOST = 1e40  # a learning rate that is read
_ROUNDING = 1e-6  # by which a share of the budget may miss 0 and 1


class PolynomialDecayLR(LRScheduler):
    """``lr(t) = lr0 * (1 - t) ** power``, after a linear warm-up.

    t is the share that is spent of the budget after the warm-up. With sequences of one length throughout, that is the
    share of the steps; with a schedule, pass its ``budget_share``. Source: Lin et al., NeurIPS 2024 (arXiv 2410.22364),
    with ``power=2``.

    Args:
        optimizer: its learning rates are the peaks lr0.
        total_steps: number of steps of the whole run, warm-up included, at least 1.
        power: exponent of the decay, above 0.
        warmup_steps: steps over which the rate rises linearly to its peak; less than ``total_steps``.
        share: maps a number of steps done to the share of the budget spent, such as
            ``SequenceScheduler.budget_share``. Not saved with the state.
        last_epoch: as in every torch scheduler.

    Raises:
        TypeError: ``optimizer`` is none, or a number of steps no whole number.
        ValueError: an argument is out of range, or what ``share`` returns, then or later.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = PolynomialDecayLR(optimizer, total_steps=10)
        >>> for _ in range(5):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> scheduler.get_last_lr()
        [0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        power: float = 2.0,
        warmup_steps: int = 0,
        share: Callable[[int], float] | None = None,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {described(optimizer)}")
        total_steps, warmup_steps, power = _checked_curve(total_steps, warmup_steps, power)
        if share is not None and not callable(share):
            raise ValueError(f"share must be a function of the number of steps, got {described(share)}")
        self.total_steps: int = total_steps
        self.warmup_steps: int = warmup_steps
        self.power: float = power
        self._share: Callable[[int], float] | None = share
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group after ``last_epoch`` steps."""
        factor = self._factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """As in every torch scheduler, without the function ``share``."""
        return {name: value for name, value in super().state_dict().items() if name != "_share"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in every torch scheduler: goes on with the saved lengths and power, and says so if they are others.

        Raises:
            ValueError: the state is not such a scheduler's; the message names the field, and nothing has been changed.
        """
        state_dict = self._checked_state(state_dict)
        for name in ("total_steps", "warmup_steps", "power"):
            own = getattr(self, name)
            if name in state_dict and state_dict[name] != own:
                warnings.warn(
                    f"seqcompress: the learning rate goes on with the saved state's {name}={state_dict[name]!r}, not "
                    f"with the scheduler's own {own!r}",
                    stacklevel=2,
                )
        super().load_state_dict(state_dict)

    def _checked_state(self, state: Any) -> dict[str, Any]:
        """What a state has of this scheduler's own fields: torch would set any attribute, the optimizer included."""
        if not isinstance(state, Mapping):
            raise ValueError(f"state_dict must be a PolynomialDecayLR's, got {described(state)}")
        own = self.state_dict()
        known = {name: value for name, value in state.items() if name in own}
        try:
            whole = {**own, **known}
            _checked_curve(*(whole[name] for name in ("total_steps", "warmup_steps", "power")))
            for name in ("last_epoch", "_step_count"):
                checked_count(whole[name], name, at_least=0)
            for name in ("base_lrs", "_last_lr"):
                rates = whole[name]
                if not isinstance(rates, list) or len(rates) != len(own[name]) or not all(map(_is_rate, rates)):
                    raise ValueError(f"{name} must be {len(own[name])} learning rates, got {described(rates)}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"state_dict is not a PolynomialDecayLR's: {error}") from None
        return known

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        begin, now = self._spent(self.warmup_steps), self._spent(min(step, self.total_steps))
        if begin == 1.0:  # nothing is left to be spent
            return 0.0
        return float(max(0.0, 1.0 - (now - begin) / (1.0 - begin)) ** self.power)

    def _spent(self, step: int) -> float:
        if self._share is None:
            return step / self.total_steps
        spent = float(self._share(step))
        if not -_ROUNDING <= spent <= 1.0 + _ROUNDING:
            raise ValueError(f"share must return a share of the budget in [0, 1], got {spent} after {step} steps")
        return min(1.0, max(0.0, spent))


def _checked_curve(total_steps: Any, warmup_steps: Any, power: Any) -> tuple[int, int, float]:
    total_steps = checked_count(total_steps, "total_steps", at_least=1)
    warmup_steps = checked_count(warmup_steps, "warmup_steps", at_least=0)
    if warmup_steps >= total_steps:
        raise ValueError(f"warmup_steps must be a whole number in [0, total_steps), got {described(warmup_steps)}")
    number: Any = power
    if isinstance(power, bool) or not isinstance(power, numbers.Real) or not 0 < number <= sys.float_info.max:
        raise ValueError(f"power must be a finite number above 0, got {described(power)}")
    return total_steps, warmup_steps, float(number)


def _is_rate(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        return False
    return value.numel() == 1 and bool(value.isfinite()) if isinstance(value, Tensor) else abs(value) < _MOST
