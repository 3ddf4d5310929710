"""The k-th largest score on the CPU: numpy's partition, kept away from the inputs on which it is slow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SMALL = 2048
"""Fewer scores than that are partitioned at once."""

SAMPLE = 16384
"""Scores that are sorted to learn what the others are like."""

TIES = 32
"""Partition is slow, up to 100 times, where many scores are equal. So a value that makes up 1 / TIES is looked for."""

BLOCK = 65536
"""Scores that are compared at a time: the booleans stay in the cache."""


def _usable_numpy() -> ModuleType | None:
    try:
        import numpy

        torch.zeros(1).numpy()
    except (ImportError, RuntimeError):  # RuntimeError: a numpy that this torch cannot work with
        return None
    return numpy


_numpy = _usable_numpy()


def thresholds_(
    thresholds: Tensor,
    histograms: Tensor | None,
    state: Tensor | None,
    ranks: Tensor,
    limits: Tensor,
    scores: Sequence[Tensor],
    factors: Sequence[Tensor],
    counted: bool,
    starts: Sequence[int],
    numels: Sequence[int],
    chunks: Tensor | None,
) -> None:
    """thresholds[side, group] <- the ranks[group]-th largest of the group's part of scores[side] (* factors[side]).

    Always exact; as in the reference. Scores must not be negative.
    """
    rows = []
    for side, importance in enumerate(scores):
        x = _ranked(importance, factors[side] if factors else None)
        parts = [x[a : a + n] for a, n in zip(starts, numels, strict=True)] if starts else [x]
        rows.append([kth_largest(part, k) for part, k in zip(parts, ranks.tolist(), strict=True)])
    thresholds.copy_(torch.tensor(rows, dtype=torch.float32))


def kth_largest(x: Tensor, k: int) -> float:
    """The k-th largest, counted from 1, of a flat float32 tensor without negative values; x is left as it is."""
    if _numpy is None:
        return float(x.kthvalue(x.numel() - k + 1).values)
    # bits of floats that are not negative are ordered as the floats are, and integers are partitioned twice as fast
    return float(_select(_numpy, x.numpy().view(_numpy.int32), k).view(_numpy.float32))


def _ranked(importance: Tensor, factor: Tensor | None) -> Tensor:
    """I or I * U as a flat float32 tensor; I itself where it is one."""
    x = importance.detach().reshape(-1).float()
    return x if factor is None else x * factor.detach().reshape(-1).float()


def _select(np: ModuleType, x: Any, k: int) -> Any:
    """The k-th largest of an integer array.

    Where a sample of x holds many equal values, bounds for the result are taken from it, and only what lies between
    them is looked at further. The result is exact whatever the sample; it decides on the time only.
    """
    for _ in range(4):
        if x.size <= SMALL:
            break
        # an odd stride, so that it does not fall in step with rows of a matrix
        sample = np.sort(x[:: (x.size // min(SAMPLE, x.size // 8)) | 1])
        run = len(sample) // TIES
        if not np.any(sample[run:] == sample[: len(sample) - run]):
            break
        # five standard deviations of the number of sampled values above the result
        p = k / x.size
        middle, spread = (1.0 - p) * len(sample), 5.0 * math.sqrt(p * (1.0 - p) * len(sample)) + 1.0
        low = sample[max(0, math.floor(middle - spread))]
        high = sample[min(len(sample) - 1, math.ceil(middle + spread))]
        found, k, x = _narrow(np, x, k, low, high)
        if found is not None:
            return found
    return np.partition(x, x.size - k)[x.size - k]


def _narrow(np: ModuleType, x: Any, k: int, low: Any, high: Any) -> tuple[Any, int, Any]:
    """(the k-th largest or None, rank among what is left, what is left): x without all that lies beyond the bounds."""
    above, below, inside = 0, 0, []
    for i in range(0, x.size, BLOCK):
        block = x[i : i + BLOCK]
        is_above, is_below = block > low, block < high
        above += np.count_nonzero(is_above)
        below += np.count_nonzero(is_below)
        is_above &= is_below
        inside.append(block[is_above])
    if k <= x.size - below:
        is_above = x > high
        return (high, k, x) if k > np.count_nonzero(is_above) else (None, k, x[is_above])
    if k > above:
        is_below = x < low
        k -= x.size - np.count_nonzero(is_below)
        return (low, k, x) if k <= 0 else (None, k, x[is_below])
    return None, k - (x.size - below), np.concatenate(inside)
