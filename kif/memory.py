"""Replay memory: a few training rows of every finished task (section 3, "Problem Formulation")."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence

from kif.families import Encoded


class ReplayMemory:
    """Rows kept of finished tasks, encoded; all tasks' rows together are M_<k.

    Args:
        fraction: share of a task's training rows that is kept (2% in the paper, after SAPT), rounded down as in
            the released code, at least one row. Between 0 and 1, neither of them.
        balanced: draw evenly over the task's classes first (at least one of each while there is room), then fill
            up at random; otherwise all at random.
        seed: the draw depends on this and on the task's name, not on what was drawn before.
    Raises: ValueError for another fraction.
    """

    def __init__(self, fraction: float, balanced: bool, seed: int) -> None:
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction must lie above 0 and below 1, got {fraction}")
        self.fraction, self.balanced, self.seed = fraction, balanced, seed
        self.indices: dict[str, list[int]] = {}
        self._rows: dict[str, list[Encoded]] = {}

    def add(self, task: str, rows: Sequence[Encoded], labels: Sequence[str]) -> None:
        """Keep rows of a finished task, drawn without replacement.

        Args:
            task: its name; a task that was added before is replaced.
            rows: its training rows.
            labels: the label of each row.
        Raises: ValueError without rows, or when rows and labels differ in number.
        """
        if not rows or len(rows) != len(labels):
            raise ValueError(f"task {task}: {len(rows)} rows and {len(labels)} labels to remember")
        size = max(1, math.floor(self.fraction * len(rows) + 1e-9))
        draw = random.Random(f"{self.seed}/memory/{task}")
        order = draw.sample(range(len(rows)), len(rows))
        if self.balanced:
            order = _balanced_first(order, labels, size)
        self.indices[task] = sorted(order[:size])
        self._rows[task] = [rows[i] for i in self.indices[task]]

    def restore(self, task: str, rows: Sequence[Encoded]) -> None:
        """Hold these rows of a task that an earlier run finished."""
        self.indices[task] = list(range(len(rows)))
        self._rows[task] = list(rows)

    def rows(self) -> list[Encoded]:
        """All rows of all remembered tasks, in the order the tasks were added."""
        return [row for rows in self._rows.values() for row in rows]

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))


def _balanced_first(order: list[int], labels: Sequence[str], size: int) -> list[int]:
    """`order` with max(1, size // classes) rows of every class moved to the front (the released code's rule)."""
    by_class: defaultdict[str, list[int]] = defaultdict(list)
    for index in order:
        by_class[labels[index]].append(index)
    share = max(1, size // len(by_class))
    first = [index for members in by_class.values() for index in members[:share]]
    chosen = set(first)
    return first + [index for index in order if index not in chosen]
