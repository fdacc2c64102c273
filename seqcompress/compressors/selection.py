"""One forward's choice: which patches of its views are embedded, of which size, and what they need on their way."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from seqcompress.compressors.patch_scaling import (
    fit_to_grid,
    resample_patches,
    resample_positions,
    resample_views,
    resize_pinv,
)
from seqcompress.compressors.token_dropout import gather_patches, rows_of_patches

__all__ = ["Selection", "embed_selection", "maps_patches", "positions_of", "select"]

Size = tuple[int, int]


class Selection(NamedTuple):
    """The patches of a batch of views that a forward embeds."""

    view: Size
    grid: Size
    patch: Size
    area: Size  # height and width of the part of the view that is cut into patches, from its upper left corner
    kept: Tensor | None  # (B, K), or None for all patches
    patch_rows: Tensor | None  # where each patch's pixels are, (N, C * h)
    rows: Tensor | None  # takes the pixels of a patch's side back to the encoder's own, (h0, h); None where they are it
    columns: Tensor | None  # the same along the other side, (w0, w)

    @property
    def patches(self) -> int:
        """How many of a view are embedded, K."""
        return math.prod(self.grid) if self.kept is None else self.kept.shape[1]


def select(views: Tensor, grid: Size, patch: Size, own_patch: Size, kept: Tensor | None, area: Size) -> Selection:
    """A selection with its tables and matrices.

    Args:
        views: shape (B, C, H, W).
        grid: patches along each side of a view.
        patch: height and width of a patch, in pixels.
        own_patch: those that the projection was made for.
        kept: indices of patches, shape (B, K), or None for all.
        area: height and width of the part of a view that is cut into patches.
    """
    patch_rows = None if kept is None else rows_of_patches(views.shape[1], grid, patch, views.device)
    rows, columns = (
        None if side == own_side else resize_pinv(own_side, side, views.dtype, views.device)
        for side, own_side in zip(patch, own_patch, strict=True)
    )
    return Selection((views.shape[2], views.shape[3]), grid, patch, area, kept, patch_rows, rows, columns)


def embed_selection(views: Tensor, selection: Selection, projection: nn.Module, *, with_hooks: bool = True) -> Tensor:
    """Project the selected patches of views (B, C, H, W): tokens (B, K, D).

    Args:
        views: as they were selected from.
        selection: of these views.
        projection: the convolution that maps each patch on its own, or what has its place.
        with_hooks: whether to call its hooks.
    """
    project = projection if with_hooks else projection.forward
    _, grid, patch, area, kept, patch_rows, rows, columns = selection
    if area != views.shape[2:]:
        views = views[..., : area[0], : area[1]]
    views = fit_to_grid(views, grid, patch)
    if kept is None or patch_rows is None:
        views = resample_views(views, grid, rows, columns)
        every: Tensor = project(views).flatten(2).transpose(1, 2)  # (B, N, D)
        return every
    pixels = gather_patches(views, kept, patch_rows, patch)  # (B, K, C, h, w)
    resampled = rows is not None or columns is not None
    if resampled:
        pixels = resample_patches(pixels, rows, columns)  # (B, K, C, w0, h0)
    if _is_plain(projection, with_hooks):
        weight = projection.weight
        kernel = weight.transpose(2, 3) if resampled else weight  # (D, C, w0, h0) or (D, C, h0, w0)
        return F.linear(pixels.flatten(2), kernel.flatten(1), projection.bias)  # (B, K, D)
    # Somebody's own, or one with hooks: it is called, not replaced.
    pixels = pixels.transpose(-1, -2) if resampled else pixels
    tokens: Tensor = project(pixels.flatten(0, 1)).flatten(1).unflatten(0, kept.shape)  # (B, K, D)
    return tokens


def positions_of(positions: Tensor, grid: Size, selection: Selection) -> Tensor:
    """Positions of the selected patches, from those of one view at the model's own grid.

    Args:
        positions: shape (1, N, D).
        grid: for which they are.
        selection: whose patches they are wanted for.

    Returns:
        Shape (1, N', D) for all patches, (B, K, D) for those that are kept.
    """
    positions = resample_positions(positions, grid, selection.grid)
    return positions if selection.kept is None else F.embedding(selection.kept, positions[0])


def maps_patches(projection: nn.Module, patch: Size) -> bool:
    """Whether each patch of this size is mapped on its own: by one convolution, and adapters (LoRA) around it."""

    def is_of_patches(conv: nn.Conv2d) -> bool:
        simple = (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1)
        of_tokens = conv is not projection and conv.kernel_size == conv.stride == (1, 1)
        return simple and (of_tokens or conv.kernel_size == conv.stride == patch)

    convolutions = [module for module in projection.modules() if isinstance(module, nn.Conv2d)]
    return bool(convolutions) and all(map(is_of_patches, convolutions))


def _is_plain(projection: nn.Module, with_hooks: bool) -> TypeGuard[nn.Conv2d]:
    """Whether nothing but torch's own convolution happens here, so that a matrix product can stand in for it."""
    if type(projection) is not nn.Conv2d or not vars(projection).keys().isdisjoint(("forward", "_conv_forward")):
        return False
    return not with_hooks or not (
        projection._forward_hooks
        or projection._forward_pre_hooks
        or projection._backward_hooks
        or projection._backward_pre_hooks
    )
