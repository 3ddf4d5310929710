from kif_kernels.reference import (  # noqa: F401
    adamw_importance_,
    fuse_,
    gradient_state_,
    histogram_,
    importance_ema_,
    thresholds_,
)
