"""What the core must know of one kind of ViT."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn

from seqcompress.compressors import CompressedPatchEmbed
from seqcompress.compressors.patch_embed import Compression, When
from seqcompress.strategy import Strategy

Encoder: TypeAlias = Any
"""A ViT. Which attributes it has is for its family to know, and for no type checker."""


class Family(ABC):
    """One kind of ViT: how to recognise it, and where the compressors take their place in it.

    ``supports`` is its entry in the list that an unsupported model is answered with. A ``general`` family knows models
    by what they do: it is asked last, and what comes behind the first block is proven too.
    """

    supports: ClassVar[str]
    general: ClassVar[bool] = False

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family."""

    @abstractmethod
    def check(self, encoder: Encoder, strategies: Iterable[Strategy]) -> None:
        """Raise ValueError, saying why, if the encoder cannot be compressed in one of these ways."""

    @abstractmethod
    def attach(
        self, encoder: Encoder, compression: Compression, *, drops_tokens: bool, when: When
    ) -> CompressedPatchEmbed:
        """Put the compressors in place."""

    @abstractmethod
    def detach(self, encoder: Encoder) -> None:
        """Take them out again, leaving nothing behind."""

    @abstractmethod
    def first_tokens(self, encoder: Encoder, views: Tensor) -> Tensor:
        """What reaches the first block of views (B, C, H, W): tokens (B, P + N, D), prefix tokens first."""

    def last_tokens(self, encoder: Encoder, views: Tensor) -> Tensor:
        """What leaves the last block of views (B, C, H, W): tokens (B, P + N, D). For general families only."""
        raise NotImplementedError

    @abstractmethod
    def patch_size(self, encoder: Encoder) -> tuple[int, int]:
        """Height and width of the encoder's own patches, in pixels."""

    @abstractmethod
    def channels(self, encoder: Encoder) -> int:
        """Channels of a view."""

    @abstractmethod
    def width(self, encoder: Encoder) -> int:
        """Numbers in a token, D."""

    @abstractmethod
    def projection_size(self, encoder: Encoder) -> int:
        """Weights of the projection that a patch is embedded by."""

    @abstractmethod
    def image_size(self, encoder: Encoder) -> tuple[int, int]:
        """Height and width of the views the encoder was built for, in pixels."""

    @abstractmethod
    def grid(self, encoder: Encoder, view: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
        """Patches of this size along each side of a view, in pixels all.

        Raises:
            ValueError: the patch is larger than a side of the view.
        """

    @abstractmethod
    def num_prefix_tokens(self, encoder: Encoder) -> int:
        """Class, distillation and register tokens."""

    @abstractmethod
    def after_embedding(self, encoder: Encoder, tokens: Tensor) -> Tensor:
        """Run the encoder on tokens (B, T, D) that are already embedded: blocks, pooling, head."""
