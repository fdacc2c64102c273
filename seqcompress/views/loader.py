"""Let the views of a DataLoader follow the strategy of an encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from seqcompress.compression import compressed_embeds_of
from seqcompress.encoders import find_encoder
from seqcompress.training.random_states import RandomStates
from seqcompress.views.scaled_views import ScaledViews, Size, scaled_size
from seqcompress.views.transforms import ScaledTransforms, known, objects_in

__all__ = ["scale_views"]


def scale_views(loader: DataLoader[Any], model: nn.Module) -> DataLoader[Any]:
    """Have a loader make smaller views while the strategy scales patches, in place.

    Where a strategy cuts a view of 224 px into patches of 32 px, the loader's workers crop it to 112 px at once: a
    crop of the same distribution with the same grid of tokens, made and moved for a fraction of the price. Blurs and
    borders shrink along, and JPEG files are decoded at half their size where torchvision or Lightly reads them.

    The loader changes over with the schedule, without a restart of its workers: a little ahead where views grow, so
    that none is ever too small for its step, and a few batches behind where they shrink. The encoder takes both sizes,
    with as many tokens as the strategy says. Training is not the same to the last digit as with full views: a smaller
    crop is resampled once where a full one is resampled twice.

    Args:
        loader: must not have started its workers yet. Its data set must be a map-style one whose samples are, or hold,
            views as tensors (C, H, W), made by transforms of torchvision (v1 or v2), Lightly, solo-learn or timm.
        model: a compressed encoder, or a module that holds encoders which were compressed together. A teacher must be
            among them: compressed with ``teacher=``, or found by ``accelerate``.

    Returns:
        ``loader``, the same object.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing is compressed, the loader is in use, or its views cannot be scaled; the message says why,
            and nothing has been changed.

    Examples:
        >>> import timm, torchvision
        >>> from torch.utils.data import DataLoader
        >>> from torchvision.transforms import Compose, RandomResizedCrop, ToTensor
        >>> import seqcompress
        >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
        >>> _ = seqcompress.compress(vit, patch_size=32)
        >>> images = torchvision.datasets.FakeData(8, transform=Compose([RandomResizedCrop(224), ToTensor()]))
        >>> loader = seqcompress.scale_views(DataLoader(images, batch_size=4), vit)
        >>> next(iter(loader))[0].shape
        torch.Size([4, 3, 112, 112])
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader must be a torch.utils.data.DataLoader, got {loader!r}")
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(f"loader must have a map-style data set, got the iterable {type(loader.dataset).__name__}")
    if getattr(loader, "_iterator", None) is not None:
        raise ValueError("loader must not have started its persistent workers, got one that has: make a new one")
    embeds = compressed_embeds_of(model)
    compression = embeds[0].compression
    if any(embed.compression is not compression for embed in embeds):
        raise ValueError(
            f"model must hold encoders of one compress() call, got {len(embeds)} that were compressed apart"
        )
    bases = {family.patch_size(encoder) for family, encoder in (find_encoder(embed.encoder) for embed in embeds)}
    if len(bases) > 1:
        raise ValueError(f"model must hold encoders of one patch size, got {sorted(bases)}")
    (base,) = bases

    followed = loader.collate_fn if isinstance(loader.collate_fn, FollowingCollate) else None  # earlier, or another
    collate = loader.collate_fn if followed is None else followed.collate
    transforms = ScaledTransforms(loader.dataset, base)
    sizes = {strategy.patch_size or 0 for strategy in (*compression.plan.strategies(), compression.strategy)}
    patch_sizes = sorted(size for size in sizes if size > max(base))
    full = _checked_views(loader.dataset, transforms, patch_sizes, (embeds[0].embed.proj.in_channels, *base))
    views = compression.views or ScaledViews(base)
    trial = copy.deepcopy(views)
    trial.add(None, full, 0)
    for patch_size in patch_sizes:
        problem = trial.conflict(patch_size)
        if problem is not None:
            raise ValueError(f"loader: {problem}")
        trial.note(patch_size)

    if followed is not None:
        followed.views.drop(followed.transforms)
    # Workers look for themselves; in this process, where other data sets may have the same transforms, nothing changes.
    views.add(None if loader.num_workers else transforms, full, _steps_ahead(loader))
    loader.collate_fn = FollowingCollate(collate, transforms, views)
    if compression.views is None:
        compression.views = views
        views.ask_for(compression.strategy)
    return loader


class FollowingCollate:
    """Collates as before; then looks for which patch size the next batch of this process is to be made.

    Looked for between batches only, so that all views of a batch have the same size. The transforms are the data
    set's own: in a worker, both come out of the same fork or pickle.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], transforms: ScaledTransforms, views: ScaledViews) -> None:
        self.collate, self.transforms, self.views = collate, transforms, views

    def __call__(self, batch: list[Any]) -> Any:
        collated = self.collate(batch)
        self.transforms.apply(int(self.views.shared) or None)
        return collated


def _steps_ahead(loader: DataLoader[Any]) -> int:
    """Steps from the moment at which a worker looks for the size of its next batch until that batch is used."""
    # One round of the workers more than are under way: from one epoch to the next, a worker may wait for its turn.
    return 1 + loader.num_workers * (2 + (loader.prefetch_factor or 0))


def _checked_views(
    dataset: Any, transforms: ScaledTransforms, patch_sizes: list[int], patch: tuple[int, int, int]
) -> set[Size]:
    """Sizes of the full views, after a look at one sample for every patch size."""
    put_back = transforms.snapshot()
    transforms.apply(None)
    try:
        full = _view_sizes(dataset, patch)
        _check_sizes(dataset, transforms, patch_sizes, patch, full)
    finally:
        put_back()
    return set(full)


def _check_sizes(
    dataset: Any, transforms: ScaledTransforms, patch_sizes: list[int], patch: tuple[int, int, int], full: list[Size]
) -> None:
    """Raise ValueError unless views become exactly as small as they should."""
    if not full:
        raise ValueError(
            f"loader must have a data set whose samples hold views as tensors (C, H, W), "
            f"found none in the first sample of {type(dataset).__name__}"
        )
    for patch_size in patch_sizes:
        expected = [scaled_size(size, patch_size, transforms.base) for size in full]
        transforms.apply(patch_size)
        got = _view_sizes(dataset, patch)
        if got != expected:
            raise ValueError(
                f"loader must make views of sizes {expected} for patch_size {patch_size}, got {got}: something "
                f"that is not known decides their size; known: {known()}"
            )


def _view_sizes(dataset: Any, patch: tuple[int, int, int]) -> list[Size]:
    """Height and width of every view in the first sample: of what has an encoder's channels and room for a patch."""
    random_states = RandomStates()
    try:
        with _as_it_was(dataset):
            sample = dataset[0]
    except Exception as error:
        raise ValueError(
            f"loader must have a data set whose first sample can be made at every patch size, got {error!r}"
        ) from error
    finally:
        random_states.restore()
    shapes = [tuple(tensor.shape[-3:]) for tensor in _tensors(sample) if tensor.ndim >= 3]
    return [
        (height, width)
        for channels, height, width in shapes
        if channels == patch[0] and height >= patch[1] and width >= patch[2]
    ]


def _tensors(sample: Any) -> Iterator[Tensor]:
    if isinstance(sample, Tensor):
        yield sample
    elif isinstance(sample, dict):
        yield from (tensor for item in sample.values() for tensor in _tensors(item))
    elif isinstance(sample, (list, tuple)):
        yield from (tensor for item in sample for tensor in _tensors(item))


@contextmanager
def _as_it_was(dataset: Any) -> Iterator[None]:
    """Undo what a first sample does to a data set: a file that it opens should not be open when workers are forked."""
    before: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    for held in objects_in(dataset):
        if isinstance(held, dict):
            before.append((held, dict(held)))
        elif not isinstance(held, (list, tuple)) and hasattr(type(held), "__getitem__"):  # one within another, too
            before.append((vars(held), dict(vars(held))))
    try:
        yield
    finally:
        for attributes, values in before:
            attributes.clear()
            attributes.update(values)
