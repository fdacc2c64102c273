"""Putting everything back that a training step changes: weights, gradients, buffers, queues, optimizers, generators.

[Reach][seqcompress.gradients.reach.Reach] finds what a function can get at, and under which names;
[Snapshot][seqcompress.gradients.state.Snapshot] keeps and restores it, and knows by name what it could not restore.
"""

from __future__ import annotations

import array
import functools
import inspect
import operator
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

from seqcompress.compressors.random_states import numpy_if_loaded
from seqcompress.gradients.reach import Plain, Reach, contents, is_generator

__all__ = ["Generators", "Snapshot"]


class Snapshot:
    """The state of objects and names, to be put back as often as needed.

    Followed are modules, optimizers and learning-rate schedulers with all their attributes; plain objects, eight deep;
    tensors, arrays, random generators, lists, dicts, sets and deques; and the names that functions use. Objects keep
    their identity, and tensors their memory. What data sets and objects of frameworks (a Trainer, a logger) keep is not
    looked into; it is watched instead, as iterators are.

    Args:
        roots: where to begin. Attributes of these are followed whatever their class.
        functions: what these can get at is followed too: what they are bound to, closure, arguments, global names,
            and the functions that they call.
    """

    def __init__(self, roots: Iterable[object], functions: Iterable[object] = ()) -> None:
        reach = Reach()
        for root in roots:
            reach.follow_root(root)
        for function in functions:
            reach.follow_function(function)
        self._kept = reach.found  # holds the objects, so that no identity is used again
        self._tensors: list[tuple[str, _SavedTensor]] = []
        self._undo: list[tuple[str, Callable[[], object]]] = []
        self._generators: list[Any] = []
        self._watched: list[tuple[str, object]] = list(reach.watched)
        self._failed: dict[str, None] = {}
        for name, binding in reach.bindings:
            self._undo.append((name, binding.restore))
        for name, value in reach.found:
            self._save(value, name)
        self._marks = [_fingerprint(value) for _, value in self._watched]

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for name, undo in self._undo:
                self._tried(name, undo)
            for name, tensor in self._tensors:
                self._tried(name, tensor.restore)

    def not_restored(self) -> list[str]:
        """Names of what has changed since the snapshot and could not be put back; to be asked after ``restore``."""
        changed = [
            name for (name, value), mark in zip(self._watched, self._marks, strict=True) if _fingerprint(value) != mark
        ]
        return list(dict.fromkeys([*self._failed, *changed]))

    def clear_gradients(self) -> None:
        """Let a backward pass start from nothing; ``restore`` brings the gradients back."""
        for _, tensor in self._tensors:
            tensor.clear_gradient()

    def seed(self, seed: int) -> None:
        """Set all random generators among it from one number; ``restore`` brings their states back."""
        for generator in self._generators:
            _seed(generator, seed)

    def _tried(self, name: str, undo: Callable[[], object]) -> None:
        try:
            undo()
        except Exception:  # whatever a foreign class raises: the rest must be put back all the same
            self._failed[name] = None

    def _save(self, value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            if _is_freed(value):
                return
            try:
                saved = None if _is_expanded(value) else _SavedTensor(value)
            except (RuntimeError, NotImplementedError):  # of a layout without memory of its own
                saved = None
            if saved is None:
                self._watched.append((name, value))
            else:
                self._tensors.append((name, saved))
        elif (undo := _undo_of(value)) is not None:
            self._undo.append((name, undo))
            if is_generator(value):
                self._generators.append(value)


class Generators:
    """The random generators that an object, such as a data loader, holds; and their states, to be put back."""

    def __init__(self, owner: object) -> None:
        reach = Reach(into_data=True)
        reach.follow_root(owner)
        self._generators = [value for _, value in reach.found if is_generator(value)]
        self.keep()

    def keep(self) -> None:
        """Keep the states as they are now."""
        self._undo = [_undo_of(generator) for generator in self._generators]

    def restore(self) -> None:
        """Put them back as they were kept."""
        for undo in self._undo:
            if undo is not None:
                undo()


class _SavedTensor:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._memory = tensor.data
        self._memory.data_ptr()  # raises for a tensor without memory of its own
        self._values = tensor.data.clone()
        self._requires_grad = tensor.requires_grad
        self._gradient = tensor.grad if tensor.is_leaf else None
        self._gradient_values = None if self._gradient is None else self._gradient.detach().clone()

    def restore(self) -> None:
        if _is_freed(self._memory):
            return
        if self._tensor.data_ptr() != self._memory.data_ptr() or self._tensor.shape != self._memory.shape:
            self._tensor.data = self._memory
        self._memory.copy_(self._values)
        if self._tensor.is_leaf:
            self._tensor.requires_grad_(self._requires_grad)
            self._tensor.grad = self._gradient
            if self._gradient is not None and self._gradient_values is not None:
                self._gradient.copy_(self._gradient_values)  # DDP may hand out the same memory for the next gradient

    def clear_gradient(self) -> None:
        if self._tensor.is_leaf:
            self._tensor.grad = None


def _is_freed(tensor: Tensor) -> bool:
    """Whether a sharding has taken its memory away until it gathers the weights again: to touch it ends the process."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    try:
        return tensor.untyped_storage().nbytes() == 0
    except (RuntimeError, NotImplementedError):  # none to ask
        return False


def _is_expanded(tensor: Tensor) -> bool:
    """torch itself refuses to write into those."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _fingerprint(value: Any) -> object:
    """Something cheap to compare that differs if an object has changed, as far as it can be seen from outside."""
    try:
        if isinstance(value, Tensor):
            return (value._version, id(value.grad))
        if isinstance(value, GeneratorType):
            frame = value.gi_frame
            return None if frame is None else (frame.f_lasti, _shallow(inspect.getgeneratorlocals(value)))
        if hasattr(value, "__dict__"):
            return _shallow(vars(value))
        if type(value).__module__ == "itertools":
            return repr(value)
        return operator.length_hint(value, -1) if isinstance(value, Iterator) else None
    except Exception:  # a foreign class may refuse to be looked at
        return None


def _shallow(attributes: Mapping[str, Any]) -> dict[str, object]:
    return {
        name: value if isinstance(value, Plain) else (id(value), len(value) if hasattr(value, "__len__") else 0)
        for name, value in attributes.items()
    }


def _undo_of(value: Any) -> Callable[[], object] | None:
    """How to give a container, a random generator or an array the contents back that it has now."""
    if isinstance(value, (dict, list, set, deque)):
        return _undo_of_container(value)
    if isinstance(value, (bytearray, array.array)):
        return functools.partial(operator.setitem, value, slice(None), value[:])
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    numpy = numpy_if_loaded()
    if numpy and isinstance(value, numpy.ndarray):
        return _undo_of_array(value)
    if numpy and isinstance(value, numpy.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if numpy and isinstance(value, numpy.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _undo_of_container(value: Any) -> Callable[[], None]:
    kept = contents(value)

    def undo() -> None:
        now = contents(value)
        if len(now) == len(kept) and all(map(_same, now, kept)):
            return
        value.clear()
        if isinstance(value, dict):
            for key, item in kept:
                value[key] = item
        else:
            (value.update if isinstance(value, set) else value.extend)(kept)

    return undo


def _undo_of_array(value: Any) -> Callable[[], None]:
    kept = value.copy()

    def undo() -> None:
        if value.flags.writeable:  # else nothing else can have written into it either
            value[...] = kept

    return undo


def _same(now: Any, kept: Any) -> bool:
    if isinstance(now, tuple) and isinstance(kept, tuple) and len(now) == len(kept):
        return all(first is second for first, second in zip(now, kept, strict=True))
    return now is kept


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif hasattr(generator, "bit_generator"):  # numpy's new kind
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)
