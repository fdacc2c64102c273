"""Real JPEG files of ImageNet's usual size, cut from the two photographs that come with scikit-learn."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

SIZE = (500, 400)  # width and height, in pixels


def write_photographs(folder: Path, count: int) -> Path:
    """Write ``count`` images as ``folder``/photographs/NNNN.jpg; returns ``folder``, the root of an image folder."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427
    place = random.Random(0)
    files = folder / "photographs"
    files.mkdir(parents=True)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        left, top = (place.randrange(whole - part + 1) for whole, part in zip(photograph.size, SIZE, strict=True))
        piece = photograph.crop((left, top, left + SIZE[0], top + SIZE[1]))
        piece.save(files / f"{number:04}.jpg", quality=90)
    return folder
