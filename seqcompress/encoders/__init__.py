"""Which ViTs can be compressed. Each family is one module of this folder, and registers itself.

To add a family, add a module with a subclass of [Family][seqcompress.encoders.family.Family] decorated with
``register``; every module here is imported. What merely wraps a ViT registers with ``register_wrapper``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from seqcompress.encoders.family import Encoder, Family

__all__ = ["Family", "find_encoder", "is_encoder", "register", "register_wrapper", "supported"]

_families: list[Family] = []
_wrappers: dict[str, Callable[[nn.Module], nn.Module | None]] = {}
_FamilyType = TypeVar("_FamilyType", bound=type[Family])
_Wrapper = TypeVar("_Wrapper", bound=Callable[[nn.Module], "nn.Module | None"])


def register(family: _FamilyType) -> _FamilyType:
    """Class decorator: from now on, models of this family can be compressed."""
    _families.append(family())
    return family


def register_wrapper(name: str) -> Callable[[_Wrapper], _Wrapper]:
    """Function decorator: the function returns the model inside a wrapper that it knows, else None."""

    def decorate(unwrap: _Wrapper) -> _Wrapper:
        _wrappers[name] = unwrap
        return unwrap

    return decorate


def supported() -> str:
    """What can be compressed, as a list for people."""
    return "; ".join([*(family.supports for family in _special_first()), f"and one inside {' or '.join(_wrappers)}"])


def is_encoder(model: object) -> bool:
    """Whether ``model`` is a ViT of a registered family, or wraps one."""
    return isinstance(model, nn.Module) and _find(model) is not None


def find_encoder(model: object, name: str = "model") -> tuple[Family, Encoder]:
    """The family of a model, and the ViT itself where ``model`` wraps one.

    Raises:
        TypeError: no family knows the model; the message lists what is supported.
    """
    found = _find(model) if isinstance(model, nn.Module) else None
    if found is None:
        raise TypeError(f"{name} must be a supported ViT, got {_described(model)}. Supported: {supported()}.")
    return found


def _find(model: nn.Module) -> tuple[Family, Encoder] | None:
    for unwrap in _wrappers.values():
        inner = unwrap(model)
        if inner is not None:
            return _find(inner)
    return next(((family, model) for family in _special_first() if family.matches(model)), None)


def _special_first() -> list[Family]:
    return sorted(_families, key=lambda family: family.general)


def _described(model: object) -> str:
    if not isinstance(model, nn.Module):
        return repr(model)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, nn.DataParallel):
        return f"{kind}, which copies the model at every step: use DistributedDataParallel"
    inside = next((path for path, child in model.named_modules() if path and is_encoder(child)), None)
    return kind if inside is None else f"{kind}, which has one at .{inside}: pass that"


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
