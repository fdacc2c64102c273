"""How a message shows a value that is not what was expected."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["described", "resume_notice"]

_MANY_DIGITS = 10**40
_LONGEST = 100  # letters


def described(value: object) -> str:
    """A value on one line: as it is, or the beginning of what is long; many lines, a module say, by their type."""
    if isinstance(value, int) and abs(value) >= _MANY_DIGITS:  # of one with thousands of digits, str() is an error
        return "a number of very many digits"
    try:
        shown, plainly = repr(value), "\n" if isinstance(value, str) else str(value)
        shape, size = getattr(value, "shape", None), ""
        if isinstance(shape, tuple):
            size = f" of shape {tuple(shape)}"
        elif isinstance(value, (list, tuple, set, Mapping)):
            size = f" of {len(value)}"
    except Exception:  # whatever a foreign class does there, or a list of such numbers
        shown, plainly, size = "\n", "\n", ""
    if len(shown) > _LONGEST and "\n" not in plainly:  # a schedule's, say
        shown = plainly
    return f"a {type(value).__name__}{size}" if "\n" in shown else _cut(shown)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def resume_notice(changes: dict[str, tuple[object, object]], now: object) -> str:
    """The one line that a resumed run says where checkpoint and script differ: the script holds, in every host.

    Args:
        changes: by name, what the checkpoint has and what the script says.
        now: the strategy that follows.
    """
    differences = ", ".join(f"{name} {_short(own)} (was {_short(saved)})" for name, (saved, own) in changes.items())
    return f"goes on from its step by what this script says, not by the checkpoint: {differences}; now at {now}"


def _short(value: object) -> str:
    return value if isinstance(value, str) else _cut(str(value))
