"""A whole round of bookkeeping on the CPU: the arena path against per-tensor PyTorch and the authors' release.

    OMP_NUM_THREADS=1 python -m benchmarks.cpu_round --json benchmarks/results/cpu-round.json

A round is Q = 8 inner and 1 outer importance updates, the snapshots, two thresholds at density 0.2 and the fusion; with
--with-adamw also clipping and AdamW. All contenders work in one process and take turns, so that what disturbs the
machine disturbs all alike; before each timed round the others have used the cache. Ratios are of medians; beside them
stand the ratio of the fastest rounds, and the smallest and the largest ratio of a turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import environment, write_json
from benchmarks.operations import INNER_STEPS, OPERATIONS
from benchmarks.shapes import SETS
from benchmarks.workload import DENSITY, Contender, Phase, Problem

ARENA = "kif"
"""The arena path: what the times of the others are divided by."""

ARENAS = {"paper": ARENA, "released": "kif-released"}
"""By method, whose weights the others should end with."""

DEFAULT = (ARENA, "per-tensor", "per-tensor-kthvalue", "released", "kif-released", "flat")

GOALS = {"per-tensor": 12.0, "per-tensor-kthvalue": 4.0}
"""Ratios that the arena path is to reach without AdamW."""


def measure(names: Sequence[str], problem: Problem, adamw: bool, turns: int) -> dict[str, Any]:
    """Times of every contender over `turns` rounds, and how far their results lie apart.

    Returns: `contenders` by name: milliseconds of each round with median and quartiles, and `differing`, the number
    of weights that differ after the last round from those of the arena path with the same method (None for that one
    itself, or where it takes no part); `ratios` by name: time of the contender over that of the arena path.
    Raises: KeyError for a contender that there is not; `benchmarks.workload.Unavailable` for one that cannot run.
    """
    operation = OPERATIONS["round-m1-adamw" if adamw else "round-m1"]
    prepared = {name: operation.prepare(operation.contenders()[name], problem) for name in names}
    for _, phases in prepared.values():
        clocked(phases)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(turns):
        for name, (_, phases) in prepared.items():
            times[name].append(clocked(phases))
    contenders = {
        name: {
            "about": contender.about,
            "method": contender.method,
            "note": contender.note,
            **_spread(times[name]),
            "differing": _differing(contender, prepared),
            "ms": times[name],
        }
        for name, (contender, _) in prepared.items()
    }
    ratios = {name: _ratio(times[name], times[ARENA]) for name in names if name != ARENA and ARENA in names}
    return {"contenders": contenders, "ratios": ratios}


def clocked(phases: Sequence[Phase]) -> float:
    """Milliseconds that the timed phases take, run in order with the others between them."""
    total = 0.0
    for phase in phases:
        begun = time.perf_counter()
        phase.run()
        total += (time.perf_counter() - begun) * phase.timed
    return total * 1e3


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    heads = (("median ms", 10), ("quartiles", 16), ("fastest", 9), ("ratio", 8), ("fastest", 9), ("smallest", 10))
    lines = ["contender".ljust(22) + "".join(f"{head:>{n}}" for head, n in (*heads, ("largest", 9), ("goal", 6)))]
    for name, row in result["contenders"].items():
        line = f"{name:22}{row['median']:10.2f}{row['low']:8.2f}{row['high']:8.2f}{row['fastest']:9.2f}"
        if name in result["ratios"]:
            ratio = result["ratios"][name]
            line += f"{ratio['median']:8.1f}{ratio['fastest']:9.1f}{ratio['smallest']:10.1f}{ratio['largest']:9.1f}"
            line += f"{ratio['goal']:6.0f}" if ratio["goal"] else ""
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when a goal is missed and --check asks for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=sorted(SETS), default="t5-large", help="set of tensors")
    parser.add_argument("--contenders", nargs="+", choices=sorted(OPERATIONS["round-m1"].contenders()), default=DEFAULT)
    parser.add_argument("--turns", type=int, default=15, help="timed rounds of each contender, after one untimed")
    parser.add_argument("--with-adamw", action="store_true", help="clipping and AdamW inside the round")
    parser.add_argument(
        "--check", type=float, nargs="?", const=1.0, metavar="SHARE",
        help="exit with 1 when a ratio is below this share of its goal (default: 1)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    options = parser.parse_args(arguments)
    problem = Problem(SETS[options.shapes])
    load = _load()
    result = measure(options.contenders, problem, options.with_adamw, options.turns)
    for name, ratio in result["ratios"].items():
        ratio["goal"] = None if options.with_adamw else GOALS.get(name)
    document = {
        "round": {
            "shapes": options.shapes,
            "elements": problem.numel,
            "tensors": len(problem.shapes),
            "inner_steps": INNER_STEPS,
            "outer_steps": 1,
            "density": DENSITY,
            "adamw": options.with_adamw,
            "turns": options.turns,
        },
        "environment": {**environment(torch.device("cpu")), "numpy": _numpy_version(), "load_before": load},
        **result,
    }
    print(f"{len(problem.shapes)} tensors, {problem.numel:,} elements, {torch.get_num_threads()} threads, load {load}")
    print(table(result))
    if options.json:
        write_json(options.json, document)
    share = options.check or 1.0
    missed = [n for n, ratio in result["ratios"].items() if ratio["goal"] and ratio["median"] < share * ratio["goal"]]
    if missed:
        print(f"below {share:g} of its goal: {', '.join(missed)}")
    return 1 if missed and options.check else 0


def _differing(contender: Contender, prepared: dict[str, tuple[Contender, list[Phase]]]) -> int | None:
    arena = prepared.get(ARENAS[contender.method], (contender, []))[0]
    if arena is contender:
        return None
    theirs, ours = contender.sync_state()["weight"], arena.sync_state()["weight"]
    return int((~torch.isclose(theirs, ours, rtol=1e-4, atol=1e-6)).sum())


def _spread(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median": median, "low": low, "high": high, "fastest": min(times)}


def _ratio(theirs: list[float], ours: list[float]) -> dict[str, Any]:
    turns = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {
        "median": statistics.median(theirs) / statistics.median(ours),
        "fastest": min(theirs) / min(ours),
        "smallest": min(turns),
        "largest": max(turns),
        "goal": None,
    }


def _load() -> list[float]:
    """Load average of the last 1, 5 and 15 minutes, where the system knows it."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []


def _numpy_version() -> str | None:
    try:
        import numpy
    except ImportError:
        return None
    return numpy.__version__


if __name__ == "__main__":
    raise SystemExit(main())
