"""Importance scoring, threshold selection and masked fusion over flat parameter buffers.

Needs torch alone. `reference` holds the definition of every operation; `backend_name` says which implementation
a device gets.
"""

from kif_kernels.backend import backend_name
from kif_kernels.reference import (
    FUSION_TABLES,
    NO_MASKS,
    NO_SHARE,
    PAPER,
    RELEASED_CODE,
    FusionTable,
    adamw_importance_,
    fuse_,
    importance_ema_,
    importance_quantile,
    importance_threshold,
    importance_uncertainty_ema_,
    mask_size,
)

__all__ = [
    "FUSION_TABLES",
    "NO_MASKS",
    "NO_SHARE",
    "PAPER",
    "RELEASED_CODE",
    "FusionTable",
    "adamw_importance_",
    "backend_name",
    "fuse_",
    "importance_ema_",
    "importance_quantile",
    "importance_threshold",
    "importance_uncertainty_ema_",
    "mask_size",
]
