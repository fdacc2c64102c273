"""What a plan does to a model over a run, before it is run: as numbers, as a picture, and on the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from seqcompress import Budget, SequenceScheduler, Strategy, compress, plot_schedule, relative_cost
from seqcompress.command import main
from seqcompress.gradients import command
from seqcompress.schedules import Cosine, Linear, Schedule, Stepwise
from seqcompress.training.forecast import cost_map, forecast

MODELS = """
import torch
from timm.models.vision_transformer import VisionTransformer


def vit():
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)


def linear():
    return torch.nn.Linear(2, 2)


def text():
    return "vit"


def broken():
    raise ValueError("no such weights")


constant = 3
"""
FOUR_STAGES = Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy(0.0, 16), 0.75: Strategy(0.5), 0.95: Strategy()})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a user's models."""
    (tmp_path / "models_of_plan_test.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "models_of_plan_test", raising=False)
    return tmp_path


MODEL = "models_of_plan_test.py:vit"


def _refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()[-1]


def test_a_run_is_foreseen_as_it_is_then_counted(tiny_vit: Callable[..., VisionTransformer]) -> None:
    student, teacher = tiny_vit(), tiny_vit()
    expected = forecast(FOUR_STAGES, student, teacher=teacher, total_steps=20)
    assert [(stage.first, stage.steps, str(stage.strategy)) for stage in expected.stages] == [
        (0, 10, "drop 0.5, patch 16"),
        (10, 5, "patch 16"),
        (15, 4, "drop 0.5"),
        (19, 1, "base"),
    ]
    assert [stage.tokens for stage in expected.stages] == [3, 5, 9, 17]
    assert [stage.teacher_tokens for stage in expected.stages] == [5, 5, 17, 17]

    compress(student, FOUR_STAGES, teacher=teacher)
    scheduler, budget = SequenceScheduler(student, total_steps=20), Budget(student)
    for _ in range(20):
        views = torch.zeros(2, 3, 32, 32)
        student.train()(views).sum().backward()
        with torch.no_grad():
            teacher.train()(views)
        scheduler.step()
    assert expected.share == pytest.approx(budget.units / (20 * 2 * 4), rel=1e-9)
    assert expected.plain_steps == pytest.approx(20 * expected.share)


@pytest.mark.parametrize("total_steps", [1, 3, 999, 1_000_003])
@pytest.mark.parametrize(
    "plan", [FOUR_STAGES, Linear(Strategy(0.75), Strategy()), Cosine(Strategy(0.9, 16), Strategy())]
)
def test_stages_of_a_forecast_are_the_schedules(
    tiny_vit: Callable[..., VisionTransformer], plan: Schedule, total_steps: int
) -> None:
    run = forecast(plan, tiny_vit(), total_steps=total_steps)
    assert run.stages[0].first == 0
    assert sum(stage.steps for stage in run.stages) == total_steps
    for before, after in pairwise(run.stages):
        assert before.first + before.steps == after.first
        assert plan.at_step(after.first, total_steps) == after.strategy
        assert plan.at_step(after.first - 1, total_steps) != after.strategy
    assert len(str(run).splitlines()) <= 20
    if isinstance(plan, Linear) and total_steps > 3:  # the mean of a straight line, but for what is quadratic in tokens
        assert run.share == pytest.approx(0.5 * (1 + relative_cost(tiny_vit(), Strategy(0.75), 32)), abs=0.02)


def test_the_cost_map_has_the_costs_of_its_strategies(tiny_vit: Callable[..., VisionTransformer]) -> None:
    vit = tiny_vit()
    grid = cost_map(vit, [0.5, 0.0])
    assert (grid.dropouts, grid.sizes) == ((0.0, 0.5), (8, 16, 32))
    assert grid.tokens == ((17, 5, 2), (9, 3, 2))
    for dropout, costs in zip(grid.dropouts, grid.costs, strict=True):
        assert list(costs) == [relative_cost(vit, Strategy(dropout, size), 32) for size in grid.sizes]
    assert str(grid).splitlines()[2].split() == ["patch", "8", "patch", "16", "patch", "32"]


def test_plot_schedule_draws_tokens_and_costs_and_writes_a_picture(
    tiny_vit: Callable[..., VisionTransformer], tmp_path: Path
) -> None:
    vit = tiny_vit()
    figure = plot_schedule(FOUR_STAGES, vit, tmp_path / "plan.png", teacher=tiny_vit(), total_steps=200)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    tokens, costs = figure.axes
    drawn = {patch.get_label(): patch.get_data() for patch in tokens.patches}
    assert list(drawn["student"].values) == [3, 5, 9, 17]
    assert list(drawn["student"].edges) == [0, 100, 150, 190, 200]
    assert list(drawn["teacher"].values) == [5, 5, 17, 17]
    assert [text.get_text().strip() for text in tokens.texts] == list(map(str, FOUR_STAGES.strategies()))
    (steps,) = costs.patches
    run = forecast(FOUR_STAGES, vit, teacher=tiny_vit(), total_steps=200)
    assert list(steps.get_data().values) == [stage.cost for stage in run.stages]
    assert f"{run.share:.1%}" in figure.get_suptitle()

    without_steps = plot_schedule("default", vit)
    assert without_steps.axes[1].get_xlim() == (0, 1)
    assert "teacher" not in {patch.get_label() for patch in without_steps.axes[0].patches}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"plan": {0.0: "report"}}, TypeError, "plan must be a Strategy or a Schedule"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model must be a supported ViT"),
        ({"teacher": torch.nn.Linear(1, 1)}, TypeError, "teacher must be a supported ViT"),
        ({"plan": Strategy(0, 64)}, ValueError, "model: "),
        ({"total_steps": 0}, ValueError, "total_steps must be a whole number of at least 1, got 0"),
        ({"total_steps": 1.5}, TypeError, "total_steps must be a whole number, got 1.5"),
    ],
)
def test_plot_schedule_says_what_is_wrong_and_writes_nothing(
    tiny_vit: Callable[..., VisionTransformer], tmp_path: Path, arguments: dict[str, Any], error: Any, message: str
) -> None:
    everything = {"plan": "default", "model": tiny_vit(), "path": tmp_path / "plan.png", **arguments}
    with pytest.raises(error, match=f"^{message}"):
        plot_schedule(everything.pop("plan"), everything.pop("model"), **everything)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_plan_and_draws_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FOUR_STAGES.to_json("plan.json")
    assert main(["plan", MODEL, "plan.json", "--steps", "2000", "--teacher", "--output", "plan.png"]) == 0
    printed = capsys.readouterr().out
    run = forecast(FOUR_STAGES, _vit(), teacher=_vit(), total_steps=2000)
    rows = [line.split() for line in printed.splitlines()[3:7]]
    assert rows[0] == ["0", "1,000", "drop", "0.5,", "patch", "16", "3", "5", f"{run.stages[0].cost:.3f}"]
    assert rows[3] == ["1,900", "100", "base", "17", "17", "1.000"]
    assert f"In all: {run.share:.1%} of the plain run's budget ({1 / run.share:.2f}x less)" in printed
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, printed.splitlines())) <= 120


def test_the_command_prints_the_cost_map_and_draws_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("--token-dropout", "0", "0.5", "--patch-size", "8", "16")
    assert main(["cost", MODEL, *grid, "--output", "cost.svg"]) == 0
    assert capsys.readouterr().out == f"{cost_map(_vit(), [0.0, 0.5], [8, 16])}\n"
    assert "<svg" in Path("cost.svg").read_text()


def test_models_of_timm_are_named_and_may_have_another_image_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "vit_tiny_patch16_224", "drop 0.5", "--image-size", "96"]) == 0
    assert "views of 96 px; a plain view has 37 tokens" in capsys.readouterr().out


def test_both_entries_of_gradients_are_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    helps = []
    for entry, arguments in ((main, ["gradients", "--help"]), (command.main, ["--help"])):
        with pytest.raises(SystemExit) as stopped:
            entry(arguments, prog="a name")
        assert stopped.value.code == 0
        helps.append(capsys.readouterr().out.partition("\n\n")[2])
    assert helps[0] == helps[1]
    assert "--checkpoints" in helps[0]

    words = [sys.executable, "-m", "seqcompress", "gradients", "at"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("python -m seqcompress gradients: error: argument FUNCTION: must be")


def test_nothing_draws_before_a_picture_is_asked_for() -> None:
    code = (
        "import sys, seqcompress, seqcompress.command\n"
        "heavy = [name for name in ('torch', 'timm') if name in sys.modules]\n"
        "seqcompress.command.main(['cost', 'vit_tiny_patch16_224'])\n"
        "seqcompress.plot_schedule, seqcompress.plot_gradient_error\n"
        "assert not heavy and 'matplotlib' not in sys.modules, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "vit_smal_patch16_224"], "MODEL: timm has no model 'vit_smal_patch16_224'; did you mean vit_small_"),
        (["plan", "models_of_plan_test.py"], "path/to/file.py:function; got the file models_of_plan_test.py"),
        (["plan", "missing.py:vit"], "MODEL: there is no file missing.py"),
        (["plan", "models_of_plan_test:missing"], "MODEL: models_of_plan_test has no function missing"),
        (["plan", "models_of_plan_test:constant"], "MODEL: models_of_plan_test has no function constant"),
        (["plan", "models_of_plan_test:text"], "models_of_plan_test:text must return a torch.nn.Module, got 'vit'"),
        (["plan", "models_of_plan_test:linear"], "MODEL: model must be a supported ViT, got "),
        (["plan", "resnet18"], "MODEL: model must be a supported ViT, got "),
        (["plan", MODEL, "--image-size", "32"], "--image-size: is for a model of timm's"),
        (
            ["plan", MODEL, "weak"],
            "PLAN for this MODEL: plan must be one of 'default', 'gentle', 'strong', 'online', a strategy",
        ),
        (["plan", MODEL, "plan.json"], "PLAN: schedule file 'plan.json' does not exist"),
        (["plan", MODEL, "patch 64"], "PLAN for this MODEL: model: "),
        (["plan", MODEL, "--steps", "0"], "--steps: must be at least 1, got 0"),
        (["plan", MODEL, "--steps", "many"], "--steps: invalid whole number value: 'many'"),
        (["plan", MODEL, "--batch", "3"], "unrecognized arguments: --batch 3"),
        (["plan", MODEL, "--output", "plan.txt"], ".webp, got 'plan.txt'"),
        (["plan", MODEL, "--output", "missing/plan.png"], "--output: there is no folder missing"),
        (["cost", MODEL, "--token-dropout", "1"], "this grid for this MODEL: token_dropout must be in [0, 1), got 1.0"),
        (["cost", MODEL, "--patch-size", "4"], "model: patch_size must be at least the encoder's own, 8, got 4"),
        (["draw"], "invalid choice: 'draw'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in _refusal(capsys, arguments)


def test_a_picture_that_cannot_be_drawn_or_written_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plan.png").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["plan", MODEL, "--output", "plan.png"])
    assert stopped.value.code == 1
    assert "plan: error: argument --output: " in capsys.readouterr().err.splitlines()[-1]

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "seqcompress.training.pictures", raising=False)
    refusal = _refusal(capsys, ["plan", MODEL, "--output", "other.png"])
    assert refusal.endswith("--output: plotting needs matplotlib: pip install 'seqcompress[plot]'")


def test_an_error_in_the_users_own_code_keeps_its_traceback(folder: Path) -> None:
    with pytest.raises(ValueError, match="no such weights"):
        main(["plan", "models_of_plan_test.py:broken"])


def _vit() -> VisionTransformer:
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)


@pytest.mark.parametrize("total_steps", [90_000, 1_000_000])
def test_stages_that_follow_each_other_at_once_are_all_seen(
    tiny_vit: Callable[..., VisionTransformer], total_steps: int
) -> None:
    plan = Stepwise({0.0: Strategy(0.5), 0.50001: Strategy(0.9), 0.50005: Strategy()})
    last = forecast(plan, tiny_vit(), total_steps=total_steps).stages[-1]
    assert (last.strategy, last.steps) == (Strategy(), pytest.approx(total_steps / 2, rel=1e-3))


def test_a_model_that_cannot_be_compressed_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "beit_base_patch16_224"])
    assert "model must be a supported ViT, got a Beit" in capsys.readouterr().err
