"""Replay memory: how many rows, which ones, and that they are the same in every run of a seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kif.families import Encoded
from kif.memory import ReplayMemory


def rows(count: int, task: str = "t") -> list[Encoded]:
    return [Encoded(input_ids=(i,), target=(0,), task=task, truncated=False) for i in range(count)]


@given(st.integers(1, 300), st.floats(0.001, 0.999), st.booleans(), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_size_and_no_row_twice(count: int, fraction: float, balanced: bool, classes: int) -> None:
    memory = ReplayMemory(fraction, balanced, seed=0)
    memory.add("t", rows(count), [str(i % classes) for i in range(count)])
    assert len(memory) == max(1, int(fraction * count + 1e-9))
    assert len({row.input_ids for row in memory.rows()}) == len(memory)


def test_paper_sizes() -> None:
    for count, expected in ((1000, 20), (400, 8), (250, 5), (40, 1)):
        memory = ReplayMemory(0.02, False, seed=0)
        memory.add("t", rows(count), ["a"] * count)
        assert len(memory) == expected


def test_balanced_draws_every_class() -> None:
    labels = ["rare" if i < 3 else f"c{i % 4}" for i in range(1000)]
    memory = ReplayMemory(0.02, True, seed=0)
    memory.add("t", rows(1000), labels)
    drawn = Counter(labels[i] for i in memory.indices["t"])
    assert drawn["rare"] == 3 and min(drawn[f"c{i}"] for i in range(4)) >= 4
    few = ReplayMemory(0.003, True, seed=0)
    few.add("t", rows(1000), labels)
    assert len({labels[i] for i in few.indices["t"]}) == 3


def test_the_draw_depends_on_seed_and_task_only() -> None:
    def draw(seed: int, before: bool) -> list[int]:
        memory = ReplayMemory(0.1, False, seed)
        if before:
            memory.add("other", rows(50), ["a"] * 50)
        memory.add("t", rows(200), ["a"] * 200)
        return memory.indices["t"]

    assert draw(0, False) == draw(0, True) != draw(1, False)


def test_rows_of_all_tasks_and_replacement() -> None:
    memory = ReplayMemory(0.1, False, 0)
    memory.add("a", rows(100, "a"), ["x"] * 100)
    memory.add("b", rows(50, "b"), ["x"] * 50)
    memory.add("a", rows(30, "a"), ["x"] * 30)
    assert Counter(row.task for row in memory.rows()) == {"a": 3, "b": 5}


def test_bad_input() -> None:
    memory = ReplayMemory(0.1, False, 0)
    with pytest.raises(ValueError, match="task t: 0 rows"):
        memory.add("t", [], [])
    with pytest.raises(ValueError, match="2 rows and 1 labels"):
        memory.add("t", rows(2), ["a"])
