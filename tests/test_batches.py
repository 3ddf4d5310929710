"""Batches: every row once an epoch, deterministic, resumable, little padding."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kif.batches import BatchStream
from kif.families import Encoded


def rows(lengths: list[int]) -> list[Encoded]:
    return [
        Encoded(input_ids=(index,) * length, target=(1,), task="t", truncated=False)
        for index, length in enumerate(lengths)
    ]


def identity(row: Encoded) -> int:
    return row.input_ids[0]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_row_once(lengths: list[int], batch_size: int, epochs: int) -> None:
    stream = BatchStream(rows(lengths), batch_size, "s")
    for epoch in range(epochs):
        batches = [stream.next() for _ in range(stream.batches_per_epoch)]
        assert stream.epoch == epoch
        assert Counter(identity(row) for batch in batches for row in batch) == Counter(range(len(lengths)))
        sizes = sorted(len(batch) for batch in batches)
        assert sizes[1:] == [batch_size] * (len(sizes) - 1) and 0 < sizes[0] <= batch_size


def test_order_depends_on_seed_and_epoch_only() -> None:
    def take(seed: str, count: int) -> list[list[int]]:
        stream = BatchStream(rows([5] * 50), 8, seed)
        return [[identity(row) for row in stream.next()] for _ in range(count)]

    assert take("a", 20) == take("a", 20)
    assert take("a", 7) != take("b", 7)
    assert take("a", 14)[:7] != take("a", 14)[7:]


def test_a_stream_continues_from_its_state() -> None:
    a, b = BatchStream(rows([5] * 50), 8, "s"), BatchStream(rows([5] * 50), 8, "s")
    for _ in range(10):
        a.next()
    b.load_state_dict(a.state_dict())
    assert [a.next() for _ in range(10)] == [b.next() for _ in range(10)]


def test_rows_of_a_batch_are_alike_in_length() -> None:
    lengths = [1 + (37 * i) % 100 for i in range(512)]
    stream = BatchStream(rows(lengths), 8, "s")
    padded = sum(8 * max(row.length for row in stream.next()) for _ in range(stream.batches_per_epoch))
    assert padded < 1.15 * sum(length + 1 for length in lengths)  # in random order it is 1.7 times


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("count", [40, 64, 200])
def test_few_rows_do_not_give_the_same_batches_again(count: int, by_length: bool) -> None:
    stream = BatchStream(rows([1 + i for i in range(count)]), 8, "s", by_length)
    batches = [frozenset(identity(row) for row in stream.next()) for _ in range(20 * stream.batches_per_epoch)]
    assert len(set(batches)) > 0.95 * len(batches)


def test_batches_of_any_length_hold_all_kinds() -> None:
    kinds = [i % 4 for i in range(512)]
    mixed = []
    for by_length in (True, False):
        stream = BatchStream(rows([10 + 10 * kind for kind in kinds]), 8, "s", by_length)
        batches = [{kinds[identity(row)] for row in stream.next()} for _ in range(stream.batches_per_epoch)]
        mixed.append(sum(map(len, batches)) / len(batches))
    assert mixed[0] < 1.5 and mixed[1] > 3.4  # of 8 rows drawn at random: 4 - 4 * 0.75^8 = 3.6


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        BatchStream([], 8, "s")
