"""Device functions that several kernels share."""

import torch
import triton
import triton.language as tl

from .. import layout

BINS: tl.constexpr = tl.constexpr(layout.BINS)


@triton.jit
def blocks_of(n, BLOCK: tl.constexpr):
    """How many blocks hold n >= 1 elements; unlike those of tl.cdiv, its int32 sums hold up to n = 2**31 - 1."""
    return (n - 1) // BLOCK + 1


_PTX: tl.constexpr = tl.constexpr(isinstance(blocks_of, triton.JITFunction) and torch.version.hip is None)
"""Whether kernels are compiled for CUDA, not interpreted."""

_FLUSHING: tl.constexpr = tl.constexpr(_PTX.value and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6))
"""Whether tl.div_rn and tl.sqrt_rn take denormals for 0: compiled for CUDA by triton 3.4 and 3.5."""


@tl.core.extern
def _llvm_quotient(a, b, _semantic=None):
    symbols = {(tl.float32, tl.float32): ("llvm.nvvm.div.rn.f", tl.float32)}
    return tl.core.extern_elementwise("", "", [a, b], symbols, is_pure=True, _semantic=_semantic)


@tl.core.extern
def _llvm_square_root(a, _semantic=None):
    symbols = {(tl.float32,): ("llvm.nvvm.sqrt.rn.f", tl.float32)}
    return tl.core.extern_elementwise("", "", [a], symbols, is_pure=True, _semantic=_semantic)


@triton.jit
def quotient(a, b):
    """a / b of float32, rounded to nearest, denormals as they are."""
    if _FLUSHING:
        return _llvm_quotient(a, b)
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(a):
    """Square root of float32, rounded to nearest, denormals as they are."""
    if _FLUSHING:
        return _llvm_square_root(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def score(weight, grad):
    """|w * g|; 0 where it is not finite: inf and nan both fail the comparison."""
    s = tl.abs(weight * grad)
    return tl.where(s < float("inf"), s, 0.0)


@triton.jit
def lerp(old, new, c, near_new):
    """torch.lerp, from the nearer end, with one rounding of the product and sum; c == 0 returns that end alone."""
    a = tl.where(near_new != 0, new, old)
    b = tl.where(near_new != 0, old, new)
    return tl.where(c == 0.0, a, tl.fma(b - a, c, a))


@triton.jit
def updated_score(s, importance_ptr, at, mask, c, near_new, skip, RESET: tl.constexpr):
    """The new importance in its storage dtype, widened again, so that what is counted is what is stored."""
    if RESET:
        old = tl.zeros_like(s)
    else:
        old = tl.load(importance_ptr + at, mask=mask, other=0.0).to(tl.float32)
    new = tl.where(skip, old, lerp(old, s, c, near_new)).to(importance_ptr.dtype.element_ty)
    tl.store(importance_ptr + at, new, mask=mask)
    return new.to(tl.float32)


@triton.jit
def ranked_score(
    s, importance_ptr, uncertainty_ptr, at, mask, c, near_new, uncertainty_c, uncertainty_near_new, skip,
    RESET: tl.constexpr,
):  # fmt: skip
    """Update importance, and uncertainty where there is one; returns what is ranked, I or I * U."""
    ranked = updated_score(s, importance_ptr, at, mask, c, near_new, skip, RESET)
    if uncertainty_ptr is not None:
        deviation = tl.abs(s - ranked)
        ranked *= updated_score(deviation, uncertainty_ptr, at, mask, uncertainty_c, uncertainty_near_new, skip, RESET)
    return ranked


@triton.jit
def bit_bins(scores, shift, base, BINS: tl.constexpr = BINS):
    """Histogram bin of a score: its bits, shifted, relative to the window, clamped into it."""
    bins = (scores.to(tl.int32, bitcast=True) >> shift) - base
    return tl.minimum(tl.maximum(bins, 0), BINS - 1)


@triton.jit
def flush(histogram_ptr, counts):
    """Add a program's counts; integers, so the order of programs cannot show."""
    tl.atomic_add(histogram_ptr + tl.arange(0, counts.shape[0]), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def add_one_each(histogram_ptr, bins, mask):
    """Add 1 to the bins of masked elements, one by one: for few of them."""
    if _PTX:
        # tl.atomic_add would first move all elements to other threads, through shared memory
        tl.inline_asm_elementwise(
            """{
            .reg .pred %one;
            setp.ne.b32 %one, $2, 0;
            @%one red.relaxed.gpu.global.add.u64 [$1], 1;
            mov.b32 $0, 0;
            }""",
            "=r,l,r",
            [(histogram_ptr + bins).to(tl.uint64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_add(histogram_ptr + bins, tl.full(bins.shape, 1, tl.int64), mask=mask, sem="relaxed")
