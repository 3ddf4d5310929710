"""OP, BWT and FWT against hand-computed values and their definitions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kif.metrics import backward_transfer, forward_transfer, overall_performance

HAND: list[list[float | None]] = [
    [90.0, 70.0, 60.0],
    [10.0, 80.0, 75.0],
    [None, 20.0, 50.0],
]
ZERO_SHOT = [5.0, 4.0, 26.0]


def full_matrices(least: int = 2) -> st.SearchStrategy[list[list[float]]]:
    """Square matrices of percentages without gaps."""
    percent = st.floats(0, 100)
    return st.integers(least, 6).flatmap(
        lambda size: st.lists(st.lists(percent, min_size=size, max_size=size), min_size=size, max_size=size)
    )


def test_hand_computed() -> None:
    assert overall_performance(HAND) == pytest.approx((60 + 75 + 50) / 3)
    assert backward_transfer(HAND) == pytest.approx(((60 - 90) + (75 - 80)) / 2)
    assert forward_transfer(HAND, ZERO_SHOT) == pytest.approx(((10 - 4) + (20 - 26)) / 2)


def test_one_task_has_no_transfer() -> None:
    assert overall_performance([[42.0]]) == 42.0
    assert backward_transfer([[42.0]]) is None
    assert forward_transfer([[42.0]], [1.0]) is None


def test_joint_training_has_op_only() -> None:
    joint = [[None, None, 70.0], [None, None, 80.0], [None, None, 90.0]]
    assert overall_performance(joint) == pytest.approx(80.0)
    assert backward_transfer(joint) is None
    assert forward_transfer(joint, ZERO_SHOT) is None


@given(full_matrices(least=1))
def test_op_is_the_mean_of_the_last_column(accuracy: list[list[float]]) -> None:
    column = [row[-1] for row in accuracy]
    assert overall_performance(accuracy) == pytest.approx(sum(column) / len(column))


@given(full_matrices())
def test_bwt_by_definition(accuracy: list[list[float]]) -> None:
    size = len(accuracy)
    expected = sum(accuracy[i][size - 1] - accuracy[i][i] for i in range(size - 1)) / (size - 1)
    assert backward_transfer(accuracy) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=6))
def test_bwt_is_zero_when_no_task_changes(scores: list[float]) -> None:
    accuracy = [[score] * len(scores) for score in scores]
    assert backward_transfer(accuracy) == 0.0


@given(full_matrices(), st.floats(-20, 20))
def test_fwt_moves_against_zero_shot(accuracy: list[list[float]], shift: float) -> None:
    zero_shot = [30.0] * len(accuracy)
    before = forward_transfer(accuracy, zero_shot)
    after = forward_transfer(accuracy, [value + shift for value in zero_shot])
    assert before is not None and after is not None
    assert after == pytest.approx(before - shift, abs=1e-9)


@given(full_matrices())
def test_metrics_ignore_what_they_do_not_need(accuracy: list[list[float]]) -> None:
    """OP and BWT look at the diagonal and the last column only."""
    size = len(accuracy)
    sparse = [[v if j in (i, size - 1) else None for j, v in enumerate(row)] for i, row in enumerate(accuracy)]
    assert overall_performance(sparse) == overall_performance(accuracy)
    assert backward_transfer(sparse) == backward_transfer(accuracy)


@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        ([], "empty"),
        ([[1.0, 2.0], [3.0]], r"accuracy\[1\] holds 1 values"),
        ([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]], r"accuracy\[0\] holds 3 values"),
        ([[1.0, None], [None, 2.0]], r"accuracy\[0\]\[1\].* not measured; OP"),
        ([[1.0, 2.0], [None, math.nan]], r"accuracy\[1\]\[1\] is nan"),
    ],
)
def test_bad_matrices_are_named(accuracy: list[list[float | None]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overall_performance(accuracy)


def test_gaps_that_only_transfer_needs_are_named() -> None:
    gap: list[list[float | None]] = [[90.0, 70.0, 60.0], [None, None, 75.0], [None, None, 50.0]]
    with pytest.raises(ValueError, match=r"accuracy\[1\]\[1\] \(task 2 after task 2\) was not measured; BWT"):
        backward_transfer(gap)
    half: list[list[float | None]] = [[90.0, 70.0, 60.0], [10.0, 80.0, 75.0], [None, None, 50.0]]
    with pytest.raises(ValueError, match=r"accuracy\[2\]\[1\] .* FWT needs it"):
        forward_transfer(half, ZERO_SHOT)


@pytest.mark.parametrize(
    ("zero_shot", "message"), [([1.0], "holds 1 values for 3 tasks"), ([1.0, math.inf, 2.0], r"zero_shot\[1\] is inf")]
)
def test_bad_zero_shot_is_named(zero_shot: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward_transfer(HAND, zero_shot)
