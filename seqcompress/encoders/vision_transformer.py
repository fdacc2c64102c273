"""Everything that timm builds from its ``VisionTransformer`` class, and subclasses of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import timm
import torch
from timm.layers.format import Format, nchw_to
from timm.layers.patch_embed import PatchEmbed
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from seqcompress.compressors.selection import maps_patches
from seqcompress.encoders.compression import Compression
from seqcompress.encoders.encoder import Encoder, Size
from seqcompress.encoders.hooks import join_at, remove_hooks
from seqcompress.encoders.patch_embed import CompressedPatchEmbed, When
from seqcompress.encoders.probe import tokens_at
from seqcompress.encoders.registry import register
from seqcompress.strategy import Strategy
from seqcompress.versions import check_version

check_version("timm", timm.__version__)


@register
class TimmVisionTransformer(Encoder):
    """Class token or none, registers, distillation token, any pooling, pre-norm, any kind of positions."""

    @staticmethod
    def recognises(model: nn.Module) -> bool:
        # One with somebody's own patch embedding may be known by its shape.
        asked = ("dynamic_img_pad", "feat_ratio", "grid_size", "img_size")
        return isinstance(model, VisionTransformer) and all(hasattr(model.patch_embed, name) for name in asked)

    @staticmethod
    def rejection_reason(model: nn.Module) -> str | None:
        if not isinstance(model, NaFlexVit):
            return None
        return (
            "is given patches that its loader has cut: have that make fewer of them (train_seq_lens), and the model "
            "drop some (patch_drop_rate)"
        )

    @property
    def has_known_blocks(self) -> bool:
        modules = [self.model, *(module for block in self.blocks for module in block.modules())]
        return super().has_known_blocks and all(map(_is_timms_own, modules))

    @property
    def patch_size(self) -> Size:
        height, width = self.patch_embed.feat_ratio(as_scalar=False)  # of a convolutional stem, its whole stride
        return int(height), int(width)

    @property
    def image_size(self) -> Size:
        height, width = self.patch_embed.img_size
        return int(height), int(width)

    @property
    def channels(self) -> int:
        return next(module.in_channels for module in self.patch_embed.modules() if isinstance(module, nn.Conv2d))

    @property
    def width(self) -> int:
        return int(self.model.embed_dim)

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.model.num_prefix_tokens)

    @property
    def only_size(self) -> Size | None:
        return self.image_size if getattr(self.patch_embed, "strict_img_size", False) else None

    def plain_grid(self, view: Size) -> Size | None:
        size, patch = getattr(self.patch_embed, "img_size", None), self.patch_size
        if getattr(self.patch_embed, "strict_img_size", False):
            if size is not None and view != (size[0], size[1]):
                return None
        elif view[0] % patch[0] or view[1] % patch[1]:
            return None
        grid = (view[0] // patch[0], view[1] // patch[1])
        return grid if min(grid) > 0 else None

    def check(self, strategies: Iterable[Strategy]) -> None:
        rate = getattr(self.model.patch_drop, "prob", None)
        if rate is not None:
            raise ValueError(
                f"the model drops tokens by itself (patch_drop_rate={rate}), which would add to token_dropout: "
                "create it with patch_drop_rate=0"
            )
        if self.patch_embed.dynamic_img_pad:
            raise ValueError(
                "the model pads views that its patches do not divide (dynamic_img_pad=True), where compression "
                "resizes them: create it with dynamic_img_pad=False"
            )
        super().check(strategies)

    def check_scaling(self, size: int) -> None:
        if not self.maps_patches:
            raise ValueError(
                f"patch_size must be None for a model whose patch embedding is a {type(self.patch_embed).__name__}, "
                f"got {size}: only a plain PatchEmbed can be scaled"
            )

    @property
    def patch_embed(self) -> Any:
        embed = self.model.patch_embed
        return embed.embed if isinstance(embed, CompressedPatchEmbed) else embed

    @property
    def projection(self) -> Any:
        return self.patch_embed.proj

    @property
    def maps_patches(self) -> bool:
        embed = self.patch_embed
        return (
            isinstance(embed, PatchEmbed)
            and type(embed).forward is PatchEmbed.forward
            and "forward" not in vars(embed)
            and maps_patches(embed.proj, tuple(embed.patch_size))
        )

    def apply_norm(self, tokens: Tensor) -> Tensor:
        normed: Tensor = self.patch_embed.norm(tokens)
        return normed

    def embed_all_patches(self, views: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embed.forward(views)
        return tokens.flatten(1, 2) if tokens.ndim == 4 and self.patch_embed.output_fmt == Format.NHWC else tokens

    def blank_grid(self, view: Size) -> Size:
        height, width = self.patch_embed.grid_size
        return height, width

    def blank(self, tokens: Tensor, blanks: int, grid: Size) -> Tensor:
        height, width = grid
        if getattr(self.patch_embed, "flatten", True):
            return tokens.new_zeros(blanks, height * width, tokens.shape[-1])  # (b, N, D)
        blank: Tensor = nchw_to(tokens.new_zeros(blanks, tokens.shape[-1], height, width), self.patch_embed.output_fmt)
        return blank

    def attach(self, compression: Compression, *, drops_tokens: bool, when: When) -> CompressedPatchEmbed:
        embed = CompressedPatchEmbed(self, compression, drops_tokens=drops_tokens, when=when)
        self.model.patch_embed = embed
        # Models without positions skip pos_drop; hosts that call the parts themselves may skip norm_pre as well.
        join_at(embed, self.model.pos_drop, self.model.norm_pre, self.model.blocks[0])
        return embed

    def detach(self) -> None:
        embed = self.model.patch_embed
        if isinstance(embed, CompressedPatchEmbed):
            self.model.patch_embed = embed.embed
            remove_hooks(embed)

    def first_tokens(self, views: Tensor) -> Tensor:
        return tokens_at(self.model, (self.model.norm_pre, self.model.blocks[0]), views)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def after_embedding(self, tokens: Tensor) -> Tensor:
        tokens = self.model.norm(self.model.blocks(self.model.norm_pre(tokens)))
        features: Tensor | tuple[Tensor, ...] = self.model.forward_head(tokens)
        return features if isinstance(features, Tensor) else torch.stack(features)


def _is_timms_own(module: nn.Module) -> bool:
    """Whether nobody else's code runs in its forward. Blocks of one's own (``block_fn``) may do anything."""
    return type(module).__module__.partition(".")[0] in ("timm", "torch") and "forward" not in vars(module)
