"""What merges batches under Lightning: the micro-batches of an update, while sequences are short.

Used by [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression] where encoders were compressed with
``batch="merge"``; nothing else imports it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Merging", "merged", "most_together", "times"]


class Merging:
    """Stands in for a LightningModule's ``training_step`` during those batches that are run with others.

    The Trainer goes on counting batches and updates as ever. Batches are held until there are enough, then the step
    runs once on all of them. Its loss counts as often as there are batches, so that of a loss that is a mean over
    samples, gradients are those of the same batches one by one.

    Args:
        trainer: the Trainer, in training.
        pl_module: what it trains.
        tell: takes what users are to know, in a line.
    """

    def __init__(self, trainer: Any, pl_module: Any, tell: Callable[[str], None]) -> None:
        self._trainer, self._pl_module, self._tell = trainer, pl_module, tell
        self._held: list[Any] = []
        self._hidden: dict[str, Any] | None = None  # what the module itself has as its step, while this stands in
        self._told = False
        self.together = 1

    def begin(self, together: int, *, holds: bool) -> None:
        """A batch begins, as many as ``together`` of which are to be run at once; or held, if more are to come."""
        self.end()
        self.together = together
        if together == 1 and not self._held:
            return
        module, step = self._pl_module, self._pl_module.training_step

        @functools.wraps(step)
        def training_step(batch: Any, *rest: Any) -> Any:
            self._held.append(batch)
            if holds:
                return torch.zeros((), device=module.device, requires_grad=True)  # ranks must not return None
            batches, self._held = self._held, []
            return self._run(step, batches, rest)

        self._hidden = {name: vars(module)[name] for name in ("training_step",) if name in vars(module)}
        module.training_step = training_step

    @property
    def is_holding(self) -> bool:
        """Whether batches wait for others."""
        return bool(self._held)

    def end(self) -> None:
        """A batch is done: the module has its own step again, to be copied and saved as ever."""
        if self._hidden is not None:
            del self._pl_module.training_step
            vars(self._pl_module).update(self._hidden)
            self._hidden = None

    def forget(self) -> None:
        """Let go of what is held, as Lightning does of gradients that led to no update."""
        self.end()
        self._held = []

    def _run(self, step: Callable[..., Any], batches: list[Any], rest: tuple[Any, ...]) -> Any:
        """The step on all of them; one by one where they cannot be put together."""
        whole, reason = merged(batches)
        fits = reason is None
        if self._trainer.world_size > 1:  # what ranks do together in a step, they must do as often
            fits = bool(self._trainer.strategy.reduce_boolean_decision(fits, all=True))
        if fits:
            with self._counted(whole):
                output = step(whole, *rest)
            return _with_loss(output, lambda loss: times(loss, len(batches)))
        if reason is not None and not self._told:
            self._told = True
            self._tell(f"some batches were run one by one, which cannot be merged: {reason}")
        outputs = [step(batch, *rest) for batch in batches]
        wrong = [output for output in outputs if output is not None and _loss(output) is None]
        if wrong:
            return wrong[0]  # Lightning says what it takes
        known = [output for output in outputs if output is not None]  # a step may leave a batch out
        if not known:
            return None
        losses = torch.stack([loss for loss in map(_loss, known) if loss is not None])
        return _with_loss(known[-1], lambda last: times(losses.mean(), len(losses)))

    @contextmanager
    def _counted(self, whole: Any) -> Iterator[None]:
        """Have means over an epoch count what the step logs by all of its samples, not by the last batch's."""
        results = getattr(self._trainer, "_results", None)
        if results is None:  # a Lightning that keeps its books elsewhere
            yield
            return
        before, results.batch, results.batch_size = results.batch, whole, None
        try:
            yield
        finally:
            results.batch, results.batch_size = before, None


def most_together(fit: int, accumulated: int) -> int:
    """How many of an update's batches are run at once: a power of two that divides them, at most as many as fit."""
    return min(fit, accumulated & -accumulated)


def merged(batches: Sequence[Any]) -> tuple[Any, str | None]:
    """Batches as one, along the first dimension of their tensors; or why they cannot be.

    Containers of batches are looked into; lists of anything else, such as file names, are joined. Whatever is not one
    for each sample must be the same in all of them: tensors of other lengths, such as indices into the batch or views
    put one after another, would not mean in the whole what they mean in a batch. Nor would a smaller batch, which
    counts as much as others.
    """
    if len(batches) == 1:
        return batches[0], None
    try:
        samples = [_samples(batch) for batch in batches]
        counts = sorted({count for count in samples if count is not None})
        if len(counts) > 1:
            raise ValueError(f"they have {' and '.join(map(str, counts))} samples")
        return _joined(batches, samples), None
    except (TypeError, ValueError, RuntimeError) as error:
        return None, str(error).partition("\n")[0]


def _samples(batch: Any) -> int | None:
    """How many a batch has; None if it holds no tensor."""
    lengths = sorted(set(_lengths(batch)))
    if len(lengths) > 1:
        raise ValueError(f"they have tensors of {' and '.join(map(str, lengths))} rows, so not all of one a sample")
    return lengths[0] if lengths else None


def _lengths(part: Any) -> Iterator[int]:
    """Of all tensors that a batch holds."""
    if isinstance(part, Tensor):
        yield from part.shape[:1]
    elif isinstance(part, (Mapping, list, tuple)):
        for item in part.values() if isinstance(part, Mapping) else part:
            yield from _lengths(item)


def _joined(parts: Sequence[Any], samples: Sequence[int | None]) -> Any:
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise TypeError(f"their parts are {' and '.join(sorted({type(part).__name__ for part in parts}))}")
    if isinstance(first, Tensor) and first.ndim:
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(f"they have tensors of the shapes {' and '.join(str(tuple(p.shape)) for p in parts[:2])}")
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        if any(part.keys() != first.keys() for part in parts):
            raise ValueError("they have different keys")
        joined = {key: _joined([part[key] for part in parts], samples) for key in first}
        return joined if type(first) is dict else type(first)(joined)  # type: ignore[call-arg]
    if isinstance(first, (list, tuple)):
        if not any(isinstance(item, (Tensor, Mapping, list, tuple)) for item in first):
            is_one_each = all(count in (None, len(part)) for part, count in zip(parts, samples, strict=True))
            return type(first)(item for part in parts for item in part) if is_one_each else _alike(parts)
        if len({len(part) for part in parts}) > 1:
            raise ValueError("they have lists of different lengths")
        items = [_joined(alike, samples) for alike in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return _alike(parts)


def _alike(parts: Sequence[Any]) -> Any:
    """What is the same in all of them."""
    try:
        is_same = not any(part != parts[0] for part in parts)
    except (TypeError, ValueError, RuntimeError):  # of what holds tensors or arrays
        is_same = False
    if not is_same:
        raise ValueError(f"each has a {type(parts[0]).__name__} of its own")
    return parts[0]


def _loss(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def _with_loss(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a step returns, with another loss; as it is where it has none, for Lightning to judge."""
    loss = _loss(output)
    if loss is None:
        return output
    return {**output, "loss": change(loss)} if isinstance(output, Mapping) else change(loss)


def times(loss: Tensor, times: int) -> Tensor:
    """The same loss, with so many times its gradient."""
    loss = loss.clone()
    if loss.requires_grad:
        loss.register_hook(lambda gradient: times * gradient)
    return loss
