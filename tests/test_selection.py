"""The k-th largest on the CPU: exact on every kind of input, with numpy and without."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eager import check
from torch import Tensor

from kif_kernels import selection

SEEDS = st.integers(0, 2**31 - 1)
KINDS = ("plain", "levels", "zeros", "blocks", "ties", "columns", "sorted", "equal", "bfloat16", "denormal", "huge")


@pytest.fixture(autouse=True, params=["numpy", "no numpy"])
def numpy_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small samples, so that small inputs are narrowed down too."""
    monkeypatch.setattr(selection, "SMALL", 8)
    monkeypatch.setattr(selection, "SAMPLE", 24)
    monkeypatch.setattr(selection, "TIES", 6)
    monkeypatch.setattr(selection, "BLOCK", 50)
    if request.param == "no numpy":
        monkeypatch.setattr(selection, "_numpy", None)


def scores(kind: str, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator).abs()
    u = torch.rand(n, generator=generator)
    if kind == "levels":
        return (4 * u).floor()
    if kind == "zeros":
        x[u < 0.85] = 0.0
    elif kind == "blocks":
        x[: n // 2] = 0.0
    elif kind == "ties":
        x[u < 0.6] = 0.3
    elif kind == "columns":
        return x * 10.0 ** (torch.arange(n) % 8)
    elif kind == "sorted":
        return x.sort().values
    elif kind == "equal":
        return torch.full((n,), 0.25)
    elif kind == "bfloat16":
        return x.bfloat16()
    elif kind == "denormal":
        return x * 1e-40
    elif kind == "huge":
        x[u < 0.1] = float("inf")
    return x


def select(
    ranks: list[int], buffers: list[Tensor], factors: list[Tensor], starts: list[int], numels: list[int]
) -> Tensor:
    """thresholds_ of the CPU path, found equal to that of the definition."""
    thresholds = torch.full((len(buffers), len(ranks)), float("nan"))
    limits = torch.zeros(len(ranks), dtype=torch.int64)
    arguments = (thresholds, None, None, torch.tensor(ranks), limits, buffers, factors, False, starts, numels, None)
    return check("thresholds_", *arguments)[0]


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 400), SEEDS, st.floats(0.0, 1.0), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_kth_largest_is_exact(kind: str, n: int, seed: int, place: float, factored: bool) -> None:
    k = min(n, 1 + int(place * n))
    x, y = scores(kind, n, seed), scores("plain", n, seed + 1)
    factors = [scores("plain", n, seed + 2), scores("zeros", n, seed + 3)] if factored and kind != "huge" else []
    result = select([k], [x, y], factors, [], [])
    ranked = x.float() * factors[0] if factors else x.float()
    assert result[0, 0] == ranked.sort(descending=True).values[k - 1]


@given(SEEDS, st.lists(st.tuples(st.integers(1, 80), st.sampled_from(KINDS[:8])), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_segments_are_ranked_on_their_own(seed: int, parts: list[tuple[int, str]]) -> None:
    buffer, starts, numels, ranks = torch.full((16,), 9.0), [], [], []
    for i, (n, kind) in enumerate(parts):
        starts.append(len(buffer))
        numels.append(n)
        ranks.append(1 + (seed + i) % n)
        gap = torch.full((16 - n % 16,), 1e9)
        buffer = torch.cat([buffer, scores(kind, n, seed + i), gap])
    select(ranks, [buffer, buffer.flip(0)], [], starts, numels)


@pytest.mark.parametrize("view", ["strided", "matrix", "parameter"])
def test_any_buffer_is_ranked_and_left_alone(view: str) -> None:
    x = scores("plain", 300, 0)
    buffer = {"strided": torch.stack([x, -x], 1)[:, 0], "matrix": x.view(3, 100), "parameter": torch.nn.Parameter(x)}
    thresholds = torch.zeros(1, 1)
    before = buffer[view].detach().clone()
    selection.thresholds_(
        thresholds, None, None, torch.tensor([60]), torch.zeros(1), [buffer[view]], [], False, [], [], None
    )
    assert thresholds.item() == x.sort(descending=True).values[59]
    assert torch.equal(buffer[view], before)


@pytest.mark.parametrize("k", [1, 2, 100, 199, 200])
def test_a_sample_that_misleads_costs_time_only(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # every sampled place holds 1, the others anything but
    x = torch.cat([torch.linspace(0.0, 0.9, 100), torch.linspace(1.1, 2.0, 100)])
    monkeypatch.setattr(selection, "SAMPLE", 8)
    x[:: (200 // 8) | 1] = 1.0
    assert select([k], [x], [], [], [])[0, 0] == x.sort(descending=True).values[k - 1]


def test_numpy_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "numpy", None)
    assert selection._usable_numpy() is None
