"""timm's ``Eva``: EVA02, DINOv3, PE and ROPE-ViT, whose blocks turn queries and keys by where a patch was."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from seqcompress.encoders.compression import Compression
from seqcompress.encoders.patch_embed import CompressedPatchEmbed, When
from seqcompress.encoders.registry import register
from seqcompress.encoders.vision_transformer import TimmVisionTransformer


@register
class TimmEva(TimmVisionTransformer):
    """Rotations for all blocks or for each, with positions that are added or without, for any grid or for one."""

    positions_in_blocks = True

    @staticmethod
    def recognises(model: nn.Module) -> bool:
        return isinstance(model, Eva)

    def attach(self, compression: Compression, *, drops_tokens: bool, when: When) -> CompressedPatchEmbed:
        embed = super().attach(compression, drops_tokens=drops_tokens, when=when)
        # Not as modules: neither may add a name to the model's.
        vars(self.model)["patch_drop"] = _KeptPatches(embed)
        if self.model.rope is not None:
            vars(self.model.rope)["get_embed"] = _RotationsOfGrid(embed, self.model.rope)
        return embed

    def detach(self) -> None:
        if isinstance(self.model.patch_drop, _KeptPatches):
            vars(self.model)["patch_drop"] = None
        if self.model.rope is not None:
            vars(self.model.rope).pop("get_embed", None)
        super().detach()

    def after_embedding(self, tokens: Tensor) -> Tensor:
        for block in self.model.blocks:
            tokens = block(tokens)
        features: Tensor = self.model.forward_head(self.model.norm(tokens))
        return features


class _KeptPatches:
    """Stands where the model drops patches by itself, and tells it which are kept: it then picks their rotations."""

    def __init__(self, embed: CompressedPatchEmbed) -> None:
        self._embed = embed

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        selection = self._embed.selection if self._embed.is_training else None
        return tokens, None if selection is None else selection.kept


class _RotationsOfGrid:
    """Stands in for ``get_embed`` of the rotary embedding: makes it for the grid that the views are cut into."""

    def __init__(self, embed: CompressedPatchEmbed, rotary: Any) -> None:
        self._embed, self._rotary = embed, rotary

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        rotary, get_embed = self._rotary, type(self._rotary).get_embed
        selection = self._embed.selection if self._embed.is_training else None
        if selection is not None and getattr(rotary, "feat_shape", None) is None:
            return cast(Tensor, get_embed(rotary, shape=list(selection.grid)))
        if selection is not None and selection.grid != tuple(rotary.feat_shape):
            # Made for one grid: another like it, with its own tables and the same parameters.
            rotary = copy.copy(rotary)
            rotary._buffers = {
                name: None if value is None else value.clone() for name, value in rotary._buffers.items()
            }
            rotary.update_feat_shape(list(selection.grid))
        return cast(Tensor, get_embed(rotary, *args, **kwargs))
