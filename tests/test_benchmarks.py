"""The contenders of the microbenchmarks at tiny size on the CPU: every one right, wrong ones caught."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import check, machine, measure, quantiles
from benchmarks.baselines import CONTENDERS, Flat, PerTensor
from benchmarks.machine import Machine
from benchmarks.measure import Case
from benchmarks.operations import OPERATIONS
from benchmarks.shapes import MODEL_SETS, SETS, elements
from benchmarks.timing import count_operations
from benchmarks.workload import DENSITY, Contender, Problem, Unavailable, run_phases

ROOT = Path(__file__).parents[1]
TINY = SETS["tiny"]
SLOW_TO_BUILD = ("compile", "cupy.partition")
"""Not run here: needs a C++ compiler and seconds for each variant; needs a GPU."""

EVERY = [
    pytest.param(operation, contender, id=f"{operation.name}-{name}")
    for operation in OPERATIONS.values()
    for name, contender in operation.contenders().items()
    if name not in SLOW_TO_BUILD
]


@pytest.fixture(scope="module")
def cpu() -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(machine.COPY_BYTES, "cpu", 2**20)
        yield Machine("cpu")


@pytest.mark.parametrize(
    ("name", "tensors", "count"),
    [
        ("t5-large", 288, 2_359_296),
        ("llama2-7b", 128, 4_194_304),
        ("llama2-13b", 160, 6_553_600),
        ("llama2-7b-all", 448, 39_976_960),
        ("256M", 1, 2**28),
        ("1B", 1, 2**30),
    ],
)
def test_sets_have_the_sizes_of_the_real_adapters(name: str, tensors: int, count: int) -> None:
    assert (len(SETS[name]), elements(SETS[name])) == (tensors, count)
    assert name in MODEL_SETS or tensors == 1


def test_data_are_the_same_for_all_and_never_zero() -> None:
    for name in ("weight", "grad", "grad0", "exp_avg_in", "exp_avg_sq_in", "importance_in", "uncertainty_out"):
        x = Problem(TINY).buffer(name)
        assert torch.equal(x, Problem(TINY).buffer(name)) and bool((x != 0).all())
        assert not torch.equal(x, Problem(TINY, seed=1).buffer(name))
    assert not torch.equal(Problem(TINY).buffer("grad0"), Problem(TINY).buffer("grad1"))


@pytest.mark.parametrize(("operation", "contender"), EVERY)
def test_every_contender_has_the_definition_s_result(operation: Any, contender: type[Contender]) -> None:
    try:
        verdict = check.check(operation, contender, Problem(TINY))
    except Unavailable as error:
        assert contender.name == "kif-counted" and "counts nothing" in str(error)
        return
    assert verdict.problem == "" and verdict.error < 1e-5 and verdict.elements == elements(TINY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["importance", "adamw-importance"])
def test_narrow_weights_are_right_too(name: str, dtype: torch.dtype) -> None:
    verdict = check.check(OPERATIONS[name], CONTENDERS["kif"], Problem(TINY, dtype=dtype))
    assert verdict.problem == ""


def test_masks_of_a_round_are_equal() -> None:
    masks = {}
    for name, contender in CONTENDERS.items():
        if contender.method == "paper" and name not in SLOW_TO_BUILD:
            it, phases = OPERATIONS["round-m4"].prepare(contender, Problem(TINY))
            run_phases(phases[:-1])
            deltas = it.thresholds()
            scores = (it.flat["importance_in"], it.flat["importance_out"])
            masks[name] = torch.stack([score >= delta for score, delta in zip(scores, deltas, strict=True)])
    for name, mask in masks.items():
        assert torch.equal(mask, masks["reference"]), name
        assert mask.sum(1).tolist() == [196, 196]  # ceil(0.2 * 978)


@pytest.mark.parametrize("name", ["round-m1", "round-m4-adamw"])
def test_the_release_s_sequence_does_the_release_s_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor-by-tensor sequence against the flat definitions with the release's switches: written twice."""
    monkeypatch.setenv("KIF_BACKEND", "reference")
    results = []
    for contender in ("released", "kif-released"):
        it, phases = OPERATIONS[name].prepare(CONTENDERS[contender], Problem(TINY))
        run_phases(phases)
        results.append(it.sync_state())
    for buffer in ("weight", "importance_in", "importance_out", "uncertainty_in", "uncertainty_out"):
        torch.testing.assert_close(results[0][buffer], results[1][buffer], rtol=1e-4, atol=1e-7)


def test_the_release_s_sequence_has_the_release_s_counts() -> None:
    """For T5-large, 288 tensors, this makes 50,142 operations and 3,456 syncs; about as many were counted there."""
    _, phases = OPERATIONS["round-m4"].prepare(CONTENDERS["released"], Problem(TINY))
    run_phases(phases)
    operations, syncs = count_operations(phases)
    whole = operations - len(TINY) * (12 * 12 + 30)
    assert syncs == len(TINY) * 12
    assert 2 <= whole <= 60  # torch.cat and torch.quantile, of either side
    assert abs(288 * (12 * 12 + 30) + whole - 50_140) < 50


def test_flat_contenders_take_few_operations() -> None:
    counts = {}
    for name in ("per-tensor", "foreach", "flat", "kif"):
        _, phases = OPERATIONS["importance"].prepare(CONTENDERS[name], Problem(TINY))
        counts[name] = count_operations(phases)
    assert counts == {"per-tensor": (5 * len(TINY), 0), "foreach": (3, 0), "flat": (3, 0), "kif": (1, 0)}


def test_bytes_follow_the_formulas() -> None:
    problem, n = Problem(TINY), elements(TINY)
    per_element = {name: operation.min_bytes(problem) / n for name, operation in OPERATIONS.items()}
    assert per_element["importance"] == 16 and per_element["adamw-importance"] == 36
    assert per_element["fusion"] == 28 and per_element["threshold"] == 4
    assert per_element["round-m1"] == 9 * 16 - 4 + 8 + 28
    assert per_element["round-m4-adamw"] == 12 * (36 + 4) - 4 + 4 + 28
    assert OPERATIONS["adamw-importance"].min_bytes(Problem(TINY, dtype=torch.bfloat16)) == n * (3 * 2 + 6 * 4)
    # the kernels zero the gradient in the step, and read the scores again where a pass was needed
    assert OPERATIONS["round-m1-adamw"].kif_bytes(problem, 3) == n * (per_element["round-m1-adamw"] + 9 * 4 + 3 * 4)
    assert OPERATIONS["threshold"].kif_bytes(problem, 2) == 8 * n


class WrongFusion(Flat):
    name = "wrong"

    def fusion(self, threshold_in: Tensor, threshold_out: Tensor) -> None:
        super().fusion(threshold_out * 2, threshold_in)


class StaleTail(Flat):
    name = "stale tail"

    def importance(self, side: Any = "in", reset: bool = False, last: bool = False) -> None:
        tail = self.flat[f"importance_{side}"][-3:].clone()
        super().importance(side, reset, last)
        self.flat[f"importance_{side}"][-3:] = tail


class NotANumber(Flat):
    name = "not a number"

    def importance(self, side: Any = "in", reset: bool = False, last: bool = False) -> None:
        super().importance(side, reset, last)
        self.flat[f"importance_{side}"][0] = torch.nan


class Raises(Flat):
    name = "raises"

    def importance(self, side: Any = "in", reset: bool = False, last: bool = False) -> None:
        raise ValueError("no such thing")


class Large(Flat):
    name = "large"

    def importance(self, side: Any = "in", reset: bool = False, last: bool = False) -> None:
        raise torch.OutOfMemoryError("of memory, there is none")


class Absent(Flat):
    name = "absent"

    def setup(self) -> None:
        raise Unavailable("it is not here")


@pytest.mark.parametrize(
    ("operation", "contender", "status", "reason"),
    [
        ("fusion", WrongFusion, "wrong", "weight: "),
        ("round-m1", WrongFusion, "wrong", "weight: "),
        ("importance", StaleTail, "wrong", "importance_in: 3 elements differ"),
        ("importance", NotANumber, "wrong", "importance_in: 1 elements differ"),
        ("importance", Raises, "error", "ValueError: no such thing"),
        ("importance", Large, "out of memory", "there is none"),
        ("importance", Absent, "unavailable", "it is not here"),
    ],
)
def test_what_fails_is_reported_and_not_timed(
    operation: str,
    contender: type[Contender],
    status: str,
    reason: str,
    cpu: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("timed")

    monkeypatch.setattr(measure, "device_times", never)
    cases = [Case(OPERATIONS[operation], contender, "tiny")]
    (row,) = measure.run(cases, cpu, budget=100)
    assert row.status == status and reason in row.reason
    assert row.median_us is None and row.gbps is None and row.launches is None


def test_the_time_that_a_larger_set_would_take() -> None:
    row = Case(OPERATIONS["fusion"], CONTENDERS["kif"], "t5-large").row()
    row.seconds, row.median_us, row.graph_us = 8.0, 90.0, 24.0
    expected = measure._expected_seconds
    # it was not measured
    assert expected([row], 10 * row.elements, False) == 0.0
    row.status = "ok"
    assert expected([row], 10 * row.elements, False) == pytest.approx(80.0)
    # on a GPU compiling took most of it
    assert expected([row], 10 * row.elements, True) == pytest.approx(measure.RUNS * 240e-6)
    row.graph_us = None
    assert expected([row], 10 * row.elements, True) == pytest.approx(measure.RUNS * 900e-6)
    assert expected([row], row.elements - 1, True) == 0.0


def test_one_that_selects_wrongly_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = OPERATIONS["threshold"]
    monkeypatch.setattr(quantiles, "by_sort", lambda scores, density: scores.sort().values[3])
    assert "wrong by" in check.check(operation, quantiles.TorchSort, Problem(TINY)).problem
    monkeypatch.setattr(quantiles, "by_sort", lambda scores, density: scores.sum() * torch.nan)
    assert "NaN" in check.check(operation, quantiles.TorchSort, Problem(TINY)).problem


def test_large_buffers_are_checked_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check.WHOLE, "cpu", 300)
    monkeypatch.setattr(check, "WINDOW", 100)
    monkeypatch.setattr(check, "STAND_IN", "tiny")
    for name in ("importance", "adamw-importance", "fusion"):
        assert check.check(OPERATIONS[name], CONTENDERS["kif"], Problem(TINY)) == ("", pytest.approx(0, abs=1e-6), 300)
    assert "3 elements differ" in check.check(OPERATIONS["importance"], StaleTail, Problem(TINY)).problem
    assert check.check(OPERATIONS["round-m1"], CONTENDERS["kif"], Problem(TINY)).elements == elements(TINY)


def test_rank_error_counts_by_definition() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0])
    found = [quantiles.rank_error(scores, torch.tensor(delta), DENSITY) for delta in (4.5, 4.0, 3.0, 3.5, 1.0)]
    assert found == [-1, 0, 1, 0, 6]
    assert quantiles.rank_error(scores, torch.tensor(1.0), 0.6) == 0


def test_quantile_falls_back_where_torch_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Problem(TINY).buffer("importance_in")
    expected, note = quantiles.interpolated_quantile(scores, DENSITY)
    assert note == "" and expected == torch.quantile(scores, 1 - DENSITY)

    def refuse(*args: Any) -> Tensor:
        raise RuntimeError("quantile() input tensor is too large")

    monkeypatch.setattr(torch, "quantile", refuse)
    delta, note = quantiles.interpolated_quantile(scores, DENSITY)
    torch.testing.assert_close(delta, expected)
    assert "refuses" in note
    it, phases = OPERATIONS["round-m1"].prepare(PerTensor, Problem(TINY))
    run_phases(phases)
    assert "refuses" in it.note
