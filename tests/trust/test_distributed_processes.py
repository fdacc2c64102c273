"""Processes that train together: one that is left alone, one that dies, and how the tests wait for neither."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest


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


LONELY = """
import os, sys, time
from datetime import timedelta
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import distributed as dist
from seqcompress import SequenceScheduler, Strategy, compress

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
print(scheduler.last_step, 15 < time.monotonic() - begin < 40, flush=True)
os._exit(0)  # torch may abort, or wait for ever, as it lets go of a group whose collective was broken off
"""


@pytest.mark.parametrize("backend", ["gloo", pytest.param(None, marks=pytest.mark.soak)])
def test_a_rank_that_is_left_alone_says_so_after_the_time_that_its_run_may_wait(
    backend: str | None, tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    printed = run_ranks(*([sys.executable, "-c", LONELY, rank, tmp_path, str(backend)] for rank in range(2)))
    assert printed[0] == "1 True\n"
    assert printed[1].startswith("rank 1 waited in vain for the others to agree on the next step: every rank must")
    assert printed[1].endswith("\n0 True\n")


DYING = """
import os, sys, time
from datetime import timedelta
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import distributed as dist
from seqcompress import SequenceScheduler, Strategy, compress

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
scheduler = SequenceScheduler(compress(vit, Strategy(0.5)), total_steps=10)
scheduler.step()
if rank == 1:
    print("dies", flush=True)
    os._exit(0)
time.sleep(1)
begin = time.monotonic()
try:
    for _ in range(3):
        scheduler.step()
except RuntimeError as error:
    print(error)
print(time.monotonic() - begin < 30, scheduler.last_step < 4)
vit.train()(torch.zeros(2, 3, 32, 32)).sum().backward()
scheduler.step(5)  # by number, one can go on alone
print(scheduler.last_step)
os._exit(0)
"""


def test_a_rank_that_dies_is_told_of_at_the_next_step_and_holds_up_nobody(
    tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    printed = run_ranks(*([sys.executable, "-c", DYING, rank, tmp_path] for rank in range(2)))
    assert printed[1] == "dies\n"
    assert printed[0].startswith("rank 0 waited in vain for the others to agree on the next step: every rank must")
    assert printed[0].endswith("\nTrue True\n5\n")


SPLIT = """
import os, sys
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from seqcompress import Strategy, compress

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
mesh, views = init_device_mesh("cpu", (2,)), torch.ones(2, 3, 32, 32)

def made():
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0).train()

for strategy in (Strategy(0.0, 16), Strategy(0.5, 16)):
    whole, split = compress(made(), strategy), compress(made(), strategy)
    for block in split.blocks:
        parallelize_module(block.mlp, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    try:
        print((split(views) - whole(views)).abs().max().item() < 1e-5)
    except RuntimeError as error:
        print(error)
sys.stdout.flush()
dist.barrier()
os._exit(0)  # without torch's own end, at which torch 2.6 may wait for ever
"""


def test_tensor_parallelism_scales_patches_and_refuses_to_drop_tokens(
    tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    for printed in run_ranks(*([sys.executable, "-c", SPLIT, rank, tmp_path] for rank in range(2))):
        scaled, dropped = printed.splitlines()
        assert scaled == "True"
        assert dropped.startswith("token dropout cannot be combined with tensor parallelism, whose processes would")


FAILING = """
import os, sys
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import distributed as dist
from seqcompress import OnlineScheduler, Strategy, compress

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(0)
vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0).train()

def loss(views):
    if rank == 1:
        raise ValueError("a bad sample")
    return vit(views).square().sum()

ladder = [Strategy(), Strategy(0.5)]
scheduler = OnlineScheduler(compress(vit, Strategy(0.5)), loss, ladder, total_steps=30, compute_share=1.0)
views = torch.randn(2, 3, 32, 32)
try:
    for _ in range(30):
        vit(views).square().sum().backward()
        scheduler.step(views)
except (RuntimeError, ValueError) as error:
    print(scheduler.last_step, error)
sys.stdout.flush()
dist.barrier()
os._exit(0)  # without torch's own end, at which torch 2.6 may wait for ever
"""


def test_a_rank_that_cannot_measure_leaves_nobody_waiting(tmp_path: Path, run_ranks: Callable[..., list[str]]) -> None:
    ranks = run_ranks(*([sys.executable, "-c", FAILING, rank, tmp_path] for rank in range(2)), timeout=120)
    step, told = zip(*(printed.strip().split(" ", 1) for printed in ranks), strict=True)
    assert told == ("another process could not measure its step, and has raised what ended it", "a bad sample")
    assert step[0] == step[1]
