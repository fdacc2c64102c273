"""A run of very many steps: with logging, views that follow, budget and callback, nothing piles up."""

from __future__ import annotations

import copy
import gc
import importlib
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from seqcompress import Budget, SequenceScheduler, Stepwise, Strategy, compress, scale_views
from seqcompress.compression import compressed_embeds

STAGES = Stepwise({0.0: Strategy(0.5, 8), 0.4: Strategy(0.0, 8), 0.6: Strategy(0.5), 0.9: Strategy()})


class Used(NamedTuple):
    """What a process holds."""

    mebibytes: float
    objects: int
    tensors: int
    hooks: int
    handles: int
    threads: int


def used(model: nn.Module) -> Used:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    objects = gc.get_objects()
    hooks = sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )
    return Used(
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(objects),
        sum(issubclass(type(each), Tensor) for each in objects),
        hooks,
        len(list(Path("/proc/self/fd").iterdir())),
        threading.active_count(),
    )


class Photos(Dataset[Any]):
    def __init__(self) -> None:
        self.transform = v2.RandomResizedCrop(16)
        self.images = torch.rand(64, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        view: Tensor = self.transform(self.images[index])
        return view


def _pair() -> tuple[nn.Module, nn.Module]:
    student = VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    teacher = copy.deepcopy(student).requires_grad_(False)
    compress(student, STAGES, teacher=teacher)
    return student, teacher


STEPS = [
    pytest.param(200, id="some"),
    pytest.param(20_000, id="20000", marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
]
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads what Linux says of a process")


def _is_flat(marks: list[Used], sizes: set[int]) -> None:
    """From the middle of the run, where every stage but the plain one has been met, to its end."""
    before, after = marks
    print(before, after)
    assert after.mebibytes - before.mebibytes < 16
    assert after.objects - before.objects < 1000
    assert after.tensors - before.tensors < 50
    assert after[3:] == before[3:]
    assert sizes == {8, 16}  # views followed


@linux
@pytest.mark.parametrize("steps", STEPS)
def test_memory_hooks_handles_and_threads_are_flat_over_a_plain_loop(steps: int) -> None:
    student, teacher = _pair()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    scheduler, budget = SequenceScheduler([student, teacher], total_steps=steps), Budget([student, teacher])
    loader: DataLoader[Any] = scale_views(DataLoader(Photos(), batch_size=4), student)
    marks, sizes, units = [], set(), 0.0
    while scheduler.last_step < steps:
        for views in loader:
            optimizer.zero_grad()
            with torch.no_grad():
                target = teacher(views)
            (student(views) - target).square().mean().backward()
            optimizer.step()
            scheduler.step()
            sizes.add(views.shape[-1])
            assert budget.units > units
            units = budget.units
            if scheduler.last_step in (steps // 2, steps):
                marks.append(used(student))
            if scheduler.last_step == steps:
                break
    _is_flat(marks, sizes)
    assert all(len(embed.forward_counts) < 30 for embed in compressed_embeds(student, teacher))


@linux
@pytest.mark.parametrize("steps", STEPS)
def test_they_are_under_lightning_with_its_logger_and_the_callback(steps: int, tmp_path: Path) -> None:
    pl: Any = importlib.import_module("lightning.pytorch")
    marks, sizes = [], set()

    class Pair(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = _pair()

        def training_step(self, views: Tensor, batch_idx: int) -> Tensor:
            sizes.add(views.shape[-1])
            if self.global_step in (steps // 2, steps - 1):
                marks.append(used(self))
            with torch.no_grad():
                target = self.teacher(views)
            return (self.student(views) - target).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.student.parameters(), lr=0.01)

    module = Pair()
    loader: DataLoader[Any] = scale_views(DataLoader(Photos(), batch_size=4), module.student)
    logger = pl.loggers.CSVLogger(tmp_path)
    settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", devices=1, logger=logger, log_every_n_steps=10, **settings)
    trainer.fit(module, loader)
    _is_flat(marks, sizes)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(rows) - 1 == pytest.approx(steps / 10, abs=2)
    assert "seqcompress/budget" in rows[0]
