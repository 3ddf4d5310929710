"""Selection round after round: windows that drift, scores counted in passing, passes that were needed, saved state."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kif_kernels as kk
from kernel_tests.inputs import SEEDS, assert_same, examples, values
from kernel_tests.scores import DENSITIES, SCORES, check_threshold, scores
from kif_kernels.kernels import launch
from kif_kernels.layout import LEVELS

N = 3000
K = 600
"""Of density 0.2."""


def ema_pass(importance: Tensor, grad: Tensor, histogram: Tensor | None, window: Tensor | None) -> None:
    kk.importance_ema_(importance, torch.ones_like(grad), grad, 0.0, histogram=histogram, window=window)


def adamw_pass(importance: Tensor, grad: Tensor, histogram: Tensor | None, window: Tensor | None) -> None:
    n, device = grad.numel(), grad.device
    weight, m, v = torch.ones(n, device=device), torch.zeros(n, device=device), torch.zeros(n, device=device)
    kk.adamw_importance_(
        weight, grad.clone(), m, v, importance, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, step=1,
        histogram=histogram, window=window, zero_grad=True,
    )  # fmt: skip


PASSES: dict[str, Callable[..., None] | None] = {"importance": ema_pass, "adamw": adamw_pass, "not counted": None}


def one_round(selection: kk.StreamingThreshold, fill: Callable[..., None] | None, sides: list[Tensor]) -> Tensor:
    """Thresholds of the sides, which `fill` wrote and counted; the number of launches is as documented."""
    buffers = sides
    if fill is not None:
        buffers = [torch.full_like(side, math.nan) for side in sides]
        for i, (buffer, side) in enumerate(zip(buffers, sides, strict=True)):
            fill(buffer, side, selection.histogram(i), selection.window(i))
            assert_same(buffer, side, "importance")
    with launch.count_launches() as launches:
        found = selection.select(tuple(buffers), counted=fill is not None)
    assert launches == {"refine_kernel": LEVELS - (fill is not None), "select_kernel": 1}
    assert not selection.state_dict()["histograms"].any()
    return found


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "approximate"])
@pytest.mark.parametrize("way", list(PASSES))
@pytest.mark.parametrize("drift", [0.1, 0.5, 1.0, 3.0])
def test_drift(device: torch.device, drift: float, way: str, exact: bool) -> None:
    """Scores that move by `drift` nats a round, up on one side and down on the other."""
    selection = kk.StreamingThreshold(0.2, N, sides=2, exact=exact, device=device)
    for i in range(4):
        up, down = (
            scores(kind, N, i).to(device) * math.exp(sign * drift * i)
            for kind, sign in (("normal * normal", 1), ("lognormal * student", -1))
        )
        found = one_round(selection, PASSES[way], [up, down])
        for x, threshold in zip((up, down), found[:, 0], strict=True):
            check_threshold(threshold, x, K, exact=exact, what=f"round {i}")


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "approximate"])
@pytest.mark.parametrize("way", list(PASSES))
def test_jumps(device: torch.device, way: str, exact: bool) -> None:
    """To zeros and back, to denormals, to the largest numbers, to a distribution of another shape."""
    kinds = ["normal", "zeros", "normal", "85% zeros", "denormal", "all equal", "1% spread", "half zeros", "student"]
    factors = [1.0, 1.0, 1e-30, 1.0, 1.0, 1e30, 1e-8, 1.0, 1e10]
    selection = kk.StreamingThreshold(0.2, N, sides=2, exact=exact, device=device)
    rounds = [scores(kind, N, 0).to(device) * factor for kind, factor in zip(kinds, factors, strict=True)]
    for i, x in enumerate(rounds):
        sides = [x, rounds[-1 - i]]
        found = one_round(selection, PASSES[way], sides)
        for side, threshold in zip(sides, found[:, 0], strict=True):
            check_threshold(threshold, side, K, exact=exact, what=f"round {i}, {kinds[i]}")


@given(
    st.lists(st.tuples(SCORES, st.sampled_from([1.0, 1.1, 0.5, 1e-6, 1e6]), st.booleans()), min_size=2, max_size=5),
    st.sampled_from([2, 1000, 3000, 5008]),
    SEEDS,
    DENSITIES,
    st.booleans(),
)
@examples(12)
def test_any_sequence(
    device: torch.device, rounds: list[tuple[str, float, bool]], n: int, seed: int, density: float, exact: bool
) -> None:
    """Rounds that were counted and rounds that were not, of any scores after any others."""
    selection = kk.StreamingThreshold(density, n, exact=exact, device=device)
    for i, (kind, factor, counted) in enumerate(rounds):
        x = scores(kind if kind != "huge" else "student", n, seed + i).abs().to(device) * factor
        found = one_round(selection, ema_pass if counted else None, [x])
        check_threshold(found[0, 0], x, kk.mask_size(density, n), exact=exact, what=f"round {i} of {rounds}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "approximate"])
def test_products_counted_in_passing(device: torch.device, exact: bool, dtype: torch.dtype) -> None:
    """E * U of the released code, as the EMA pass counts it, in the dtype it is stored in."""
    e, u = ([torch.zeros(N, dtype=dtype, device=device) for _ in range(2)] for _ in range(2))
    selection = kk.StreamingThreshold(0.2, N, sides=2, exact=exact, device=device)
    for i in range(4):
        for side in range(2):
            w, g = (values(kind, N, 10 * i + side).to(device) for kind in ("normal", "student"))
            kk.importance_uncertainty_ema_(
                e[side], u[side], w, g, 0.55, 0.7, reset=i == 0 and side == 0,
                histogram=selection.histogram(side), window=selection.window(side),
            )  # fmt: skip
        found = selection.select(tuple(e), tuple(u), counted=True)
        for side in range(2):
            product = e[side].float() * u[side].float()
            check_threshold(found[side, 0], product, K, exact=exact, what=f"round {i}")


def test_padding_counted_in_passing(device: torch.device) -> None:
    """Zeros beyond numel are in the histogram, and rank below all others."""
    selection = kk.StreamingThreshold(0.2, N, device=device)
    for i in range(3):
        x = torch.cat([scores("student", N, i), torch.zeros(72)]).to(device)
        found = one_round(selection, ema_pass, [x])
        check_threshold(found[0, 0], x[:N], K, exact=True)


def needed(selection: kk.StreamingThreshold, sides: list[Tensor], fill: Callable[..., None] | None) -> list[int]:
    """Refinement passes of one more round, by side."""
    before = selection.refinements.clone()
    one_round(selection, fill, sides)
    return (selection.refinements - before).flatten().tolist()


@pytest.mark.parametrize("way", list(PASSES))
def test_refinements_of_the_exact_mode(device: torch.device, way: str) -> None:
    """9 bits a pass: 3 after the coarse window, 2 after a hit of the fine one, 4 after a miss."""
    selection, fill = kk.StreamingThreshold(0.2, N, sides=2, device=device), PASSES[way]
    x, zeros = scores("normal", N, 0).to(device), torch.zeros(N, device=device)
    assert needed(selection, [x, zeros], fill) == [3, 3]
    assert needed(selection, [x * 1.1, zeros], fill) == [2, 3]
    assert needed(selection, [x * 1.9, x], fill) == [2, 3]
    assert needed(selection, [x * 100, x / 100], fill) == [4, 4]
    assert needed(selection, [zeros, x / 100], fill) == [4, 2]
    selection.reset()
    assert selection.refinements.tolist() == [[0], [0]]
    assert needed(selection, [x, x], fill) == [3, 3]


@pytest.mark.parametrize("way", list(PASSES))
def test_refinements_of_the_approximate_mode(device: torch.device, way: str) -> None:
    """None where a bin of 1/256 octave holds few enough elements; as many as needed where it does not."""
    n, fill = 20000, PASSES[way]
    selection = kk.StreamingThreshold(0.02, n, exact=False, device=device)
    x = scores("lognormal * student", n, 0).to(device)
    assert needed(selection, [x], fill) == [1]
    for factor in (1.0, 1.1, 1.5):
        assert needed(selection, [x * factor], fill) == [0]
    assert needed(selection, [x * 1e6], fill) == [2]
    equal = torch.full((n,), float(selection.thresholds), device=device)
    assert needed(selection, [equal], fill) == [2]


def test_segments_count_the_passes_of_each(device: torch.device) -> None:
    x = scores("normal", 96, 0)
    segments = kk.Segments.of([(0, 40), (48, 48)])
    selection = kk.StreamingThreshold(0.2, 1, segments=segments, device=device)
    assert selection.histogram(0) is None and selection.window(0) is None
    selection.select((x.to(device),))
    assert selection.refinements.tolist() == [[3, 3]]
    x[48:] *= 1000
    # no scores of segments are counted in passing: the request is ignored
    selection.select((x.to(device),), counted=True)
    assert selection.refinements.tolist() == [[5, 7]]
    for group, (start, n) in enumerate(((0, 40), (48, 48))):
        check_threshold(selection.thresholds[0, group], x[start : start + n], kk.mask_size(0.2, n), exact=True)


def test_counts_of_a_round_that_was_not_ended_are_dropped(device: torch.device) -> None:
    selection = kk.StreamingThreshold(0.2, N, device=device)
    x = scores("student", N, 0).to(device)
    importance = torch.zeros_like(x)
    ema_pass(importance, x * 1e3, selection.histogram(0), selection.window(0))
    found = one_round(selection, None, [x])
    check_threshold(found[0, 0], x, K, exact=True)
    ema_pass(importance, x * 1e3, selection.histogram(0), selection.window(0))
    selection.reset()
    found = one_round(selection, ema_pass, [x])
    check_threshold(found[0, 0], x, K, exact=True)


def test_saved_state_continues_between_the_counts_and_the_selection(device: torch.device) -> None:
    first, x = kk.StreamingThreshold(0.2, N, exact=False, device=device), scores("student", N, 0).to(device)
    one_round(first, ema_pass, [x])
    importance = torch.zeros_like(x)
    ema_pass(importance, x * 1.1, first.histogram(0), first.window(0))
    second = kk.StreamingThreshold(0.2, N, exact=False, device=device)
    assert second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    results = [s.select((importance,), counted=True).clone() for s in (first, second)]
    assert_same(results[1], results[0], "thresholds")
    for name, tensor in first.state_dict().items():
        assert_same(second.state_dict()[name], tensor, name)
    # saved where there are no kernels: nothing to continue from
    assert not second.load_state_dict({})
    assert needed(second, [x], ema_pass)[0] > 0


def test_the_same_rounds_twice_are_the_same_bits(device: torch.device) -> None:
    def run() -> list[Tensor]:
        selection, results = kk.StreamingThreshold(0.2, 9999, sides=2, exact=False, device=device), []
        for i in range(3):
            sides = [scores(kind, 9999, i).to(device) for kind in ("student", "half zeros")]
            results.append(one_round(selection, ema_pass, sides).clone())
        return [*results, *selection.state_dict().values()]

    for actual, expected in zip(run(), run(), strict=True):
        assert_same(actual, expected, "second run")
