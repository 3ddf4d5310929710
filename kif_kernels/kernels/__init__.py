"""The operations as Triton kernels; functions as in `kif_kernels.reference`."""

from .adamw import adamw_importance_
from .fuse import fuse_
from .gradient import gradient_state_
from .importance import importance_ema_
from .threshold import histogram_, thresholds_

__all__ = [
    "adamw_importance_",
    "fuse_",
    "gradient_state_",
    "histogram_",
    "importance_ema_",
    "thresholds_",
]
