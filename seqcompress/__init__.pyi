"""Every public name, once: type checkers read this file, and ``__init__.py`` imports on first use what it says."""

from seqcompress import schedules as schedules
from seqcompress.compression import compress as compress
from seqcompress.compression import get_strategy as get_strategy
from seqcompress.compression import is_compressed as is_compressed
from seqcompress.compression import restore as restore
from seqcompress.compression import set_strategy as set_strategy
from seqcompress.gradients import GradientErrorReport as GradientErrorReport
from seqcompress.gradients import TrainingStep as TrainingStep
from seqcompress.gradients import best_schedule as best_schedule
from seqcompress.gradients import explain_schedule as explain_schedule
from seqcompress.gradients import gradient_error as gradient_error
from seqcompress.gradients import plot_gradient_error as plot_gradient_error
from seqcompress.gradients.online import OnlineScheduler as OnlineScheduler
from seqcompress.pairs import accelerate as accelerate
from seqcompress.schedules import Constant as Constant
from seqcompress.schedules import Cosine as Cosine
from seqcompress.schedules import Linear as Linear
from seqcompress.schedules import Schedule as Schedule
from seqcompress.schedules import Stepwise as Stepwise
from seqcompress.strategy import Strategy as Strategy
from seqcompress.training.budget import Budget as Budget
from seqcompress.training.cost import grid_size as grid_size
from seqcompress.training.cost import num_tokens as num_tokens
from seqcompress.training.cost import relative_cost as relative_cost
from seqcompress.training.forecast import plot_schedule as plot_schedule
from seqcompress.training.learning_rate import PolynomialDecayLR as PolynomialDecayLR
from seqcompress.training.rehearsal import Rehearsal as Rehearsal
from seqcompress.training.rehearsal import rehearse as rehearse
from seqcompress.training.sequence_scheduler import SequenceScheduler as SequenceScheduler
from seqcompress.views import scale_views as scale_views

__version__: str
