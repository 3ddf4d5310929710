"""Kernels that the contract must refuse, each for one reason. The names say which."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

import kif_kernels
from benchmarks.contract import entries as real
from benchmarks.contract.compile import Launch, recorded
from benchmarks.contract.entries import Entry
from benchmarks.contract.formulas import Bytes, adamw_bytes, importance_bytes
from benchmarks.contract.variants import N, adamw
from kif_kernels.kernels.common import add_one_each

REGISTERS_TOO_FEW = 40


@triton.jit
def doubled_load_kernel(weight_ptr, importance_ptr, n, BLOCK: tl.constexpr):
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(importance_ptr + at, tl.abs(tl.load(weight_ptr + at, mask=at < n)), mask=at < n)
        # the store in between keeps the compiler from merging the loads
        tl.store(importance_ptr + at, tl.exp(tl.load(weight_ptr + at, mask=at < n)), mask=at < n)


@triton.jit
def atomic_kernel(weight_ptr, sum_ptr, n, BLOCK: tl.constexpr):
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        tl.atomic_add(sum_ptr, tl.sum(tl.load(weight_ptr + at, mask=at < n, other=0.0)))


@triton.jit
def assembled_atomic_kernel(weight_ptr, sum_ptr, n, BLOCK: tl.constexpr):
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + at, mask=at < n, other=0.0)
        add_one_each(sum_ptr.to(tl.pointer_type(tl.int64)), at & 15, weight > 0.0)


@triton.jit
def two_passes_kernel(weight_ptr, sum_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(2):
        for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            total += tl.load(weight_ptr + at, mask=at < n, other=0.0)
    tl.store(sum_ptr, tl.sum(total))


def entries() -> list[Entry]:
    """One entry a reason."""
    x = torch.zeros(N)
    options = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}
    with recorded() as launches:
        shifted = [torch.zeros(N + 1)[1:] for _ in range(3)]
        kif_kernels.importance_ema_(*shifted, 0.5)
    (full,) = real.entries([adamw("adamw+importance")])
    tight = {**full.launch.kwargs, "maxnreg": REGISTERS_TOO_FEW}
    return [
        Entry("unaligned", launches[0], importance_bytes()),
        Entry("doubled load", Launch(doubled_load_kernel, (x, x, N), options), Bytes(4, 8)),
        Entry("atomics in the loop", Launch(atomic_kernel, (x, x, N), options), Bytes(4, 0)),
        Entry("atomics in assembly", Launch(assembled_atomic_kernel, (x, x, N), options), Bytes(4, 0)),
        Entry("nested loops", Launch(two_passes_kernel, (x, x, N), options), Bytes(4, 0)),
        Entry("spill", replace(full.launch, kwargs=tight), adamw_bytes()),
    ]
