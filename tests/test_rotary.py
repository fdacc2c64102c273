"""ViTs whose blocks turn queries and keys by where a patch was: timm's Eva, Hugging Face's DINOv3 and Meta's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import resample_patch_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

import seqcompress
from seqcompress import Budget, SequenceScheduler, Strategy, compress, num_tokens, relative_cost, restore, set_strategy
from seqcompress.schedules import Stepwise

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 0}
EVAS: dict[str, tuple[str, dict[str, Any]]] = {
    "DINOv3": ("vit_small_patch16_dinov3", {"img_size": 64}),
    "EVA02": ("eva02_tiny_patch14_224", {"img_size": 56}),
    "axial, absolute": ("vit_small_patch16_rope_ape_224", {"img_size": 64}),
    "mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 64}),
    "mixed, absolute": ("vit_small_patch16_rope_mixed_ape_224", {"img_size": 64}),
    "PE": ("vit_pe_core_tiny_patch16_384", {"img_size": 64}),
}


def _eva(kind: str) -> nn.Module:
    name, settings = EVAS[kind]
    model: nn.Module = timm.create_model(name, **SMALL, **settings)
    return _with_weights_that_matter(model)


def _dinov3(**settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        **{"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 64, "num_register_tokens": 4, "layerscale_value": 1.0, "pos_embed_rescale": None,
           **settings}
    )  # fmt: skip
    return _with_weights_that_matter(transformers.DINOv3ViTModel(config))


def _with_weights_that_matter(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model.train()


class PatchMap(nn.Module):
    def __init__(self, side: int, patch: int, width: int) -> None:
        super().__init__()
        self.img_size = (side, side)
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)  # (B, gh, gw, D)


class Rotations(nn.Module):
    """Of a grid whose coordinates are scaled at random while it trains."""

    def __init__(self, numbers: int, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("periods", 10.0 ** torch.linspace(0, 1, numbers // 4))

    def forward(self, *, height: int, width: int) -> tuple[Tensor, Tensor]:
        sides = [2 * torch.arange(0.5, side) / side - 1 for side in (height, width)]
        where = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
        if self.training and self.scale is not None:
            where = where * torch.empty(1).uniform_(1 / self.scale, self.scale)
        angles = (6 * where[:, :, None] / self.periods).flatten(1).tile(2)  # (N, d)
        return angles.sin(), angles.cos()


class TurningBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv_attn, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: Any, rope: Any) -> Any:
        if isinstance(x, list):
            return [self.one(*each) for each in zip(x, rope, strict=True)]
        return self.one(x, rope)

    def one(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv_attn(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.turned(q, *rope), self.turned(k, *rope)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def turned(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        prefix, patches = x.split((x.shape[2] - sin.shape[-2], sin.shape[-2]), dim=2)
        one, other = patches.chunk(2, dim=-1)
        return torch.cat((prefix, patches * cos + torch.cat((-other, one), dim=-1) * sin), dim=2)


class LikeDinov3(nn.Module):
    """Meta's third: no positions but rotations, made anew for every block and every crop of a list."""

    def __init__(self, patch: int = 8, scale: float | None = None) -> None:
        super().__init__()
        self.patch_embed, self.rope_embed = PatchMap(32, patch, 32), Rotations(16, scale)
        self.cls_token, self.storage_tokens = (nn.Parameter(torch.zeros(1, number, 32)) for number in (1, 2))
        self.mask_token = nn.Parameter(torch.zeros(1, 32))
        self.blocks = nn.ModuleList(TurningBlock(32, 2) for _ in range(2))
        self.norm = nn.LayerNorm(32)
        self.checkpointing = False

    def set_grad_checkpointing(self, on: bool) -> None:
        self.checkpointing = on

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(x)
        batch, height, width, _ = x.shape
        x = x.flatten(1, 2)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.unsqueeze(0), x)
        cls_token = self.cls_token + 0 * self.mask_token
        tokens = (cls_token.expand(batch, -1, -1), self.storage_tokens.expand(batch, -1, -1), x)
        return torch.cat(tokens, dim=1), (height, width)

    def forward_features_list(self, crops: list[Tensor], masks: list[Tensor | None]) -> list[dict[str, Any]]:
        made = [self.prepare_tokens_with_masks(*each) for each in zip(crops, masks, strict=True)]
        x: Any = [tokens for tokens, _ in made]
        for block in self.blocks:
            rope = [self.rope_embed(height=height, width=width) for _, (height, width) in made]
            x = checkpoint(block, x, rope, use_reentrant=False) if self.checkpointing else block(x, rope)
        return [{"class": self.norm(each)[:, 0], "all": self.norm(each)} for each in x]

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        return (
            self.forward_features_list(x, masks) if isinstance(x, list) else self.forward_features_list([x], [masks])[0]
        )

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        features = self.forward_features(*args, **kwargs)
        return features if is_training else features["class"]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Meta's DINOv3": lambda: _with_weights_that_matter(LikeDinov3()),
    **{kind: lambda kind=kind: _eva(kind) for kind in EVAS},  # type: ignore[misc]
    "Hugging Face": _dinov3,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


def _size(model: nn.Module) -> tuple[int, int]:
    return seqcompress.encoders.find_encoder(model).image_size


def _views(model: nn.Module, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, *_size(model))


def _features(model: nn.Module, views: Tensor) -> Tensor:
    """What is pooled to the output of timm's models; the output of others."""
    if isinstance(model, LikeDinov3):
        features: Tensor = model(views, is_training=True)["all"]
        return features
    output = model(views)
    return output if isinstance(output, Tensor) else output[0]


def _embed(model: Any) -> Any:
    if isinstance(model, LikeDinov3):
        return model.patch_embed.proj
    return model.patch_embed if hasattr(model, "patch_embed") else model.embeddings.patch_embeddings


def _features_of(plain: Any, views: Tensor, kept: Tensor) -> Tensor:
    """Those of the plain model on the same patches."""
    if isinstance(plain, LikeDinov3):
        every, (height, width) = plain.prepare_tokens_with_masks(views)
        index = kept.unsqueeze(-1).expand(-1, -1, every.shape[-1])
        tokens = torch.cat((every[:, :3], every[:, 3:].gather(1, index)), dim=1)
        for block in plain.blocks:
            sin, cos = plain.rope_embed(height=height, width=width)
            tokens = block(tokens, (sin[kept].unsqueeze(1), cos[kept].unsqueeze(1)))
        return plain.norm(tokens)  # type: ignore[no-any-return]
    if hasattr(plain, "patch_embed"):
        prefix = plain.num_prefix_tokens

        def keep(tokens: Tensor) -> tuple[Tensor, Tensor]:
            index = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            return torch.cat((tokens[:, :prefix], tokens[:, prefix:].gather(1, index)), dim=1), kept

        vars(plain)["patch_drop"] = keep  # the place that timm has for it
        return _features(plain, views)
    every, (cos, sin) = plain.embeddings(views), plain.rope_embeddings(views)
    prefix = every.shape[1] - len(cos)
    index = kept.unsqueeze(-1).expand(-1, -1, every.shape[-1])
    tokens = torch.cat((every[:, :prefix], every[:, prefix:].gather(1, index)), dim=1)
    rotations = (cos[kept].unsqueeze(1), sin[kept].unsqueeze(1))
    features: Tensor = plain.norm(plain.model(tokens, position_embeddings=rotations).last_hidden_state)
    return features


def _with_larger_patches(plain: Any, patch: int) -> Any:
    """The plain model cut in patches of another size, by the means of its own package."""
    if isinstance(plain, LikeDinov3):
        kernel = resample_patch_embed(plain.patch_embed.proj.weight, [patch, patch])
        larger: Any = LikeDinov3(patch)
        larger.load_state_dict({**plain.state_dict(), "patch_embed.proj.weight": kernel})
        return larger
    if hasattr(plain, "patch_embed"):
        plain.set_input_size(patch_size=(patch, patch))
        return plain
    kernel = resample_patch_embed(plain.embeddings.patch_embeddings.weight, [patch, patch])
    larger = _dinov3(patch_size=patch)
    larger.load_state_dict({**plain.state_dict(), "embeddings.patch_embeddings.weight": kernel})
    return larger


@pytest.mark.parametrize("dropout", [0.5, 0.75])
def test_features_of_kept_patches_are_those_of_the_plain_model_on_the_same_patches(
    model: nn.Module, dropout: float
) -> None:
    plain, views = copy.deepcopy(model), _views(model)
    features = _features(compress(model, Strategy(dropout)), views)
    kept = _embed(model).selection.kept
    assert kept.shape[1] + seqcompress.encoders.find_encoder(model).num_prefix_tokens == num_tokens(
        model, Strategy(dropout), _size(model)
    )
    assert not torch.equal(kept[0], kept[1])
    expected = _features_of(plain, views, kept)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_features_of_larger_patches_are_those_of_a_model_with_such_patches(model: nn.Module) -> None:
    views, own = _views(model), seqcompress.encoders.find_encoder(model).patch_size[0]
    expected = _features(_with_larger_patches(copy.deepcopy(model), 2 * own).train(), views)
    features = _features(compress(model, Strategy(0.0, 2 * own)), views)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_base_strategy_and_evaluation_are_the_plain_model_and_restoring_leaves_nothing(model: nn.Module) -> None:
    plain, views = copy.deepcopy(model), _views(model)
    keys = list(model.state_dict())
    compress(model, Strategy())
    assert torch.equal(_features(model, views), _features(plain, views))
    set_strategy(model, Strategy(0.5))
    assert torch.equal(_features(model.eval(), views), _features(plain.eval(), views))
    assert list(model.state_dict()) == keys
    restore(model.train())
    for module, before in zip(model.modules(), plain.modules(), strict=True):
        assert type(module) is type(before)
        assert vars(module).keys() == vars(before).keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(_features(model, views), _features(plain.train(), views))


def test_two_forwards_before_a_checkpointed_backward_each_keep_their_own_rotations(model: Any) -> None:
    one, other = _views(model), _views(model)
    compress(model, Strategy(0.5))
    twin = copy.deepcopy(model)
    if hasattr(model, "patch_embed"):
        twin.set_grad_checkpointing(True)
    else:
        twin.gradient_checkpointing_enable()
    gradients = []
    for trained in (model, twin):
        torch.manual_seed(1)
        (_features(trained, one) * _features(trained, other)).sum().backward()
        gradients.append([p.grad for p in trained.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for mine, others in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, others)


def test_a_scheduled_run_is_counted_and_measured(model: nn.Module) -> None:
    own = seqcompress.encoders.find_encoder(model).patch_size[0]
    compress(model, Stepwise({0.0: Strategy(0.5, 2 * own), 0.5: Strategy()}))
    scheduler, budget = SequenceScheduler(model, total_steps=4), Budget(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    lengths = []
    for _ in range(4):
        optimizer.zero_grad()
        _features(model, _views(model)).square().mean().backward()
        optimizer.step()
        embed = _embed(model)
        lengths.append(None if embed.selection is None else embed.selection.patches)
        scheduler.step()
    full = num_tokens(model, Strategy(), _size(model)) - seqcompress.encoders.find_encoder(model).num_prefix_tokens
    assert lengths == [max(1, round(full / 8)), max(1, round(full / 8)), None, None]
    cost = relative_cost(model, Strategy(0.5, 2 * own), _size(model))
    assert budget.units == pytest.approx(3 * 3 * (2 + 2 * cost))
    report = seqcompress.gradient_error(
        model,
        lambda views: _features(model, views).square().mean(),
        [_views(model) for _ in range(4)],
        [Strategy(0.5)],
        cost="flops",
    )
    assert report[Strategy(0.5)].bias2 != 0


def test_copies_are_independent_and_pickle(model: nn.Module) -> None:
    views = _views(model)
    compress(model, Strategy(0.5))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert _embed(twin).encoder.model is twin
        set_strategy(twin, Strategy(0.75))
        torch.manual_seed(3)
        mine = _features(model, views)
        _features(twin, views)
        torch.manual_seed(3)
        assert torch.equal(mine, _features(model, views))
        assert (_embed(model).selection.patches, _embed(twin).selection.patches) == (8, 4)


def test_views_are_made_smaller_for_them(model: nn.Module) -> None:
    side, own = _size(model)[0], seqcompress.encoders.find_encoder(model).patch_size[0]
    compress(model, Strategy(0.0, 2 * own))
    crop = v2.Compose([v2.RandomResizedCrop(side), torchvision.transforms.ToTensor()])
    images = torchvision.datasets.FakeData(8, (3, 2 * side, 2 * side), transform=crop)
    loader = seqcompress.scale_views(DataLoader(Subset(images, range(8)), batch_size=4), model)
    views = next(iter(loader))[0]
    assert views.shape[-1] == side // 2
    _features(model, views)
    assert _embed(model).selection.patches == (side // own // 2) ** 2


def test_views_of_another_size_have_rotations_of_their_own() -> None:
    model = _eva("DINOv3")
    plain, views = copy.deepcopy(model), torch.randn(2, 3, 32, 96)
    features = _features(compress(model, Strategy(0.5)), views)
    kept = _embed(model).selection.kept
    assert kept.shape == (2, 6)
    torch.testing.assert_close(features, _features_of(plain, views, kept), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.0, 16), Strategy(0.5, 16)], ids=str)
def test_rotations_made_at_random_for_each_block_and_crop_are_those_of_its_own_patches(strategy: Strategy) -> None:
    """The plain model runs on the same kept patches, from the random state in which rotations were first made."""
    model = _with_weights_that_matter(LikeDinov3(scale=2.0))
    plain = copy.deepcopy(model)
    if strategy.patch_size is not None:
        plain = _with_larger_patches(plain, strategy.patch_size)
        plain.rope_embed.scale = 2.0
    crops = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 32, 64), torch.randn(2, 3, 32, 32)]
    kept: list[Any] = []
    states: list[Tensor] = []
    compress(model, strategy)
    model.rope_embed.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    _embed(model).register_forward_hook(lambda *_: kept.append(_embed(model).selection.kept))
    features = model(crops, masks=[None] * 3, is_training=True)
    assert len(states) == 2 * 3
    prepared = [plain.prepare_tokens_with_masks(crop) for crop in crops]
    tokens = [
        every
        if of_one is None
        else torch.cat((every[:, :3], every[:, 3:][torch.arange(len(every))[:, None], of_one]), 1)
        for (every, _), of_one in zip(prepared, kept, strict=True)
    ]
    torch.set_rng_state(states[0])
    for block in plain.blocks:
        rotations = [plain.rope_embed(height=height, width=width) for _, (height, width) in prepared]
        rotations = [
            rope if of_one is None else tuple(part[of_one].unsqueeze(1) for part in rope)
            for rope, of_one in zip(rotations, kept, strict=True)
        ]
        tokens = block(tokens, rotations)
    for found, expected in zip(features, tokens, strict=True):
        expected = plain.norm(expected)
        assert float((found["all"] - expected).abs().max() / expected.abs().max()) < 1e-4


def test_crops_of_lists_in_two_forwards_keep_their_rotations_until_a_checkpoint_asks() -> None:
    model = compress(_with_weights_that_matter(LikeDinov3(scale=2.0)), Strategy(0.5))
    lists, gradients = [[torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)] for _ in range(2)], []
    for model.checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        one, other = ([named["class"] for named in model(crops, [None] * 2, is_training=True)] for crops in lists)
        (one[0] * other[0] + one[1] * other[1]).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for mine, others in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, others)


def test_rotations_in_half_precision_are_proven_as_any_others() -> None:
    model = _with_weights_that_matter(LikeDinov3())
    with torch.no_grad():
        for block in model.blocks:
            block.qkv_attn.weight.normal_(std=0.6)
    exact = type(model.rope_embed).forward
    model.rope_embed.forward = lambda **sides: tuple(part.bfloat16() for part in exact(model.rope_embed, **sides))
    model.blocks[0].turned = model.blocks[1].turned = lambda x, sin, cos: TurningBlock.turned(
        model.blocks[0], x.to(sin.dtype), sin, cos
    ).to(x.dtype)
    plain, views = copy.deepcopy(model), _views(model)
    features = _features(compress(model, Strategy(0.5)), views)
    expected = _features_of(plain, views, _embed(model).selection.kept)
    assert float((features - expected).abs().max() / expected.abs().max()) < 2e-2


def test_compiled_blocks_and_half_precision_take_crops_of_lists() -> None:
    model = compress(_with_weights_that_matter(LikeDinov3(scale=2.0)), Strategy(0.5))
    crops, found = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)], []
    for compiles in (False, True):
        for block in model.blocks if compiles else ():
            block.compile(backend="eager")
        torch.manual_seed(1)
        found.append([named["all"] for named in model(crops, [None] * 2, is_training=True)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        half = [named["all"] for named in model(crops, [None] * 2, is_training=True)]
    for exact, rough in zip(found[0], half, strict=True):
        torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)
    half[0].float().square().sum().backward()


def test_a_fresh_rotary_model_whose_blocks_add_little_is_seen_through() -> None:
    model = _dinov3(layerscale_value=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda" in name:
                parameter.fill_(1e-5)
    tokens = _features(compress(model, Strategy(0.25)), _views(model))
    assert tokens.shape[1] == 5 + 12
