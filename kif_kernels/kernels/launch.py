"""How kernels are started: grid, compile options, and a count of what was started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 1024
"""Elements a program works on at once: two 128-bit accesses a thread and float32 tensor."""

NUM_WARPS = 4

PROGRAMS_PER_SM = 6
"""Of kernels that carry something over blocks, such as a histogram that each program adds to memory once."""

_counters: list[Counter[str]] = []


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Counts the kernels started in the body, by name."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Start `kernel` on the device of its first argument."""
    for counter in _counters:
        counter[kernel.fn.__name__] += 1
    device = args[0].device
    # products and sums stay separate roundings, as in the definition and in the interpreter
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)


def programs_for(n: int, device: torch.device, *, few: bool) -> int:
    """Programs over n elements: one a block, or a few a multiprocessor where each carries something over blocks."""
    programs = max(1, -(-n // BLOCK))
    return min(programs, PROGRAMS_PER_SM * _multiprocessors(device)) if few else programs


def flat(tensor: Tensor | None) -> Tensor | None:
    """One-dimensional view of a contiguous tensor."""
    return None if tensor is None else tensor.view(-1)


def contiguous(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)


def lerp_weight(weight: float) -> tuple[float, int]:
    """(c, near_new) for `common.lerp`: the smaller of weight and 1 - weight, rounded once, and which it is."""
    return (weight, 0) if weight < 0.5 else (1.0 - weight, 1)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
