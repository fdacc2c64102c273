"""Methods that mask tokens themselves, as iBOT and DINOv2 do: the mask is drawn on the grid that is in force.

Lightly's own examples are run as well, where ``SEQCOMPRESS_LIGHTLY_SOURCE`` names a checkout of its repository.
"""

from __future__ import annotations

import ast
import copy
import os
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import timm
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss
from lightly.models.modules import MaskedVisionTransformerTIMM, MaskedVisionTransformerTorchvision
from lightly.models.utils import random_block_mask, update_momentum
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import VisionTransformer as TorchvisionViT

import seqcompress
from seqcompress import Strategy, compress, get_strategy, grid_size, restore, schedules, set_strategy

Build = Callable[..., Any]
SOURCES = Path(os.environ.get("SEQCOMPRESS_LIGHTLY_SOURCE", "")) / "examples" / "pytorch_lightning"
needs_sources = pytest.mark.skipif(
    not (SOURCES / "ibot.py").exists(),
    reason="SEQCOMPRESS_LIGHTLY_SOURCE does not name a checkout of Lightly's repository (docs/lightly.md)",
)
PATCH_16 = Strategy(0.0, 16)
HALF_AND_16 = Strategy(0.5, 16)


class Pair(nn.Module):
    """A student that predicts what its teacher, frozen and in eval mode, makes of the tokens that are masked."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.student = MaskedVisionTransformerTIMM(vit, antialias=False, pos_embed_initialization="skip")
        self.student.mask_token.data.normal_()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 64))
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False).eval()
        self.views_loss = DINOLoss(output_dim=64, teacher_temp=0.07)
        self.patch_loss = IBOTPatchLoss(output_dim=64, teacher_temp=0.07)

    def draw(self, views: Tensor) -> Tensor:
        """Rectangles of the grid that the teacher says it has."""
        rows, columns = self.teacher.vit.patch_embed.grid_size
        assert self.teacher.sequence_length == 1 + rows * columns
        random.seed(7)  # what Lightly draws with
        return random_block_mask((len(views), rows, columns), 1.0, 0.3, 0.6, min_num_masks_per_block=1)

    def loss(self, large: Tensor, small: Tensor | None = None, of_patches: Tensor | None = None) -> Tensor:
        of_patches = self.draw(large) if of_patches is None else of_patches
        mask = nn.functional.pad(of_patches.flatten(1), (1, 0))
        with torch.no_grad():
            taught = self.teacher.encode(large)
        learned = self.student.encode(large, mask=mask)
        seen = [self.head(learned[:, 0])]
        if small is not None:
            seen.append(self.head(self.student.encode(small)[:, 0]))
        views = self.views_loss(
            self.teacher_head(taught[:, 0]).chunk(2), [half for out in seen for half in out.chunk(2)], teacher_temp=0.05
        )
        patches = self.patch_loss(
            self.teacher_head(taught[mask]), self.head(learned[mask]), of_patches, teacher_temp=0.05
        )
        return views + patches


@pytest.fixture
def pair(tiny_vit: Build) -> Pair:
    return Pair(tiny_vit(dynamic_img_size=True))


def native(pair: Pair) -> Pair:
    """The plain pair for patches of 16 px: kernels and positions resampled by timm."""
    plain = copy.deepcopy(pair)
    for encoder in (plain.student, plain.teacher):
        encoder.vit.set_input_size(patch_size=16)
    return plain


def large(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def small(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(4))


# By number


@pytest.mark.parametrize("strategy", [PATCH_16, HALF_AND_16], ids=str)
def test_losses_and_gradients_are_those_of_the_plain_module_on_that_grid(strategy: Strategy, pair: Pair) -> None:
    plain = native(pair)
    seqcompress.accelerate(pair, strategy)
    mask = pair.draw(large())
    assert torch.equal(mask, plain.draw(large()))
    assert mask.shape == (4, 2, 2)
    assert 0 < mask.sum() < 16
    with pytest.warns(UserWarning, match="a teacher in eval mode gets larger patches all the same") as told:
        loss = pair.loss(large())
    assert len(told) == 1
    expected = plain.loss(large())
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    loss.backward()
    expected.backward()
    compared = 0
    for name, weight in plain.named_parameters():
        if weight.grad is not None and "patch_embed" not in name and "pos_embed" not in name:
            torch.testing.assert_close(pair.get_parameter(name).grad, weight.grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared > 20
    assert pair.student.mask_token.grad.abs().sum() > 1e-4


@pytest.mark.parametrize("settings", [{}, {"dynamic_img_size": True}, {"no_embed_class": True, "reg_tokens": 2}])
def test_masked_features_of_student_and_teacher_are_the_native_ones(settings: Any, tiny_vit: Build) -> None:
    pair = Pair(tiny_vit(**settings))
    plain, prefix = native(pair), pair.student.vit.num_prefix_tokens
    seqcompress.accelerate(pair, HALF_AND_16)
    pair.teacher.train()  # whoever draws masks by themselves asks nobody for the grid
    mask = torch.zeros(4, prefix + 4, dtype=torch.bool)
    mask[:, prefix:] = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    mask[3, 0] = True  # Lightly masks prefix tokens as well, where it is told to
    for masked in (mask, mask.int()):
        torch.testing.assert_close(
            pair.student.encode(large(), mask=masked), plain.student.encode(large(), mask=mask), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(
        pair.student(large(), mask=mask), plain.student(large(), mask=mask), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(pair.teacher.encode(large()), plain.teacher.encode(large()), rtol=1e-4, atol=1e-5)


def test_a_teacher_in_eval_mode_is_the_plain_one_until_the_host_draws_masks_on_its_grid(pair: Pair) -> None:
    plain = copy.deepcopy(pair).teacher.encode(large())
    seqcompress.accelerate(pair, PATCH_16)
    pair.student.encode(large())
    assert torch.equal(pair.teacher.encode(large()), plain)
    mask = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"for 2 \* 2 patches, while a teacher in eval mode is not compressed: call"):
        pair.student.encode(large(), mask=mask)
    assert torch.equal(pair.teacher.encode(large()), plain)
    assert pair.teacher.vit.patch_embed.grid_size == (2, 2)
    with pytest.warns(UserWarning, match="a teacher in eval mode gets larger patches all the same"):
        assert pair.teacher.encode(large()).shape == pair.student.encode(large(), mask=mask).shape == (4, 5, 32)


def test_a_forward_with_a_mask_drops_nothing_and_one_without_does(pair: Pair, note_tokens: Build) -> None:
    plain = copy.deepcopy(pair)
    seqcompress.accelerate(pair, Strategy(0.5))
    student, teacher = note_tokens(pair.student.vit), note_tokens(pair.teacher.vit)
    assert torch.equal(pair.loss(large()), plain.loss(large()))  # as if nothing was compressed
    assert (student, teacher) == ([17], [17])
    pair.loss(large(), small())
    assert (student, teacher) == ([17, 17, 3], [17, 17])  # a local view has 4 patches, of which 2 stay


@pytest.mark.parametrize(("strategy", "tokens"), [(Strategy(), (17, 5)), (PATCH_16, (5, 2)), (HALF_AND_16, (5, 2))])
def test_the_grid_follows_the_strategy_at_once(
    strategy: Strategy, tokens: tuple[int, int], pair: Pair, note_tokens: Build
) -> None:
    seqcompress.accelerate(pair, Strategy())
    student, teacher = note_tokens(pair.student.vit), note_tokens(pair.teacher.vit)
    for current in (Strategy(), strategy):
        set_strategy(pair, current)
        pair.loss(large(), small()).backward()
    assert (student, teacher) == ([17, 5, *tokens], [17, tokens[0]])
    with torch.no_grad():
        pair.eval().student(large())
    assert student[-1] == 17


# What the model says of its grid


def test_the_grid_is_told_to_whoever_draws_masks_while_it_is_in_force(pair: Pair) -> None:
    encoders = (pair.student, pair.teacher)

    def told() -> list[Any]:
        embeds = [encoder.vit.patch_embed for encoder in encoders]
        return [(embed.grid_size, embed.num_patches) for embed in embeds]

    seqcompress.accelerate(pair, HALF_AND_16)
    assert told() == [((2, 2), 4)] * 2
    assert [encoder.sequence_length for encoder in encoders] == [5, 5]
    assert grid_size(pair.student, get_strategy(pair), 32) == (2, 2)
    set_strategy(pair, Strategy(0.5))
    assert told() == [((4, 4), 16)] * 2
    set_strategy(pair, PATCH_16)
    pair.eval()
    assert told() == [((4, 4), 16)] * 2
    pair.train()
    assert told() == [((2, 2), 4)] * 2
    restore(pair)
    assert told() == [((4, 4), 16)] * 2


def test_the_models_own_code_is_told_the_grid_of_its_positions(pair: Pair) -> None:
    plain = native(pair).student.vit
    seqcompress.accelerate(pair, PATCH_16)
    vit = pair.student.vit
    torch.testing.assert_close(vit(large()), plain(large()), rtol=1e-4, atol=1e-5)
    own = copy.deepcopy(restore(copy.deepcopy(pair)).student.vit)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs without gradients, and so plain
        torch.testing.assert_close(vit(small()), own(small()))
    torch.testing.assert_close(vit(large()), plain(large()), rtol=1e-4, atol=1e-5)
    assert vit.patch_embed.grid_size == (2, 2)


@pytest.mark.filterwarnings("ignore:.*ran in train mode without gradients")
def test_the_grid_is_that_of_training_also_after_features_were_looked_at(pair: Pair) -> None:
    seqcompress.accelerate(pair, PATCH_16)
    with torch.no_grad():
        assert pair.student.encode(large()).shape[1] == 17
        assert pair.student.vit.patch_embed.grid_size == (4, 4)
    assert pair.student.vit.patch_embed.grid_size == (2, 2)
    assert pair.loss(large(), small()).isfinite()


def test_a_vit_that_nobody_masks_says_what_it_was_built_for(tiny_vit: Build) -> None:
    vit = compress(tiny_vit(), PATCH_16).train()
    assert (vit.patch_embed.grid_size, vit.patch_embed.num_patches) == ((4, 4), 16)
    vit.set_input_size(64)
    assert vit.patch_embed.grid_size == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("vit", PATCH_16, 32), TypeError, "model must be a supported ViT, got 'vit'"),
        ((None, "patch 16", 32), TypeError, "strategy must be a Strategy, got 'patch 16'"),
        ((None, PATCH_16, 0), ValueError, "image_size must be"),
        ((None, Strategy(0.0, 48), 32), ValueError, "patch_size 48 x 48 for a view of 32 x 32"),
    ],
)
def test_no_grid_is_made_up_for_what_has_none(arguments: Any, error: Any, words: str, tiny_vit: Build) -> None:
    model, *others = arguments
    with pytest.raises(error, match=words):
        grid_size(tiny_vit() if model is None else model, *others)


def test_rows_and_columns_are_those_that_a_view_is_cut_into(tiny_vit: Build) -> None:
    vit = tiny_vit(dynamic_img_size=True)
    assert grid_size(vit, Strategy(0.75), (32, 48)) == (4, 6)
    assert grid_size(vit, Strategy(0.0, 12), (32, 48)) == (3, 4)


# What is refused


@pytest.mark.parametrize("shape", [(4, 17), (4, 4), (3, 5), (4, 2, 2), (5,)], ids=str)
def test_a_mask_of_another_grid_is_refused_with_both_shapes_and_the_way_to_draw_it(shape: Any, pair: Pair) -> None:
    seqcompress.accelerate(pair, HALF_AND_16)
    words = r"mask must have the shape \(4, 1 \+ 2 \* 2\) under drop 0.5, patch 16"
    with pytest.raises(ValueError, match=words) as got:
        pair.student.encode(large(), mask=torch.zeros(shape, dtype=torch.bool))
    assert f"got {shape}: draw it" in str(got.value)
    line = "rows, columns = seqcompress.grid_size(model, seqcompress.get_strategy(model), 32)"
    assert str(got.value).endswith(line)
    names = {"model": pair.student, "seqcompress": seqcompress}
    exec(line, names)
    pair.teacher.train()
    right = torch.zeros(4, 1 + names["rows"] * names["columns"], dtype=torch.bool)  # type: ignore[operator]
    assert pair.student.encode(large(), mask=right).shape == (4, 5, 32)


def test_a_mask_that_was_drawn_before_the_strategy_changed_is_refused_as_well(pair: Pair) -> None:
    seqcompress.accelerate(pair, PATCH_16)
    mask = torch.zeros(4, pair.student.sequence_length, dtype=torch.bool)
    set_strategy(pair, Strategy(0.5))
    with pytest.raises(
        ValueError, match=r"mask must have the shape \(4, 1 \+ 4 \* 4\) under drop 0.5, got \(4, 5\): draw"
    ):
        pair.student.encode(large(), mask=mask)


@pytest.mark.parametrize("name", ["idx_mask", "idx_keep"])
@pytest.mark.parametrize("strategy", [Strategy(0.5), PATCH_16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_what_predicts_pixels_or_leaves_tokens_out_is_refused(
    name: str, strategy: Strategy, batch: int, pair: Pair
) -> None:
    index = {name: torch.arange(1, 4).expand(batch, -1)}
    plain = pair.student.train().encode(large(batch), **index)
    seqcompress.accelerate(pair, strategy)
    words = rf"{name} must be None while a compressed encoder trains, got a tensor of shape \({batch}, 3\): .*MAE"
    with pytest.raises(ValueError, match=words):
        pair.student.encode(large(batch), **index)
    assert torch.equal(pair.student.eval().encode(large(batch), **index), plain)
    set_strategy(pair, Strategy())
    assert torch.equal(pair.student.train().encode(large(batch), **index), plain)
    restore(pair)
    assert "preprocess" not in vars(pair.student)
    assert torch.equal(pair.student.encode(large(batch), **index), plain)


@pytest.mark.parametrize("batch", [1, 4])
def test_masks_of_torchvisions_vit_are_those_of_the_plain_one(batch: int) -> None:
    vit = TorchvisionViT(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
    masked = MaskedVisionTransformerTorchvision(vit).train()
    masked.mask_token.data.normal_()
    every = masked.preprocess(large(batch), mask=torch.ones(batch, 17, dtype=torch.bool))
    compress(masked, HALF_AND_16)
    mask = torch.zeros(batch, 5, dtype=torch.bool)
    mask[:, 2] = True
    # At a view's second patch of 16 px: the mean of positions near it, in torch's own interpolation, plus the token.
    own = every[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(own, (2, 2), mode="bicubic", antialias=True).flatten(2).mT[:, 1]
    masked.vit.encoder.layers[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    seen: list[Tensor] = []
    masked.encode(large(batch), mask=mask)
    masked.encode(large(batch), mask=torch.zeros_like(mask))
    torch.testing.assert_close(seen[0][:, 2], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[0][:, [0, 1, 3, 4]], seen[1][:, [0, 1, 3, 4]])
    assert (seen[0][:, 2] - seen[1][:, 2]).abs().max() > 0.1


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deep", "pickle"]
)
def test_a_copy_takes_masks_of_its_own(copied: Any, pair: Pair) -> None:
    seqcompress.accelerate(pair, PATCH_16)
    mask = torch.zeros(4, pair.teacher.sequence_length, dtype=torch.bool)
    assert mask.shape == (4, 5)
    mask[1:, 2] = True
    expected = pair.student.encode(large(), mask=mask)
    twin = copied(pair)
    set_strategy(pair, Strategy())
    assert twin.teacher.sequence_length == 5
    assert pair.teacher.sequence_length == 17
    torch.testing.assert_close(twin.student.encode(large(), mask=mask), expected)
    restore(twin)
    assert "preprocess" not in vars(twin.student)
    set_strategy(pair, PATCH_16)
    torch.testing.assert_close(pair.student.encode(large(), mask=mask), expected)


def test_the_state_dict_and_the_weights_are_the_plain_ones(pair: Pair) -> None:
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    weights = list(pair.parameters())
    seqcompress.accelerate(pair, HALF_AND_16)
    after = pair.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(one is other for one, other in zip(weights, pair.parameters(), strict=True))


def test_an_encoder_that_was_wrapped_after_it_was_compressed_takes_masks_once_the_wrapper_is_named(
    tiny_vit: Build,
) -> None:
    masked = MaskedVisionTransformerTIMM(compress(tiny_vit(), PATCH_16)).train()
    mask = torch.zeros(4, 5, dtype=torch.bool)
    with pytest.raises(RuntimeError):
        masked.encode(large(), mask=mask)
    assert masked.sequence_length == 17
    compress(masked, PATCH_16)
    assert masked.sequence_length == 5
    assert masked.encode(large(), mask=mask).shape == (4, 5, 32)


# Parts that are called one by one


class LeavesOut(nn.Module):
    """Holds the parts of a ViT, and gives its blocks a quarter of the tokens, as an MAE does."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit
        self.patch_embed = vit.patch_embed

    def forward(self, views: Tensor) -> Tensor:
        tokens = self.patch_embed(views)[:, :4]
        for block in self.vit.blocks:
            tokens = block(tokens)
        return tokens


def test_blocks_that_are_given_the_plain_embeddings_tokens_are_told_once(tiny_vit: Build) -> None:
    module = LeavesOut(tiny_vit()).train()
    plain = module(large())
    seqcompress.accelerate(module, HALF_AND_16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.eval()(large())
        with torch.no_grad():
            module.train()(large())
    with pytest.warns(UserWarning, match="training is uncompressed: the blocks of a compressed encoder are") as told:
        outputs = [module(large()) for _ in range(3)]
    assert len(told) == 1
    assert all(torch.equal(output, plain) for output in outputs)


def test_blocks_of_an_encoder_that_is_reached_are_nobodys_concern(tiny_vit: Build) -> None:
    vit = compress(tiny_vit(), HALF_AND_16).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit(large()).sum().backward()
        vit.blocks[0](torch.randn(4, 5, 32)).sum().backward()


# Under Lightning


def quiet_trainer(folder: Path, **settings: Any) -> Any:
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pytorch_lightning.Trainer(accelerator="cpu", default_root_dir=folder, **silent, **settings)


class Steps(pytorch_lightning.LightningModule):
    """The pair above, whose step draws masks where Lightly's examples do."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        update_momentum(self.pair.student, self.pair.teacher, m=0.99)
        loss = self.pair.loss(*batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.pair.student(batch[0])
        self.pair.teacher(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.pair.student.parameters(), lr=1e-3)


def test_a_schedule_moves_masks_of_both_from_grid_to_grid(pair: Pair, note_tokens: Build, tmp_path: Path) -> None:
    module = Steps(pair)
    plan = schedules.Stepwise({0.0: HALF_AND_16, 0.5: Strategy(0.5), 0.75: Strategy()})
    assert seqcompress.accelerate(module, plan) is module  # the one line
    student, teacher = note_tokens(pair.student.vit), note_tokens(pair.teacher.vit)
    loader = DataLoader(list(zip(large(16), small(16), strict=True)), batch_size=4)
    trainer = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, limit_val_batches=1)
    trainer.fit(module, loader, loader)
    validation = [17]
    assert student == [5, 2] * 4 + validation + [17, 3] * 2 + [17, 5] * 2 + validation
    assert teacher == [5] * 4 + validation + [17] * 4 + validation
    assert not pair.teacher.training
    assert torch.tensor(module.losses).isfinite().all()
    assert len(module.losses) == 8


@pytest.mark.parametrize(("strategy", "tokens", "together"), [(Strategy(0.75), 17, 1), (Strategy(0.75, 16), 5, 2)])
def test_masked_views_are_counted_with_all_their_tokens(
    strategy: Strategy, tokens: int, together: int, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, seen = Steps(pair), []
    seqcompress.accelerate(module, strategy, batch="merge")
    pair.student.vit.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    loader = DataLoader(list(zip(large(32), small(32), strict=True)), batch_size=4)
    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=4, log_every_n_steps=1)
    with caplog.at_level("INFO"):
        trainer.fit(module, loader)
    assert seen[::2] == [(4 * together, tokens)] * (8 // together)  # no more than the 4 x 17 of the plain step
    assert trainer.callback_metrics["seqcompress/tokens"] == tokens
    assert trainer.callback_metrics["seqcompress/batch_factor"] == together
    assert "views that are masked keep all tokens, and cost more" in caplog.text


def test_what_is_rehearsed_of_masked_views_are_the_most_of_all_their_tokens(pair: Pair) -> None:
    plan = schedules.Stepwise({0.0: PATCH_16, 0.5: Strategy(0.9)})
    compress(pair.student, plan, teacher=pair.teacher)
    assert seqcompress.SequenceScheduler(pair, total_steps=4).most_expensive() == Strategy(0.9)


def test_an_online_schedule_prices_masked_views_with_all_their_tokens(pair: Pair) -> None:
    seqcompress.accelerate(pair, Strategy(0.75, 16))
    batch, share = (large(), small()), 0.2
    scheduler = seqcompress.OnlineScheduler(pair, lambda batch: pair.loss(*batch), total_steps=400, compute_share=share)
    while not scheduler.measured_share:
        pair.loss(*batch).backward()
        scheduler.step(batch)
        assert scheduler.measured_share <= share
    assert 10 < scheduler.last_step < 400


# Lightly's own


def example(name: str) -> Any:
    """The module of one of Lightly's examples, its own source, with a small ViT of timm's."""
    tree = ast.parse((SOURCES / f"{name}.py").read_text(encoding="utf-8"))
    kept = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))]
    names: dict[str, Any] = {"__name__": name}
    exec(compile(ast.Module(kept, []), f"{name}.py", "exec"), names)

    def vit(**settings: Any) -> Any:
        return timm.create_model("vit_small_patch16_224", img_size=112, patch_size=8, depth=2, **settings)

    names |= {"vit_small_patch16_224": vit, "vit_base_patch32_224": vit}
    kinds = [kind for kind in names.values() if isinstance(kind, type) and kind.__module__ == name]
    return next(kind for kind in kinds if issubclass(kind, pytorch_lightning.LightningModule))()


class Crops(Dataset[Any]):
    """Two large views and two small ones of noise, with a label, as Lightly's transforms give them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        generator = torch.Generator().manual_seed(index)
        return [torch.randn(3, side, side, generator=generator) for side in (112, 112, 48, 48)], 0


class OneView(Crops):
    """The first of them, as what predicts pixels is given."""

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return super().__getitem__(index)[0][:1], 0


@needs_sources
@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_lightlys_examples_train_by_one_line(name: str, note_tokens: Build, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = example(name)
    plan = schedules.Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy()})
    seqcompress.accelerate(module, plan)  # the one line
    student, teacher = note_tokens(module.student_backbone.vit), note_tokens(module.teacher_backbone.vit)
    losses: list[float] = []

    class Noting(pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[Noting()])
    trainer.fit(module, DataLoader(Crops(), batch_size=2))
    # Large views have 14 x 14 patches, or 7 x 7; small ones 6 x 6, or 3 x 3, of which 4 stay.
    assert student == [50, 5] * 2 + [197, 37] * 2
    assert teacher == [50] * 2 + [197] * 2
    assert torch.tensor(losses).isfinite().all()
    assert len(losses) == 4


@needs_sources
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mae", r"idx_keep must be None while a compressed encoder trains, got a tensor of shape \(4, 50\): .*MAE"),
        ("aim", r"mask must be None while a compressed encoder trains"),
    ],
)
def test_lightlys_examples_that_predict_what_is_dropped_end_in_one_line(name: str, words: str, tmp_path: Path) -> None:
    module = example(name)
    seqcompress.accelerate(module, Strategy(0.5))
    with pytest.raises(ValueError, match=words):
        quiet_trainer(tmp_path, max_steps=1).fit(module, DataLoader(OneView(), batch_size=4))
