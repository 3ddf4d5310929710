"""What the microbenchmarks do on a GPU, with stand-ins for events and graphs: what is timed, and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from benchmarks import check, machine, measure, timing
from benchmarks.baselines import CONTENDERS, Flat
from benchmarks.machine import Machine
from benchmarks.measure import Case
from benchmarks.operations import OPERATIONS
from benchmarks.workload import Phase, Problem


class Event:
    """Stand-in for a CUDA event: the time between two is the work done in between."""

    work = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.work

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class Graph:
    """Stand-in for a CUDA graph: replays the work that was captured."""

    def __init__(self) -> None:
        self.work = 0.0

    def replay(self) -> None:
        Event.work += self.work


@contextmanager
def capture(graph: Graph) -> Iterator[None]:
    before = Event.work
    yield
    graph.work, Event.work = Event.work - before, before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that goes through the steps of a GPU; a flush is 7 ms of work."""
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**20)
    it = Machine("cpu")
    it.cuda, it.flush_us = True, 100.0
    monkeypatch.setattr(it, "synchronize", lambda: None)
    monkeypatch.setattr(it, "flush", lambda: work(7.0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return it


def work(milliseconds: float) -> None:
    Event.work += milliseconds


PHASES = [
    Phase("untimed", partial(work, 50.0), timed=False),
    Phase("first", partial(work, 2.0)),
    Phase("second", partial(work, 3.0)),
]


def test_only_timed_phases_count_on_a_gpu(gpu: Machine) -> None:
    assert timing.device_times(gpu, PHASES, 0.001).median == pytest.approx(5000)
    in_graph, reason = timing.graph_times(gpu, PHASES, 0.001)
    assert reason == "" and in_graph is not None
    assert in_graph.median == pytest.approx(5000) and in_graph.halves == (pytest.approx(5000),) * 2
    assert 0 < timing.host_times(gpu, PHASES, 0.001).median < 5000


def test_the_clock_gives_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = [Phase("timed", lambda: None), Phase("untimed", lambda: None, timed=False)]
    monkeypatch.setattr(timing.time, "perf_counter", iter([1.0, 1.25, 2.0]).__next__)
    assert timing._clocked(phases) == 250_000


def test_a_capture_that_fails_gives_its_reason(gpu: Machine) -> None:
    def refuse() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    in_graph, reason = timing.graph_times(gpu, [Phase("refuses", refuse)], 0.001)
    assert in_graph is None and reason.endswith("RuntimeError: operation not permitted when stream is capturing")


def test_rows_of_a_gpu_have_all_columns(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_profiled", lambda machine, phases: 4 * len(phases))
    monkeypatch.setattr(timing, "_profiler_counts", lambda machine: True)
    for name in ("flat", "released"):
        monkeypatch.setattr(CONTENDERS[name], "finish", lambda contender: work(1.0))
    monkeypatch.setattr(check, "check", lambda *args: check.Verdict("", 0.0, 1))
    row = measure.measure(Case(OPERATIONS["round-m1"], Flat, "tiny"), gpu, 0.001)
    assert row.status == "ok", row.reason
    assert row.event_us == row.median_us == pytest.approx(1000) and row.graph_us == pytest.approx(1000)
    # snapshots, scores and the finish; not the backward passes and the optimizer
    assert row.launches == 4 * (2 + 9 + 1) and row.host_us is not None and row.host_us > 0
    row = measure.measure(Case(OPERATIONS["round-m1"], CONTENDERS["released"], "tiny"), gpu, 0.001)
    assert row.status == "ok", row.reason
    assert row.graph_us is None and row.graph_note == f"no capture: the host reads {9 * row.tensors} values"
    monkeypatch.setattr(CONTENDERS["released"], "fusion", lambda contender, *thresholds: work(1.0))
    row = measure.measure(Case(OPERATIONS["fusion"], CONTENDERS["released"], "tiny"), gpu, 0.001)
    assert row.status == "ok", row.reason
    assert row.graph_us is None and row.graph_note == "no capture: every step binds other tensors"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_profiler_that_cannot_count_gives_no_number(gpu: Machine) -> None:
    """As on this CPU, where it sees no launch at all."""
    timing._profiler_counts.cache_clear()
    _, phases = OPERATIONS["importance"].prepare(Flat, Problem(((3, 5),)))
    assert timing.count_kernels(gpu, phases) == (None, {})
