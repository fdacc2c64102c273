"""Images that are held in memory as one tensor, and views of them that are made on the device, a batch at a time.

Every sample has crop, flip and colours of its own, drawn from the seed of the run and the number of the step alone. So
a run that was interrupted goes on with the very views it would have had, and runs of different plans see the same.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from seqcompress.json_files import replacing

_LUMA = (0.299, 0.587, 0.114)
_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
_FROM_YIQ = tuple(map(tuple, torch.linalg.inv(torch.tensor(_TO_YIQ)).tolist()))
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """Images (N, 3, H, W) of bytes and their labels (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device) -> Images:
        """The same with the images on a device."""
        return Images(self.pixels.to(device), self.labels)

    def part(self, begin: int, end: int) -> Images:
        """Some of them."""
        return Images(self.pixels[begin:end], self.labels[begin:end])


def load_images(folder: Path, size: int, number: int, cache: Path) -> Images:
    """The first ``number`` images of a folder in ``ImageFolder``'s layout, in an order that is always the same.

    Classes take turns in the order, so every beginning of it has as many of each class. Decoded once: the tensor is
    kept in ``cache``.

    Raises:
        ValueError: there are fewer images.
    """
    key = hashlib.sha256(f"{folder.resolve()} {size} {number}".encode()).hexdigest()[:12]
    kept = cache / f"images-{key}.pt"
    if kept.is_file():
        pixels, labels = torch.load(kept)
        return Images(pixels, labels)
    found = ImageFolder(folder)
    shuffled = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    seen: dict[int, int] = {}
    turns = []
    for index in shuffled:
        label = found.targets[index]
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], label, index))
    if not 0 < number <= len(turns):
        raise ValueError(f"images must be at most the {len(turns)} in {folder.name}, got {number}")
    chosen = [index for _, _, index in sorted(turns)[:number]]
    shape = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    pixels = torch.stack([shape(found[index][0]) for index in chosen])
    labels = torch.tensor([found.targets[index] for index in chosen])
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(kept) as beside:
        torch.save((pixels, labels), beside)
    return Images(pixels, labels)


class View(v2.RandomResizedCrop):
    """How one view of every image is made; a crop by its class, so that ``scale_views`` knows its size.

    Args:
        size: of the view, in pixels.
        scale: least and greatest share of the image's area that is cropped.
        blur: probability of a Gaussian blur.
        solarize: probability that bright pixels are inverted.
    """

    def __init__(self, size: int, scale: tuple[float, float], blur: float = 0.0, solarize: float = 0.0) -> None:
        super().__init__(size, scale)
        self.blur, self.solarize = blur, solarize

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Views (B, 3, height, width), normalized, of images (B, 3, H, W) of bytes, on the images' device."""
        draws = _Draws(len(images), images.device, generator)
        views = _crop(images, self.size, self.scale, draws)
        views = _recolour(views, draws)
        if self.blur:
            views = _blur(views, self.blur, draws)
        if self.solarize:
            inverted = draws.chance(self.solarize)[:, None, None, None] & (views > 0.5)
            views = torch.where(inverted, 1 - views, views)
        return _normalized(views)


class Views(nn.Module):
    """All views of a batch of images, those of one size after the other."""

    def __init__(self, views: Iterable[View]) -> None:
        super().__init__()
        self.views = nn.ModuleList(views)
        self.sizes = [view.size[0] for view in self.views]  # full ones, in pixels, whatever scale_views does

    def forward(self, images: Tensor, generator: torch.Generator) -> list[Tensor]:
        """A list of views (B, 3, height, width) of images (B, 3, H, W) of bytes."""
        return [view(images, generator) for view in self.views]


def as_input(images: Tensor) -> Tensor:
    """Images of bytes as an encoder takes them, unchanged."""
    return _normalized(images.float() / 255)


class _Draws:
    """One random number for every sample at a time."""

    def __init__(self, number: int, device: torch.device, generator: torch.Generator) -> None:
        self._number, self._device, self._generator = number, device, generator

    def between(self, low: float, high: float) -> Tensor:
        drawn = torch.rand(self._number, generator=self._generator, device=self._device)
        return low + (high - low) * drawn

    def chance(self, probability: float) -> Tensor:
        return self.between(0, 1) < probability


def _crop(images: Tensor, size: Sequence[int], scale: tuple[float, float], draws: _Draws) -> Tensor:
    """A random resized crop, its sides in a ratio between 3/4 and 4/3, flipped half of the time."""
    root = draws.between(*scale).sqrt()
    stretch = torch.exp(draws.between(math.log(3 / 4), math.log(4 / 3)) / 2)
    width, height = (root * stretch).clamp(max=1), (root / stretch).clamp(max=1)
    across, down = (1 - width) * draws.between(-1, 1), (1 - height) * draws.between(-1, 1)
    flipped = torch.where(draws.chance(0.5), -width, width)
    zero = torch.zeros_like(width)
    places = torch.stack([flipped, zero, across, zero, height, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(places, [len(images), 3, *size], align_corners=False)
    return F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)


def _recolour(views: Tensor, draws: _Draws) -> Tensor:
    """Brightness, contrast, saturation and hue of 0.4, 0.4, 0.2, 0.1 for four in five, and one in five made gray.

    All of them are linear in the colours, so each sample has one matrix and one offset, cut off to [0, 1] at the end.
    """
    device = views.device
    one, nothing = torch.ones(len(views), device=device), torch.zeros(len(views), device=device)
    jittered, gray = draws.chance(0.8), draws.chance(0.2)
    brightness = torch.where(jittered, draws.between(0.6, 1.4), one)
    contrast = torch.where(jittered, draws.between(0.6, 1.4), one)
    saturation = torch.where(gray, nothing, torch.where(jittered, draws.between(0.8, 1.2), one))
    turn = torch.where(jittered, draws.between(-0.1, 0.1), nothing)
    return recoloured(views, brightness, contrast, saturation, turn)


def recoloured(views: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Views (B, 3, H, W) in [0, 1] with a factor (B,) of each kind, and the hue turned by a share of the circle."""
    device = views.device
    luma, to_yiq, from_yiq = (_constant(values, device) for values in (_LUMA, _TO_YIQ, _FROM_YIQ))
    one, nothing = torch.ones_like(hue), torch.zeros_like(hue)
    cos, sin = torch.cos(2 * math.pi * hue), torch.sin(2 * math.pi * hue)
    turned = torch.stack([one, nothing, nothing, nothing, cos, -sin, nothing, sin, cos], dim=1).view(-1, 3, 3)
    turn = from_yiq @ turned @ to_yiq
    share = saturation[:, None, None]
    saturate = share * torch.eye(3, device=device) + (1 - share) * luma.expand(3, 3)
    matrix = (brightness * contrast)[:, None, None] * (turn @ saturate)  # (B, 3, 3)
    mean = views.mean(dim=(2, 3)) @ luma
    offset = ((1 - contrast) * brightness * mean)[:, None, None]
    return torch.baddbmm(offset, matrix, views.flatten(2)).clamp_(0, 1).view_as(views)


def _blur(views: Tensor, probability: float, draws: _Draws) -> Tensor:
    """A Gaussian blur whose width, in a view of 224 px, is between 0.1 and 2 px."""
    number, channels, side, _ = views.shape
    width = draws.between(0.1, 2.0) * side / 224
    reach = max(1, round(2 * 2.0 * side / 224))
    steps = torch.arange(-reach, reach + 1, device=views.device, dtype=views.dtype)
    kernel = torch.exp(-0.5 * (steps / width[:, None]) ** 2)
    kernel = torch.where(draws.chance(probability)[:, None], kernel, (steps == 0).to(kernel.dtype))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)  # (B * 3, K)
    rows = views.reshape(1, number * channels, side, side)
    rows = F.pad(rows, (reach, reach, reach, reach), mode="reflect")
    rows = F.conv2d(rows, kernel[:, None, None, :], groups=number * channels)
    rows = F.conv2d(rows, kernel[:, None, :, None], groups=number * channels)
    return rows.view_as(views)


def _normalized(views: Tensor) -> Tensor:
    mean, std = (_constant(values, views.device).view(3, 1, 1) for values in (_MEAN, _STD))
    return (views - mean) / std


@functools.cache
def _constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Made once: a GPU waits for whatever is copied to it."""
    return torch.tensor(values, device=device)
