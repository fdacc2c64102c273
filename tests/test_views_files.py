"""Views follow the strategy while their images lie in one file, which every worker must open for itself."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torchvision.transforms as v1
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Dataset

from seqcompress import Strategy, compress, scale_views

IMAGES = 120


def colour(index: int) -> tuple[int, int, int]:
    return index % 5 * 60, index // 5 % 5 * 60, index // 25 % 5 * 60


class InOneFile(Dataset[Any]):
    """Images of one colour, which tells their number, from a Zip file or LMDB that the first sample opens."""

    opened: ClassVar[dict[str, Any]] = {}  # Zip files, held by the class

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.transform = v1.Compose([v1.RandomResizedCrop(32, scale=(0.3, 1.0)), v1.ToTensor()])
        self.database: Any = None  # which cannot be pickled

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.open(io.BytesIO(self._read(index)))), index

    def _read(self, index: int) -> bytes:
        if self.path.endswith(".zip"):
            if self.path not in self.opened:
                self.opened[self.path] = zipfile.ZipFile(self.path)
            return self.opened[self.path].read(str(index))
        if self.database is None:
            import lmdb

            self.database = lmdb.open(self.path, readonly=True, lock=False)
        with self.database.begin() as transaction:
            return bytes(transaction.get(str(index).encode()))


def write(path: Path) -> None:
    images = []
    for index in range(IMAGES):
        file = io.BytesIO()
        Image.new("RGB", (40, 40), colour(index)).save(file, "PNG")
        images.append(file.getvalue())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for index, image in enumerate(images):
                archive.writestr(str(index), image)
        return
    import lmdb

    with lmdb.open(str(path)) as database, database.begin(write=True) as transaction:
        for index, image in enumerate(images):
            transaction.put(str(index).encode(), image)


def wrong_images(path: Path, workers: int, start: str | None, scaled: bool) -> tuple[int, int, list[int]]:
    """How many images are another's, of how many, and the sides of views."""
    InOneFile.opened.clear()
    loader = DataLoader(InOneFile(path), batch_size=8, num_workers=workers, multiprocessing_context=start)
    if scaled:
        vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
        scale_views(loader, compress(vit, Strategy(patch_size=16)))
    wrong = seen = 0
    sides = set()
    for views, numbers in loader:
        expected = torch.tensor([colour(int(number)) for number in numbers]) / 255
        wrong += int((views.mean((2, 3)) - expected).abs().amax(1).gt(0.02).sum())
        seen += len(views)
        sides.add(views.shape[-1])
    return wrong, seen, sorted(sides)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        *(("images.zip", "fork"), ("lmdb", "fork"), ("lmdb", "spawn")),
        *(
            pytest.param(*each, marks=pytest.mark.soak)
            for each in (("images.zip", "spawn"), ("images.zip", "forkserver"), ("lmdb", "forkserver"))
        ),
    ],
)
def test_images_of_a_zip_file_held_by_a_class_and_of_lmdb_are_their_own(name: str, start: str, tmp_path: Path) -> None:
    if name == "lmdb":
        pytest.importorskip("lmdb")
    write(tmp_path / name)
    counts = ["0", "1", "4"] if start == "fork" else ["1"]
    # In a process of its own, whose module workers can import.
    command = [sys.executable, __file__, str(tmp_path / name), start, *counts]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout.splitlines()
    assert found == [
        f"{count}: (0, {IMAGES}, {sides})" for count in counts for sides in ([32], [16] if count == "0" else [16, 32])
    ]


if __name__ == "__main__":
    for workers in map(int, sys.argv[3:]):
        for is_scaled in (False, True):
            result = wrong_images(Path(sys.argv[1]), workers, sys.argv[2] if workers else None, is_scaled)
            print(f"{workers}: {result}")
