"""Norm, clipping factor, non-finite flag and counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kif_kernels as kk
from kernel_tests.inputs import ANY, FINITE, FLOATS, HALF_ULP, SEEDS, Buffers, assert_same, examples, values
from kif_kernels import reference
from kif_kernels.kernels import launch
from kif_kernels.kernels.gradient import BLOCKS_PER_PROGRAM

CHUNK = BLOCKS_PER_PROGRAM * launch.BLOCK
SIZES = st.sampled_from([2, 15, 31, 1023, 1025, 5008, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
MAX_NORMS = st.sampled_from([0.0, 1e-3, 1.0, 100.0, 1e6])
INV_SCALES = st.sampled_from([None, 1.0, 2.0**-14, 0.3, 1e3])

SLACK = 32.0
"""Half ulps: a lane sums 16 squares, 1024 lanes are added by pairs, and a few roundings follow. A root halves it."""


class State:
    """The four scalars, each between margins; scale and skip hold what must be overwritten."""

    def __init__(self, device: torch.device) -> None:
        self.buffers = Buffers(device)
        self.scale = self.buffers.poison(1).view(())
        # no margins: a bool cannot hold the sentinel
        self.skip = torch.zeros(3, dtype=torch.bool, device=device)
        self.step = self.buffers.copy(torch.tensor([7.0], dtype=torch.float64)).view(())
        self.skipped = self.buffers.copy(torch.tensor([3])).view(())

    @property
    def scalars(self) -> tuple[Tensor, ...]:
        return self.scale, self.skip[1], self.step, self.skipped

    def check(self) -> None:
        self.buffers.check()
        assert not self.skip[0] and not self.skip[2]


def run(device: torch.device, grad: Tensor, max_norm: float, inv_scale: float | None) -> tuple[float, bool, float]:
    """(scale, skip, norm) of the kernels, found equal to the definition in what is not rounded."""
    buffers = Buffers(device)
    norm = buffers.poison(1).view(())
    ours, theirs, g = State(device), State(device), buffers.copy(grad)
    inv = None if inv_scale is None else torch.tensor(inv_scale, device=device)
    with launch.count_launches() as launches:
        kk.gradient_state_(g, *ours.scalars, max_norm=max_norm, inv_scale=inv, norm=norm)
    assert launches == {"square_sum_kernel": 1, "gradient_state_kernel": 1}
    reference.gradient_state_(g, *theirs.scalars, max_norm, inv, None)
    for state in (ours, theirs):
        state.check()
    buffers.check()
    assert_same(g.cpu(), grad, "gradient")
    for actual, expected, name in zip(ours.scalars[1:], theirs.scalars[1:], ("skip", "step", "skipped"), strict=True):
        assert_same(actual, expected, name)
    taken = not bool(ours.skip[1])
    assert float(ours.step) == 7.0 + taken and int(ours.skipped) == 3 + (not taken)
    assert taken == math.isfinite(float(norm))
    return float(ours.scale), not taken, float(norm)


def check(device: torch.device, grad: Tensor, max_norm: float, inv_scale: float | None) -> None:
    scale, skipped, found = run(device, grad, max_norm, inv_scale)
    factor = 1.0 if inv_scale is None else float(torch.tensor(inv_scale))
    norm = float(grad.double().norm()) * factor
    assert skipped == (not math.isfinite(norm))
    if not skipped:
        # squares, or their sums, may underflow
        assert abs(found - norm) <= SLACK * HALF_ULP * norm + 2.0**-64 * factor * len(grad)
    if skipped or max_norm == 0.0:
        assert scale == 1.0
        return
    expected = min(1.0, max_norm / (norm + 1e-6))
    assert abs(scale - expected) <= SLACK * HALF_ULP * expected, f"{scale} instead of {expected}"
    if max_norm > norm * (1.0 + 1e-5) + 1e-6:
        assert scale == 1.0, "what is short enough is not clipped"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(SIZES, SEEDS, FINITE, MAX_NORMS, INV_SCALES)
@examples(25)
def test_clipping(
    device: torch.device, dtype: torch.dtype, n: int, seed: int, kind: str, max_norm: float, inv_scale: float | None
) -> None:
    check(device, values(kind, n, seed, dtype), max_norm, inv_scale)


@given(
    SIZES, SEEDS, ANY, MAX_NORMS, INV_SCALES, st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 10**6)
)
@examples(25)
def test_one_bad_element_anywhere(
    device: torch.device, n: int, seed: int, kind: str, max_norm: float, inv_scale: float | None, bad: float, at: int
) -> None:  # fmt: skip
    grad = values(kind, n, seed)
    grad[at % n] = bad
    assert run(device, grad, max_norm, inv_scale)[:2] == (1.0, True)


@pytest.mark.parametrize("value", [0.0, 1e-40, -3.0, 1e18])
def test_one_element(device: torch.device, value: float) -> None:
    check(device, torch.tensor([value]), 1.0, None)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, CHUNK + 1])
def test_a_norm_that_overflows_is_skipped(device: torch.device, n: int, max_norm: float) -> None:
    assert run(device, torch.full((n,), 1e20), max_norm, None) == (1.0, True, math.inf)
    # before it is scaled back
    assert run(device, torch.full((n,), 1e20), max_norm, 1e-10)[:2] == (1.0, True)
    # and after
    assert run(device, torch.full((n,), 1e15), max_norm, 1e30)[:2] == (1.0, True)
    scale, skipped, _ = run(device, torch.full((n,), 1e15), max_norm, 1e10)
    assert not skipped and scale == (1.0 if max_norm == 0.0 else pytest.approx(1e-25 / n**0.5, rel=1e-5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_loss_scale_that_is_no_number(device: torch.device, bad: float) -> None:
    scale, skipped, _ = run(device, torch.full((100,), 2.0), 1.0, bad)
    assert (scale, skipped) == (1.0, bad != 0.0)


def test_counts_over_many_steps(device: torch.device) -> None:
    state, good = State(device), torch.full((100,), 2.0, device=device)
    bad = good.clone()
    bad[50] = math.nan
    for i in range(9):
        kk.gradient_state_(bad if i % 3 == 0 else good, *state.scalars, max_norm=1.0)
        assert bool(state.skip[1]) == (i % 3 == 0)
        # clipping of the step before does not linger
        assert float(state.scale) == (1.0 if i % 3 == 0 else pytest.approx(0.05, rel=1e-6))
    assert float(state.step) == 7.0 + 6 and int(state.skipped) == 3 + 3
    state.check()


def test_it_agrees_with_torch(device: torch.device) -> None:
    grads = [values("student", 3000, seed).to(device) for seed in range(3)]
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 0.7)
    state, flat = State(device), torch.cat(grads)
    kk.gradient_state_(flat, *state.scalars, max_norm=0.7)
    clipped = torch.cat([p.grad for p in parameters])
    torch.testing.assert_close(flat * state.scale, clipped, rtol=1e-6, atol=0.0)


def test_a_strided_gradient_takes_the_definition(device: torch.device) -> None:
    base = values("normal", 600, 0).view(300, 2).to(device)
    base[:, 1] = math.nan
    ours, theirs = State(device), State(device)
    with launch.count_launches() as launches:
        kk.gradient_state_(base[:, 0], *ours.scalars, max_norm=1.0)
    reference.gradient_state_(base[:, 0], *theirs.scalars, 1.0, None, None)
    assert not launches and not ours.skip[1]
    for actual, expected in zip(ours.scalars, theirs.scalars, strict=True):
        assert_same(actual, expected, "scalar")


def test_two_runs_are_the_same_bits(device: torch.device) -> None:
    grad, results = values("student", 3 * CHUNK + 5, 0).to(device), []
    for _ in range(2):
        state = State(device)
        kk.gradient_state_(grad.view(-1, 1), *state.scalars, max_norm=0.1)
        results.append(float(state.scale))
    assert results[0] == results[1] < 1.0


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    grad, state = values("normal", 100, 0).to(device), State(device)
    scale, skip, step, skipped = state.scalars
    for name, scalars in {
        "scale": (grad[:2], skip, step, skipped),
        "skip": (scale, torch.zeros((), device=device), step, skipped),
        "step": (scale, skip, scale, skipped),
        "skipped": (scale, skip, step, step),
    }.items():
        with pytest.raises(ValueError, match=name):
            kk.gradient_state_(grad, *scalars, max_norm=1.0)
    for name in ("inv_scale", "norm"):
        with pytest.raises(ValueError, match=name):
            kk.gradient_state_(grad, *state.scalars, max_norm=1.0, **{name: step})
