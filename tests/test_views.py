"""Loaders make the views that the strategy needs, and the encoder takes them for what they stand for."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import itertools
import os
import pickle
import random
import tarfile
import warnings
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms as v1
import torchvision.transforms.v2 as v2
from lightly.transforms import DINOTransform, MoCoV2Transform, SimCLRTransform, SwaVTransform
from omegaconf import OmegaConf
from packaging.version import Version
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate
from torchvision.datasets import FakeData, ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.models import VisionTransformer

from seqcompress import (
    Budget,
    OnlineScheduler,
    SequenceScheduler,
    Stepwise,
    Strategy,
    compress,
    gradient_error,
    rehearse,
    restore,
    set_strategy,
)
from seqcompress.compressors import resize_pinv
from seqcompress.compressors.patch_scaling import resample_views
from seqcompress.views import scale_views
from seqcompress.views.transforms import ScaledTransforms, SmallerJPEGs

SCALED = Strategy(patch_size=16)  # of a ViT with patches of 8 px: half the side, a quarter of the tokens
RELAXING = Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy()})


class Photos(Dataset[Any]):
    """Pieces of a photograph, and the process that made each view."""

    def __init__(self, transform: Callable[[Any], Any], images: int = 64, side: int = 96) -> None:
        self.transform, self.images, self.side = transform, images, side
        self.photo = Image.fromarray(load_sample_image("china.jpg"))

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Any, int]:
        left, top = 7 * index % 500, 5 * index % 300
        return self.transform(self.photo.crop((left, top, left + self.side, top + self.side))), os.getpid()


def crop_to(side: int) -> Any:
    return v1.Compose([v1.RandomResizedCrop(side, scale=(0.3, 1.0)), v1.ToTensor()])


def loader_of(transform: Any, batch_size: int = 4, images: int = 64, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Photos(transform, images), batch_size=batch_size, **settings)


def sides(views: Any) -> list[int]:
    return [view.shape[-1] for view in (views if isinstance(views, list) else [views])]


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


PIPELINES = {
    "Lightly's SimCLR": SimCLRTransform(input_size=64),
    "Lightly's MoCo v2": MoCoV2Transform(input_size=64),
    "Lightly's DINO": DINOTransform(global_crop_size=64, local_crop_size=32, n_local_views=2),
    "Lightly's SwaV": SwaVTransform(crop_sizes=(64, 32), crop_counts=(2, 2)),
    "torchvision v1": v1.Compose(
        [v1.RandomResizedCrop(64), v1.RandomHorizontalFlip(), v1.GaussianBlur(9, (0.1, 2.0)), v1.ToTensor()]
    ),
    "torchvision v2": v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop((64, 64), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.GaussianBlur(9, (0.1, 2.0)),
            v2.ToDtype(torch.float32, scale=True),
        ]
    ),
    "resize and crop": v1.Compose([v1.Resize(80), v1.CenterCrop(64), v1.ToTensor()]),
    "resize only": v2.Compose([v2.Resize((64, 64)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("patch_size", [16, 32])
def test_a_smaller_view_shows_what_the_full_one_shows(name: str, patch_size: int, tiny_vit: Any) -> None:
    """Compared with the full view whose patches are resampled as the encoder would."""
    dataset = Photos(copy.deepcopy(PIPELINES[name]))
    transforms = ScaledTransforms(dataset, (8, 8))
    shrink = resize_pinv(8, patch_size, torch.float32, torch.device("cpu"))
    for index in range(4):
        made = []
        for size in (None, patch_size):
            transforms.apply(size)
            seed_all(index)
            views = dataset[index][0]
            made.append(views if isinstance(views, list) else [views])
        for full, small in zip(*made, strict=True):
            grid = (full.shape[1] // patch_size, full.shape[2] // patch_size)
            assert small.shape[1:] == (8 * grid[0], 8 * grid[1])
            resampled = resample_views(full[None], grid, shrink, shrink)[0]
            assert (small - resampled).square().mean().sqrt() < 0.25 * resampled.std()
    transforms.apply(None)
    assert sides(dataset[0][0])[0] == 64


def test_blurs_and_borders_shrink_with_the_view() -> None:
    pipeline = v1.Compose([v1.Resize(32, max_size=48), v1.RandomCrop(64, padding=8), v1.GaussianBlur(23, (0.1, 2))])
    lightly = SimCLRTransform(input_size=64, sigmas=(0.2, 2.0))
    dataset = Photos([pipeline, lightly])  # type: ignore[arg-type]
    transforms = ScaledTransforms(dataset, (8, 8))
    resize, crop, blur = pipeline.transforms
    lightly_blur = next(step for step in lightly.transforms[0].transform.transforms if hasattr(step, "sigmas"))

    def settings() -> tuple[Any, ...]:
        return (*crop.size, crop.padding, blur.kernel_size, blur.sigma, resize.size, resize.max_size)

    before = settings()
    transforms.apply(16)
    assert settings() == (32, 32, 4, (11, 11), (0.05, 1.0), 16, 24)
    assert lightly_blur.sigmas == (0.1, 1.0)
    transforms.apply(None)
    assert settings() == before
    assert lightly_blur.sigmas == (0.2, 2.0)


@pytest.mark.parametrize("patch_size", [16, 24, 32])
def test_blurs_shrink_as_much_as_their_own_view(patch_size: int) -> None:
    pipeline = DINOTransform(global_crop_size=64, local_crop_size=40, n_local_views=1)
    transforms = ScaledTransforms(Photos(pipeline), (8, 8))
    transforms.apply(patch_size)
    for view, side in zip(pipeline.transforms, (64, 64, 40), strict=True):
        crop, blur = (
            next(step for step in view.transform.transforms if hasattr(step, name)) for name in ("size", "sigmas")
        )
        size = crop.size if isinstance(crop.size, int) else crop.size[0]
        assert size == 8 * round(side / patch_size)
        assert blur.sigmas[1] == pytest.approx(2.0 * size / side)


@pytest.mark.parametrize("transforms", [v1, v2])
@pytest.mark.parametrize("patch_size", [16, 32])
def test_elastic_distortions_keep_their_share_of_the_view(transforms: Any, patch_size: int) -> None:
    def distortion(side: int) -> float:
        """Root mean square shift of a pixel, in parts of the view: of a picture whose values are its columns."""
        columns = torch.linspace(0, 1, side).expand(3, side, side)
        shifted = torch.stack([elastic(columns) for _ in range(20)])
        inside = slice(side // 8, -side // 8)  # away from the border, where values end
        return (shifted - columns)[..., inside, inside].square().mean().sqrt().item()

    elastic = transforms.ElasticTransform(alpha=60.0, sigma=8.0)
    scaled = ScaledTransforms(Photos(transforms.Compose([transforms.RandomResizedCrop(128), elastic])), (8, 8))
    full = distortion(128)
    scaled.apply(patch_size)
    assert distortion(128 * 8 // patch_size) == pytest.approx(full, rel=0.1)
    scaled.apply(None)
    assert (elastic.alpha, elastic.sigma) == ([60.0, 60.0], [8.0, 8.0])


@pytest.mark.parametrize("patch_size", [20, 24, 28])  # none of which divides 64 px
@pytest.mark.parametrize(
    "crop",
    [
        v1.Compose([v1.Resize(64), v1.CenterCrop(64)]),
        v1.Compose([v1.Resize(66), v1.RandomCrop(64)]),
        v2.Compose([v2.Resize((64, 64))]),
        v2.Compose([v2.Resize([64]), v2.CenterCrop(64)]),
        v1.Compose([v1.Resize(80), v1.CenterCrop(72), v1.CenterCrop(64)]),
    ],
    ids=["resize and crop", "random crop", "resize only", "resize in a list", "two crops"],
)
def test_views_that_patches_do_not_divide_get_no_border_and_keep_their_crop(
    crop: Any, patch_size: int, tiny_vit: Any
) -> None:
    pipeline = v1.Compose([crop, v1.ToTensor()])
    images = Photos(copy.deepcopy(pipeline))
    images.photo = Image.new("RGB", images.photo.size, "white")
    vit = compress(tiny_vit(img_size=64), Strategy(patch_size=patch_size))
    (view, *_), _ = next(iter(scale_views(DataLoader(images, batch_size=2), vit)))
    side = 8 * round(64 / patch_size)
    assert view.shape == (3, side, side)
    assert view.min() == 1
    resized, *rest = (step.size for step in images.transform.transforms[0].transforms)  # type: ignore[attr-defined]
    before = crop.transforms[0].size
    if rest and isinstance(before, int):
        assert rest[-1][0] / resized == pytest.approx(64 / before, abs=1.1 / side)


def test_jpeg_files_are_decoded_smaller_and_others_whole(tmp_path: Path, tiny_vit: Any) -> None:
    (tmp_path / "class").mkdir()
    photo = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 201, 120))
    for name in ("a.jpg", "b.png"):
        photo.save(tmp_path / "class" / name)
    dataset = ImageFolder(str(tmp_path), transform=crop_to(32))
    plain = dataset.loader
    vit = compress(tiny_vit(), Strategy(patch_size=32))
    loader = scale_views(DataLoader(dataset, batch_size=2), vit)
    assert isinstance(dataset.loader, SmallerJPEGs)
    assert [dataset.loader(path).size for path, _ in dataset.samples] == [(51, 30), (201, 120)]
    assert dataset[0][0].shape == (3, 8, 8)
    restore(vit)
    assert dataset.loader is plain
    assert next(iter(loader))[0].shape[-1] == 32
    whole = np.asarray(plain(dataset.samples[0][0]))
    assert np.array_equal(np.asarray(SmallerJPEGs(1)(dataset.samples[0][0])), whole)


class Rotated(ImageFolder):
    """Does something of its own with what it has read."""

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.loader(self.samples[index][0]).rotate(90))


@functools.wraps(pil_loader)
def _rotating_loader(path: str) -> Any:
    return pil_loader(path).rotate(90)


@pytest.mark.parametrize(
    ("folder", "reader"),
    [(Rotated, pil_loader), (ImageFolder, _rotating_loader), (ImageFolder, functools.cache(pil_loader))],
    ids=["data set", "loader", "cache"],
)
def test_files_that_the_users_code_reads_are_decoded_whole(
    folder: Any, reader: Any, tmp_path: Path, tiny_vit: Any
) -> None:
    (tmp_path / "class").mkdir()
    Image.fromarray(load_sample_image("china.jpg")).save(tmp_path / "class" / "a.jpg")
    images = folder(str(tmp_path), transform=crop_to(32), loader=reader)
    views = next(iter(scale_views(DataLoader(images), compress(tiny_vit(), SCALED))))
    assert (views[0] if isinstance(views, list) else views).shape[-1] == 16
    assert images.loader is reader


def test_an_upsampled_view_and_the_view_itself_give_the_same_features(tiny_vit: Any) -> None:
    """METHOD's identity: what the smaller view lacks is what the resize matrix makes up."""
    vit = compress(tiny_vit(), SCALED).train()
    scale_views(loader_of(crop_to(32)), vit)
    small = torch.rand(2, 3, 16, 16)
    up = F.interpolate(torch.eye(8)[None, None], size=(16, 8), mode="bicubic", antialias=True)[0, 0]  # (16, 8)
    patches = small.unflatten(2, (2, 8)).unflatten(4, (2, 8))  # (2, 3, gh, 8, gw, 8)
    full = torch.einsum("nciajb,ya,xb->nciyjx", patches, up, up).flatten(4).flatten(2, 3)
    assert full.shape == (2, 3, 32, 32)
    torch.testing.assert_close(vit(small), vit(full), rtol=1e-5, atol=1e-5)


def test_with_real_crops_features_of_both_forms_differ_by_a_few_percent(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), SCALED).train()
    loader = scale_views(loader_of(SimCLRTransform(input_size=32)), vit)
    features = []
    for strategy in (Strategy(), SCALED):  # decides the size of the views
        set_strategy(vit, strategy)
        seed_all(3)
        views = next(iter(loader))[0][0]
        set_strategy(vit, SCALED)
        features.append(vit(views).detach())
        assert views.shape[-1] == (32 if strategy == Strategy() else 16)
    full, small = features
    another = full.roll(1, 0)
    distance = (small - full).square().mean().sqrt()
    assert 0 < distance < 0.25 * (another - full).square().mean().sqrt()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loaders_change_over_with_the_schedule_and_never_too_late(
    workers: int, tiny_vit: Any, first_tokens: Any
) -> None:
    vit = compress(tiny_vit(), RELAXING).train()
    settings = {"num_workers": workers, "persistent_workers": True} if workers else {}
    loader = scale_views(loader_of(crop_to(32), **settings), vit)  # 16 batches an epoch
    scheduler, steps = SequenceScheduler(vit, total_steps=32), 0
    made, makers = [], set()
    for _ in range(2):
        for views, makers_of_batch in loader:
            made.append(views.shape[-1])
            makers.update(makers_of_batch.tolist())
            assert first_tokens(vit, views).shape[1] == (1 + 2 if steps < 16 else 1 + 16)
            steps += 1
            scheduler.step()
    assert len(makers) == max(1, workers)  # the same workers all along
    assert set(made[workers : 16 - 1 - 4 * workers]) == {16}  # each worker looks after its first batch
    assert set(made[16:]) == {32}


class _Lazy(Photos):
    """Opens a file at its first sample, as data sets in one large file do, and keeps handles by name."""

    file: Any = None

    def __init__(self, transform: Any) -> None:
        super().__init__(transform)
        self.handles: dict[str, Any] = {}

    def __getitem__(self, index: int) -> Any:
        if self.file is None:
            self.file = self.handles["samples"] = Path(__file__).open("rb")  # noqa: SIM115
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "wrap",
    [lambda images: images, lambda images: Subset(images, range(8)), lambda images: ConcatDataset(300 * [images])],
)
def test_no_file_is_open_when_workers_start(wrap: Any, tiny_vit: Any) -> None:
    images = _Lazy(crop_to(32))
    loader = DataLoader(wrap(images), batch_size=2, num_workers=1)
    views = [views.shape[-1] for views, _ in itertools.islice(scale_views(loader, compress(tiny_vit(), SCALED)), 4)]
    assert views[1:] == [16, 16, 16]
    assert images.file is None
    assert images.handles == {}


def test_where_views_are_to_shrink_they_follow_within_the_batches_under_way(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), Stepwise({0.0: Strategy(), 0.5: SCALED})).train()
    loader = scale_views(loader_of(crop_to(32), num_workers=1, prefetch_factor=2), vit)
    scheduler, made = SequenceScheduler(vit, total_steps=16), []
    for views, _ in loader:
        made.append(views.shape[-1])
        scheduler.step()
    assert set(made[:8]) == {32}
    assert made[-1] == 16
    assert made == sorted(made, reverse=True)


def test_workers_that_are_spawned_follow_as_well(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), RELAXING)
    # A data set of a package: a spawned worker cannot import this module, and then its parent waits for ever.
    images = FakeData(size=40, image_size=(3, 96, 96), transform=crop_to(32))
    loader = DataLoader(images, batch_size=4, num_workers=1, multiprocessing_context="spawn", prefetch_factor=1)
    scale_views(loader, vit)
    scheduler, made = SequenceScheduler(vit, total_steps=10), []
    for views, _ in loader:
        made.append(views.shape[-1])
        scheduler.step()
    assert made[1] == 16
    assert set(made[5:]) == {32}


def test_a_view_that_comes_too_small_has_the_tokens_of_its_step(tiny_vit: Any, first_tokens: Any) -> None:
    for settings in ({}, {"dynamic_img_size": True}):
        vit = compress(tiny_vit(**settings), SCALED).train()
        loader = scale_views(loader_of(crop_to(32)), vit)
        small = next(iter(loader))[0]
        assert small.shape[-1] == 16
        budget = Budget(vit)
        assert first_tokens(vit, small).shape[1] == 1 + 4
        spent = budget.units
        set_strategy(vit, Strategy())
        assert first_tokens(vit, small).shape[1] == 1 + 16
        assert budget.units - spent == pytest.approx(3 * len(small))
        set_strategy(vit, Strategy(0.5, 32))
        assert first_tokens(vit, small).shape[1] == 1 + 1


def test_a_teacher_and_local_views_get_theirs_too(tiny_vit: Any, first_tokens: Any) -> None:
    student, teacher = tiny_vit(dynamic_img_size=True), tiny_vit(dynamic_img_size=True).requires_grad_(False)
    compress(student, Strategy(0.5, 16), teacher=teacher)
    pipeline = DINOTransform(global_crop_size=64, local_crop_size=40, n_local_views=2)
    views = next(iter(scale_views(loader_of(pipeline), student.train())))[0]
    assert sides(views) == [32, 32, 16, 16]  # a local view of 40 px has round(40 / 16) = 2 patches a side
    assert [first_tokens(student, view).shape[1] for view in views] == [1 + 8, 1 + 8, 1 + 2, 1 + 2]
    teacher.train()
    with torch.no_grad():
        assert [first_tokens(teacher, view).shape[1] for view in views[:2]] == [1 + 16, 1 + 16]


def test_a_rehearsal_runs_at_full_length_on_small_views(tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit(), RELAXING).train()
    loader = scale_views(loader_of(crop_to(32)), vit)
    scheduler, lengths = SequenceScheduler(vit, total_steps=100), []
    rehearse(scheduler, lambda: lengths.append(first_tokens(vit, next(iter(loader))[0]).shape[1]))
    assert lengths == [1 + 16]
    assert next(iter(loader))[0].shape[-1] == 16


def test_no_random_number_is_used_up(tiny_vit: Any) -> None:
    vit, loader = compress(tiny_vit(), SCALED), loader_of(SimCLRTransform(input_size=32))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    scale_views(loader, vit)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_restoring_the_model_brings_the_full_views_back(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), SCALED)
    loader = scale_views(loader_of(crop_to(32)), vit)
    assert next(iter(loader))[0].shape[-1] == 16
    restore(vit)
    views = next(iter(loader))[0]
    assert views.shape[-1] == 32
    vit.train()(views)


def test_a_model_that_is_planned_anew_keeps_its_loader(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), SCALED)
    loader = scale_views(loader_of(crop_to(32)), vit)
    compress(vit, Strategy(patch_size=32))
    assert next(iter(loader))[0].shape[-1] == 8
    compress(vit, Strategy())
    assert next(iter(loader))[0].shape[-1] == 32


def test_without_its_loader_a_data_set_makes_full_views_again(tiny_vit: Any) -> None:
    images = Photos(crop_to(32))
    vit = compress(tiny_vit(), SCALED)
    for _ in range(3):  # loaders come and go
        loader = scale_views(DataLoader(images, batch_size=4), vit)
        gc.collect()
    assert len(vit.patch_embed.compression.views._followers) == 1
    assert images[0][0].shape[-1] == 16
    del loader
    gc.collect()
    assert images[0][0].shape[-1] == 32


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda images: pickle.loads(pickle.dumps(images))])
def test_a_copy_of_a_data_set_whose_views_are_small_knows_their_full_size(duplicate: Any, tiny_vit: Any) -> None:
    images = Photos(SimCLRTransform(input_size=32))
    first = scale_views(DataLoader(images, batch_size=4), other := compress(tiny_vit(), SCALED))
    vit = compress(tiny_vit(), SCALED)
    loader = scale_views(DataLoader(duplicate(images), batch_size=4), vit)
    assert next(iter(loader))[0][0].shape[-1] == 16
    restore(vit)
    assert next(iter(loader))[0][0].shape[-1] == 32
    assert images[0][0][0].shape[-1] == 16
    restore(other)
    assert next(iter(first))[0][0].shape[-1] == 32
    assert images[0][0][0].shape[-1] == 32


def test_a_loader_may_follow_another_model_later(tiny_vit: Any) -> None:
    loader = loader_of(crop_to(32))
    scale_views(loader, compress(tiny_vit(), SCALED))
    scale_views(loader, compress(tiny_vit(), Strategy(patch_size=32)))
    assert next(iter(loader))[0].shape[-1] == 8


def test_two_loaders_may_follow_one_model(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(dynamic_img_size=True), SCALED)
    loaders = [scale_views(loader_of(crop_to(side)), vit) for side in (32, 48)]
    assert [next(iter(loader))[0].shape[-1] for loader in loaders] == [16, 24]
    set_strategy(vit, Strategy())
    assert [next(iter(loader))[0].shape[-1] for loader in loaders] == [32, 48]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_takes_small_views_and_drives_no_loader(
    duplicate: Any, tiny_vit: Any, first_tokens: Any
) -> None:
    vit = compress(tiny_vit(), SCALED).train()
    loader = scale_views(loader_of(crop_to(32)), vit)
    other = duplicate(vit)
    set_strategy(other, Strategy())
    small = next(iter(loader))[0]
    assert small.shape[-1] == 16
    assert first_tokens(other, small).shape[1] == 1 + 16


class _UnknownCrop:
    def __call__(self, image: Any) -> Tensor:
        return F.interpolate(v1.functional.to_tensor(image)[None], size=(32, 32))[0]


class _Unknown:
    def __init__(self, **settings: float) -> None:
        vars(self).update(settings)

    def __call__(self, view: Tensor) -> Tensor:
        return view


class _UnknownBlur(_Unknown):
    """A blur by its name."""


class _Module(torch.nn.Module):
    """A module that brings a network and the transform for its data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, kernel_size=3), timm.layers.ConvNormAct(8, 8, 3))
        self.crop = crop_to(32)

    def transform(self, image: Any) -> Any:
        return self.crop(image)


def _shrunk(image: Any) -> Tensor:
    return v1.functional.to_tensor(image.resize((32, 32)))


class _Stacked(Photos):
    def __getitem__(self, index: int) -> Any:
        return torch.stack([super(_Stacked, self).__getitem__(index)[0] for _ in range(2)]), 0


@pytest.mark.parametrize(
    "transform",
    [
        v1.Compose([v1.Compose([v1.Resize(40), v1.RandomCrop(32)]), v1.ToTensor()]),
        torch.nn.Sequential(v2.PILToTensor(), v2.Resize(40), v2.RandomCrop(32)),
        v1.Compose(
            [
                v1.RandomChoice([v1.RandomResizedCrop(32), v1.Compose([v1.Resize(40), v1.CenterCrop(32)])]),
                v1.ToTensor(),
            ]
        ),
        v1.Compose([v1.Resize(OmegaConf.create([32, 32])), v1.ToTensor()]),
        _Module().transform,
    ],
    ids=["compose", "sequential", "choice", "hydra", "method"],
)
def test_crops_are_found_wherever_they_are(transform: Any, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), SCALED)
    loader = scale_views(loader_of(copy.deepcopy(transform)), vit)
    assert next(iter(loader))[0].shape[-1] == 16
    restore(vit)
    assert next(iter(loader))[0].shape[-1] == 32


class _Both:
    """Two pipelines, a view from each."""

    def __init__(self, *pipelines: Any) -> None:
        self.pipelines = pipelines

    def __call__(self, image: Any) -> list[Any]:
        return [pipeline(image) for pipeline in self.pipelines]


@pytest.mark.parametrize("patch_size", [16, 24])
def test_each_view_of_a_pipeline_that_makes_several_is_scaled_by_itself(patch_size: int, tiny_vit: Any) -> None:
    def cut(side: int) -> Any:
        return v1.Compose([v1.Resize(side + 8), v1.RandomCrop(side), v1.ToTensor()])

    vit = compress(tiny_vit(dynamic_img_size=True), Strategy(patch_size=patch_size))
    both = v1.Compose([v1.RandomHorizontalFlip(), _Both(cut(64), cut(40))])
    views = next(iter(scale_views(loader_of(both), vit)))[0]
    assert sides(views) == [8 * round(side / patch_size) for side in (64, 40)]


def test_a_blur_before_the_crop_is_refused_in_every_view(tiny_vit: Any) -> None:
    blurred = v1.Compose([v1.GaussianBlur(9), v1.RandomResizedCrop(40), v1.ToTensor()])
    both = v1.Compose([_Both(crop_to(64), blurred)])
    with pytest.raises(ValueError, match="GaussianBlur before what resizes the image"):
        scale_views(loader_of(both), compress(tiny_vit(dynamic_img_size=True), SCALED))


def test_views_may_come_stacked(tiny_vit: Any) -> None:
    images = _Stacked(crop_to(32))
    views = next(iter(scale_views(DataLoader(images, batch_size=4), compress(tiny_vit(), SCALED))))[0]
    assert views.shape == (4, 2, 3, 16, 16)


class _Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield torch.zeros(3, 32, 32)


def test_what_cannot_be_scaled_is_refused_and_nothing_changes(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(dynamic_img_size=True), SCALED)
    cases: list[tuple[Any, type[Exception], str]] = [
        (
            Photos(crop_to(32)),
            TypeError,
            r"loader must be, or hold, a torch.utils.data.DataLoader, or be a module of transforms, got a .*Photos",
        ),
        (DataLoader(_Endless()), TypeError, r"loader must have a map-style data set, got the iterable _Endless"),
        (
            loader_of(_UnknownCrop()),
            ValueError,
            r"known crop, found none in .*Photos, but _UnknownCrop; known: torchvision",
        ),
        (loader_of(v1.Lambda(_shrunk)), ValueError, r"found none in .*Photos, but Lambda; known"),
        (
            loader_of(v1.Compose([v1.Resize(32), v1.ToTensor()])),
            ValueError,
            r"a Resize that leaves the size of views to the image",
        ),
        *(
            (loader_of(v1.Compose([*crop_to(32).transforms, blur])), ValueError, message)
            for blur, message in (
                (_Unknown(sigma=2.0), r"_Unknown with sigma in pixels, which is not known"),
                (_Unknown(prob=0.5, radius_min=0.1), r"_Unknown with radius_min in pixels, which is not known"),
                (_UnknownBlur(r=11), r"_UnknownBlur, which is not known and so cannot be scaled"),
            )
        ),
        (
            loader_of(DINOTransform(global_crop_size=64, local_crop_size=32)),
            ValueError,
            r"views of 64 x 64 px made for patch_size 16 would look like those of 32 x 32 px",
        ),
        (loader_of(crop_to(8)), ValueError, r"patch_size must not be larger than a side of the view"),
    ]
    for loader, kind, message in cases:
        collate = getattr(loader, "collate_fn", None)
        with pytest.raises(kind, match=message):
            scale_views(loader, vit)
        assert getattr(loader, "collate_fn", None) is collate
        assert vit.patch_embed.compression.views is None
    multi_crop = next(loader for loader, _, message in cases if "look like" in message)
    assert sides(multi_crop.dataset[0][0])[:3] == [64, 64, 32]

    loader = loader_of(crop_to(32))
    with pytest.raises(ValueError, match=r"must be compressed first"):
        scale_views(loader, tiny_vit())
    apart = torch.nn.ModuleList([compress(tiny_vit(), SCALED) for _ in range(2)])
    with pytest.raises(ValueError, match=r"one compress\(\) call, got 2 that were compressed apart"):
        scale_views(loader, apart)
    running = loader_of(crop_to(32), num_workers=1, persistent_workers=True)
    next(iter(running))
    with pytest.raises(ValueError, match=r"must not have started its persistent workers"):
        scale_views(running, vit)


def test_a_new_loader_on_the_same_data_set_makes_the_same_views(tiny_vit: Any, first_tokens: Any) -> None:
    images = Photos(crop_to(32))
    scale_views(DataLoader(images, batch_size=4), compress(tiny_vit(), SCALED))
    vit = compress(tiny_vit(), SCALED).train()
    views = next(iter(scale_views(DataLoader(images, batch_size=4), vit)))[0]
    assert views.shape[-1] == 16
    assert first_tokens(vit, views).shape[1] == 1 + 4


@pytest.mark.parametrize("sigmas", [(1, 2), (0.1, 2)])
def test_widths_of_blurs_that_are_whole_numbers_are_not_rounded(sigmas: Any) -> None:
    lightly = SimCLRTransform(input_size=64, sigmas=sigmas)
    transforms = ScaledTransforms(Photos(lightly), (8, 8))
    transforms.apply(28)  # which makes 2 x 2 patches of 8 px of a view of 64 px
    blur = next(step for step in lightly.transforms[0].transform.transforms if hasattr(step, "sigmas"))
    assert blur.sigmas == (sigmas[0] * 16 / 64, sigmas[1] * 16 / 64)


@pytest.mark.parametrize("crop", [v1.RandomCrop(32, padding=4), v1.RandomCrop(32), v1.CenterCrop(32)])
def test_a_window_of_the_image_as_it_is_is_refused(crop: Any, tiny_vit: Any) -> None:
    with pytest.raises(ValueError, match="a smaller one would show less"):
        scale_views(loader_of(v1.Compose([crop, v1.ToTensor()])), compress(tiny_vit(), SCALED))


def test_a_stage_shorter_than_the_look_ahead_gets_full_views(tiny_vit: Any) -> None:
    plan = Stepwise({0.0: SCALED, 0.5: Strategy(), 0.6: SCALED})
    vit = compress(tiny_vit(), plan).train()
    loader = scale_views(loader_of(crop_to(32), images=400, num_workers=2, prefetch_factor=4), vit)
    scheduler, made = SequenceScheduler(vit, total_steps=100), []
    for views, _ in loader:
        made.append(views.shape[-1])
        scheduler.step()
    assert set(made[50:60]) == {32}


def test_a_model_from_a_file_drives_workers(tiny_vit: Any, tmp_path: Path) -> None:
    vit = compress(tiny_vit(), SCALED)
    scale_views(loader_of(crop_to(32)), vit)
    torch.save(vit, tmp_path / "model.pt")
    vit = torch.load(tmp_path / "model.pt", weights_only=False)
    assert vit.patch_embed.compression.views.shared.is_shared()


def test_with_workers_a_data_set_that_shares_the_transforms_keeps_full_views(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), SCALED)
    loader = loader_of(crop_to(32), num_workers=1)
    validation = Photos(loader.dataset.transform)  # type: ignore[attr-defined]
    made = [views.shape[-1] for views, _ in scale_views(loader, vit)]
    assert made == [32] + [16] * 15
    assert validation[0][0].shape[-1] == 32


def test_views_that_would_look_alike_at_different_stages_are_refused(tiny_vit: Any) -> None:
    vit = compress(
        tiny_vit(dynamic_img_size=True), Stepwise({0.0: Strategy(patch_size=32), 0.5: Strategy(patch_size=14)})
    )
    loader = loader_of(DINOTransform(global_crop_size=96, local_crop_size=48))
    with pytest.raises(ValueError, match=r"96 x 96 px made for patch_size 32 would look like those of 48 x 48"):
        scale_views(loader, vit)


def test_gradient_error_asks_for_full_views(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), SCALED).train()
    loader = scale_views(loader_of(crop_to(32)), vit)
    with pytest.raises(ValueError, match=r"must get full views, got some of 16 x 16 px that scale_views made smaller"):
        gradient_error(vit, lambda batch: vit(batch[0]).square().mean(), list(loader)[:2], [SCALED], cost="flops")
    with pytest.raises(ValueError, match="must not have scale_views for an online schedule with patch sizes"):
        OnlineScheduler(vit, lambda batch: vit(batch[0]).square().mean(), total_steps=100)


def _coloured(index: int) -> tuple[int, int, int]:
    return index % 5 * 60, index // 5 % 5 * 60, index // 25 % 5 * 60


def _tar_of_images(path: Path, images: int) -> Path:
    """Every image of one colour, which tells its number below 125; its class is its number."""
    with tarfile.open(path, "w") as tar:
        for index in range(images):
            file = io.BytesIO()
            Image.new("RGB", (40, 40), _coloured(index)).save(file, "PNG")
            entry = tarfile.TarInfo(f"{index:05d}/{index:05d}.png")
            entry.size = file.tell()
            file.seek(0)
            tar.addfile(entry, file)
    return path


def _wrong_images(path: Path, workers: int, start: str | None, vit: Any = None) -> tuple[int, int, set[int]]:
    """How many images are another's, of how many, and the sides of views."""
    images = timm.data.create_dataset("", root=str(path))
    images.transform = crop_to(32)
    settings = {"multiprocessing_context": start, "timeout": 120} if workers else {}
    loader: Any = DataLoader(images, batch_size=8, num_workers=workers, **settings)
    if vit is not None:
        loader = scale_views(loader, vit)
    wrong = seen = 0
    found = set()
    for views, labels in loader:
        expected = torch.tensor([_coloured(int(label)) for label in labels]) / 255
        wrong += int((views.mean((2, 3)) - expected).abs().amax(1).gt(0.02).sum())
        seen += len(views)
        found.add(views.shape[-1])
    return wrong, seen, found


STARTS = [(0, None), *((workers, start) for workers in (1, 4) for start in ("fork", "spawn", "forkserver"))]


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork")])
def test_images_of_a_tar_file_are_their_own(workers: int, start: str | None, tmp_path: Path, tiny_vit: Any) -> None:
    tar = _tar_of_images(tmp_path / "x.tar", 120)
    assert _wrong_images(tar, workers, start) == (0, 120, {32})
    assert _wrong_images(tar, workers, start, compress(tiny_vit(), SCALED)) == (0, 120, {32, 16} if workers else {16})


@pytest.mark.soak
@pytest.mark.parametrize(("workers", "start"), STARTS)
def test_no_image_of_2000_in_a_tar_file_is_anothers(
    workers: int, start: str | None, tmp_path: Path, tiny_vit: Any
) -> None:
    tar = _tar_of_images(tmp_path / "x.tar", 2000)
    wrong, seen, found = _wrong_images(tar, workers, start, compress(tiny_vit(), SCALED))
    assert (wrong, seen) == (0, 2000)
    assert 16 in found


class _Owned(Photos):
    """Draws from a generator of its own, and counts what is asked of it."""

    asked = 0

    def __init__(self, transform: Any) -> None:
        super().__init__(transform)
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        return self.transform(self.photo.crop((0, 0, 96, 96))), self.generator.random()


@pytest.mark.parametrize("strategy", [Strategy(), SCALED])
def test_nothing_is_asked_of_a_data_set_and_its_own_generator_goes_on_as_in_a_plain_run(
    strategy: Strategy, tiny_vit: Any
) -> None:
    plain, images = _Owned(crop_to(32)), _Owned(crop_to(32))
    loader = DataLoader(images, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a plan that scales nothing says so
        scale_views(loader, compress(tiny_vit(), strategy))
    assert images.asked == 0
    drawn = [torch.cat([numbers for _, numbers in batches]) for batches in (DataLoader(plain, batch_size=4), loader)]
    assert torch.equal(*drawn)


def test_crops_that_would_look_alike_in_parts_of_a_data_set_are_refused(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(dynamic_img_size=True), SCALED)
    for order in ((64, 128), (128, 64)):
        images = ConcatDataset([Photos(crop_to(side)) for side in order])
        with pytest.raises(ValueError, match="128 x 128 px made for patch_size 16 would look like those of 64 x 64"):
            scale_views(DataLoader(images, batch_size=4), vit)
    images = ConcatDataset([Photos(crop_to(32)), Photos(_UnknownCrop())])
    with pytest.raises(ValueError, match=r"found none in .*Photos, but _UnknownCrop.*every part of the data set"):
        scale_views(DataLoader(images, batch_size=4), vit)


def test_parts_of_a_data_set_that_differ_in_size_each_keep_their_own(tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit(dynamic_img_size=True), SCALED).train()
    images = ConcatDataset([Photos(crop_to(side), images=4) for side in (64, 96)])
    made = [views for views, _ in scale_views(DataLoader(images, batch_size=4), vit)]
    assert [(views.shape[-1], first_tokens(vit, views).shape[1]) for views in made] == [(32, 1 + 16), (48, 1 + 36)]


@pytest.mark.parametrize("workers", [0, 1])
def test_views_that_accelerate_prepared_follow(workers: int, tiny_vit: Any) -> None:
    from accelerate import Accelerator

    vit = compress(tiny_vit(), SCALED)
    prepared = Accelerator(cpu=True).prepare(loader_of(crop_to(32), num_workers=workers))
    assert [views.shape[-1] for views, _ in scale_views(prepared, vit)] == [32] * workers + [16] * (16 - workers)
    earlier = Accelerator(cpu=True).prepare(scale_views(loader_of(crop_to(32), num_workers=workers), vit))
    assert [views.shape[-1] for views, _ in earlier] == [32] * workers + [16] * (16 - workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_size_that_the_user_sets_between_epochs_is_what_gets_scaled(
    workers: int, tiny_vit: Any, first_tokens: Any
) -> None:
    vit = compress(tiny_vit(dynamic_img_size=True), SCALED).train()
    loader = scale_views(loader_of(crop_to(32), num_workers=workers), vit)
    made = []
    for side in (32, 48, 80):
        loader.dataset.transform.transforms[0].size = (side, side)  # type: ignore[attr-defined]
        for views, _ in loader:
            made.append(views.shape[-1])
            assert first_tokens(vit, views).shape[1] == 1 + (side // 16) ** 2
    late = slice(2, None)  # a value set between two batches holds for the one after the next
    assert [set(made[start : start + 16][late]) for start in (0, 16, 32)] == [{16}, {24}, {40}]
    if workers:
        assert loader.dataset.transform.transforms[0].size == (80, 80)  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_put_in_its_place_is_scaled_as_well(workers: int, tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit(dynamic_img_size=True), SCALED).train()
    images = FakeData(64, (3, 96, 96), transform=crop_to(32))
    loader = scale_views(DataLoader(images, batch_size=4, num_workers=workers), vit)
    first = [views.shape[-1] for views, _ in loader]
    images.transform = crop_to(48)
    second = []
    for views, _ in loader:
        second.append(views.shape[-1])
        assert first_tokens(vit, views).shape[1] == 1 + 9
    assert (first[2:], second[2:]) == ([16] * 14, [24] * 14)
    images.transform = v1.Lambda(_shrunk)
    context: Any = warnings.catch_warnings() if workers else pytest.warns(UserWarning, match="goes on with full views")
    with context:
        assert {views.shape[-1] for views, _ in loader} == {32}


def test_data_sets_are_freed_over_20_epochs(tiny_vit: Any, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "class" / "a.png")
    vit, alive = compress(tiny_vit(), SCALED), []
    for _ in range(20):
        images = ImageFolder(str(tmp_path), transform=crop_to(32))
        alive.append(weakref.ref(images))
        assert next(iter(scale_views(DataLoader(images), vit)))[0].shape[-1] == 16
        del images
    gc.collect()
    assert [images() for images in alive] == [None] * 20
    assert len(vit.patch_embed.compression.views._followers) == 0


@pytest.mark.parametrize("transform", [[v1.RandomResizedCrop(40), _UnknownCrop()], [v1.RandomResizedCrop(40)]])
def test_where_something_else_decides_the_size_the_loader_goes_on_with_full_views_and_says_so(
    transform: list[Any], tiny_vit: Any
) -> None:
    def enlarged(batch: list[Any]) -> Any:
        return F.interpolate(torch.stack([view for view, _ in batch]), size=(32, 32)), 0

    vit = compress(tiny_vit(dynamic_img_size=True), SCALED)
    alone = len(transform) == 1
    images = Photos(v1.Compose([*transform, v1.ToTensor()] if alone else transform))
    loader = DataLoader(images, batch_size=4, collate_fn=enlarged if alone else None)
    scale_views(loader, vit)
    crop = images.transform.transforms[0]  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="32 x 32 px came out of the loader where") as told:
        sizes = [(views.shape[-1], *crop.size) for views, _ in loader]
    assert sizes == [(32, 40, 40)] * 16
    assert len([one for one in told if "came out" in str(one.message)]) == 1


def test_a_batch_of_which_only_some_views_are_scaled_is_not_lost(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), SCALED)
    mixed = v1.RandomChoice([crop_to(32), _UnknownCrop()])
    loader = scale_views(loader_of(mixed), vit)
    seed_all(1)  # of four views, all may be small by chance
    with pytest.warns(UserWarning, match="32 x 32 px came out of the loader where 16 x 16 px were asked for"):
        assert [views.shape for views, _ in loader] == [(4, 3, 32, 32)] * 16


def test_a_crop_of_the_batch_after_the_data_sets_own_is_told_and_stops_the_scaling(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(dynamic_img_size=True), SCALED).train()
    loader = scale_views(loader_of(v1.Compose([v1.Resize((80, 80)), v1.CenterCrop(64), v1.ToTensor()])), vit)
    crop = v2.RandomResizedCrop(40)

    def train(views: Tensor) -> int:
        vit(crop(views))
        return views.shape[-1]

    with pytest.warns(UserWarning, match="views of 40 x 40 px reach the encoder, which no loader was asked for"):
        made = [train(views) for views, _ in loader]
    assert made == [32] + [64] * 15


def test_what_helps_is_told_at_the_call(tiny_vit: Any) -> None:
    vit, loader = compress(tiny_vit(), SCALED), loader_of(crop_to(32))
    with pytest.raises(
        TypeError, match=r"^loader must come first and model second: .* got a VisionTransformer and a D"
    ):
        scale_views(vit, loader)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"^model must be compressed first.*got a plain VisionTransformer"):
        scale_views(loader, tiny_vit())
    with pytest.warns(UserWarning, match="no strategy of the plan has patches larger than the encoder's own 8 px"):
        scale_views(loader, compress(tiny_vit(), Strategy(0.5)))
    with pytest.warns(UserWarning, match="make views of 64 x 64 px, which the plain model refuses"):
        scale_views(loader_of(crop_to(64)), vit)


class _OwnBlur(torch.nn.Module):
    """Has its name from what it wraps."""

    def __init__(self, kornia_op: torch.nn.Module) -> None:
        super().__init__()
        self.kornia_op = kornia_op

    def forward(self, views: Tensor) -> Tensor:
        return cast(Tensor, self.kornia_op(views))


def _on_the_device(name: str) -> torch.nn.Module:
    import kornia.augmentation as K

    blur = K.RandomGaussianBlur((9, 9), (0.1, 2.0), p=1.0)
    return {
        "kornia": lambda: K.AugmentationSequential(K.RandomResizedCrop((32, 32)), blur),
        "kornia's blur in a module": lambda: torch.nn.Sequential(K.RandomResizedCrop((32, 32)), _OwnBlur(blur)),
        "kornia in a Sequential": lambda: torch.nn.Sequential(K.RandomResizedCrop((32, 32)), K.RandomHorizontalFlip()),
        "kornia's random crop": lambda: K.AugmentationSequential(K.Resize((40, 40)), K.RandomCrop((32, 32))),
        "kornia's centre crop": lambda: K.AugmentationSequential(K.Resize((40, 40)), K.CenterCrop(32)),
        "torchvision": lambda: v2.Compose([v2.RandomResizedCrop(32), v2.GaussianBlur(9)]),
        "torchvision in a Sequential": lambda: torch.nn.Sequential(v2.Resize((32, 32)), v2.RandomHorizontalFlip()),
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        *("kornia", "kornia in a Sequential", "kornia's random crop", "kornia's centre crop"),
        *("kornia's blur in a module", "torchvision", "torchvision in a Sequential"),
    ],
)
def test_transforms_of_whole_batches_follow_at_every_call(name: str, tiny_vit: Any, first_tokens: Any) -> None:
    vit, photo = compress(tiny_vit(), Strategy()).train(), v1.functional.to_tensor(load_sample_image("china.jpg"))
    batch = photo[None, :, :96, :96].repeat(2, 1, 1, 1)
    transform, plain = _on_the_device(name), _on_the_device(name)
    with pytest.warns(UserWarning, match="no strategy of the plan"):
        assert scale_views(transform, vit) is transform
    settings = repr(transform)
    for strategy, side in ((Strategy(), 32), (SCALED, 16), (Strategy(0.5, 32), 8), (Strategy(), 32)):
        set_strategy(vit, strategy)
        seed_all(1)
        views = transform(batch)
        assert views.shape == (2, 3, side, side)
        patches = (32 // (strategy.patch_size or 8)) ** 2
        assert first_tokens(vit, views).shape[1] == 1 + max(1, round(patches * (1 - strategy.token_dropout)))
        assert repr(transform) == settings  # between calls it is as its owner made it
        seed_all(1)
        full = plain(batch)
        if side == 32:
            assert torch.equal(views, full)
        else:
            shrunk = F.interpolate(full, (side, side), mode="bilinear", antialias=True)
            assert (views - shrunk).square().mean().sqrt() < 0.5 * shrunk.std()
    set_strategy(vit, SCALED)
    restore(vit)
    assert transform(batch).shape[-1] == 32


def test_a_module_whose_size_its_owner_changes_is_scaled_from_there(tiny_vit: Any, first_tokens: Any) -> None:
    vit, crop = compress(tiny_vit(dynamic_img_size=True), SCALED).train(), v2.RandomResizedCrop(32)
    scale_views(crop, vit)
    batch = torch.rand(2, 3, 96, 96)
    assert crop(batch).shape[-1] == 16
    crop.size = (64, 64)
    views = crop(batch)
    assert views.shape[-1] == 32
    assert first_tokens(vit, views).shape[1] == 1 + 16
    with pytest.raises(TypeError):
        crop(batch, no_such_argument=1)
    assert crop.size == (64, 64)


@pytest.mark.parametrize("ahead", ["after", "before"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dispatch", [False, True])
def test_views_that_accelerate_fetches_ahead_are_never_too_small_in_either_order(
    ahead: str, workers: int, dispatch: bool, tiny_vit: Any
) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    vit = compress(tiny_vit(), RELAXING)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    settings = {"num_workers": workers, "persistent_workers": True} if workers else {}
    loader = loader_of(crop_to(32), **settings)
    if ahead == "before":
        loader = accelerator.prepare(scale_views(loader, vit))
    else:
        loader = scale_views(accelerator.prepare(loader), vit)
    scheduler, made = SequenceScheduler(vit, total_steps=32), []
    for _ in range(2):  # 16 batches each: views grow where workers wait for the next epoch
        for views, _ in loader:
            made.append(views.shape[-1])
            scheduler.step()
    assert 16 in made[:16]
    assert set(made[16:]) == {32}


@pytest.mark.parametrize("ahead", ["after", "before"])
@pytest.mark.parametrize(("workers", "accumulated"), [(0, 1), (2, 1), (0, 4)])
def test_views_of_hugging_faces_trainer_follow(
    ahead: str, workers: int, accumulated: int, tiny_vit: Any, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    vit = compress(tiny_vit(num_classes=10), RELAXING)
    images = FakeData(96, (3, 48, 48), num_classes=10, transform=crop_to(32))
    made: list[tuple[int, int]] = []

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit

        def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
            made.append((views.shape[-1], scheduler.strategy.patch_size or 8))
            return {"loss": F.cross_entropy(self.vit(views), labels)}

    class Scaled(Trainer):
        def get_train_dataloader(self) -> Any:
            if ahead == "after":
                return scale_views(super().get_train_dataloader(), vit)
            loader = DataLoader(images, batch_size=4, num_workers=workers, collate_fn=_for_trainer)
            return self.accelerator.prepare(scale_views(loader, vit))

    class Step(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            scheduler.step()

    scheduler = SequenceScheduler(vit, total_steps=24 // accumulated)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        dataloader_num_workers=workers,
        gradient_accumulation_steps=accumulated,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Scaled(Classifier(), arguments, _for_trainer, images, callbacks=[Step()]).train()
    assert len(made) == 24
    assert (16, 16) in made
    assert (16, 8) not in made


def _for_trainer(batch: list[Any]) -> dict[str, Tensor]:
    return {
        "views": torch.stack([view for view, _ in batch]),
        "labels": torch.tensor([int(label) for _, label in batch]),
    }


def test_a_stateful_loader_that_accelerate_has_started_is_refused_with_what_helps(tiny_vit: Any) -> None:
    pytest.importorskip("torchdata.stateful_dataloader")
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    vit = compress(tiny_vit(), SCALED)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
    prepared = accelerator.prepare(loader_of(crop_to(32)))
    with pytest.raises(ValueError, match=r"Accelerate starts a StatefulDataLoader in prepare.*scale_views before that"):
        scale_views(prepared, vit)
    prepared = accelerator.prepare(scale_views(loader_of(crop_to(32)), vit))
    assert {views.shape[-1] for views, _ in prepared} == {16}


@pytest.mark.parametrize("workers", [0, 1])
def test_timms_prefetching_loader_follows(workers: int, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), RELAXING)
    images = FakeData(64, (3, 96, 96))
    loader = timm.data.create_loader(
        images,
        (3, 32, 32),
        4,
        is_training=True,
        num_workers=workers,
        device=torch.device("cpu"),
        persistent_workers=workers > 0,
    )
    assert scale_views(loader, vit) is loader
    scheduler, made = SequenceScheduler(vit, total_steps=32), []
    for _ in range(2):
        for views, _ in loader:
            made.append(views.shape[-1])
            scheduler.step()
    assert made[workers : 8 + workers] == [16] * 8
    assert set(made[16:]) == {32}


@dataclasses.dataclass
class _View:
    image: Any
    number: int


class _Wrapped(Photos):
    """Samples in a container of its own, and some that could not be read."""

    def __init__(self, container: Any, transform: Any = None) -> None:
        super().__init__(transform or crop_to(32))
        self.container = container

    def __getitem__(self, index: int) -> Any:
        broken = index % 4 == 1 or 16 <= index < 20
        return None if self.container is None and broken else (self.container or tuple)(super().__getitem__(index))


def _in_a_dataclass(sample: Any) -> _View:
    return _View(*sample)


def _in_a_mapping(sample: Any) -> Any:
    from transformers import BatchFeature

    return BatchFeature({"image": sample[0], "number": sample[1]})


def _collated(batch: list[Any]) -> Any:
    if isinstance(batch[0], _View):
        return _View(torch.stack([sample.image for sample in batch]), len(batch))
    batch = [sample for sample in batch if sample is not None]
    return default_collate(batch) if batch else None


def _image(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (list, tuple)) else batch.image if isinstance(batch, _View) else batch["image"]


@pytest.mark.parametrize("container", [None, _in_a_dataclass, _in_a_mapping])
def test_views_in_containers_and_batches_without_any_are_no_reason_to_stop(container: Any, tiny_vit: Any) -> None:
    loader = DataLoader(_Wrapped(container), batch_size=4, collate_fn=_collated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = list(scale_views(loader, compress(tiny_vit(), SCALED)))
    assert [None if batch is None else _image(batch).shape[-1] for batch in made] == [
        None if container is None and number == 4 else 16 for number in range(16)
    ]


@pytest.mark.parametrize("container", [_in_a_dataclass, _in_a_mapping])
def test_a_batch_in_containers_of_which_only_some_views_are_scaled_is_not_lost(container: Any, tiny_vit: Any) -> None:
    mixed = v1.RandomChoice([crop_to(32), _UnknownCrop()])
    loader = DataLoader(_Wrapped(container, mixed), batch_size=8, collate_fn=_collated)
    scale_views(loader, compress(tiny_vit(), SCALED))
    with pytest.warns(UserWarning, match="32 x 32 px came out of the loader where 16 x 16 px were asked for"):
        assert [_image(batch).shape for batch in loader] == [(8, 3, 32, 32)] * 8


def test_a_copy_of_a_loader_follows_the_same_model(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), SCALED)
    loader = scale_views(loader_of(crop_to(32), images=8), vit)
    next(iter(loader))
    loaders = [loader, copy.deepcopy(loader)]
    assert loaders[0].dataset is not loaders[1].dataset

    def made() -> list[set[int]]:
        return [{views.shape[-1] for views, _ in each} for each in loaders]

    assert made() == [{16}, {16}]
    set_strategy(vit, Strategy())
    assert made() == [{32}, {32}]
    set_strategy(vit, SCALED)
    assert made() == [{16}, {16}]
    restore(vit)
    assert made() == [{32}, {32}]


@pytest.mark.parametrize("patch_size", [16, 32])
def test_kornias_elastic_distortions_keep_their_share_of_the_view(patch_size: int, tiny_vit: Any) -> None:
    import kornia
    import kornia.augmentation as K

    vit = compress(tiny_vit(img_size=128), Strategy(patch_size=patch_size))
    # With corners that are not aligned, its default, kornia before 0.9 shifts all of the image, too.
    aligned = Version(kornia.__version__) < Version("0.9")
    elastic = K.RandomElasticTransform((31, 31), (5.0, 5.0), (1.0, 1.0), align_corners=aligned, p=1.0)
    transform = torch.nn.Sequential(K.Resize((128, 128)), elastic)
    columns = torch.linspace(0, 1, 128).expand(20, 3, 128, 128)

    def distortion() -> Tensor:
        """Root mean square shift of a pixel, in parts of the view, and how it changes over a 32nd of the view."""
        side = (shifted := transform(columns)).shape[-1]
        shift = shifted - F.interpolate(columns, (side, side), mode="bilinear", antialias=True)
        shift = shift[..., side // 8 : -side // 8, side // 8 : -side // 8]  # away from the border, where values end
        change = shift[..., side // 32 :] - shift[..., : -side // 32]
        return torch.stack([values.square().mean().sqrt() for values in (shift, change)])

    full = distortion()
    scale_views(transform, vit)
    assert transform(columns).shape[-1] == 128 * 8 // patch_size
    torch.testing.assert_close(distortion(), full, rtol=0.15, atol=0)


def test_what_kornia_measures_in_pixels_and_is_not_known_is_refused(tiny_vit: Any) -> None:
    import kornia.augmentation as K

    class Smooth(K.IntensityAugmentationBase2D):
        def __init__(self) -> None:
            super().__init__(p=1.0)
            self.flags = {"kernel_size": (9, 9)}

    with pytest.raises(ValueError, match="Smooth with kernel_size in pixels, which is not known"):
        scale_views(torch.nn.Sequential(K.RandomResizedCrop((32, 32)), Smooth()), compress(tiny_vit(), SCALED))


def test_full_views_that_keep_coming_where_small_ones_are_made_stop_the_scaling(tiny_vit: Any) -> None:
    vit = compress(tiny_vit().train(), Strategy(0.0, 16))
    images = FakeData(800, (3, 64, 64), transform=v1.Compose([v1.RandomResizedCrop(32), v1.ToTensor()]))
    loader = scale_views(DataLoader(images, batch_size=4), vit)
    again = v1.RandomResizedCrop(32)  # what users do on the device, to the same size
    sizes = []

    def train() -> None:
        for views, _ in loader:
            sizes.append(views.shape[-1])
            vit(again(views))

    with pytest.warns(UserWarning, match="views of 32 x 32 px keep coming where smaller ones are asked for") as told:
        train()
    assert len([one for one in told if "keep coming" in str(one.message)]) == 1
    assert (sizes[0], sizes[-1]) == (16, 32)


def test_loaders_are_followed_under_another_default_device(tiny_vit: Any) -> None:
    vit, loader = compress(tiny_vit(), Strategy(0.0, 16)), loader_of(crop_to(32))
    with torch.device("meta"):
        scale_views(loader, vit)
    assert sides(next(iter(loader))[0]) == [16]


def test_a_worker_with_another_way_to_share_memory_sees_what_is_asked_for(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), SCALED)
    scale_views(loader_of(crop_to(32)), vit)
    views = vit.patch_embed.compression.views
    before = torch.multiprocessing.get_sharing_strategy()
    try:
        torch.multiprocessing.set_sharing_strategy("file_system")
        sent = bytes(ForkingPickler.dumps(views))
        torch.multiprocessing.set_sharing_strategy("file_descriptor")
        of_worker = pickle.loads(sent)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    assert int(of_worker.shared) == 16
    set_strategy(vit, Strategy())
    assert int(of_worker.shared) == 0


def test_transforms_of_whole_batches_make_full_views_while_nothing_trains(tiny_vit: Any) -> None:
    vit, crop = compress(tiny_vit(), SCALED).train(), v2.RandomResizedCrop(32)
    scale_views(crop, vit)
    batch = torch.rand(2, 3, 96, 96)
    assert crop(batch).shape[-1] == 16
    vit.eval()
    assert vit(crop(batch)).shape[0] == 2  # which takes 32 px only
    vit.train()
    assert pickle.loads(pickle.dumps(crop))(batch).shape[-1] == crop(batch).shape[-1] == 16


class _NormalizesByItself(VisionTransformer):
    def forward(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, super().forward(pixels.sub(0.5).div(0.25)))


def test_a_model_of_one_size_that_changes_views_itself_is_refused_smaller_ones(tiny_vit: Any) -> None:
    def model(kind: Any) -> Any:
        return kind(image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64)

    loader = loader_of(crop_to(32))
    refused = compress(model(_NormalizesByItself), SCALED)
    with pytest.raises(ValueError, match="model must hand views on to its patch embedding as they are, got a _Normal"):
        scale_views(loader, refused)
    assert sides(next(iter(loader))[0]) == [32]
    scale_views(loader, compress(model(VisionTransformer), SCALED))
    assert sides(next(iter(loader))[0]) == [16]
