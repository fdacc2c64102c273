"""One rank of ``test_distributed``: trains two steps' worth of views and writes down what it saw.

Run as ``python distributed_worker.py RANK FOLDER``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch.nn.parallel import DistributedDataParallel

from seqcompress import SequenceScheduler, Stepwise, Strategy, compress, get_strategy

STAGES = Stepwise({0.0: Strategy(0.5), 0.5: Strategy(0.25), 0.75: Strategy()})


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)  # the same on both ranks, as trainers do
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    model = compress(DistributedDataParallel(vit), STAGES).train()
    scheduler = SequenceScheduler(model, total_steps=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    views = torch.arange(16.0).reshape(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(4, 3, 32, 32)

    kept: list[torch.Tensor] = []
    with torch.no_grad():
        every = vit._pos_embed(vit.patch_embed.embed(views))[:, 1:].clone()

    def look(block: torch.nn.Module, args: tuple[Any, ...]) -> None:
        patches = args[0][:, 1:].detach()
        kept.append(torch.cdist(patches, every, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=2))

    handle = vit.blocks[0].register_forward_pre_hook(look)
    model(views)[:, 0].sum().backward()
    handle.remove()
    optimizer.step()

    if rank == 1:
        scheduler.step(3)  # this rank lost count
    strategies = []
    for _ in range(8):
        scheduler.step()
        strategies.append(str(get_strategy(model)))
        optimizer.zero_grad()
        model(views + rank)[:, 0].sum().backward()
        optimizer.step()
    seen = {
        "subsets": kept[0].sort(dim=1).values.tolist(),
        "strategies": strategies,
        "last_step": scheduler.last_step,
        "weights": [float(value.detach().double().sum()) for value in model.parameters()],
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
