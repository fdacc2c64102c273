"""Reports of gradient error as values, text and files, and the schedule that several of them ask for."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from seqcompress import (
    GradientErrorReport,
    Strategy,
    best_schedule,
    compress,
    explain_schedule,
    gradient_error,
    plot_gradient_error,
)
from seqcompress.gradients.statistics import Estimate, jackknife
from seqcompress.schedules import Schedule, Stepwise

BASE, HALF, LARGE, BOTH = Strategy(), Strategy(0.5), Strategy(0.0, 16), Strategy(0.5, 16)
COSTS = {BASE: 1.0, HALF: 0.5, LARGE: 0.25, BOTH: 0.125}


def _estimate(value: float, noise: float, seed: int) -> Estimate:
    """An estimate from 8 batches; equal seeds vary together."""
    values = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = value + noise * (values - values.mean())
    return jackknife(fmean, values.tolist())


def _report(
    ca_mse: dict[Strategy, float], noise: float | dict[Strategy, float] = 0.0, paired: bool = False, **facts: Any
) -> GradientErrorReport:
    """A report with given CA-MSE: half of it variance, half bias."""
    noises = noise if isinstance(noise, dict) else dict.fromkeys(ca_mse, noise)
    strategies = {
        strategy: {
            "bias2": _estimate(total / 2, noises[strategy], 0 if paired else index),
            "variance": _estimate(total / 2 / COSTS[strategy], 0.0, 50),
            "cost": _estimate(COSTS[strategy], 0.0, 51),
        }
        for index, (strategy, total) in enumerate(ca_mse.items())
    }
    settings: dict[str, Any] = {"num_batches": 8, "cost_kind": "measured", "own_patch_size": 8, **facts}
    return GradientErrorReport.from_estimates(strategies, _estimate(2.0, 0.1, 99), **settings)


@pytest.fixture(scope="module")
def measured(tiny_vit: Any) -> GradientErrorReport:
    vit = tiny_vit()
    batches = list(torch.randn(4, 4, 3, 32, 32))
    return gradient_error(vit, lambda views: vit(views).sin().mean(), batches, [HALF, LARGE, BOTH], cost="flops")


def test_an_entry_has_every_number_with_its_interval() -> None:
    report = _report({BASE: 4.0, HALF: 1.0}, noise=0.2)
    half = report[HALF]
    assert (half.bias2, half.variance, half.cost, half.ca_mse) == pytest.approx((0.5, 1.0, 0.5, 1.0))
    assert half.relative_bias2 == pytest.approx(0.25)
    assert half.relative_variance == pytest.approx(0.5)
    assert half.relative_ca_mse == pytest.approx(0.5)
    for name in ("bias2", "variance", "cost", "ca_mse", "relative_bias2", "relative_variance", "relative_ca_mse"):
        low, high = getattr(half, f"{name}_interval")
        assert low <= getattr(half, name) <= high
    assert half.ca_mse_interval[1] - half.ca_mse_interval[0] == pytest.approx(
        half.bias2_interval[1] - half.bias2_interval[0]
    )
    low, high = report.base_norm2_interval
    assert low < report.base_norm2 < high


def test_a_strategy_that_was_not_measured_is_an_error_that_lists_those_that_were() -> None:
    report = _report({BASE: 1.0, HALF: 1.0})
    with pytest.raises(KeyError, match=r"drop 0\.75 was not measured; measured: base, drop 0\.5"):
        report[Strategy(0.75)]
    assert Strategy(0.5, 8) in report
    assert LARGE not in report


def test_the_best_has_the_least_ca_mse() -> None:
    assert _report({BASE: 4.0, HALF: 1.0, LARGE: 2.0}).best() == HALF
    assert _report({BASE: 4.0, HALF: -1.0, LARGE: 2.0}).best() == HALF


def test_strategies_are_tied_if_their_paired_difference_may_be_zero() -> None:
    totals = {BASE: 2.0, HALF: 1.0, LARGE: 1.1}
    assert _report(totals, noise=0.5).tied() == (HALF, LARGE)
    assert _report(totals, noise=0.5, paired=True).tied() == (HALF,)  # noise that all share decides nothing
    assert _report(totals, noise=10.0).tied() == (HALF, LARGE, BASE)
    assert _report(totals).tied() == (HALF,)


def test_relative_values_need_a_positive_norm() -> None:
    strategies = {
        BASE: {"bias2": _estimate(0.0, 0.0, 0), "variance": _estimate(1.0, 0.1, 1), "cost": _estimate(1.0, 0.0, 2)}
    }
    report = GradientErrorReport.from_estimates(
        strategies, _estimate(-0.1, 0.1, 3), num_batches=8, cost_kind="flops", own_patch_size=None
    )
    assert math.isnan(report[BASE].relative_variance)
    again = GradientErrorReport.from_json(report.to_json())
    assert (again, hash(again)) == (report, hash(report))
    assert replace(report[BASE], relative_variance=float("nan")) == report[BASE]  # another NaN
    assert report[BASE].relative_variance_interval == (-math.inf, math.inf)
    assert "absolute" in str(report)
    assert "nan" not in str(report)
    assert GradientErrorReport.from_json(report.to_json()).base_norm2 == report.base_norm2


def test_a_report_survives_json_exactly(measured: GradientErrorReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    text = measured.to_json(path)
    assert path.read_text() == text
    for source in (text, path, str(path)):
        read = GradientErrorReport.from_json(source)
        assert read == measured
        assert read.tied() == measured.tied()
        assert read[HALF].ca_mse_interval == measured[HALF].ca_mse_interval


def _broken(**changes: Any) -> str:
    content = json.loads(_report({BASE: 1.0, HALF: 2.0}, noise=0.1).to_json())
    for path, value in changes.items():
        *inner, last = path.split("__")
        place = content
        for name in inner:
            place = place[int(name) if name.isdigit() else name]
        if value is ...:
            del place[last]
        else:
            place[int(last) if last.isdigit() else last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqcompress_gradient_error": 2}, "field 'seqcompress_gradient_error': version 2 is not supported"),
        ({"seqcompress_gradient_error": ...}, "field 'seqcompress_gradient_error': is missing"),
        ({"num_batches": 1}, "field 'num_batches': must be a whole number of at least 2, got 1"),
        ({"num_batches": True}, "field 'num_batches'"),
        ({"num_batches": 9}, r"leave_one_out': must be rows of 9 numbers"),
        ({"cost_kind": "guessed"}, "field 'cost_kind': must be 'measured' or 'flops', got 'guessed'"),
        ({"own_patch_size": 0}, "field 'own_patch_size'"),
        ({"complete": 1}, "field 'complete': must be true or false, got 1"),
        ({"sketch_error": -1}, "field 'sketch_error'"),
        ({"base_norm2": 3.0}, "field 'base_norm2': must be an object"),
        ({"base_norm2__value": "3"}, r"field 'base_norm2\.value': must be finite numbers of at most .*, got '3'"),
        ({"strategies": []}, "field 'strategies': must be a list of strategies"),
        ({"strategies__0": 3}, r"field 'strategies\[0\]': must be an object, got 3"),
        ({"strategies__1__token_dropout": 2.0}, r"field 'strategies\[1\]': token_dropout must be in \[0, 1\)"),
        ({"strategies__1__token_dropout": 0.0}, r"field 'strategies\[1\]': base is there twice"),
        ({"strategies__0__token_dropout": 0.25}, "field 'strategies': must contain the base strategy"),
        ({"strategies__1__bias2": ...}, r"field 'strategies\[1\]': field 'bias2': is missing"),
        ({"strategies__1__bias2__value": math.nan}, r"field 'strategies\[1\]\.bias2\.value'"),
        ({"strategies__1__cost__leave_one_out": []}, r"field 'strategies\[1\]\.cost\.leave_one_out'"),
        ({"extra": 1}, "field 'extra': is unknown"),
    ],
)
def test_a_bad_file_is_one_error_that_names_the_field(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(_broken(**changes))
    with pytest.raises(ValueError, match=message) as raised:
        GradientErrorReport.from_json(path)
    assert "bad.json" in str(raised.value)


@pytest.mark.parametrize("number", [10**400, 1e299, -1e299])
@pytest.mark.parametrize("name", ["base_norm2", "bias2", "variance", "cost"])
def test_numbers_that_nothing_can_be_computed_from_are_refused(name: str, number: float) -> None:
    content = json.loads(_report({BASE: 1.0, HALF: 2.0}).to_json())
    place = content if name == "base_norm2" else content["strategies"][1]
    for target, key in ((place[name], "value"), (place[name]["leave_one_out"][0], 3)):
        kept, target[key] = target[key], number
        with pytest.raises(ValueError, match=f"{name}.*must be finite numbers of at most 1e"):
            GradientErrorReport.from_json(json.dumps(content))
        target[key] = kept
    assert GradientErrorReport.from_json(json.dumps(content)).best() == BASE


def test_the_largest_numbers_that_are_read_break_nothing() -> None:
    content = json.loads(_report({BASE: 1.0, HALF: 2.0}).to_json())
    errors = [part[name] for part in content["strategies"] for name in ("bias2", "variance")]
    for entry in (content["base_norm2"], *errors):
        entry.update(value=1e150, leave_one_out=[[1e150, -1e150] * 4])
    for part in content["strategies"]:
        part["cost"].update(value=1e150, leave_one_out=[[1e150, 1e-150] * 4])
    report = GradientErrorReport.from_json(json.dumps(content))
    assert report[HALF].bias2_interval[0] < 0 < report[HALF].bias2_interval[1]
    assert str(best_schedule({0.0: report}))
    assert "e+" in str(report)


def test_the_encoders_own_patch_size_in_a_file_is_no_other_strategy() -> None:
    content = json.loads(_report({BASE: 1.0, HALF: 2.0}).to_json())
    content["own_patch_size"] = content["strategies"][1]["patch_size"] = 8
    report = GradientErrorReport.from_json(json.dumps(content))
    assert report[HALF] == report[Strategy(0.5, 8)]
    content["strategies"].append({**content["strategies"][1], "patch_size": None})
    with pytest.raises(ValueError, match=r"strategies\[2\]': drop 0.5 is there twice"):
        GradientErrorReport.from_json(json.dumps(content))


def test_a_cost_of_nothing_is_refused() -> None:
    content = json.loads(_report({BASE: 1.0, HALF: 2.0}).to_json())
    content["strategies"][1]["cost"]["value"] = 0
    with pytest.raises(ValueError, match=r"strategies\[1\].cost': must be above 0, got 0"):
        GradientErrorReport.from_json(json.dumps(content))


def test_a_file_that_is_replaced_keeps_its_mode_and_a_link_its_target(tmp_path: Path) -> None:
    path, link = tmp_path / "report.json", tmp_path / "link.json"
    path.write_text("{}")
    path.chmod(0o640)
    link.symlink_to(path)
    expected = _report({BASE: 1.0, HALF: 2.0})
    expected.to_json(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert GradientErrorReport.from_json(path) == expected
    expected.to_csv(tmp_path / "report.csv")
    assert {each.name for each in tmp_path.iterdir()} == {"report.json", "link.json", "report.csv"}


def test_no_point_lies_under_the_legend_of_a_picture(tmp_path: Path, monkeypatch: Any) -> None:
    from seqcompress.gradients import plots

    report = _report({BASE: 4.0, HALF: 1.0, LARGE: 2.0, BOTH: 3.0}, noise=0.2)
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    report.plot(tmp_path / "report.png")
    (figure,) = drawn
    figure.canvas.draw()
    axes = figure.axes[0]
    legend = axes.get_legend().get_window_extent()
    assert not legend.overlaps(axes.get_window_extent())
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert not legend.overlaps(axes.title.get_window_extent())
    assert len(boxes) == 4


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.json' does not exist"):
        GradientErrorReport.from_json(tmp_path / "no.json")


def test_the_table_is_sorted_by_cost_and_marks_the_best_and_the_tied() -> None:
    text = str(_report({BASE: 2.0, HALF: 1.0, LARGE: 1.1, BOTH: 30.0}, noise=0.5))
    lines = [line for line in text.splitlines() if "±" in line and "half" not in line]
    assert [line[0] for line in lines] == [" ", "=", "*", " "]
    assert [line[3:].split("  ")[0] for line in lines] == ["drop 0.5, patch 16", "patch 16", "drop 0.5", "base"]
    assert len({len(line) for line in lines}) == 1
    assert "8 batches" in text
    assert "not told from it" in text


def test_the_table_of_a_sketch_says_so() -> None:
    assert "sketches, which add an error of 1.00%" in str(_report({BASE: 1.0}, sketch_error=0.01))


def test_csv_and_data_frame_hold_every_number(measured: GradientErrorReport, tmp_path: Path) -> None:
    measured.to_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = {row["strategy"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["base", "drop 0.5", "patch 16", "drop 0.5, patch 16"]
    assert float(rows["drop 0.5"]["ca_mse_high"]) == measured[HALF].ca_mse_interval[1]
    frame = measured.to_frame()
    assert frame.loc["patch 16", "variance"] == measured[LARGE].variance


def test_what_is_not_installed_is_named(monkeypatch: Any, tmp_path: Path, tiny_vit: Any) -> None:
    report = _report({BASE: 1.0})
    for name in ("pandas", "matplotlib.figure", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    for module in ("gradients.plots", "training.pictures"):
        monkeypatch.delitem(sys.modules, f"seqcompress.{module}", raising=False)
    with pytest.raises(ImportError, match="pip install pandas"):
        report.to_frame()
    with pytest.raises(ImportError, match=r"pip install 'seqcompress\[plot\]'"):
        report.plot(tmp_path / "report.png")
    vit = tiny_vit()
    with pytest.raises(ImportError, match="pip install tqdm"):
        gradient_error(vit, lambda views: vit(views).mean(), [], [], progress=True)


def test_pictures_are_drawn(measured: GradientErrorReport, tmp_path: Path) -> None:
    errors, costs = measured.plot(tmp_path / "report.png").axes
    assert costs.get_xlabel() == "patch size"
    assert len(errors.get_xticklabels()) == len(measured.entries)
    assert len(plot_gradient_error({0.0: measured, 1.0: measured}).axes) == 3  # shown, and not written
    plot_gradient_error({0.0: measured, 1.0: measured}, tmp_path / "schedule.svg")
    assert (tmp_path / "report.png").read_bytes()[1:4] == b"PNG"
    assert "schedule" in (tmp_path / "schedule.svg").read_text()


def test_each_stage_takes_the_least_ca_mse() -> None:
    reports = {
        0.5: _report({BASE: 4.0, HALF: 2.0, LARGE: 3.0, BOTH: 9.0}),
        0.0: _report({BASE: 4.0, HALF: 2.0, LARGE: 3.0, BOTH: 1.0}),
        1.0: _report({BASE: 1.0, HALF: 2.0, LARGE: 3.0, BOTH: 9.0}),
    }
    for monotone in (True, False):
        assert best_schedule(reports, monotone=monotone) == Stepwise({0.0: BOTH, 0.5: HALF, 1.0: BASE})


def test_the_first_stage_begins_at_zero_and_equal_ones_are_merged() -> None:
    cheap = _report({BASE: 4.0, HALF: 2.0, BOTH: 1.0})
    dear = _report({BASE: 1.0, HALF: 2.0, BOTH: 3.0})
    assert best_schedule({0.1: cheap, 0.2: cheap, 0.3: dear, 0.9: dear}) == Stepwise({0.0: BOTH, 0.3: BASE})
    assert best_schedule({1.0: dear}) == Stepwise({0.0: BASE})


def test_a_monotone_schedule_is_the_best_of_all_whose_sequences_never_get_cheaper() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        totals = torch.rand(4, 4, generator=generator, dtype=torch.float64).add(0.1).tolist()
        stages = [dict(zip(COSTS, row, strict=True)) for row in totals]
        reports = {index / 4: _report(stage) for index, stage in enumerate(stages)}
        allowed = [
            path
            for path in itertools.product(COSTS, repeat=4)
            if all(COSTS[now] <= COSTS[after] for now, after in itertools.pairwise(path))
        ]
        best = min(
            allowed,
            key=lambda path: math.fsum(math.log(stage[chosen]) for stage, chosen in zip(stages, path, strict=True)),
        )
        schedule = best_schedule(reports)
        assert tuple(schedule(progress) for progress in reports) == best
        free = best_schedule(reports, monotone=False)
        assert all(free(progress) == report.best() for progress, report in reports.items())


def test_what_only_some_reports_measured_is_no_choice_for_a_monotone_schedule() -> None:
    reports = {0.0: _report({BASE: 4.0, HALF: 2.0, BOTH: 1.0}), 0.5: _report({BASE: 4.0, HALF: 2.0})}
    assert best_schedule(reports) == Stepwise({0.0: HALF})
    assert best_schedule(reports, monotone=False) == Stepwise({0.0: BOTH, 0.5: HALF})


def test_ties_go_to_the_strategy_that_is_less_likely_to_be_bad() -> None:
    totals = {BASE: 9.0, HALF: 1.0, LARGE: 1.05}
    report = _report(totals, noise={BASE: 0.0, HALF: 2.0, LARGE: 0.1})
    assert report.best() == HALF
    assert set(report.tied()) == {HALF, LARGE}
    assert best_schedule({0.0: report}) == Stepwise({0.0: LARGE})


def test_errors_that_were_estimated_below_zero_are_no_obstacle() -> None:
    below = {BASE: 4.0, HALF: -2.0, LARGE: -1.0}
    assert best_schedule({0.0: _report(below), 0.5: _report({BASE: 1.0, HALF: 2.0, LARGE: 3.0})})(0.5) in (BASE, HALF)
    zero = dict.fromkeys(COSTS, 0.0)
    assert isinstance(best_schedule({0.0: _report(zero), 0.5: _report(zero)}), Stepwise)


def test_undecided_stages_are_said_plainly(caplog: Any) -> None:
    clear = _report({BASE: 4.0, HALF: 1.0, LARGE: 2.0})
    unclear = _report({BASE: 1.0, HALF: 1.1, LARGE: 9.0}, noise=1.0)
    with caplog.at_level(logging.WARNING):
        best_schedule({0.0: clear, 0.5: unclear})
    assert "could not decide the best strategy at progress 0.5:" in caplog.text
    first, second = explain_schedule({0.0: clear, 0.5: unclear}).splitlines()
    assert first == "from 0: drop 0.5, relative CA-MSE 0.5 (0.484 to 0.516)"
    assert "undecided between base / drop 0.5" in second
    caplog.clear()
    best_schedule({0.0: clear})
    assert not caplog.text


def test_where_the_least_error_would_be_cheaper_than_before_it_says_so() -> None:
    reports = {
        0.0: _report({BASE: 1.0, HALF: 50.0, LARGE: 90.0}),
        0.5: _report({BASE: 1.0, HALF: 0.9, LARGE: 90.0}),
    }
    assert best_schedule(reports) == Stepwise({0.0: BASE})
    assert "least is drop 0.5" in explain_schedule(reports).splitlines()[1]
    assert "must not become cheaper" in explain_schedule(reports)


def test_the_schedule_is_a_plan_that_compress_takes(
    measured: GradientErrorReport, tmp_path: Path, tiny_vit: Any
) -> None:
    schedule = best_schedule({0.0: measured, 0.75: measured})
    schedule.to_json(tmp_path / "plan.json")
    assert Schedule.from_json(tmp_path / "plan.json") == schedule
    vit = compress(tiny_vit(), tmp_path / "plan.json")
    assert vit.patch_embed.strategy == schedule(0.0)


@pytest.mark.parametrize(
    ("reports", "error", "message"),
    [
        ({}, ValueError, "at least one stage"),
        ([], TypeError, r"reports must map progress to GradientErrorReport, got \[\]"),
        (_report({BASE: 1.0}), TypeError, r"such as \{0\.0: report\}, got one report alone"),
        ({0.0: "report"}, TypeError, "reports must map progress to .*, got 'report' at 0.0"),
        ({1.5: _report({BASE: 1.0})}, ValueError, r"progress must be in \[0, 1\], got 1\.5"),
        (
            {0.0: _report({BASE: 1.0}), 0.5: _report({BASE: 1.0}, own_patch_size=16)},
            ValueError,
            "reports must be of one encoder",
        ),
    ],
)
def test_reports_that_make_no_sense_are_refused(reports: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        best_schedule(reports)
