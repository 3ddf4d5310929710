"""Numbers of a GPU that numpy has no function for. All on arrays, all rounded as IEEE 754 and PTX have it.

The bits of nan are the host's, and the sign of a smallest or largest 0 is that of either.
"""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

_fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
_fma.restype, _fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once.

    The product is exact in float64. Its sum there is rounded to odd, from which rounding to float32 is right
    (Boldo and Melquiond 2008).
    """
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = np.asarray(total).view(np.int64) % 2 == 0
    odd = np.where(even & (error != 0) & np.isfinite(error), np.nextafter(total, np.copysign(np.inf, error)), total)
    return np.where(np.isfinite(total), odd, total).astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float64, rounded once; by the C library, once for equal numbers."""
    rows = np.stack(np.broadcast_arrays(np.atleast_1d(a), b, c), 1).view(np.uint64)
    unique, places = np.unique(rows, axis=0, return_inverse=True)
    return np.array([_fma(*row) for row in unique.view(np.float64)])[places.reshape(-1)]


def bfloat16(x: Array) -> Array:
    """Bits of the nearest bfloat16, ties to even; 0x7FFF for nan."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isnan(x), 0x7FFF, (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def flushed(x: Array) -> Array:
    """0 of the same sign for denormals."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """Four of the eight bytes of a and b, lowest first, by four bits of the selector each; the last takes the sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    found = np.zeros(a.shape, np.uint32)
    for place in range(4):
        choice = selector >> np.uint32(4 * place)
        byte = np.where(choice & 4, b, a) >> (8 * (choice & 3)) & 255
        byte = np.where(choice & 8, 255 * (byte >> 7), byte).astype(np.uint32)
        found |= byte << np.uint32(8 * place)
    return found


def quotient(a: Array, b: Array) -> Array:
    """Of integers, cut off towards 0."""
    rest = np.where(b == 0, 0, np.fmod(a, np.where(b == 0, 1, b)))
    return np.where(b == 0, ~a.dtype.type(0), (a - rest) // np.where(b == 0, 1, b)).astype(a.dtype)


def shifted_left(a: Array, by: Array) -> Array:
    """Shifts by the width and more give 0."""
    width = 8 * a.itemsize
    return np.where(by >= width, a.dtype.type(0), a << np.minimum(by, width - 1).astype(a.dtype))


def shifted_right(a: Array, by: Array) -> Array:
    """Shifts by the width and more leave the sign, or 0 of unsigned numbers."""
    width = 8 * a.itemsize
    cut = a >> np.minimum(by, width - 1).astype(a.dtype)
    return cut if a.dtype.kind == "i" else np.where(by >= width, a.dtype.type(0), cut)
