"""Two processes, started by torchrun, that train in every way torch has: what comes out is what one process gets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seqcompress import Stepwise, Strategy

WORKER = Path(__file__).with_name("training_worker.py")
HAS_FSDP2 = hasattr(torch.cpu.Stream, "record_event")
needs_fsdp2 = pytest.mark.skipif(not HAS_FSDP2, reason="torch 2.6 has fully_shard on GPUs alone")
STAGES = Stepwise({0.0: Strategy(0.5, 16), 0.25: Strategy(0.5), 0.5: Strategy(0.25), 0.75: Strategy()})
EXPECTED = [str(STAGES(step / 8)) for step in range(8)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[str]]) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    run_ranks([*torchrun, WORKER, folder], timeout=480)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_weights_after_eight_steps_are_those_of_gradients_averaged_by_hand(ranks: list[dict[str, Any]]) -> None:
    ways = 12 if HAS_FSDP2 else 6  # of DDP three, of FSDP1 two and of FSDP2 three, some in both orders
    assert len(ranks[0]["differences"]) == ways
    for rank in ranks:
        assert rank["moved"] > 1e-2
        assert {way: error for way, error in rank["differences"].items() if error > 1e-12} == {}


def test_weights_are_those_of_one_process_on_all_samples_and_their_kept_patches(ranks: list[dict[str, Any]]) -> None:
    assert [rank["one process"]["difference"] < 1e-12 for rank in ranks] == [True, True]


def test_every_rank_runs_every_step_at_the_strategy_of_the_plan(ranks: list[dict[str, Any]]) -> None:
    seen = {way: strategies for rank in ranks for way, strategies in rank["strategies"].items()}
    assert seen == dict.fromkeys(ranks[0]["differences"], EXPECTED)


def test_ranks_of_one_seed_draw_different_subsets_at_every_step(ranks: list[dict[str, Any]]) -> None:
    for step in range(6):  # the last two keep all patches
        kept = [tuple(patches) for rank in ranks for patches in rank["one process"]["subsets"][step]]
        assert [len(set(patches)) for patches in kept] == [8 if step < 4 else 12] * 8
        assert len(set(kept)) == 8


def test_all_ranks_follow_the_count_of_the_first(ranks: list[dict[str, Any]]) -> None:
    expected = [[step, str(STAGES.at_step(step, 8))] for step in range(1, 9)]
    assert ranks[0]["lost count"] == ranks[1]["lost count"] == expected


def test_a_rank_with_one_batch_less_keeps_nobody_waiting_where_steps_are_given_by_number(
    ranks: list[dict[str, Any]],
) -> None:
    first, second = (rank["one batch less"] for rank in ranks)
    assert (first["strategies"], second["strategies"]) == (EXPECTED, EXPECTED[:7])
    assert first["weights"] == second["weights"]


def test_costs_and_budget_of_a_model_do_not_depend_on_how_it_is_distributed(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["costs"] == dict.fromkeys(rank["differences"], rank["expected costs"])


@needs_fsdp2
def test_gradient_error_is_the_same_sharded_and_replicated(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        replicated, sharded = rank["gradient errors"]["DDP"], rank["gradient errors"]["FSDP2"]
        assert sharded == [pytest.approx(values, rel=1e-9, abs=1e-15) for values in replicated]
        assert all(bias2 > 1e-4 for bias2, _, _ in replicated[1:])


@needs_fsdp2
def test_an_online_schedule_decides_the_same_sharded_and_replicated(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        replicated, sharded = rank["found online"]["DDP"], rank["found online"]["FSDP2"]
        assert 4 <= sharded["step"] == replicated["step"] < 20
        assert sharded["errors"] == pytest.approx(replicated["errors"], rel=1e-6)
        assert len(sharded["errors"]) == 2
        assert sharded["weights"] == pytest.approx(replicated["weights"], abs=1e-12)
    assert ranks[0]["found online"]["FSDP2"] == ranks[1]["found online"]["FSDP2"]


def test_what_flattened_weights_cannot_do_is_refused_in_one_sentence(ranks: list[dict[str, Any]]) -> None:
    refused = ranks[0]["refused"]
    assert refused["measured"].startswith("ValueError: model must have whole gradients on every process")
    assert refused["measured online"] == refused["measured"]
    assert refused["compressed late"].startswith("ValueError: model must be compressed before FullyShardedDataParallel")


def test_gradients_of_tokens_that_are_expanded_lie_as_ddp_expects_them(ranks: list[dict[str, Any]]) -> None:
    assert [told for rank in ranks for way, told in rank["told"].items() if way.startswith("DDP")] == [[]] * 8
