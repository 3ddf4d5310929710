"""The CPU path against the definitions: equal bits for every option, in chunks far shorter than the buffers."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kif_kernels as kk
from kif_kernels import eager, reference
from kif_kernels.layout import BINS

CHUNK = 64
SIZES = st.one_of(st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK]), st.integers(1, 5 * CHUNK))
SEEDS = st.integers(0, 2**31 - 1)
SKIPS = st.sampled_from([None, False, True])
DECAYS = st.sampled_from([0.0, 0.45, 0.55, 1.0])
NAN = float("nan")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CHUNK", CHUNK)


class Numbers:
    """Normal numbers with zeros, ties, denormals and very large ones."""

    def __init__(self, seed: int, n: int) -> None:
        self.generator, self.n = torch.Generator().manual_seed(seed), n

    def __call__(self, dtype: torch.dtype = torch.float32, bad: bool = False) -> Tensor:
        x = torch.randn(self.n, generator=self.generator)
        kind = torch.randint(0, 12, (self.n,), generator=self.generator)
        odd = (0.0, 0.5, 1e-40, 1e30) + ((NAN, float("inf"), -float("inf")) if bad else ())
        for i, value in enumerate(odd):
            x[kind == i] = value
        return x.to(dtype)

    def scores(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self().abs().to(dtype)

    def poison(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """To be written before it is read."""
        return torch.full((self.n,), NAN, dtype=dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of x, as a view of that kind where x is a buffer."""
    if not x.is_floating_point() or x.dim() != 1 or x.numel() < 4:
        return x.clone()
    if layout == "strided":
        return torch.stack([x, x], dim=1)[:, 1]
    if layout == "flat" or len(x) % 2:
        return x.clone()
    return x.clone().view(2, -1) if layout == "matrix" else x.clone().view(2, -1).t()


def outcome(module: ModuleType, name: str, arguments: list[Any], layout: str) -> list[Tensor]:
    """The tensors after a call with copies of the arguments; those that the schema calls inputs are unchanged."""
    copies: list[Any] = []
    for x in arguments:
        if isinstance(x, list):
            copies.append([laid_out(y, layout) if isinstance(y, Tensor) else y for y in x])
        else:
            copies.append(laid_out(x, layout) if isinstance(x, Tensor) else x)
    assert getattr(module, name)(*copies) is None
    schema = getattr(torch.ops.kif, name).default._schema
    after = []
    for before, copy, declared in zip(arguments, copies, schema.arguments, strict=True):
        for x, y in zip(before, copy, strict=True) if isinstance(before, list) else [(before, copy)]:
            if isinstance(x, Tensor):
                mutable = declared.alias_info is not None and declared.alias_info.is_write
                assert mutable or equal(laid_out(x, layout), y), f"{name} changed its input {declared.name}"
                after.append(y)
    return after


def equal(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.nan_to_num(nan=-77.0), y.nan_to_num(nan=-77.0))


def check(name: str, *arguments: Any, layout: str = "flat") -> list[Tensor]:
    """Returns: the tensors after the call, equal for the definition and the CPU path."""
    expected = outcome(reference, name, list(arguments), layout)
    result = outcome(eager, name, list(arguments), layout)
    for i, (x, y) in enumerate(zip(expected, result, strict=True)):
        assert equal(x, y), f"tensor {i} of {name} differs by up to {(x.double() - y.double()).abs().max()}"
    return result


def flag(value: bool | None) -> Tensor | None:
    return None if value is None else torch.tensor(value)


class Kinds(NamedTuple):
    """Dtypes of weights and gradients and of importances, and the layout: the fast path takes the default only."""

    value: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    layout: str = "flat"


every_kind = pytest.mark.parametrize(
    "kinds",
    [
        Kinds(),
        Kinds(layout="matrix"),
        Kinds(layout="strided"),
        Kinds(layout="transposed"),
        Kinds(value=torch.bfloat16),
        Kinds(value=torch.float16),
        Kinds(state=torch.bfloat16),
    ],
    ids=str,
)


@every_kind
@given(
    SIZES, SEEDS, st.integers(-30, 21), st.sampled_from([None, float("nan"), float("inf")]),
    st.sampled_from([0.0, 0.5, 1e18]), st.sampled_from([None, 2.0**-14, 1e30]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_gradient_state(
    kinds: Kinds, n: int, seed: int, octave: int, bad: float | None, max_norm: float, inv_scale: float | None
) -> None:
    # squares and sums of them from underflow to overflow
    grad = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 10.0**octave).to(kinds.value)
    if bad is not None:
        grad[seed % n] = bad
    inverse = None if inv_scale is None else torch.tensor(inv_scale)
    arguments = [
        grad, torch.tensor(NAN), torch.tensor(False), torch.tensor(3.0, dtype=torch.float64), torch.tensor(4),
        max_norm, inverse, torch.tensor(NAN),
    ]  # fmt: skip
    expected, result = (outcome(module, "gradient_state_", arguments, kinds.layout) for module in (reference, eager))
    # sums in another order; torch multiplies max_norm by 1 / norm, a denormal where the norm is next to overflow
    for i, least in ((1, max_norm * 2.0**-149), (-1, 0.0)):
        close = {"rtol": 2 * torch.finfo(torch.float32).eps, "atol": least}
        torch.testing.assert_close(result[i], expected[i], equal_nan=True, **close)
    assert [int(x) for x in result[2:5]] == [int(x) for x in expected[2:5]]


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
    assert bool(after[0].isfinite().all())


def adamw_arguments(make: Numbers, value: torch.dtype, state: torch.dtype, draw: Any) -> list[Any]:
    """Arguments of adamw_importance_, every option drawn."""
    skip, yes = draw(st.sampled_from([None, None, False, False, True])), st.booleans()
    scored, reset, counted = draw(st.sampled_from([True, True, False])), draw(yes), draw(yes)
    uncertain = scored and draw(yes)
    on_device = draw(yes)
    lr = draw(st.sampled_from([1e-3, 0.1]))
    step = float(draw(st.integers(1, 2000)))
    return [
        make(value),
        make(value, bad=draw(yes)),
        make(),
        make.scores(),
        (make.poison(state) if reset else make.scores(state)) if scored else None,
        (make.poison(state) if reset else make.scores(state)) if uncertain else None,
        make.poison(value) if draw(yes) else None,
        make.poison(value) if draw(yes) else None,
        make.poison(draw(st.sampled_from([torch.bfloat16, torch.float16]))) if draw(yes) else None,
        torch.zeros(BINS, dtype=torch.int64) if counted else None,
        torch.tensor([22, 3]) if counted else None,
        0.0 if on_device else lr,
        torch.tensor(lr) if on_device else None,
        0.0 if on_device else step,
        torch.tensor(step, dtype=torch.float64) if on_device else None,
        0.9,
        0.999,
        draw(st.sampled_from([1e-8, 1e-3])),
        draw(st.sampled_from([0.0, 0.1])),
        draw(DECAYS),
        0.7,
        reset,
        draw(yes),
        draw(yes),
        torch.tensor(draw(st.sampled_from([1.0, 0.25]))) if draw(yes) else None,
        torch.tensor(draw(st.sampled_from([1.0, 2.0**-14, 0.3]))) if draw(yes) else None,
        flag(skip),
    ]


@every_kind
@given(st.data(), SIZES, SEEDS)
@settings(max_examples=120, deadline=None)
def test_adamw_with_importance(kinds: Kinds, data: st.DataObject, n: int, seed: int) -> None:
    arguments = adamw_arguments(Numbers(seed, n), kinds.value, kinds.state, data.draw)
    check("adamw_importance_", *arguments, layout=kinds.layout)


def test_a_skipped_step_still_copies_zeroes_and_resets() -> None:
    make = Numbers(0, 3 * CHUNK)
    weight = make()
    after = check(
        "adamw_importance_", weight, make.poison(), make(), make.scores(), make.poison(), make.poison(),
        make.poison(), make.poison(), make.poison(torch.bfloat16), torch.zeros(BINS, dtype=torch.int64),
        torch.tensor([22, 0]), 0.1, None, 1.0, None, 0.9, 0.999, 1e-8, 0.1, 0.5, 0.5, True, False, True, None, None,
        torch.tensor(True),
    )  # fmt: skip
    new_weight, grad, _, _, importance, uncertainty, before, end, shadow, histogram = after[:10]
    assert torch.equal(new_weight, weight) and torch.equal(before, weight) and torch.equal(end, weight)
    assert torch.equal(shadow, weight.bfloat16())
    assert not grad.any() and not importance.any() and not uncertainty.any()
    assert histogram[0] == len(weight)


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
        assert int(after[-1][0]) - 5 == int((real > limit if strict else real >= limit).sum())


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
    assert equal(after[0][gaps], theta[gaps])


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
