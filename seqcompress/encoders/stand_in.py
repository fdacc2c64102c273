"""A module in another one's place that nobody notices: state, hooks and attributes are the other one's."""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any, ClassVar, NoReturn

from torch import nn

__all__ = ["StandIn"]


class StandIn(nn.Module):
    """A module that wraps a patch embedding, and takes its place in a model.

    Parameters, buffers, children and hooks are those of the wrapped embedding, under their own names, so that
    nothing changes in a state dict or for an optimizer. Attributes are read from and written to it too, but for those
    that a subclass annotates, which are its own.

    Args:
        embed: the patch embedding.
    """

    embed: Any
    training: bool
    _deleted: tuple[str, weakref.ref[nn.Parameter]] | None  # the last parameter that was taken out
    _own_names: ClassVar[frozenset[str]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = [base for base in cls.__mro__ if issubclass(base, StandIn)]
        cls._own_names = frozenset(name for base in bases for name in inspect.get_annotations(base))

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        for name, registry in vars(embed).items():
            if name in vars(self) and isinstance(registry, (dict, set)):
                vars(self)[name] = registry
        # Not registered as a child, which would add a name to the state dict.
        vars(self).update(
            embed=embed, training=embed.training, _is_full_backward_hook=embed._is_full_backward_hook, _deleted=None
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        if not memo:  # copied by itself, as PEFT does it: a part of no encoder yet
            return copy.deepcopy(self.embed, memo)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_deleted": None}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "embed" not in vars(self):  # not set up yet: copy and pickle ask early
                raise
            return getattr(vars(self)["embed"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("__class__", "__dict__"):  # of this module, as FSDP and torch.export do it
            object.__setattr__(self, name, value)
        elif name == "parametrizations" and self._deleted is not None:
            self._refuse_parametrization(self._deleted)
        elif name in self._own_names or name == "forward":  # what is put around this forward calls this one
            vars(self)[name] = value
        else:
            if name == "_is_full_backward_hook":
                vars(self)[name] = value
            setattr(self.embed, name, value)

    def __delattr__(self, name: str) -> None:
        if name == "forward":
            del vars(self)[name]
        else:
            value = vars(self)["_parameters"].get(name)
            delattr(self.embed, name)
            vars(self)["_deleted"] = None if value is None else (name, weakref.ref(value))

    def _refuse_parametrization(self, deleted: tuple[str, weakref.ref[nn.Parameter]]) -> NoReturn:
        """torch puts the parameter's new values in its place on this module's class, where the embedding has none."""
        name, value = deleted
        object.__setattr__(self, "__class__", type(self).__base__)  # torch has just derived one from it
        self.embed.register_parameter(name, value())
        raise RuntimeError(
            f"{name} of a compressed encoder's patch embedding cannot be parametrized: restore(model), parametrize, "
            "and compress it again"
        )

    def train(self, mode: bool = True) -> StandIn:
        self.embed.training = mode
        super().train(mode)
        return self

    # The embedding may save, load and move more than its parameters and buffers.

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.embed._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.embed._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> StandIn:
        self.embed._apply(*args, **kwargs)
        return self
