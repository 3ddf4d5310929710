"""AdamW, importance EMA, snapshots, low-precision copy and histogram in one pass.

20 + 16 B/element in float32 (plain AdamW 16 + 12); + 4 for each snapshot and for zeroing the gradient, + 2 for a
low-precision copy, + 8 for uncertainty; - 4 on the first step of a round.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .common import BINS, bit_bins, blocks_of, flush, lerp, quotient, ranked_score, score, square_root
from .launch import BLOCK, contiguous, flat, launch, lerp_weight, programs_for


# a flag that is 1 must not become a constant, and a kernel of its own
@triton.jit(do_not_specialize=["near_new1", "near_new2", "near_new", "uncertainty_near_new"])
def adamw_kernel(
    weight_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    importance_ptr,
    uncertainty_ptr,
    before_ptr,
    after_ptr,
    shadow_ptr,
    histogram_ptr,
    window_ptr,
    lr_ptr,
    step_ptr,
    grad_scale_ptr,
    inv_scale_ptr,
    skip_ptr,
    rate,
    keep,
    root_bias2,
    lr,
    bias1,
    log2_beta1,
    log2_beta1_rest,
    log2_beta2,
    log2_beta2_rest,
    weight_decay,
    eps,
    c1,
    near_new1,
    c2,
    near_new2,
    c,
    near_new,
    uncertainty_c,
    uncertainty_near_new,
    n,
    RESET: tl.constexpr,
    AFTER_UPDATE: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    skip = False
    if skip_ptr is not None:
        skip = tl.load(skip_ptr) != 0
    # rounded to float32 once; 1 - beta2**step is small, so that float32 powers would lose most of it
    if lr_ptr is not None:
        lr = tl.load(lr_ptr)
        keep = (1.0 - tl.cast(lr, tl.float64) * weight_decay).to(tl.float32)
    if step_ptr is not None:
        step = tl.maximum(tl.load(step_ptr), 1.0)
        # arguments arrive in float32
        bias1 = 1.0 - tl.exp2(step * (tl.cast(log2_beta1, tl.float64) + log2_beta1_rest))
        root_bias2 = tl.sqrt(1.0 - tl.exp2(step * (tl.cast(log2_beta2, tl.float64) + log2_beta2_rest))).to(tl.float32)
    if lr_ptr is not None or step_ptr is not None:
        rate = (tl.cast(lr, tl.float64) / bias1).to(tl.float32)
    if histogram_ptr is not None:
        shift = tl.load(window_ptr).to(tl.int32)
        base = tl.load(window_ptr + 1).to(tl.int32)
        counts = tl.zeros([BINS], dtype=tl.int32)
    for block in range(tl.program_id(0), blocks_of(n, BLOCK), tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < n
        stored = tl.load(weight_ptr + at, mask=mask, other=0.0)
        if before_ptr is not None:
            tl.store(before_ptr + at, stored, mask=mask)
        w = stored.to(tl.float32)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if inv_scale_ptr is not None:
            g *= tl.load(inv_scale_ptr)
        clipped = g
        if grad_scale_ptr is not None:
            clipped = g * tl.load(grad_scale_ptr)
        # before the update where it can be: fewer values are held at once
        if importance_ptr is not None and not AFTER_UPDATE:
            ranked = ranked_score(
                score(w, g), importance_ptr, uncertainty_ptr, at, mask, c, near_new, uncertainty_c,
                uncertainty_near_new, skip, RESET,
            )  # fmt: skip
        m_old = tl.load(exp_avg_ptr + at, mask=mask, other=0.0)
        v_old = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0)
        m = lerp(m_old, clipped, c1, near_new1)
        v = lerp(v_old, clipped * clipped, c2, near_new2)
        # a quotient of a root is never denormal
        new = w * keep - rate * quotient(m, tl.div_rn(square_root(v), root_bias2) + eps)
        new = tl.where(skip, stored, new.to(weight_ptr.dtype.element_ty))
        tl.store(exp_avg_ptr + at, tl.where(skip, m_old, m), mask=mask)
        tl.store(exp_avg_sq_ptr + at, tl.where(skip, v_old, v), mask=mask)
        tl.store(weight_ptr + at, new, mask=mask)
        if after_ptr is not None:
            tl.store(after_ptr + at, new, mask=mask)
        if shadow_ptr is not None:
            tl.store(shadow_ptr + at, new.to(tl.float32).to(shadow_ptr.dtype.element_ty), mask=mask)
        if ZERO_GRAD:
            tl.store(grad_ptr + at, tl.zeros_like(g).to(grad_ptr.dtype.element_ty), mask=mask)
        if importance_ptr is not None and AFTER_UPDATE:
            ranked = ranked_score(
                score(new.to(tl.float32), clipped), importance_ptr, uncertainty_ptr, at, mask, c, near_new,
                uncertainty_c, uncertainty_near_new, skip, RESET,
            )  # fmt: skip
        if histogram_ptr is not None:
            counts += tl.histogram(bit_bins(ranked, shift, base), BINS, mask=mask)
    if histogram_ptr is not None:
        flush(histogram_ptr, counts)


def adamw_importance_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    importance: Tensor | None,
    uncertainty: Tensor | None,
    snapshot_before: Tensor | None,
    snapshot_after: Tensor | None,
    shadow: Tensor | None,
    histogram: Tensor | None,
    window: Tensor | None,
    lr: float,
    lr_tensor: Tensor | None,
    step: float,
    step_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay: float,
    uncertainty_decay: float,
    reset: bool,
    after_update: bool,
    zero_grad: bool,
    grad_scale: Tensor | None,
    inv_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    """One pass over all elements; arguments as `reference.adamw_importance_`. Strided tensors take the definition."""
    streams = (weight, grad, exp_avg, exp_avg_sq, importance, uncertainty, snapshot_before, snapshot_after, shadow)
    if not contiguous(*streams):
        reference.adamw_importance_(
            *streams, histogram, window, lr, lr_tensor, step, step_tensor, beta1, beta2, eps, weight_decay, decay,
            uncertainty_decay, reset, after_update, zero_grad, grad_scale, inv_scale, skip,
        )  # fmt: skip
        return
    if step_tensor is None:
        bias1, root_bias2 = 1.0 - beta1**step, math.sqrt(1.0 - beta2**step)
    else:
        bias1 = root_bias2 = 1.0
    n = weight.numel()
    # the histogram is added to memory, and powers of the betas are taken, once a program
    few = histogram is not None or step_tensor is not None
    launch(
        adamw_kernel,
        (programs_for(n, weight.device, few=few),),
        *map(flat, streams),
        histogram,
        window,
        lr_tensor,
        step_tensor,
        grad_scale,
        inv_scale,
        skip,
        lr / bias1,
        1.0 - lr * weight_decay,
        root_bias2,
        lr,
        bias1,
        *_log2(beta1),
        *_log2(beta2),
        weight_decay,
        eps,
        *lerp_weight(1.0 - beta1),
        *lerp_weight(1.0 - beta2),
        *lerp_weight(1.0 - decay),
        *lerp_weight(1.0 - uncertainty_decay),
        n,
        RESET=reset,
        AFTER_UPDATE=after_update,
        ZERO_GRAD=zero_grad,
        BLOCK=BLOCK,
    )


@cache
def _log2(beta: float) -> tuple[float, float]:
    """log2 as a sum of two float32, with a stand-in for 0 whose power vanishes."""
    exact = math.log2(beta) if beta > 0.0 else -1e30
    rounded = ctypes.c_float(exact).value
    return rounded, exact - rounded
