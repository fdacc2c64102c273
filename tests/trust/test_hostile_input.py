"""Whatever is read from files, checkpoints, configs and the command line: accepted, or a documented error."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PROGRAM = Path(__file__).with_name("hostile.py")


@pytest.fixture(scope="module")
def hostile() -> ModuleType:
    specification = importlib.util.spec_from_file_location("hostile_of_trust", PROGRAM)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@settings(max_examples=250)
@given(seed=st.integers(0, 2**32), rounds=st.integers(1, 4))
def test_a_changed_input_is_accepted_or_one_documented_error_and_reaches_nothing_outside(
    seed: int, rounds: int, hostile: ModuleType
) -> None:
    dice = random.Random(seed)
    kind, text = dice.choice(hostile.SEEDS)
    for _ in range(rounds):
        text = hostile.mutated(text, dice)
    hostile.feed(kind, text)


def test_every_reader_accepts_what_was_written_for_it(hostile: ModuleType) -> None:
    accepted = {kind for kind, text in hostile.SEEDS if hostile.feed(kind, text)}
    assert accepted == set(hostile.READERS)


def test_the_watch_sees_a_file_and_a_module_that_an_input_names(hostile: ModuleType) -> None:
    with pytest.raises(hostile.Reached, match="open"), hostile._watched(f"see {PROGRAM}"):
        PROGRAM.read_text()
    sys.modules.pop("this", None)
    with pytest.raises(hostile.Reached, match="this"), hostile._watched("see this"), redirect_stdout(None):
        importlib.import_module("this")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_minutes_of_fuzzing_find_nothing(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, PROGRAM, "600"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    counts = json.loads((tmp_path / "counts.json").read_text())
    print(ended.stdout.split()[0], counts)
    assert counts["inputs"] > 10_000
    assert counts["peak_mib"] < 2048
