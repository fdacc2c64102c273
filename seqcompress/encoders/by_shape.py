"""Any ViT, known by what it does and not by its class: DINO's, DINOv2's, Hugging Face's, torchvision's, one's own.

One strided convolution makes the patches, prefix tokens and positions are added, a list of equal blocks follows.
Whether that is all is proven by running the model (``seqcompress.encoders.probe``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from seqcompress.compressors import CompressedPatchEmbed
from seqcompress.compressors.patch_embed import Compression, Size, When
from seqcompress.compressors.patch_scaling import grid_size
from seqcompress.encoders import Family, register
from seqcompress.encoders.family import Encoder
from seqcompress.encoders.hooks import Hook, hook_in, join_at, leave
from seqcompress.encoders.probe import Reached, call_of, difference, first_tensor, tokens_at, undisturbed
from seqcompress.strategy import Strategy

_SIZE_NAMES = ("image_size", "img_size")


class Layout(NamedTuple):
    """Where the parts of a ViT are, as names of modules."""

    projection: str
    blocks: str


class FirstCall(NamedTuple):
    """How a model calls its first block."""

    tokens: torch.Size
    args: tuple[Any, ...]  # beside the tokens
    kwargs: dict[str, Any]


class CompressedProjection(CompressedPatchEmbed):
    """The convolution that makes the patches of a ViT, compressed.

    Positions come from the model's own code: meanwhile it is given a map of zeros for the grid that it would have.
    """

    _OWN = CompressedPatchEmbed._OWN | {"prefix", "size", "takes_other_sizes"}

    prefix: int
    size: Size
    takes_other_sizes: bool

    @property
    def own_patch(self) -> Size:
        height, width = self.embed.kernel_size
        return int(height), int(width)

    @property
    def num_prefix_tokens(self) -> int:
        return self.prefix

    @property
    def projection(self) -> nn.Module | None:
        return self.embed

    @property
    def only_size(self) -> Size | None:
        return None if self.takes_other_sizes else self.size

    def plain_grid(self, view: Size) -> Size | None:
        patch = self.own_patch
        grid = (view[0] // patch[0], view[1] // patch[1])
        return grid if min(grid) > 0 and (self.takes_other_sizes or view == self.size) else None

    def blank_grid(self, view: Size) -> Size:
        grid = self.plain_grid(view) or self.plain_grid(self.size)
        assert grid is not None
        return grid

    def normed(self, tokens: Tensor) -> Tensor:
        return tokens

    def blank(self, tokens: Tensor, blanks: int, grid: Size) -> Tensor:
        return tokens.new_zeros(blanks, tokens.shape[-1], *grid)


class _RefuseMasks(Hook):
    """Forward pre-hook of the whole model: tokens that it masks would be masked among blank ones."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.embed.training or self.embed.strategy == Strategy() or self.embed.trial is not None:
            return
        named = [(f"argument {number}", value) for number, value in enumerate(args)] + list(kwargs.items())
        for name, value in named:
            if isinstance(value, Tensor) and value.ndim in (2, 3) and (value.dtype == torch.bool or "mask" in name):
                raise ValueError(
                    f"{name} must be None while a compressed encoder trains, got a mask of shape {tuple(value.shape)}: "
                    "masked tokens cannot be combined with compression"
                )


@register
class ByShape(Family):
    """Additive positions, any class."""

    supports = (
        "any ViT in which one convolution makes patches, positions are added and equal blocks follow "
        "(DINO, iBOT, DINOv2, Hugging Face, torchvision)"
    )
    general = True

    def matches(self, model: nn.Module) -> bool:
        return _layout(model) is not None

    def check(self, encoder: Encoder, strategies: Iterable[Strategy]) -> None:
        for strategy in strategies:
            if strategy.patch_size is not None:
                grid_size(self.image_size(encoder), (strategy.patch_size, strategy.patch_size))

    def attach(
        self, encoder: Encoder, compression: Compression, *, drops_tokens: bool, when: When
    ) -> CompressedPatchEmbed:
        layout = self._layout(encoder)
        size, prefix = self.image_size(encoder), self.num_prefix_tokens(encoder)
        takes_other_sizes, places = self._takes_other_sizes(encoder), self._places(encoder, prefix)
        projection = encoder.get_submodule(layout.projection)
        embed = CompressedProjection(projection, encoder, compression, drops_tokens=drops_tokens, when=when)
        embed.prefix, embed.size, embed.takes_other_sizes = prefix, size, takes_other_sizes
        _replace(encoder, layout.projection, embed)
        # The earliest place behind the positions: dropout and norms before the blocks then see the kept patches.
        for number in range(len(places)):
            leave(embed)
            hook_in(encoder, _RefuseMasks(embed))
            join_at(embed, *places[number:])
            if any(_gives_own_tokens(self, encoder, embed) for embed.blank_per_view in (False, True)):
                break
        return embed

    def detach(self, encoder: Encoder) -> None:
        layout = _layout(encoder)
        embed = None if layout is None else encoder.get_submodule(layout.projection)
        if isinstance(embed, CompressedProjection):
            leave(embed)
            _replace(encoder, layout.projection, embed.embed)  # type: ignore[union-attr]

    def first_tokens(self, encoder: Encoder, views: Tensor) -> Tensor:
        return tokens_at(encoder, (self._blocks(encoder)[0],), views)

    def last_tokens(self, encoder: Encoder, views: Tensor) -> Tensor:
        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise Reached(first_tensor(output))

        handle = self._blocks(encoder)[-1].register_forward_hook(stop)
        try:
            encoder.forward(views)
        except Reached as reached:
            tokens: Tensor = reached.values
            return tokens
        finally:
            handle.remove()
        raise RuntimeError(f"{type(encoder).__name__} has not reached its last block")

    def grid(self, encoder: Encoder, view: Size, patch: Size) -> Size:
        own = self.patch_size(encoder)
        if patch == own and view[0] >= own[0] and view[1] >= own[1]:
            return view[0] // own[0], view[1] // own[1]
        return grid_size(view, patch)

    def patch_size(self, encoder: Encoder) -> Size:
        height, width = self._projection(encoder).kernel_size
        return int(height), int(width)

    def channels(self, encoder: Encoder) -> int:
        return int(self._projection(encoder).in_channels)

    def width(self, encoder: Encoder) -> int:
        return int(self._projection(encoder).out_channels)

    def projection_size(self, encoder: Encoder) -> int:
        return int(self._projection(encoder).weight.numel())

    def image_size(self, encoder: Encoder) -> Size:
        path = self._layout(encoder).projection
        holders = [getattr(encoder, "config", None), encoder]
        while "." in path:
            path = path.rpartition(".")[0]
            holders.append(encoder.get_submodule(path))
        for holder in holders:
            for name in _SIZE_NAMES:
                size = getattr(holder, name, None)
                if isinstance(size, int):
                    return size, size
                if isinstance(size, (tuple, list)) and len(size) == 2:
                    return int(size[0]), int(size[1])
        raise TypeError(
            f"a {type(encoder).__name__} must tell in image_size or img_size for which size of views it is made"
        )

    def num_prefix_tokens(self, encoder: Encoder) -> int:
        embed = self._projection(encoder)
        if isinstance(embed, CompressedProjection):
            return embed.prefix
        grid = self.grid(encoder, self.image_size(encoder), self.patch_size(encoder))
        tokens = self._first_call(encoder).tokens
        if len(tokens) != 3 or tokens[1] < math.prod(grid):
            raise TypeError(
                f"a {type(encoder).__name__} must bring {math.prod(grid)} patches to its first block, got a tensor "
                f"of shape {tuple(tokens)}"
            )
        return tokens[1] - math.prod(grid)

    def _first_call(self, encoder: Encoder) -> FirstCall:
        if encoder not in _first_calls:
            with undisturbed(encoder):
                args, kwargs = call_of(
                    encoder, (self._blocks(encoder)[0],), self._zeros(encoder, self.image_size(encoder))
                )
            tokens, others = first_tensor((args, kwargs)), dict(kwargs)
            if not args:
                others.pop(next(name for name, value in kwargs.items() if value is tokens))
            _first_calls[encoder] = FirstCall(tokens.shape, args[1:], others)
        return _first_calls[encoder]

    def after_embedding(self, encoder: Encoder, tokens: Tensor) -> Tensor:
        _, args, kwargs = self._first_call(encoder)
        for block in self._blocks(encoder):
            tokens = first_tensor(block(tokens, *args, **kwargs))
        return tokens

    def _layout(self, encoder: Encoder) -> Layout:
        layout = _layout(encoder)
        if layout is None:
            raise TypeError(
                f"a {type(encoder).__name__} is no ViT any more: its convolution or its blocks have changed"
            )
        return layout

    def _projection(self, encoder: Encoder) -> Any:
        return encoder.get_submodule(self._layout(encoder).projection)

    def _blocks(self, encoder: Encoder) -> list[nn.Module]:
        return list(encoder.get_submodule(self._layout(encoder).blocks).children())

    def _zeros(self, encoder: Encoder, size: Size) -> Tensor:
        weight = self._projection(encoder).weight
        return torch.zeros(1, self.channels(encoder), *size, device=weight.device, dtype=weight.dtype)

    def _takes_other_sizes(self, encoder: Encoder) -> bool:
        size, patch = self.image_size(encoder), self.patch_size(encoder)
        other = (size[0] + patch[0], size[1] + patch[1])
        try:
            with undisturbed(encoder):
                self.first_tokens(encoder, self._zeros(encoder, other))
        except Exception:
            return False
        return True

    def _places(self, encoder: Encoder, prefix: int) -> list[nn.Module]:
        """Modules that see a whole sequence before the first block does, in order, and that block."""
        first = self._blocks(encoder)[0]
        within = {module for block in self._blocks(encoder) for module in block.modules()}
        tokens = prefix + math.prod(self.grid(encoder, self.image_size(encoder), self.patch_size(encoder)))
        seen: list[nn.Module] = []

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape[:-1] == (1, tokens) and module not in seen:
                seen.append(module)

        with undisturbed(encoder):
            modules = [module for module in encoder.modules() if module not in within]
            handles = [module.register_forward_pre_hook(note) for module in modules]
            try:
                self.first_tokens(encoder, self._zeros(encoder, self.image_size(encoder)))
            finally:
                for handle in handles:
                    handle.remove()
        return [*seen, first]


_first_calls: WeakKeyDictionary[nn.Module, FirstCall] = WeakKeyDictionary()


def _gives_own_tokens(family: ByShape, encoder: Encoder, embed: CompressedPatchEmbed) -> bool:
    return difference(family, encoder, embed, blocks=False) is None


def _replace(encoder: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    encoder.get_submodule(parent)._modules[name] = module


def _layout(model: nn.Module) -> Layout | None:
    """The parts of a ViT, if ``model`` is one, and not what holds one beside other things."""
    lists = list(_lists_of_blocks(model))
    if len(lists) != 1:
        return None
    blocks = lists[0]
    projections = [
        name
        for name, module in model.named_modules()
        if not name.startswith(f"{blocks}.") and name and _makes_patches(module)
    ]
    if len(projections) != 1:
        return None
    own = {name.partition(".")[0] for name in (projections[0], blocks)}
    return Layout(projections[0], blocks) if len(own) == 2 else None


def _makes_patches(module: nn.Module) -> bool:
    conv = module.embed if isinstance(module, CompressedProjection) else module
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == conv.stride != (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


def _lists_of_blocks(model: nn.Module, path: str = "") -> Iterator[str]:
    """Names of the outermost lists of modules with attention that are equal in kind and in their parameters' shapes."""
    for name, child in model.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _are_blocks(list(child.children())):
            yield inner
        else:
            yield from _lists_of_blocks(child, inner)


def _are_blocks(children: list[nn.Module]) -> bool:
    if not children or isinstance(children[0], (nn.ModuleList, nn.Sequential)):
        return False
    if len({type(child) for child in children}) > 1 or not _has_attention(children[0]):
        return False
    shapes = Counter(tuple((name, value.shape) for name, value in child.named_parameters()) for child in children)
    return len(shapes) == 1


def _has_attention(block: nn.Module) -> bool:
    return any(
        "atten" in type(module).__name__.lower() or "attn" in name.lower() for name, module in block.named_modules()
    )
