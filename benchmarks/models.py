"""The ViTs that benchmarks compare. All variants share their parameters, and so work on the same memory."""

from __future__ import annotations

import copy
import math
from importlib import import_module
from typing import Any, TypeVar

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

IMAGE_SIZE = 224
PATCH_SIZE = 16
OF_OTHERS = ("dino", "dinov2")  # ViT-S of other code bases than timm's

AnyModel = TypeVar("AnyModel", bound=nn.Module)


def vit(name: str, **settings: Any) -> VisionTransformer:
    """A ViT of timm without classifier; refused where the benchmarks' patch sizes would mean nothing."""
    model = timm.create_model(name, img_size=IMAGE_SIZE, num_classes=0, **settings)
    if not isinstance(model, VisionTransformer) or model.patch_embed.patch_size != (PATCH_SIZE, PATCH_SIZE):
        raise ValueError(f"--model must be a VisionTransformer of timm with patch size {PATCH_SIZE}, got {name}")
    return model


def any_vit(name: str, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE), *, narrow: bool = False) -> nn.Module:
    """A ViT with patches of 16 px that is built for views of this size.

    Args:
        name: a model of timm; "dinov2", the class of Hugging Face at the size of a ViT-S; or "dino", the ViT-S of the
            first DINO's repository, which has to be on PYTHONPATH.
        size: of views. Those of OF_OTHERS have to be square to need no interpolation of positions.
        narrow: 32 wide, of the same depth.
    """
    if name == "dino":
        settings = {"embed_dim": 32, "num_heads": 1} if narrow else {"embed_dim": 384, "num_heads": 6}
        module = import_module("vision_transformer")
        return module.VisionTransformer(img_size=list(size), patch_size=PATCH_SIZE, qkv_bias=True, **settings)
    if name == "dinov2":
        from transformers import Dinov2Config, Dinov2Model

        width = 32 if narrow else 384
        heads = width // 64 or 1
        config = Dinov2Config(
            hidden_size=width, num_attention_heads=heads, image_size=list(size), patch_size=PATCH_SIZE
        )
        return Dinov2Model(config)
    settings = {"embed_dim": 32, "num_heads": 1} if narrow else {}
    model = timm.create_model(name, img_size=size, num_classes=0, **settings)
    if tuple(model.patch_embed.patch_size) != (PATCH_SIZE, PATCH_SIZE):
        raise ValueError(f"--model must have patches of {PATCH_SIZE} px, got {name}")
    return model


def features(output: Any) -> Tensor:
    """What a ViT's forward returned, without what is around it."""
    return output if isinstance(output, Tensor) else output.last_hidden_state


def sharing_parameters(model: AnyModel) -> AnyModel:
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


def any_native(name: str, model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """The same for each ViT that ``any_vit`` makes: built for this size, with the model's parameters but positions."""
    small = any_vit(name, size).to(next(model.parameters()).device)
    shared = model.state_dict(keep_vars=True)
    fitting = {key: shared[key] for key, value in small.state_dict().items() if value.shape == shared[key].shape}
    small.load_state_dict(fitting, strict=False, assign=True)
    return small


def compiled(model: AnyModel, *, really: bool) -> AnyModel:
    """The model, its blocks compiled as ``docs/torch-compile.md`` recommends, or as it is."""
    if really:
        # Variants run the same code, which has one limit of compilations; a training run has one model.
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(torch._dynamo.config, limit, 64)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        blocks = model.blocks if hasattr(model, "blocks") else model.encoder.layer
        for part in [blocks] if isinstance(blocks, nn.Sequential) else blocks:
            part.compile(dynamic=True)
    return model
