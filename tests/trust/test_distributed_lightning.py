"""Two processes under Lightning's ddp, fsdp and model-parallel strategies, with the callback that comes by itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seqcompress import Stepwise, Strategy

WORKER = Path(__file__).with_name("lightning_worker.py")
STAGES = Stepwise({0.0: Strategy(0.5, 16), 0.25: Strategy(0.5), 0.5: Strategy(0.25), 0.75: Strategy()})
TOLERANCES = {"ddp": 1e-12, "fsdp": 1e-5, "model-parallel": 1e-12}  # Lightning's fsdp casts to 32 bits in between
if not hasattr(torch.cpu.Stream, "record_event"):  # torch 2.6 has fully_shard on GPUs alone
    del TOLERANCES["model-parallel"]


@pytest.mark.parametrize(
    "package", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.soak)], ids=str
)
def test_under_each_strategy_of_lightnings_weights_are_those_of_averaged_gradients(
    package: str, tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    run_ranks([*torchrun, WORKER, tmp_path, package], timeout=480)
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["moved"] > 1e-2
        assert seen["differences"].keys() == TOLERANCES.keys()
        assert {name: error for name, error in seen["differences"].items() if error > TOLERANCES[name]} == {}
        every = [str(STAGES.at_step(step, 8)) for step in range(8)]
        assert seen["strategies"] == dict.fromkeys(seen["differences"], every)
        expected = pytest.approx(seen["expected budget"], rel=1e-5)
        assert seen["budgets"] == dict.fromkeys(seen["differences"], expected)
