"""The Lightning callback that drives compressed encoders. It comes by itself.

Both Lightning packages load callbacks from entry points into every Trainer. Whatever LightningModule holds
encoders that ``compress`` or ``accelerate`` has wrapped gets its plans advanced and its budget counted; for
any other, the callback does nothing. Importing this module imports neither torch, timm nor Lightning.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from seqcompress.messages import by_script, described

if TYPE_CHECKING:
    from torch import Tensor

    from seqcompress.adapters.merging import Merging
    from seqcompress.adapters.online import Measured
    from seqcompress.encoders import CompressedPatchEmbed, Compression
    from seqcompress.schedules import Online, Schedule
    from seqcompress.strategy import Strategy
    from seqcompress.training.budget import Budget

__all__ = ["SequenceCompression"]

Result = TypeVar("Result")

_SHOWN_AS = {  # in the progress bar: a terminal is narrow, it would cut a longer name, and then there is no number
    "seqcompress/token_dropout": "seq_drop",
    "seqcompress/patch_size": "seq_patch",
    "seqcompress/tokens": "seq_tokens",
    "seqcompress/budget": "seq_budget",
    "seqcompress/batch_factor": "seq_batch",
}
_SECONDS_SHOWN = 0.5  # nobody reads numbers that change faster, and the budget takes a moment to count
_MOMENTS = 10**6  # in the time of a run
_SAMPLES = 200  # of a schedule, to say what it will cost


class SequenceCompression:
    """What the callbacks of both Lightning packages have in common: all but what they take from their package.

    At every batch each encoder's strategy is its plan's at the progress of the run, the same on every rank: whole
    epochs and the share of the current one where the run is given in epochs, ``global_step / max_steps``, and the
    share of ``max_time``; the furthest of those that the Trainer has limits for. The batches of one optimizer step
    share its strategy. The batch-norm epoch of stochastic weight averaging, which does not train, is not counted.
    Encoders that something else drives are left to it, and logged all the same; a schedule that has been run to its
    end is not run again. What will happen, and what did not, is told in one line each, on rank 0, by the logger of
    the Lightning package.

    Logged to whatever logger there is, with all that the Trainer logs at its ``log_every_n_steps``:
    ``seqcompress/token_dropout``, ``seqcompress/patch_size`` (pixels), ``seqcompress/tokens`` (the student's, in a
    view of the size the encoder was built for) and ``seqcompress/budget`` (millions of units, all ranks together);
    and once more at the end of training. ``trainer.callback_metrics`` has them from those steps, from the end of
    every full epoch and from before every validation. The progress bar shows them as ``seq_drop``, ``seq_patch``,
    ``seq_tokens`` and ``seq_budget``. Other steps compute none of it, and none of it is ever on the device. What
    cannot be counted or logged is said once and left out: it never ends a run.

    An online plan is measured by the module's own training step, after the optimizer's, within the plan's shares of
    compute and time: ``online_decisions``, ``online_moves``, ``online_share_of_time`` and ``online_ca_mse`` are logged
    too, all under ``seqcompress/``, and what was found is kept as ``seqcompress_schedule.json`` in the run's folder.
    Where that cannot be done, one line says why, and the plan's preset is followed.

    Where encoders were compressed with ``batch="merge"``, the batches that the Trainer accumulates for an update are
    run several at a time while sequences are short, and ``seqcompress/batch_factor`` says how many. Updates, learning
    rates and all that goes by them stay what they are.

    On a device with memory of its own, the second step is run at the schedule's most expensive strategy, as soon
    as the optimizer has its state: a run that will not fit stops there and not at three quarters. The log says what
    the longest sequences need. Whenever a step does not fit, torch's error is raised as ever, and every rank that it
    meets logs the strategy and, on CUDA devices, the memory that was in use.
    """

    host = logging.getLogger(__name__)
    """Who tells the user: a logger of the Lightning package's, shown and silenced with all that it says."""
    timers: Any = ()
    """The package's callback that ends a run after a time."""
    averaging: Any = ()
    """The package's callback that may add an epoch in which nothing is trained."""
    finders: Any = ()
    """The package's callback that tries batch sizes, with no other callback there."""
    silent: Any = None
    """The package's logger that writes nothing."""
    plain: Any = ()
    """The package's strategies that leave a module's parameters and gradients whole."""

    def __init__(self) -> None:
        super().__init__()
        self._module: weakref.ref[Any] | None = None  # whose state this is
        self._fitting = True
        self._resuming = False  # the state is a checkpoint's
        self._loaded: dict[str, Any] = {}
        self._tried: list[_Drive] = []  # what batch sizes are tried at
        self._merging: Merging | None = None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}  # a process of its own has a module of its own

    def _forget(self) -> None:
        """Let go of the model."""
        for drive in getattr(self, "_drives", ()):
            drive.release(self)
        self._stop_merging()
        self._places: dict[str, tuple[CompressedPatchEmbed, Compression]] = {}
        self._drives: list[_Drive] = []
        self._length: _Length | None = None
        self._budget: Budget | None = None
        self._readings: _Readings | None = None
        self._measured: Measured | None = None  # of an online plan
        self._steps = 0  # that were done as the latest batch began
        self._accumulated = 0  # batches since the optimizer's last step
        self._rehearsal_is_due = False
        self._rehearsing: Strategy | None = None
        self._logged: bool | None = None  # whether the Trainer logs the latest step; None before the first one
        self._shown = float("-inf")  # when the progress bar got its numbers
        self._looked = False
        self._batches = 0  # of this epoch that are done
        self._progress = self._done = 0.0  # at which the latest step was run, and that it has reached
        self._place = (0, 1)  # of the latest step in the run, and how many there are
        self._forwards: list[int] = []  # of the latest step, by encoder
        self._seed = 0
        self._ranks = 1
        self._speaks = True
        self._said: set[str] = set()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave another module's state behind; have first views made, or batch sizes tried at the longest sequences."""
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        if self._module is None or self._module() is not pl_module:
            self._module, self._loaded = weakref.ref(pl_module), {}
        self._resuming = False
        if not _is_compressed(pl_module):
            return
        drives = self._to_drive(_embeds_by_place(pl_module))
        if any(isinstance(callback, self.finders) for callback in trainer.callbacks):
            self._tried = drives
            for drive in drives:
                drive.compression.set_by_hand(drive.most_expensive())
        elif trainer.global_step == 0:
            for drive in drives:
                drive.have_views_made(0.0)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Batch sizes have been tried by now."""
        self._end_trials()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """They have been, and nothing else was asked for."""
        self._end_trials()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Have full views made at first: workers start before it is known how far training has come."""
        if _is_compressed(pl_module):
            from seqcompress.strategy import Strategy

            for embed in _embeds_by_place(pl_module).values():
                embed.compression.ask_views_for(Strategy())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget what an interrupted fit may have left, and say what a new one will do, as far as it is known."""
        self._forget()
        self._speaks = trainer.is_global_zero
        if trainer.global_step == 0 and _is_compressed(pl_module):
            self._announce(_embeds_by_place(pl_module), 0.0)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Look again: the module may compress or restore its encoders between epochs, or as training starts."""
        self._looked = False
        if self._merging is not None:
            self._merging.forget()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put the strategies of this step in force."""
        if self._logged:
            _withdraw(trainer)
        if not self._looked or not self._is_in_place(pl_module):
            self._looked = True
            self._look(trainer, pl_module, batch_idx)
        if self._length is None:
            return
        if self._drives:
            self._follow(trainer, pl_module, batch_idx, self._length)
        if self._merging is not None:
            together = self._together(trainer, pl_module)
            done = batch_idx - self._length.first_of_step(batch_idx) + 1
            is_last = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
            self._merging.begin(together, holds=done % together != 0 and not is_last)
        if self._measured is not None:
            self._measured.before_step(batch)

    def _follow(self, trainer: Any, pl_module: Any, batch_idx: int, length: _Length) -> None:
        """Put in force what the plans have at this batch."""
        if batch_idx == length.first_of_step(batch_idx):
            self._progress = length.begin_step(batch_idx)
            self._place = length.place(length.first_of_step(batch_idx))
        step = self._steps = _steps_done(trainer, pl_module)
        for drive in self._drives:
            drive.follow(self._place, step, self._seed, self._progress, length.pace())
        if self._rehearsal_is_due and step > 0:
            from seqcompress.training.rehearsal import forget_peak

            together = self._merging is not None
            longest = self._drives[0].most_expensive(trainer.accumulate_grad_batches if together else 1)
            self._rehearsal_is_due, self._rehearsing = False, longest
            forget_peak(pl_module.device)
        if self._rehearsing is not None:
            for drive in self._drives:
                drive.use(self._rehearsing if drive is self._drives[0] else drive.most_expensive())

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Note the forwards of the step: others may save a checkpoint before this sees the end of the batch."""
        self._forwards = [drive.compression.stream.forwards for drive in self._drives]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what this step was run at, and what has been spent so far, if this step is one to be logged."""
        readings, length = self._readings, self._length
        if readings is None or length is None:
            return
        self._batches = batch_idx + 1
        self._done = length.share(self._batches)
        if self._merging is not None:
            self._merging.end()
        readings.take_reading(None if self._merging is None else self._merging.together)
        self._guarded("log a step", lambda: self._log(trainer, pl_module, readings))
        if self._rehearsing is not None and not (self._merging is not None and self._merging.is_holding):
            self._end_rehearsal(pl_module.device, self._rehearsing)
        self._accumulated += 1
        if self._measured is not None and _steps_done(trainer, pl_module) != self._steps:
            self._measured.after_step(batch, batch_idx, length.place(batch_idx + 1), self._accumulated)
            self._accumulated = 0
            self._take_over(self._measured)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note how many batches the epoch really had."""
        if self._length is not None:
            self._length.note_epoch(self._batches)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Let checkpoints and early stopping, which follow, see how far training has come."""
        readings = self._readings
        if readings is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._guarded("log a step", lambda: self._publish(trainer, readings))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the model, and say at which strategy a training step did not fit into memory."""
        if self._drives and trainer.training:
            from seqcompress.training.rehearsal import is_out_of_memory, shortage

            if is_out_of_memory(exception):
                drive = self._drives[0]
                strategy = self._rehearsing or drive.strategy
                self._guarded(
                    "say what did not fit",
                    lambda: self.host.error(
                        "seqcompress: %s", shortage(strategy, drive.student, pl_module.device, exception)
                    ),
                )
        self._loaded = self._state()
        self._end_trials()
        self._forget()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Log how training ended, say so if that was before its plan did, and let go of the model."""
        readings = self._readings
        if readings is not None and self._logged is False and trainer.log_every_n_steps:
            self._guarded("log a step", lambda: self._log_the_end(trainer, readings))
        if self._length is not None:
            self._done = max(self._done, self._length.share_of_time())
            if not trainer.fast_dev_run:
                for drive in self._drives:
                    if drive.ends_at(self._done):
                        drive.finish()
                    else:
                        self._tell(drive.shortfall(self._done))
                if self._measured is not None:
                    self._keep_what_was_found(trainer, self._measured)
        self._loaded = self._state()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Seed of the random subsets, units spent by all ranks, and how far the run has come. Plain values only."""
        return self._state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts.

        Raises:
            ValueError: a checkpoint's numbers are none that a run can go on with; nothing has been changed.
        """
        if self._fitting:  # not what is tested in between
            self._loaded, self._resuming = _checked_state(state_dict), True

    def _state(self) -> dict[str, Any]:
        if self._readings is None or self._length is None:
            return self._loaded
        budget = self._budget
        spent = None if budget is None else self._guarded("count the budget", budget.state_dict)
        if spent is None:
            spent = {name: self._loaded[name] for name in ("units", "flops_of_unit") if name in self._loaded}
        else:
            spent["units"] *= self._ranks
        online = self._loaded.get("online") if self._measured is None else self._measured.state_dict()
        return {
            "seed": self._seed,
            "units": 0.0,
            **spent,
            "progress": self._done,
            "batches": self._length.batches,
            "plans": {drive.name: drive.compression.plan.to_json() for drive in self._drives},
            "forwards": self._forwards,
            **({} if online is None else {"online": online}),
        }

    def _end_trials(self) -> None:
        for drive in self._tried:
            if drive.compression.driver is None:
                drive.take(self)
                drive.release(self)
        self._tried = []

    def _is_in_place(self, pl_module: Any) -> bool:
        """Whether the module holds, where they were, the encoders that it held."""
        for place, (embed, compression) in self._places.items():
            try:
                found = pl_module.get_submodule(place)
            except AttributeError:
                return False
            if found is not embed or embed.compression is not compression:
                return False
        return True

    def _look(self, trainer: Any, pl_module: Any, batch_idx: int) -> None:
        """Find the compressed encoders, and take up their plans where these stand."""
        embeds = _embeds_by_place(pl_module) if _is_compressed(pl_module) else {}
        self._adopt(embeds)
        places = {place: (embed, embed.compression) for place, embed in embeds.items()}
        if places == self._places:
            return
        is_first = self._readings is None
        self._loaded = self._state()
        kept = {compression for _, compression in places.values()}
        for drive in self._drives:
            if drive.compression not in kept:
                drive.release(self)
        self._places, self._drives = places, []
        self._budget = self._readings = self._rehearsing = self._measured = None
        self._stop_merging()
        self._rehearsal_is_due = False
        if not embeds:
            return
        if self._length is None:
            self._length = _Length(trainer, pl_module, self.timers, self.averaging, self._loaded.get("batches"))
            self._seed = self._loaded["seed"] if "seed" in self._loaded else _seed(trainer)
            self._done = self._loaded.get("progress", 0.0) if self._resuming else 0.0
        self._progress = self._length.begin_step(batch_idx)
        self._place = self._length.place(self._length.first_of_step(batch_idx))
        if self._resuming and is_first:
            self._go_on(embeds)
        self._drives = self._to_drive(embeds)
        if self._resuming and is_first and batch_idx != self._length.first_of_step(batch_idx):
            for drive, forwards in zip(self._drives, _forwards_in(self._loaded), strict=False):
                drive.forwards = forwards
        if not all(drive.is_constant for drive in self._drives):
            self._length.check()
        if is_first:
            self._announce(embeds, self._progress if trainer.global_step else 0.0)  # as at the start
        if is_first and not self._resuming:
            self._loaded.pop("online", None)  # another fit's
        self._begin_measuring(trainer, pl_module)
        self._begin_merging(trainer, pl_module)
        for drive in self._drives:
            drive.take(self)
        self._ranks = trainer.world_size
        self._budget = self._guarded("count the budget", lambda: self._budget_of(pl_module))
        self._readings = _Readings(list(embeds.values()), self._units_in_millions)
        if is_first and not self._loaded and self._drives:
            self._rehearsal_is_due = self._has_own_memory(pl_module.device)

    def _adopt(self, embeds: dict[str, CompressedPatchEmbed]) -> None:
        """Let a copy that was put in an encoder's place take its part: Lightly's SMoG makes teachers of students so."""
        known = {compression for _, compression in self._places.values()}
        for place, embed in embeds.items():
            before, compression = self._places.get(place, (embed, embed.compression))
            if embed is before or embed.compression in known or embed.compression.plan != compression.plan:
                continue
            embed.compression, embed.drops_tokens, embed.when = compression, before.drops_tokens, before.when

    def _to_drive(self, embeds: dict[str, CompressedPatchEmbed]) -> list[_Drive]:
        """What nobody else drives, and has not been run to its end."""
        drives = [_Drive(number, group) for number, group in enumerate(_groups(embeds))]
        return [drive for drive in drives if not drive.is_finished and not drive.is_others]

    def _begin_measuring(self, trainer: Any, pl_module: Any) -> None:
        """Have an online plan find itself; say so where it cannot, and follow its preset."""
        drives = [drive for drive in self._drives if drive.is_online]
        if not drives:
            return
        from seqcompress.adapters.online import Measured, reason_not_to

        drive, self._accumulated = drives[0], 0
        problem = reason_not_to(trainer, pl_module, self.plain)
        if len(drives) > 1:
            problem = "its encoders were compressed apart, and what is measured has to be compressed together"
        if problem is None:
            drive.compression.release(drive.compression.driver)  # another Trainer's callback, which is done
            try:
                tell = partial(self._say, drive)
                measured = Measured(trainer, pl_module, drive.embeds, self._place, self.silent, tell)
                if "online" in self._loaded:
                    measured.load_state_dict(self._loaded["online"])
                self._measured = measured
                self._take_over(measured)
            except (TypeError, ValueError, RuntimeError) as error:
                problem = str(error)
        if problem is not None:
            self._say(drive, f"cannot be measured, and goes on with its preset: {problem}")

    def _begin_merging(self, trainer: Any, pl_module: Any) -> None:
        """Have batches merged where that was asked for; say so where it cannot be done."""
        if not any(compression.batch == "merge" for _, compression in self._places.values()):
            return
        from seqcompress.adapters.merging import Merging, most_together
        from seqcompress.adapters.online import reason_not_to

        accumulated = trainer.accumulate_grad_batches
        problem = reason_not_to(trainer, pl_module, self.plain)
        if any(drive.is_online for drive in self._drives):
            problem = "an online plan measures by the batches as they come"
        if problem is not None:
            self._tell(f"batch='merge': goes on without, since {problem}")
            return
        if most_together(2, accumulated) == 1:
            self._tell(
                "batch='merge': needs an even accumulate_grad_batches of the Trainer, such as 4, got "
                f"{accumulated}: batches are run one by one"
            )
        self._merging = Merging(trainer, pl_module, lambda line: self._tell(f"batch='merge': {line}"))

    def _stop_merging(self) -> None:
        if self._merging is not None:
            self._merging.forget()
            self._merging = None

    def _together(self, trainer: Any, pl_module: Any) -> int:
        """How many batches of an update are run at once, under the strategies in force."""
        from seqcompress.adapters.merging import most_together
        from seqcompress.training.cost import batch_factor

        fit = [
            batch_factor(embed.encoder, _run_at(embed))
            for embed, compression in self._places.values()
            if compression.batch == "merge" and embed.drops_tokens
        ]
        return most_together(min(fit, default=1), trainer.accumulate_grad_batches)

    def _say(self, drive: _Drive, line: str, *, is_problem: bool = False) -> None:
        self._tell(f"{drive.name}: {line}")

    def _take_over(self, measured: Measured) -> None:
        """Follow what was found so far."""
        for drive in self._drives:
            if drive.is_online:
                drive.plan = measured.schedule

    def _keep_what_was_found(self, trainer: Any, measured: Measured) -> None:
        """Write it down as a plan for another run. Collective."""
        from seqcompress.adapters.online import FILE

        folder = self._guarded("find the run's folder", lambda: self._folder(trainer))
        name = next(drive.name for drive in self._drives if drive.is_online)

        def write() -> Path:
            file = Path(str(folder)) / FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            measured.schedule.to_json(file)
            return file

        kept = None if folder is None or not self._speaks else self._guarded("write the schedule", write)
        where = "" if kept is None else f"; what it followed is a plan for the next: {kept}"
        self._tell(f"{name}: {measured.outcome()}{where}")

    def _folder(self, trainer: Any) -> str:
        """Where a run keeps its files. Collective."""
        return str(trainer.log_dir or trainer.default_root_dir)

    def _go_on(self, embeds: dict[str, CompressedPatchEmbed]) -> None:
        """Take up what a checkpoint says of its run: at its end, there is nothing left of a schedule."""
        before, pace = self._loaded.get("progress"), 0.0 if self._length is None else self._length.pace()
        for group in _groups(embeds):
            drive = _Drive(0, group)
            if before is None or drive.is_constant or drive.is_others:
                continue
            if before >= 1.0:
                drive.finish()
                continue
            drive.compression.finished = False
            now = drive.plan.at_step(*self._place)
            was = self._guarded("compare schedules", partial(_schedule_in, self._loaded, drive.name))
            if was is not None and was != drive.compression.plan:
                self._tell(f"{drive.name}: {by_script({'schedule': (was, drive.compression.plan)}, now)}")
                continue
            # A run that was broken off within a batch has not counted it.
            is_elsewhere = abs(before - self._progress) > 1.5 * pace
            if is_elsewhere and drive.plan(before) != now:
                self._tell(
                    f"{drive.name}: the checkpoint was at {before:.0%} of its run ({drive.plan(before)}), which is "
                    f"{self._progress:.0%} of this one: goes on from its step, at {now}"
                )

    def _announce(self, embeds: dict[str, CompressedPatchEmbed], progress: float) -> None:
        """Say what will happen, in one line for all encoders with which the same will."""
        drives: dict[tuple[Any, ...], list[_Drive]] = {}
        for number, group in enumerate(_groups(embeds)):
            drive = _Drive(number, group)
            drives.setdefault((drive.plan, drive.is_finished, drive.is_others), []).append(drive)
        for alike in drives.values():
            share = self._guarded("count the budget", partial(_share_of_plain_budget, alike))
            line = alike[0].outlook(progress, share, [drive.name for drive in alike])
            if line not in self._said:  # at the first batch all is known; at the start, mostly
                self._said.add(line)
                self._tell(line)

    def _tell(self, line: str) -> None:
        if self._speaks:
            self.host.info("seqcompress: %s", line)

    def _guarded(self, what: str, do: Callable[[], Result]) -> Result | None:
        """Books are kept as well as they can be: what goes wrong there is said once, and the run goes on."""
        try:
            return do()
        except Exception as error:
            if what not in self._said and self._speaks:
                self._said.add(what)
                self.host.warning("seqcompress: could not %s: %s: %s", what, type(error).__name__, error)
            return None

    def _budget_of(self, pl_module: Any) -> Budget:
        from seqcompress.training.budget import Budget

        budget = Budget(pl_module)
        if "units" in self._loaded:
            budget.load_state_dict({**self._loaded, "units": self._loaded["units"] / self._ranks})
        return budget

    def _units_in_millions(self) -> float | None:
        budget = self._budget
        return None if budget is None else self._guarded("count the budget", lambda: budget.millions * self._ranks)

    def _has_own_memory(self, device: Any) -> bool:
        return bool(device.type != "cpu")

    def _end_rehearsal(self, device: Any, strategy: Strategy) -> None:
        """Say what the step has needed that was run at the longest sequences."""
        from seqcompress.training.rehearsal import measured

        self._tell(str(measured(strategy, device)))
        for drive in self._drives:
            drive.use(drive.strategy)
        self._rehearsing = None

    def _log(self, trainer: Any, pl_module: Any, readings: _Readings) -> None:
        self._logged = False
        self._logged = bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)
        if self._logged or trainer.is_last_batch or trainer.global_step == trainer.max_steps:
            metrics = self._publish(trainer, readings)
            if self._logged:
                for name, value in metrics.items():
                    pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
        elif time.monotonic() - self._shown >= _SECONDS_SHOWN and _has_progress_bar(trainer):
            self._show(trainer, readings.values())

    def _log_the_end(self, trainer: Any, readings: _Readings) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        trainer._logger_connector.log_metrics(self._publish(trainer, readings), step=max(0, step))

    def _publish(self, trainer: Any, readings: _Readings) -> dict[str, Tensor]:
        """Put the metrics where the Trainer keeps those of the latest step."""
        import torch

        values = readings.values()
        online = {} if self._measured is None else self._measured.metrics()
        # On the CPU: of numbers, Lightning makes tensors on the device, and each of these waits for the device.
        metrics = {name: torch.tensor(value, dtype=torch.float32) for name, value in {**values, **online}.items()}
        # The public properties would read whatever else was logged, and wait for the device too.
        trainer._logger_connector._callback_metrics.update(metrics)
        trainer._logger_connector._logged_metrics.update(metrics)
        self._show(trainer, values)
        return metrics

    def _show(self, trainer: Any, values: dict[str, float]) -> None:
        shown = {_SHOWN_AS[name]: value for name, value in values.items()}
        trainer._logger_connector._progress_bar_metrics.update(shown)
        self._shown = time.monotonic()


class _Length:
    """How long a run is and how far it has come, as its Trainer counts.

    Args:
        trainer: the Trainer, in training.
        pl_module: what it trains.
        timers: the class of callbacks that end a run after a time.
        averaging: the class of callbacks that may add an epoch in which nothing is trained.
        batches: see the attribute.

    Attributes:
        batches: how many the last epoch had, if these were fewer than its loader had promised.
    """

    def __init__(self, trainer: Any, pl_module: Any, timers: Any, averaging: Any, batches: int | None) -> None:
        self._trainer, self._pl_module = trainer, pl_module
        self._timers = [
            timer
            for timer in trainer.callbacks
            if isinstance(timer, timers) and timer.time_remaining("train") is not None
        ]
        self._averaging = [callback for callback in trainer.callbacks if isinstance(callback, averaging)]
        self._time = 0.0  # share of it that had passed as the step began
        self.batches = batches

    @property
    def _epochs(self) -> float:
        """Epochs that train; infinite without a limit."""
        limit = self._trainer.max_epochs
        limits = [float("inf") if limit in (None, -1) else limit]
        return min([*limits, *(callback.swa_end + 1 for callback in self._averaging)])

    @property
    def _batches_an_epoch(self) -> float:
        """Infinite for a stream whose first epoch has not ended."""
        expected: float = self._trainer.num_training_batches
        return expected if self.batches is None else min(expected, self.batches)

    def check(self) -> None:
        """Raise ValueError unless a schedule can go by this length."""
        trainer = self._trainer
        by_epochs = self._epochs < float("inf") and (self._batches_an_epoch < float("inf") or self._epochs > 1)
        if not by_epochs and trainer.max_steps == -1 and not self._timers:
            raise ValueError(
                "a schedule needs to know how long training is: set max_epochs, max_steps or max_time of the Trainer "
                f"(for a loader without a length, max_steps, max_time or more than one epoch), got "
                f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}"
            )

    def first_of_step(self, batch: int) -> int:
        """The batch of this epoch with which the optimizer step of ``batch`` begins."""
        if not self._pl_module.automatic_optimization:
            return batch
        return batch - batch % int(self._trainer.accumulate_grad_batches)

    def begin_step(self, batch: int) -> float:
        """Progress, in [0, 1], at which the optimizer step of a batch of this epoch is to be run."""
        if self._timers:
            self._time = self.share_of_time()
        return self.share(self.first_of_step(batch))

    def share(self, batches: int) -> float:
        """Share of the run that is done, in [0, 1], after some batches of this epoch."""
        trainer, shares = self._trainer, [0.0, self._time]
        if trainer.max_steps != -1:
            shares.append(trainer.global_step / trainer.max_steps if trainer.max_steps else 1.0)
        if self._epochs < float("inf"):
            of_this = min(1.0, batches / self._batches_an_epoch) if self._batches_an_epoch else 1.0
            shares.append((trainer.current_epoch + of_this) / self._epochs if self._epochs else 1.0)
        return min(1.0, max(shares))

    def place(self, batches: int) -> tuple[int, int]:
        """The same in steps, those done and all, as if every epoch were as long as this one."""
        trainer, places = self._trainer, [(round(self._time * _MOMENTS), _MOMENTS)]
        if trainer.max_steps > 0:
            places.append((int(trainer.global_step), int(trainer.max_steps)))
        if 0 < self._epochs < float("inf"):
            epochs, steps, done = int(self._epochs), 1, 0
            if 0 < self._batches_an_epoch < float("inf"):
                each = int(trainer.accumulate_grad_batches) if self._pl_module.automatic_optimization else 1
                steps = math.ceil(self._batches_an_epoch / each)
                done = min(steps, batches // each)
            places.append((trainer.current_epoch * steps + done, epochs * steps))
        # The nearest to its end; of equal ones, the shortest.
        return max(places, key=lambda place: (place[0] / place[1], -place[1]))

    def share_of_time(self) -> float:
        """Share of the time that has passed, the same on every rank; 0 without a limit."""
        if not self._timers:
            return 0.0
        shares = []
        for timer in self._timers:
            elapsed, remaining = timer.time_elapsed("train"), timer.time_remaining("train")
            shares.append(elapsed / (elapsed + remaining) if elapsed + remaining > 0 else 1.0)
        share = min(1.0, max(shares))
        return float(self._trainer.strategy.broadcast(share)) if self._trainer.world_size > 1 else share

    def pace(self) -> float:
        """About what a batch adds to the share; rather more than less."""
        trainer = self._trainer
        paces = [self._time / max(1, trainer.fit_loop.total_batch_idx)]
        if trainer.max_steps > 0:
            paces.append(1 / trainer.max_steps)
        if 0 < self._epochs < float("inf") and self._batches_an_epoch:
            paces.append(1 / (self._epochs * self._batches_an_epoch))
        return max(paces)

    def note_epoch(self, batches: int) -> None:
        """An epoch is over, after so many batches."""
        trainer = self._trainer
        if trainer.should_stop or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps):
            return  # it was broken off
        if trainer.world_size > 1:
            batches = int(trainer.strategy.broadcast(batches))
        self.batches = batches if 0 < batches < trainer.num_training_batches else None


class _Drive:
    """The encoders that were compressed together, and their plan.

    Args:
        number: of this group in its module, for random subsets of its own.
        group: the compressed patch embeddings by place; at least one.
    """

    def __init__(self, number: int, group: dict[str, CompressedPatchEmbed]) -> None:
        self._number = number
        self._group = group
        self.embeds = tuple(group.values())
        self.compression = self.embeds[0].compression
        self.plan: Schedule = self.compression.plan
        self.strategy = self.compression.strategy
        self._step: int | None = None
        self.forwards = 0  # of the step that is taken up, where a run goes on in the middle of it

    @property
    def name(self) -> str:
        """Where the module has the encoder; the student, of a pair."""
        of_students = ((place, embed) for place, embed in self._group.items() if embed.drops_tokens)
        place, embed = next(of_students, next(iter(self._group.items())))
        names = (name for name, module in embed.encoder.model.named_modules() if module is embed)
        within = next(names, place.rpartition(".")[2])
        return place.removesuffix(within).rstrip(".") or "the encoder"

    @property
    def student(self) -> Any:
        """The encoder that drops tokens; the only one, if it is a teacher's."""
        return next((embed for embed in self.embeds if embed.drops_tokens), self.embeds[0]).encoder

    @property
    def is_constant(self) -> bool:
        """Whether the plan is one strategy, which needs nobody to advance it."""
        return len(self.plan.strategies()) == 1 and not self.is_online

    @property
    def is_online(self) -> bool:
        """Whether the plan asks for measuring; what it follows then is what was found so far."""
        from seqcompress.schedules import Online

        return isinstance(self.compression.plan, Online)

    @property
    def is_finished(self) -> bool:
        """Whether the plan has been run to its end."""
        return self.compression.finished

    @property
    def is_others(self) -> bool:
        """Whether something else drives them. A callback that is left over from another Trainer does not."""
        driven = self.compression.driven_by is not None
        return driven and not isinstance(self.compression.driver, SequenceCompression)

    def take(self, driver: SequenceCompression) -> None:
        """Drive a schedule from now on. A constant plan needs no driver, so that others may come."""
        if not self.is_constant:
            self.compression.release(self.compression.driver)
            self.compression.claim(driver, "the Lightning callback")

    def release(self, driver: SequenceCompression) -> None:
        """Let others drive; until then, a schedule leaves the encoder plain."""
        self.compression.release(driver)

    def ends_at(self, progress: float) -> bool:
        """Whether nothing of the plan is left at this progress."""
        return self.plan(progress) == self.plan(1.0)

    def finish(self) -> None:
        """The plan has been run to its end. A constant one has none."""
        self.compression.finished = not self.is_constant

    def most_expensive(self, accumulated: int = 1) -> Strategy:
        """The strategy of the plan with the longest sequences; with the most tokens at once, of merged batches."""
        from seqcompress.adapters.merging import most_together
        from seqcompress.training.cost import batch_factor

        def tokens(strategy: Strategy) -> int:
            return most_together(batch_factor(self.student, strategy), accumulated) * self.tokens(strategy)

        return max((*self.plan.strategies(), *self.compression.plan.strategies()), key=tokens)

    def follow(self, place: tuple[int, int], step: int, seed: int, progress: float, pace: float) -> None:
        """Put in force what the plan has at this place of the run, and have views made for what comes next.

        Args:
            place: steps done, and all steps of the run.
            step: decides the random subsets, with the seed; those of a step's batches follow each other.
            seed: of the run, the same on every rank.
            progress: the share that is done, in [0, 1].
            pace: what a batch adds to it.
        """
        if self.is_others:  # who has come since, which a constant plan allows
            return
        self.compression.count_step()
        if step != self._step:
            self.compression.stream.anchor(seed, step, self._number, self.forwards)
            self._step, self.forwards = step, 0
        self.strategy = self.plan.at_step(*place)
        self.use(self.strategy)
        self.have_views_made(progress, pace)

    def have_views_made(self, progress: float, pace: float = 0.0) -> None:
        """Have loaders make views for this progress and what comes next; their workers start before training does."""
        views = self.compression.views
        if views is not None and not self.is_constant:
            views.ask_ahead(lambda batches: self.plan(min(1.0, progress + batches * pace)))

    def use(self, strategy: Strategy) -> None:
        """Put a strategy of the plan in force until the next step."""
        if not self.is_constant:
            self.compression.strategy = strategy

    def tokens(self, strategy: Strategy) -> int:
        """The student's, in a view of the size it was built for."""
        from seqcompress.training.cost import sequence_length

        return sequence_length(self.student, strategy)

    def outlook(self, progress: float, share: float | None, names: list[str]) -> str:
        """One line: what will happen to the encoders of these names."""
        from seqcompress.strategy import Strategy

        who, start, end = " and ".join(names), self.plan(progress), self.plan(1.0)
        if self.is_others:
            return f"{who}: driven by {self.compression.driven_by}, and left to it; only logged here"
        if self.is_finished:
            return (
                f"{who}: trains plain, at {self._at(Strategy())}, as its schedule has been run to its end; for another "
                "run of it, call compress(model, plan) again"
            )
        from seqcompress.schedules import Online

        what = f"{who}: trains at {self._at(start)}"
        if not self.is_constant:
            what += f" now, {self._at(end)} in the end"
        if set(self.plan.strategies()) != {Strategy()}:
            if share is not None:
                what += f", {'in all ' if progress else ''}about {share:.0%} of the plain run's budget"
            teachers = [embed for embed in self.embeds if not embed.drops_tokens]
            if teachers:
                scales = any(strategy.patch_size is not None for strategy in self.plan.strategies())
                what += f"; its teacher gets {'the patch size' if scales else 'nothing of it'}"
        if isinstance(plan := self.compression.plan, Online):
            what += f"; this is a preset, until gradient error is measured to be less elsewhere, {_limits(plan)}"
        return what

    def shortfall(self, progress: float) -> str:
        """One line: what is missing of a plan whose run has ended at this progress."""
        end = self.plan(1.0)
        return (
            f"{self.name}: the run ended before its plan, at {progress:.0%} of it and {self._at(self.strategy)}: it "
            f"never trained at {self._at(end)}, and its figures are worse for it; to add what is missing, let "
            "trainer.fit(module, ckpt_path=...) go on to the end, or call compress(model, "
            f"{_written(end)}) and fit for some more epochs"
        )

    def _at(self, strategy: Strategy) -> str:
        return f"{strategy} ({self.tokens(strategy)} tokens a view)"


class _Readings:
    """What there is to tell about a run: the strategy of its latest step, and what has been spent."""

    def __init__(self, embeds: list[CompressedPatchEmbed], millions: Callable[[], float | None]) -> None:
        self._student = next((embed for embed in embeds if embed.drops_tokens), embeds[0])
        self._millions = millions
        self.take_reading()

    def take_reading(self, together: int | None = None) -> None:
        """A step is done, by batches so many of which were run at once."""
        self._strategy, self._together = self._student.strategy, together

    def values(self) -> dict[str, float]:
        """The metrics of the latest step."""
        from seqcompress.training.cost import sequence_length

        encoder, strategy = self._student.encoder, _run_at(self._student, self._strategy)
        patch_size = strategy.patch_size or min(encoder.patch_size)
        tokens = sequence_length(encoder, strategy)
        numbers = (strategy.token_dropout, patch_size, tokens, self._millions(), self._together)
        return {name: float(number) for name, number in zip(_SHOWN_AS, numbers, strict=True) if number is not None}


def _run_at(embed: CompressedPatchEmbed, strategy: Strategy | None = None) -> Strategy:
    """The strategy, by default the one in force; a student builds no graph and runs plain while all of it is frozen."""
    from seqcompress.encoders import is_frozen
    from seqcompress.strategy import Strategy

    is_plain = embed.when == "grad" and is_frozen(embed.encoder.model)
    return Strategy() if is_plain else strategy or embed.strategy


def _checked_state(state: Any) -> dict[str, Any]:
    """A checkpoint's numbers, each where a run can go on with it."""
    from seqcompress.training.budget import MOST_UNITS

    numbers: dict[str, tuple[Any, float, float]] = {
        "seed": (int, 0, 2**64 - 1),
        "units": ((int, float), 0, MOST_UNITS),
        "progress": ((int, float), 0, 1),
        "batches": ((int, type(None)), 1, 2**64 - 1),
    }
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of seqcompress's callback must be a mapping, got {described(state)}")
    for name, (kind, least, most) in numbers.items():
        value = state.get(name, least)
        in_range = isinstance(value, kind) and (value is None or least <= value <= most)
        if isinstance(value, bool) or not in_range:
            raise ValueError(
                f"the state of seqcompress's callback must have a number from {least} to {most} as {name!r}, got "
                f"{described(value)}"
            )
    return dict(state)


def _embeds_by_place(pl_module: Any) -> dict[str, CompressedPatchEmbed]:
    """The compressed patch embeddings that a module holds, by their names in it; each once."""
    from seqcompress.encoders import CompressedPatchEmbed

    return {place: module for place, module in pl_module.named_modules() if isinstance(module, CompressedPatchEmbed)}


def _groups(embeds: dict[str, CompressedPatchEmbed]) -> Iterable[dict[str, CompressedPatchEmbed]]:
    """Those that were compressed together."""
    groups: dict[Compression, dict[str, CompressedPatchEmbed]] = {}
    for place, embed in embeds.items():
        groups.setdefault(embed.compression, {})[place] = embed
    return groups.values()


def _share_of_plain_budget(drives: list[_Drive]) -> float:
    """What a whole run at the plan that these have in common takes, relative to the plain run."""
    from seqcompress.strategy import Strategy
    from seqcompress.training.cost import StepCosts

    cost = StepCosts((embed.encoder, embed.drops_tokens) for drive in drives for embed in drive.embeds)
    spent = sum(cost(drives[0].plan((number + 0.5) / _SAMPLES)) for number in range(_SAMPLES))
    return spent / _SAMPLES / cost(Strategy())


def _forwards_in(state: dict[str, Any]) -> list[int]:
    """How many forwards of its step a state was saved after, by encoder."""
    forwards = state.get("forwards")
    counts = forwards if isinstance(forwards, list) else []
    return [count if isinstance(count, int) and count > 0 else 0 for count in counts]


def _schedule_in(state: dict[str, Any], name: str) -> Schedule | None:
    """What an encoder was compressed with when a state was saved, if it says so."""
    from seqcompress.json_files import json_text
    from seqcompress.schedules import Schedule

    text = state.get("plans", {}).get(name)
    return None if text is None else Schedule.from_json(json_text(text, "plans"))


def _limits(plan: Online) -> str:
    time_too = "" if plan.time_share is None else f" and at most {plan.time_share:.0%} of its time"
    return f"in at most {plan.compute_share:.0%} of the compute of training{time_too}"


def _written(strategy: Strategy) -> str:
    from seqcompress.strategy import Strategy

    return "Strategy()" if strategy == Strategy() else repr(str(strategy))


def _withdraw(trainer: Any) -> None:
    """Take the metrics of an earlier step from Lightning: where a step is logged since training stops, they are old."""
    for name, result in trainer._results.items():
        if name.startswith("on_train_batch_end.seqcompress/"):
            result.has_reset = True


def _has_progress_bar(trainer: Any) -> bool:
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def _is_compressed(module: Any) -> bool:
    # Where the compressors were never imported, nothing can be compressed: not even a look is taken.
    if "seqcompress.compression" not in sys.modules:
        return False
    from seqcompress.compression import is_compressed

    return is_compressed(module)


def _seed(trainer: Any) -> int:
    """Rank 0's, on every rank: it is the one that checkpoints have."""
    import torch

    seed = torch.initial_seed()
    return int(trainer.strategy.broadcast(seed)) if trainer.world_size > 1 else seed


def _steps_done(trainer: Any, pl_module: Any) -> int:
    if pl_module.automatic_optimization or trainer.max_steps != -1:
        return int(trainer.global_step)
    # Manual optimization may step its optimizers several times in a batch, or once in several batches.
    return int(trainer.fit_loop.total_batch_idx)
