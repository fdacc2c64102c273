"""MoCo-v3, SimCLR and DINO at the sizes of their papers, from Lightly's heads and losses, in parts that can be timed.

They are put together as in Lightly's own examples. An encoder is what the caller passes: a plain ViT, a compressed one,
or one that is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead, MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from measure import Stopwatch
from models import IMAGE_SIZE
from torch import Tensor, nn

LOCAL_SIZE = 96
PARTS = ("student", "teacher", "heads", "loss", "optimizer", "momentum update")


class Views(NamedTuple):
    """What each encoder sees of one batch: one tensor (B, 3, H, W) for each of its forwards."""

    student: list[Tensor]
    teacher: list[Tensor]


class Recipe(nn.Module):
    """What a method has besides its encoders: views, heads and loss."""

    heads: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.heads_momentum: nn.Module | None = None

    def views(self, batch_size: int, device: torch.device) -> Views:
        """Noise of the shape of one batch's views."""
        raise NotImplementedError

    def project(self, features: list[Tensor]) -> list[Tensor]:
        """What the student's heads make of its features (B, D), forward by forward."""
        return [self.heads(forward) for forward in features]

    def targets(self, features: list[Tensor]) -> list[Tensor]:
        """What the teacher's head makes of the teacher's features."""
        return [] if self.heads_momentum is None else [self.heads_momentum(forward) for forward in features]

    def loss(self, projections: list[Tensor], targets: list[Tensor]) -> Tensor:
        """The loss of a batch."""
        raise NotImplementedError


class MoCoV3(Recipe):
    """Queries of each view against keys of the other; heads of 4096, temperature 0.2 (arXiv 2104.02057)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads, self.heads_momentum = (
            MoCoProjectionHead(dim, 4096, 256, num_layers=3, batch_norm=True) for _ in range(2)
        )
        self.prediction_head = MoCoProjectionHead(256, 4096, 256, num_layers=2, batch_norm=True)
        self.criterion = NTXentLoss(temperature=0.2)
        _follow(self.heads_momentum, self.heads)

    def views(self, batch_size: int, device: torch.device) -> Views:
        both = [_noise(batch_size, IMAGE_SIZE, device) for _ in range(2)]
        return Views(both, both)

    def project(self, features: list[Tensor]) -> list[Tensor]:
        return [self.prediction_head(self.heads(view)) for view in features]

    def loss(self, projections: list[Tensor], targets: list[Tensor]) -> Tensor:
        (first, second), (first_key, second_key) = projections, targets
        return 0.5 * (self.criterion(first, second_key) + self.criterion(second, first_key))


class SimCLR(Recipe):
    """Two views of an image must find each other in the batch; head of 2048, temperature 0.1 (arXiv 2002.05709)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = SimCLRProjectionHead(dim, 2048, 128)
        self.criterion = NTXentLoss(temperature=0.1)

    def views(self, batch_size: int, device: torch.device) -> Views:
        return Views([_noise(2 * batch_size, IMAGE_SIZE, device)], [])

    def loss(self, projections: list[Tensor], targets: list[Tensor]) -> Tensor:
        (both,) = projections
        return self.criterion(*both.chunk(2))


class DINO(Recipe):
    """Two global views of 224 px and six local ones of 96 px; head of 2048 and 256 (arXiv 2104.14294).

    As after the first epoch, during which the last layer gets no gradient.
    """

    local_views = 6

    def __init__(self, dim: int, output_dim: int) -> None:
        super().__init__()
        # The weight norm in this head cannot be copied, so the teacher's is a new one with the same weights.
        self.heads, self.heads_momentum = (
            DINOProjectionHead(dim, 2048, 256, output_dim, norm_last_layer=False) for _ in range(2)
        )
        self.criterion = DINOLoss(output_dim)
        _follow(self.heads_momentum, self.heads)

    def views(self, batch_size: int, device: torch.device) -> Views:
        large = _noise(2 * batch_size, IMAGE_SIZE, device)
        return Views([large, _noise(self.local_views * batch_size, LOCAL_SIZE, device)], [large])

    def loss(self, projections: list[Tensor], targets: list[Tensor]) -> Tensor:
        (large, small), (teacher,) = projections, targets
        return self.criterion(list(teacher.chunk(2)), [*large.chunk(2), *small.chunk(self.local_views)])


@dataclass
class Training:
    """A training step of a recipe, whole or in parts.

    Views are ready on the device; gradients are None between steps.

    Attributes:
        recipe: heads and loss.
        student: the encoder that is trained.
        teacher: its momentum encoder, or None.
        optimizer: of the student's and the recipe's parameters.
        views: a batch.
        amp: whether forwards and loss run under bfloat16 autocast.
    """

    recipe: Recipe
    student: nn.Module
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    views: Views
    amp: bool = False

    def step(self) -> None:
        """One whole step."""
        self.backward()
        self.optimize()
        self.update_teacher()

    def backward(self) -> None:
        """Forward and backward, as a training loop has them."""
        with self._autocast():
            targets: list[Tensor] = []
            if self.teacher is not None:
                with torch.no_grad():
                    targets = self.recipe.targets(_forward(self.teacher, self.views.teacher))
            projections = self.recipe.project(_forward(self.student, self.views.student))
            loss = self.recipe.loss(projections, targets)
        loss.backward()

    def optimize(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update_teacher(self) -> None:
        """Move the teacher and its head, if there are any, towards the student and its."""
        if self.teacher is None or self.recipe.heads_momentum is None:
            return
        update_momentum(self.student, self.teacher, m=0.99)
        update_momentum(self.recipe.heads, self.recipe.heads_momentum, m=0.99)

    def step_in_parts(self, stopwatch: Stopwatch) -> None:
        """The same step, and the same gradients, part by part."""
        self.backward_in_parts(stopwatch)
        with stopwatch.part("optimizer"):
            self.optimize()
        if self.teacher is not None:
            with stopwatch.part("momentum update"):
                self.update_teacher()

    def backward_in_parts(self, stopwatch: Stopwatch) -> None:
        """The same as ``backward``, cut between encoders and heads and between heads and loss."""
        targets: list[Tensor] = []
        if self.teacher is not None:
            with stopwatch.part("teacher"), torch.no_grad(), self._autocast():
                keys = _forward(self.teacher, self.views.teacher)
            with stopwatch.part("heads"), torch.no_grad(), self._autocast():
                targets = self.recipe.targets(keys)
        with stopwatch.part("student"), self._autocast():
            features = _forward(self.student, self.views.student)
        with stopwatch.part("heads"), self._autocast():
            features_cut = _cut(features)
            projections = self.recipe.project(features_cut)
        with stopwatch.part("loss"):
            projections_cut = _cut(projections)
            with self._autocast():
                loss = self.recipe.loss(projections_cut, targets)
            loss.backward()
        with stopwatch.part("heads"):
            torch.autograd.backward(projections, [cut.grad for cut in projections_cut])
        with stopwatch.part("student"):
            torch.autograd.backward(features, [cut.grad for cut in features_cut])

    def encoders_in_parts(self, stopwatch: Stopwatch) -> None:
        """Only what the encoders do: the teacher's forwards, the student's forwards and backwards."""
        if self.teacher is not None:
            with stopwatch.part("teacher"), torch.no_grad(), self._autocast():
                _forward(self.teacher, self.views.teacher)
        with stopwatch.part("student"):
            with self._autocast():
                features = _forward(self.student, self.views.student)
            torch.autograd.backward(features, [torch.ones_like(forward) for forward in features])
        self.student.zero_grad()

    def _autocast(self) -> AbstractContextManager[None]:
        device = self.views.student[0].device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.amp)


def _forward(encoder: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    return [encoder(view) for view in views]


def _cut(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _follow(teacher: nn.Module, student: nn.Module) -> None:
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)


def _noise(batch_size: int, size: int, device: torch.device) -> Tensor:
    return torch.randn(batch_size, 3, size, size, device=device)
