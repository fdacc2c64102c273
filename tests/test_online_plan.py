"""The plan "online": a preset until what is measured moves, within its shares of compute and time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from seqcompress import Linear, OnlineScheduler, Schedule, SequenceScheduler, Strategy, compress, get_strategy
from seqcompress.gradients import online
from seqcompress.presets import PRESETS
from seqcompress.schedules import Constant, Online, Stepwise

HALF, LARGE = Strategy(0.5), Strategy(0.0, 8)
PRESET = Stepwise({0.0: Strategy(0.5, 8), 0.5: LARGE, 0.9: Strategy()})
MUCH = Online(PRESET, compute_share=1.0, time_share=None)


def _vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0)


class _Run:
    """A run in a plain loop; a loss that trains takes ``pause`` seconds more, one that is measured ``slow``."""

    def __init__(self, plan: Any, steps: int, slow: float = 0.0, pause: float = 0.001) -> None:
        self.vit = compress(_vit(), plan)
        self.steps, self.slow, self.pause = steps, slow, pause
        self.training = False
        self.scheduler = OnlineScheduler(self.vit, self.loss, total_steps=steps)
        self.optimizer = torch.optim.SGD(self.vit.parameters(), lr=0.01)
        self.followed: list[Strategy] = []
        self.events_dropped = 0

    def loss(self, views: Tensor) -> Tensor:
        time.sleep(self.pause if self.training else self.slow)
        return self.vit(views)[:, 0].sin().mean()

    def go_on(self, until: int) -> _Run:
        for step in range(self.scheduler.last_step, until):
            views = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            self.followed.append(get_strategy(self.vit))
            self.optimizer.zero_grad()
            self.training = True
            self.loss(views).backward()
            self.training = False
            self.optimizer.step()
            before = self._open, len(self.scheduler.decisions)
            self.scheduler.step(views)
            self.events_dropped += before[0] > self._open and len(self.scheduler.decisions) == before[1]
        return self

    @property
    def _open(self) -> int:
        return len(json.loads(self.scheduler.state_dict()["events"]))


@pytest.fixture
def only_sleep_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)


@pytest.mark.parametrize("moves", [False, True])
def test_until_the_first_move_it_is_the_preset_and_in_the_end_too(monkeypatch: pytest.MonkeyPatch, moves: bool) -> None:
    monkeypatch.setattr(online, "_CONFIDENCE", 0.0 if moves else 2.0)
    run = _Run(MUCH, 300).go_on(300)
    decisions, found = run.scheduler.decisions, run.scheduler.schedule
    assert len(decisions) >= 3
    assert [decision.before != decision.after for decision in decisions] == [moves] * len(decisions)
    assert run.followed == [found.at_step(step, 300) for step in range(300)]
    assert run.followed[270:] == [Strategy()] * 30
    first = decisions[0].step if moves else 300
    assert run.followed[:first] == [PRESET.at_step(step, 300) for step in range(first)]
    assert max(decision.step for decision in decisions) < 270  # nothing is measured at the end
    kept = {begin: strategy for begin, strategy in PRESET.stages if begin < first / 300}
    made = {decision.step / 300: decision.after for decision in decisions} if moves else {}
    assert found == Stepwise({**kept, **made, 0.9: Strategy()})


def test_a_decision_is_begun_anew_where_the_preset_moves_on_within_it() -> None:
    steady = _Run(Online(Constant(HALF), 1.0, None), 100)
    while not json.loads(steady.scheduler.state_dict()["events"]):
        steady.go_on(steady.scheduler.last_step + 1)
    begins = steady.scheduler.last_step
    moving = Stepwise({0.0: HALF, (begins + 2) / 100: LARGE, 0.9: Strategy()})
    run = _Run(Online(moving, 1.0, None), 100).go_on(begins + 1)
    assert len(json.loads(run.scheduler.state_dict()["events"])) == 2
    run.go_on(100)
    first = run.scheduler.decisions[0]
    assert (first.before, first.report.num_batches) == (LARGE, 4)
    assert first.step >= begins + 5


@pytest.mark.usefixtures("only_sleep_takes_time")
def test_measuring_that_is_slower_than_its_flops_is_held_to_its_share_of_the_time() -> None:
    free = _Run(Online(PRESET, 1.0, None), 300, slow=0.05, pause=0.01).go_on(200)
    held = _Run(Online(PRESET, 1.0, 0.5), 300, slow=0.05, pause=0.01).go_on(300)
    assert free.scheduler.measured_share_of_time > 0.6
    assert held.scheduler.measured_share_of_time <= 0.5
    assert held.scheduler.measured_share < free.scheduler.measured_share


@pytest.mark.usefixtures("only_sleep_takes_time")
def test_a_decision_whose_first_batch_takes_longer_than_thought_is_ended_and_the_run_keeps_its_share() -> None:
    run = _Run(Online(Constant(HALF), 1.0, 0.2), 400, slow=0.02, pause=0.005).go_on(400)
    batches = [decision.report.num_batches for decision in run.scheduler.decisions]
    assert batches == [4] * len(batches)
    assert batches
    assert run.events_dropped == 0
    assert run.scheduler.measured_share_of_time <= 0.2


@pytest.mark.parametrize("preset", [PRESET, Constant(HALF), Constant(Strategy())])
def test_a_run_that_is_too_short_to_decide_says_so_at_its_first_step_and_how_long_it_must_be(
    preset: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Online(preset, 0.2, None)
    _Run(plan, 10).go_on(1)
    said = [record.message for record in caplog.records if "too few" in record.message]
    assert len(said) == 1
    assert said[0].startswith(f"10 steps are too few for a decision, and the run keeps to {preset}")
    enough = int(said[0].split()[-3])
    caplog.clear()
    assert not _Run(plan, enough - 2).go_on(enough - 2).scheduler.decisions
    assert "too few" in caplog.text
    caplog.clear()
    assert _Run(plan, enough + 8).go_on(enough + 8).scheduler.decisions  # begun at the end, it takes four steps
    assert "too few" not in caplog.text


def test_the_time_of_a_run_goes_on_where_it_was_stopped() -> None:
    run = _Run(Online(PRESET, 1.0, 1.0), 120).go_on(60)
    state = run.scheduler.state_dict()
    resumed = _Run(Online(PRESET, 1.0, 1.0), 120)
    resumed.scheduler.load_state_dict(state)
    assert resumed.scheduler.measured_share_of_time == run.scheduler.measured_share_of_time > 0
    assert resumed.scheduler.state_dict()["seconds_trained"] == state["seconds_trained"] > 0.06


def test_a_resumed_run_follows_preset_and_moves_as_if_it_had_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "_CONFIDENCE", 0.0)
    whole = _Run(MUCH, 100).go_on(37)
    parts = [whole.vit.state_dict(), whole.scheduler.state_dict()]
    resumed = _Run(MUCH, 100)
    resumed.vit.load_state_dict(parts[0])
    resumed.scheduler.load_state_dict(parts[1])
    whole.go_on(100), resumed.go_on(100)
    assert resumed.scheduler.schedule == whole.scheduler.schedule
    assert resumed.scheduler.decisions == whole.scheduler.decisions
    assert resumed.followed == whole.followed[37:]
    assert all(map(torch.equal, resumed.vit.state_dict().values(), whole.vit.state_dict().values()))


def test_what_cannot_be_measured_goes_on_with_the_preset_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    run = _Run(MUCH, 100)
    measured = run.loss

    def loss(views: Tensor) -> Tensor:
        if not run.training:
            raise RuntimeError("this step\ncannot be run twice")
        return measured(views)

    run.scheduler._loss = loss
    run.go_on(100)
    assert run.followed == [PRESET.at_step(step, 100) for step in range(100)]
    assert not run.scheduler.is_measuring
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == ["cannot be measured, and goes on with its preset: this step"]


def test_after_moves_a_step_that_fails_brings_the_preset_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "_CONFIDENCE", 0.0)
    run = _Run(MUCH, 300)
    while not run.scheduler.decisions:
        run.go_on(run.scheduler.last_step + 1)
    moved = run.scheduler.last_step
    run.scheduler._loss = lambda views: views.sum()  # does not pass through the encoder
    run.go_on(300)
    gave_up = run.scheduler.state_dict()["gave_up"]
    assert moved < gave_up < 270
    assert run.followed[moved:gave_up] == [run.scheduler.decisions[0].after] * (gave_up - moved)
    assert run.followed[gave_up:] == [PRESET.at_step(step, 300) for step in range(gave_up, 300)]


def test_the_name_is_the_default_preset_within_3_percent() -> None:
    vit = compress(_vit(), "online")
    assert get_strategy(vit) == Strategy()  # nobody drives
    scheduler = OnlineScheduler(vit, torch.sum, total_steps=100)
    assert get_strategy(vit) == Strategy(0.5, 8)
    assert scheduler.schedule == PRESETS["default"](8)
    assert PRESETS["online"](8) == Online(PRESETS["default"](8), 0.03, 0.03)  # type: ignore[arg-type]
    assert Strategy() in PRESETS["online"](8).strategies()


def test_a_scheduler_that_cannot_measure_follows_the_preset_and_says_so() -> None:
    vit = compress(_vit(), MUCH)
    with pytest.warns(UserWarning, match="measures nothing, and follows the preset of an online plan"):
        scheduler = SequenceScheduler(vit, total_steps=10)
    assert scheduler.schedule == PRESET


def test_nobody_drives_says_what_to_make() -> None:
    vit = compress(_vit(), "online")
    with pytest.warns(UserWarning, match=r"keep an OnlineScheduler\(model, loss, total_steps"):
        vit(torch.randn(2, 3, 16, 16)).sum().backward()


def test_encoders_with_another_plan_beside_an_online_one_are_refused() -> None:
    models = [compress(_vit(), MUCH), compress(_vit(), PRESET)]
    with pytest.raises(ValueError, match="must have one plan where one is online, got 2"):
        OnlineScheduler(models, torch.sum, total_steps=10)


@pytest.mark.parametrize("plan", [MUCH, Online(Constant(HALF)), Online(PRESET, 0.01, 0.5)])
def test_an_online_plan_is_a_file_like_any_other(plan: Online, tmp_path: Path) -> None:
    plan.to_json(tmp_path / "plan.json")
    assert Schedule.from_json(tmp_path / "plan.json") == plan
    assert compress(_vit(), tmp_path / "plan.json") is not None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Linear(HALF, Strategy()),), TypeError, "preset must be a Stepwise or a Constant"),
        ((MUCH,), TypeError, "preset must be a Stepwise or a Constant"),
        ((PRESET, 0.0), ValueError, r"compute_share must be in \(0, 1\], got 0.0"),
        ((PRESET, "much"), TypeError, "compute_share must be a number"),
        ((PRESET, 0.1, 2), ValueError, r"time_share must be in \(0, 1\], got 2"),
    ],
)
def test_an_online_plan_that_makes_no_sense_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Online(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": None}, "field 'preset': must be a schedule"),
        ({"preset": {"kind": "stepwise"}}, "field 'preset': field 'seqcompress_schedule': is missing"),
        ({"compute_share": 0}, "field 'compute_share': compute_share must be in"),
        ({"time_share": "x"}, "field 'time_share': time_share must be a number"),
        ({"more": 1}, "field 'more': is unknown"),
    ],
)
def test_a_file_of_an_online_plan_that_is_wrong_names_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_json(json.dumps({**json.loads(MUCH.to_json()), **changes}))
