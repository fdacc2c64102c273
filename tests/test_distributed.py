"""Two processes that train together: the same strategy at the same step, different random subsets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seqcompress import Stepwise, Strategy

STAGES = Stepwise({0.0: Strategy(0.5), 0.5: Strategy(0.25), 0.75: Strategy()})
WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes under DistributedDataParallel saw."""
    folder = tmp_path_factory.mktemp("ranks")
    commands = [[sys.executable, str(WORKER), str(rank), str(folder)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_all_ranks_follow_the_count_of_the_first(ranks: list[dict[str, Any]]) -> None:
    expected = [str(STAGES(step / 8)) for step in range(1, 9)]
    assert ranks[0]["strategies"] == ranks[1]["strategies"] == expected
    assert ranks[0]["last_step"] == ranks[1]["last_step"] == 8


def test_ranks_of_one_seed_draw_different_subsets(ranks: list[dict[str, Any]]) -> None:
    subsets = [tuple(patches) for rank in ranks for patches in rank["subsets"]]
    assert [len(set(patches)) for patches in subsets] == [8] * 8
    assert len(set(subsets)) == 8


def test_weights_stay_the_same_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["weights"] == ranks[1]["weights"]
