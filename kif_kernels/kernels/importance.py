"""Importance EMA of |w * g|, with the uncertainty of the released code and the histogram of the result as options.

12 + 4 B/element in float32; 8 + 4 on the first step of a round; 16 + 8 with uncertainty.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .common import BINS, bit_bins, blocks_of, flush, ranked_score, score
from .launch import BLOCK, contiguous, flat, launch, lerp_weight, programs_for


# a flag that is 1 must not become a constant, and a kernel of its own
@triton.jit(do_not_specialize=["near_new", "uncertainty_near_new"])
def importance_kernel(
    weight_ptr,
    grad_ptr,
    importance_ptr,
    uncertainty_ptr,
    histogram_ptr,
    window_ptr,
    skip_ptr,
    c,
    near_new,
    uncertainty_c,
    uncertainty_near_new,
    n,
    RESET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    skip = False
    if skip_ptr is not None:
        skip = tl.load(skip_ptr) != 0
    if histogram_ptr is not None:
        shift = tl.load(window_ptr).to(tl.int32)
        base = tl.load(window_ptr + 1).to(tl.int32)
        counts = tl.zeros([BINS], dtype=tl.int32)
    for block in range(tl.program_id(0), blocks_of(n, BLOCK), tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < n
        w = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        s = score(w, g)
        ranked = ranked_score(
            s, importance_ptr, uncertainty_ptr, at, mask, c, near_new, uncertainty_c, uncertainty_near_new, skip, RESET
        )
        if histogram_ptr is not None:
            counts += tl.histogram(bit_bins(ranked, shift, base), BINS, mask=mask)
    if histogram_ptr is not None:
        flush(histogram_ptr, counts)


def importance_ema_(
    importance: Tensor,
    weight: Tensor,
    grad: Tensor,
    decay: float,
    reset: bool,
    uncertainty: Tensor | None,
    uncertainty_decay: float,
    skip: Tensor | None,
    histogram: Tensor | None,
    window: Tensor | None,
) -> None:
    """One pass over all elements; arguments as `reference.importance_ema_`. Strided tensors take the definition."""
    if not contiguous(importance, weight, grad, uncertainty):
        reference.importance_ema_(
            importance, weight, grad, decay, reset, uncertainty, uncertainty_decay, skip, histogram, window
        )
        return
    n, few = importance.numel(), histogram is not None
    launch(
        importance_kernel,
        (programs_for(n, importance.device, few=few),),
        flat(weight),
        flat(grad),
        flat(importance),
        flat(uncertainty),
        histogram,
        window,
        skip,
        *lerp_weight(1.0 - decay),
        *lerp_weight(1.0 - uncertainty_decay),
        n,
        RESET=reset,
        BLOCK=BLOCK,
    )
