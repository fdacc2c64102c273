"""What an analysis of gradient error needs of one's own training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["TrainingStep"]


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """A training step at one stage of training: what the command ``python -m seqcompress.gradients`` asks for.

    Write a function that takes a checkpoint's path and returns one, with everything as it was at that checkpoint.

    Args:
        model: see [gradient_error][seqcompress.gradient_error], as for all the others.
        step: returns the scalar loss of a batch, and does not call backward.
        batches: at the batch size of the run, such as its data loader. No more are read than are asked for.
        teacher: shares the patch size but not the dropout.
        after_backward: what completes a training step.
        protect: what ``step`` changes and cannot be found from it.

    Examples:
        >>> import timm, torch
        >>> from seqcompress import TrainingStep
        >>> def at(checkpoint):
        ...     vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
        ...     vit.load_state_dict(torch.load(checkpoint))
        ...     def step(batch):
        ...         return torch.nn.functional.cross_entropy(vit(batch[0]), batch[1])
        ...     batches = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(3)]
        ...     return TrainingStep(vit, step, batches)
    """

    model: nn.Module
    step: Callable[[Any], Tensor]
    batches: Iterable[Any]
    teacher: nn.Module | None = None
    after_backward: Callable[[], object] | None = None
    protect: object = ()
