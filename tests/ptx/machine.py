"""Threads, registers, and the order in which warps get on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arithmetic import Array
from .memory import WARP, Ints, Memory
from .program import Fault, Program

TOGETHER = ("shfl", "redux", "vote")
"""Instructions that all threads of a warp make at once."""

LIMIT = 10**6
"""Instructions of a launch; a kernel that is not done then has no end."""


class Machine:
    """One launch. Registers are arrays with an element for each thread of the grid.

    Args:
        seed: None lets all threads go together, a number lets random sets of warps run ahead of the others, for random
            stretches.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        memory: Memory,
        parameters: dict[str, Any],
        seed: int | None = None,
    ) -> None:
        if program.threads % WARP:
            raise Fault("programs of parts of warps")
        self.program, self.memory, self.parameters = program, memory, parameters
        self.programs = grid[0] * grid[1] * grid[2]
        self.everyone = np.arange(self.programs * program.threads)
        self.warp: Ints = self.everyone // WARP
        thread = (self.everyone % program.threads).astype(np.uint32)
        number = (self.everyone // program.threads).astype(np.uint32)
        self.registers: dict[str, Array] = {
            "%tid.x": thread,
            "%ctaid.x": number % np.uint32(grid[0]),
            "%ctaid.y": number // np.uint32(grid[0]) % np.uint32(grid[1]),
            "%ctaid.z": number // np.uint32(grid[0] * grid[1]),
        }
        for axis, extent in zip("xyz", grid, strict=True):
            self.registers[f"%nctaid.{axis}"] = np.full(len(thread), extent, np.uint32)
        self.random = None if seed is None else np.random.default_rng(seed)
        self.at = np.zeros(len(thread), np.int64)
        self.waiting, self.gone = np.zeros(len(thread), bool), np.zeros(len(thread), bool)
        # of registers that not all threads have written: which have
        self.defined: dict[str, NDArray[np.bool_]] = {}
        self.epoch = np.zeros(self.programs, np.int64)

    def epochs(self, who: Ints) -> Ints:
        """How many barriers the programs of these threads have passed."""
        return self.epoch[who // self.program.threads]

    def peek(self, register: str, who: Ints) -> Array:
        """What a register holds, also where it was not written: a compiler may compute with what it does not use."""
        if register not in self.registers:
            self.registers[register] = self._garbage(self.program.form(register))
            self.defined[register] = np.zeros(len(self.everyone), bool)
        value = self.registers[register]
        return value if len(who) == len(self.everyone) else value[who]

    def read(self, register: str, who: Ints) -> Array:
        """A register on which an effect depends."""
        value = self.peek(register, who)
        if self.unknown([register], who).any():
            raise Fault(f"{register} is read before it is written")
        return value

    def unknown(self, registers: list[str], who: Ints) -> NDArray[np.bool_]:
        """Which of these threads have not written one of the registers; numbers among them are known."""
        found = np.zeros(len(who), bool)
        for register in registers:
            if register in self.defined:
                found |= ~self.defined[register][who]
            elif register.startswith("%") and register not in self.registers:
                found[:] = True
        return found

    def write(self, register: str, value: Array, who: Ints, form: Any) -> None:
        """`value` has the register's size. Registers may share an array, which is never changed."""
        if value.shape != who.shape:
            value = np.broadcast_to(value, who.shape)
        value = value.view(form)
        if len(who) < len(self.everyone):
            old = self.registers.get(register)
            whole = self._garbage(form) if old is None else old.copy()
            whole[who] = value
            value = whole
            if old is None:
                self.defined[register] = np.zeros(len(self.everyone), bool)
            if register in self.defined:
                self.defined[register][who] = True
        else:
            self.defined.pop(register, None)
        self.registers[register] = value

    def _garbage(self, form: Any) -> Array:
        size = np.dtype(form).itemsize
        return np.full(len(self.everyone) * size, 1 if form == np.bool_ else 0xA5, np.uint8).view(form)

    def forget(self, register: str, who: Ints) -> None:
        """What these threads have in a register is not known any more."""
        if len(who) and register in self.registers:
            self.defined.setdefault(register, np.ones(len(self.everyone), bool))[who] = False

    def run(self, steps: list[Any]) -> None:
        """All threads to their ends; `steps` are what `instructions.decode` makes of the program. Raises: Fault."""
        with np.errstate(all="ignore"):
            self._run(steps)
        races = self.memory.races()
        if races:
            what, lines = races[0]
            raise Fault(f"{what} race: " + "; ".join(self.program.code[line].text for line in lines))

    def _run(self, steps: list[Any]) -> None:
        chosen, stretch, left = self.everyone, 0, LIMIT
        while not self.gone.all():
            if self.random is not None and stretch <= 0:
                chosen, stretch = self._some_warps(), int(self.random.integers(1, 200))
            able = chosen[~(self.gone | self.waiting)[chosen]]
            if not len(able):
                # those that were not chosen may be able
                stretch = 0
                if (self.gone | self.waiting).all():
                    raise Fault("a barrier that not all threads of a program reach")
                continue
            low, who, ahead = self._behind(able)
            made = self._straight(steps, low, who, ahead, stretch)
            stretch, left = stretch - made, left - made
            if left < 0:
                raise Fault("no end")
            self._open_barriers()

    def _behind(self, able: Ints) -> tuple[int, Ints, int | None]:
        """Those that are behind go first, so that ways that part come together again; a warp waits for its threads.

        Returns where they are, who, and the next place where others are; None: there are no others.
        """
        places = self.at[able]
        distinct = [*np.unique(places).tolist(), len(self.program.code)]
        for low, ahead in pairwise(distinct):
            who = able[places == low]
            if self.program.code[low].parts[0] in TOGETHER:
                who = who[np.bincount(self.warp[who])[self.warp[who]] == WARP]
            if len(who):
                return low, who, ahead if len(who) < len(able) else None
        return low, able[places == low], ahead

    def _some_warps(self) -> Ints:
        assert self.random is not None
        warps = self.random.random(len(self.everyone) // WARP) < self.random.choice([0.1, 0.5, 0.9])
        return self.everyone[np.repeat(warps, WARP)]

    def _straight(self, steps: list[Any], at: int, who: Ints, ahead: int | None, stretch: int) -> int:
        """From one instruction to the next that parts threads or has others waiting. Returns how many were made."""
        made = 0
        while True:
            instruction = self.program.code[at]
            live = who
            if instruction.guard:
                register, negated = instruction.guard
                live = who[self.read(register, who) != negated]
            try:
                target = steps[at](self, live) if len(live) else None
            except Fault as fault:
                raise Fault(f"{fault}: {instruction.text}") from None
            made, at = made + 1, at + 1
            stops = target is not None or instruction.parts[0] in ("bar", "ret")
            if ahead is not None:
                stops = stops or at >= ahead or self.program.code[at].parts[0] in TOGETHER
            if stops or (self.random is not None and made >= stretch):
                self.at[who] = at
                if target is not None:
                    self.at[live] = target
                return made

    def _open_barriers(self) -> None:
        """Where all threads of a program wait; that some have ended, which a GPU allows, counts as a fault."""
        if self.waiting.any():
            waiting: NDArray[np.bool_] = self.waiting.reshape(self.programs, -1)
            complete = waiting.all(1)
            self.epoch[complete] += 1
            lanes = self.at.reshape(self.programs, -1, WARP)[complete]
            if (lanes != lanes[..., :1]).any():
                raise Fault("threads of a warp at different barriers")
            waiting[complete] = False
