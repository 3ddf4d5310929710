"""Corrections of Triton's interpreter, where it differs from the hardware that it stands for.

- A float argument stays a Python number, of 64 bits; a compiled kernel gets 32.
- bfloat16: float32 is cut off (triton 3.6, 3.9), and denormals become something else; hardware rounds to nearest even.
- fma: product and sum are rounded one by one (triton 3.6); hardware rounds once.
- A scalar as a loop bound fails with numpy 2.4 (triton 3.4, 3.6).

With them, what the interpreter computes can be compared bit by bit. And it looks for triton's builtins once, where by
itself it does so for every call of a jitted function, a quarter of the time.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def correct_interpreter() -> None:
    builder = interpreter.InterpreterBuilder
    convert, cast, patch_tensor = interpreter._implicit_cvt, builder.cast_impl, interpreter._patch_lang_tensor

    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return convert(arg)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        old, new = src.dtype.scalar, dst_type.scalar
        if old == tl.bfloat16 and new == tl.float32:
            return interpreter.TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), new)
        if old == tl.float32 and new == tl.bfloat16:
            return interpreter.TensorHandle(_rounded(src.data), new)
        return cast(self, src, dst_type)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # products of float32 are exact in float64, and the sum is rounded there to much more than float32
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        # triton 3.4 has no scope and sets attributes for good
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    @cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        for name in builtins(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._implicit_cvt = implicit_cvt
    builder.cast_impl = cast_impl
    if not hasattr(interpreter._interpreter, "fma_fp32"):
        builder.create_fma = create_fma
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._patch_builtin = patch_builtin


def _rounded(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16."""
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), nearest).astype(np.uint16)
