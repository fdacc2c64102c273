"""Proof that a compressed model's tokens are the plain model's: a little run of each, compared at the first block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from seqcompress.compressors.tables import is_fake
from seqcompress.encoders.hooks import without_hooks
from seqcompress.encoders.patch_embed import CompressedPatchEmbed

__all__ = ["Reached", "call_of", "difference", "first_tensor", "tokens_at", "tokens_behind", "undisturbed"]

_VIEWS = 3  # not as many as the blank views that stand in for them


class Reached(Exception):  # noqa: N818 - not an error
    """A forward that is run for what some module is called with, or returns, has come to it."""

    def __init__(self, values: Any) -> None:
        super().__init__()
        self.values = values


def call_of(model: Any, places: tuple[nn.Module, ...], views: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the first of these modules that is reached.

    Raises:
        RuntimeError: none is reached.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached((args, kwargs))

    handles = [place.register_forward_pre_hook(stop, with_kwargs=True) for place in places]
    try:
        model.forward(views)
    except Reached as reached:
        call: tuple[tuple[Any, ...], dict[str, Any]] = reached.values
        return call
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError(f"{type(model).__name__} has not reached its first block")


def tokens_at(model: Any, places: tuple[nn.Module, ...], views: Tensor) -> Tensor:
    """The first tensor among these arguments."""
    return first_tensor(call_of(model, places, views))


def tokens_behind(model: Any, block: nn.Module, views: Tensor) -> Tensor:
    """What leaves a block.

    Raises:
        RuntimeError: it is not reached.
    """

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise Reached(first_tensor(output))

    handle = block.register_forward_hook(stop)
    try:
        model.forward(views)
    except Reached as reached:
        tokens: Tensor = reached.values
        return tokens
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} has not reached its last block")


def first_tensor(values: Any) -> Tensor:
    """The first tensor in tuples, lists and dictionaries within each other."""
    if isinstance(values, Tensor):
        return values
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, (tuple, list)) else ():
        with suppress(LookupError):
            return first_tensor(value)
    raise LookupError("there is no tensor")


def difference(embed: CompressedPatchEmbed, *, blocks: bool = True) -> str | None:
    """In what the tokens of a compressed forward differ from the plain model's, or None if in nothing.

    Both see the same random views of the model's own size; the compressed one leaves out one patch of each and has
    the others in random order. No gradient, no random number of the caller's, no hook of the user's, no module in
    train mode: nothing stays. Where parameters have no values of their own (meta device, sharded), or where the model
    runs on no views alone, nothing can be compared: a model of a known class is then taken as it is.

    For a general kind, and where blocks are given positions, it is also proven that the blocks do not know where a
    patch was, but from what they are given: with all patches in random order, the same tokens must come in that order.

    Args:
        embed: the compressed patch embedding of the model.
        blocks: whether to look behind the first block too.
    """
    encoder = embed.encoder
    parameter = next(encoder.model.parameters(), None)
    if parameter is None or type(parameter.data) is not Tensor or parameter.is_meta or is_fake():
        return "its parameters have no values here, so that nothing can be proven" if encoder.general else None
    generator = torch.Generator().manual_seed(0)
    size = encoder.image_size
    views = torch.randn((_VIEWS, encoder.channels, *size), generator=generator, device="cpu")
    views = views.to(parameter.device, parameter.dtype)
    prefix, grid = encoder.num_prefix_tokens, encoder.blank_grid(size)
    patches = grid[0] * grid[1]
    order = torch.stack([torch.randperm(patches, generator=generator) for _ in range(_VIEWS)]).to(parameter.device)
    kept = order[:, : max(1, patches - 1)]
    with undisturbed(encoder.model, embed):
        try:
            expected = encoder.first_tokens(views)
        except Exception as error:
            return f"it does not run on views alone: {error}" if encoder.general else None
        if expected.ndim != 3 or expected.shape[:2] != (_VIEWS, prefix + patches):
            return (
                f"{prefix} prefix tokens and {patches} patches of a view should reach the first block, and tokens of "
                f"shape {tuple(expected.shape)} do: its patches overlap, or something adds tokens"
            )
        try:
            with _keeping(embed, kept):
                tokens = encoder.first_tokens(views)
        except Exception as error:
            return f"between its patch embedding and its first block it fails on patches of another number: {error}"
        problem = _compared(tokens, expected, kept, prefix)
        if problem is not None:
            return (
                f"the tokens that are kept {problem}: it does something to patches between its patch embedding and its "
                "first block, beside adding positions"
            )
        if not (blocks and (encoder.general or encoder.positions_in_blocks)):
            return None
        views, order, kept = views[:1], order[:1], kept[:1]  # all blocks of a large model take their time
        expected = encoder.last_tokens(views)
        try:
            with _keeping(embed, order):
                tokens = encoder.last_tokens(views)
            with _keeping(embed, kept):
                encoder.last_tokens(views)
        except Exception as error:
            return f"its blocks fail on patches of another number: {error}"
        problem = _compared(tokens, expected, order, prefix)
        return f"its blocks know where a patch was, since tokens in another order {problem}" if problem else None


def _compared(tokens: Tensor, every: Tensor, kept: Tensor, prefix: int) -> str | None:
    index = kept.unsqueeze(-1).expand(-1, -1, every.shape[-1])
    expected = torch.cat((every[:, :prefix], every[:, prefix:].gather(1, index)), dim=1).float()
    if tokens.shape != expected.shape:
        return f"have the shape {tuple(tokens.shape)} instead of {tuple(expected.shape)}"
    largest = float((tokens.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    # Sums in another order differ by about 1e-6 through 24 blocks, in single precision.
    if largest <= (1e-5 if every.dtype in (torch.float32, torch.float64) else 5e-2):
        return None
    return f"differ from its own by up to {largest:.2g} of the largest"


@contextmanager
def _keeping(embed: CompressedPatchEmbed, kept: Tensor) -> Iterator[None]:
    embed.trial, vars(embed)["training"] = kept, True
    try:
        yield
    finally:
        embed.trial, vars(embed)["training"] = None, False


@contextmanager
def undisturbed(model: Any, embed: CompressedPatchEmbed | None = None) -> Iterator[None]:
    """Run a model without a trace: in eval mode, without gradients, without hooks of others, random states put back."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    counted = None if embed is None else embed.tally.copy()
    autocast = torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext()
    try:
        for module in modules:
            vars(module)["training"] = False
        with torch.no_grad(), torch.random.fork_rng(devices=devices), autocast, without_hooks(model):
            yield
    finally:
        for module, training in modes:
            vars(module)["training"] = training
        if embed is not None and counted is not None:
            embed.embed.training = embed.training
            embed.tally.clear()  # a teacher's forwards count in eval mode, too
            embed.tally.update(counted)
