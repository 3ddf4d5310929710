"""AdamW with importance, copies and histogram in one pass."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kif_kernels as kk
from kernel_tests.inputs import (
    ANY,
    FLOATS,
    SEEDS,
    SIZES,
    Buffers,
    assert_as_accurate,
    assert_same,
    errors,
    examples,
    values,
)
from kif_kernels import reference
from kif_kernels.kernels import launch
from kif_kernels.layout import BINS, WHOLE_SHIFT, WINDOW_SHIFT

STEPS = st.sampled_from([1, 2, 7, 100, 10000])


@dataclass(frozen=True)
class Options:
    """Arguments of `kk.adamw_importance_`, with what is a tensor there as a plain value."""

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: float = 0.55
    uncertainty_decay: float = 0.7
    on_device: bool = False
    reset: bool = False
    after_update: bool = False
    zero_grad: bool = False
    skip: bool | None = None
    grad_scale: float | None = None
    inv_scale: float | None = None
    scored: torch.dtype | None = torch.float32
    uncertain: bool = False
    snapshots: bool = False
    shadow: torch.dtype | None = None
    counted: bool = False
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)


EVERYTHING = Options(
    on_device=True, reset=True, zero_grad=True, skip=False, grad_scale=0.3, inv_scale=2.0**-7, uncertain=True,
    snapshots=True, shadow=torch.bfloat16, counted=True,
)  # fmt: skip
SKIPPED = Options(
    on_device=True, zero_grad=True, skip=True, uncertain=True, snapshots=True, shadow=torch.float16, counted=True
)
VARIANTS = {
    "plain": Options(scored=None),
    "plain, device scalars": Options(scored=None, on_device=True, skip=False, grad_scale=0.3, zero_grad=True),
    "importance": Options(),
    "importance in bfloat16": Options(scored=torch.bfloat16),
    "device scalars": Options(on_device=True, skip=False, grad_scale=0.3, inv_scale=0.01),
    "first": Options(reset=True, snapshots=True),
    "counted": Options(counted=True, snapshots=True, zero_grad=True),
    "shadow in bfloat16": Options(shadow=torch.bfloat16),
    "shadow in float16": Options(shadow=torch.float16, inv_scale=2.0**-7),
    "released code": Options(after_update=True, uncertain=True, grad_scale=0.3),
    "released code, first, counted": Options(after_update=True, uncertain=True, reset=True, counted=True),
    "released code in bfloat16": Options(after_update=True, uncertain=True, scored=torch.bfloat16, counted=True),
    "everything": EVERYTHING,
    "skipped": SKIPPED,
    "skipped, first": Options(skip=True, reset=True, uncertain=True, after_update=True),
}
HYPERPARAMETERS = [
    dict(betas=(0.9, 0.95), lr=1e-3, weight_decay=0.0, eps=1e-6),
    dict(betas=(0.9, 0.98), lr=3e-4, weight_decay=0.01),
    dict(betas=(0.45, 0.4), lr=0.1),
    dict(betas=(0.0, 0.999), lr=1e-3),
    dict(betas=(0.0, 0.0), lr=1e-3),
    dict(betas=(0.9, 0.999), lr=0.0, weight_decay=0.0),
]


def check(device: torch.device, n: int, seed: int, kinds: tuple[str, str], step: int, o: Options) -> None:
    """Run the kernel and the definition on the same input, and compare both with float64."""

    def scalar(value: float | bool | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return None if value is None else torch.tensor(value, dtype=dtype, device=device)

    w0, g0 = (values(kind, n, seed + i, dtype) for i, (kind, dtype) in enumerate(zip(kinds, o.dtypes, strict=True)))
    m0, v0 = values("mixed", n, seed + 2) * 1e-3, values("student", n, seed + 3) ** 2 * 1e-4
    if step == 1:
        m0, v0 = torch.zeros(n), torch.zeros(n)
    i0 = None if o.scored is None else values("lognormal", n, seed + 4).abs().to(o.scored)
    u0 = values("mixed", n, seed + 5).abs().to(i0.dtype) if i0 is not None and o.uncertain else None
    skip, grad_scale, inv_scale = scalar(o.skip, torch.bool), scalar(o.grad_scale), scalar(o.inv_scale)
    lr = scalar(o.lr) if o.on_device else None
    count = scalar(float(step), torch.float64) if o.on_device else None
    window = torch.tensor([WHOLE_SHIFT, 0] if seed % 2 else [WINDOW_SHIFT, 32000], device=device) if o.counted else None
    results = []
    for ours in (True, False):
        buffers = Buffers(device)
        w, g, m, v = (buffers.copy(t) for t in (w0, g0, m0, v0))
        i, u = (buffers.poison(n, t.dtype) if t is not None and o.reset else buffers.copy(t) for t in (i0, u0))
        before, after = (buffers.poison(n, w0.dtype) if o.snapshots else None for _ in range(2))
        low = None if o.shadow is None else buffers.poison(n, o.shadow)
        histogram = torch.arange(BINS, device=device) if o.counted else None
        results.append((w, g, m, v, i, u, before, after, low, histogram))
        if ours:
            with launch.count_launches() as launches:
                kk.adamw_importance_(
                    w, g, m, v, i, lr=o.lr if lr is None else lr, betas=o.betas, eps=o.eps,
                    weight_decay=o.weight_decay, step=step if count is None else count, decay=o.decay, reset=o.reset,
                    after_update=o.after_update, uncertainty=u, uncertainty_decay=o.uncertainty_decay,
                    grad_scale=grad_scale, inv_scale=inv_scale, skip=skip, snapshot_before=before,
                    snapshot_after=after, shadow=low, histogram=histogram, window=window, zero_grad=o.zero_grad,
                )  # fmt: skip
            assert launches == {"adamw_kernel": 1}
            buffers.check()
        else:
            reference.adamw_importance_(
                w, g, m, v, i, u, before, after, low, histogram, window, o.lr, lr, float(step), count, *o.betas, o.eps,
                o.weight_decay, o.decay, o.uncertainty_decay, o.reset, o.after_update, o.zero_grad, grad_scale,
                inv_scale, skip,
            )  # fmt: skip
    (w, g, m, v, i, u, before, after, low, histogram), theirs = results
    starts = [None if t is None else t.to(device) for t in (w0, g0, m0, v0, i0, u0)]
    check_copies(results[0], starts, o)
    if histogram is not None and window is not None and i is not None:
        expected = torch.arange(BINS, device=device)
        reference.histogram_(expected, window, i, u)
        assert_same(histogram, expected, "histogram")
    if o.skip:
        for tensor, start, name in zip((w, m, v), (starts[0], starts[2], starts[3]), ("w", "m", "v"), strict=True):
            assert_same(tensor, start, f"{name} of a skipped step")
        for tensor, start in ((i, starts[4]), (u, starts[5])):
            if tensor is not None and start is not None:
                assert_same(tensor, torch.zeros_like(start) if o.reset else start, "score of a skipped step")
        return
    check_moments_and_weight(results[0], theirs, starts, step, o)
    if i is not None:
        check_scores(results[0], theirs, starts, o)


def check_copies(results: tuple[Tensor | None, ...], starts: list[Tensor | None], o: Options) -> None:
    w, g, _, _, _, _, before, after, low, _ = results
    if before is not None and after is not None:
        assert_same(before, starts[0], "snapshot before")
        assert_same(after, w, "snapshot after")
    if low is not None:
        assert_same(low, w.to(low.dtype), "shadow")
    assert_same(g, torch.zeros_like(g) if o.zero_grad else starts[1], "gradient")


def gradients(grad: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """The gradient that importance sees and the one that AdamW sees, in float64."""
    g = grad.double()
    if o.inv_scale is not None:
        g = g * float(torch.tensor(o.inv_scale))
    return g, g if o.grad_scale is None else g * float(torch.tensor(o.grad_scale))


def exact_step(starts: list[Tensor], step: int, o: Options) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """(m, scale of its error), v, w, scale of its error: AdamW in float64."""
    w, m, v = (starts[k].double() for k in (0, 2, 3))
    _, c = gradients(starts[1], o)
    lr, (beta1, beta2) = float(torch.tensor(o.lr)) if o.on_device else o.lr, o.betas
    kept, new = beta1 * m, (1.0 - beta1) * c
    m, m_scale = kept + new, kept.abs() + new.abs()
    v = beta2 * v + (1.0 - beta2) * c * c
    rate = lr / (1.0 - beta1**step) / (v.sqrt() / math.sqrt(1.0 - beta2**step) + o.eps)
    shrunk = w * (1.0 - lr * o.weight_decay)
    return (m, m_scale), v, shrunk - rate * m, shrunk.abs() + rate * m_scale


def check_moments_and_weight(
    ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], starts: list[Tensor], step: int, o: Options
) -> None:
    (m, m_scale), v, w, scale = exact_step(starts, step, o)
    assert_as_accurate(ours[2], theirs[2], m, m_scale, "m")
    assert_as_accurate(ours[3], theirs[3], v, v, "v")
    # square roots of PyTorch are off by an ulp here and there on some CPUs: whether at the largest error is luck. The
    # average is compared in test_error_over_many_hyperparameters
    assert_as_accurate(ours[0], theirs[0], w, scale, "w", slack=2.0)


def check_scores(
    ours: tuple[Tensor | None, ...], theirs: tuple[Tensor | None, ...], starts: list[Tensor | None], o: Options
) -> None:
    g, c = gradients(starts[1], o)

    def score(weight: Tensor) -> Tensor:
        gradient = c if o.after_update else g
        s = (weight.double() * gradient).abs()
        narrow = starts[1].float()
        for factor in (o.inv_scale, o.grad_scale if o.after_update else None):
            narrow = narrow if factor is None else narrow * factor
        return torch.where((weight.float() * narrow).isfinite(), s, 0.0)

    # after the update, each from its own weight, which may differ in its last bits
    s, their_s = (score(t[0] if o.after_update else starts[0]) for t in (ours, theirs))
    kept = torch.zeros_like(s) if o.reset else o.decay * starts[4].double()
    exact, their_exact = (kept + (1.0 - o.decay) * x for x in (s, their_s))
    assert_as_accurate(ours[4], theirs[4], exact, exact, "importance", their_exact=their_exact)
    if starts[5] is not None:
        new = 1.0 - o.uncertainty_decay
        kept = torch.zeros_like(s) if o.reset else o.uncertainty_decay * starts[5].double()
        exact, their_exact = (kept + new * (x - t[4].double()).abs() for x, t in ((s, ours), (their_s, theirs)))
        scale = kept + new * (s + ours[4].double())
        assert_as_accurate(ours[5], theirs[5], exact, scale, "uncertainty", their_exact=their_exact)


@pytest.mark.parametrize("variant", list(VARIANTS))
@given(SIZES, SEEDS, ANY, ANY, STEPS)
@examples(10)
def test_variants(device: torch.device, variant: str, n: int, seed: int, weights: str, grads: str, step: int) -> None:
    check(device, n, seed, (weights, grads), step, VARIANTS[variant])


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, FLOATS)), ids=str)
@given(SIZES, SEEDS, ANY, ANY, STEPS)
@examples(6)
def test_dtypes(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    n: int,
    seed: int,
    weights: str,
    grads: str,
    step: int,
) -> None:
    options = Options(dtypes=dtypes, snapshots=True, shadow=torch.bfloat16, zero_grad=True, counted=True)
    check(device, n, seed, (weights, grads), step, options)


@pytest.mark.parametrize("on_device", [False, True], ids=["host scalars", "device scalars"])
@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS, ids=str)
@given(st.sampled_from([3000, 5008]), SEEDS, ANY, ANY, STEPS)
@examples(8)
def test_hyperparameters(
    device: torch.device,
    hyperparameters: dict[str, object],
    on_device: bool,
    n: int,
    seed: int,
    weights: str,
    grads: str,
    step: int,
) -> None:
    check(device, n, seed, (weights, grads), step, Options(on_device=on_device, **hyperparameters))


@pytest.mark.parametrize("on_device", [False, True], ids=["host scalars", "device scalars"])
def test_error_over_many_hyperparameters(device: torch.device, on_device: bool) -> None:
    """On average over the hyperparameters the weights are as close to float64 as those of plain PyTorch.

    For one choice of them a scalar may happen to round better in the one than in the other. Weights of 0 show the
    error of the update, which is lost in the rounding of weights that are far larger.
    """
    n, totals = 4096, torch.zeros(2, 2, dtype=torch.float64)
    count = 0
    for lr, eps in ((1e-3, 1e-8), (3e-4, 1e-6), (2e-2, 1e-8)):
        for betas in ((0.9, 0.999), (0.9, 0.95), (0.8, 0.99)):
            for step in (1, 2, 7, 100, 10000):
                w, g = values("zeros" if count % 2 else "normal", n, 0), values("normal", n, count)
                m, v = values("normal", n, 1) * 0.1, values("normal", n, 2) ** 2 * 0.01
                o = Options(lr=lr, betas=betas, eps=eps, weight_decay=0.01, on_device=on_device, scored=None)
                ours, theirs, exact, scale = updated_weights(device, [w, g, m, v], step, o)
                for row, weight in enumerate((ours, theirs)):
                    e = errors(weight, exact, scale)
                    totals[row] += torch.stack([e.mean(), e.max()]).cpu()
                count += 1
    (mean, largest), (their_mean, their_largest) = (totals / count).tolist()
    # the interpreter computes with numpy, which fuses no multiply-add as the device and most CPUs do; PyTorch's own
    # mean is 0.657 half ulps on one CPU, 0.663 or 0.686 on others
    margin = 1.03 if os.environ.get("TRITON_INTERPRET") == "1" else 1.001
    assert mean <= margin * their_mean, f"mean error {mean:.3f} half ulps, plain PyTorch {their_mean:.3f}"
    assert largest <= margin * their_largest, f"largest error {largest:.2f}, plain PyTorch {their_largest:.2f}"


def updated_weights(
    device: torch.device, tensors: list[Tensor], step: int, o: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights after a step of the kernel, of the definition and of float64, and the scale of the error."""
    starts = [t.to(device) for t in tensors]
    lr = torch.tensor(o.lr, device=device) if o.on_device else None
    count = torch.tensor(float(step), dtype=torch.float64, device=device) if o.on_device else None
    ours, theirs = ([t.clone() for t in starts] for _ in range(2))
    kk.adamw_importance_(
        *ours, None, lr=o.lr if lr is None else lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay,
        step=step if count is None else count,
    )  # fmt: skip
    reference.adamw_importance_(
        *theirs, None, None, None, None, None, None, None, o.lr, lr, float(step), count, *o.betas, o.eps,
        o.weight_decay, 0.0, 0.0, False, False, False, None, None, None,
    )  # fmt: skip
    _, _, exact, scale = exact_step(starts, step, o)
    return ours[0], theirs[0], exact, scale


@pytest.mark.parametrize("variant", ["importance", "everything", "skipped"])
@pytest.mark.parametrize("kind", ["normal", "zeros", "denormal", "not finite"])
def test_one_element(device: torch.device, kind: str, variant: str) -> None:
    for seed in range(4):
        check(device, 1, seed, (kind, kind), 3, VARIANTS[variant])


@pytest.mark.parametrize("decay", [0.0, 0.2, 1.0])
def test_decays(device: torch.device, decay: float) -> None:
    check(device, 3000, 0, ("normal", "half zeros"), 3, Options(decay=decay, uncertainty_decay=decay, uncertain=True))


def test_a_count_of_zero_is_taken_as_the_first_step(device: torch.device) -> None:
    """The count stays 0 where the first gradient was not finite; that step is skipped, and must not divide by 0."""
    results = []
    for count in (0.0, 1.0):
        w, g = (values("normal", 100, seed).to(device) for seed in (0, 1))
        kk.adamw_importance_(
            w, g, torch.zeros_like(w), torch.zeros_like(w), None, lr=0.1, betas=(0.9, 0.999), eps=1e-8,
            weight_decay=0.0, step=torch.tensor(count, dtype=torch.float64, device=device),
        )  # fmt: skip
        results.append(w)
    assert_same(results[0], results[1], "step 0")


def test_many_steps_stay_as_close_to_torch_in_float64_as_torch_in_float32(device: torch.device) -> None:
    n, steps = 2049, 30
    start = values("normal", n, 0).to(device)
    hyperparameters = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)
    exact, theirs = (torch.nn.Parameter(start.to(dtype, copy=True)) for dtype in (torch.float64, torch.float32))
    optimizers = [torch.optim.AdamW([p], **hyperparameters) for p in (exact, theirs)]
    ours, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    importance = torch.zeros_like(start)
    expected = torch.zeros_like(start, dtype=torch.float64)
    clip = torch.tensor(0.5, device=device)
    for step in range(1, steps + 1):
        grad = values("student", n, step).to(device)
        expected = 0.55 * expected + 0.45 * (exact.detach() * grad.double()).abs()
        for parameter, optimizer in zip((exact, theirs), optimizers, strict=True):
            parameter.grad = grad.to(parameter.dtype) * 0.5
            optimizer.step()
        kk.adamw_importance_(ours, grad, m, v, importance, step=step, decay=0.55, grad_scale=clip, **hyperparameters)
    limit = 1.2 * float((theirs.detach().double() - exact.detach()).abs().max())
    assert float((ours.double() - exact.detach()).abs().max()) <= limit
    torch.testing.assert_close(importance.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strided", range(4), ids=["weight", "grad", "exp_avg", "importance"])
def test_strided_tensors_take_the_definition(device: torch.device, strided: int) -> None:
    def tensors() -> list[Tensor]:
        flat = [values("mixed", 300, seed).to(device) for seed in range(5)]
        flat[3].abs_(), flat[4].abs_()
        flat[strided if strided < 3 else 4] = values("normal", 900, 9).abs().view(300, 3).to(device)[:, 1]
        return flat

    ours, theirs = tensors(), tensors()
    with launch.count_launches() as launches:
        kk.adamw_importance_(
            *ours, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=2, decay=0.55, zero_grad=True
        )
    reference.adamw_importance_(
        *theirs, None, None, None, None, None, None, 0.1, None, 2.0, None, 0.9, 0.999, 1e-8, 0.1, 0.55, 0.0, False,
        False, True, None, None, None,
    )  # fmt: skip
    assert not launches
    for actual, expected in zip(ours, theirs, strict=True):
        assert_same(actual, expected, "strided")
        if actual._base is not None and expected._base is not None:
            assert_same(actual._base.reshape(-1), expected._base.reshape(-1), "what lies between")


@pytest.mark.parametrize("programs", [1, 2, 3, 100])
def test_the_number_of_programs_does_not_show(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    def run() -> list[Tensor]:
        tensors = [values("student", 9999, seed).to(device) for seed in range(5)]
        histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
        for tensor in tensors[3:]:
            tensor.abs_()
        kk.adamw_importance_(
            *tensors, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, decay=0.55, histogram=histogram,
            step=torch.tensor(3.0, dtype=torch.float64, device=device),
            window=torch.tensor([WINDOW_SHIFT, 32000], device=device),
        )  # fmt: skip
        return [*tensors, histogram]

    before = run()
    monkeypatch.setattr(launch, "PROGRAMS_PER_SM", programs)
    for actual, expected in zip(run(), before, strict=True):
        assert_same(actual, expected, f"{programs} programs")
