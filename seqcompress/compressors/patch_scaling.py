"""Flexible patch scaling: the same patch embedding at another patch size.

Source: Beyer et al., "FlexiViT: One Model for All Patch Sizes", CVPR 2023 (arXiv 2212.08013). FlexiViT
resamples the kernel w by the pseudo-inverse of the resize matrix B (PI-resize): w' = (B^T)^+ w. Since
x^T w' = (B^+ x)^T w, resampling each patch of the view with B^+ and using w as it is gives the same tokens,
the same gradient for w, and costs a fraction: B^+ is separable, and the view needs no gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqcompress.compressors.tables import Table

__all__ = [
    "fit_to_grid",
    "grid_size",
    "resample_patches",
    "resample_positions",
    "resample_views",
    "resize_matrix",
    "resize_pinv",
]

Size = tuple[int, int]


def grid_size(view: Size, patch: Size) -> Size:
    """Patches along each side of a view: ``max(1, round(side / patch))``, with Python's ``round``.

    Args:
        view: height and width of the view, in pixels.
        patch: height and width of a patch, in pixels.

    Raises:
        ValueError: the patch is larger than a side of the view.
    """
    if patch[0] > view[0] or patch[1] > view[1]:
        raise ValueError(
            f"patch_size must not be larger than a side of the view, "
            f"got patch_size {_shape(patch)} for a view of {_shape(view)} px"
        )
    return max(1, round(view[0] / patch[0])), max(1, round(view[1] / patch[1]))


def fit_to_grid(views: Tensor, grid: Size, patch: Size) -> Tensor:
    """Resize views (B, C, H, W) to exactly ``grid`` patches; unchanged where they already are."""
    size = (grid[0] * patch[0], grid[1] * patch[1])
    if views.shape[-2:] == size:
        return views
    # Interpolation knows no half precision.
    exact = views.to(torch.promote_types(views.dtype, torch.float32))
    resized = F.interpolate(exact, size=size, mode="bicubic", antialias=True, align_corners=False)
    return resized.to(views.dtype)


@Table
def resize_matrix(base: int, scaled: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """B along one side, of shape (scaled, base): the bicubic antialiased resize that ``timm.layers`` uses."""
    # Each column of the identity is one pixel; resizing the height only gives B.
    pixels = torch.eye(base, dtype=torch.float64, device="cpu")[None, None]  # (1, 1, base, base)
    resize = F.interpolate(pixels, size=(scaled, base), mode="bicubic", antialias=True, align_corners=False)
    return resize[0, 0].to(dtype=dtype, device=device)


@Table
def resize_pinv(base: int, scaled: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """B^+ along one side, of shape (base, scaled): takes ``scaled`` pixels back to ``base`` pixels."""
    resize = resize_matrix(base, scaled, torch.float64, torch.device("cpu"))
    return torch.linalg.pinv(resize).to(dtype=dtype, device=device)


def resample_positions(positions: Tensor, old: Size, new: Size) -> Tensor:
    """Interpolate position embeddings to another grid, as ``timm.layers.resample_abs_pos_embed`` does.

    Two small matrix products instead of an interpolation, forward and backward at every step.

    Args:
        positions: of shape (1, old_h * old_w, D).
        old: the grid they are made for.
        new: the grid they are to be for.

    Returns:
        Positions of shape (1, new_h * new_w, D), with their own dtype.
    """
    if new == old:
        return positions
    exact = positions.to(torch.promote_types(positions.dtype, torch.float32))
    rows, columns = (
        resize_matrix(side, resized, exact.dtype, exact.device) for side, resized in zip(old, new, strict=True)
    )
    with _full_precision(exact):
        resampled = (rows @ exact.reshape(old[0], -1)).view(new[0], old[1], -1)  # (new_h, old_w, D)
        resampled = columns @ resampled  # (new_h, new_w, D)
    return resampled.flatten(0, 1)[None].to(positions.dtype)


def resample_views(views: Tensor, grid: Size, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Apply B^+ to every patch of views, along its height and along its width.

    Args:
        views: pixels of shape (B, C, gh * h, gw * w).
        grid: patches along each side, gh and gw.
        rows: matrix of shape (h0, h), or None to leave the height as it is.
        columns: matrix of shape (w0, w), or None to leave the width as it is.

    Returns:
        Pixels of shape (B, C, gh * h0, gw * w0).
    """
    with _full_precision(views):
        if rows is not None:
            views = (rows @ views.unflatten(2, (grid[0], -1))).flatten(2, 3)  # (B, C, gh * h0, gw * w)
        if columns is not None:
            views = (views.unflatten(3, (grid[1], -1)) @ columns.T).flatten(3)  # (B, C, gh * h0, gw * w0)
    return views


def resample_patches(patches: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Apply B^+ to single patches, along their height and along their width.

    Args:
        patches: pixels of shape (..., h, w).
        rows: matrix of shape (h0, h), or None to leave the height as it is.
        columns: matrix of shape (w0, w), or None to leave the width as it is.

    Returns:
        Pixels of shape (..., w0, h0). The two sides are swapped: one transposition of the patches is saved,
        and the caller transposes the (much smaller) kernel instead.
    """
    with _full_precision(patches):
        if columns is not None:
            patches = patches @ columns.T  # (..., h, w0)
        patches = patches.transpose(-1, -2)  # (..., w0, h)
        return patches if rows is None else patches @ rows.T  # (..., w0, h0)


def _full_precision(pixels: Tensor) -> AbstractContextManager[Any]:
    """Linear algebra on pixels, not on features: autocast would only blur them."""
    kind = pixels.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _shape(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
