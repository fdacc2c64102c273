"""What a measurement compares: encoders, each as it is compressed meanwhile, and strategies that suit them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from seqcompress.compression import check_roles, compressed_embeds, find_pair, is_compressed
from seqcompress.encoders import CompressedPatchEmbed, Encoder, When
from seqcompress.encoders.sharding import is_wrapped
from seqcompress.messages import described
from seqcompress.strategy import Strategy

__all__ = ["MeasuredEncoder", "checked_strategies", "measured_encoders", "own_patch_size_of", "refuse_flattened"]


@dataclass(frozen=True)
class MeasuredEncoder:
    """An encoder, and how it is to be compressed for the measurement."""

    encoder: Encoder
    is_student: bool
    when: When

    @property
    def embed(self) -> CompressedPatchEmbed:
        """Its patch embedding, while it is compressed."""
        return compressed_embeds(self.encoder.model)[0]

    @property
    def role(self) -> str:
        """The name of the argument that it came as."""
        return "model" if self.is_student else "teacher"

    def check(self, strategies: Sequence[Strategy]) -> None:
        """Raise ValueError if a strategy cannot be measured on it now."""
        if self.is_student and not self.encoder.model.training:
            raise ValueError("model must be in train mode: in eval mode nothing is compressed; call model.train()")
        self.check_strategies(strategies)

    def check_strategies(self, strategies: Iterable[Strategy]) -> None:
        """The same in any mode."""
        for strategy in strategies:
            try:
                self.encoder.check([strategy if self.is_student else strategy.without_dropout()])
            except ValueError as error:
                raise ValueError(f"strategies: {strategy!s} does not suit the {self.role}: {error}") from None


def measured_encoders(model: nn.Module, teacher: nn.Module | None = None) -> list[MeasuredEncoder]:
    """The encoders of one analysis: those that were compressed together, or ``model`` and ``teacher``."""
    if teacher is None and isinstance(model, nn.Module) and is_compressed(model):
        embeds = [partner for embed in compressed_embeds(model) for partner in embed.partners()]
        return [MeasuredEncoder(embed.encoder, embed.drops_tokens, embed.when) for embed in dict.fromkeys(embeds)]
    found = find_pair(model, teacher)
    check_roles(found)
    return [
        MeasuredEncoder(encoder, name == "model", "grad" if name == "model" else "train")
        for name, encoder in found.items()
    ]


def refuse_flattened(model: nn.Module, encoders: Sequence[MeasuredEncoder]) -> None:
    """Raise ValueError for weights whose gradients cannot be put together again."""
    if is_wrapped(model) or any(measured.encoder.is_flattened for measured in encoders):
        raise ValueError(
            "model must have whole gradients on every process to be measured, got one in FullyShardedDataParallel: "
            "shard it with fully_shard instead, or measure without sharding"
        )


def own_patch_size_of(encoders: Sequence[MeasuredEncoder]) -> int | None:
    """Side of the patches that all these encoders have without compression; None if they differ or are not square."""
    sides = {side for measured in encoders for side in measured.encoder.patch_size}
    return sides.pop() if len(sides) == 1 else None


def checked_strategies(strategies: Iterable[Strategy]) -> list[Strategy]:
    """A list of them, for sure."""
    if isinstance(strategies, (str, Strategy)) or not isinstance(strategies, Iterable):
        raise TypeError(f"strategies must be several of them, such as a list, got {described(strategies)}")
    checked = list(strategies)
    for strategy in checked:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"strategies must be of type Strategy, got {described(strategy)}")
    return checked
