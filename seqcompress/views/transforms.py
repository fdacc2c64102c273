"""What in an augmentation pipeline depends on the size of a view, found by walking through the data set.

Known are torchvision's transforms (v1 and v2), and what Lightly, solo-learn and timm add to them. They are known by
their names, so none of these packages is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from seqcompress.views.scaled_views import Size, scaled_size

__all__ = ["ScaledTransforms", "known"]

Scaling = Callable[[Any, int, Size], Any]
"""From the attribute's value for full views, the strategy's patch size and the encoder's own to the value to use."""


def _sides(value: Any, patch_size: int, base: Size) -> Any:
    """The size of a crop: as many base patches as the full crop has larger ones."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        height, width = value if len(value) == 2 else (value[0], value[0])
        sides = scaled_size((height, width), patch_size, base)
        return type(value)(sides[: len(value)])
    return scaled_size((value, value), patch_size, base)[0]


def _length(value: Any, patch_size: int, base: Size) -> Any:
    """A length in pixels that need not be whole, such as the width of a blur."""
    if isinstance(value, (tuple, list)):
        return type(value)(_length(item, patch_size, base) for item in value)
    return value * min(base) / patch_size


def _pixels(value: Any, patch_size: int, base: Size) -> Any:
    """A number of pixels, such as the width of a border or the size of what a crop is then taken from."""
    if isinstance(value, (tuple, list)):
        return type(value)(_pixels(item, patch_size, base) for item in value)
    return None if value is None else round(value * min(base) / patch_size)


def _odd(value: Any, patch_size: int, base: Size) -> Any:
    """The size of a kernel, which has a pixel in its middle."""
    if isinstance(value, (tuple, list)):
        return type(value)(_odd(item, patch_size, base) for item in value)
    return max(3, 2 * round((value * min(base) / patch_size - 1) / 2) + 1) if value > 1 else value


def _loader(value: Any, patch_size: int, base: Size) -> Any:
    """A function that reads image files: JPEG files at a fraction of their size, where it is PIL that reads them."""
    if not _reads_with_pil(value):
        return value
    return SmallerJPEGs(patch_size // max(base))


_KNOWN: dict[tuple[str, str], dict[str, Scaling]] = {
    ("torchvision", "RandomResizedCrop"): {"size": _sides},
    ("torchvision", "RandomCrop"): {"size": _sides, "padding": _pixels},
    ("torchvision", "CenterCrop"): {"size": _sides},
    ("torchvision", "Resize"): {"size": _pixels, "max_size": _pixels},
    ("torchvision", "Pad"): {"padding": _pixels},
    ("torchvision", "GaussianBlur"): {"kernel_size": _odd, "sigma": _length},
    ("torchvision", "ElasticTransform"): {"alpha": _length, "sigma": _length},
    ("torchvision", "GaussianNoise"): {},  # its sigma is one of intensity
    ("torchvision", "DatasetFolder"): {"loader": _loader},
    ("timm", "RandomResizedCropAndInterpolation"): {"size": _sides},
    ("lightly", "GaussianBlur"): {"sigmas": _length},
    ("lightly", "DatasetFolder"): {"loader": _loader},
    ("solo", "GaussianBlur"): {"sigma": _length},
}
_full: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""Settings for full views of everything that is scaled at the moment, by whomever."""
_RESIZES = ("Resize", "RandomResizedCrop", "RandomResizedCropAndInterpolation")
_WINDOWS = ("RandomCrop", "CenterCrop")
_IN_PIXELS = {"kernel_size", "radius", "sigma", "sigmas"}
_LONGEST_LIST = 256  # of transforms; longer ones are lists of samples


def known() -> str:
    """The crops and blurs that can be scaled, as a list for people."""
    packages: dict[str, list[str]] = {}
    for (package, name), rules in _KNOWN.items():
        if rules and _loader not in rules.values():
            packages.setdefault(package, []).append(name)
    return "; ".join(f"{package}'s {', '.join(names)}" for package, names in packages.items())


class ScaledTransforms:
    """All transforms of a data set whose settings depend on the size of a view; changes them in place.

    Args:
        dataset: the data set, or any object that holds transforms.
        base: height and width of the encoder's own patches, in pixels.

    Raises:
        ValueError: no known crop is among them, or a blur that is not known.
    """

    def __init__(self, dataset: object, base: Size) -> None:
        self.base = base
        self._settings: list[tuple[Any, str, Any, Scaling]] = []
        for held in _walk(dataset):
            rules = _rules(held)
            if rules is not None:
                attributes = [name for name in rules if hasattr(held, name)]
                full = _full.get(held, {})  # another loader may have scaled it
                self._settings += [
                    (held, name, full.get(name, getattr(held, name)), rules[name]) for name in attributes
                ]
                continue
            unknown = _IN_PIXELS & set(vars(held)) if callable(held) else set()
            if unknown:
                raise ValueError(
                    f"loader has a {type(held).__module__}.{type(held).__qualname__} with {min(unknown)} in pixels, "
                    f"which is not known and so cannot be scaled; known: {known()}"
                )
        _check_order(dataset)
        if not any(name == "size" for _, name, _, _ in self._settings):
            raise ValueError(
                f"loader must have a data set that holds a known crop, found none in "
                f"{type(dataset).__module__}.{type(dataset).__qualname__}; known: {known()}"
            )

    def apply(self, patch_size: int | None) -> None:
        """Make views for this patch size from now on; ``None`` for full views."""
        for held, attribute, full, scaling in self._settings:
            _full.setdefault(held, {})[attribute] = full
            setattr(held, attribute, full if patch_size is None else scaling(full, patch_size, self.base))
        if patch_size is None:
            for held, *_ in self._settings:
                _full.pop(held, None)

    def snapshot(self) -> Callable[[], None]:
        """What puts everything back as it is now, whoever scaled it."""
        before = [(held, attribute, getattr(held, attribute)) for held, attribute, _, _ in self._settings]
        scaled = [(held, dict(_full[held])) for held, *_ in self._settings if held in _full]

        def put_back() -> None:
            for held, attribute, value in before:
                setattr(held, attribute, value)
            for held, full in scaled:
                _full[held] = full

        return put_back


class SmallerJPEGs:
    """Reads image files as torchvision's ``pil_loader`` does, but JPEG files at a fraction of their size.

    JPEG can be decoded at a half, a quarter or an eighth of its size, for less work. A view of half the size then has
    as many pixels of the file beneath each of its own as the full view has in plain training.

    Args:
        factor: how many times smaller the image may be; 1 for its own size.
    """

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, path: str | Path) -> Any:
        from PIL import Image

        with Path(path).open("rb") as file:
            image = Image.open(file)
            if self.factor > 1:
                image.draft(None, (max(1, image.width // self.factor), max(1, image.height // self.factor)))
            return image.convert("RGB")


def _reads_with_pil(loader: Any) -> bool:
    name, package = getattr(loader, "__name__", ""), getattr(loader, "__module__", "").partition(".")[0]
    if package not in ("torchvision", "lightly") or name not in ("default_loader", "pil_loader"):
        return False
    import torchvision

    return name == "pil_loader" or torchvision.get_image_backend() == "PIL"


def _rules(held: object) -> Mapping[str, Scaling] | None:
    rules = (_KNOWN.get((kind.__module__.partition(".")[0], kind.__name__)) for kind in type(held).__mro__)
    return next((found for found in rules if found is not None), None)


def _check_order(dataset: object) -> None:
    """Raise ValueError unless what is measured in pixels of a view comes after what gives the view its size."""
    pipelines = [held for held in _walk(dataset) if type(held).__name__ == "Compose"]
    inner = {id(held) for pipeline in pipelines for held in _walk(pipeline.transforms)}
    sized: set[int] = set()  # whatever comes after a resize
    for pipeline in (held for held in pipelines if id(held) not in inner):
        steps = [list(_walk(step)) for step in pipeline.transforms]
        resizing = [number for number, parts in enumerate(steps) if any(_is(part, *_RESIZES) for part in parts)]
        if not resizing:
            continue
        earlier = [part for parts in steps[: resizing[0]] for part in parts if _rules(part)]
        if earlier:
            raise ValueError(
                f"loader has a {type(earlier[0]).__name__} before what resizes the image: it is measured in pixels of "
                "the image, not of the view, and so cannot be scaled; put it behind"
            )
        sized.update(id(part) for parts in steps[resizing[0] + 1 :] for part in parts)
    for held in _walk(dataset):
        if _is(held, *_WINDOWS) and id(held) not in sized:
            raise ValueError(
                f"loader has a {type(held).__name__} of the image as it is: a smaller one would show less of it. Put a "
                "Resize before it, in one Compose, or use RandomResizedCrop"
            )


def _is(held: object, *names: str) -> bool:
    return _rules(held) is not None and any(kind.__name__ in names for kind in type(held).__mro__)


def _walk(root: object) -> Iterator[Any]:
    """Every object with attributes that can be reached, each once."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        held = waiting.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, (type, ModuleType, FunctionType, BuiltinFunctionType, torch.Tensor)):
            continue
        if isinstance(held, MethodType):
            waiting.append(held.__self__)
        elif isinstance(held, functools.partial):
            waiting.extend([held.func, *held.args, *held.keywords.values()])
        elif isinstance(held, (Mapping, list, tuple)):
            if len(held) <= _LONGEST_LIST:
                waiting.extend(held.values() if isinstance(held, Mapping) else held)
        elif isinstance(getattr(held, "__dict__", None), dict):
            yield held
            waiting.extend(vars(held).values())
