"""Global norm of a gradient, and from it the clipping factor, the non-finite flag and the step counts. 4 B/element.

Two launches: partial sums over fixed chunks, so that the result does not depend on the GPU, and their sum in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .common import quotient
from .launch import BLOCK, contiguous, launch

BLOCKS_PER_PROGRAM = 16


@triton.jit
def square_sum_kernel(grad_ptr, partial_ptr, n, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK)
    for block in range(BLOCKS):
        at = start + block * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        total += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["partials"])
def gradient_state_kernel(
    partial_ptr,
    scale_ptr,
    skip_ptr,
    step_ptr,
    skipped_ptr,
    inv_scale_ptr,
    norm_ptr,
    max_norm,
    partials,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # all warps read what one writes below: before the barriers of the sum, not beside that
    step = tl.load(step_ptr)
    skipped = tl.load(skipped_ptr)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for block in range(0, tl.cdiv(partials, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + at, mask=at < partials, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total, 0)).to(tl.float32)
    if inv_scale_ptr is not None:
        norm *= tl.load(inv_scale_ptr)
    if norm_ptr is not None:
        tl.store(norm_ptr, norm)
    # false for nan too
    finite = tl.abs(norm) < float("inf")
    if CLIP:
        tl.store(scale_ptr, tl.where(finite, tl.minimum(quotient(max_norm, norm + 1e-6), 1.0), 1.0))
    else:
        tl.store(scale_ptr, 1.0)
    taken = tl.where(finite, 1, 0)
    tl.store(skip_ptr, (1 - taken).to(tl.int8))
    tl.store(step_ptr, step + taken.to(tl.float64))
    tl.store(skipped_ptr, skipped + (1 - taken).to(tl.int64))


def gradient_state_(
    grad: Tensor,
    scale: Tensor,
    skip: Tensor,
    step: Tensor,
    skipped: Tensor,
    max_norm: float,
    inv_scale: Tensor | None,
    norm: Tensor | None,
) -> None:
    """Two launches; arguments as `reference.gradient_state_`. A strided gradient takes the definition."""
    if not contiguous(grad):
        reference.gradient_state_(grad, scale, skip, step, skipped, max_norm, inv_scale, norm)
        return
    n = grad.numel()
    programs = max(1, -(-n // (BLOCKS_PER_PROGRAM * BLOCK)))
    partial = torch.empty(programs, dtype=torch.float32, device=grad.device)
    launch(square_sum_kernel, (programs,), grad.view(-1), partial, n, BLOCKS=BLOCKS_PER_PROGRAM, BLOCK=BLOCK)
    launch(
        gradient_state_kernel,
        (1,),
        partial,
        scale,
        skip.view(torch.int8),
        step,
        skipped,
        inv_scale,
        norm,
        max_norm,
        programs,
        CLIP=max_norm > 0,
        BLOCK=BLOCK,
    )
