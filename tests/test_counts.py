"""Launches and host syncs of a round: the budget, the record, and that additions are seen."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_process import IMPORTS, ROOT
from torch import Tensor

from benchmarks.contract import check
from benchmarks.contract.counts import INNER_STEPS, SHAPES, Counts, counting, new_engine, round_of
from kif.config import KIFConfig
from kif.engine import RecurrentKIF

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
CONFIG = KIFConfig(inner_steps=2, outer_steps=1)


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return check.measure(module="counts", environment=check.INTERPRET)


@needs_triton
@pytest.mark.parametrize("outer_steps", [1, 4])
def test_a_round_launches_what_its_budget_says_and_nothing_else(counted: dict[str, Any], outer_steps: int) -> None:
    row, steps = counted["engine"][f"paper, M={outer_steps}"], INNER_STEPS + outer_steps
    assert row["kernels"] == {
        "square_sum_kernel": steps,
        "gradient_state_kernel": steps,
        "adamw_kernel": steps,
        "refine_kernel": 4,
        "select_kernel": 1,
        "fuse_kernel": 1,
    }
    assert row["operations"] == {} and row["syncs"] == {}
    assert row["launches"] == 3 * steps + 6 and row["host syncs"] == 0


@needs_triton
def test_no_round_waits_for_the_host(counted: dict[str, Any]) -> None:
    broken = check.broken_count_rules(counted)
    assert not broken, "\n".join(broken)


@needs_triton
def test_no_launch_and_no_sync_was_added(counted: dict[str, Any]) -> None:
    recorded = check.load(check.COUNTS)
    assert recorded is not None, f"to record it: {check.ACCEPT}"
    worse, _ = check.count_changes(recorded, counted)
    assert not worse, "\n".join([*worse, f"if that is justified: {check.ACCEPT}"])


@needs_triton
def test_thresholds_of_any_kind_do_not_wait_for_the_host() -> None:
    code = """
import torch
import kif_kernels as kk
from benchmarks.contract.counts import Counts, counting
from kernel_tests.interpreter import correct_interpreter

correct_interpreter()
x, density = torch.rand(96), torch.tensor(0.2)
segments = kk.Segments.of([(0, 40), (48, 48)])
calls = {
    "number": lambda: kk.importance_threshold(x, 0.2),
    "tensor": lambda: kk.importance_threshold(x, density, exact=False),
    "segments": lambda: kk.importance_thresholds(x, 0.2, segments),
    "segments, tensor": lambda: kk.importance_thresholds(x, density, segments, exact=False),
    "quantile": lambda: kk.importance_quantile(x, 0.2),
}
for name, call in calls.items():
    call()  # what is kept of segments is copied once
    counts = Counts()
    with counting(counts):
        call()
    assert counts.kernels and not counts.syncs, (name, counts)
"""
    environment = os.environ | check.INTERPRET | {"KIF_BACKEND": "interpret", "PYTHONPATH": IMPORTS}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_recorded_comparison_is_of_the_same_round() -> None:
    recorded = check.load(check.COUNTS)
    assert recorded is not None
    for m in (1, 4):
        ours, plain = recorded["engine"][f"paper, M={m}"], recorded["comparison"][f"per-tensor, M={m}"]
        # at least a product, its size and an update a tensor and step
        assert plain["launches"] > 10 * len(SHAPES) * (INNER_STEPS + m) and ours["launches"] < plain["launches"] / 1000


class Careless(RecurrentKIF):
    """Reads a value back in every inner step."""

    def inner_step(self, lr: float) -> None:
        super().inner_step(lr)
        assert self.arena.data.sum().item() != 0


class Copying(RecurrentKIF):
    """Copies a buffer once a round."""

    def fuse(self) -> None:
        self.arena.buffer("theta_inner").copy_(self.arena.data)
        super().fuse()


@pytest.fixture
def on_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIF_BACKEND", "reference")


def compared(kind: type[RecurrentKIF]) -> tuple[list[str], list[str]]:
    before, after = (round_of(new_engine(CONFIG, k), 1).summary() for k in (RecurrentKIF, kind))
    return check.count_changes({"engine": {"round": before}}, {"engine": {"round": after}})


def test_an_added_sync_is_seen(on_definitions: None) -> None:
    worse, better = compared(Careless)
    assert better == []
    assert "round · syncs: _local_scalar_dense: recorded 0 -> now 2" in worse
    before = round_of(new_engine(CONFIG), 1).summary()["host syncs"]
    assert f"round · host syncs: recorded {before} -> now {before + 2}" in worse
    measured = {"engine": {"paper, M=1": round_of(new_engine(CONFIG, Careless), 1).summary()}}
    assert len(check.broken_count_rules(measured)) == 1


def test_an_added_launch_is_seen(on_definitions: None) -> None:
    worse, better = compared(Copying)
    assert better == []
    assert [line.split(": ")[0] for line in worse] == ["round · launches", "round · operations"]
    assert worse[1].startswith("round · operations: copy_: recorded ")


def test_a_launch_less_is_no_failure(on_definitions: None) -> None:
    summary = round_of(new_engine(CONFIG), 1).summary()
    fewer = copy.deepcopy(summary)
    fewer["launches"] -= 1
    worse, better = check.count_changes({"engine": {"round": summary}}, {"engine": {"round": fewer}})
    assert worse == [] and better == [
        f"round · launches: recorded {summary['launches']} -> now {summary['launches'] - 1}"
    ]


def test_counts_do_not_depend_on_the_run(on_definitions: None) -> None:
    first, second = (round_of(new_engine(CONFIG), rounds).summary() for rounds in (2, 3))
    assert first == second


@pytest.mark.parametrize(
    ("reading", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool(x.any()), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.equal(x, x + 1), "equal"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: torch.tensor([1.0, 2.0]), "lift_fresh"),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2, 3])), "repeat_interleave"),
        (lambda x: x.unique(), "_unique2"),
    ],
)
def test_what_a_sync_is(on_definitions: None, reading: Any, name: str) -> None:
    x, counts = torch.tensor([1.0, 2.0, 3.0]), Counts()
    with counting(counts):
        reading(x)
    assert counts.syncs[name] == 1


@pytest.mark.parametrize(
    ("operation", "launches"),
    [
        (lambda x: x.view(3, 1)[1:].t(), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x + 1, 1),
        (lambda x: x.mul_(2).add_(1), 2),
        (lambda x: torch.zeros_like(x), 1),
        (lambda x: x[torch.arange(2)], 2),
        (lambda x: (x * x).sum().sqrt(), 3),
        (lambda x: x.__setitem__(slice(1), 5.0), 1),
        (lambda x: x.__setitem__(slice(1), torch.zeros(1)), 2),
    ],
)
def test_what_a_launch_is(on_definitions: None, operation: Any, launches: int) -> None:
    x, counts = torch.ones(3), Counts()
    with counting(counts):
        operation(x)
    assert counts.summary()["launches"] == launches and counts.summary()["host syncs"] == 0


def test_operations_inside_ours_are_seen(on_definitions: None) -> None:
    importance: Tensor = torch.zeros(64)
    counts = Counts()
    with counting(counts):
        torch.ops.kif.importance_ema_(
            importance, torch.ones(64), torch.ones(64), 0.5, True, None, 0.0, None, None, None
        )
    assert counts.operations["abs"] == 1 and importance.eq(0.5).all()
    assert not any(name.startswith("importance") for name in counts.operations)
