"""Gradient error: how far the gradient under a strategy is from the uncompressed one, and the schedule that follows."""

from seqcompress.gradients.measurement import gradient_error
from seqcompress.gradients.report import GradientErrorReport, StrategyError
from seqcompress.gradients.schedule_search import best_schedule, explain_schedule, plot_gradient_error
from seqcompress.gradients.training_step import TrainingStep

__all__ = [
    "GradientErrorReport",
    "StrategyError",
    "TrainingStep",
    "best_schedule",
    "explain_schedule",
    "gradient_error",
    "plot_gradient_error",
]
