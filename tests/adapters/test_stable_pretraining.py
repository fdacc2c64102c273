"""stable-pretraining's own MoCov3, SimCLR and DINO, run by its own Manager and accelerated by one line."""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import seqcompress

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("stable_pretraining") is None,
    reason="stable-pretraining is not installed: it brings many packages of its own (docs/stable-pretraining.md)",
)

EPOCHS = 5
# The default plan over 20 steps, for 32 px and patches of 8 px: patches of 16 px with and without dropout, then of 8.
STUDENT = [3] * 10 + [5] * 5 + [9] * 4 + [17]
TEACHER = [5] * 15 + [17] * 5
SMALL = [2] * 15 + [3] * 4 + [5]  # of 16 px, which have one patch of 16 px, or four of 8
FULL = 17

Build = Callable[..., Any]


class Images(Dataset[dict[str, Any]]):
    """Sixteen images of 32 px, the same ones whenever they are looked up."""

    def __init__(self, views: int = 0, local_views: int = 0, gpu_transform: Any = None) -> None:
        self.pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        self.views = views
        self.local_views = local_views
        self.gpu_transform = gpu_transform  # what stable-pretraining runs on whole batches

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.pixels[index]
        sample: dict[str, Any] = {"image": image, "label": index % 2}
        if self.views:
            sample["views"] = [{"image": image.roll(place, -1)} for place in range(self.views)]
            sample["local"] = [image[:, place : place + 16, :16] for place in range(self.local_views)]
        return sample


def mocov3_or_simclr_forward(self: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
    """What stable-pretraining's own scripts put in the place of ``forward``."""
    views = [view["image"] for view in batch["views"]] if self.training else [batch["image"]]
    output = type(self).forward(self, *views)
    label = batch["label"]
    return {"loss": output.loss, "embedding": output.embedding, "label": label.repeat(len(views))}


def dino_forward(self: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
    if self.training:
        views = [view["image"] for view in batch["views"]]
        output = type(self).forward(self, global_views=views, local_views=batch["local"])
        return {"loss": output.loss, "embedding": output.embedding, "label": batch["label"].repeat(len(views))}
    output = type(self).forward(self, images=batch["image"])
    return {"loss": output.loss, "embedding": output.embedding, "label": batch["label"]}


class Noted:
    """Tokens that reach the first block of an encoder, in training and in validation."""

    def __init__(self, vit: Any) -> None:
        self.vit = vit
        self.training: list[int] = []
        self.validation: list[int] = []
        self.pixels: list[int] = []
        vit.blocks[0].register_forward_pre_hook(self._note)
        vit.register_forward_pre_hook(self._note_view)

    def _note(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        (self.training if block.training else self.validation).append(args[0].shape[1])

    def _note_view(self, vit: nn.Module, args: tuple[Tensor, ...]) -> None:
        if vit.training:
            self.pixels.append(args[0].shape[-1])


@pytest.fixture
def spt(tmp_path: Path) -> Iterator[Any]:
    import stable_pretraining

    before = stable_pretraining.get_config().cache_dir
    stable_pretraining.set(cache_dir=str(tmp_path / "runs"), progress_bar="none", verbose="error")
    yield stable_pretraining
    stable_pretraining.set(cache_dir=before)


@pytest.fixture
def make_module(spt: Any) -> Build:
    """Builds one of its methods around a ViT of two blocks."""
    from stable_pretraining import methods

    def build(name: str) -> Any:
        torch.manual_seed(3)
        vit = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            num_classes=0,
            dynamic_img_size=True,  # its modules try the encoder at 224 px
        )
        sizes = {
            "MoCov3": {"projector_dims": (32, 32, 16), "predictor_hidden_dim": 32},
            "SimCLR": {"projector_dims": (32, 32, 16)},
            "DINO": {"projector_hidden_dim": 32, "projector_bottleneck_dim": 16, "n_prototypes": 32},
        }
        module = getattr(methods, name)(vit, **sizes[name])
        module.forward = types.MethodType(dino_forward if name == "DINO" else mocov3_or_simclr_forward, module)
        module.optim = {
            "optimizer": {"type": "AdamW", "lr": 1e-3},
            "scheduler": {"type": "CosineAnnealingLR", "T_max": 20},
        }
        return module

    return build


@pytest.fixture
def train(spt: Any, tmp_path: Path) -> Build:
    """Runs the Manager; returns the Trainer."""
    import lightning

    def run(module: Any, data: Any, callbacks: Any = (), **settings: Any) -> Any:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[*callbacks],
        )
        loaders = spt.data.DataModule(
            train=DataLoader(data, batch_size=4), val=DataLoader(Images(), batch_size=8)
        )
        spt.Manager(trainer=trainer, module=module, data=loaders, seed=0, **settings)()
        return trainer

    return run


def times(count: int, lengths: list[int]) -> list[int]:
    return [length for length in lengths for _ in range(count)]


@pytest.mark.parametrize("name", ["MoCov3", "SimCLR", "DINO"])
def test_its_methods_train_on_the_tokens_of_the_plan_and_validate_on_full_sequences(name, make_module, train):
    module = make_module(name)
    has_teacher = name != "SimCLR"
    student = Noted(module.backbone.student if has_teacher else module.backbone)
    teacher = Noted(module.backbone.teacher) if has_teacher else None

    seqcompress.accelerate(module, "default")  # the one line
    train(module, Images(views=2, local_views=2 if name == "DINO" else 0))

    print(student.training, student.validation, teacher and (teacher.training, teacher.validation))
    if name == "DINO":
        assert student.training[::2] == STUDENT
        assert student.training[1::2] == SMALL
        assert teacher.training == TEACHER
    else:
        assert student.training == times(2, STUDENT)
        assert teacher is None or teacher.training == times(2, TEACHER)
    judged = teacher if teacher else student
    assert judged.validation == [FULL] * 2 * EPOCHS
