"""How good are an encoder's features? k-NN and a linear probe, both scikit-learn's, on frozen features."""

from __future__ import annotations

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
from threadpoolctl import threadpool_limits
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
        train, test = (self._features(encoder, images) for images in (self._train, self._test))
        with threadpool_limits(torch.get_num_threads()):  # as many as training has
            classifier.fit(train, self._train_labels)
            return float(classifier.score(test, self._test_labels))

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
