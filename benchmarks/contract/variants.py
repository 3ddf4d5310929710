"""The ways to call the public operations that the contract covers, each with its formula.

The engine's launches must be among them (`entries.engine_launches`). Sizes are multiples of 16, as the arena's are:
with others every masked access is 32 bits wide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kif_kernels
from benchmarks.contract.formulas import Bytes, adamw_bytes, fuse_bytes, importance_bytes, scores_bytes
from kif_kernels import Segments, StreamingThreshold

N = 2**18
"""Elements of the buffers: a multiple of 16, and enough for several partial sums."""
HUGE = 2**31 + 32
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LEVELS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Variant:
    """One way to call an operation.

    Args:
        name: unique.
        call: makes the launches.
        bytes: by kernel, for those that pass over the elements; other kernels work on a few scalars or bins.
        numel: replaces the kernels' n, for sizes that no test machine holds.
        levels: refinement levels to look at; each is a kernel of its own.
    """

    name: str
    call: Callable[[], object]
    bytes: dict[str, Bytes]
    numel: int | None = None
    levels: tuple[int, ...] = LEVELS


def importance(
    name: str,
    value: torch.dtype = FP32,
    state: torch.dtype = FP32,
    reset: bool = False,
    count: bool = False,
    uncertain: bool = False,
    numel: int | None = None,
) -> Variant:
    """`importance_ema_`; when uncertain, `importance_uncertainty_ema_`. Weights and gradients are of dtype `value`."""

    def call() -> None:
        options = {"reset": reset, "skip": _scalar(torch.bool), **_histogram(count)}
        if uncertain:
            buffers = (_buffer(state), _buffer(state), _buffer(value), _buffer(value))
            kif_kernels.importance_uncertainty_ema_(*buffers, 0.85, 0.85, **options)
        else:
            kif_kernels.importance_ema_(_buffer(state), _buffer(value), _buffer(value), 0.55, **options)

    formula = importance_bytes(value.itemsize, state.itemsize, reset=reset, uncertainty=uncertain)
    return Variant(name, call, {"importance_kernel": formula}, numel)


def adamw(
    name: str,
    value: torch.dtype = FP32,
    grad: torch.dtype | None = None,
    state: torch.dtype | None = FP32,
    reset: bool = False,
    before: bool = False,
    after: bool = False,
    shadow: bool = False,
    count: bool = False,
    uncertain: bool = False,
    zero_grad: bool = False,
    numel: int | None = None,
    **options: Any,
) -> Variant:
    """`adamw_importance_`; weights are of dtype `value`, gradients too unless given. state=None: AdamW alone."""
    grad = grad or value

    def call() -> None:
        given = {"lr": 3e-4, "step": _scalar(torch.float64), "grad_scale": _scalar(), "skip": _scalar(torch.bool)}
        if state is not None:
            given |= {"decay": 0.55, "uncertainty_decay": 0.85}
        kif_kernels.adamw_importance_(
            _buffer(value),
            _buffer(grad),
            _buffer(),
            _buffer(),
            None if state is None else _buffer(state),
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
            reset=reset,
            uncertainty=_buffer() if uncertain else None,
            snapshot_before=_buffer(value) if before else None,
            snapshot_after=_buffer(value) if after else None,
            shadow=_buffer(BF16) if shadow else None,
            zero_grad=zero_grad,
            **_histogram(count),
            **(given | options),
        )

    formula = adamw_bytes(
        value.itemsize,
        grad.itemsize,
        0 if state is None else state.itemsize,
        uncertainty=uncertain,
        reset=reset,
        snapshots=before + after,
        shadow=shadow,
        zero_grad=zero_grad,
    )
    return Variant(name, call, {"adamw_kernel": formula}, numel)


def gradient(
    name: str,
    grad: torch.dtype = FP32,
    max_norm: float = 1.0,
    scaled: bool = False,
    kept: bool = False,
    numel: int | None = None,
) -> Variant:
    """`gradient_state_`; `kept`: with the norm."""

    def call() -> None:
        scalars = _scalar(), _scalar(torch.bool), _scalar(torch.float64), _scalar(torch.int64)
        inv_scale, norm = (_scalar() if wanted else None for wanted in (scaled, kept))
        kif_kernels.gradient_state_(_buffer(grad), *scalars, max_norm=max_norm, inv_scale=inv_scale, norm=norm)

    return Variant(name, call, {"square_sum_kernel": Bytes(grad.itemsize, 0)}, numel)


def thresholds(
    name: str,
    state: torch.dtype = FP32,
    uncertain: bool = False,
    segments: bool = False,
    levels: tuple[int, ...] = LEVELS,
    numel: int | None = None,
) -> Variant:
    """`StreamingThreshold.select` of two sides, without a histogram from the importance pass."""

    def call() -> None:
        selection = StreamingThreshold(0.2, N, sides=2, segments=_segments() if segments else None)
        factors = (_buffer(state), _buffer(state)) if uncertain else ()
        selection.select((_buffer(state), _buffer(state)), factors)

    formula = scores_bytes(state.itemsize, uncertainty=uncertain)
    return Variant(name, call, {"refine_kernel": formula}, numel, levels)


def fuse(
    name: str,
    state: torch.dtype = FP32,
    strict: bool = False,
    uncertain: bool = False,
    write_start: bool = True,
    shadow: bool = False,
    count: bool = False,
    segments: bool = False,
    real: int = N,
    numel: int | None = None,
) -> Variant:
    """`fuse_`; `real` elements are no padding."""

    def call() -> None:
        found = torch.zeros(2, 2 if segments else 1)
        deltas = found if segments else found[:, 0]
        if strict:
            # the released code's quantiles are tensors of their own
            deltas = (_scalar(), _scalar())
        kif_kernels.fuse_(
            _buffer(),
            _buffer(),
            _buffer(),
            _buffer(state),
            _buffer(state),
            deltas[0],
            deltas[1],
            strict=strict,
            uncertainty_in=_buffer(state) if uncertain else None,
            uncertainty_out=_buffer(state) if uncertain else None,
            write_start=write_start,
            shadow=_buffer(BF16) if shadow else None,
            kept=torch.zeros(3, dtype=torch.int64) if count else None,
            numel=real,
            segments=_segments() if segments else None,
        )

    formula = fuse_bytes(state.itemsize, uncertainty=uncertain, write_start=write_start, shadow=shadow)
    return Variant(name, call, {"fuse_kernel": formula}, numel)


VARIANTS = (
    importance("importance"),
    importance("importance, first", reset=True),
    importance("importance, histogram", count=True),
    importance("importance, bf16", BF16),
    importance("importance, fp16", FP16),
    importance("importance, bf16, histogram", BF16, count=True),
    importance("importance in bf16", state=BF16),
    importance("importance in bf16, bf16", BF16, BF16),
    importance("importance, E*U", uncertain=True),
    importance("importance, E*U, first", uncertain=True, reset=True),
    importance("importance, E*U, histogram", uncertain=True, count=True),
    importance("importance, 2^31 elements", numel=HUGE),
    adamw("adamw", state=None),
    adamw("adamw, zero_grad", state=None, zero_grad=True),
    adamw("adamw, snapshot before, zero_grad", state=None, before=True, zero_grad=True),
    adamw("adamw, snapshot after, zero_grad", state=None, after=True, zero_grad=True),
    adamw("adamw+importance"),
    adamw("adamw+importance, host scalars", step=3, grad_scale=None, skip=None),
    adamw("adamw+importance, lr on device", lr=torch.zeros(()), inv_scale=torch.zeros(())),
    adamw("adamw+importance, snapshot", after=True),
    adamw("adamw+importance, histogram", count=True),
    adamw("adamw+importance, shadow", shadow=True),
    adamw("adamw+importance, bf16", BF16),
    adamw("adamw+importance, fp16", FP16),
    adamw("adamw+importance, bf16 gradient", grad=BF16),
    adamw("adamw+importance, 2^31 elements", numel=HUGE),
    adamw("engine: first inner step", before=True, reset=True, zero_grad=True),
    adamw("engine: inner step", zero_grad=True),
    adamw("engine: last inner step", after=True, count=True, zero_grad=True),
    adamw("engine: last inner step, per tensor", after=True, zero_grad=True),
    adamw("engine: last outer step", count=True, zero_grad=True),
    adamw("released code: first step", uncertain=True, after_update=True, before=True, reset=True, zero_grad=True),
    adamw("released code: step", uncertain=True, after_update=True, zero_grad=True),
    adamw("released code: last inner step", uncertain=True, after_update=True, after=True, zero_grad=True),
    gradient("gradient"),
    gradient("gradient, bf16", BF16),
    gradient("gradient, fp16", FP16, scaled=True),
    gradient("gradient, no clipping", max_norm=0.0),
    gradient("gradient, norm kept", kept=True),
    gradient("gradient, 2^31 elements", numel=HUGE),
    thresholds("thresholds"),
    thresholds("thresholds in bf16", BF16, levels=(0, 1)),
    thresholds("thresholds, E*U", uncertain=True, levels=(0, 1)),
    thresholds("thresholds, per tensor", segments=True),
    thresholds("thresholds, 2^31 elements", levels=(2,), numel=HUGE),
    fuse("fuse"),
    fuse("fuse, counts", count=True),
    fuse("fuse, counts, padding", count=True, real=N - 7),
    fuse("fuse, shadow", shadow=True),
    fuse("fuse, scores in bf16", BF16),
    fuse("fuse, 2^31 elements", count=True, numel=HUGE),
    fuse("engine: fuse", write_start=False, count=True),
    fuse("engine: fuse per tensor", write_start=False, count=True, segments=True),
    fuse("released code: fuse", strict=True, uncertain=True, write_start=False, count=True),
)  # fmt: skip


def _buffer(dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(N, dtype=dtype)


def _scalar(dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros((), dtype=dtype)


def _histogram(count: bool) -> dict[str, Tensor | None]:
    if not count:
        return {}
    selection = StreamingThreshold(0.2, N)
    return {"histogram": selection.histogram(0), "window": selection.window(0)}


def _segments() -> Segments:
    return Segments.of([(0, N // 2), (N // 2, N // 2)])
