"""Both compressors as one module around a ViT's patch embedding.

Prefix tokens and positions do not depend on the image. So a compressed forward lets the model do what it
always does between its patch embedding and its first block, but once, on a single blank view: what comes out
is its prefix tokens and its positions, whatever kind they are. Those are joined with the patches that are
really embedded (few, and perhaps larger) just before position dropout, or before the first block.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast
from weakref import WeakSet

import torch
import torch.nn.functional as F
from timm.layers.format import Format, nchw_to
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from seqcompress.compressors.patch_scaling import (
    fit_to_grid,
    grid_size,
    resample_patches,
    resample_positions,
    resample_views,
    resize_pinv,
)
from seqcompress.compressors.token_dropout import (
    SubsetStream,
    gather_patches,
    in_backward,
    num_kept,
    random_subset,
    rows_of_patches,
)
from seqcompress.schedules import Schedule
from seqcompress.strategy import Strategy

if TYPE_CHECKING:
    from seqcompress.views import ScaledViews

__all__ = ["CompressedPatchEmbed", "Compression", "When"]

When = Literal["grad", "train"]
Size = tuple[int, int]


@dataclass(eq=False)
class Compression:
    """What the encoders that were compressed together share: one plan, one strategy, one random stream.

    ``views`` is there if loaders make smaller views for them.
    """

    plan: Schedule
    strategy: Strategy
    stream: SubsetStream = field(default_factory=SubsetStream)
    views: ScaledViews | None = None


class Forward(NamedTuple):
    """One kind of training forward, for the tally."""

    view: tuple[int, ...]  # (B, C, H, W)
    tokens: int  # a view, prefix tokens included
    graph: bool  # whether a backward pass follows


class _Selection(NamedTuple):
    """What one compressed forward does with its views."""

    grid: Size
    patch: Size
    kept: Tensor | None  # (B, K), or None for all patches
    patch_rows: Tensor | None  # where each patch's pixels are, (N, C * h)
    rows: Tensor | None
    columns: Tensor | None


class _Pending(NamedTuple):
    """Embedded patches on their way to where positions are known."""

    tokens: Tensor  # (B, K, D)
    grid: Size
    kept: Tensor | None


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
    _pending: _Pending | None
    _joined: int | None
    _joining: bool  # apart from the two above: compiled code may look at it without a guard on lengths
    _shortened: tuple[Size, bool] | None  # grid of the last forward, and whether all of it was kept

    _OWN = frozenset({"embed", "encoder", "compression", "drops_tokens", "when", "tally", "training"}) | frozenset(
        {"_pending", "_joined", "_joining", "_shortened"}
    )

    def __init__(
        self, embed: nn.Module, encoder: nn.Module, compression: Compression, *, drops_tokens: bool, when: When
    ) -> None:
        super().__init__()
        for name, registry in vars(embed).items():
            if name in vars(self) and isinstance(registry, dict):
                vars(self)[name] = registry
        # Not registered as children: neither may add a name to the state dict.
        vars(self).update(
            embed=embed,
            encoder=encoder,
            compression=compression,
            drops_tokens=drops_tokens,
            when=when,
            tally=Counter(),
            training=embed.training,
            _pending=None,
            _joined=None,
            _joining=False,
            _shortened=None,
        )
        _live.add(self)

    def __getstate__(self) -> dict[str, Any]:
        # A forward that failed halfway leaves its patches waiting; a copy has no use for them.
        return {**vars(self), "_pending": None, "_joined": None, "_joining": False}

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
        if name in self._OWN:
            vars(self)[name] = value
        else:
            setattr(self.embed, name, value)

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

    def forward(self, views: Tensor) -> Tensor:
        """Embed views (B, C, H, W); compressed forwards return a blank and keep the patches for ``join``."""
        return self._forward_in_training(views) if self.training else self.embed.forward(views)

    def join(self, blank: Tensor) -> Tensor:
        """Replace the model's tokens of the blank view by those of the views that were embedded.

        Args:
            blank: prefix tokens and positions as the model made them for one blank view, (1, P + N, D).

        Returns:
            Tokens of shape (B, P + K, D), prefix tokens first; ``blank`` itself if nothing is waiting.

        Raises:
            RuntimeError: the model changed the sequence on its own, by masking for instance.
        """
        return self._join_in_training(blank) if self.training and self._joining else blank

    # Random seeds, counters, tensors that wait between two modules: left out of compiled graphs. The blocks, where
    # the time goes, are compiled once for each length, or once for all lengths.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_in_training(self, views: Tensor) -> Tensor:
        self._pending = self._joined = None  # what a forward that failed halfway may have left
        selection = self._select(views)
        self._joining = selection is not None
        self._shortened = None if selection is None else (selection.grid, selection.kept is None)
        if selection is None:
            return self.embed.forward(views)
        tokens = self._embed_patches(views, selection)
        self._pending = _Pending(tokens, selection.grid, selection.kept)
        return self._blank(tokens)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _join_in_training(self, blank: Tensor) -> Tensor:
        pending, self._pending = self._pending, None
        if pending is None:
            joined, self._joined, self._joining = self._joined, None, False
            if joined is not None and blank.shape[1] != joined:
                raise RuntimeError(_changed(blank, f"the {joined} tokens that were kept"))
            return blank
        prefix, grid = self.encoder.num_prefix_tokens, self.embed.grid_size
        if blank.shape[0] != 1 or blank.shape[1] != prefix + grid[0] * grid[1]:
            raise RuntimeError(_changed(blank, f"{prefix} prefix tokens and {grid[0] * grid[1]} positions"))
        before, positions = blank.split((prefix, grid[0] * grid[1]), dim=1)
        positions = resample_positions(positions, (grid[0], grid[1]), pending.grid)
        if pending.kept is not None:
            positions = F.embedding(pending.kept, positions[0])  # (B, K, D)
        tokens = pending.tokens + positions
        if prefix:
            tokens = torch.cat((before.expand(len(tokens), -1, -1), tokens), dim=1)
        self._joined = tokens.shape[1]
        return tokens

    def _select(self, views: Tensor) -> _Selection | None:
        if views.ndim != 4:
            raise ValueError(f"views must have the shape (B, C, H, W), got {tuple(views.shape)}")
        graph = _builds_graph(views, self.encoder)
        strategy = self.strategy if graph or self.when == "train" else Strategy()
        base, view = patch_size(self.embed), (views.shape[2], views.shape[3])
        full = view if self.compression.views is None else self.compression.views.full_size(view)
        patch = base if strategy.patch_size is None else (strategy.patch_size, strategy.patch_size)
        grid = grid_size(full, patch)
        if full != view:  # made smaller: the same grid, whose patches have fewer pixels here
            patch = (max(base[0], round(view[0] / grid[0])), max(base[1], round(view[1] / grid[1])))
        patches = grid[0] * grid[1]
        kept = num_kept(patches, strategy.token_dropout)
        prefix: int = self.encoder.num_prefix_tokens
        if not in_backward():
            self.tally[Forward(tuple(views.shape), prefix + kept, graph)] += 1
        # Views that the plain model refuses: compressed or not, training takes them, so that a schedule that ends
        # at the base strategy does not end in an error.
        uneven = view[0] % base[0] != 0 or view[1] % base[1] != 0
        refused = uneven or (view != self.embed.img_size and getattr(self.embed, "strict_img_size", False))
        compressing = graph or self.when == "train"
        if patch == base and kept == patches and full == view and not (refused and compressing):
            return None
        subset = patch_rows = None
        if kept < patches:
            seed = self.compression.stream.next_seed()
            subset = random_subset(len(views), patches, kept, seed=seed, device=views.device)
            patch_rows = rows_of_patches(views.shape[1], grid, patch, views.device)
        rows, columns = (
            None if side == base_side else resize_pinv(base_side, side, views.dtype, views.device)
            for side, base_side in zip(patch, base, strict=True)
        )
        return _Selection(grid, patch, subset, patch_rows, rows, columns)

    def _embed_patches(self, views: Tensor, selection: _Selection) -> Tensor:
        if not embeds_patches(self.embed):
            return self._embed_then_drop(views, selection)
        grid, patch, kept, patch_rows, rows, columns = selection
        views = fit_to_grid(views, grid, patch)
        if kept is None or patch_rows is None:
            views = resample_views(views, grid, rows, columns)
            tokens = self.embed.proj(views).flatten(2).transpose(1, 2)  # (B, N, D)
        else:
            pixels = gather_patches(views, kept, patch_rows, patch)  # (B, K, C, h, w)
            kernel = self.embed.proj.weight  # (D, C, h0, w0)
            if rows is not None or columns is not None:
                pixels = resample_patches(pixels, rows, columns)  # (B, K, C, w0, h0)
                kernel = kernel.transpose(2, 3)
            tokens = F.linear(pixels.flatten(2), kernel.flatten(1), self.embed.proj.bias)  # (B, K, D)
        return self.embed.norm(tokens)

    def _embed_then_drop(self, views: Tensor, selection: _Selection) -> Tensor:
        """For embeddings that are more than one projection, such as a convolutional stem."""
        tokens = self.embed.forward(views)
        if not self.embed.flatten:
            tokens = tokens.flatten(1, 2) if self.embed.output_fmt == Format.NHWC else tokens
        if selection.kept is None:
            return tokens
        return tokens.gather(1, selection.kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))

    def _blank(self, tokens: Tensor) -> Tensor:
        """The embedding of one view of the model's own size, all zero, in the format the model expects."""
        height, width = self.embed.grid_size
        if self.embed.flatten:
            return tokens.new_zeros(1, height * width, tokens.shape[-1])  # (1, N, D)
        return nchw_to(tokens.new_zeros(1, tokens.shape[-1], height, width), self.embed.output_fmt)


_live: WeakSet[CompressedPatchEmbed] = WeakSet()


def embeds_patches(embed: nn.Module) -> bool:
    """Whether ``embed`` is one linear map of each patch on its own, so that patches can be chosen and scaled."""
    proj = getattr(embed, "proj", None)
    return (
        isinstance(embed, PatchEmbed)
        and type(embed).forward is PatchEmbed.forward
        and isinstance(proj, nn.Conv2d)
        and proj.kernel_size == proj.stride == tuple(embed.patch_size)
        and proj.padding == (0, 0)
        and proj.dilation == (1, 1)
        and proj.groups == 1
    )


def patch_size(embed: nn.Module) -> Size:
    """Height and width in pixels of what becomes one token; for a convolutional stem, its whole stride."""
    height, width = cast(Any, embed).feat_ratio(as_scalar=False)
    return int(height), int(width)


def _changed(tokens: Tensor, expected: str) -> str:
    return (
        f"a compressed encoder expected {expected} between its patch embedding and its first block, got tokens of "
        f"shape {tuple(tokens.shape)}: masked tokens (mask, idx_mask, idx_keep) cannot be combined with compression"
    )


def _builds_graph(views: Tensor, encoder: nn.Module) -> bool:
    """Whether this forward will be differentiated.

    The first pass of reentrant gradient checkpointing runs without grad, but its input requires grad; that of
    a teacher does not.
    """
    if views.requires_grad:
        return True
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in encoder.parameters())
