"""How a message shows a value that is not what was expected."""

from __future__ import annotations

__all__ = ["by_script", "described"]

_MANY_DIGITS = 10**40


def described(value: object) -> str:
    """A value on one line: what is short as it is, anything else, a whole module for instance, by its type."""
    if isinstance(value, int) and abs(value) >= _MANY_DIGITS:  # of one with thousands of digits, str() is an error
        return "a number of very many digits"
    try:
        shown = repr(value)
    except Exception:  # whatever a foreign class does there, or a list of such numbers
        shown = "\n"
    return shown if len(shown) <= 100 and "\n" not in shown else f"a {type(value).__name__}"


def by_script(changes: dict[str, tuple[object, object]], now: object) -> str:
    """The one line that a resumed run says where checkpoint and script differ: the script holds, in every host.

    Args:
        changes: by name, what the checkpoint has and what the script says.
        now: the strategy that follows.
    """
    differences = ", ".join(f"{name} {_short(own)} (was {_short(saved)})" for name, (saved, own) in changes.items())
    return f"goes on from its step by what this script says, not by the checkpoint: {differences}; now at {now}"


def _short(value: object) -> str:
    return value if isinstance(value, str) else described(value)
