"""Patch scaling is PI-resize of the kernel: compared with timm's, and with what resizing means."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from seqcompress import SequenceScheduler, Stepwise, Strategy, compress, num_tokens
from seqcompress.compressors import grid_size, resample_patches, resize_pinv
from seqcompress.compressors.patch_scaling import resample_positions


def _timm_tokens(vit: Any, views: Tensor, patch: int) -> Tensor:
    """What reaches the first block if the kernel and the positions are resampled by timm. One class token."""
    kernel = resample_patch_embed(vit.patch_embed.proj.weight, [patch, patch])
    tokens = F.conv2d(views, kernel, vit.patch_embed.proj.bias, stride=patch)
    positions = resample_abs_pos_embed(
        vit.pos_embed, new_size=list(tokens.shape[-2:]), old_size=list(vit.patch_embed.grid_size), num_prefix_tokens=1
    )
    tokens = tokens.flatten(2).transpose(1, 2)
    return torch.cat((vit.cls_token.expand(len(views), -1, -1), tokens), dim=1) + positions


@pytest.mark.parametrize("patch", [9, 10, 12, 16, 20])
def test_tokens_and_gradients_are_those_of_timms_resampled_kernel(
    patch: int, tiny_vit: Any, first_tokens: Any, gradients: Any
) -> None:
    vit = tiny_vit().double().train()
    views = torch.randn(3, 3, 3 * patch, 4 * patch, dtype=torch.float64)
    expected = _timm_tokens(vit, views, patch)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    reference = gradients(vit)
    vit.zero_grad()

    compress(vit, patch_size=patch)
    tokens = first_tokens(vit, views)
    (tokens * weights).sum().backward()
    # timm computes its kernel in single precision
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "cls_token"):
        torch.testing.assert_close(vit.get_parameter(name).grad, reference[name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("own", [(8, 4), (4, 8), (2, 16)])
def test_patches_that_are_not_square_are_scaled_along_each_side(
    own: tuple[int, int], tiny_vit: Any, first_tokens: Any
) -> None:
    vit, views = tiny_vit(patch_size=own).train(), torch.randn(2, 3, 32, 32)
    expected = _timm_tokens(vit, views, 8)
    torch.testing.assert_close(first_tokens(compress(vit, patch_size=8), views), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("own", "patch"), [(4, 8), (8, 12), (6, 16), (8, 32)])
def test_an_upsampled_image_has_the_tokens_of_the_original(own: int, patch: int, tiny_vit: Any) -> None:
    vit = tiny_vit(img_size=2 * own, patch_size=own, class_token=False, pos_embed="none", global_pool="avg").double()
    original = torch.randn(2, 3, 2 * own, 2 * own, dtype=torch.float64)
    blocks = original.unflatten(3, (2, own)).unflatten(2, (2, own)).permute(0, 2, 4, 1, 3, 5).reshape(8, 3, own, own)
    large = F.interpolate(blocks, size=(patch, patch), mode="bicubic", antialias=True)
    upsampled = large.reshape(2, 2, 2, 3, patch, patch).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 2 * patch, 2 * patch)

    plain = vit.train()(original)
    vit.set_input_size(img_size=2 * patch)
    torch.testing.assert_close(compress(vit, patch_size=patch)(upsampled), plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("base", "scaled"), [(16, 32), (16, 56), (8, 5), (16, 12), (8, 9)])
def test_the_matrix_is_the_pseudo_inverse_of_the_resize(base: int, scaled: int) -> None:
    pinv = resize_pinv(base, scaled, torch.float64, torch.device("cpu"))
    line = torch.randn(1, 1, 1, base, dtype=torch.float64)
    resized = F.interpolate(line, size=(1, scaled), mode="bicubic", antialias=True).flatten()
    assert pinv.shape == (base, scaled)
    if scaled >= base:
        torch.testing.assert_close(pinv @ resized, line.flatten())
    else:
        again = F.interpolate((pinv @ resized).reshape(1, 1, 1, base), size=(1, scaled), mode="bicubic", antialias=True)
        torch.testing.assert_close(again.flatten(), resized)


def test_resampled_patches_have_their_sides_swapped() -> None:
    patches = torch.randn(5, 6, 9)
    rows, columns = torch.randn(4, 6), torch.randn(3, 9)
    torch.testing.assert_close(resample_patches(patches, rows, columns), (rows @ patches @ columns.T).mT)
    torch.testing.assert_close(resample_patches(patches, None, columns), (patches @ columns.T).mT)
    torch.testing.assert_close(resample_patches(patches, rows, None), (rows @ patches).mT)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 500))
def test_the_grid_is_the_rounded_quotient(height: int, width: int, patch: int) -> None:
    if patch > min(height, width):
        with pytest.raises(ValueError, match=f"patch_size {patch} x {patch} for a view of {height} x {width}"):
            grid_size((height, width), (patch, patch))
    else:
        expected = max(1, round(height / patch)), max(1, round(width / patch))
        assert grid_size((height, width), (patch, patch)) == expected


@pytest.mark.parametrize("side", [16, 20, 24, 30, 40, 48])
def test_a_view_of_240_px_is_divided_by_flexivits_sizes_without_a_rest(side: int) -> None:
    assert grid_size((240, 240), (side, side)) == (240 // side, 240 // side)


@pytest.mark.parametrize(("patch", "grid"), [(9, 4), (12, 3), (13, 2), (20, 2), (24, 1)])
def test_a_view_that_the_patch_does_not_divide_is_resized(
    patch: int, grid: int, tiny_vit: Any, first_tokens: Any
) -> None:
    vit, views = tiny_vit().train(), torch.randn(2, 3, 32, 32)
    resized = F.interpolate(views, size=(grid * patch, grid * patch), mode="bicubic", antialias=True)
    expected = _timm_tokens(vit, resized, patch)
    torch.testing.assert_close(first_tokens(compress(vit, patch_size=patch), views), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [9, 12, 24])
def test_no_border_is_lost(patch: int, tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit(), patch_size=patch).train()
    views = torch.randn(1, 3, 32, 32, requires_grad=True)
    tokens = first_tokens(vit, views)[:, 1:]
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert views.grad is not None
    influence = views.grad.abs().sum(dim=(0, 1))  # (H, W)
    for border in (influence[0], influence[-1], influence[:, 0], influence[:, -1]):
        assert border.min() > 1e-3 * influence.mean()


@pytest.mark.parametrize("strategy", [Strategy(0.0, 16), Strategy(0.5, 12), Strategy(0.5)])
def test_the_layout_of_the_views_in_memory_does_not_matter(
    strategy: Strategy, tiny_vit: Any, first_tokens: Any
) -> None:
    vit = compress(tiny_vit(), strategy).train()
    views = torch.randn(4, 3, 32, 32)
    layouts = {
        "channels last": views.contiguous(memory_format=torch.channels_last),
        "strided": views.repeat_interleave(2, dim=3)[..., ::2],
        "transposed": views.transpose(2, 3).contiguous().transpose(2, 3),
    }
    torch.manual_seed(3)
    expected = first_tokens(vit, views)
    for name, other in layouts.items():
        torch.manual_seed(3)
        torch.testing.assert_close(
            first_tokens(vit, other), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m
        )


def test_views_are_not_changed(tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(), Strategy(0.5, 12)).train(), torch.randn(2, 3, 32, 32)
    before = views.clone()
    vit(views)
    assert torch.equal(views, before)


def test_a_base_kernel_trained_at_another_patch_size_is_the_one_that_evaluation_uses(tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(), patch_size=16).train(), torch.randn(2, 3, 32, 32)
    before = vit.eval()(views)
    optimizer = torch.optim.SGD(vit.patch_embed.parameters(), lr=100.0)
    vit.train()(views)[:, 0].sum().backward()
    optimizer.step()
    assert (vit.eval()(views) - before).abs().max() > 1e-3


def test_an_embedding_with_a_norm_and_without_a_bias_is_scaled_like_timms(tiny_vit: Any) -> None:
    vit, views = tiny_vit(pre_norm=True, embed_norm_layer=nn.LayerNorm).train(), torch.randn(2, 3, 32, 32)
    assert vit.patch_embed.proj.bias is None
    native = copy.deepcopy(vit)
    native.set_input_size(patch_size=16)
    torch.testing.assert_close(compress(vit, patch_size=16)(views), native(views), rtol=1e-4, atol=1e-4)


def test_a_first_use_in_inference_mode_does_no_harm_later(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), patch_size=11, when="train").train()  # a size that no other test uses: nothing cached
    with torch.inference_mode():
        vit(torch.randn(1, 3, 32, 32))
    vit(torch.randn(1, 3, 32, 32))[:, 0].sum().backward()
    assert float(vit.patch_embed.proj.weight.grad.abs().sum()) > 0


def test_a_patch_larger_than_the_view_is_an_error_that_names_both(tiny_vit: Any) -> None:
    vit = tiny_vit()
    with pytest.raises(ValueError, match="patch_size 33 x 33 for a view of 32 x 32 px"):
        compress(vit, patch_size=33)
    with pytest.raises(ValueError, match="patch_size 33 x 33 for a view of 32 x 32 px"):
        num_tokens(vit, Strategy(0.0, 33), 32)
    with pytest.raises(ValueError, match="patch_size 32 x 32 for a view of 24 x 32 px"):
        compress(vit, patch_size=32).train()(torch.randn(1, 3, 24, 32))


@pytest.mark.parametrize(
    "grids", [((14, 14), (7, 7)), ((4, 6), (3, 2)), ((4, 4), (4, 4)), ((4, 4), (6, 5)), ((3, 3), (1, 1))]
)
def test_positions_are_interpolated_as_timm_does(grids: Any) -> None:
    old, new = grids
    positions = torch.randn(1, old[0] * old[1], 8, requires_grad=True)
    expected = resample_abs_pos_embed(positions, new_size=list(new), old_size=list(old), num_prefix_tokens=0)
    resampled = resample_positions(positions, old, new)
    torch.testing.assert_close(resampled, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected)
    (gradient,), (expected_gradient,) = (
        torch.autograd.grad((result * weights).sum(), positions) for result in (resampled, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_positions_keep_half_precision_and_are_interpolated_in_full() -> None:
    positions = torch.randn(1, 196, 8)
    expected = resample_positions(positions, (14, 14), (7, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample_positions(positions, (14, 14), (7, 7)), expected)
    half = resample_positions(positions.half(), (14, 14), (7, 7))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=2e-3, atol=2e-3)


def test_a_view_that_is_smaller_than_the_patches_of_a_stage_is_one_patch_and_that_is_said_once(
    tiny_vit: Any, first_tokens: Any
) -> None:
    vit = compress(tiny_vit(dynamic_img_size=True).train(), Stepwise({0.0: Strategy(), 0.5: Strategy(0.0, 32)}))
    scheduler = SequenceScheduler(vit, total_steps=2)
    scheduler.step()
    with pytest.warns(UserWarning, match="views of 24 x 24 px are smaller than patches of 32 px"):
        assert first_tokens(vit, torch.randn(2, 3, 24, 24)).shape[1] == 1 + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_tokens(vit, torch.randn(2, 3, 24, 24)).shape[1] == 1 + 1
    assert first_tokens(vit, torch.randn(2, 3, 24, 64)).shape[1] == 1 + 2
