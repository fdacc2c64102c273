"""solo-learn's own script, killed by SIGKILL, goes on where its last checkpoint was."""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

EPOCHS, STEPS = 8, 2  # of an epoch

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        importlib.util.find_spec("solo") is None,
        reason="solo-learn is not on the path: its source cannot be had from the package index",
    ),
]


def _started(pictures: Path, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    package = importlib.util.find_spec("solo")
    assert package is not None
    source = Path(package.origin or "").parents[1]
    command = [
        *(sys.executable, source / "main_pretrain.py"),
        *("--config-path", source / "scripts" / "pretrain" / "cifar", "--config-name", "mocov3"),
        *("wandb.enabled=false", "data.dataset=custom", f"data.train_path={pictures}", "data.val_path=null"),
        *("data.num_workers=0", "optimizer.batch_size=4", "++scheduler.warmup_epochs=0", f"max_epochs={EPOCHS}"),
        *("devices='1'", "accelerator=cpu", "strategy=auto", "precision=32", "sync_batchnorm=false"),
        *("method_kwargs.proj_hidden_dim=64", "method_kwargs.pred_hidden_dim=64", "++log_every_n_steps=1"),
        *("backbone.name=vit_tiny", "++backbone.kwargs.img_size=32", "++backbone.kwargs.patch_size=8"),
        *("checkpoint.enabled=true", f"++checkpoint.dir={folder}", "++checkpoint.frequency=1"),
        *("auto_resume.enabled=false", f"++default_root_dir={folder}", "++seqcompress.enabled=true"),
        *overrides,
    ]
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    with (folder / "out.txt").open("w") as out:
        return subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, stdout=out, stderr=out, text=True)


def _logged(folder: Path) -> list[tuple[int, float, float]]:
    """Step, tokens and budget of each that was logged."""
    rows: list[tuple[int, float, float]] = []
    for file in sorted(folder.glob("lightning_logs/*/metrics.csv")):
        with file.open(newline="") as lines:
            rows += [
                (int(row["step"]), float(row["seqcompress/tokens"]), float(row["seqcompress/budget"]))
                for row in csv.DictReader(lines)
                if row.get("seqcompress/tokens")
            ]
    if not rows:
        pytest.skip("Lightning logs to TensorBoard where that is installed, and solo-learn's script lets it choose")
    return rows


def test_a_killed_run_of_its_script_has_the_tokens_and_the_budget_of_one_that_was_not(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for label in range(2):
        (pictures / str(label)).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (40, 40), (60 * index, 120 * label, 90)).save(pictures / str(label) / f"{index}.png")
    folders = [tmp_path / name for name in ("whole", "killed", "resumed")]
    for folder in folders:
        folder.mkdir()
    whole, killed, resumed = folders

    assert _started(pictures, whole).wait(timeout=300) == 0, (whole / "out.txt").read_text()[-3000:]
    expected = _logged(whole)
    assert [step for step, _, _ in expected] == list(range(EPOCHS * STEPS))

    process, deadline = _started(pictures, killed), time.monotonic() + 300
    while process.poll() is None and not list(killed.rglob("*ep=3.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (killed / "out.txt").read_text()[-3000:]
    # The last one that is whole: the kill may have struck while the next was written.
    (checkpoint,) = killed.rglob("*ep=2.ckpt")

    run = _started(pictures, resumed, f"++resume_from_checkpoint='{checkpoint}'")
    assert run.wait(timeout=300) == 0, (resumed / "out.txt").read_text()[-3000:]
    found = _logged(resumed)
    assert [row[:2] for row in found] == [row[:2] for row in expected if row[0] >= 3 * STEPS]
    assert found[-1][2] == pytest.approx(expected[-1][2], rel=1e-6)
