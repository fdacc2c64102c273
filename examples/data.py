"""Two small grayscale data sets, and Lightly's transforms set up for them."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightly.transforms import DINOTransform, MoCoV2Transform, SimCLRTransform
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Pixels = NDArray[np.uint8]  # (N, H, W)
Labels = NDArray[np.int64]  # (N,)

_LOCAL_SIZE, _LOCAL_VIEWS = 16, 4  # DINO's local views: their side in pixels, and how many of an image

_IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class ImageData:
    """Images with labels. Pretraining sees ``train_images`` only, never a label."""

    name: str
    train_images: Pixels
    train_labels: Labels
    test_images: Pixels
    test_labels: Labels
    patch_size: int
    """What a ViT for these images cuts them into, in pixels."""
    flip: bool
    """Whether a mirrored image still shows the same thing: a shoe does, a digit does not."""
    note: str = ""
    """What must be said beside every figure measured on these images."""

    @property
    def image_size(self) -> int:
        return self.train_images.shape[1]

    @property
    def normalize(self) -> dict[str, list[float]]:
        """Mean and spread of the training pixels, for ``torchvision.transforms.Normalize``."""
        pixels = self.train_images / 255.0
        return {"mean": [float(pixels.mean())], "std": [float(pixels.std())]}

    def limited(self, images: int) -> ImageData:
        """The same with the first ``images`` training images only."""
        fields = {**vars(self), "train_images": self.train_images[:images], "train_labels": self.train_labels[:images]}
        return ImageData(**fields)

    def tensors(self, images: Pixels) -> Tensor:
        """Images as an encoder sees them in evaluation: normalized, not augmented, (N, 1, H, W)."""
        normalize = self.normalize
        scaled = torch.from_numpy(images).unsqueeze(1) / 255.0
        return (scaled - normalize["mean"][0]) / normalize["std"][0]


def digits() -> ImageData:
    """scikit-learn's handwritten digits, 8 x 8 pixels enlarged to 32 x 32; a fifth is for testing."""
    bunch = load_digits()
    small = (bunch.images * (255 / 16)).astype(np.uint8)
    images = np.stack(
        [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in small]
    )
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, bunch.target.astype(np.int64), test_size=0.2, random_state=0, stratify=bunch.target
    )
    note = (
        "The digits are 8 x 8 pixels enlarged to 32 x 32, so larger patches throw almost nothing away on them: "
        "these figures show that everything works and say little about real images."
    )
    return ImageData(
        "digits", train_images, train_labels, test_images, test_labels, patch_size=4, flip=False, note=note
    )


def fashion_mnist(folder: str | os.PathLike[str]) -> ImageData:
    """Fashion-MNIST, 28 x 28 pixels, from its four idx files.

    Args:
        folder: has the files, gzipped or not, or torchvision's ``FashionMNIST/raw`` with them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what its name says.
    """
    arrays = {part: _read_idx(_idx_file(Path(folder), name)) for part, name in _IDX_FILES.items()}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{folder} must hold 28 x 28 images with one label each, "
                f"got {part} images {images.shape} and labels {labels.shape}"
            )
    return ImageData(
        "fashion-mnist",
        train_images=arrays["train_images"],
        train_labels=arrays["train_labels"].astype(np.int64),
        test_images=arrays["test_images"],
        test_labels=arrays["test_labels"].astype(np.int64),
        patch_size=4,
        flip=True,
    )


def view_transform(method: str, data: ImageData) -> Callable[[Image.Image], list[Tensor]]:
    """Lightly's transform for a method, with what cannot apply to small grayscale images switched off."""
    common = {
        "hf_prob": 0.5 if data.flip else 0.0,
        "cj_strength": 0.5,
        "cj_sat": 0.0,
        "cj_hue": 0.0,
        "random_gray_scale": 0.0,
        "normalize": data.normalize,
    }
    if method != "dino":
        two_views = MoCoV2Transform if method == "moco" else SimCLRTransform
        return two_views(input_size=data.image_size, min_scale=0.5, gaussian_blur=0.0, **common)
    return DINOTransform(
        global_crop_size=data.image_size,
        global_crop_scale=(0.4, 1.0),
        local_crop_size=_LOCAL_SIZE,
        local_crop_scale=(0.1, 0.4),
        n_local_views=_LOCAL_VIEWS,
        gaussian_blur=(0.0, 0.0, 0.0),
        **common,
    )


def view_sizes(method: str, data: ImageData) -> tuple[int, ...]:
    """Sides of the views that ``view_transform`` makes of an image, in pixels."""
    return (data.image_size,) * 2 + ((_LOCAL_SIZE,) * _LOCAL_VIEWS if method == "dino" else ())


def view_loader(
    data: ImageData, method: str, *, batch_size: int, num_workers: int, seed: int
) -> DataLoader[list[Tensor]]:
    """Batches of augmented views: each batch is a list of tensors (B, 1, H, W), one a view."""
    return DataLoader(
        _Views(data.train_images, view_transform(method, data)),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )


class _Views(Dataset[list[Tensor]]):
    def __init__(self, images: Pixels, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.images[index]))


def _idx_file(folder: Path, name: str) -> Path:
    places = [
        place / f"{name}{ending}" for place in (folder, folder / "FashionMNIST" / "raw") for ending in ("", ".gz")
    ]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} has no {name}, gzipped or not, nor has a FashionMNIST/raw in it")
    return found


def _read_idx(path: Path) -> Pixels:
    """The idx format: two zero bytes, type (8 for bytes), number of dimensions, their sizes, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    dimensions = content[3] if len(content) > 3 else 0
    shape = tuple(int(size) for size in np.frombuffer(content[4 : 4 + 4 * dimensions], dtype=">u4"))
    if content[:3] != b"\x00\x00\x08" or len(content) != 4 + 4 * dimensions + int(np.prod(shape)):
        raise ValueError(f"{path} is not an idx file of bytes")
    return (
        np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    )  # writable, as torch wants it
