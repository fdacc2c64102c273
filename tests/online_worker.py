"""One rank of ``test_online_schedule``: trains with an online schedule and writes down what it saw.

Run as ``python online_worker.py RANK FOLDER WAY``, WAY being whether measured steps go "through" or "past" DDP.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch.nn.parallel import DistributedDataParallel

from seqcompress import OnlineScheduler, Strategy, compress, get_strategy


def main(rank: int, folder: Path, way: str) -> None:
    logged: list[logging.LogRecord] = []
    logging.getLogger("seqcompress").setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    logging.getLogger("seqcompress").addHandler(handler)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)  # the same on both ranks, as trainers do
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    parallel = DistributedDataParallel(vit)
    compress(parallel, Strategy(0.0, 8))
    measured = parallel if way == "through" else vit

    def loss(views: torch.Tensor) -> torch.Tensor:
        return measured(views)[:, 0].sin().mean()

    scheduler = OnlineScheduler(parallel, loss, [], total_steps=60, compute_share=1.0)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(rank)
    common = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    strategies, batches = [], []
    for step in range(60):
        size = 2 if rank and step % 5 == 4 else 4  # now and then a short batch on one rank
        views = common + 0.2 * torch.randn(size, 3, 16, 16, generator=generator)
        optimizer.zero_grad()
        parallel(views)[:, 0].sin().mean().backward()
        optimizer.step()
        scheduler.step(views)
        strategies.append(str(get_strategy(vit)))
        batches.append(float(views.sum()))
    first = scheduler.decisions[0].report
    seen = {
        "decisions": [[made.step, str(made.before), str(made.after)] for made in scheduler.decisions],
        "variance": [entry.variance for entry in first.entries],
        "measured": [str(strategy) for strategy in first.strategies],
        "strategies": strategies,
        "batches": batches,
        "logged": len(logged),
        "weights": [float(value.detach().double().sum()) for value in vit.parameters()],
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
