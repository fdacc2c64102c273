"""A LightningModule with the attributes and the call order of a solo-learn method, for where solo-learn is not.

Every crop goes through the student on its own, then the large crops through the momentum encoder, which follows
once the optimizer has stepped. Validation runs both on one view.

Run as ``python solo_learn_module.py PACKAGE FOLDER``, this trains on two ranks, each of which writes down its steps.
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop

from seqcompress import get_strategy, is_compressed

SIZE, SMALL = 32, 16  # px of the large and the small crops
ABSENT = object()  # for a config without the key


class Seen(NamedTuple):
    """One forward of one encoder."""

    stage: str
    encoder: str
    tokens: int  # a view, as they reached the first block


class MomentumUpdater:
    """Averages one parameter after the other, each into new storage; what that costs is what is to be saved."""

    def __init__(self, base_tau: float = 0.996, final_tau: float = 1.0) -> None:
        self.base_tau = self.cur_tau = base_tau
        self.final_tau = final_tau

    @torch.no_grad()
    def update(self, online_net: nn.Module, momentum_net: nn.Module) -> None:
        for online, average in zip(online_net.parameters(), momentum_net.parameters(), strict=False):
            average.data = self.cur_tau * average.data + (1 - self.cur_tau) * online.data

    def update_tau(self, cur_step: int, max_steps: int) -> None:
        remaining = (math.cos(math.pi * cur_step / max_steps) + 1) / 2
        self.cur_tau = self.final_tau - (self.final_tau - self.base_tau) * remaining


MomentumUpdater.__module__ = "solo.utils.momentum"  # by which it is known


def make_vit() -> VisionTransformer:
    """A ViT of 16 patches, 8 px each, with one class token: 17 tokens. It takes small crops too."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vit = VisionTransformer(
            img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True
        )
        with torch.no_grad():
            vit.pos_embed.normal_()
    return vit


def make_config(section: Any = ABSENT, *, method: str = "mocov3", small_crops: int = 0, final_tau: float = 0.9) -> Any:
    """What Hydra would make of a method's YAML, with ``section`` under ``seqcompress``."""
    config: dict[str, Any] = {
        "name": "contract",
        "method": method,
        "backbone": {"name": "vit_tiny", "kwargs": {"img_size": SIZE, "patch_size": 8}},
        "data": {"num_classes": 3, "num_large_crops": 2, "num_small_crops": small_crops},
        "momentum": {"base_tau": 0.9, "final_tau": final_tau},
    }
    if section is not ABSENT:
        config["seqcompress"] = section
    return OmegaConf.create(config)


def loader(small_crops: int = 0, *, constant: bool = False) -> DataLoader[Any]:
    """16 samples in 4 batches: index, crops and label. Constant images differ in nothing but positions."""
    generator = torch.Generator().manual_seed(2)

    def crop(size: int) -> Tensor:
        return torch.ones(3, size, size) if constant else torch.randn(3, size, size, generator=generator)

    sizes = [SIZE, SIZE] + [SMALL] * small_crops
    samples = [(index, [crop(size) for size in sizes], index % 3) for index in range(16)]
    return DataLoader(samples, batch_size=4)  # type: ignore[arg-type]


def validation_loader() -> DataLoader[Any]:
    """4 samples in one batch: a view and its label."""
    generator = torch.Generator().manual_seed(3)
    samples = [(torch.randn(3, SIZE, SIZE, generator=generator), index % 3) for index in range(4)]
    return DataLoader(samples, batch_size=4)  # type: ignore[arg-type]


class Pictures(Dataset[Any]):
    """16 pictures of 48 px, of each of which a transform makes two crops."""

    def __init__(self) -> None:
        self.pictures = torch.randn(16, 3, 48, 48, generator=torch.Generator().manual_seed(2))
        self.transform = RandomResizedCrop(SIZE, antialias=True)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, list[Tensor], int]:
        return index, [self.transform(self.pictures[index]) for _ in range(2)], index % 3


def picture_loader() -> DataLoader[Any]:
    """As ``loader``, but its crops are made when they are asked for."""
    return DataLoader(Pictures(), batch_size=4)


def method_class(pl: Any) -> Any:
    """The LightningModule, for one of the two Lightning packages."""

    class Method(pl.LightningModule):
        def __init__(self, cfg: Any, *, momentum: bool = True, backbone: nn.Module | None = None) -> None:
            super().__init__()
            self.cfg = cfg
            self.backbone = make_vit() if backbone is None else backbone
            width = getattr(self.backbone, "num_features", 32)
            self.classifier = nn.Linear(width, cfg.data.num_classes)
            self.num_large_crops = cfg.data.num_large_crops
            self.num_small_crops = cfg.data.num_small_crops
            if momentum:
                self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
                self.momentum_updater = MomentumUpdater(cfg.momentum.base_tau, cfg.momentum.final_tau)
            self.losses: list[float] = []
            self.seen: list[Seen] = []
            self.compressed_in: set[tuple[str, bool]] = set()
            self.strategies: list[str] = []
            self.updaters: set[str] = set()
            self.view_sizes: list[int] = []
            for name in ("backbone", "momentum_backbone"):
                blocks = getattr(getattr(self, name, None), "blocks", None)
                if blocks is not None:
                    blocks[0].register_forward_pre_hook(self._noting(name))

        def _noting(self, name: str) -> Any:
            def note(block: nn.Module, args: tuple[Tensor, ...]) -> None:
                self.seen.append(Seen(str(self.trainer.state.stage.value), name, args[0].shape[1]))

            return note

        def on_train_start(self) -> None:
            self.last_step = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.compressed_in.add(("training", is_compressed(self)))
            self.strategies.append(str(get_strategy(self.backbone)) if is_compressed(self) else "plain")
            _, crops, targets = batch
            self.view_sizes.append(crops[0].shape[-1])
            large = crops[: self.num_large_crops]
            features = [self.backbone(crop) for crop in large]
            losses = [F.cross_entropy(self.classifier(feature.detach()), targets) for feature in features]
            features += [self.backbone(crop) for crop in crops[self.num_large_crops :]]
            keys = features[: self.num_large_crops]
            if hasattr(self, "momentum_backbone"):
                with torch.no_grad():
                    keys = [self.momentum_backbone(crop) for crop in large]
            losses += [
                _contrast(query, key)
                for place, query in enumerate(features)
                for other, key in enumerate(keys)
                if place != other
            ]
            loss = torch.stack(losses).mean()
            self.losses.append(loss.item())
            self.log("train_loss", loss.detach(), on_epoch=True, sync_dist=True)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if hasattr(self, "momentum_backbone") and self.trainer.global_step > self.last_step:
                self.updaters.add(type(self.momentum_updater).__name__)
                self.momentum_updater.update(self.backbone, self.momentum_backbone)
                self.momentum_updater.update_tau(self.trainer.global_step, self.trainer.estimated_stepping_batches)
            self.last_step = self.trainer.global_step

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.compressed_in.add((str(self.trainer.state.fn.value), is_compressed(self)))
            views, targets = batch
            loss = F.cross_entropy(self.classifier(self.backbone(views)), targets)
            if hasattr(self, "momentum_backbone"):
                self.momentum_backbone(views)
            self.log("val_loss", loss, sync_dist=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            learnable = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return torch.optim.SGD(learnable, lr=0.05, momentum=0.9)

    return Method


def _contrast(queries: Tensor, keys: Tensor) -> Tensor:
    """Each query's own key is the right one of the batch."""
    similarities = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / 0.2
    return F.cross_entropy(similarities, torch.arange(len(queries)))


def note_subsets(vit: Any) -> list[Tensor]:
    """A list to which each training forward on constant images adds which patches each sample kept, (B, K)."""
    noted: list[Tensor] = []

    def note(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        if vit.training:
            with torch.no_grad():
                embed = getattr(vit.patch_embed, "embed", vit.patch_embed)
                every = embed(torch.ones(1, 3, SIZE, SIZE)).flatten(1, 2)[0] + vit.pos_embed[0, 1:]
                noted.append(torch.cdist(args[0][:, 1:], every.expand(len(args[0]), -1, -1)).argmin(2).sort().values)

    vit.blocks[0].register_forward_pre_hook(note)
    return noted


def main(package: str, folder: Path) -> None:
    pl = importlib.import_module(package)
    pl.seed_everything(0, verbose=False)
    section = {"enabled": True, "schedule": "linear", "start": {"token_dropout": 0.75}}
    module = method_class(pl)(make_config(section))
    subsets = note_subsets(module.backbone)
    trainer = pl.Trainer(
        strategy="ddp",
        accelerator="cpu",
        devices=2,
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader(constant=True))
    seen = {
        "strategies": module.strategies,
        "tokens": [seen.tokens for seen in module.seen if seen.encoder == "backbone"],
        "teacher_tokens": [seen.tokens for seen in module.seen if seen.encoder == "momentum_backbone"],
        "subsets": [subset.tolist() for subset in subsets],
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "compressed": is_compressed(module),
    }
    torch.save(seen, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
