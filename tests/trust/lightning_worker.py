"""One rank of ``test_distributed_lightning``, started by torchrun: eight steps under each strategy of Lightning's.

Run as ``torchrun --nproc-per-node 2 lightning_worker.py FOLDER PACKAGE``.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, IterableDataset
from training_worker import HAS_FSDP2, STAGES, STEPS, difference, loss_of, make_vit, trained, views_of, whole_weights

from seqcompress import compress, get_strategy

pl: Any = importlib.import_module(sys.argv[2])


class Batches(IterableDataset[Tensor]):
    """The batches of this rank."""

    def __iter__(self) -> Iterator[Tensor]:
        return (views_of(dist.get_rank(), step) for step in range(STEPS))

    def __len__(self) -> int:
        return STEPS


class OnlyViT(pl.LightningModule):  # type: ignore[misc]
    """A ViT that trains, compressed, and notes what it saw."""

    def __init__(self, shards_itself: bool) -> None:
        super().__init__()
        self.vit: Any = compress(make_vit(), STAGES)
        self.shards_itself = shards_itself
        self.strategies: list[str] = []
        self.weights: list[Tensor] = []

    def configure_model(self) -> None:
        if self.shards_itself:
            self.shards_itself = False
            mesh = self.device_mesh["data_parallel"]
            for block in self.vit.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.vit, mesh=mesh)

    def training_step(self, views: Tensor, batch_idx: int) -> Tensor:
        self.strategies.append(str(get_strategy(self.vit)))
        return loss_of(self.vit(views))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_train_end(self) -> None:
        self.weights = whole_weights(self.trainer.strategy.model, self.vit)


class FSDPOnCPU(pl.strategies.FSDPStrategy):  # type: ignore[misc]
    """Lightning's own lets torch find the device, which takes no CPU."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    def _setup_model(self, model: Any) -> Any:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def main(folder: Path) -> None:
    strategies = {
        "ddp": lambda: "ddp",
        "fsdp": lambda: FSDPOnCPU(auto_wrap_policy={Block}, process_group_backend="gloo"),
        "model-parallel": lambda: pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }
    if not HAS_FSDP2:
        del strategies["model-parallel"]
    found: dict[str, Any] = {}
    for name, strategy in strategies.items():
        module = OnlyViT(name == "model-parallel")
        torch.manual_seed(7)  # as ``trained`` does, after the model is made
        trainer = pl.Trainer(
            strategy=strategy(),
            accelerator="cpu",
            devices=2,
            max_epochs=1,
            logger=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, DataLoader(Batches(), batch_size=None))
        budget = float(trainer.callback_metrics["seqcompress/budget"]) * 1e6
        found[name] = (module.weights, module.strategies, budget)
    vit = compress(make_vit(), STAGES)
    expected = trained(vit, vit, by_hand=True)
    seen = {
        "differences": {name: difference(weights, expected["weights"]) for name, (weights, _, _) in found.items()},
        "moved": difference(expected["weights"], whole_weights(vit, make_vit())),
        "strategies": {name: strategies for name, (_, strategies, _) in found.items()},
        "budgets": {name: budget for name, (_, _, budget) in found.items()},
        "expected budget": 2 * expected["costs"][0],
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
