"""Recurrent knowledge identification and fusion for continual fine-tuning of language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kif import metrics
from kif.config import KIFConfig, RunConfig

if TYPE_CHECKING:
    from kif.arena import ArenaError, ParameterArena
    from kif.callback import KIFCallback
    from kif.engine import RecurrentKIF
    from kif.optimizer import OptimizerConfig
    from kif.trainer import (
        KIFArguments,
        KIFMixin,
        KIFSeq2SeqTrainer,
        KIFSeq2SeqTrainingArguments,
        KIFTrainer,
        KIFTrainingArguments,
    )

__version__ = "0.1.0"

__all__ = [
    "ArenaError",
    "KIFArguments",
    "KIFCallback",
    "KIFConfig",
    "KIFMixin",
    "KIFSeq2SeqTrainer",
    "KIFSeq2SeqTrainingArguments",
    "KIFTrainer",
    "KIFTrainingArguments",
    "OptimizerConfig",
    "ParameterArena",
    "RecurrentKIF",
    "RunConfig",
    "__version__",
    "metrics",
]

# torch takes a second to import; `kif --help` and the configuration do not need it, and the engine no transformers
_LAZY = {
    "ArenaError": "kif.arena",
    "ParameterArena": "kif.arena",
    "RecurrentKIF": "kif.engine",
    "OptimizerConfig": "kif.optimizer",
    "KIFCallback": "kif.callback",
    "KIFArguments": "kif.trainer",
    "KIFMixin": "kif.trainer",
    "KIFSeq2SeqTrainer": "kif.trainer",
    "KIFSeq2SeqTrainingArguments": "kif.trainer",
    "KIFTrainer": "kif.trainer",
    "KIFTrainingArguments": "kif.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kif' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
