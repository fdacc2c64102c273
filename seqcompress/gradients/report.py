"""What a gradient error analysis found: numbers with intervals, as text, JSON, CSV, a data frame and a picture."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from seqcompress.gradients.statistics import LEVEL, Estimate, Interval
from seqcompress.json_files import FieldError, check_names, read_json, replacing, take, take_version, write_json
from seqcompress.messages import described
from seqcompress.strategy import Strategy

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["CostKind", "GradientErrorReport", "StrategyError"]

CostKind = Literal["measured", "flops"]
_VERSION = 1
_LARGEST = 1e150  # what can still be squared
_ESTIMATED = ("bias2", "variance", "cost")
_QUANTITIES = (*_ESTIMATED, "ca_mse", "relative_bias2", "relative_variance", "relative_ca_mse")


@dataclass(frozen=True)
class StrategyError:
    """Gradient error and cost of one strategy. Every number has a 95 % interval beside it, ``(low, high)``.

    Nothing is clipped: an estimate of bias2 without systematic error is negative about half the time where the
    true one is 0.

    Attributes:
        strategy: the strategy.
        bias2: ``||E[g_s] - E[g_0]||^2``, unbiased.
        variance: ``E ||g_s - E[g_s]||^2`` at the batch size that was used, unbiased.
        cost: of a whole training step, relative to the base's.
        ca_mse: cost-adjusted mean squared error, ``bias2 + cost * variance``.
        relative_bias2: ``bias2 / base_norm2``; NaN if the estimate of ``base_norm2`` is not positive.
        relative_variance: likewise.
        relative_ca_mse: likewise. None of the relative values is looked at where two are compared: they follow from the
            rest and the report's ``base_norm2``, and NaN is unlike NaN.
        estimates: bias2, variance and cost with their leave-one-out values.
    """

    strategy: Strategy
    bias2: float
    bias2_interval: Interval
    variance: float
    variance_interval: Interval
    cost: float
    cost_interval: Interval
    ca_mse: float
    ca_mse_interval: Interval
    relative_bias2: float = field(compare=False)
    relative_bias2_interval: Interval = field(compare=False)
    relative_variance: float = field(compare=False)
    relative_variance_interval: Interval = field(compare=False)
    relative_ca_mse: float = field(compare=False)
    relative_ca_mse_interval: Interval = field(compare=False)
    estimates: tuple[Estimate, Estimate, Estimate] = field(repr=False)

    @classmethod
    def from_estimates(
        cls, strategy: Strategy, *, bias2: Estimate, variance: Estimate, cost: Estimate, base_norm2: Estimate
    ) -> StrategyError:
        """Derive everything from what was estimated on the same batches."""
        errors = {"bias2": bias2, "variance": variance, "ca_mse": bias2 + cost * variance}
        relative = {f"relative_{name}": _relative(error, base_norm2) for name, error in errors.items()}
        named = {"cost": cost, **errors, **relative}
        values = {name: estimate.value for name, estimate in named.items()}
        intervals = {f"{name}_interval": estimate.interval for name, estimate in named.items()}
        return cls(strategy=strategy, estimates=(bias2, variance, cost), **values, **intervals)  # type: ignore[arg-type]

    @property
    def ca_mse_estimate(self) -> Estimate:
        """CA-MSE with its leave-one-out values."""
        bias2, variance, cost = self.estimates
        return bias2 + cost * variance


@dataclass(frozen=True)
class GradientErrorReport:
    """Gradient error and cost of strategies at one point of training. ``report[strategy]`` is a strategy's part.

    Attributes:
        entries: one a strategy, the base first.
        base_norm2: ``||E[g_0]||^2``, unbiased: what relative values are relative to.
        base_norm2_interval: its 95 % interval.
        num_batches: batches K that were measured.
        cost_kind: "measured" for the time of a step, "flops" for the encoders' FLOPs.
        own_patch_size: the encoder's own patch size, so that ``Strategy(0, own_patch_size)`` is the base; None for
            patches that are not square.
        complete: False after an interrupt.
        sketch_error: standard deviation that sketching adds to a squared norm, relative to it; 0 for exact values.
            It is not part of the intervals.
    """

    entries: tuple[StrategyError, ...]
    base_norm2: float
    base_norm2_interval: Interval
    num_batches: int
    cost_kind: CostKind
    own_patch_size: int | None
    complete: bool
    sketch_error: float
    _base_norm2: Estimate = field(repr=False)

    @classmethod
    def from_estimates(
        cls,
        strategies: Mapping[Strategy, Mapping[str, Estimate]],
        base_norm2: Estimate,
        *,
        num_batches: int,
        cost_kind: CostKind,
        own_patch_size: int | None,
        complete: bool = True,
        sketch_error: float = 0.0,
    ) -> GradientErrorReport:
        """Derive a report from ``bias2``, ``variance`` and ``cost`` of every strategy, all from the same batches."""
        return cls(
            entries=tuple(
                StrategyError.from_estimates(strategy, base_norm2=base_norm2, **estimates)
                for strategy, estimates in strategies.items()
            ),
            base_norm2=base_norm2.value,
            base_norm2_interval=base_norm2.interval,
            num_batches=num_batches,
            cost_kind=cost_kind,
            own_patch_size=own_patch_size,
            complete=complete,
            sketch_error=sketch_error,
            _base_norm2=base_norm2,
        )

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The strategies that were measured, the base first."""
        return tuple(entry.strategy for entry in self.entries)

    @property
    def level(self) -> float:
        """Level of the intervals: 0.95."""
        return LEVEL

    @property
    def shown_prefix(self) -> str:
        """ "relative_" if tables and pictures show relative values; empty if ``base_norm2`` is not surely positive."""
        return "relative_" if self.base_norm2_interval[0] > 0 else ""

    def __getitem__(self, strategy: Strategy) -> StrategyError:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"strategy must be a Strategy, got {described(strategy)}")
        for entry in self.entries:
            if entry.strategy == canonical(strategy, self.own_patch_size):
                return entry
        measured = ", ".join(f"{known!s}" for known in self.strategies)
        raise KeyError(f"strategy {strategy!s} was not measured; measured: {measured}")

    def __contains__(self, strategy: object) -> bool:
        return isinstance(strategy, Strategy) and canonical(strategy, self.own_patch_size) in self.strategies

    def best(self) -> Strategy:
        """The strategy with the least CA-MSE."""
        return min(self.entries, key=lambda entry: entry.ca_mse).strategy

    def tied(self) -> tuple[Strategy, ...]:
        """The best strategy, and those that these batches cannot tell from it, by rising CA-MSE.

        A strategy is told from the best if the 95 % interval of the difference of their CA-MSE, batch by batch on the
        same images, is above 0. There is no correction for comparing several.
        """
        best = self[self.best()].ca_mse_estimate
        ranked = sorted(self.entries, key=lambda entry: entry.ca_mse)
        first, *others = ranked
        tied = [entry for entry in others if (entry.ca_mse_estimate - best).interval[0] <= 0]
        return tuple(entry.strategy for entry in (first, *tied))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text, written to ``path`` too if one is given. Intervals follow from what is kept."""
        content = {
            "seqcompress_gradient_error": _VERSION,
            "num_batches": self.num_batches,
            "cost_kind": self.cost_kind,
            "own_patch_size": self.own_patch_size,
            "complete": self.complete,
            "sketch_error": self.sketch_error,
            "base_norm2": _estimate_fields(self._base_norm2),
            "strategies": [
                {
                    **entry.strategy.to_dict(),
                    **{
                        name: _estimate_fields(estimate)
                        for name, estimate in zip(_ESTIMATED, entry.estimates, strict=True)
                    },
                }
                for entry in self.entries
            ],
        }
        return write_json(content, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> GradientErrorReport:
        """Read a report back from JSON text or from a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the content is not a report; the message names the field.
        """
        fields, origin = read_json(source, "gradient error report")
        try:
            take_version(fields, "seqcompress_gradient_error", _VERSION)
            return _report(fields)
        except FieldError as error:
            raise ValueError(f"{origin}: {error}") from None

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a table of all numbers and intervals, one strategy a row."""
        rows = self._rows()
        with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    def to_frame(self) -> pandas.DataFrame:
        """The same table as a pandas data frame, indexed by strategy.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("to_frame needs pandas: pip install pandas") from None
        return pandas.DataFrame(self._rows()).set_index("strategy")

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw CA-MSE, bias2, variance and cost of all strategies.

        Args:
            path: a picture file to be written; its ending names the format.

        Returns:
            matplotlib's figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from seqcompress.gradients.plots import draw_report, save

        figure = draw_report(self)
        if path is not None:
            save(figure, path)
        return figure

    def __str__(self) -> str:
        tied = self.tied()
        prefix = self.shown_prefix
        names = [f"{prefix}{name}" for name in ("bias2", "variance", "ca_mse")]
        table = [["", "strategy", "cost", "bias2", "variance", "CA-MSE"]]
        for entry in sorted(self.entries, key=lambda entry: entry.cost):
            mark = "*" if entry.strategy == tied[0] else "=" if entry.strategy in tied else ""
            shown = [_with_margin(entry, name) for name in ("cost", *names)]
            table.append([mark, str(entry.strategy), *shown])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        aligned = [
            "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in row)
            for row in (enumerate(zip(cells, widths, strict=True)) for cells in table)
        ]
        return "\n".join([self._title(bool(prefix)), "", *(line.rstrip() for line in aligned), "", *self._notes(tied)])

    def _title(self, relative: bool) -> str:
        stopped = "" if self.complete else ", interrupted"
        low, high = self.base_norm2_interval
        scale = "relative to" if relative else "absolute, for this is not surely positive:"
        return (
            f"Gradient error from {self.num_batches} batches{stopped}, cost {self.cost_kind}\n"
            f"{scale} ||E g_0||^2 = {self.base_norm2:.3g} ({low:.3g} to {high:.3g})"
        )

    def _notes(self, tied: Sequence[Strategy]) -> list[str]:
        notes = ["± is half a 95 % interval.  * least CA-MSE"]
        if len(tied) > 1:
            notes[0] += "  = not told from it by these batches"
        if self.sketch_error:
            notes.append(f"From sketches, which add an error of {self.sketch_error:.2%} of a squared norm.")
        return notes

    def _rows(self) -> list[dict[str, Any]]:
        tied = self.tied()
        rows = []
        for entry in self.entries:
            row: dict[str, Any] = {"strategy": str(entry.strategy), **entry.strategy.to_dict()}
            for name in _QUANTITIES:
                row[name] = getattr(entry, name)
                row[f"{name}_low"], row[f"{name}_high"] = getattr(entry, f"{name}_interval")
            rows.append({**row, "tied": entry.strategy in tied})
        return rows


def canonical(strategy: Strategy, own_patch_size: int | None) -> Strategy:
    """The same strategy, with None for the encoder's own patch size."""
    if own_patch_size is not None and strategy.patch_size == own_patch_size:
        return Strategy(strategy.token_dropout)
    return strategy


def _relative(estimate: Estimate, base_norm2: Estimate) -> Estimate:
    return estimate / base_norm2 if base_norm2.value > 0 else Estimate(math.nan)


def _with_margin(entry: StrategyError, name: str) -> str:
    value, (low, high) = getattr(entry, name), getattr(entry, f"{name}_interval")
    return f"{value:.3g} ± {(high - low) / 2:.2g}"


def _estimate_fields(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "leave_one_out": [list(row) for row in estimate.leave_one_out]}


def _report(fields: dict[str, Any]) -> GradientErrorReport:
    check_names(
        fields,
        ("num_batches", "cost_kind", "own_patch_size", "complete", "sketch_error", "base_norm2", "strategies"),
    )
    batches = _checked(fields, "num_batches", int, lambda value: 2 <= value <= 2**31, "a whole number of at least 2")
    own = fields["own_patch_size"]
    if own is not None:
        _checked(fields, "own_patch_size", int, lambda value: value >= 1, "a whole number of at least 1, or null")
    entries = _checked(fields, "strategies", list, bool, "a list of strategies")
    strategies: dict[Strategy, dict[str, Estimate]] = {}
    for index, entry in enumerate(entries):
        place = f"strategies[{index}]"
        if not isinstance(entry, dict):
            raise FieldError(place, f"must be an object, got {described(entry)}")
        rest = dict(entry)
        try:
            estimated = {name: take(rest, name) for name in _ESTIMATED}
            strategy = canonical(Strategy.from_dict(rest), own)
        except (TypeError, ValueError) as error:
            raise FieldError(place, str(error)) from None
        if strategy in strategies:
            raise FieldError(place, f"{strategy!s} is there twice")
        strategies[strategy] = {name: _estimate(value, f"{place}.{name}", batches) for name, value in estimated.items()}
        cost = strategies[strategy]["cost"]
        if (least := min((cost.value, *(value for row in cost.leave_one_out for value in row)))) <= 0:
            raise FieldError(f"{place}.cost", f"must be above 0, got {described(least)}")
    if Strategy() not in strategies:
        raise FieldError("strategies", "must contain the base strategy")
    return GradientErrorReport.from_estimates(
        strategies,
        _estimate(fields["base_norm2"], "base_norm2", batches),
        num_batches=batches,
        cost_kind=_checked(fields, "cost_kind", str, ("measured", "flops").__contains__, "'measured' or 'flops'"),
        own_patch_size=own,
        complete=_checked(fields, "complete", bool, lambda value: True, "true or false"),
        sketch_error=float(
            _checked(fields, "sketch_error", (int, float), lambda value: 0 <= value < 1, "a number in [0, 1)")
        ),
    )


def _checked(fields: Mapping[str, Any], name: str, kind: Any, suits: Any, expected: str) -> Any:
    value = fields[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not suits(value):
        raise FieldError(name, f"must be {expected}, got {described(value)}")
    return value


def _estimate(fields: Any, name: str, batches: int) -> Estimate:
    if not isinstance(fields, dict):
        raise FieldError(name, f"must be an object with 'value' and 'leave_one_out', got {described(fields)}")
    try:
        check_names(fields, ("value", "leave_one_out"))
    except FieldError as error:
        raise FieldError(name, str(error)) from None
    (value,) = _numbers([fields["value"]], f"{name}.value")
    rows = fields["leave_one_out"]
    per_row = batches if batches > 2 else 0
    if not isinstance(rows, list) or len(rows) > 2 or bool(rows) != bool(per_row):
        raise FieldError(
            f"{name}.leave_one_out", f"must be one or two rows for {batches} batches, got {described(rows)}"
        )
    read = []
    for row in rows:
        if not isinstance(row, list) or len(row) != per_row:
            raise FieldError(f"{name}.leave_one_out", f"must be rows of {per_row} numbers, got {described(row)}")
        read.append(_numbers(row, f"{name}.leave_one_out"))
    return Estimate(value, tuple(read))


def _numbers(values: Iterable[Any], name: str) -> tuple[float, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            raise FieldError(name, f"must be finite numbers of at most {_LARGEST:g}, got {described(value)}")
    return tuple(map(float, values))
