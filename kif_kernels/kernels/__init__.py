"""The operations as Triton kernels; functions as in `kif_kernels.reference`."""

from kif_kernels.kernels.adamw import adamw_importance_
from kif_kernels.kernels.fuse import fuse_
from kif_kernels.kernels.gradient import gradient_state_
from kif_kernels.kernels.importance import importance_ema_
from kif_kernels.kernels.threshold import histogram_, thresholds_

__all__ = [
    "adamw_importance_",
    "fuse_",
    "gradient_state_",
    "histogram_",
    "importance_ema_",
    "thresholds_",
]
