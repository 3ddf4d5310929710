"""The operations on CPU tensors: plain PyTorch, chunk by chunk so that intermediate values stay in the cache.

Equal bits as from `kif_kernels.reference`, since the same operations run in the same order. Tensors that are not
contiguous or not float32 go to the reference. Thresholds are in `kif_kernels.selection`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import histogram_
from .selection import thresholds_

__all__ = ["adamw_importance_", "fuse_", "gradient_state_", "histogram_", "importance_ema_", "thresholds_"]

CHUNK = 131072
"""Elements a thread works on at a time, 512 KiB of a buffer: fewer pay for calls, more push others out of the cache."""


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
    """Clipping factor and non-finite flag; as in the reference."""
    if not _fast(grad):
        reference.gradient_state_(grad, scale, skip, step, skipped, max_norm, inv_scale, norm)
        return
    total = 0.0
    for (squares,), (g,) in _chunks(1, grad):
        part = float(torch.mul(g, g, out=squares).sum())
        # a sum may overflow where no square does
        total += part if math.isfinite(part) else float(squares.sum(dtype=torch.float64))
    found = torch.tensor(math.sqrt(total), dtype=torch.float32)
    if inv_scale is not None:
        found = found * inv_scale.reshape(())
    if norm is not None:
        norm.copy_(found)
    finite = math.isfinite(found)
    scale.copy_((max_norm / (found + 1e-6)).clamp(max=1.0) if finite and max_norm > 0 else torch.ones(()))
    skip.fill_(not finite)
    step += finite
    skipped += not finite


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
    """I <- decay * I + (1 - decay) * |w * g|, and U; as in the reference."""
    if skip is not None and bool(skip):
        _skip_scores(importance, uncertainty, reset)
    elif not _fast(importance, weight, grad, uncertainty):
        reference.importance_ema_(
            importance, weight, grad, decay, reset, uncertainty, uncertainty_decay, None, None, None
        )
    else:
        for (s,), (i, u, w, g) in _chunks(1, importance, uncertainty, weight, grad):
            _ema_(i, u, _score(w, g, s), decay, uncertainty_decay, reset)
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
    """AdamW and importance; as in the reference."""
    skipped = skip is not None and bool(skip)
    copies = (snapshot_before, snapshot_after, shadow)
    if skipped:
        for copy in copies:
            if copy is not None:
                copy.copy_(weight)
        if importance is not None:
            _skip_scores(importance, uncertainty, reset)
        if zero_grad:
            grad.zero_()
    elif not _fast(weight, grad, exp_avg, exp_avg_sq, importance, uncertainty) or not _contiguous(*copies):
        reference.adamw_importance_(
            weight, grad, exp_avg, exp_avg_sq, importance, uncertainty, *copies, None, None, lr, lr_tensor, step,
            step_tensor, beta1, beta2, eps, weight_decay, decay, uncertainty_decay, reset, after_update, zero_grad,
            grad_scale, inv_scale, None,
        )  # fmt: skip
    else:
        # python and tensor scalars meet as in the reference, so that they round as there
        count = step if step_tensor is None else step_tensor.clamp(min=1.0)
        rate = lr if lr_tensor is None else lr_tensor
        bias1, bias2 = 1.0 - beta1**count, 1.0 - beta2**count
        shrink, step_size, root = float(1.0 - rate * weight_decay), float(rate / bias1), float(bias2**0.5)
        inv = 1.0 if inv_scale is None else float(inv_scale)
        clip = 1.0 if grad_scale is None else float(grad_scale)
        state = (weight, grad, exp_avg, exp_avg_sq, importance, uncertainty, *copies)
        for (s, scaled), (w, g, m, v, i, u, before, after, low) in _chunks(2, *state):
            if before is not None:
                before.copy_(w)
            c = g
            if inv != 1.0:
                c = torch.mul(c, inv, out=scaled)
            if i is not None and not after_update:
                _ema_(i, u, _score(w, c, s), decay, uncertainty_decay, reset)
            if clip != 1.0:
                c = torch.mul(c, clip, out=scaled)
            _lerp_(m, c, 1.0 - beta1)
            _lerp_(v, torch.mul(c, c, out=s), 1.0 - beta2)
            torch.sqrt(v, out=s).div_(root).add_(eps)
            torch.div(m, s, out=s).mul_(step_size)
            (w if shrink == 1.0 else w.mul_(shrink)).sub_(s)
            if i is not None and after_update:
                _ema_(i, u, _score(w, c, s), decay, uncertainty_decay, reset)
            if after is not None:
                after.copy_(w)
            if low is not None:
                low.copy_(w)
            if zero_grad:
                g.zero_()
    if importance is not None and histogram is not None and window is not None:
        histogram_(histogram, window, importance, uncertainty)


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
    """Masked fusion; as in the reference."""
    if not _fast(theta, theta_start, theta_inner) or not _contiguous(
        importance_in, importance_out, uncertainty_in, uncertainty_out, shadow
    ):
        reference.fuse_(
            theta, theta_start, theta_inner, importance_in, importance_out, uncertainty_in, uncertainty_out,
            threshold_in, threshold_out, weights, strict, write_start, shadow, kept, numel, starts, numels, chunks,
        )  # fmt: skip
        return
    buffers = (
        theta, theta_start, theta_inner, importance_in, importance_out, uncertainty_in, uncertainty_out, shadow
    )  # fmt: skip
    counts = [0, 0, 0]
    limits = list(zip(threshold_in.reshape(-1).tolist(), threshold_out.reshape(-1).tolist(), strict=True))
    rule = (weights, strict, write_start)
    if starts:
        flat = [None if t is None else t.view(-1) for t in buffers]
        for a, n, pair in zip(starts, numels, limits, strict=True):
            _fuse_part([None if t is None else t[a : a + n] for t in flat], pair, *rule, kept is not None, counts)
    else:
        _fuse_part(buffers, limits[0], *rule, kept is not None, counts)
    if kept is not None:
        if not starts:
            # padding holds zeros, which a mask keeps when its threshold is 0
            pads = [limit < 0.0 if strict else limit <= 0.0 for limit in limits[0]]
            padding = theta.numel() - numel
            counts = [count - padding * pad for count, pad in zip(counts, (*pads, all(pads)), strict=True)]
        kept += torch.tensor(counts)


def _fuse_part(
    buffers: Sequence[Tensor | None], limits: tuple[float, float], weights: Sequence[float], strict: bool,
    write_start: bool, count: bool, counts: list[int],
) -> None:  # fmt: skip
    """Fuse (theta, start, inner, I_in, I_out, U_in, U_out, shadow) by one pair of thresholds; counts += mask sizes."""
    compare = torch.gt if strict else torch.ge
    for (m_in, m_out, tau, fused), (theta, start, inner, i_in, i_out, u_in, u_out, low) in _chunks(4, *buffers):
        # masks of floats: PyTorch multiplies by them several times faster than it selects by bools
        compare(_ranked(i_in, u_in, tau, fused), limits[0], out=m_in)
        compare(_ranked(i_out, u_out, tau, fused), limits[1], out=m_out)
        w_in, w_out = _task_weights(m_in, m_out, weights)
        torch.sub(inner, start, out=tau).mul_(w_in)
        torch.add(start, tau, out=fused)
        fused.add_(torch.sub(theta, inner, out=tau).mul_(w_out))
        if math.isfinite(float(fused.sum())):
            theta.copy_(fused)
            if write_start:
                start.copy_(fused)
        else:
            # 0 * inf is not 0, but a task vector of weight 0 may hold anything
            reference.fuse_(
                theta, start, inner, i_in, i_out, u_in, u_out, torch.tensor(limits[0], dtype=torch.float32),
                torch.tensor(limits[1], dtype=torch.float32), weights, strict, write_start, None, None, theta.numel(),
                (), (), None,
            )  # fmt: skip
        if low is not None:
            low.copy_(theta)
        if count:
            # exact in float32: at most 2^24 ones
            for i, size in enumerate((m_in.sum(), m_out.sum(), torch.dot(m_in, m_out))):
                counts[i] += int(size)


def _task_weights(m_in: Tensor, m_out: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The weights of the inner and the outer task vector, looked up in the table by float masks."""
    if list(weights) == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]:
        return m_in, m_out
    both = m_in * m_out
    outer_only = m_out - both
    cells = (both, m_in - both, outer_only, 1.0 - m_in - outer_only)
    w_in, w_out = torch.zeros_like(both), torch.zeros_like(both)
    for i, cell in enumerate(cells):
        # an element is in one of the cells: the sums are exact
        w_in.add_(cell, alpha=weights[2 * i])
        w_out.add_(cell, alpha=weights[2 * i + 1])
    return w_in, w_out


def _ranked(importance: Tensor, uncertainty: Tensor | None, out: Tensor, other: Tensor) -> Tensor:
    """What is compared with a threshold: I or I * U, in float32; `out` and `other` are scratch."""
    if uncertainty is None:
        return importance if importance.dtype == torch.float32 else out.copy_(importance)
    return out.copy_(importance).mul_(other.copy_(uncertainty))


def _score(weight: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    """|w * g|, 0 where that is not finite."""
    torch.mul(weight, grad, out=out).abs_()
    # to look for what is not finite is cheaper than to replace it, and there is seldom any
    return out if math.isfinite(float(out.sum())) else out.nan_to_num_(0.0, 0.0, 0.0)


def _ema_(
    importance: Tensor, uncertainty: Tensor | None, s: Tensor, decay: float, uncertainty_decay: float, reset: bool
) -> None:
    """I and U take in the scores s, which is overwritten."""
    _lerp_(importance.zero_() if reset else importance, s, 1.0 - decay)
    if uncertainty is not None:
        torch.sub(s, importance, out=s).abs_()
        _lerp_(uncertainty.zero_() if reset else uncertainty, s, 1.0 - uncertainty_decay)


def _lerp_(old: Tensor, new: Tensor, weight: float) -> None:
    """As `reference._lerp`, in place."""
    if weight == 1.0:
        old.copy_(new)
    else:
        old.lerp_(new, weight)


def _skip_scores(importance: Tensor, uncertainty: Tensor | None, reset: bool) -> None:
    for state in (importance, uncertainty):
        if state is not None and reset:
            state.zero_()


def _contiguous(*tensors: Tensor | None) -> bool:
    return all(t is None or t.is_contiguous() for t in tensors)


def _fast(*tensors: Tensor | None) -> bool:
    return _contiguous(*tensors) and all(t is None or t.dtype == torch.float32 for t in tensors)


_kept = threading.local()


def _room(rows: int, columns: int) -> Tensor:
    """Scratch that is kept: fresh pages for every call would cost a third of the call."""
    room: Tensor | None = getattr(_kept, "room", None)
    if room is None or room.numel() < rows * columns:
        # usable in and outside of inference mode, wherever it was made
        with torch.inference_mode(False):
            room = _kept.room = torch.empty(rows * columns, dtype=torch.float32)
    return room[: rows * columns].view(rows, columns)


def _chunks(scratch: int, *tensors: Tensor | None) -> Iterator[tuple[tuple[Tensor, ...], tuple[Any, ...]]]:
    """(`scratch` float32 buffers, the parts of the tensors) for part after part; None stays None."""
    numel = next(t.numel() for t in tensors if t is not None)
    size = min(CHUNK * torch.get_num_threads(), 2**24)
    room = _room(scratch, min(size, numel))
    for parts in zip(*(repeat(None) if t is None else t.view(-1).split(size) for t in tensors), strict=False):
        n = next(part.numel() for part in parts if part is not None)
        yield room[:, :n].unbind(), parts
