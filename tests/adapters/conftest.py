"""Both Lightning packages, and one small student and teacher to train under them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.loss import NTXentLoss
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture
def told(pl: Any) -> Iterator[list[str]]:
    """What the callback says to users of a Lightning package, line by line."""
    lines: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger(f"{pl.__name__}.seqcompress"), Noting()
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@pytest.fixture
def images() -> DataLoader[Any]:
    """Four times the same batch of 4 images of 32 px: losses differ by weights and dropped tokens only."""
    pixels = 10 * torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(pixels.repeat(4, 1, 1, 1)), batch_size=4)


@pytest.fixture
def make_pair(pl: Any, tiny_vit: Callable[..., nn.Module]) -> Callable[..., Any]:
    """Builds a LightningModule with a student and its momentum teacher; it notes tokens and losses."""

    class Pair(pl.LightningModule):
        def __init__(self, manual_steps: int = 0) -> None:
            super().__init__()
            self.manual_steps = manual_steps
            self.automatic_optimization = manual_steps == 0
            self.criterion = NTXentLoss(temperature=0.2)
            self.backbone = tiny_vit(global_pool="avg")
            self.backbone_momentum = copy.deepcopy(self.backbone)
            deactivate_requires_grad(self.backbone_momentum)
            self.losses: list[float] = []
            self.tokens = note_tokens(self.backbone)
            self.teacher_tokens = note_tokens(self.backbone_momentum)
            self.validation_tokens: list[int] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            update_momentum(self.backbone, self.backbone_momentum, m=0.9)
            (views,) = batch
            loss = self.criterion(self.backbone(views), self.backbone_momentum(views.flip(-1)))
            self.losses.append(loss.item())
            if not self.automatic_optimization:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                for _ in range(self.manual_steps):
                    optimizer.step()
            return loss

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            seen = len(self.tokens)
            self.backbone(batch[0])
            self.validation_tokens += self.tokens[seen:]
            del self.tokens[seen:]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.backbone.parameters(), lr=0.05, momentum=0.9)

    def build(**settings: Any) -> Any:
        torch.manual_seed(3)
        return Pair(**settings)

    return build


@pytest.fixture
def make_trainer(pl: Any, tmp_path: Path) -> Callable[..., Any]:
    """Builds a quiet Trainer on the CPU; keywords override."""

    def build(**overrides: Any) -> Any:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "max_epochs": 2,
        }
        return pl.Trainer(**{**quiet, **overrides})

    return build


@pytest.fixture(name="note_tokens")
def _note_tokens() -> Callable[[nn.Module], list[int]]:
    """Attaches a list to a ViT, to which each forward adds how many tokens reached the first block."""
    return note_tokens


def note_tokens(vit: Any) -> list[int]:
    noted: list[int] = []

    def note(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        noted.append(args[0].shape[1])

    vit.blocks[0].register_forward_pre_hook(note)
    return noted
