"""A schedule that finds itself: right where the answer is known, within its share, and without a trace in the run."""

from __future__ import annotations

import copy
import functools
import io
import json
import logging
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed import checkpoint

from seqcompress import (
    OnlineScheduler,
    Schedule,
    SequenceScheduler,
    Stepwise,
    Strategy,
    compress,
    get_strategy,
    gradient_error,
    rehearse,
    relative_cost,
    restore,
)
from seqcompress.encoders import find_encoder
from seqcompress.gradients import online
from seqcompress.gradients.statistics import GradientMoments, jackknife, norm2_of_mean, variance
from seqcompress.training import cost
from seqcompress.training.cost import encoder_flops

HALF, LARGE, HUGE = Strategy(0.5), Strategy(0.0, 8), Strategy(0.0, 16)
WORKER = Path(__file__).with_name("online_worker.py")


def _vit(**overrides: Any) -> VisionTransformer:
    settings: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return VisionTransformer(**{**settings, "num_classes": 0, **overrides})


class _Method(nn.Module):
    """A momentum method in small, with everything in it that a training step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _vit(drop_path_rate=0.2)
        self.teacher = copy.deepcopy(self.backbone).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.register_buffer("queue", torch.randn(4, 16))

    def loss(self, batch: Tensor) -> Tensor:
        views = batch + 0.1 * torch.randn_like(batch)
        features = self.head(self.backbone(views))
        with torch.no_grad():
            target = self.teacher(batch)
        keys = F.normalize(torch.cat((target, self.queue)), dim=1)
        self.queue = torch.cat((self.queue[1:], target[:1]))
        return F.cross_entropy(F.normalize(features, dim=1) @ keys.T / 0.2, torch.arange(len(batch)))


def _batches(steps: int, seed: int = 3) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(4, 3, 16, 16, generator=generator)


class _Run:
    """A training run of a method, from a seed."""

    def __init__(self, seed: int = 0, start: Strategy = HALF, **settings: Any) -> None:
        torch.manual_seed(seed)
        self.method = _Method()
        compress(self.method.backbone, start, teacher=self.method.teacher)
        self.optimizer = torch.optim.SGD(self.method.parameters(), lr=0.05, momentum=0.9)
        settings = {"total_steps": 60, "compute_share": 1.0, **settings}
        self.scheduler = OnlineScheduler(self.method, self.method.loss, **settings)

    def train(self, batches: Iterator[Tensor], advance: Callable[[Tensor], object] | None = None) -> _Run:
        for batch in batches:
            self.optimizer.zero_grad()
            self.method.loss(batch).backward()
            self.optimizer.step()
            (advance or self.scheduler.step)(batch)
        return self

    def weights(self) -> list[Tensor]:
        return [*self.method.state_dict().values(), torch.get_rng_state()]


def _state_of(part: Any) -> Any:
    return copy.deepcopy(part.state_dict())


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def test_where_compression_has_no_bias_it_ends_at_the_cheapest_strategy() -> None:
    torch.manual_seed(0)
    vit = _vit(class_token=False, global_pool="avg", pos_embed="none")  # of views of one colour, all tokens are equal
    compress(vit, Strategy())
    optimizer = torch.optim.SGD(vit.parameters(), lr=1e-3)

    def loss(views: Tensor) -> Tensor:
        return vit(views).sin().mean()

    ladder = [Strategy(dropout) for dropout in (0.0, 0.5, 0.75)]
    scheduler = OnlineScheduler(vit, loss, ladder, total_steps=60, compute_share=0.5)
    followed = []
    for _ in range(60):
        views = torch.randn(4, 3, 1, 1).expand(4, 3, 16, 16).contiguous()
        optimizer.zero_grad()
        loss(views).backward()
        optimizer.step()
        scheduler.step(views)
        followed.append(get_strategy(vit))
    moves = [(decision.before, decision.after) for decision in scheduler.decisions[:2]]
    assert moves == [(Strategy(), HALF), (HALF, Strategy(0.75))]
    assert {decision.after for decision in scheduler.decisions[1:]} == {Strategy(0.75)}
    assert scheduler.decisions[0].chance(HALF) >= 0.8
    error = scheduler.decisions[0].report[HALF]
    assert error.bias2 == pytest.approx(0.0, abs=1e-6 * error.variance)
    assert error.cost == pytest.approx(relative_cost(vit, HALF, 16))
    assert scheduler.schedule == Stepwise(
        {0.0: Strategy(), **{made.step / 60: made.after for made in scheduler.decisions[:2]}}
    )
    assert followed == [scheduler.schedule(step / 60) for step in range(1, 61)]


def test_where_bias_is_all_it_relaxes_to_the_base_past_a_rung_between() -> None:
    torch.manual_seed(0)
    vit = compress(_vit(), HUGE)
    views = torch.randn(4, 3, 16, 16)  # always these: the gradient has no variance

    def loss(views: Tensor) -> Tensor:
        return vit(views)[:, 0].sin().mean()

    scheduler = OnlineScheduler(vit, loss, [LARGE], total_steps=100, compute_share=1.0)
    assert scheduler.ladder == (HUGE, LARGE, Strategy())
    for _ in range(100):
        loss(views).backward()
        scheduler.step(views)
    moves = [(made.before, made.after) for made in scheduler.decisions if made.before != made.after]
    assert moves == [(HUGE, Strategy())]
    assert get_strategy(vit) == Strategy()
    first = scheduler.decisions[0].report
    reference = gradient_error(vit, loss, [views] * 4, [LARGE, HUGE], cost="flops")
    for strategy in (LARGE, HUGE):
        assert first[strategy].bias2 == pytest.approx(reference[strategy].bias2, rel=1e-4)
        assert first[strategy].cost == reference[strategy].cost


def test_a_difference_that_may_be_chance_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chances = iter([0.79, 0.1, 0.81, 0.1])
    monkeypatch.setattr(online.OnlineDecision, "chance", lambda self, strategy: next(chances))
    run = _Run(strategies=[Strategy(0.75)], total_steps=100)
    batches = _batches(100)
    for made in (1, 2):
        while len(run.scheduler.decisions) < made:
            run.train(iter([next(batches)]))
    assert [made.after for made in run.scheduler.decisions] == [HALF, Strategy()]


def test_at_a_tie_the_rule_moves_in_less_than_a_fifth_of_the_decisions_and_finds_what_is_better() -> None:
    generator = torch.Generator().manual_seed(0)
    moved = {1.0: 0, 0.6: 0}  # a neighbour's noise and bias, relative to those of the strategy in force
    for scale in moved:
        for _ in range(500):
            base = torch.randn(4, 1, 50, generator=generator)
            strategies = {}
            for name, size in (("now", 1.0), ("neighbour", scale)):
                errors = size * (torch.randn(4, 1, 50, generator=generator) + 0.5)
                bias2, spread = norm2_of_mean(list(errors)), variance(list(base + errors))
                half = jackknife(statistics.fmean, [0.5] * 4)
                strategies[name] = bias2 + half * spread
            moved[scale] += (strategies["now"] - strategies["neighbour"]).chance_of_positive >= 0.8
    assert 0.12 <= moved[1.0] / 500 <= 0.22
    assert moved[0.6] / 500 >= 0.9


def test_estimates_from_sketches_are_those_of_the_gradients() -> None:
    base, others = torch.randn(5, 30), torch.randn(5, 30) + 1
    moments = GradientMoments(30, sketch_size=30)
    for first, second in zip(base, others, strict=True):
        moments.begin([first])
        moments.add("other", [second])
        moments.close()
    for mine, theirs in (
        (norm2_of_mean(list(base[:, None])), moments.base_norm2()),
        (norm2_of_mean(list((others - base)[:, None])), moments.bias2("other")),
        (variance(list(others[:, None])), moments.variance("other")),
    ):
        assert mine.value == pytest.approx(theirs.value)
        assert mine.leave_one_out[0] == pytest.approx(theirs.leave_one_out[0])


@pytest.mark.parametrize(
    ("values", "chance"),
    [((1.0, 1.0, 1.0), 1.0), ((-1.0, -1.0, -1.0), 0.0), ((0.0, 0.0, 0.0), 0.5), ((1.0, 2.0), 0.5)],
)
def test_the_chance_of_a_difference_follows_students_t(values: tuple[float, ...], chance: float) -> None:
    assert jackknife(statistics.fmean, values).chance_of_positive == chance
    four = jackknife(statistics.fmean, [0.0, 1.0, 2.0, 3.0])  # t = 2.324 with 3 degrees of freedom
    assert four.chance_of_positive == pytest.approx(0.94864, abs=1e-5)


@pytest.mark.parametrize("share", [0.03, 0.3])
def test_measuring_never_takes_more_than_its_share_and_most_of_it(share: float) -> None:
    run = _Run(compute_share=share, total_steps=1000)
    student = find_encoder(run.method.backbone)
    flops = functools.cache(encoder_flops)
    calls = SimpleQueue[tuple[int, int]]()  # weight and tokens of every forward; a list would be put back
    for weight, vit in ((3, run.method.backbone), (1, run.method.teacher)):
        vit.blocks[0].register_forward_pre_hook(
            lambda block, args, weight=weight: calls.put((weight, args[0].shape[1])), prepend=True
        )
    spent = {"training": 0, "measuring": 0}

    def add(kind: str) -> None:
        spent[kind] += sum(
            4 * weight * flops(student, tokens) for weight, tokens in (calls.get() for _ in range(calls.qsize()))
        )

    def advance(batch: Tensor) -> None:
        add("training")
        run.scheduler.step(batch)
        add("measuring")
        assert spent["measuring"] <= share * spent["training"]
        assert run.scheduler.measured_share == pytest.approx(spent["measuring"] / spent["training"])

    run.train(_batches(600 if share < 0.1 else 120), advance)
    assert len(run.scheduler.decisions) >= 1
    assert spent["measuring"] > 0.5 * share * spent["training"]
    assert all(made.share <= share for made in run.scheduler.decisions)


def test_what_steps_cost_is_counted_once_of_all_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    count = encoder_flops

    def counting(encoder: Any, tokens: int) -> int:
        counted.append(tokens)
        return count(encoder, tokens)

    run = _Run(compute_share=1e-9)
    monkeypatch.setattr(cost, "encoder_flops", counting)
    run.train(_batches(1))
    first = len(counted)
    run.train(_batches(20))
    assert len(counted) == first > 0
    run.train(batch[:3] for batch in _batches(2))  # a step of another size
    assert len(counted) == 2 * first
    assert run.scheduler._trained == 3 * sum(
        views * (encoder_flops(encoder, 9) * 3 + encoder_flops(encoder, 17)) / 3
        for views in (4,) * 21 + (3,) * 2
        for encoder in [find_encoder(run.method.backbone)]
    )


def test_a_run_too_short_for_one_decision_measures_nothing() -> None:
    run = _Run(compute_share=0.03).train(_batches(30))
    assert (run.scheduler.decisions, run.scheduler.measured_share) == ((), 0.0)
    assert run.scheduler.schedule == Stepwise({0.0: HALF})


def test_the_batches_of_a_decision_are_those_of_steps_that_follow_each_other() -> None:
    run, measured_at = _Run(compute_share=0.2, total_steps=1000), []
    for batch in _batches(250):
        before = run.scheduler.measured_share
        run.train(iter([batch]))
        if run.scheduler.measured_share > before:
            measured_at.append(run.scheduler.last_step)
    assert len(measured_at) >= 8
    for begin in range(0, len(measured_at) - 3, 4):
        assert measured_at[begin : begin + 4] == list(range(measured_at[begin], measured_at[begin] + 4))


def test_measuring_leaves_no_trace_in_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "_CONFIDENCE", 2.0)  # never moves
    observed = _Run().train(_batches(40))
    plain = _Run()
    del plain.scheduler  # one drives at a time
    plain.scheduler = SequenceScheduler(plain.method, HALF, total_steps=60)
    plain.train(_batches(40), lambda batch: plain.scheduler.step())
    assert len(observed.scheduler.decisions) >= 2
    assert _same(observed.weights(), plain.weights())
    assert all(
        torch.equal(mine["momentum_buffer"], others["momentum_buffer"])
        for mine, others in zip(observed.optimizer.state.values(), plain.optimizer.state.values(), strict=True)
    )


def test_the_seed_decides_everything() -> None:
    runs = [_Run(seed).train(_batches(40)) for seed in (1, 1, 2)]
    assert runs[0].scheduler.decisions == runs[1].scheduler.decisions
    assert _same(runs[0].weights(), runs[1].weights())
    assert runs[0].scheduler.decisions != runs[2].scheduler.decisions


def test_a_resumed_run_decides_what_it_would_have_had_it_not_stopped_in_the_middle_of_a_measurement_too() -> None:
    batches, stops = list(_batches(50)), {}
    whole = _Run()
    for done, batch in enumerate(batches, start=1):
        whole.train(iter([batch]))
        measured = len(json.loads(whole.scheduler.state_dict()["events"]))
        if whole.scheduler.decisions and measured not in stops:
            file = stops[measured] = io.BytesIO()
            kept = [whole.method, whole.optimizer, whole.scheduler]
            torch.save([done, whole.scheduler.strategy, torch.get_rng_state(), *map(_state_of, kept)], file)
        if len(stops) == 4 and len(whole.scheduler.decisions) == 2:
            break
    assert sorted(stops) == [0, 1, 2, 3]  # batches that a decision still to come rests on
    end = [whole.scheduler.state_dict()[name] for name in ("decisions", "schedule", "measured")]

    for file in stops.values():
        resumed = _Run(seed=7)
        file.seek(0)
        done_then, strategy, random_state, *states = torch.load(file, weights_only=False)
        for part, state in zip((resumed.method, resumed.optimizer, resumed.scheduler), states, strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(random_state)
        assert get_strategy(resumed.method) == resumed.scheduler.strategy == strategy
        resumed.train(iter(batches[done_then:done]))
        assert [resumed.scheduler.state_dict()[name] for name in ("decisions", "schedule", "measured")] == end
        assert _same(resumed.weights(), whole.weights())


def test_a_run_that_stops_while_gradients_accumulate_counts_what_was_forward_already() -> None:
    first, second = _batches(2)
    whole, resumed = _Run(), _Run()
    whole.train(iter([first]))
    whole.method.loss(second).backward()
    state = _state_of(whole.scheduler)
    assert json.loads(state["begun"])[0][0][0] == list(second.shape)
    resumed.scheduler.load_state_dict(state)
    for run in (whole, resumed):
        run.method.loss(second).backward()  # the other half of the step
        run.scheduler.step(second, accumulated=2)
    assert resumed.scheduler.state_dict()["trained"] == whole.scheduler.state_dict()["trained"]
    of_nothing, flat = (json.dumps([[[view, 0, True, False, 1]], []]) for view in ([8, 3, 32, 32], [8, 3, 32]))
    for begun in ("[]", "[7, 7]", of_nothing, flat):
        with pytest.raises(ValueError, match="state is not an OnlineScheduler's"):
            resumed.scheduler.load_state_dict({**state, "begun": begun})


def test_ladder_share_and_length_are_those_of_the_script_and_what_was_found_goes_on() -> None:
    run = _Run().train(_batches(30))
    state, moved = run.scheduler.state_dict(), "drop 0.75"
    decisions = json.loads(state["decisions"])
    decisions[0]["after"], step = moved, decisions[0]["step"]
    schedule = Stepwise({0.0: HALF, step / 60: Strategy.parse(moved)})
    state.update(decisions=json.dumps(decisions[:1]), schedule=schedule.to_json(), events="[]")
    resumed = _Run(strategies=[HUGE], compute_share=0.5, total_steps=90)
    with pytest.warns(UserWarning, match="goes on from its step by what this script says") as told:
        resumed.scheduler.load_state_dict(state)
    assert len(told) == 1
    assert re.search(r"ladder .*, compute_share 0\.5 \(was 1\.0\), total_steps 90 \(was 60\)", str(told[0].message))
    scheduler = resumed.scheduler
    found = Strategy.parse(moved)
    assert (scheduler.strategy, scheduler.last_step, scheduler.total_steps) == (found, run.scheduler.last_step, 90)
    assert scheduler.schedule == Stepwise({0.0: HALF, step / 90: found})
    assert set(scheduler.ladder) == {HUGE, HALF, Strategy(), found}
    again = _Run(strategies=[HUGE, found], compute_share=0.5, total_steps=90)
    again.scheduler.load_state_dict(scheduler.state_dict())
    assert (again.scheduler.strategy, again.scheduler.ladder) == (found, scheduler.ladder)


def test_what_was_found_can_be_saved_and_followed_again(tmp_path: Path) -> None:
    run = _Run().train(_batches(60))
    run.scheduler.schedule.to_json(tmp_path / "found.json")
    assert Schedule.from_json(tmp_path / "found.json") == run.scheduler.schedule
    vit = compress(_vit(), tmp_path / "found.json")
    scheduler = SequenceScheduler(vit, total_steps=60)
    assert get_strategy(vit) == scheduler.strategy == HALF


def test_every_decision_is_logged_with_what_it_rests_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "seqcompress"):
        run = _Run().train(_batches(40))
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [str(made) for made in run.scheduler.decisions]
    made = run.scheduler.decisions[0]
    assert logged[0].startswith(f"step {made.step}: ")
    assert "CA-MSE" in logged[0]
    assert f"{made.share:.2%} of the compute" in logged[0]


def test_nothing_is_measured_after_the_last_step_or_where_nothing_was_trained() -> None:
    run = _Run(total_steps=20).train(_batches(20))
    share = run.scheduler.measured_share
    run.train(_batches(20))
    assert run.scheduler.measured_share < share  # training goes on, measuring does not
    idle = _Run()
    for batch in _batches(10):
        idle.scheduler.step(batch)
    assert idle.scheduler.measured_share == 0.0


def test_the_default_ladder_halves_the_sequence_from_rung_to_rung() -> None:
    scheduler = OnlineScheduler(compress(_vit(), HALF), torch.sum, total_steps=9)
    assert scheduler.ladder == (Strategy(0.75, 8), Strategy(0.5, 8), LARGE, HALF, Strategy())
    other = OnlineScheduler(compress(_vit(), Strategy(0.9)), torch.sum, [Strategy(0.5, 4)], total_steps=9)
    assert other.ladder == (Strategy(0.9), HALF, Strategy())  # with where it begins, and the base


def test_a_teachers_share_of_the_cost_decides_the_order() -> None:
    student, teacher = _vit(), _vit()
    compress(student, Strategy(), teacher=teacher)
    scheduler = OnlineScheduler(student, torch.sum, total_steps=9)
    assert scheduler.ladder[-3:] == (Strategy(0.75), HALF, Strategy())  # 3/4 and 2/4 of the base's, about
    assert set(scheduler.ladder) == {Strategy(r, p) for r in (0.0, 0.5, 0.75) for p in (None, 8)} - {Strategy(0.75, 8)}


def test_a_rehearsal_runs_the_dearest_strategy_of_the_ladder() -> None:
    run = _Run()
    seen = []
    assert rehearse(run.scheduler, lambda: seen.append(get_strategy(run.method))).strategy == Strategy()
    assert seen == [Strategy()]
    assert get_strategy(run.method) == HALF


def test_the_budget_of_the_rest_of_the_run_is_not_made_up() -> None:
    with pytest.raises(RuntimeError, match="does not know what the rest of the run will cost"):
        _Run().scheduler.budget_share(3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"step": None}, TypeError, "step must be a function, got None"),
        ({"strategies": HALF}, TypeError, "strategies must be several"),
        ({"strategies": [0.5]}, TypeError, r"strategies must be of type Strategy, got 0\.5"),
        ({"strategies": [Strategy(0.0, 64)]}, ValueError, "strategies: patch 64 does not suit the model"),
        ({"total_steps": 0}, ValueError, "total_steps must be a whole number of at least 1, got 0"),
        ({"compute_share": 0}, ValueError, r"compute_share must be in \(0, 1\], got 0"),
        ({"compute_share": float("nan")}, ValueError, r"compute_share must be in \(0, 1\], got nan"),
        ({"compute_share": True}, TypeError, r"compute_share must be a number in \(0, 1\], got True"),
        ({"model_or_models": nn.Linear(2, 2)}, ValueError, "model_or_models must be compressed first"),
        ({"model_or_models": []}, TypeError, "model_or_models must be one or several"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes: Any, error: type[Exception], message: str) -> None:
    vit = compress(_vit(), SCHEDULE)
    vit.patch_embed.compression.strategy = Strategy()
    arguments = {"model_or_models": vit, "step": torch.sum, "total_steps": 10, **changes}
    with pytest.raises(error, match=message):
        OnlineScheduler(**arguments)
    assert get_strategy(vit) == Strategy()


SCHEDULE = Stepwise({0.0: HALF, 0.5: Strategy()})


def test_encoders_must_begin_alike_and_have_something_to_learn() -> None:
    models = [compress(_vit(), HALF), compress(_vit(), LARGE)]
    with pytest.raises(ValueError, match=r"must begin with one strategy, got drop 0\.5 / patch 8"):
        OnlineScheduler(models, torch.sum, total_steps=10)
    with pytest.raises(ValueError, match="must have parameters that require grad, got none"):
        OnlineScheduler(models[0].requires_grad_(False), torch.sum, total_steps=10)


def test_a_model_in_eval_mode_is_an_error_once_it_is_to_be_measured() -> None:
    run = _Run()
    with pytest.raises(ValueError, match="model must be in train mode"):
        run.train(_batches(60), lambda batch: (run.method.eval(), run.scheduler.step(batch), run.method.train()))


def test_encoders_that_were_restored_are_an_error() -> None:
    run = _Run()
    restore(run.method)
    with pytest.raises(RuntimeError, match="make a new SequenceScheduler"):
        run.scheduler.step(torch.zeros(4, 3, 16, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ladder": None}, "is not an OnlineScheduler's: ladder must be JSON text, got None"),
        ({"ladder": "[" * 100_000}, "ladder must be JSON text of a list"),
        ({"ladder": '["drop 0.5", "patch 64", "base"]'}, "patch 64 does not suit"),
        ({"ladder": '["base"]'}, r"must be of strategies of the ladder, got drop 0\.5"),
        ({"compute_share": 2}, r"compute_share must be in \(0, 1\], got 2"),
        ({"compute_share": 10**400}, r"compute_share must be in \(0, 1\], got a number of very many digits"),
        ({"measured": -1}, "measured must be a number from 0 to 1e40, got -1"),
        ({"measured": 1e299}, r"measured must be a number from 0 to 1e40, got 1e\+299"),
        ({"trained": 10**400}, "trained must be a number from 0 to 1e40, got a number of very many digits"),
        ({"total_steps": 10**400}, "total_steps must be a whole number below 2\\*\\*64, got a number of very many"),
        ({"last_step": 10**400}, "last_step must be a whole number below 2\\*\\*64, got a number of very many"),
        ({"seed": 10**400}, "seed must be a whole number below 2\\*\\*64, got a number of very many"),
        ({"decisions": "[{}]"}, "must have the field 'step'"),
        ({"decisions": f'[{{"step": {10**400}}}]'}, "decisions' step must be a whole number"),
        ({"decisions": '[{"step": 60, "share": 0}]'}, "step must be at most last_step, got 60 after"),
        ({"decisions": '[{"step": 1, "share": 1e299}]'}, "share must be a number of at least 0"),
        ({"events": '[{"sketches": ["base"], "flops": [0]}]'}, "flops must be above 0, got 0"),
        ({"events": '[{"sketches": ["base"], "flops": [1, 2]}]'}, "flops must be one number a strategy"),
        ({"events": '[{"sketches": ["base"], "flops": [1]}]'}, "must be of drop 0.5, its neighbours and the base"),
        ({"sketches": torch.zeros(1, 2)}, "sketches must be a tensor of shape"),
        ({"sketches": None}, "sketches must be a tensor of shape .* got None"),
        ({"last_step": -1}, "is not an OnlineScheduler's"),
        ({"total_steps": 0}, "is not an OnlineScheduler's: .*total_steps must be a whole number of at least 1, got 0"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(changes: dict[str, Any], message: str) -> None:
    run = _Run().train(_batches(20))
    before = run.scheduler.state_dict()
    with pytest.raises(ValueError, match=message):
        run.scheduler.load_state_dict({**before, **changes})
    assert repr(run.scheduler.state_dict()) == repr(before)
    with pytest.raises(ValueError, match="must have the field 'ladder'"):
        run.scheduler.load_state_dict(SequenceScheduler(compress(_vit(), HALF), total_steps=5).state_dict())
    with pytest.raises(ValueError, match="state must be an OnlineScheduler's"):
        run.scheduler.load_state_dict([])


def test_a_batch_with_infinite_values_or_nan_costs_one_measurement_and_not_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = _Run()
    batches = list(_batches(40))
    while not run.scheduler.measured_share:
        run.train(iter([batches.pop()]))
    events = len(json.loads(run.scheduler.state_dict()["events"]))
    for bad in (torch.nan, torch.inf):
        share, step = run.scheduler.measured_share, run.scheduler.last_step
        run.scheduler.step(torch.full((4, 3, 16, 16), bad))
        while run.scheduler.measured_share <= share:
            run.train(iter([batches.pop()]), lambda batch: run.scheduler.step(batch * torch.nan))
        assert run.scheduler.last_step > step
    assert len(json.loads(run.scheduler.state_dict()["events"])) == events
    dropped = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(dropped) >= 2
    assert "this measurement is dropped: its loss or gradient is not finite under base / drop 0.5" in dropped[0]
    assert all(value.isfinite().all() for value in run.method.parameters())
    run.train(iter(batches))
    assert len(run.scheduler.decisions) >= 1
    assert all(math.isfinite(entry.ca_mse) for entry in run.scheduler.decisions[0].report.entries)


def test_the_state_has_the_same_structure_at_every_step_so_that_distributed_checkpoints_load(tmp_path: Path) -> None:
    fresh, run = _Run(), _Run().train(_batches(40))
    while not json.loads(run.scheduler.state_dict()["events"]):
        run.train(_batches(1))
    assert len(run.scheduler.decisions) >= 1
    checkpoint.save({"online": run.scheduler.state_dict()}, checkpoint_id=tmp_path)
    loaded = {"online": fresh.scheduler.state_dict()}
    checkpoint.load(loaded, checkpoint_id=tmp_path)
    fresh.scheduler.load_state_dict(loaded["online"])
    assert fresh.scheduler.decisions == run.scheduler.decisions
    assert repr(fresh.scheduler.state_dict()) == repr(run.scheduler.state_dict())


def test_gradients_that_are_taken_inside_the_backward_pass_are_an_error_once_they_are_measured() -> None:
    run = _Run()
    for parameter in run.method.head.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    with pytest.raises(ValueError, match=r"must leave its gradients in \.grad, got 4 of "):
        run.train(_batches(60))


def test_gradients_of_zeros_are_an_error_and_nothing_to_decide_on() -> None:
    run = _Run()
    for parameter in run.method.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    with pytest.raises(ValueError, match="must give model a gradient, got one of zeros under every strategy"):
        run.train(_batches(60))
    assert run.scheduler.decisions == ()


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[str]]
) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes saw, with a step through DistributedDataParallel and with one past it."""
    seen = {}
    for way in ("through", "past"):
        folder = tmp_path_factory.mktemp(way)
        run_ranks(*([sys.executable, WORKER, rank, folder, way] for rank in range(2)))
        seen[way] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return seen


def test_all_ranks_measure_and_move_at_the_same_steps(ranks: Any) -> None:
    for first, second in ranks.values():
        assert first["decisions"] == second["decisions"]
        assert first["strategies"] == second["strategies"]
        assert first["weights"] == second["weights"]
        assert len(set(first["strategies"])) > 1
        assert first["batches"] != second["batches"]
        assert (first["logged"], second["logged"]) == (len(first["decisions"]), 0)


def test_gradients_are_averaged_over_ranks_whether_the_step_does_so_or_not(ranks: Any) -> None:
    through, past = ranks["through"][0], ranks["past"][0]
    assert through["measured"] == past["measured"]
    assert through["variance"] == pytest.approx(past["variance"], rel=1e-4)


def test_after_a_step_without_a_gradient_it_goes_on_to_decide() -> None:
    vit, scale = compress(_vit().train(), HALF), torch.zeros(())

    def loss(views: Tensor) -> Tensor:
        return scale * vit(views).square().mean()

    scheduler = OnlineScheduler(vit, loss, total_steps=1000, compute_share=1.0)

    def train(steps: int) -> None:
        for batch in _batches(steps):
            loss(batch).backward()
            scheduler.step(batch)

    with pytest.raises(ValueError, match="gradient"):
        train(60)
    scale.fill_(1.0)
    train(60)
    assert len(scheduler.decisions) >= 1


def test_what_is_kept_of_measurements_has_its_values_under_another_default_device() -> None:
    run = _Run().train(_batches(12))
    with torch.device("meta"):
        sketches = run.scheduler.state_dict()["sketches"]
    assert sketches.device.type == "cpu"
    assert torch.equal(sketches, run.scheduler.state_dict()["sketches"])
