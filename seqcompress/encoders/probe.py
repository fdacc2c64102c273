"""Proof that a compressed model's tokens are the plain model's: a little run of each, compared at the first block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from seqcompress.compressors.execution import is_fake
from seqcompress.compressors.random_states import RandomStates
from seqcompress.encoders.hooks import without_hooks
from seqcompress.encoders.joining import ChangedTokensError
from seqcompress.encoders.patch_embed import CompressedPatchEmbed, Trial
from seqcompress.encoders.precision import full_precision

__all__ = [
    "Reached",
    "call_of",
    "difference",
    "first_tensor",
    "tensors_in",
    "tokens_at",
    "undisturbed",
    "without_values",
]

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

    call: tuple[tuple[Any, ...], dict[str, Any]] = _reached(model, places, views, lambda args, kwargs: (args, kwargs))
    return call


def tokens_at(model: Any, places: tuple[nn.Module, ...], views: Tensor) -> Tensor:
    """The first tensor among these arguments, as it was computed."""
    tokens: Tensor = _reached(model, places, views, lambda args, kwargs: _as_computed(first_tensor((args, kwargs))))
    return tokens


def _reached(model: Any, places: tuple[nn.Module, ...], views: Tensor, look: Callable[[Any, Any], Any]) -> Any:
    """What is to be seen there, while the model still runs."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached(look(args, kwargs))

    with ExitStack() as hooked:
        for place in places:
            hooked.enter_context(place.register_forward_pre_hook(stop, with_kwargs=True))
        try:
            model.forward(views)
        except Reached as reached:
            return reached.values
    raise RuntimeError(f"{type(model).__name__} has not reached its first block")


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and dictionaries within each other."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors_in(value)


def first_tensor(values: Any) -> Tensor:
    """The first of them.

    Raises:
        LookupError: there is none.
    """
    found = next(tensors_in(values), None)
    if found is None:
        raise LookupError("there is no tensor")
    return found


def without_values(model: nn.Module) -> str | None:
    """Why a model cannot be run by itself, if parameters of it are elsewhere; None if all are here."""
    for parameter in model.parameters():
        if hasattr(parameter, "full_tensor"):
            return "its parameters are sharded: compress it before fully_shard"
        if parameter.is_meta:
            return (
                "its parameters have no values here (meta device, or offloaded): load it, and compress it before it is "
                "offloaded"
            )
    return None


def difference(embed: CompressedPatchEmbed, *, blocks: bool = True) -> str | None:
    """In what the tokens of a compressed forward differ from the plain model's, or None if in nothing.

    Both see the same random views of the model's own size; the compressed one leaves out one patch of each and has
    the others in random order. That nothing but positions is added is shown in train mode too, and of parameters that
    do nothing yet. No gradient, no random number of the caller's, no hook of the model's: nothing stays. Where
    parameters have no values of their own (meta device, sharded) or none that are finite, or where the model runs on no
    views alone, nothing can be compared: a model of a known class is then taken as it is.

    For a general kind, and where blocks are given positions or are not timm's own, it is also proven that they do not
    know where a patch was, but from what they are given: with all patches in random order, the same tokens must come in
    that order.

    Args:
        embed: the compressed patch embedding of the model.
        blocks: whether to look behind the first block too.
    """
    encoder = embed.encoder
    if encoder.general and (problem := without_values(encoder.model)) is not None:
        return problem
    parameter = next(encoder.model.parameters(), None)
    if parameter is None or type(parameter.data) is not Tensor or parameter.is_meta or is_fake():
        return "its parameters have no values here, so that nothing can be proven" if encoder.general else None
    generator = torch.Generator().manual_seed(0)
    size = encoder.image_size
    views = torch.randn((_VIEWS, encoder.channels, *size), generator=generator, device="cpu")
    views = views.to(parameter.device, parameter.dtype)
    prefix, grid = encoder.num_prefix_tokens, encoder.blank_grid(size)
    patches = grid[0] * grid[1]
    order = torch.stack([torch.randperm(patches, generator=generator, device="cpu") for _ in range(_VIEWS)]).to(
        parameter.device
    )
    kept = order[:, : max(1, patches - 1)]
    with undisturbed(encoder.model):
        try:
            expected = encoder.first_tokens(views)
        except Exception as error:
            return f"it does not run on views alone: {error}" if encoder.general else None
        if not bool(expected.isfinite().all()):
            problem = "its tokens are not finite (NaN or infinite weights?), so that nothing can be proven"
            return problem if encoder.general else None
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
        trained = _parameter_that_sees_patches(embed, views)
        if trained is not None:
            return (
                f"{trained} works on patches between its patch embedding and its first block, beside adding positions"
            )
        if blocks and not encoder.has_known_blocks:
            problem = _difference_in_blocks(embed, views[:1], order[:1], kept[:1])
            problem = problem or _difference_in_crops(embed, views[:1], order[:1])
            if problem is not None:
                return problem
    return _difference_in_train_mode(embed, views, kept)


def _difference_in_train_mode(embed: CompressedPatchEmbed, views: Tensor, kept: Tensor) -> str | None:
    """Dropout, masks and the like, which are at work in train mode only, seen by tokens that are none of a view's."""
    try:
        with undisturbed(embed.encoder.model, training=True), _keeping(embed, kept, marked=True):
            embed.encoder.first_tokens(views)
    except ChangedTokensError:
        return (
            "in train mode it does something to patches between its patch embedding and its first block, beside adding "
            "positions (dropout, masks)"
        )
    except Exception:  # whatever else it needs in train mode, its own forwards will bring
        return None
    return None


def _parameter_that_sees_patches(embed: CompressedPatchEmbed, views: Tensor) -> str | None:
    """The name of a parameter, none of the patch embedding's, whose gradient depends on what is seen in a view.

    It may do nothing yet, such as a scale of 1.
    """
    model = embed.encoder.model
    own = set(embed.encoder.patch_embed.parameters())
    # No hook of the user's is to see a gradient that is none of training's.
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad and value.numel()]
    named = [(name, value) for name, value in named if value not in own and not value._backward_hooks]
    if not named:
        return None
    gradients = []
    places = tuple(place for place in embed.hooked_modules if place is not model)
    try:
        for view in views[:2].unbind():
            with torch.enable_grad():
                tokens = tokens_at(model, places, view.unsqueeze(0))
                weights = torch.linspace(-1, 1, tokens.numel(), device=tokens.device, dtype=tokens.dtype)
                loss = (tokens * weights.view_as(tokens)).sum()
                gradients.append(torch.autograd.grad(loss, [value for _, value in named], allow_unused=True))
    except Exception:  # nothing there is trained, or it cannot be differentiated twice
        return None
    for (name, _), one, other in zip(named, *gradients, strict=True):
        if one is None or other is None:
            continue
        if (one - other).abs().max() > 1e-2 * torch.maximum(one.abs().max(), other.abs().max()):
            return name
    return None


def _difference_in_blocks(embed: CompressedPatchEmbed, views: Tensor, order: Tensor, kept: Tensor) -> str | None:
    """In what the blocks' work on patches in another order differs. What little a fresh block adds is seen too."""
    encoder, prefix = embed.encoder, embed.encoder.num_prefix_tokens
    length = prefix + order.shape[1]
    try:
        expected = _sequences(encoder, views, length)
    except Exception as error:  # they may need a GPU, and the model be on its way there
        return f"its blocks do not run on views alone: {error}" if encoder.general else None
    try:
        with _keeping(embed, order):
            sequences = _sequences(encoder, views, length)
        with _keeping(embed, kept):
            _sequences(encoder, views, prefix + kept.shape[1])
    except Exception as error:
        return f"its blocks fail on patches of another number: {error}"
    problem: str | None = "are of another number"
    if len(sequences) == len(expected):
        problems = [
            _compared(tokens, every, order, prefix, 1e-5 if number == len(expected) - 1 else 1e-3)
            for number, (tokens, every) in enumerate(zip(sequences, expected, strict=True))
        ]
        problem = next(filter(None, problems), None)
    return f"its blocks know where a patch was, since tokens in another order {problem}" if problem else None


def _difference_in_crops(embed: CompressedPatchEmbed, views: Tensor, order: Tensor) -> str | None:
    """In what crops of two sizes in one call differ, at the first block and behind the last."""
    encoder = embed.encoder
    smaller = views[:, :, : max(1, encoder.blank_grid(encoder.image_size)[0] // 2) * encoder.patch_size[0]]
    patches = math.prod(encoder.blank_grid((smaller.shape[2], smaller.shape[3])))
    crops, orders = [views, smaller], [order, order[order < patches].view(len(order), patches)]
    expected = _crops_in(encoder, crops)
    with _keeping(embed, *orders):
        found = _crops_in(encoder, crops)
    if len(found) != len(expected):
        return "it fails on lists of crops of which patches are in another order"
    for every, tokens in zip(expected, found, strict=True):
        for all_of_one, of_one, kept in zip(every, tokens, orders, strict=True):
            problem = _compared(of_one, all_of_one, kept, encoder.num_prefix_tokens)
            if problem is not None:
                return f"it mixes up crops in one list: tokens of one {problem}"
    return None


def _crops_in(encoder: Any, crops: list[Tensor]) -> list[list[Tensor]]:
    """Tokens of each crop in one call, (B, T, D), at the first block and behind the last, as far as they come there.

    Blocks may need what is not there (xFormers, a GPU); a model may take no lists.
    """
    seen: list[list[Tensor]] = []
    with ExitStack() as hooked:
        hooked.enter_context(
            encoder.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(list(args[0])))
        )
        hooked.enter_context(
            encoder.blocks[-1].register_forward_hook(lambda block, args, output: seen.append(list(output)))
        )
        with suppress(Exception):
            encoder.forward_crops(crops)
    return seen


def _sequences(encoder: Any, views: Tensor, length: int) -> list[Tensor]:
    """What the modules of the first and the last block make of one view, as far as they are sequences: (1, T, .).

    Those with channels first, (1, ., T), are turned around. In the order of their calls; what leaves the last block is
    the last. All blocks' would take much memory.
    """
    last = encoder.blocks[-1]
    found: list[Tensor] = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        with suppress(LookupError):
            tokens = _as_computed(first_tensor(output))
            if tokens.ndim == 3 and tokens.shape[:2] == (1, length):
                found.append(tokens)
            elif tokens.ndim == 3 and tokens.shape[::2] == (1, length):  # channels first, as convolutions have them
                found.append(tokens.transpose(1, 2))
        if module is last:
            raise Reached(None)

    looked_at = {module: None for block in (encoder.blocks[0], last) for module in block.modules()}
    with ExitStack() as hooked:
        for module in looked_at:
            hooked.enter_context(module.register_forward_hook(remember))
        try:
            encoder.model.forward(views)
        except Reached:
            return found
    raise RuntimeError(f"{type(encoder.model).__name__} has not reached its last block")


def _as_computed(tokens: Tensor) -> Tensor:
    """Tokens in the precision in which a model's own autocast has them computed; what comes of it may hide that."""
    place = tokens.device.type
    return tokens.to(torch.get_autocast_dtype(place)) if torch.is_autocast_enabled(place) else tokens


def _compared(tokens: Tensor, every: Tensor, kept: Tensor, prefix: int, most: float = 1e-5) -> str | None:
    index = kept.unsqueeze(-1).expand(-1, -1, every.shape[-1])
    expected = torch.cat((every[:, :prefix], every[:, prefix:].gather(1, index)), dim=1).float()
    if tokens.shape != expected.shape:
        return f"have the shape {tuple(tokens.shape)} instead of {tuple(expected.shape)}"
    least = max(1e-12, torch.finfo(every.dtype).smallest_normal)  # below it, half precision has but few numbers
    largest = float((tokens.float() - expected).abs().max() / expected.abs().max().clamp(min=least))
    # Sums in another order differ by about 1e-6 through 24 blocks, in single precision.
    if largest <= (most if every.dtype in (torch.float32, torch.float64) else 5e-2):
        return None
    return f"differ from its own by up to {largest:.2g} of the largest"


@contextmanager
def _keeping(embed: CompressedPatchEmbed, *kept: Tensor, marked: bool = False) -> Iterator[None]:
    embed.trial = Trial(list(kept), marked)
    try:
        yield
    finally:
        embed.trial = embed.selection = None


@contextmanager
def undisturbed(model: Any, *, training: bool = False) -> Iterator[None]:
    """Run a model without a trace: no gradients, no hooks of others, no counting; random states and modes put back.

    So are buffers, and attributes that modules assign to; not where a model puts in hooks as it first runs, which stay,
    and notes that it has done so.
    """
    embeds = [module for module in model.modules() if isinstance(module, CompressedPatchEmbed)]
    modules = [*model.modules(), *(embed.embed for embed in embeds)]
    modes = [(module, module.training) for module in modules]
    others = [module for module in modules if not isinstance(module, CompressedPatchEmbed)]
    remembered = [(registry, dict(registry)) for module in others for registry in (vars(module), module._buffers)]
    buffers = [(buffer, buffer.clone(), _version(buffer)) for buffer in model.buffers()]
    hooks = _hooks_in(model)
    random_states = RandomStates()
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext()
    try:
        for embed in embeds:
            embed.is_probed = True
        for module in modules:
            vars(module)["training"] = training
        with torch.no_grad(), autocast, full_precision(), without_hooks(model):
            yield
    finally:
        random_states.restore()
        for registry, before in remembered if _hooks_in(model) == hooks else ():
            for name in registry.keys() - before.keys():
                del registry[name]
            registry.update({name: value for name, value in before.items() if registry.get(name) is not value})
        with torch.no_grad():
            for buffer, content, version in buffers:
                if _was_changed(buffer, content, version):
                    if buffer.shape != content.shape:  # an observer's, which takes its shape as it first runs
                        buffer.resize_(content.shape)
                    buffer.copy_(content)
        for module, mode in modes:
            vars(module)["training"] = mode
        for embed in embeds:
            embed.is_probed = False


def _version(buffer: Tensor) -> int | None:
    """How often it has been changed in place; None for one that does not count."""
    return None if buffer.is_inference() else buffer._version


def _was_changed(buffer: Tensor, content: Tensor, version: int | None) -> bool:
    """Whether it has another content or version. Batch norms change theirs without counting."""
    return version is None or _version(buffer) != version or not (buffer.is_meta or torch.equal(buffer, content))


def _hooks_in(model: nn.Module) -> list[list[int]]:
    return [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]
