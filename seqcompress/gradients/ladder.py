"""The strategies among which an online schedule moves, by cost, and what each of them costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from seqcompress.encoders import Forward
from seqcompress.gradients.measured_encoder import MeasuredEncoder
from seqcompress.presets import double_patch
from seqcompress.strategy import Strategy
from seqcompress.training.cost import Flops, sequence_length

__all__ = ["by_cost", "compared", "default_ladder", "forwards_under"]

_RUNG = 0.75  # what a rung of the default ladder costs at most, relative to the next dearer one


def _neighbours(ladder: Sequence[Strategy], strategy: Strategy) -> list[Strategy]:
    position = ladder.index(strategy)
    return [ladder[place] for place in (position - 1, position + 1) if 0 <= place < len(ladder)]


def compared(ladder: Sequence[Strategy], strategy: Strategy) -> list[Strategy]:
    """What is measured while a strategy is in force: each once."""
    return list(dict.fromkeys((Strategy(), strategy, *_neighbours(ladder, strategy))))


def default_ladder(encoders: Sequence[MeasuredEncoder], flops: Flops) -> list[Strategy]:
    """Rungs that lie far enough apart for a difference to show; at equal cost, the larger patches."""
    student = next(measured for measured in encoders if measured.is_student)
    own = max(student.encoder.patch_size)
    large = double_patch(own, min(student.encoder.image_size))
    rungs = [Strategy()]
    grid = [Strategy(dropout, size) for size in (None, large) for dropout in (0.75, 0.5, 0.0)]
    suiting = [strategy for strategy in grid if all(_suits(measured, strategy) for measured in encoders)]
    for strategy in reversed(by_cost(suiting, encoders, flops)):
        if _cost(strategy, encoders, flops) <= _RUNG * _cost(rungs[-1], encoders, flops):
            rungs.append(strategy)
    return rungs


def _suits(measured: MeasuredEncoder, strategy: Strategy) -> bool:
    try:
        measured.check_strategies([strategy])
    except ValueError:
        return False
    return True


def by_cost(strategies: Iterable[Strategy], encoders: Sequence[MeasuredEncoder], flops: Flops) -> list[Strategy]:
    """From the cheapest to the dearest."""
    return sorted(strategies, key=lambda strategy: _cost(strategy, encoders, flops))


def _cost(strategy: Strategy, encoders: Sequence[MeasuredEncoder], flops: Flops) -> int:
    """FLOPs of one view of the encoders' own size, forward and backward through students, forward through teachers."""
    views = [(1, 1, *measured.encoder.image_size) for measured in encoders]
    one_each = [
        Counter([Forward(view, 0, measured.is_student)]) for view, measured in zip(views, encoders, strict=True)
    ]
    return flops(forwards_under(strategy, encoders, one_each))


def forwards_under(
    strategy: Strategy, encoders: Sequence[MeasuredEncoder], tallies: Sequence[Counter[Forward]]
) -> list[Counter[Forward]]:
    """The same forwards, with the tokens that they have under a strategy."""
    changed = []
    for measured, tally in zip(encoders, tallies, strict=True):
        mine = strategy if measured.is_student else strategy.without_dropout()
        counted: Counter[Forward] = Counter()
        for forward, calls in tally.items():
            here = mine if forward.graph or measured.when == "train" else Strategy()
            here = here.without_dropout() if forward.masked else here
            full = measured.embed.compression.full_size((forward.view[2], forward.view[3]))
            tokens = sequence_length(measured.encoder, here, full)
            counted[forward._replace(tokens=tokens)] += calls
        changed.append(counted)
    return changed
