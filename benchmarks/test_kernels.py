"""The microbenchmarks under pytest-benchmark, for its comparison and histograms:

    pytest benchmarks/test_kernels.py --benchmark-only

KIF_BENCH_SETS and KIF_BENCH_DEVICE choose sets of `benchmarks.shapes` (default t5-large) and the device (default: a GPU
if there is one). Times are of the device, without the parts of a round that are no bookkeeping; bytes, rates and
launches are in extra_info. `pytest` alone does not collect this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import check
from benchmarks.machine import Machine
from benchmarks.measure import Case, describe, plan, rate
from benchmarks.operations import OPERATIONS
from benchmarks.timing import device_run
from benchmarks.workload import Unavailable

SETS = os.environ.get("KIF_BENCH_SETS", "t5-large").split(",")
CASES = plan(SETS, list(OPERATIONS))
ROUNDS = 20
EXTRA = ("elements", "min_bytes", "bytes", "gbps", "fraction", "launches", "operations", "syncs", "note")


class Clock:
    """A timer for pytest-benchmark that only goes while something timed runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def run(self, once: Callable[[], float]) -> None:
        """Run something that returns its microseconds."""
        self.seconds += once() * 1e-6


CLOCK = Clock()


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine(os.environ.get("KIF_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.set}-{case.operation.name}-{case.contender.name}")
def test_kernels(benchmark: Any, machine: Machine, case: Case) -> None:
    """Checks the contender against the definition, then times it."""
    problem, row = case.problem(machine.device), case.row()
    try:
        verdict = check.check(case.operation, case.contender, problem)
        assert not verdict.problem
        phases = describe(row, case, problem, machine)
    except (Unavailable, MemoryError, torch.OutOfMemoryError) as error:
        pytest.skip(str(error))
    benchmark.group = f"{case.set} {case.operation.name}"
    benchmark.pedantic(CLOCK.run, args=(device_run(machine, phases),), rounds=ROUNDS, warmup_rounds=2)
    if benchmark.stats is not None:
        rate(row, benchmark.stats.stats.median * 1e6, machine)
    benchmark.extra_info.update({name: getattr(row, name) for name in EXTRA})
