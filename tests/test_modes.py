"""Tools that look into a model: without data, under function transforms, traced, scripted, quantized, exported."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from seqcompress import Strategy, compress, is_compressed
from seqcompress.compressors.patch_scaling import resize_matrix, resize_pinv
from seqcompress.compressors.token_dropout import first_rows, rows_of_patches

STRATEGIES = [Strategy(0.5), Strategy(0.0, 16), Strategy(0.5, 16)]


class CheckpointedFromTheFirstBlock(nn.Module):
    """A ViT of one's own with nothing between its positions and its blocks, each of which is checkpointed."""

    img_size = 32

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.cls_token, self.pos_embed = (nn.Parameter(torch.randn(1, number, 32)) for number in (1, 17))
        self.blocks = nn.ModuleList(Block(32, 2) for _ in range(2))

    def forward(self, views: Tensor) -> Tensor:
        tokens = self.patches(views).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), dim=1) + self.pos_embed
        for block in self.blocks:
            if self.reentrant is None:
                tokens = block(tokens)
            else:
                tokens = checkpoint(block, tokens, use_reentrant=self.reentrant)
        return tokens[:, 0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_first_block_that_is_checkpointed_is_run_again_on_the_kept_patches(
    strategy: Strategy, reentrant: bool
) -> None:
    gradients = []
    for way in (None, reentrant):
        torch.manual_seed(0)
        vit = compress(CheckpointedFromTheFirstBlock(way), strategy).train()
        one, other = torch.randn(2, 4, 3, 32, 32)
        (vit(one) * vit(other)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in vit.named_parameters()})
        assert list(vit.patches.joining._of_earlier) == []  # nothing is kept once the graph is gone
    assert len(gradients[0]) == 4 + 2 * 11
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_dry_run_leaves_real_tables_behind(strategy: Strategy, tiny_vit: Any) -> None:
    for table in (resize_matrix, resize_pinv, first_rows, rows_of_patches):
        table._kept.cache_clear()
    vit, views = compress(tiny_vit(), strategy).train(), torch.randn(2, 3, 32, 32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        dry = vit(mode.from_tensor(views))
        assert isinstance(dry, FakeTensor)
        assert dry.shape == (2, 32)
    output = vit(views)
    assert type(output) is Tensor
    assert bool(output.isfinite().all())


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_dry_run_after_a_real_one_works_too(strategy: Strategy, tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(), strategy).train(), torch.randn(2, 3, 32, 32)
    vit(views)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert vit(mode.from_tensor(views)).shape == (2, 32)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_model_without_data_trains_without_data(strategy: Strategy, tiny_vit: Any) -> None:
    with torch.device("meta"):
        vit = compress(tiny_vit(), strategy).train()
        output = vit(torch.randn(2, 3, 32, 32))
    assert output.is_meta
    assert output.shape == (2, 32)


def test_flops_without_data_are_those_of_a_real_step(tiny_vit: Any) -> None:
    counts = []
    for device in ("cpu", "meta"):
        vit = compress(tiny_vit(), Strategy(0.5, 16)).train().to(device)
        with FlopCounterMode(display=False) as counter:
            vit(torch.randn(2, 3, 32, 32, device=device)).sum().backward()
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.addmm])
    assert counts[0] == counts[1] > 0


def test_models_with_stacked_weights_are_scaled_alike(tiny_vit: Any) -> None:
    vits = [compress(tiny_vit(), Strategy(0.0, 16), when="train").train() for _ in range(2)]
    weights, _ = stack_module_state(vits)
    views = torch.randn(3, 3, 32, 32)
    features = vmap(lambda weights: functional_call(vits[0], weights, (views,)))(weights)
    torch.testing.assert_close(features, torch.stack([vit(views) for vit in vits]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_gradients_of_single_samples_are_those_of_their_own_tokens(strategy: Strategy, tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(depth=1), strategy).train(), torch.randn(3, 3, 32, 32)
    parameters = dict(vit.named_parameters())

    def loss(parameters: dict[str, Tensor], view: Tensor) -> Tensor:
        return functional_call(vit, parameters, (view[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, views.expand(3, -1, -1, -1))
    weight = found["patch_embed.proj.weight"]
    assert weight.shape == (3, 32, 3, 8, 8)
    assert bool((weight.flatten(1).norm(dim=1) > 0).all())
    same = vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, views[:1].expand(3, -1, -1, -1))
    first, second, _ = same["patch_embed.proj.weight"]
    assert torch.equal(first, second) is (strategy.token_dropout == 0)
    if strategy.token_dropout == 0:
        vit(views[:1]).square().sum().backward()
        torch.testing.assert_close(first, vit.patch_embed.proj.weight.grad, rtol=1e-4, atol=1e-4)


def test_tables_made_under_a_function_transform_do_not_stay(tiny_vit: Any) -> None:
    resize_pinv._kept.cache_clear()
    vit, views = compress(tiny_vit(depth=1), patch_size=16).train(), torch.randn(2, 3, 32, 32)
    parameters = dict(vit.named_parameters())
    grad(lambda values: functional_call(vit, values, (views,)).sum())(parameters)
    vit(views).sum().backward()
    assert resize_pinv.cache_info().currsize == 1


def _torchvisions(vit: nn.Module) -> Any:
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(vit, ["blocks.1"])


def _timms(vit: nn.Module) -> Any:
    from timm.models import FeatureGraphNet

    return FeatureGraphNet(vit, (0,))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("look", [_torchvisions, _timms])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_what_fx_traces_is_the_plain_model_in_either_mode_and_that_is_said(
    strategy: Strategy, look: Any, training: bool, tiny_vit: Any
) -> None:
    plain, vit = tiny_vit().train(training), compress(tiny_vit(), strategy).train(training)
    views = torch.randn(2, 3, 32, 32)
    try:
        expected = _tensors(look(plain).train(training)(views))
    except TypeError as error:
        pytest.skip(f"this version of timm cannot be traced: {error}")
    told = pytest.warns(UserWarning, match="a graph that it makes trains uncompressed")
    with told if training or look is _torchvisions else nullcontext():  # torchvision traces both
        graph = look(vit).train(training)
    assert all(map(torch.equal, _tensors(graph(views)), expected))
    assert is_compressed(vit)
    vit.train()(views).sum().backward()


def _tensors(output: Any) -> list[torch.Tensor]:
    return list(output.values() if isinstance(output, dict) else output)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_scripting_says_restore_first(strategy: Strategy, tiny_vit: Any) -> None:
    with pytest.raises(RuntimeError, match=r"restore\(model\) first"):
        torch.jit.script(compress(tiny_vit(), strategy).eval())


def test_an_evaluating_model_is_traced_exported_and_quantized_as_the_plain_one(tiny_vit: Any) -> None:
    plain, views = tiny_vit().eval(), torch.randn(2, 3, 32, 32)
    vit = compress(copy.deepcopy(plain), Strategy(0.5, 16))
    assert torch.equal(torch.jit.trace(vit, views)(views), plain(views))
    for strict in (True, False):
        exported = torch.export.export(vit, (views,), strict=strict).module()
        torch.testing.assert_close(exported(views), plain(views), rtol=1e-5, atol=1e-5)
    quantized = torch.ao.quantization.quantize_dynamic(vit, {nn.Linear})
    expected = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    assert torch.equal(quantized(views), expected(views))
