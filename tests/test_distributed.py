"""Two processes that train together: the same strategy at the same step, different random subsets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seqcompress import Stepwise, Strategy

STAGES = Stepwise({0.0: Strategy(0.5), 0.5: Strategy(0.25), 0.75: Strategy()})
WORKER = Path(__file__).with_name("distributed_worker.py")
SHARDED_WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[str]]) -> list[dict[str, Any]]:
    """What each of two processes under DistributedDataParallel saw."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(*([sys.executable, WORKER, rank, folder] for rank in range(2)))
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


def test_the_ranks_of_a_test_return_what_they_print(run_ranks: Callable[..., list[str]]) -> None:
    script = "import sys; sys.stderr.write('x' * 200_000); print(sys.argv[1] * 200_000)"  # more than a pipe holds
    printed = run_ranks(*([sys.executable, "-c", script, letter] for letter in "ab"))
    assert printed == ["a" * 200_000 + "\n", "b" * 200_000 + "\n"]


@pytest.mark.parametrize(
    ("scripts", "told"),
    [
        (["import sys; sys.exit('no view')", "import time; time.sleep(900)"], r"(?s)\[1, None\].*rank 0:\nno view"),
        (["import time; time.sleep(900)"], r"exit codes \[None\]"),
    ],
    ids=["one fails", "one hangs"],
)
def test_no_rank_of_a_test_keeps_it_waiting(scripts: list[str], told: str, run_ranks: Callable[..., list[str]]) -> None:
    with pytest.raises(pytest.fail.Exception, match=told):
        run_ranks(*([sys.executable, "-c", script] for script in scripts), timeout=240 if len(scripts) > 1 else 1)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[str]]) -> dict[str, Any]:
    """How far weights after two steps are from those of averaged gradients, sharded and replicated."""
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(*([sys.executable, SHARDED_WORKER, rank, folder] for rank in range(2)))
    report: dict[str, Any] = json.loads((folder / "sharded-0.json").read_text())
    return report


def test_sharded_weights_become_those_of_averaged_gradients_whatever_is_a_unit(sharded: dict[str, Any]) -> None:
    assert len(sharded["largest"]) == 2 * (3 * 2 + 1)
    assert {name: error for name, error in sharded["largest"].items() if error > 1e-9} == {}


def test_gradients_of_tokens_that_are_expanded_lie_as_ddp_expects_them(sharded: dict[str, Any]) -> None:
    assert sharded["told"] == {"drop": [], "both": []}


LONELY = """
import sys, time
from datetime import timedelta
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import distributed as dist
from seqcompress import SequenceScheduler, Strategy, compress

torch.set_num_threads(1)
rank, folder, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group(
    None if backend == "None" else backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
    timeout=timedelta(seconds=20),
)
vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
scheduler = SequenceScheduler(compress(vit, Strategy()), total_steps=10)
begin = time.monotonic()
if rank == 0:
    scheduler.step(1)  # waits for nobody
    time.sleep(22)
else:
    try:
        scheduler.step()
    except RuntimeError as error:
        print(error)
print(scheduler.last_step, 15 < time.monotonic() - begin < 40)
"""


@pytest.mark.parametrize("backend", ["gloo", None])
def test_a_rank_that_is_left_alone_says_so_after_the_time_that_its_run_may_wait(
    backend: str | None, tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    printed = run_ranks(*([sys.executable, "-c", LONELY, rank, tmp_path, str(backend)] for rank in range(2)))
    assert printed[0] == "1 True\n"
    assert printed[1].startswith("rank 1 waited in vain for the others to agree on the next step: every rank must")
    assert printed[1].endswith("\n0 True\n")
