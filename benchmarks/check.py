"""Whether a contender gets the numbers it claims: it is compared with the definition before it is timed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.operations import Operation
from benchmarks.product import Reference
from benchmarks.quantiles import Selector, rank_error
from benchmarks.released import Released
from benchmarks.shapes import SETS
from benchmarks.workload import DENSITY, Contender, Problem, run_phases

REFERENCES: dict[str, type[Contender]] = {"paper": Reference, "released": Released}
"""Who is right, by method. The tests compare `Released` with a second implementation."""

COMPARED = ("weight", "importance", "uncertainty", "exp_avg")
"""Beginnings of the names of buffers that must agree: what the next round depends on."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Relative; a place more than one rounding of the dtype, a thousandth where nothing is rounded."""

FLOOR, FLOOR_MOMENTS = 0.1, 1.0
"""Size below which a number need not be relatively exact, as a fraction of the buffer's root mean square. Moments are
sums that cancel, of gradients that were scaled by a norm; a float32 norm of millions of elements is off by 1e-4."""

WHOLE = {"cpu": 2**23, "cuda": 2**26}
"""Elements up to which everything is compared; larger buffers are compared in three windows of `WINDOW` elements."""
WINDOW = 2**20
STAND_IN = "llama2-7b"
"""The set on which is checked what cannot be compared in windows."""


class Verdict(NamedTuple):
    """Outcome of a check.

    Args:
        problem: what is wrong; empty when nothing is.
        error: largest ||x - reference|| / ||reference|| of the buffers; for thresholds, elements too many or too few.
        elements: number of elements that were compared.
    """

    problem: str
    error: float
    elements: int


def check(operation: Operation, contender: type[Contender], problem: Problem) -> Verdict:
    """Run a contender from fresh buffers, twice where it can be, and compare it with the definition.

    Raises: Unavailable as the contender does.
    """
    whole = WHOLE.get(problem.device.type, WHOLE["cpu"])
    if issubclass(contender, Selector):
        return _check_selector(operation, contender, problem)
    if problem.numel > whole and (operation.is_round or contender.method != "paper"):
        problem = Problem(SETS[STAND_IN], problem.device, problem.dtype, problem.seed)
        whole = problem.numel
    tested, phases = operation.prepare(contender, problem)
    windows = _windows(problem.numel, whole)
    before = {name: _cut(buffer, windows) for name, buffer in tested.flat.items()} if len(windows) > 1 else {}
    # a second fusion starts from the theta_0 of the first only where the contender writes it
    runs = 1 if operation.name == "fusion" else 2
    for _ in range(runs):
        run_phases(phases)
    results = {name: _cut(buffer, windows) for name, buffer in tested.sync_state().items() if name.startswith(COMPARED)}
    del tested, phases

    reference = REFERENCES[contender.method]
    if len(windows) > 1:
        problem = Problem(((sum(b - a for a, b in windows),),), problem.device, problem.dtype, problem.seed)
    expected, phases = operation.prepare(reference, problem)
    if len(windows) > 1:
        for name, part in before.items():
            expected.flat[name].copy_(part)
    for _ in range(runs):
        run_phases(phases)
    # masks of scores that differ by rounding may differ in elements that lie on the threshold
    allowed = 2 + round(2 * contender.mask_slack * problem.numel) if operation.is_round else 0
    return _compare(results, expected.sync_state(), TOLERANCE[problem.dtype], allowed, problem.numel)


def _check_selector(operation: Operation, contender: type[Contender], problem: Problem) -> Verdict:
    it, phases = operation.prepare(contender, problem)
    assert isinstance(it, Selector)
    worst = 0
    for _ in range(2):
        run_phases(phases)
        if it.result.isnan():
            return Verdict("the threshold is NaN", float("nan"), problem.numel)
        worst = max(worst, abs(rank_error(it.scores, it.result, DENSITY)))
    wrong = f"the mask is wrong by {worst} elements, {it.slack} are allowed" if worst > it.slack else ""
    return Verdict(wrong, worst, problem.numel)


def _compare(
    results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, allowed: int, elements: int
) -> Verdict:
    wrong, worst = [], 0.0
    compared = [name for name in expected if name in results]
    if not compared:
        return Verdict("no buffer to compare", float("nan"), 0)
    for name in compared:
        x, y = results[name].double(), expected[name].double()
        difference = (x - y).abs()
        floor = FLOOR_MOMENTS if name.startswith("exp_avg") else FLOOR
        # a NaN is no match
        bad = ~(difference <= tolerance * (y.abs() + floor * y.square().mean().sqrt()))
        count = int(bad.sum())
        worst = max(worst, float(difference.norm() / y.norm()))
        if count > allowed:
            i = int(bad.to(torch.int8).argmax())
            wrong.append(f"{name}: {count} elements differ, the first is {x[i]:.6g} and should be {y[i]:.6g}")
    return Verdict("; ".join(wrong), worst, elements)


def _windows(n: int, whole: int) -> list[tuple[int, int]]:
    """All of n elements, or the beginning, the middle and the end."""
    if n <= whole:
        return [(0, n)]
    starts = (0, n // 2 - WINDOW // 2, n - WINDOW)
    return [(start, start + WINDOW) for start in starts]


def _cut(buffer: Tensor, windows: list[tuple[int, int]]) -> Tensor:
    return torch.cat([buffer[a:b] for a, b in windows])
