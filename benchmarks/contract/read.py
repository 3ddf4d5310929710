"""What a compiled kernel costs, read off Triton's IR, PTX and machine code.

Bytes per element come from the IR, where an access is one operation with a shape and a type. Widths come from PTX,
whose accesses carry the source position of their IR operation. Machine code must move the same bytes, and gives
spills and instruction counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from benchmarks.contract.machine_code import Instruction, Unreadable, bits_of, loop_instructions, registers_and_stack

TYPE_BYTES = {"i1": 1, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10}
Position = tuple[str, int, int]


@dataclass
class Access:
    """A load or store of one value for each element of a tensor."""

    kind: str
    elements: int
    bytes: int
    position: Position | None


@dataclass
class Region:
    """A block of IR. Children by kind; the branches of one `if` are alternatives."""

    kind: str
    accesses: list[Access] = field(default_factory=list)
    atomics: int = 0
    children: list[Region] = field(default_factory=list)

    def moved(self, kind: str, elements: int) -> int:
        """Bytes that one trip moves in accesses of `elements` elements; the larger branch of an `if`."""
        own = sum(a.bytes for a in self.accesses if a.kind == kind and a.elements == elements)
        inner = [child.moved(kind, elements) for child in self.children]
        return own + (max(inner) if self.kind == "if" else sum(inner))

    def walk(self, loops: int = 0) -> list[tuple[int, Region]]:
        """(number of loops around, region), of all regions."""
        inside = loops + (self.kind == "loop")
        return [(inside, self), *(pair for child in self.children for pair in child.walk(inside))]


@dataclass
class Compiled:
    """What is read of a compiled kernel; a CompiledKernel cannot leave its process."""

    hash: str
    ttgir: str
    ptx: str
    cubin: bytes
    num_warps: int
    shared: int


def facts(kernel: Compiled, machine: list[Instruction], architecture: int, elements: int) -> dict[str, int]:
    """Figures of a compiled kernel.

    Args:
        kernel: of Triton's compiler.
        machine: its instructions (`machine_code.disassembled`).
        architecture: 80 or 90.
        elements: of a block, which is what a trip through the code works on; accesses of this shape are the per-element
            ones. 0 for a kernel that makes no pass over the elements.

    Returns: load, store (bytes per element), width (narrowest per-element access, bits), loop_atomics (operations);
        these are missing for elements=0. registers, stack, spills (instructions), shared (bytes), instructions,
        loop (instructions inside loops), warps (resident on a multiprocessor).
    Raises: Unreadable.
    """
    if not machine:
        raise Unreadable("no machine code")
    names = [name for name, _ in machine]
    registers, stack = registers_and_stack(kernel.cubin)
    measured = {
        "registers": registers,
        "stack": stack,
        "spills": sum(name.startswith(("LDL", "STL")) for name in names),
        "shared": kernel.shared,
        "instructions": len(names),
        "loop": loop_instructions(machine),
        "warps": _resident_warps(architecture, registers, kernel.shared, kernel.num_warps),
    }
    if not elements:
        return measured
    body = _regions(kernel.ttgir)
    if any(loops > 1 and a.elements == elements for loops, r in body.walk() for a in r.accesses):
        raise Unreadable("a per-element access lies in nested loops: its trip count is not known")
    every = [a for _, region in body.walk() for a in region.accesses if a.elements == elements]
    widths = []
    for kind, opcode in (("load", "LDG"), ("store", "STG")):
        accesses = [a for a in every if a.kind == kind]
        widths += _widths(kernel.ptx, kind, accesses, 32 * kernel.num_warps, names, opcode)
    return {
        "load": body.moved("load", elements) // elements,
        "store": body.moved("store", elements) // elements,
        "width": min(widths, default=0),
        "loop_atomics": sum(region.atomics for loops, region in body.walk() if loops),
        **measured,
    }


def _widths(ptx: str, kind: str, accesses: list[Access], threads: int, machine: list[str], opcode: str) -> list[int]:
    """Widths in bits of the PTX accesses that belong to the IR's; bytes must agree in IR, PTX and machine code."""
    positions = {a.position for a in accesses}
    if None in positions:
        raise Unreadable("an access has no source position; is TRITON_DISABLE_LINE_INFO set?")
    found = [bits for position, bits in _ptx_accesses(ptx, kind) if position in positions]
    expected = sum(a.bytes for a in accesses) // threads
    moved = sum(found) // 8
    if not expected and not moved:
        return []
    if not expected or moved % expected or not moved:
        raise Unreadable(f"{kind}s: {expected} bytes a thread in the IR, {moved} in PTX")
    # the assembler may unroll a loop, it does not split accesses
    wide = {bits: found.count(bits) for bits in set(found)}
    for bits, count in wide.items():
        there = sum(bits_of(name) == bits for name in machine if name.split(".")[0] == opcode)
        if there < count:
            raise Unreadable(f"{kind}s of {bits} bits: {count} in PTX, {there} in machine code")
    return found


def _regions(ttgir: str) -> Region:
    """The kernel's region tree."""
    for foreign in ("async_copy", "descriptor_", "tma_"):
        if foreign in ttgir:
            raise Unreadable(f"memory operation {foreign}* is not known to the contract")
    places = _positions(ttgir)
    stack = [Region("module")]
    for line in ttgir.splitlines():
        text = line.strip()
        if text.startswith("#") or not text:
            continue
        if text.startswith("}"):
            closed = stack.pop()
            if text.startswith("} else {") or text.startswith("} do {"):
                # the other branch; what a while loop does before and after its condition is both the loop's
                stack.append(Region(closed.kind))
                stack[-2].children.append(stack[-1])
                continue
            if stack[-1].kind == "if":
                stack.pop()
            continue
        _add_operation(stack[-1], text, places)
        if text.endswith("{"):
            kind = "loop" if re.search(r"\bscf\.(for|while)\b", text) else "other"
            if re.search(r"\bscf\.if\b", text):
                choice = Region("if")
                stack[-1].children.append(choice)
                stack.append(choice)
                kind = "branch"
            region = Region(kind)
            stack[-1].children.append(region)
            stack.append(region)
    if len(stack) != 1:
        raise Unreadable("the IR's regions do not close")
    return stack[0]


def _add_operation(region: Region, text: str, places: dict[str, Position]) -> None:
    if re.search(r'\btt\.elementwise_inline_asm ".*\b(red|atom)\.', text):
        region.atomics += 1
    operation = re.search(r"\btt\.(load|store|atomic_\w+)\b", text)
    if operation is None:
        return
    tensor = re.search(r"tensor<([\dx]*\d)x!tt\.ptr<(\w+)", text)
    if operation[1].startswith("atomic"):
        region.atomics += 1
    elif tensor is not None:
        elements = 1
        for size in tensor[1].split("x"):
            elements *= int(size)
        where = re.search(r"loc\((#loc\d*)\)$", text)
        position = places.get(where[1]) if where else None
        region.accesses.append(Access(operation[1], elements, elements * TYPE_BYTES[tensor[2]], position))


def _positions(ttgir: str) -> dict[str, Position]:
    """Source position of every location alias, of the innermost function where calls were inlined."""
    text = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))

    def resolve(alias: str) -> Position | None:
        body = text[alias]
        place = re.match(r'"([^"]+)":(\d+):(\d+)', body)
        if place:
            return place[1].rsplit("/", 1)[-1], int(place[2]), int(place[3])
        inner = re.search(r"#loc\d*", body)
        return resolve(inner[0]) if inner else None

    resolved = {alias: resolve(alias) for alias in text}
    return {alias: position for alias, position in resolved.items() if position is not None}


def _ptx_accesses(ptx: str, kind: str) -> list[tuple[Position | None, int]]:
    """(source position, bits) of every global load or store of a thread."""
    files = {
        number: name.rsplit("/", 1)[-1] for number, name in re.findall(r'\.file\s+(\d+) (?:"[^"]*" )?"([^"]+)"', ptx)
    }
    found: list[tuple[Position | None, int]] = []
    position: Position | None = None
    frozen = fresh = False
    for line in ptx.splitlines():
        # an access is inline assembly of several lines, to which LLVM gives lines that count up from the source's
        if "begin inline asm" in line:
            frozen, fresh = True, True
        elif "end inline asm" in line:
            frozen = False
        place = re.match(r"\s*\.loc\s+(\d+) (\d+) (\d+)", line)
        if place and (fresh or not frozen):
            position, fresh = (files[place[1]], int(place[2]), int(place[3])), False
        access = re.search(rf"\b{'ld' if kind == 'load' else 'st'}\.global([\w.:]*)", line)
        if access:
            vector = re.search(r"\.v(\d)", access[1])
            bits = re.search(r"\.[busf](\d+)$", access[1])
            if bits is None:
                raise Unreadable(f"PTX access without a type: {line.strip()}")
            found.append((position, int(bits[1]) * (int(vector[1]) if vector else 1)))
    return found


def _resident_warps(architecture: int, registers: int, shared: int, num_warps: int) -> int:
    """Warps that fit on a multiprocessor; registers go out in units of 256 a warp, each program takes 1 KiB more."""
    by_registers = (65536 // (-(-registers * 32 // 256) * 256)) // 4 * 4 // num_warps
    by_shared = SHARED_PER_SM[architecture] // (shared + 1024)
    return min(64 // num_warps, 32, by_registers, by_shared) * num_warps
