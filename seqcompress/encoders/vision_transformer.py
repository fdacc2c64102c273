"""Everything that timm builds from its ``VisionTransformer`` class, and subclasses of it."""

from __future__ import annotations

from collections.abc import Iterable

import timm
import torch
from packaging.version import Version
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from seqcompress.compressors import CompressedPatchEmbed
from seqcompress.compressors.patch_embed import Compression, When, embeds_patches, grid_of_view, patch_size
from seqcompress.compressors.patch_scaling import grid_size
from seqcompress.encoders import Family, register
from seqcompress.encoders.family import Encoder
from seqcompress.encoders.hooks import join_at, leave
from seqcompress.encoders.probe import tokens_at
from seqcompress.strategy import Strategy

_OLDEST_TIMM = "1.0.26"

if Version(timm.__version__) < Version(_OLDEST_TIMM):
    raise ImportError(f"timm {timm.__version__} is not supported; supported: timm >= {_OLDEST_TIMM}")


@register
class TimmVisionTransformer(Family):
    """Class token or none, registers, distillation token, any pooling, pre-norm, any kind of positions."""

    supports = "timm.models.vision_transformer.VisionTransformer and its subclasses (vit_*, deit*, flexivit_*, ...)"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def check(self, encoder: Encoder, strategies: Iterable[Strategy]) -> None:
        rate = getattr(encoder.patch_drop, "prob", None)
        if rate is not None:
            raise ValueError(
                f"the model drops tokens by itself (patch_drop_rate={rate}), which would add to token_dropout: "
                "create it with patch_drop_rate=0"
            )
        if _plain_embed(encoder).dynamic_img_pad:
            raise ValueError(
                "the model pads views that its patches do not divide (dynamic_img_pad=True), where compression "
                "resizes them: create it with dynamic_img_pad=False"
            )
        for strategy in strategies:
            size = strategy.patch_size
            if size is None or (size, size) == self.patch_size(encoder):
                continue
            grid_size(self.image_size(encoder), (size, size))
            embed = _plain_embed(encoder)
            if not embeds_patches(embed):
                raise ValueError(
                    f"patch_size must be None for a model whose patch embedding is a {type(embed).__name__}, "
                    f"got {size}: only a plain PatchEmbed can be scaled"
                )

    def attach(
        self, encoder: Encoder, compression: Compression, *, drops_tokens: bool, when: When
    ) -> CompressedPatchEmbed:
        embed = CompressedPatchEmbed(_plain_embed(encoder), encoder, compression, drops_tokens=drops_tokens, when=when)
        encoder.patch_embed = embed
        # Models without positions skip pos_drop; hosts that call the parts themselves may skip norm_pre as well.
        join_at(embed, encoder.pos_drop, encoder.norm_pre, encoder.blocks[0])
        return embed

    def detach(self, encoder: Encoder) -> None:
        embed = encoder.patch_embed
        if isinstance(embed, CompressedPatchEmbed):
            encoder.patch_embed = embed.embed
            leave(embed)

    def first_tokens(self, encoder: Encoder, views: Tensor) -> Tensor:
        return tokens_at(encoder, (encoder.norm_pre, encoder.blocks[0]), views)

    def patch_size(self, encoder: Encoder) -> tuple[int, int]:
        return patch_size(_plain_embed(encoder))

    def channels(self, encoder: Encoder) -> int:
        embed = _plain_embed(encoder)
        return next(module.in_channels for module in embed.modules() if isinstance(module, nn.Conv2d))

    def width(self, encoder: Encoder) -> int:
        return int(encoder.embed_dim)

    def projection_size(self, encoder: Encoder) -> int:
        return int(encoder.patch_embed.proj.weight.numel())

    def image_size(self, encoder: Encoder) -> tuple[int, int]:
        height, width = encoder.patch_embed.img_size
        return int(height), int(width)

    def grid(self, encoder: Encoder, view: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
        return grid_of_view(_plain_embed(encoder), view, patch)

    def num_prefix_tokens(self, encoder: Encoder) -> int:
        return int(encoder.num_prefix_tokens)

    def after_embedding(self, encoder: Encoder, tokens: Tensor) -> Tensor:
        tokens = encoder.norm(encoder.blocks(encoder.norm_pre(tokens)))
        features: Tensor | tuple[Tensor, ...] = encoder.forward_head(tokens)
        return features if isinstance(features, Tensor) else torch.stack(features)


def _plain_embed(encoder: Encoder) -> nn.Module:
    embed = encoder.patch_embed
    return embed.embed if isinstance(embed, CompressedPatchEmbed) else embed
