"""Under Lightning, a loader's views follow the schedule by themselves, also when a run goes on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import Compose, RandomResizedCrop, ToTensor

from seqcompress import Stepwise, Strategy, scale_views
from seqcompress.adapters.lightly import accelerate

RELAXING = Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy()})


class Unlabelled(FakeData):
    def __getitem__(self, index: int) -> tuple[Any]:
        return (super().__getitem__(index)[0],)


@pytest.fixture
def loader() -> DataLoader[Any]:
    """16 batches of views of 32 px, made by one worker that stays."""
    pipeline = Compose([RandomResizedCrop(32), ToTensor()])
    images = Unlabelled(size=32, image_size=(3, 40, 40), transform=pipeline)
    return DataLoader(images, batch_size=2, num_workers=1, persistent_workers=True, prefetch_factor=1)


def note_sides(vit: nn.Module) -> list[int]:
    noted: list[int] = []
    vit.register_forward_pre_hook(lambda module, args: noted.append(args[0].shape[-1]))
    return noted


def test_views_grow_before_the_schedule_relaxes(make_pair: Any, make_trainer: Any, loader: Any) -> None:
    module = accelerate(make_pair(), RELAXING)
    sides = note_sides(module.backbone)
    scale_views(loader, module)
    make_trainer().fit(module, loader)  # 2 epochs of 16 steps
    assert module.tokens == [1 + 2] * 16 + [1 + 16] * 16
    assert module.teacher_tokens == [1 + 4] * 16 + [1 + 16] * 16
    assert set(sides[1:12]) == {16}
    assert set(sides[16:]) == {32}


def _stop_at(trainer: Any, step: int, *_: Any) -> None:
    trainer.should_stop = trainer.global_step == step


def test_a_run_that_goes_on_begins_with_full_views(
    make_pair: Any, make_trainer: Any, loader: Any, tmp_path: Path
) -> None:
    for stopped_at, checkpoint in ((6, None), (32, tmp_path / "last.ckpt")):
        module = accelerate(make_pair(), Stepwise({0.0: Strategy(0.5, 16), 0.9: Strategy()}))
        trainer = make_trainer(max_steps=32, max_epochs=-1)
        module.on_train_batch_end = partial(_stop_at, trainer, stopped_at)
        restarted = DataLoader(loader.dataset, batch_size=2, num_workers=1, persistent_workers=True, prefetch_factor=1)
        sides = note_sides(module.backbone)
        scale_views(restarted, module)
        trainer.fit(module, restarted, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert trainer.global_step == 32
    assert len(sides) == 32 - 6
    assert sides[0] == 32
    assert 16 in sides
    assert sides[-1] == 32
    assert module.tokens == [1 + 2] * (29 - 6) + [1 + 16] * 3


def test_a_module_without_compression_is_left_alone(make_pair: Any, make_trainer: Any, loader: Any) -> None:
    module = make_pair()
    sides = note_sides(module.backbone)
    with pytest.raises(ValueError, match="must be compressed first"):
        scale_views(loader, module)
    torch.manual_seed(0)
    make_trainer(max_epochs=1).fit(module, loader)
    assert set(sides) == {32}
