"""Continual-learning metrics on an accuracy matrix.

`accuracy[i][j]` is the test performance on task i (in training order) after training on task j, in percent;
`None` where it was not measured. K is the number of tasks. Formulas count tasks from 1, as the paper does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

AccuracyMatrix = Sequence[Sequence[float | None]]


def overall_performance(accuracy: AccuracyMatrix) -> float:
    """Mean performance over all tasks after the last one, in percent.

    OP = 1/K * sum_{i=1..K} a[i, K]   (Eq. 10; Chaudhry et al., 2018)

    Raises ValueError if the matrix is empty or not square, or if an entry of the last column is missing or
    not finite.
    """
    size = _size(accuracy)
    return math.fsum(_entry(accuracy, i, size - 1, "OP") for i in range(size)) / size


def backward_transfer(accuracy: AccuracyMatrix) -> float | None:
    """Mean change of earlier tasks from right after their own training to the end, in percentage points.

    BWT = 1/(K-1) * sum_{i=1..K-1} (a[i, K] - a[i, i])   (Eq. 11; Lopez-Paz and Ranzato, 2017)

    Negative values are forgetting. None where it is not defined: for one task, and for joint training, which
    measures the last column only. Raises ValueError for a matrix with gaps, see `overall_performance`.
    """
    size = _size(accuracy)
    earlier = range(size - 1)
    if all(accuracy[i][i] is None for i in earlier):
        return None
    changes = [_entry(accuracy, i, size - 1, "BWT") - _entry(accuracy, i, i, "BWT") for i in earlier]
    return math.fsum(changes) / len(changes)


def forward_transfer(accuracy: AccuracyMatrix, zero_shot: Sequence[float]) -> float | None:
    """Mean gain that training on earlier tasks brings to a task before its own training, in percentage points.

    FWT = 1/(K-1) * sum_{i=2..K} (a[i, i-1] - z[i])   (Lopez-Paz and Ranzato, 2017)

    `zero_shot` holds z, the K performances before any training. None where FWT is not defined: for one task,
    and where no a[i, i-1] was measured. Raises ValueError if some of them were, if `zero_shot` does not hold K
    finite numbers, and for a bad matrix, see `overall_performance`.
    """
    size = _size(accuracy)
    if len(zero_shot) != size:
        raise ValueError(f"zero_shot holds {len(zero_shot)} values for {size} tasks")
    for i, value in enumerate(zero_shot):
        if value is None or not math.isfinite(value):
            raise ValueError(f"zero_shot[{i}] is {value}, not a finite number")
    later = range(1, size)
    if all(accuracy[i][i - 1] is None for i in later):
        return None
    gains = [_entry(accuracy, i, i - 1, "FWT") - zero_shot[i] for i in later]
    return math.fsum(gains) / len(gains)


def _size(accuracy: AccuracyMatrix) -> int:
    """K, after checking that every row has K entries."""
    if not accuracy:
        raise ValueError("the accuracy matrix is empty")
    for i, row in enumerate(accuracy):
        if len(row) != len(accuracy):
            raise ValueError(f"accuracy[{i}] holds {len(row)} values; with {len(accuracy)} tasks it must hold as many")
    return len(accuracy)


def _entry(accuracy: AccuracyMatrix, i: int, j: int, metric: str) -> float:
    """accuracy[i][j], which `metric` cannot do without."""
    value = accuracy[i][j]
    if value is None:
        raise ValueError(f"accuracy[{i}][{j}] (task {i + 1} after task {j + 1}) was not measured; {metric} needs it")
    if not math.isfinite(value):
        raise ValueError(f"accuracy[{i}][{j}] is {value}, not a finite number")
    return value
