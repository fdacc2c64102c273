"""JSON files: written the same way everywhere, and read as what a person may have written.

Every complaint names the file and the field.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["FieldError", "check_names", "is_file", "read_json", "take", "take_version", "write_json"]


class FieldError(ValueError):
    """Something is wrong with one field."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"field {name!r}: {problem}")


def write_json(content: Mapping[str, Any], path: str | os.PathLike[str] | None) -> str:
    """An object as JSON text, written to ``path`` too if one is given."""
    text = json.dumps(content, indent=2) + "\n"
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def read_json(source: str | os.PathLike[str], what: str) -> tuple[dict[str, Any], str]:
    """A JSON object from its text (it begins with ``{``) or from a file.

    Args:
        source: the text, or the path.
        what: what it should be, for messages.

    Returns:
        The object's fields, and a name of their origin for messages.

    Raises:
        TypeError: ``source`` is neither text nor path.
        FileNotFoundError: there is no such file.
        ValueError: the content is not a JSON object.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be JSON text or a path, got {source!r}")
    if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
        origin, text = what, source
    else:
        origin = f"{what} file {os.fspath(source)!r}"
        if not is_file(source):
            raise FileNotFoundError(f"{origin} does not exist")
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{origin} is not UTF-8 text: {error}") from None
    content = _parsed(text, origin)
    if not isinstance(content, dict):
        raise ValueError(f"{origin}: must be a JSON object, got {type(content).__name__}")
    return content, origin


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a file; no, for what can be no path at all."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def take(fields: dict[str, Any], name: str) -> Any:
    """Take a field out that must be there."""
    if name not in fields:
        raise FieldError(name, "is missing")
    return fields.pop(name)


def take_version(fields: dict[str, Any], name: str, supported: int) -> None:
    """Take out the field that says what the object is, and in which version."""
    version = take(fields, name)
    if isinstance(version, bool) or version != supported:
        raise FieldError(name, f"version {version!r} is not supported; supported: {supported}")


def check_names(fields: Mapping[str, Any], expected: tuple[str, ...]) -> None:
    """Raise FieldError unless exactly the expected fields are there."""
    for name in expected:
        if name not in fields:
            raise FieldError(name, "is missing")
    for name in fields:
        if name not in expected:
            raise FieldError(name, f"is unknown; expected {', '.join(map(repr, expected))}")


def _parsed(text: str, origin: str) -> Any:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise FieldError(repeated, "is there twice")
        return content

    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except FieldError as error:
        raise ValueError(f"{origin}: {error}") from None
    except ValueError as error:  # malformed, or a number of thousands of digits
        raise ValueError(f"{origin} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{origin} is not valid JSON: it is nested too deeply") from None
