"""Where the time goes, without a host sync on the way."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds by section; on CUDA by events, which are read when they are done."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def section(self, name: str, device: torch.device) -> Iterator[None]:
        """Time the body, which works on `device`, under `name`."""
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            yield
            end.record(stream)
            self._events.append((name, start, end))
            if len(self._events) >= 1024:
                self._read([event for event in self._events if event[2].query()])
        else:
            start_time = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start_time

    def seconds(self) -> dict[str, float]:
        """Seconds so far by section. On CUDA this waits for the device."""
        for _, _, end in self._events:
            end.synchronize()
        self._read(list(self._events))
        return dict(self._seconds)

    def _read(self, finished: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]) -> None:
        for event in finished:
            name, start, end = event
            self._seconds[name] += start.elapsed_time(end) / 1000.0
            self._events.remove(event)
