"""Which strategy at which point of training: from strong compression early to none at the end.

A schedule is a plain value. It knows nothing of models or steps: called with the progress of training,
a number in [0, 1], it returns a [Strategy][seqcompress.Strategy]. Source of the idea: Lin et al.,
"Accelerating Augmentation Invariance Pretraining", NeurIPS 2024 (arXiv 2410.22364).
"""

from __future__ import annotations

import json
import math
import numbers
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from seqcompress.strategy import Strategy

__all__ = ["Constant", "Cosine", "Linear", "Schedule", "Stepwise"]

_VERSION = 1


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

    def __call__(self, progress: float) -> Strategy:
        """The strategy at ``progress``, the share of training that is done, in [0, 1].

        Raises:
            TypeError: ``progress`` is not a number.
            ValueError: ``progress`` is outside [0, 1] or NaN.
        """
        return self._at(_checked_progress(progress, "progress"))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The schedule as JSON text, written to ``path`` too if one is given."""
        content = {"seqcompress_schedule": _VERSION, "kind": self.kind, **self._fields()}
        text = json.dumps(content, indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Schedule:
        """Read a schedule back from JSON text or from a file.

        Args:
            source: the text itself (it begins with ``{``), or the path of a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the content is not a schedule; the message names the field.
        """
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"source must be JSON text or a path, got {source!r}")
        if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
            origin, text = "schedule", source
        else:
            origin = f"schedule file {os.fspath(source)!r}"
            if not is_file(source):
                raise FileNotFoundError(f"{origin} does not exist")
            try:
                text = Path(source).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{origin} is not UTF-8 text: {error}") from None
        return cls._from_content(_parsed_json(text, origin), origin)

    @classmethod
    def _from_content(cls, content: Any, origin: str) -> Schedule:
        if not isinstance(content, dict):
            raise ValueError(f"{origin}: must be a JSON object, got {type(content).__name__}")
        fields = dict(content)
        version = _taken(fields, "seqcompress_schedule", origin)
        if isinstance(version, bool) or version != _VERSION:
            raise ValueError(
                f"{origin}: field 'seqcompress_schedule': version {version!r} is not supported; supported: {_VERSION}"
            )
        kind = _taken(fields, "kind", origin)
        kinds = {known.kind: known for known in (Constant, Linear, Cosine, Stepwise) if issubclass(known, cls)}
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"{origin}: field 'kind': {kind!r} is not one of {', '.join(map(repr, kinds))}")
        try:
            return kinds[kind]._from_fields(fields)
        except _FieldError as error:
            raise ValueError(f"{origin}: {error}") from None


@dataclass(frozen=True)
class Constant(Schedule):
    """The same strategy all the time."""

    strategy: Strategy
    kind: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        _check_strategy(self.strategy, "strategy")

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

    @abstractmethod
    def _share(self, progress: float) -> float:
        """How far from start (0) to end (1)."""

    def _at(self, progress: float) -> Strategy:
        if progress in (0.0, 1.0):
            return self.end if progress else self.start
        share = self._share(progress)
        dropout = (1.0 - share) * self.start.token_dropout + share * self.end.token_dropout
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
            raise TypeError(f"stages must map progress to Strategy, got {stages!r}")
        checked = {}
        for progress, strategy in stages.items():
            _check_strategy(strategy, f"stages[{progress!r}]")
            checked[_checked_progress(progress, "stages: progress")] = strategy
        if 0.0 not in checked:
            raise ValueError(f"stages must begin at progress 0, got {sorted(checked)}")
        object.__setattr__(self, "stages", tuple(sorted(checked.items(), key=lambda stage: stage[0])))

    def __repr__(self) -> str:
        return f"Stepwise({dict(self.stages)!r})"

    def _at(self, progress: float) -> Strategy:
        return [strategy for begin, strategy in self.stages if begin <= progress][-1]

    def strategies(self) -> tuple[Strategy, ...]:
        return tuple(dict.fromkeys(strategy for _, strategy in self.stages))

    def _fields(self) -> dict[str, Any]:
        return {"stages": [{"progress": begin, **strategy.to_dict()} for begin, strategy in self.stages]}

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Stepwise:
        _check_names(fields, ("stages",))
        listed = fields["stages"]
        if not isinstance(listed, list) or not listed:
            raise _FieldError("stages", f"must be a list of stages, got {listed!r}")
        stages: dict[float, Strategy] = {}
        for index, stage in enumerate(listed):
            name = f"stages[{index}]"
            if not isinstance(stage, dict) or "progress" not in stage:
                raise _FieldError(name, f"must be an object with 'progress', got {stage!r}")
            strategy = _strategy(name, {key: value for key, value in stage.items() if key != "progress"})
            try:
                progress = _checked_progress(stage["progress"], "progress")
            except (TypeError, ValueError) as error:
                raise _FieldError(f"{name}.progress", str(error)) from None
            if progress in stages:
                raise _FieldError(f"{name}.progress", f"{progress!r} is there twice")
            stages[progress] = strategy
        try:
            return cls(stages)
        except ValueError as error:
            raise _FieldError("stages", str(error)) from None


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a file; no, for what can be no path at all."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


class _FieldError(ValueError):
    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"field {name!r}: {problem}")


def _parsed_json(text: str, origin: str) -> Any:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise _FieldError(repeated, "is there twice")
        return content

    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except _FieldError as error:
        raise ValueError(f"{origin}: {error}") from None
    except ValueError as error:  # malformed, or a number of thousands of digits
        raise ValueError(f"{origin} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{origin} is not valid JSON: it is nested too deeply") from None


def _taken(fields: dict[str, Any], name: str, origin: str) -> Any:
    if name not in fields:
        raise ValueError(f"{origin}: field {name!r} is missing")
    return fields.pop(name)


def _check_names(fields: Mapping[str, Any], expected: tuple[str, ...]) -> None:
    for name in expected:
        if name not in fields:
            raise _FieldError(name, "is missing")
    for name in fields:
        if name not in expected:
            raise _FieldError(name, f"is unknown; expected {', '.join(map(repr, expected))}")


def _strategy(name: str, fields: Any) -> Strategy:
    try:
        return Strategy.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise _FieldError(name, str(error)) from None


def _strategy_fields(fields: Mapping[str, Any], *names: str) -> dict[str, Strategy]:
    _check_names(fields, names)
    return {name: _strategy(name, fields[name]) for name in names}


def _check_strategy(value: Any, name: str) -> None:
    if not isinstance(value, Strategy):
        raise TypeError(f"{name} must be a Strategy, got {value!r}")


def _checked_progress(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
    number: Any = value
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return float(number)
