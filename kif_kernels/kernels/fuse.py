"""Fusion of both task vectors through two importance masks. 20 + 8 B/element; + 2 for a low-precision copy, - 4 where
theta_start is not written, + 8 with uncertainty."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..segments import SEGMENT_CHUNK
from .common import blocks_of
from .launch import BLOCK, contiguous, flat, launch, programs_for


@triton.jit
def ones_by_four(mask, BLOCK: tl.constexpr):
    """Set elements among each four neighbours, which a thread holds: a quarter of the registers of a counter each."""
    return tl.sum(tl.reshape(mask.to(tl.int32), [BLOCK // 4, 4]), 1)


@triton.jit
def fuse_block(
    theta_ptr,
    start_ptr,
    inner_ptr,
    importance_in_ptr,
    importance_out_ptr,
    uncertainty_in_ptr,
    uncertainty_out_ptr,
    shadow_ptr,
    at,
    inside,
    mask,
    threshold_in,
    threshold_out,
    both_in,
    both_out,
    inner_only_in,
    inner_only_out,
    outer_only_in,
    outer_only_out,
    neither_in,
    neither_out,
    STRICT: tl.constexpr,
    WRITE_START: tl.constexpr,
):
    start = tl.load(start_ptr + at, mask=mask, other=0.0)
    inner = tl.load(inner_ptr + at, mask=mask, other=0.0)
    outer = tl.load(theta_ptr + at, mask=mask, other=0.0)
    score_in = tl.load(importance_in_ptr + at, mask=mask, other=0.0).to(tl.float32)
    score_out = tl.load(importance_out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if uncertainty_in_ptr is not None:
        score_in *= tl.load(uncertainty_in_ptr + at, mask=mask, other=0.0).to(tl.float32)
        score_out *= tl.load(uncertainty_out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if STRICT:
        m_in = score_in > threshold_in
        m_out = score_out > threshold_out
    else:
        m_in = score_in >= threshold_in
        m_out = score_out >= threshold_out
    w_in = tl.where(m_in, tl.where(m_out, both_in, inner_only_in), tl.where(m_out, outer_only_in, neither_in))
    w_out = tl.where(m_in, tl.where(m_out, both_out, inner_only_out), tl.where(m_out, outer_only_out, neither_out))
    # a task vector of weight 0 has no effect, whatever it holds
    fused = start + tl.where(w_in == 0.0, 0.0, w_in * (inner - start))
    fused += tl.where(w_out == 0.0, 0.0, w_out * (outer - inner))
    # between segments, what was there is written back: whole vectors are stored
    tl.store(theta_ptr + at, tl.where(inside, fused, outer), mask=mask)
    if WRITE_START:
        tl.store(start_ptr + at, tl.where(inside, fused, start), mask=mask)
    if shadow_ptr is not None:
        tl.store(shadow_ptr + at, fused.to(shadow_ptr.dtype.element_ty), mask=inside)
    return m_in & inside, m_out & inside


@triton.jit(do_not_specialize=["padding"])
def fuse_kernel(
    theta_ptr,
    start_ptr,
    inner_ptr,
    importance_in_ptr,
    importance_out_ptr,
    uncertainty_in_ptr,
    uncertainty_out_ptr,
    threshold_in_ptr,
    threshold_out_ptr,
    shadow_ptr,
    kept_ptr,
    chunks_ptr,
    both_in,
    both_out,
    inner_only_in,
    inner_only_out,
    outer_only_in,
    outer_only_out,
    neither_in,
    neither_out,
    padding,
    n,
    STRICT: tl.constexpr,
    WRITE_START: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: programs over all elements, or one for each chunk of a segment."""
    kept_in = tl.zeros([BLOCK // 4], dtype=tl.int32)
    kept_out = tl.zeros([BLOCK // 4], dtype=tl.int32)
    kept_both = tl.zeros([BLOCK // 4], dtype=tl.int32)
    if chunks_ptr is not None:
        chunk_ptr = chunks_ptr + tl.program_id(0) * 3
        group = tl.load(chunk_ptr)
        begin = tl.multiple_of(tl.load(chunk_ptr + 1), 16)
        size = tl.load(chunk_ptr + 2)
        readable = tl.minimum(tl.cdiv(size, 16) * 16, n - begin)
        threshold_in = tl.load(threshold_in_ptr + group)
        threshold_out = tl.load(threshold_out_ptr + group)
        for block in range(BLOCKS):
            inner = block * BLOCK + tl.arange(0, BLOCK)
            m_in, m_out = fuse_block(
                theta_ptr, start_ptr, inner_ptr, importance_in_ptr, importance_out_ptr, uncertainty_in_ptr,
                uncertainty_out_ptr, shadow_ptr, begin + inner, inner < size, inner < readable, threshold_in,
                threshold_out, both_in, both_out, inner_only_in, inner_only_out, outer_only_in, outer_only_out,
                neither_in, neither_out, STRICT, WRITE_START,
            )  # fmt: skip
            kept_in += ones_by_four(m_in, BLOCK)
            kept_out += ones_by_four(m_out, BLOCK)
            kept_both += ones_by_four(m_in & m_out, BLOCK)
    else:
        threshold_in = tl.load(threshold_in_ptr)
        threshold_out = tl.load(threshold_out_ptr)
        for block in range(tl.program_id(0), blocks_of(n, BLOCK), tl.num_programs(0)):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            m_in, m_out = fuse_block(
                theta_ptr, start_ptr, inner_ptr, importance_in_ptr, importance_out_ptr, uncertainty_in_ptr,
                uncertainty_out_ptr, shadow_ptr, at, at < n, at < n, threshold_in, threshold_out, both_in, both_out,
                inner_only_in, inner_only_out, outer_only_in, outer_only_out, neither_in, neither_out, STRICT,
                WRITE_START,
            )  # fmt: skip
            kept_in += ones_by_four(m_in, BLOCK)
            kept_out += ones_by_four(m_out, BLOCK)
            kept_both += ones_by_four(m_in & m_out, BLOCK)
    if kept_ptr is not None:
        all_in = tl.sum(kept_in.to(tl.int64), 0)
        all_out = tl.sum(kept_out.to(tl.int64), 0)
        all_both = tl.sum(kept_both.to(tl.int64), 0)
        if tl.program_id(0) == 0 and not STRICT:
            # padding holds zeros, which a mask keeps when its threshold is 0
            pad_in = threshold_in <= 0.0
            pad_out = threshold_out <= 0.0
            all_in -= padding * pad_in.to(tl.int64)
            all_out -= padding * pad_out.to(tl.int64)
            all_both -= padding * (pad_in & pad_out).to(tl.int64)
        tl.atomic_add(kept_ptr, all_in, sem="relaxed")
        tl.atomic_add(kept_ptr + 1, all_out, sem="relaxed")
        tl.atomic_add(kept_ptr + 2, all_both, sem="relaxed")


def fuse_(
    theta: Tensor,
    theta_start: Tensor,
    theta_inner: Tensor,
    importance_in: Tensor,
    importance_out: Tensor,
    uncertainty_in: Tensor | None,
    uncertainty_out: Tensor | None,
    threshold_in: Tensor,
    threshold_out: Tensor,
    weights: Sequence[float],
    strict: bool,
    write_start: bool,
    shadow: Tensor | None,
    kept: Tensor | None,
    numel: int,
    starts: Sequence[int],
    numels: Sequence[int],
    chunks: Tensor | None,
) -> None:
    """One launch; arguments as `reference.fuse_`. Strided tensors take the definition."""
    streams = (theta, theta_start, theta_inner, importance_in, importance_out, uncertainty_in, uncertainty_out)
    if not contiguous(*streams, shadow):
        reference.fuse_(
            *streams, threshold_in, threshold_out, weights, strict, write_start, shadow, kept, numel, starts, numels,
            chunks,
        )  # fmt: skip
        return
    n = theta.numel()
    programs = programs_for(n, theta.device, few=kept is not None) if chunks is None else len(chunks)
    launch(
        fuse_kernel,
        (programs,),
        *map(flat, streams),
        threshold_in,
        threshold_out,
        flat(shadow),
        kept,
        chunks,
        *weights,
        0 if chunks is not None else n - numel,
        n,
        STRICT=strict,
        WRITE_START=write_start,
        BLOCKS=SEGMENT_CHUNK // BLOCK,
        BLOCK=BLOCK,
    )
