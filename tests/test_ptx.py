"""The PTX machine that kernels are tried on: its numbers, its threads, and each fault that it is there to find."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_process import IMPORTS
from ptx import arithmetic, machine
from ptx.instructions import decode
from ptx.machine import Machine
from ptx.memory import Memory
from ptx.program import Fault, parse

BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)
BASE = 0x1000
HEAD = """
.version 8.0
.target sm_90
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 out, .param .u32 n)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, {threads}, %r0;
    ld.param.b64 %rd0, [out];
    mad.wide.u32 %rd1, %r2, 4, %rd0;  // each thread's element
    {body}
    ret;
}}
"""


def run(body: str, programs: int = 1, threads: int = 64, n: int = 0, size: int | None = None, order: int | None = None,
        shared: int = 1024) -> Any:  # fmt: skip
    """What a kernel leaves in its buffer of uint32, an element a thread. %r0 to %r2 are thread, program, element."""
    program = parse(HEAD.format(threads=threads, body=body))
    out = np.zeros(programs * threads if size is None else size, np.uint32)
    memory = Memory([(BASE, out.view(np.uint8))], shared, programs, threads)
    parameters = {"out": np.uint64(BASE), "n": np.int32(n)}
    Machine(program, (programs, 1, 1), memory, parameters, order).run(decode(program))
    return out


def floats(bits: list[int]) -> Any:
    return np.array(bits, np.uint32).view(np.float32)


@given(BITS, BITS, BITS)
@settings(max_examples=300, deadline=None)
def test_fma_is_rounded_once(a: list[int], b: list[int], c: list[int]) -> None:
    size = min(map(len, (a, b, c)))
    x, y, z = (floats(bits[:size]) for bits in (a, b, c))
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    wanted = np.array([fmaf(*numbers) for numbers in zip(x, y, z, strict=True)], np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(arithmetic.fma32(x, y, z), wanted)


def test_fma_where_rounding_twice_is_wrong() -> None:
    # 1 + 2**-24 is a tie in float32; what lies beyond float64 decides it
    a, b, c = np.float32([2.0**-24, 2.0**-24]), np.float32([1.0, 1.0]), np.float32([1.0, 1.0 + 2.0**-23])
    least = np.float32(2.0**-100)
    assert arithmetic.fma32(a, b, c).tolist() == [1.0, 1.0 + 2.0**-22]
    above = arithmetic.fma32(np.float32([1 + 2.0**-23]), np.float32([2.0**-24]), np.float32([1.0]))
    assert above.tolist() == [1.0 + 2.0**-23]
    assert arithmetic.fma64(np.float64(1 + 2.0**-52), np.float64(1 - 2.0**-52), np.float64(-1.0))[0] == -(2.0**-104)
    assert arithmetic.fma32(least, least, np.float32([1.0])).tolist() == [1.0]


@given(BITS)
@settings(max_examples=300, deadline=None)
def test_bfloat16(bits: list[int]) -> None:
    x = floats(bits)
    wanted = torch.from_numpy(x.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(arithmetic.from_bfloat16(arithmetic.bfloat16(x)), wanted)


def test_integers() -> None:
    a, b = np.int64([7, -7, 7, -7]), np.int64([2, 2, -2, -2])
    assert arithmetic.quotient(a, b).tolist() == [3, -3, -3, 3]
    assert arithmetic.shifted_left(np.uint32([1, 1, 1]), np.uint32([31, 32, 99])).tolist() == [2**31, 0, 0]
    assert arithmetic.shifted_right(np.int32([-8, -8]), np.uint32([1, 40])).tolist() == [-4, -1]
    assert arithmetic.shifted_right(np.uint32([8, 8]), np.uint32([1, 32])).tolist() == [4, 0]
    mixed = arithmetic.permuted(np.uint32([0x03020180]), np.uint32([0x07060504]), np.uint32([0x8740]))
    assert mixed.tolist() == [0xFF070480]
    assert arithmetic.flushed(np.float32([-1e-40, 0.5])).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("order", [None, 0, 1])
def test_threads_part_and_come_together_again(order: int | None) -> None:
    """Steps of each number to 1: half of it, or three times it and one."""
    body = """
    add.s32 %r3, %r2, 1;
    mov.b32 %r4, 0;
$again:
    setp.eq.s32 %p1, %r3, 1;
    @%p1 bra $end;
    and.b32 %r5, %r3, 1;
    setp.ne.s32 %p2, %r5, 0;
    @%p2 bra $odd;
    shr.u32 %r3, %r3, 1;
    bra.uni $next;
$odd:
    mad.lo.s32 %r3, %r3, 3, 1;
$next:
    add.s32 %r4, %r4, 1;
    bra.uni $again;
$end:
    redux.sync.add.s32 %r6, 1, 0xffffffff;
    shl.b32 %r6, %r6, 16;
    or.b32 %r4, %r4, %r6;
    st.global.b32 [%rd1], %r4;"""

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    wanted = [32 << 16 | steps(n) for n in range(1, 129)]
    assert run(body, programs=2, order=order).tolist() == wanted


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "reads"),
    [
        ("up", 1, 0, lambda lane: lane - 1 if lane >= 1 else None),
        ("down", 3, 31, lambda lane: lane + 3 if lane + 3 < 32 else None),
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("idx", 9, 31, lambda lane: 9),
        # parts of eight
        ("up", 2, 24 << 8, lambda lane: lane - 2 if lane % 8 >= 2 else None),
        ("down", 2, 24 << 8 | 31, lambda lane: lane + 2 if lane % 8 + 2 < 8 else None),
        ("idx", 3, 24 << 8 | 31, lambda lane: lane // 8 * 8 + 3),
    ],
)
def test_shuffles(mode: str, by: int, clamp: int, reads: Any) -> None:
    body = f"""
    add.s32 %r3, %r0, 100;
    shfl.sync.{mode}.b32 %r4|%p1, %r3, {by}, {clamp}, -1;
    selp.b32 %r5, 0, 1000, %p1;
    add.s32 %r4, %r4, %r5;
    st.global.b32 [%rd1], %r4;"""
    wanted = [1100 + lane if reads(lane) is None else 100 + reads(lane) for lane in range(32)]
    assert run(body, threads=32).tolist() == wanted


def test_votes_and_small_parts() -> None:
    body = """
    and.b32 %r3, %r0, 3;
    setp.eq.s32 %p1, %r3, 0;
    vote.sync.ballot.b32 %r4, %p1, -1;
    popc.b32 %r5, %r4;
    mov.b32 {%rs1, %rs2}, %r4;
    mov.b32 %r6, {%rs2, %rs1};
    bfe.u32 %r7, %r6, 4, 5;
    mad.lo.s32 %r7, %r5, 100, %r7;
    st.global.b32 [%rd1], %r7;"""
    assert set(run(body).tolist()) == {800 + 0b10001}


@pytest.mark.parametrize("order", range(5))
def test_barriers_order_warps(order: int) -> None:
    body = """
    shl.b32 %r3, %r0, 2;
    st.shared.b32 [%r3], %r0;
    bar.sync 0;
    xor.b32 %r3, %r3, 252;
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [%rd1], %r4;"""
    assert run(body, programs=3, order=order).tolist() == 3 * list(range(63, -1, -1))


def test_a_warp_waits_for_its_threads() -> None:
    """The one that went elsewhere comes back from behind."""
    body = """
    setp.eq.s32 %p1, %r0, 5;
    mov.b32 %r3, 1;
    @%p1 bra $aside;
$back:
    redux.sync.add.s32 %r4, %r3, -1;
    st.global.b32 [%rd1], %r4;
    ret;
$aside:
    mov.b32 %r3, 100;
    bra.uni $back;"""
    assert run(body, threads=32).tolist() == [131] * 32


def test_parameters_have_the_type_of_the_instruction() -> None:
    body = "ld.param.b32 %rd2, [n];\n shr.u64 %rd2, %rd2, 32;\n st.global.b32 [%rd1], %rd2;"
    assert set(run(body, n=-5).tolist()) == {0}
    assert set(run(body.replace("b32 %rd2, [n]", "s32 %rd2, [n]"), n=-5).tolist()) == {2**32 - 1}


def test_neighbouring_bytes_are_places_of_their_own() -> None:
    body = "cvt.u64.u32 %rd2, %r2;\n add.s64 %rd2, %rd0, %rd2;\n cvt.u16.u32 %rs1, %r2;\n st.global.b8 [%rd2], %rs1;"
    assert run(body, size=16).view(np.uint8).tolist() == list(range(64))


def test_atomics_go_together() -> None:
    assert run("red.global.gpu.relaxed.add.u32 [%rd0], 1;", programs=4, size=1).tolist() == [256]


WRITE_AND_READ = "st.shared.b32 [%r3], %r0;\n xor.b32 %r3, %r3, 128;\n ld.shared.b32 %r4, [%r3];"


FIRST_FOUR = "setp.lt.u32 %p1, %r0, 4;\n @%p1 mov.b32 %r3, %r0;\n"
"""A register that the others do not write."""


def test_what_was_not_written_may_be_computed_with() -> None:
    """As triton 3.6 adds up the sums of four warps; half of a pair may be filled up with nothing."""
    body = """
    shfl.sync.bfly.b32 %r4, %r3, 2, 31, -1;
    add.s32 %r3, %r3, %r4;
    shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
    add.s32 %r3, %r3, %r4;
    mov.b64 %rd2, {%r3, %r7};
    mov.b64 {%r5, _}, %rd2;
    @%p1 st.global.b32 [%rd1], %r5;"""
    assert run(FIRST_FOUR + body).tolist() == [6] * 4 + [0] * 60


@pytest.mark.parametrize(
    ("body", "fault", "settings"),
    [
        ("st.global.b32 [%rd1+4], %r0;", "in none of the arguments", {}),
        ("st.global.b32 [%rd1+-4], %r0;", "in none of the arguments", {}),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd1];", "not aligned", {}),
        ("mov.u32 %r3, 1024;\n ld.shared.b32 %r4, [%r3];", "of 1024 bytes of shared memory", {}),
        ("mov.u32 %r3, 0;\n ld.shared.b32 %r4, [%r3];", "before it is written", {}),
        ("st.global.b32 [%rd1], %r7;", "%r7 is read before it is written", {}),
        ("mov.u32 %r3, 0;\n st.global.b32 [%rd0], %r3;", "warps race", {}),
        ("shl.b32 %r3, %r0, 2;\n" + WRITE_AND_READ, "before it is written|warps race", {}),
        ("and.b32 %r3, %r0, 124;\n st.shared.b32 [%r3], %r0;", "different values to one place", {"threads": 32}),
        ("shl.b32 %r3, %r0, 2;\n st.shared.b32 [%r3], %r0;\n mov.u32 %r3, 4;\n ld.shared.b32 %r4, [%r3];",
         "threads of a warp race: ld.shared.b32 .*; st.shared|threads of a warp race: st.shared", {"threads": 32}),
        ("mov.u32 %r3, 0;\n setp.eq.s32 %p1, %r0, 0;\n ld.global.b32 %r4, [%rd0];\n @%p1 st.global.b32 [%rd0], %r3;",
         "warps race: ld.global", {}),
        ("setp.eq.s32 %p1, %r0, 0;\n @%p1 st.global.b32 [%rd0], %r0;", "programs race", {"programs": 2}),
        ("setp.eq.s32 %p1, %r1, 1;\n @%p1 bra $end;\n ld.global.b32 %r3, [%rd0];\n bra.uni $out;\n $end:\n"
         "red.global.add.u32 [%rd0], 1;\n $out:", "programs race", {"programs": 2}),
        ("setp.lt.s32 %p1, %r0, 40;\n @%p1 bar.sync 0;", "not all threads of a program reach", {}),
        ("setp.lt.s32 %p1, %r0, 40;\n @%p1 redux.sync.add.s32 %r3, %r0, -1;", "not all threads of a warp", {}),
        ("sin.approx.f32 %r3, %r0;", "not known: sin.approx", {}),
        ("div.approx.f32 %r3, %r0, %r0;", "not known: div.approx", {}),
        ("setp.lt.u32 %p1, %r0, 3;\n @%p1 mov.b32 %r3, 5;\n st.global.b32 [%rd1], %r3;", "%r3 is read before", {}),
        ("and.b32 %r3, %r0, 1;\n setp.eq.s32 %p1, %r3, 0;\n @%p1 bar.sync 0;\n @!%p1 bar.sync 0;",
         "at different barriers", {}),
        ("redux.sync.add.s32 %r3, %r0, 65535;", "a mask of parts of warps", {}),
        ("add.bf16 %rs1, %rs2, %rs3;", "not known: add.bf16", {}),
        ("mul.u32 %r3, %r0, %r0;", "not known: mul.u32", {}),
        ("add.rn.f32 %r3, %r0, 0d3FF0000000000000;", "not known: add.rn.f32", {}),
        ("ld.global.v2.b32 {%r3}, [%rd1];", "not known: ld.global.v2", {}),
        ("bra $nowhere;", "not known: bra", {}),
        ("add.rz.f32 %r3, %r0, %r0;", "not known: add.rz", {}),
        ("add.cc.u32 %r3, %r0, %r0;", "not known: add.cc", {}),
        ("ld.volatile.global.b32 %r3, [%rd1];", "not known: ld.volatile", {}),
        ("cvt.rzi.s32.f32 %r3, %r0;", "not known: cvt.rzi", {}),
        ("atom.global.add.u32 %r3, [%rd0], 1;\n st.global.b32 [%rd1], %r3;", "%r3 is read before", {}),
        (FIRST_FOUR + "shfl.sync.bfly.b32 %r4, %r3, 4, 31, -1;\n @%p1 st.global.b32 [%rd1], %r4;",
         "%r4 is read before", {}),
        (FIRST_FOUR + "add.s32 %r4, %r3, %r2;\n st.global.b32 [%rd1], %r4;", "%r4 is read before", {}),
        (FIRST_FOUR + "setp.eq.s32 %p2, %r3, 0;\n @%p2 bra $end;\n $end:", "%p2 is read before", {}),
        (FIRST_FOUR + "mov.b64 %rd2, {%r0, %r3};\n mov.b64 {_, %r4}, %rd2;\n st.global.b32 [%rd1], %r4;",
         "%r4 is read before", {}),
        (FIRST_FOUR + "vote.sync.ballot.b32 %r4, %p3, -1;", "%p3 is read before", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", [None, 3])
def test_faults(body: str, fault: str, settings: dict[str, int], order: int | None) -> None:
    with pytest.raises(Fault, match=fault):
        run(body, order=order, **settings)


@pytest.mark.parametrize("order", [None, 3])
def test_a_loop_without_an_end(order: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LIMIT", 1000)
    with pytest.raises(Fault, match="no end"):
        run("$again: bra.uni $again;", order=order)


def test_what_is_no_kernel() -> None:
    with pytest.raises(Fault, match="no kernel"):
        parse(".version 8.0")


TRITON = """
import torch, triton, triton.language as tl
from ptx.launch import emulate, launched
emulate(80, seed=5)

@triton.jit
def count(x_ptr, total_ptr, n, twice, BLOCK: tl.constexpr, factor=3.0):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + at, mask=at < n, other=0.0))
    total = tl.where(twice, 2 * total, total) * factor
    {end}

x, total = torch.arange(1000.0), torch.zeros(())
count.warmup(x, total, 1000, True, BLOCK=256, grid=(4,))
assert total.item() == 0.0
count[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](x, total, 1000, True, BLOCK=256)
print(total.item(), dict(launched))
"""


@pytest.mark.parametrize(
    ("end", "shows"),
    [
        ("tl.atomic_add(total_ptr, total)", "2997000.0 {'count': 1}"),
        ("tl.store(total_ptr, tl.load(total_ptr) + total)", "different values to one place"),
        ("tl.store(total_ptr + tl.program_id(0), total)", "in none of the arguments"),
    ],
)
def test_kernels_of_triton(tmp_path: Path, end: str, shows: str) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "script.py"
    script.write_text(TRITON.format(end=end))
    environment = os.environ | {"PYTHONPATH": IMPORTS}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert shows in done.stdout + done.stderr
