"""The formulas under torch.compile: the definition's numbers, and nothing compiled twice."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import kif_kernels as kk
from kif_kernels import compiled, reference
from kif_kernels.layout import BINS

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "g++") is None, reason="torch.compile needs a C++ compiler"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TABLE = [w for pair in kk.RELEASED_CODE for w in pair]


class Numbers:
    def __init__(self, n: int) -> None:
        self.n, self.generator = n, torch.Generator().manual_seed(n)

    def __call__(self, dtype: torch.dtype = FP32) -> Tensor:
        return torch.randn(self.n, generator=self.generator).to(dtype)

    def scores(self, dtype: torch.dtype = FP32) -> Tensor:
        return self().abs().to(dtype)

    def poison(self, dtype: torch.dtype = FP32) -> Tensor:
        return torch.full((self.n,), float("nan"), dtype=dtype)


def check(name: str, *arguments: Any) -> list[Tensor]:
    """Returns: the tensors after a call of the compiled function, found close to those of the definition."""
    after = []
    for module in (reference, compiled):
        copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        getattr(module, name)(*copies)
        after.append([x for x in copies if isinstance(x, Tensor)])
    for expected, result in zip(*after, strict=True):
        # one step of the narrow dtypes, where a value lies between two
        rtol = {BF16: 2**-7, FP16: 2**-10}.get(expected.dtype, 1e-5)
        torch.testing.assert_close(result, expected, rtol=rtol, atol=1e-6, equal_nan=True)
    return after[1]


def graphs() -> int:
    """Graphs that have been compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def importance(n: int, decay: float, skip: bool, state: torch.dtype = FP32, reset: bool = False) -> list[Tensor]:
    make = Numbers(n)
    grad = make()
    grad[0], grad[n // 2] = float("nan"), float("inf")
    old = make.poison(state) if reset else make.scores(state)
    unc = make.scores(state) if state == BF16 else None
    counts, window = torch.zeros(BINS, dtype=torch.int64), torch.tensor([22, 0])
    return check(
        "importance_ema_", old, make(), grad, decay, reset, unc, 0.7, torch.tensor(skip), counts, window
    )  # fmt: skip


def test_importance_is_compiled_once_for_all_sizes_and_numbers() -> None:
    importance(1000, 0.55, False)
    before = graphs()
    assert before >= 1
    for n, decay, skip in ((4096, 0.45, False), (33, 1.0, True), (2, 0.3, False), (1000, 0.55, True)):
        assert int(importance(n, decay, skip)[-2].sum()) == n
    assert graphs() == before


@pytest.mark.parametrize(("state", "reset", "decay"), [(BF16, False, 0.6), (FP32, True, 0.0)])
def test_variants_of_importance(state: torch.dtype, reset: bool, decay: float) -> None:
    assert bool(importance(777, decay, False, state, reset)[0].isfinite().all())


def adamw(n: int, lr: float, step: int, skip: bool, on_device: bool = False, scale: float = 0.5) -> list[Tensor]:
    """Every option; weights in bfloat16 where numbers come from the device."""
    make, dtype = Numbers(n), BF16 if on_device else FP32
    return check(
        "adamw_importance_",
        make(dtype),
        make(dtype),
        make(),
        make.scores(),
        make.scores(),
        None if on_device else make.scores(),
        make.poison(dtype),
        make.poison(dtype),
        make.poison(FP16),
        None,
        None,
        0.0 if on_device else lr,
        torch.tensor(lr) if on_device else None,
        0.0 if on_device else float(step),
        torch.tensor(float(step), dtype=torch.float64) if on_device else None,
        0.9,
        0.999,
        1e-8,
        0.1,
        0.55,
        0.85,
        False,
        on_device,
        True,
        torch.tensor(scale),
        torch.tensor(2.0),
        torch.tensor(skip),
    )


@pytest.mark.parametrize("on_device", [False, True], ids=["python numbers", "device numbers, bfloat16"])
def test_adamw_is_compiled_once_for_all_steps(on_device: bool) -> None:
    adamw(1000, 1e-2, 1, False, on_device)
    before = graphs()
    for n, lr, step, skip in ((1000, 2e-2, 2, False), (4097, 1e-3, 3, True), (64, 5e-4, 1000, False)):
        after = adamw(n, lr, step, skip, on_device, scale=1.0 / step)
        assert not after[1].any()
    assert graphs() == before


def test_bfloat16_weights_are_scored_as_they_are_stored() -> None:
    weight, grad = torch.linspace(1.0, 2.0, 100).to(BF16), torch.full((100,), 0.125)
    scores = torch.zeros(100)
    compiled.adamw_importance_(
        weight, grad, torch.zeros(100), torch.zeros(100), scores, None, None, None, None, None, None, 0.1, None, 1.0,
        None, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0, False, True, False, None, None, None,
    )  # fmt: skip
    assert torch.equal(scores, weight.float() * 0.125)


def fuse(
    n: int, limits: tuple[Tensor, Tensor], table: list[float], starts: list[int], numels: list[int], padding: int = 0
) -> list[Tensor]:
    make = Numbers(n)
    theta, kept = make(), torch.tensor([1, 2, 3])
    if table[6] == 0.0:
        theta[n // 2] = float("inf")
    return check(
        "fuse_", theta, make(), make(), make.scores(), make.scores(), None, None, *limits, table, False, True,
        make.poison(BF16), kept, n - padding, starts, numels, None,
    )  # fmt: skip


def test_fusion_is_compiled_once_for_all_tables_and_thresholds() -> None:
    fuse(1000, (torch.tensor(0.5), torch.tensor(0.7)), TABLE, [], [])
    before = graphs()
    fuse(333, (torch.tensor(0.0), torch.tensor(0.0)), [w for pair in kk.PAPER for w in pair], [], [], padding=30)
    fuse(50, (torch.tensor(1.0), torch.tensor(0.0)), [w for pair in kk.NO_SHARE for w in pair], [], [], padding=1)
    assert graphs() == before


def test_fusion_by_segments_is_compiled_once_for_all_of_them() -> None:
    starts, numels = [0, 64, 112], [50, 48, 2]
    limits = (torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.0, 0.5, 1.0]))
    before = graphs()
    fuse(120, limits, TABLE, starts, numels)
    assert graphs() == before + 1
    fuse(120, limits, TABLE, starts, [20, 30, 1])  # a segment of one element: the definition does it
    assert graphs() == before + 1


def test_what_is_not_flat_goes_to_the_definition() -> None:
    before, make = graphs(), Numbers(8)
    x = torch.stack([make(), make()], 1)
    result = x.clone()
    compiled.importance_ema_(result[:, 0], x[:, 1], x[:, 1], 0.5, False, None, 0.0, None, None, None)
    reference.importance_ema_(x[:, 0], x[:, 1], x[:, 1], 0.5, False, None, 0.0, None, None, None)
    assert torch.equal(result, x) and graphs() == before


def test_the_public_functions_take_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for backend in ("reference", "compile"):
        monkeypatch.setenv("KIF_BACKEND", backend)
        make = Numbers(640)
        scores, theta, start, inner = make.scores(), make(), make(), make()
        kk.importance_ema_(scores, theta, make(), 0.55, skip=torch.tensor(False))
        deltas = kk.StreamingThreshold(0.2, 640).select((scores,))
        kk.fuse_(theta, start, inner, scores, scores, deltas[0, 0], deltas[0, 0])
        results.append((deltas.clone(), theta))
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"C\+\+ compiler .*'no-such-compiler'.*KIF_BACKEND=eager"):
        compiled._variant.__wrapped__(compiled._importance, (), "cpu")
