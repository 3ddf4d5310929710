"""The reference formulas under torch.compile, for the CPU and for CUDA (`KIF_BACKEND=compile`).

Each variant of an operation (which optional buffers there are, of which dtypes, which switches are set) is compiled
when it is first called, which takes seconds, and not again: sizes are symbolic, and numbers such as the learning rate
come in as 0-d tensors. On the CPU this needs a C++ compiler. Buffers that are not contiguous, those of one element, and
on the CPU before torch 2.13 weights and importances that are not float32 go to the reference. Norms and thresholds are
not compiled, since no element-wise operations: they are those of `kif_kernels.eager` on the CPU, else of the reference.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from . import eager, reference
from .reference import histogram_, score

__all__ = ["adamw_importance_", "fuse_", "gradient_state_", "histogram_", "importance_ema_", "thresholds_"]


def gradient_state_(
    grad: Tensor,
    scale: Tensor,
    skip: Tensor,
    step: Tensor,
    skipped: Tensor,
    max_norm: float,
    inv_scale: Tensor | None,
    norm: Tensor | None,
) -> None:
    """As in the reference, and not compiled."""
    module = eager if grad.device.type == "cpu" else reference
    module.gradient_state_(grad, scale, skip, step, skipped, max_norm, inv_scale, norm)


def importance_ema_(
    importance: Tensor,
    weight: Tensor,
    grad: Tensor,
    decay: float,
    reset: bool,
    uncertainty: Tensor | None,
    uncertainty_decay: float,
    skip: Tensor | None,
    histogram: Tensor | None,
    window: Tensor | None,
) -> None:
    """As in the reference."""
    tensors = (importance, weight, grad, uncertainty)
    if _suits(*tensors) and _rounds(importance):
        _call(_importance, _flat(*tensors), (_flag(skip), *_ema_weights(decay, uncertainty_decay)), (reset,))
    else:
        reference.importance_ema_(
            importance, weight, grad, decay, reset, uncertainty, uncertainty_decay, skip, None, None
        )
    if histogram is not None and window is not None:
        histogram_(histogram, window, importance, uncertainty)


def adamw_importance_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    importance: Tensor | None,
    uncertainty: Tensor | None,
    snapshot_before: Tensor | None,
    snapshot_after: Tensor | None,
    shadow: Tensor | None,
    histogram: Tensor | None,
    window: Tensor | None,
    lr: float,
    lr_tensor: Tensor | None,
    step: float,
    step_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay: float,
    uncertainty_decay: float,
    reset: bool,
    after_update: bool,
    zero_grad: bool,
    grad_scale: Tensor | None,
    inv_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    """As in the reference."""
    buffers = (
        weight, grad, exp_avg, exp_avg_sq, importance, uncertainty, snapshot_before, snapshot_after, shadow,
    )  # fmt: skip
    if _suits(*buffers) and _rounds(weight, importance):
        # outside of the compiled code, which would raise to a power for every element
        count = step if step_tensor is None else step_tensor.clamp(min=1.0)
        rate = lr if lr_tensor is None else lr_tensor
        bias1, bias2 = 1.0 - beta1**count, 1.0 - beta2**count
        numbers = (1.0 - beta1, 1.0 - beta2, eps, 1.0 - rate * weight_decay, rate / bias1, bias2**0.5)
        scalars = (
            _scalar(grad_scale), _scalar(inv_scale), _flag(skip), *_ema_weights(decay, uncertainty_decay),
            *(_scalar(x) for x in numbers),
        )  # fmt: skip
        _call(_adamw, _flat(*buffers), scalars, (reset, after_update, zero_grad))
    else:
        reference.adamw_importance_(
            *buffers, None, None, lr, lr_tensor, step, step_tensor, beta1, beta2, eps, weight_decay, decay,
            uncertainty_decay, reset, after_update, zero_grad, grad_scale, inv_scale, skip,
        )  # fmt: skip
    if importance is not None and histogram is not None and window is not None:
        histogram_(histogram, window, importance, uncertainty)


def thresholds_(
    thresholds: Tensor,
    histograms: Tensor | None,
    state: Tensor | None,
    ranks: Tensor,
    limits: Tensor,
    scores: Sequence[Tensor],
    factors: Sequence[Tensor],
    counted: bool,
    starts: Sequence[int],
    numels: Sequence[int],
    chunks: Tensor | None,
) -> None:
    """As in the reference, and not compiled."""
    module = eager if thresholds.device.type == "cpu" else reference
    module.thresholds_(
        thresholds, histograms, state, ranks, limits, scores, factors, counted, starts, numels, chunks
    )  # fmt: skip


def fuse_(
    theta: Tensor,
    theta_start: Tensor,
    theta_inner: Tensor,
    importance_in: Tensor,
    importance_out: Tensor,
    uncertainty_in: Tensor | None,
    uncertainty_out: Tensor | None,
    threshold_in: Tensor,
    threshold_out: Tensor,
    weights: Sequence[float],
    strict: bool,
    write_start: bool,
    shadow: Tensor | None,
    kept: Tensor | None,
    numel: int,
    starts: Sequence[int],
    numels: Sequence[int],
    chunks: Tensor | None,
) -> None:
    """As in the reference."""
    scored = (theta, theta_start, theta_inner, importance_in, importance_out, uncertainty_in, uncertainty_out)
    if not _suits(*scored, shadow) or 1 in numels:
        reference.fuse_(
            *scored, threshold_in, threshold_out, weights, strict, write_start, shadow, kept, numel, starts, numels,
            chunks,
        )  # fmt: skip
        return
    buffers = _flat(*scored, shadow)
    table, switches = [_scalar(w) for w in weights], (strict, write_start)
    limits = list(zip(threshold_in.reshape(-1), threshold_out.reshape(-1), strict=True))
    if starts:
        for a, n, pair in zip(starts, numels, limits, strict=True):
            part = [None if t is None else t[a : a + n] for t in buffers]
            _call(_fuse, part, (kept, *pair, *table), switches)
        return
    _call(_fuse, buffers, (kept, *limits[0], *table), switches)
    padding = theta.numel() - numel
    if kept is not None and padding:
        # padding holds zeros, which a mask keeps when its threshold is 0
        pads = [limit < 0.0 if strict else limit <= 0.0 for limit in limits[0]]
        kept -= padding * torch.stack((*pads, pads[0] & pads[1])).to(kept.dtype)


def _importance(
    importance: Tensor, w: Tensor, g: Tensor, uncertainty: Tensor | None,
    skip: Tensor | None, new: Tensor | None, new_u: Tensor, reset: bool,
) -> None:  # fmt: skip
    _ema(importance, uncertainty, score(w, g), skip, new, new_u, reset)


def _adamw(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, importance: Tensor | None,
    uncertainty: Tensor | None, before: Tensor | None, after: Tensor | None, shadow: Tensor | None,
    clip: Tensor | None, inv: Tensor | None, skip: Tensor | None, new: Tensor | None, new_u: Tensor,
    new_m: Tensor, new_v: Tensor, eps: Tensor, shrink: Tensor, step_size: Tensor, root: Tensor,
    reset: bool, after_update: bool, zero_grad: bool,
) -> None:  # fmt: skip
    if before is not None:
        before.copy_(weight)
    g = grad.float() if inv is None else grad.float() * inv
    c = g if clip is None else g * clip
    w = weight.float()
    m, v = torch.lerp(exp_avg, c, new_m), torch.lerp(exp_avg_sq, c * c, new_v)
    updated = (w * shrink - step_size * (m / (v.sqrt() / root + eps))).to(weight.dtype)
    if importance is not None:
        _ema(importance, uncertainty, score(updated, c) if after_update else score(w, g), skip, new, new_u, reset)
    for state, value in ((exp_avg, m), (exp_avg_sq, v), (weight, updated)):
        state.copy_(value if skip is None else torch.where(skip, state, value))
    for copy in (after, shadow):
        if copy is not None:
            copy.copy_(weight)
    if zero_grad:
        grad.zero_()


def _fuse(
    theta: Tensor, start: Tensor, inner: Tensor, importance_in: Tensor, importance_out: Tensor,
    uncertainty_in: Tensor | None, uncertainty_out: Tensor | None, shadow: Tensor | None,
    kept: Tensor | None, threshold_in: Tensor, threshold_out: Tensor,
    both_in: Tensor, both_out: Tensor, inner_in: Tensor, inner_out: Tensor, outer_in: Tensor, outer_out: Tensor,
    neither_in: Tensor, neither_out: Tensor, strict: bool, write_start: bool,
) -> None:  # fmt: skip
    compare = torch.gt if strict else torch.ge
    m_in = compare(_ranked(importance_in, uncertainty_in), threshold_in)
    m_out = compare(_ranked(importance_out, uncertainty_out), threshold_out)
    w_in = torch.where(m_in, torch.where(m_out, both_in, inner_in), torch.where(m_out, outer_in, neither_in))
    w_out = torch.where(m_in, torch.where(m_out, both_out, inner_out), torch.where(m_out, outer_out, neither_out))
    fused = start + torch.where(w_in == 0, 0.0, w_in * (inner - start))
    fused = fused + torch.where(w_out == 0, 0.0, w_out * (theta - inner))
    theta.copy_(fused)
    if write_start:
        start.copy_(fused)
    if shadow is not None:
        shadow.copy_(fused)
    if kept is not None:
        kept += torch.stack((m_in.sum(), m_out.sum(), (m_in & m_out).sum()))


def _ema(
    importance: Tensor, uncertainty: Tensor | None, s: Tensor, skip: Tensor | None, new: Tensor | None, new_u: Tensor,
    reset: bool,
) -> None:  # fmt: skip
    """new, new_u: weights of the new score and of the new deviation; new is None where it is 1."""
    old = torch.zeros_like(s) if reset else importance.float()
    mean = s if new is None else torch.lerp(old, s, new)
    mean = (mean if skip is None else torch.where(skip, old, mean)).to(importance.dtype)
    if uncertainty is not None:
        old_u = torch.zeros_like(s) if reset else uncertainty.float()
        deviation = torch.lerp(old_u, (s - mean.float()).abs(), new_u)
        uncertainty.copy_(deviation if skip is None else torch.where(skip, old_u, deviation))
    importance.copy_(mean)


def _ranked(importance: Tensor, uncertainty: Tensor | None) -> Tensor:
    return importance.float() if uncertainty is None else importance.float() * uncertainty.float()


def _suits(*buffers: Tensor | None) -> bool:
    return all(t is None or (t.is_contiguous() and t.numel() > 1) for t in buffers)


def _rounds(*stored: Tensor | None) -> bool:
    """Whether compiled code reads what it stores there as it was rounded."""
    return all(t is None or _emulates_casts(t.device.type) or t.dtype == torch.float32 for t in stored)


def _emulates_casts(device: str) -> bool:
    """Before 2.13 torch's C++ code keeps what it stores as it was before it was rounded."""
    return device != "cpu" or torch.__version__ >= "2.13"


def _flat(*buffers: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().view(-1) for t in buffers]


def _scalar(x: float | Tensor | None) -> Tensor | None:
    """0-d float32; one on the CPU may be used beside CUDA tensors."""
    if x is None:
        return None
    return x.detach().reshape(()).float() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32)


def _flag(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(())


def _ema_weights(decay: float, uncertainty_decay: float) -> tuple[Tensor | None, Tensor | None]:
    return None if decay == 0.0 else _scalar(1.0 - decay), _scalar(1.0 - uncertainty_decay)


def _call(function: Callable[..., None], *arguments: Sequence[Any]) -> None:
    """function, compiled for arguments like these; all of them in one flat list."""
    flat = [x for part in arguments for x in part]
    kinds = tuple(x.dtype if isinstance(x, Tensor) else x for x in flat)
    device = next(x.device.type for x in flat if isinstance(x, Tensor))
    with torch.no_grad():
        _variant(function, kinds, device)(*flat)


@cache
def _variant(function: Callable[..., None], kinds: tuple[object, ...], device: str) -> Callable[..., None]:
    """A compiled copy of function for this kind of arguments.

    A copy each, since torch.compile gives up on a function after a few recompilations.
    """
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise RuntimeError(
            f"KIF_BACKEND=compile needs a C++ compiler on the CPU and found no {compiler!r}: install one, "
            "name one in the variable CXX, or use KIF_BACKEND=eager"
        )
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    # a value that is stored as bfloat16 is scored as that; see _rounds
    options: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": _emulates_casts(device)}
    return torch.compile(copy, dynamic=True, fullgraph=True, options=options)
