"""ViTs of any class: what is promised for timm's holds for every one whose shape is known."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import resample_abs_pos_embed
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqcompress import (
    Budget,
    SequenceScheduler,
    Stepwise,
    Strategy,
    compress,
    get_strategy,
    is_compressed,
    num_tokens,
    relative_cost,
    restore,
    set_strategy,
)
from seqcompress.encoders import find_encoder, is_encoder, registry

HUGGING_FACE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMaker(nn.Module):
    def __init__(self, side: int, patch: int, width: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = side, patch
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class LikeDino(nn.Module):
    """Positions follow the size of the image, which the model reads off the image itself."""

    def __init__(self, side: int = 32, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.patch_embed = PatchMaker(side, 8, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (side // 8) ** 2, width))
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def positions(self, patches: int, height: int, width: int) -> Tensor:
        own = self.pos_embed.shape[1] - 1
        if patches == own and height == width:
            return self.pos_embed
        side = math.isqrt(own)
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height // 8, width // 8), mode="bicubic")
        return torch.cat((self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = self.patch_embed(x)
        positions = self.positions(x.shape[1], height, width)
        x = self.pos_drop(torch.cat((self.cls_token.expand(batch, -1, -1), x), dim=1) + positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class Chunk(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class NestedBlock(Block):
    """Takes the crops of all sizes at once."""

    def forward(self, x: Any) -> Any:
        return [Block.forward(self, each) for each in x] if isinstance(x, list) else super().forward(x)


class LikeDinov2(LikeDino):
    """Meta's second: registers behind the positions, blocks in chunks, crops in lists, a dictionary of features."""

    def __init__(self, chunks: int = 2) -> None:
        super().__init__()
        self.register_tokens = nn.Parameter(torch.randn(1, 2, 32))
        self.mask_token = nn.Parameter(torch.randn(1, 32))
        blocks = [NestedBlock(32) for _ in range(4)]
        size = 4 // chunks if chunks else 4
        self.blocks = nn.ModuleList(
            Chunk([nn.Identity()] * start + blocks[start : start + size]) for start in range(0, 4, size)
        )
        if not chunks:
            self.blocks = nn.ModuleList(blocks)
        self.checkpoints: bool | None = None  # whether reentrant

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        _, _, height, width = x.shape
        x = self.patch_embed(x)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.unsqueeze(0), x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.positions(x.shape[1] - 1, height, width)
        return torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)

    def forward_features_list(self, crops: list[Tensor], masks: list[Tensor | None]) -> list[dict[str, Any]]:
        x: Any = [self.prepare_tokens_with_masks(*each) for each in zip(crops, masks, strict=True)]
        for block in self.blocks:
            x = block(x)
        return [self._named(*each) for each in zip(x, masks, strict=True)]

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        if isinstance(x, list):
            return self.forward_features_list(x, masks)
        x = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            x = block(x) if self.checkpoints is None else checkpoint(block, x, use_reentrant=self.checkpoints)
        return self._named(x, masks)

    def _named(self, x: Tensor, masks: Tensor | None) -> dict[str, Any]:
        normed = self.norm(x)
        return {"class": normed[:, 0], "registers": normed[:, 1:3], "patches": normed[:, 3:], "masks": masks}

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        features = self.forward_features(*args, **kwargs)
        return features if is_training else features["class"]


class ForkWithOtherNames(nn.Module):
    """No class token, positions added in place, a mean at the end, nothing between positions and blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = (32, 48)
        self.stem = nn.Conv2d(1, 16, 8, 8, bias=False)
        self.where = nn.Parameter(torch.randn(1, 24, 16))
        self.trunk = nn.Sequential(*[Block(16) for _ in range(3)])

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.stem(2 * pixels - 1).flatten(2).mT.contiguous()
        tokens += self.where
        return self.trunk(tokens).mean(dim=1)


def _hugging_face(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name.removesuffix("Model").removesuffix("ForImageClassification") + "Config")
    model: nn.Module = getattr(transformers, name)(config(**HUGGING_FACE, **settings))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "DINO": LikeDino,
    "Meta's DINOv2": LikeDinov2,
    "fork": ForkWithOtherNames,
    "torchvision": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=4),
    "ViTModel": lambda: _hugging_face("ViTModel"),
    "ViTForImageClassification": lambda: _hugging_face("ViTForImageClassification"),
    "Dinov2Model": lambda: _hugging_face("Dinov2Model"),
    "Dinov2WithRegistersModel": lambda: _hugging_face("Dinov2WithRegistersModel"),
    "SiglipVisionModel": lambda: _hugging_face("SiglipVisionModel"),
    "CLIPVisionModel": lambda: _hugging_face("CLIPVisionModel"),
}
STRATEGIES = [Strategy(0.5), Strategy(0.0, 16), Strategy(0.5, 16), Strategy(0.75)]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    made = MODELS[request.param]()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "pos" in name or "token" in name:
                parameter.normal_()
    return made.train()


def _blocks(model: nn.Module) -> list[nn.Module]:
    blocks: list[nn.Module] = find_encoder(model).blocks
    return blocks


def _views(model: nn.Module, batch: int = 3) -> Tensor:
    encoder = find_encoder(model)
    return torch.randn(batch, encoder.channels, *encoder.image_size)


def _output(model: nn.Module, views: Tensor) -> Tensor:
    output = model(views)
    return output if isinstance(output, Tensor) else output[0]


def _first_and_last(model: nn.Module, views: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens at the first block, and behind the last."""
    seen: list[Tensor] = []
    blocks = _blocks(model)
    first = blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    last = blocks[-1].register_forward_hook(
        lambda block, args, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    try:
        model(views)
    finally:
        first.remove()
        last.remove()
    return seen[0], seen[1]


def _prefix(model: nn.Module) -> int:
    return find_encoder(model).num_prefix_tokens


def _size(model: nn.Module) -> tuple[int, int]:
    return find_encoder(model).image_size


def _scaled_reference(model: nn.Module, views: Tensor, patch: int) -> Tensor:
    """Tokens at the first block with a resampled kernel and interpolated positions, by timm's own functions."""
    encoder = find_encoder(model)
    conv, prefix = encoder.patch_embed, encoder.num_prefix_tokens
    every = _first_and_last(model, torch.zeros_like(views))[0]
    if isinstance(encoder.model, ForkWithOtherNames):
        views, zero = 2 * views - 1, torch.full_like(views, -1.0)
    else:
        zero = torch.zeros_like(views)
    own = every[:, prefix:] - conv(zero).flatten(2).mT
    side = [size // 8 for size in _size(model)]
    kernel = resample_patch_embed(conv.weight, [patch, patch])
    patches = F.conv2d(views, kernel, conv.bias, stride=patch)
    positions = resample_abs_pos_embed(own[:1], list(patches.shape[-2:]), side, num_prefix_tokens=0)
    return torch.cat((every[:, :prefix], patches.flatten(2).mT + positions), dim=1)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_kept_tokens_and_their_features_are_those_of_the_plain_model(
    model: nn.Module, strategy: Strategy, patches_among: Any
) -> None:
    if type(model).__name__ == "CLIPVisionModel":
        pytest.skip("its norm before the blocks is tested by itself")
    views, prefix = _views(model), _prefix(model)
    every = _first_and_last(model, views)[0] if strategy.patch_size is None else None
    every = _scaled_reference(model, views, strategy.patch_size) if every is None else every  # type: ignore[arg-type]
    plain = copy.deepcopy(model)
    tokens, features = _first_and_last(compress(model, strategy), views)
    assert tokens.shape[1] == num_tokens(model, strategy, _size(model))
    torch.testing.assert_close(tokens[:, :prefix], every[:, :prefix])
    subset = patches_among(tokens[:, prefix:], every[:, prefix:])
    assert [len(set(row)) for row in subset.tolist()] == [tokens.shape[1] - prefix] * len(views)
    torch.testing.assert_close(features, find_encoder(plain).after_embedding(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.0, 16)], ids=str)
def test_a_norm_behind_the_positions_sees_the_tokens_that_are_kept(strategy: Strategy, patches_among: Any) -> None:
    model = _hugging_face("CLIPVisionModel").train()
    norm = next(module for name, module in model.named_modules() if name.endswith("pre_layrnorm"))
    views, seen = _views(model), []
    plain = copy.deepcopy(model)
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens, _ = _first_and_last(compress(model, strategy), views)
    torch.testing.assert_close(norm(seen[0]), tokens)
    if strategy.patch_size is None:
        every, _ = _first_and_last(plain, views)
        patches_among(tokens, every)


def test_the_base_strategy_and_evaluation_are_the_plain_model_bit_for_bit(model: nn.Module) -> None:
    plain, views = copy.deepcopy(model), _views(model)
    compress(model, Strategy())
    assert torch.equal(_output(model, views), _output(plain, views))
    compress(model, Strategy(0.5, 16))
    _output(model, views)
    assert torch.equal(_output(model.eval(), views), _output(plain.eval(), views))
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())


def test_every_parameter_that_trains_plainly_trains_compressed(model: nn.Module) -> None:
    trained = []
    for strategy in (Strategy(), Strategy(0.5, 16)):
        model.zero_grad(set_to_none=True)
        _output(compress(model, strategy), _views(model)).square().sum().backward()
        trained.append({name for name, value in model.named_parameters() if value.grad is not None})
    assert trained[0] == trained[1]


def test_restore_leaves_nothing_behind(model: nn.Module) -> None:
    before = [(name, type(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    parameters = list(model.parameters())
    restore(compress(compress(model, token_dropout=0.5), Strategy(0.25, 16)))
    after = [(name, type(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    assert after == before
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert not is_compressed(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent_and_works(model: nn.Module, duplicate: Any) -> None:
    twin = duplicate(compress(model, token_dropout=0.5))
    views = _views(model)
    restore(model)
    assert _first_and_last(twin, views)[0].shape[1] == num_tokens(twin, Strategy(0.5), _size(twin))
    assert _first_and_last(model, views)[0].shape[1] == num_tokens(model, Strategy(), _size(model))


def test_costs_and_budgets_are_counted(model: nn.Module) -> None:
    size = _size(model)
    cost = relative_cost(model, Strategy(0.5), size)
    expected = num_tokens(model, Strategy(0.5), size) / num_tokens(model, Strategy(), size)
    assert cost == pytest.approx(expected, abs=0.12)
    budget = Budget(compress(model, token_dropout=0.5))
    model(_views(model))
    assert budget.units == pytest.approx(3 * 3 * cost)


def test_student_and_teacher_follow_a_schedule(model: nn.Module) -> None:
    teacher, views = copy.deepcopy(model).requires_grad_(False), _views(model)
    plan = Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy(0.5), 0.75: Strategy()})
    scheduler = SequenceScheduler(compress(model, plan, teacher=teacher), total_steps=4)
    for step in range(4):
        strategy, size = plan(step / 4), _size(model)
        assert _first_and_last(model, views)[0].shape[1] == num_tokens(model, strategy, size)
        with torch.no_grad():
            assert _first_and_last(teacher, views)[0].shape[1] == num_tokens(model, strategy.without_dropout(), size)
        scheduler.step()
    assert get_strategy(model) == Strategy()


def test_the_same_seed_gives_the_same_tokens_and_half_precision_trains(model: nn.Module) -> None:
    compress(model, Strategy(0.5, 16))
    views, seen = _views(model), []
    for _ in range(2):
        torch.manual_seed(3)
        seen.append(_first_and_last(model, views)[0])
    assert torch.equal(*seen)
    model.to(torch.bfloat16)
    _output(model, views.to(torch.bfloat16)).float().square().sum().backward()


def test_timms_own_vit_is_known_by_its_shape_too(tiny_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    views, outputs = torch.randn(2, 3, 32, 32), []
    for kinds in (registry._kinds, [kind for kind in registry._kinds if kind.general]):
        monkeypatch.setattr(registry, "_kinds", kinds)
        vit = compress(tiny_vit(), Strategy(0.5, 16)).train()
        torch.manual_seed(2)
        outputs.append(vit(views))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


# Multi-crop, dropout, masks, checkpointing


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.0, 16), Strategy(0.5, 16)], ids=str)
@pytest.mark.parametrize("view", [(16, 16), (24, 40), (48, 48)])
def test_local_views_have_the_models_own_positions(
    strategy: Strategy, view: tuple[int, int], patches_among: Any
) -> None:
    model, views = LikeDino().train(), torch.randn(3, 3, *view)
    every, _ = _first_and_last(model, views)
    tokens, _ = _first_and_last(compress(model, strategy), views)
    assert tokens.shape[1] == num_tokens(model, strategy, view)
    if strategy.patch_size is None:
        patches_among(tokens[:, 1:], every[:, 1:])


# Meta's class: lists of crops, masks, chunks


def test_each_crop_of_one_list_has_a_selection_of_its_own(patches_among: Any) -> None:
    model = LikeDinov2(chunks=0).train()
    crops = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 24), torch.randn(2, 3, 32, 32)]
    every = [model.prepare_tokens_with_masks(crop) for crop in crops]
    seen: list[list[Tensor]] = []
    compress(model, token_dropout=0.5)
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model.blocks[-1].register_forward_hook(lambda block, args, output: seen.append(output))
    features = model(crops, masks=[None] * 3, is_training=True)
    subsets = []
    for tokens, plain, patches in zip(seen[0], every, (8, 3, 8), strict=True):
        torch.testing.assert_close(tokens[:, :3], plain[:, :3])
        subsets.append(patches_among(tokens[:, 3:], plain[:, 3:]))
        assert [len(set(row)) for row in subsets[-1].tolist()] == [patches] * len(plain)
    assert not torch.equal(subsets[0][:2].sort().values, subsets[2].sort().values)
    for alone, together, named in zip(seen[0], seen[1], features, strict=True):
        torch.testing.assert_close(find_encoder(model).after_embedding(alone), together, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.norm(together)[:, 3:], named["patches"])


def test_crops_of_one_list_are_scaled_and_counted_each() -> None:
    model = LikeDinov2(chunks=0).train()
    crops = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    budget = Budget(compress(model, Strategy(0.0, 16)))
    together = model(crops, masks=[None, None], is_training=True)
    assert [named["patches"].shape for named in together] == [(2, 4, 32), (3, 1, 32)]
    in_one = budget.units
    for crop, named in zip(crops, together, strict=True):
        torch.testing.assert_close(model(crop), named["class"])
    assert budget.units == pytest.approx(2 * in_one)
    plain = restore(copy.deepcopy(model))
    set_strategy(model, Strategy())
    for one, other in zip(
        model.forward_features(crops, [None] * 2), plain.forward_features(crops, [None] * 2), strict=True
    ):
        assert torch.equal(one["patches"], other["patches"])


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.0, 16)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_among_crops_are_refused_while_compressed_by_whichever_method(strategy: Strategy, batch: int) -> None:
    model = LikeDinov2(chunks=0).train()
    views, mask = torch.randn(batch, 3, 32, 32), torch.zeros(batch, 16, dtype=torch.bool)
    compress(model, strategy)
    words = rf"masks must be None while a compressed encoder trains, got a mask of shape \({batch}, 16\)"
    for run in (
        lambda: model([views, views], masks=[None, mask], is_training=True),
        lambda: model.forward_features([views, views], [mask, None]),
        lambda: model.forward_features(views, mask),
    ):
        with pytest.raises(ValueError, match=words):
            run()
    assert torch.equal(model.eval().forward_features(views, mask)["masks"], mask)
    set_strategy(model.train(), Strategy())
    assert model.forward_features(views, mask)["patches"].shape == (batch, 16, 32)


@pytest.mark.parametrize("chunks", [0, 1, 2, 4])
def test_blocks_in_chunks_are_all_of_the_blocks(chunks: int) -> None:
    model = LikeDinov2(chunks)
    assert len(find_encoder(model).blocks) == 4
    assert all(isinstance(block, NestedBlock) for block in find_encoder(model).blocks)
    assert relative_cost(model, Strategy(0.5), 32) == relative_cost(LikeDinov2(0), Strategy(0.5), 32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_first_block_sees_joined_tokens(reentrant: bool, gradients: Any) -> None:
    model, views, found = compress(LikeDinov2(chunks=0), Strategy(0.5, 16)).train(), torch.randn(2, 3, 32, 32), []
    for model.checkpoints in (None, reentrant):
        model.zero_grad()
        torch.manual_seed(5)
        (model(views) * model(views.flip(0))).sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_a_fork_that_mixes_up_the_crops_of_a_list_is_refused() -> None:
    class Mixed(LikeDinov2):
        def forward_features_list(self, crops: list[Tensor], masks: Any) -> Any:
            made = [self.prepare_tokens_with_masks(crop) for crop in crops]
            made[0] = made[0].roll(1, dims=1)
            return self.blocks[0](made)

    with pytest.raises(TypeError, match="it mixes up crops in one list"):
        compress(Mixed(chunks=0), token_dropout=0.5)


def test_dropout_behind_the_positions_falls_on_the_tokens_that_are_kept() -> None:
    model = compress(LikeDino(dropout=0.25), Strategy(0.5)).train()
    tokens, _ = _first_and_last(model, torch.randn(64, 3, 32, 32))
    zeros = (tokens == 0).double().mean(dim=(0, 2))
    assert float(zeros.mean()) == pytest.approx(0.25, abs=0.01)
    assert zeros.max() < 0.32


def test_masks_are_refused_while_compressed() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTModel(transformers.ViTConfig(**HUGGING_FACE), use_mask_token=True).train()
    views, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    compress(model, token_dropout=0.5)
    with pytest.raises(ValueError, match="bool_masked_pos must be None while a compressed encoder trains"):
        model(views, bool_masked_pos=mask)
    assert model.eval()(views, bool_masked_pos=mask)[0].shape == (2, 17, 32)


def test_masks_of_lightlys_wrapper_are_refused_where_every_view_has_its_blank() -> None:
    from lightly.models.modules import MaskedVisionTransformerTorchvision

    masked = MaskedVisionTransformerTorchvision(MODELS["torchvision"]())
    views, index = torch.randn(3, 3, 32, 32), torch.arange(1, 5).expand(3, -1)
    compress(masked, token_dropout=0.5).train()
    for name, words in (("idx_mask", "puts others in their place"), ("idx_keep", "adds or takes away tokens")):
        with pytest.raises(RuntimeError, match=words):
            masked(views, **{name: index})
    assert _first_and_last(masked, views)[0].shape == (3, 9, 32)
    assert masked.eval()(views, idx_mask=index).shape == (3, 32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_hugging_faces_gradient_checkpointing_has_the_gradients_of_a_run_without(
    reentrant: bool, gradients: Any
) -> None:
    found = []
    torch.manual_seed(4)
    model = compress(_hugging_face("Dinov2Model"), Strategy(0.5, 16)).train()
    views = torch.randn(2, 3, 32, 32)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(5)
        _output(model, views).square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


# Refusals


def test_crops_in_one_list_are_refused_while_compressed() -> None:
    class ListsOfCrops(LikeDino):
        """As DINOv2's class does in training: every block takes the crops of all sizes at once."""

        def forward_list(self, crops: list[Tensor]) -> list[Tensor]:
            tokens = [self.patch_embed(crop) + self.pos_embed[:, 1:] for crop in crops]
            for block in self.blocks:
                tokens = block(tokens)
            return tokens

    class TakesLists(Block):
        def forward(self, x: Any) -> Any:
            return [super(TakesLists, self).forward(each) for each in x] if isinstance(x, list) else super().forward(x)

    model = ListsOfCrops()
    model.blocks = nn.ModuleList(TakesLists(32) for _ in range(2))
    crops = [torch.randn(2, 3, 32, 32), torch.randn(4, 3, 32, 32)]
    compress(model, token_dropout=0.5).train()
    with pytest.raises(ValueError, match=r"crops must be passed one by one .* got a list of 2"):
        model.forward_list(crops)
    assert [len(tokens) for tokens in model.eval().forward_list(crops)] == [2, 4]
    assert [len(tokens) for tokens in compress(model, Strategy()).train().forward_list(crops)] == [2, 4]


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(0.5)], ids=str)
@pytest.mark.parametrize("views", [[torch.zeros(2, 3, 32, 32)] * 2, (torch.zeros(2, 3, 32, 32),), "views"], ids=type)
def test_views_that_are_no_tensor_are_refused_in_one_line(views: Any, strategy: Strategy) -> None:
    number = f" of {len(views)}" if not isinstance(views, str) else ""
    model = compress(LikeDino(), strategy).train()
    given = rf"views must be a tensor of shape \(B, C, H, W\), got a {type(views).__name__}{number}: a LikeDino takes"
    with pytest.raises(TypeError, match=given):
        model.patch_embed.proj(views)
    model(torch.zeros(2, 3, 32, 32))  # nothing is left waiting


def test_a_teacher_in_eval_mode_leaves_it_to_the_model_to_refuse_a_list(tiny_vit: Any) -> None:
    student, teacher = tiny_vit().train(), tiny_vit()
    compress(student, Strategy(0.5), teacher=teacher)
    with pytest.raises(AttributeError, match="'list' object has no attribute 'shape'"):
        tiny_vit().eval()([torch.zeros(2, 3, 32, 32)])
    with pytest.raises(AttributeError, match="'list' object has no attribute 'shape'"):
        teacher.eval()([torch.zeros(2, 3, 32, 32)])


def test_a_vit_that_keeps_its_patches_in_a_map_is_refused_with_the_list_of_what_is_supported() -> None:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    sam = VisionTransformerSAM(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    with pytest.raises(TypeError, match=r"got a tensor of shape \(1, 4, 4, 32\)\. Supported: Meta's DinoVision"):
        compress(sam, token_dropout=0.5)


class ConvolutionalStem(LikeDino):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed.proj = nn.Sequential(  # type: ignore[assignment]
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1)
        )


class BlocksThatKnowWhere(LikeDino):
    def __init__(self) -> None:
        super().__init__()
        for number, block in enumerate(self.blocks):
            block.register_buffer("where", torch.linspace(0, 1e-3 * (1 + number), 17)[:, None])
            block.forward = lambda x, block=block: Block.forward(block, x + block.where[: x.shape[1]])  # type: ignore[method-assign]


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **settings)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_timm("vit_relpos_small_patch16_224", depth=1), "VisionTransformerRelPos whose tokens"),
        (_timm("beit_base_patch16_224", depth=1), "Beit"),
        (_timm("convnext_atto"), "ConvNeXt"),
        (_timm("naflexvit_base_patch16_gap", depth=1), r"NaFlexVit, which is given patches .*patch_drop_rate"),
        (_timm("hiera_tiny_224"), "Hiera"),
        (lambda: _hugging_face("BeitModel", use_relative_position_bias=True), "its blocks fail"),
        (ConvolutionalStem, "ConvolutionalStem"),
        (BlocksThatKnowWhere, "its blocks know where a patch was"),
    ],
)
def test_what_shape_cannot_do_is_refused_with_the_reason(make: Any, words: str) -> None:
    model = make()
    before = [(name, type(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    with pytest.raises(TypeError, match=words) as raised:
        compress(model, token_dropout=0.5)
    assert "Supported:" in str(raised.value)
    assert before == [(name, type(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()]


def test_a_model_without_values_cannot_be_proven() -> None:
    with torch.device("meta"):
        model = LikeDino()
    with pytest.raises(TypeError, match="its parameters have no values here"):
        compress(model, token_dropout=0.5)


def test_what_holds_a_vit_beside_other_things_is_none() -> None:
    assert is_encoder(LikeDino())
    assert not is_encoder(nn.Sequential(LikeDino(), nn.Linear(32, 8)))
    assert not is_encoder(nn.ModuleDict({"student": LikeDino(), "teacher": LikeDino()}))
