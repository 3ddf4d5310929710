"""MTL: all tasks at once, the upper bound."""

from __future__ import annotations

from collections.abc import Sequence

from kif.methods.base import SingleAdapterMethod
from kif.tasks import Task


class MTL(SingleAdapterMethod):
    """One LoRA adapter on the shuffled union of all tasks; only the last column of the accuracy matrix exists."""

    name = "mtl"
    summary = "multi-task learning on the union of all tasks (upper bound, not continual)"
    source = "last paragraph of Baselines, section 4"
    plain_passes = True
    unused = ("outer_lr", "outer_batch_size", "memory_fraction", "memory_balanced")

    def phases(self, tasks: Sequence[Task]) -> list[list[Task]]:
        return [list(tasks)]
