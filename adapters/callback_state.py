"""What a checkpoint has of the Lightning callback: whether a run can go on with it, and what it says of its own run.

Used by [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression]; nothing else imports it. Imports
neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from seqcompress.messages import described

if TYPE_CHECKING:
    from seqcompress.schedules import Schedule

__all__ = ["checked_state", "forwards_in", "has_plan_left", "schedule_in"]


def checked_state(state: Any) -> dict[str, Any]:
    """A checkpoint's numbers, each where a run can go on with it."""
    from seqcompress.training.budget import MOST_UNITS

    numbers: dict[str, tuple[Any, float, float]] = {
        "seed": (int, 0, 2**64 - 1),
        "units": ((int, float), 0, MOST_UNITS),
        "progress": ((int, float), 0, 1),
        "batches": ((int, type(None)), 1, 2**64 - 1),
    }
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of seqcompress's callback must be a mapping, got {described(state)}")
    for name, (kind, least, most) in numbers.items():
        value = state.get(name, least)
        in_range = isinstance(value, kind) and (value is None or least <= value <= most)
        if isinstance(value, bool) or not in_range:
            raise ValueError(
                f"the state of seqcompress's callback must have a number from {least} to {most} as {name!r}, got "
                f"{described(value)}"
            )
    return dict(state)


def forwards_in(state: dict[str, Any]) -> list[int]:
    """How many forwards of its step a state was saved after, by encoder."""
    forwards = state.get("forwards")
    counts = forwards if isinstance(forwards, list) else []
    return [count if isinstance(count, int) and count > 0 else 0 for count in counts]


def schedule_in(state: dict[str, Any], name: str) -> Schedule | None:
    """What an encoder was compressed with when a state was saved, if it says so."""
    from seqcompress.json_files import json_text
    from seqcompress.schedules import Schedule

    text = state.get("plans", {}).get(name)
    return None if text is None else Schedule.from_json(json_text(text, "plans"))


def has_plan_left(state: dict[str, Any]) -> bool:
    """Whether a run was at a plan when its state was saved, and not at the end of it."""
    from seqcompress.schedules import Constant

    plans = [schedule_in(state, name) for name in state.get("plans", {})]
    return any(isinstance(plan, Constant) or state.get("progress", 0.0) < 1.0 for plan in plans)
