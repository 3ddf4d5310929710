"""Selection of the k-th largest score: exact or within its bound on every kind of input, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kif_kernels as kk
from kernel_tests.inputs import SEEDS, SIZES, Buffers, assert_same, examples, values
from kernel_tests.scores import DENSITIES, SCORE_KINDS, SCORES, check_threshold, kth_largest, scores
from kif_kernels import reference
from kif_kernels.kernels import launch
from kif_kernels.layout import BINS, LEVELS, WHOLE_SHIFT, WINDOW_SHIFT

LARGER = st.sampled_from([1000, 3000, 5008, 9999])
"""From 1000 elements on, the approximate mode may differ from the exact one."""


def assert_clean(selection: kk.StreamingThreshold) -> None:
    """The workspace is ready for the next selection."""
    state = selection.state_dict()
    assert state and not state["histograms"].any()
    rows = state["state"][:, :, 0]
    whole = selection.thresholds == 0
    bits = selection.thresholds.view(torch.int32).to(torch.int64)
    assert torch.equal(rows[..., 0], torch.where(whole, WHOLE_SHIFT, WINDOW_SHIFT))
    assert torch.equal(rows[..., 1], torch.where(whole, 0, ((bits >> WINDOW_SHIFT) - BINS // 2).clamp(min=0)))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "approximate"])
@pytest.mark.parametrize("kind", SCORE_KINDS)
@given(SIZES, LARGER, SEEDS, DENSITIES, SCORES, st.booleans())
@examples(4)
def test_one_selection_of_both_sides(
    device: torch.device, kind: str, exact: bool, n: int, more: int, seed: int, density: float, other: str, low: bool
) -> None:
    n, dtype = n if exact else more, torch.bfloat16 if low else torch.float32
    buffers = Buffers(device)
    sides = tuple(buffers.copy(scores(k, n, seed + i, dtype)) for i, k in enumerate((kind, other)))
    before = [side.clone() for side in sides]
    selection = kk.StreamingThreshold(density, n, sides=2, exact=exact, device=device)
    with launch.count_launches() as launches:
        found = selection.select(sides)
    assert launches == {"refine_kernel": LEVELS, "select_kernel": 1}
    assert found is selection.thresholds and found.shape == (2, 1) and found.dtype == torch.float32
    for side, threshold, name in zip(sides, found[:, 0], (kind, other), strict=True):
        check_threshold(threshold, side, kk.mask_size(density, n), exact=exact, what=name)
    for side, start in zip(sides, before, strict=True):
        assert_same(side, start, "scores")
    buffers.check()
    assert_clean(selection)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "approximate"])
@given(LARGER, SEEDS, DENSITIES, SCORES, SCORES, st.booleans())
@examples(4)
def test_products_with_uncertainty(
    device: torch.device, exact: bool, n: int, seed: int, density: float, kind: str, other: str, low: bool
) -> None:
    kinds = [k if k not in ("huge", "minus zero") else "student" for k in (kind, other, "mixed", "85% zeros")]
    dtype = torch.bfloat16 if low else torch.float32
    a, b, u, v = (scores(k, n, seed + i, dtype).to(device) for i, k in enumerate(kinds))
    selection = kk.StreamingThreshold(density, n, sides=2, exact=exact, device=device)
    found = selection.select((a, b), (u, v))
    for product, threshold in zip((a.float() * u.float(), b.float() * v.float()), found[:, 0], strict=True):
        check_threshold(threshold, product, kk.mask_size(density, n), exact=exact, what=str(kinds))
    assert_clean(selection)


SEGMENT_SIZES = st.lists(
    st.sampled_from([1, 15, 16, 17, 100, 1023, 1024, 1025, 2049, 4095, 4096, 4097, 9001]), min_size=1, max_size=5
)


def laid_out(parts: list[Tensor], gap: float) -> tuple[Tensor, kk.Segments]:
    """One buffer that ends exactly where its last part does; the space between parts holds `gap`."""
    pieces, places, end = [], [], 0
    for i, part in enumerate(parts):
        space = -end % 16 + 16 * (i % 2)
        pieces += [torch.full((space,), gap, dtype=part.dtype), part]
        places.append((end + space, part.numel()))
        end += space + part.numel()
    return torch.cat(pieces), kk.Segments.of(places)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "approximate"])
@pytest.mark.parametrize("sides", [1, 2])
@given(SEGMENT_SIZES, SEEDS, DENSITIES, st.booleans(), st.booleans())
@examples(4)
def test_segments_have_thresholds_of_their_own(
    device: torch.device, sides: int, exact: bool, sizes: list[int], seed: int, density: float, low: bool,
    factored: bool,
) -> None:  # fmt: skip
    kinds = [SCORE_KINDS[(seed + 3 * i) % (len(SCORE_KINDS) - 4)] for i in range(2 * len(sizes))]
    dtype, buffers, gap = torch.bfloat16 if low else torch.float32, Buffers(device), [float("nan"), 1e9][seed % 2]
    count = len(sizes)
    flat, factors = [], []
    for side in range(sides):
        parts = [scores(kinds[side * count + i], n, seed + i, dtype) for i, n in enumerate(sizes)]
        buffer, segments = laid_out(parts, gap)
        flat.append(buffers.copy(buffer))
        if factored:
            factors.append(buffers.copy(laid_out([scores("mixed", n, seed, dtype) for n in sizes], gap)[0]))
    selection = kk.StreamingThreshold(density, 1, sides=sides, segments=segments, exact=exact, device=device)
    for repeat in range(2):
        found = selection.select(tuple(flat), tuple(factors))
        assert found.shape == (sides, count)
        for side in range(sides):
            ranked = flat[side].float() * factors[side].float() if factored else flat[side]
            for group, (start, n) in enumerate(zip(segments.starts, segments.numels, strict=True)):
                part, k = ranked[start : start + n], kk.mask_size(density, n)
                check_threshold(found[side, group], part, k, exact=exact, what=f"{kinds}, {group}, {repeat}")
        assert_clean(selection)
    buffers.check()


def test_many_segments(device: torch.device) -> None:
    parts = [scores("student", 1 + 7 * i % 50, i) for i in range(20)]
    buffer, segments = laid_out(parts, 1e9)
    found = kk.importance_thresholds(buffer.to(device), 0.3, segments)
    expected = [kth_largest(part, kk.mask_size(0.3, part.numel())) for part in parts]
    assert_same(found.cpu(), torch.stack(expected), "thresholds")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "approximate"])
@given(SIZES, SEEDS, DENSITIES, SCORES)
@examples(4)
def test_public_thresholds(
    device: torch.device, exact: bool, dtype: torch.dtype, n: int, seed: int, density: float, kind: str
) -> None:
    x, k = scores(kind, n, seed, dtype).to(device), kk.mask_size(density, n)
    threshold = kk.importance_threshold(x, density, exact)
    assert threshold.shape == () and threshold.dtype == dtype and threshold.device == device
    check_threshold(threshold, x, k, exact=exact, what=kind)
    padded = torch.cat([x, torch.zeros(37, dtype=dtype, device=device)])
    check_threshold(kk.importance_threshold(padded, density, exact, numel=n), x, k, exact=exact, what="padded")
    segments = kk.Segments.of([(0, n)])
    by_segment = kk.importance_thresholds(padded, density, segments, exact)
    assert by_segment.shape == (1,) and by_segment.dtype == dtype
    check_threshold(by_segment[0], x, k, exact=exact, what="segment")


@pytest.mark.parametrize("kind", ["normal", "zeros", "denormal", "huge"])
def test_one_element(device: torch.device, kind: str) -> None:
    x = scores(kind, 1, 5).to(device)
    for density in (0.0, 0.5, 1.0):
        assert_same(kk.importance_threshold(x, density), x[0], kind)
        assert_same(kk.importance_threshold(x, density, exact=False), x[0], kind)


@given(SIZES, SEEDS, DENSITIES, SCORES.filter(lambda kind: kind != "huge"), st.integers(0, 40))
@examples(12)
def test_quantile(device: torch.device, n: int, seed: int, density: float, kind: str, padding: int) -> None:
    x = scores(kind, n, seed)
    padded = torch.cat([x, torch.zeros(padding)]).to(device)
    found = kk.importance_quantile(padded, density, numel=n)
    expected = np.quantile(x.double().numpy(), 1.0 - density)
    np.testing.assert_allclose(float(found), expected, rtol=1e-6, atol=1e-44)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_density_on_the_device(device: torch.device, dtype: torch.dtype) -> None:
    """k as for the plain number, wherever float32 can tell k from k + 1."""
    sizes = [*range(1, 60), 100, 999, 1000, 1001, 2500, 10000, *([2359296, 10**8] if dtype == torch.float64 else [])]
    segments, wanted = laid_out_sizes(sizes), [i / 100 for i in range(101)]
    selection = kk.StreamingThreshold(0.5, 1, segments=segments, device=device)
    for density in wanted:
        selection.set_density(density)
        plain = selection._ranks.tolist()
        selection.set_density(torch.tensor(density, dtype=dtype, device=device))
        assert selection._ranks.tolist() == plain == [max(1, -(-round(100 * density) * n // 100)) for n in sizes]


def laid_out_sizes(sizes: list[int]) -> kk.Segments:
    places, end = [], 0
    for n in sizes:
        places.append((end, n))
        end += -(-n // 16) * 16
    return kk.Segments.of(places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_density_and_rank_may_change_between_selections(device: torch.device, dtype: torch.dtype) -> None:
    x = scores("student", 3000, 0).to(device)
    selection = kk.StreamingThreshold(torch.tensor(0.2, dtype=dtype, device=device), 3000, device=device)
    assert float(selection.select((x,))) == float(kth_largest(x, 600))
    selection.set_density(0.5)
    assert float(selection.select((x,))) == float(kth_largest(x, 1500))
    for k in (1, 2, 1023, 2999, 3000):
        selection.set_rank(k)
        assert float(selection.select((x,))) == float(kth_largest(x, k))
    for k in (0, 3001):
        with pytest.raises(ValueError, match=f"no {k}-th largest of 3000"):
            selection.set_rank(k)
    selection.set_density(torch.zeros((), dtype=dtype, device=device))
    assert float(selection.select((x,))) == float(x.max())


@given(SIZES, SEEDS, DENSITIES, SCORES)
@examples(10)
def test_histogram_of_its_own(device: torch.device, n: int, seed: int, density: float, kind: str) -> None:
    buffers = Buffers(device)
    x, u = (buffers.copy(scores(k, n, seed)) for k in (kind, "mixed"))
    for window in ([WHOLE_SHIFT, 0], [WINDOW_SHIFT, 32000], [6, 0]):
        for factor in (None, u) if kind != "huge" else (None,):
            ours, expected = buffers.copy(torch.arange(BINS)), torch.arange(BINS, device=device)
            place = torch.tensor(window, device=device)
            with launch.count_launches() as launches:
                torch.ops.kif.histogram_(ours, place, x, factor)
            assert launches == {"histogram_kernel": 1}
            reference.histogram_(expected, place, x, factor)
            assert_same(ours, expected, f"histogram {window}")
    buffers.check()


@pytest.mark.parametrize("programs", [1, 2, 100])
def test_the_number_of_programs_does_not_show(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    sides = tuple(scores(kind, 5008, 0).to(device) for kind in ("lognormal * student", "85% zeros"))

    def run() -> list[Tensor]:
        exact, near = (kk.StreamingThreshold(0.2, 5008, sides=2, exact=e, device=device) for e in (True, False))
        return [s.select(sides).clone() for s in (exact, near, exact, near)] + list(near.state_dict().values())

    before = run()
    monkeypatch.setattr(launch, "PROGRAMS_PER_SM", programs)
    for actual, expected in zip(run(), before, strict=True):
        assert_same(actual, expected, f"{programs} programs")


def test_strided_buffers_take_the_definition_and_leave_a_clean_workspace(device: torch.device) -> None:
    x = scores("student", 3000, 0).to(device)
    strided = torch.stack([x, -x], 1)[:, 0]
    selection = kk.StreamingThreshold(0.2, 3000, device=device)
    importance = torch.zeros_like(x)
    options = dict(histogram=selection.histogram(0), window=selection.window(0))
    kk.importance_ema_(importance, x, torch.ones_like(x), 0.0, **options)
    with launch.count_launches() as launches:
        assert float(selection.select((strided,), counted=True)) == float(kth_largest(x, 600))
    assert not launches
    # what was counted into the workspace above must not be added to what is counted now
    assert not selection.state_dict()["histograms"].any()
    kk.importance_ema_(importance, x * 2, torch.ones_like(x), 0.0, **options)
    assert float(selection.select((importance,), counted=True)) == float(kth_largest(2 * x, 600))


def test_two_dimensions_and_parameters(device: torch.device) -> None:
    x = torch.nn.Parameter(scores("normal", 600, 0).view(20, 30).to(device))
    assert float(kk.importance_threshold(x, 0.2)) == float(kth_largest(x.detach(), 120))


def test_what_cannot_be_ranked_is_refused(device: torch.device) -> None:
    x, y = scores("normal", 100, 0).to(device), scores("normal", 90, 0).to(device)
    two = kk.StreamingThreshold(0.2, 80, sides=2, device=device)
    with pytest.raises(ValueError, match=r"scores\[1\] has 90 elements, scores\[0\] has 100"):
        two.select((x, y))
    with pytest.raises(ValueError, match="1 score and 0 factor buffers for 2 sides"):
        two.select((x,))
    with pytest.raises(ValueError, match=r"factors\[0\]"):
        kk.StreamingThreshold(0.2, 80, device=device).select((x,), (y,))
    with pytest.raises(ValueError, match="100 elements, 101 are to be ranked"):
        kk.StreamingThreshold(0.2, 101, device=device).select((x,))
    for sides in (0, 3):
        with pytest.raises(ValueError, match="sides must be 1 or 2"):
            kk.StreamingThreshold(0.2, 100, sides=sides, device=device)
    for density in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="density"):
            kk.StreamingThreshold(density, 100, device=device)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        kk.importance_threshold(values("normal", 100, 0).abs().double().to(device), 0.2)
    with pytest.raises(ValueError, match="cannot rank"):
        kk.importance_threshold(x[:0], 0.2)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_scores_of_minus_zero_are_zeros_in_a_sharded_threshold(density: float, device: torch.device) -> None:
    """Their bits less the base of a window do not fit into 32 bits."""
    x = torch.tensor([-0.0] * 9 + [1.5, 1e-41, 0.25, 3.0, 0.0, -0.0], device=device)
    expected = x.sort(descending=True).values[kk.checks.mask_size(density, x.numel()) - 1]
    assert kk.sharded_threshold(x, density) == expected
