"""A loop of one's own that stops anywhere, in any way, goes on as if it had not; and what holds where plans differ."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqcompress import SequenceScheduler, Stepwise, Strategy, compress, get_strategy
from seqcompress.schedules import Linear

STEPS, BATCHES = 10, 2  # of one step
EVERY_KIND = Stepwise(
    {
        0.0: Strategy(0.5, 16),
        0.2: Strategy(0.75, 16),
        0.4: Strategy(0.75),
        0.5: Strategy(0.0, 16),
        0.7: Strategy(0.25),
        0.9: Strategy(),
    }
)


class _Run:
    """Training with gradient accumulation that can be stopped after any batch."""

    def __init__(self, make: Callable[..., Any], plan: Any = EVERY_KIND, total_steps: int = STEPS) -> None:
        self.student, self.teacher = make(), make().requires_grad_(False)
        compress(self.student, plan, teacher=self.teacher)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)
        self.scheduler = SequenceScheduler([self.student, self.teacher], total_steps=total_steps)
        self.done = 0
        self.strategies: list[Strategy] = []

    def go_on(self, until: int = STEPS * BATCHES, after_batch: Callable[[], object] = lambda: None) -> _Run:
        while self.done < until:
            views = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(self.done))
            self.strategies.append(get_strategy(self.student))
            with torch.no_grad():
                target = self.teacher(views)
            (self.student(views) - 1.1 * target.flip(0)).square().mean().backward()
            self.done += 1
            if self.done % BATCHES == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
            after_batch()
        return self

    def state(self) -> dict[str, Any]:
        """With the gradients so far: without them, nobody can stop in the middle of a step."""
        return {
            "student": self.student.state_dict(),
            "gradients": [parameter.grad for parameter in self.student.parameters()],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "done": self.done,
        }

    def load(self, state: dict[str, Any]) -> _Run:
        self.student.load_state_dict(state["student"])
        for parameter, gradient in zip(self.student.parameters(), state["gradients"], strict=True):
            parameter.grad = gradient
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.done = state["done"]
        return self

    def weights(self) -> list[Tensor]:
        return [value.clone() for value in self.student.state_dict().values()]


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "plan",
    [EVERY_KIND, pytest.param(Linear(Strategy(0.75, 16), Strategy()), marks=pytest.mark.soak)],
    ids=["every kind of change", "ramp"],
)
def test_a_run_goes_on_bit_for_bit_from_every_batch_also_in_the_middle_of_a_step(plan: Any, tiny_vit: Any) -> None:
    states: list[dict[str, Any]] = []
    whole = _Run(tiny_vit, plan)
    whole.go_on(after_batch=lambda: states.append(_copied(whole.state())))
    assert len(set(whole.strategies)) >= 5
    for number, state in enumerate(states):
        torch.manual_seed(1000 + number)  # another process begins with another random state
        resumed = _Run(tiny_vit, plan).load(state).go_on()
        assert resumed.strategies == whole.strategies[number + 1 :]
        assert _same(resumed.weights(), whole.weights()), f"stopped after {number + 1} batches"
    assert len(states) == STEPS * BATCHES


def _train_in_a_process(make: Callable[..., Any], folder: Path) -> None:
    torch.manual_seed(os.getpid())
    run, last = _Run(make), folder / "last.pt"
    if last.exists():
        run.load(torch.load(last, weights_only=True))
    else:
        torch.manual_seed(0)
        run = _Run(make)

    def save() -> None:
        torch.save(run.state(), folder / "next.pt")
        (folder / "next.pt").replace(last)
        (folder / f"{run.done}.done").touch()

    run.go_on(after_batch=save)
    torch.save(run.weights(), folder / "end.pt")


def test_a_run_that_is_killed_after_every_batch_ends_as_one_that_is_not(tiny_vit: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = _Run(tiny_vit).go_on()
    forked = multiprocessing.get_context("fork")  # no import again: a start takes milliseconds
    codes: list[int | None] = []
    for batch in range(STEPS * BATCHES):
        process = forked.Process(target=_train_in_a_process, args=(tiny_vit, tmp_path))
        process.start()
        while process.is_alive() and not (tmp_path / f"{batch + 1}.done").exists():
            time.sleep(0.001)
        if batch < STEPS * BATCHES - 1:
            os.kill(process.pid or 0, signal.SIGKILL)  # wherever it is by now
        process.join()
        codes.append(process.exitcode)
    assert codes.count(-signal.SIGKILL) > STEPS  # some have gone on for more than one batch
    assert codes[-1] == 0
    assert _same(torch.load(tmp_path / "end.pt"), whole.weights())


# Where the script and the checkpoint differ, the script holds, from the step that was reached


def test_another_plan_and_length_of_the_script_hold_and_that_is_said_in_one_line(tiny_vit: Any) -> None:
    state = _Run(tiny_vit).go_on(until=8).state()
    resumed = _Run(tiny_vit, Strategy(0.1), total_steps=3 * STEPS)
    with pytest.warns(UserWarning, match="goes on from its step") as told:
        resumed.load(state)
    assert [str(warning.message) for warning in told] == [
        "seqcompress: goes on from its step by what this script says, not by the checkpoint: schedule drop 0.1 "
        "(was 0: drop 0.5, patch 16; 0.2: drop 0.75, patch 16; 0.4: drop 0.75; 0.5: patch 16; 0.7: drop 0.25; 0...), "
        "total_steps 30 (was 10); now at drop 0.1"
    ]
    scheduler = resumed.scheduler
    assert (scheduler.last_step, scheduler.total_steps, get_strategy(resumed.student)) == (4, 30, Strategy(0.1))


def test_a_longer_run_goes_on_from_its_step(tiny_vit: Any) -> None:
    resumed = _Run(tiny_vit, total_steps=2 * STEPS)
    with pytest.warns(UserWarning, match=r"total_steps 20 \(was 10\); now at drop 0\.75, patch 16$"):
        resumed.load(_Run(tiny_vit).go_on(until=10).state())
    assert resumed.go_on(until=12).strategies == [Strategy(0.75, 16)] * 2  # at a quarter, no longer at a half
    assert resumed.scheduler.progress == 0.3


def test_a_schedule_that_was_run_to_its_end_stays_there_in_a_longer_run(tiny_vit: Any) -> None:
    resumed = _Run(tiny_vit, total_steps=2 * STEPS)
    with pytest.warns(UserWarning, match="now at base of a schedule that was run to its end"):
        resumed.load(_Run(tiny_vit).go_on().state())
    assert (get_strategy(resumed.student), resumed.scheduler.progress) == (Strategy(), 1.0)


def test_a_schedule_that_was_followed_since_the_start_goes_on(tiny_vit: Any) -> None:
    run = _Run(tiny_vit).go_on(until=8)
    followed = Stepwise({0.0: Strategy(0.6), 0.8: Strategy()})
    run.scheduler.follow(followed)
    resumed = _Run(tiny_vit).load(run.state())  # an error if it warns: nothing differs from the script
    assert resumed.scheduler.schedule == followed
    assert get_strategy(resumed.student) == Strategy(0.6)


def test_loading_what_was_saved_gives_what_was_saved(tiny_vit: Any) -> None:
    run = _Run(tiny_vit).go_on(until=7)
    state = run.scheduler.state_dict()
    assert state["forwards"] == [1]  # of a student and its teacher, which draws nothing
    resumed = _Run(tiny_vit)
    resumed.scheduler.load_state_dict(state)
    assert resumed.scheduler.state_dict() == state


def test_a_state_that_an_earlier_version_has_saved_is_taken(tiny_vit: Any) -> None:
    state = _Run(tiny_vit).go_on(until=8).scheduler.state_dict()
    for name in ("plan", "forwards"):
        del state[name]
    resumed = _Run(tiny_vit)
    resumed.scheduler.load_state_dict(state)
    assert (resumed.scheduler.last_step, get_strategy(resumed.student)) == (4, Strategy(0.75))
