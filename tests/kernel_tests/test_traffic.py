"""What a round moves through memory, counted as compiled kernels run: the bytes that docs/performance.md states."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import kif_kernels as kk
from kif.arena import ParameterArena
from kif.config import KIFConfig
from kif.engine import RecurrentKIF

INNER, OUTER = 3, 2
PLAIN = 4 + 28 + 4
"""Of a step without Recurrent-KIF: the norm, AdamW, zeroing the gradient."""


def moved(n: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes by kernel in the second round over n elements, in whole sectors."""
    from ptx import launch
    from ptx.memory import Memory

    parameter = nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(0)))
    config = KIFConfig(inner_steps=INNER, outer_steps=OUTER)
    engine = RecurrentKIF(ParameterArena([("weight", parameter)]), config)
    found: Counter[str] = Counter()

    def observe(kernel: str, memory: Memory) -> None:
        found[kernel] += memory.traffic()

    def run_round() -> None:
        for step in range(INNER + OUTER):
            engine.arena.grad.copy_(torch.randn(n, generator=torch.Generator().manual_seed(step)))
            (engine.inner_step if step < INNER else engine.outer_step)(1e-3)
        engine.fuse()

    run_round()
    with monkeypatch.context() as patch:
        patch.setattr(launch, "observers", [observe])
        run_round()
    return found


@pytest.mark.emulated
def test_a_round_moves_what_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    n, steps = 2**14, INNER + OUTER
    small, large = moved(n, monkeypatch), moved(2 * n, monkeypatch)
    # what is done once a launch or a program is in both
    found = {kernel: (large[kernel] - small[kernel]) / n for kernel in large}
    # with each block a warp reads the clipping factor again, from a cache: it would take a register to keep
    again = 32 * 4 / 1024 * steps
    # importance is not read in the first step; two snapshots; triton 3.6 needs a sector more in all
    assert found["adamw_kernel"] == pytest.approx(40 * steps - 4 + 8 + again, rel=0, abs=32 / n)
    assert found["fuse_kernel"] == 24
    # the windows were hit: two passes a side make the thresholds exact; more elements fill a few bins more
    assert found["refine_kernel"] == pytest.approx(16, rel=0.01)
    assert sum(found.values()) == pytest.approx(PLAIN * steps + 8 * steps + 44 + again, rel=1e-3)


def additions(selection: kk.StreamingThreshold, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Atomic operations on memory of each pass of a selection."""
    from ptx import launch
    from ptx.memory import ATOMIC, Memory

    found: list[int] = []

    def observe(kernel: str, memory: Memory) -> None:
        if kernel == "refine_kernel":
            # the last region is shared memory
            atomic = [a for a in memory.log if a.kind == ATOMIC and a.region < len(memory.starts)]
            found.append(sum(len(accesses.byte) for accesses in atomic))

    with monkeypatch.context() as patch:
        patch.setattr(launch, "observers", [observe])
        selection.select((x,))
    return found


@pytest.mark.emulated
@pytest.mark.parametrize(("ties", "expected"), [(32, [32, 32, 0, 0]), (33, [1, 1, 0, 0])])
def test_few_candidates_are_added_one_by_one(ties: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a 512th of the elements; the counts of more go from a program to memory at once."""
    n = 2**14
    x = torch.ones(n)
    x[: kk.mask_size(0.2, n) - 1] = 4.0
    x[8192 : 8192 + ties] = 2.0
    selection = kk.StreamingThreshold(0.2, n)
    selection.select((x,))
    assert additions(selection, x, monkeypatch)[1:] == expected
    assert selection.thresholds.item() == 2.0


@pytest.mark.emulated
def test_after_a_miss_all_elements_are_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few were in the window's outer bin."""
    n = 2**14
    x = torch.ones(n)
    x[:5] = 2.0
    selection = kk.StreamingThreshold(0.0, n)
    selection.set_rank(3)
    selection.select((x,))
    x[:5] = 32.0
    # ones in each program, and the five in the first
    assert max(additions(selection, x, monkeypatch)[1:]) <= n // 1024 + 1
    assert selection.thresholds.item() == 32.0
