"""Modules that merely wrap a ViT: what is inside them gets compressed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from seqcompress.encoders.registry import is_encoder, register_wrapper
from seqcompress.encoders.sharding import wrapped_by_fsdp


@register_wrapper
def distributed(model: nn.Module) -> nn.Module | None:
    """``DistributedDataParallel(vit)``."""
    return model.module if isinstance(model, DistributedDataParallel) else None


@register_wrapper
def sharded(model: nn.Module) -> nn.Module | None:
    """``FullyShardedDataParallel(vit)``, if the ViT was compressed before."""
    return wrapped_by_fsdp(model)


@register_wrapper
def compiled(model: nn.Module) -> nn.Module | None:
    """``torch.compile(vit)``."""
    inner = vars(model).get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else None


@register_wrapper
def lightly_masked(model: nn.Module) -> nn.Module | None:
    """``MaskedVisionTransformerTIMM(vit)``, known by its name: the core imports no framework."""
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(model).__mro__}
    if names.isdisjoint(("lightly", f"MaskedVisionTransformer{kind}") for kind in ("TIMM", "Torchvision")):
        return None
    vit: Any = model.vit
    return vit


@register_wrapper
def hugging_face(model: nn.Module) -> nn.Module | None:
    """``ViTForImageClassification`` and its like, known by their package."""
    if type(model).__module__.partition(".")[0] != "transformers":
        return None
    inside = [child for child in model.children() if is_encoder(child)]
    return inside[0] if len(inside) == 1 else None
