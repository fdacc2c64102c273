"""The runs that the project's claim rests on: they can be interrupted, cost what they say, and are compared fairly."""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from seqcompress import Strategy, gradient_error
from seqcompress.presets import PRESETS, double_patch
from seqcompress.schedules import Online

FOLDER = Path(__file__).parent.parent / "benchmarks" / "time_to_accuracy"
NAMES = ("branches", "images", "methods", "online_cost", "report", "run", "suite")


@pytest.fixture(scope="module")
def evidence() -> Iterator[SimpleNamespace]:
    """The modules of the benchmark, which lie beside each other and are no package."""
    others = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield SimpleNamespace(**{name: import_module(name) for name in NAMES})
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in colour, as folders of images."""
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    for part, number in (("train", 30), ("test", 20)):
        for label, channel in (("red", 0), ("blue", 2)):
            (folder / part / label).mkdir(parents=True)
            for image in range(number):
                pixels = noise.integers(0, 128, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / part / label / f"{image:03}.png")
    return folder


@pytest.fixture(scope="module")
def small(evidence: SimpleNamespace) -> Any:
    """Settings of a run of some steps."""
    return evidence.run.Settings(
        dataset="colours", images=40, image_size=16, depth=1, width=32, batch=8, hidden=32, out=16, prototypes=32,
        budget=0.0012, plan="0: drop 0.5, patch 8; 0.5: drop 0.5; 0.9: base",
    )  # fmt: skip


def _without_times(path: Path) -> dict[str, Any]:
    report = json.loads(path.read_text())
    report.pop("seconds")
    for point in report["curve"]:
        point.pop("wall"), point.pop("cpu")
    return report


@pytest.mark.parametrize("views", ["full", "scaled"])
def test_a_run_that_is_stopped_again_and_again_ends_as_one_that_is_not(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path, views: str
) -> None:
    short, run = replace(small, budget=0.0004, views=views), evidence.run.run
    whole = run(short, data, tmp_path / "whole", tmp_path / "a", device="cpu")
    stops = 0
    while (pieces := run(short, data, tmp_path / "pieces", tmp_path / "b", device="cpu", minutes=0)) is None:
        assert list((tmp_path / "b").glob("colours*.pt"))
        stops += 1
    report = _without_times(whole)
    assert stops == report["steps"] - 1 > 8
    assert report == _without_times(pieces)
    assert len(report["curve"]) == 5
    assert not list((tmp_path / "b").glob("colours*"))  # no checkpoint is left


@pytest.mark.parametrize("method", ["mocov3", "simclr", "dino"])
def test_a_run_spends_its_budget_and_counts_what_arithmetic_gives(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path, method: str
) -> None:
    settings = replace(small, method=method)
    report = json.loads(evidence.run.run(settings, data, tmp_path, tmp_path / "kept", device="cpu").read_text())
    assert report["units"] == pytest.approx(report["units_computed"], abs=1)
    assert report["units"] == pytest.approx(1200, rel=0.5 / report["steps"] * 4)
    assert report["curve"][-1]["units"] == report["units"]


def test_a_batch_that_grows_takes_fewer_updates_for_the_same_views_and_budget(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path
) -> None:
    reports = {}
    for grow in ("no", "sqrt"):
        done = evidence.run.run(replace(small, grow=grow), data, tmp_path, tmp_path / "kept", device="cpu")
        reports[grow] = json.loads(done.read_text())
    plain, grown = reports["no"], reports["sqrt"]
    assert grown["steps"] == plain["steps"] == plain["updates"]
    assert grown["units"] == plain["units"]
    # Four batches at once at 3 tokens of 17, for half of the run; then one.
    assert grown["updates"] == pytest.approx(0.625 * plain["updates"], abs=2)


@pytest.mark.parametrize("change", [{"micro": 2, "merge": "yes"}, {"micro": 1, "grow": "linear"}])
def test_what_is_run_at_once_is_what_would_have_been_run_in_turn(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    pixels = evidence.images.load_images(data / "train", 16, 40, tmp_path)
    settings = replace(small, plan="patch 8", method="simclr", **change)
    training = evidence.run.Training(settings, pixels, torch.device("cpu"))
    sizes: list[int] = []
    training.method.criterion.register_forward_pre_hook(lambda criterion, views: sizes.append(len(views[0])))
    rates: list[float] = []
    training.optimizer.register_step_pre_hook(lambda optimizer, *rest: rates.append(optimizer.param_groups[0]["lr"]))
    expected = [training.batch(step) for step in range(2)]
    alike = [torch.cat([views[0] for views in expected]), expected[0][0]][change["micro"] - 1]
    seen: list[torch.Tensor] = []
    training.method.backbone.register_forward_pre_hook(lambda vit, views: seen.append(views[0]))
    begins = training.optimizer.param_groups[0]["lr"]
    training.step()
    assert sizes == [16 if "grow" in change else 8]  # 5 tokens of 17: two at once
    assert torch.equal(seen[0], alike)
    assert rates == [pytest.approx(begins * (2 if "grow" in change else 1))]
    assert (training.steps_done, training.updates) == ((2, 1) if "grow" in change else (1, 1))


def test_what_an_online_plan_takes_is_read_off_two_runs_that_end_with_the_same_weights(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "online", lambda large: Online(PRESETS["default"](16), 0.5, None))
    pixels = evidence.images.load_images(data / "train", 16, 40, tmp_path)
    settings = replace(small, method="mocov3", budget=0.004)
    found = evidence.online_cost.measure(settings, pixels, torch.device("cpu"))
    assert found["steps"] > 20
    assert len(found["decisions"]) >= 1
    assert found["measuring"] > 0.05  # half of the compute was allowed
    assert found["together"] == pytest.approx(found["measuring"] + found["bookkeeping"])
    assert found["bookkeeping_interval"][0] <= found["bookkeeping"] <= found["bookkeeping_interval"][1]
    assert "| steps that measure |" in evidence.online_cost.report(settings, {}, found)

    step = evidence.run.Training.step

    def disturbed(self: Any) -> None:
        step(self)
        if self.online and self.steps_done == 3:
            with torch.no_grad():
                next(iter(self.method.parameters())).add_(1.0)

    monkeypatch.setattr(evidence.run.Training, "step", disturbed)
    with pytest.raises(RuntimeError, match="measuring has changed the run: "):
        evidence.online_cost.measure(settings, pixels, torch.device("cpu"))


def test_an_online_schedule_pays_for_what_it_measures_and_goes_on_from_a_checkpoint(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    much = Online(PRESETS["default"](16), 0.5, None)  # so that some dozens of steps pay for a decision
    monkeypatch.setitem(PRESETS, "online", lambda large: much)
    pixels = evidence.images.load_images(data / "train", 16, 40, tmp_path)
    settings = replace(small, method="mocov3", plan="online", budget=0.004)
    made = [evidence.run.Training(settings, pixels, torch.device("cpu")) for _ in range(2)]
    whole, second = made
    default = evidence.run.Training(replace(settings, plan="default"), pixels, torch.device("cpu"))
    assert whole.total_steps == default.total_steps
    half = whole.total_steps // 2
    while whole.steps_done < whole.total_steps:
        if whole.steps_done == half:
            second.load_state_dict(copy.deepcopy(whole.state_dict()))
        whole.step()
    while second.steps_done < second.total_steps:
        second.step()
    assert len(whole.online.decisions) >= 1
    assert [str(decision) for decision in second.online.decisions] == [str(one) for one in whole.online.decisions]
    assert second.loss.item() == whole.loss.item()
    assert 0.2 < whole.online.measured_share <= 0.5
    computed = whole.computed_units(whole.online.schedule, whole.total_steps)
    assert whole.units == pytest.approx(computed * (1 + whole.online.measured_share), rel=1e-3)


def test_an_image_of_a_plain_run_costs_three_units_a_student_view_and_one_a_teacher_view(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path
) -> None:
    pixels = evidence.images.load_images(data / "train", 16, 40, tmp_path)
    for method, expected in (("mocov3", 8.0), ("simclr", 6.0)):
        settings = replace(small, method=method, plan="none")
        training = evidence.run.Training(settings, pixels, torch.device("cpu"))
        training.step()
        assert training.budget.units / settings.batch == expected


@pytest.mark.parametrize("method", ["mocov3", "dino"])
def test_views_are_as_much_smaller_as_patches_are_larger_and_cost_the_same_units(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path, method: str
) -> None:
    pixels = evidence.images.load_images(data / "train", 32, 40, tmp_path)
    full = {"mocov3": {32}, "dino": {32, 12}}[method]
    small_ones = {"mocov3": {16}, "dino": {16, 8}}[method]  # 12 px are three patches, and of the larger ones two
    spent = {}
    for views in ("full", "scaled"):
        settings = replace(small, method=method, views=views, plan="0: patch 8; 0.5: base", image_size=32)
        training = evidence.run.Training(settings, pixels, torch.device("cpu"))
        sizes = []
        training.views.register_forward_hook(lambda *call, sizes=sizes: sizes.append({v.shape[-1] for v in call[2]}))
        while training.steps_done < training.total_steps:
            training.step()
        half = training.total_steps // 2
        assert sizes[half + 1 :] == [full] * (training.total_steps - half - 1)
        assert sizes[: half - 1] == [full if views == "full" else small_ones] * (half - 1)
        spent[views] = training.budget.units
        computed = training.computed_units(training.sequence_scheduler.schedule, training.total_steps)
    assert spent["scaled"] == spent["full"] == pytest.approx(computed)


def test_colour_can_be_told_from_the_features_of_a_trained_encoder(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path
) -> None:
    done = evidence.run.run(small, data, tmp_path, tmp_path / "kept", device="cpu")
    accuracy = json.loads(done.read_text())["accuracy"]
    assert accuracy["knn"] > 0.9
    assert accuracy["linear"] > 0.9


def test_images_that_settings_are_tuned_on_are_never_trained_on_nor_tested_on(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path
) -> None:
    train, held_out, judged = evidence.run._data(replace(small, judged_on="held-out"), data, tmp_path)
    seen = {image.numpy().tobytes() for image in train.pixels}
    assert (len(train), len(held_out)) == (40, 8)
    assert torch.equal(judged.pixels, held_out.pixels)
    assert not seen & {image.numpy().tobytes() for image in judged.pixels}
    assert held_out.labels.bincount().tolist() == [4, 4]


def test_views_are_drawn_sample_by_sample_and_again_by_the_same_seed(evidence: SimpleNamespace) -> None:
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(64, -1, -1, -1)
    view = evidence.images.View(32, (0.2, 1.0), blur=0.5, solarize=0.2)
    first, again, other = (view(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    distances = torch.cdist(first.flatten(1), first.flatten(1)) + 1e9 * torch.eye(64)
    assert distances.min() > 1


def test_a_crop_shows_the_share_of_the_image_that_was_asked_for(evidence: SimpleNamespace) -> None:
    across = torch.arange(32, dtype=torch.float32).expand(3, 32, 32)
    both = torch.stack([across, across.transpose(1, 2)]).mul(8).to(torch.uint8).repeat_interleave(500, dim=0)
    draws = evidence.images._Draws(1000, torch.device("cpu"), torch.Generator().manual_seed(0))
    crops = evidence.images._crop(both, (32, 32), (0.3, 0.5), draws) * 255 / 8  # in pixels of the image
    width = (crops[:500, 0, 16, -9] - crops[:500, 0, 16, 8]).abs() * 32 / 15
    height = (crops[500:, 0, -9, 16] - crops[500:, 0, 8, 16]).abs() * 32 / 15
    assert math.sqrt(0.3 * 3 / 4) * 32 - 0.01 <= width.min() < 17
    assert math.sqrt(0.5 * 4 / 3) * 32 + 0.01 >= width.max() > 25
    assert (width * height).mean().item() / 32**2 == pytest.approx(0.4, abs=0.01)
    assert ((crops[:500, 0, 16, -9] > crops[:500, 0, 16, 8]).float().mean().item()) == pytest.approx(0.5, abs=0.1)


def test_colours_change_as_torchvisions_do(evidence: SimpleNamespace) -> None:
    views = 0.4 + 0.2 * torch.rand(2, 3, 8, 8)  # far from black and white, where cutting off comes in
    one, none = torch.ones(2), torch.zeros(2)
    change = evidence.images.recoloured
    change_of = v2.functional
    torch.testing.assert_close(change(views, 1.3 * one, one, one, none), change_of.adjust_brightness(views, 1.3))
    bright, dull = change(views, one, 0.7 * one, one, none), change_of.adjust_contrast(views, 0.7)
    torch.testing.assert_close(bright, dull, atol=2e-3, rtol=0)
    gray = change_of.rgb_to_grayscale(views, 3)
    torch.testing.assert_close(change(views, one, one, none, none), gray, atol=2e-3, rtol=0)
    turned = change(views, one, one, one, 0.1 * one)
    torch.testing.assert_close(change_of.rgb_to_grayscale(turned, 3), gray, atol=2e-3, rtol=0)
    assert (turned - views).abs().max() > 0.02
    back = change(turned, one, one, one, -0.1 * one)
    torch.testing.assert_close(back, views)


def _run(plan: str, seed: int, units: float, accuracy: float) -> dict[str, Any]:
    settings = {
        "dataset": "d", "method": "mocov3", "plan": plan, "seed": seed, "budget": units / 1e6, "depth": 1, "width": 2,
        "patch_size": 4, "image_size": 32, "precision": "float32", "lr": 1e-3, "weight_decay": 0.1, "momentum": 0.99,
        "crop": 0.2,
    }  # fmt: skip
    return {
        "settings": settings, "units": units,
        "seconds": {"wall": 9.0, "cpu": units / 500 if plan == "none" else units / 250},
        "accuracy": {"knn": accuracy, "linear": accuracy}, "hardware": "h", "device": "cpu", "threads": 1,
        "steps": 10, "epochs": 1.0, "judged_images": 10**8,
    }  # fmt: skip


def _summary(report: SimpleNamespace, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return report.summary(report.compared(runs))


def test_a_curve_that_is_moved_by_four_is_a_speed_up_of_four(evidence: SimpleNamespace) -> None:
    lengths = [1e5, 2e5, 4e5, 8e5]
    runs = [
        _run(plan, seed, units, 0.05 * math.log(units * factor))
        for plan, factors in (("none", (1, 1)), ("default", (4, 2)))
        for seed, factor in enumerate(factors)
        for units in lengths
    ]
    row, _ = _summary(evidence.report, runs)
    assert row["speedup_units"] == pytest.approx(math.sqrt(4 * 2), rel=1e-3)
    assert row["interval"] == pytest.approx([2.0, 4.0], rel=0.01)
    assert row["interval_wall"] == pytest.approx([1.0, 2.0], rel=0.01)
    assert row["speedup_wall"] == pytest.approx(math.sqrt(2 * 1), rel=1e-3)  # a unit takes twice as long there
    assert row["seeds"] == [0, 1]
    assert row["accuracy"] == pytest.approx(0.05 * math.log(8e5), abs=1e-4)


def test_seeds_are_read_together_where_they_have_the_same_lengths(evidence: SimpleNamespace) -> None:
    lengths = {
        ("none", 0): (1e5, 2e5, 4e5),
        ("none", 1): (1e5, 2e5),
        ("default", 0): (0.5e5, 2.5e5),
        ("default", 1): (0.5e5, 2.5e5),
    }
    runs = [
        _run(plan, seed, units, 0.05 * math.log(units * (2 if plan == "default" else 1)))
        for (plan, seed), of in lengths.items()
        for units in of
    ]
    both, alone = (row for row in _summary(evidence.report, runs) if row["metric"] == "knn")
    assert (both["seeds"], alone["seeds"]) == ([0, 1], [0])
    assert both["accuracy"] == pytest.approx(0.05 * math.log(2e5), abs=1e-4)
    assert alone["accuracy"] == pytest.approx(0.05 * math.log(4e5), abs=1e-4)
    assert both["speedup_units"] == alone["speedup_units"] == pytest.approx(2)
    *_, row = evidence.report.short_table([both, alone]).splitlines()  # the one with more seeds alone
    assert "| 2.00x (" in row
    assert "| 0, 1 |" in row
    assert evidence.report.short_table([alone, both]).splitlines()[2:] == [row]
    point = evidence.report.Point
    curves = {seed: [point(1, 1, {}, length=length) for length in of] for seed, of in ((0, (1, 2)), (1, (2, 3)))}
    together = [sorted(plain) for plain, _ in evidence.report.groups(curves, curves)]
    assert together == [[0, 1], [1]]  # each has a length of its own: no end of it otherwise


def test_the_mean_over_seeds_is_the_ratio_of_the_budgets_beside_it(evidence: SimpleNamespace) -> None:
    runs = [_run("none", seed, units, 0.05 * math.log(units)) for seed in (0, 1) for units in (1e5, 8e5)]
    for seed, ratio in ((0, 2), (1, 8)):
        runs += [_run("default", seed, units, 0.05 * math.log(ratio * units)) for units in (1e4, 8e5)]
    row = next(row for row in _summary(evidence.report, runs) if row["metric"] == "knn")
    assert row["speedup_units_by_seed"] == pytest.approx({"0": 2, "1": 8})
    assert row["speedup_units"] == pytest.approx(4)
    assert row["units"][0] / row["units"][1] == pytest.approx(4, rel=1e-3)
    assert re.search(r"\| 4\.00x \([^|]*\| 0: 2\.00x; 1: 8\.00x \|", evidence.report.speedups_table([row]))


def test_a_ratio_is_read_at_each_length_of_the_plain_run(evidence: SimpleNamespace) -> None:
    gained = {1e5: 0.3, 2e5: 0.35, 4e5: 0.4}
    runs = [_run("none", seed, units, accuracy) for seed in (0, 1) for units, accuracy in gained.items()]
    runs.append(_run("none", 0, 8e5, 0.45))
    # It needs a quarter of the budget for what 0.2 M bring, and half of it for all that comes later.
    fast = {0.25e5: 0.3, 0.5e5: 0.35, 2e5: 0.4, 4e5: 0.45}
    runs += [_run("default", seed, units, accuracy) for seed in (0, 1) for units, accuracy in fast.items()]
    rows = [row for row in evidence.report.by_length(runs) if row["metric"] == "knn"]
    assert [(row["plain"], row["seeds"]) for row in rows] == [(0.2, [0, 1]), (0.4, [0, 1]), (0.8, [0])]
    assert [row["speedup_units"] for row in rows] == pytest.approx([4, 2, 2])
    assert [row["speedup_wall"] for row in rows] == pytest.approx([2, 1, 1])
    assert "| 0.8 M | k-NN | 45.0 | 2.00x (" in evidence.report.by_length_table(rows)
    both, alone = (row for row in _summary(evidence.report, runs) if row["metric"] == "knn")
    assert rows[1:] == [{**both, "plain": 0.4}, {**alone, "plain": 0.8}]  # one interval of the same, in both tables


def test_the_interval_of_one_seed_is_what_chance_the_test_images_leave(evidence: SimpleNamespace) -> None:
    point = evidence.report.Point
    plain, fast = (
        [point(units, units, {"knn": 0.3 + 0.1 * math.log(units * factor / 4)}, 1000) for units in (1, 2, 4)]
        for factor in (1, 2)
    )
    (low, high), _ = evidence.report.intervals({0: plain}, {0: fast}, "knn")
    chance = math.sqrt(0.3 * 0.7 / 1000)
    assert low < 2 < high
    # The plain end decides where is read, and an accuracy between two points of the other curve has less chance.
    assert 1.96 * chance / 0.1 * 0.9 < math.log(high / low) / 2 < 1.96 * chance / 0.1 * 1.5
    sure = [[replace(point, images=10**9) for point in curve] for curve in (plain, fast)]
    assert evidence.report.intervals({0: sure[0]}, {0: sure[1]}, "knn")[0] == pytest.approx([2, 2], rel=0.01)


def test_nothing_is_read_outside_the_points(evidence: SimpleNamespace) -> None:
    point = evidence.report.Point
    low = [point(units, units, {"knn": value}) for units, value in ((1, 0.1), (2, 0.2))]
    high = [point(units, units, {"knn": value}) for units, value in ((1, 0.3), (2, 0.4))]
    assert evidence.report.speedup(low, high, "knn") is None
    assert evidence.report.speedup(low, low[:1], "knn") is None
    between = [point(units, units, {"knn": value}) for units, value in ((1, 0.15), (4, 0.4))]
    found = evidence.report.speedup(low, between, "knn")
    assert found.accuracy == 0.2
    assert found.units == pytest.approx(2 / 4 ** (0.05 / 0.25))


def test_what_was_spent_is_that_of_the_first_time_an_accuracy_was_reached(evidence: SimpleNamespace) -> None:
    point = evidence.report.Point
    falls = [point(units, units, {"knn": value}) for units, value in ((1, 0.42), (2, 0.38), (4, 0.41), (8, 0.43))]
    fast = [point(units, units, {"knn": value}) for units, value in ((1, 0.39), (2, 0.40))]
    assert evidence.report.speedup(falls, fast, "knn").budgets == (1, 2)
    rises = [point(units, units, {"knn": value}) for units, value in ((1, 0.3), (2, 0.41), (4, 0.39), (8, 0.43))]
    assert evidence.report.speedup(rises, fast, "knn").budgets[0] == pytest.approx(2 ** (0.1 / 0.11))


def test_a_ratio_that_chance_often_takes_away_is_none(evidence: SimpleNamespace) -> None:
    runs = [
        _run(plan, 0, units, accuracy)
        for plan, of in (("none", (0.2, 0.3)), ("default", (0.298, 0.4)))
        for units, accuracy in zip((1e5, 2e5), of, strict=True)
    ]
    for run in runs:
        run["judged_images"] = 10_000
    assert evidence.report.speedup(
        *([evidence.report.Point(r["units"], 1.0, r["accuracy"]) for r in of] for of in (runs[:2], runs[2:])), "knn"
    )
    assert _summary(evidence.report, runs) == []
    line = next(iter(evidence.report.unread(runs, evidence.report.compared(runs))))
    assert line.startswith(
        "- d, ViT 1 x 2, patch 4, 32 px, MoCo-v3, default, k-NN, seeds 0: no ratio, since in more than 5 %"
    )


def test_plans_are_ordered_by_what_the_same_seeds_reached_for_the_same_budget(evidence: SimpleNamespace) -> None:
    plans = {"none": 0.3, "drop 0.5": 0.4, "0: patch 8; 0.8: base": 0.5, "patch 8": 0.45}
    runs = [_run(plan, seed, 2e5, accuracy + seed / 10) for plan, accuracy in plans.items() for seed in (0, 1)]
    runs += [_run("none", 2, 2e5, 0.9), _run("drop 0.5", 0, 1e5, 0.2)]  # another seed, another budget
    kinds = [{"kind": "constant", "strategy": {"token_dropout": 0.5, "patch_size": None}}]
    kinds.append({"kind": "constant", "strategy": {"token_dropout": 0.0, "patch_size": None}})
    stages = [(0.0, 8), (0.8, None)]
    staged = [{"progress": begin, "token_dropout": 0.0, "patch_size": patch} for begin, patch in stages]
    kinds.append({"kind": "stepwise", "stages": staged})
    for run in runs:
        plan = run["settings"]["plan"]
        run["schedule"] = {"seqcompress_schedule": 1, **kinds[1 if plan == "none" else 2 if ":" in plan else 0]}
        run["steps"] = 10 if plan == "none" else 20
    rows = evidence.report.plans_table(runs).splitlines()[2:]
    assert rows[0] == (
        "| d | MoCo-v3 | 0.2 M | 0: patch 8; 0.8: base | 20 | 20%, 40% | 55.0 (50.0 to 60.0) | 55.0 (50.0 to 60.0) "
        "| 0, 1 |"
    )
    assert [row.split(" | ")[3] for row in rows] == ["0: patch 8; 0.8: base", "patch 8", "drop 0.5", "plain"]
    assert " | 10 | 100%, 100% | 35.0 (" in rows[-1]
    assert len(evidence.report.plans_table(runs, least=5).splitlines()) == 2  # too few to say which
    more = {**runs[6], "settings": {**runs[6]["settings"], "seed": 2}}
    again = evidence.report.plans_table([*runs, more]).splitlines()[2:]
    assert again[:4] == rows
    told = [row.strip("| ").split(" | ") for row in again[4:]]
    assert [(row[3], row[-1]) for row in told] == [("plain", "0, 1, 2"), ("patch 8", "0, 1, 2")]


def test_curves_without_a_common_accuracy_are_told_instead_of_a_ratio(evidence: SimpleNamespace) -> None:
    runs = [
        _run(plan, 0, units, low + 1e-7 * units)
        for plan, low in (("none", 0.1), ("default", 0.3))
        for units in (1e5, 2e5)
    ]
    knn, _ = evidence.report.unread(runs, evidence.report.compared(runs))
    assert _summary(evidence.report, runs) == []
    assert knn.endswith("(plain 11.0 to 12.0, default 31.0 to 32.0).")


def test_scaled_views_are_another_curve_and_runs_from_before_had_full_ones(
    evidence: SimpleNamespace, tmp_path: Path
) -> None:
    kinds = [
        ("none", {}),
        ("none", {"views": "full"}),
        ("default", {"views": "full"}),
        ("default", {"views": "scaled"}),
    ]
    for number, (plan, views) in enumerate(kinds):
        for units in (1e5, 2e5):
            run = _run(plan, number, units, 0.05 * math.log(units))
            run["settings"] = {**views, **run["settings"]}  # in another order, too
            (tmp_path / f"{number}_{units:g}_seed.json").write_text(json.dumps(run))
    runs = evidence.report.load(tmp_path)
    (curves,) = evidence.report.comparisons(runs).values()
    assert {plan: sorted(seeds) for plan, seeds in curves.items()} == {
        "none": [0, 1], "default": [2], "default, scaled views": [3]
    }  # fmt: skip
    table = evidence.report.runs_table(runs).splitlines()[2:]
    assert len(table) == 6  # plain runs of both kinds share a row for each length


def test_runs_with_another_learning_rate_are_not_compared(evidence: SimpleNamespace) -> None:
    runs = [_run(plan, 0, units, 0.05 * math.log(units)) for plan in ("none", "default") for units in (1e5, 2e5)]
    assert len(_summary(evidence.report, runs)) == 2
    for run in runs[2:]:
        run["settings"]["lr"] = 2e-3
    assert _summary(evidence.report, runs) == []


def test_a_criterion_is_held_against_whole_runs_under_one_strategy(evidence: SimpleNamespace) -> None:
    reached = {"none": 0.3, "patch 8": 0.5, "drop 0.5": 0.4, "0: patch 8; 0.9: base": 0.6}
    runs = [_run(plan, 0, 4e5, accuracy) for plan, accuracy in reached.items()]
    runs += [_run("drop 0.5", 1, 4e5, 0.9), _run("patch 16", 0, 2e5, 0.9)]  # another seed, another length
    for run in runs:
        run["settings"] = {**evidence.report._SINCE, **run["settings"]}
    names = ["base", "drop 0.5", "patch 8", "patch 16"]
    elsewhere = {**_run("patch 8", 0, 4e5, 0.9), "hardware": "another"}
    elsewhere["settings"] = {**evidence.report._SINCE, **elsewhere["settings"]}
    runs.append(elsewhere)
    found = {"checkpoint_of": runs[3]["settings"], "branches": dict.fromkeys(names), "hardware": "h"}
    assert evidence.report.whole_runs(found, runs) == {"base": 0.3, "drop 0.5": 0.4, "patch 8": 0.5}
    asked = {"good": (1, 2, 3, 0), "bad": (3, 2, 1, 4)}
    found["criteria"] = {kind: dict(zip(names, values, strict=True)) for kind, values in asked.items()}
    found["correlation"] = {kind: {what: [0.5, 0.0, 1.0] for what in ("knn", "linear", "loss")} for kind in asked}
    good, bad = evidence.report.predictions_table([found], runs).splitlines()[2:]
    assert (good, bad) == ("| good | 0.50 | 0.50 | 0.50 | 1.00 |", "| bad | 0.50 | 0.50 | 0.50 | -1.00 |")
    assert evidence.report.predictions_table([found], runs[:2]).endswith("| 0.50 |  |")  # two are no order


def test_the_tables_of_the_page_are_those_of_the_runs(evidence: SimpleNamespace, tmp_path: Path) -> None:
    report = evidence.report
    runs = report.load(report.RESULTS)
    rows = report.compared(runs)
    tables = report.tables(report.RESULTS, runs, rows)
    for page in report.PAGES:
        copy_of_page = tmp_path / page.name
        copy_of_page.write_text(page.read_text())
        report.fill(copy_of_page, tables)
        assert copy_of_page.read_text() == page.read_text()
    text = "".join(page.read_text() for page in report.PAGES)
    assert all(table in text for table in tables.values())
    assert json.loads((report.RESULTS / "summary.json").read_text()) == report.summary(rows)


def test_every_comparison_has_its_figure(evidence: SimpleNamespace, tmp_path: Path) -> None:
    runs = [
        _run(plan, seed, units, 0.07 * math.log(units) + seed / 300)
        for plan in ("none", "default")
        for seed in range(3)
        for units in (1e5, 2e5)
    ]
    others = [copy.deepcopy(run) for run in runs[:4]]
    for run, method in zip(others, ("mocov3", "mocov3", "dino", "dino"), strict=True):
        run["settings"].update(method=method, lr=2e-3)
    alone = copy.deepcopy(runs[0])
    alone["settings"]["method"] = "simclr"  # one point is no curve
    figures = evidence.report.figures([*runs, *others, alone], tmp_path)
    # A name says what is on the picture, and does not change with the runs that come before it.
    assert [figure.name for figure in figures] == [
        "evidence-d-mocov3.png",
        "evidence-d-mocov3-2.png",
        "evidence-d-dino.png",
    ]
    with Image.open(figures[0]) as picture:
        assert picture.size == (990, 715)
    evidence.report.overview([*runs, *others, alone], tmp_path / "overview.png")
    with Image.open(tmp_path / "overview.png") as picture:  # of the other comparisons none has both plans
        assert picture.size == (300, 550)


def test_a_curve_without_held_out_images_is_not_judged_by_the_judged_images_themselves(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges: list[Any] = []
    init = evidence.run.Judge.__init__

    def remember(self: Any, bank: Any, judged: Any) -> None:
        judges.append((bank, judged))
        init(self, bank, judged)

    monkeypatch.setattr(evidence.run.Judge, "__init__", remember)
    evidence.run.run(replace(small, images=60, budget=0.0003), data, tmp_path / "results", tmp_path)
    bank, judged = judges[0]
    assert (len(bank), len(judged)) == (30, 30)
    assert not (bank.pixels[:, None] == judged.pixels).flatten(2).all(dim=2).any()


def test_every_run_of_a_suite_is_one_run_whose_command_says_all_about_it(evidence: SimpleNamespace) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    evidence.run.add_settings(parser)
    for suite in evidence.suite.SUITES.values():
        rows = evidence.suite.unique(suite())
        assert len(rows) > 40
        assert len({row.name for row in rows}) == len(rows)
        for row in rows:
            assert evidence.run.Settings(**vars(parser.parse_args(evidence.suite._options(row)))) == row


def test_the_suites_default_plan_is_the_preset_and_the_tables_call_it_so(evidence: SimpleNamespace) -> None:
    for settings in (evidence.suite.CIFAR, evidence.suite.SMALL_PHOTOGRAPHS, evidence.suite.IMAGENETTE):
        patch = settings.patch_size
        plan = evidence.suite.DEFAULT.format(2 * patch)
        assert evidence.run.parse_plan(plan) == PRESETS["default"](double_patch(patch, settings.image_size))
        run = {"plan": plan, "patch_size": patch, "image_size": settings.image_size}
        assert evidence.report._plan_of(run) == "default"
        assert evidence.report._plan_of({**run, "plan": "drop 0.5"}) == "drop 0.5"


def test_a_suite_knows_what_is_done_and_what_is_missing(
    evidence: SimpleNamespace, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["cpu", "--data", str(data), "--output", str(tmp_path), "--only", "simclr_none_", "seed0"]
    rows = [row for row in evidence.suite.unique(evidence.suite.cpu()) if "simclr_none" in row.name and row.seed == 0]
    for row in rows[:2]:
        (tmp_path / f"{row.name}.json").write_text("{}")
    assert evidence.suite.main([*command, "--list"]) == 0
    told = ["   done"] * 2 + ["missing"] * (len(rows) - 2)
    assert len(rows) > 2
    listed = [f"{state} {row.name}" for state, row in zip(told, rows, strict=True)]
    assert capsys.readouterr().out.splitlines() == [f"{len(rows)} runs, {len(rows) - 2} missing", *listed]
    for row in rows[2:]:
        (tmp_path / f"{row.name}.json").write_text("{}")
    assert evidence.suite.main(command) == 0
    assert capsys.readouterr().out.splitlines() == [f"{len(rows)} runs, 0 missing", "0 of 0 done"]


@pytest.mark.parametrize(
    ("suite", "name"),
    [
        ("cpu", "dino_0-drop-0.5-patch-8-0.98-base_0.2M_seed2"),
        ("gpu", "mocov3_0-drop-0.5-patch-32-0.98-base_0.75M_seed0"),
    ],
)
def test_a_suite_is_tried_at_a_size_of_seconds(data: Path, suite: str, name: str) -> None:
    command = [sys.executable, FOLDER / "suite.py", suite, "--data", data, "--smoke", "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 of 1 done"


def test_a_checkpoint_from_before_a_setting_was_there_is_gone_on_from(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path
) -> None:
    pixels = evidence.images.load_images(data / "train", 16, 40, tmp_path)
    first, second = (evidence.run.Training(small, pixels, torch.device("cpu")) for _ in range(2))
    first.step()
    state = first.state_dict()
    del state["settings"]["views"]
    second.load_state_dict(state)
    assert second.steps_done == 1
    state["settings"]["lr"] = 2e-3
    with pytest.raises(ValueError, match="checkpoint is of a run with other settings"):
        second.load_state_dict(state)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_suite_that_is_ended_ends_its_runs_and_begins_no_other(
    evidence: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, str(os.getpid())).with_suffix('.begun').touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(evidence.suite, "RUN", script)

    def end_when_begun() -> None:
        while len(list(tmp_path.glob("*.begun"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    ending = threading.Thread(target=end_when_begun)
    ending.start()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        evidence.suite.main(["cpu", "--data", str(tmp_path), "--jobs", "2", "--output", str(tmp_path)])
    ending.join()
    time.sleep(0.5)  # for a worker that would begin another
    begun = [int(path.stem) for path in tmp_path.glob("*.begun")]
    assert len(begun) == 2
    assert not any(_is_running(process) for process in begun)


def _is_running(process: int) -> bool:
    try:
        return os.waitpid(process, os.WNOHANG) == (0, 0)
    except ChildProcessError:  # its end was noticed
        return False


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"method": "byol"}, "method must be one of mocov3, simclr, dino, got 'byol'"),
        ({"views": "small"}, "views must be full or scaled, got 'small'"),
        ({"budget": -1.0}, "budget must be a number of millions of units above 0, got -1.0"),
        ({"batch": 50}, "batch must be at least 2 and at most as many as images, got 50"),
        ({"plan": "0: drop 2"}, "text '0: drop 2' is not a schedule: .*token_dropout must be in"),
    ],
)
def test_a_bad_setting_is_named(small: Any, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(small, **setting)


def test_a_setting_that_is_added_later_leaves_earlier_runs_their_names(evidence: SimpleNamespace, small: Any) -> None:
    extended = dataclasses.make_dataclass("Extended", [("new", int, 1)], bases=(evidence.run.Settings,), frozen=True)(
        **dataclasses.asdict(small)
    )
    assert extended.name == small.name
    assert replace(extended, new=2).name != small.name


def test_moments_of_gradients_are_those_of_gradient_error(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path
) -> None:
    pixels = evidence.images.load_images(data / "train", 16, 40, tmp_path)
    training = evidence.run.Training(replace(small, plan="default"), pixels, torch.device("cpu"))
    for _ in range(3):
        training.step()
    point = evidence.branches.BranchPoint.of(training.state_dict(), pixels)
    strategy = Strategy(patch_size=8)
    measured = point.measure(strategy, 4, 0, pixels, torch.device("cpu"))

    plain = replace(point.settings, plan="none", seed=500)
    again = evidence.branches.training_from(point.state, plain, pixels, torch.device("cpu"))
    report = gradient_error(
        again.method, lambda step: again.method.loss(again.batch(step), 0.0), range(4), [strategy], cost="flops"
    )
    moments = measured[""]
    assert moments["bias2"] == pytest.approx(report[strategy].bias2, rel=1e-4)
    assert moments["variance"] == pytest.approx(report[strategy].variance, rel=1e-4)
    assert moments["plain_norm2"] == pytest.approx(report.base_norm2, rel=1e-4)
    twice = moments["norm2"] + moments["plain_norm2"] - moments["bias2"]
    assert 2 * moments["inner"] == pytest.approx(twice, rel=1e-4)
    found = evidence.branches.criteria(moments, 0.5)
    expected = -(report[strategy].bias2 + 0.5 * report[strategy].variance) / report.base_norm2
    assert found["CA-MSE"] == pytest.approx(expected, rel=1e-4)

    for held in point.state["optimizer"][
        "state"
    ].values():  # where the root of the second moment is 2, all is a quarter
        held["exp_avg_sq"].fill_(4 * (1 - 0.95**3))
    quarter = point.measure(strategy, 4, 0, pixels, torch.device("cpu"))[" over AdamW's"]
    assert quarter["norm2"] == pytest.approx(moments["norm2"] / 4, rel=1e-4)
    assert quarter["variance"] == pytest.approx(moments["variance"] / 4, rel=1e-4)


def test_gradient_error_reads_the_step_of_a_checkpoint(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerated = replace(small, plan="default")
    assert evidence.run.run(accelerated, data, tmp_path, tmp_path, device="cpu", until=0.5) is None
    checkpoint = tmp_path / f"{accelerated.name}.pt"
    monkeypatch.setenv("DATA", str(data))
    found = evidence.branches.at(checkpoint)
    state = torch.load(checkpoint, weights_only=True)
    assert all(
        torch.equal(value, state["method"][f"backbone.{name}"]) for name, value in found.model.state_dict().items()
    )
    strategy, batches = Strategy(patch_size=8), list(itertools.islice(found.batches, 4))
    report = gradient_error(
        found.model,
        found.step,
        batches,
        [strategy],
        teacher=found.teacher,
        after_backward=found.after_backward,
        cost="flops",
    )
    weights = [parameter for parameter in found.model.parameters() if parameter.requires_grad]
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(found.step(views), weights)]) for views in batches]
    total, squares = sum(gradients), sum(float(g @ g) for g in gradients)
    assert report.base_norm2 == pytest.approx((float(total @ total) - squares) / 12, rel=1e-4)
    assert report[strategy].bias2 > 0


def test_a_gradient_that_is_only_longer_is_no_error_where_any_length_will_do(evidence: SimpleNamespace) -> None:
    torch.manual_seed(0)
    sums = evidence.branches.Sums()
    for plain in torch.randn(400, 5) * 0.1 + torch.tensor([1.0, 0, 0, 0, 0]):
        sums.add(3 * plain, plain)
    found = evidence.branches.criteria(sums.moments(), 1.0)
    assert found["CA-MSE"] == pytest.approx(-(4 + 9 * 0.05), rel=0.1)
    assert found["CA-MSE, any length"] == pytest.approx(1 / 1.05 - 1, rel=0.1)
    assert found["rate"] == pytest.approx(1 / 1.05, rel=0.05)


def test_an_order_that_is_foretold_has_a_rank_correlation_of_one(evidence: SimpleNamespace) -> None:
    reached = {name: [value - 0.1, value + 0.1] for name, value in zip("abcdef", range(6), strict=True)}
    criterion = dict(zip("abcdef", (1, 2, 4, 8, 16, 32), strict=True))
    assert evidence.branches.correlations(criterion, reached, 200) == pytest.approx((1.0, 1.0, 1.0))
    swapped = {**criterion, "a": 64}
    value, low, high = evidence.branches.correlations(swapped, reached, 200)
    assert value == pytest.approx(1 - 6 * (5**2 + 5) / (6 * 35))
    assert low < value < high


def test_what_gradient_error_has_found_is_told_by_checkpoint(evidence: SimpleNamespace, tmp_path: Path) -> None:
    ends = ("", "_low", "_high")
    heading = ["strategy", *(f"relative_ca_mse{end}" for end in ends), "tied"]
    of = {"base": (2, 1, 3, False), "drop 0.5, patch 8": (1.234, 1, 2, True), "patch 8": (0.5, 0.25, 1, True)}
    (tmp_path / "plain").mkdir()
    with (tmp_path / "plain" / "stage-0.25.csv").open("w", newline="") as file:
        csv.writer(file).writerows([heading, *((name, *values) for name, values in of.items())])
    assert evidence.report.gradients_table(tmp_path).splitlines()[2:] == [
        "| plain | 0.25 | patch 8: 0.5 (0.25 to 1) | drop 0.5, patch 8 | 2 (1 to 3) | 1.23 (1 to 2) |"
    ]


def test_what_criteria_predict_is_told_over_all_checkpoints(evidence: SimpleNamespace) -> None:
    rows = ({"knn": (rho, -1, 1), "linear": (0.5, -1, 1), "loss": (-rho, -1, 1)} for rho in (0.5, 0.7))
    settings = _run("none", 0, 1e5, 0.3)["settings"]
    found = [
        {
            "correlation": {"cost": row, "rate": row},
            "checkpoint_of": settings,
            "branches": {"base": {}},
            "hardware": "h",
        }
        for row in rows
    ]
    assert evidence.report.predictions_table(found, []).splitlines()[2:] == [
        f"| {name} | 0.60 (0.50 to 0.70) | 0.50 (0.50 to 0.50) | -0.60 (-0.70 to -0.50) |  |"
        for name in ("cost", "rate")
    ]


def test_what_criteria_put_first_at_a_checkpoint_is_told_without_branches(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{small.name}.json").write_text("{}")  # the run is done, and a checkpoint is made all the same
    assert evidence.run.run(small, data, tmp_path, tmp_path, device="cpu", until=0.5) is None
    command = [str(tmp_path / f"{small.name}.pt"), "--data", str(data), "--seeds", "0", "--batches", "3"]
    command += ["--adapt", "0", "--strategies", "base", "drop 0.5", "--output", str(tmp_path), "--device", "cpu"]
    assert evidence.branches.main([*command, "--checkpoints", str(tmp_path)]) == 0
    (found,) = evidence.report.load_branches(tmp_path / "criteria")
    table = evidence.report.choices_table([found])
    assert table in capsys.readouterr().out
    _, _, line = table.splitlines()
    better = found["criteria"]["rate"]
    names = [name for name in found["criteria"] if name != "cost"]
    assert line.strip("| ").split(" | ")[3 + names.index("rate")] == max(better, key=better.get)
    assert found["criteria"]["CA-MSE"].keys() == {"base", "drop 0.5"}
    assert not found["branches"]
    assert "correlation" not in found


@pytest.mark.soak
def test_branches_go_on_from_a_checkpoint_and_are_not_done_twice(
    evidence: SimpleNamespace, small: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evidence.run.run(small, data, tmp_path, tmp_path, device="cpu", until=0.5) is None
    checkpoint = tmp_path / f"{small.name}.pt"
    state = torch.load(checkpoint, weights_only=True)
    command = [str(checkpoint), "--data", str(data), "--branch", "0.0006", "--batches", "3", "--adapt", "2"]
    command += ["--strategies", "base", "drop 0.5", "patch 8", "--output", str(tmp_path), "--device", "cpu"]
    command += ["--checkpoints", str(tmp_path)]
    assert evidence.branches.main([*command, "--seeds", "1"]) == 0
    (path,) = (tmp_path / "branches").glob("*.json")
    first = json.loads(path.read_text())
    assert first["progress"] == pytest.approx(0.5, abs=0.05)
    assert first["cost"] == {
        "base": 1.0,
        "drop 0.5": pytest.approx(0.63, abs=0.05),
        "patch 8": pytest.approx(0.3, abs=0.1),
    }
    for branch in first["branches"].values():
        assert branch["0"]["units"] == pytest.approx(600, rel=0.1)
    capsys.readouterr()
    assert evidence.branches.main([*command, "--seeds", "2"]) == 0
    done = [line for line in capsys.readouterr().out.splitlines() if "seed" in line]
    assert [line.partition(":")[0] for line in done] == ["base, seed 1", "drop 0.5, seed 1", "patch 8, seed 1"]
    second = json.loads(path.read_text())
    assert second["moments"] == first["moments"]
    assert len(second["correlation"]) == 1 + 2 * 2 * 3
    (kept,) = evidence.report.load_branches(tmp_path / "branches")
    told = evidence.report.branches_table(kept).splitlines()
    assert "plain" not in told[0]
    assert "2 branches for each strategy, judged on 8 held-out images" in told[0]
    assert [line.split(" | ")[0] for line in told[4:7]] == ["| base", "| drop 0.5", "| patch 8"]
    assert len(told) == 4 + 3 + 3 + 13
    alone = [*command[: command.index("base")], "drop 0.75", *command[command.index("--output") :]]
    assert evidence.branches.main([*alone, "--seeds", "1"]) == 0  # those before stay, and are compared with it
    third = json.loads(path.read_text())
    assert list(third["branches"]) == [*second["branches"], "drop 0.75"]
    assert third["criteria"]["rate"].keys() == third["cost"].keys() == third["branches"].keys()
    assert third["correlation"].keys() == second["correlation"].keys()
    point = evidence.branches.BranchPoint.of(state, evidence.images.load_images(data / "train", 16, 40, tmp_path))
    branch = point.branch(
        Strategy(0.5), 0.0006, 0, evidence.images.load_images(data / "train", 16, 40, tmp_path), torch.device("cpu")
    )
    rate = state["optimizer"]["param_groups"][0]["lr"]
    assert 0 < rate < small.lr
    assert branch.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    while branch.steps_done < branch.total_steps:
        branch.step()
    assert branch.optimizer.param_groups[0]["lr"] == pytest.approx(0.001 * rate, rel=0.5)
