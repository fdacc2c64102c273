"""What in an augmentation pipeline depends on the size of a view: one description, for loaders and for modules.

Known are torchvision's transforms (v1 and v2), what Lightly, solo-learn and timm add to them, and kornia's, also within
stable-pretraining's modules. They are known by their names, so none of these packages is imported. Only attributes and
plain lists are looked at: no sample is made, and nothing is called that is the data set's.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch

from seqcompress.views.scaled_views import Size, scaled_size

__all__ = ["ScaledTransforms", "known", "put_back"]

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
    if isinstance(value, torch.Tensor):
        return value * float(max(ratios)) ** power
    return float(value * max(ratios) ** power)


def _length_squared(value: Any, ratios: Ratios) -> Any:
    """The strength of an elastic distortion: noise gets weaker with the width of its blur, which is a length, too."""
    return _length(value, ratios, power=2)


def _kernel_size(value: Any, ratios: Ratios) -> Any:
    """The size of a kernel, which has a pixel in its middle."""
    if isinstance(value, Sequence):
        return _like(value, [_kernel_size(item, ratios) for item in value])
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
    ("torchvision", "GaussianBlur"): {"kernel_size": _kernel_size, "sigma": _length},
    ("torchvision", "ElasticTransform"): {"alpha": _length_squared, "sigma": _length},
    ("torchvision", "GaussianNoise"): {},  # its sigma is one of intensity
    ("torchvision", "DatasetFolder"): {"loader": _loader},
    ("timm", "RandomResizedCropAndInterpolation"): {"size": _sides},
    ("lightly", "GaussianBlur"): {"sigmas": _length},
    ("lightly", "DatasetFolder"): {"loader": _loader},
    ("solo", "GaussianBlur"): {"sigma": _length},
    # kornia keeps a size twice: in the flags, and in what draws the place of a crop.
    ("kornia", "RandomResizedCrop"): {
        "flags.size": _sides,
        "_param_generator.output_size": _sides,
        "_param_generator.resize_to": _sides,
    },
    ("kornia", "RandomCrop"): {"flags.size": _sides, "flags.padding": _pixels, "_param_generator.size": _sides},
    ("kornia", "CenterCrop"): {"size": _sides, "flags.size": _sides},
    ("kornia", "Resize"): {"flags.size": _sides, "_param_generator.output_size": _sides},
    ("kornia", "RandomGaussianBlur"): {"flags.kernel_size": _kernel_size, "_param_generator.sigma": _length},
    # Its alpha is a part of the view, of noise that gets weaker with the width of its blur.
    ("kornia", "RandomElasticTransform"): {
        "flags.kernel_size": _kernel_size,
        "flags.sigma": _length,
        "flags.alpha": _length,
    },
}
_RESIZES = ("Resize", "RandomResizedCrop", "RandomResizedCropAndInterpolation")
_WINDOWS = ("RandomCrop", "CenterCrop")
_FOLDERS = ("DatasetFolder",)
_PIPELINES = ("Compose", "GPUCompose", "Sequential", "RandomApply", "RandomChoice", "RandomOrder")
_IN_PIXELS = re.compile(r"kernel_size|ksize|radius|sigma")
_FULL = "_seqcompress_full"
"""Attribute of all that is scaled: its settings' values for full views, and those that were put in their place."""
_PLAIN = (dict, list, tuple, OrderedDict)
_VALUES = frozenset({int, float, bool, str, bytes, complex, type(None)})
_CLOSED = (type, ModuleType, FunctionType, BuiltinFunctionType, torch.Tensor)
_LONGEST_LIST = 256  # of transforms; longer ones are lists of samples


def known() -> str:
    """The crops and blurs that can be scaled, as a list for people."""
    packages: dict[str, list[str]] = {}
    for (package, name), rules in _KNOWN.items():
        if rules and _loader not in rules.values():
            packages.setdefault(package, []).append(name)
    return "; ".join(f"{package}'s {', '.join(names)}" for package, names in packages.items())


class ScaledTransforms:
    """All transforms within an object whose settings depend on the size of a view, as they are now.

    What a setting is for full views is what its owner gave it, at whatever time: a value that is not the one that
    ``apply`` left there is the owner's, and is what gets scaled.

    Args:
        root: the data set, or a module of transforms.
        base: height and width of the encoder's own patches, in pixels.

    Attributes:
        full: sizes of the full views that they make.
        scaled: whether every setting has the value that ``apply`` gave it for smaller views.

    Raises:
        ValueError: no known crop is among them, one whose views' size the image decides, or a blur that is not known.
    """

    def __init__(self, root: object, base: Size) -> None:
        self.base = base
        self.full: set[Size] = set()
        self._settings: list[tuple[Any, str, Any, Scaling, Size | None]] = []
        held_by_root, pipelines = [*objects_in(root)], _pipelines(root)
        views = _views_of_pipelines(pipelines)
        for held in filter(_has_settings, held_by_root):
            rules = _rules(held)
            if rules is None:
                _check_unknown(held)
                continue
            view = views.get(id(held), _size_of(held))
            for name, scaling in rules.items():
                if _has(held, name):
                    self._settings.append((held, name, _full_value(held, name), scaling, view))
            if _has_kind(held, *_RESIZES, *_WINDOWS):
                if view is None:
                    raise ValueError(
                        f"loader has a {type(held).__name__} that leaves the size of views to the image: give it "
                        "height and width, or put a crop behind it"
                    )
                self.full.add(view)
        self.scaled = all(
            name in vars(held).get(_FULL, {}) and _same(_get(held, name), vars(held)[_FULL][name][1])
            for held, name, *_ in self._settings
        )
        _check_order(pipelines, held_by_root)
        if not self.full:
            raise ValueError(_no_crop(root))
        for held in held_by_root:
            for part in held if isinstance(held, (list, tuple)) and len(held) > 0 and _holds_datasets(held) else ():
                if not any(_has_kind(step, *_RESIZES, *_WINDOWS) for step in objects_in(part)):
                    raise ValueError(f"{_no_crop(part)}; every part of the data set must have one")

    def apply(self, patch_size: int | None) -> None:
        """Make views for this patch size from now on; ``None`` for full views."""
        for held, name, full, scaling, view in self._settings:
            marks = vars(held).setdefault(_FULL, {})
            if patch_size is None:
                if name in marks:
                    _set(held, name, full)
                vars(held).pop(_FULL) if not marks.keys() - {name} else marks.pop(name, None)
            else:
                value = scaling(full, self._ratios(patch_size, view))
                marks[name] = (full, value)
                _set(held, name, value)

    def _ratios(self, patch_size: int, view: Size | None) -> Ratios:
        """How much smaller a view becomes; where its size is not known, as if patches divided it."""
        if view is None:
            return Fraction(self.base[0], patch_size), Fraction(self.base[1], patch_size)
        height, width = scaled_size(view, patch_size, self.base)
        return Fraction(height, view[0]), Fraction(width, view[1])


def put_back(root: object) -> None:
    """Make full views again, whatever else has become of the transforms."""
    for held in filter(_has_settings, objects_in(root)):
        for name in vars(held).get(_FULL, {}):
            if _has(held, name):
                _set(held, name, _full_value(held, name))
        vars(held).pop(_FULL, None)


def _full_value(held: object, name: str) -> Any:
    now = _get(held, name)
    full, written = vars(held).get(_FULL, {}).get(name, (now, now))
    return full if _same(now, written) else now


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    return one is other or bool(one == other)


def _get(held: Any, path: str) -> Any:
    for name in path.split("."):
        held = held[name] if isinstance(held, dict) else getattr(held, name)
    return held


def _has(held: object, path: str) -> bool:
    try:
        _get(held, path)
    except (AttributeError, KeyError):
        return False
    return True


def _set(held: object, path: str, value: Any) -> None:
    *holders, name = path.split(".")
    holder: Any = _get(held, ".".join(holders)) if holders else held
    if isinstance(holder, dict):
        holder[name] = value
        return
    setattr(holder, name, value)
    if hasattr(holder, "make_samplers") and getattr(holder, "device", None) is not None:  # kornia's: drawn from copies
        holder.make_samplers(holder.device, holder.dtype)


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
        if type(held) in _VALUES or id(held) in seen:
            continue
        seen.add(id(held))
        inside: list[Any] = []
        if isinstance(held, _CLOSED):
            continue
        if isinstance(held, MethodType):
            inside = [held.__self__]
        elif isinstance(held, functools.partial):
            inside = [held.func, *held.args, *held.keywords.values()]
        elif isinstance(held, (dict, list, tuple)):
            if type(held) not in _PLAIN:  # somebody's own might read files when asked for what it holds
                continue
            if len(held) <= _LONGEST_LIST or _holds_datasets(held):
                inside = [*held.values()] if isinstance(held, dict) else [*held]
                yield held
        elif isinstance(getattr(held, "__dict__", None), dict):
            inside = [] if is_closed(held) else [value for name, value in vars(held).items() if _is_used(held, name)]
            yield held
        waiting.extend(reversed(inside))


def _is_used(held: object, name: str) -> bool:
    """torchvision's data sets keep their transform a second time, as it was at first."""
    again = name == "transforms" and type(vars(held)[name]).__name__ == "StandardTransform"
    return name != _FULL and not (again and vars(held).get("transform") is not None)


def _no_crop(root: object) -> str:
    steps = [step for pipeline in _pipelines(root) for step in pipeline] or [getattr(root, "transform", root)]
    found = ", ".join(dict.fromkeys(getattr(step, "__name__", type(step).__name__) for step in steps))
    kind = type(root)
    return (
        f"loader must have a data set that holds a known crop, found none in {kind.__module__}.{kind.__qualname__}, "
        f"but {found or 'nothing'}; known: {known()}"
    )


def _has_settings(held: object) -> bool:
    return not isinstance(held, (dict, list, tuple))


def _holds_datasets(held: Any) -> bool:
    return not isinstance(held, dict) and isinstance(held[0], torch.utils.data.Dataset)


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
    known_as = _known_as(held)
    if known_as is None or (known_as[1] in _FOLDERS and not _reads_anew(held)):
        return None if known_as is None else {}
    return _KNOWN[known_as]


def _known_as(held: object) -> tuple[str, str] | None:
    kind = type(held)
    if kind not in _known_kinds:
        names = ((_package(base), base.__name__) for base in kind.__mro__)
        _known_kinds[kind] = next((name for name in names if name in _KNOWN), None)
    return _known_kinds[kind]


_known_kinds: WeakKeyDictionary[type, tuple[str, str] | None] = WeakKeyDictionary()


def _reads_anew(folder: object) -> bool:
    """Whether each sample is read from its file. A class of the user's may keep images, which must be whole then."""
    return _package(getattr(type(folder), "__getitem__", None)) in ("torchvision", "lightly", "solo")


def _package(named: object) -> str:
    return str(getattr(named, "__module__", "")).partition(".")[0]


def _has_kind(held: object, *names: str) -> bool:
    known_as = _known_as(held)
    return known_as is not None and known_as[1] in names


def _check_unknown(held: object) -> None:
    """Raise ValueError if this looks like a blur: it would stay as wide as in a full view."""
    kind = type(held)
    of_network = _package(kind) in ("torch", "timm") or ".random_generator" in kind.__module__  # kornia's have both
    if not callable(held) or of_network:
        return
    settings = [name for name in (*vars(held), *(getattr(held, "flags", None) or ())) if _IN_PIXELS.match(name)]
    if settings or ("blur" in kind.__name__.lower() and not _holds_known_blur(held)):
        what = f" with {settings[0]} in pixels" if settings else ""
        raise ValueError(
            f"loader has a {kind.__module__}.{kind.__qualname__}{what}, which is not known and so cannot be scaled; "
            f"known: {known()}"
        )


def _holds_known_blur(wrapper: object) -> bool:
    """Whether it has its name from what it wraps, as stable-pretraining's modules have around kornia's."""
    return any("blur" in (_known_as(held) or ("", ""))[1].lower() for held in objects_in(wrapper))


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
        inside = [*objects_in(step, _is_pipeline)]
        yield from (held for held in inside if _has_settings(held) and not _is_pipeline(held))
        pipelines = [held for held in inside if _is_pipeline(held)] if id(step) not in opened else []
        opened.add(id(step))
        if len(pipelines) == 1:
            yield from unfold(pipelines[0])
        elif pipelines:
            holders.append(step)

    for holder in holders:
        found += [list(unfold(held)) for held in objects_in(holder, _is_pipeline) if _is_pipeline(held)]
    return found


def _is_pipeline(held: object) -> bool:
    named = any(kind.__name__ in _PIPELINES for kind in type(held).__mro__)
    return named and isinstance(_steps(held), Iterable)


def _steps(pipeline: Any) -> Iterable[Any]:
    return getattr(pipeline, "transforms", pipeline)


def _size_of(held: object) -> Size | None:
    """Height and width of what comes out of a transform, if it alone decides."""
    if not _has_kind(held, *_RESIZES, *_WINDOWS):
        return None
    name = "flags.size" if _package(type(held)) == "kornia" else "size"
    size = _full_value(held, name) if _has(held, name) else None
    if isinstance(size, Sequence):
        return (int(size[0]), int(size[1])) if len(size) == 2 else None
    return None if size is None or _has_kind(held, "Resize") else (size, size)


def _views_of_pipelines(pipelines: list[list[Any]]) -> dict[int, Size | None]:
    """For every step of a pipeline, the size of the full views that leave it: the last crop's."""
    views: dict[int, Size | None] = {}
    for steps in pipelines:
        sizing = [step for step in steps if _has_kind(step, *_RESIZES, *_WINDOWS)]
        if sizing:
            view = _size_of(sizing[-1])
            views.update((id(step), view) for step in steps if id(step) not in views)
    return views


def _check_order(pipelines: list[list[Any]], held_by_root: list[Any]) -> None:
    """Raise ValueError unless what is measured in pixels of a view comes after what gives the view its size."""
    sized: set[int] = set()  # whatever comes after a resize
    for steps in pipelines:
        resizing = next((number for number, step in enumerate(steps) if _has_kind(step, *_RESIZES)), None)
        if resizing is None:
            continue
        earlier = [step for step in steps[:resizing] if _rules(step)]
        if earlier:
            raise ValueError(
                f"loader has a {type(earlier[0]).__name__} before what resizes the image: it is measured in pixels of "
                "the image, not of the view, and so cannot be scaled; put it behind"
            )
        sized.update(id(step) for step in steps[resizing + 1 :])
    for held in held_by_root:
        if _has_kind(held, *_WINDOWS) and id(held) not in sized:
            raise ValueError(
                f"loader has a {type(held).__name__} of the image as it is: a smaller one would show less of it. Put a "
                "Resize before it, in one Compose, or use RandomResizedCrop"
            )
