"""Which strategy at which point of training: from strong compression early to none at the end.

A schedule is a plain value. It knows nothing of models or steps: called with the progress of training,
a number in [0, 1], it returns a [Strategy][seqcompress.Strategy]. Source of the idea: Lin et al.,
"Accelerating Augmentation Invariance Pretraining", NeurIPS 2024 (arXiv 2410.22364).
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from seqcompress.checks import checked_count, checked_progress, checked_share
from seqcompress.json_files import FieldError, check_names, read_json, take, take_version, write_json
from seqcompress.messages import described
from seqcompress.strategy import Strategy

__all__ = ["Constant", "Cosine", "Linear", "Online", "Schedule", "Stepwise", "reads_like_schedule"]

_VERSION = 1
_RAMP = re.compile(r"(linear|cosine) from (.+) to (.+)")
_BEGINNINGS = (r"base\s*$", r"(drop|patch|linear|cosine)\s+\S", r"[-+]?(\.?\d|nan|inf)[\w.+-]*\s*:")


class Schedule(ABC):
    """What every schedule is: progress of training in, strategy out.

    Schedules compare by value, can be pickled, and round-trip through JSON.
    """

    kind: ClassVar[str]

    @abstractmethod
    def _at(self, progress: float) -> Strategy: ...

    @abstractmethod
    def strategies(self) -> tuple[Strategy, ...]:
        """The strategies between which all others of this schedule lie, without repeats.

        Whatever must hold for the whole run (a patch fits the view, the longest sequence fits the memory)
        holds if it holds for these.
        """

    @abstractmethod
    def _fields(self) -> dict[str, Any]: ...

    @classmethod
    @abstractmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Schedule: ...

    @abstractmethod
    def __str__(self) -> str:
        """The schedule on one line, for people; a plan as it is, but for an online one."""

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read back what ``str(schedule)`` wrote, of any kind but an online one.

        Raises:
            TypeError: ``text`` is not a string.
            ValueError: ``text`` is not a schedule's text, names a value out of range, or is of another kind.

        Examples:
            >>> str(Schedule.parse("0: drop 0.5, patch 32; 0.5: patch 32"))
            '0: drop 0.5, patch 32; 0.5: patch 32'
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string such as '0: drop 0.5; 0.9: base', got {described(text)}")
        ramp = _RAMP.fullmatch(" ".join(text.split()))
        if ramp is None and ":" not in text:
            found: Schedule = Constant(Strategy.parse(text))  # its own words say what is wrong
        else:
            try:
                found = Stepwise(_stages_in(text)) if ramp is None else _ramp(*ramp.groups())
            except ValueError as error:
                raise ValueError(f"text {described(text)} is not a schedule: {error}") from None
        if not isinstance(found, cls):
            raise ValueError(f"text must be of kind {cls.kind!r}, got {described(text)}, which is {found.kind!r}")
        return found

    def __call__(self, progress: float) -> Strategy:
        """The strategy at ``progress``, the share of training that is done, in [0, 1].

        Raises:
            TypeError: ``progress`` is not a number.
            ValueError: ``progress`` is outside [0, 1] or NaN.
        """
        return self._at(checked_progress(progress, "progress"))

    def at_step(self, step: int, total_steps: int) -> Strategy:
        """The strategy of a run's step: that at ``step / total_steps``, and at the last step the end's.

        Args:
            step: number of steps done, at least 0; from ``total_steps - 1`` on, the end holds.
            total_steps: steps of the whole run, at least 1. If they are as many as the stages of a
                [Stepwise][seqcompress.schedules.Stepwise] at least, each of these gets one.

        Raises:
            TypeError: an argument is not a whole number.
            ValueError: an argument is out of range.
        """
        step, total_steps = _checked_steps(step, total_steps)
        return self(1.0 if step >= total_steps - 1 else step / total_steps)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The schedule as JSON text, written to ``path`` too if one is given."""
        return write_json(self._content(), path)

    def _content(self) -> dict[str, Any]:
        return {"seqcompress_schedule": _VERSION, "kind": self.kind, **self._fields()}

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Schedule:
        """Read a schedule back from JSON text or from a file.

        Args:
            source: the text itself (it begins with ``{``), or the path of a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the content is not a schedule; the message names the field.
        """
        fields, origin = read_json(source, "schedule")
        try:
            return cls._from_content(fields)
        except FieldError as error:
            raise ValueError(f"{origin}: {error}") from None

    @classmethod
    def _from_content(cls, fields: dict[str, Any]) -> Schedule:
        take_version(fields, "seqcompress_schedule", _VERSION)
        kind = take(fields, "kind")
        kinds = {known.kind: known for known in (Constant, Linear, Cosine, Stepwise, Online) if issubclass(known, cls)}
        if not isinstance(kind, str) or kind not in kinds:
            raise FieldError("kind", f"{described(kind)} is not one of {', '.join(map(repr, kinds))}")
        return kinds[kind]._from_fields(fields)


@dataclass(frozen=True)
class Constant(Schedule):
    """The same strategy all the time."""

    strategy: Strategy
    kind: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        _check_strategy(self.strategy, "strategy")

    def __str__(self) -> str:
        return str(self.strategy)

    def _at(self, progress: float) -> Strategy:
        return self.strategy

    def strategies(self) -> tuple[Strategy, ...]:
        return (self.strategy,)

    def _fields(self) -> dict[str, Any]:
        return {"strategy": self.strategy.to_dict()}

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Constant:
        return cls(**_strategy_fields(fields, "strategy"))


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From one strategy to another: dropout moves gradually, patch size changes over halfway.

    Only the two patch sizes that were asked for are ever used: sizes between them, 17 px say, make no
    grid of the view. For more sizes on the way, use [Stepwise][seqcompress.schedules.Stepwise].
    """

    start: Strategy
    end: Strategy

    def __post_init__(self) -> None:
        _check_strategy(self.start, "start")
        _check_strategy(self.end, "end")

    def __str__(self) -> str:
        return f"{self.kind} from {self.start} to {self.end}"

    @abstractmethod
    def _share(self, progress: float) -> float:
        """How far from start (0) to end (1)."""

    def _at(self, progress: float) -> Strategy:
        if progress in (0.0, 1.0):
            return self.end if progress else self.start
        share = self._share(progress)
        first, last = self.start.token_dropout, self.end.token_dropout
        # Rounding must neither leave the range nor make many strategies of one.
        dropout = min(max((1.0 - share) * first + share * last, min(first, last)), max(first, last))
        return Strategy(dropout, self.start.patch_size if progress < 0.5 else self.end.patch_size)

    def strategies(self) -> tuple[Strategy, ...]:
        halfway = 0.5 * (self.start.token_dropout + self.end.token_dropout)
        before, after = Strategy(halfway, self.start.patch_size), Strategy(halfway, self.end.patch_size)
        return tuple(dict.fromkeys((self.start, before, after, self.end)))

    def _fields(self) -> dict[str, Any]:
        return {"start": self.start.to_dict(), "end": self.end.to_dict()}

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> _Ramp:
        return cls(**_strategy_fields(fields, "start", "end"))


@dataclass(frozen=True)
class Linear(_Ramp):
    """Dropout moves from ``start`` to ``end`` in a straight line; patch size changes over halfway."""

    kind: ClassVar[str] = "linear"

    def _share(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Dropout moves from ``start`` to ``end`` along half a cosine wave; patch size changes over halfway."""

    kind: ClassVar[str] = "cosine"

    def _share(self, progress: float) -> float:
        return 0.5 * (1.0 - math.cos(math.pi * progress))


@dataclass(frozen=True, init=False, repr=False)
class Stepwise(Schedule):
    """Each strategy holds from its progress on, until the next one's.

    Args:
        stages: progress in [0, 1] mapped to the strategy that begins there; progress 0 must be among them.
    """

    stages: tuple[tuple[float, Strategy], ...]
    kind: ClassVar[str] = "stepwise"

    def __init__(self, stages: Mapping[float, Strategy]) -> None:
        if not isinstance(stages, Mapping):
            raise TypeError(f"stages must map progress to Strategy, got {described(stages)}")
        checked = {}
        for progress, strategy in stages.items():
            _check_strategy(strategy, f"stages[{described(progress)}]")
            checked[checked_progress(progress, "stages: progress")] = strategy
        if 0.0 not in checked:
            raise ValueError(f"stages must begin at progress 0, got {described(sorted(checked))}")
        object.__setattr__(self, "stages", tuple(sorted(checked.items(), key=lambda stage: stage[0])))

    def __repr__(self) -> str:
        return f"Stepwise({dict(self.stages)!r})"

    def __str__(self) -> str:
        return "; ".join(f"{_shortest(begin)}: {strategy}" for begin, strategy in self.stages)

    def _at(self, progress: float) -> Strategy:
        return [strategy for begin, strategy in self.stages if begin <= progress][-1]

    def at_step(self, step: int, total_steps: int) -> Strategy:
        step, total_steps = _checked_steps(step, total_steps)
        first_steps = _first_steps(tuple(begin for begin, _ in self.stages), total_steps)
        return self.stages[bisect_right(first_steps, step) - 1][1]

    def strategies(self) -> tuple[Strategy, ...]:
        return tuple(dict.fromkeys(strategy for _, strategy in self.stages))

    def _fields(self) -> dict[str, Any]:
        return {"stages": [{"progress": begin, **strategy.to_dict()} for begin, strategy in self.stages]}

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Stepwise:
        check_names(fields, ("stages",))
        entries = fields["stages"]
        if not isinstance(entries, list) or not entries:
            raise FieldError("stages", f"must be a list of stages, got {described(entries)}")
        stages: dict[float, Strategy] = {}
        for index, stage in enumerate(entries):
            name = f"stages[{index}]"
            if not isinstance(stage, dict) or "progress" not in stage:
                raise FieldError(name, f"must be an object with 'progress', got {described(stage)}")
            strategy = _strategy(name, {key: value for key, value in stage.items() if key != "progress"})
            try:
                progress = checked_progress(stage["progress"], "progress")
            except (TypeError, ValueError) as error:
                raise FieldError(f"{name}.progress", str(error)) from None
            if progress in stages:
                raise FieldError(f"{name}.progress", f"{progress!r} is there twice")
            stages[progress] = strategy
        try:
            return cls(stages)
        except ValueError as error:
            raise FieldError("stages", str(error)) from None


@dataclass(frozen=True)
class Online(Schedule):
    """Finds itself while the run goes on, for a share of it; follows a preset until it has found something better.

    It is found under a driver that measures: an [OnlineScheduler][seqcompress.OnlineScheduler] or the Lightning
    callback. Any other driver follows the preset, and says so. See ``docs/online-schedule.md``.

    Args:
        preset: what holds until the first move; its last stage holds in the end in any case, if it has several.
        compute_share: measuring takes at most this share of the encoders' FLOPs of training so far, in (0, 1].
        time_share: and at most this share of the time of training so far, in (0, 1]; ``None`` for as long as it takes.
            A decision that is begun is ended if the time of the whole run allows it. Where time is what limits, the
            moments of measuring depend on the machine.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a share is out of range.
    """

    preset: Stepwise | Constant
    compute_share: float = 0.03
    time_share: float | None = 0.03
    kind: ClassVar[str] = "online"

    def __post_init__(self) -> None:
        if not isinstance(self.preset, (Stepwise, Constant)):
            raise TypeError(
                f"preset must be a Stepwise or a Constant, for what is measured must last, got {described(self.preset)}"
            )
        object.__setattr__(self, "compute_share", checked_share(self.compute_share, "compute_share"))
        if self.time_share is not None:
            object.__setattr__(self, "time_share", checked_share(self.time_share, "time_share"))

    def __str__(self) -> str:
        return f"online, at first {self.preset}"

    def _at(self, progress: float) -> Strategy:
        return self.preset(progress)

    def at_step(self, step: int, total_steps: int) -> Strategy:
        return self.preset.at_step(step, total_steps)

    def strategies(self) -> tuple[Strategy, ...]:
        return tuple(dict.fromkeys((*self.preset.strategies(), Strategy())))  # the base is always measured

    def _fields(self) -> dict[str, Any]:
        return {
            "preset": self.preset._content(),
            "compute_share": self.compute_share,
            "time_share": self.time_share,
        }

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Online:
        check_names(fields, ("preset", "compute_share", "time_share"))
        preset = fields["preset"]
        if not isinstance(preset, dict):
            raise FieldError("preset", f"must be a schedule, got {described(preset)}")
        try:
            inner = Schedule._from_content(dict(preset))
        except FieldError as error:
            raise FieldError("preset", str(error)) from None
        try:
            return cls(inner, fields["compute_share"], fields["time_share"])  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:  # the message begins with the field
            raise FieldError(str(error).partition(" ")[0], str(error)) from None


def reads_like_schedule(text: str) -> bool:
    """Whether a text begins as one that [parse][seqcompress.schedules.Schedule.parse] reads, right or wrong."""
    return re.match(rf"\s*({'|'.join(_BEGINNINGS)})", text) is not None


def _ramp(kind: str, start: str, end: str) -> _Ramp:
    ends = Strategy.parse(start), Strategy.parse(end)
    return Linear(*ends) if kind == Linear.kind else Cosine(*ends)


def _stages_in(text: str) -> dict[float, Strategy]:
    """The stages of a text such as ``0: drop 0.5; 0.9: base``."""
    stages: dict[float, Strategy] = {}
    for stage in text.split(";"):
        begin, _, strategy = stage.partition(":")
        try:
            progress = float(begin)
        except ValueError:
            raise ValueError(f"a stage must read like '0.9: base', got {described(stage.strip())}") from None
        if progress in stages:
            raise ValueError(f"progress {begin.strip()} is there twice")
        stages[progress] = Strategy.parse(strategy.strip())
    return stages


def _checked_steps(step: Any, total_steps: Any) -> tuple[int, int]:
    return checked_count(step, "step", at_least=0), checked_count(total_steps, "total_steps", at_least=1)


def _shortest(number: float) -> str:
    """The number's text without what it does not need to be read back."""
    return short if float(short := f"{number:g}") == number else repr(number)


@lru_cache(maxsize=16)
def _first_steps(begins: tuple[float, ...], total_steps: int) -> list[int]:
    """At which step of a run each stage begins: every one has a step, as far as there are enough."""
    first_steps: list[int] = []
    for begin in begins:
        step = math.ceil(begin * total_steps)
        if step > 0 and (step - 1) / total_steps >= begin:  # a product of floats may lie above what was divided
            step -= 1
        first_steps.append(max(step, first_steps[-1] + 1) if first_steps else 0)
    stages = len(begins)
    return [max(0, min(step, total_steps - stages + stage)) for stage, step in enumerate(first_steps)]


def _strategy(name: str, fields: Any) -> Strategy:
    try:
        return Strategy.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise FieldError(name, str(error)) from None


def _strategy_fields(fields: Mapping[str, Any], *names: str) -> dict[str, Strategy]:
    check_names(fields, names)
    return {name: _strategy(name, fields[name]) for name in names}


def _check_strategy(value: Any, name: str) -> None:
    if not isinstance(value, Strategy):
        raise TypeError(f"{name} must be a Strategy, got {described(value)}")
