"""An online plan under Lightning: what measures is the module's own step, and the run must not notice."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from seqcompress import OnlineScheduler, Schedule, Strategy, get_strategy
from seqcompress.adapters.lightly import accelerate
from seqcompress.gradients import online
from seqcompress.schedules import Constant, Online, Stepwise

HALF = Strategy(0.5)
PRESET = Stepwise({0.0: Strategy(0.75), 0.5: HALF, 0.75: Strategy()})
MUCH = Online(PRESET, compute_share=1.0, time_share=None)  # a decision every ten steps or so
UNMEASURED = Online(PRESET)  # 3 % of 40 steps is nothing

Build = Callable[..., Any]


def loader(batches: int) -> DataLoader[Any]:
    pixels = torch.randn(4 * batches, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(pixels), batch_size=4)


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
def make_busy(pl: Any, make_pair: Build) -> Build:
    """A pair whose step does all that a step may do: it logs, draws, and keeps a queue, statistics and a teacher."""

    def build(plan: Any) -> Any:
        module = make_pair()
        module.norm = nn.BatchNorm1d(32)
        module.register_buffer("queue", torch.zeros(8, 32))
        step = module.training_step

        def training_step(batch: list[Tensor], batch_idx: int) -> Tensor:
            noisy = batch[0] + 0.1 * torch.randn_like(batch[0])
            loss = step([noisy], batch_idx)
            features = module.norm(module.backbone(noisy))
            module.queue = torch.cat((module.queue[4:], features.detach()))
            loss = loss + 0.1 * (features @ module.queue.T).square().mean()
            module.log("own_loss", loss, on_step=True, on_epoch=True)
            module.log_dict({"own_steps": float(len(module.losses))})
            return loss

        module.training_step = training_step
        return accelerate(module, plan)

    return build


def columns(folder: str | Path) -> dict[str, list[float]]:
    with (Path(folder) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_it(pl: Any, make_busy: Build, make_trainer: Build, told: list[str], tmp_path: Path) -> None:
    module, trainer = make_busy(MUCH), make_trainer(max_epochs=4, logger=pl.loggers.CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(module, loader(10))
    print("\n".join(told))
    print(columns(trainer.log_dir).keys())
