"""Putting everything back that a training step changes: weights, gradients, buffers, queues, optimizers, generators."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from seqcompress.training.random_states import numpy_if_loaded

__all__ = ["Snapshot", "reached_by"]

_Stateful = (nn.Module, Optimizer, LRScheduler)


class Snapshot:
    """The state of objects, to be put back as often as needed.

    Followed are modules, optimizers and learning-rate schedulers with all their attributes; tensors, arrays, random
    generators, lists, dicts, sets and deques. What else an attribute may hold is put back as the same object, but not
    looked into. Objects keep their identity, and tensors their memory.

    Args:
        roots: where to begin. Attributes of these are followed whatever their class.
    """

    def __init__(self, roots: Iterable[object]) -> None:
        self._seen: dict[int, object] = {}
        self._tensors: list[_SavedTensor] = []
        self._undo: list[Callable[[], object]] = []
        self._generators: list[Any] = []
        for root in roots:
            self._save(root)
            if id(root) not in self._seen and hasattr(root, "__dict__"):
                self._save(vars(root))

    def restore(self) -> None:
        """Put everything back."""
        for undo in self._undo:
            undo()
        with torch.no_grad():
            for tensor in self._tensors:
                tensor.restore()

    def clear_gradients(self) -> None:
        """Let a backward pass start from nothing; ``restore`` brings the gradients back."""
        for tensor in self._tensors:
            tensor.clear_gradient()

    def seed(self, seed: int) -> None:
        """Set all random generators among it from one number; ``restore`` brings their states back."""
        for generator in self._generators:
            _seed(generator, seed)

    def _save(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._seen[id(value)] = value
            if not _is_expanded(value):  # torch itself refuses to write into those
                self._tensors.append(_SavedTensor(value))
        elif isinstance(value, _Stateful):
            self._seen[id(value)] = value
            self._save(vars(value))
        elif isinstance(value, (dict, list, set, deque)):
            self._seen[id(value)] = value
            self._undo.append(_undo_of(value))
            for item in _contents(value):
                self._save(item)
        elif isinstance(value, tuple):
            for item in value:
                self._save(item)
        elif (undo := _undo_of_other(value)) is not None:
            self._seen[id(value)] = value
            self._undo.append(undo)
            if _is_generator(value):
                self._generators.append(value)


class _SavedTensor:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._memory = tensor.data
        self._values = tensor.data.clone()
        self._requires_grad = tensor.requires_grad
        self._gradient = tensor.grad if tensor.is_leaf else None
        self._gradient_values = None if self._gradient is None else self._gradient.detach().clone()

    def restore(self) -> None:
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


def reached_by(function: object) -> list[object]:
    """Modules, optimizers, learning-rate schedulers and random generators that a function can get at.

    For a method, the object itself comes first, whatever its class. Searched are what the function is bound to, its
    closure, its default and partial arguments, the global names in its code, and functions of the same file that it
    calls; lists and dicts among these, and attributes of other objects.
    """
    owner = [function.__self__] if isinstance(function, MethodType) else []
    found = {id(value): value for value in (*owner, *_reached(function, set(), in_object=False))}
    return list(found.values())


def _reached(value: Any, seen: set[int], *, in_object: bool) -> Iterator[object]:
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    nested: Iterable[object] = ()
    if isinstance(value, _Stateful) or _is_generator(value):
        yield value
    elif isinstance(value, functools.partial):
        nested = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        nested = (value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        nested = _used_by(value)
    elif isinstance(value, (list, tuple, set, deque)):
        nested = list(value)
    elif isinstance(value, dict):
        nested = list(value.values())
    elif hasattr(value, "__dict__") and not in_object and not isinstance(value, (Tensor, ModuleType)):
        nested, in_object = list(vars(value).values()), True
    for item in nested:
        yield from _reached(item, seen, in_object=in_object)


def _used_by(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that has no value yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in _names(function.__code__):
        used = function.__globals__.get(name)
        if not isinstance(used, FunctionType) or used.__globals__ is function.__globals__:
            yield used


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_expanded(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _contents(value: Any) -> list[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def _undo_of(value: Any) -> Callable[[], None]:
    """How to give a container the contents back that it has now."""
    kept = list(value.items() if isinstance(value, dict) else value)

    def undo() -> None:
        now = list(value.items() if isinstance(value, dict) else value)
        if len(now) == len(kept) and all(map(_same, now, kept)):
            return
        value.clear()
        if isinstance(value, dict):
            for key, item in kept:
                value[key] = item
        else:
            (value.update if isinstance(value, set) else value.extend)(kept)

    return undo


def _same(now: Any, kept: Any) -> bool:
    if isinstance(now, tuple) and isinstance(kept, tuple) and len(now) == len(kept):
        return all(first is second for first, second in zip(now, kept, strict=True))
    return now is kept


def _undo_of_other(value: Any) -> Callable[[], object] | None:
    """The same for random generators and numpy arrays."""
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    numpy = numpy_if_loaded()
    if numpy and isinstance(value, numpy.ndarray):
        return functools.partial(numpy.copyto, value, value.copy())
    if numpy and isinstance(value, numpy.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if numpy and isinstance(value, numpy.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _is_generator(value: object) -> bool:
    numpy = numpy_if_loaded()
    kinds: tuple[Any, ...] = (torch.Generator, random.Random)
    return isinstance(value, (*kinds, numpy.random.Generator, numpy.random.RandomState) if numpy else kinds)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif hasattr(generator, "bit_generator"):  # numpy's new kind
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)
