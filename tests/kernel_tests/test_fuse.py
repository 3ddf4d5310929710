"""Fusion of two task vectors through two masks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kif_kernels as kk
from kernel_tests.inputs import ANY, FINITE, SEEDS, SIZES, Buffers, assert_as_accurate, assert_same, examples, values
from kernel_tests.scores import SCORES, scores
from kif_kernels import reference
from kif_kernels.kernels import launch

TABLES = {**kk.FUSION_TABLES, "eight numbers": kk.FusionTable((0.3, -0.7), (1.5, 0.1), (-0.2, 2.0), (0.25, 0.6))}
TABLE = st.sampled_from(list(TABLES))
LIMITS = st.sampled_from(["low", "middle", "high", 0.0, 1e-40, math.inf])
SHADOWS = st.sampled_from([None, torch.bfloat16, torch.float16])
FLAGS = st.tuples(*[st.booleans()] * 4)
"""strict, write_start, with uncertainty, bfloat16 scores."""


def limit(kind: str | float, ranked: Tensor) -> Tensor:
    """A threshold; `low`, `middle` and `high` are scores themselves, so that > and >= differ."""
    if isinstance(kind, float):
        return torch.tensor(kind)
    order = ranked.float().sort().values
    return order[{"low": len(order) // 10, "middle": len(order) // 2, "high": len(order) - 1}[kind]]


class Case:
    """Tensors of one fusion on the CPU."""

    def __init__(self, n: int, seed: int, kinds: tuple[str, str], flags: tuple[bool, ...], padding: int = 0) -> None:
        self.strict, self.write_start, uncertain, low = flags
        state = torch.bfloat16 if low else torch.float32
        self.theta, self.start, self.inner = (values("mixed", n, seed + i) for i in range(3))
        self.scores = [scores(kind, n, seed + 3 + i, state) for i, kind in enumerate(kinds)]
        self.factors: list[Tensor | None] = [None, None]
        if uncertain:
            self.factors = [scores("mixed", n, seed + 5 + i, state) for i in range(2)]
        for score in self.scores:
            score[n - padding :] = 0.0

    @property
    def ranked(self) -> list[Tensor]:
        pairs = zip(self.scores, self.factors, strict=True)
        return [s.float() if f is None else s.float() * f.float() for s, f in pairs]


def check(
    device: torch.device,
    case: Case,
    limits: tuple[Tensor, Tensor],
    table: kk.FusionTable,
    *,
    shadow: torch.dtype | None = None,
    padding: int = 0,
    segments: kk.Segments | None = None,
) -> list[Tensor]:
    """The kernel gives the bits of the definition, is as close to float64, and writes nothing else. Returns: theta,
    theta_start, shadow, kept (where there are such), on the CPU."""
    n, buffers = case.theta.numel(), Buffers(device)
    weights = [w for pair in table for w in pair]
    t_in, t_out = (t.float().to(device) for t in limits)
    results = []
    for ours in (True, False):
        theta, start, inner, i_in, i_out = (buffers.copy(t) for t in (case.theta, case.start, case.inner, *case.scores))
        u_in, u_out = (buffers.copy(t) for t in case.factors)
        low = None if shadow is None else buffers.poison(n, shadow)
        kept = buffers.copy(torch.tensor([100, 200, 300]))
        if ours:
            with launch.count_launches() as launches:
                result = kk.fuse_(
                    theta, start, inner, i_in, i_out, t_in, t_out, table, strict=case.strict, uncertainty_in=u_in,
                    uncertainty_out=u_out, write_start=case.write_start, shadow=low, kept=kept, numel=n - padding,
                    segments=segments,
                )  # fmt: skip
            assert result is theta and launches == {"fuse_kernel": 1}
            for tensor, before in zip((inner, i_in, i_out), (case.inner, *case.scores), strict=True):
                assert_same(tensor.cpu(), before, "input")
        else:
            reference.fuse_(
                theta, start, inner, i_in, i_out, u_in, u_out, t_in, t_out, weights, case.strict, case.write_start,
                low, kept, n - padding, segments.starts if segments else [], segments.numels if segments else [], None,
            )  # fmt: skip
        results.append([t.cpu() for t in (theta, start, low, kept) if t is not None])
    buffers.check()
    for actual, expected, name in zip(*results, ("theta", "start", "shadow or kept", "kept"), strict=False):
        assert_same(actual, expected, name)
    places = [(0, n)] if segments is None else list(zip(segments.starts, segments.numels, strict=True))
    for group, (a, size) in enumerate(places):
        pair = (t_in.cpu().reshape(-1)[group], t_out.cpu().reshape(-1)[group])
        check_part(case, results, slice(a, a + size), pair, table)
    return results[0]


def check_part(
    case: Case, results: list[list[Tensor]], part: slice, limits: tuple[Tensor, Tensor], table: kk.FusionTable
) -> None:
    """Formula in float64, cell by cell."""
    compare = torch.gt if case.strict else torch.ge
    m_in, m_out = (compare(ranked[part], t) for ranked, t in zip(case.ranked, limits, strict=True))
    theta, start, inner = (t[part].double() for t in (case.theta, case.start, case.inner))
    exact, scale = start.clone(), start.abs()
    cells = {"both": m_in & m_out, "inner_only": m_in & ~m_out, "outer_only": ~m_in & m_out, "neither": ~m_in & ~m_out}
    for name, cell in cells.items():
        weights = getattr(table, name)
        for w, tau, size in zip(
            weights, (inner - start, theta - inner), (inner.abs() + start.abs(), theta.abs() + inner.abs()), strict=True
        ):
            if w != 0.0:
                exact = torch.where(cell, exact + w * tau, exact)
                scale = torch.where(cell, scale + abs(w) * size, scale)
    assert_as_accurate(results[0][0][part], results[1][0][part], exact, scale, "theta", slack=0.0)
    if case.write_start:
        assert_same(results[0][1][part], results[0][0][part], "the next round's start")
    else:
        assert_same(results[0][1][part], case.start[part], "start")


@pytest.mark.parametrize("name", list(TABLES))
@given(SIZES, SEEDS, st.tuples(SCORES, SCORES), st.tuples(LIMITS, LIMITS), FLAGS, SHADOWS)
@examples(10)
def test_tables_and_options(
    device: torch.device, name: str, n: int, seed: int, kinds: tuple[str, str], limits: tuple[str | float, ...],
    flags: tuple[bool, ...], shadow: torch.dtype | None,
) -> None:  # fmt: skip
    if flags[2]:  # inf * 0 is no score
        kinds = tuple(kind if kind != "huge" else "student" for kind in kinds)
    case = Case(n, seed, kinds, flags)
    thresholds = tuple(limit(kind, ranked) for kind, ranked in zip(limits, case.ranked, strict=True))
    theta, *_, kept = check(device, case, thresholds, TABLES[name], shadow=shadow)
    compare = torch.gt if case.strict else torch.ge
    m_in, m_out = (compare(ranked, t) for ranked, t in zip(case.ranked, thresholds, strict=True))
    sizes = [100 + int(m_in.sum()), 200 + int(m_out.sum()), 300 + int((m_in & m_out).sum())]
    assert kept.tolist() == sizes
    assert theta.isfinite().all()


@pytest.mark.parametrize("strict", [False, True])
@given(SIZES, SEEDS, TABLE, st.tuples(LIMITS, LIMITS), st.integers(1, 1500))
@examples(10)
def test_padding_is_not_counted(
    device: torch.device, strict: bool, n: int, seed: int, name: str, limits: tuple[str | float, ...], padding: int
) -> None:
    padding = min(padding, n)
    case = Case(n, seed, ("mixed", "half zeros"), (strict, True, False, False), padding)
    real = [ranked[: n - padding] for ranked in case.ranked]
    thresholds = tuple(limit(kind, ranked) for kind, ranked in zip(limits, case.ranked, strict=True))
    kept = check(device, case, thresholds, TABLES[name], padding=padding)[-1]
    m_in, m_out = ((r > t if strict else r >= t) for r, t in zip(real, thresholds, strict=True))
    assert kept.tolist() == [100 + int(m_in.sum()), 200 + int(m_out.sum()), 300 + int((m_in & m_out).sum())]


@pytest.mark.parametrize("name", list(TABLES))
def test_each_cell_of_the_table(device: torch.device, name: str) -> None:
    """Plain numbers: start 1, inner task vector 8, outer task vector 64."""
    ranks = [(2.0, 2.0), (2.0, 0.0), (0.0, 2.0), (0.0, 0.0), (1.0, 1.0)]
    score_in, score_out = (torch.tensor([rank[side] for rank in ranks], device=device) for side in (0, 1))
    one = torch.tensor(1.0, device=device)
    for strict in (False, True):
        theta, start, inner = (torch.full((5,), value, device=device) for value in (73.0, 1.0, 9.0))
        kept = torch.zeros(3, dtype=torch.int64, device=device)
        kk.fuse_(theta, start, inner, score_in, score_out, one, one, TABLES[name], strict=strict, kept=kept)
        cells = [*TABLES[name], TABLES[name].neither if strict else TABLES[name].both]
        torch.testing.assert_close(theta.tolist(), [1.0 + 8.0 * w_in + 64.0 * w_out for w_in, w_out in cells])
        assert_same(start, theta, "start")
        assert kept.tolist() == ([2, 2, 1] if strict else [3, 3, 2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_task_vector_of_weight_0_may_hold_anything(device: torch.device, bad: float) -> None:
    score_in, score_out = torch.tensor([2.0, 2.0, 0.0], device=device), torch.tensor([0.0, 2.0, 0.0], device=device)
    one = torch.tensor(1.0, device=device)
    theta = torch.tensor([bad, 5.0, bad], device=device)
    start, inner = torch.tensor([1.0, 1.0, 1.0], device=device), torch.tensor([3.0, bad, bad], device=device)
    kk.fuse_(theta, start, inner, score_in, score_out, one, one, kk.PAPER)
    # inner only: the outer vector is not looked at; both: what is not finite shows; neither: nothing moves
    assert theta[0] == 3.0 and not theta[1].isfinite() and theta[2] == 1.0


@given(SIZES, SEEDS, ANY, ANY, TABLE)
@examples(20)
def test_weights_that_are_not_finite(device: torch.device, n: int, seed: int, kind: str, other: str, name: str) -> None:
    """Bit by bit as the definition, which says where NaN may appear."""
    results = []
    for ours in (True, False):
        theta, start, inner = (values(k, n, seed + i).to(device) for i, k in enumerate((kind, "mixed", other)))
        a, b = (scores("ties", n, seed + i).to(device) for i in (3, 4))
        half = torch.tensor(0.5, device=device)
        if ours:
            kk.fuse_(theta, start, inner, a, b, half, half, TABLES[name])
        else:
            weights = [w for pair in TABLES[name] for w in pair]
            reference.fuse_(
                theta, start, inner, a, b, None, None, half, half, weights, False, True, None, None, n, [], [], None
            )
        results.append((theta, start))
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected, "theta")


SEGMENT_SIZES = st.lists(
    st.sampled_from([1, 15, 16, 17, 100, 1023, 1025, 4095, 4096, 4097, 5001]), min_size=1, max_size=5
)


@given(SEGMENT_SIZES, SEEDS, TABLE, FLAGS, SHADOWS, st.integers(0, 20), st.sampled_from([0, 16, 48]))
@examples(20)
def test_segments(
    device: torch.device, sizes: list[int], seed: int, name: str, flags: tuple[bool, ...],
    shadow: torch.dtype | None, tail: int, gap: int,
) -> None:  # fmt: skip
    """Every segment by its own thresholds; what lies between and behind stays, whether or not the buffer goes on."""
    places, end = [], gap
    for size in sizes:
        places.append((end, size))
        end += -(-size // 16) * 16 + gap
    segments = kk.Segments.of(places)
    n = segments.end + tail
    case = Case(n, seed, ("mixed", "ties"), flags)
    wanted = [["low", "middle", 0.0][(seed + i) % 3] for i in range(len(places))]
    thresholds = tuple(
        torch.stack([limit(kind, ranked[a : a + size]) for kind, (a, size) in zip(wanted, places, strict=True)])
        for ranked in case.ranked
    )
    outside = torch.ones(n, dtype=torch.bool)
    for a, size in places:
        outside[a : a + size] = False
    theta, start, *rest, kept = check(device, case, thresholds, TABLES[name], shadow=shadow, segments=segments)
    assert_same(theta[outside], case.theta[outside], "theta outside of segments")
    assert_same(start[outside], case.start[outside], "start outside of segments")
    if rest:
        assert bool(rest[0][outside].isnan().all()), "the shadow outside of segments is untouched"
        assert_same(rest[0][~outside], theta[~outside].to(rest[0].dtype), "shadow")
    # elements outside are in no mask
    inside = [r[a : a + s] for r in case.ranked for a, s in places]
    compare = torch.gt if case.strict else torch.ge
    masks = [compare(x, t) for x, t in zip(inside, torch.cat(thresholds), strict=True)]
    m_in, m_out = torch.cat(masks[: len(places)]), torch.cat(masks[len(places) :])
    assert kept.tolist() == [100 + int(m_in.sum()), 200 + int(m_out.sum()), 300 + int((m_in & m_out).sum())]


@pytest.mark.parametrize("segmented", [False, True])
def test_one_element(device: torch.device, segmented: bool) -> None:
    segments = kk.Segments.of([(0, 1)]) if segmented else None
    for seed, (name, flags) in enumerate(
        itertools.product(TABLES, [(False, True, False, False), (True, False, True, True)])
    ):
        case = Case(1, seed, ("normal", "normal"), flags)
        thresholds = tuple(ranked[0] * factor for ranked, factor in zip(case.ranked, (1.0, 0.5), strict=True))
        if segmented:
            thresholds = tuple(t.reshape(1) for t in thresholds)
        check(device, case, thresholds, TABLES[name], shadow=torch.bfloat16, segments=segments)


@pytest.mark.parametrize("strided", ["theta", "scores", "shadow"])
def test_strided_tensors_take_the_definition(device: torch.device, strided: str) -> None:
    def buffer(seed: int, *, apart: bool) -> Tensor:
        x = values("normal", 900, seed).abs().view(300, 3).to(device)
        return x[:, 1] if apart else x[:, 1].contiguous()

    def tensors() -> list[Tensor]:
        return [buffer(i, apart={"theta": i < 3, "scores": 3 <= i < 5, "shadow": False}[strided]) for i in range(5)]

    ours, theirs, t = tensors(), tensors(), torch.tensor(0.7, device=device)
    lows = [torch.zeros(300, 2, dtype=torch.bfloat16, device=device)[:, int(strided == "shadow")] for _ in range(2)]
    lows = lows if strided == "shadow" else [low.contiguous() for low in lows]
    with launch.count_launches() as launches:
        kk.fuse_(*ours, t, t, shadow=lows[0])
    weights = [w for pair in kk.PAPER for w in pair]
    reference.fuse_(*theirs, None, None, t, t, weights, False, True, lows[1], None, 300, [], [], None)
    assert not launches
    for actual, expected in zip([*ours, lows[0]], [*theirs, lows[1]], strict=True):
        assert_same(actual, expected, "strided")
        if actual._base is not None and expected._base is not None:
            assert_same(actual._base.reshape(-1), expected._base.reshape(-1), "what lies between")


@pytest.mark.parametrize("strided", ["thresholds", "kept"])
def test_columns_of_a_table_of_rounds(device: torch.device, strided: str) -> None:
    """The kernel must not take the memory of a column for a row."""
    segments, case = kk.Segments.of([(0, 100), (112, 50)]), Case(162, 0, ("normal", "normal"), (False,) * 4)
    results = []
    for apart in (True, False):
        limits = torch.tensor([[0.2, 9.0], [1.5, 9.0]], device=device)[:, 0]
        table = torch.zeros(3, 2, dtype=torch.int64, device=device)
        kept = table[:, 0]
        if not (apart and strided == "thresholds"):
            limits = limits.contiguous()
        if not (apart and strided == "kept"):
            kept = kept.contiguous()
        tensors = [t.to(device, copy=True) for t in (case.theta, case.start, case.inner, *case.scores)]
        kk.fuse_(*tensors, limits, limits, segments=segments, kept=kept)
        assert not table[:, 1].any()
        results.append((*tensors, kept))
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected, strided)


@pytest.mark.parametrize("programs", [1, 2, 100])
@given(st.just(9999), SEEDS, FINITE)
@examples(2)
def test_the_number_of_programs_does_not_show(
    device: torch.device, programs: int, n: int, seed: int, kind: str
) -> None:
    results = []
    for count in (launch.PROGRAMS_PER_SM, programs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "PROGRAMS_PER_SM", count)
            case = Case(n, seed, (kind, "mixed"), (False, True, False, False), 30)
            thresholds = (limit("middle", case.ranked[0]), limit(0.0, case.ranked[1]))
            results.append(check(device, case, thresholds, kk.RELEASED_CODE, padding=30))
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected, f"{programs} programs")


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    theta, start, inner, a, b = (values("normal", 100, i).abs().to(device) for i in range(5))
    t = torch.tensor(0.5, device=device)
    with pytest.raises(ValueError, match="together or not at all"):
        kk.fuse_(theta, start, inner, a, b, t, t, uncertainty_in=a)
    with pytest.raises(ValueError, match="numel is 101"):
        kk.fuse_(theta, start, inner, a, b, t, t, numel=101)
    with pytest.raises(ValueError, match="segments end at 112"):
        kk.fuse_(theta, start, inner, a, b, t.reshape(1), t.reshape(1), segments=kk.Segments.of([(96, 16)]))
    with pytest.raises(ValueError, match="threshold_in"):
        kk.fuse_(theta, start, inner, a, b, torch.stack([t, t]), t)
    with pytest.raises(ValueError, match=r"threshold_out must be a 0-d tensor on .*, got 0\.5"):
        kk.fuse_(theta, start, inner, a, b, t, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kept must be int64"):
        kk.fuse_(theta, start, inner, a, b, t, t, kept=torch.zeros(3, device=device))
