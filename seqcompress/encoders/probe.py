"""Proof that a compressed model's tokens are the plain model's: a little run of each, compared at the first block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seqcompress.compressors import CompressedPatchEmbed
from seqcompress.compressors.tables import is_fake

__all__ = ["JoinHook", "difference", "tokens_at"]

_VIEWS = 3  # not as many as the blank views that stand in for them


class JoinHook:
    """A forward pre-hook of ours. An object, not a closure: it can be copied along with the model."""

    def __init__(self, embed: CompressedPatchEmbed) -> None:
        self.embed = embed


class _Reached(Exception):  # noqa: N818 - not an error
    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


def tokens_at(encoder: Any, places: tuple[nn.Module, ...], views: Tensor) -> Tensor:
    """What the first of these modules that is reached is called with.

    Raises:
        RuntimeError: none is reached.
    """

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    handles = [place.register_forward_pre_hook(stop) for place in places]
    try:
        encoder.forward(views)
    except _Reached as reached:
        return reached.tokens
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError(f"{type(encoder).__name__} has not reached its first block")


def difference(family: Any, encoder: Any, embed: CompressedPatchEmbed) -> str | None:
    """In what the tokens of a compressed forward differ from the plain model's, or None if in nothing.

    Both see the same random views of the model's own size; the compressed one leaves out one patch of each and has
    the others in random order. No gradient, no random number of the caller's, no hook of the user's, no module in
    train mode: nothing stays. Where parameters have no values of their own (meta device, sharded), where the model
    runs on no views alone, nothing can be compared, and None is returned.
    """
    parameter = next(encoder.parameters(), None)
    if parameter is None or type(parameter.data) is not Tensor or parameter.is_meta or is_fake():
        return None
    generator = torch.Generator().manual_seed(0)
    shape = (_VIEWS, family.channels(encoder), *family.image_size(encoder))
    views = torch.randn(shape, generator=generator, device="cpu").to(parameter.device, parameter.dtype)
    prefix, grid = family.num_prefix_tokens(encoder), embed.embed.grid_size
    patches = grid[0] * grid[1]
    order = [torch.randperm(patches, generator=generator)[: max(1, patches - 1)] for _ in range(_VIEWS)]
    kept = torch.stack(order).to(parameter.device)
    with _undisturbed(encoder, embed):
        try:
            expected = family.first_tokens(encoder, views)
        except Exception:  # not even the plain model runs on views alone
            return None
        if expected.ndim != 3 or expected.shape[:2] != (_VIEWS, prefix + patches):
            return (
                f"{prefix} prefix tokens and {patches} patches of a view should reach the first block, and tokens of "
                f"shape {tuple(expected.shape)} do: its patches overlap, or something adds tokens"
            )
        embed.trial, embed.training = kept, True
        try:
            tokens = family.first_tokens(encoder, views)
        except Exception as error:
            return f"between its patch embedding and its first block it fails on patches of another number: {error}"
    index = kept.unsqueeze(-1).expand(-1, -1, expected.shape[-1])
    expected = torch.cat((expected[:, :prefix], expected[:, prefix:].gather(1, index)), dim=1).float()
    if tokens.shape != expected.shape:
        return f"tokens of shape {tuple(expected.shape)} should reach the first block, {tuple(tokens.shape)} do"
    largest = float((tokens.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if largest <= (1e-4 if parameter.dtype in (torch.float32, torch.float64) else 5e-2):
        return None
    return (
        f"the tokens that are kept differ from its own by up to {largest:.2g} of the largest: it does something to "
        "patches between its patch embedding and its first block, beside adding positions"
    )


@contextmanager
def _undisturbed(encoder: Any, embed: CompressedPatchEmbed) -> Iterator[None]:
    modules = list(encoder.modules())
    modes = [(module, module.training) for module in modules]
    names = ("_forward_hooks", "_forward_pre_hooks")
    hooks = [(module, name, vars(module)[name]) for module in modules for name in names]
    device = next(encoder.parameters()).device
    devices = [device] if device.type == "cuda" else []
    try:
        for module, name, registered in hooks:
            vars(module)[name] = OrderedDict(
                (key, hook) for key, hook in registered.items() if isinstance(hook, JoinHook)
            )
        for module in modules:
            vars(module)["training"] = False
        with torch.no_grad(), torch.random.fork_rng(devices=devices), torch.autocast(device.type, enabled=False):
            yield
    finally:
        embed.trial = None
        for module, name, registered in hooks:
            vars(module)[name] = registered
        for module, training in modes:
            vars(module)["training"] = training
        embed.embed.training = embed.training
