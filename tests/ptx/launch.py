"""Launches of Triton kernels, compiled for a GPU that is not there and run here."""

from __future__ import annotations

import ctypes
import gc
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.contract.compile import OfflineDriver

from .instructions import Step, decode
from .machine import Machine
from .memory import Memory
from .program import Fault, Program, parse

launched: Counter[str] = Counter()
"""How often each kernel has run."""

observers: list[Callable[[str, Memory], None]] = []
"""Called after each launch with the kernel's name and its memory."""

_NUMBERS: dict[str, Any] = {
    "fp32": np.float32, "fp64": np.float64, "u1": np.uint8, "i32": np.int32, "i64": np.int64,
}  # fmt: skip
_programs: dict[str, tuple[Program, list[Step]]] = {}


def emulate(architecture: int, seed: int | None = None) -> None:
    """From now on every launch in this process runs here, on CPU tensors, as compiled for this architecture (80, 90).

    `seed`: of the order of warps; None: all together.
    """
    compile_and_launch = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        driver.set_active(OfflineDriver(architecture))
        compiled = compile_and_launch(kernel, *args, grid=grid, warmup=True, **options)
        if warmup:
            return compiled
        if compiled.hash not in _programs:
            program = parse(compiled.asm["ptx"])
            _programs[compiled.hash] = program, decode(program)
            # millions of objects that stay: collections need not look at them
            gc.freeze()
        program, steps = _programs[compiled.hash]
        bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in options.items() if k in kernel.arg_names})
        bound.apply_defaults()
        named = bound.arguments
        grid = grid(named) if callable(grid) else grid
        signature = compiled.src.signature
        given = [(named[name], kind) for name, kind in signature.items() if kind != "constexpr"]
        extents = (*grid, 1, 1)[:3]
        programs = extents[0] * extents[1] * extents[2]
        memory = Memory(_buffers(value for value, _ in given), compiled.metadata.shared, programs, program.threads)
        values = [_parameter(value, kind) for value, kind in given]
        # triton adds pointers to scratch memory, which is not used
        assert len(program.parameters) - len(values) <= 2
        values += [np.uint64(0)] * (len(program.parameters) - len(values))
        parameters = dict(zip(program.parameters, values, strict=True))
        order = None if seed is None else seed + launched.total()
        try:
            Machine(program, extents, memory, parameters, order).run(steps)
        except Fault as fault:
            raise Fault(f"{kernel.fn.__name__}, order {order}: {fault}") from None
        launched[kernel.fn.__name__] += 1
        for observe in observers:
            observe(kernel.fn.__name__, memory)
        return compiled

    JITFunction.run = run


def _parameter(value: Any, kind: str) -> Any:
    return np.uint64(value.data_ptr()) if isinstance(value, Tensor) else _NUMBERS[kind](value)


def _last(tensor: Tensor) -> int:
    """Place of the last element."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _buffers(values: Any) -> list[tuple[int, NDArray[np.uint8]]]:
    """Memory of the tensors; those that overlap are one. That a kernel leaves one for a neighbour is not noticed."""
    spans: list[list[int]] = []
    tensors = (value for value in values if isinstance(value, Tensor) and value.numel())
    for begin, end in sorted((t.data_ptr(), t.data_ptr() + t.itemsize * (1 + _last(t))) for t in tensors):
        if spans and begin < spans[-1][1]:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([begin, end])
    return [
        (begin, np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))) for begin, end in spans
    ]
