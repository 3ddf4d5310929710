"""The goals of the kernels, and what of them a run reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.measure import Row

Verdict = Literal["reached", "missed", "not measured here"]


@dataclass(frozen=True)
class Reached:
    """A goal beside a run.

    Args:
        goal: what is wanted.
        value: what the run has, as text; empty when it has nothing.
        verdict: `not measured here` when the run has no row for it, or ran on another device than the goal names.
    """

    goal: str
    value: str
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


LARGE = 64 * 10**6
"""Elements from which on a pass must run at the copy bandwidth."""

BANDWIDTH = 0.9
PASSES = ("importance", "adamw-importance", "fusion")

MICROSECONDS = {"importance": 12.0, "adamw-importance": 25.0, "fusion": 20.0, "round-m1": 130.0}
"""On an H200, T5-large."""

RATIOS = {"per-tensor": 100.0, "flat": 2.5, "compile": 1.7}
"""Time of a round with M=1 over that of the kernels, T5-large, on a GPU; `compile` with a sort for the threshold."""


def goals(rows: Sequence[Row], gpu: str | None) -> list[Reached]:
    """All goals, beside what the rows have. Args: gpu: name of the GPU, None on a CPU."""
    found = [_bandwidth(rows, operation, gpu) for operation in PASSES]
    found += [_time(rows, operation, limit, gpu) for operation, limit in MICROSECONDS.items()]
    return found + [_ratio(rows, contender, factor, gpu) for contender, factor in RATIOS.items()]


def _bandwidth(rows: Sequence[Row], operation: str, gpu: str | None) -> Reached:
    goal = f"{operation}: at least {BANDWIDTH:.0%} of the copy bandwidth from {LARGE // 10**6}M elements on"
    large = [
        row
        for row in _of_kif(rows, operation)
        if row.elements >= LARGE and row.fraction is not None and row.dtype == "fp32"
    ]
    if not large:
        return Reached(goal, "", "not measured here")
    least = min(large, key=lambda row: row.fraction or 0.0)
    value = f"{least.fraction:.0%} ({least.set})"
    return _judge(goal, value, (least.fraction or 0.0) >= BANDWIDTH, gpu is not None)


def _time(rows: Sequence[Row], operation: str, limit: float, gpu: str | None) -> Reached:
    goal = f"{operation}: at most {limit:g} us, T5-large on H200"
    row = _one(rows, operation, "kif")
    if row is None or row.median_us is None:
        return Reached(goal, "", "not measured here")
    on_h200 = gpu is not None and "H200" in gpu
    value = f"{row.median_us:.1f} us" + ("" if on_h200 else f" on {gpu or 'a CPU'}")
    return _judge(goal, value, row.median_us <= limit, on_h200)


def _ratio(rows: Sequence[Row], contender: str, factor: float, gpu: str | None) -> Reached:
    goal = f"round-m1: at least {factor:g} times as fast as {contender}, T5-large on a GPU"
    kif, other = _one(rows, "round-m1", "kif"), _one(rows, "round-m1", contender)
    if kif is None or other is None or not kif.median_us or not other.median_us:
        return Reached(goal, "", "not measured here")
    ratio = other.median_us / kif.median_us
    return _judge(goal, f"{ratio:.2f}" + ("" if gpu else " on a CPU"), ratio >= factor, gpu is not None)


def _judge(goal: str, value: str, reached: bool, here: bool) -> Reached:
    if not here:
        return Reached(goal, value, "not measured here")
    return Reached(goal, value, "reached" if reached else "missed")


def _of_kif(rows: Sequence[Row], operation: str) -> list[Row]:
    return [row for row in rows if row.status == "ok" and row.operation == operation and row.contender == "kif"]


def _one(rows: Sequence[Row], operation: str, contender: str) -> Row | None:
    """The float32 row of an operation on T5-large."""
    for row in rows:
        key = (row.operation, row.contender, row.set, row.dtype, row.status)
        if key == (operation, contender, "t5-large", "fp32", "ok"):
            return row
    return None
