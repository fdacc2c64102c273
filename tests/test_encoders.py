"""Which models can be compressed, in which architectures it works, and how all others are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from timm.layers.hybrid_embed import HybridEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from seqcompress import SequenceScheduler, Strategy, compress, get_strategy, is_compressed, num_tokens, restore
from seqcompress.encoders import find_encoder, is_encoder, registry
from seqcompress.encoders.vision_transformer import TimmVisionTransformer

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


class FixedPositions(VisionTransformer):
    """Like the ViT of MoCo-v3: sine and cosine positions that are not trained."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        side, quarter = self.patch_embed.grid_size[0], self.embed_dim // 4
        angles = torch.arange(side).unsqueeze(1) / 10000 ** (torch.arange(quarter) / quarter)  # (side, D / 4)
        along = torch.cat((angles.sin(), angles.cos()), dim=1)  # (side, D / 2)
        rows, columns = along.unsqueeze(1).expand(-1, side, -1), along.unsqueeze(0).expand(side, -1, -1)
        positions = torch.cat((rows, columns), dim=2).flatten(0, 1)
        prefix = torch.zeros(1, self.embed_dim)
        self.pos_embed = nn.Parameter(torch.cat((prefix, positions)).unsqueeze(0), requires_grad=False)


ARCHITECTURES: dict[str, Callable[[], VisionTransformer]] = {
    "class token": partial(VisionTransformer, **SMALL),
    "no class token, average pooling": partial(VisionTransformer, **SMALL, class_token=False, global_pool="avg"),
    "registers": partial(VisionTransformer, **SMALL, reg_tokens=4),
    "registers only": partial(VisionTransformer, **SMALL, reg_tokens=2, class_token=False, global_pool="avg"),
    "distillation token": partial(VisionTransformerDistilled, **SMALL),
    "positions of patches only": partial(VisionTransformer, **SMALL, reg_tokens=1, no_embed_class=True),
    "average pooling": partial(VisionTransformer, **SMALL, global_pool="avg"),
    "attention pooling": partial(VisionTransformer, **SMALL, class_token=False, global_pool="map"),
    "pre-norm, no bias": partial(VisionTransformer, **SMALL, pre_norm=True),
    "fixed positions": partial(FixedPositions, **SMALL),
    "no positions": partial(VisionTransformer, **SMALL, pos_embed="none"),
    "dynamic size": partial(VisionTransformer, **SMALL, dynamic_img_size=True),
    "dynamic size, registers": partial(
        VisionTransformer, **SMALL, dynamic_img_size=True, reg_tokens=2, no_embed_class=True
    ),
    "dynamic size, no positions": partial(VisionTransformer, **SMALL, dynamic_img_size=True, pos_embed="none"),
    "not square": partial(VisionTransformer, **{**SMALL, "img_size": (16, 48)}),
    "one channel": partial(VisionTransformer, **SMALL, in_chans=1),
    "layer scale, qk norm": partial(VisionTransformer, **SMALL, init_values=0.1, qk_norm=True),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> VisionTransformer:
    vit = ARCHITECTURES[request.param]()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith("_token") or (name == "pos_embed" and parameter.requires_grad):
                parameter.normal_()
    return vit.train()


def _views(vit: Any, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)


@pytest.mark.parametrize("patch", [16])
def test_scaled_patches_give_the_output_of_timms_own_resized_model(architecture: Any, patch: int) -> None:
    native, views = copy.deepcopy(architecture), _views(architecture)
    native.set_input_size(patch_size=patch)
    compress(architecture, patch_size=patch)
    torch.testing.assert_close(architecture(views), native(views), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.75), Strategy(0.5, 16)])
def test_kept_tokens_are_those_of_timms_own_resized_model(
    architecture: Any, strategy: Strategy, first_tokens: Any, patches_among: Any
) -> None:
    native, views, prefix = copy.deepcopy(architecture), _views(architecture), architecture.num_prefix_tokens
    native.set_input_size(patch_size=strategy.patch_size or 8)
    every = first_tokens(native, views)
    tokens = first_tokens(compress(architecture, strategy), views)
    assert tokens.shape[1] == num_tokens(architecture, strategy, architecture.patch_embed.img_size)
    assert torch.equal(tokens[:, :prefix], every[:, :prefix])
    subset = patches_among(tokens[:, prefix:], every[:, prefix:])
    assert [len(set(patches)) for patches in subset.tolist()] == [tokens.shape[1] - prefix] * 3


def test_every_trained_parameter_has_a_gradient(architecture: Any) -> None:
    compress(architecture, Strategy(0.5, 16))(_views(architecture)).square().sum().backward()
    # mask tokens and position kinds aside, what the plain model trains is what the compressed one trains
    missing = [name for name, value in architecture.named_parameters() if value.requires_grad and value.grad is None]
    assert missing == []


def test_evaluation_and_restored_training_are_those_of_the_plain_model(architecture: Any) -> None:
    plain, views = copy.deepcopy(architecture), _views(architecture)
    compress(architecture, Strategy(0.5, 16))
    architecture(views)
    assert torch.equal(architecture.eval()(views), plain.eval()(views))
    assert torch.equal(restore(architecture).train()(views), plain.train()(views))


def test_position_dropout_falls_on_the_kept_tokens(tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit(pos_drop_rate=0.25), Strategy(0.5)).train()
    tokens = first_tokens(vit, torch.randn(64, 3, 32, 32))
    assert tokens.shape == (64, 9, 32)
    zeros = (tokens == 0).double().mean(dim=(0, 2))  # of each token
    assert float(zeros.mean()) == pytest.approx(0.25, abs=0.01)
    assert zeros.max() < 0.32  # five standard deviations


def test_every_block_takes_part_with_stochastic_depth_and_dropout(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(drop_path_rate=0.2, proj_drop_rate=0.1, attn_drop_rate=0.1), token_dropout=0.5).train()
    vit(torch.randn(8, 3, 32, 32))[:, 0].sum().backward()
    assert all(float(block.attn.qkv.weight.grad.abs().sum()) > 0 for block in vit.blocks)


def _hybrid(**settings: Any) -> VisionTransformer:
    stem = partial(HybridEmbed, backbone=ConvStem(channels=(8, 16, 32), depth=3), proj=False)
    return VisionTransformer(**{**SMALL, "embed_layer": stem, "patch_size": 1}, **settings)


@pytest.mark.parametrize("dynamic", [False, True])
def test_tokens_of_a_convolutional_stem_can_be_dropped(dynamic: bool, first_tokens: Any, patches_among: Any) -> None:
    vit, views = _hybrid(dynamic_img_size=dynamic).train(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        vit.pos_embed.normal_()
    every = first_tokens(vit, views)
    assert every.shape[1] == 17
    tokens = first_tokens(compress(vit, token_dropout=0.75), views)
    assert tokens.shape == (4, 5, 32)
    assert torch.equal(tokens[:, :1], every[:, :1])
    assert [len(set(row)) for row in patches_among(tokens[:, 1:], every[:, 1:]).tolist()] == [4] * 4


def test_patches_that_are_not_square_are_never_made_smaller() -> None:
    vit, views = VisionTransformer(**{**SMALL, "patch_size": (8, 16)}).train(), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="patch_size must be at least the encoder's own, 8 x 16, got 8"):
        compress(vit, patch_size=8)
    assert num_tokens(vit, Strategy(), 32) == 9
    assert num_tokens(vit, Strategy(0.0, 16), 32) == 5
    assert vit.train().forward_features(views).shape == (2, 9, 32)
    assert compress(vit, patch_size=16).forward_features(views).shape == (2, 5, 32)
    wide = VisionTransformer(**{**SMALL, "img_size": (32, 128), "patch_size": (2, 32)})  # as of spectrograms
    plan = SequenceScheduler(compress(wide, "default"), total_steps=10).schedule
    assert {strategy.patch_size for strategy in plan.strategies()} == {None, 32}


def test_patches_of_a_convolutional_stem_cannot_be_scaled() -> None:
    vit = _hybrid()
    with pytest.raises(ValueError, match=r"patch_size must be None .* HybridEmbed, got 16"):
        compress(vit, patch_size=16)
    assert not is_compressed(vit)


def _masked(vit: Any) -> Any:
    return MaskedVisionTransformerTIMM(vit)


@pytest.mark.parametrize("where", ["the masked ViT", "the ViT in it", "the ViT before wrapping"])
@pytest.mark.parametrize("settings", [{}, {"reg_tokens": 2}, {"dynamic_img_size": True}], ids=str)
def test_lightlys_masked_vit_is_compressed_wherever_one_points_at(
    where: str, settings: dict[str, Any], tiny_vit: Any, first_tokens: Any, patches_among: Any
) -> None:
    vit, views = tiny_vit(**settings).train(), torch.randn(4, 3, 32, 32)
    strategy, prefix = Strategy(0.5, 16), vit.num_prefix_tokens
    if where == "the ViT before wrapping":
        masked = _masked(compress(vit, strategy))
    else:
        masked = _masked(vit)
        compress(masked if where == "the masked ViT" else vit, strategy)
    assert get_strategy(masked) == get_strategy(vit) == strategy
    tokens = first_tokens(masked, views)

    native = copy.deepcopy(vit)
    restore(native).set_input_size(patch_size=16)
    every = first_tokens(native, views)
    assert tokens.shape == (4, prefix + 2, 32)
    torch.testing.assert_close(tokens[:, :prefix], every[:, :prefix])
    assert [len(set(row)) for row in patches_among(tokens[:, prefix:], every[:, prefix:]).tolist()] == [2] * 4
    assert masked(views).shape == (4, 32)
    assert not is_compressed(restore(masked))
    assert first_tokens(masked, views).shape[1] == prefix + 16


@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("kind", ["idx_mask", "idx_keep", "mask"])
def test_masks_drop_nothing_and_chosen_tokens_are_refused_while_compressed(
    kind: str, batch: int, tiny_vit: Any
) -> None:
    masked, views = _masked(tiny_vit()), torch.randn(batch, 3, 32, 32)
    argument = (torch.arange(17) > 12 if kind == "mask" else torch.arange(1, 5)).expand(batch, -1)
    plain = masked.eval()(views, **{kind: argument})
    compress(masked, token_dropout=0.5)
    assert torch.equal(masked(views, **{kind: argument}), plain)
    masked.train()
    if kind == "mask":
        assert torch.equal(masked(views, mask=argument), plain)
    else:
        words = rf"{kind} must be None while a compressed encoder trains, got a tensor of shape \({batch}, 4\)"
        with pytest.raises(ValueError, match=words):
            masked(views, **{kind: argument})
    assert masked(views).shape == (batch, 32)


def _resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=0)


def _swin() -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


class _Container(nn.Module):
    """What a training framework's module looks like: an encoder, a head, a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"backbone": VisionTransformer(**SMALL)})
        self.head = nn.Linear(32, 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_resnet, "ResNet"),
        (_swin, "SwinTransformer"),
        (lambda: nn.Linear(2, 2), "Linear"),
        (lambda: nn.DataParallel(VisionTransformer(**SMALL)), "DistributedDataParallel"),
        (lambda: nn.DataParallel(_resnet()), "DataParallel"),
        (lambda: "vit_tiny_patch16_224", "'vit_tiny_patch16_224'"),
        (lambda: VisionTransformer, "VisionTransformer"),
        (lambda: None, "None"),
        (_Container, r"_Container.*\.student\.backbone: pass that"),
        (lambda: nn.Sequential(VisionTransformer(**SMALL), nn.Linear(32, 8)), r"Sequential.*\.0: pass that"),
    ],
)
def test_anything_else_is_refused_in_three_lines_that_say_where_to_read_on(make: Any, words: str) -> None:
    model = make()
    before = _look(model)
    with pytest.raises(TypeError, match=words) as raised:
        compress(model)
    assert "Supported: most ViTs of timm, Hugging Face, torchvision, DINO and one's own: docs/" in str(raised.value)
    assert len(str(raised.value)) < 3 * 120
    assert _look(model) == before
    assert not is_encoder(model)


@pytest.mark.parametrize("make", [_resnet, lambda: "teacher", _Container])
def test_a_teacher_that_is_not_supported_is_named_and_the_model_left_alone(make: Any, tiny_vit: Any) -> None:
    vit = tiny_vit()
    with pytest.raises(TypeError, match="teacher must be a supported ViT"):
        compress(vit, teacher=make())
    assert not is_compressed(vit)


def _look(model: object) -> list[Any]:
    if not isinstance(model, nn.Module):
        return []
    return [
        (name, type(module), sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


def test_a_subclass_is_known_without_being_registered() -> None:
    encoder = find_encoder(FixedPositions(**SMALL))
    assert (encoder.patch_size, encoder.image_size) == ((8, 8), (32, 32))


def _timms() -> list[str]:
    # Eva, relative positions, and stems that fix the width
    other = ["*dinov3*", "*lingbot*", "*sapiens2*", "*rope*", "*relpos*", "*_pe_*", "*mci*"]
    return timm.list_models(["vit_*", "deit*", "flexivit*", "test_vit*"], exclude_filters=other)


def test_a_kind_of_ones_own_is_asked_before_the_built_in_one_that_it_is_derived_from(
    monkeypatch: pytest.MonkeyPatch, tiny_vit: Any
) -> None:
    monkeypatch.setattr(registry, "_kinds", [*registry._kinds])

    @registry.register
    class Mine(TimmVisionTransformer):
        positions_in_blocks = True

        @staticmethod
        def recognises(model: nn.Module) -> bool:
            return isinstance(model, FixedPositions)

    assert type(find_encoder(FixedPositions(**SMALL))) is Mine
    assert type(find_encoder(tiny_vit())) is TimmVisionTransformer


def test_what_timm_builds_from_its_vision_transformer_is_accepted() -> None:
    names = _timms()
    assert len(names) > 100
    # timm registers one architecture under many names: every third tries them all
    for name in names[::3]:
        vit = timm.create_model(name, embed_dim=32, depth=1, num_heads=2, num_classes=0, device="meta")
        assert get_strategy(compress(vit, token_dropout=0.5)) == Strategy(0.5), name
        assert not is_compressed(restore(vit)), name


@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_224", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224", "flexivit_small",
     "vit_base_patch16_clip_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224",
     "vit_medium_patch16_reg4_gap_256", "vit_betwixt_patch16_reg4_gap_256", "vit_base_patch16_xp_224"],
)  # fmt: skip
def test_the_well_known_ones_train_on_half_the_patches_of_twice_the_size(name: str, first_tokens: Any) -> None:
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    vit = timm.create_model(name, **small).train()
    side, patch = vit.patch_embed.img_size[0], 2 * vit.patch_embed.patch_size[0]
    views = torch.randn(1, 3, side, side)
    tokens = first_tokens(compress(vit, Strategy(0.5, patch)), views)
    assert tokens.shape[1] == vit.num_prefix_tokens + round(0.5 * round(side / patch) ** 2)
    vit(views).square().sum().backward()
    assert float(vit.patch_embed.proj.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "beit_base_patch16_224"])
def test_close_relatives_that_need_more_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="Supported:"):
        compress(timm.create_model(name, device="meta"))
