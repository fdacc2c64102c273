"""The Lightning callback that drives compressed encoders. It comes by itself.

Both Lightning packages load callbacks from entry points into every Trainer. Whatever LightningModule holds
encoders that ``compress`` or ``accelerate`` has wrapped gets its plans advanced and its budget counted; for
any other, the callback does nothing. Importing this module imports neither torch, timm nor Lightning.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from seqcompress.adapters.callback_state import checked_state, forwards_in, has_plan_left, schedule_in
from seqcompress.adapters.driven_encoders import (
    DrivenEncoders,
    compressed_together,
    embeds_by_path,
    share_of_plain_budget,
)
from seqcompress.adapters.run_length import RunLength
from seqcompress.adapters.trainer_metrics import Readings, TrainerMetrics, run_at
from seqcompress.messages import resume_notice

if TYPE_CHECKING:
    from seqcompress.adapters.merging import Merging
    from seqcompress.adapters.online import TrainerOnlineScheduler
    from seqcompress.encoders import CompressedPatchEmbed, Compression
    from seqcompress.strategy import Strategy
    from seqcompress.training.budget import Budget

__all__ = ["SequenceCompression"]

Result = TypeVar("Result")


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

    logger = logging.getLogger(__name__)
    """Who tells the user: a logger of the Lightning package's, shown and silenced with all that it says."""
    timer_class: Any = ()
    """The package's callback that ends a run after a time."""
    weight_averaging_class: Any = ()
    """The package's callback that may add an epoch in which nothing is trained."""
    finder_classes: Any = ()
    """The package's callbacks that try batch sizes or learning rates, with no other callback there."""
    silent_logger_class: Any = None
    """The package's logger that writes nothing."""
    whole_gradient_strategies: Any = ()
    """The package's strategies that leave a module's parameters and gradients whole."""

    def __init__(self) -> None:
        super().__init__()
        self._module: weakref.ref[Any] | None = None  # whose state this is
        self._fitting = True
        self._resuming = False  # the state is a checkpoint's
        self._loaded: dict[str, Any] = {}
        self._tried: list[DrivenEncoders] = []  # what batch sizes and learning rates are tried at
        self._is_before_training = False
        self._keeps_for_finder = False  # whether such a trial has saved the state that it will load
        self._merging: Merging | None = None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}  # a process of its own has a module of its own

    def _forget(self) -> None:
        """Let go of the model."""
        for encoders in getattr(self, "_driven", ()):
            encoders.release(self)
        self._stop_merging()
        self._embeds_by_path: dict[str, tuple[CompressedPatchEmbed, Compression]] = {}
        self._driven: list[DrivenEncoders] = []
        self._length: RunLength | None = None
        self._budget: Budget | None = None
        self._readings: Readings | None = None
        self._metrics = TrainerMetrics()
        self._online: TrainerOnlineScheduler | None = None  # of an online plan
        self._steps = 0  # that were done as the latest batch began
        self._accumulated = 0  # batches since the optimizer's last step
        self._rehearsal_is_due = False
        self._rehearsing: Strategy | None = None
        self._looked = False
        self._batches = 0  # of this epoch that are done
        self._progress = self._done = 0.0  # at which the latest step was run, and that it has reached
        self._step_and_total = (0, 1)  # of the latest step in the run, and how many there are
        self._forwards: list[int] = []  # of the latest step, by encoder
        self._seed = 0
        self._ranks = 1
        self._is_rank_zero = True
        self._said: set[str] = set()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave another module's state behind; have first views made, or batch sizes tried at the longest sequences."""
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        if self._module is None or self._module() is not pl_module:
            self._module, self._loaded = weakref.ref(pl_module), {}
        self._resuming = self._keeps_for_finder = False
        self._is_before_training = True
        if not _is_compressed(pl_module):
            return
        driven = self._to_drive(embeds_by_path(pl_module))
        if any(isinstance(callback, self.finder_classes) for callback in trainer.callbacks):
            self._tried = driven
            for encoders in driven:
                encoders.compression.set_by_hand(encoders.most_expensive())
        elif trainer.global_step == 0:
            for encoders in driven:
                encoders.have_first_views_made()

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

            for embed in embeds_by_path(pl_module).values():
                embed.compression.ask_views_for(Strategy())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget what an interrupted fit may have left, and say what a new one will do, as far as it is known."""
        self._forget()
        self._is_before_training = self._keeps_for_finder = False
        self._is_rank_zero = trainer.is_global_zero
        going_on = self._resuming and self._is_rank_zero and not _is_compressed(pl_module)
        if going_on and self._guarded("compare schedules", lambda: has_plan_left(self._loaded)):
            self.logger.warning(
                "seqcompress: the checkpoint is of a run at a plan, and this module is not compressed: it trains "
                "plain; call accelerate(module, plan) before fit"
            )
        if trainer.global_step == 0 and _is_compressed(pl_module):
            self._announce(embeds_by_path(pl_module), 0.0)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Look again: the module may compress or restore its encoders between epochs, or as training starts."""
        self._looked = False
        if self._merging is not None:
            self._merging.forget()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put the strategies of this step in force."""
        self._guarded("log a step", lambda: self._metrics.withdraw(trainer))
        if not self._looked or not self._is_in_place(pl_module):
            self._looked = True
            self._look(trainer, pl_module, batch_idx)
        if self._length is None:
            return
        if self._driven:
            self._follow(trainer, pl_module, batch_idx, self._length)
        if self._merging is not None:
            together = self._together(trainer, pl_module)
            done = batch_idx - self._length.first_of_step(batch_idx) + 1
            is_last = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
            self._merging.begin(together, holds=done % together != 0 and not is_last)
        if self._online is not None:
            self._online.before_step(batch)

    def _follow(self, trainer: Any, pl_module: Any, batch_idx: int, length: RunLength) -> None:
        """Put in force what the plans have at this batch."""
        if batch_idx == length.first_of_step(batch_idx):
            self._progress = length.begin_step(batch_idx)
            self._step_and_total = length.step_and_total(length.first_of_step(batch_idx))
        step = self._steps = _steps_done(trainer, pl_module)
        for encoders in self._driven:
            encoders.follow(self._step_and_total, step, self._seed, length.pace())
        if self._rehearsal_is_due and step > 0:
            from seqcompress.training.rehearsal import forget_peak

            together = self._merging is not None
            longest = self._driven[0].most_expensive(trainer.accumulate_grad_batches if together else 1)
            self._rehearsal_is_due, self._rehearsing = False, longest
            forget_peak(pl_module.device)
        if self._rehearsing is not None:
            for encoders in self._driven:
                encoders.use(self._rehearsing if encoders is self._driven[0] else encoders.most_expensive())

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Note the forwards of the step: others may save a checkpoint before this sees the end of the batch."""
        self._forwards = [encoders.compression.stream.forwards for encoders in self._driven]

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
        self._guarded("log a step", lambda: self._metrics.log(trainer, pl_module, readings))
        if self._rehearsing is not None and not (self._merging is not None and self._merging.is_holding):
            self._end_rehearsal(pl_module.device, self._rehearsing)
        self._accumulated += 1
        if (
            self._online is not None
            and _steps_done(trainer, pl_module) != self._steps
            and self._is_in_place(pl_module)  # else the step has put a copy there, looked at as the next begins
        ):
            self._online.after_step(batch, batch_idx, length.step_and_total(batch_idx + 1), self._accumulated)
            self._accumulated = 0
            self._take_over(self._online)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note how many batches the epoch really had."""
        if self._length is not None:
            self._length.note_epoch(self._batches)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Let checkpoints and early stopping, which follow, see how far training has come."""
        readings = self._readings
        if readings is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._guarded("log a step", lambda: self._metrics.publish(trainer, readings))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the model, and say at which strategy a training step did not fit into memory."""
        if self._driven and trainer.training:
            from seqcompress.training.rehearsal import is_out_of_memory, shortage

            if is_out_of_memory(exception):
                encoders = self._driven[0]
                strategy = self._rehearsing or encoders.strategy
                self._guarded(
                    "say what did not fit",
                    lambda: self.logger.error(
                        "seqcompress: %s", shortage(strategy, encoders.student, pl_module.device, exception)
                    ),
                )
        self._loaded = self._state()
        self._end_trials()
        self._forget()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Log how training ended, say so if that was before its plan did, and let go of the model."""
        readings = self._readings
        if readings is not None:
            self._guarded("log a step", lambda: self._metrics.log_the_end(trainer, readings))
        if self._length is not None:
            self._done = max(self._done, self._length.share_of_time())
            if not trainer.fast_dev_run:
                for encoders in self._driven:
                    if encoders.ends_at(self._done):
                        encoders.finish()
                    else:
                        self._tell(encoders.shortfall(self._done))
                if self._online is not None:
                    self._keep_what_was_found(trainer, self._online)
        self._loaded = self._state()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Seed of the random subsets, units spent by all ranks, and how far the run has come. Plain values only."""
        self._keeps_for_finder = self._is_before_training
        return self._state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts.

        Raises:
            ValueError: a checkpoint's numbers are none that a run can go on with; nothing has been changed.
        """
        if self._fitting and not self._keeps_for_finder:  # not what is tested in between
            self._loaded, self._resuming = checked_state(state_dict), True

    def _state(self) -> dict[str, Any]:
        if self._readings is None or self._length is None:
            return self._loaded
        budget = self._budget
        spent = None if budget is None else self._guarded("count the budget", budget.state_dict)
        if spent is None:
            spent = {name: self._loaded[name] for name in ("units", "flops_of_unit") if name in self._loaded}
        else:
            spent["units"] *= self._ranks
        online = self._loaded.get("online") if self._online is None else self._online.state_dict()
        return {
            "seed": self._seed,
            "units": 0.0,
            **spent,
            "progress": self._done,
            "batches": self._length.batches,
            "plans": {encoders.name: encoders.compression.plan.to_json() for encoders in self._driven},
            "forwards": self._forwards,
            **({} if online is None else {"online": online}),
        }

    def _end_trials(self) -> None:
        for encoders in self._tried:
            if encoders.compression.driver is None:
                encoders.take(self)
                encoders.release(self)
        self._tried = []

    def _is_in_place(self, pl_module: Any) -> bool:
        """Whether the module holds, where they were, the encoders that it held."""
        for path, (embed, compression) in self._embeds_by_path.items():
            try:
                found = pl_module.get_submodule(path)
            except AttributeError:
                return False
            if found is not embed or embed.compression is not compression:
                return False
        return True

    def _look(self, trainer: Any, pl_module: Any, batch_idx: int) -> None:
        """Find the compressed encoders, and take up their plans where these stand."""
        embeds = embeds_by_path(pl_module) if _is_compressed(pl_module) else {}
        self._adopt(embeds)
        found = {path: (embed, embed.compression) for path, embed in embeds.items()}
        if found == self._embeds_by_path:
            return
        is_first = self._readings is None
        self._loaded = self._state()
        kept = {compression for _, compression in found.values()}
        for encoders in self._driven:
            if encoders.compression not in kept:
                encoders.release(self)
        self._embeds_by_path, self._driven = found, []
        self._budget = self._readings = self._rehearsing = self._online = None
        self._stop_merging()
        self._rehearsal_is_due = False
        if not embeds:
            return
        if self._length is None:
            self._length = RunLength(
                trainer, pl_module, self.timer_class, self.weight_averaging_class, self._loaded.get("batches")
            )
            self._seed = self._loaded["seed"] if "seed" in self._loaded else _seed(trainer)
            self._done = self._loaded.get("progress", 0.0) if self._resuming else 0.0
        self._progress = self._length.begin_step(batch_idx)
        self._step_and_total = self._length.step_and_total(self._length.first_of_step(batch_idx))
        if self._resuming and is_first:
            self._go_on(embeds)
        self._driven = self._to_drive(embeds)
        if self._resuming and is_first and batch_idx != self._length.first_of_step(batch_idx):
            for encoders, forwards in zip(self._driven, forwards_in(self._loaded), strict=False):
                encoders.forwards = forwards
        if not all(encoders.is_constant for encoders in self._driven):
            self._length.check()
        if is_first:
            self._announce(embeds, self._progress if trainer.global_step else 0.0)  # as at the start
        if is_first and not self._resuming:
            self._loaded.pop("online", None)  # another fit's
        self._begin_measuring(trainer, pl_module)
        self._begin_merging(trainer, pl_module)
        for encoders in self._driven:
            encoders.take(self)
        self._ranks = trainer.world_size
        self._budget = self._guarded("count the budget", lambda: self._budget_of(pl_module))
        self._readings = Readings(list(embeds.values()), self._units_in_millions, self._online)
        if is_first and not self._loaded and self._driven:
            self._rehearsal_is_due = self._has_own_memory(pl_module.device)

    def _adopt(self, embeds: dict[str, CompressedPatchEmbed]) -> None:
        """Let a copy that was put in an encoder's place take its part: Lightly's SMoG makes teachers of students so."""
        known = {compression for _, compression in self._embeds_by_path.values()}
        for path, embed in embeds.items():
            before, compression = self._embeds_by_path.get(path, (embed, embed.compression))
            if embed is before or embed.compression in known or embed.compression.plan != compression.plan:
                continue
            embed.compression, embed.drops_tokens, embed.when = compression, before.drops_tokens, before.when
            if before not in embeds.values():  # else it is measured and kept alive with those that run
                before.release()

    def _to_drive(self, embeds: dict[str, CompressedPatchEmbed]) -> list[DrivenEncoders]:
        """What nobody else drives, and has not been run to its end."""
        candidates = [DrivenEncoders(number, group) for number, group in enumerate(compressed_together(embeds))]
        return [encoders for encoders in candidates if not encoders.is_finished and not encoders.is_others]

    def _begin_measuring(self, trainer: Any, pl_module: Any) -> None:
        """Have an online plan find itself; say so where it cannot, and follow its preset."""
        of_online_plans = [encoders for encoders in self._driven if encoders.is_online]
        if not of_online_plans:
            return
        from seqcompress.adapters.online import TrainerOnlineScheduler, reason_not_to

        encoders, self._accumulated = of_online_plans[0], 0
        problem = reason_not_to(trainer, pl_module, self.whole_gradient_strategies)
        if len(of_online_plans) > 1:
            problem = "its encoders were compressed apart, and what is measured has to be compressed together"
        if problem is None:
            encoders.compression.release(encoders.compression.driver)  # another Trainer's callback, which is done
            try:
                tell = partial(self._say, encoders)
                online = TrainerOnlineScheduler(
                    trainer, pl_module, encoders.embeds, self._step_and_total, self.silent_logger_class, tell
                )
                if "online" in self._loaded:
                    online.load_state_dict(self._loaded["online"])
                self._online = online
                self._take_over(online)
            except (TypeError, ValueError, RuntimeError) as error:
                problem = str(error)
        if problem is not None:
            self._say(encoders, f"cannot be measured, and goes on with its preset: {problem}")

    def _begin_merging(self, trainer: Any, pl_module: Any) -> None:
        """Have batches merged where that was asked for; say so where it cannot be done."""
        if not any(compression.batch == "merge" for _, compression in self._embeds_by_path.values()):
            return
        from seqcompress.adapters.merging import Merging, most_together
        from seqcompress.adapters.online import reason_not_to

        accumulated = trainer.accumulate_grad_batches
        problem = reason_not_to(trainer, pl_module, self.whole_gradient_strategies)
        if any(encoders.is_online for encoders in self._driven):
            problem = "an online plan measures by the batches as they come"
        if problem is not None:
            self._tell(f"batch='merge': goes on without, since {problem}")
            return
        if most_together(2, accumulated) == 1:
            self._tell(
                "batch='merge': needs an even accumulate_grad_batches of the Trainer, such as 4, got "
                f"{accumulated}: batches are run one by one while it is so"
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
            batch_factor(embed, run_at(embed))
            for embed, compression in self._embeds_by_path.values()
            if compression.batch == "merge" and embed.drops_tokens
        ]
        return most_together(min(fit, default=1), trainer.accumulate_grad_batches)

    def _say(self, encoders: DrivenEncoders, line: str, *, is_problem: bool = False) -> None:
        self._tell(f"{encoders.name}: {line}")

    def _take_over(self, online: TrainerOnlineScheduler) -> None:
        """Follow what was found so far."""
        for encoders in self._driven:
            if encoders.is_online:
                encoders.plan = online.schedule

    def _keep_what_was_found(self, trainer: Any, online: TrainerOnlineScheduler) -> None:
        """Write it down as a plan for another run. Collective."""
        from seqcompress.adapters.online import FILE

        folder = self._guarded("find the run's folder", lambda: self._folder(trainer))
        name = next(encoders.name for encoders in self._driven if encoders.is_online)

        def write() -> Path:
            file = Path(str(folder)) / FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            online.schedule.to_json(file)
            return file

        kept = None if folder is None or not self._is_rank_zero else self._guarded("write the schedule", write)
        where = "" if kept is None else f"; what it followed is a plan for the next: {kept}"
        self._tell(f"{name}: {online.outcome()}{where}")

    def _folder(self, trainer: Any) -> str:
        """Where a run keeps its files. Collective."""
        return str(trainer.log_dir or trainer.default_root_dir)

    def _go_on(self, embeds: dict[str, CompressedPatchEmbed]) -> None:
        """Take up what a checkpoint says of its run: at its end, there is nothing left of a schedule."""
        before, pace = self._loaded.get("progress"), 0.0 if self._length is None else self._length.pace()
        for group in compressed_together(embeds):
            encoders = DrivenEncoders(0, group)
            if before is None or encoders.is_others:
                continue
            if before >= 1.0 and not encoders.is_constant:
                encoders.finish()
                continue
            encoders.compression.finished = False
            now = encoders.plan.at_step(*self._step_and_total)
            was = self._guarded("compare schedules", partial(schedule_in, self._loaded, encoders.name))
            if was is not None and was != encoders.compression.plan:
                self._tell(f"{encoders.name}: {resume_notice({'schedule': (was, encoders.compression.plan)}, now)}")
                continue
            # A run that was broken off within a batch has not counted it.
            is_elsewhere = abs(before - self._progress) > 1.5 * pace
            if is_elsewhere and encoders.plan(before) != now:
                self._tell(
                    f"{encoders.name}: the checkpoint was at {before:.0%} of its run ({encoders.plan(before)}), which "
                    f"is {self._progress:.0%} of this one: goes on from its step, at {now}"
                )

    def _announce(self, embeds: dict[str, CompressedPatchEmbed], progress: float) -> None:
        """Say what will happen, in one line for all encoders with which the same will."""
        by_outlook: dict[tuple[Any, ...], list[DrivenEncoders]] = {}
        for number, group in enumerate(compressed_together(embeds)):
            encoders = DrivenEncoders(number, group)
            by_outlook.setdefault((encoders.plan, encoders.is_finished, encoders.is_others), []).append(encoders)
        for alike in by_outlook.values():
            share = self._guarded("count the budget", partial(share_of_plain_budget, alike, progress))
            line = alike[0].outlook(progress, share, [encoders.name for encoders in alike])
            if line not in self._said:  # at the first batch all is known; at the start, mostly
                self._said.add(line)
                self._tell(line)

    def _tell(self, line: str) -> None:
        if self._is_rank_zero:
            self.logger.info("seqcompress: %s", line)

    def _guarded(self, what: str, do: Callable[[], Result]) -> Result | None:
        """Books are kept as well as they can be: what goes wrong there is said once, and the run goes on."""
        try:
            return do()
        except Exception as error:
            if what not in self._said and self._is_rank_zero:
                self._said.add(what)
                self.logger.warning("seqcompress: could not %s: %s: %s", what, type(error).__name__, error)
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
        from seqcompress.training.rehearsal import memory_needed

        self._tell(str(memory_needed(strategy, device)))
        for encoders in self._driven:
            encoders.use(encoders.strategy)
        self._rehearsing = None


def _is_compressed(module: Any) -> bool:
    # Where the compressors were never imported, nothing can be compressed: not even a look is taken. A module that was
    # unpickled brings no more of this package than them.
    if "seqcompress.encoders.patch_embed" not in sys.modules:
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
