"""Machine code of compiled kernels, read by the tools of Triton's wheel."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from itertools import accumulate

from triton import knobs

Instruction = tuple[str, int | None]
"""Name with modifiers, and the index of the instruction that it branches to."""


class Unreadable(Exception):
    """The compiled code has a form that the contract cannot judge."""


def disassembled(cubins: list[bytes], architecture: int) -> list[list[Instruction]]:
    """The instructions of each kernel, without padding.

    All in one call: nvdisasm takes half a second to begin, and next to none for a kernel.
    """
    codes = [_code(cubin) for cubin in cubins]
    lines = _output(knobs.nvidia.nvdisasm.path, b"".join(codes), "--binary", f"SM{architecture}").splitlines()
    ends = list(accumulate(len(code) for code in codes))
    kernels: list[list[tuple[int, str, int | None]]] = [[] for _ in codes]
    place = 0
    for line in lines:
        found = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line)
        if found is None:
            continue
        address = int(found[1], 16)
        while address >= ends[place]:
            place += 1
        if found[2] != "NOP":
            target = re.search(r"\b0x([0-9a-f]+)\s*;", found[3]) if found[2].startswith("BRA") else None
            kernels[place].append((address, found[2], int(target[1], 16) if target else None))
    return [_with_indices(kernel) for kernel in kernels]


def _with_indices(kernel: list[tuple[int, str, int | None]]) -> list[Instruction]:
    """Addresses as indices; padding that is branched to stands for what follows it."""
    addresses = [address for address, _, _ in kernel]
    return [(name, None if to is None else bisect_left(addresses, to)) for _, name, to in kernel]


def _code(cubin: bytes) -> bytes:
    """The sections `.text.*` of a 64-bit ELF file."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # of each section: its name's place in the section of names, its own place and its size
    sections = [struct.unpack_from("<I20xQQ", cubin, headers + i * size) for i in range(count)]
    return b"".join(
        cubin[place : place + length]
        for name, place, length in sections
        if cubin.startswith(b".text.", sections[names][1] + name)
    )


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack. Raises: Unreadable."""
    resources = _output(knobs.nvidia.cuobjdump.path, cubin, "--dump-resource-usage")
    used = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    if used is None:
        raise Unreadable(f"cuobjdump says nothing of registers: {resources}")
    return int(used[1]), int(used[2])


def loop_instructions(machine: list[Instruction]) -> int:
    """Instructions between a branch back and its target; 0 without loops. The end's branch to itself is none."""
    inside = set()
    for place, (_, target) in enumerate(machine):
        if target is not None and target < place:
            inside.update(range(target, place + 1))
    return len(inside)


def bits_of(name: str) -> int:
    """Width of a global access."""
    modifiers = name.split(".")
    for suffix, bits in (("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("U8", 8), ("S8", 8)):
        if suffix in modifiers:
            return bits
    return 32


def _output(tool: str, content: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout
