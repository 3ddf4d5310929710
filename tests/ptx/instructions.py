"""What each instruction does: a function of the machine and the threads that take part."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic
from .arithmetic import Array
from .machine import Machine
from .memory import ATOMIC, READ, WARP, WRITE, Ints
from .program import FORMS, Fault, Instruction, Operand, Program

Step = Callable[[Machine, Ints], "int | None"]
Get = Callable[[Machine, Ints], Array]

_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
_BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_NUMBERS = {"add": np.add, "sub": np.subtract, "abs": np.abs, "neg": np.negative}
_SHIFTS = {"shl": arithmetic.shifted_left, "shr": arithmetic.shifted_right}
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_EXTREMES = {"min": (np.minimum, np.fmin), "max": (np.maximum, np.fmax)}
"""Of integers; of floats, where a number goes before nan."""


_MODIFIERS = {
    "mul": {"rn", "ftz", "lo", "wide"},
    "mad": {"lo", "wide"},
    "setp": {"ftz", "nan", "lo", "ls", "hi", "hs", *_COMPARE, *(f"{name}u" for name in _COMPARE)},
    "cvt": {"rn", *FORMS, "bf16x2", "f16x2"},
    "ld": {"global", "shared", "param", "v2", "v4"},
    "st": {"global", "shared", "v2", "v4"},
    "atom": {"global", "shared", "relaxed", "acq_rel", "gpu", "sys", "add"},
    "red": {"global", "shared", "relaxed", "gpu", "sys", "add"},
    "bar": set(),
    "bra": set(),
    "shfl": {"sync", "up", "down", "bfly", "idx"},
    "redux": {"sync", "add"},
    "vote": {"sync", "ballot"},
}  # fmt: skip
"""What may stand between a name and its type, without which another would be computed; of others `_ROUNDING`."""

_ROUNDING = {"rn", "ftz"}


def decode(program: Program) -> list[Step]:
    """Raises: Fault that names an instruction that is not known."""
    steps = []
    for line, instruction in enumerate(program.code):
        try:
            step = _Decoder(program, instruction, line).step()
        except (AssertionError, KeyError, ValueError):
            step = None
        if step is None:
            raise Fault(f"not known: {instruction.text}")
        steps.append(step)
    return steps


class _Decoder:
    def __init__(self, program: Program, instruction: Instruction, line: int) -> None:
        self.program, self.line = program, line
        self.parts, self.operands = instruction.parts, instruction.operands
        self.kind = self.parts[-1]

    def step(self) -> Step | None:
        """None: not known."""
        name = self.parts[0]
        # bfloat16 stays bits, with which nothing is computed
        if not set(self.parts[1:-1]) <= _MODIFIERS.get(name, _ROUNDING) or (self.kind == "bf16" and name != "cvt"):
            return None
        if self.kind[0] in "subp" and {"rn", "ftz"} & set(self.parts[1:-1]) and name != "cvt":
            return None
        special = getattr(self, f"do_{name}", None)
        if special is not None:
            step: Step | None = special()
            return step
        function = self._function(name)
        return None if function is None else self._plain(function)

    # operands

    def _get(self, operand: Operand, kind: str, checked: bool = True) -> Get:
        """`checked`: where it was not written is a fault, else the caller's concern."""
        assert isinstance(operand, str)
        form = np.dtype(FORMS[kind])
        if not operand.startswith("%"):
            value = _number(operand, form)
            return lambda machine, who: value
        read = Machine.read if checked else Machine.peek
        if form == np.bool_:
            return lambda machine, who: read(machine, operand, who)
        unsigned = np.dtype(f"u{form.itemsize}")

        def get(machine: Machine, who: Ints) -> Array:
            value = read(machine, operand, who)
            return (value if value.itemsize == form.itemsize else value.astype(unsigned)).view(form)

        return get

    def _put(self, operand: Operand) -> Callable[[Machine, Array, Ints], None]:
        """Values of another size than the register's are cut, or extended by their sign if they have one."""
        assert isinstance(operand, str)
        if operand == "_":  # a half of a pair that is not wanted
            return lambda machine, value, who: None
        form = np.dtype(self.program.form(operand))

        def put(machine: Machine, value: Array, who: Ints) -> None:
            if value.itemsize != form.itemsize:
                value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{form.itemsize}")
            machine.write(operand, value, who, form)

        return put

    def _plain(self, function: Callable[..., Array], kinds: list[str] | None = None) -> Step:
        """First operand = function of the others, which are of the instruction's type or of `kinds`."""
        kinds = kinds or [self.kind] * (len(self.operands) - 1)
        gets = [self._get(operand, kind, False) for operand, kind in zip(self.operands[1:], kinds, strict=True)]
        put = self._put(self.operands[0])
        flush = "ftz" in self.parts

        def step(machine: Machine, who: Ints) -> None:
            values = [get(machine, who) for get in gets]
            if flush:
                values = [arithmetic.flushed(value) for value in values]
            value = np.asarray(function(*values))
            put(machine, arithmetic.flushed(value) if flush and value.dtype.kind == "f" else value, who)

        return self._passed_on(step)

    def _passed_on(self, step: Callable[[Machine, Ints], None]) -> Step:
        """What was not written makes results that count as not written: it is a fault where it has an effect."""
        targets, *sources = ([names] if isinstance(names, str) else names for names in self.operands)
        # a half that nothing ever writes fills up a pair
        registers = [name for names in sources for name in names if len(names) == 1 or name in self.program.written]

        def passed_on(machine: Machine, who: Ints) -> None:
            unknown = who[machine.unknown(registers, who)]
            step(machine, who)
            for name in targets:
                machine.forget(name, unknown)

        return passed_on

    # numbers

    def _function(self, name: str) -> Callable[..., Array] | None:
        if self.kind == "pred":
            return _LOGIC.get(name)
        if name in _EXTREMES:
            return _EXTREMES[name][self.kind[0] == "f"]
        return _BITS.get(name) or _NUMBERS.get(name)

    def do_shl(self) -> Step:
        return self._plain(_SHIFTS[self.parts[0]], [self.kind, "u32"])

    do_shr = do_shl

    def do_mul(self) -> Step | None:
        if self.kind[0] == "f" or "lo" in self.parts:
            return self._plain(np.multiply)
        if "wide" not in self.parts:
            return None
        form = FORMS[f"{self.kind[0]}{2 * int(self.kind[1:])}"]
        return self._plain(lambda a, b: a.astype(form) * b.astype(form))

    def do_mad(self) -> Step | None:
        if "lo" in self.parts:
            return self._plain(lambda a, b, c: a * b + c)
        if "wide" not in self.parts:
            return None
        wide = f"{self.kind[0]}{2 * int(self.kind[1:])}"
        form = FORMS[wide]
        return self._plain(lambda a, b, c: a.astype(form) * b.astype(form) + c, [self.kind, self.kind, wide])

    def do_fma(self) -> Step | None:
        return self._plain({"f32": arithmetic.fma32, "f64": arithmetic.fma64}[self.kind])

    def do_div(self) -> Step | None:
        if self.kind[0] == "f":
            return self._plain(np.divide) if "rn" in self.parts else None
        return self._plain(arithmetic.quotient)

    def do_sqrt(self) -> Step | None:
        return self._plain(np.sqrt) if "rn" in self.parts else None

    def do_popc(self) -> Step:
        def count(a: Array) -> Array:
            bits = np.unpackbits(np.ascontiguousarray(a).view(np.uint8))
            return bits.reshape(-1, 8 * a.itemsize).sum(1).astype(np.uint32)

        return self._plain(count)

    def do_bfe(self) -> Step | None:
        if self.kind != "u32":
            return None

        def taken(a: Array, at: Array, size: Array) -> Array:
            return arithmetic.shifted_right(a, at & 255) & ~arithmetic.shifted_left(~(a & 0), size & 255)

        return self._plain(taken)

    def do_prmt(self) -> Step | None:
        return self._plain(arithmetic.permuted, ["u32"] * 3) if self.kind == "b32" else None

    def do_selp(self) -> Step:
        return self._plain(lambda a, b, p: np.where(p, a, b), [self.kind, self.kind, "pred"])

    def do_setp(self) -> Step | None:
        compare = self.parts[1]
        if compare == "nan":
            return self._plain(lambda a, b: np.isnan(a) | np.isnan(b))
        if self.kind[0] != "f":
            return self._plain(_COMPARE[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(compare, compare)])
        unordered, function = len(compare) == 3, _COMPARE[compare[:2]]
        return self._plain(lambda a, b: np.where(np.isnan(a) | np.isnan(b), unordered, function(a, b)))

    def do_cvt(self) -> Step | None:
        target, source = self.parts[-2:]
        if len(self.parts) != 3 + ("rn" in self.parts) + ("ftz" in self.parts):
            return None
        if target in ("bf16x2", "f16x2"):
            half = arithmetic.bfloat16 if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
            return self._plain(lambda high, low: half(high).astype(np.uint32) << np.uint32(16) | half(low))
        if source == "bf16" and target == "f32":
            return self._plain(arithmetic.from_bfloat16)
        if target == "bf16" and source == "f32":
            return self._plain(arithmetic.bfloat16)
        floats = target[0] == "f", source[0] == "f"
        # to integers numpy rounds otherwise
        if (
            "b" in target[0] + source[0]
            or floats == (False, True)
            or (floats == (True, False) and "rn" not in self.parts)
        ):
            return None
        return self._plain(lambda a: a.astype(FORMS[target]))

    def do_mov(self) -> Step | None:
        to, source = self.operands
        if isinstance(to, str) and isinstance(source, str):
            return self._plain(lambda a: a)
        part = {"b32": "b16", "b64": "b32"}[self.kind]
        if isinstance(source, list):
            gets, put = [self._get(operand, part, False) for operand in source], self._put(to)

            def pack(machine: Machine, who: Ints) -> None:
                values = [np.broadcast_to(get(machine, who), who.shape) for get in gets]
                put(machine, np.stack(values, 1).view(FORMS[self.kind]).ravel(), who)

            return self._passed_on(pack)
        get, puts = self._get(source, self.kind, False), [self._put(operand) for operand in to]

        def unpack(machine: Machine, who: Ints) -> None:
            values = np.array(np.broadcast_to(get(machine, who), who.shape)).view(FORMS[part]).reshape(len(who), -1)
            for put, value in zip(puts, values.T, strict=True):
                put(machine, value, who)

        return self._passed_on(unpack)

    # memory

    def do_ld(self) -> Step | None:
        if "param" not in self.parts:
            return self._move(READ)
        assert isinstance(self.operands[1], str)
        name, put = self.operands[1].strip("[] "), self._put(self.operands[0])
        form = np.dtype(FORMS[self.kind])

        def step(machine: Machine, who: Ints) -> None:
            value = np.asarray(machine.parameters[name])
            put(machine, np.frombuffer(value.tobytes()[: form.itemsize], form)[0], who)

        return step

    def do_st(self) -> Step | None:
        return self._move(WRITE)

    def _address(self, operand: Operand, space: str) -> Get:
        assert isinstance(operand, str)
        found = re.match(r"\[\s*([%$.\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]$", operand)
        if not found:
            raise Fault(f"address {operand}")
        base, offset = self._get(found[1], "u32" if space == "shared" else "u64"), int(found[2] or "0", 0)
        return lambda machine, who: np.broadcast_to(base(machine, who).astype(np.int64) + offset, who.shape)

    def _space(self) -> str | None:
        return next((space for space in ("shared", "global") if space in self.parts), None)

    def _move(self, kind: int) -> Step | None:
        space = self._space()
        if space is None:
            return None
        count = next((int(part[1:]) for part in self.parts if re.match(r"v\d$", part)), 1)
        form = np.dtype(FORMS[self.kind])
        bits = np.dtype(f"u{form.itemsize}")
        registers, where = self.operands if kind == READ else self.operands[::-1]
        names = registers if isinstance(registers, list) else [registers]
        if len(names) != count:
            return None
        address = self._address(where, space)
        puts = [self._put(name) for name in names] if kind == READ else []
        gets = [self._get(name, self.kind) for name in names] if kind == WRITE else []

        def step(machine: Machine, who: Ints) -> None:
            loaded = np.zeros((count, len(who)), form)
            for data, byte, chosen in machine.memory.access(
                space, address(machine, who), form.itemsize * count, who, machine.epochs(who), kind, self.line
            ):
                elements = data[: len(data) // form.itemsize * form.itemsize].view(bits)
                for at in range(count):
                    place = byte // form.itemsize + at
                    if kind == READ:
                        loaded[at, chosen] = elements[place].view(form)
                    else:
                        elements[place] = value = gets[at](machine, who[chosen]).view(bits)
                        if (elements[place] != value).any():
                            raise Fault("threads write different values to one place at once")
            for at, put in enumerate(puts):
                put(machine, loaded[at], who)

        return step

    def do_atom(self) -> Step | None:
        space = self._space()
        if space is None:
            return None
        form = np.dtype(FORMS[self.kind])
        where, what = self.operands[-2:]
        address, get = self._address(where, space), self._get(what, self.kind)
        # what was there is not modelled: reading it shall fail
        result = self.operands[0] if self.parts[0] == "atom" else None

        def step(machine: Machine, who: Ints) -> None:
            for data, byte, chosen in machine.memory.access(
                space, address(machine, who), form.itemsize, who, machine.epochs(who), ATOMIC, self.line
            ):
                elements = data[: len(data) // form.itemsize * form.itemsize].view(form)
                np.add.at(elements, byte // form.itemsize, get(machine, who[chosen]))
            if isinstance(result, str):
                machine.forget(result, who)

        return step

    do_red = do_atom

    # threads

    def do_bar(self) -> Step | None:
        if self.operands != ["0"]:
            return None

        def step(machine: Machine, who: Ints) -> None:
            machine.waiting[who] = True

        return step

    def do_bra(self) -> Step:
        assert isinstance(self.operands[0], str)
        target = self.program.labels[self.operands[0]]
        return lambda machine, who: target

    def do_ret(self) -> Step:
        def step(machine: Machine, who: Ints) -> None:
            machine.gone[who] = True

        return step

    def _warps(self, kinds: list[str], checked: bool = True) -> Callable[[Machine, Ints], list[Array]]:
        """All operands between the first and the mask, as (warps, 32); `checked`: the first of them, as the others."""
        operands = zip(self.operands[1:-1], kinds, [checked] + [True] * (len(kinds) - 1), strict=True)
        gets = [self._get(*given) for given in operands]
        mask = self._get(self.operands[-1], "u32")

        def get(machine: Machine, who: Ints) -> list[Array]:
            _whole_warps(machine, who)
            if (mask(machine, who) != 0xFFFFFFFF).any():
                raise Fault("a mask of parts of warps")
            return [np.broadcast_to(get(machine, who), who.shape).reshape(-1, WARP) for get in gets]

        return get

    def _by_warp(self, function: Callable[[Array], Array], kind: str) -> Step:
        """One value for all threads of a warp, of what they have."""
        get, put = self._warps([kind]), self._put(self.operands[0])

        def step(machine: Machine, who: Ints) -> None:
            (values,) = get(machine, who)
            put(machine, np.repeat(function(values), WARP), who)

        return step

    def do_shfl(self) -> Step:
        mode = self.parts[2]
        assert isinstance(self.operands[0], str)
        to, _, valid = self.operands[0].partition("|")

        def source(b: Array, c: Array) -> tuple[Array, Array]:
            """Lane that is read, and whether there is one."""
            lane = np.arange(WARP)
            b, clamp, segment = b.astype(np.int64) & 31, c.astype(np.int64) & 31, c.astype(np.int64) >> 8 & 31
            low = lane & segment
            bound = low | clamp & ~segment
            at = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | b & ~segment}[mode]
            inside = at >= bound if mode == "up" else at <= bound
            return np.where(inside, at, lane), inside

        value = self.operands[1]
        assert isinstance(value, str)
        get, put = self._warps(["b32", "u32", "u32"], checked=False), self._put(to)
        put_valid = self._put(valid or "_")

        def shuffle(machine: Machine, who: Ints) -> None:
            values, b, c = get(machine, who)
            lane, inside = source(b, c)
            unknown = machine.unknown([value], who).reshape(-1, WARP)
            put_valid(machine, inside.ravel(), who)
            put(machine, np.take_along_axis(values, lane, 1).ravel(), who)
            machine.forget(to, who[np.take_along_axis(unknown, lane, 1).ravel()])

        return shuffle

    def do_redux(self) -> Step:
        return self._by_warp(lambda a: a.sum(1, dtype=np.uint32), "u32")

    def do_vote(self) -> Step:
        bit = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
        return self._by_warp(lambda p: (p * bit).sum(1, dtype=np.uint32), "pred")


def _whole_warps(machine: Machine, who: Ints) -> None:
    warps = machine.warp[who]
    if len(who) % WARP or (warps.reshape(-1, WARP) != warps[::WARP, None]).any():
        raise Fault("not all threads of a warp take part")


def _number(text: str, form: np.dtype[Any]) -> Array:
    """A constant; the one symbol is the base of shared memory."""
    if text == "global_smem":
        number = 0
    elif re.match(r"0[fFdD][0-9A-Fa-f]+$", text):
        if len(text) != 2 + 2 * form.itemsize:
            raise ValueError(f"{text} is no {form}")
        number = int(text[2:], 16)
    elif form.kind == "f":
        raise ValueError(f"{text} is no {form}")
    else:
        number = int(text.rstrip("U"), 0)
    if form == np.bool_:
        return np.array(number != 0)
    return np.array(number & ((1 << 8 * form.itemsize) - 1), f"u{form.itemsize}").view(form)
