"""Importance scoring, threshold selection and masked fusion over flat parameter buffers.

Needs torch, and triton for the kernels. `reference` holds the definition of every operation; `backend_name` says which
implementation a device gets. All operations are also there as `torch.ops.kif.*`.
"""

from . import ops  # noqa: F401 (registers torch.ops.kif)
from .api import (
    adamw_importance_,
    fuse_,
    gradient_state_,
    importance_ema_,
    importance_quantile,
    importance_threshold,
    importance_thresholds,
    importance_uncertainty_ema_,
)
from .backend import backend_name
from .checks import mask_size
from .fusion_table import FUSION_TABLES, NO_MASKS, NO_SHARE, PAPER, RELEASED_CODE, FusionTable
from .segments import Segments
from .sharded import sharded_threshold
from .streaming import StreamingThreshold

__all__ = [
    "FUSION_TABLES",
    "NO_MASKS",
    "NO_SHARE",
    "PAPER",
    "RELEASED_CODE",
    "FusionTable",
    "Segments",
    "StreamingThreshold",
    "adamw_importance_",
    "backend_name",
    "fuse_",
    "gradient_state_",
    "importance_ema_",
    "importance_quantile",
    "importance_threshold",
    "importance_thresholds",
    "importance_uncertainty_ema_",
    "mask_size",
    "sharded_threshold",
]
