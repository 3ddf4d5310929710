"""Data-parallel training by several processes; with one process every function here does nothing.

Each process sees its share of a step's rows and the shares' gradients are summed, so all hold equal weights. A method
that gathers anything besides `arena.grad` from the rows it sees must sum that too: `all_reduce_(tensor)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""A process waits so long for the others: more than the first one needs to tokenise, download or save."""


def world() -> tuple[int, int]:
    """(number of this process, number of processes): (0, 1) unless a process group was started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def started() -> int:
    """Number of processes that `torchrun` started, before they have joined; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "device_mesh")


def share(rows: Sequence[T]) -> Sequence[T]:
    """This process's part of `rows`, which all hold: every size-th one from its number on; may be empty."""
    rank, size = world()
    return rows[rank::size]


def all_reduce_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over all processes, bit by bit the same on each, and return it."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def alike(tensor: Tensor) -> bool:
    """Whether all processes hold the same bits in a contiguous float32 tensor, by a sum of them; all must ask."""
    return world()[1] == 1 or len(set(gather(int(tensor.view(torch.int32).sum(dtype=torch.int64))))) == 1


def broadcast_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by that of process 0 and return it."""
    if world()[1] > 1:
        dist.broadcast(tensor, 0)
    return tensor


def gather(value: T) -> list[T]:
    """The values of all processes, in their order, on every process."""
    size = world()[1]
    if size == 1:
        return [value]
    values: list[T | None] = [None] * size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the body on process 0, then on the others, which find what it has downloaded or cached.

    Where process 0 fails, the others end with status 1; it says why.
    """
    if world()[0] > 0:
        if not gather(True)[0]:
            raise SystemExit(1)
        yield
        return
    try:
        yield
    except BaseException:
        gather(False)
        raise
    gather(True)


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that `torchrun` started, if it did, for the body: NCCL between GPUs, gloo between CPUs.

    Args:
        device: as configured; `auto` and `cuda` give each process the GPU of its number on the machine.
    Raises: ValueError when there are fewer GPUs than processes on the machine, or the device is a single GPU.
    """
    if started() == 1:
        yield
        return
    place = local_device(device)
    on_gpu = place.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(place)
    # objects are gathered by gloo, also beside NCCL
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield
    except BaseException:
        if not on_gpu:
            # closed connections wake the others; NCCL's end would wait for them, and torchrun ends them
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def local_device(device: str) -> str:
    """The device of this process: with several processes and a GPU, `auto` and `cuda` are `cuda:LOCAL_RANK`.

    Raises: ValueError as `process_group`.
    """
    count = started()
    if count == 1 or device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return device
    if device not in ("auto", "cuda"):
        raise ValueError(f"{count} processes cannot share device {device!r}; use auto, cuda or cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise ValueError(f"process {number} of this machine has no GPU: torch sees {torch.cuda.device_count()}")
    return f"cuda:{number}"
