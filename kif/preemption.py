"""SIGTERM, as Slurm sends it before it takes a machine away: the run saves its state and ends with status 143.

Ctrl-C ends it at once; how to go on is said as well.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from kif.distributed import all_reduce_, world
from kif.faults import Preempted


class Preemption:
    """Whether SIGTERM came. It ends the run at once where nothing would be lost, else when `release` is called.

    Several processes end together, at one of the points at which they ask each other by `agreed`.

    Args:
        advice: how to go on from what is saved now; the caller replaces it as the run proceeds.
    """

    def __init__(self, advice: str) -> None:
        self.advice = advice
        self.received = False
        self._held = False

    def hold(self) -> None:
        """From now on the state must be saved before the run may end."""
        self._held = True

    def release(self) -> None:
        """The state is saved. Raises: Preempted if SIGTERM came meanwhile, to a process that is alone."""
        self._held = world()[1] > 1
        if self.received and not self._held:
            raise self.preempted()

    def agreed(self, device: torch.device) -> bool:
        """Whether SIGTERM came to any of the processes; all must call it."""
        if world()[1] == 1:
            return self.received
        return bool(all_reduce_(torch.tensor(float(self.received), device=device)).item())

    def preempted(self) -> Preempted:
        return Preempted(f"stopped by SIGTERM: {self.advice}")

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler. Raises: Preempted where nothing would be lost."""
        self.received = True
        if not self._held:
            raise self.preempted()


@contextmanager
def preemption(advice: str) -> Iterator[Preemption]:
    """Handle SIGTERM for the body, and as before after it; in threads, which get no signals, it is left alone.

    A KeyboardInterrupt passes with the advice as its text.
    """
    stop = Preemption(advice)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.handle)
    try:
        yield stop
    except KeyboardInterrupt as interrupt:
        interrupt.args = (stop.advice,)
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
