"""PTX text as a list of instructions. Of the language, what Triton's compiler writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

FORMS: dict[str, Any] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
"""How the bits of a register are read as each type; bfloat16 stays bits."""

Operand = str | list[str]
"""A register, number, symbol or address; a list for a vector in braces."""


class Fault(Exception):
    """Undefined on a GPU, or unknown here."""


@dataclass
class Instruction:
    """`parts` are those of the name, at the dots; `guard` is a predicate register and whether it must be false."""

    text: str
    guard: tuple[str, bool] | None
    parts: list[str]
    operands: list[Operand]


@dataclass
class Program:
    """`parameters` are names in order; `registers` the type of each kind of register, by what precedes its number."""

    parameters: list[str]
    registers: dict[str, str]
    code: list[Instruction]
    labels: dict[str, int]
    threads: int

    @cached_property
    def written(self) -> set[str]:
        """Registers that an instruction writes, and some that it only reads."""
        first = (instruction.operands[0] for instruction in self.code if instruction.operands)
        return {name for names in first for name in ([names] if isinstance(names, str) else names)}

    def form(self, register: str) -> Any:
        """Raises: KeyError when it is not declared."""
        kinds = self.registers
        return FORMS[kinds[register] if register in kinds else kinds[register.rstrip("0123456789")]]


def parse(ptx: str) -> Program:
    """The one kernel of a PTX module. Raises: Fault for what is not understood."""
    text = re.sub(r"//[^\n]*|^\s*\.(loc|pragma)\s[^\n]*$", "", ptx, flags=re.M)
    found = re.search(r"\.entry\s+\w+\s*\((.*?)\)\s*(.*?)\{", text, re.S)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", found[2]) if found else None
    if found is None or threads is None:
        raise Fault("no kernel with a number of threads")
    parameters = [declared.split()[-1] for declared in found[1].split(",") if declared.strip()]
    program = Program(parameters, {}, [], {}, int(threads[1]))
    for statement in _body(text[found.end() :]).split(";"):
        _read(program, statement)
    return program


def _body(text: str) -> str:
    """Up to the brace that closes the kernel."""
    depth = 1
    for at, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return text[:at]
    raise Fault("the kernel has no end")


def _read(program: Program, statement: str) -> None:
    # braces around statements, of inline assembly, only limit names
    statement = statement.lstrip("{} \t\n").rstrip()
    while label := re.match(r"([$\w]+):\s*", statement):
        program.labels[label[1]] = len(program.code)
        statement = statement[label.end() :].lstrip("{} \t\n")
    if statement.startswith(".reg"):
        _, kind, names = statement.split(None, 2)
        for name in names.split(","):
            program.registers[re.sub(r"<\d+>", "", name.strip())] = kind[1:]
    elif statement:
        found = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.S)
        if not found:
            raise Fault(f"not understood: {statement}")
        guard = (found[2], bool(found[1])) if found[2] else None
        name = found[3].replace("::cta", "")
        program.code.append(Instruction(" ".join(statement.split()), guard, name.split("."), _operands(found[4])))


def _operands(text: str) -> list[Operand]:
    operands: list[Operand] = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text):
        operands.append([inner.strip() for inner in part[1:-1].split(",")] if part.startswith("{") else part)
    return operands
