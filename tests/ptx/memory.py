"""The memory of one launch: bounds and alignment of each access when it is made, races when all are known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .program import Fault

Ints = NDArray[np.int64]
READ, WRITE, ATOMIC = 1, 2, 4
WARP = 32
SECTOR = 32
"""Bytes that a GPU moves at least."""


@dataclass
class _Accesses:
    """Of one instruction: where, how many bytes, by which threads, after how many barriers of their programs."""

    region: int
    byte: Ints
    size: int
    thread: Ints
    epoch: Ints
    kind: int
    line: int


class Memory:
    """Buffers of the host at their addresses, and `shared` bytes for each of `programs`, undefined at first.

    Args:
        buffers: address and bytes of each, which do not overlap.
        threads: of a program.
    """

    def __init__(
        self, buffers: Iterable[tuple[int, NDArray[np.uint8]]], shared: int, programs: int, threads: int
    ) -> None:
        found = sorted(buffers, key=lambda buffer: buffer[0])
        self.starts = np.array([start for start, _ in found], np.int64)
        self.ends = np.array([start + len(data) for start, data in found], np.int64)
        self.shared = shared
        self.stride = -(-shared // 16) * 16
        self.threads = threads
        self.data = [data for _, data in found] + [np.zeros(self.stride * programs, np.uint8)]
        self.defined = np.zeros(self.stride * programs, bool)
        self.log: list[_Accesses] = []

    def access(
        self, space: str, address: Ints, size: int, thread: Ints, epoch: Ints, kind: int, line: int
    ) -> Iterator[tuple[NDArray[np.uint8], Ints, Ints]]:
        """Bytes, where each access begins in them, and which accesses these are, for each buffer that is met."""
        if (address % size).any():
            raise Fault(f"an access of {size} bytes that is not aligned, at {address[address % size > 0][0]:#x}")
        if space == "shared":
            if address.min() < 0 or address.max() + size > self.shared:
                raise Fault(f"{size} bytes at {address.max()} of {self.shared} bytes of shared memory")
            regions, starts = np.full(len(address), len(self.starts)), -(thread // self.threads) * self.stride
        else:
            regions = np.searchsorted(self.starts, address, "right") - 1
            outside = (regions < 0) | (address + size > self.ends[regions])
            if outside.any():
                raise Fault(f"{size} bytes at {address[outside][0]:#x}, in none of the arguments")
            starts = self.starts[regions]
        for region in set(regions.tolist()):
            chosen = np.flatnonzero(regions == region)
            byte = (address - starts)[chosen]
            if (byte % size).any():
                raise Fault(f"{size} bytes of a buffer that begins between two such")
            self.log.append(_Accesses(region, byte, size, thread[chosen], epoch[chosen], kind, line))
            if space == "shared":
                touched = byte[:, None] + np.arange(size)
                if kind != WRITE and not self.defined[touched].all():
                    raise Fault("shared memory is read before it is written")
                self.defined[touched] = True
            yield self.data[region], byte, chosen

    def traffic(self) -> int:
        """Bytes of the sectors of the buffers that each warp reads or writes, instruction by instruction."""
        met = 0
        for a in self.log:
            if a.region < len(self.starts):
                # one is aligned to its size, which is less than a sector
                sectors = np.stack([a.thread // WARP, (a.byte + self.starts[a.region]) // SECTOR])
                met += SECTOR * np.unique(sectors, axis=1).shape[1]
        return met

    def races(self) -> list[tuple[str, list[int]]]:
        """Which kinds of race there are, each with the lines that take part in the first of them.

        Between programs of a launch nothing is ordered, between threads of a program barriers are. Reads go together,
        so do atomic accesses, and what a warp writes at once.
        """
        found = []
        for region in {accesses.region for accesses in self.log}:
            log = [accesses for accesses in self.log if accesses.region == region]
            if {accesses.kind for accesses in log} in ({READ}, {ATOMIC}):
                continue
            # all are aligned to their sizes, so that parts of the smallest one tell all places apart
            grain = min(accesses.size for accesses in log)
            grains = [a.byte[:, None] // grain + np.arange(a.size // grain) for a in log]
            place = np.concatenate([grain.ravel() for grain in grains])
            thread = np.concatenate([np.repeat(a.thread, g.shape[1]) for a, g in zip(log, grains, strict=True)])
            epoch = np.concatenate([np.repeat(a.epoch, g.shape[1]) for a, g in zip(log, grains, strict=True)])
            kind = np.concatenate([np.full(g.size, a.kind) for a, g in zip(log, grains, strict=True)])
            line = np.concatenate([np.full(g.size, a.line) for a, g in zip(log, grains, strict=True)])
            moment = np.repeat(np.arange(len(log)), [g.size for g in grains])
            program = thread // self.threads
            whole = _Groups((place,), kind)
            between_barriers = _Groups((epoch, program, place), kind)
            for what, groups, differ in (
                ("programs", whole, (program,)),
                ("warps", between_barriers, (thread // WARP,)),
                ("threads of a warp", between_barriers, (thread, moment)),
            ):
                bad = groups.first_of_several(differ)
                if bad is not None:
                    found.append((what, sorted(set(line[bad].tolist()))))
        return found


class _Groups:
    """Accesses of equal keys; those groups that only read, or only add, do not matter."""

    def __init__(self, keys: tuple[Ints, ...], kind: Ints) -> None:
        self.order = np.lexsort(keys)
        first = np.zeros(len(kind), bool)
        first[0] = True
        for key in keys:
            first[1:] |= np.diff(key[self.order]) != 0
        self.begins = np.flatnonzero(first)
        kinds = np.bitwise_or.reduceat(kind[self.order], self.begins)
        self.matter = (kinds != READ) & (kinds != ATOMIC)

    def first_of_several(self, differ: tuple[Ints, ...]) -> Ints | None:
        """The accesses of the first group in which each of these arrays has different values."""
        bad = self.matter
        for values in differ:
            ordered = values[self.order]
            bad = bad & (np.minimum.reduceat(ordered, self.begins) != np.maximum.reduceat(ordered, self.begins))
        if not bad.any():
            return None
        at = int(np.argmax(bad))
        return self.order[self.begins[at] : [*self.begins, len(self.order)][at + 1]]
