"""The reference operations against independent arithmetic in float64, and their stated properties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kif_kernels as kk

SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**31 - 1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(seed: int, n: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values with zeros, ties and denormals among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * scale
    kind = torch.randint(0, 10, (n,), generator=generator)
    values[kind == 0] = 0.0
    values[kind == 1] = 0.5
    values[kind == 2] = 1e-40
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(SIZES, SEEDS, st.sampled_from([0.0, 0.45, 0.55, 1.0]))
@settings(max_examples=25, deadline=None)
def test_importance_ema_is_eq_3_and_4(dtype: torch.dtype, n: int, seed: int, decay: float) -> None:
    importance, weight, grad = random(seed, n).abs(), random(seed + 1, n, dtype), random(seed + 2, n, dtype)
    expected = decay * importance.double() + (1 - decay) * (weight.double() * grad.double()).abs()
    result = kk.importance_ema_(importance, weight, grad, decay)
    assert result is importance
    torch.testing.assert_close(result.double(), expected, rtol=3e-7, atol=1e-38)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_importance_never_becomes_nan(bad: float) -> None:
    importance = torch.tensor([1.0, 1.0, 1.0])
    kk.importance_ema_(importance, torch.tensor([1.0, 0.0, 3e38]), torch.tensor([2.0, bad, 3e38]), 0.5)
    assert importance.tolist() == [1.5, 0.5, 0.5]


def test_importance_ema_works_on_views_and_skips() -> None:
    base = torch.ones(6, 4)
    kk.importance_ema_(base[:, 1], torch.full((6,), 2.0), torch.full((4, 6), -3.0)[1], 0.5)
    assert base[:, 1].tolist() == [3.5] * 6
    assert base[:, 0].tolist() == [1.0] * 6
    kk.importance_ema_(base, base, base, 0.0, skip=torch.tensor(True))
    assert base[:, 0].tolist() == [1.0] * 6


@given(SIZES, SEEDS)
@settings(max_examples=25, deadline=None)
def test_uncertainty_follows_the_new_ema(n: int, seed: int) -> None:
    ema, unc = random(seed, n).abs(), random(seed + 3, n).abs()
    weight, grad = random(seed + 1, n), random(seed + 2, n)
    s = (weight.double() * grad.double()).abs()
    expected_ema = 0.85 * ema.double() + 0.15 * s
    expected_unc = 0.7 * unc.double() + 0.3 * (s - expected_ema).abs()
    kk.importance_uncertainty_ema_(ema, unc, weight, grad, 0.85, 0.7)
    torch.testing.assert_close(ema.double(), expected_ema, rtol=1e-6, atol=1e-38)
    torch.testing.assert_close(unc.double(), expected_unc, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("on_device", [False, True], ids=["python scalars", "device scalars"])
def test_adamw_equals_torch(on_device: bool) -> None:
    start, steps = random(0, 257), 20
    theirs = torch.nn.Parameter(start.double())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    ours, m, v, importance = start.clone(), torch.zeros(257), torch.zeros(257), torch.zeros(257)
    expected_importance = torch.zeros(257, dtype=torch.float64)
    for step in range(1, steps + 1):
        grad = random(step, 257)
        expected_importance = 0.55 * expected_importance + 0.45 * (theirs.detach() * grad.double()).abs()
        theirs.grad = grad.double() * 0.5
        optimizer.step()
        kk.adamw_importance_(
            ours, grad, m, v, importance,
            lr=torch.tensor(1e-2) if on_device else 1e-2,
            step=torch.tensor(float(step), dtype=torch.float64) if on_device else step,
            betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, decay=0.55, grad_scale=torch.tensor(0.5),
        )  # fmt: skip
    torch.testing.assert_close(ours.double(), theirs.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(importance.double(), expected_importance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_rounds_low_precision_weights_once(dtype: torch.dtype) -> None:
    weight, grad = random(3, 100, dtype), random(4, 100, dtype)
    wide = weight.float().clone()
    states = [torch.zeros(100) for _ in range(6)]
    options = dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1, decay=0.5)
    kk.adamw_importance_(weight, grad, *states[:3], **options)
    kk.adamw_importance_(wide, grad.float(), *states[3:], **options)
    assert torch.equal(weight, wide.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(states[:3], states[3:], strict=True))


def test_a_skipped_step_changes_nothing() -> None:
    tensors = [random(i, 33).abs() for i in range(5)]
    before = [t.clone() for t in tensors]
    tensors[1][0] = float("nan")
    weight, grad, m, v, importance = tensors
    kk.adamw_importance_(
        weight, grad, m, v, importance, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=1, decay=0.5,
        skip=torch.tensor(True),
    )  # fmt: skip
    for i in (0, 2, 3, 4):
        assert torch.equal(tensors[i], before[i])


@given(SIZES, SEEDS, st.floats(0.0, 1.0), st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_threshold_is_the_kth_largest(n: int, seed: int, density: float, padding: int) -> None:
    scores = random(seed, n).abs()
    k = kk.mask_size(density, n)
    assert max(1, math.floor(density * n)) <= k <= math.floor(density * n) + 1
    ordered = sorted(scores.tolist(), reverse=True)
    threshold = kk.importance_threshold(scores, density)
    assert threshold.shape == () and threshold.item() == ordered[k - 1]
    strictly_above = sum(value > ordered[k - 1] for value in ordered)
    assert int((scores >= threshold).sum()) == strictly_above + ordered.count(ordered[k - 1]) >= k
    padded = torch.cat([scores, torch.zeros(padding)])
    assert torch.equal(kk.importance_threshold(padded, density, numel=n), threshold)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype) -> None:
    monkeypatch.setenv("KIF_BACKEND", backend)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(1000, generator=generator, dtype=torch.float32) * 1e-8 for _ in range(2)]
    values = [torch.randn(1000, generator=generator, dtype=torch.float32) for _ in range(3)]
    values[0][3] = math.inf  # the chunk with it takes the definition
    found = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            limits = [kk.importance_threshold(score, 0.2) for score in scores]
            theta, start, inner = (value.clone() for value in values)
            kk.fuse_(theta, start, inner, *scores, *limits, kk.RELEASED_CODE)
        finally:
            torch.set_default_dtype(torch.float32)
        assert [int((score >= limit).sum()) for score, limit in zip(scores, limits, strict=True)] == [200, 200]
        found.append(theta)
    assert found[1].dtype == torch.float32 and torch.equal(*(t.nan_to_num(nan=1.5) for t in found))


def test_what_lies_on_another_device_is_named() -> None:
    x, away = torch.rand(32), torch.rand(32, device="meta")
    histogram, window = torch.zeros(512, dtype=torch.int64, device="meta"), torch.zeros(2, dtype=torch.int64)
    adamw = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    limit = torch.tensor(0.5)
    calls = {
        "grad": lambda: kk.importance_ema_(x, x, away, 0.5),
        "importance": lambda: kk.importance_ema_(away, x, x, 0.5),
        "uncertainty": lambda: kk.importance_uncertainty_ema_(x, away, x, x, 0.5, 0.5),
        "histogram": lambda: kk.importance_ema_(x, x, x, 0.5, histogram=histogram, window=window),
        "exp_avg": lambda: kk.adamw_importance_(x, x, away, x, None, **adamw),
        "theta_start": lambda: kk.fuse_(x, away, x, x, x, limit, limit),
        "importance_out": lambda: kk.fuse_(x, x, x, x, away, limit, limit),
        "kept": lambda: kk.fuse_(x, x, x, x, x, limit, limit, kept=torch.zeros(3, dtype=torch.int64, device="meta")),
        r"scores\[0\]": lambda: kk.StreamingThreshold(0.2, 32).select((away,)),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} is on meta"):
            call()


def test_mask_size_takes_the_density_as_the_decimal_it_is() -> None:
    assert [kk.mask_size(0.1, 30), kk.mask_size(0.2, 5), kk.mask_size(0.2, 6)] == [3, 1, 2]
    assert [kk.mask_size(0.0, 7), kk.mask_size(1.0, 7), kk.mask_size(1e-9, 7)] == [1, 7, 1]


def test_all_zero_scores_keep_everything_and_sparse_ones_too() -> None:
    assert kk.importance_threshold(torch.zeros(10), 0.2).item() == 0.0
    sparse = torch.zeros(10)
    sparse[3] = 1.0
    assert int((sparse >= kk.importance_threshold(sparse, 0.2)).sum()) == 10
    assert int((sparse >= kk.importance_threshold(sparse, 0.1)).sum()) == 1


@given(SIZES, SEEDS, st.sampled_from([0.01, 0.1, 0.2, 0.5, 0.999, 1.0]), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_quantile_is_torch_quantile(n: int, seed: int, density: float, padding: int) -> None:
    scores = random(seed, n).abs()
    expected = np.quantile(scores.double().numpy(), 1.0 - density)
    padded = torch.cat([scores, torch.zeros(padding)])
    result = kk.importance_quantile(padded, density, numel=n).item()
    assert result == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert result == pytest.approx(torch.quantile(scores, 1.0 - density).item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("table", list(kk.FUSION_TABLES.values()), ids=list(kk.FUSION_TABLES))
@given(SIZES, SEEDS)
@settings(max_examples=20, deadline=None)
def test_fuse_is_eq_9_with_the_table(table: kk.FusionTable, strict: bool, n: int, seed: int) -> None:
    theta, start, inner = random(seed, n), random(seed + 1, n), random(seed + 2, n)
    i_in, i_out = random(seed + 3, n).abs(), random(seed + 4, n).abs()
    t_in, t_out = torch.tensor(0.5), i_out.median()
    expected = []
    for k in range(n):
        m_in = i_in[k] > t_in if strict else i_in[k] >= t_in
        m_out = i_out[k] > t_out if strict else i_out[k] >= t_out
        row = (table.both if m_out else table.inner_only) if m_in else (table.outer_only if m_out else table.neither)
        tau_in, tau_out = float(inner[k]) - float(start[k]), float(theta[k]) - float(inner[k])
        expected.append(float(start[k]) + row[0] * tau_in + row[1] * tau_out)
    result = kk.fuse_(theta, start, inner, i_in, i_out, t_in, t_out, table, strict=strict)
    assert result is theta and torch.equal(theta, start)
    torch.testing.assert_close(theta.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_fuse_ignores_what_a_zero_weight_drops() -> None:
    theta, start, inner = torch.tensor([float("nan")]), torch.tensor([1.0]), torch.tensor([2.0])
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    kk.fuse_(theta, start, inner, one[None], zero[None], one, one)
    assert theta.tolist() == [2.0]


def test_no_masks_is_plain_training() -> None:
    theta, start, inner, scores = random(0, 50), random(1, 50), random(2, 50), random(3, 50).abs()
    end, threshold = theta.clone(), torch.tensor(0.3)
    kk.fuse_(theta, start, inner, scores, scores, threshold, threshold, kk.NO_MASKS)
    torch.testing.assert_close(theta, end)


def test_wrong_input_is_named() -> None:
    a, b = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match="grad has shape"):
        kk.importance_ema_(a, a, b, 0.5)
    with pytest.raises(ValueError, match="decay must lie"):
        kk.importance_ema_(a, a, a, 1.5)
    with pytest.raises(ValueError, match="importance must be float32"):
        kk.importance_ema_(a.double(), a, a, 0.5)
    with pytest.raises(ValueError, match="density must lie"):
        kk.importance_threshold(a, 1.1)
    with pytest.raises(ValueError, match="cannot rank 4"):
        kk.importance_threshold(a, 0.5, numel=4)
    with pytest.raises(ValueError, match="cannot rank 0"):
        kk.importance_threshold(torch.zeros(0), 0.5)
    with pytest.raises(ValueError, match="importance_out has shape"):
        kk.fuse_(a, a.clone(), a.clone(), a, b, a[0], a[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", math.nan), ("lr", -0.1), ("lr", math.inf), ("betas", (1.0, 0.99)), ("betas", (0.9, math.nan)),
        ("betas", (0.9,)), ("eps", -1e-8), ("weight_decay", -0.1), ("weight_decay", math.nan),
        ("step", 0), ("step", -3),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_named(name: str, value: Any) -> None:
    weight, options = torch.ones(3), {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        kk.adamw_importance_(weight, *torch.ones(3, 3), None, **{**options, name: value})
    assert weight.tolist() == [1.0] * 3


def test_other_numbers_out_of_range_are_named() -> None:
    ones, threshold = torch.ones(3), torch.tensor(0.5)
    for table in (kk.PAPER[:2], (*kk.PAPER[:3], (1.0,)), (*kk.PAPER[:3], (1.0, math.nan))):
        with pytest.raises(ValueError, match="table must hold four pairs"):
            kk.fuse_(ones, *torch.ones(4, 3), threshold, threshold, table)  # type: ignore[arg-type]
    state = threshold.clone(), torch.tensor(False), torch.tensor(0.0, dtype=torch.float64), torch.tensor(0)
    for norm in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm must not be negative"):
            kk.gradient_state_(ones, *state, max_norm=norm)


def test_backend_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KIF_BACKEND", raising=False)
    assert kk.backend_name("cpu") == "eager"
    monkeypatch.setenv("KIF_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        kk.backend_name("cpu")


@given(st.integers(0, 1000), st.integers(1, 10**9))
@settings(max_examples=300, deadline=None)
def test_mask_size_is_exact_for_decimal_densities(thousandths: int, n: int) -> None:
    assert kk.mask_size(thousandths / 1000, n) == max(1, -(-thousandths * n // 1000))
