"""Let views follow the strategy of an encoder: those of a DataLoader, or those a module makes of whole batches."""

from __future__ import annotations

import copy
import dataclasses
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from seqcompress.compression import embeds_of_one_compression, is_compressed
from seqcompress.encoders import Compression
from seqcompress.messages import described
from seqcompress.views.scaled_views import ScaledViews, Size, px, scaled_size
from seqcompress.views.transforms import ScaledTransforms, put_back

__all__ = ["scale_views"]

Maker = TypeVar("Maker", DataLoader[Any], nn.Module)


def scale_views(loader: Maker, model: nn.Module) -> Maker:
    """Have a loader, or a module of transforms, make smaller views while the strategy scales patches, in place.

    Where a strategy cuts a view of 224 px into patches of 32 px, the loader's workers crop it to 112 px at once: a
    crop of the same distribution with the same grid of tokens, made and moved for a fraction of the price. Blurs and
    borders shrink along, and JPEG files are decoded at half their size where torchvision or Lightly reads them.

    The loader changes over with the schedule, without a restart of its workers: a little ahead where views grow, so
    that none is ever too small for its step, and a few batches behind where they shrink. The encoder takes both sizes,
    with as many tokens as the strategy says. Training is not the same to the last digit as with full views: a smaller
    crop is resampled once where a full one is resampled twice.

    No sample is made here: sizes are read off the crops. Whether views come out as small as they should is seen where
    they are made; where they do not, one warning says so, and the loader goes on with full views.

    Args:
        loader: must not have started its workers yet. Its data set must be a map-style one whose samples are, or hold,
            views as tensors (C, H, W), made by transforms of torchvision (v1 or v2), Lightly, solo-learn or timm;
            Accelerate or timm may have wrapped it. Or a module of kornia's or torchvision's (v2) transforms that is
            called on batches (B, C, H, W) in the training process: it then follows the strategy at every call.
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
    _check_types(loader, model)
    embeds = embeds_of_one_compression(model)
    compression: Compression = embeds[0].compression
    bases = {embed.encoder.patch_size for embed in embeds}
    if len(bases) > 1:
        raise ValueError(f"model must hold encoders of one patch size, got {sorted(bases)}")
    (base,) = bases
    channels = {embed.encoder.channels for embed in embeds}

    inner = _inner(loader)
    root = loader if inner is None else inner.dataset
    full = ScaledTransforms(root, base).full
    strategies = (*compression.plan.strategies(), compression.strategy)
    patch_sizes = sorted(
        {strategy.patch_size or 0 for strategy in strategies if (strategy.patch_size or 0) > max(base)}
    )
    views = compression.views if isinstance(compression.views, ScaledViews) else ScaledViews(base)
    trial = copy.deepcopy(views)
    trial.add(None, full, 0)
    for patch_size in patch_sizes:
        problem = trial.conflict(patch_size)
        if problem is not None:
            raise ValueError(f"loader: {problem}")
        trial.expect_views_for(patch_size)
    if not patch_sizes:
        _say(f"no strategy of the plan has patches larger than the encoder's own {max(base)} px: all views stay full")
    for embed in embeds:
        if patch_sizes and embed.encoder.changes_views():
            raise ValueError(
                f"model must hand views on to its patch embedding as they are, got a "
                f"{type(embed.encoder.model).__name__} of one size, which changes them before (normalizes them, say): "
                "smaller views would go without; have it done by the loader's transforms"
            )
    for size in sorted(full):
        if all(embed.encoder.plain_grid(size) is None for embed in embeds):
            _say(f"the transforms make views of {size[0]} x {size[1]} px, which the plain model refuses")

    follower: Any = None
    lookahead = 0
    if isinstance(loader, nn.Module):
        for earlier in [hook for hook in loader._forward_hooks.values() if isinstance(hook, FollowingModule)]:
            earlier.remove()
        follower = FollowingModule(loader, views, full, channels, [embed.encoder.model for embed in embeds])
    elif inner is not None:
        followed = inner.collate_fn
        collate = followed.collate if isinstance(followed, FollowingCollate) else followed
        follower = FollowingCollate(collate, inner.num_workers, views, full, channels)
        follower.attach(inner.dataset)
        inner.collate_fn = follower
        lookahead = _steps_ahead(inner)
    views.add(follower, full, lookahead)
    if compression.views is None:
        compression.views = views
        views.ask_for(compression.strategy)
    return loader


def _check_types(loader: object, model: object) -> None:
    if isinstance(loader, nn.Module) and (isinstance(model, DataLoader) or is_compressed(loader)):
        raise TypeError(
            f"loader must come first and model second: scale_views(loader, model), got a {type(loader).__name__} and a "
            f"{type(model).__name__}"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {described(model)}")
    if isinstance(loader, nn.Module):
        return
    inner = _inner(loader)
    if inner is None:
        raise TypeError(
            "loader must be, or hold, a torch.utils.data.DataLoader, or be a module of transforms, got a "
            f"{type(loader).__name__}"
        )
    if isinstance(inner.dataset, IterableDataset):
        raise TypeError(f"loader must have a map-style data set, got the iterable {type(inner.dataset).__name__}")
    if getattr(inner, "_iterator", None) is not None:
        raise ValueError(
            "loader must not have started its persistent workers, nor loading, got one that has: make a new one. "
            "Accelerate starts a StatefulDataLoader in prepare(): call scale_views before that"
        )


def _inner(loader: object) -> DataLoader[Any] | None:
    """The loader that makes the batches: Accelerate's and timm's are wrapped around it."""
    inner = getattr(loader, "base_dataloader", getattr(loader, "loader", None))
    return next((held for held in (inner, loader) if isinstance(held, DataLoader)), None)


def _say(what: str) -> None:
    warnings.warn(f"seqcompress: scale_views: {what}", stacklevel=3)


class _Following:
    """What is known of the views of a loader or module, and how they are compared with what was asked for."""

    def __init__(self, views: ScaledViews, full: set[Size], channels: set[int]) -> None:
        self.views, self.full, self.channels = views, full, channels
        self._made_for: int | None = None

    def follow(self) -> None:
        """Have the next views made for the patch size that is asked for."""

    def sizes(self) -> set[Size]:
        """Sizes of the full views."""
        return self.full

    def _expect(self, full: set[Size]) -> None:
        if full != self.full:
            before, self.full = self.full, full
            self.views.replace(before, full)

    def _sizes_of(self, made: Any) -> list[Size]:
        shapes = [tensor.shape[-3:] for tensor in _tensors(made) if tensor.ndim >= 3]
        return [(height, width) for channels, height, width in shapes if channels in self.channels]

    def _problem(self, found: list[Size]) -> tuple[Size, Size] | None:
        """What was asked for and what came out, if views do not have the sizes that they should."""
        asked = {scaled_size(size, self._made_for, self.views.base) for size in self.full}
        wrong = [size for size in found if size in self.full - asked]
        if not found or (not wrong and not asked.isdisjoint(found)):
            return None
        return min(asked), (wrong or found)[0]


class FollowingCollate(_Following):
    """Collates as before, looks at what came out, and for which patch size the next batch is to be made.

    Looked for between batches only, so that all views of a batch have the same size. A worker changes its own copy of
    the data set; nothing changes in the training process. Without workers it is the data set itself, which is held
    weakly and makes full views again when the loader is gone.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        workers: int,
        views: ScaledViews,
        full: set[Size],
        channels: set[int],
    ) -> None:
        super().__init__(views, full, channels)
        self.collate, self.workers = collate, workers
        self._dataset: Callable[[], Any] = _nothing
        # For all workers: whether a batch came out wrong, the size it should have had and its own, and if that was said
        self._wrong = torch.zeros(6, dtype=torch.int64, device="cpu").share_memory_()

    def attach(self, dataset: Any) -> None:
        """Follow for this data set, as long as it lives, where it is this process that asks it for samples."""
        self._dataset = weakref.ref(dataset)
        if not self.workers:
            _here.add(self)
            weakref.finalize(self, _release, self._dataset)

    def __call__(self, batch: list[Any]) -> Any:
        batch = self._mended(batch)
        collated = self.collate(batch)
        if not self._wrong[0]:
            self._look_at(self._sizes_of(collated) or self._sizes_of(batch))
        self.follow()
        return collated

    def follow(self) -> None:
        """Have the next batch of this process made for the patch size that is asked for."""
        worker = get_worker_info()
        if worker is None and self.workers:
            return
        dataset = self._dataset() if worker is None else worker.dataset
        if dataset is None:
            return
        self._made_for = None
        try:
            transforms = ScaledTransforms(dataset, self.views.base)
            if worker is None:
                self._expect(transforms.full)
            wanted = None if self._wrong[0] else int(self.views.shared) or None
            if wanted is not None and self.views.conflict(wanted, transforms.full) is not None:
                wanted = None
            transforms.apply(wanted)
            self.full, self._made_for = transforms.full, wanted
        except ValueError as error:  # its owner has put something else there
            put_back(dataset)
            if not self._wrong[0]:
                self._wrong[5] = 1  # first: other workers must not say it in other words
                self._wrong[0] = 2
                _say(f"{error}. The loader goes on with full views.")
        if self._wrong[0] and not self._wrong[5] and (worker is None or worker.id == 0):
            self._wrong[5] = 1
            _, height, width, *got, _ = self._wrong.tolist()
            _say(
                f"views of {px(got)} came out of the loader where {px((height, width))} were asked for: something that "
                "is not known decides their size. The loader goes on with full views."
            )

    def sizes(self) -> set[Size]:
        """Sizes of the full views, as the data set of this process has them now."""
        dataset = self._dataset()
        if dataset is not None:
            try:
                self._expect(ScaledTransforms(dataset, self.views.base).full)
            except ValueError:
                return set()
        return self.full

    def _look_at(self, found: list[Size]) -> bool:
        """Whether these are the sizes that were asked for; if not, views are full from now on."""
        problem = self._problem(found)
        if problem is not None and not self._changed_by_owner():
            (height, width), (got_height, got_width) = problem
            self._wrong[1:5] = torch.tensor([height, width, got_height, got_width], device="cpu")
            self._wrong[0] = 1
        return problem is None

    def _changed_by_owner(self) -> bool:
        """Whether somebody has given the transforms other values since they were set for this batch."""
        worker = get_worker_info()
        try:
            now = ScaledTransforms(self._dataset() if worker is None else worker.dataset, self.views.base)
        except ValueError:
            return True
        return now.full != self.full or (self._made_for is not None and not now.scaled)

    def _mended(self, batch: list[Any]) -> list[Any]:
        """A batch that came out in several sizes where one was asked for has no other way to be collated."""
        if self._made_for is None or self._wrong[0] or len(self.full) != 1:
            return batch
        found = self._sizes_of(batch)
        if len(set(found)) < 2 or self._look_at(found):
            return batch
        (full,) = self.full
        return [_resized(sample, full, self.channels) for sample in batch]

    def __deepcopy__(self, memo: dict[int, Any]) -> FollowingCollate:
        """For a copy of the loader, which follows the same model with its own copy of the data set."""
        collate = copy.deepcopy(self.collate, memo)
        other = FollowingCollate(collate, self.workers, self.views, set(self.full), self.channels)
        other._made_for = self._made_for
        dataset = self._dataset()
        if dataset is not None:
            other.attach(copy.deepcopy(dataset, memo))
        self.views.join(other)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_dataset": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._dataset = _nothing


_here: weakref.WeakSet[FollowingCollate] = weakref.WeakSet()


def _nothing() -> None:
    return None


def _release(dataset: Callable[[], Any]) -> None:
    left = dataset()
    if left is not None:
        put_back(left)
        for follower in list(_here):  # another loader on the same data set
            if follower._dataset() is left:
                follower.follow()


class FollowingModule(_Following):
    """Has a module of transforms make what the strategy of the moment needs; between calls it is as its owner made it.

    Called after the module's forward; ``before`` is called before it, where the strategy is looked for. While none of
    the encoders is in train mode, as in validation, views are full.
    """

    def __init__(
        self,
        module: nn.Module,
        views: ScaledViews,
        full: set[Size],
        channels: set[int],
        encoders: Sequence[nn.Module],
    ) -> None:
        super().__init__(views, full, channels)
        self._wrong = False
        self._encoders: Collection[nn.Module] = weakref.WeakSet(encoders)
        # What raises on its way must not leave the transforms scaled.
        self._handles = [
            module.register_forward_pre_hook(self.before),
            module.register_forward_hook(self, always_call=True),
        ]

    def before(self, module: nn.Module, args: Any) -> None:
        self._made_for = None
        if self._wrong:
            return
        try:
            transforms = ScaledTransforms(module, self.views.base)
        except ValueError as error:
            self._wrong = True
            _say(f"{error}. The module goes on with full views.")
            return
        self._expect(transforms.full)
        self._made_for = self.views.wanted_now() if self._is_training() else None
        if self._made_for is not None:
            self.views.expect_views_for(self._made_for)
            transforms.apply(self._made_for)

    def __call__(self, module: nn.Module, args: Any, made: Any) -> None:
        put_back(module)
        problem = None if self._wrong else self._problem(self._sizes_of(made))
        if problem is not None:
            self._wrong = True
            _say(
                f"views of {px(problem[1])} came out of the module where {px(problem[0])} were asked for. "
                "It goes on with full views."
            )

    def _is_training(self) -> bool:
        return not self._encoders or any(encoder.training for encoder in self._encoders)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_encoders": ()}  # elsewhere there are none to go by

    def __deepcopy__(self, memo: dict[int, Any]) -> FollowingModule:
        return self  # copies of the module follow the same model


def _steps_ahead(loader: DataLoader[Any]) -> int:
    """Steps from the moment at which a worker looks for the size of its next batch until that batch is used."""
    # One round of the workers more than are under way: from one epoch to the next, a worker may wait for its turn. And
    # one batch that wrappers, Accelerate's and timm's, fetch before they hand out the one before it.
    return 1 + loader.num_workers * (2 + (loader.prefetch_factor or 0))


def _tensors(sample: Any) -> Iterator[Tensor]:
    if isinstance(sample, Tensor):
        yield sample
    elif isinstance(sample, (list, tuple)):
        yield from (tensor for item in sample for tensor in _tensors(item))
    else:
        yield from (tensor for item in _named(sample).values() for tensor in _tensors(item))


def _named(sample: Any) -> dict[Any, Any]:
    """What a mapping holds, such as Hugging Face's, or a dataclass; else nothing."""
    if isinstance(sample, Mapping):
        return dict(sample)
    fields = dataclasses.fields(sample) if dataclasses.is_dataclass(sample) and not isinstance(sample, type) else ()
    return {field.name: getattr(sample, field.name) for field in fields}


def _resized(sample: Any, size: Size, channels: set[int]) -> Any:
    if isinstance(sample, Tensor):
        if sample.ndim != 3 or sample.shape[0] not in channels or sample.shape[1:] == size:
            return sample
        resized = F.interpolate(sample[None].float(), size, mode="bilinear", antialias=True)[0]
        return resized.to(sample.dtype)
    if isinstance(sample, (list, tuple)):
        return getattr(sample, "_make", type(sample))([_resized(item, size, channels) for item in sample])
    named = {name: _resized(item, size, channels) for name, item in _named(sample).items()}
    if isinstance(sample, MutableMapping):
        sample = copy.copy(sample)
        sample.update(named)
        return sample
    if named and dataclasses.is_dataclass(sample) and not isinstance(sample, type):
        return dataclasses.replace(sample, **named)
    return sample
