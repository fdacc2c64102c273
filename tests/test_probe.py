"""What is proven when a model is compressed: that the tokens which are kept are the plain model's own."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from seqcompress import Strategy, compress, is_compressed, num_tokens, relative_cost, restore

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


class NormBeforePositions(VisionTransformer):
    def _pos_embed(self, x: Tensor) -> Tensor:
        return super()._pos_embed(F.layer_norm(x, x.shape[-1:]))


class ScaleBeforePositions(VisionTransformer):
    def _pos_embed(self, x: Tensor) -> Tensor:
        return super()._pos_embed(2 * x)


class NeighboursMixed(VisionTransformer):
    def _pos_embed(self, x: Tensor) -> Tensor:
        return super()._pos_embed(x + x.roll(1, dims=1))


class MaskTokenPutIn(VisionTransformer):
    def _pos_embed(self, x: Tensor) -> Tensor:
        return super()._pos_embed(torch.cat((torch.full_like(x[:, :1], 0.5), x[:, 1:]), dim=1))


class BlockOfOnesOwn(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return super().forward(x)


class BlockOfAnotherDevice(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        raise RuntimeError("this kernel needs a GPU")


class LikeTimms(nn.Module):
    """Of no class that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.stem = 32, nn.Conv2d(3, 32, 8, 8)
        self.trunk = nn.ModuleList(BlockOfAnotherDevice(32, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        for block in self.trunk:
            x = block(x)
        return x


class BatchSizeOfTheImages(VisionTransformer):
    """As in MAE's code and its many copies."""

    def forward_features(self, x: Tensor, **kwargs: Any) -> Tensor:
        batch = x.shape[0]
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(batch, -1, -1), x), dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


@pytest.mark.parametrize("kind", [NormBeforePositions, ScaleBeforePositions, NeighboursMixed, MaskTokenPutIn])
@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.0, 16)], ids=str)
def test_a_model_that_changes_patches_before_their_positions_is_refused(kind: Any, strategy: Strategy) -> None:
    vit = kind(**SMALL)
    with pytest.raises(
        TypeError, match=rf"a {kind.__name__} whose tokens would not be those of the plain model: .*differ"
    ):
        compress(vit, strategy)
    assert not is_compressed(vit)


class TurnedByIndex(Attention):
    """Rotates queries and keys by their place in the sequence, however many tokens there are."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        angles = torch.arange(x.shape[1])[:, None] * 10 ** -torch.linspace(0, 1, self.head_dim // 2)

        def turned(x: Tensor) -> Tensor:
            one, other = x.chunk(2, dim=-1)
            return torch.cat((one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()), -1)

        attended = F.scaled_dot_product_attention(turned(q), turned(k), v)
        return self.proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class BlockThatTurns(Block):
    def __init__(self, dim: int, num_heads: int, **settings: Any) -> None:
        super().__init__(dim, num_heads, **settings)
        self.attn = TurnedByIndex(dim, num_heads)


class MixesNeighboursBetweenBlocks(VisionTransformer):
    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x)
            x = x + 0.1 * x.roll(1, dims=1)
        return self.norm(x)


def _with_a_forward_of_its_own() -> nn.Module:
    vit = VisionTransformer(**SMALL)
    mlp = vit.blocks[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x).cumsum(dim=1)  # type: ignore[method-assign]
    return vit


@pytest.mark.parametrize(
    "make",
    [
        lambda: VisionTransformer(**SMALL, block_fn=BlockThatTurns),
        lambda: MixesNeighboursBetweenBlocks(**SMALL),
        _with_a_forward_of_its_own,
    ],
    ids=["block_fn", "subclass", "forward"],
)
def test_blocks_that_know_where_a_patch_was_are_refused_in_timms_class_too(make: Any) -> None:
    vit = make()
    with pytest.raises(TypeError, match="its blocks know where a patch was, since tokens in another order differ"):
        compress(vit, token_dropout=0.5)
    assert not is_compressed(vit)


def test_a_convolution_over_tokens_is_seen_though_it_adds_nothing_yet() -> None:
    class BlockWithAConvolution(Block):
        def __init__(self, dim: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(dim, *args, **kwargs)
            self.mixing, self.gate = nn.Conv1d(dim, dim, 3, padding=1, groups=dim), nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(x + self.gate * self.mixing(x.transpose(1, 2)).transpose(1, 2), *args, **kwargs)

    class BlockWithAPointwiseConvolution(BlockWithAConvolution):
        def __init__(self, dim: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(dim, *args, **kwargs)
            self.mixing = nn.Conv1d(dim, dim, 1)

    with pytest.raises(TypeError, match="its blocks know where a patch was"):
        compress(VisionTransformer(**SMALL, block_fn=BlockWithAConvolution), token_dropout=0.5)
    compress(VisionTransformer(**SMALL, block_fn=BlockWithAPointwiseConvolution), token_dropout=0.5)


@pytest.mark.parametrize(("block", "runs"), [(Block, 0), (BlockOfOnesOwn, 3)])
def test_only_blocks_that_are_not_timms_own_are_run_for_the_proof(
    block: Any, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x, **given: ran.append(x.shape[1]) or forward(self, x, **given))
    vit = VisionTransformer(**SMALL, block_fn=block)
    compress(vit, token_dropout=0.5)
    assert ran == [17, 17, 17, 17, 16, 16][: 2 * runs]  # 2 blocks: in order, in another, and of one patch less
    assert num_tokens(vit, Strategy(0.5), 32) == 9


def test_blocks_that_do_not_run_here_are_taken_as_they_are_in_a_known_class_only() -> None:
    vit, other = VisionTransformer(**SMALL, block_fn=BlockOfAnotherDevice), LikeTimms()
    assert is_compressed(compress(vit, token_dropout=0.5))
    with pytest.raises(TypeError, match="its blocks do not run on views alone: this kernel needs a GPU"):
        compress(other, token_dropout=0.5)


@pytest.mark.parametrize("already", [False, True])
def test_a_refused_teacher_leaves_the_student_as_it_was(already: bool, tiny_vit: Any) -> None:
    student = tiny_vit()
    if already:
        compress(student, token_dropout=0.25)
    with pytest.raises(TypeError, match="teacher must be a supported ViT, got a ScaleBeforePositions"):
        compress(student, token_dropout=0.5, teacher=ScaleBeforePositions(**SMALL))
    assert is_compressed(student) is already


@pytest.mark.parametrize("grid", [(4, 4), (7, 7)], ids=["grid by patch size", "grid by stride"])
def test_overlapping_patches_are_refused(grid: tuple[int, int]) -> None:
    vit = VisionTransformer(**SMALL)
    vit.patch_embed.proj = nn.Conv2d(3, 32, 8, stride=4)
    vit.patch_embed.grid_size, vit.pos_embed = grid, nn.Parameter(torch.randn(1, 50, 32))
    assert vit(torch.randn(2, 3, 32, 32)).shape == (2, 32)
    with pytest.raises(TypeError, match="overlap"):
        compress(vit, token_dropout=0.5)


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.5, 16), Strategy(0.0, 16)], ids=str)
def test_a_model_that_takes_the_batch_size_from_its_images_trains_on_its_own_tokens(
    strategy: Strategy, first_tokens: Any, patches_among: Any
) -> None:
    vit, views = BatchSizeOfTheImages(**SMALL).train(), torch.randn(5, 3, 32, 32)
    native = copy.deepcopy(vit)
    native.set_input_size(patch_size=strategy.patch_size or 8)
    every = first_tokens(native, views)
    for batch in (views, views[:2], views[:1]):
        tokens = first_tokens(compress(vit, strategy), batch)
        assert tokens.shape[1] == num_tokens(vit, strategy, 32)
        assert torch.equal(tokens[:, :1], every[: len(batch), :1])
        patches_among(tokens[:, 1:], every[: len(batch), 1:])
    vit(views).square().sum().backward()
    assert float(vit.pos_embed.grad.abs().sum()) > 0
    assert float(vit.cls_token.grad.abs().sum()) > 0


def test_the_proof_leaves_no_trace(tiny_vit: Any) -> None:
    vit, seen = tiny_vit(drop_rate=0.1).train(), []
    vit.blocks[1].eval()
    for module in (vit, vit.patch_embed, vit.patch_embed.proj, vit.pos_drop, vit.blocks[0]):
        module.register_forward_hook(lambda *_: seen.append(1))
        module.register_forward_pre_hook(lambda *_: seen.append(1))
    modes = [module.training for module in vit.modules()]
    state = torch.get_rng_state()
    compress(vit, token_dropout=0.5)
    assert seen == []
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in vit.modules()] == modes
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert not vit.patch_embed.forward_counts


class Remembers(VisionTransformer):
    """Keeps what it sees in the ways that people do: a buffer that is replaced, numbers, generators of others."""

    def __init__(self) -> None:
        super().__init__(**SMALL)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))
        self.latest, self.forwards = None, 0

    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        self.mean = 0.9 * self.mean + x.mean() * random.random() * np.random.rand()
        self.seen += 1
        self.latest, self.forwards = x, self.forwards + 1
        return super().forward_features(x)


def test_what_a_model_remembers_of_the_proof_is_forgotten() -> None:
    vit = Remembers().train()
    before = (vit.mean, vit.latest, vit.forwards, random.getstate(), np.random.get_state()[1].tolist())
    compress(vit, token_dropout=0.5)
    assert vit.mean is before[0]
    assert (float(vit.mean), float(vit.seen)) == (0, 0)
    after = (vit.mean, vit.latest, vit.forwards, random.getstate(), np.random.get_state()[1].tolist())
    assert after[1:] == before[1:]
    vit(torch.randn(2, 3, 32, 32))
    assert (float(vit.seen), vit.forwards) == (1, 1)


class HooksAsItFirstRuns(VisionTransformer):
    """As Hugging Face's models do, where they are to return more than their last features."""

    def __init__(self) -> None:
        super().__init__(**SMALL)
        self.has_hooks = False

    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        if not self.has_hooks:
            self.has_hooks = bool(self.blocks[0].register_forward_hook(lambda *_: None))
        return super().forward_features(x)


def test_hooks_that_a_model_puts_in_as_it_first_runs_are_put_in_once() -> None:
    vit = compress(HooksAsItFirstRuns(), token_dropout=0.5).train()
    for _ in range(2):
        vit(torch.randn(2, 3, 32, 32))
    assert len(vit.blocks[0]._forward_hooks) == 1


# Precision


class AsOnAGpu(TorchDispatchMode):
    """Convolutions and matrix products in TF32 where torch's settings allow a GPU to do so: 10 bits of fraction."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_convolution = function is torch.ops.aten.convolution.default
        is_product = function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        if (is_convolution and torch.backends.cudnn.allow_tf32) or (
            is_product and torch.get_float32_matmul_precision() != "highest"
        ):
            args = [_in_tf32(arg) if isinstance(arg, Tensor) and arg.ndim > 1 else arg for arg in args]
        return function(*args, **(kwargs or {}))


def _in_tf32(numbers: Tensor) -> Tensor:
    return ((numbers.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture(params=["highest", "high", "medium"])
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def test_a_model_is_proven_where_convolutions_or_products_run_in_tf32(matmul_precision: str, tiny_vit: Any) -> None:
    vit, views = tiny_vit().train(), torch.randn(2, 3, 32, 32)
    assert torch.backends.cudnn.allow_tf32  # torch's default
    exact = vit.patch_embed.proj(views).detach()
    with AsOnAGpu():
        assert 1e-4 < float((vit.patch_embed.proj(views).detach() - exact).abs().max() / exact.abs().max()) < 1e-2
        compress(vit, token_dropout=0.5)
        compress(VisionTransformer(**SMALL, block_fn=BlockOfOnesOwn), token_dropout=0.5)
        with pytest.raises(TypeError, match="its blocks know where a patch was"):
            compress(VisionTransformer(**SMALL, block_fn=BlockThatTurns), token_dropout=0.5)
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == matmul_precision


@pytest.mark.gpu
def test_a_model_is_proven_on_a_gpu_with_its_default_precision(matmul_precision: str, tiny_vit: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    vit = VisionTransformer(img_size=224, patch_size=16, depth=2).cuda().train()
    assert compress(vit, token_dropout=0.5)(torch.randn(8, 3, 224, 224, device="cuda")).shape == (8, 1000)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="a setting since torch 2.9")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_settings_of_precision_are_put_back_of_either_generation(precision: str, tiny_vit: Any) -> None:
    places: Any = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = precision
        compress(tiny_vit(), token_dropout=0.5)
        assert [place.fp32_precision for place in places] == [precision] * 3
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


# Views that patches do not divide


@pytest.mark.parametrize(
    ("view", "patch", "settings", "tokens"),
    [
        ((250, 250), 16, {"img_size": 250}, 226),
        ((30, 30), 4, {"img_size": 30}, 50),
        ((128, 998), 16, {"img_size": (128, 998)}, 1 + 8 * 62),
    ],
)
def test_the_base_strategy_is_the_plain_model_where_patches_do_not_divide_the_view(
    view: tuple[int, int], patch: int, settings: dict[str, Any], tokens: int, first_tokens: Any, gradients: Any
) -> None:
    plain = VisionTransformer(**{**SMALL, "depth": 1, "patch_size": patch, **settings}).train()
    vit, views = copy.deepcopy(plain), torch.randn(2, 3, *view)
    compress(vit, Strategy())
    assert first_tokens(vit, views).shape[1] == num_tokens(vit, Strategy(), view) == tokens
    plain(views).sum().backward()
    vit(views).sum().backward()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(vit)[name], gradient), name


@pytest.mark.parametrize("dropout", [0.25, 0.9])
def test_tokens_that_are_kept_of_such_a_view_are_the_plain_models(
    dropout: float, first_tokens: Any, patches_among: Any
) -> None:
    vit, views = VisionTransformer(**{**SMALL, "img_size": 30, "patch_size": 4}).train(), torch.randn(3, 3, 30, 30)
    every = first_tokens(vit, views)
    tokens = first_tokens(compress(vit, token_dropout=dropout), views)
    assert tokens.shape[1] == 1 + round((1 - dropout) * 49)
    patches_among(tokens[:, 1:], every[:, 1:])


# Projections that are more than a convolution


class OwnConvolution(nn.Conv2d):
    def forward(self, views: Tensor) -> Tensor:
        return 3 * super().forward(views)


def _own_convolution(vit: Any) -> None:
    proj = OwnConvolution(3, 32, 8, stride=8)
    vit.patch_embed.proj = proj


def _spectral_norm(vit: Any) -> None:
    parametrizations.spectral_norm(vit.patch_embed.proj)


def _weight_norm(vit: Any) -> None:
    parametrizations.weight_norm(vit.patch_embed.proj)


def _pruned(vit: Any) -> None:
    prune.l1_unstructured(vit.patch_embed.proj, "weight", amount=0.5)


def _lora(vit: Any) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(vit, peft.LoraConfig(target_modules=["patch_embed.proj"], r=2, init_lora_weights=False))


def _hooked_projection(vit: Any) -> None:
    vit.patch_embed.proj.register_forward_hook(lambda module, args, output: output + 1)


def _hooked_embedding(vit: Any) -> None:
    vit.patch_embed.register_forward_hook(lambda module, args, output: 2 * output)


def _own_forward(vit: Any) -> None:
    embed = vit.patch_embed
    inner = getattr(embed, "embed", embed)
    inner.forward = lambda views: 2 * type(inner).forward(inner, views)


CHANGES = [
    _own_convolution,
    _spectral_norm,
    _weight_norm,
    _pruned,
    _lora,
    _hooked_projection,
    _hooked_embedding,
    _own_forward,
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_projection_that_is_more_than_a_convolution_gives_the_tokens_of_the_plain_model(
    change: Any, when: str, tiny_vit: Any, first_tokens: Any, patches_among: Any
) -> None:
    vit, views = tiny_vit().train(), torch.randn(4, 3, 32, 32)
    for step in (change, lambda vit: compress(vit, token_dropout=0.5))[:: 1 if when == "before" else -1]:
        step(vit)
    tokens = first_tokens(vit, views)
    before = {name: parameter.grad for name, parameter in vit.named_parameters()}
    assert set(before.values()) == {None}
    tokens.square().sum().backward()
    trained = {name for name, parameter in vit.patch_embed.named_parameters() if parameter.grad is not None}
    vit.zero_grad()
    vit.eval() if change is _spectral_norm else restore(vit)  # its power iteration goes on with every forward
    every = first_tokens(vit, views)
    every.square().sum().backward()
    assert trained == {name for name, parameter in vit.patch_embed.named_parameters() if parameter.grad is not None}
    if change is not _spectral_norm:
        assert tokens.shape[1] == 9
        patches_among(tokens[:, 1:], every[:, 1:])


def test_a_hook_that_detaches_patches_detaches_those_that_are_kept(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.5).train()
    vit.patch_embed.register_forward_hook(lambda module, args, output: output.detach())
    vit(torch.randn(2, 3, 32, 32)).sum().backward()
    assert vit.patch_embed.proj.weight.grad is None
    assert vit.cls_token.grad is not None


def test_patches_of_an_adapted_projection_can_be_scaled(tiny_vit: Any, first_tokens: Any) -> None:
    vit = tiny_vit().train()
    _lora(vit)
    pixels = torch.randn(2, 3, 32, 32)
    patches = F.unfold(pixels, 8, stride=8).transpose(1, 2).reshape(-1, 3, 8, 8)
    large = F.interpolate(patches, scale_factor=2, mode="bicubic", antialias=True)  # each patch by itself
    upsampled = F.fold(large.reshape(2, 16, -1).transpose(1, 2), 64, 16, stride=16)
    expected = first_tokens(vit, pixels)
    with pytest.warns(UserWarning, match="64 x 64 px"):
        tokens = first_tokens(compress(vit, patch_size=16), upsampled)  # PI-resize undoes the upsampling
    torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-3)


# Masks and passes without gradients


def test_an_attention_mask_for_all_tokens_is_answered_with_what_is_wrong(tiny_vit: Any) -> None:
    vit, views, mask = compress(tiny_vit(), token_dropout=0.5).train(), torch.randn(2, 3, 32, 32), torch.zeros(17, 17)
    with pytest.raises(ValueError, match="attn_mask must be None in a compressed forward, got a mask or bias for all"):
        vit.forward_features(views, attn_mask=mask)
    assert vit.eval().forward_features(views, attn_mask=mask).shape == (2, 17, 32)
    assert compress(vit, Strategy()).train().forward_features(views, attn_mask=mask).shape == (2, 17, 32)


def test_a_pass_without_gradients_of_what_is_trained_is_told_once(tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(), token_dropout=0.5).train(), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            vit(views)
    assert len(told) == 1
    assert "without gradients, and so uncompressed" in str(told[0].message)
    assert 'when="train"' in str(told[0].message)


@pytest.mark.filterwarnings("error")
def test_a_teacher_a_frozen_encoder_and_a_base_strategy_are_not_told_of_passes_without_gradients(tiny_vit: Any) -> None:
    student, teacher, frozen, base = (tiny_vit().train() for _ in range(4))
    compress(student, Strategy(0.5, 16), teacher=teacher.requires_grad_(False))
    compress(frozen.requires_grad_(False), token_dropout=0.5)
    compress(base, Strategy())
    with torch.no_grad():
        for vit in (teacher, frozen, base):
            vit(torch.randn(2, 3, 32, 32))
    student(torch.randn(2, 3, 32, 32)).sum().backward()


def test_views_that_the_plain_model_refuses_are_told_once(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.5).train()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for side in (64, 64, 32):
            vit(torch.randn(2, 3, side, side))
    assert len(told) == 1
    assert "views of 64 x 64 px, with interpolated positions" in str(told[0].message)
    assert "takes 32 x 32 px only" in str(told[0].message)


# Nothing left behind


def test_restore_takes_its_hooks_out_of_blocks_that_have_been_wrapped_since(tiny_vit: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    vit, views = compress(tiny_vit(), token_dropout=0.5).train(), torch.randn(2, 3, 32, 32)
    first = type(vit.blocks[0])
    apply_activation_checkpointing(vit, check_fn=lambda module: isinstance(module, first))
    assert type(vit.blocks[0]) is not first
    vit(views).sum().backward()
    restore(vit)
    assert [name for name, module in vit.named_modules() if module._forward_pre_hooks] == []
    assert [name for name, module in vit.named_modules() if module._forward_pre_hooks_with_kwargs] == []


class EmbeddingWithScratch(type(VisionTransformer(**SMALL).patch_embed)):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_a_buffer_that_is_not_kept_adds_no_key_to_the_state() -> None:
    vit = VisionTransformer(**SMALL, embed_layer=EmbeddingWithScratch)
    before = list(vit.state_dict())
    assert list(compress(vit, token_dropout=0.5).state_dict()) == before


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_a_model_that_runs_under_an_autocast_of_its_own_is_proven_in_its_precision(name: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    vit = timm.create_model(name, num_classes=0, depth=2, img_size=224)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(vit)
    AcceleratorState._reset_state(reset_partial_state=True)
    for strategy in ("drop 0.5", "drop 0.25"):
        assert compress(prepared, strategy) is prepared
    assert is_compressed(vit)


def test_blocks_that_know_where_a_patch_was_are_refused_under_such_an_autocast_too() -> None:
    class InHalfPrecision(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    class BlockThatLooksAside(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return super().forward(x + 0.5 * x.roll(1, dims=1))

    compress(InHalfPrecision(**SMALL, block_fn=BlockOfOnesOwn), token_dropout=0.5)
    with pytest.raises(TypeError, match="its blocks know where a patch was"):
        compress(InHalfPrecision(**SMALL, block_fn=BlockThatLooksAside), token_dropout=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fresh_blocks_that_add_next_to_nothing_are_taken_in_half_precision(dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        vit = timm.create_model("vit_small_patch16_dinov3", img_size=64, depth=2, num_classes=0).to(dtype)
        assert is_compressed(compress(vit, token_dropout=0.5))


def test_observers_of_quantization_that_have_seen_nothing_yet_stay_as_they_are() -> None:
    from torch.ao import quantization

    vit = VisionTransformer(**SMALL).train()
    vit.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(vit, inplace=True)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    compress(vit, token_dropout=0.5)
    after = vit.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_weights_that_are_not_finite_are_named_in_a_class_of_ones_own_and_prove_nothing_in_a_known_one() -> None:
    known = VisionTransformer(**SMALL)
    nn.init.constant_(known.pos_embed, float("nan"))
    assert is_compressed(compress(known, Strategy(0.5)))
    general = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64
    )
    nn.init.constant_(general.encoder.pos_embedding, float("nan"))
    with pytest.raises(TypeError, match=r"its tokens are not finite \(NaN or infinite weights\?\)"):
        compress(general, Strategy(0.5))


def test_views_of_other_channels_are_named(tiny_vit: Any) -> None:
    vit = compress(tiny_vit().train(), Strategy(0.5, 16))
    with pytest.raises(ValueError, match=r"views must have 3 channels, got the shape \(2, 1, 32, 32\)"):
        vit(torch.randn(2, 1, 32, 32))


def test_a_spectral_norm_of_the_projection_is_not_advanced_by_asking_what_it_costs(tiny_vit: Any) -> None:
    vit = tiny_vit().train()
    parametrizations.spectral_norm(vit.patch_embed.proj)
    before = copy.deepcopy(vit.state_dict())
    compress(vit, Strategy(0.5))
    relative_cost(vit, Strategy(0.5), 32)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="older torch does not tell that it exports")
def test_a_compressed_encoder_in_train_mode_is_not_exported(tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit().train(), Strategy(0.5, 16)), torch.randn(2, 3, 32, 32)
    with pytest.raises(RuntimeError, match=r"cannot be traced in train mode: eval\(\) or restore\(model\) first"):
        torch.export.export(vit, (views,), strict=False)
    exported = torch.export.export(vit.eval(), (views,), strict=False).module()
    torch.testing.assert_close(exported(views), vit(views))
