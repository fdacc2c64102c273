"""One ViT, as all of the package sees it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from seqcompress.compressors.patch_scaling import grid_size
from seqcompress.encoders.sharding import is_flattened, shapes_of
from seqcompress.strategy import Strategy

if TYPE_CHECKING:
    from seqcompress.encoders.compression import Compression
    from seqcompress.encoders.patch_embed import CompressedPatchEmbed, When

__all__ = ["Encoder", "Size", "is_frozen"]

Size = tuple[int, int]


class Encoder(ABC):
    """A ViT: what it is like, and where the compressors take their place in it. One subclass for each kind of ViT.

    Nothing outside this folder names an attribute of a model; it asks here. A compressed model's patch embedding keeps
    its encoder, so that what it is like is found out once.

    Args:
        model: the ViT itself, of a kind that ``recognises`` knows.

    Attributes:
        general: whether models are known by what they do: such a kind is asked last.
        positions_in_blocks: whether blocks are given positions too.
        masks_tokens: whether it masks tokens by itself, where its call says which.
    """

    general: ClassVar[bool] = False
    positions_in_blocks: ClassVar[bool] = False
    masks_tokens: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # which attributes it has is for the subclass to know, and for no type checker
        self._noted: dict[str, torch.Size] = {}
        self._noted_projection = 0

    @staticmethod
    @abstractmethod
    def recognises(model: nn.Module) -> bool:
        """Whether ``model`` is of this kind."""

    @staticmethod
    def rejection_reason(model: nn.Module) -> str | None:
        """What keeps a model that is almost of this kind from being so, or None."""
        return None

    @property
    def has_known_blocks(self) -> bool:
        """Whether its blocks are known not to look at where a patch was; if not, a probe has to prove it."""
        return not (self.general or self.positions_in_blocks)

    # What it is like:

    @property
    @abstractmethod
    def patch_size(self) -> Size:
        """Height and width of its own patches, in pixels."""

    @property
    @abstractmethod
    def image_size(self) -> Size:
        """Height and width of the views it was built for, in pixels."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of a view."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers in a token, D."""

    @property
    @abstractmethod
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens."""

    @property
    @abstractmethod
    def only_size(self) -> Size | None:
        """Height and width of the only views that the plain model takes, or None if it takes more."""

    @abstractmethod
    def plain_grid(self, view: Size) -> Size | None:
        """Patches along each side of a view in the plain model; None if it refuses such a view."""

    def grid(self, view: Size, patch: Size) -> Size:
        """Patches along each side of a view: the plain model's under its own patch size, where it takes the view.

        Raises:
            ValueError: the patch is larger than a side of the view.
        """
        own = self.plain_grid(view) if patch == self.patch_size else None
        return grid_size(view, patch) if own is None else own

    def check(self, strategies: Iterable[Strategy]) -> None:
        """Raise ValueError, saying why, if the encoder cannot be compressed in one of these ways."""
        height, width = self.patch_size
        for size in (strategy.patch_size for strategy in strategies):
            if size is not None and size**2 < height * width:
                own = f"{height}" if height == width else f"{height} x {width}"
                raise ValueError(
                    f"patch_size must be at least the encoder's own, {own}, got {size}: smaller patches make "
                    "sequences longer"
                )
            if size is not None and (size, size) != self.patch_size:
                grid_size(self.image_size, (size, size))
                self.check_scaling(size)

    def check_scaling(self, size: int) -> None:  # noqa: B027 - most can be scaled
        """Raise ValueError, saying why, if patches cannot have this size in pixels."""

    # Its embedding:

    @property
    @abstractmethod
    def patch_embed(self) -> nn.Module:
        """The module that makes tokens of patches: the plain one, compressed or not."""

    @property
    @abstractmethod
    def projection(self) -> nn.Module:
        """What maps pixels to numbers in that module: a convolution, or what has its place."""

    @property
    def projection_size(self) -> int:
        """Weights of the projection that a patch is embedded by."""
        return self._noted_projection if self.is_flattened else self._projection_size()

    def _projection_size(self) -> int:
        conv = self.projection
        if isinstance(conv, nn.Conv2d):  # whose weight, where it is computed, is left alone
            return math.prod(conv.kernel_size) * conv.out_channels * conv.in_channels // conv.groups
        weight: Any = getattr(conv, "weight", None)  # a stem of convolutions may be all that there is
        return 0 if weight is None else int(weight.numel())

    @property
    def maps_patches(self) -> bool:
        """Whether each patch is mapped on its own, so that patches can be chosen and scaled before."""
        return True

    def apply_norm(self, tokens: Tensor) -> Tensor:
        """What the embedding does to tokens (B, K, D) after projecting them."""
        return tokens

    def embed_all_patches(self, views: Tensor) -> Tensor:
        """All of the embedding's tokens of views (B, C, H, W): (B, N, D). For those that do not map single patches."""
        raise NotImplementedError

    @abstractmethod
    def blank_grid(self, view: Size) -> Size:
        """For which grid the model makes positions, if it is given blank views instead of these."""

    @abstractmethod
    def blank(self, tokens: Tensor, blanks: int, grid: Size) -> Tensor:
        """The embedding of so many blank views, all zero, in the format the model expects, on the device of tokens."""

    # How it runs:

    @abstractmethod
    def attach(self, compression: Compression, *, drops_tokens: bool, when: When) -> CompressedPatchEmbed:
        """Put the compressors in place."""

    @abstractmethod
    def detach(self) -> None:
        """Take them out again, leaving nothing behind."""

    @abstractmethod
    def first_tokens(self, views: Tensor) -> Tensor:
        """What reaches the first block of views (B, C, H, W): tokens (B, P + N, D), prefix tokens first."""

    def changes_views(self) -> bool:
        """Whether views that only training takes would miss what the model does to them before it cuts patches."""
        return False

    def forward_crops(self, crops: list[Tensor]) -> Any:
        """Run on views (B, C, H, W) of several sizes in one call.

        Raises:
            NotImplementedError: it takes no lists.
        """
        raise NotImplementedError

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Its blocks, in order."""

    def note_shapes(self) -> None:
        """Note how large its weights are while they are whole: FullyShardedDataParallel, which flattens and shards
        them later, does not tell."""
        if not self.is_flattened:
            self._noted_projection = self._projection_size()
            self._noted = shapes_of(self.model)

    @property
    def is_flattened(self) -> bool:
        """Whether FullyShardedDataParallel has taken its weights apart."""
        return is_flattened(shapes_of(self.model), self._noted)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Those of its parameters and buffers when they are whole, by name."""
        now = shapes_of(self.model)
        return {**now, **self._noted} if is_flattened(now, self._noted) else now

    def clear_cache(self) -> None:  # noqa: B027 - most have nothing to forget
        """Forget what was found out about the model, which may have been changed since."""

    @abstractmethod
    def after_embedding(self, tokens: Tensor) -> Tensor:
        """Run the encoder on tokens (B, T, D) that are already embedded, for its cost: blocks, pooling, head.

        What blocks do with positions may be left out.
        """


def is_frozen(model: nn.Module) -> bool:
    """Whether none of its parameters is trained."""
    return not any(parameter.requires_grad for parameter in model.parameters())
