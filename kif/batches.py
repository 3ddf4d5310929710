"""Batches of encoded rows: shuffled without replacement within an epoch, alike in length within a batch if wanted."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kif.families import Encoded

BUCKET_BATCHES = 16
"""Batches whose rows are sorted by length together, at most: enough to save most padding, few enough to stay random."""

MIN_BUCKETS = 4
"""Buckets that an epoch is cut into, at least, where it has so many batches: sorted as a whole, few rows would give the
same batches every time."""


class BatchStream:
    """An endless stream of batches over epochs of `rows`; one batch of an epoch may be smaller.

    Every row occurs exactly once in an epoch. Rows are shuffled; if `by_length`, they are then cut into groups of
    up to `BUCKET_BATCHES` batches, sorted by length within a group, and all batches are shuffled, so that padding is
    small and the order random. The order depends on `seed` and the epoch only.

    Args:
        rows: encoded rows.
        batch_size: rows in a batch.
        seed: any string that identifies the stream.
        by_length: whether a batch holds rows of like length. Rows of one task or label may be alike in length, so that
            such a batch stands for fewer of them than one drawn at random.
    Raises: ValueError without rows.
    """

    def __init__(self, rows: Sequence[Encoded], batch_size: int, seed: str, by_length: bool = True) -> None:
        if not rows:
            raise ValueError("there are no rows to make batches of")
        self.rows, self.batch_size, self.seed, self.by_length = rows, batch_size, seed, by_length
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
        if self.by_length:
            bucket = max(1, min(BUCKET_BATCHES, len(order) // self.batch_size // MIN_BUCKETS)) * self.batch_size
            for start in range(tail, len(order), bucket):
                order[start : start + bucket] = sorted(order[start : start + bucket], key=lambda i: self.rows[i].length)
        batches = [order[:tail]] if tail else []
        batches += [order[i : i + self.batch_size] for i in range(tail, len(order), self.batch_size)]
        rng.shuffle(batches)
        return batches
