"""Which ViTs can be compressed: what registers a kind, and what finds the kind of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn

from seqcompress.encoders.encoder import Encoder
from seqcompress.encoders.patch_embed import CompressedPatchEmbed
from seqcompress.messages import described

__all__ = ["SUPPORTED_VITS", "find_encoder", "is_encoder", "register", "register_wrapper"]

SUPPORTED_VITS = "Supported: most ViTs of timm, Hugging Face, torchvision, DINO and one's own: docs/your-own-vit.md."

_kinds: list[type[Encoder]] = []
_wrappers: list[Callable[[nn.Module], nn.Module | None]] = []
_Kind = TypeVar("_Kind", bound=type[Encoder])
_Wrapper = TypeVar("_Wrapper", bound=Callable[[nn.Module], "nn.Module | None"])


def register(kind: _Kind) -> _Kind:
    """Class decorator: models of this kind can be compressed. The latest kind is asked first, general ones last."""
    _kinds.append(kind)
    return kind


def register_wrapper(unwrap: _Wrapper) -> _Wrapper:
    """Function decorator: the function returns the model inside a wrapper that it knows, else None."""
    _wrappers.append(unwrap)
    return unwrap


def is_encoder(model: object) -> bool:
    """Whether ``model`` is a ViT of a registered kind, or wraps one."""
    return isinstance(model, nn.Module) and _find(model) is not None


def find_encoder(model: object, name: str = "model") -> Encoder:
    """A model as an encoder, or the one inside where ``model`` wraps one.

    Raises:
        TypeError: no kind of ViT that is registered; the message says what is supported.
    """
    found = _find(model) if isinstance(model, nn.Module) else None
    if found is None:
        raise TypeError(f"{name} must be a supported ViT, got {_kind_of(model)}. {SUPPORTED_VITS}")
    return found


def _find(model: nn.Module) -> Encoder | None:
    for unwrap in _wrappers:
        inner = unwrap(model)
        if inner is not None:
            return _find(inner)
    for module in model.modules():
        if isinstance(module, CompressedPatchEmbed) and module.encoder.model is model:
            return module.encoder
    return next((kind(model) for kind in _special_first(reversed(_kinds)) if kind.recognises(model)), None)


def _special_first(kinds: Iterable[type[Encoder]]) -> list[type[Encoder]]:
    return sorted(kinds, key=lambda kind: kind.general)


def _kind_of(model: object) -> str:
    if not isinstance(model, nn.Module):
        return described(model)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, nn.DataParallel):
        return f"{kind}, which copies the model at every step: use DistributedDataParallel"
    inside = next((path for path, child in model.named_modules() if path and is_encoder(child)), None)
    if inside is not None:
        return f"{kind}, which has one at .{inside}: pass that"
    reason = next(filter(None, (one.rejection_reason(model) for one in _special_first(_kinds))), None)
    return kind if reason is None else f"{kind}, which {reason}"
