"""Timing of phases: by events, inside a CUDA graph, on the host; and what is launched on the way.

On a GPU everything is timed with a cold L2: a buffer larger than it is written before every timed phase. While the
device writes it, the host enqueues, so that event times are the device's own as long as the host needs less than
`HIDDEN_US`; beyond that (a loop over hundreds of tensors) they show the wait for the host, as a training loop would.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import Machine
from benchmarks.workload import Phase, run_phases

HIDDEN_US = 300.0
"""Host time of a phase up to which it is hidden behind flushes."""

WARM_UP = 3
MIN_REPEATS, MAX_REPEATS = 6, 200
SLOW_SECONDS = 0.2
"""Runs that take longer are repeated half of `MIN_REPEATS` times."""


class Times(NamedTuple):
    """Microseconds: median, distance between the quartiles, medians of the first and the second half, repeats."""

    median: float
    iqr: float
    halves: tuple[float, float]
    repeats: int


def summary(times: Sequence[float]) -> Times:
    """Median and spread of at least two times."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    half = len(times) // 2
    halves = (statistics.median(times[:half]), statistics.median(times[half:]))
    return Times(statistics.median(times), high - low, halves, len(times))


def device_run(machine: Machine, phases: Sequence[Phase]) -> Callable[[], float]:
    """Runs the phases when called; returns microseconds of the timed ones: by events on a GPU, else by the clock."""
    if not machine.cuda:
        return partial(_clocked, phases)
    host = host_times(machine, phases, 0.0)
    each = host.median / max(1, sum(phase.timed for phase in phases))
    # twice: enqueueing them takes the host time too, and it does not always need the same
    flushes = max(1, math.ceil(2.0 * min(each, HIDDEN_US) / max(machine.flush_us, 1.0)))
    pairs = [(_event(), _event()) for phase in phases if phase.timed]

    def once() -> float:
        free = iter(pairs)
        for phase in phases:
            if not phase.timed:
                phase.run()
                continue
            start, end = next(free)
            for _ in range(flushes):
                machine.flush()
            start.record()
            phase.run()
            end.record()
        machine.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) * 1e3

    return once


def device_times(machine: Machine, phases: Sequence[Phase], seconds: float) -> Times:
    """Repeated `device_run`s."""
    return summary(_repeat(device_run(machine, phases), seconds))


def host_times(machine: Machine, phases: Sequence[Phase], seconds: float) -> Times:
    """How long the host needs to enqueue the timed phases, without waiting for the device."""

    def once() -> float:
        machine.synchronize()
        return _clocked(phases)

    return summary(_repeat(once, seconds))


def graph_times(machine: Machine, phases: Sequence[Phase], seconds: float) -> tuple[Times | None, str]:
    """Inside a CUDA graph replay: a graph of flushes and all phases, less one without the timed phases.

    Returns: the times, or None and why there are none.
    """
    if not machine.cuda:
        return None, "no CUDA"

    def everything() -> None:
        for phase in phases:
            if phase.timed:
                machine.flush()
            phase.run()

    def rest() -> None:
        for phase in phases:
            (machine.flush if phase.timed else phase.run)()

    graphs = []
    try:
        for body in (everything, rest):
            machine.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                body()
            graphs.append(graph)
    except Exception as error:
        machine.synchronize()
        return None, f"no capture: {first_line(error)}"
    start, end = _event(), _event()

    def replay(graph: Any) -> float:
        start.record()
        graph.replay()
        end.record()
        machine.synchronize()
        return start.elapsed_time(end) * 1e3

    offset = statistics.median(_repeat(lambda: replay(graphs[1]), seconds))
    whole = summary(_repeat(lambda: replay(graphs[0]), seconds))
    halves = (whole.halves[0] - offset, whole.halves[1] - offset)
    return Times(whole.median - offset, whole.iqr, halves, whole.repeats), ""


class Operations(TorchDispatchMode):
    """Counts the PyTorch operations that compute something (views and allocations do not), and host syncs."""

    FREE = ("empty", "detach", "alias", "_unsafe_view", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero"):
            self.syncs += 1
        elif not (func.is_view or name.startswith(self.FREE)):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_operations(phases: Sequence[Phase]) -> tuple[int, int]:
    """PyTorch operations that compute, and reads of a value by the host, in the timed phases of one run."""
    operations = syncs = 0
    for phase in phases:
        with Operations() as counter:
            phase.run()
        if phase.timed:
            operations += counter.counts.total()
            syncs += counter.syncs
    return operations, syncs


def count_kernels(machine: Machine, phases: Sequence[Phase]) -> tuple[int | None, dict[str, int]]:
    """Launches of the timed phases of one run, and those among them that this project's kernels made, by name.

    On a GPU by the profiler (kernels, copies and fills), None where it does not count right; on a CPU only the
    project's own are known, and only where Triton's interpreter runs them: else the number is None.
    """
    own: Counter[str] = Counter()
    for phase in phases:
        with _own_launches() as counts:
            phase.run()
        if phase.timed:
            own.update(counts)
    if machine.cuda:
        if not _profiler_counts(machine):
            return None, dict(own)
        untimed = [phase for phase in phases if not phase.timed]
        launches = _profiled(machine, phases) - (_profiled(machine, untimed) if untimed else 0)
        return launches, dict(own)
    return own.total() or None, dict(own)


def first_line(error: BaseException) -> str:
    """Type and message of an error, short enough for a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _own_launches() -> AbstractContextManager[Counter[str]]:
    """Counts this project's kernels; without triton there are none."""
    try:
        from kif_kernels.kernels.launch import count_launches
    except ImportError:
        return nullcontext(Counter())
    return count_launches()


def _profiled(machine: Machine, phases: Sequence[Phase]) -> int:
    """Kernels, copies and fills that the device ran."""
    machine.synchronize()
    # without CPU events: they cost time, and their ranges would appear on the device once more
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_phases(phases)
        machine.synchronize()
    device = torch.autograd.DeviceType.CUDA
    others = ("Sync", "Activity Buffer")
    return sum(event.device_type == device and not any(o in event.name for o in others) for event in profile.events())


@cache
def _profiler_counts(machine: Machine) -> bool:
    """Whether the profiler sees one launch as one."""
    x = torch.ones(1, device=machine.device)
    launch = Phase("launch", partial(x.add_, 1.0))
    try:
        return _profiled(machine, [launch]) == 1 and _profiled(machine, [launch] * 3) == 3
    except Exception:  # it counts, or it is not used: how it fails differs by version and machine
        return False


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _clocked(phases: Sequence[Phase]) -> float:
    """Microseconds on the host's clock of the timed phases."""
    total = 0.0
    for phase in phases:
        begun = time.perf_counter()
        phase.run()
        if phase.timed:
            total += time.perf_counter() - begun
    return total * 1e6


def _repeat(once: Callable[[], float], seconds: float) -> list[float]:
    """Times of as many runs as fit into `seconds`, after the warm-up; slow ones get fewer warm-up runs."""
    begun = time.perf_counter()
    once()
    first = time.perf_counter() - begun
    for _ in range(WARM_UP - 1 if first < seconds else 0):
        once()
    begun = time.perf_counter()
    times = [once()]
    one = max(time.perf_counter() - begun, 1e-7)
    least = MIN_REPEATS if one < SLOW_SECONDS else MIN_REPEATS // 2
    repeats = min(MAX_REPEATS, max(least, math.ceil(seconds / one)))
    times += [once() for _ in range(repeats - 1)]
    return times
