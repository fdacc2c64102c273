"""Token dropout keeps a uniformly random subset, of every view its own, and leaves the kept tokens as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seqcompress import Strategy, compress, num_tokens
from seqcompress.compressors import num_kept, random_subset

CPU = torch.device("cpu")


def _inclusion(subset: Tensor, patches: int) -> Tensor:
    """Subsets as 0 and 1: (B, K) indices to (B, N)."""
    return torch.zeros(len(subset), patches, dtype=torch.float64).scatter_(1, subset, 1.0)


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_the_kept_share_is_rounded_and_never_nothing(patches: int, dropout: float) -> None:
    kept = num_kept(patches, dropout)
    assert 1 <= kept <= patches
    assert abs(kept - (1 - dropout) * patches) <= 0.5 or kept == 1


@pytest.mark.parametrize(
    ("patches", "dropout", "kept"), [(16, 0.5, 8), (196, 0.75, 49), (5, 0.5, 2), (7, 0.5, 4), (36, 0.999, 1)]
)
def test_the_kept_share_is_rounded_as_python_does(patches: int, dropout: float, kept: int) -> None:
    assert num_kept(patches, dropout) == kept


def test_every_patch_is_kept_equally_often() -> None:
    batch, patches, kept = 4096, 16, 6
    share = kept / patches
    counts = _inclusion(random_subset(batch, patches, kept, seed=1, device=CPU), patches).sum(dim=0)
    spread = batch * share * (1 - share) * patches / (patches - 1)
    chi2 = float(((counts - batch * share) ** 2).sum() / spread)
    assert 3.48 < chi2 < 37.70  # the central 99.8 % of chi-square with 15 degrees of freedom


def test_every_pair_of_patches_is_kept_equally_often() -> None:
    batch, patches, kept = 8192, 12, 5
    inclusion = _inclusion(random_subset(batch, patches, kept, seed=2, device=CPU), patches)
    together = (inclusion.T @ inclusion).masked_select(torch.ones(patches, patches).triu(1).bool()) / batch
    expected = kept * (kept - 1) / (patches * (patches - 1))
    assert (together - expected).abs().max() < 4.5 * math.sqrt(expected * (1 - expected) / batch)


def _check_overlaps(overlaps: Tensor, patches: int, kept: int) -> None:
    """Overlaps of independent subsets are hypergeometric."""
    mean = kept**2 / patches
    variance = kept**2 * (patches - kept) ** 2 / (patches**2 * (patches - 1))
    assert abs(float(overlaps.mean()) - mean) < 4 * math.sqrt(variance / len(overlaps))
    assert float(overlaps.var()) == pytest.approx(variance, rel=0.12)


def test_samples_of_a_batch_are_independent() -> None:
    inclusion = _inclusion(random_subset(4096, 16, 8, seed=3, device=CPU), 16)
    _check_overlaps((inclusion[1:] * inclusion[:-1]).sum(dim=1), 16, 8)


def test_views_of_a_sample_are_independent(tiny_vit: Any, first_tokens: Any, patches_among: Any) -> None:
    vit = tiny_vit(depth=1)
    views = torch.randn(1, 3, 32, 32).expand(2048, -1, -1, -1)
    every = first_tokens(vit.eval(), views[:1])[:, 1:].expand(2048, -1, -1)
    compress(vit.train(), token_dropout=0.5)
    one, other = (
        _inclusion(patches_among(first_tokens(vit, views)[:, 1:].detach(), every.detach()), 16) for _ in range(2)
    )
    _check_overlaps((one * other).sum(dim=1), 16, 8)


def test_a_subset_has_no_patch_twice() -> None:
    subset = random_subset(256, 20, 15, seed=4, device=CPU)
    assert torch.equal(_inclusion(subset, 20).sum(dim=1), torch.full((256,), 15.0, dtype=torch.float64))


@pytest.mark.parametrize("strategy", [Strategy(0.75), Strategy(0.5, 12), Strategy(0.7, 10), Strategy(0.5, 16)])
def test_mean_and_spread_of_the_kept_tokens_are_those_of_sampling_without_replacement(
    strategy: Strategy, tiny_vit: Any, first_tokens: Any
) -> None:
    batch = 4096
    vit = compress(tiny_vit(depth=1, embed_dim=16), strategy.without_dropout()).train()
    view = torch.randn(1, 3, 32, 32)
    every = first_tokens(vit, view)[0, 1:].detach().double()  # (N, D)
    compress(vit, strategy)
    kept = first_tokens(vit, view.expand(batch, -1, -1, -1))[:, 1:].detach().double()  # (B, K, D)

    size, drawn = len(every), num_kept(len(every), strategy.token_dropout)
    assert kept.shape[1] == drawn
    means = kept.mean(dim=1)  # (B, D)
    expected = (1 - drawn / size) / drawn * float(every.var(dim=0).sum())
    assert float(means.var(dim=0).sum()) == pytest.approx(expected, rel=0.06)
    assert float(((means.mean(dim=0) - every.mean(dim=0)) ** 2).sum()) < 4 * expected / batch


@pytest.mark.parametrize("dropout", [0.25, 0.5, 0.9])
def test_kept_tokens_are_a_subset_of_all_tokens_and_the_prefix_is_untouched(
    dropout: float, tiny_vit: Any, first_tokens: Any, patches_among: Any
) -> None:
    vit, views = tiny_vit(reg_tokens=2), torch.randn(8, 3, 32, 32)
    plain = first_tokens(vit.train(), views)
    compressed = first_tokens(compress(vit, token_dropout=dropout), views)
    assert compressed.shape == (8, 3 + round(16 * (1 - dropout)), 32)
    assert torch.equal(compressed[:, :3], plain[:, :3])
    subset = patches_among(compressed[:, 3:], plain[:, 3:])
    assert _inclusion(subset, 16).max() == 1
    assert len({tuple(sorted(patches)) for patches in subset.tolist()}) > 1


def test_gathering_before_projecting_has_the_gradients_of_gathering_after(
    tiny_vit: Any, first_tokens: Any, patches_among: Any, gradients: Any
) -> None:
    vit, views = tiny_vit().train(), torch.randn(4, 3, 32, 32)
    compress(vit, token_dropout=0.5)
    kept = first_tokens(vit, views)
    weights = torch.randn_like(kept)
    (kept * weights).sum().backward()
    early = gradients(vit)

    vit.zero_grad()
    compress(vit, Strategy())
    plain = first_tokens(vit, views)
    subset = patches_among(kept[:, 1:], plain[:, 1:])
    late_kept = plain[:, 1:].gather(1, subset.unsqueeze(-1).expand(-1, -1, 32))
    (torch.cat((plain[:, :1], late_kept), dim=1) * weights).sum().backward()
    late = gradients(vit)
    assert {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "cls_token"} <= early.keys()
    assert early.keys() == late.keys()
    for name, gradient in early.items():
        torch.testing.assert_close(gradient, late[name], rtol=1e-4, atol=1e-4)


def test_only_the_kept_patches_are_embedded(tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.75).train()
    views = torch.randn(2, 3, 32, 32, requires_grad=True)
    first_tokens(vit, views)[:, 1:].sum().backward()
    assert views.grad is not None
    touched = views.grad.abs().sum(dim=1).unflatten(2, (4, 8)).unflatten(1, (4, 8)).sum(dim=(2, 4)) > 0  # (B, 4, 4)
    assert touched.sum(dim=(1, 2)).tolist() == [4, 4]


def test_nothing_is_dropped_in_eval_mode(tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.9, when="train").eval()
    assert first_tokens(vit, torch.randn(2, 3, 32, 32)).shape == (2, 17, 32)


@pytest.mark.parametrize(("when", "tokens"), [("grad", 17), ("train", 9)])
def test_forwards_without_a_graph_are_compressed_only_when_asked(
    when: Any, tokens: int, tiny_vit: Any, first_tokens: Any
) -> None:
    vit = compress(tiny_vit(), token_dropout=0.5, when=when).train()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert first_tokens(vit, torch.randn(2, 3, 32, 32)).shape[1] == tokens
    assert first_tokens(vit, torch.randn(2, 3, 32, 32)).shape[1] == 9


def test_the_global_seed_decides_the_subsets(tiny_vit: Any, first_tokens: Any) -> None:
    vit, views = compress(tiny_vit(), token_dropout=0.5).train(), torch.randn(4, 3, 32, 32)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return first_tokens(vit, views)

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.3, 12), Strategy(0.99, 16), Strategy(0.0, 11)])
def test_num_tokens_says_how_many_tokens_a_forward_has(strategy: Strategy, tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit(reg_tokens=1), strategy).train()
    assert first_tokens(vit, torch.randn(2, 3, 32, 32)).shape[1] == num_tokens(vit, strategy, 32)
