"""Rows of measurements: which cases there are, in which order, within a budget of time; none ever stops the others.

Before a contender is timed it is checked against the definition; one that is wrong is reported and not timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from benchmarks import check
from benchmarks.machine import Machine
from benchmarks.operations import OPERATIONS, Operation
from benchmarks.shapes import SETS
from benchmarks.timing import count_kernels, count_operations, device_times, first_line, graph_times, host_times
from benchmarks.workload import Contender, Phase, Problem, Unavailable, run_phases

Status = Literal["ok", "wrong", "unavailable", "out of memory", "error", "not run"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of weights and gradients, by the name on the command line."""


@dataclass
class Row:
    """One measurement; times in microseconds, for one run of the operation.

    Args:
        operation, contender, set: names (`OPERATIONS`, `CONTENDERS` or `SELECTORS`, `SETS`).
        method: `paper`, or `released` (the authors' variant); times of different methods are different work.
        elements, tensors: size of the set.
        dtype: of weights and gradients; state is float32.
        status: `ok`, or why there are no times; `reason` says more.
        check_error, check_elements: outcome of the check (`check.Verdict`), None when it did not run.
        min_bytes: what the paper's operation must read and write at least.
        bytes: what this contender reads and writes by its formula, where there is one (the kernels).
        passes: selection passes over the scores of one side that a run needed (kernels), part of `bytes`.
        gbps: (bytes, else min_bytes) / median, 1e9 bytes a second. For the others an effective rate: they move more.
        fraction: gbps over the copy bandwidth of the same run.
        launches: kernels, copies and fills on the device; None on a CPU.
        kernels: launches of this project's kernels by name.
        operations, syncs: PyTorch operations that compute, and values read by the host; None under torch.compile.
        median_us, iqr_us, halves_us, repeats: device time (events on a GPU, the clock on a CPU) with its spread;
            halves_us are the medians of the first and of the second half of the repeats.
        event_us: the median again, None on a CPU.
        graph_us: inside a CUDA graph replay, None where `graph_note` says why.
        host_us: to enqueue it; None on a CPU.
        seconds: what the row took, with its check.
        note: backend, a fallback that was taken.
    """

    operation: str
    contender: str
    set: str
    method: str
    elements: int
    tensors: int
    dtype: str
    status: Status = "not run"
    reason: str = ""
    check_error: float | None = None
    check_elements: int | None = None
    min_bytes: int = 0
    bytes: int | None = None
    passes: float | None = None
    gbps: float | None = None
    fraction: float | None = None
    launches: int | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    operations: int | None = None
    syncs: int | None = None
    median_us: float | None = None
    iqr_us: float | None = None
    halves_us: tuple[float, float] | None = None
    repeats: int = 0
    event_us: float | None = None
    graph_us: float | None = None
    graph_note: str = ""
    host_us: float | None = None
    seconds: float = 0.0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """What a row is to measure."""

    operation: Operation
    contender: type[Contender]
    set: str
    dtype: str = "fp32"

    def row(self) -> Row:
        """The row, nothing measured."""
        problem = self.problem(torch.device("cpu"))
        return Row(
            operation=self.operation.name,
            contender=self.contender.name,
            set=self.set,
            method=self.contender.method,
            elements=problem.numel,
            tensors=len(problem.shapes),
            dtype=self.dtype,
            min_bytes=self.operation.min_bytes(problem),
        )

    def problem(self, device: torch.device) -> Problem:
        return Problem(SETS[self.set], device, DTYPES[self.dtype])


def plan(
    sets: Sequence[str],
    operations: Sequence[str],
    contenders: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("fp32",),
) -> list[Case]:
    """All cases, the most telling first: the kernels on every set, what the goals compare them with, the rest.

    Args:
        sets, operations: names; the order of sets is kept.
        contenders: names; None for all.
        dtypes: names; narrow ones take the operations that have weights or gradients of their own.
    """
    cases = []
    for dtype in dtypes:
        for set_index, name in enumerate(sets):
            for operation_index, operation in enumerate(operations):
                for rank, contender in enumerate(OPERATIONS[operation].contenders().values()):
                    if contenders is not None and contender.name not in contenders:
                        continue
                    narrow = dtype != "fp32"
                    if narrow and (operation not in NARROW or DTYPES[dtype] not in contender.dtypes):
                        continue
                    tier = 2 if narrow else min(rank, 1) + (rank > 4)
                    order = (tier, set_index, operation_index, rank)
                    cases.append((order, Case(OPERATIONS[operation], contender, name, dtype)))
    return [case for _, case in sorted(cases, key=lambda pair: pair[0])]


RUNS = 100
"""Runs of a case on a GPU, about: checks, warm-up, and the least repeats of each kind of timing."""

NARROW = ("importance", "adamw-importance")
"""Operations whose weights and gradients may be bf16 or fp16."""


def run(
    cases: Iterable[Case],
    machine: Machine,
    budget: float,
    row_seconds: float = 0.3,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measure the cases in order until `budget` seconds are over; the rest becomes rows with status `not run`.

    A case that would take longer than what is left, by the time it took on a smaller set, is left out too.

    Args:
        cases: what to measure.
        machine: where.
        budget: seconds for everything.
        row_seconds: seconds for each kind of timing of a row.
        report: called with every row when it is done.
    """
    begun = time.perf_counter()
    known: dict[tuple[str, str], list[Row]] = {}
    rows = []
    for case in cases:
        left = budget - (time.perf_counter() - begun)
        row = case.row()
        before = known.setdefault((row.operation, row.contender), [])
        if left <= 0:
            row.reason = "budget"
        elif (expected := _expected_seconds(before, row.elements, machine.cuda)) > left:
            row.reason = f"budget: would take about {expected:.0f} s"
        else:
            row = measure(case, machine, row_seconds)
            before.append(row)
        rows.append(row)
        report(row)
    return rows


def measure(case: Case, machine: Machine, row_seconds: float = 0.3) -> Row:
    """Check and time one case. Whatever goes wrong is in the row."""
    row = case.row()
    begun = time.perf_counter()
    try:
        problem = case.problem(machine.device)
        _check_memory(case, problem, machine)
        verdict = check.check(case.operation, case.contender, problem)
        row.check_error, row.check_elements = verdict.error, verdict.elements
        _release(machine)
        if verdict.problem:
            row.status, row.reason = "wrong", verdict.problem
        else:
            _time(row, describe(row, case, problem, machine), machine, row_seconds)
            row.status = "ok"
    except Unavailable as error:
        row.status, row.reason = "unavailable", str(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        row.status, row.reason = "out of memory", first_line(error)
    except Exception as error:
        row.status, row.reason = "error", first_line(error)
    if row.status != "ok":
        # a traceback keeps the buffers of its frames
        gc.collect()
    _release(machine)
    row.seconds = time.perf_counter() - begun
    return row


def describe(row: Row, case: Case, problem: Problem, machine: Machine) -> list[Phase]:
    """Fill in all that is no time: launches, operations, bytes, notes.

    Returns: the phases, warmed up and ready to be timed.
    Raises: Unavailable as `Operation.prepare`.
    """
    contender, phases = case.operation.prepare(case.contender, problem)
    run_phases(phases)
    row.launches, row.kernels = count_kernels(machine, phases)
    if contender.countable:
        row.operations, row.syncs = count_operations(phases)
    if contender.bytes_known:
        row.passes = contender.count_passes(phases)
        row.bytes = case.operation.kif_bytes(problem, row.passes)
    row.note = contender.note
    if row.syncs:
        row.graph_note = f"no capture: the host reads {row.syncs} values"
    elif contender.rebinds:
        row.graph_note = "no capture: every step binds other tensors"
    return phases


def rate(row: Row, median_us: float, machine: Machine) -> None:
    """Fill in the rates that follow from a time."""
    row.median_us = median_us
    moved = row.min_bytes if row.bytes is None else row.bytes
    if moved:
        row.gbps = moved / median_us / 1e3
        row.fraction = row.gbps / machine.copy_gbps


def _time(row: Row, phases: list[Phase], machine: Machine, seconds: float) -> None:
    times = device_times(machine, phases, seconds)
    rate(row, times.median, machine)
    row.iqr_us, row.halves_us, row.repeats = times.iqr, times.halves, times.repeats
    if not machine.cuda:
        return
    row.event_us = times.median
    row.host_us = host_times(machine, phases, seconds / 3).median
    if not row.graph_note:
        in_graph, row.graph_note = graph_times(machine, phases, seconds)
        row.graph_us = in_graph.median if in_graph else None


def _expected_seconds(before: Sequence[Row], elements: int, cuda: bool) -> float:
    """By the largest set that was measured already; 0 when there is none.

    On a GPU most of that time went into compiling and is not spent again; what grows are the runs.
    """
    timed = [row for row in before if row.status == "ok" and row.elements <= elements]
    if not timed:
        return 0.0
    largest = max(timed, key=lambda row: row.elements)
    growth = elements / largest.elements
    if not cuda:
        return largest.seconds * growth
    return RUNS * growth * (largest.graph_us or largest.median_us or 0.0) * 1e-6


def _check_memory(case: Case, problem: Problem, machine: Machine) -> None:
    """On a CPU too much memory ends the process, so it is not tried. Raises: MemoryError."""
    if machine.cuda:
        return
    buffers = len(case.operation.buffers(case.contender.method)) + problem.gradients
    # the check holds a second contender, and each has temporaries
    need = 4 * problem.numel * (2 * buffers + 4)
    free = machine.memory_free()
    if need > 0.8 * free:
        raise MemoryError(f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free")


def _release(machine: Machine) -> None:
    """Give memory back that nothing holds any more."""
    if machine.cuda:
        torch.cuda.empty_cache()
