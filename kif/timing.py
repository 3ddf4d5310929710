"""Where the time goes, without a host sync on the way."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MAX_PENDING = 1024
"""Events kept before the finished ones are read; a run of days must not hold one for every step."""


class Stopwatch:
    """Adds up seconds by section; on CUDA by events, which are read when they are done."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def section(self, name: str, device: torch.device) -> Iterator[None]:
        """Time the body, which works on `device`, under `name`."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # a graph's replays are timed from outside
            yield
        elif device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            yield
            end.record(stream)
            self._events.append((name, start, end))
            if len(self._events) >= MAX_PENDING:
                self._read(wait=False)
        else:
            start_time = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start_time

    def add(self, name: str, seconds: float) -> None:
        """Add host time."""
        self._seconds[name] += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds so far by section. On CUDA this waits for the device."""
        self._read(wait=True)
        return dict(self._seconds)

    def _read(self, wait: bool) -> None:
        """Add up finished events; with `wait`, all of them."""
        pending = []
        for name, start, end in self._events:
            if wait:
                end.synchronize()
            elif not end.query():
                pending.append((name, start, end))
                continue
            self._seconds[name] += start.elapsed_time(end) / 1000.0
        self._events = pending
