"""Tokens that a host masks: replaced behind the patch embedding by a token of its own, for the encoder to predict.

A host is recognised by its method that masks. In a compressed forward that method gets two blank views, one without a
mask and one that is masked all over, which show what it puts in a token's place, for any grid, as they show the
positions. Whether a forward is masked is known before any token is dropped: where tokens are predicted, none is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqcompress.encoders.patch_embed import CompressedPatchEmbed
from seqcompress.encoders.wrappers import lightly_masked
from seqcompress.strategy import Strategy

__all__ = ["follow_masks", "forget_masks", "masked_forward", "refuse_tokens_named"]

_PREPARES = "preprocess"


def masked_forward(
    embed: CompressedPatchEmbed,
    views: Tensor,
    mask: Tensor,
    prepare: Callable[[Tensor], Any],
    *,
    name: str = "mask",
    prefix: int = 0,
) -> Any:
    """Run a host's own code on masked views.

    Args:
        embed: the compressed patch embedding that it will call.
        views: shape (B, C, H, W).
        mask: shape (B, prefix + N), true where a token is to be replaced: N patches of the grid that is in force.
        prepare: embeds the views, masks their tokens and adds positions.
        name: of the argument, for people.
        prefix: how many prefix tokens the mask says something of.

    Raises:
        ValueError: the mask was drawn for another grid, or the teacher runs on another one.
    """
    grid = embed.masked_grid(views)
    if grid is None:  # the plain model's forward, or none that it would take
        plain = embed.encoder.plain_grid((views.shape[-2], views.shape[-1]))
        if plain is not None and mask.ndim == 2 and mask.shape[1] not in (1, prefix + math.prod(plain)):
            _refuse_grid(embed, views, mask, plain, name, prefix)
        with embed.masking(mask):
            return prepare(mask)
    if mask.ndim != 2 or mask.shape[1] != prefix + math.prod(grid) or len(mask) not in (1, len(views)):
        _refuse_grid(embed, views, mask, grid, name, prefix)
    of_patches = math.prod(embed.encoder.blank_grid((views.shape[2], views.shape[3])))
    if any(not teacher.drops_tokens and not teacher.is_training for teacher in embed.partners()):
        raise ValueError(
            f"{name} must be for student and teacher alike, got one for {grid[0]} * {grid[1]} patches, while a teacher "
            "in eval mode is not compressed: call teacher.train()"
        )
    blank = mask.new_zeros(embed.num_blanks(len(views), is_masked=True), prefix + of_patches, dtype=torch.bool)
    blank[1:] = True
    mask = F.pad(mask.to(torch.bool), (embed.encoder.num_prefix_tokens - prefix, 0))
    with embed.masking(mask.expand(len(views), -1)):
        return prepare(blank)


def _refuse_grid(
    embed: CompressedPatchEmbed, views: Tensor, mask: Tensor, grid: tuple[int, int], name: str, prefix: int
) -> NoReturn:
    own = f"{prefix} + " if prefix else ""
    side = f"{views.shape[2]}" if views.shape[2] == views.shape[3] else f"({views.shape[2]}, {views.shape[3]})"
    raise ValueError(
        f"{name} must have the shape ({len(views)}, {own}{grid[0]} * {grid[1]}) under {embed.strategy}, got "
        f"{tuple(mask.shape)}: draw it for the grid that is in force, rows, columns = seqcompress.grid_size(model, "
        f"seqcompress.get_strategy(model), {side})"
    )


def refuse_tokens_named(name: str, tokens: Tensor) -> NoReturn:
    """Refuse what says which tokens are masked or left out, by the name of the argument that says so.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{name} must be None while a compressed encoder trains, got a tensor of shape {tuple(tokens.shape)}: what "
        "predicts pixels, or leaves tokens out by itself (MAE, SimMIM, I-JEPA, MSN), cannot be combined with "
        "compression; train it plain. Masks for iBOT and DINOv2 are taken by the mask= of Lightly's "
        "MaskedVisionTransformerTIMM and the masks of Meta's DinoVisionTransformer"
    )


def follow_masks(module: nn.Module) -> None:
    """Have hosts mask tokens of the compressed encoders in a module on the grid that is in force."""
    for host in module.modules():
        vit = lightly_masked(host)
        for embed in [] if vit is None else vit.modules():
            if isinstance(embed, CompressedPatchEmbed) and embed.encoder.model is vit:
                # Not as a module: it may not add a name to the host's.
                vars(host)[_PREPARES] = _MaskedByLightly(host, embed)
                embed.host = host


def forget_masks(embed: CompressedPatchEmbed) -> None:
    """Give a host that masks tokens its own method back: the encoder is not compressed any more."""
    if embed.host is not None:
        vars(embed.host).pop(_PREPARES, None)
        embed.host = None


class _MaskedByLightly:
    """Stands in for ``preprocess`` of Lightly's masked ViT: it embeds views, masks tokens and adds positions."""

    def __init__(self, host: nn.Module, embed: CompressedPatchEmbed) -> None:
        self._host, self._embed = host, embed

    def __call__(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        embed = self._embed
        prepare: Any = getattr(type(self._host), _PREPARES)
        if embed.is_training and (idx_mask is not None or idx_keep is not None or mask is not None):
            return self._masked(images, idx_mask, idx_keep, mask)
        tokens: Tensor = prepare(self._host, images, idx_mask=idx_mask, idx_keep=idx_keep, mask=mask)
        return tokens

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _masked(self, images: Tensor, idx_mask: Tensor | None, idx_keep: Tensor | None, mask: Tensor | None) -> Tensor:
        embed, host = self._embed, self._host
        prepare: Any = getattr(type(host), _PREPARES)
        if embed.strategy != Strategy():
            for name, index in (("idx_mask", idx_mask), ("idx_keep", idx_keep)):
                if index is not None:
                    refuse_tokens_named(name, index)
        if mask is None:
            tokens: Tensor = prepare(host, images, idx_mask=idx_mask, idx_keep=idx_keep)
            return tokens
        masked: Tensor = masked_forward(
            embed,
            images,
            mask,
            lambda mask: prepare(host, images, idx_mask=idx_mask, idx_keep=idx_keep, mask=mask),
            prefix=embed.encoder.num_prefix_tokens,
        )
        return masked
