"""The hooks by which the compressors take their place in a model, and the way to run it without hooks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from seqcompress.encoders.patch_embed import CompressedPatchEmbed

__all__ = ["Hook", "Join", "add_forward_hook", "add_pre_hook", "join_at", "remove_hooks", "without_hooks"]


class Hook:
    """A hook of ours. An object, not a closure: it can be copied along with the model.

    Attributes:
        embed: the patch embedding that it belongs to.
        number: torch's, by which the hooked module has it.
    """

    def __init__(self, embed: CompressedPatchEmbed) -> None:
        self.embed = embed
        self.number = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # A process that has unpickled it may have numbered fewer hooks: the next one would take its number and place.
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.number + 1)


class Join(Hook):
    """Where embedded patches meet their positions, however the tokens are passed.

    Args:
        embed: whose patches they are.
        is_last: whether no other such place follows.
    """

    def __init__(self, embed: CompressedPatchEmbed, *, is_last: bool) -> None:
        super().__init__(embed)
        self.is_last = is_last

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.embed.check_mask(kwargs)
        if args and isinstance(args[0], (list, tuple)):
            if self.embed.has_waiting_patches:
                raise ValueError(
                    "crops must be passed one by one to a compressed encoder that trains, got a "
                    f"{type(args[0]).__name__} of {len(args[0])} in one forward"
                )
            return args, kwargs
        if args:
            return (self.embed.join(args[0], is_last=self.is_last), *args[1:]), kwargs
        name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
        if name is None:
            raise TypeError(f"a {type(module).__name__} must be given tokens, got no tensor")
        return args, {**kwargs, name: self.embed.join(kwargs[name], is_last=self.is_last)}


def join_at(embed: CompressedPatchEmbed, *places: nn.Module) -> None:
    """Have patches joined at the first of these modules that a forward reaches; the others see what was joined."""
    for place in places:
        add_pre_hook(place, Join(embed, is_last=place is places[-1]))


def add_pre_hook(place: nn.Module, hook: Hook) -> None:
    """Hook in before all others, which then see what the model sees."""
    hook.number = place.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).id  # type: ignore[arg-type]
    hook.embed.hooked_modules = (*hook.embed.hooked_modules, place)


def add_forward_hook(place: nn.Module, hook: Hook) -> None:
    """Hook in behind a module."""
    hook.number = place.register_forward_hook(hook, with_kwargs=True).id  # type: ignore[arg-type]
    hook.embed.hooked_modules = (*hook.embed.hooked_modules, place)


def remove_hooks(embed: CompressedPatchEmbed) -> None:
    """Take our hooks out: of the modules that have them, around which something may have been wrapped since."""
    for place in embed.hooked_modules:
        for hooks, with_kwargs in (
            (place._forward_pre_hooks, place._forward_pre_hooks_with_kwargs),
            (place._forward_hooks, place._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook) and hook.embed is embed]:
                hooks.pop(key)
                with_kwargs.pop(key, None)
    embed.hooked_modules = ()


@contextmanager
def without_hooks(model: nn.Module, *, ours: bool = False) -> Iterator[None]:
    """Keep the user's forward hooks away from tokens that are none of theirs.

    Args:
        model: whose hooks are left out.
        ours: whether to leave out those of this module as well.
    """
    kept = [
        (hooks, OrderedDict(hooks))
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    ]
    try:
        for hooks, before in kept:
            for key, hook in before.items():
                if ours or not isinstance(hook, Hook):
                    hooks.pop(key, None)
        yield
    finally:
        for hooks, before in kept:
            made = OrderedDict(hooks)  # by the model itself, which may do so once, as it first runs
            hooks.clear()
            hooks.update({**before, **made})
