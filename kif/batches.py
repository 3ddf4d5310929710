"""Batches of encoded rows: shuffled without replacement within an epoch, alike in length within a batch."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kif.families import Encoded

BUCKET_BATCHES = 16
"""Batches whose rows are sorted by length together: enough to save most padding, few enough to stay random."""


class BatchStream:
    """An endless stream of batches over epochs of `rows`; an epoch's last batch may be smaller.

    Every row occurs exactly once in an epoch. Rows are shuffled, cut into groups of `BUCKET_BATCHES` batches,
    sorted by length within a group, and the group's batches are shuffled, so that padding is small and the order
    random. The order depends on `seed` and the epoch only.

    Args:
        rows: encoded rows.
        batch_size: rows in a batch.
        seed: any string that identifies the stream.
    Raises: ValueError without rows.
    """

    def __init__(self, rows: Sequence[Encoded], batch_size: int, seed: str) -> None:
        if not rows:
            raise ValueError("there are no rows to make batches of")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.epoch = 0
        self._batches = self._shuffled()
        self._position = 0

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def next(self) -> list[Encoded]:
        """The next batch; a new epoch begins by itself."""
        if self._position == len(self._batches):
            self.epoch += 1
            self._batches, self._position = self._shuffled(), 0
        batch = self._batches[self._position]
        self._position += 1
        return [self.rows[i] for i in batch]

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands; rows, batch size and seed are given anew."""
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]
        self._batches, self._position = self._shuffled(), state["position"]

    def _shuffled(self) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = rng.sample(range(len(self.rows)), len(self.rows))
        # the short batch is taken off first, so that it is a random one and not always the longest rows
        tail = len(order) % self.batch_size
        batches = [order[:tail]] if tail else []
        group = BUCKET_BATCHES * self.batch_size
        for start in range(tail, len(order), group):
            members = sorted(order[start : start + group], key=lambda i: self.rows[i].length)
            batches += [members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size)]
        rng.shuffle(batches)
        return batches
