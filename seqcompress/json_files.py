"""JSON files: written the same way everywhere, and read as what a person may have written.

Every complaint names the file and the field.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from seqcompress.messages import described

__all__ = [
    "FieldError",
    "check_names",
    "is_file",
    "json_text",
    "read_json",
    "replacing",
    "take",
    "take_version",
    "write_json",
    "write_text",
]


_LONGEST_PATH = 4096  # of any system, in letters
_LARGEST_FILE = 2**26  # bytes; a schedule has some hundred, a report of 50 strategies and 1000 batches 6 million


class FieldError(ValueError):
    """Something is wrong with one field."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"field {described(name)}: {problem}")


def write_json(content: Mapping[str, Any], path: str | os.PathLike[str] | None) -> str:
    """An object as JSON text, written to ``path`` too if one is given."""
    text = json.dumps(content, indent=2) + "\n"
    if path is not None:
        write_text(text, path)
    return text


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a text file, whole or not at all; see [replacing][seqcompress.json_files.replacing]."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        file.write(text)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside ``path`` to be written, which takes its place when it is complete and on the disk.

    If writing is interrupted or the disk is full, the old file stays. After a kill, a hidden file ending in
    ``.unfinished`` and the suffix may be left. What is no ordinary file, such as a pipe, is written directly.

    Raises:
        OSError: it cannot be written; the message is the system's.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    if target.exists() and not target.is_file():
        yield target
        return
    beside = target.with_name(f".{secrets.token_hex(8)}.unfinished{target.suffix}")
    try:
        yield beside
        with suppress(FileNotFoundError):
            beside.chmod(target.stat().st_mode & 0o7777)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(target)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(beside):  # not the file that was asked for
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    with suppress(OSError, AttributeError):  # where folders can be flushed
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
        ValueError: the content is not a JSON object, or the file has more than 64 MiB.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be JSON text or a path, got {described(source)}")
    if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
        origin, text = what, source
    else:
        path = os.fspath(source)
        origin = f"{what} file {path!r}" if len(path) <= _LONGEST_PATH else f"{what} file of {len(path)} letters"
        if not is_file(source):
            raise FileNotFoundError(f"{origin} does not exist")
        try:
            with Path(source).open("rb") as file:
                content = file.read(_LARGEST_FILE + 1)
            if len(content) > _LARGEST_FILE:
                raise ValueError(f"{origin} must have at most {_LARGEST_FILE // 2**20} MiB, got more")
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{origin} is not UTF-8 text: {error}") from None
    fields = _parsed(text, origin)
    if not isinstance(fields, dict):
        raise ValueError(f"{origin}: must be a JSON object, got {described(fields)}")
    return fields, origin


def json_text(value: Any, name: str) -> str:
    """A JSON object's text out of a saved state, for [read_json][seqcompress.json_files.read_json].

    What comes out of a checkpoint names no file.

    Raises:
        TypeError: it is no text.
        ValueError: it is another text, such as a path.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be JSON text, got {described(value)}")
    if not value.lstrip().startswith("{"):
        raise ValueError(f"{name} must be JSON text of an object, got {described(value)}")
    return value


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
        raise FieldError(name, f"version {described(version)} is not supported; supported: {supported}")


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
            ((repeated, _),) = Counter(name for name, _ in pairs).most_common(1)
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
