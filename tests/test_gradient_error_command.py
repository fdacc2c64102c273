"""The command line: from checkpoints and a function to reports, pictures and a schedule in a folder."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from timm.models.vision_transformer import VisionTransformer

from seqcompress import GradientErrorReport, Schedule, Strategy, TrainingStep, compress, gradient_error
from seqcompress.gradients import command, plots
from seqcompress.gradients.command import main

# What a user would write. It imports what lies beside it, and notes every call.
TRAINING = """
from pathlib import Path
from queue import SimpleQueue

import torch
from models_of_command_test import small_vit

from seqcompress import TrainingStep

CALLS = []
STEPS = SimpleQueue()
COUNT = 3
INTERRUPT = False
RANDOM = False


def at(checkpoint: Path) -> TrainingStep:
    CALLS.append(checkpoint.name)
    vit = small_vit()
    vit.load_state_dict(torch.load(checkpoint))
    generator = None if RANDOM else torch.Generator().manual_seed(3)
    batches = torch.randn(COUNT, 4, 3, 16, 16, generator=generator)

    def step(views):
        STEPS.put(1)
        if INTERRUPT and checkpoint.name == "late.pt":
            raise KeyboardInterrupt
        return vit(views).sin().mean()

    return TrainingStep(vit, step, list(batches))


def endless(checkpoint: Path) -> TrainingStep:
    training = at(checkpoint)
    return TrainingStep(training.model, training.step, (batch for batch in training.batches))


def wrong(checkpoint: Path) -> str:
    return "loss"


def asleep(checkpoint: Path) -> TrainingStep:
    training = at(checkpoint)
    training.model.eval()
    return training


def unsupported(checkpoint: Path) -> TrainingStep:
    return TrainingStep(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, [])


constant = 3
"""

MODELS = """
from timm.models.vision_transformer import VisionTransformer


def small_vit() -> VisionTransformer:
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0)
"""

GRID = ("--token-dropout", "0.5", "0", "0.75", "--patch-size", "8", "4", "--batches", "3", "--cost", "flops")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a user's code and two checkpoints."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "training_of_command_test.py").write_text(TRAINING)
    (tmp_path / "code" / "models_of_command_test.py").write_text(MODELS)
    for name in ("early", "late"):
        torch.save(_vit().state_dict(), tmp_path / f"{name}.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("training_of_command_test", "models_of_command_test"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


@pytest.fixture
def undrawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where pictures stay empty: they take most of the time."""
    monkeypatch.setattr(plots, "draw_report", lambda report: None)
    monkeypatch.setattr(plots, "draw_stages", lambda reports, chosen: None)
    monkeypatch.setattr(plots, "save", lambda figure, path: Path(path).touch())
    return folder


@pytest.fixture
def training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The user's module, as the command will find it."""
    monkeypatch.syspath_prepend(folder / "code")
    return importlib.import_module("training_of_command_test")


def _vit() -> VisionTransformer:
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0)


def _arguments(*more: str, function: str = "code/training_of_command_test.py:at") -> list[str]:
    return [function, "--checkpoints", "0.5=late.pt", "0=early.pt", *GRID, "--output", "results", *more]


def _refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_one_command_writes_reports_pictures_and_a_schedule_that_compress_takes(folder: Path) -> None:
    arguments = [sys.executable, "-m", "seqcompress.gradients", *_arguments()]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = folder / "results"
    assert {path.name for path in results.iterdir()} == {
        *(f"stage-{progress}.{kind}" for progress in ("0", "0.5") for kind in ("json", "csv", "png")),
        *("analysis.json", ".analysis.lock", "schedule.json", "schedule.png", "summary.txt"),
    }
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in results.glob("*.png"))
    assert "stage 1 of 2, progress 0: early.pt" in done.stderr
    assert "stage 2 of 2, progress 0.5: late.pt" in done.stderr

    reports = {stage: GradientErrorReport.from_json(results / f"stage-{stage:g}.json") for stage in (0.0, 0.5)}
    grid = {Strategy(dropout, size) for dropout in (0.0, 0.5, 0.75) for size in (None, 8)}  # 4 is the model's own
    assert all(set(report.strategies) == grid for report in reports.values())
    with (results / "stage-0.csv").open(newline="") as file:
        assert [row["strategy"] for row in csv.DictReader(file)] == list(map(str, reports[0.0].strategies))
    summary = (results / "summary.txt").read_text(encoding="utf-8")
    assert done.stdout == summary
    assert all(str(report) in summary for report in reports.values())
    steps = sum(3 * sum(entry.cost for entry in report.entries) + 1 for report in reports.values())
    assert f"worth {steps:.0f} training steps" in summary

    vit = compress(_vit(), results / "schedule.json")
    assert isinstance(Schedule.from_json(results / "schedule.json"), Schedule)
    assert vit(torch.randn(2, 3, 16, 16)).shape == (2, 16)


def test_its_numbers_are_those_of_gradient_error_at_each_checkpoint(undrawn: Path, training: Any) -> None:
    assert main(_arguments("--seed", "5")) == 0
    for progress, name in (("0", "early.pt"), ("0.5", "late.pt")):
        step: TrainingStep = training.at(Path(name))
        strategies = [Strategy(0.5), Strategy(0.0, 8), Strategy(0.5, 8), Strategy(0.75), Strategy(0.75, 8)]
        expected = gradient_error(step.model, step.step, step.batches, strategies, cost="flops", seed=5)
        found = GradientErrorReport.from_json(f"results/stage-{progress}.json")
        assert found.base_norm2 == pytest.approx(expected.base_norm2, rel=1e-6)
        for strategy in strategies:
            assert found[strategy].cost == expected[strategy].cost
            assert found[strategy].bias2 == pytest.approx(expected[strategy].bias2, rel=1e-4)
            assert found[strategy].variance == pytest.approx(expected[strategy].variance, rel=1e-4)


def test_a_function_of_a_module_is_found_from_the_working_folder(
    undrawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(undrawn / "code")
    shutil.copy("../late.pt", ".")
    shutil.copy("../early.pt", ".")
    assert main(_arguments(function="training_of_command_test:at")) == 0
    assert (undrawn / "code" / "results" / "stage-0.json").is_file()


def test_stages_that_are_complete_are_read_back_and_new_ones_added(
    undrawn: Path, training: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments("--checkpoints", "0=early.pt")) == 0
    only = capsys.readouterr().out
    assert "One stage says nothing about the others" in only
    assert len(Schedule.from_json("results/schedule.json").strategies()) == 1
    measured = Path("results/stage-0.json").read_bytes()

    assert main(_arguments()) == 0
    assert training.CALLS == ["early.pt", "late.pt"]
    assert Path("results/stage-0.json").read_bytes() == measured
    both = capsys.readouterr()
    assert "progress 0: read back from results/stage-0.json" in both.err.replace(os.sep, "/")

    Path("results/stage-0.5.png").unlink()
    assert main(_arguments("--no-monotone")) == 0
    assert training.CALLS == ["early.pt", "late.pt"]
    assert Path("results/stage-0.5.png").is_file()
    assert "never become cheaper" not in capsys.readouterr().out


def test_stages_are_measured_again_on_demand_and_others_are_left_as_they_are(
    undrawn: Path, training: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments()) == 0
    measured = Path("results/stage-0.json").read_bytes()
    assert "32 does not suit" in _refusal(capsys, _arguments("--overwrite", "--patch-size", "32"))
    assert main(_arguments()) == 0
    assert training.CALLS == ["early.pt", "late.pt", "early.pt"]  # the last only to be asked for its model
    assert main(_arguments("--checkpoints", "0=early.pt", "--overwrite", "--seed", "1")) == 0
    assert Path("results/stage-0.json").read_bytes() != measured
    assert main(_arguments("--checkpoints", "0=early.pt", "--overwrite")) == 0
    assert Path("results/stage-0.json").read_bytes() == measured
    assert main(_arguments()) == 0
    assert training.CALLS == ["early.pt", "late.pt", "early.pt", "early.pt", "early.pt"]


@pytest.mark.parametrize("cost", ["flops", "measured"])
def test_what_the_analysis_took_is_counted_in_steps(
    undrawn: Path, training: Any, capsys: pytest.CaptureFixture[str], cost: str
) -> None:
    base_only = ("--token-dropout", "0", "--patch-size", "4", "--cost", cost)
    assert main(_arguments("--checkpoints", "early.pt", *base_only)) == 0
    assert f"worth {training.STEPS.qsize()} training steps" in capsys.readouterr().out
    assert Schedule.from_json("results/schedule.json")(0.0) == Strategy()


def test_an_interrupted_command_goes_on_after_the_stages_that_are_complete(
    undrawn: Path, training: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    training.INTERRUPT = True
    assert main(_arguments()) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {path.name for path in Path("results").iterdir()} == {
        ".analysis.lock",
        "analysis.json",
        "stage-0.json",
        "stage-0.csv",
        "stage-0.png",
    }
    training.INTERRUPT = False
    assert main(_arguments()) == 0
    assert training.CALLS == ["early.pt", "late.pt", "late.pt"]
    assert set(json.loads(Path("results/analysis.json").read_text())["stages"]) == {"0", "0.5"}


def test_random_batches_are_the_same_whatever_was_measured_before(undrawn: Path, training: Any) -> None:
    training.RANDOM = True
    assert main(_arguments()) == 0
    torch.manual_seed(99)
    assert main(_arguments("--checkpoints", "0.5=late.pt", "--output", "alone")) == 0
    assert Path("alone/stage-0.5.json").read_bytes() == Path("results/stage-0.5.json").read_bytes()


def test_a_stage_measured_with_other_settings_is_neither_used_nor_lost(
    undrawn: Path, training: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    early = ("--checkpoints", "early.pt")
    assert main(_arguments(*early)) == 0
    measured = Path("results/stage-0.json").read_bytes()
    for more, named in (
        (("--seed", "1"), "seed"),
        (("--batches", "2"), "batches"),
        (("--cost", "measured"), "cost"),
        (("--sketch", "64"), "sketch"),
        (("--token-dropout", "0.5"), "strategies"),
        (("--checkpoints", "late.pt"), "checkpoint_sha256"),
    ):
        refusal = _refusal(capsys, _arguments(*early, *more))
        assert f"stage-0.json was measured with other settings ({named})" in refusal
    assert "(function)" in _refusal(capsys, _arguments(*early, function="code/training_of_command_test.py:wrong"))
    assert Path("results/stage-0.json").read_bytes() == measured
    assert training.CALLS == ["early.pt"]


def test_files_of_an_earlier_command_that_cannot_be_read_are_named(
    undrawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments("--checkpoints", "early.pt")
    assert main(arguments) == 0
    Path("results/stage-0.json").write_text("{}")
    assert "stage-0.json': field 'seqcompress_gradient_error': is missing" in _refusal(capsys, arguments)
    Path("results/analysis.json").write_text('{"seqcompress_analysis": 1, "stages": {"0": 3}}')
    assert "analysis.json': field 'stages.0': must be an object" in _refusal(capsys, arguments)
    Path("results/analysis.json").write_text("[]")
    assert "analysis.json': must be a JSON object" in _refusal(capsys, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("at",), "FUNCTION: must be package.module:function or path/to/file.py:function, got 'at'"),
        (("code/missing.py:at",), "FUNCTION: there is no file code/missing.py"),
        (("missing.module:at",), "FUNCTION: there is no module missing.module"),
        (("code/training_of_command_test.py:missing",), "has no function missing"),
        (("code/training_of_command_test.py:constant",), "has no function constant"),
        (("code/training_of_command_test.py:wrong",), "FUNCTION: must return a TrainingStep, got '"),
        (("code/training_of_command_test.py:asleep",), "model must be in train mode"),
        (("code/training_of_command_test.py:unsupported",), "model must be a "),
        (("--patch-size", "32"), "strategies: patch 32 does not suit the model: "),
        (("code/training_of_command_test.py:endless", "--batches", "4"), "the training step has 3, got 4"),
        (("--batches", "4"), "--batches: the training step has 3, got 4"),
        (("--batches", "1"), "--batches: must be at least 2, got 1"),
        (("--token-dropout", "0", "1"), "--token-dropout: token_dropout must be in [0, 1), got 1.0"),
        (("--token-dropout", "much"), "--token-dropout: could not convert string to float: 'much'"),
        (("--patch-size", "0"), "--patch-size: must be at least 1, got 0"),
        (("--cost", "guessed"), "--cost: invalid choice: 'guessed'"),
        (("--seed", str(2**63)), "--seed: must be below 2**63"),
        (("--checkpoints", "0=missing.pt"), "--checkpoints: there is no file missing.pt"),
        (("--checkpoints", "1.5=late.pt"), "--checkpoints: progress must be in [0, 1], got 1.5"),
        (("--checkpoints", "nan=late.pt"), "--checkpoints: progress must be in [0, 1], got nan"),
        (("--checkpoints", "0=early.pt", "late.pt"), "must be PROGRESS=FILE where there are several, got late.pt"),
        (("--checkpoints", "0.5=early.pt", "0.50=late.pt"), "--checkpoints: progress 0.5 is there twice"),
        (("--output", "early.pt"), "--output: "),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    first, *more = arguments
    complete = _arguments(*arguments) if first.startswith("--") else _arguments(*more, function=first)
    assert message in _refusal(capsys, complete)
    assert not list(folder.glob("results/*"))


def test_a_file_named_like_another_module_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("code/json.py").write_text(TRAINING)
    assert "code/json.py needs another name: json is" in _refusal(capsys, _arguments(function="code/json.py:at"))


def test_a_checkpoint_may_have_an_equals_sign_in_its_name(undrawn: Path) -> None:
    shutil.copy("late.pt", "epoch=3.ckpt")
    assert main(_arguments("--checkpoints", "epoch=3.ckpt")) == 0
    assert main(_arguments("--checkpoints", "1=epoch=3.ckpt")) == 0
    assert {path.name for path in Path("results").glob("stage-*.json")} == {"stage-0.json", "stage-1.json"}


def test_an_error_in_the_users_own_code_keeps_its_traceback(folder: Path, training: Any) -> None:
    def broken(checkpoint: Path) -> TrainingStep:
        raise ValueError("no such weights")

    training.at = broken
    with pytest.raises(ValueError, match="no such weights"):
        main(_arguments())


def test_two_commands_measure_into_one_folder_at_once_and_neither_loses_its_stage(folder: Path) -> None:
    def arguments(stage: str) -> list[str]:
        return [sys.executable, "-m", "seqcompress.gradients", *_arguments("--checkpoints", stage)]

    stages = ("0=early.pt", "0.5=late.pt")
    settings = {"cwd": folder, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(arguments(stage), **settings) for stage in stages]
    assert [process.communicate(timeout=300)[1].count("Traceback") for process in both] == [0, 0]
    assert [process.returncode for process in both] == [0, 0]
    assert set(json.loads((folder / "results" / "analysis.json").read_text())["stages"]) == {"0", "0.5"}


def test_a_stage_that_another_command_has_completed_meanwhile_stays_written_down(
    undrawn: Path, training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = command._measured

    def slowly(function: Any, stage: Any, *others: Any) -> GradientErrorReport:
        report = measured(function, stage, *others)
        if stage.progress == 0:
            assert main(_arguments("--checkpoints", "0.5=late.pt")) == 0
        return report

    monkeypatch.setattr(command, "_measured", slowly)
    assert main(_arguments("--checkpoints", "0=early.pt")) == 0
    assert set(json.loads(Path("results/analysis.json").read_text())["stages"]) == {"0", "0.5"}


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_full_disk_is_one_line_and_loses_nothing(folder: Path) -> None:
    import resource

    def run(*more: str, room: int | None = None) -> subprocess.CompletedProcess[str]:
        limit = None if room is None else (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
        arguments = [sys.executable, "-m", "seqcompress.gradients", *_arguments("--checkpoints", "early.pt", *more)]
        return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300, preexec_fn=limit)

    assert run().returncode == 0
    names = {path.name for path in (folder / "results").iterdir()}
    before = (folder / "results" / "stage-0.json").read_bytes()
    writes_at_import = Version(torch.__version__) < Version("2.7")  # torch itself, 2,355 bytes
    full = run("--overwrite", room=3000 if writes_at_import else 1000)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert full.stderr.splitlines()[-1].startswith("python -m seqcompress.gradients: error: argument --output: ")
    assert (folder / "results" / "stage-0.json").read_bytes() == before
    assert {path.name for path in (folder / "results").iterdir()} == names


def test_a_checkpoint_that_is_a_folder_gets_its_own_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "sharded").mkdir()
    refusal = _refusal(capsys, _arguments("--checkpoints", "0=sharded"))
    assert "--checkpoints: sharded is a folder: a checkpoint must be one file" in refusal


def test_without_matplotlib_nothing_is_begun(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for module in ("gradients.plots", "training.pictures"):
        monkeypatch.delitem(sys.modules, f"seqcompress.{module}", raising=False)
    assert "plotting needs matplotlib: pip install 'seqcompress[plot]'" in _refusal(capsys, _arguments())
    assert not Path("results").exists()
