"""What a strategy costs, in tokens and in FLOPs."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from seqcompress.compressors.token_dropout import num_kept
from seqcompress.encoders import CompressedPatchEmbed, Encoder, Forward, find_encoder
from seqcompress.encoders.encoder import Size
from seqcompress.encoders.hooks import without_hooks
from seqcompress.encoders.sharding import past_wrappers
from seqcompress.messages import described
from seqcompress.strategy import Strategy

__all__ = [
    "Flops",
    "StepCosts",
    "ViewCosts",
    "batch_factor",
    "encoder_flops",
    "flops_by_tokens",
    "grid_size",
    "num_tokens",
    "relative_cost",
    "sequence_length",
]

FORWARD_AND_BACKWARD = 3  # forward passes that a forward and its backward cost together


def num_tokens(model: nn.Module, strategy: Strategy, image_size: int | tuple[int, int]) -> int:
    """Sequence length of one view under a strategy, prefix tokens included.

    ``N(s) = prefix + max(1, round((1 - r) * g_h * g_w))`` with ``g = max(1, round(side / p))``; at its own patch size
    a model that cuts views otherwise (rounding down, or padding them) keeps its own grid.

    Args:
        model: a supported ViT, compressed or not.
        strategy: token dropout r and patch size p.
        image_size: side of the view, or its height and width, in pixels.

    Raises:
        TypeError: the model is not supported, or an argument has the wrong type.
        ValueError: the patch is larger than a side of the view.

    Examples:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224")
        >>> num_tokens(vit, Strategy(0.5, 32), 224)
        25
    """
    encoder, view = _checked(model, strategy, image_size)
    return sequence_length(encoder, strategy, view)


def grid_size(model: nn.Module, strategy: Strategy, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches that a view is cut into under a strategy: what masks for it are drawn on.

    Token dropout changes nothing in it: a forward with a mask drops no tokens.

    Args:
        model: a supported ViT, compressed or not. Nothing is done to it.
        strategy: how it is compressed.
        image_size: side of the view in pixels, or height and width.

    Raises:
        TypeError: an argument has the wrong type, or the model is not supported.
        ValueError: the view or the patch size is out of range, or does not suit the model.

    Examples:
        >>> import timm
        >>> from seqcompress import compress, get_strategy
        >>> vit = compress(timm.create_model("vit_tiny_patch16_224"), Strategy(0.5, 32))
        >>> grid_size(vit, get_strategy(vit), (224, 160))
        (7, 5)
    """
    encoder, view = _checked(model, strategy, image_size)
    return encoder.grid(view, _patch(encoder, strategy))


def _checked(model: nn.Module, strategy: Strategy, image_size: int | tuple[int, int]) -> tuple[Encoder, Size]:
    encoder = find_encoder(model)
    if not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be a Strategy, got {described(strategy)}")
    return encoder, _checked_size(image_size)


def _patch(encoder: Encoder, strategy: Strategy) -> Size:
    return encoder.patch_size if strategy.patch_size is None else (strategy.patch_size, strategy.patch_size)


def sequence_length(encoder: Encoder, strategy: Strategy, view: tuple[int, int] | None = None) -> int:
    """``num_tokens`` of an encoder; by default, of a view of the size it was built for."""
    patches = math.prod(encoder.grid(encoder.image_size if view is None else view, _patch(encoder, strategy)))
    return encoder.num_prefix_tokens + num_kept(patches, strategy.token_dropout)


def batch_factor(embed: CompressedPatchEmbed, strategy: Strategy) -> int:
    """How many times as many views have no more tokens than under the base strategy: a power of two, at least 1.

    Rounded down to a power of two, so that what is put together of several batches begins and ends with what is put
    together of more, queues of keys stay multiples of a batch, and there are few shapes.
    """
    encoder = embed.encoder
    times = sequence_length(encoder, Strategy()) // sequence_length(encoder, embed.strategy_for_full_views(strategy))
    return 1 << (times.bit_length() - 1)


def relative_cost(model: nn.Module, strategy: Strategy, image_size: int | tuple[int, int]) -> float:
    """FLOPs of the encoder's forward under a strategy, relative to the same view uncompressed.

    Args:
        model: a supported ViT, compressed or not. Nothing is done to it.
        strategy: how it is compressed.
        image_size: side of the view in pixels, or height and width.

    Raises:
        TypeError: an argument has the wrong type, or the model is not supported.
        ValueError: the view or the patch size is out of range, or does not suit the model.

    Examples:
        >>> import timm
        >>> vit = timm.create_model("vit_small_patch16_224", num_classes=0)
        >>> round(relative_cost(vit, Strategy(0.5), 224), 2)
        0.48
    """
    encoder = find_encoder(model)
    compressed = num_tokens(model, strategy, image_size)
    full = num_tokens(model, Strategy(), image_size)
    return encoder_flops(encoder, compressed) / encoder_flops(encoder, full)


def encoder_flops(encoder: Encoder, tokens: int) -> int:
    """FLOPs of one view's forward with ``tokens`` tokens: embedding, blocks, pooling and head.

    Counted by torch's FLOP counter on runs without data (meta device), so it holds for any kind of block. A few
    lengths are run, once for each encoder: if what they take grows with the length as matrix products and attention
    do, that gives all other lengths, else each is run. Left out: a convolutional stem before the embedding, and for
    patch scaling the resampling of weights and positions, which is done once a forward, however many views it has: in
    a batch of 64, below 0.1 % of the rest with a ViT-Ti at 224 px.
    """
    return flops_by_tokens(encoder)(tokens)


def flops_by_tokens(encoder: Encoder) -> Callable[[int], int]:
    """``encoder_flops`` of an encoder as it is now, for many lengths."""
    size = sum(parameter.numel() for parameter in encoder.model.parameters())
    known = _known.get(encoder.model)
    if known is None or known.size != size:  # somebody may have replaced its head, or its blocks
        known = _known[encoder.model] = _FlopsByTokens(size, encoder.projection_size)
    prefix = encoder.num_prefix_tokens

    def flops(tokens: int) -> int:
        if tokens not in known.counted:
            known.counted[tokens] = _flops_of(known, encoder, tokens)
        return 2 * (tokens - prefix) * known.projection + known.counted[tokens]

    return flops


class Flops:
    """FLOPs of training steps in encoders: three for a forward that is differentiated against one for another.

    Args:
        encoders: those that run. Each forward is counted once for each view, with the tokens it really had.
    """

    def __init__(self, encoders: Iterable[Encoder]) -> None:
        self._encoders = list(encoders)

    def __call__(self, tallies: Iterable[Counter[Forward]]) -> int:
        """Those of the forwards that were counted, one tally an encoder."""
        return sum(
            calls * self.of_call(number, forward)
            for number, tally in enumerate(tallies)
            for forward, calls in tally.items()
        )

    def of_call(self, number: int, forward: Forward) -> int:
        """Those of one call of one encoder, named by its number, and of the backward pass that follows, if any."""
        passes = FORWARD_AND_BACKWARD if forward.graph else 1
        return forward.view[0] * passes * self.of_one_view(number, forward.tokens)

    def of_one_view(self, number: int, tokens: int) -> int:
        """Those of one view's forward through one encoder; see ``encoder_flops``."""
        return encoder_flops(self._encoders[number], tokens)


class ViewCosts:
    """``relative_cost`` at an encoder's own view size, for many strategies: quick where few lengths are behind them.

    Args:
        encoder: whose cost it is.
        drops_tokens: False for a teacher, which only scales patches.
    """

    def __init__(self, encoder: Encoder, drops_tokens: bool) -> None:
        self._encoder = encoder
        self._prefix = encoder.num_prefix_tokens
        self._drops_tokens = drops_tokens
        self._patches: dict[int | None, int] = {}
        self._costs: dict[int, float] = {}
        self._flops = flops_by_tokens(encoder)
        self._unit = self._flops(self._prefix + self._all(None))

    def __call__(self, strategy: Strategy) -> float:
        """That of one forward pass."""
        patches = self._all(strategy.patch_size)
        kept = num_kept(patches, strategy.token_dropout) if self._drops_tokens else patches
        if kept not in self._costs:
            self._costs[kept] = self._flops(self._prefix + kept) / self._unit
        return self._costs[kept]

    def _all(self, patch_size: int | None) -> int:
        if patch_size not in self._patches:
            self._patches[patch_size] = sequence_length(self._encoder, Strategy(0.0, patch_size)) - self._prefix
        return self._patches[patch_size]


class StepCosts:
    """What encoders cost in a step on a view of their own size, in their plain forward passes.

    Args:
        encoders: those that run, each with whether it drops tokens. One that does is a student: its forward has a
            backward pass. A teacher's has none.
    """

    def __init__(self, encoders: Iterable[tuple[Encoder, bool]]) -> None:
        self._costs = [
            (FORWARD_AND_BACKWARD if drops_tokens else 1, ViewCosts(encoder, drops_tokens))
            for encoder, drops_tokens in encoders
        ]

    def __call__(self, strategy: Strategy) -> float:
        """Under this strategy."""
        return sum(passes * cost(strategy) for passes, cost in self._costs)


@dataclass
class _FlopsByTokens:
    """What is known of an encoder's FLOPs after its embedding."""

    size: int  # parameters it had, on this process
    projection: int  # weights of its projection, as a whole
    counted: dict[int, int] = field(default_factory=dict)
    growth: tuple[int, int, int, int] | None = None  # those of a length, their first and second difference from there
    is_quadratic: bool | None = None  # None before it was looked at


_known: WeakKeyDictionary[nn.Module, _FlopsByTokens] = WeakKeyDictionary()


def _flops_of(known: _FlopsByTokens, encoder: Encoder, tokens: int) -> int:
    """FLOPs for a length that was not run, from what those that were have shown; run it if they show nothing."""
    if known.is_quadratic is None:
        first = encoder.num_prefix_tokens + 1
        try:
            known.growth = _growth_of_parts(encoder, first)
            known.is_quadratic = known.growth is not None
            if known.growth is None:
                one, two, three = (_flops_after_embedding(encoder, first + more) for more in range(3))
                known.growth = (first, one, two - one, three - 2 * two + one)
                known.is_quadratic = all(
                    _flops_after_embedding(encoder, length) == _extrapolated(known.growth, length)
                    for length in (first + 7, first + 61)
                )
        except Exception:  # too few tokens, or too many, for this one
            known.is_quadratic = False
    if known.is_quadratic and known.growth is not None:
        return _extrapolated(known.growth, tokens)
    try:
        return _flops_after_embedding(encoder, tokens)
    except Exception as error:  # what compress() refuses, too
        raise TypeError(
            f"model must be a supported ViT, got a {type(encoder.model).__name__}: its blocks do not run on {tokens} "
            f"tokens alone: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error


def _growth_of_parts(encoder: Encoder, first: int) -> tuple[int, int, int, int] | None:
    """What two lengths show, if each operator of each module grows with a power of the length; else None."""
    short, long = first + 1, first + 61
    few, many = (_flops_of_parts(encoder, length) for length in (short, long))
    factors = [0, 0, 0]
    for part in few.keys() | many.keys():
        power = next((power for power in range(3) if few[part] * long**power == many[part] * short**power), None)
        if power is None or few[part] % short**power:
            return None
        factors[power] += few[part] // short**power
    lengths = range(first, first + 3)
    one, two, three = (sum(factor * each**power for power, factor in enumerate(factors)) for each in lengths)
    return (first, one, two - one, three - 2 * two + one)


def _extrapolated(growth: tuple[int, int, int, int], tokens: int) -> int:
    first, flops, slope, bend = growth
    more = tokens - first
    return flops + more * slope + more * (more - 1) // 2 * bend


def _flops_after_embedding(encoder: Encoder, tokens: int) -> int:
    return sum(_flops_of_parts(encoder, tokens).values())


def _flops_of_parts(encoder: Encoder, tokens: int) -> Counter[tuple[str, Any]]:
    """Those of each operator in each module, without what belongs to the modules within."""

    class AfterEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = encoder.model

        def forward(self, tokens: Tensor) -> Tensor:
            return encoder.after_embedding(tokens)

    module = AfterEmbedding()
    dtype = next(encoder.model.parameters()).dtype
    dtypes = {name: value.dtype for name, value in encoder.model.named_buffers()}
    # By their shapes when they are whole: a process may have pieces of them.
    weights = {
        f"model.{name}": torch.empty(shape, dtype=dtypes.get(name, dtype), device="meta")
        for name, shape in encoder.shapes.items()
    }
    blank = torch.empty(1, tokens, encoder.width, device="meta", dtype=dtype)
    counter = FlopCounterMode(display=False)
    plain_attention = sdpa_kernel(SDPBackend.MATH)  # fused kernels count for nothing without data, in older torch
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        past_wrappers(encoder.model),
        without_hooks(encoder.model, ours=True),
        plain_attention,
        counter,
    ):
        torch.func.functional_call(module, weights, (blank,))
    counts = counter.get_flop_counts()
    everything = counts.pop("Global", {})
    parts: Counter[tuple[str, Any]] = Counter()
    for kind, flops in everything.items():
        parts["", kind] += flops
    for name, flops_of in counts.items():
        around = name.rpartition(".")[0]
        while around and around not in counts:
            around = around.rpartition(".")[0]
        for kind, flops in flops_of.items():
            parts[name, kind] += flops
            parts[around, kind] -= flops
    return parts


def _checked_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    problem = f"image_size must be one or two whole numbers of pixels, at least 1, got {described(image_size)}"
    try:
        height, width = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        size = (operator.index(height), operator.index(width))
    except TypeError:
        raise TypeError(problem) from None
    except ValueError:  # a tuple of another length
        raise ValueError(problem) from None
    if isinstance(height, bool) or isinstance(width, bool):
        raise TypeError(problem)
    if min(size) < 1:
        raise ValueError(problem)
    return size
