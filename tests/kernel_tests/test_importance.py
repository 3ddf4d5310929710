"""Importance EMA, uncertainty and the histogram of the stored scores."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kif_kernels as kk
from kernel_tests.inputs import (
    ANY,
    FLOATS,
    SEEDS,
    SIZES,
    Buffers,
    assert_as_accurate,
    assert_same,
    examples,
    values,
)
from kif_kernels import reference
from kif_kernels.kernels import launch
from kif_kernels.layout import BINS, WHOLE_SHIFT, WINDOW_SHIFT

DECAYS = st.sampled_from([0.0, 0.45, 0.55, 0.999, 1.0])

VARIANTS = {
    "plain": {},
    "first": {"reset": True},
    "not skipped": {"skip": False},
    "skipped": {"skip": True},
    "first, skipped": {"reset": True, "skip": True},
    "uncertainty": {"uncertain": True},
    "uncertainty, first": {"uncertain": True, "reset": True},
    "uncertainty, skipped": {"uncertain": True, "skip": True},
    "counted": {"counted": True},
    "counted, first, skipped": {"counted": True, "reset": True, "skip": True},
    "uncertainty, counted, first": {"uncertain": True, "counted": True, "reset": True},
}


def check(
    device: torch.device,
    n: int,
    seed: int,
    kinds: tuple[str, str],
    decay: float,
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    state_dtype: torch.dtype = torch.float32,
    reset: bool = False,
    skip: bool | None = None,
    uncertain: bool = False,
    counted: bool = False,
) -> None:
    """Run the kernel and the definition on the same input, and compare both with float64."""
    buffers, uncertainty_decay = Buffers(device), 0.7
    weight = buffers.copy(values(kinds[0], n, seed, dtypes[0]))
    grad = buffers.copy(values(kinds[1], n, seed + 1, dtypes[1]))
    old = values("lognormal", n, seed + 2).abs().to(state_dtype).to(device)
    old_u = values("mixed", n, seed + 3).abs().to(state_dtype).to(device) if uncertain else None
    # with reset, what was there must not be read
    ours = buffers.poison(n, state_dtype) if reset else buffers.copy(old.cpu())
    ours_u = None if old_u is None else buffers.poison(n, state_dtype) if reset else buffers.copy(old_u.cpu())
    skip_tensor = None if skip is None else torch.tensor(skip, device=device)
    histogram = torch.arange(BINS, device=device) if counted else None
    window = torch.tensor([WHOLE_SHIFT, 0] if seed % 2 else [WINDOW_SHIFT, 32000], device=device) if counted else None
    options = dict(reset=reset, skip=skip_tensor, histogram=histogram, window=window)

    with launch.count_launches() as launches:
        if ours_u is None:
            result = kk.importance_ema_(ours, weight, grad, decay, **options)
        else:
            result = kk.importance_uncertainty_ema_(ours, ours_u, weight, grad, decay, uncertainty_decay, **options)
    assert result is ours and launches == {"importance_kernel": 1}
    buffers.check()

    theirs, theirs_u = old.clone(), None if old_u is None else old_u.clone()
    reference.importance_ema_(theirs, weight, grad, decay, reset, theirs_u, uncertainty_decay, skip_tensor, None, None)
    if skip:
        assert_same(ours, torch.zeros_like(old) if reset else old, "importance of a skipped step")
        if ours_u is not None and old_u is not None:
            assert_same(ours_u, torch.zeros_like(old) if reset else old_u, "uncertainty of a skipped step")
    else:
        s = (weight.double() * grad.double()).abs()
        s = torch.where((weight.float() * grad.float()).isfinite(), s, 0.0)
        exact = (0.0 if reset else decay * old.double()) + (1.0 - decay) * s
        assert_as_accurate(ours, theirs, exact, exact, "importance")
        if decay == 0.0:
            assert_same(ours, theirs, "importance without memory")
        if decay == 1.0 and not reset:
            assert_same(ours, old, "importance that only remembers")
        if ours_u is not None and theirs_u is not None and old_u is not None:
            kept = torch.zeros_like(s) if reset else uncertainty_decay * old_u.double()
            new = 1.0 - uncertainty_decay
            scale = kept + new * (s + ours.double())
            exact_u, their_exact = (kept + new * (s - i.double()).abs() for i in (ours, theirs))
            assert_as_accurate(ours_u, theirs_u, exact_u, scale, "uncertainty", their_exact=their_exact)
    if histogram is not None and window is not None:
        expected = torch.arange(BINS, device=device)
        reference.histogram_(expected, window, ours, ours_u)
        assert_same(histogram, expected, "histogram")
        assert int(histogram.sum()) == n + BINS * (BINS - 1) // 2


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", list(VARIANTS))
@given(SIZES, SEEDS, ANY, ANY, DECAYS)
@examples(10)
def test_variants(
    device: torch.device,
    variant: str,
    state_dtype: torch.dtype,
    n: int,
    seed: int,
    weights: str,
    grads: str,
    decay: float,
) -> None:
    check(device, n, seed, (weights, grads), decay, state_dtype=state_dtype, **VARIANTS[variant])


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, FLOATS)), ids=str)
@given(SIZES, SEEDS, ANY, ANY, DECAYS)
@examples(6)
def test_dtypes(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    n: int,
    seed: int,
    weights: str,
    grads: str,
    decay: float,
) -> None:
    check(device, n, seed, (weights, grads), decay, dtypes=dtypes)


@pytest.mark.parametrize("variant", ["plain", "uncertainty, counted, first"])
@pytest.mark.parametrize("kind", ["normal", "zeros", "denormal", "not finite"])
def test_one_element(device: torch.device, kind: str, variant: str) -> None:
    for seed in range(4):
        check(device, 1, seed, (kind, kind), 0.55, **VARIANTS[variant])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_counts_as_zero(device: torch.device, bad: float) -> None:
    importance = torch.tensor([2.0, 2.0, 2.0], device=device)
    weight = torch.tensor([1e5, 0.0, bad], device=device)
    grad = torch.tensor([bad, bad, 1e5], device=device)
    kk.importance_ema_(importance, weight, grad, 0.5)
    # 0 * 3e38 is 0, 0 * inf is nan: both count as 0
    assert importance.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("counted", [False, True])
def test_strided_tensors_take_the_definition(device: torch.device, counted: bool) -> None:
    def tensors() -> list[Tensor]:
        bases = [values("mixed", 3 * 400, seed).abs().view(400, 3).to(device) for seed in range(4)]
        return [bases[0][:, 1], bases[1][:, 0], bases[2].t()[2], bases[3][:, 2]]

    ours, theirs = tensors(), tensors()
    histograms = [torch.zeros(BINS, dtype=torch.int64, device=device) if counted else None for _ in range(2)]
    window = torch.tensor([WHOLE_SHIFT, 0], device=device) if counted else None
    with launch.count_launches() as launches:
        kk.importance_uncertainty_ema_(*ours, 0.55, 0.7, histogram=histograms[0], window=window)
    i, u, w, g = theirs
    reference.importance_ema_(i, w, g, 0.55, False, u, 0.7, None, histograms[1], window)
    assert not launches
    for actual, expected in zip(ours, theirs, strict=True):
        assert_same(actual, expected, "strided")
        assert_same(actual._base.view(-1), expected._base.view(-1), "what lies between")
    if histograms[0] is not None and histograms[1] is not None:
        assert_same(histograms[0], histograms[1], "histogram")


@pytest.mark.parametrize("programs", [1, 2, 3, 100])
def test_the_number_of_programs_does_not_show(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    weight, grad = (values("student", 9999, seed).to(device) for seed in (0, 1))

    def run() -> tuple[Tensor, Tensor]:
        importance = torch.full((9999,), 0.5, device=device)
        histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
        window = torch.tensor([WINDOW_SHIFT, 32000], device=device)
        kk.importance_ema_(importance, weight, grad, 0.55, histogram=histogram, window=window)
        return importance, histogram

    before = run()
    monkeypatch.setattr(launch, "PROGRAMS_PER_SM", programs)
    for actual, expected in zip(run(), before, strict=True):
        assert_same(actual, expected, f"{programs} programs")


def test_shape_is_kept(device: torch.device) -> None:
    weight, grad = (values("normal", 600, seed).view(20, 30).to(device) for seed in (0, 1))
    importance = torch.zeros(20, 30, device=device)
    kk.importance_ema_(importance, weight, grad, 0.0)
    assert_same(importance, (weight * grad).abs(), "two dimensions")
