"""Scores to rank, and what a threshold promises about them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernel_tests.inputs import KINDS, values

PRODUCTS = {
    "normal * normal": ("normal", "normal"),
    "lognormal * student": ("lognormal", "student"),
    "student * student": ("student", "student"),
    "half zeros * lognormal": ("half zeros", "lognormal"),
}
SCORE_KINDS = [*KINDS, *PRODUCTS, "huge", "one positive", "sorted", "minus zero"]
"""Besides single tensors, |w * g| of heavy-tailed weights and gradients."""

SCORES = st.sampled_from(SCORE_KINDS)

DENSITIES = st.sampled_from([0.0, 0.001, 0.02, 0.1, 0.2, 0.25, 0.5, 0.8, 0.99, 1.0])


def scores(kind: str, n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Importances, not negative and without NaN, on the CPU."""
    if kind in PRODUCTS:
        weight, grad = (values(factor, n, seed + i) for i, factor in enumerate(PRODUCTS[kind]))
        x = (weight * grad).abs()
    elif kind == "huge":
        x = values("lognormal", n, seed).abs() * 1e36
        x[::7] = float("inf")
    elif kind == "one positive":
        x = torch.zeros(n)
        x[seed % n] = 0.3
    elif kind == "sorted":
        x = values("normal", n, seed).abs().sort().values
    elif kind == "minus zero":
        x = values("half zeros", n, seed).abs()
        x[x == 0] = -0.0
    else:
        x = values(kind, n, seed).abs()
    return x.to(dtype)


def kth_largest(x: Tensor, k: int) -> Tensor:
    return x.reshape(-1).float().sort(descending=True).values[k - 1]


def check_threshold(threshold: Tensor, x: Tensor, k: int, *, exact: bool, what: str = "") -> None:
    """The k-th largest, bit by bit; or a mask that is at most a thousandth of the elements larger or smaller."""
    kth = kth_largest(x, k)
    if exact:
        # -0.0 may come back as 0.0: they are equal
        assert float(threshold) == float(kth), f"{what}: {float(threshold)!r} instead of {float(kth)!r}"
        return
    ours, wanted = int((x.float() >= threshold).sum()), int((x.float() >= kth).sum())
    assert ours > 0, f"{what}: an empty mask"
    assert abs(ours - wanted) <= int(0.001 * x.numel()), f"{what}: {ours} elements instead of {wanted} of {x.numel()}"
