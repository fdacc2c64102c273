"""How good are an encoder's features? k-NN and a linear probe, both scikit-learn's, on frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from data import ImageData
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

Features = NDArray[np.float32]  # (N, D)

_MOST_IMAGES = 5_000  # for training and for testing; more would take longer than the pretraining


class Evaluator:
    """Accuracies of an encoder on the test images, in [0, 1]."""

    def __init__(self, data: ImageData, device: torch.device) -> None:
        self._train = data.tensors(data.train_images[:_MOST_IMAGES])
        self._test = data.tensors(data.test_images[:_MOST_IMAGES])
        self._train_labels = data.train_labels[:_MOST_IMAGES]
        self._test_labels = data.test_labels[:_MOST_IMAGES]
        self._device = device

    def knn(self, encoder: nn.Module, neighbors: int = 20) -> float:
        """Accuracy of the label that most of an image's neighbours have, nearest by cosine of standardized features."""
        classifier = KNeighborsClassifier(min(neighbors, len(self._train)), metric="cosine", weights="distance")
        return self._accuracy(make_pipeline(StandardScaler(), classifier), encoder)

    def linear_probe(self, encoder: nn.Module) -> float:
        """Accuracy of logistic regression on standardized features."""
        return self._accuracy(make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)), encoder)

    def _accuracy(self, classifier: Any, encoder: nn.Module) -> float:
        classifier.fit(self._features(encoder, self._train), self._train_labels)
        return float(classifier.score(self._features(encoder, self._test), self._test_labels))

    @torch.no_grad()
    def _features(self, encoder: nn.Module, images: Tensor) -> Features:
        training = encoder.training
        encoder.eval()  # full sequences: eval mode is never compressed
        features = [encoder(batch.to(self._device)).cpu() for batch in images.split(256)]
        encoder.train(training)
        return torch.cat(features).numpy()


@dataclass(frozen=True)
class Point:
    """One evaluation along the way."""

    epoch: int
    units: float
    """Budget spent so far: forward passes of the uncompressed encoder on one view."""
    seconds: float
    """Time spent training so far, evaluation excluded."""
    knn: float


@dataclass(frozen=True)
class Speedup:
    """How many times less one run spent than another when both had the same accuracy."""

    accuracy: float
    budget: float
    wall_clock: float


def speedup_at_equal_accuracy(plain: Sequence[Point], accelerated: Sequence[Point]) -> Speedup | None:
    """Compare where the two runs first reach the highest accuracy that both reach.

    Between evaluations, accuracy is taken to move in a straight line. ``None`` if no accuracy that both reach
    takes training.
    """
    accuracy = min(max(point.knn for point in run) for run in (plain, accelerated))
    spent = [(_first(run, "units", accuracy), _first(run, "seconds", accuracy)) for run in (plain, accelerated)]
    if min(spent[0] + spent[1]) <= 0:
        return None
    return Speedup(accuracy, budget=spent[0][0] / spent[1][0], wall_clock=spent[0][1] / spent[1][1])


def _first(run: Sequence[Point], spent: str, accuracy: float) -> float:
    """What ``run`` had spent when it first reached ``accuracy``; it must reach it."""
    index = next(index for index, point in enumerate(run) if point.knn >= accuracy)
    after: float = getattr(run[index], spent)
    if index == 0:
        return after
    before: float = getattr(run[index - 1], spent)
    share = (accuracy - run[index - 1].knn) / (run[index].knn - run[index - 1].knn)
    return before + share * (after - before)
