"""Cheaper self-supervised pretraining of Vision Transformers.

Wrap a backbone in one line and train it on shortened sequences:
``seqcompress.compress(backbone, seqcompress.Strategy(token_dropout=0.5, patch_size=32))``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from seqcompress import schedules
    from seqcompress.compression import compress, get_strategy, is_compressed, restore, set_strategy
    from seqcompress.gradients import (
        GradientErrorReport,
        TrainingStep,
        best_schedule,
        explain_schedule,
        gradient_error,
        plot_gradient_error,
    )
    from seqcompress.gradients.online import OnlineScheduler
    from seqcompress.pairs import accelerate
    from seqcompress.schedules import Constant, Cosine, Linear, Schedule, Stepwise
    from seqcompress.strategy import Strategy
    from seqcompress.training.budget import Budget
    from seqcompress.training.cost import num_tokens, relative_cost
    from seqcompress.training.forecast import plot_schedule
    from seqcompress.training.learning_rate import PolynomialDecayLR
    from seqcompress.training.rehearsal import Rehearsal, rehearse
    from seqcompress.training.sequence_scheduler import SequenceScheduler
    from seqcompress.views import scale_views

__all__ = [
    "Budget",
    "Constant",
    "Cosine",
    "GradientErrorReport",
    "Linear",
    "OnlineScheduler",
    "PolynomialDecayLR",
    "Rehearsal",
    "Schedule",
    "SequenceScheduler",
    "Stepwise",
    "Strategy",
    "TrainingStep",
    "accelerate",
    "best_schedule",
    "compress",
    "explain_schedule",
    "get_strategy",
    "gradient_error",
    "is_compressed",
    "num_tokens",
    "plot_gradient_error",
    "plot_schedule",
    "rehearse",
    "relative_cost",
    "restore",
    "scale_views",
    "schedules",
    "set_strategy",
]

# Imported on first use: Lightning imports this package at the start of every Trainer (the entry points of its
# callbacks), and must not pay for timm where nothing is compressed.
_MODULES = {
    "Budget": "training.budget",
    "Constant": "schedules",
    "Cosine": "schedules",
    "GradientErrorReport": "gradients",
    "Linear": "schedules",
    "OnlineScheduler": "gradients.online",
    "PolynomialDecayLR": "training.learning_rate",
    "Rehearsal": "training.rehearsal",
    "Schedule": "schedules",
    "SequenceScheduler": "training.sequence_scheduler",
    "Stepwise": "schedules",
    "Strategy": "strategy",
    "TrainingStep": "gradients",
    "accelerate": "pairs",
    "best_schedule": "gradients",
    "compress": "compression",
    "explain_schedule": "gradients",
    "get_strategy": "compression",
    "gradient_error": "gradients",
    "is_compressed": "compression",
    "num_tokens": "training.cost",
    "plot_gradient_error": "gradients",
    "plot_schedule": "training.forecast",
    "rehearse": "training.rehearsal",
    "relative_cost": "training.cost",
    "restore": "compression",
    "scale_views": "views",
    "set_strategy": "compression",
}


def __getattr__(name: str) -> Any:
    if name == "schedules":
        return importlib.import_module("seqcompress.schedules")
    if name in _MODULES:
        return getattr(importlib.import_module(f"seqcompress.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
