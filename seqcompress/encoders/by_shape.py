"""Any ViT, known by what it does and not by its class: DINO's, DINOv2's, Hugging Face's, torchvision's, one's own.

One strided convolution makes the patches, prefix tokens and positions are added, a list of equal blocks follows.
Positions may also be made by one module and given to every block, as rotations of queries and keys.
Whether that is all is proven by running the model (``seqcompress.encoders.probe``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from seqcompress.compressors.selection import Selection
from seqcompress.encoders.compression import Compression
from seqcompress.encoders.encoder import Encoder, Size
from seqcompress.encoders.hooks import Hook, add_forward_hook, add_pre_hook, join_at, remove_hooks
from seqcompress.encoders.masks import refuse_tokens_named
from seqcompress.encoders.patch_embed import CompressedPatchEmbed, When
from seqcompress.encoders.probe import (
    call_of,
    difference,
    first_tensor,
    tensors_in,
    tokens_at,
    undisturbed,
    without_values,
)
from seqcompress.encoders.registry import SUPPORTED_VITS, register
from seqcompress.strategy import Strategy

_SIZE_NAMES = ("image_size", "img_size")


class Layout(NamedTuple):
    """Where the parts of a ViT are, as names of modules."""

    projection: str
    blocks: str


class FirstCall(NamedTuple):
    """How a model calls its first block."""

    tokens: Tensor  # (1, P + N, D), somewhere among these:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _LookAtCall(Hook):
    """Forward pre-hook of the whole model: what the user's call asks for, beside features of views.

    Tokens that are masked would be masked among blank ones. Hugging Face's models take views of another size where they
    are asked to; a model of one size is given blank views of that size where a loader has made them smaller.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        encoder = self.embed.encoder
        assert isinstance(encoder, AnyVisionTransformer)
        encoder.interpolates = bool(kwargs.get("interpolate_pos_encoding"))
        self.embed.small_views = None
        if not self.embed.is_training or self.embed.trial is not None:
            return args, kwargs
        named = [(f"argument {number}", value) for number, value in enumerate(args)] + list(kwargs.items())
        for name, value in [] if self.embed.strategy == Strategy() else named:
            is_mask = isinstance(value, Tensor) and (value.dtype == torch.bool or "mask" in name)
            if is_mask and value.ndim in (2, 3) and not encoder.masks_tokens:
                refuse_tokens_named(name, value)
        return tuple(map(self._of_its_size, args)), {name: self._of_its_size(value) for name, value in kwargs.items()}

    def _of_its_size(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != 4:
            return value
        encoder, view = self.embed.encoder, (value.shape[2], value.shape[3])
        self.embed.compression.observe(view)
        if encoder.plain_grid(view) is not None or self.embed.compression.full_size(view) == view:
            return value
        self.embed.small_views = value
        return value.new_zeros(()).expand(*value.shape[:2], *encoder.image_size)


class _LookAtOutput(Hook):
    """Forward hook of the whole model: what it folds to a map is none, where patches are dropped or larger.

    It also notes whether patches of this call have come to a block, and that the call is over which ``_LookAtCall`` has
    looked at.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.embed.is_training and self.embed.trial is None:
            self.embed.joining.end()
        encoder, selection = self.embed.encoder, self.embed.selection
        assert isinstance(encoder, AnyVisionTransformer)
        grid = None if selection is None else encoder.plain_grid(selection.view)
        encoder.interpolates = False  # the call that asked for it is over
        if selection is None:
            return
        numbers = encoder.width * selection.patches
        for value in tensors_in(output):
            if value.ndim == 4 and value.shape[-2:] == grid and value.numel() == len(value) * numbers:
                refuse_map(self.embed)


def refuse_map(embed: CompressedPatchEmbed) -> None:
    """Raise RuntimeError if the last forward has left no patches that make a map of the plain model's grid."""
    selection = embed.selection if embed.is_training and embed.trial is None else None
    grid = None if selection is None else embed.encoder.plain_grid(selection.view)
    if selection is not None and grid is not None and selection.patches != math.prod(grid):
        raise RuntimeError(
            f"a compressed encoder that trains has no feature map of {grid[0]} x {grid[1]}, but {selection.patches} "
            "patches: use its eval mode, or features that are sequences"
        )


class _RotationsOfGrid(Hook):
    """Forward pre-hook of the module that makes rotations: they are wanted for the grid that views are cut into."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        selection = self.embed.selection if self.embed.is_training else None
        if selection is None:
            return args, kwargs
        encoder = self.embed.encoder
        sides = iter(selection.grid)

        def of_grid(value: Any) -> Any:
            if isinstance(value, int) and not isinstance(value, bool):
                return next(sides, value)
            if isinstance(value, Tensor) and value.shape[-2:] == selection.view:  # views, for their size
                size = [side * patch for side, patch in zip(selection.grid, encoder.patch_size, strict=True)]
                return value.new_zeros(()).expand(1, value.shape[1], *size)
            return value

        return tuple(map(of_grid, args)), {name: of_grid(value) for name, value in kwargs.items()}


class KeptRotations(Hook):
    """Forward hook of the module that makes rotations: those of the kept patches, (B, 1, K, d) of (N, d)."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        selection = self.selection(args, kwargs)
        kept = None if selection is None else selection.kept
        if kept is None and not self.embed.is_probed:
            return output

        def of_kept(rotations: Tensor) -> Tensor:
            if self.embed.is_probed:  # rounded to half precision, they would hide small differences
                weight = next(self.embed.encoder.patch_embed.parameters())
                rotations = rotations.to(torch.promote_types(rotations.dtype, weight.dtype))
            return rotations if kept is None else F.embedding(kept, rotations).unsqueeze(1)

        return of_kept(output) if isinstance(output, Tensor) else type(output)(map(of_kept, output))

    def selection(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Selection | None:
        """Whose patches' rotations are asked for by this call."""
        return self.embed.selection if self.embed.is_training else None


@register
class AnyVisionTransformer(Encoder):
    """Additive positions, any class. Positions come from the model's own code, given a map of zeros for its grid."""

    general = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        layout = _layout(model)
        assert layout is not None  # recognises() has looked
        self._names = layout
        self.interpolates = False  # whether the current call asks for positions of another grid

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_first_call"}

    def clear_cache(self) -> None:
        for name in ("image_size", "num_prefix_tokens", "_first_call", "_takes_other_sizes", "_unchecked"):
            vars(self).pop(name, None)

    @staticmethod
    def recognises(model: nn.Module) -> bool:
        return _layout(model) is not None

    @staticmethod
    def rejection_reason(model: nn.Module) -> str | None:
        lists = list(_lists_of_blocks(model))
        if len(lists) > 1:
            return f"has {len(lists)} lists of blocks ({', '.join(lists)}), and not one"
        names = _projections(model, lists[0] if lists else "")
        if lists and len(names) > 1:
            return f"has {len(names)} convolutions that make patches ({', '.join(names)}), and not one"
        if lists:
            return None if names else "has no convolution outside its blocks whose stride is its kernel"
        unequal = list(_lists_of_blocks(model, equal=False))
        if len(unequal) == 1:
            return f"has blocks (.{unequal[0]}) whose parameters differ in their shapes"
        return "has no list of blocks in which something is called attn or attention" if names else None

    @property
    def patch_size(self) -> Size:
        height, width = self.patch_embed.kernel_size
        return int(height), int(width)

    @cached_property
    def image_size(self) -> Size:
        path = self._names.projection
        holders = [getattr(self.model, "config", None), self.model]
        while "." in path:
            path = path.rpartition(".")[0]
            holders.append(self.model.get_submodule(path))
        for holder in holders:
            for name in _SIZE_NAMES:
                size = getattr(holder, name, None)
                if isinstance(size, int):
                    return size, size
                if isinstance(size, (tuple, list)) and len(size) == 2:
                    return int(size[0]), int(size[1])
        raise TypeError(
            f"a {type(self.model).__name__} must tell in image_size or img_size for which size of views it is made"
        )

    @property
    def channels(self) -> int:
        return int(self.patch_embed.in_channels)

    @property
    def width(self) -> int:
        return int(self.patch_embed.out_channels)

    @cached_property
    def num_prefix_tokens(self) -> int:
        patches, tokens = math.prod(self._own_grid), self._first_call.tokens.shape
        if len(tokens) != 3 or tokens[1] < patches:
            raise TypeError(
                f"a {type(self.model).__name__} must bring {patches} patches to its first block, got a tensor of "
                f"shape {tuple(tokens)}. {SUPPORTED_VITS}"
            )
        return tokens[1] - patches

    @property
    def only_size(self) -> Size | None:
        return None if self.interpolates or self._takes_other_sizes else self.image_size

    def plain_grid(self, view: Size) -> Size | None:
        patch = self.patch_size
        grid = (view[0] // patch[0], view[1] // patch[1])
        takes_all = self.interpolates or self._takes_other_sizes
        takes_it = view == self.image_size or takes_all or self._kind(grid) in self._unchecked
        return grid if min(grid) > 0 and takes_it else None

    def check(self, strategies: Iterable[Strategy]) -> None:
        strategies = tuple(strategies)
        super().check(strategies)
        config = getattr(self.model, "config", None)
        folds = hasattr(self.model, "out_features") and getattr(config, "reshape_hidden_states", False)
        if folds and any(strategy not in (Strategy(), Strategy(0.0, min(self.patch_size))) for strategy in strategies):
            raise ValueError(
                f"reshape_hidden_states must be False in the config of a {type(self.model).__name__}, which otherwise "
                "folds its features to maps: patches that are dropped or larger make none"
            )

    @property
    def patch_embed(self) -> Any:
        conv = self.model.get_submodule(self._names.projection)
        return conv.embed if isinstance(conv, CompressedPatchEmbed) else conv

    @property
    def projection(self) -> Any:
        return self.patch_embed

    def blank_grid(self, view: Size) -> Size:
        return self.plain_grid(view) or self._own_grid

    def blank(self, tokens: Tensor, blanks: int, grid: Size) -> Tensor:
        return tokens.new_zeros(blanks, tokens.shape[-1], *grid)

    def attach(self, compression: Compression, *, drops_tokens: bool, when: When) -> CompressedPatchEmbed:
        # All that the plain model shows of itself, before anything is changed.
        places, rotary, _, _ = self._places(), self._rotary(), self._takes_other_sizes, self._unchecked
        embed = CompressedPatchEmbed(self, compression, drops_tokens=drops_tokens, when=when)
        self.model.set_submodule(self._names.projection, embed)
        # The earliest place behind the positions: dropout and norms before the blocks then see the kept patches.
        for number in range(len(places)):
            remove_hooks(embed)
            add_pre_hook(self.model, _LookAtCall(embed))
            add_forward_hook(self.model, _LookAtOutput(embed))
            self.follow_positions(embed, rotary)
            join_at(embed, *places[number:])
            if any(difference(embed, blocks=False) is None for embed.blank_per_view in (False, True)):
                break
        return embed

    def follow_positions(self, embed: CompressedPatchEmbed, rotary: nn.Module | None) -> None:
        """Have what else is made of positions made for the patches of each forward."""
        if rotary is not None:
            add_pre_hook(rotary, _RotationsOfGrid(embed))
            add_forward_hook(rotary, KeptRotations(embed))

    def detach(self) -> None:
        embed = self.model.get_submodule(self._names.projection)
        if isinstance(embed, CompressedPatchEmbed):
            remove_hooks(embed)
            self.model.set_submodule(self._names.projection, embed.embed)

    def first_tokens(self, views: Tensor) -> Tensor:
        return tokens_at(self.model, (self.blocks[0],), views)

    def changes_views(self) -> bool:
        if self._takes_other_sizes or without_values(self.model) is not None:
            return False
        with undisturbed(self.model):
            views = torch.rand_like(self._zeros(self.image_size))
            seen = tokens_at(self.model, (self.model.get_submodule(self._names.projection),), views)
        return not torch.equal(seen, views)

    def after_embedding(self, tokens: Tensor) -> Tensor:
        first, args, kwargs = self._first_call
        patches, others = math.prod(self._own_grid), tokens.shape[1] - self.num_prefix_tokens

        def of_length(value: Any) -> Any:
            if value is first:
                return tokens
            if isinstance(value, (tuple, list)):
                return type(value)(map(of_length, value))
            is_of_patches = isinstance(value, Tensor) and value.ndim == 2 and len(value) == patches
            return value.new_zeros(others, value.shape[1], device=tokens.device) if is_of_patches else value

        for block in self.blocks:
            output = block(*map(of_length, args), **{name: of_length(value) for name, value in kwargs.items()})
            tokens = first_tensor(output)
        return tokens

    @property
    def blocks(self) -> list[nn.Module]:
        return _blocks_in(self.model.get_submodule(self._names.blocks))

    @property
    def _own_grid(self) -> Size:
        size, patch = self.image_size, self.patch_size
        return size[0] // patch[0], size[1] // patch[1]

    @cached_property
    def _first_call(self) -> FirstCall:
        try:
            with undisturbed(self.model):
                args, kwargs = call_of(self.model, (self.blocks[0],), self._zeros(self.image_size))
        except Exception as error:
            name, (height, width) = type(self.model).__name__, self.image_size
            if (problem := without_values(self.model)) is not None:
                raise TypeError(f"a {name} cannot be proven: {problem}") from error
            raise TypeError(
                f"a {name} must run on views alone, in eval mode, got {type(error).__name__}: "
                f"{str(error).strip() or 'no reason'} (on a view of {height} x {width} px, its own size)"
            ) from error
        return FirstCall(first_tensor((args, kwargs)), args, kwargs)

    @cached_property
    def _takes_other_sizes(self) -> bool:
        size, patch = self.image_size, self.patch_size
        try:
            with undisturbed(self.model):
                self.first_tokens(self._zeros((size[0] + patch[0], size[1] + patch[1])))
        except Exception:
            return False
        return True

    @cached_property
    def _unchecked(self) -> frozenset[str]:
        """Views of which kinds a model of one size takes all the same: one that looks at no more than their number of
        patches, or not at what is left over at their edges."""
        if self._takes_other_sizes:
            return frozenset()
        size, patch = self.image_size, self.patch_size
        patches, (rows, columns) = math.prod(self._own_grid), self._own_grid
        whole, odd = (rows * patch[0], columns * patch[1]), ((rows + 1) * patch[0] - 1, (columns + 1) * patch[1] - 1)
        views: tuple[Size, ...] = (
            whole if odd == size else odd,
            (patches * patch[0], patch[1]),
            (patch[0], patches * patch[1]),
            (size[0] - patch[0], size[1] - patch[1]),
        )
        return frozenset(
            self._kind((view[0] // patch[0], view[1] // patch[1]))
            for view in views
            if view != size and min(view) > 0 and self._takes(view)
        )

    def _kind(self, grid: Size) -> str:
        more = math.prod(grid) - math.prod(self._own_grid)
        if grid == self._own_grid:
            return "own grid"
        return "as many patches" if more == 0 else "more patches" if more > 0 else "fewer patches"

    def _takes(self, view: Size) -> bool:
        """Whether the plain model brings the patches of such a view to its first block, and no others."""
        patch = self.patch_size
        try:
            with undisturbed(self.model):
                tokens = self.first_tokens(self._zeros(view))
        except Exception:
            return False
        return tokens.shape[1] == self.num_prefix_tokens + view[0] // patch[0] * (view[1] // patch[1])

    def _rotary(self) -> nn.Module | None:
        """The module outside the blocks that makes what they are given for each patch, (N, d), if there is one."""
        made: dict[int, nn.Module] = {}
        seen: list[Tensor] = []  # alive, so that none of them has another's id

        def remember(module: nn.Module, args: Any, output: Any) -> None:
            for value in tensors_in(output):
                seen.append(value)
                made.setdefault(id(value), module)

        call = self._run_with(lambda module: module.register_forward_hook(remember))
        given = [value for value in tensors_in(call) if value.ndim == 2]
        makers = {made.get(id(value)) for value in given if len(value) == math.prod(self._own_grid)}
        return makers.pop() if len(makers) == 1 else None

    def _places(self) -> list[nn.Module]:
        """Modules that see a whole sequence before the first block does, in order, and that block."""
        tokens = self.num_prefix_tokens + math.prod(self._own_grid)
        seen: list[nn.Module] = []

        def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape[:-1] == (1, tokens) and module not in seen:
                seen.append(module)

        self._run_with(lambda module: module.register_forward_pre_hook(remember))
        return [*seen, self.blocks[0]]

    def _run_with(self, hook: Callable[[nn.Module], RemovableHandle]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Run to the first block, whose arguments are returned, with a hook on every module outside the blocks."""
        within = {module for block in self.blocks for module in block.modules()}
        outside = [module for module in self.model.modules() if module not in within]
        with undisturbed(self.model), ExitStack() as hooked:
            for module in outside:
                hooked.enter_context(hook(module))
            return call_of(self.model, (self.blocks[0],), self._zeros(self.image_size))

    def _zeros(self, size: Size) -> Tensor:
        weight = self.patch_embed.weight
        return torch.zeros(1, self.channels, *size, device=weight.device, dtype=weight.dtype)


def _layout(model: nn.Module) -> Layout | None:
    """The parts of a ViT, if ``model`` is one, and not what holds one beside other things."""
    lists = list(_lists_of_blocks(model))
    if len(lists) != 1:
        return None
    blocks = lists[0]
    projections = _projections(model, blocks)
    if len(projections) != 1:
        return None
    own = {name.partition(".")[0] for name in (projections[0], blocks)}
    return Layout(projections[0], blocks) if len(own) == 2 else None


def _projections(model: nn.Module, blocks: str) -> list[str]:
    """Names of the convolutions that make patches."""
    return [
        name
        for name, module in model.named_modules()
        if not name.startswith(f"{blocks}.") and name and _makes_patches(module)
    ]


def _makes_patches(module: nn.Module) -> bool:
    conv = module.embed if isinstance(module, CompressedPatchEmbed) else module
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == conv.stride != (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


def _lists_of_blocks(model: nn.Module, path: str = "", *, equal: bool = True) -> Iterator[str]:
    """Names of the outermost lists of modules with attention, equal in kind and in their parameters' shapes."""
    for name, child in model.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _are_blocks(_blocks_in(child), equal):
            yield inner
        else:
            yield from _lists_of_blocks(child, inner, equal=equal)


def _blocks_in(container: nn.Module) -> list[nn.Module]:
    """Those of a list, and of the pieces that it may be cut in, which DINOv2 fills up with what does nothing."""
    found: list[nn.Module] = []
    for child in container.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            found += _blocks_in(child)
        elif not isinstance(child, nn.Identity):
            found.append(child)
    return found


def _are_blocks(children: list[nn.Module], equal: bool) -> bool:
    if len({type(child) for child in children}) != 1 or not _has_attention(children[0]):
        return False
    shapes = Counter(tuple((name, value.shape) for name, value in child.named_parameters()) for child in children)
    return len(shapes) == 1 or not equal


def _has_attention(block: nn.Module) -> bool:
    return any(
        "atten" in type(module).__name__.lower() or "attn" in name.lower() for name, module in block.named_modules()
    )
