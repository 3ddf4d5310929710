"""Recurrent knowledge identification and fusion for continual fine-tuning of language models."""

from kif import metrics
from kif.arena import ArenaError, ParameterArena
from kif.config import KIFConfig, RunConfig
from kif.engine import RecurrentKIF
from kif.optimizer import OptimizerConfig

__version__ = "0.1.0"

__all__ = [
    "ArenaError",
    "KIFConfig",
    "OptimizerConfig",
    "ParameterArena",
    "RecurrentKIF",
    "RunConfig",
    "__version__",
    "metrics",
]
