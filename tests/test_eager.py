"""The CPU path against the definitions: equal bits for every option, in chunks far shorter than the buffers."""

from __future__ import annotations

import pytest
import torch
from beside_reference import (
    CHUNK,
    DECAYS,
    EPS,
    NAN,
    SEEDS,
    SIZES,
    SKIPS,
    Kinds,
    Numbers,
    check,
    equal,
    every_kind,
    flag,
    outcome,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

import kif_kernels as kk
from kif_kernels import eager, reference
from kif_kernels.layout import BINS


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CHUNK", CHUNK)


@every_kind
@given(
    SIZES, SEEDS, st.sampled_from([-30, -20, 0, 18, 19, 20]), st.sampled_from([None, float("nan"), float("inf")]),
    st.sampled_from([0.0, 0.5, 1e18]), st.sampled_from([None, 2.0**-14, 1e30]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_gradient_state(
    kinds: Kinds, n: int, seed: int, octave: int, bad: float | None, max_norm: float, inv_scale: float | None
) -> None:
    # squares that underflow, whose sum overflows, that overflow
    grad = ((0.5 + torch.rand(n, generator=torch.Generator().manual_seed(seed))) * 10.0**octave).to(kinds.value)
    if bad is not None:
        grad[seed % n] = bad
    inverse = None if inv_scale is None else torch.tensor(inv_scale)
    arguments = [
        grad, torch.tensor(NAN), torch.tensor(False), torch.tensor(3.0, dtype=torch.float64), torch.tensor(4),
        max_norm, inverse,
    ]  # fmt: skip
    expected, result = (outcome(module, "gradient_state_", arguments, kinds.layout) for module in (reference, eager))
    # sums in another order
    torch.testing.assert_close(result["scale"], expected["scale"], rtol=2 * EPS, atol=0.0)
    assert all(torch.equal(result[key], expected[key]) for key in ("skip", "step", "skipped"))


@every_kind
@given(SIZES, SEEDS, DECAYS, SKIPS, st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_importance(
    kinds: Kinds, n: int, seed: int, decay: float, skip: bool | None, reset: bool, uncertain: bool, counted: bool
) -> None:  # fmt: skip
    make, (value, state, layout) = Numbers(seed, n), kinds
    written = reset or (decay == 0.0 and not skip)
    after = check(
        "importance_ema_",
        make.poison(state) if written else make.scores(state),
        make(value),
        make(value, bad=True),
        decay,
        reset,
        (make.poison(state) if reset else make.scores(state)) if uncertain else None,
        0.85,
        flag(skip),
        torch.arange(BINS) if counted else None,
        torch.tensor([22, 3]) if counted else None,
        layout=layout,
    )
    assert bool(after["importance"].isfinite().all())


LIMITS = st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1e30, float("inf")])
TABLES = st.sampled_from(list(kk.FUSION_TABLES.values()))


@every_kind
@given(SIZES, SEEDS, TABLES, LIMITS, LIMITS, st.tuples(*[st.booleans()] * 6), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_fusion(
    kinds: Kinds, n: int, seed: int, table: kk.FusionTable, limit_in: float, limit_out: float,
    options: tuple[bool, ...], padding: int,
) -> None:  # fmt: skip
    strict, write_start, uncertain, low, counted, bad = options
    make, padding, state = Numbers(seed, n), min(padding, n - 1), kinds.state
    scores = [make.scores(state), make.scores(state), *((make.scores(state), make.scores(state)) if uncertain else ())]
    for score in scores:
        score[n - padding :] = 0.0
    after = check(
        "fuse_", make(bad=bad), make(), make(bad=bad), scores[0], scores[1], scores[2] if uncertain else None,
        scores[3] if uncertain else None, torch.tensor(limit_in), torch.tensor(limit_out),
        [w for pair in table for w in pair], strict, write_start, make.poison(torch.bfloat16) if low else None,
        torch.tensor([5, 6, 7]) if counted else None, n - padding, [], [], None, layout=kinds.layout,
    )  # fmt: skip
    if counted and not uncertain:
        limit, real = torch.tensor(limit_in), scores[0][: n - padding].float()
        assert int(after["kept"][0]) - 5 == int((real > limit if strict else real >= limit).sum())


@given(SEEDS, st.lists(st.integers(1, 3 * CHUNK), min_size=1, max_size=5), TABLES, st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_fusion_by_segments_leaves_gaps_alone(
    seed: int, numels: list[int], table: kk.FusionTable, strict: bool, bad: bool
) -> None:
    starts, end = [], 16
    for numel in numels:
        starts.append(end)
        end += (numel + 31) // 16 * 16
    make = Numbers(seed, end)
    limits = [torch.rand(len(numels), generator=make.generator) for _ in range(2)]
    theta = make(bad=bad)
    after = check(
        "fuse_", theta, make(), make(bad=bad), make.scores(), make.scores(), None, None, *limits,
        [w for pair in table for w in pair], strict, True, make.poison(torch.float16),
        torch.zeros(3, dtype=torch.int64), end, starts, numels, None,
    )  # fmt: skip
    gaps = torch.ones(end, dtype=torch.bool)
    for start, numel in zip(starts, numels, strict=True):
        gaps[start : start + numel] = False
    assert equal(after["theta"][gaps], theta[gaps])


def test_chunks_grow_with_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    make = Numbers(1, 10 * CHUNK + 5)
    (first, *_), parts = next(eager._chunks(2, make(), None))
    assert first.numel() == parts[0].numel() == 3 * CHUNK and parts[1] is None
    check("importance_ema_", make.scores(), make(), make(), 0.5, False, None, 0.0, None, None, None)


def test_a_parameter_is_trained_through_the_public_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for backend in ("reference", "eager"):
        monkeypatch.setenv("KIF_BACKEND", backend)
        make = Numbers(2, 100)
        weight = torch.nn.Parameter(make())
        importance, start, inner = make.scores(), make(), make()
        with torch.no_grad():
            kk.adamw_importance_(
                weight, make(), make(), make.scores(), importance, lr=0.1, betas=(0.9, 0.999), eps=1e-8,
                weight_decay=0.0, step=1, decay=0.5,
            )  # fmt: skip
            threshold = kk.importance_threshold(importance, 0.2)
            kk.fuse_(weight, start, inner, importance, importance, threshold, threshold)
        assert weight.requires_grad and not start.requires_grad
        results.append(weight.detach())
    assert torch.equal(*results)


def test_scratch_made_in_inference_mode_is_used_outside() -> None:
    eager._kept.__dict__.clear()
    ends = []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            importance, weight, grad = torch.ones(9), torch.full((9,), 2.0), torch.full((9,), 3.0)
            kk.importance_ema_(importance, weight, grad, 0.5)
            ends.append(importance.tolist())
    assert ends == [[3.5] * 9] * 2
