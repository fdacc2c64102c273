"""What happens to a model around ``compress``: parts that are replaced, hooked, copied, frozen, and what it tells."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from seqcompress import (
    Budget,
    OnlineScheduler,
    SequenceScheduler,
    Strategy,
    accelerate,
    compress,
    get_strategy,
    gradient_error,
    is_compressed,
    num_tokens,
    rehearse,
    restore,
    set_strategy,
)
from seqcompress.encoders import CompressedPatchEmbed

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
HUGGING_FACE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
VIEWS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def _torchvision() -> Any:
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=4)
    nn.init.normal_(vit.heads.head.weight)
    return vit.train()


def _hugging_face(name: str = "ViT", **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**HUGGING_FACE, **settings)
    return getattr(transformers, f"{name}Model")(config).train()


def _tokens(model: Any, block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Those that reach a block."""
    seen: list[Tensor] = []
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model(*args, **kwargs)
    handle.remove()
    return seen[0]


# What a model does to patches before their positions, in train mode, or as soon as it has learned to.


class _Before(VisionTransformer):
    """Something between patches and positions."""

    def __init__(self) -> None:
        super().__init__(**SMALL)
        self.before: Any = nn.Identity()

    def _pos_embed(self, x: Tensor) -> Tensor:
        return super()._pos_embed(self.before(x))  # type: ignore[no-any-return]


class _Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.rand(x.shape[:2]).unsqueeze(-1) < 0.5, self.token, x) if self.training else x


class _Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, self.training)


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class _Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(32, 4), nn.Linear(4, 32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


class _BatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (nn.Dropout(0.5), "in train mode"),
        (_Functional(), "in train mode"),
        (_Masks(), "in train mode"),
        (_Scale(), "before.weight works on patches"),
        (_Adapter(), "before.up.weight works on patches"),
        (_BatchNorm(32, affine=False), "in train mode"),
    ],
)
def test_what_shows_in_train_mode_only_or_later_is_refused(before: nn.Module, words: str) -> None:
    vit = _Before()
    assert is_compressed(compress(vit, Strategy(0.5)))
    restore(vit).before = before
    state, modes = copy.deepcopy(vit.state_dict()), [module.training for module in vit.modules()]
    random = torch.get_rng_state()
    with pytest.raises(TypeError, match=words):
        compress(vit, Strategy(0.5))
    assert not is_compressed(vit)
    assert [module.training for module in vit.modules()] == modes
    assert torch.equal(random, torch.get_rng_state())
    for name, value in vit.state_dict().items():
        assert torch.equal(value, state[name]), name


class _AttentionByPlace(nn.Module):
    """Attention of its own, which knows where a token stands in the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        angle = torch.arange(x.shape[1]).unsqueeze(-1) * 0.3
        key = key * torch.cos(angle) + key.roll(1, -1) * torch.sin(angle)
        return self.proj(F.scaled_dot_product_attention(query, key, value)), None


@pytest.mark.parametrize("layer_scale", [1.0, 1e-5, 0.0])
def test_blocks_that_know_where_a_patch_was_are_seen_however_little_they_add(layer_scale: float) -> None:
    model = _hugging_face("Dinov2", layerscale_value=layer_scale)
    assert is_compressed(compress(model, Strategy(0.5)))
    restore(model)
    for layer in model.encoder.layer if hasattr(model, "encoder") else model.layers:
        layer.attention = _AttentionByPlace()
    with pytest.raises(TypeError, match="its blocks know where a patch was"):
        compress(model, Strategy(0.5))


# Hooks


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(0.5), Strategy(0.0, 16)], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_hooks_on_the_convolution_of_a_vit_that_is_known_by_its_shape_run_once(
    strategy: Strategy, first: bool, patches_among: Any
) -> None:
    model, calls = _torchvision(), []
    plain = copy.deepcopy(model)

    def hook() -> None:
        model.conv_proj.register_forward_hook(lambda _, args, output: (calls.append("forward"), 3 * output)[1])
        model.conv_proj.register_full_backward_hook(lambda *_: calls.append("backward"))

    if first:
        hook()
    compress(model, strategy)
    if not first:
        hook()
    tokens = _tokens(model, model.encoder.layers[0], VIEWS)
    assert calls == ["forward"]
    model(VIEWS).sum().backward()
    assert calls == ["forward", "forward", "backward"]
    if strategy.patch_size is None:
        plain.conv_proj.register_forward_hook(lambda _, args, output: 3 * output)
        patches_among(tokens[:, 1:], _tokens(plain, plain.encoder.layers[0], VIEWS)[:, 1:])


def test_a_backward_hook_on_timms_patch_embedding_is_called(tiny_vit: Any) -> None:
    vit, calls = compress(tiny_vit().train(), Strategy(0.5)), []
    vit.patch_embed.register_full_backward_hook(lambda *_: calls.append(1))
    vit(VIEWS).sum().backward()
    restore(vit)(VIEWS).sum().backward()
    assert calls == [1, 1]


@pytest.mark.parametrize("make", [_torchvision, _hugging_face, lambda: VisionTransformer(**SMALL).train()])
def test_hooks_that_are_taken_out_are_an_error_and_not_features_of_nothing(make: Any) -> None:
    model = compress(make(), Strategy(0.5))
    for module in model.modules():
        module._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="its hooks have been taken out"):
        model(VIEWS)
    plain = restore(model).eval()
    assert not is_compressed(plain)


def test_a_forward_that_is_put_around_the_patch_embedding_is_called_once(tiny_vit: Any) -> None:
    vit, calls = compress(tiny_vit().train(), Strategy(0.5)), []
    inner = vit.patch_embed.forward

    def around(views: Tensor) -> Tensor:
        calls.append(1)
        return inner(views)

    vit.patch_embed.forward = around
    assert _tokens(vit, vit.blocks[0], VIEWS).shape[1] == 9
    del vit.patch_embed.forward
    assert _tokens(vit, vit.blocks[0], VIEWS).shape[1] == 9
    assert calls == [1]


def test_accelerates_hooks_on_every_module_work_before_and_after(tiny_vit: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    for first in (True, False):
        vit = tiny_vit().train()
        if not first:
            compress(vit, Strategy(0.5))
        for module in list(vit.modules()):
            hooks.add_hook_to_module(module, hooks.ModelHook())
        if first:
            compress(vit, Strategy(0.5))
        assert _tokens(vit, vit.blocks[0], VIEWS).shape[1] == 9


# Parts that are replaced, shared, copied


def test_blocks_that_are_replaced_are_an_error(tiny_vit: Any) -> None:
    model = compress(_hugging_face(), Strategy(0.5))
    blocks = model.layers if hasattr(model, "layers") else model.encoder.layer
    blocks[0] = copy.deepcopy(blocks[1])
    before = _tokens(model.eval(), blocks[0], VIEWS)
    assert before.shape[1] == 17
    if isinstance(model.embeddings.dropout, nn.Dropout):  # positions are met there, and the change does no harm
        assert _tokens(model.train(), blocks[0], VIEWS).shape[1] == 9
    vit = VisionTransformer(**SMALL, pos_drop_rate=0.0).train()
    compress(vit, Strategy(0.5))
    vit.pos_drop, vit.norm_pre, vit.blocks[0] = nn.Identity(), nn.Identity(), copy.deepcopy(vit.blocks[1])
    with pytest.raises(RuntimeError, match="has been replaced since compress"):
        vit.train()(VIEWS)


@pytest.mark.parametrize("share", [copy.deepcopy, lambda embed: embed])
def test_a_patch_embedding_in_another_model_is_plain_or_told(share: Any, tiny_vit: Any) -> None:
    student, other = compress(tiny_vit().train(), Strategy(0.5)), tiny_vit().train()
    other.patch_embed = share(student.patch_embed)
    if type(other.patch_embed) is PatchEmbed:
        assert torch.equal(other(VIEWS), tiny_vit().train()(VIEWS))
        return
    other(VIEWS)
    with pytest.warns(UserWarning, match="another model has been given this patch embedding"):
        student(VIEWS)


def test_restoring_one_of_two_models_with_common_blocks_leaves_the_other_compressed(tiny_vit: Any) -> None:
    one, other = tiny_vit().train(), tiny_vit().train()
    other.pos_drop, other.norm_pre, other.blocks = one.pos_drop, one.norm_pre, one.blocks
    compress(one, Strategy(0.5))
    compress(other, Strategy(0.75))
    lengths = [_tokens(vit, vit.blocks[0], VIEWS).shape[1] for vit in (one, other)]
    restore(other)
    assert [*lengths, _tokens(one, one.blocks[0], VIEWS).shape[1]] == [9, 5, 9]
    assert _tokens(other, other.blocks[0], VIEWS).shape[1] == 17


def test_a_block_that_is_adapted_after_compressing_leaves_everything_in_reach() -> None:
    peft = pytest.importorskip("peft")
    model = compress(_hugging_face(), Strategy(0.5))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*\.1\..*(q_proj|query)"))
    set_strategy(model, Strategy(0.75))
    budget = Budget(adapted)
    adapted.train()(VIEWS)
    assert budget.units > 0
    assert not is_compressed(restore(adapted))


@pytest.mark.parametrize("kind", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_compressed_convolution_refuses_a_parametrization_and_is_as_before(kind: Any) -> None:
    model = compress(_torchvision(), Strategy(0.5))
    weight, state, features = model.conv_proj.weight, copy.deepcopy(model.state_dict()), model.eval()(VIEWS)
    with pytest.raises(RuntimeError, match=r"weight of .* cannot be parametrized: restore\(model\), parametrize, and"):
        kind(model.conv_proj)
    assert model.conv_proj.weight is weight
    assert type(model.conv_proj) is CompressedPatchEmbed
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.eval()(VIEWS), features)
    kind(restore(model).conv_proj)
    assert _tokens(compress(model.train(), Strategy(0.5)), model.encoder.layers[0], VIEWS).shape[1] == 9


def test_a_copied_projection_keeps_its_parametrization() -> None:
    model = _torchvision()
    nn.utils.parametrizations.weight_norm(model.conv_proj)
    twin = copy.deepcopy(compress(model, Strategy(0.5)))
    assert isinstance(twin.conv_proj, CompressedPatchEmbed)
    assert twin.conv_proj.encoder.model is twin
    assert _tokens(twin, twin.encoder.layers[0], VIEWS).shape[1] == 9


def test_a_model_that_was_resized_is_looked_at_again() -> None:
    class Resizable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.img_size, self.conv = 64, nn.Conv2d(3, 32, 8, 8)
            self.where = nn.Parameter(torch.randn(1, 64, 32))
            self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(2)])
            for block in self.blocks:
                block.attention = nn.Identity()

        def forward(self, views: Tensor) -> Tensor:
            return self.blocks(self.conv(views).flatten(2).mT + self.where)  # type: ignore[no-any-return]

    model = Resizable()
    assert num_tokens(compress(model, Strategy(0.5)), Strategy(), 64) == 64
    model.img_size, model.where = 32, nn.Parameter(torch.randn(1, 16, 32))
    assert num_tokens(compress(model, Strategy(0.5)), Strategy(), 32) == 16


# Views of another size, maps, modes, devices


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (16, 64), (48, 32)])
def test_interpolated_positions_of_hugging_face_are_the_plain_models(size: tuple[int, int], patches_among: Any) -> None:
    model = _hugging_face()
    nn.init.normal_(model.embeddings.position_embeddings, std=0.5)
    plain, views = copy.deepcopy(model), torch.randn(3, 3, *size)
    compress(model, Strategy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model(views, interpolate_pos_encoding=True)[0]
    torch.testing.assert_close(output, plain(views, interpolate_pos_encoding=True)[0], rtol=0, atol=0)
    set_strategy(model, Strategy(0.5))
    first = [(vit.layers if hasattr(vit, "layers") else vit.encoder.layer)[0] for vit in (model, plain)]
    tokens, every = (
        _tokens(vit, block, views, interpolate_pos_encoding=True)
        for vit, block in zip((model, plain), first, strict=True)
    )
    assert tokens.shape[1] == 1 + every[:, 1:].shape[1] // 2
    patches_among(tokens[:, 1:], every[:, 1:])


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.0, 16)], ids=str)
def test_a_backbone_that_folds_its_features_to_maps_is_refused_before_it_trains(kind: str, strategy: Strategy) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**HUGGING_FACE, reshape_hidden_states=True)
    model = getattr(transformers, f"{kind}Backbone")(config).train()
    words = f"model: reshape_hidden_states must be False in the config of a {kind}Backbone, which otherwise folds"
    with pytest.raises(ValueError, match=words):
        compress(model, strategy)
    assert not is_compressed(model)
    assert compress(model, Strategy())(VIEWS).feature_maps[0].shape == (4, 32, 4, 4)
    with pytest.raises(ValueError, match=words):
        set_strategy(model, strategy)


def test_a_feature_map_of_dropped_patches_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2Backbone(transformers.Dinov2Config(**HUGGING_FACE, reshape_hidden_states=False)).train()
    compress(model, Strategy(0.5))
    model.config.reshape_hidden_states = True
    with pytest.raises(RuntimeError, match="no feature map of 4 x 4, but 8 patches"):
        model(VIEWS)
    assert model.eval()(VIEWS).feature_maps[0].shape == (4, 32, 4, 4)
    assert not model._forward_hooks or (restore(model) and not model._forward_hooks)


def test_a_frozen_patch_embedding_in_eval_mode_is_compressed_all_the_same(tiny_vit: Any) -> None:
    vit = compress(tiny_vit().train(), Strategy(0.5))
    vit.patch_embed.eval().requires_grad_(False)
    budget = Budget(vit)
    assert _tokens(vit, vit.blocks[0], VIEWS).shape[1] == 9
    assert budget.units > 0


def test_the_proof_does_not_care_for_the_default_device(tiny_vit: Any) -> None:
    vit = tiny_vit().train()
    with torch.device("meta"):
        compress(vit, Strategy(0.5))
    assert _tokens(vit, vit.blocks[0], VIEWS).shape[1] == 9


def test_a_model_that_needs_more_than_views_is_refused_with_its_own_words() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = _torchvision()
            self.image_size, self.conv_proj, self.layers = 32, self.vit.conv_proj, self.vit.encoder.layers
            del self.vit

        def forward(self, views: Tensor, condition: Tensor) -> Tensor:
            return self.layers(self.conv_proj(views).flatten(2).mT + condition)  # type: ignore[no-any-return]

    with pytest.raises(
        TypeError, match=r"a Conditioned must run on views alone, in eval mode, got TypeError: .*'condition'"
    ):
        compress(Conditioned(), Strategy(0.5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda vit: vit.conv_proj.__class__, None),
        (
            lambda vit: setattr(vit, "extra", nn.Conv2d(3, 8, 4, 4)),
            r"has 2 convolutions that make patches \(conv_proj, extra\)",
        ),
        (lambda vit: setattr(vit, "conv_proj", nn.Conv2d(3, 32, 8, 4)), "no convolution .* whose stride is its kernel"),
        (lambda vit: setattr(vit.encoder.layers[0].mlp, "0", nn.Linear(32, 96)), "blocks .* differ in their shapes"),
    ],
)
def test_what_is_almost_a_vit_is_refused_with_what_it_lacks(change: Any, words: str | None) -> None:
    vit = _torchvision()
    change(vit)
    if words is None:
        assert is_compressed(compress(vit, Strategy(0.5)))
        return
    with pytest.raises(TypeError, match=words):
        compress(vit, Strategy(0.5))


class _OwnState(PatchEmbed):
    """Saves, loads and moves something of its own."""

    def __init__(self) -> None:
        super().__init__(32, 8, 3, 32)
        self.seen, self.moved = 3, 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.seen)

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = int(state)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.moved += 1
        return super()._apply(fn, recurse)


def test_what_an_embedding_saves_and_does_beside_its_parameters_stays(tiny_vit: Any) -> None:
    vit, plain = tiny_vit(), tiny_vit()
    vit.patch_embed, plain.patch_embed = _OwnState(), _OwnState()
    plain.patch_embed.seen = 5
    compress(vit, Strategy(0.5))
    assert vit.state_dict().keys() == plain.state_dict().keys()
    vit.load_state_dict(plain.state_dict())
    assert vit.double().patch_embed.proj.weight.dtype == torch.float64
    embed = restore(vit).patch_embed
    assert (type(embed), embed.seen, embed.moved) == (_OwnState, 5, 1)


def test_a_trace_in_train_mode_is_refused(tiny_vit: Any) -> None:
    vit = compress(tiny_vit().train(), Strategy(0.5))
    with pytest.raises(RuntimeError, match="cannot be traced in train mode"):
        torch.jit.trace(vit, VIEWS)


def test_conditions_of_a_batch_are_answered_with_what_is_wrong() -> None:
    class Conditioned(VisionTransformer):
        def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
            return self.blocks(self._pos_embed(self.patch_embed(x)) + condition[:, None])  # type: ignore[no-any-return]

    vit = compress(Conditioned(**SMALL).train(), Strategy(0.5))
    vit.pos_drop._forward_pre_hooks.clear()  # met behind the condition only
    with pytest.raises(RuntimeError, match=r"1 blank view.* got those of 4: whatever depends on the views or on the"):
        vit(VIEWS, torch.randn(4, 32))


# What is told


def _train(vit: nn.Module, steps: int, scheduler: Any = None) -> None:
    optimizer = torch.optim.SGD(vit.parameters(), 1e-6)
    for _ in range(steps):
        optimizer.zero_grad()
        vit(VIEWS[:2]).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def test_a_scheduler_that_is_never_stepped_is_told_once(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(depth=1).train(), "default")
    scheduler = SequenceScheduler(vit, total_steps=1000)
    with pytest.warns(UserWarning, match="has been updated 100 times .* a SequenceScheduler .* call its step") as told:
        _train(vit, 130)
    assert len(told) == 1
    assert get_strategy(vit) == scheduler.schedule(0.0)


@pytest.mark.parametrize(("total_steps", "updates"), [(4, 2), (10, 5), (60, 30), (199, 99), (1000, 100)])
def test_a_scheduler_that_is_never_stepped_is_told_halfway_through_a_short_run(
    tiny_vit: Any, total_steps: int, updates: int
) -> None:
    vit = compress(tiny_vit(depth=1).train(), "default")
    scheduler = SequenceScheduler(vit, total_steps=total_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _train(vit, updates)  # a forward sees the updates before it
    with pytest.warns(UserWarning, match="has been updated") as told:
        vit(VIEWS[:2])
    (message,) = [str(one.message) for one in told]
    assert f"updated {updates} times since a SequenceScheduler was made, which has not been stepped and has" in message
    assert f" {scheduler.total_steps} steps to go: training stays at drop 0.5, patch 16; call its step()" in message


def test_a_run_that_goes_on_and_is_never_stepped_is_told_halfway_through_what_is_left(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(depth=1).train(), "default")
    scheduler = SequenceScheduler(vit, total_steps=100)
    scheduler.load_state_dict({**scheduler.state_dict(), "last_step": 94})
    with pytest.warns(UserWarning, match="updated 3 times .* has not been stepped and has 6 steps to go"):
        _train(vit, 4)
    ended = compress(tiny_vit(depth=1).train(), "default")
    scheduler = SequenceScheduler(ended, total_steps=100)
    scheduler.load_state_dict({**scheduler.state_dict(), "last_step": 100})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _train(ended, 110)  # plain, as it should be


def test_nothing_but_updates_counts_for_a_scheduler_that_is_not_stepped_yet(tiny_vit: Any) -> None:
    """Forwards before the loop, what is measured, gradient accumulation, a checkpoint: none of them is training."""
    vit = compress(tiny_vit(depth=1).train(), "default")
    kept = SequenceScheduler(vit, total_steps=4)
    optimizer = torch.optim.SGD(vit.parameters(), 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            vit(VIEWS[:2])
        rehearse(kept, lambda: vit(VIEWS[:2]).square().mean().backward())
        gradient_error(vit, lambda views: vit(views).square().mean(), [VIEWS[:2]] * 3, [Strategy(0.5)], cost="flops")
        vit.load_state_dict(vit.state_dict())
        for _ in range(4):
            optimizer.zero_grad()
            for _ in range(3):
                vit(VIEWS[:2]).square().mean().backward()
            optimizer.step()
            kept.step()
    assert kept.progress == 1


def test_an_online_scheduler_that_is_never_stepped_is_told_by_its_name(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(depth=1).train(), "online")
    scheduler = OnlineScheduler(vit, lambda views: vit(views).square().mean(), total_steps=24)
    with pytest.warns(UserWarning, match="updated 12 times since an OnlineScheduler .* and has 24 steps to go"):
        _train(vit, 13)
    assert scheduler.last_step == 0


def test_a_rehearsal_is_no_step_of_a_scheduler(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(depth=1).train(), "default")
    scheduler = SequenceScheduler(vit, total_steps=20)
    rehearse(scheduler, lambda: vit(VIEWS[:2]).square().mean().backward())
    with pytest.warns(UserWarning, match="has been updated 10 times"):
        _train(vit, 11)


def test_a_scheduler_that_is_stepped_a_strategy_that_is_set_and_a_constant_are_not_told(tiny_vit: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit = compress(tiny_vit(depth=1).train(), "default")
        scheduler = SequenceScheduler(vit, total_steps=110)
        _train(vit, 110, scheduler)
        by_hand = compress(tiny_vit(depth=1).train(), "default")
        set_strategy(by_hand, Strategy(0.5))
        _train(by_hand, 110)
        _train(compress(tiny_vit(depth=1).train(), Strategy(0.5)), 110)
        constant = compress(tiny_vit(depth=1).train(), Strategy(0.5))
        kept = SequenceScheduler(constant, total_steps=10)
        _train(constant, 10)
        assert kept.last_step == 0


def test_a_frozen_copy_of_a_student_is_told_to_be_plain(tiny_vit: Any) -> None:
    student = compress(tiny_vit().train(), Strategy(0.5, 16))
    teacher = copy.deepcopy(student).requires_grad_(False)
    with pytest.warns(UserWarning, match=r"a copy .* compress\(student, plan, teacher=...\)"), torch.no_grad():
        teacher(VIEWS)
    paired = tiny_vit().train().requires_grad_(False)
    compress(student, Strategy(0.5, 16), teacher=paired)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        paired(VIEWS)


def test_an_average_of_a_students_weights_is_told_to_be_plain_until_it_is_trained(tiny_vit: Any) -> None:
    student = compress(tiny_vit().train(), Strategy(0.5, 16))
    student(VIEWS).sum().backward()
    teacher = AveragedModel(student)
    with pytest.warns(UserWarning, match=r"a copy .* compress\(student, plan, teacher=...\)"), torch.no_grad():
        teacher(VIEWS)
    trained = copy.deepcopy(student)
    trained(VIEWS).sum().backward()
    with pytest.warns(UserWarning, match="GradCache"), torch.no_grad():
        trained(VIEWS)


def test_planning_a_pair_anew_counts_and_tells_nothing(tiny_vit: Any) -> None:
    student, teacher = tiny_vit().train(), tiny_vit().train()
    compress(student, Strategy(0.5, 16), teacher=teacher)
    budget = Budget(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(student, Strategy(0.5), teacher=teacher)
    assert budget.units == 0
    assert teacher.patch_embed.training


def test_a_pair_is_counted_whole_whoever_is_named(tiny_vit: Any) -> None:
    student, teacher = tiny_vit().train(), tiny_vit().train()
    compress(student, Strategy(0.5), teacher=teacher)
    budgets = [Budget(student), Budget(teacher), Budget([student, teacher])]
    student(VIEWS)
    with torch.no_grad():
        teacher(VIEWS)
    units = {budget.units for budget in budgets}
    assert len(units) == 1
    assert units.pop() > 4 * 1  # the teacher's own


def test_no_message_shows_a_whole_module(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), Strategy(0.5))
    scheduler = SequenceScheduler(vit, total_steps=4)
    wrong: list[Any] = [
        lambda: Strategy(vit),
        lambda: Strategy(0.5, vit),
        lambda: compress(vit, when=vit),
        lambda: set_strategy(Strategy(), vit),  # type: ignore[arg-type]
        lambda: SequenceScheduler(vit, total_steps=vit),
        lambda: scheduler.use(vit),
        lambda: scheduler.step(vit),
        lambda: scheduler.load_state_dict(vit.state_dict()),
        lambda: Budget(vit).load_state_dict(vit),
        lambda: num_tokens(vit, Strategy(), vit),
        lambda: accelerate(Strategy(), vit),  # type: ignore[type-var]
    ]
    for call in wrong:
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 250


def test_what_one_call_asks_for_is_over_with_it() -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16
    )
    vit = compress(ViTModel(config, add_pooling_layer=False).train(), Strategy(0.5))
    before = num_tokens(vit, Strategy(), 120)
    vit(torch.randn(2, 3, 128, 128), interpolate_pos_encoding=True)
    assert num_tokens(vit, Strategy(), 120) == before
