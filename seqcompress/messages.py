"""How a message shows a value that is not what was expected."""

from __future__ import annotations

__all__ = ["described"]

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
