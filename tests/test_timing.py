"""Seconds by section: by the clock on a CPU, by events (stand-ins here) on CUDA."""

from __future__ import annotations

import time

import pytest
import torch

from kif import timing


class Event:
    """A CUDA event that is done when the test says so; each pair is 2 ms apart."""

    done = False
    waited = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"

    def query(self) -> bool:
        return Event.done

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, end: Event) -> float:
        return 2.0


def test_cpu_sections_add_up() -> None:
    watch = timing.Stopwatch()
    for name in ("a", "b", "a"):
        with watch.section(name, torch.device("cpu")):
            time.sleep(0.01)
    seconds = watch.seconds()
    assert set(seconds) == {"a", "b"} and seconds["a"] >= 0.02 and seconds["b"] >= 0.01


def test_cuda_events_are_read_when_done_and_never_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(timing, "MAX_PENDING", 5)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    watch, device = timing.Stopwatch(), torch.device("cuda:1")

    def spend(count: int) -> None:
        for _ in range(count):
            with watch.section("a", device):
                pass

    spend(7)
    assert len(watch._events) == 7  # none is done, none is waited for
    Event.done = True
    spend(1)
    assert not watch._events and Event.waited == 0
    Event.done = False
    spend(2)
    assert watch.seconds() == {"a": pytest.approx(0.020)} and Event.waited == 2
    assert watch.seconds() == {"a": pytest.approx(0.020)}
