"""What a function or an object can get at, and under which names: what a training step may change.

Nothing is put back here: that is for [Snapshot][seqcompress.gradients.state.Snapshot].
"""

from __future__ import annotations

import argparse
import array
import collections
import contextvars
import functools
import gc
import inspect
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    GeneratorType,
    MappingProxyType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from seqcompress.compressors.random_states import numpy_if_loaded

__all__ = ["Plain", "Reach", "contents", "is_generator"]

_Stateful = (nn.Module, Optimizer, LRScheduler)
Plain = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)  # cannot change
_ABSENT = object()  # a name without a value
_DEPTH = 8  # plain objects within plain objects
_TOO_MANY = 100_000  # items of a list that are looked at one by one
# What these keep is theirs: a Trainer's loops, a logger's files, a progress bar's clock.
_HOSTS = {
    *sys.stdlib_module_names,
    *("torch", "numpy", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "seqcompress"),
    *("accelerate", "deepspeed", "wandb", "tensorboard", "mlflow", "tqdm", "rich", "matplotlib", "pandas", "PIL"),
} - {"__main__"}
_OWN = (
    *(SimpleNamespace, argparse.Namespace, torch.amp.GradScaler),
    *(collections.UserDict, collections.UserList, collections.ChainMap),
    *(weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet),
)
_DATA = (Dataset, DataLoader)
_Cached = type(functools.cache(int))
_Wrappers = (
    *(MethodType, BuiltinMethodType, MethodWrapperType, staticmethod, classmethod, property, _Cached),
    *(functools.partial, functools.partialmethod, functools.cached_property),
)
_PARTS = ("__self__", "__func__", "__wrapped__", "func", "fget", "fset", "fdel", "args", "keywords")
_CALLED = {"forward", "backward", "setup_context"}  # by torch


class Reach:
    """What functions and objects can get at, with names for messages.

    Attributes:
        found: tensors, arrays, generators and containers (attributes of an object are one), each once.
        bindings: names that may be bound anew: closure cells, global names, attributes of classes.
        watched: what cannot be put back; only that it changed can be seen.
    """

    def __init__(self, *, into_data: bool = False) -> None:
        self.found: list[tuple[str, Any]] = []
        self.bindings: list[tuple[str, _Binding]] = []
        self.watched: list[tuple[str, object]] = []
        self._into_data = into_data
        self._seen: dict[int, object] = {}
        self._bound: set[tuple[int, str]] = set()
        self._names: set[str] = set()  # used by the functions that were followed
        self._classes: dict[type, int] = {}  # of objects of one's own, and how deep these lie
        self._modules: dict[ModuleType, int] = {}

    def follow_root(self, root: object) -> None:
        """Follow an object, its attributes too whatever its class."""
        if root is None:
            return
        name = type(root).__name__
        if not self._is_followed(root) and hasattr(root, "__dict__") and not isinstance(root, (FunctionType, Tensor)):
            self._attributes(root, name, 0)
        self._follow(root, name, 0)
        self._follow_what_is_used()

    def follow_function(self, function: object) -> None:
        """Follow what a function can get at. For a method, the object itself comes first, whatever its class."""
        if isinstance(function, MethodType):
            owner = function.__self__
            if not self._is_followed(owner) and hasattr(owner, "__dict__"):
                self._seen[id(owner)] = owner
                self._attributes(owner, type(owner).__name__, 0)
            self._follow(owner, type(owner).__name__, 0)
        self._follow(function, getattr(function, "__name__", type(function).__name__), 0)
        self._follow_what_is_used()

    def _follow_what_is_used(self) -> None:
        """Of classes and modules, only what some function names: a method that is called may name more of it."""
        before = -1
        while before != len(self._bound):
            before = len(self._bound)
            for kind, depth in list(self._classes.items()):
                for key, item in list(vars(kind).items()):
                    is_used = key in self._names or key in _CALLED or key.startswith("__")
                    if is_used and isinstance(item, (FunctionType, type, *_Wrappers)):
                        self._bound.add((id(kind), key))
                        self._follow(item, f"{kind.__name__}.{key}", depth)
            for module, depth in list(self._modules.items()):
                for key in list(self._names & vars(module).keys()):
                    self._bind_name(vars(module), key, f"{module.__name__}.{key}", depth)

    def _follow(self, value: Any, name: str, depth: int) -> None:
        if type(value) in weakref.ProxyTypes:
            value = _behind(value)
        if isinstance(value, Plain) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._tensor(value, name, depth)
        elif isinstance(value, _Stateful):
            self._attributes(value, name, depth)
        elif isinstance(value, (dict, MappingProxyType)):
            if isinstance(value, dict):
                self.found.append((name, value))
            for key, item in contents(value):
                self._follow(key, name, depth)
                self._follow(item, f"{name}[{key!r}]" if isinstance(key, Plain) else name, depth)
        elif isinstance(value, (list, set, deque)):
            self.found.append((name, value))
            if len(value) <= _TOO_MANY:
                for item in contents(value):
                    self._follow(item, f"{name}[...]", depth)
        elif isinstance(value, (tuple, frozenset)):
            for item in value:
                self._follow(item, name, depth)
        elif is_generator(value) or _is_array(value) or isinstance(value, (bytearray, array.array)):
            self.found.append((name, value))
        elif isinstance(value, _Wrappers):
            for item in (getattr(value, part, None) for part in _PARTS):
                self._follow(item, name, depth)
            for item in _results(value) if isinstance(value, _Cached) else ():
                self._follow(item, f"{name}()", depth)
        elif isinstance(value, FunctionType):
            self._function(value, depth)
        elif isinstance(value, ModuleType):
            if not _is_hosts(value.__name__):
                self._modules[value] = depth
        elif isinstance(value, type):
            self._class(value, depth)
        elif isinstance(value, weakref.ref):
            self._follow(value(), name, depth)
        elif isinstance(value, contextvars.ContextVar):
            binding = _Binding.of_context(value)
            self.bindings.append((name, binding))
            self._follow(binding.kept, name, depth)
        elif isinstance(value, GeneratorType):
            self.watched.append((name, value))
            for key, item in inspect.getgeneratorlocals(value).items():
                if self._into_data or not key.startswith("."):  # the iterator of a generator expression goes on with it
                    self._follow(item, f"{name}'s {key}", depth)
        elif self._is_followed(value):
            if depth < _DEPTH:
                self._attributes(value, name, depth + 1)
            else:
                self.watched.append((name, value))
        elif self._into_data and isinstance(
            value, Iterator
        ):  # islice, map, zip: they show what they hold in no other way
            for item in gc.get_referents(value):
                self._follow(item, name, depth)
        elif not callable(value) and not _is_quiet(type(value).__module__):
            self.watched.append((name, value))

    def _is_followed(self, value: object) -> bool:
        """Whether attributes of an object are its user's own."""
        if isinstance(value, (*_Stateful, *_OWN)):
            return True
        if isinstance(value, (type, ModuleType, FunctionType, MethodType, Tensor, GeneratorType)):
            return False
        if self._into_data:
            return hasattr(value, "__dict__")
        if isinstance(value, _DATA) or _is_hosts(type(value).__module__):
            return False
        return hasattr(value, "__dict__") or bool(_slots(value))

    def _tensor(self, value: Tensor, name: str, depth: int) -> None:
        self.found.append((name, value))
        for hooks in (getattr(value, "_backward_hooks", None), getattr(value, "_post_accumulate_grad_hooks", None)):
            for hook in list((hooks or {}).values()):  # an optimizer may step in there
                self._follow(hook, f"{name}'s hook", depth)
        if type(value) in (Tensor, nn.Parameter):  # other kinds keep parts of their own memory there
            self._follow(vars(value), name, depth)

    def _attributes(self, value: Any, name: str, depth: int) -> None:
        for slot in _slots(value):
            self.bindings.append((f"{name}.{slot}", _Binding.of_attribute(value, slot)))
            self._follow(getattr(value, slot, None), f"{name}.{slot}", depth)
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and id(attributes) not in self._seen:
            self._seen[id(attributes)] = attributes
            self.found.append((name, attributes))
            for key, item in list(attributes.items()):
                if key in ("_modules", "_parameters", "_buffers") and isinstance(item, dict):
                    self._seen[id(item)] = item
                    self.found.append((name, item))
                    for child, part in list(item.items()):
                        self._follow(part, f"{name}.{child}", depth)
                else:
                    self._follow(item, f"{name}.{key}", depth)
        self._class(type(value), depth)

    def _class(self, kind: type, depth: int) -> None:
        """Its attributes, and those of its bases and its metaclass."""
        for each in (*inspect.getmro(kind), *inspect.getmro(type(kind))):
            if each in self._classes or _is_hosts(each.__module__):
                continue
            self._classes[each] = depth
            self.bindings.append((each.__name__, _Binding.of_names(each)))
            for key, item in list(vars(each).items()):
                if key.startswith("__") or callable(item) or hasattr(item, "__get__"):
                    continue
                self.bindings.append((f"{each.__name__}.{key}", _Binding.of_attribute(each, key)))
                self._follow(item, f"{each.__name__}.{key}", depth)

    def _function(self, function: FunctionType, depth: int) -> None:
        names = set(_names(function.__code__))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            binding = _Binding.of_cell(cell)
            self.bindings.append((name, binding))
            if binding.kept is not _ABSENT:
                self._follow(binding.kept, name, depth)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._follow(default, f"{function.__name__}'s default", depth)
        self._follow(vars(function), function.__name__, depth)
        self._names |= names
        module = function.__globals__.get("__name__", "")
        if not _is_hosts(module):
            self._names |= set(_words(function.__code__))
            for name in names:
                self._bind_name(function.__globals__, name, name, depth)
                for imported in (name, f"{function.__globals__.get('__package__')}.{name}"):  # within the function
                    self._follow(sys.modules.get(imported), imported, depth)

    def _bind_name(self, namespace: dict[str, Any], key: str, name: str, depth: int) -> None:
        if (id(namespace), key) in self._bound:
            return
        self._bound.add((id(namespace), key))
        binding = _Binding.of_item(namespace, key)
        self.bindings.append((name, binding))
        if binding.kept is not _ABSENT:
            self._follow(binding.kept, name, depth)


class _Binding:
    """One name, and the object that it was bound to."""

    def __init__(self, get: Callable[[], Any], bind_to: Callable[[Any], None]) -> None:
        self._read_value, self._bind_to = get, bind_to
        self.kept = get()

    def restore(self) -> None:
        if self._read_value() is not self.kept:
            self._bind_to(self.kept)

    @classmethod
    def of_cell(cls, cell: CellType) -> _Binding:
        def get() -> Any:
            try:
                return cell.cell_contents
            except ValueError:  # a name that has no value yet
                return _ABSENT

        def bind_to(value: Any) -> None:
            if value is _ABSENT:
                del cell.cell_contents
            else:
                cell.cell_contents = value

        return cls(get, bind_to)

    @classmethod
    def of_item(cls, namespace: dict[str, Any], key: str) -> _Binding:
        def bind_to(value: Any) -> None:
            if value is _ABSENT:
                del namespace[key]
            else:
                namespace[key] = value

        return cls(lambda: namespace.get(key, _ABSENT), bind_to)

    @classmethod
    def of_attribute(cls, owner: Any, key: str) -> _Binding:
        def bind_to(value: Any) -> None:
            if value is _ABSENT:
                delattr(owner, key)
            else:
                setattr(owner, key, value)

        return cls(lambda: getattr(owner, key, _ABSENT), bind_to)

    @classmethod
    def of_context(cls, variable: contextvars.ContextVar[Any]) -> _Binding:
        def bind_to(value: Any) -> None:
            if value is _ABSENT:
                raise LookupError("a context variable cannot lose its value again")
            variable.set(value)

        return cls(lambda: variable.get(_ABSENT), bind_to)

    @classmethod
    def of_names(cls, kind: type) -> _Binding:
        """The attributes that a class has, not what they are bound to."""

        def bind_to(names: frozenset[str]) -> None:
            for name in vars(kind).keys() - names:
                if not name.startswith("__"):
                    delattr(kind, name)

        return cls(lambda: frozenset(vars(kind)), bind_to)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _words(code: CodeType) -> Iterator[str]:
    """Texts that may be names: ``getattr(self, "loss")``."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _behind(proxy: Any) -> object:
    """The object that a weak proxy stands for; None if it is gone."""
    try:
        return proxy.__init__.__self__
    except ReferenceError:
        return None


def _results(cached: Any) -> list[object]:
    """What a function with a cache keeps, the cache itself left out: nobody else may write into that."""
    if not cached.cache_info().currsize:
        return []
    parts = [part for part in gc.get_referents(cached) if part is not vars(cached)]
    if cached.cache_parameters()["maxsize"] is None:
        return [result for part in parts if isinstance(part, dict) for result in part.values()]
    return [part for part in parts if not (isinstance(part, dict) and any(map(_is_link, part.values())))]


def _is_link(value: object) -> bool:
    return type(value).__name__ == "_lru_list_elem"


def _is_hosts(module: object) -> bool:
    # A class made in C may have a descriptor there.
    return isinstance(module, str) and module.partition(".")[0] in _HOSTS


def _is_quiet(module: object) -> bool:
    """Whether what an object of such a class keeps is nothing to tell of: caches, and the measurement's own."""
    if not isinstance(module, str):
        return False
    return module.partition(".")[0] in ("seqcompress", "logging") or (
        module.startswith("torch.") and not module.startswith("torch.utils.data")
    )


def _slots(value: object) -> list[str]:
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__ if not _is_hosts(kind.__module__)]
    names_of_slots = [name for names in slots for name in ((names,) if isinstance(names, str) else names)]
    return [name for name in names_of_slots if not name.startswith("__")]


def contents(container: Any) -> list[Any]:
    """What a container holds, pairs of a mapping, as the built-in class says: those made of it may load or compute.

    Transformers' maps of all its models import every one of them when they are asked for their items.
    """
    if isinstance(container, collections.OrderedDict):
        return list(collections.OrderedDict.items(container))
    if isinstance(container, dict):
        return list(dict.items(container))
    if isinstance(container, list):
        return list(list.__iter__(container))
    if isinstance(container, set):
        return list(set.__iter__(container))
    return list(container.items() if isinstance(container, MappingProxyType) else container)


def _is_array(value: object) -> bool:
    numpy = numpy_if_loaded()
    return bool(numpy) and isinstance(value, numpy.ndarray)


def is_generator(value: object) -> bool:
    """Whether it draws random numbers; nothing to do with generators that yield."""
    numpy = numpy_if_loaded()
    kinds: tuple[Any, ...] = (torch.Generator, random.Random)
    return isinstance(value, (*kinds, numpy.random.Generator, numpy.random.RandomState) if numpy else kinds)
