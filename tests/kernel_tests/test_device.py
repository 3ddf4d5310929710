"""What only a GPU can show: CUDA graphs, more than 2**31 elements, no host sync, repeatable bits, torch.compile.

Every test also runs interpreted, at small sizes and without what makes it a GPU's: so that it is known to work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import kif_kernels as kk
from kernel_tests.inputs import assert_same, values
from kif_kernels import reference
from kif_kernels.kernels import common

INNER, OUTER = 2, 2
BEYOND = 2**31 + 1037
PLACES = [pytest.param(5000, id="5000"), pytest.param(BEYOND, id="beyond 2**31", marks=pytest.mark.gpu)]
LENGTHS = [pytest.param(3000, id="3000"), pytest.param(1_000_003, id="1000003", marks=pytest.mark.gpu)]


@triton.jit
def count_blocks(result_ptr, n, BLOCK: tl.constexpr):
    tl.store(result_ptr, common.blocks_of(n, BLOCK))


@pytest.mark.parametrize(
    "n", [1, 2, 1023, 1024, 1025, 2**31 - 1025, 2**31 - 1024, 2**31 - 1023, 2**31 - 1, 2**31, 2**33]
)
def test_blocks_of_sizes_around_int32(device: torch.device, n: int) -> None:
    result = torch.zeros((), dtype=torch.int64, device=device)
    count_blocks[(1,)](result, n, 1024)
    assert result.item() == -(-n // 1024)


class Round:
    """A round as the engine does it, on buffers that stay where they are: all that changes is on the device."""

    def __init__(self, device: torch.device, n: int, *, exact: bool = True) -> None:
        def zeros(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.n = n
        self.weight = values("normal", n, 0).to(device)
        self.incoming = torch.zeros(INNER + OUTER, n, device=device)
        self.grad, self.start, self.inner = (torch.zeros(n, device=device) for _ in range(3))
        self.shadow = torch.zeros(n, dtype=torch.bfloat16, device=device)
        self.moments = [[torch.zeros(n, device=device) for _ in range(2)] for _ in range(2)]
        self.scores = [torch.zeros(n, device=device) for _ in range(2)]
        self.counts = [(zeros(), zeros(torch.bool), zeros(torch.float64), zeros(torch.int64)) for _ in range(2)]
        self.lr, self.kept = torch.full((), 0.1, device=device), zeros(torch.int64, 3)
        self.selection = kk.StreamingThreshold(0.2, n, sides=2, exact=exact, device=device)

    def feed(self, seed: int) -> None:
        for i, row in enumerate(self.incoming):
            row.copy_(values("student", self.n, 10 * seed + i))
        if seed % 2:
            # a step that is skipped
            self.incoming[1, self.n // 2] = float("nan")

    def __call__(self) -> None:
        for i, incoming in enumerate(self.incoming):
            side, first = int(i >= INNER), i == 0
            last = i in (INNER - 1, INNER + OUTER - 1)
            self.grad.copy_(incoming)
            scale, skip, step, skipped = self.counts[side]
            kk.gradient_state_(self.grad, scale, skip, step, skipped, max_norm=1.0)
            kk.adamw_importance_(
                self.weight, self.grad, *self.moments[side], self.scores[side], lr=self.lr, betas=(0.9, 0.99),
                eps=1e-8, weight_decay=0.1, step=step, decay=0.55, reset=first, grad_scale=scale, skip=skip,
                snapshot_before=self.start if first else None,
                snapshot_after=self.inner if i == INNER - 1 else None,
                histogram=self.selection.histogram(side) if last else None,
                window=self.selection.window(side) if last else None, zero_grad=True,
            )  # fmt: skip
        found = self.selection.select(tuple(self.scores), counted=True)
        kk.fuse_(
            self.weight, self.start, self.inner, *self.scores, found[0, 0], found[1, 0], kept=self.kept,
            shadow=self.shadow,
        )  # fmt: skip

    def state(self) -> list[Tensor]:
        """All tensors that a round reads or writes."""
        return [
            self.weight, self.grad, self.start, self.inner, self.shadow, *self.moments[0], *self.moments[1],
            *self.scores, *self.counts[0], *self.counts[1], self.kept, self.selection.thresholds,
            *self.selection.state_dict().values(),
        ]  # fmt: skip


def rounds(device: torch.device, n: int, exact: bool, run: Callable[[Round], Callable[[], None]]) -> list[Tensor]:
    """The state after each of three rounds, each run by what `run` makes of it."""
    one = Round(device, n, exact=exact)
    start = [tensor.clone() for tensor in one.state()]
    one.feed(0)
    repeat = run(one)
    # preparing may have run the round
    for tensor, value in zip(one.state(), start, strict=True):
        tensor.copy_(value)
    results = []
    for seed in range(3):
        one.feed(seed)
        repeat()
        results += [tensor.clone() for tensor in one.state()]
    assert int(one.kept[0]) >= 3 * kk.mask_size(0.2, n) - 0.003 * n and int(one.counts[0][3]) == 1
    return results


def captured(one: Round) -> Callable[[], None]:
    """The round as a CUDA graph; where there is no GPU, the round."""
    if one.weight.device.type != "cuda":
        return one
    # kernels are compiled and loaded before the capture, on a stream of its own as PyTorch asks for
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        one()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()
    return graph.replay


@contextmanager
def no_sync(device: torch.device) -> Iterator[None]:
    """Whatever waits for the device raises."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "approximate"])
@pytest.mark.parametrize("n", LENGTHS)
def test_a_captured_round_gives_the_bits_of_a_launched_one(device: torch.device, n: int, exact: bool) -> None:
    expected = rounds(device, n, exact, lambda one: one)
    for i, (actual, wanted) in enumerate(zip(rounds(device, n, exact, captured), expected, strict=True)):
        assert_same(actual, wanted, f"tensor {i}")


@pytest.mark.parametrize("n", LENGTHS)
def test_a_round_never_waits_for_the_host(device: torch.device, n: int) -> None:
    one = Round(device, n)
    one.feed(0)
    one()
    with no_sync(device):
        one()
        kk.importance_threshold(one.scores[0], 0.2)
    assert one.weight.isfinite().all()


@pytest.mark.parametrize("n", LENGTHS)
def test_a_second_run_on_a_stream_of_its_own_gives_the_same_bits(device: torch.device, n: int) -> None:
    def on_a_stream(one: Round) -> Callable[[], None]:
        if device.type != "cuda":
            return one
        stream = torch.cuda.Stream()

        def run() -> None:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                one()
            torch.cuda.current_stream().wait_stream(stream)

        return run

    expected = rounds(device, n, True, lambda one: one)
    for actual, wanted in zip(rounds(device, n, True, on_a_stream), expected, strict=True):
        assert_same(actual, wanted, "state")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(device: torch.device) -> None:
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    results = [rounds(where, 3000, True, lambda one: one) for where in (device, other)]
    for actual, wanted in zip(*results, strict=True):
        assert actual.device != wanted.device
        assert_same(actual.cpu(), wanted.cpu(), "state")


def compiled_phases(grad: Tensor, one: Round, density: Tensor) -> tuple[Tensor, Tensor]:
    """Operations of ours between operations of PyTorch."""
    scale, skip, step, skipped = one.counts[0]
    grad = grad * 2.0
    kk.gradient_state_(grad, scale, skip, step, skipped, max_norm=1.0)
    kk.importance_ema_(one.scores[1], one.weight, grad, 0.55, reset=True, skip=skip)
    kk.adamw_importance_(
        one.weight, grad, *one.moments[0], one.scores[0], lr=one.lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1,
        step=step, decay=0.4, grad_scale=scale, skip=skip, zero_grad=True,
    )  # fmt: skip
    t_in, t_out = (kk.importance_threshold(score, density) for score in one.scores)
    kk.fuse_(one.weight, one.start, one.inner, *one.scores, t_in, t_out, kept=one.kept)
    return one.weight + grad, t_in * 2.0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled_code_gives_the_same_bits(device: torch.device, backend: str) -> None:
    density, results = torch.tensor(0.2, device=device), []
    for function in (compiled_phases, torch.compile(compiled_phases, fullgraph=True, backend=backend)):
        one = Round(device, 3000)
        one.feed(0)
        returned = function(one.incoming[0], one, density)
        results.append([*returned, *one.state()])
    for i, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert_same(actual, expected, f"tensor {i}")


def parts(n: int) -> list[slice]:
    """Of buffers too large for a second copy."""
    size = 2**26 if n > 2**26 else 1000
    return [slice(a, min(a + size, n)) for a in range(0, n, size)]


def filled(n: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.empty(n, dtype=dtype, device=device)
    for part in parts(n):
        x[part] = numbers(part, seed, device)
    return x


def numbers(part: slice, seed: int, device: torch.device) -> Tensor:
    """The same again whenever it is asked for."""
    generator = torch.Generator(device).manual_seed(1000 * seed + part.start // 1000)
    return torch.randn(part.stop - part.start, generator=generator, device=device)


def need(device: torch.device, gibibytes: float, n: int) -> None:
    if n != BEYOND:
        return
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(device)[0] < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory")


@pytest.mark.parametrize("n", PLACES)
def test_importance_and_threshold_of_many_elements(device: torch.device, n: int) -> None:
    need(device, 20, n)
    weight, grad = (filled(n, seed, torch.bfloat16, device) for seed in (0, 1))
    importance = torch.full((n,), float("nan"), dtype=torch.bfloat16, device=device)
    selection = kk.StreamingThreshold(0.2, n, device=device)
    kk.importance_ema_(
        importance, weight, grad, 0.5, reset=True, histogram=selection.histogram(0), window=selection.window(0)
    )
    for part in parts(n):
        expected = (weight[part].float() * grad[part].float()).abs() * 0.5
        assert_same(importance[part], expected.to(torch.bfloat16), f"importance of {part}")
    k = kk.mask_size(0.2, n)
    for counted in (True, False):
        threshold = selection.select((importance,), counted=counted)[0, 0].clone()
        above, not_below = (
            sum(int(compare(importance[part].float(), threshold).sum()) for part in parts(n))
            for compare in (torch.gt, torch.ge)
        )
        assert above < k <= not_below
    # the last elements, beyond any 32-bit offset, are the largest
    importance[-7:] = 2.0**100
    selection.set_rank(7)
    assert float(selection.select((importance,))) == 2.0**100


@pytest.mark.parametrize("n", PLACES)
def test_norm_of_many_elements(device: torch.device, n: int) -> None:
    need(device, 8, n)
    grad = filled(n, 0, torch.bfloat16, device)
    scale, skip, step, skipped = Round(device, 16).counts[0]
    kk.gradient_state_(grad, scale, skip, step, skipped, max_norm=1.0)
    norm = sum(float(grad[part].double().square().sum()) for part in parts(n)) ** 0.5
    assert float(scale) == pytest.approx(1.0 / norm, rel=2e-6)
    grad[-1] = float("nan")
    kk.gradient_state_(grad, scale, skip, step, skipped, max_norm=1.0)
    assert (float(scale), bool(skip), float(step), int(skipped)) == (1.0, True, 1.0, 1)


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("n", PLACES)
def test_fusion_of_many_elements(device: torch.device, n: int, segmented: bool) -> None:
    need(device, 44, n)
    theta, start, inner = (filled(n, seed, torch.float32, device) for seed in range(3))
    scores = [filled(n, seed, torch.bfloat16, device).abs_() for seed in (3, 4)]
    middle = n // 2 // 16 * 16
    segments = kk.Segments.of([(0, middle), (middle, n - middle)]) if segmented else None
    limits = torch.tensor([0.5, 1.0] if segmented else 0.5, device=device)
    kept, expected = torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    kk.fuse_(theta, start, inner, *scores, limits, limits, kk.RELEASED_CODE, kept=kept, segments=segments)
    weights = [w for pair in kk.RELEASED_CODE for w in pair]
    for part in parts(n):
        fused, begin = (numbers(part, seed, device) for seed in (0, 1))
        a, b = (score[part] for score in scores)
        size = part.stop - part.start
        # a part may lie in both segments
        limit = torch.where(torch.arange(part.start, part.stop, device=device) < middle, limits.reshape(-1)[0],
                            limits.reshape(-1)[-1])  # fmt: skip
        shifted = [torch.where(score.float() >= limit, 1.0, 0.0) for score in (a, b)]
        one = torch.ones((), device=device)
        reference.fuse_(
            fused, begin, inner[part], *shifted, None, None, one, one, weights, False, True, None, expected, size, [],
            [], None,
        )  # fmt: skip
        assert_same(theta[part], fused, f"theta of {part}")
        assert_same(start[part], begin, f"start of {part}")
    assert kept.tolist() == expected.tolist()


@pytest.mark.parametrize("offset", [1, 2, 5])
def test_buffers_that_are_not_aligned(device: torch.device, offset: int) -> None:
    """Views into other buffers: no vector accesses, the same results."""

    def run(offset: int) -> list[Tensor]:
        tensors = [torch.zeros(3000 + offset, device=device)[offset:] for _ in range(5)]
        for seed, tensor in enumerate(tensors):
            tensor.copy_(values("student", 3000, seed))
        theta, start, inner, a, b = tensors
        a.abs_()
        kk.importance_ema_(a, theta, inner, 0.5)
        kk.adamw_importance_(
            theta, inner, start, b.abs_(), a, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=1
        )
        found = kk.StreamingThreshold(0.2, 3000, sides=2, device=device).select((a, b)).clone()
        kk.fuse_(theta, start, inner, a, b, found[0, 0], found[1, 0])
        return [*tensors, found]

    for actual, expected in zip(run(offset), run(0), strict=True):
        assert_same(actual, expected, f"{offset} elements off")
