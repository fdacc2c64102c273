"""One of two processes: the same two steps of training, replicated and sharded in several ways. Run by a test."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from seqcompress import Strategy, compress

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
STRATEGIES = {"drop": Strategy(0.5), "both": Strategy(0.5, 16)}


def _whole(weight: Any) -> Tensor:
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()


def _trained(model: Any, vit: Any, rank: int, *, average: bool) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(100 + rank)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(torch.randn(4, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
        for parameter in model.parameters() if average else ():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        optimizer.step()
    return [_whole(parameter) for _, parameter in sorted(vit.named_parameters())]


def _vit() -> VisionTransformer:
    torch.manual_seed(1)
    return VisionTransformer(**SMALL, reg_tokens=2).double()  # a convolution and a product round otherwise


def _sharded(strategy: Strategy, unit: str, order: str, mesh: Any) -> VisionTransformer:
    vit = _vit()
    if order == "compressed first":
        compress(vit, strategy)
    if unit == "embedding":
        fully_shard(vit.patch_embed, mesh=mesh)
    elif unit == "projection":
        fully_shard(vit.patch_embed.proj, mesh=mesh)
    for block in vit.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(vit, mesh=mesh)
    return vit if order == "compressed first" else compress(vit, strategy)


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    largest, told = {}, {}
    for name, strategy in STRATEGIES.items():
        vit = compress(_vit(), strategy)
        expected = _trained(vit, vit, rank, average=True)
        for unit in ("model", "embedding", "projection"):
            for order in ("compressed first", "sharded first"):
                vit = _sharded(strategy, unit, order, mesh)
                weights = _trained(vit, vit, rank, average=False)
                pairs = zip(weights, expected, strict=True)
                largest[f"{name}, {unit}, {order}"] = max(float((a - b).abs().max()) for a, b in pairs)
        vit = compress(_vit(), strategy)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weights = _trained(DistributedDataParallel(vit), vit, rank, average=False)
        told[name] = [str(warning.message) for warning in caught]
        largest[f"{name}, replicated"] = max(float((a - b).abs().max()) for a, b in zip(weights, expected, strict=True))
    (folder / f"sharded-{rank}.json").write_text(json.dumps({"largest": largest, "told": told}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
