"""Both compressors as one module around a ViT's patch embedding.

Prefix tokens and positions do not depend on the image. So a compressed forward lets the model do what it
always does between its patch embedding and its first block, but once, on a single blank view: what comes out
is its prefix tokens and its positions, whatever kind they are. Those are joined with the patches that are
really embedded (few, and perhaps larger) just before position dropout, or before the first block. That this gives
the model's own tokens is proven for every model when it is compressed (``seqcompress.encoders.probe``).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import Any, Literal, NamedTuple, cast
from weakref import WeakSet

import torch
import torch.nn.functional as F
from timm.layers.format import Format, nchw_to
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, distributed, nn

from seqcompress.compressors.compression import Compression
from seqcompress.compressors.patch_scaling import (
    fit_to_grid,
    grid_size,
    resample_patches,
    resample_positions,
    resample_views,
    resize_pinv,
)
from seqcompress.compressors.tables import in_function_transform, is_fake
from seqcompress.compressors.token_dropout import (
    gather_patches,
    in_backward,
    num_kept,
    random_subset,
    rows_of_patches,
)
from seqcompress.strategy import Strategy

__all__ = ["CompressedPatchEmbed", "Compression", "When"]

When = Literal["grad", "train"]
Size = tuple[int, int]


class Forward(NamedTuple):
    """One kind of training forward, for the tally."""

    view: tuple[int, ...]  # (B, C, H, W)
    tokens: int  # a view, prefix tokens included
    graph: bool  # whether a backward pass follows


class _Selection(NamedTuple):
    """What one compressed forward does with its views."""

    view: Size
    grid: Size
    patch: Size
    area: Size  # height and width of the part of the view that is cut into patches, from its upper left corner
    kept: Tensor | None  # (B, K), or None for all patches
    patch_rows: Tensor | None  # where each patch's pixels are, (N, C * h)
    rows: Tensor | None
    columns: Tensor | None


class _Pending(NamedTuple):
    """Embedded patches on their way to where positions are known."""

    tokens: Tensor  # (B, K, D)
    view: Size
    grid: Size
    kept: Tensor | None
    own_grid: Size  # for which the model makes positions meanwhile,
    blanks: int  # and for how many views
    marked: bool  # whether the second of these is marked, to see that nothing is put in its tokens' place


class CompressedPatchEmbed(nn.Module):
    """A patch embedding that can drop tokens and scale patches; otherwise the one it wraps.

    Parameters, buffers, children and hooks are those of the wrapped embedding, under their own names, so that
    nothing changes in a state dict or for an optimizer. Attributes are read from and written to it too.

    Args:
        embed: the patch embedding to wrap.
        encoder: the model it belongs to; must have ``num_prefix_tokens``.
        compression: strategy and random stream, shared by all encoders compressed together.
        drops_tokens: False for a teacher, which only scales patches.
        when: "grad" compresses forwards in train mode that build a graph, "train" all in train mode.
    """

    embed: Any
    encoder: Any
    compression: Compression
    drops_tokens: bool
    when: When
    tally: Counter[Forward]
    blank_per_view: bool  # whether the model takes the batch size from its images: its tokens must be as many
    places: tuple[nn.Module, ...]  # where patches may meet their positions: what has our hooks
    trial: Tensor | None  # patches to keep, while a probe runs
    _warned: set[str]
    _looked_at: set[Size]  # sizes of views
    _selection: _Selection | None
    _pending: _Pending | None
    _joined: int | None
    _joining: bool  # apart from the two above: compiled code may look at it without a guard on lengths
    _shortened: tuple[Size, bool] | None  # grid of the last forward, and whether all of it was kept

    _OWN = frozenset({"embed", "encoder", "compression", "drops_tokens", "when", "tally", "training"}) | frozenset(
        {"blank_per_view", "places", "trial", "_warned", "_looked_at"}
        | {"_selection", "_pending", "_joined", "_joining", "_shortened"}
    )

    def __init__(
        self, embed: nn.Module, encoder: nn.Module, compression: Compression, *, drops_tokens: bool, when: When
    ) -> None:
        super().__init__()
        for name, registry in vars(embed).items():
            if name in vars(self) and isinstance(registry, (dict, set)):
                vars(self)[name] = registry
        # Not registered as children: neither may add a name to the state dict.
        vars(self).update(
            embed=embed,
            encoder=encoder,
            compression=compression,
            drops_tokens=drops_tokens,
            when=when,
            tally=Counter(),
            blank_per_view=False,
            places=(),
            trial=None,
            training=embed.training,
            _warned=set(),
            _looked_at=set(),
            _selection=None,
            _pending=None,
            _joined=None,
            _joining=False,
            _shortened=None,
        )
        _live.add(self)

    def __getstate__(self) -> dict[str, Any]:
        # A forward that failed halfway leaves its patches waiting; a copy has no use for them.
        return {**vars(self), "_selection": None, "_pending": None, "_joined": None, "_joining": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _live.add(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "embed" not in vars(self):  # not set up yet: copy and pickle ask early
                raise
            return getattr(vars(self)["embed"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # of this module, as FSDP does it, and not of the embedding inside
            object.__setattr__(self, name, value)
        elif name in self._OWN:
            vars(self)[name] = value
        else:
            setattr(self.embed, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.embed, name)

    def train(self, mode: bool = True) -> CompressedPatchEmbed:
        self.embed.training = mode
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        return f"strategy={self.strategy}, when={self.when}, teacher={not self.drops_tokens}"

    @property
    def strategy(self) -> Strategy:
        """The strategy as it concerns this encoder: without dropout for a teacher."""
        strategy = self.compression.strategy
        return strategy if self.drops_tokens else strategy.without_dropout()

    # What a patch embedding of another kind knows otherwise:

    @property
    def own_patch(self) -> Size:
        """Height and width of the model's own patches, in pixels."""
        return patch_size(self.embed)

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens."""
        return int(self.encoder.num_prefix_tokens)

    @property
    def projection(self) -> nn.Module | None:
        """What maps each patch on its own, so that patches can be chosen and scaled; None where nothing does."""
        return self.embed.proj if embeds_patches(self.embed) else None

    @property
    def only_size(self) -> Size | None:
        """Height and width of the only views that the plain model takes, or None if it takes more."""
        return self.embed.img_size if getattr(self.embed, "strict_img_size", False) else None

    def plain_grid(self, view: Size) -> Size | None:
        """Patches along each side of a view in the plain model; None if it refuses such a view."""
        return plain_grid(self.embed, view)

    def blank_grid(self, view: Size) -> Size:
        """For which grid the model makes positions, if it is given blank views instead of these."""
        height, width = self.embed.grid_size
        return height, width

    def normed(self, tokens: Tensor) -> Tensor:
        """What the embedding does to tokens (B, K, D) after projecting them."""
        return self.embed.norm(tokens)

    def blank(self, tokens: Tensor, blanks: int, grid: Size) -> Tensor:
        """The embedding of blank views, all zero, in the format the model expects."""
        height, width = grid
        if getattr(self.embed, "flatten", True):
            return tokens.new_zeros(blanks, height * width, tokens.shape[-1])  # (b, N, D)
        return nchw_to(tokens.new_zeros(blanks, tokens.shape[-1], height, width), self.embed.output_fmt)

    def grid(self, view: Size, patch: Size) -> Size:
        """Patches along each side of a view: the plain model's under its own patch size, where it takes the view.

        Raises:
            ValueError: the patch is larger than a side of the view.
        """
        own = self.plain_grid(view) if patch == self.own_patch else None
        return grid_size(view, patch) if own is None else own

    def partners(self) -> list[CompressedPatchEmbed]:
        """All embeddings that share this one's compression, itself included."""
        return [other for other in _live if other.compression is self.compression]

    @property
    def is_live(self) -> bool:
        """Whether the encoder still has this patch embedding."""
        return self in _live

    def release(self) -> None:
        """Take leave of the partners: the encoder has its plain patch embedding back."""
        _live.discard(self)

    def dynamic_feat_size(self, img_size: Size) -> Size:
        """The grid that timm folds tokens into for feature maps: that of the last forward.

        Raises:
            RuntimeError: the last forward dropped tokens.
        """
        if not self.training or self._shortened is None:
            return self.embed.dynamic_feat_size(img_size)
        grid, complete = self._shortened
        if not complete:
            raise RuntimeError("dropped tokens leave no feature map: use eval mode, or output_fmt='NLC'")
        return grid

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Embed views; compressed forwards return a blank and keep the patches for ``join``.

        Hooks run within, as everywhere: around what is really embedded, not around the blank.
        """
        embedded: Tensor = super().__call__(*args, **kwargs)
        return self._wait_for_positions(embedded) if self.training and self._joining else embedded

    def forward(self, views: Tensor) -> Tensor:
        """Embed views (B, C, H, W): all of their patches, or those that are kept, (B, K, D)."""
        if isinstance(views, torch.fx.Proxy):
            raise RuntimeError("a compressed encoder cannot be traced by torch.fx: restore(model) first")
        if self.training:
            return self._forward_in_training(views)
        if not self.drops_tokens and not _is_exporting():
            self._count_in_eval(views)
        return self.embed.forward(views)

    def __prepare_scriptable__(self) -> None:
        """What ``torch.jit.script`` asks for first.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a compressed encoder cannot be scripted: restore(model) first")

    def join(self, blank: Tensor) -> Tensor:
        """Replace the model's tokens of the blank view by those of the views that were embedded.

        Args:
            blank: prefix tokens and positions as the model made them for blank views, (1 or more, P + N, D).

        Returns:
            Tokens of shape (B, P + K, D), prefix tokens first; ``blank`` itself if nothing is waiting.

        Raises:
            RuntimeError: something adds or takes away tokens before the first block: masks or prompts, for instance.
        """
        return self._join_in_training(blank) if self.training and self._joining else blank

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count_in_eval(self, views: Tensor) -> None:
        """A teacher may train its student in eval mode: plain, and not for nothing."""
        if not any(partner.drops_tokens and partner.training for partner in self.partners()):
            return
        grid = self.plain_grid((views.shape[2], views.shape[3])) if views.ndim == 4 else None
        if grid is None:
            return
        tokens = self.num_prefix_tokens + math.prod(grid)
        self.tally[Forward(tuple(views.shape), tokens, False)] += 1
        if self.strategy != Strategy():
            self._warn(
                "teacher in eval mode",
                "a teacher in eval mode is not compressed: it sees all patches, at their own size, and costs as much; "
                "call train() on it, as on its student",
            )

    # Random seeds, counters, tensors that wait between two modules: left out of compiled graphs. The blocks, where
    # the time goes, are compiled once for each length, or once for all lengths.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_in_training(self, views: Tensor) -> Tensor:
        self._pending = self._joined = None  # what a forward that failed halfway may have left
        self._joining = False
        self._selection = selection = self._select(views) if self.trial is None else self._trial_selection(views)
        self._joining = selection is not None
        self._shortened = None if selection is None else (selection.grid, selection.kept is None)
        return self.embed.forward(views) if selection is None else self._embed_patches(views, selection)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _wait_for_positions(self, tokens: Tensor) -> Tensor:
        selection, self._selection = self._selection, None
        if selection is None:
            return tokens
        expected = math.prod(selection.grid) if selection.kept is None else selection.kept.shape[1]
        if tokens.ndim != 3 or tokens.shape[1] != expected:
            raise RuntimeError(
                f"the patch embedding of a compressed encoder must make {expected} tokens of a view, got a tensor of "
                f"shape {tuple(tokens.shape)}: it has been changed since compress(), or a hook changes its output"
            )
        # One view's positions are all there is to know. Under DistributedDataParallel it is two views: what the model
        # expands for each of them (its class token) then has a gradient that is summed, and so lies in memory as the
        # parameter does, about which it warns else. Never as many as the batch has: masks for a batch must not fit.
        few = 2 if len(tokens) > 2 and distributed.is_available() and distributed.is_initialized() else 1
        blanks = len(tokens) if self.blank_per_view else few
        own_grid = self.blank_grid(selection.view)
        blank = self.blank(tokens, blanks, own_grid)
        # Masks for a batch do fit where there is a blank for each view. Looked for once for each size of views, since
        # looking waits for the device.
        marked = self.blank_per_view and blanks > 1 and selection.view not in self._looked_at
        marked = marked and self.trial is None and _has_values(tokens)
        if marked:
            blank[1] = 1
        self._pending = _Pending(tokens, selection.view, selection.grid, selection.kept, own_grid, blanks, marked)
        return blank

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _join_in_training(self, blank: Tensor) -> Tensor:
        pending, self._pending = self._pending, None
        if pending is None:
            joined, self._joined, self._joining = self._joined, None, False
            if joined is not None and blank.shape[1] != joined:
                raise RuntimeError(_changed(blank, f"the {joined} tokens that were kept"))
            return blank
        prefix, grid = self.num_prefix_tokens, pending.own_grid
        if blank.shape[0] != pending.blanks or blank.shape[1] != prefix + grid[0] * grid[1]:
            raise RuntimeError(_changed(blank, f"{prefix} prefix tokens and {grid[0] * grid[1]} positions"))
        before, positions = blank.split((prefix, grid[0] * grid[1]), dim=1)
        if pending.marked:
            self._look_at_mark(positions.detach())
            self._looked_at.add(pending.view)
        positions = resample_positions(positions[:1], grid, pending.grid)
        if pending.kept is not None:
            positions = F.embedding(pending.kept, positions[0])  # (B, K, D)
        tokens = pending.tokens + positions
        if prefix:
            before = before if self.blank_per_view else before[:1].expand(len(tokens), -1, -1)
            tokens = torch.cat((before, tokens), dim=1)
        self._joined = tokens.shape[1]
        return tokens

    def _look_at_mark(self, positions: Tensor) -> None:
        """Raise RuntimeError if the second blank view's tokens are not those of the first, plus one."""
        off = (positions[1].float() - positions[0].float() - 1).abs().max()
        if off > (1e-3 if positions.dtype in (torch.float32, torch.float64) else 0.2):
            raise RuntimeError(
                "something changes tokens of a compressed encoder between its patch embedding and its first block: "
                "whatever puts others in their place (mask, idx_mask) cannot be combined with compression"
            )

    def check_mask(self, mask: Any) -> None:
        """Refuse an attention mask, which is made for all tokens, where tokens have been joined.

        Raises:
            ValueError: there is one.
        """
        if mask is not None and self.training and self._shortened is not None:
            raise ValueError(
                "attn_mask must be None while a compressed encoder trains: it is made for the tokens of the plain "
                "model, of which some are dropped or cut in another size"
            )

    def _select(self, views: Tensor) -> _Selection | None:
        if views.ndim != 4:
            raise ValueError(f"views must have the shape (B, C, H, W), got {tuple(views.shape)}")
        graph = _builds_graph(views, self.encoder)
        compressing = graph or self.when == "train"
        if not compressing:
            self._warn_of_a_pass_without_gradients()
        elif self.drops_tokens and (missing := self.compression.notice_missing_driver()):
            self._warn("no driver", missing)
        strategy = self.strategy if compressing else Strategy()
        base, view = self.own_patch, (views.shape[2], views.shape[3])
        full = view if self.compression.views is None else self.compression.views.full_size(view)
        patch = base if strategy.patch_size is None else (strategy.patch_size, strategy.patch_size)
        grid = self.grid(full, patch)
        if full != view:  # made smaller: the same grid, whose patches have fewer pixels here
            patch = (max(base[0], round(view[0] / grid[0])), max(base[1], round(view[1] / grid[1])))
        patches = grid[0] * grid[1]
        kept = num_kept(patches, strategy.token_dropout)
        prefix = self.num_prefix_tokens
        if not in_backward():
            self.tally[Forward(tuple(views.shape), prefix + kept, graph)] += 1
        # Views that the plain model refuses: compressed or not, training takes them, so that a schedule that ends
        # at the base strategy does not end in an error.
        plain = self.plain_grid(view)
        if patch == base and kept == patches and full == view and (plain is not None or not compressing):
            return None
        if plain is None and full == view:
            self._warn_of_another_size(view)
        subset = None
        if kept < patches:
            # Without values, or with a batch that a function transform hides, there is no stream of numbers to follow.
            seed = self.compression.stream.next_seed() if _has_values(views) else None
            subset = random_subset(len(views), patches, kept, seed=seed, device=views.device)
        is_own = patch == base and full == view and grid == plain
        return self._selection_of(views, grid, patch, subset, view if not is_own else None)

    def _trial_selection(self, views: Tensor) -> _Selection:
        base, view = self.own_patch, (views.shape[2], views.shape[3])
        return self._selection_of(views, self.grid(view, base), base, self.trial, None)

    def _selection_of(
        self, views: Tensor, grid: Size, patch: Size, kept: Tensor | None, area: Size | None
    ) -> _Selection:
        """Tables and matrices for a selection; without ``area``, what the plain model cuts off is cut off too."""
        patch_rows = None if kept is None else rows_of_patches(views.shape[1], grid, patch, views.device)
        rows, columns = (
            None if side == base_side else resize_pinv(base_side, side, views.dtype, views.device)
            for side, base_side in zip(patch, self.own_patch, strict=True)
        )
        area = area or (grid[0] * patch[0], grid[1] * patch[1])
        return _Selection((views.shape[2], views.shape[3]), grid, patch, area, kept, patch_rows, rows, columns)

    def _warn_of_a_pass_without_gradients(self) -> None:
        if "no gradients" in self._warned or not self.drops_tokens or self.strategy == Strategy() or in_backward():
            return
        if any(parameter.requires_grad for parameter in self.encoder.parameters()):
            self._warn(
                "no gradients",
                "a compressed encoder that is being trained ran in train mode without gradients, and so uncompressed; "
                'if the loss takes two passes (GradCache), have both compressed: compress(..., when="train")',
            )

    def _warn_of_another_size(self, view: Size) -> None:
        size = self.only_size
        takes = "sizes that its patches divide" if size is None else f"{size[0]} x {size[1]} px"
        self._warn(
            "other size",
            f"training takes views of {view[0]} x {view[1]} px, with interpolated positions, where the plain model "
            f"takes {takes} only and will refuse them in evaluation",
        )

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"seqcompress: {message}", stacklevel=2)

    def _embed_patches(self, views: Tensor, selection: _Selection) -> Tensor:
        proj = self.projection
        if proj is None:
            return self._embed_then_drop(views, selection)
        _, grid, patch, area, kept, patch_rows, rows, columns = selection
        if area != views.shape[2:]:
            views = views[..., : area[0], : area[1]]
        views = fit_to_grid(views, grid, patch)
        if kept is None or patch_rows is None:
            views = resample_views(views, grid, rows, columns)
            return self.normed(proj(views).flatten(2).transpose(1, 2))  # (B, N, D)
        pixels = gather_patches(views, kept, patch_rows, patch)  # (B, K, C, h, w)
        resampled = rows is not None or columns is not None
        if resampled:
            pixels = resample_patches(pixels, rows, columns)  # (B, K, C, w0, h0)
        if is_plain_projection(proj):
            weight = cast(Tensor, proj.weight)
            kernel = weight.transpose(2, 3) if resampled else weight  # (D, C, w0, h0) or (D, C, h0, w0)
            tokens = F.linear(pixels.flatten(2), kernel.flatten(1), cast(Any, proj).bias)  # (B, K, D)
        else:  # somebody's own, or one with hooks: it is called, not replaced
            pixels = pixels.transpose(-1, -2) if resampled else pixels
            tokens = proj(pixels.flatten(0, 1)).flatten(1).unflatten(0, kept.shape)  # (B, K, D)
        return self.normed(tokens)

    def _embed_then_drop(self, views: Tensor, selection: _Selection) -> Tensor:
        """For embeddings that are more than one projection, such as a convolutional stem."""
        tokens = self.embed.forward(views)
        if tokens.ndim == 4:
            tokens = tokens.flatten(1, 2) if self.embed.output_fmt == Format.NHWC else tokens
        if tokens.shape[1] != math.prod(selection.grid):
            raise RuntimeError(
                f"the patch embedding of a compressed encoder must make {math.prod(selection.grid)} tokens of a view, "
                f"got {tokens.shape[1]}: its patches overlap, or it has been changed since compress()"
            )
        if selection.kept is None:
            return tokens
        return tokens.gather(1, selection.kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


_live: WeakSet[CompressedPatchEmbed] = WeakSet()


def embeds_patches(embed: nn.Module) -> bool:
    """Whether ``embed`` maps each patch on its own, so that patches can be chosen and scaled."""
    return (
        isinstance(embed, PatchEmbed)
        and type(embed).forward is PatchEmbed.forward
        and "forward" not in vars(embed)
        and _maps_patches(embed.proj, tuple(embed.patch_size))
    )


def _maps_patches(proj: nn.Module, patch: Size) -> bool:
    def is_of_patches(conv: nn.Conv2d) -> bool:
        simple = (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1)
        of_tokens = conv is not proj and conv.kernel_size == conv.stride == (1, 1)
        return simple and (of_tokens or conv.kernel_size == conv.stride == patch)

    # Adapters (LoRA) wrap a convolution, and add others of its shape.
    convolutions = [module for module in proj.modules() if isinstance(module, nn.Conv2d)]
    return bool(convolutions) and all(map(is_of_patches, convolutions))


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.device.type == "meta" or is_fake() or in_function_transform())


def is_plain_projection(proj: nn.Module) -> bool:
    """Whether nothing but torch's own convolution happens here, so that a matrix product can stand in for it."""
    return type(proj) is nn.Conv2d and not (
        proj._forward_hooks
        or proj._forward_pre_hooks
        or proj._backward_hooks
        or proj._backward_pre_hooks
        or "forward" in vars(proj)
    )


def patch_size(embed: nn.Module) -> Size:
    """Height and width in pixels of what becomes one token; for a convolutional stem, its whole stride."""
    height, width = cast(Any, embed).feat_ratio(as_scalar=False)
    return int(height), int(width)


def plain_grid(embed: nn.Module, view: Size) -> Size | None:
    """Patches along each side of a view in the plain model; None if it refuses such a view."""
    size, patch = getattr(embed, "img_size", None), patch_size(embed)
    if getattr(embed, "strict_img_size", False):
        if size is not None and view != (size[0], size[1]):
            return None
    elif view[0] % patch[0] or view[1] % patch[1]:
        return None
    grid = (view[0] // patch[0], view[1] // patch[1])
    return grid if min(grid) > 0 else None


def grid_of_view(embed: nn.Module, view: Size, patch: Size) -> Size:
    """Patches along each side of a view: the plain model's under its own patch size, where it takes the view.

    Raises:
        ValueError: the patch is larger than a side of the view.
    """
    own = plain_grid(embed, view) if patch == patch_size(embed) else None
    return grid_size(view, patch) if own is None else own


def _changed(tokens: Tensor, expected: str) -> str:
    return (
        f"a compressed encoder expected {expected} between its patch embedding and its first block, got tokens of "
        f"shape {tuple(tokens.shape)}: whatever adds or takes away tokens there (mask, idx_mask, idx_keep, prompts) "
        "cannot be combined with compression"
    )


def _is_exporting() -> bool:
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    return torch.compiler.is_compiling() if is_exporting is None else bool(is_exporting())


def _builds_graph(views: Tensor, encoder: nn.Module) -> bool:
    """Whether this forward will be differentiated.

    The first pass of reentrant gradient checkpointing runs without grad, but its input requires grad; that of
    a teacher does not.
    """
    if views.requires_grad:
        return True
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in encoder.parameters())
