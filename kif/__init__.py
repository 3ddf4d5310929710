"""Recurrent knowledge identification and fusion for continual fine-tuning of language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kif import metrics
from kif.config import KIFConfig, RunConfig

if TYPE_CHECKING:
    from kif.arena import ArenaError, ParameterArena
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

# torch takes a second to import; `kif --help` and the configuration do not need it
_LAZY = {
    "ArenaError": "kif.arena",
    "ParameterArena": "kif.arena",
    "RecurrentKIF": "kif.engine",
    "OptimizerConfig": "kif.optimizer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kif' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
