"""What a user starts from must run: the script for every method, the notebooks from first cell to last."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from seqcompress import GradientErrorReport, Strategy
from seqcompress.schedules import Constant, Schedule, Stepwise

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ("--epochs", "2", "--images", "96", "--batch-size", "16", "--num-workers", "0")


def quickstart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--output", str(folder / "output"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def results(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    done = quickstart(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "output" / "results.json").read_text(encoding="utf-8")), done.stdout


def idx_files(folder: Path, *, gzipped: bool, images: int = 40) -> None:
    """Files as Fashion-MNIST's, with noise in them."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part in ("train", "t10k"):
        for kind, content in (
            ("images-idx3", random.integers(0, 256, (images, 28, 28))),
            ("labels-idx1", np.arange(images) % 10),
        ):
            header = b"\0\0\x08" + bytes([content.ndim]) + np.array(content.shape, dtype=">u4").tobytes()
            data = header + content.astype(np.uint8).tobytes()
            path = folder / f"{part}-{kind}-ubyte{'.gz' if gzipped else ''}"
            path.write_bytes(gzip.compress(data) if gzipped else data)


@pytest.mark.parametrize(
    ("method", "units_per_image"),
    # Students' views cost 3 units, teachers' 1. DINO's 16 px views are a quarter of the patches, and a little more
    # or less of the FLOPs.
    [
        ("moco", 2 * 3 + 2),
        pytest.param("simclr", 2 * 3, marks=pytest.mark.soak),
        pytest.param("dino", pytest.approx(2 * 3 + 2 + 4 * 3 / 4, rel=0.03), marks=pytest.mark.soak),
    ],
)
def test_quickstart_compares_a_plain_and_an_accelerated_run(tmp_path: Path, method: str, units_per_image: Any) -> None:
    scaling = ["--scale-views"] if method == "simclr" else []
    content, printed = results(tmp_path, *TINY, "--method", method, *scaling)
    plain, accelerated = content["runs"]["plain"], content["runs"]["accelerated"]

    assert plain["curve"][-1]["units"] / (2 * 96) == units_per_image
    assert accelerated["curve"][-1]["units"] < 0.6 * plain["curve"][-1]["units"]
    assert accelerated["tokens_per_view"] < 0.6 * plain["tokens_per_view"]
    for run in (plain, accelerated):
        assert [point["epoch"] for point in run["curve"]] == [0, 1, 2]
        for spent in ("units", "seconds"):
            values = [point[spent] for point in run["curve"]]
            assert values[0] == 0
            assert values == sorted(set(values))
        for accuracy in (run["linear_probe"], *(point["knn"] for point in run["curve"])):
            assert 0.1 < accuracy <= 1.0
        assert f"{run['curve'][-1]['units'] / 1e6:.4f}" in printed
        assert f"{run['linear_probe']:.3f}" in printed
    assert plain["curve"][0]["knn"] == accelerated["curve"][0]["knn"]
    assert "8 x 8 pixels enlarged" in printed
    assert content["hardware"]["torch_threads"] == 1  # the model is too small for more
    assert (tmp_path / "output" / "accuracy_over_cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("folder", "gzipped"), [(".", True), pytest.param("FashionMNIST/raw", False, marks=pytest.mark.soak)]
)
def test_quickstart_reads_fashion_mnist_in_either_layout(tmp_path: Path, folder: str, gzipped: bool) -> None:
    idx_files(tmp_path / "idx" / folder, gzipped=gzipped)
    content, printed = results(
        tmp_path, "--data", "fashion-mnist", "--data-dir", str(tmp_path / "idx"), "--plan", "strong",
        "--epochs", "1", "--batch-size", "20", "--num-workers", "0",
    )  # fmt: skip
    assert content["runs"]["plain"]["tokens_per_view"] == 1 + 7 * 7
    assert content["runs"]["plain"]["curve"][-1]["units"] == 8 * 40
    assert "enlarged" not in printed


def test_the_report_compares_only_the_ends_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from evaluation import Point
    from report import Report, Run

    def report(on_the_way: float, end: float) -> Report:
        plain = [Point(0, 0, 0, 0.4), Point(1, 1e6, 10, 0.6), Point(2, 2e6, 20, 0.8)]
        fast = [Point(0, 0, 0, 0.4), Point(1, 0.25e6, 5, on_the_way), Point(2, 0.5e6, 8, end)]
        runs = Run("plain", "base", plain, 65.0, 0.85), Run("accelerated", "default", fast, 17.0, end)
        return Report("a title", *runs, note="", arguments={})

    better = report(0.7, 0.9)
    assert "no less accurate, for 1/4.0 of the budget and 1/2.5 of the time" in better.verdict()
    assert "less accurate in k-NN" in report(0.95, 0.75).verdict()
    assert report(0.3, 0.9).table() == report(0.95, 0.9).table()
    assert [line.split() for line in better.table().splitlines()[4:8]] == [
        ["k-NN", "accuracy", "at", "the", "end", "0.800", "0.900"],
        ["linear-probe", "accuracy", "at", "the", "end", "0.850", "0.900"],
        ["budget", "(M", "units)", "2.0000", "0.5000", "4.0x", "less"],
        ["wall-clock", "of", "training", "(s)", "20.0", "8.0", "2.5x", "less"],
    ]

    figure = better.figure()
    over_budget, over_time = figure.axes
    assert over_budget.get_xlabel() == "budget (M units)"
    assert over_time.get_xlabel() == "wall-clock of training (s)"
    assert "1 unit: one forward pass of the uncompressed encoder on one view" in figure.get_supxlabel()
    for axis, ends in ((over_budget, [2.0, 0.5]), (over_time, [20, 8])):
        marked = [line.get_xydata().tolist() for line in axis.lines if not line.get_label().startswith("_")]
        assert marked == [[[ends[0], 0.8]], [[ends[1], 0.9]]]


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--data", "fashion-mnist"], "--data-dir"),
        (["--data-dir", "."], "--data-dir"),
        (["--data", "fashion-mnist", "--data-dir", "nowhere"], "--data-dir"),
        (["--method", "byol"], "--method"),
        (["--plan", "fast"], "--plan"),
        (["--plan", "nowhere.json"], "--plan"),
        (["--epochs", "0"], "--epochs"),
        (["--images", "99999"], "--images"),
        (["--batch-size", "many"], "--batch-size"),
        (["--images", "10", "--batch-size", "16"], "--batch-size"),
        (["--seed", "-1"], "--seed"),
        (["--device", "abacus"], "--device"),
        (["--method", "dino", "--scale-views"], "--scale-views"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_answered_with_one_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    flag: str,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    import quickstart

    with pytest.raises(SystemExit, match="2"):
        quickstart.parsed(arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert f"argument {flag}:" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_with_patches_larger_than_a_local_view_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import quickstart

    plan = tmp_path / "plan.json"
    Constant(Strategy(patch_size=20)).to_json(plan)
    chosen = ["--plan", str(plan), "--output", str(tmp_path / "output")]
    arguments, _ = quickstart.parsed([*chosen, "--method", "moco"])
    assert arguments.plan == str(plan)
    with pytest.raises(SystemExit, match="2"):
        quickstart.parsed([*chosen, "--method", "dino"])
    assert "argument --plan: patch_size must not be larger than a side of the view" in capsys.readouterr().err


def executed(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Outputs of a notebook's cells."""
    monkeypatch.setenv("SEQCOMPRESS_TINY", "1")
    notebook = nbformat.read(path, as_version=4)

    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize(
    ("path", "units_per_image"),
    [("lightly_moco", 8), ("lightly_dino", 11), pytest.param("lightly_simclr", 6, marks=pytest.mark.soak)],
)
def test_notebook_shows_a_plain_run_beside_the_accelerated_one(
    path: str, units_per_image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = executed(EXAMPLES / f"{path}.ipynb", monkeypatch)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    printed = [line.split() for output in outputs for line in output.get("text", "").splitlines()]
    ((_, *plain),) = [[words[0], *map(float, words[1:])] for words in printed if words[:1] == ["plain"]]
    ((_, *fast),) = [[words[0], *map(float, words[1:])] for words in printed if words[:1] == ["accelerated"]]
    tokens, units, seconds, knn, linear = zip(plain, fast, strict=True)
    assert tokens[0] == 1 + 8 * 8
    assert tokens[1] < 0.65 * tokens[0]
    # 2 epochs of 160 images; the table rounds to 0.0001 M units
    assert units[0] == pytest.approx(2 * 160 * units_per_image / 1e6, abs=2e-4)
    assert 0 < units[1] < 0.7 * units[0]
    assert min(seconds) > 0
    assert all(0.1 < accuracy <= 1.0 for accuracy in (*knn, *linear))
    ((_, budget_saved, *_, time_saved, _, _, _),) = [words for words in printed if words[:1] == ["saved:"]]
    assert float(budget_saved.rstrip("%")) == pytest.approx(100 * (1 - units[1] / units[0]), abs=4)  # of rounded units
    assert float(time_saved.rstrip("%")) == pytest.approx(100 * (1 - seconds[1] / seconds[0]), abs=4)


@pytest.fixture
def solo_learn() -> Path:
    """The repository of solo-learn, with its scripts and configs."""
    solo = importlib.util.find_spec("solo")
    if solo is None or solo.origin is None:
        pytest.skip("solo-learn is not installed; its repository on PYTHONPATH is enough")
    repository = Path(solo.origin).parent.parent
    if not (repository / "main_pretrain.py").is_file():
        pytest.skip("solo-learn is installed without main_pretrain.py; put its repository on PYTHONPATH")
    return repository


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_show_what_they_gave_at_full_size(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)], "execute it whole, from the start"
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    printed = "\n".join(output.get("text", "") for output in outputs)
    assert re.search(r"^plain .*\d", printed, re.MULTILINE)
    assert re.search(r"^accelerated .*\d", printed, re.MULTILINE)
    assert not re.search(r"/(home|root|tmp|work|Users)/", printed)
    assert path.stat().st_size < 400_000


def test_the_command_on_the_page_on_solo_learn_trains_on_a_folder_of_images(solo_learn: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(4):
            pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{index}.png")

    page = (EXAMPLES.parent / "docs" / "solo-learn.md").read_text(encoding="utf-8")
    command = re.findall(r"```sh\n.*?^python3 (main_pretrain.py .*?)```", page, re.DOTALL | re.MULTILINE)[0]
    arguments = shlex.split(command.replace("\\\n", " ").replace("/path/to/images", str(tmp_path)))
    small = ["backbone.name=vit_tiny", "optimizer.batch_size=4", "max_epochs=1", "data.num_workers=0"]
    heads = [f"method_kwargs.{part}=64" for part in ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim")]
    here = ["accelerator=cpu", "precision=32", "checkpoint.enabled=false", f"++default_root_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments, *small, *heads, *here, "auto_resume.enabled=false"],
        cwd=solo_learn, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "drop 0.5, patch 32 (25 tokens a view)" in done.stdout
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        budget = [float(row["seqcompress/budget"]) for row in csv.DictReader(file) if row["seqcompress/budget"]]
    assert 0 < budget[-1] < 0.9 * 8 * 8 / 1e6  # of 8 units for each of 8 images


def test_solo_learn_notebook_runs_the_recipe_plain_and_accelerated(
    solo_learn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLO_LEARN", str(solo_learn))

    outputs = executed(EXAMPLES / "solo_learn.ipynb", monkeypatch)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = [line for output in outputs for line in output.get("text", "").splitlines()]
    (plain,) = [line.split() for line in printed if line.startswith("plain")]
    (accelerated,) = [line.split() for line in printed if line.startswith("accelerated")]
    # Six steps of 16 images, and 8 units an image. The table rounds to 0.0001 M units.
    assert float(plain[1]) == pytest.approx(6 * 16 * 8 / 1e6, abs=1e-4)
    assert float(accelerated[1]) < 0.6 * float(plain[1])
    assert int(plain[2]) == 1 + 7 * 7


def test_hugging_face_notebook_trains_dinov3_plain_and_accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = executed(EXAMPLES / "hugging_face_dinov3.ipynb", monkeypatch)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    printed = [line for output in outputs for line in output.get("text", "").splitlines()]
    (plain,) = [line.split() for line in printed if line.startswith("plain")]
    (accelerated,) = [line.split() for line in printed if line.startswith("accelerated")]
    assert float(plain[1]) == 1 + 4 + 8 * 8
    assert float(accelerated[1]) < 0.65 * float(plain[1])
    assert float(plain[2]) == pytest.approx(2 * 160 * 6 / 1e6, abs=1e-4)  # the table rounds to 0.0001 M units
    assert 0 < float(accelerated[2]) < 0.7 * float(plain[2])
    assert all(0.1 < float(accuracy) <= 1 for accuracy in (*plain[4:], *accelerated[4:]))
    assert "True" in printed  # loads as it was saved
    assert not any("'loss':" in line for line in printed)


def test_gradient_error_notebook_finds_a_schedule_and_trains_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = executed(EXAMPLES / "gradient_error.ipynb", monkeypatch)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = [line for output in outputs for line in output.get("text", "").splitlines()]
    assert [line.split(":")[0] for line in printed if line.startswith("from ")] == ["from 0", "from 1"]
    (units,) = [line for line in printed if line.endswith("without compression")]
    spent, plain = int(units.split()[0]), int(units.split()[-3])
    assert plain == 2 * 3 * 32 * 8  # epochs x steps x images x units an image
    assert 0 < spent <= plain


@pytest.mark.soak
def test_stages_are_checkpoints_that_the_analysis_can_start_from(tmp_path: Path) -> None:
    arguments = ("--epochs", "2", "--images", "64", "--batch-size", "16", "--method", "dino", "--output", "stages")
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    done = run([sys.executable, str(EXAMPLES / "stages.py"), *arguments])
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == [
        "0.25.pt",
        "0.5.pt",
        "0.75.pt",
        "0.pt",
        "1.pt",
    ]
    command = [sys.executable, "-m", "seqcompress.gradients", f"{EXAMPLES / 'stages.py'}:at"]
    checkpoints = ["--checkpoints", "0=stages/0.pt", "1=stages/1.pt"]
    grid = ["--token-dropout", "0.5", "--patch-size", "4", "8", "--batches", "3", "--output", "found"]
    done = run([*command, *checkpoints, *grid])
    assert done.returncode == 0, done.stderr
    report = GradientErrorReport.from_json(tmp_path / "found" / "stage-1.json")
    assert report.strategies == (Strategy(), Strategy(0.5), Strategy(0.5, 8))
    assert report[Strategy(0.5, 8)].cost < report[Strategy(0.5)].cost < 1
    assert Schedule.from_json(tmp_path / "found" / "schedule.json")(0.0) in report


@pytest.mark.parametrize(
    ("plan", "found"),
    [(("--plan", "strong"), None), (("--online", "drop 0.5, patch 8"), Stepwise({0.0: Strategy(0.5, 8)}))],
)
def test_stages_of_an_accelerated_run_are_kept_too(
    tmp_path: Path, plan: tuple[str, str], found: Schedule | None
) -> None:
    arguments = ("--epochs", "1", "--images", "32", "--batch-size", "16", "--method", "simclr", "--output", "stages")
    command = [sys.executable, str(EXAMPLES / "stages.py"), *arguments, *plan]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "stages" / "1.pt").is_file()
    if found is not None:  # two steps are too few for a decision
        assert Schedule.from_json(tmp_path / "stages" / "schedule.json") == found


def test_there_is_a_notebook_for_each_way_in() -> None:
    names = [path.stem for path in sorted(EXAMPLES.glob("*.ipynb"))]
    ways = ["gradient_error", "hugging_face_dinov3", "lightly_dino", "lightly_moco", "lightly_simclr", "solo_learn"]
    assert names == ways


def test_what_the_quickstart_writes_is_no_part_of_the_repository() -> None:
    output = EXAMPLES.parent / "quickstart-output" / "results.json"
    command = ["git", "check-ignore", "--quiet", "--no-index", str(output)]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip(f"no git repository here: {done.stderr.strip()}")
    assert done.returncode == 0
