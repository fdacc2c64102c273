"""The ViTs that benchmarks compare. All variants share their parameters, and so work on the same memory."""

from __future__ import annotations

import copy
import math
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

IMAGE_SIZE = 224
PATCH_SIZE = 16


def vit(name: str, **settings: Any) -> VisionTransformer:
    """A ViT of timm without classifier; refused where the benchmarks' patch sizes would mean nothing."""
    model = timm.create_model(name, img_size=IMAGE_SIZE, num_classes=0, **settings)
    if not isinstance(model, VisionTransformer) or model.patch_embed.patch_size != (PATCH_SIZE, PATCH_SIZE):
        raise ValueError(f"--model must be a VisionTransformer of timm with patch size {PATCH_SIZE}, got {name}")
    return model


def sharing_parameters(model: VisionTransformer) -> VisionTransformer:
    """A copy of the modules with the very same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def native_size(patches: int) -> tuple[int, int]:
    """The size of views that have exactly this many patches by nature, as square as can be."""
    rows = next(side for side in range(math.isqrt(patches), 0, -1) if patches % side == 0)
    return rows * PATCH_SIZE, patches // rows * PATCH_SIZE


def native(model: VisionTransformer, size: tuple[int, int]) -> VisionTransformer:
    """The plain model for views of this size, with nothing to choose, to drop or to resample."""
    small = sharing_parameters(model)
    small.set_input_size(img_size=size)
    return small


def compiled(model: VisionTransformer, *, really: bool) -> VisionTransformer:
    """The model, its blocks compiled as ``docs/torch-compile.md`` recommends, or as it is."""
    if really:
        # Variants run the same code, which has one limit of compilations; a training run has one model.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        model.blocks.compile(dynamic=True)
    return model
