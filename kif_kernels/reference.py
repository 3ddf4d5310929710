"""The definition of every operation, in plain PyTorch: the specification that the fast paths are tested against.

Notation: w weight, g gradient, I importance, U uncertainty, theta parameters, tau task vector, n number of elements.
The functions take checked arguments (`kif_kernels.api` checks) and change tensors in place; every implementation
(`eager`, `kernels`) has functions of the same names and arguments. Tensors may have any shape and any strides. State
is float32 (importance and uncertainty also bfloat16), weights and gradients are float32, bfloat16 or float16; all are
widened to float32 first. Nothing here reads a value back from the device.

Eq. and Table numbers refer to "Recurrent Knowledge Identification and Fusion for Language Model Continual
Learning".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import BINS


def score(weight: Tensor, grad: Tensor) -> Tensor:
    """|w * g| in float32 (Eq. 3); 0 where the product is not finite, so that importance never becomes NaN."""
    product = (weight.float() * grad.float()).abs()
    return torch.where(product.isfinite(), product, 0.0)


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
    """norm <- |inv_scale * g|; scale <- min(1, max_norm / (norm + 1e-6)), 1 when max_norm is 0 or the norm is
    not finite; skip <- norm not finite; step += not skip; skipped += skip."""
    # float32 sums of millions of squares are off in the fourth digit on a CPU
    found = grad.float().square().sum(dtype=torch.float64).sqrt().float()
    if inv_scale is not None:
        found = found * inv_scale
    if norm is not None:
        norm.copy_(found)
    finite = found.isfinite()
    factor = (max_norm / (found + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(found)
    scale.copy_(torch.where(finite, factor, 1.0))
    skip.copy_(~finite)
    step += finite.to(step.dtype)
    skipped += (~finite).to(skipped.dtype)


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
    """s = |w * g|;  I <- decay * I + (1 - decay) * s;  U <- uncertainty_decay * U + (1 - uncertainty_decay) * |s - I|.

    reset takes the old I and U as 0; skip leaves them as they are (as 0 with reset). histogram += counts of I (I * U).
    """
    _ema_(importance, score(weight, grad), decay, reset, uncertainty, uncertainty_decay, skip)
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
    """AdamW and importance; the formulas are in `kif_kernels.adamw_importance_`."""
    if snapshot_before is not None:
        snapshot_before.copy_(weight)
    g = grad.float() if inv_scale is None else grad.float() * inv_scale
    clipped = g if grad_scale is None else g * grad_scale
    w = weight.float()
    m = _lerp(exp_avg, clipped, 1.0 - beta1)
    v = _lerp(exp_avg_sq, clipped * clipped, 1.0 - beta2)
    count = step if step_tensor is None else step_tensor.clamp(min=1.0)
    rate = lr if lr_tensor is None else lr_tensor
    bias1, bias2 = 1.0 - beta1**count, 1.0 - beta2**count
    updated = w * (1.0 - rate * weight_decay) - (rate / bias1) * (m / (v.sqrt() / bias2**0.5 + eps))
    updated = updated.to(weight.dtype)
    if importance is not None:
        s = score(updated, clipped) if after_update else score(w, g)
        _ema_(importance, s, decay, reset, uncertainty, uncertainty_decay, skip)
        if histogram is not None and window is not None:
            histogram_(histogram, window, importance, uncertainty)
    for state, new in ((exp_avg, m), (exp_avg_sq, v), (weight, updated)):
        state.copy_(new if skip is None else torch.where(skip, state, new))
    if snapshot_after is not None:
        snapshot_after.copy_(weight)
    if shadow is not None:
        shadow.copy_(weight)
    if zero_grad:
        grad.zero_()


def histogram_(histogram: Tensor, window: Tensor, importance: Tensor, uncertainty: Tensor | None) -> None:
    """histogram[b] += number of scores x with b = clamp((bits(x) >> shift) - base, 0, BINS - 1).

    window = (shift, base). The bits of a float32 that is not negative are ordered as the number is. x is I, or I * U.
    """
    bits = _scores(importance, uncertainty).reshape(-1).view(torch.int32).to(torch.int64)
    bins = ((bits >> window[0]) - window[1]).clamp(0, BINS - 1)
    histogram += torch.zeros_like(histogram).scatter_add_(0, bins, torch.ones_like(bins))


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
    """thresholds[side, group] <- the ranks[group]-th largest of the group's part of scores[side] (* factors[side]).

    Always exact; limits and the workspace of the streaming selection are not used.
    """
    for side, importance in enumerate(scores):
        x = _scores(importance, factors[side] if factors else None).reshape(-1)
        for group, part in enumerate(_parts(x, starts, numels)):
            thresholds[side, group] = _largest(part, ranks[group])


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
    """Masked fusion; the formula is in `kif_kernels.fuse_`.

    weights: (w_in, w_out) where both masks are set, only the inner, only the outer, neither: eight numbers.
    """
    scores_in, scores_out = _scores(importance_in, uncertainty_in), _scores(importance_out, uncertainty_out)
    if not starts:
        padding = theta.numel() - numel
        _fuse_part(
            theta, theta_start, theta_inner, scores_in, scores_out, threshold_in.reshape(()), threshold_out.reshape(()),
            weights, strict, write_start, kept, padding,
        )  # fmt: skip
    else:
        buffers = (theta, theta_start, theta_inner, scores_in, scores_out)
        for group, (a, n) in enumerate(zip(starts, numels, strict=True)):
            part, start, inner, in_, out = (buffer[a : a + n] for buffer in buffers)
            t_in, t_out = threshold_in[group], threshold_out[group]
            _fuse_part(part, start, inner, in_, out, t_in, t_out, weights, strict, write_start, kept, 0)
    if shadow is not None:
        for to, source in zip(_parts(shadow, starts, numels), _parts(theta, starts, numels), strict=True):
            to.copy_(source)


def _fuse_part(
    theta: Tensor,
    theta_start: Tensor,
    theta_inner: Tensor,
    scores_in: Tensor,
    scores_out: Tensor,
    threshold_in: Tensor,
    threshold_out: Tensor,
    weights: Sequence[float],
    strict: bool,
    write_start: bool,
    kept: Tensor | None,
    padding: int,
) -> None:
    compare = torch.gt if strict else torch.ge
    m_in, m_out = compare(scores_in, threshold_in), compare(scores_out, threshold_out)
    fused = theta_start.clone()
    for tau, column in ((theta_inner - theta_start, 0), (theta - theta_inner, 1)):
        both, inner_only, outer_only, neither = weights[column::2]
        w = torch.full_like(tau, neither).masked_fill(m_out, outer_only)
        w = w.masked_fill(m_in, inner_only).masked_fill(m_in & m_out, both)
        fused += torch.where(w == 0, 0.0, w * tau)
    theta.copy_(fused)
    if write_start:
        theta_start.copy_(fused)
    if kept is not None:
        # padding holds zeros, which a mask keeps when its threshold is 0
        zero = torch.zeros_like(threshold_in)
        pads = [compare(zero, threshold_in), compare(zero, threshold_out)]
        for i, (mask, pad) in enumerate(((m_in, pads[0]), (m_out, pads[1]), (m_in & m_out, pads[0] & pads[1]))):
            kept[i] += mask.sum() - padding * pad.to(torch.int64)


def _ema_(
    importance: Tensor,
    s: Tensor,
    decay: float,
    reset: bool,
    uncertainty: Tensor | None,
    uncertainty_decay: float,
    skip: Tensor | None,
) -> None:
    old = torch.zeros_like(s) if reset else importance.float()
    new = _lerp(old, s, 1.0 - decay)
    new = (new if skip is None else torch.where(skip, old, new)).to(importance.dtype)
    if uncertainty is not None:
        old_u = torch.zeros_like(s) if reset else uncertainty.float()
        new_u = _lerp(old_u, (s - new.float()).abs(), 1.0 - uncertainty_decay)
        uncertainty.copy_(new_u if skip is None else torch.where(skip, old_u, new_u))
    importance.copy_(new)


def _lerp(old: Tensor, new: Tensor, weight: float) -> Tensor:
    """new alone for a weight of 1, whatever old is; torch before 2.13 makes NaN of an infinite one."""
    return new if weight == 1.0 else torch.lerp(old, new, weight)


def _scores(importance: Tensor, uncertainty: Tensor | None) -> Tensor:
    return importance.float() if uncertainty is None else importance.float() * uncertainty.float()


def _parts(x: Tensor, starts: Sequence[int], numels: Sequence[int]) -> list[Tensor]:
    return [x[a : a + n] for a, n in zip(starts, numels, strict=True)] if starts else [x]


def _largest(x: Tensor, rank: Tensor) -> Tensor:
    """The rank-th largest, counted from 1."""
    if x.device.type == "cpu":
        return x.kthvalue(x.numel() - int(rank) + 1).values
    # the rank is on the device: kthvalue would need it on the host
    return x.sort(descending=True).values.gather(0, (rank - 1).reshape(1))[0]
