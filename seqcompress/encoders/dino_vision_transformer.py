"""Meta's ``DinoVisionTransformer`` (DINOv2, DINOv3): several crops in one call, each with its own patches.

What is added to patches is added in one method, ``prepare_tokens_with_masks``, crop by crop: they are joined there.
DINOv3's answers with the grid as well, for which rotations are made anew for every block.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from seqcompress.compressors.selection import Selection
from seqcompress.encoders.by_shape import AnyVisionTransformer, KeptRotations, refuse_map
from seqcompress.encoders.hooks import add_forward_hook
from seqcompress.encoders.masks import masked_forward
from seqcompress.encoders.patch_embed import CompressedPatchEmbed
from seqcompress.encoders.registry import register

_PREPARES, _LAYERS = "prepare_tokens_with_masks", "get_intermediate_layers"


@register
class DinoVisionTransformer(AnyVisionTransformer):
    """By the names of its methods, so that copies are recognised, too."""

    general = False
    positions_in_blocks = True
    masks_tokens = True

    @staticmethod
    def recognises(model: nn.Module) -> bool:
        has_methods = hasattr(type(model), _PREPARES) and hasattr(type(model), "forward_features_list")
        return has_methods and AnyVisionTransformer.recognises(model)

    @staticmethod
    def rejection_reason(model: nn.Module) -> str | None:
        return None  # the general kind says it

    def detach(self) -> None:
        for name in (_PREPARES, _LAYERS):
            vars(self.model).pop(name, None)
        super().detach()

    def follow_positions(self, embed: CompressedPatchEmbed, rotary: nn.Module | None) -> None:
        vars(self.model)[_PREPARES] = _JoinedTokens(embed)  # not as a module: it may not add a name to the model's
        if hasattr(type(self.model), _LAYERS):
            vars(self.model)[_LAYERS] = _LayersButNoMaps(embed)
        if rotary is not None:
            add_forward_hook(rotary, _KeptRotationsOfCrop(embed))

    def forward_crops(self, crops: list[Tensor]) -> Any:
        return self.model.forward_features_list(crops, [None] * len(crops))


class _Side(int):
    """A side of the grid of one crop, which says whose it is when rotations are asked for."""

    selection: Selection


class _JoinedTokens:
    """Stands in for the method that adds prefix tokens and positions to the patches of a crop."""

    def __init__(self, embed: CompressedPatchEmbed) -> None:
        self._embed = embed

    def __call__(self, views: Tensor, masks: Tensor | None = None) -> Any:
        embed = self._embed
        if masks is not None and embed.is_training:
            return self._masked(views, masks)
        made = self._made(views, masks)
        return self._joined(made) if embed.is_training else made

    def _made(self, views: Tensor, masks: Tensor | None) -> Any:
        model = self._embed.encoder.model
        return getattr(type(model), _PREPARES)(model, views, masks)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _masked(self, views: Tensor, masks: Tensor) -> Any:
        return masked_forward(
            self._embed, views, masks, lambda masks: self._joined(self._made(views, masks)), name="masks"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _joined(self, made: Any) -> Any:
        selection = self._embed.selection
        if selection is None:
            return made
        if isinstance(made, Tensor):
            return self._embed.join(made, is_last=True)
        height, width = map(_Side, selection.grid)
        height.selection = selection
        return self._embed.join(made[0], is_last=True), (height, width)


class _LayersButNoMaps:
    """Stands in for the method that folds features of several blocks to maps, if it is asked to."""

    def __init__(self, embed: CompressedPatchEmbed) -> None:
        self._embed = embed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._embed.encoder.model
        layers = getattr(type(model), _LAYERS)
        if not inspect.signature(layers).bind(model, *args, **kwargs).arguments.get("reshape"):
            return layers(model, *args, **kwargs)
        self._embed.selection = None  # that of an earlier forward
        try:
            return layers(model, *args, **kwargs)
        finally:  # whether it has failed, or folded what is no map
            refuse_map(self._embed)


class _KeptRotationsOfCrop(KeptRotations):
    def selection(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Selection | None:
        return next((side.selection for side in (*args, *kwargs.values()) if hasattr(side, "selection")), None)
