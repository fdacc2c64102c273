"""Batches that are accumulated are run together while sequences are short, and updates stay what they are."""

from __future__ import annotations

import csv
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from seqcompress import Stepwise, Strategy, accelerate, compress, set_strategy
from seqcompress.adapters.lightning import SequenceCompression
from seqcompress.adapters.merging import merged, most_together, times
from seqcompress.schedules import Online

Build = Callable[..., Any]

HALVES = Stepwise({0.0: Strategy(0.0, 16), 0.5: Strategy()})  # 5 and 17 tokens, no subset of which is drawn
THIRDS = Stepwise({0.0: Strategy(0.5, 16), 0.34: Strategy(0.0, 16), 0.67: Strategy()})  # 3, 5 and 17


@pytest.fixture
def make_regressor(pl: Any, tiny_vit: Build) -> Build:
    """Builds a LightningModule whose loss is a mean over samples; it notes views and tokens of each forward."""

    class Regressor(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny_vit(global_pool="avg")
            self.ran: list[tuple[int, int]] = []
            self.losses: list[float] = []
            self.backbone.blocks[0].register_forward_pre_hook(
                lambda block, args: self.ran.append(tuple(args[0].shape[:2]))
            )

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            views = batch["views"] if isinstance(batch, dict) else batch[0]
            loss = (self.backbone(views).mean(dim=1) - views.mean(dim=(1, 2, 3))).square().mean()
            self.losses.append(loss.item())
            self.log("loss", loss, batch_size=len(views))
            return {"loss": loss, "views": len(views)}

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}
            ]

    def build(plan: Any = None, batch: Any = None) -> Any:
        torch.manual_seed(3)
        return accelerate(Regressor(), plan or HALVES, batch=batch)

    return build


def loader(batches: int, size: int = 4) -> DataLoader[Any]:
    views = torch.randn(batches * size, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(views), batch_size=size)


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters())


@pytest.mark.parametrize(
    ("batches", "accumulated", "ran"),
    [
        (8, 4, [(8, 5)] * 4 + [(4, 17)] * 8),
        (7, 4, [(8, 5)] * 3 + [(4, 5)] + [(4, 17)] * 7),  # the last update of an epoch has fewer batches
        (6, 6, [(8, 5)] * 3 + [(4, 17)] * 6),
        (6, 3, [(4, 5)] * 6 + [(4, 17)] * 6),  # nothing that is a power of two
    ],
)
def test_updates_are_those_of_the_same_batches_one_by_one(
    make_regressor: Build, make_trainer: Build, batches: int, accumulated: int, ran: list[tuple[int, int]]
) -> None:
    ends = []
    for policy in (None, "merge"):
        module, trainer = make_regressor(batch=policy), make_trainer(accumulate_grad_batches=accumulated)
        trainer.fit(module, loader(batches))
        updates = 2 * -(-batches // accumulated)
        assert trainer.global_step == updates
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**updates)
        ends.append((weights(module), module.ran))
    (alone, ran_alone), (together, ran_together) = ends
    assert ran_alone == [(4, 5)] * batches + [(4, 17)] * batches
    assert ran_together == ran
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (alone - weights(make_regressor())).abs().max() > 0.01


def test_each_stage_runs_as_many_batches_at_once_as_fit_and_logs_it(
    pl: Any, make_regressor: Build, make_trainer: Build, tmp_path: Path, told: list[str]
) -> None:
    module, logger = make_regressor(THIRDS, "merge"), pl.loggers.CSVLogger(tmp_path)
    make_trainer(max_epochs=3, accumulate_grad_batches=8, logger=logger, log_every_n_steps=1).fit(module, loader(8))
    assert module.ran == [(16, 3)] * 2 + [(8, 5)] * 4 + [(4, 17)] * 8
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["seqcompress/batch_factor"]) for row in rows if row["seqcompress/batch_factor"]] == [4, 2, 1]
    losses = [module.losses[1], module.losses[5], module.losses[13]]  # what a step logs is what it was
    assert [float(row["loss"]) for row in rows if row["loss"]] == pytest.approx(losses)
    assert not [line for line in told if "merge" in line]


def test_a_loss_that_compares_samples_sees_those_of_all_merged_batches(
    make_pair: Build, make_trainer: Build, images: Any
) -> None:
    compared: list[int] = []
    module = accelerate(make_pair(), Strategy(0.5, 16), batch="merge")
    module.criterion.register_forward_pre_hook(lambda criterion, args: compared.append(len(args[0])))
    make_trainer(max_epochs=1, accumulate_grad_batches=4).fit(module, images)
    assert compared == [16]
    assert module.tokens == [3]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (lambda number: number, "each has a int of its own"),
        (lambda number: torch.zeros(4, number), "they have tensors of the shapes (4, 0) and (4, 1)"),
        # Crops that a collate function has stacked, first of all samples, then second of all; and one weight for all.
        (lambda number: torch.zeros(8, 2), "they have tensors of 4 and 8 rows, so not all of one a sample"),
        (lambda number: torch.ones(1), "they have tensors of 1 and 4 rows, so not all of one a sample"),
    ],
    ids=["number", "shape", "stacked", "scalar"],
)
def test_batches_that_cannot_be_merged_are_run_one_by_one_and_that_is_said_once(
    make_regressor: Build, make_trainer: Build, told: list[str], extra: Build, reason: str
) -> None:
    views = torch.randn(8, 4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    batches = [{"views": each, "extra": extra(number)} for number, each in enumerate(views)]
    ends = []
    for policy in (None, "merge"):
        module = make_regressor(batch=policy)
        make_trainer(accumulate_grad_batches=4).fit(module, DataLoader(batches, batch_size=None))
        assert module.ran == [(4, 5)] * 8 + [(4, 17)] * 8
        ends.append(weights(module))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)
    assert [line for line in told if "merge" in line] == [
        f"seqcompress: batch='merge': some batches were run one by one, which cannot be merged: {reason}"
    ]


def test_a_smaller_last_batch_counts_as_much_as_it_does_alone(make_regressor: Build, make_trainer: Build) -> None:
    ends = []
    for policy in (None, "merge"):
        module = make_regressor(Strategy(0.0, 16), policy)
        views = torch.randn(14, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        make_trainer(max_epochs=1, accumulate_grad_batches=2).fit(
            module, DataLoader(TensorDataset(views), batch_size=4)
        )
        ends.append(weights(module))
    assert module.ran == [(8, 5), (4, 5), (2, 5)]
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("left_out", [{0}, {3}, {1, 2, 3}, {0, 1, 2, 3}])
def test_a_step_that_leaves_out_a_batch_loses_none_of_the_others(
    make_regressor: Build, make_trainer: Build, left_out: set[int]
) -> None:
    views = torch.randn(4, 4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    batches, ends = [{"views": each, "number": number} for number, each in enumerate(views)], []
    for policy in (None, "merge"):
        module = make_regressor(Strategy(0.0, 16), policy)
        step = module.training_step
        module.training_step = lambda batch, batch_idx, step=step: (
            None if batch["number"] in left_out else step(batch, batch_idx)
        )
        make_trainer(max_epochs=1, accumulate_grad_batches=4).fit(module, DataLoader(batches, batch_size=None))
        assert module.ran == [(4, 5)] * (4 - len(left_out))
        ends.append(weights(module))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batches", [[0, 0], [0, 1]], ids=["merged", "one by one"])
@pytest.mark.parametrize("output", [{"los": torch.ones(())}, 1.0], ids=["no loss", "no tensor"])
def test_lightning_says_what_a_step_must_return(
    make_regressor: Build, make_trainer: Build, output: Any, batches: list[int]
) -> None:
    module, words = make_regressor(Strategy(0.0, 16), "merge"), []
    module.training_step = lambda batch, batch_idx: output
    data = [{"views": torch.zeros(4, 3, 32, 32), "number": number} for number in batches]
    for accumulated in (1, 2):
        with pytest.raises(Exception, match=r"(?i)in automatic.optimization") as caught:
            make_trainer(accumulate_grad_batches=accumulated).fit(module, DataLoader(data, batch_size=None))
        words.append(str(caught.value))
    assert words[0] == words[1]


def test_a_mean_over_an_epoch_counts_every_sample_once(make_regressor: Build, make_trainer: Build) -> None:
    means = []
    for policy in (None, "merge"):
        module = make_regressor(HALVES, policy)
        step = module.training_step

        def training_step(batch: Any, batch_idx: int, module: Any = module, step: Any = step) -> Any:
            module.log("mean", batch[0].mean(), on_step=False, on_epoch=True)
            return step(batch, batch_idx)

        module.training_step = training_step
        trainer = make_trainer(max_epochs=1, accumulate_grad_batches=4)
        trainer.fit(module, loader(8))
        means.append(trainer.callback_metrics["mean"].item())
    assert module.ran == [(8, 5)] * 2 + [(4, 17)] * 4
    assert means == pytest.approx([loader(8).dataset.tensors[0].mean().item()] * 2, abs=1e-6)


def test_a_run_that_goes_on_is_the_one_that_never_stopped(
    make_regressor: Build, make_trainer: Build, tmp_path: Path
) -> None:
    whole = make_regressor(THIRDS, "merge")
    make_trainer(max_epochs=6, accumulate_grad_batches=4).fit(whole, loader(8))
    first, second = make_regressor(THIRDS, "merge"), make_regressor(THIRDS, "merge")
    trainer = make_trainer(max_epochs=6, accumulate_grad_batches=4)
    first.on_train_epoch_end = lambda: (
        trainer.save_checkpoint(tmp_path / "half.ckpt") if trainer.current_epoch == 2 else None
    )
    trainer.fit(first, loader(8))
    make_trainer(max_epochs=6, accumulate_grad_batches=4).fit(second, loader(8), ckpt_path=tmp_path / "half.ckpt")
    assert second.ran == whole.ran[-len(second.ran) :]
    assert torch.equal(weights(second), weights(whole))


def test_between_batches_a_module_has_its_own_training_step(make_regressor: Build, make_trainer: Build) -> None:
    module, seen = make_regressor(Strategy(0.0, 16), "merge"), []
    own = module.training_step
    module.on_before_zero_grad = lambda optimizer: seen.append("training_step" in vars(module))
    module.on_train_batch_end = lambda *args: seen.append("training_step" in vars(module))
    make_trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, loader(2))
    assert seen == [True, False, False]
    assert module.training_step == own


def test_a_step_that_fails_leaves_nothing_behind(make_regressor: Build, make_trainer: Build) -> None:
    module = make_regressor(batch="merge")

    def fail(criterion: nn.Module, args: Any) -> None:
        raise KeyError("broken")

    handle = module.backbone.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="broken"):
        make_trainer(accumulate_grad_batches=2).fit(module, loader(4))
    assert "training_step" not in vars(module)
    handle.remove()
    make_trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, loader(4))
    assert module.ran == [(8, 5), (4, 17), (4, 17)]


@pytest.mark.parametrize(
    ("plan", "accumulated", "manual", "line"),
    [
        (HALVES, 1, False, "needs an even accumulate_grad_batches of the Trainer, such as 4, got 1: batches are run"),
        (HALVES, 1, True, "goes on without, since its training_step optimizes by hand"),
        (Online(HALVES), 4, False, "goes on without, since an online plan measures by the batches as they come"),
    ],
)
def test_what_cannot_be_merged_is_said_in_a_line(
    make_pair: Build,
    make_trainer: Build,
    images: Any,
    told: list[str],
    plan: Any,
    accumulated: int,
    manual: bool,
    line: str,
) -> None:
    module = accelerate(make_pair(manual_steps=int(manual)), plan, batch="merge")
    make_trainer(max_epochs=1, accumulate_grad_batches=accumulated).fit(module, images)
    assert len([said for said in told if line in said]) == 1
    assert len(module.tokens) == 4


def test_encoders_that_are_driven_by_hand_are_merged_by_what_is_in_force(
    make_regressor: Build, make_trainer: Build
) -> None:
    module = make_regressor(batch="merge")
    set_strategy(module.backbone, Strategy(0.0, 16))
    make_trainer(max_epochs=1, accumulate_grad_batches=4).fit(module, loader(8))
    assert module.ran == [(8, 5)] * 4


def test_a_frozen_student_runs_plain_and_is_not_merged(make_regressor: Build, make_trainer: Build) -> None:
    module = make_regressor(Strategy(0.0, 16), "merge")
    module.backbone.requires_grad_(False)
    module.scale = nn.Parameter(torch.ones(()))
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx)["loss"] * module.scale
    make_trainer(max_epochs=1, accumulate_grad_batches=4).fit(module, loader(4))
    assert module.ran == [(4, 17)] * 4


def test_a_rehearsal_is_run_where_most_tokens_come_together(
    pl: Any, make_regressor: Build, make_trainer: Build
) -> None:
    class OnADevice(SequenceCompression, pl.Callback):
        whole_gradient_strategies = pl.strategies.Strategy

        def _has_own_memory(self, device: Any) -> bool:
            return True

    # 3 tokens four times are more than 9 tokens once.
    module = make_regressor(Stepwise({0.0: Strategy(0.5), 0.5: Strategy(0.5, 16)}), "merge")
    trainer = make_trainer(callbacks=[OnADevice()], max_epochs=4, accumulate_grad_batches=4)
    trainer.callbacks.remove(next(one for one in trainer.callbacks if "CompressionCallback" in type(one).__name__))
    trainer.fit(module, loader(4))
    assert module.ran == [(4, 9)] * 4 + [(16, 3)] * 3


DISTRIBUTED = """
import sys
import torch, timm
from torch.utils.data import DataLoader, TensorDataset
import {package} as pl
from seqcompress import Strategy, accelerate


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0
        )
        self.ran = []
        self.vit.blocks[0].register_forward_pre_hook(lambda block, args: self.ran.append(tuple(args[0].shape[:2])))

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        if self.unlike and self.global_rank == 1:
            batch.append(len(self.ran) + self.global_step + self.trainer.fit_loop.total_batch_idx)
        return batch

    def training_step(self, batch, batch_idx):
        return self.vit(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.vit.parameters(), lr=1e-2)

done = {{}}
for name, policy, unlike in (("alone", None, False), ("merged", "merge", False), ("unlike", "merge", True)):
    pl.seed_everything(0, verbose=False)
    module = accelerate(Module(), Strategy(0.0, 16), batch=policy)
    module.unlike = unlike
    trainer = pl.Trainer(
        strategy="ddp", accelerator="cpu", devices=2, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(32, 3, 32, 32)), batch_size=4))
    done[name] = module.ran, torch.nn.utils.parameters_to_vector(module.parameters()).detach()
torch.save(done, f"{{sys.argv[1]}}/rank{{trainer.global_rank}}.pt")
"""


@pytest.mark.parametrize("package", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.soak)])
def test_ranks_merge_together_or_not_at_all(package: str, tmp_path: Path, run_ranks: Build) -> None:
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED.format(package=package))
    run_ranks([sys.executable, script, tmp_path], cwd=tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name, ran in (("alone", [(4, 5)] * 8), ("merged", [(8, 5)] * 4), ("unlike", [(4, 5)] * 8)):
        assert first[name][0] == second[name][0] == ran
        assert torch.equal(first[name][1], second[name][1])
        torch.testing.assert_close(first[name][1], first["alone"][1], rtol=0, atol=1e-6)


class Labelled(NamedTuple):
    views: list[Tensor]
    names: list[str]


def test_batches_are_joined_along_samples_whatever_holds_them() -> None:
    batches = [
        (
            torch.full((2,), number),
            Labelled([torch.full((2, 3), number)] * 2, [f"{number}a", f"{number}b"]),
            {"size": 8},
        )
        for number in range(2)
    ]
    (indices, (views, names), same), reason = merged(batches)
    assert reason is None
    assert indices.tolist() == [0, 0, 1, 1]
    assert [view[:, 0].tolist() for view in views] == [[0, 0, 1, 1]] * 2
    assert names == ["0a", "0b", "1a", "1b"]
    assert same == {"size": 8}
    assert merged([{"views": torch.zeros(3, 2), "sizes": [8, 4]}] * 2)[0]["sizes"] == [8, 4]
    assert merged([{"views": torch.zeros(2, 2), "sizes": [size] * 3} for size in (8, 4)]) == (
        None,
        "each has a list of its own",
    )
    assert merged([{"views": torch.zeros(2, 2), "box": torch.zeros(2, 2).numpy()} for _ in range(2)])[1] == (
        "each has a ndarray of its own"
    )
    assert merged([{"a": 1}, {"b": 1}]) == (None, "they have different keys")
    assert merged([torch.zeros(4, 2), torch.zeros(3, 2)]) == (None, "they have 3 and 4 samples")
    assert merged([torch.zeros(4, 2), None]) == (None, "their parts are NoneType and Tensor")
    assert merged([{"crops": torch.zeros(4, 2), "views": torch.zeros(8, 2)}])[1] is None  # alone, it is what it is
    assert merged([torch.zeros(1, 2), [1]]) == (None, "their parts are Tensor and list")
    assert merged([torch.zeros(()), torch.ones(())])[1] == "each has a Tensor of its own"


def test_batches_whose_rows_are_not_samples_are_not_joined() -> None:
    masks = torch.tensor([[True, False], [False, True], [True, True], [False, False]])  # (crops, patches)
    batch = {  # as DINOv2 collates it: the crops of one kind after those of another, and masks by their indices
        "collated_global_crops": torch.zeros(4, 3, 8, 8),
        "collated_local_crops": torch.zeros(16, 3, 4, 4),
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
    }
    reason = "they have tensors of 4 and 16 rows, so not all of one a sample"
    assert merged([batch, batch]) == (None, reason)


@pytest.mark.parametrize(("fit", "accumulated", "together"), [(8, 4, 4), (4, 6, 2), (4, 3, 1), (1, 8, 1), (16, 48, 16)])
def test_as_many_batches_are_merged_as_fit_and_divide_an_update(fit: int, accumulated: int, together: int) -> None:
    assert most_together(fit, accumulated) == together


@pytest.mark.parametrize("batch", ["grow", True, 2])
def test_an_unknown_policy_is_refused_before_anything_is_changed(tiny_vit: Build, batch: Any) -> None:
    vit = compress(tiny_vit(), HALVES, batch="merge")
    with pytest.raises(ValueError, match=r"^batch must be 'merge' or None, got "):
        compress(vit, "strong", batch=batch)
    assert vit.patch_embed.compression.plan == HALVES
    assert pickle.loads(pickle.dumps(vit.patch_embed.compression)).batch == "merge"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.1, 20_000.0, float("inf")])
def test_a_merged_loss_keeps_its_value_and_has_its_gradient_as_often(dtype: torch.dtype, value: float) -> None:
    weight = torch.tensor(value, dtype=dtype, requires_grad=True)
    loss = 1 * weight
    often = times(loss, 4)
    assert torch.equal(often, loss)
    often.backward()
    assert weight.grad == 4
    assert torch.equal(times(loss.detach(), 4), loss)


def test_numbers_that_are_tensors_are_joined_where_they_are_the_same() -> None:
    batches = [{"views": torch.zeros(2, 3), "size": torch.tensor(8)}] * 2
    whole, reason = merged(batches)
    assert (reason, len(whole["views"]), whole["size"]) == (None, 4, 8)
