"""What training really cost, in the unit that runs are compared by."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from seqcompress.compression import compressed_embeds_of, is_compressed, with_partners
from seqcompress.encoders import CompressedPatchEmbed, Forward
from seqcompress.messages import described
from seqcompress.strategy import Strategy
from seqcompress.training.cost import Flops, sequence_length

__all__ = ["MOST_UNITS", "Budget"]

MOST_UNITS = 1e40  # what is read of a state: more than all machines will ever do, and far from an overflow


class Budget:
    """Counts what was really spent on the encoders, in units.

    One unit is one forward pass of the uncompressed encoder on one view of its image size. That size is fixed when the
    budget is made; a loaded state brings its own. A view that passes forward only (a teacher's) costs its relative
    cost, one that passes forward and backward three times that. Each forward in train mode counts with the tokens it
    really had, and so does a teacher's in eval mode while its student is in train mode. Evaluation does not count, and
    neither do the re-runs of gradient checkpointing.

    Args:
        model_or_models: compressed encoders, or modules that contain them; a student's teacher counts too, and the
            other way round. To count a plain run, use
            ``compress(model, Strategy())``, which never changes anything.

    Raises:
        TypeError: an argument is neither a module nor several.
        ValueError: there is no compressed encoder.

    Examples:
        >>> import timm, torch
        >>> from seqcompress import Strategy, compress
        >>> vit = compress(timm.create_model("vit_tiny_patch16_224"), Strategy())
        >>> budget = Budget(vit)
        >>> _ = vit.train()(torch.zeros(2, 3, 224, 224))
        >>> budget.units
        6.0
    """

    def __init__(self, model_or_models: nn.Module | Sequence[nn.Module]) -> None:
        self._embeds = with_partners(compressed_embeds_of(model_or_models))
        self._flops = Flops(embed.encoder for embed in self._embeds)
        self._units = [self._unit(number) for number in range(len(self._embeds))]
        self._prices: dict[tuple[int, Forward], float] = {}
        self._earlier = 0.0
        self._has_warned = False
        self.reset()

    @property
    def units(self) -> float:
        """Units spent since this budget was made, reset or loaded; a warning says so if they are counted no more."""
        return self._earlier + self._counted() - self._offset

    @property
    def millions(self) -> float:
        """The same in millions of units, the "M" of the paper."""
        return self.units / 1e6

    def reset(self) -> None:
        """Start again from zero."""
        self._earlier, self._offset = 0.0, self._counted()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep: the units, and the FLOPs of one in each encoder. Plain values only."""
        return {"units": self.units, "flops_of_unit": list(self._units)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a saved state, in its units; its encoders must be these, in their order.

        Raises:
            ValueError: the state is not a budget's; nothing has been changed.
        """
        units = state.get("units") if isinstance(state, Mapping) else None
        if isinstance(units, bool) or not isinstance(units, (int, float)) or not 0 <= units <= MOST_UNITS:
            raise ValueError(
                f"state must be a Budget's: 'units' must be a number from 0 to {MOST_UNITS:g}, got {described(state)}"
            )
        flops = state.get("flops_of_unit", self._units)
        if not isinstance(flops, list) or not all(type(each) is int and 0 < each <= MOST_UNITS for each in flops):
            raise ValueError(
                "state must be a Budget's: 'flops_of_unit' must be a list of positive whole numbers, got "
                f"{described(flops)}"
            )
        self._units, self._prices = [*flops, *self._units[len(flops) :]][: len(self._units)], {}
        self.reset()
        self._earlier = float(units)

    def __str__(self) -> str:
        return f"{self.millions:.3g} M"

    def __repr__(self) -> str:
        return f"Budget(units={self.units:.6g})"

    def _counted(self) -> float:
        if not self._has_warned and any(_is_compressed_anew(embed) for embed in self._embeds):
            self._has_warned = True
            warnings.warn(
                "seqcompress: the encoders of a Budget were compressed anew since it was made, and what they spend "
                "from there on is not in it: make another",
                stacklevel=3,
            )
        return sum(
            (
                calls * self._price(number, forward)
                for number, embed in enumerate(self._embeds)
                for forward, calls in embed.forward_counts.items()
            ),
            start=0.0,
        )

    def _price(self, number: int, forward: Forward) -> float:
        """Units of one call. What was spent stays spent, whatever becomes of the encoder."""
        if (number, forward) not in self._prices:
            self._prices[number, forward] = self._flops.of_call(number, forward) / self._units[number]
        return self._prices[number, forward]

    def _unit(self, number: int) -> int:
        """FLOPs of a unit, in one of the encoders."""
        full = sequence_length(self._embeds[number].encoder, Strategy())
        return self._flops.of_one_view(number, full)


def _is_compressed_anew(embed: CompressedPatchEmbed) -> bool:
    return not embed.is_live and is_compressed(embed.encoder.model)
