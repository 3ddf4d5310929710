"""Streaming selection of the k-th largest score: histograms of bit patterns, narrowed level by level.

One launch a level for all sides and groups, 4 B/element where it works; a level that is not needed returns after a few
scalar loads. The workspace, and what its rows mean, is in `kif_kernels.layout`. Every program of a launch works out for
itself where the last level ended; only the first of a group writes it down.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .. import layout, reference
from ..segments import SEGMENT_CHUNK
from .common import BINS, add_one_each, bit_bins, blocks_of, flush
from .launch import BLOCK, contiguous, flat, launch, programs_for

LEVELS: tl.constexpr = tl.constexpr(layout.LEVELS)
ROW: tl.constexpr = tl.constexpr(layout.ROW)
STEP: tl.constexpr = tl.constexpr(layout.STEP)
WHOLE_SHIFT: tl.constexpr = tl.constexpr(layout.WHOLE_SHIFT)
WINDOW_SHIFT: tl.constexpr = tl.constexpr(layout.WINDOW_SHIFT)
REFINED_BINS: tl.constexpr = tl.constexpr(2**layout.STEP)
MANY: tl.constexpr = tl.constexpr(512)
"""Candidates that are at most 1 / MANY of the elements are counted in memory one by one, at worst all in one bin."""
INFINITY_BITS: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def locate(histogram_ptr, row_ptr, rank_ptr, limit_ptr, LEVEL: tl.constexpr):
    """Where the wanted rank lies in the histogram of `LEVEL`.

    Returns (done, bits, shift, base, parent shift, rank, candidates): the threshold's bits when done, else the next
    level's row and how many elements it counts.
    """
    shift = tl.load(row_ptr)
    base = tl.load(row_ptr + 1)
    if LEVEL == 0:
        rank = tl.load(rank_ptr)
    else:
        rank = tl.load(row_ptr + 3)
    bins = tl.arange(0, BINS if LEVEL == 0 else REFINED_BINS)
    counts = tl.load(histogram_ptr + bins)
    not_below = tl.cumsum(counts, 0, reverse=True)
    here = (not_below >= rank) & (not_below - counts < rank)
    index = tl.sum(tl.where(here, bins, 0).to(tl.int64), 0)
    inside = tl.maximum(tl.sum(tl.where(here, counts, 0), 0), 1)
    above = tl.sum(tl.where(here, not_below - counts, 0), 0)
    needed = rank - above
    low = (base + index) << shift
    # linear inside the bin; its lower edge when all or the very largest are wanted, so that no mask is empty
    offset = ((inside - needed) * (tl.full([], 1, tl.int64) << shift)) // inside
    bits = tl.where(above == 0, low, low + offset)
    done = (shift == 0) | (inside <= tl.load(limit_ptr))
    next_shift = tl.maximum(shift - STEP, 0)
    next_base = (base + index) << (shift - next_shift)
    next_parent = shift
    if LEVEL == 0:
        # the outer bins of a window also hold everything beyond it
        missed = ((index == 0) & (base > 0)) | ((index == BINS - 1) & (((base + BINS) << shift) <= INFINITY_BITS))
        done = done & (missed == 0)
        next_shift = tl.where(missed, 31 - STEP, next_shift)
        next_base = tl.where(missed, 0, next_base)
        next_parent = tl.where(missed, 31, next_parent)
        needed = tl.where(missed, rank, needed)
        inside = tl.where(missed, tl.sum(counts, 0), inside)
    return done, bits, next_shift, next_base, next_parent, needed, inside


@triton.jit
def answer(histogram_ptr, row_ptr, rank_ptr, limit_ptr, LEVEL: tl.constexpr):
    """What `locate` returns for `LEVEL`, or what an earlier level found; and the number of levels that have counted."""
    candidates = tl.full([], 0, tl.int64)
    bits = tl.load(row_ptr + 5)
    shift = tl.load(row_ptr)
    base = tl.load(row_ptr + 1)
    parent = tl.load(row_ptr + 2)
    rank = tl.load(row_ptr + 3)
    passes = tl.load(row_ptr + 6)
    done = tl.load(row_ptr + 4) != 0
    if not done:
        done, bits, shift, base, parent, rank, candidates = locate(histogram_ptr, row_ptr, rank_ptr, limit_ptr, LEVEL)
    return done, bits, shift, base, parent, rank, candidates, passes


@triton.jit
def count_block(counts, histogram_ptr, scores_ptr, factor_ptr, at, inside, mask, shift, base, parent,
                LEVEL: tl.constexpr, FEW: tl.constexpr):  # fmt: skip
    """Count the block's candidates, all at level 0, those of the parent's bin at others; in memory if they are FEW."""
    x = tl.load(scores_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + at, mask=mask, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    if LEVEL > 0:
        inside &= (bits >> parent) == (base >> (parent - shift))
    if FEW:
        add_one_each(histogram_ptr, (bits >> shift) - base, inside)
    else:
        counts += tl.histogram(bit_bins(x, shift, base, counts.shape[0]), counts.shape[0], mask=inside)
    return counts


@triton.jit
def count_all(histogram_ptr, scores_ptr, factor_ptr, chunk_ptr, n, shift, base, parent, LEVEL: tl.constexpr,
              FEW: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    counts = tl.zeros([BINS if LEVEL == 0 else REFINED_BINS], dtype=tl.int32)
    if chunk_ptr is not None:
        start = tl.multiple_of(tl.load(chunk_ptr + 1), 16)
        size = tl.load(chunk_ptr + 2)
        # whole vectors are read where the buffer reaches that far
        readable = tl.minimum(tl.cdiv(size, 16) * 16, n - start)
        for block in range(BLOCKS):
            inner = block * BLOCK + tl.arange(0, BLOCK)
            at, inside, mask = start + inner, inner < size, inner < readable
            counts = count_block(
                counts, histogram_ptr, scores_ptr, factor_ptr, at, inside, mask, shift, base, parent, LEVEL, FEW
            )
    else:
        for block in range(tl.program_id(0), blocks_of(n, BLOCK), tl.num_programs(0)):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = at < n
            counts = count_block(
                counts, histogram_ptr, scores_ptr, factor_ptr, at, inside, inside, shift, base, parent, LEVEL, FEW
            )
    if not FEW:
        flush(histogram_ptr, counts)


@triton.jit
def count_side(histogram_ptr, scores_ptr, factor_ptr, chunk_ptr, n, shift, base, parent, few, LEVEL: tl.constexpr,
               BLOCKS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    if few:
        count_all(histogram_ptr, scores_ptr, factor_ptr, chunk_ptr, n, shift, base, parent, LEVEL, True, BLOCKS, BLOCK)
    else:
        count_all(histogram_ptr, scores_ptr, factor_ptr, chunk_ptr, n, shift, base, parent, LEVEL, False, BLOCKS, BLOCK)


@triton.jit(do_not_specialize=["groups"])
def refine_kernel(
    scores_in_ptr,
    scores_out_ptr,
    factor_in_ptr,
    factor_out_ptr,
    histograms_ptr,
    state_ptr,
    ranks_ptr,
    limits_ptr,
    chunks_ptr,
    groups,
    n,
    LEVEL: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Histogram of one level. Grid: (programs or chunks, sides)."""
    side = tl.program_id(1)
    group = tl.full([], 0, tl.int64)
    first = tl.program_id(0) == 0
    chunk_ptr = None
    if chunks_ptr is not None:
        chunk_ptr = chunks_ptr + tl.program_id(0) * 3
        group = tl.load(chunk_ptr)
        if not first:
            first = tl.load(chunk_ptr - 3) != group
    row_ptr = state_ptr + ((side * groups + group) * LEVELS + LEVEL) * ROW
    histogram_ptr = histograms_ptr + ((side * LEVELS + LEVEL) * groups + group) * BINS
    done = False
    few = False
    if LEVEL == 0:
        shift = tl.load(row_ptr)
        base = tl.load(row_ptr + 1)
        parent = tl.full([], 31, tl.int64)
    else:
        done, bits, shift, base, parent, rank, candidates, passes = answer(
            histogram_ptr - groups * BINS, row_ptr - ROW, ranks_ptr + group, limits_ptr + group, LEVEL - 1
        )
        if first:
            tl.store(row_ptr, shift)
            tl.store(row_ptr + 1, base)
            tl.store(row_ptr + 2, parent)
            tl.store(row_ptr + 3, rank)
            tl.store(row_ptr + 4, done.to(tl.int64))
            tl.store(row_ptr + 5, bits)
            tl.store(row_ptr + 6, tl.where(done, passes, LEVEL))
        few = candidates * MANY <= n
    if not done:
        s = shift.to(tl.int32)
        b = base.to(tl.int32)
        p = parent.to(tl.int32)
        if side == 0:
            count_side(histogram_ptr, scores_in_ptr, factor_in_ptr, chunk_ptr, n, s, b, p, few, LEVEL, BLOCKS, BLOCK)
        else:
            count_side(histogram_ptr, scores_out_ptr, factor_out_ptr, chunk_ptr, n, s, b, p, few, LEVEL, BLOCKS, BLOCK)


@triton.jit(do_not_specialize=["groups"])
def select_kernel(thresholds_ptr, histograms_ptr, state_ptr, ranks_ptr, limits_ptr, groups):
    """Threshold, next window and a clean workspace. Grid: (groups, sides)."""
    group = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    rows_ptr = state_ptr + (side * groups + group) * (LEVELS * ROW)
    histogram_ptr = histograms_ptr + (side * LEVELS * groups + group) * BINS
    _, bits, _, _, _, _, _, passes = answer(
        histogram_ptr + (LEVELS - 1) * groups * BINS,
        rows_ptr + (LEVELS - 1) * ROW,
        ranks_ptr + group,
        limits_ptr + group,
        LEVELS - 1,
    )
    passes += tl.load(rows_ptr + 7)
    # all warps have read before any writes
    tl.debug_barrier()
    tl.store(thresholds_ptr + side * groups + group, bits.to(tl.int32).to(tl.float32, bitcast=True))
    # a threshold of 0 tells nothing about where the next one is
    tl.store(rows_ptr, tl.where(bits == 0, WHOLE_SHIFT, WINDOW_SHIFT))
    tl.store(rows_ptr + 1, tl.where(bits == 0, 0, tl.maximum((bits >> WINDOW_SHIFT) - BINS // 2, 0)))
    tl.store(rows_ptr + 7, passes)
    for level in tl.static_range(LEVELS):
        tl.store(histogram_ptr + level * groups * BINS + tl.arange(0, BINS), tl.zeros([BINS], dtype=tl.int64))


@triton.jit
def histogram_kernel(scores_ptr, factor_ptr, histogram_ptr, window_ptr, n, BLOCK: tl.constexpr):
    shift = tl.load(window_ptr).to(tl.int32)
    base = tl.load(window_ptr + 1).to(tl.int32)
    count_all(histogram_ptr, scores_ptr, factor_ptr, None, n, shift, base, 31, 0, False, 1, BLOCK)


def histogram_(histogram: Tensor, window: Tensor, importance: Tensor, uncertainty: Tensor | None) -> None:
    """One pass; arguments as `reference.histogram_`. Strided tensors take the definition."""
    if not contiguous(importance, uncertainty):
        reference.histogram_(histogram, window, importance, uncertainty)
        return
    n = importance.numel()
    programs = programs_for(n, importance.device, few=True)
    launch(histogram_kernel, (programs,), flat(importance), flat(uncertainty), histogram, window, n, BLOCK=BLOCK)


def thresholds_(
    thresholds: Tensor,
    histograms: Tensor | None,
    state: Tensor | None,
    ranks: Tensor,
    limits: Tensor,
    scores: Sequence[Tensor],
    factors: Sequence[Tensor],
    counted: bool,
    starts: Sequence[int],
    numels: Sequence[int],
    chunks: Tensor | None,
) -> None:
    """One launch a level, and one to select; arguments as `reference.thresholds_`, for one or two sides.

    Strided buffers, and a workspace made for another backend, take the definition.
    """
    if histograms is None or state is None or not contiguous(*scores, *factors):
        reference.thresholds_(
            thresholds, histograms, state, ranks, limits, scores, factors, counted, starts, numels, chunks
        )
        if histograms is not None:
            # what was counted on the way is not used
            histograms.zero_()
        return
    sides, groups = thresholds.shape
    inner, outer = scores[0].view(-1), scores[-1].view(-1)
    factor_in, factor_out = (factors[0].view(-1), factors[-1].view(-1)) if factors else (None, None)
    n = inner.numel()
    programs = programs_for(n, inner.device, few=True) if chunks is None else len(chunks)
    for level in range(1 if counted else 0, layout.LEVELS):
        launch(
            refine_kernel,
            (programs, sides),
            inner,
            outer,
            factor_in,
            factor_out,
            histograms,
            state,
            ranks,
            limits,
            chunks,
            groups,
            n,
            LEVEL=level,
            BLOCKS=SEGMENT_CHUNK // BLOCK,
            BLOCK=BLOCK,
        )
    launch(select_kernel, (groups, sides), thresholds, histograms, state, ranks, limits, groups)
