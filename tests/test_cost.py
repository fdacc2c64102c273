"""What a strategy costs: tokens by the definition, FLOPs by counting."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from seqcompress import Strategy, compress, num_tokens, relative_cost
from seqcompress.encoders import find_encoder
from seqcompress.training import cost


@pytest.mark.parametrize(
    ("strategy", "size", "patches"),
    [
        (Strategy(), 32, 16),
        (Strategy(0.5), 32, 8),
        (Strategy(0.0, 16), 32, 4),
        (Strategy(0.5, 16), 32, 2),
        (Strategy(0.999), 32, 1),
        (Strategy(0.999, 32), 32, 1),
        (Strategy(), 96, 144),
        (Strategy(0.75), 96, 36),
        (Strategy(0.0, 5), 32, 36),
        (Strategy(0.0, 12), 30, 4),  # 30 / 12 = 2.5 is rounded to even
        (Strategy(0.3, 7), 28, 11),
        (Strategy(), (16, 48), 12),
        (Strategy(0.5, 16), [16, 64], 2),
    ],
)
def test_tokens_are_those_of_the_definition(strategy: Strategy, size: Any, patches: int, tiny_vit: Any) -> None:
    assert num_tokens(tiny_vit(), strategy, size) == 1 + patches
    assert num_tokens(compress(tiny_vit(reg_tokens=3), "default"), strategy, size) == 4 + patches


@pytest.mark.parametrize(("settings", "prefix"), [({"class_token": False, "global_pool": "avg"}, 0), ({}, 2)])
def test_prefix_tokens_are_counted(settings: dict[str, Any], prefix: int, tiny_vit: Any) -> None:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    vit = tiny_vit(**settings) if settings else VisionTransformerDistilled(**small)
    assert num_tokens(vit, Strategy(0.5), 32) == prefix + 8


def _flops(model: nn.Module, views: torch.Tensor) -> int:
    # Older torch does not count fused attention on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(views)
    return counter.get_total_flops()


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(0.5), Strategy(0.75), Strategy(0.0, 16), Strategy(0.5, 16)])
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_relative_cost_is_what_a_flop_counter_sees(strategy: Strategy, pool: str, tiny_vit: Any) -> None:
    vit = tiny_vit(img_size=64, embed_dim=64, global_pool=pool, class_token=pool != "map").eval()
    full = _flops(vit, torch.randn(1, 3, 64, 64))
    # a model that natively has that many tokens: one image of as many patches in a row
    native = copy.deepcopy(vit)
    tokens = num_tokens(vit, strategy, 64) - vit.num_prefix_tokens
    native.set_input_size(img_size=(8, 8 * tokens))
    expected = _flops(native, torch.randn(1, 3, 8, 8 * tokens)) / full
    assert relative_cost(vit, strategy, 64) == pytest.approx(expected, rel=1e-9)


def test_a_compressed_forward_costs_what_relative_cost_says(tiny_vit: Any) -> None:
    vit, views = tiny_vit(img_size=64, embed_dim=64).train(), torch.randn(1, 3, 64, 64)
    full = _flops(vit, views)
    for strategy in (Strategy(0.5), Strategy(0.75), Strategy(0.25)):
        assert _flops(compress(vit, strategy), views) / full == pytest.approx(
            relative_cost(vit, strategy, 64), rel=1e-9
        )


def test_the_base_strategy_costs_one(tiny_vit: Any) -> None:
    vit = tiny_vit()
    assert relative_cost(vit, Strategy(), 32) == 1.0
    assert relative_cost(vit, Strategy(0.0, 8), 96) == 1.0
    assert relative_cost(compress(vit, Strategy(0.5, 16)), Strategy(), 32) == 1.0


def test_cost_falls_with_dropout_and_rises_with_smaller_patches(tiny_vit: Any) -> None:
    vit = tiny_vit()
    by_dropout = [relative_cost(vit, Strategy(dropout / 10), 96) for dropout in range(10)]
    assert by_dropout == sorted(by_dropout, reverse=True)
    assert len(set(by_dropout)) == 10
    assert relative_cost(vit, Strategy(0.0, 4), 32) > 4.0


def test_counting_has_no_side_effects(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.1), Strategy(0.5)).train()
    state, parameters = torch.get_rng_state(), [value.clone() for value in vit.parameters()]
    relative_cost(vit, Strategy(0.5, 16), 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert vit.training
    assert all(torch.equal(one, other) for one, other in zip(parameters, vit.parameters(), strict=True))
    assert all(value.grad is None for value in vit.parameters())
    assert not vit.patch_embed.forward_counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_the_same(dtype: torch.dtype, tiny_vit: Any) -> None:
    expected = relative_cost(tiny_vit(), Strategy(0.5), 32)
    assert relative_cost(tiny_vit().to(dtype), Strategy(0.5), 32) == expected


@pytest.mark.parametrize("size", [np.int64(32), (np.int32(32), 32), torch.Size((32, 32))])
def test_sizes_may_be_whole_numbers_of_other_libraries(size: Any, tiny_vit: Any) -> None:
    assert num_tokens(tiny_vit(), Strategy(), size) == 17


@pytest.mark.parametrize("function", [num_tokens, relative_cost])
class TestErrors:
    @pytest.mark.parametrize("size", [0, -32, True, 3.5, None, "32", (32,), (32, 32, 3), (32, 0), (32.0, 32), "ab", []])
    def test_a_bad_image_size_is_named_with_its_value(self, function: Any, size: Any, tiny_vit: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="image_size") as raised:
            function(tiny_vit(), Strategy(), size)
        assert repr(size) in str(raised.value)

    @pytest.mark.parametrize("strategy", [0.5, "drop 0.5", None, (0.5, 16)])
    def test_a_bad_strategy_is_named_with_its_value(self, function: Any, strategy: Any, tiny_vit: Any) -> None:
        with pytest.raises(TypeError, match="strategy must be a Strategy") as raised:
            function(tiny_vit(), strategy, 32)
        assert repr(strategy) in str(raised.value)

    def test_a_patch_larger_than_the_view_is_named_with_both(self, function: Any, tiny_vit: Any) -> None:
        with pytest.raises(ValueError, match="patch_size 48 x 48 for a view of 32 x 64"):
            function(tiny_vit(), Strategy(0.0, 48), (32, 64))

    @pytest.mark.parametrize("model", ["vit", None, nn.Linear(2, 2)])
    def test_a_model_that_is_not_supported_is_named(self, function: Any, model: Any) -> None:
        with pytest.raises(TypeError, match="model must be a supported ViT"):
            function(model, Strategy(), 32)


class AllInOne(nn.Module):
    """A linear layer and attention in one module, by the same operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 32, 32))

    def forward(self, tokens: Any) -> Any:
        mapped = torch.bmm(tokens, self.weight)
        return torch.bmm(torch.bmm(mapped, mapped.transpose(1, 2)), mapped)


@pytest.mark.parametrize(("block", "expected"), [(None, 2), (AllInOne, 2 + 5)], ids=["timm's", "all in one module"])
def test_other_lengths_follow_from_the_few_that_were_run(
    block: Any, expected: int, tiny_vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = find_encoder(tiny_vit(num_classes=10))
    if block is not None:
        encoder.model.blocks = nn.Sequential(block())
    runs, count = [], cost._flops_of_parts

    def counted(*arguments: Any) -> Any:
        runs.append(arguments[-1])
        return count(*arguments)

    monkeypatch.setattr(cost, "_flops_of_parts", counted)
    found = {tokens: cost.encoder_flops(encoder, tokens) for tokens in (2, 9, 17, 40, 197, 1025)}
    assert len(runs) == expected
    patch = 2 * encoder.projection_size
    assert found == {tokens: cost._flops_after_embedding(encoder, tokens) + patch * (tokens - 1) for tokens in found}


def test_flops_that_jump_with_the_length_are_run_for_each_length(tiny_vit: Any) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(32, 32)

        def forward(self, tokens: Any) -> Any:
            padded = nn.functional.pad(tokens, (0, 0, 0, -tokens.shape[1] % 8))
            return self.proj(padded)[:, : tokens.shape[1]]

    vit = find_encoder(tiny_vit())
    vit.model.blocks = nn.Sequential(Padded())
    patch = 2 * vit.patch_embed.proj.weight.numel()
    for tokens, rows in ((7, 8), (8, 8), (9, 16), (17, 24), (63, 64)):
        assert cost.encoder_flops(vit, tokens) == 2 * rows * 32 * 32 + patch * (tokens - 1)


def test_another_head_is_counted_anew(tiny_vit: Any) -> None:
    vit = tiny_vit()
    before = cost.encoder_flops(find_encoder(vit), 17)
    vit.head = nn.Linear(32, 1000)
    assert cost.encoder_flops(find_encoder(vit), 17) == before + 2 * 32 * 1000


def test_a_stem_that_projects_by_itself_counts_for_nothing_and_the_rest_is_counted() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_mci_224", num_classes=0, depth=1)
    assert 0.4 < relative_cost(vit, Strategy(0.5), 256) < 0.6


def test_a_model_whose_blocks_do_not_run_on_other_lengths_is_named() -> None:
    with torch.device("meta"):
        beit = timm.create_model("beit_base_patch16_224", num_classes=0, depth=1)
    with pytest.raises(TypeError, match=r"^model must be a supported ViT, got a Beit: its blocks do not run on "):
        relative_cost(beit, Strategy(0.5), 224)
