"""One contract for every ViT: what is promised for timm's holds for all classes. A new model adds a row to ``VITS``.

Below the contract: what only some of them have (lists of crops, masks, rotations at random), and what is refused.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

import seqcompress
from seqcompress import (
    Budget,
    SequenceScheduler,
    Stepwise,
    Strategy,
    compress,
    get_strategy,
    grid_size,
    is_compressed,
    num_tokens,
    relative_cost,
    restore,
    set_strategy,
)
from seqcompress.compression import compressed_embeds
from seqcompress.compressors.patch_scaling import resample_positions
from seqcompress.encoders import find_encoder, is_encoder, registry
from seqcompress.encoders.probe import first_tensor

# Small models of the kinds that people write and fork


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if turns is not None:
            queries, keys = self.turned(queries, *turns), self.turned(keys, *turns)
        return self.proj(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))

    def turned(self, x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        """Each pair of numbers of a patch as a point in the plane, turned by angles (N, d / 2)."""
        prefix = x.shape[2] - sine.shape[-2]
        even, odd = x[:, :, prefix:, 0::2], x[:, :, prefix:, 1::2]
        turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)
        return torch.cat((x[:, :, :prefix], turned), dim=2)


class Block(nn.Module):
    """Takes the crops of all sizes at once, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: Any, *turns: Any) -> Any:
        if isinstance(x, list):
            return [Block.forward(self, *each) for each in zip(x, *turns, strict=True)]
        x = x + self.attn(self.norm1(x), *turns)
        return x + self.mlp(self.norm2(x))


class PatchMaker(nn.Module):
    def __init__(self, patch: int = 8) -> None:
        super().__init__()
        self.img_size, self.proj = 32, nn.Conv2d(3, 32, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class LikeDino(nn.Module):
    """Positions follow the size of the image, which the model reads off the image itself."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.patch_embed = PatchMaker()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 32))
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))
        self.norm = nn.LayerNorm(32)

    def positions(self, height: int, width: int) -> Tensor:
        if (height, width) == (32, 32):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].mT.unflatten(2, (4, 4))
        grid = F.interpolate(grid, size=(height // 8, width // 8), mode="bicubic")
        return torch.cat((self.pos_embed[:, :1], grid.flatten(2).mT), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = torch.cat((self.cls_token.expand(batch, -1, -1), self.patch_embed(x)), dim=1)
        x = self.pos_drop(x + self.positions(height, width))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class ListsOfCrops(nn.Module):
    """What Meta's second and third have in common: crops in lists, masks, a dictionary of features."""

    checkpoints: bool | None = None  # whether reentrant

    def forward_features_list(self, crops: list[Tensor], masks: list[Tensor | None]) -> list[dict[str, Any]]:
        made = [self.prepare_tokens_with_masks(*each) for each in zip(crops, masks, strict=True)]
        return [self.named(*each) for each in zip(self.through_blocks(made), masks, strict=True)]

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        return (
            self.forward_features_list(x, masks) if isinstance(x, list) else self.forward_features_list([x], [masks])[0]
        )

    def get_intermediate_layers(self, x: Tensor, n: int = 1, reshape: bool = False) -> tuple[Tensor, ...]:
        """Those of the last n blocks, as maps if asked for."""
        seen: list[Any] = []
        with ExitStack() as hooked:
            for block in list(self.blocks)[-n:]:
                hooked.enter_context(block.register_forward_hook(lambda *call: seen.append(call[-1])))
            prefix = self.forward_features(x)["registers"].shape[1] + 1
        layers = [first_tensor(each)[:, prefix:] for each in seen]
        grid = (x.shape[2] // 8, x.shape[3] // 8)
        return tuple(each.reshape(len(x), *grid, -1).permute(0, 3, 1, 2) if reshape else each for each in layers)

    def masked(self, x: Tensor, masks: Tensor | None) -> Tensor:
        return x if masks is None else x.masked_fill(masks[..., None], 0) + masks[..., None] * self.mask_token

    def run(self, block: Any, *args: Any) -> Any:
        return block(*args) if self.checkpoints is None else checkpoint(block, *args, use_reentrant=self.checkpoints)

    def named(self, x: Tensor, masks: Tensor | None) -> dict[str, Any]:
        every = self.norm(x)
        return {
            "class": every[:, 0], "registers": every[:, 1:3], "patches": every[:, 3:], "all": every, "masks": masks
        }  # fmt: skip

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        features = self.forward_features(*args, **kwargs)
        return features if is_training else features["class"]


class Chunk(nn.ModuleList):
    def forward(self, x: Any) -> Any:
        for block in self:
            x = block(x)
        return x


class LikeDinov2(ListsOfCrops, LikeDino):
    """Meta's second: registers behind the positions, blocks in chunks."""

    def __init__(self, chunks: int = 2) -> None:
        super().__init__()
        self.register_tokens = nn.Parameter(torch.randn(1, 2, 32))
        self.mask_token = nn.Parameter(torch.randn(1, 32))
        blocks, size = [Block(32) for _ in range(4)], 4 // max(1, chunks)
        pieces = [Chunk([nn.Identity()] * start + blocks[start : start + size]) for start in range(0, 4, size)]
        self.blocks = nn.ModuleList(pieces if chunks else blocks)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        x = self.masked(self.patch_embed(x), masks)
        x = torch.cat((self.cls_token.expand(batch, -1, -1), x), dim=1) + self.positions(height, width)
        return torch.cat((x[:, :1], self.register_tokens.expand(batch, -1, -1), x[:, 1:]), dim=1)

    def through_blocks(self, x: Any) -> Any:
        for block in self.blocks:
            x = self.run(block, x)
        return x

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        if isinstance(x, list):
            return self.forward_features_list(x, masks)
        return self.named(self.through_blocks(self.prepare_tokens_with_masks(x, masks)), masks)


class Turns(nn.Module):
    """Angles for a grid, whose coordinates are scaled at random in training."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("frequencies", torch.tensor([0.5, 1.0, 2.0, 4.0]))

    def forward(self, *, height: int, width: int) -> tuple[Tensor, Tensor]:
        where = torch.cartesian_prod(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width))
        where = where.to(self.frequencies)  # (N, 2)
        if self.training and self.scale is not None:
            where = where * torch.empty(1).uniform_(1 / self.scale, self.scale)
        angles = torch.einsum("na,f->naf", where, self.frequencies).flatten(1)  # (N, d / 2)
        return angles.sin(), angles.cos()


class LikeDinov3(ListsOfCrops):
    """Meta's third: no positions but rotations, made anew for every block and every crop of a list."""

    def __init__(self, patch: int = 8, scale: float | None = None) -> None:
        super().__init__()
        self.patch_embed, self.turns = PatchMaker(patch), Turns(scale)
        self.cls_token, self.storage_tokens = (nn.Parameter(torch.zeros(1, number, 32)) for number in (1, 2))
        self.mask_token = nn.Parameter(torch.zeros(1, 32))
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))
        self.norm = nn.LayerNorm(32)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        grid = self.patch_embed.proj(x)  # (B, D, gh, gw)
        prefix = torch.cat((self.cls_token, self.storage_tokens), dim=1).expand(len(x), -1, -1)
        return torch.cat((prefix, self.masked(grid.flatten(2).mT, masks)), dim=1), tuple(grid.shape[2:])

    def through_blocks(self, made: Any) -> Any:
        x = [tokens for tokens, _ in made]
        for block in self.blocks:
            x = self.run(block, x, [self.turns(height=height, width=width) for _, (height, width) in made])
        return x


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


HUGGING_FACE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
DINOV3: dict[str, Any] = {"num_register_tokens": 4, "layerscale_value": 1.0, "pos_embed_rescale": None}
TIMM: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 0}


def _hugging_face(name: str, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    family = name.removesuffix("Model").removesuffix("ForImageClassification").removesuffix("Backbone")
    return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**{**HUGGING_FACE, **settings}))


def _timm(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: timm.create_model(name, **settings)


# The table


class Vit(NamedTuple):
    """One model, and what is particular of it."""

    build: Callable[[], nn.Module]
    place: str | None = None  # the module that positions go to, if that is none of the blocks
    larger: Callable[[Any, int], nn.Module] | None = None  # the same with larger patches, by its package's own means
    checkpoint: Callable[[Any, bool], object] | None = None  # switches it on, reentrant or not
    reentrant: tuple[bool, ...] = (False, True)  # which of the two it has
    measured: bool = True  # whether its gradient error is: that takes a second for a model of Hugging Face


def _larger_by_timm(plain: Any, patch: int) -> nn.Module:
    plain.set_input_size(patch_size=(patch, patch))
    return plain  # type: ignore[no-any-return]


def _larger_like_dinov3(plain: Any, patch: int) -> nn.Module:
    return _loaded(LikeDinov3(patch, plain.turns.scale), plain, "patch_embed.proj.weight", patch)


def _larger_by_hugging_face(plain: Any, patch: int) -> nn.Module:
    config = type(plain.config)(**{**plain.config.to_dict(), "patch_size": patch})
    return _loaded(type(plain)(config), plain, "embeddings.patch_embeddings.weight", patch)


def _loaded(larger: nn.Module, plain: nn.Module, kernel: str, patch: int) -> nn.Module:
    state = plain.state_dict()
    larger.load_state_dict({**state, kernel: resample_patch_embed(state[kernel], [patch, patch])})
    return larger.train()


def _checkpoint_like_meta(model: Any, reentrant: bool) -> None:
    model.checkpoints = reentrant


def _checkpoint_by_hugging_face(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def _row_of_timm(name: str, side: int = 64, **settings: Any) -> Vit:
    build = _timm(name, **TIMM, img_size=side, **settings)
    return Vit(build, None, _larger_by_timm, lambda model, _: model.set_grad_checkpointing(True), (False,))


def _row_of_hugging_face(name: str, settings: Any = None, **particular: Any) -> Vit:
    build = partial(_hugging_face, name, **(settings or {}))
    measured = name in ("ViTModel", "DINOv3ViTModel")
    return Vit(build, checkpoint=_checkpoint_by_hugging_face, measured=measured, **particular)


VITS: dict[str, Vit] = {
    "timm's ViT": _row_of_timm("vit_small_patch16_224"),
    "DINO": Vit(LikeDino),
    "Meta's DINOv2": Vit(LikeDinov2, checkpoint=_checkpoint_like_meta),
    "fork": Vit(ForkWithOtherNames),
    "torchvision": Vit(partial(torchvision.models.VisionTransformer, 32, 8, 2, 2, 32, 64, num_classes=4)),
    "ViTModel": _row_of_hugging_face("ViTModel"),
    "ViTForImageClassification": _row_of_hugging_face("ViTForImageClassification"),
    "Dinov2Model": _row_of_hugging_face("Dinov2Model"),
    "Dinov2WithRegistersModel": _row_of_hugging_face("Dinov2WithRegistersModel"),
    "SiglipVisionModel": _row_of_hugging_face("SiglipVisionModel"),
    "CLIPVisionModel": _row_of_hugging_face("CLIPVisionModel", place="pre_layrnorm"),
    "Meta's DINOv3": Vit(LikeDinov3, larger=_larger_like_dinov3, checkpoint=_checkpoint_like_meta, reentrant=(False,)),
    "DINOv3ViTModel": _row_of_hugging_face("DINOv3ViTModel", settings=DINOV3, larger=_larger_by_hugging_face),
    "AutoBackbone of DINOv3": _row_of_hugging_face(
        "DINOv3ViTBackbone", settings={**DINOV3, "reshape_hidden_states": False}, larger=_larger_by_hugging_face
    ),
    "Eva, DINOv3": _row_of_timm("vit_small_patch16_dinov3"),
    "Eva, EVA02": _row_of_timm("eva02_tiny_patch14_224", 56),
    "Eva, axial, absolute": _row_of_timm("vit_small_patch16_rope_ape_224"),
    "Eva, mixed": _row_of_timm("vit_small_patch16_rope_mixed_224"),
    "Eva, mixed, absolute": _row_of_timm("vit_small_patch16_rope_mixed_ape_224"),
    "Eva, PE": _row_of_timm("vit_pe_core_tiny_patch16_384"),
}


def _built(vit: Vit) -> nn.Module:
    return _with_weights_that_matter(vit.build())


def _with_weights_that_matter(model: Any) -> Any:
    """A fresh model's positions, tokens and blocks do almost nothing: differences would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "pos" in name or "token" in name else 0.1)
    return model.train()


@pytest.fixture(params=VITS)
def name(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def vit(name: str) -> Vit:
    return VITS[name]


@cache
def _compressed(name: str) -> Any:
    """Proven once for all tests; each has a copy."""
    return compress(_built(VITS[name]), Strategy())


@pytest.fixture
def compressed(name: str) -> Any:
    return copy.deepcopy(_compressed(name))


@pytest.fixture
def model(vit: Vit) -> Any:
    return _built(vit)


# What the tests look at


def _size(model: nn.Module) -> tuple[int, int]:
    return find_encoder(model).image_size


def _patch(model: nn.Module) -> int:
    return find_encoder(model).patch_size[0]


def _views(model: nn.Module, batch: int = 3, size: tuple[int, int] | None = None) -> Tensor:
    return torch.randn(batch, find_encoder(model).channels, *(size or _size(model)))


def _output(model: nn.Module, views: Tensor) -> Tensor:
    return first_tensor(model(views))


def _changed(values: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, dict):
        return {name: _changed(value, change) for name, value in values.items()}
    return type(values)(_changed(value, change) for value in values) if type(values) in (tuple, list) else values


def _before(module: nn.Module, change: Callable[[Any], Any]) -> Any:
    """Hook in what changes the arguments of a call, or only looks at them."""
    return module.register_forward_pre_hook(lambda _, args, kwargs: change((args, kwargs)), with_kwargs=True)


def _place(vit: Vit, model: nn.Module) -> nn.Module:
    """Where patches have met their positions."""
    named = (module for name, module in model.named_modules() if vit.place and name.endswith(vit.place))
    return next(named, find_encoder(model).blocks[0])


def _run(model: nn.Module, views: Tensor, place: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Tokens where they have met their positions, and behind the last block."""
    seen: list[Tensor] = []
    blocks = find_encoder(model).blocks
    with (
        _before(blocks[0] if place is None else place, lambda call: seen.append(first_tensor(call))),
        blocks[-1].register_forward_hook(lambda *call: seen.append(first_tensor(call[-1]))),
    ):
        model(views)
    tokens, features = seen
    return tokens, features


@contextmanager
def _on_patches(vit: Vit, plain: Any, kept: Tensor, tokens: Tensor | None = None) -> Iterator[None]:
    """The plain model's own code on the kept patches of each view, (B, K), of all tokens or of these instead."""
    prefix = find_encoder(plain).num_prefix_tokens

    def keep(every: Tensor) -> Tensor:
        index = kept.unsqueeze(-1).expand(-1, -1, every.shape[-1])
        return torch.cat((every[:, :prefix], every[:, prefix:].gather(1, index)), dim=1)

    if hasattr(plain, "rope"):
        vars(plain)["patch_drop"] = lambda every: (keep(every), kept)  # the place that timm has for it
        yield
        return

    def with_tokens(call: Any) -> Any:
        own = first_tensor(call)
        return _changed(call, lambda value: keep(own if tokens is None else tokens) if value is own else value)

    def with_rotations(call: Any) -> Any:
        return _changed(call, lambda value: value[kept].unsqueeze(1) if value.ndim == 2 else value)

    with ExitStack() as hooked:
        hooked.enter_context(_before(_place(vit, plain), with_tokens))
        for block in find_encoder(plain).blocks:
            hooked.enter_context(_before(block, with_rotations))
        yield


def _scaled_tokens(vit: Vit, plain: Any, views: Tensor, patch: int) -> Tensor:
    """All tokens, with a resampled kernel and interpolated positions, by timm's own functions."""
    encoder, pixels = find_encoder(plain), []
    conv, prefix = encoder.patch_embed, encoder.num_prefix_tokens
    with conv.register_forward_pre_hook(lambda _, args: pixels.append(args[0])):
        every, _ = _run(plain, views, _place(vit, plain))
    own = conv(pixels[0])
    positions = (every[:, prefix:] - own.flatten(2).mT)[:1]
    patches = F.conv2d(pixels[0], resample_patch_embed(conv.weight, [patch, patch]), conv.bias, stride=patch)
    grids = list(patches.shape[2:]), list(own.shape[2:])
    positions = resample_abs_pos_embed(positions, *grids, num_prefix_tokens=0)
    return torch.cat((every[:, :prefix], patches.flatten(2).mT + positions), dim=1)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# The contract


def test_features_are_those_of_the_plain_model_on_the_same_patches(
    vit: Vit, compressed: Any, patches_among: Any
) -> None:
    model, plain = compressed, restore(copy.deepcopy(compressed))
    views, prefix, own = _views(model), find_encoder(model).num_prefix_tokens, _patch(model)
    for strategy in (Strategy(0.5), Strategy(0.75), Strategy(0.0, 2 * own), Strategy(0.5, 2 * own)):
        reference, tokens = copy.deepcopy(plain), None
        if strategy.patch_size is not None and vit.larger is not None:
            reference = vit.larger(reference, strategy.patch_size).train()
        elif strategy.patch_size is not None:
            tokens = _scaled_tokens(vit, reference, views, strategy.patch_size)
        every = _run(reference, views, _place(vit, reference))[0] if tokens is None else tokens
        set_strategy(model, strategy)
        found, features = _run(model, views, _place(vit, model))
        assert found.shape[1] == num_tokens(model, strategy, _size(model))
        torch.testing.assert_close(found[:, :prefix], every[:, :prefix])
        kept = patches_among(found[:, prefix:], every[:, prefix:])
        assert [len(set(row)) for row in kept.tolist()] == [found.shape[1] - prefix] * len(views)
        assert strategy.patch_size is not None or not torch.equal(kept[0], kept[1])
        with _on_patches(vit, reference, kept, tokens):
            assert _difference(features, _run(reference, views)[1]) < 1e-4, strategy


def test_views_of_another_size_have_the_plain_models_positions(vit: Vit, compressed: Any, patches_among: Any) -> None:
    model, encoder = compressed, find_encoder(compressed)
    if encoder.only_size is not None:
        pytest.skip("it takes views of one size")
    height, width = encoder.image_size
    views, plain = _views(model, 2, (height // 2, width + width // 2)), restore(copy.deepcopy(model))
    set_strategy(model, Strategy(0.5))
    every, prefix = _run(plain, views)[0], encoder.num_prefix_tokens
    found, features = _run(model, views)
    assert found.shape[1] == num_tokens(model, Strategy(0.5), views.shape[2:])
    kept = patches_among(found[:, prefix:], every[:, prefix:])
    with _on_patches(vit, plain, kept):
        assert _difference(features, _run(plain, views)[1]) < 1e-4


def test_the_base_strategy_and_evaluation_are_the_plain_model_and_restoring_leaves_nothing(model: Any) -> None:
    plain, views, parameters = copy.deepcopy(model), _views(model), list(model.parameters())
    compress(model, Strategy())
    assert torch.equal(_output(model, views), _output(plain, views))
    compress(model, Strategy(0.5, 2 * _patch(model)))
    _output(model, views)
    assert torch.equal(_output(model.eval(), views), _output(plain.eval(), views))
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    restore(model.train())
    assert not is_compressed(model)
    for module, before in zip(model.modules(), plain.modules(), strict=True):
        assert type(module) is type(before)
        assert vars(module).keys() == vars(before).keys()
        assert len(module._forward_hooks) == len(before._forward_hooks)
        assert not module._forward_pre_hooks
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(_output(model, views), _output(plain.train(), views))


def test_the_base_strategy_is_the_plain_model_on_views_of_every_size_that_it_takes(name: str, compressed: Any) -> None:
    plain, (height, width), patch = restore(copy.deepcopy(compressed)), _size(compressed), _patch(compressed)
    patches, taken = height // patch * (width // patch), 0
    for size in [
        *((height + more, width + more) for more in (1, patch - 1, -1, -patch, patch, patch + 1)),
        (patches * patch, patch),
        (height + patch - 1, width),
    ]:
        views = _views(compressed, 2, size)
        try:
            expected = _output(plain, views)
        except Exception:
            continue
        assert torch.equal(_output(compressed, views), expected), size
        taken += 1
    if name in ("SiglipVisionModel", "fork"):
        assert taken == 4


class PositionsCutOff(ForkWithOtherNames):
    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.stem(pixels).flatten(2).mT
        return self.trunk(tokens + self.where[:, : tokens.shape[1]])


@pytest.mark.parametrize(("size", "patches"), [((24, 32), 12), ((39, 55), 24), ((192, 8), 24)])
def test_a_model_that_checks_no_size_keeps_its_own_tokens_of_views_of_another(
    size: tuple[int, int], patches: int, patches_among: Any
) -> None:
    model, views = _with_weights_that_matter(PositionsCutOff()), torch.randn(2, 1, *size)
    every = _run(model, views, model.trunk[0])[0]
    assert every.shape[1] == patches
    compress(model, Strategy())
    assert torch.equal(_run(model, views, model.trunk[0])[0], every)
    tokens = _run(compress(model, token_dropout=0.5), views, model.trunk[0])[0]
    assert tokens.shape[1] == patches // 2
    patches_among(tokens, every)


def test_every_parameter_that_trains_plainly_trains_compressed_and_in_half_precision(
    compressed: Any, gradients: Any
) -> None:
    model, views, trained = compressed, _views(compressed), []
    for strategy, kind in [(Strategy(), None), (Strategy(0.5, 2 * _patch(model)), None), (None, torch.bfloat16)]:
        model.zero_grad(set_to_none=True)
        if strategy is not None:
            set_strategy(model, strategy)
        model, seen = model.to(kind or torch.float32), views.to(kind or torch.float32)
        if kind is not None:
            try:
                _output(restore(copy.deepcopy(model)), seen)
            except RuntimeError as error:
                assert trained[0].keys() == trained[1].keys()
                pytest.skip(f"the plain model does not run in half precision: {error}")  # timm 1.0.26's mixed rotations
        _output(model, seen).float().square().sum().backward()
        trained.append(gradients(model))
    assert trained[0].keys() == trained[1].keys() == trained[2].keys()
    assert all(bool(gradient.isfinite().all()) for gradient in trained[2].values())


def test_a_copy_is_independent_and_the_same_seed_gives_the_same_tokens(name: str, model: Any) -> None:
    views, full = _views(model), num_tokens(model, Strategy(), _size(model))
    twins = [copy.deepcopy(compress(model, Strategy(0.5)))]
    if "AutoBackbone" not in name:  # a plain one holds hooks that cannot be pickled
        twins.append(pickle.loads(pickle.dumps(model)))
    found = []
    for twin in twins:
        assert find_encoder(twin).model is not find_encoder(model).model
        set_strategy(twin, Strategy(0.75))
        torch.manual_seed(3)
        found.append(_run(model, views)[1])
        assert found[0].shape[1] == num_tokens(model, Strategy(0.5), _size(model))
        assert _run(twin, views)[0].shape[1] == num_tokens(twin, Strategy(0.75), _size(twin))
    torch.manual_seed(3)
    assert torch.equal(found[-1], _run(model, views)[1])
    restore(model)
    assert _run(model, views)[0].shape[1] == full
    for twin in twins:
        assert _run(twin, views)[0].shape[1] == num_tokens(twin, Strategy(0.75), _size(twin))


def test_student_and_teacher_follow_a_schedule(model: Any) -> None:
    teacher, views, size = copy.deepcopy(model).requires_grad_(False), _views(model), _size(model)
    plan = Stepwise({0.0: Strategy(0.5, 2 * _patch(model)), 0.5: Strategy(0.5), 0.75: Strategy()})
    scheduler = SequenceScheduler(compress(model, plan, teacher=teacher), total_steps=4)
    for step in range(4):
        strategy = plan(step / 4)
        assert _run(model, views)[0].shape[1] == num_tokens(model, strategy, size)
        with torch.no_grad():
            assert _run(teacher, views)[0].shape[1] == num_tokens(model, strategy.without_dropout(), size)
        scheduler.step()
    assert get_strategy(model) == Strategy()


def test_a_scheduled_run_is_counted_and_measured(vit: Vit, model: Any) -> None:
    size, strategy = _size(model), Strategy(0.5, 2 * _patch(model))
    compress(model, Stepwise({0.0: strategy, 0.5: Strategy()}))
    scheduler, budget = SequenceScheduler(model, total_steps=4), Budget(model)
    for _ in range(4):
        _output(model, _views(model)).square().mean().backward()
        scheduler.step()
    assert budget.units == pytest.approx(3 * 3 * (2 + 2 * relative_cost(model, strategy, size)))
    share = num_tokens(model, Strategy(0.5), size) / num_tokens(model, Strategy(), size)
    assert relative_cost(model, Strategy(0.5), size) == pytest.approx(share, abs=0.12)
    if vit.measured:
        batches = [_views(model) for _ in range(2)]
        report = seqcompress.gradient_error(
            model, lambda views: _output(model, views).square().mean(), batches, [Strategy(0.5)], cost="flops"
        )
        assert report[Strategy(0.5)].bias2 != 0


def test_two_forwards_before_a_checkpointed_backward_have_the_gradients_of_a_run_without(
    vit: Vit, compressed: Any, gradients: Any
) -> None:
    if vit.checkpoint is None:
        pytest.skip("it has no checkpointing of its own")
    set_strategy(compressed, Strategy(0.5, 2 * _patch(compressed)))
    one, other, found = _views(compressed), _views(compressed), []
    for reentrant in (None, *vit.reentrant):
        twin = copy.deepcopy(compressed)
        if reentrant is not None:
            vit.checkpoint(twin, reentrant)
        torch.manual_seed(1)
        (_output(twin, one) * _output(twin, other)).sum().backward()
        found.append(gradients(twin))
    assert len(found[0]) > 10
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-4, atol=1e-5)


def _smaller_views(model: Any, *, side: int = 2) -> Tensor:
    """What a loader makes for the model where its patches are as much larger."""
    encoder = find_encoder(model)
    height, width = encoder.image_size
    set_strategy(model, Strategy(0.0, side * _patch(model)))
    crop = v2.Compose([v2.RandomResizedCrop((height, width)), torchvision.transforms.ToTensor()])
    images = torchvision.datasets.FakeData(4, (3, 2 * height, 2 * width), transform=crop)
    loader = seqcompress.scale_views(DataLoader(Subset(images, range(4)), batch_size=4), model)
    views: Tensor = next(iter(loader))[0][:, : encoder.channels]
    assert views.shape[2:] == (height // side, width // side)
    return views


def test_views_are_made_smaller_for_them(vit: Vit, compressed: Any) -> None:
    if type(compressed) is ForkWithOtherNames:  # of one size, and normalizes by itself what it is given
        with pytest.raises(ValueError, match="must hand views on to its patch embedding as they are"):
            _smaller_views(compressed)
        return
    views, own = _smaller_views(compressed), _patch(compressed)
    encoder = find_encoder(compressed)
    patches = (views.shape[2] // own) * (views.shape[3] // own)
    assert _run(compressed, views)[0].shape[1] == encoder.num_prefix_tokens + patches


def test_smaller_views_have_their_patches_at_resampled_positions_in_a_model_of_one_size() -> None:
    model, seen = compress(VITS["torchvision"].build(), "drop 0.5").train(), []
    views = _smaller_views(model)
    model.encoder.layers[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    patches = model.conv_proj.embed(views).flatten(2).mT
    own, prefix = model.encoder.pos_embedding[:, 1:], model.encoder.pos_embedding[:, :1] + model.class_token
    expected = patches + resample_positions(own, (4, 4), (2, 2))
    model(views)
    torch.testing.assert_close(seen[0], torch.cat((prefix.expand(4, -1, -1), expected), dim=1))
    set_strategy(model, Strategy())  # some that were made before come late: the same patches as of full views
    assert _run(model, views)[0].shape == (4, 17, 32)
    with pytest.raises(AssertionError, match="Wrong image"):  # made by no loader: as the plain model says
        model(views[:, :, 1:])


def _one_rank_of_two(rank: int, folder: str) -> dict[str, tuple[float, bool]]:
    """For each model: how far its gradients are from the mean of both ranks' alone, and whether both keep the same."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    found = {}
    for name, vit in VITS.items():
        torch.manual_seed(0)
        model = compress(_built(vit), Strategy(0.5))
        alone, views = copy.deepcopy(model), _views(model) + rank
        together = DistributedDataParallel(model, find_unused_parameters=True)
        for each in (alone, together):
            torch.manual_seed(rank)
            _output(each, views).square().mean().backward()
        far = 0.0
        for mean, own in zip(model.parameters(), alone.parameters(), strict=True):
            if own.grad is not None and mean.grad is not None:
                dist.all_reduce(own.grad)
                far = max(far, float((mean.grad - own.grad / 2).abs().max() / own.grad.abs().max().clamp(min=1e-3)))
        kept = compressed_embeds(model)[0].selection.kept
        others = [torch.empty_like(kept) for _ in range(2)]
        dist.all_gather(others, kept)
        found[name] = (far, torch.equal(*others))
    dist.destroy_process_group()
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process has no gradients where there is a GPU")
def test_two_ranks_train_on_subsets_of_their_own_and_share_their_gradients(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:  # all is imported there already
        other = pool.submit(_one_rank_of_two, 1, str(tmp_path))
        ranks = [_one_rank_of_two(0, str(tmp_path)), other.result()]
    for found in ranks:
        assert found.keys() == VITS.keys()
        assert {name: far for name, (far, _) in found.items() if not far < 1e-4} == {}
        assert [name for name, (_, is_same) in found.items() if is_same] == []


# Views of another size, dropout, masks


def test_timms_own_vit_is_known_by_its_shape_too(tiny_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    views, outputs = torch.randn(2, 3, 32, 32), []
    for kinds in (registry._kinds, [kind for kind in registry._kinds if kind.general]):
        monkeypatch.setattr(registry, "_kinds", kinds)
        vit = compress(tiny_vit(), Strategy(0.5, 16)).train()
        torch.manual_seed(2)
        outputs.append(vit(views))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.0, 16), Strategy(0.5, 16)], ids=str)
@pytest.mark.parametrize("view", [(16, 16), (24, 40), (48, 48)])
def test_local_views_have_the_models_own_positions(
    strategy: Strategy, view: tuple[int, int], patches_among: Any
) -> None:
    model = LikeDino().train()
    views = _views(model, size=view)
    every, _ = _run(model, views)
    tokens, _ = _run(compress(model, strategy), views)
    assert tokens.shape[1] == num_tokens(model, strategy, view)
    if strategy.patch_size is None:
        patches_among(tokens[:, 1:], every[:, 1:])


def test_dropout_behind_the_positions_falls_on_the_tokens_that_are_kept() -> None:
    model = compress(LikeDino(dropout=0.25), Strategy(0.5)).train()
    tokens, _ = _run(model, _views(model, 64))
    zeros = (tokens == 0).double().mean(dim=(0, 2))
    assert float(zeros.mean()) == pytest.approx(0.25, abs=0.01)
    assert zeros.max() < 0.32


class LeavesBlocksOut(ForkWithOtherNames):
    """In train mode, as LayerDrop does it."""

    def __init__(self, before: nn.Module | None = None) -> None:
        super().__init__()
        self.before = before
        self.left_out: tuple[int, ...] = ()

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.stem(pixels).flatten(2).mT + self.where
        if self.before is not None:
            tokens = self.before(tokens)
        for number, block in enumerate(self.trunk):
            if not self.training or number not in self.left_out:
                tokens = block(tokens)
        return tokens.mean(dim=1)


def test_features_of_no_view_are_an_error_at_the_next_call() -> None:
    views = torch.randn(2, 1, 32, 48)
    model = compress(LeavesBlocksOut(), Strategy(0.5)).train()
    model.left_out = (0,)
    model(views)
    with pytest.raises(RuntimeError, match="last call in train mode ended before its patches had come"):
        model(views)
    model.left_out = (1,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left of the calls before
        one, other = model(views)
    assert not torch.equal(one, other)
    model = compress(LeavesBlocksOut(nn.Dropout(0.0)), Strategy(0.5)).train()
    model.left_out = (0,)
    for _ in range(2):
        one, other = model(views)
        assert not torch.equal(one, other)


class InTwoCalls(ForkWithOtherNames):
    """Both parts go through forward, as DistributedDataParallel needs it."""

    def forward(self, given: Tensor, part: str = "both") -> Tensor:
        if part != "blocks":
            given = self.stem(given).flatten(2).mT + self.where
        return given if part == "tokens" else self.trunk(given).mean(dim=1)


def test_patches_may_wait_from_one_call_to_the_next() -> None:
    model, views = compress(InTwoCalls(), Strategy(0.5)).train(), torch.randn(2, 1, 32, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            one, other = model(model(views, "tokens"), "blocks")
            assert not torch.equal(one, other)
            model(views)


def test_masks_are_refused_while_compressed() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTModel(transformers.ViTConfig(**HUGGING_FACE), use_mask_token=True).train()
    views, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    compress(model, token_dropout=0.5)
    with pytest.raises(ValueError, match="bool_masked_pos must be None while a compressed encoder trains"):
        model(views, bool_masked_pos=mask)
    assert model.eval()(views, bool_masked_pos=mask)[0].shape == (2, 17, 32)


def test_chosen_tokens_of_lightlys_wrapper_are_refused_where_every_view_has_its_blank() -> None:
    from lightly.models.modules import MaskedVisionTransformerTorchvision

    masked = MaskedVisionTransformerTorchvision(VITS["torchvision"].build())
    views, index = torch.randn(3, 3, 32, 32), torch.arange(1, 5).expand(3, -1)
    compress(masked, token_dropout=0.5).train()
    for name in ("idx_mask", "idx_keep"):
        with pytest.raises(ValueError, match=f"{name} must be None while a compressed encoder trains"):
            masked(views, **{name: index})
    assert _run(masked, views)[0].shape == (3, 9, 32)
    assert masked.eval()(views, idx_mask=index).shape == (3, 32)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hidden_states_that_a_model_captures_as_it_first_runs_are_still_captured(when: str) -> None:
    model = _hugging_face("Dinov2Model")
    model.config.output_hidden_states = True
    compress(model, Strategy(0.5)).train()
    if when == "after":
        restore(model)
    tokens = 9 if when == "before" else 17
    assert [states.shape for states in model(_views(model)).hidden_states] == 3 * [(3, tokens, 32)]


# Meta's classes: lists of crops, masks, chunks, rotations at random


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


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.5, 16)], ids=str)
@pytest.mark.parametrize("batch", [2, 3])
def test_masked_crops_keep_all_their_tokens_and_are_masked_on_the_grid_in_force(strategy: Strategy, batch: int) -> None:
    model, seen = LikeDinov2(chunks=0).train(), []
    views, rows = torch.randn(batch, 3, 32, 32), grid_size(model, strategy, 32)[0]
    mask = torch.rand(batch, rows**2) < 0.5
    mask[0, :2] = torch.tensor([True, False])
    plain = copy.deepcopy(model)
    compress(model, strategy)
    with torch.no_grad():  # positions of the own grid, resampled; a masked token is the same at each
        every = plain.prepare_tokens_with_masks(views)
        positions = every[:, 3:] - plain.patch_embed.proj(views).flatten(2).mT
    resampled = resample_positions(positions[:1], (4, 4), (rows, rows))
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    for run in (
        lambda: model([views, views], masks=[None, mask], is_training=True)[1],
        lambda: model.forward_features([views, views], [mask, None])[0],
        lambda: model.forward_features(views, mask),
    ):
        assert run()["patches"].shape == (batch, rows**2, 32)
    patches = every.shape[1] - 3 if strategy.patch_size is None else 4
    kept = num_tokens(model, strategy, 32)
    assert [[crop.shape[1] for crop in crops] for crops in seen[:2]] == [[kept, 3 + patches], [3 + patches, kept]]
    for tokens in (seen[0][1], seen[1][0], seen[2]):
        expected = (model.mask_token + resampled[0]).expand(batch, -1, -1)
        torch.testing.assert_close(tokens[:, 3:][mask], expected[mask], rtol=1e-5, atol=1e-5)
        assert ((tokens[:, 3:] - expected).abs().amax(-1)[~mask] > 0.01).all()
        torch.testing.assert_close(tokens[:, :3], every[:, :3])
    wrong = torch.zeros(batch, 9, dtype=torch.bool)
    if strategy.patch_size is not None:
        with pytest.raises(
            ValueError, match=rf"masks must have the shape \({batch}, 2 \* 2\) .*got \({batch}, 9\): draw"
        ):
            model.forward_features(views, wrong)
    own = torch.zeros(batch, 16, dtype=torch.bool)
    assert torch.equal(model.eval().forward_features(views, own)["masks"], own)
    set_strategy(model.train(), Strategy())
    assert torch.equal(model.forward_features(views, own)["patches"], plain.forward_features(views, own)["patches"])


def test_masks_for_a_teacher_in_eval_mode_are_refused_since_it_has_a_grid_of_its_own() -> None:
    student, teacher = LikeDinov2(chunks=0).train(), LikeDinov2(chunks=0).requires_grad_(False).eval()
    compress(student, Strategy(0.5, 16), teacher=teacher)
    views, masks = torch.randn(2, 3, 32, 32), torch.ones(2, 4, dtype=torch.bool)
    assert teacher.forward_features(views)["patches"].shape == (2, 16, 32)
    with pytest.raises(ValueError, match=r"masks must be for student and teacher alike, got one for 2 \* 2 patches"):
        student.forward_features(views, masks)
    teacher.train()
    assert teacher.forward_features(views)["patches"].shape == (2, 4, 32)
    assert student.forward_features(views, masks)["patches"].shape == (2, 4, 32)


@pytest.mark.parametrize("kind", [partial(LikeDinov2, 0), LikeDinov3])
@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.0, 16), Strategy(0.75)], ids=str)
def test_layers_of_dropped_or_larger_patches_are_sequences_and_no_maps(kind: Any, strategy: Strategy) -> None:
    model = compress(_with_weights_that_matter(kind()), strategy)
    views, patches = _views(model), num_tokens(model, strategy, 32) - 3
    assert [layer.shape for layer in model.get_intermediate_layers(views, 2)] == 2 * [(3, patches, 32)]
    words = f"no feature map of 4 x 4, but {patches} patches: use its eval mode"
    for asked in ((views, 2, True), {"x": views, "reshape": True}):
        with pytest.raises(RuntimeError, match=words):
            model.get_intermediate_layers(**asked) if isinstance(asked, dict) else model.get_intermediate_layers(*asked)
    plain = restore(copy.deepcopy(model)).eval()
    (found,), (expected,) = (each.eval().get_intermediate_layers(views, reshape=True) for each in (model, plain))
    assert found.shape == (3, 32, 4, 4)
    assert torch.equal(found, expected)
    assert "get_intermediate_layers" not in vars(plain)


def test_blocks_in_chunks_are_all_of_the_blocks() -> None:
    models = [LikeDinov2(chunks) for chunks in (0, 1, 2, 4)]
    assert [[type(block) for block in find_encoder(model).blocks] for model in models] == 4 * [4 * [Block]]
    assert len({relative_cost(model, Strategy(0.5), 32) for model in models}) == 1


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.0, 16), Strategy(0.5, 16)], ids=str)
def test_rotations_made_at_random_for_each_block_and_crop_are_those_of_its_own_patches(strategy: Strategy) -> None:
    """The plain model runs on the same kept patches, from the random state in which rotations were first made."""
    model = _with_weights_that_matter(LikeDinov3(scale=2.0))
    plain = copy.deepcopy(model)
    if strategy.patch_size is not None:
        plain = _larger_like_dinov3(plain, strategy.patch_size)
    crops = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 32, 64), torch.randn(2, 3, 32, 32)]
    kept: list[Any] = []
    states: list[Tensor] = []
    (embed,) = compressed_embeds(compress(model, strategy))
    model.turns.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    embed.register_forward_hook(lambda *_: kept.append(embed.selection.kept))
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
        turns = [plain.turns(height=height, width=width) for _, (height, width) in prepared]
        turns = [
            each if of_one is None else tuple(part[of_one].unsqueeze(1) for part in each)
            for each, of_one in zip(turns, kept, strict=True)
        ]
        tokens = block(tokens, turns)
    for found, expected in zip(features, tokens, strict=True):
        assert _difference(found["all"], plain.norm(expected)) < 1e-4


def test_crops_of_lists_in_two_forwards_keep_their_rotations_until_a_checkpoint_asks(gradients: Any) -> None:
    model = compress(_with_weights_that_matter(LikeDinov3(scale=2.0)), Strategy(0.5))
    lists, found = [[torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)] for _ in range(2)], []
    for model.checkpoints in (None, False):
        model.zero_grad()
        torch.manual_seed(1)
        one, other = ([named["class"] for named in model(crops, [None] * 2, is_training=True)] for crops in lists)
        (one[0] * other[0] + one[1] * other[1]).sum().backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found)


def test_rotations_in_half_precision_are_proven_as_any_others() -> None:
    model = _with_weights_that_matter(LikeDinov3())
    exact, turned = type(model.turns).forward, Attention.turned
    model.turns.forward = lambda **sides: tuple(part.bfloat16() for part in exact(model.turns, **sides))
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.6)
        block.attn.turned = lambda x, sine, cosine, attn=block.attn: turned(attn, x.to(sine.dtype), sine, cosine).to(
            x.dtype
        )
    plain, views = copy.deepcopy(model), _views(model)
    (embed,) = compressed_embeds(compress(model, Strategy(0.5)))
    features = _run(model, views)[1]
    with _on_patches(VITS["Meta's DINOv3"], plain, embed.selection.kept):
        assert _difference(features, _run(plain, views)[1]) < 2e-2


def test_compiled_blocks_and_half_precision_take_crops_of_lists() -> None:
    model = compress(_with_weights_that_matter(LikeDinov3(scale=2.0)), Strategy(0.5))
    crops, found = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)], []
    for compiles in (False, True):
        for block in model.blocks if compiles else ():
            block.compile(backend="eager")
        torch.manual_seed(1)
        found.append([named["all"] for named in model(crops, [None] * 2, is_training=True)])
    torch.testing.assert_close(*found)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        half = [named["all"] for named in model(crops, [None] * 2, is_training=True)]
    for exact, rough in zip(found[0], half, strict=True):
        torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)
    half[0].float().square().sum().backward()


def test_a_fresh_rotary_model_whose_blocks_add_little_is_seen_through() -> None:
    model = _hugging_face("DINOv3ViTModel", **DINOV3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda" in name:
                parameter.fill_(1e-5)
    model.train()
    tokens = _output(compress(model, Strategy(0.25)), _views(model))
    assert tokens.shape[1] == 5 + 12


# Refusals


def test_a_fork_that_mixes_up_the_crops_of_a_list_is_refused() -> None:
    class Mixed(LikeDinov2):
        def forward_features_list(self, crops: list[Tensor], masks: Any) -> Any:
            made = [self.prepare_tokens_with_masks(crop) for crop in crops]
            made[0] = made[0].roll(1, dims=1)
            return self.blocks[0](made)

    with pytest.raises(TypeError, match="it mixes up crops in one list"):
        compress(Mixed(chunks=0), token_dropout=0.5)


def test_crops_in_one_list_are_refused_while_compressed() -> None:
    class TakesLists(LikeDino):
        """As DINOv2's class does in training, by another method: every block takes the crops of all sizes at once."""

        def forward_list(self, crops: list[Tensor]) -> list[Tensor]:
            tokens = [self.patch_embed(crop) + self.pos_embed[:, 1:] for crop in crops]
            for block in self.blocks:
                tokens = block(tokens)
            return tokens

    model = TakesLists()
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
    for vit in (tiny_vit(), teacher):
        with pytest.raises(AttributeError, match="'list' object has no attribute 'shape'"):
            vit.eval()([torch.zeros(2, 3, 32, 32)])


def test_a_vit_that_keeps_its_patches_in_a_map_is_refused_with_what_is_supported() -> None:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    sam = VisionTransformerSAM(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    with pytest.raises(TypeError, match=r"got a tensor of shape \(1, 4, 4, 32\)\. Supported: most ViTs of timm"):
        compress(sam, token_dropout=0.5)


class ConvolutionalStem(LikeDino):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed.proj = nn.Sequential(*_stem())  # type: ignore[assignment]


class NothingWithThatName(LikeDino):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(2))


class TwoLists(LikeDino):
    def __init__(self) -> None:
        super().__init__()
        self.more_blocks = nn.ModuleList(Block(32) for _ in range(2))


class StemOfSomebody(nn.Module):
    """In timm's class, which gives it more than it takes, and asks for more than it has."""

    def __init__(self, stem: nn.Module, **_: Any) -> None:
        super().__init__()
        self.img_size, self.num_patches, self.proj = (32, 32), 16, stem

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def _timm_with(*stem: nn.Module) -> nn.Module:
    stem_of = partial(StemOfSomebody, nn.Sequential(*stem) if len(stem) > 1 else stem[0])
    return VisionTransformer(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=0, embed_layer=stem_of)


def _stem() -> list[nn.Module]:
    return [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1)]


def test_timms_class_with_somebodys_own_patch_embedding_is_known_by_its_shape(patches_among: Any) -> None:
    model = _with_weights_that_matter(_timm_with(nn.Conv2d(3, 32, 8, 8)))
    views = torch.randn(3, 3, 32, 32)
    every, _ = _run(model, views)
    tokens, _ = _run(compress(model, Strategy(0.5)), views)
    assert tokens.shape == (3, 9, 32)
    patches_among(tokens[:, 1:], every[:, 1:])


class BlocksThatKnowWhere(LikeDino):
    def __init__(self) -> None:
        super().__init__()
        for number, block in enumerate(self.blocks):
            block.register_buffer("where", torch.linspace(0, 1e-3 * (1 + number), 17)[:, None])
            block.forward = lambda x, block=block: Block.forward(block, x + block.where[: x.shape[1]])  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_timm("vit_relpos_small_patch16_224", **TIMM), "VisionTransformerRelPos whose tokens"),
        (_timm("beit_base_patch16_224", **TIMM), "Beit"),
        (_timm("convnext_atto"), "ConvNeXt"),
        (_timm("naflexvit_base_patch16_gap", **TIMM), r"NaFlexVit, which is given patches .*patch_drop_rate"),
        (_timm("hiera_tiny_224", stages=(1, 1, 1, 1)), "Hiera"),
        (partial(_hugging_face, "BeitModel", use_relative_position_bias=True), "its blocks fail"),
        (
            ConvolutionalStem,
            "ConvolutionalStem, which has no convolution outside its blocks whose stride is its kernel",
        ),
        (lambda: _timm_with(*_stem()), "VisionTransformer, which has no convolution outside its blocks whose stride"),
        (NothingWithThatName, "which has no list of blocks in which something is called attn or attention"),
        (TwoLists, r"which has 2 lists of blocks \(blocks, more_blocks\), and not one"),
        (BlocksThatKnowWhere, "its blocks know where a patch was"),
    ],
)
def test_what_shape_cannot_do_is_refused_with_the_reason(make: Any, words: str) -> None:
    model = make()
    before = [(name, type(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    with pytest.raises(TypeError, match=words) as raised:
        compress(model, token_dropout=0.5)
    assert "Supported:" in str(raised.value)
    assert len(str(raised.value)) < 3 * 120
    assert before == [(name, type(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()]


def test_a_model_without_values_cannot_be_proven() -> None:
    with torch.device("meta"):
        model = LikeDino()
    with pytest.raises(TypeError, match="its parameters have no values here"):
        compress(model, token_dropout=0.5)


def test_a_model_whose_parameters_are_sharded_is_told_to_be_compressed_before() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole, blocks = LikeDino(), LikeDino()
        for sharded in (*blocks.blocks, whole):
            fully_shard(sharded, mesh=mesh)
        for model in (whole, blocks):
            with pytest.raises(TypeError, match="its parameters are sharded: compress it before fully_shard") as raised:
                compress(model, token_dropout=0.5)
            assert str(raised.value).count("Tensor") == 0
    finally:
        dist.destroy_process_group()


def test_a_model_whose_parameters_are_offloaded_is_told_to_be_compressed_before() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = _built(VITS["Dinov2Model"])
    accelerate.cpu_offload(model)
    with pytest.raises(TypeError, match=r"its parameters have no values here .*compress it before it is offloaded"):
        compress(model, token_dropout=0.5)


class OnlySquareViews(LikeDino):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != x.shape[3]:
            raise AssertionError
        return super().forward(x)


def test_a_model_that_does_not_run_at_its_own_size_is_told_which_that_is() -> None:
    model = OnlySquareViews()
    model.patch_embed.img_size = (32, 48)
    with pytest.raises(TypeError, match=r"AssertionError: no reason \(on a view of 32 x 48 px, its own size\)"):
        compress(model, token_dropout=0.5)
    model.patch_embed.img_size = (32, 32)
    assert num_tokens(compress(model, token_dropout=0.5), Strategy(0.5), 32) == 9


def test_a_bias_for_all_tokens_that_a_model_makes_by_itself_is_called_no_more_than_that() -> None:
    model = _hugging_face("BeitModel", use_shared_relative_position_bias=True)
    words = "attention_mask must be None in a compressed forward, got a mask or bias for all tokens"
    with pytest.raises(TypeError, match=words):
        compress(model, token_dropout=0.5)


def test_what_holds_a_vit_beside_other_things_is_none() -> None:
    assert is_encoder(LikeDino())
    assert not is_encoder(nn.Sequential(LikeDino(), nn.Linear(32, 8)))
    assert not is_encoder(nn.ModuleDict({"student": LikeDino(), "teacher": LikeDino()}))
