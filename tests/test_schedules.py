"""Schedules: progress in, strategy out; and files that either mean exactly one schedule or are refused."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqcompress import Constant, Cosine, Linear, Schedule, Stepwise, Strategy, schedules
from seqcompress.presets import PRESETS, double_patch

progresses = st.floats(0.0, 1.0)
any_strategy = st.builds(Strategy, st.floats(0.0, 1.0, exclude_max=True), st.none() | st.integers(1, 64))
ramps = st.builds(Linear, any_strategy, any_strategy) | st.builds(Cosine, any_strategy, any_strategy)
stages = st.dictionaries(progresses, any_strategy, max_size=5)
stepwise = st.builds(lambda begin, later: Stepwise({**later, 0.0: begin}), any_strategy, stages)
any_schedule = st.builds(Constant, any_strategy) | ramps | stepwise


@pytest.mark.parametrize("kind", [Linear, Cosine])
@pytest.mark.parametrize("dropout", [0.1, 0.3, 0.6, 0.7, 0.9])
def test_a_ramp_between_equal_dropouts_has_this_one_throughout(kind: Any, dropout: float) -> None:
    ramp = kind(Strategy(dropout, 32), Strategy(dropout))
    assert {ramp(step / 997) for step in range(998)} == {Strategy(dropout, 32), Strategy(dropout)}


@given(ramps, progresses)
def test_a_ramp_never_leaves_its_range(ramp: Any, progress: float) -> None:
    low, high = sorted((ramp.start.token_dropout, ramp.end.token_dropout))
    assert low <= ramp(progress).token_dropout <= high


@pytest.mark.parametrize(
    "schedule", [Stepwise({0.0: Strategy(0.5), 0.5: Strategy()}), Linear(Strategy(0.5), Strategy())]
)
def test_a_step_before_the_first_is_refused(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="step must be a whole number of at least 0, got -1"):
        schedule.at_step(-1, 10)
    with pytest.raises(ValueError, match="total_steps must be a whole number of at least 1, got 0"):
        schedule.at_step(0, 0)
    with pytest.raises(TypeError, match=r"step must be a whole number, got 1\.5"):
        schedule.at_step(1.5, 10)  # type: ignore[arg-type]


def test_a_folder_that_is_not_there_is_an_error_that_names_the_file_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "none" / "plan.json"
    with pytest.raises(FileNotFoundError) as caught:
        Stepwise({0.0: Strategy()}).to_json(path)
    assert caught.value.filename == str(path)
    assert "unfinished" not in str(caught.value)


def test_the_schedules_module_offers_all_kinds() -> None:
    assert (schedules.Constant, schedules.Linear, schedules.Cosine, schedules.Stepwise) == (
        Constant, Linear, Cosine, Stepwise,
    )  # fmt: skip


@given(any_strategy, progresses)
def test_constant_is_the_same_all_the_time(strategy: Strategy, progress: float) -> None:
    assert Constant(strategy)(progress) == strategy


@given(ramps)
def test_ramps_begin_and_end_exactly(ramp: Linear | Cosine) -> None:
    assert ramp(0.0) == ramp(0) == ramp.start
    assert ramp(1.0) == ramp(1) == ramp.end


@given(ramps, progresses)
def test_ramps_keep_dropout_between_their_ends_and_use_no_other_patch_size(
    ramp: Linear | Cosine, progress: float
) -> None:
    strategy = ramp(progress)
    low, high = sorted((ramp.start.token_dropout, ramp.end.token_dropout))
    assert low - 1e-15 <= strategy.token_dropout <= high + 1e-15
    assert strategy.patch_size in (ramp.start.patch_size, ramp.end.patch_size)


@given(any_schedule, progresses)
def test_every_strategy_lies_between_those_a_schedule_lists(schedule: Schedule, progress: float) -> None:
    strategy = schedule(progress)
    same_size = [one.token_dropout for one in schedule.strategies() if one.patch_size == strategy.patch_size]
    assert min(same_size) - 1e-15 <= strategy.token_dropout <= max(same_size) + 1e-15


@pytest.mark.parametrize(("progress", "dropout"), [(0.25, 0.6), (0.5, 0.4), (0.75, 0.2)])
def test_linear_moves_in_a_straight_line(progress: float, dropout: float) -> None:
    assert Linear(Strategy(0.8), Strategy())(progress).token_dropout == pytest.approx(dropout)


@pytest.mark.parametrize("progress", [0.1, 0.25, 0.5, 0.9])
def test_cosine_moves_along_half_a_wave(progress: float) -> None:
    dropout = 0.8 * 0.5 * (1 + math.cos(math.pi * progress))
    assert Cosine(Strategy(0.8), Strategy())(progress).token_dropout == pytest.approx(dropout)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_ramps_change_the_patch_size_once_halfway(kind: type[Linear] | type[Cosine]) -> None:
    ramp = kind(Strategy(0.5, 32), Strategy())
    sizes = [ramp(step / 100).patch_size for step in range(101)]
    assert sizes == [32] * 50 + [None] * 51


def test_stepwise_holds_each_strategy_until_the_next() -> None:
    schedule = Stepwise({0.5: Strategy(0.25), 0: Strategy(0.5, 32), 1.0: Strategy()})
    assert schedule(0.0) == schedule(0.25) == schedule(math.nextafter(0.5, 0)) == Strategy(0.5, 32)
    assert schedule(0.5) == schedule(math.nextafter(1.0, 0)) == Strategy(0.25)
    assert schedule(1.0) == Strategy()


@given(any_schedule)
def test_json_text_round_trips(schedule: Schedule) -> None:
    back = Schedule.from_json(schedule.to_json())
    assert back == schedule
    assert type(back) is type(schedule)
    assert hash(back) == hash(schedule)
    assert type(schedule).from_json(schedule.to_json()) == schedule


@given(any_schedule)
def test_the_text_of_a_schedule_is_read_back(schedule: Schedule) -> None:
    back = Schedule.parse(str(schedule))
    assert back == schedule
    assert type(back) is type(schedule)
    assert type(schedule).parse(f"  {schedule} ".replace(" ", "  ")) == schedule


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0: drop 0.5; 0.9", "text '0: drop 0.5; 0.9' is not a schedule: text must read 'base'"),
        ("0: drop 0.5; base", "a stage must read like '0.9: base', got 'base'"),
        ("0: drop 0.5;", "a stage must read like '0.9: base', got ''"),
        ("0: drop 0.5; 0: base", "progress 0 is there twice"),
        ("0.5: base", r"stages must begin at progress 0, got \[0.5\]"),
        ("0: base; 1.5: base", r"progress must be in \[0, 1\], got 1.5"),
        ("0: drop 2", r"token_dropout must be in \[0, 1\), got 2.0"),
        ("linear from drop 2 to base", r"is not a schedule: .*token_dropout must be in \[0, 1\), got 2.0"),
        ("online, at first 0: base", "a stage must read like '0.9: base', got 'online, at first 0: base'"),
        ("nan: base", r"progress must be in \[0, 1\], got nan"),
        ("drop half", "^text must read 'base', 'drop 0.5'"),
    ],
)
def test_the_text_of_no_schedule_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule.parse(text)


def test_a_stage_out_of_all_bounds_is_named() -> None:
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got a number of very many digits"):
        Stepwise({0.0: Strategy(), 10**5000: Strategy()})


def test_a_kind_refuses_the_text_of_another_and_what_is_no_text() -> None:
    with pytest.raises(ValueError, match=r"text must be of kind 'stepwise', got 'drop 0\.5', which is 'constant'"):
        Stepwise.parse("drop 0.5")
    with pytest.raises(TypeError, match=r"text must be a string such as '0: drop 0.5; 0.9: base', got 3"):
        Schedule.parse(3)  # type: ignore[arg-type]


@given(any_schedule)
def test_pickles_are_equal(schedule: Schedule) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@given(stepwise)
def test_repr_of_stepwise_is_the_call_that_makes_it(schedule: Stepwise) -> None:
    assert eval(repr(schedule)) == schedule


@pytest.mark.parametrize("as_text", [True, False])
def test_json_files_round_trip(tmp_path: Path, as_text: bool) -> None:
    schedule = Stepwise({0.0: Strategy(0.5, 32), 0.5: Strategy()})
    path = tmp_path / "plan.json"
    text = schedule.to_json(path)
    assert path.read_text(encoding="utf-8") == text
    assert Schedule.from_json(str(path) if as_text else path) == schedule


def test_schedules_of_different_kinds_are_different() -> None:
    assert Linear(Strategy(0.5), Strategy()) != Cosine(Strategy(0.5), Strategy())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Constant(0.5), "strategy"),  # type: ignore[arg-type]
        (lambda: Linear("drop 0.5", Strategy()), "start"),  # type: ignore[arg-type]
        (lambda: Cosine(Strategy(), None), "end"),  # type: ignore[arg-type]
        (lambda: Stepwise([Strategy()]), "stages"),  # type: ignore[arg-type]
        (lambda: Stepwise({0.0: Strategy(), 0.5: 0.5}), r"stages\[0.5\]"),  # type: ignore[dict-item]
        (lambda: Stepwise({"0": Strategy()}), "'0'"),  # type: ignore[dict-item]
        (lambda: Stepwise({False: Strategy()}), "False"),
        (lambda: Constant(Strategy())("0.5"), "progress"),  # type: ignore[arg-type]
        (lambda: Constant(Strategy())(True), "progress"),
    ],
)
def test_wrong_types_are_named(make: Any, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        make()


@pytest.mark.parametrize("stages", [{}, {0.5: Strategy()}, {0.0: Strategy(), 1.5: Strategy()}, {math.nan: Strategy()}])
def test_stages_out_of_range_are_refused(stages: dict[float, Strategy]) -> None:
    with pytest.raises(ValueError, match="stages"):
        Stepwise(stages)


@given(any_schedule, st.floats().filter(lambda progress: not 0 <= progress <= 1))
def test_progress_out_of_range_is_named_with_its_value(schedule: Schedule, progress: float) -> None:
    with pytest.raises(ValueError, match="progress") as raised:
        schedule(progress)
    assert repr(progress) in str(raised.value)


def _content(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "seqcompress_schedule": 1,
        "kind": "linear",
        "start": {"token_dropout": 0.5, "patch_size": 32},
        "end": {"token_dropout": 0.0, "patch_size": None},
    }
    content.update(changes)
    return {name: value for name, value in content.items() if value is not ...}


def _stages(*stages: Any) -> dict[str, Any]:
    return {"seqcompress_schedule": 1, "kind": "stepwise", "stages": list(stages)}


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (_content(seqcompress_schedule=...), "seqcompress_schedule"),
        (_content(seqcompress_schedule=2), "seqcompress_schedule"),
        (_content(seqcompress_schedule="1"), "seqcompress_schedule"),
        (_content(seqcompress_schedule=True), "seqcompress_schedule"),
        (_content(kind=...), "kind"),
        (_content(kind="Linear"), "kind"),
        (_content(kind=["linear"]), "kind"),
        (_content(kind=None), "kind"),
        (_content(start=...), "start"),
        (_content(start=0.5), "start"),
        (_content(start={"token_dropout": 1.0}), "start"),
        (_content(start={"token_dropout": "0.5"}), "token_dropout"),
        (_content(start={"token_dropout": math.nan}), "token_dropout"),
        (_content(end={"patch_size": 16.0}), "patch_size"),
        (_content(end={"patch_size": 0}), "patch_size"),
        (_content(end={"patchsize": 16}), "patchsize"),
        (_content(middle={}), "middle"),
        (_content(kind="constant"), "strategy"),
        ({"seqcompress_schedule": 1, "kind": "stepwise"}, "stages"),
        (_stages(), "stages"),
        (_stages(0.5), "stages[0]"),
        (_stages({"token_dropout": 0.5}), "stages[0]"),
        (_stages({"progress": 0.5}), "stages"),
        (_stages({"progress": 0}, {"progress": 1.5}), "stages[1].progress"),
        (_stages({"progress": 0}, {"progress": "1"}), "stages[1].progress"),
        (_stages({"progress": 0}, {"progress": 0.0}), "stages[1].progress"),
        (_stages({"progress": 0, "token_dropout": 2}), "token_dropout"),
        (_stages({"progress": 0}, {"progress": 10**400}), "stages[1].progress"),
        (_content(start={"token_dropout": 10**400}), "token_dropout"),
    ],
)
def test_a_bad_file_is_one_value_error_that_names_the_field_and_the_file(
    tmp_path: Path, content: Any, field: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"plan\.json") as raised:
        Schedule.from_json(path)
    assert field in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "[1, 2]", "{}", '{"kind": "linear"', "{1: 2}", "[" * 100_000, '{"a":' * 100_000,
     '{"seqcompress_schedule": ' + "9" * 5000 + "}"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_text_that_is_no_schedule_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="schedule"):
        Schedule.from_json(text)


def test_a_field_that_is_there_twice_is_refused() -> None:
    text = Constant(Strategy(0.5)).to_json().replace('"kind"', '"kind": "linear", "kind"')
    with pytest.raises(ValueError, match=r"'kind':? is there twice"):
        Schedule.from_json(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Schedule.from_json(tmp_path / "nowhere.json")


@pytest.mark.parametrize("source", [None, 3, b"{}", {"kind": "linear"}, Strategy()])
def test_a_source_of_a_wrong_type_is_named(source: Any) -> None:
    with pytest.raises(TypeError, match="source"):
        Schedule.from_json(source)


def test_a_kind_refuses_the_file_of_another() -> None:
    with pytest.raises(ValueError, match="'kind': 'constant'"):
        Linear.from_json(Constant(Strategy()).to_json())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _paths(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(one for key, value in inner for one in _paths(value, (*path, key)))]


@given(any_schedule, st.data())
def test_a_mutated_file_is_a_schedule_or_one_value_error(schedule: Schedule, data: st.DataObject) -> None:
    content = json.loads(schedule.to_json())
    *parents, key = data.draw(st.sampled_from(_paths(content)[1:]))
    place = content
    for parent in parents:
        place = place[parent]
    if data.draw(st.booleans()):
        del place[key]
    else:
        place[key] = data.draw(json_values)
    try:
        back = Schedule.from_json(json.dumps(content))
    except ValueError as error:
        assert "field '" in str(error)  # noqa: PT017
    else:
        assert Schedule.from_json(back.to_json()) == back


@given(any_schedule, st.data())
def test_a_file_with_damaged_bytes_is_a_schedule_or_one_value_error(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule, data: st.DataObject
) -> None:
    content = bytearray(schedule.to_json().encode())
    begin = data.draw(st.integers(0, len(content) - 1))
    content[begin : begin + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=5))
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(bytes(content))
    try:
        back = Schedule.from_json(path)
    except ValueError as error:
        assert "damaged.json" in str(error)  # noqa: PT017
    else:
        assert Schedule.from_json(back.to_json()) == back


@given(st.text(max_size=40))
def test_any_text_is_a_value_error_or_a_missing_file(text: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)):
        Schedule.from_json(text)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("patch", "side"), [(16, 224), (14, 224), (8, 64), (4, 28), (8, 8), (32, 32)])
def test_presets_relax_and_use_patches_that_fit_the_view(preset: str, patch: int, side: int) -> None:
    schedule = PRESETS[preset](double_patch(patch, side))
    lengths = []
    for step in range(101):
        strategy = schedule(step / 100)
        size = strategy.patch_size or patch
        assert size <= side
        lengths.append(max(1, round((1 - strategy.token_dropout) * round(side / size) ** 2)))
    assert lengths[0] == min(lengths)
    assert lengths[-1] == max(lengths)


@pytest.mark.parametrize(
    ("patch", "side", "double"), [(16, 224, 32), (16, 240, 30), (4, 28, 7), (8, 32, 16), (14, 224, 28), (8, 8, 8)]
)
def test_the_doubled_patch_divides_the_view_where_one_near_does(patch: int, side: int, double: int) -> None:
    assert double_patch(patch, side) == double


@pytest.mark.parametrize("patch", [16, 14, 8, 4])
@pytest.mark.parametrize("side", [518, 384, 336, 256, 224, 196, 160, 128, 96, 64, 32, 28])
def test_a_presets_large_patches_are_near_twice_the_models_own_at_every_size_of_view(side: int, patch: int) -> None:
    large = double_patch(patch, side)
    assert 1.7 * patch <= large <= min(side, 2.3 * patch)
    if any(side % size == 0 for size in range(math.ceil(1.7 * patch), math.floor(2.3 * patch) + 1)):
        assert side % large == 0


@pytest.mark.parametrize(
    ("steps", "first"), [(4, [0, 1, 2, 3]), (5, [0, 2, 3, 4]), (16, [0, 8, 12, 15]), (20, [0, 10, 15, 19]),
                         (1000, [0, 500, 750, 950]), (3, [0, 0, 1, 2]), (1, [0, 0, 0, 0])]
)  # fmt: skip
def test_stages_begin_at_their_progress_and_no_later_than_leaves_a_step_for_each(steps: int, first: list[int]) -> None:
    strategies = [Strategy(0.8), Strategy(0.6), Strategy(0.4), Strategy()]
    plan = Stepwise(dict(zip((0.0, 0.5, 0.75, 0.95), strategies, strict=True)))
    for step in range(steps + 3):
        expected = [strategy for begin, strategy in zip(first, strategies, strict=True) if begin <= step][-1]
        assert plan.at_step(step, steps) == expected
