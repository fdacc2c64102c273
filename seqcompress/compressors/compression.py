"""What encoders share that were compressed together: a plan, the strategy in force, and who drives it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from seqcompress.compressors.token_dropout import SubsetStream
from seqcompress.schedules import Constant, Schedule
from seqcompress.strategy import Strategy

if TYPE_CHECKING:
    from seqcompress.views import ScaledViews

__all__ = ["Compression"]


class Compression:
    """What the encoders that were compressed together share: one plan, one strategy, one random stream, one driver.

    A constant plan is in force at once. A schedule is in force while somebody drives it: an object that has claimed it
    and is alive, or whoever calls ``set_strategy`` by hand. Else the base strategy is, so that a schedule nobody
    advances costs speed and never accuracy. A copy, pickled or deep, has no driver.

    Args:
        plan: what the encoders were compressed with.
        strategy: the one to begin with; by default, the plan's first.
        stream: the seeds of random subsets.
        views: there if loaders make smaller views for the encoders.

    Attributes:
        finished: whether the plan has been run to its end, as its driver says. Who drives by itself, without being
            asked to, drives no such encoders: they stay plain.
    """

    def __init__(
        self,
        plan: Schedule,
        strategy: Strategy | None = None,
        stream: SubsetStream | None = None,
        views: ScaledViews | None = None,
    ) -> None:
        self.plan = plan
        self.stream = SubsetStream() if stream is None else stream
        self.views = views
        self.finished = False
        self._strategy = plan(0.0) if strategy is None else strategy
        self._by_hand = False
        self._driver: weakref.ref[Any] | None = None
        self._driver_name: str | None = None

    @property
    def strategy(self) -> Strategy:
        """The strategy in force: the base one under a schedule that nobody drives."""
        return self._strategy if self.driven_by is not None or isinstance(self.plan, Constant) else Strategy()

    @strategy.setter
    def strategy(self, strategy: Strategy) -> None:
        self._strategy = strategy

    @property
    def driver(self) -> Any | None:
        """Who has claimed the encoders and is alive, or None."""
        return None if self._driver is None else self._driver()

    @property
    def driven_by(self) -> str | None:
        """The name of the driver for people; "set_strategy" where it is done by hand; None for nobody."""
        if self.driver is not None:
            return self._driver_name
        return "set_strategy" if self._by_hand else None

    def check_free(self, driver: object) -> None:
        """Whether ``driver`` may claim the encoders: nobody else has, or nobody who is still alive.

        Raises:
            RuntimeError: somebody has; the message names them.
        """
        if self.driver not in (None, driver):
            raise RuntimeError(
                f"the encoders are driven by {self._driver_name} already, and one drives at a time: go on with that "
                "one, let go of it (del), or compress(model, plan) anew"
            )

    def claim(self, driver: object, name: str) -> None:
        """Drive the encoders from now on, as the only one. Nothing but a weak reference is kept.

        Args:
            driver: whoever advances the plan.
            name: how a message is to name it, such as "a SequenceScheduler".

        Raises:
            RuntimeError: another driver is alive; nothing has been changed.
        """
        self.check_free(driver)
        self._driver, self._driver_name, self._by_hand = weakref.ref(driver), name, False

    def release(self, driver: object) -> None:
        """Drive them no more. Does nothing for one that does not."""
        if self.driver is driver:
            self._driver = None

    def set_by_hand(self, strategy: Strategy) -> None:
        """Put a strategy in force, which counts as driving.

        Raises:
            RuntimeError: a driver is alive; nothing has been changed.
        """
        self.check_free(None)
        self._strategy, self._by_hand = strategy, True

    def notice_missing_driver(self) -> str | None:
        """What a schedule lacks to take effect, in a sentence for people, or None; to be called as training runs."""
        if self.driven_by is not None or isinstance(self.plan, Constant):
            return None
        if self.views is not None:  # a driver that is gone may have left small ones
            self.views.ask_for(Strategy())
        if self.finished:
            return None
        whose = "nobody drives" if self._driver_name is None else f"{self._driver_name} drove, which is gone"
        return (
            f"training is uncompressed: the encoder has a schedule that {whose}. Make and keep a "
            "SequenceScheduler(model, total_steps=...), and call its step() after every training step; under "
            "Lightning, a callback does so. For a plain encoder, restore(model)"
        )

    def __getstate__(self) -> dict[str, Any]:
        # The driver drives the original; a weak reference cannot be pickled anyway.
        return {**vars(self), "_driver": None, "_driver_name": None}
