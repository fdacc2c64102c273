"""Under either Lightning package, a run that stops anywhere goes on as if it had not; the script holds over plans."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from seqcompress import Schedule, Stepwise, Strategy, compress, get_strategy

EVERY_KIND = Stepwise(
    {
        0.0: Strategy(0.5, 16),
        0.2: Strategy(0.75, 16),
        0.4: Strategy(0.75),
        0.6: Strategy(0.0, 16),
        0.8: Strategy(0.25),
        0.9: Strategy(),
    }
)
EPOCHS, BATCHES = 3, 5  # of an epoch, whose last one is a step of its own under accumulation


@pytest.fixture
def told(pl: Any) -> Iterator[list[str]]:
    """What the callback says through the package's logger."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(pl.__name__)
    before, logger.level = logger.level, logging.INFO
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def fit(pl: Any, tiny_vit: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Trains a compressed ViT on the same four images in every batch, and returns its module, which has noted a lot."""

    class OnlyViT(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, plan: Any) -> None:
            super().__init__()
            self.vit = compress(tiny_vit(), plan)
            self.vit.patch_embed.embed.requires_grad_(False)  # what reaches the blocks tells the subset then
            self.vit.pos_embed.requires_grad_(False)
            self.vit.cls_token.requires_grad_(False)
            self.vit.blocks[0].register_forward_pre_hook(lambda block, args: self.inputs.append(args[0].detach()))
            self.inputs: list[Tensor] = []
            self.strategies: list[Strategy] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.strategies.append(get_strategy(self.vit))
            features = self.vit(batch[0])
            return (features * torch.linspace(-1, 1, features.shape[-1])).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return torch.optim.SGD(trained, lr=0.05, momentum=0.9)

    class SaveEveryBatch(pl.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.stepped: list[bool] = []  # whether nothing waits for the next step

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.stepped.append((batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch)
            trainer.save_checkpoint(tmp_path / f"{len(self.stepped)}.ckpt")

    def run(
        plan: Any, *, resume: int | None = None, save: bool = False, epochs: int = EPOCHS, accumulate: int = 1
    ) -> Any:
        module, saving = OnlyViT(plan), SaveEveryBatch()
        torch.manual_seed(5 if resume is None else 1000 + resume)  # another process has another random state
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            accumulate_grad_batches=accumulate,
            callbacks=[saving] if save else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2)).repeat(BATCHES, 1, 1, 1)
        loader = DataLoader(TensorDataset(pixels), batch_size=4)
        trainer.fit(module, loader, ckpt_path=None if resume is None else str(tmp_path / f"{resume}.ckpt"))
        module.stepped = saving.stepped
        return module

    return run


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


@pytest.mark.parametrize(
    "accumulate", [pytest.param(1, marks=pytest.mark.soak), pytest.param(2, marks=pytest.mark.soak), 3]
)
def test_a_run_goes_on_from_every_batch_at_its_strategies_and_subsets_and_from_every_step_bit_for_bit(
    fit: Callable[..., Any], accumulate: int
) -> None:
    whole = fit(EVERY_KIND, save=True, accumulate=accumulate)
    assert len(set(whole.strategies)) >= 5
    exact = 0
    for stop in range(1, EPOCHS * BATCHES):
        resumed = fit(EVERY_KIND, resume=stop, accumulate=accumulate)
        assert resumed.strategies == whole.strategies[stop:], f"stopped after {stop} batches"
        assert same(resumed.inputs, whole.inputs[stop:]), f"stopped after {stop} batches"
        if whole.stepped[stop - 1]:  # in the middle of a step, Lightning itself loses the gradients so far
            exact += 1
            assert same([*resumed.state_dict().values()], [*whole.state_dict().values()])
    assert exact == {1: 14, 2: 8, 3: 5}[accumulate]


def test_another_plan_of_the_script_holds_and_that_is_said_in_one_line(
    fit: Callable[..., Any], told: list[str]
) -> None:
    fit(EVERY_KIND, save=True)
    told.clear()
    resumed = fit(Stepwise({0.0: Strategy(0.5), 0.9: Strategy(0.1)}), resume=6)
    assert resumed.strategies == [Strategy(0.5)] * 8 + [Strategy(0.1)]
    assert [line for line in told if "script" in line] == [
        "seqcompress: vit: goes on from its step by what this script says, not by the checkpoint: schedule 0: drop "
        "0.5; 0.9: drop 0.1 (was 0: drop 0.5, patch 16; 0.2: drop 0.75, patch 16; 0.4: drop 0.75; 0.6: patch 16; 0.8: "
        "drop 0.25; 0...); now at drop 0.5"
    ]


def test_a_longer_run_goes_on_from_its_step_and_says_so(fit: Callable[..., Any], told: list[str]) -> None:
    fit(EVERY_KIND, save=True)
    told.clear()
    resumed = fit(EVERY_KIND, resume=8, epochs=2 * EPOCHS)
    every = [EVERY_KIND.at_step(step, 2 * EPOCHS * BATCHES) for step in range(8, 2 * EPOCHS * BATCHES)]
    assert resumed.strategies == every
    (line,) = [line for line in told if "the checkpoint was at" in line]
    assert line.endswith("which is 27% of this one: goes on from its step, at drop 0.75, patch 16")


@pytest.mark.parametrize("state", [{"plans": 3, "forwards": ["x"]}, {"plans": {"vit": "{"}, "forwards": None}])
def test_what_a_checkpoint_says_of_other_plans_ends_no_run(
    fit: Callable[..., Any], tmp_path: Path, state: dict[str, Any]
) -> None:
    fit(EVERY_KIND, save=True, accumulate=2)
    checkpoint = torch.load(tmp_path / "6.ckpt", weights_only=False)
    (ours,) = (saved for name, saved in checkpoint["callbacks"].items() if "SequenceCompression" in name)
    assert Schedule.from_json(ours["plans"]["vit"]) == EVERY_KIND
    ours.update(state)
    torch.save(checkpoint, tmp_path / "6.ckpt")
    assert len(fit(EVERY_KIND, resume=6, accumulate=2).strategies) == 9
