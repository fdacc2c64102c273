"""Every example of Lightly's ``examples/pytorch_lightning``, its own source, with a ViT in the place of its ResNet.

Their transforms, heads, losses, memory banks and training steps are run under a real Trainer, on generated images.
The sources are no part of Lightly's package: ``SEQCOMPRESS_LIGHTLY_SOURCE`` names a checkout of its repository.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import seqcompress
from seqcompress import Strategy, schedules

SOURCES = Path(os.environ.get("SEQCOMPRESS_LIGHTLY_SOURCE", "")) / "examples" / "pytorch_lightning"

pytestmark = pytest.mark.skipif(
    not (SOURCES / "simclr.py").exists(),
    reason="SEQCOMPRESS_LIGHTLY_SOURCE does not name a checkout of Lightly's repository (docs/lightly.md)",
)

STEPS = 4
SMALL = "views of 32 px"  # patches of 8 px: 16, and 4 of 16 px, of which 2 are kept
LARGE = "views of 224 and 96 px"  # patches of 16 px: 196 and 36, and 49 and 9 of 32 px, of which 24 and 4 are kept

# For two steps both, for one larger patches alone, for one nothing: tokens of a view, class token included.
STUDENT = {32: [3, 3, 5, 17], 224: [25, 25, 50, 197], 96: [5, 5, 10, 37]}
TEACHER = {32: [5, 5, 5, 17], 224: [50, 50, 50, 197]}


class Images(Dataset[Any]):
    """In the place of CIFAR-10 and Pascal VOC: sixteen images, the same ones whenever they are looked up."""

    def __init__(self, root: str, download: bool, transform: Callable[..., Any], target_transform: Any = None) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (16, 48, 48, 3), dtype=np.uint8)
        self.images = [Image.fromarray(image) for image in pixels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), 0


class Noted:
    """The sides in pixels of the views that an encoder is given in training, and the tokens at its first block."""

    def __init__(self, vit: Any) -> None:
        self.sides: list[int] = []
        self.tokens: list[int] = []
        embed = vit.conv_proj if hasattr(vit, "conv_proj") else vit.patch_embed
        block = vit.encoder.layers[0] if hasattr(vit, "encoder") else vit.blocks[0]
        embed.register_forward_pre_hook(lambda _, args: self.sides.append(args[0].shape[-1]))
        block.register_forward_pre_hook(lambda _, args: self.tokens.append(args[0].shape[1]))


class Map(nn.Module):
    """A ViT whose patches are a map (B, C, H, W), as the layers of a ResNet are before they are pooled."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, views: Tensor) -> Tensor:
        (features,) = self.vit.forward_intermediates(views, indices=1, norm=True, intermediates_only=True)
        return features


def example(name: str) -> tuple[Any, Any]:
    """The module and the loader that an example makes, with a ViT of two blocks and images that cost nothing."""
    source = (SOURCES / f"{name}.py").read_text(encoding="utf-8").partition("\naccelerator = ")[0]
    is_small = re.search(r"input_size=32\b|crop_sizes=\(32\b", source) is not None

    def vit() -> Any:
        size = {"img_size": 32, "patch_size": 8} if is_small else {"img_size": 224, "patch_size": 16}
        return timm.create_model(
            "vit_tiny_patch16_224", **size, embed_dim=512, depth=2, num_heads=8, num_classes=0, dynamic_img_size=True
        )

    for pattern, ours in (
        (r"nn\.Sequential\(\s*\*list\(resnet\.children\(\)\)\[:-1\](, nn\.AdaptiveAvgPool2d\(1\)\s*)?\)", "make_vit()"),
        (r"nn\.Sequential\(\*list\(resnet\.children\(\)\)\[:-2\]\)", "Map(make_vit())"),
        (r"torchvision\.datasets\.(CIFAR10|VOCDetection)\(", "Images("),
        (r"batch_size=\d+", "batch_size=4"),
        (r"num_workers=\d+", "num_workers=0"),
        (r"= vit_small_patch16_224\(", "= vit_small_patch16_224(depth=2, "),
        (r"\b(depth|num_layers)=(12|32)", r"\1=2"),
        (r"self\.global_step % 300", "self.global_step % 2"),  # SMoG: its teacher is made anew
        (r"self\.n_groups = 300", "self.n_groups = 4"),
        (r"memory_bank_size = 10000", "memory_bank_size = 8"),
    ):
        source = re.sub(pattern, ours, source)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": name, "Images": Images, "Map": Map, "make_vit": vit}
    exec(compile(source, f"{name}.py", "exec"), names)
    return names["model"], names["dataloader"]


def train(module: Any, loader: Any, tmp_path: Path) -> list[float]:
    """Four steps; returns their losses."""
    losses: list[float] = []

    class Noting(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path, callbacks=[Noting()], **quiet
    )
    trainer.fit(module, loader)
    return losses
