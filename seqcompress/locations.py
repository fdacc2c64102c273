"""Functions of a user's own, named on a command line as ``package.module:function`` or ``path/to/file.py:function``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seqcompress.json_files import is_file

__all__ = ["LocationError", "loaded", "location", "module_name"]


class LocationError(ValueError):
    """There is no such module or function."""


def location(text: str) -> tuple[str, str]:
    """Module or file, and the function's name: a type for argparse."""
    where, _, name = text.rpartition(":")
    if not where or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be package.module:function or path/to/file.py:function, got {text!r}")
    if where.endswith(".py") and not is_file(where):
        raise argparse.ArgumentTypeError(f"there is no file {where}")
    return where, name


def loaded(where: str, name: str) -> Callable[..., Any]:
    """The function, imported as Python's own command line would: what lies beside it can be imported too.

    Raises:
        LocationError: there is no such module or function. Errors of the user's own code stay what they are.
    """
    path = Path(where)
    of_file, module_of = where.endswith(".py"), module_name(where)
    sys.path.insert(0, str(path.parent.resolve()) if of_file else str(Path.cwd()))
    try:
        module = importlib.import_module(module_of)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_of}.".startswith(f"{error.name}."):
            raise  # something that it imports itself
        raise LocationError(f"there is no module {module_of}") from None
    found = getattr(module, "__file__", None)
    if of_file and (found is None or not path.samefile(found)):
        raise LocationError(f"{where} needs another name: {module_of} is {found or module!r}")
    function = getattr(module, name, None)
    if not callable(function):
        raise LocationError(f"{where} has no function {name}")
    return function


def module_name(where: str) -> str:
    """How what lies there is imported."""
    return Path(where).stem if where.endswith(".py") else where
