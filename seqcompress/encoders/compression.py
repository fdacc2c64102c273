"""What encoders share that were compressed together: a plan, the strategy in force, and who drives it."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal, Protocol

from torch.optim.optimizer import register_optimizer_step_post_hook

from seqcompress.compressors.token_dropout import SubsetStream
from seqcompress.schedules import Constant, Online, Schedule
from seqcompress.strategy import Strategy

__all__ = ["BatchPolicy", "Compression", "SmallerViews", "say"]

BatchPolicy = Literal["merge"]

_MANY_UPDATES = 100
_FEW_UPDATES = 2  # one is what a checkpoint that is loaded, or SAM's step up, looks like


class SmallerViews(Protocol):
    """What makes smaller views for encoders where their patches are larger."""

    def ask_for(self, strategy: Strategy, /) -> None:
        """Have views made for this strategy from now on."""

    def ask_ahead(self, strategy_after: Callable[[int], Strategy], /) -> None:
        """Have views made for what will be in force so many steps from now."""

    def full_size(self, view: tuple[int, int], /) -> tuple[int, int]:
        """The size in pixels that a view would have had."""

    def observe(self, view: tuple[int, int], /) -> None:
        """A view of this size has come to an encoder."""


class Compression:
    """What the encoders that were compressed together share: one plan, one strategy, one random stream, one driver.

    A constant plan is in force at once. A schedule is in force while somebody drives it: an object that has claimed it
    and is alive, or code that calls ``set_strategy`` by hand. Otherwise the base strategy is, so that a schedule nobody
    advances costs speed and never accuracy. A copy, pickled or deep, has no driver, but one of encoders that are driven
    by hand is so, too.

    Args:
        plan: what the encoders were compressed with.
        stream: the seeds of random subsets.
        views: there if loaders make smaller views for the encoders.
        batch: as in [compress][seqcompress.compress].

    Attributes:
        members: the patch embeddings of these encoders, those of copies in other processes or files excluded.
        masks_are_drawn: whether the host has read the grid in force off one of the encoders, to draw masks for all.
        batch: "merge" if a host is to run several batches at once while sequences are short, else None.
        finished: whether the plan has been run to its end, as its driver says. A driver that comes by itself, as the
            Lightning callback does, leaves such encoders alone: they stay plain.
        warns_when_finished: whether an encoder that is trained on says that its schedule has ended.
        steps_left: of the driver's run, as it says; None where it does not.
    """

    # Where it was pickled before there were these, too.
    batch: BatchPolicy | None = None
    masks_are_drawn = False
    steps_left: int | None = None
    warns_when_finished = True

    def __init__(
        self,
        plan: Schedule,
        stream: SubsetStream | None = None,
        views: SmallerViews | None = None,
        batch: BatchPolicy | None = None,
    ) -> None:
        self.plan = plan
        self.stream = SubsetStream() if stream is None else stream
        self.views = views
        self.batch = batch
        self.finished = False
        self.members: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()  # a set that keeps its order
        self._strategy = plan(0.0)
        self._by_hand = False
        self._driver: weakref.ref[Any] | None = None
        self._driver_name: str | None = None
        self._said: set[str] = set()  # what was said of this driver, or of its absence
        self._was_stepped = False  # whether the driver has advanced the plan
        self._updates = 0  # by optimizers since it came
        self._has_run = False  # whether the encoders have trained since the last of them

    @property
    def strategy(self) -> Strategy:
        """The strategy in force: the base one under a schedule that nobody drives."""
        return self._strategy if self.driven_by is not None or isinstance(self.plan, Constant) else Strategy()

    @strategy.setter
    def strategy(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def ask_views_for(self, strategy: Strategy) -> None:
        """Have smaller views made for this strategy, if any are made at all."""
        if self.views is not None:
            self.views.ask_for(strategy)

    def full_size(self, view: tuple[int, int]) -> tuple[int, int]:
        """The size in pixels that a view would have had, had it not been made smaller."""
        return view if self.views is None else self.views.full_size(view)

    def observe(self, view: tuple[int, int]) -> None:
        """A view of this size has come, which may not be one that was asked for."""
        if self.views is not None:
            self.views.observe(view)

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
            driver: what advances the plan.
            name: how a message is to name it, such as "a SequenceScheduler".

        Raises:
            RuntimeError: another driver is alive; nothing has been changed.
        """
        self.check_free(driver)
        self._driver, self._driver_name, self._by_hand = weakref.ref(driver), name, False
        self._was_stepped, self._updates = False, 0
        self._said = set()
        self.warns_when_finished = True
        if not isinstance(self.plan, Constant):
            _watch_optimizers()
            _waiting_for_a_step.add(self)

    def count_step(self) -> None:
        """The driver has advanced the plan, which it is expected to do at every step."""
        self._was_stepped = True
        _waiting_for_a_step.discard(self)

    def release(self, driver: object) -> None:
        """Drive them no more. Does nothing for one that does not."""
        if self.driver is driver:
            self._driver = None
            _waiting_for_a_step.discard(self)

    def note_update(self) -> None:
        """An optimizer has made a step; if the encoders have run since the one before, it was theirs."""
        self._updates += self._has_run
        self._has_run = False

    def set_by_hand(self, strategy: Strategy) -> None:
        """Put a strategy in force. Where nobody drives, this does; else it holds until the driver's next step."""
        self._strategy, self._by_hand = strategy, self.driver is None
        if self.driver is not None and self._is_new("will not stay"):
            warnings.warn(
                f"seqcompress: the encoders are driven by {self._driver_name}, whose own strategy is back at its next "
                "step; to drive them by hand, compress(model, plan) anew",
                stacklevel=3,
            )

    def notice_missing_driver(self) -> str | None:
        """What a schedule lacks to take effect, in a sentence for people, once; to be called as training runs."""
        if self.driven_by is not None or isinstance(self.plan, Constant):
            return None
        self.ask_views_for(Strategy())  # a driver that is gone may have left small ones
        if self.finished:
            if not self.warns_when_finished or not self._is_new("its end"):
                return None
            return (
                "training is uncompressed: the schedule of the encoder has been run to its end, and whoever drove it "
                "is gone. For another run of it, compress(model, plan) anew or make another driver; for a plain "
                "encoder, restore(model)"
            )
        if not self._is_new("no driver"):
            return None
        whose = "nobody drives" if self._driver_name is None else f"{self._driver_name} drove, which is gone"
        is_online = isinstance(self.plan, Online)
        driver = "n OnlineScheduler(model, loss," if is_online else " SequenceScheduler(model,"
        return (
            f"training is uncompressed: the encoder has a schedule that {whose}. Make and keep a{driver} "
            f"total_steps=...), and call its step({'batch' if is_online else ''}) after every training step; under "
            "Lightning, a callback does so. For a plain encoder, restore(model)"
        )

    def notice_missing_step(self) -> str | None:
        """That a driver is never stepped, in a sentence for people, once; to be called as training runs.

        Only updates count. So neither forwards before the loop nor gradient accumulation are taken for
        steps, however short the run is: half of it, and at most 100 updates, is what a loop may do without.
        """
        self._has_run = True
        if self._was_stepped or self.driver is None or isinstance(self.plan, Constant) or self.steps_left == 0:
            return None
        left = 2 * _MANY_UPDATES if self.steps_left is None else self.steps_left
        if self._updates < min(_MANY_UPDATES, max(_FEW_UPDATES, left // 2)) or not self._is_new("no step"):
            return None
        return (
            f"the encoder has been updated {self._updates} times since {self._driver_name} was made, which has not "
            f"been stepped and has {left} steps to go: training stays at {self._strategy}; call its step() after every "
            "training step"
        )

    def _is_new(self, what: str) -> bool:
        if what in self._said:
            return False
        self._said.add(what)
        return True

    def __getstate__(self) -> dict[str, Any]:
        # The driver drives the original; a weak reference cannot be pickled anyway.
        # Members that are copied along join the copy.
        return {**vars(self), "_driver": None, "_driver_name": None, "members": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, members=weakref.WeakKeyDictionary(), _said=set())


def say(message: str) -> None:
    """Warn, even if another model was warned of the same: Python would show it once for all of them."""
    warnings.warn_explicit(f"seqcompress: {message}", UserWarning, __file__, 0, module=__name__)


_waiting_for_a_step: weakref.WeakSet[Compression] = weakref.WeakSet()
"""Those whose driver has not been stepped yet."""


@functools.cache
def _watch_optimizers() -> None:
    """Have the steps of all optimizers seen, since fused ones leave no other trace.

    The hook stays, and has nothing to do once drivers are stepped: torch lets none be taken out while it calls them.
    """

    def note_update(*_: Any) -> None:
        for compression in list(_waiting_for_a_step):
            compression.note_update()

    register_optimizer_step_post_hook(note_update)
