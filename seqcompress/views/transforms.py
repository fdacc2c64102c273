"""What in an augmentation pipeline depends on the size of a view, found by walking through the data set.

Known are torchvision's transforms (v1 and v2), and what Lightly, solo-learn and timm add to them. They are known by
their names, so none of these packages is imported.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch

from seqcompress.views.scaled_views import Size, scaled_size

__all__ = ["ScaledTransforms", "known", "objects_in"]

Ratios: TypeAlias = tuple[Fraction, Fraction]
"""Height and width of a smaller view over those of the full one."""
Scaling: TypeAlias = Callable[[Any, Ratios], Any]
"""From a setting's value for full views to the one to use."""


def _sides(value: Any, ratios: Ratios) -> Any:
    """Height and width, of a crop for instance; or one number for the shorter side."""
    if not isinstance(value, Sequence) or len(value) != 2:
        return _pixels(value, ratios)
    return _like(value, [round(side * ratio) for side, ratio in zip(value, ratios, strict=True)])


def _pixels(value: Any, ratios: Ratios) -> Any:
    """A number of pixels, such as the width of a border."""
    if isinstance(value, Sequence):
        return _like(value, [_pixels(item, ratios) for item in value])
    return None if value is None else round(value * max(ratios))


def _length(value: Any, ratios: Ratios, power: int = 1) -> Any:
    """A length in pixels that need not be whole, such as the width of a blur."""
    if isinstance(value, Sequence):
        return _like(value, [_length(item, ratios, power) for item in value])
    return float(value * max(ratios) ** power)


def _area(value: Any, ratios: Ratios) -> Any:
    """The strength of an elastic distortion: noise gets weaker with the width of its blur, which is a length, too."""
    return _length(value, ratios, power=2)


def _odd(value: Any, ratios: Ratios) -> Any:
    """The size of a kernel, which has a pixel in its middle."""
    if isinstance(value, Sequence):
        return _like(value, [_odd(item, ratios) for item in value])
    return max(3, 2 * round((value * max(ratios) - 1) / 2) + 1) if value > 1 else value


def _like(sequence: Sequence[Any], items: list[Any]) -> Sequence[Any]:
    return tuple(items) if isinstance(sequence, tuple) else items


def _loader(value: Any, ratios: Ratios) -> Any:
    """A function that reads image files: JPEG files at a fraction of their size, where it is PIL that reads them."""
    return SmallerJPEGs(int(1 / max(ratios))) if _reads_with_pil(value) else value


_KNOWN: dict[tuple[str, str], dict[str, Scaling]] = {
    ("torchvision", "RandomResizedCrop"): {"size": _sides},
    ("torchvision", "RandomCrop"): {"size": _sides, "padding": _pixels},
    ("torchvision", "CenterCrop"): {"size": _sides},
    ("torchvision", "Resize"): {"size": _sides, "max_size": _pixels},
    ("torchvision", "Pad"): {"padding": _pixels},
    ("torchvision", "GaussianBlur"): {"kernel_size": _odd, "sigma": _length},
    ("torchvision", "ElasticTransform"): {"alpha": _area, "sigma": _length},
    ("torchvision", "GaussianNoise"): {},  # its sigma is one of intensity
    ("torchvision", "DatasetFolder"): {"loader": _loader},
    ("timm", "RandomResizedCropAndInterpolation"): {"size": _sides},
    ("lightly", "GaussianBlur"): {"sigmas": _length},
    ("lightly", "DatasetFolder"): {"loader": _loader},
    ("solo", "GaussianBlur"): {"sigma": _length},
}
_RESIZES = ("Resize", "RandomResizedCrop", "RandomResizedCropAndInterpolation")
_WINDOWS = ("RandomCrop", "CenterCrop")
_FOLDERS = ("DatasetFolder",)
_PIPELINES = ("Compose", "Sequential", "RandomApply", "RandomChoice", "RandomOrder")
_IN_PIXELS = re.compile(r"kernel_size|ksize|radius|sigma")
_FULL = "_seqcompress_full"
"""Attribute of all that is scaled at the moment, by whomever: its settings for full views. Copies have it, too."""
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
        self._settings: list[tuple[Any, str, Any, Scaling, Size | None]] = []
        views = _views_of_pipelines(dataset)
        for held in _with_settings(dataset):
            rules = _rules(held)
            if rules is None:
                _check_unknown(held)
                continue
            full, view = vars(held).get(_FULL, {}), views.get(id(held), _size_of(held))
            for name, scaling in rules.items():
                if hasattr(held, name):
                    self._settings.append((held, name, full.get(name, getattr(held, name)), scaling, view))
        _check_order(dataset)
        if not any(name == "size" for _, name, *_ in self._settings):
            raise ValueError(
                f"loader must have a data set that holds a known crop, found none in "
                f"{type(dataset).__module__}.{type(dataset).__qualname__}; known: {known()}"
            )

    def apply(self, patch_size: int | None) -> None:
        """Make views for this patch size from now on; ``None`` for full views."""
        for held, name, full, scaling, view in self._settings:
            if patch_size is None:
                setattr(held, name, full)
                vars(held).pop(_FULL, None)
            else:
                vars(held).setdefault(_FULL, {})[name] = full
                setattr(held, name, scaling(full, self._ratios(patch_size, view)))

    def snapshot(self) -> Callable[[], None]:
        """What puts everything back as it is now, whoever scaled it."""
        before = [(held, name, getattr(held, name)) for held, name, *_ in self._settings]
        scaled = [(held, dict(vars(held)[_FULL])) for held, *_ in self._settings if _FULL in vars(held)]

        def put_back() -> None:
            for held, name, value in before:
                setattr(held, name, value)
                vars(held).pop(_FULL, None)
            for held, full in scaled:
                setattr(held, _FULL, full)

        return put_back

    def overlaps(self, other: ScaledTransforms) -> bool:
        """Whether the two change the same transforms."""
        return not {id(held) for held, *_ in self._settings}.isdisjoint(id(held) for held, *_ in other._settings)

    def _ratios(self, patch_size: int, view: Size | None) -> Ratios:
        """How much smaller a view becomes; where its size is not known, as if patches divided it."""
        if view is None:
            return Fraction(self.base[0], patch_size), Fraction(self.base[1], patch_size)
        height, width = scaled_size(view, patch_size, self.base)
        return Fraction(height, view[0]), Fraction(width, view[1])


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


def objects_in(root: object, is_closed: Callable[[object], bool] = lambda held: False) -> Iterator[Any]:
    """Every object, list and dictionary that can be reached by attributes and items, in order, each once.

    Not what lies in long lists (of samples), in functions, in tensors, or in what ``is_closed``.
    """
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        held = waiting.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        inside: list[Any] = []
        if isinstance(held, (type, ModuleType, FunctionType, BuiltinFunctionType, torch.Tensor)):
            continue
        if isinstance(held, MethodType):
            inside = [held.__self__]
        elif isinstance(held, functools.partial):
            inside = [held.func, *held.args, *held.keywords.values()]
        elif isinstance(held, (Mapping, list, tuple)):
            if len(held) <= _LONGEST_LIST or _holds_datasets(held):
                inside = [*held.values()] if isinstance(held, Mapping) else [*held]
                yield held
        elif isinstance(getattr(held, "__dict__", None), dict):
            inside = [] if is_closed(held) else [*vars(held).values()]
            yield held
        waiting.extend(reversed(inside))


def _with_settings(root: object, *is_closed: Callable[[object], bool]) -> Iterator[Any]:
    return (held for held in objects_in(root, *is_closed) if not isinstance(held, (Mapping, list, tuple)))


def _holds_datasets(held: Any) -> bool:
    return not isinstance(held, Mapping) and isinstance(held[0], torch.utils.data.Dataset)


def _reads_with_pil(loader: Any) -> bool:
    """Whether it is the one that torchvision's or Lightly's folders have by default; one made from it may do more."""
    for name in ("torchvision.datasets.folder", "lightly.data._image_loaders"):
        module = sys.modules.get(name)
        if loader is getattr(module, "pil_loader", ...):
            return True
        if loader is getattr(module, "default_loader", ...):
            import torchvision

            return torchvision.get_image_backend() == "PIL"
    return False


def _rules(held: object) -> Mapping[str, Scaling] | None:
    rules = (_KNOWN.get((_package(kind), kind.__name__)) for kind in type(held).__mro__)
    found = next((found for found in rules if found is not None), None)
    if found is not None and _is(held, *_FOLDERS) and not _reads_anew(held):
        return {}
    return found


def _reads_anew(folder: object) -> bool:
    """Whether each sample is read from its file. A class of the user's may keep images, which must be whole then."""
    return _package(getattr(type(folder), "__getitem__", None)) in ("torchvision", "lightly", "solo")


def _package(named: object) -> str:
    return str(getattr(named, "__module__", "")).partition(".")[0]


def _is(held: object, *names: str) -> bool:
    return any((_package(kind), kind.__name__) in _KNOWN and kind.__name__ in names for kind in type(held).__mro__)


def _check_unknown(held: object) -> None:
    """Raise ValueError if this looks like a blur: it would stay as wide as in a full view."""
    kind = type(held)
    if not callable(held) or _package(kind) in ("torch", "timm"):  # layers of a network, for instance
        return
    settings = [name for name in vars(held) if _IN_PIXELS.match(name)]
    if settings or "blur" in kind.__name__.lower():
        what = f" with {settings[0]} in pixels" if settings else ""
        raise ValueError(
            f"loader has a {kind.__module__}.{kind.__qualname__}{what}, which is not known and so cannot be scaled; "
            f"known: {known()}"
        )


def _pipelines(dataset: object) -> list[list[Any]]:
    """All transforms of every pipeline, in order.

    A pipeline within another is a part of it. Where one step holds several, they make a view each: they come by
    themselves.
    """
    found: list[list[Any]] = []
    holders, opened = [dataset], set[int]()

    def unfold(step: object) -> Iterator[Any]:
        if _is_pipeline(step):
            for inner in _steps(step):
                yield from unfold(inner)
            return
        yield from (held for held in _with_settings(step, _is_pipeline) if not _is_pipeline(held))
        pipelines = _pipelines_in(step) if id(step) not in opened else []
        opened.add(id(step))
        if len(pipelines) == 1:
            yield from unfold(pipelines[0])
        elif pipelines:
            holders.append(step)

    for holder in holders:
        found += [list(unfold(pipeline)) for pipeline in _pipelines_in(holder)]
    return found


def _pipelines_in(holder: object) -> list[Any]:
    return [held for held in objects_in(holder, _is_pipeline) if _is_pipeline(held)]


def _is_pipeline(held: object) -> bool:
    names = {kind.__name__ for kind in type(held).__mro__}
    return not names.isdisjoint(_PIPELINES) and isinstance(_steps(held), Iterable)


def _steps(pipeline: Any) -> Iterable[Any]:
    return getattr(pipeline, "transforms", pipeline)


def _size_of(held: object) -> Size | None:
    """Height and width of what comes out of a transform, if it alone decides."""
    if not _is(held, *_RESIZES, *_WINDOWS):
        return None
    size = vars(held).get(_FULL, {}).get("size", getattr(held, "size", None))
    if isinstance(size, Sequence):
        return (size[0], size[1]) if len(size) == 2 else None
    return None if size is None or _is(held, "Resize") else (size, size)


def _views_of_pipelines(dataset: object) -> dict[int, Size | None]:
    """For every step of a pipeline, the size of the full views that leave it: the last crop's."""
    views: dict[int, Size | None] = {}
    for steps in _pipelines(dataset):
        sizing = [step for step in steps if _is(step, *_RESIZES, *_WINDOWS)]
        if sizing:
            view = _size_of(sizing[-1])
            views.update((id(step), view) for step in steps if id(step) not in views)
    return views


def _check_order(dataset: object) -> None:
    """Raise ValueError unless what is measured in pixels of a view comes after what gives the view its size."""
    sized: set[int] = set()  # whatever comes after a resize
    for steps in _pipelines(dataset):
        resizing = next((number for number, step in enumerate(steps) if _is(step, *_RESIZES)), None)
        if resizing is None:
            continue
        earlier = [step for step in steps[:resizing] if _rules(step)]
        if earlier:
            raise ValueError(
                f"loader has a {type(earlier[0]).__name__} before what resizes the image: it is measured in pixels of "
                "the image, not of the view, and so cannot be scaled; put it behind"
            )
        sized.update(id(step) for step in steps[resizing + 1 :])
    for held in _with_settings(dataset):
        if _is(held, *_WINDOWS) and id(held) not in sized:
            raise ValueError(
                f"loader has a {type(held).__name__} of the image as it is: a smaller one would show less of it. Put a "
                "Resize before it, in one Compose, or use RandomResizedCrop"
            )
