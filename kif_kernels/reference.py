"""The definition of every operation, in plain PyTorch: the specification that the fast paths are tested against.

Notation: w weight, g gradient, I importance, theta parameters, tau task vector, n number of elements. All
operations work on tensors of any shape and on views; state (importance, moments, snapshots) is float32,
weights and gradients may be float32, bfloat16 or float16 and are widened to float32 first. Nothing here reads
a value back from the device, except through Python numbers that the caller passes in.

Eq. and Table numbers refer to "Recurrent Knowledge Identification and Fusion for Language Model Continual
Learning".
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class FusionTable(NamedTuple):
    """Weights (w_in, w_out) of the two task vectors, looked up by the two masks (generalises Eq. 9).

    Args:
        both: where the inner and the outer mask are set.
        inner_only: where only the inner mask is set.
        outer_only: where only the outer mask is set.
        neither: where no mask is set.
    """

    both: tuple[float, float]
    inner_only: tuple[float, float]
    outer_only: tuple[float, float]
    neither: tuple[float, float]


PAPER = FusionTable(both=(1.0, 1.0), inner_only=(1.0, 0.0), outer_only=(0.0, 1.0), neither=(0.0, 0.0))
RELEASED_CODE = FusionTable(both=(0.4, 0.6), inner_only=(1.0, 0.0), outer_only=(0.0, 1.0), neither=(0.5, 0.5))
NO_SHARE = FusionTable(both=(0.0, 1.0), inner_only=(1.0, 0.0), outer_only=(0.0, 1.0), neither=(0.0, 0.0))
NO_MASKS = FusionTable(both=(1.0, 1.0), inner_only=(1.0, 1.0), outer_only=(1.0, 1.0), neither=(1.0, 1.0))

FUSION_TABLES: dict[str, FusionTable] = {
    "paper": PAPER,
    "released-code": RELEASED_CODE,
    "no-share": NO_SHARE,
    "no-masks": NO_MASKS,
}
"""Named fusion tables: Eq. 9, the authors' released code, and the rows "- Share" and "- KI" of Table 2."""


def score(weight: Tensor, grad: Tensor) -> Tensor:
    """|w * g| in float32 (Eq. 3); 0 where the product is not finite, so that importance never becomes NaN."""
    product = (weight.float() * grad.float()).abs()
    return torch.where(product.isfinite(), product, 0.0)


def importance_ema_(
    importance: Tensor, weight: Tensor, grad: Tensor, decay: float, *, skip: Tensor | None = None
) -> Tensor:
    """importance <- decay * importance + (1 - decay) * |weight * grad|, in place (Eq. 3, 4; Eq. 7: decay = 1 - alpha2).

    Args:
        importance: float32 state, any shape; overwritten.
        weight: float32, bfloat16 or float16, same shape.
        grad: same shape as weight.
        decay: weight of the old value, in [0, 1]; 0 overwrites without the old value having any effect.
        skip: 0-d bool tensor; where true nothing changes (a step with non-finite gradients).

    Returns: importance.
    Raises: ValueError for shapes that differ, a decay outside [0, 1] or an importance that is not float32.
    """
    _check_state("importance", importance, weight, grad=grad)
    _check_unit("decay", decay)
    new = score(weight, grad) if decay == 0.0 else torch.lerp(importance, score(weight, grad), 1.0 - decay)
    return importance.copy_(new if skip is None else torch.where(skip, importance, new))


def importance_uncertainty_ema_(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    grad: Tensor,
    decay: float,
    uncertainty_decay: float,
    *,
    skip: Tensor | None = None,
) -> Tensor:
    """The pair (E, U) of the authors' released code, whose product E * U is thresholded there (as in AdaLoRA).

    E <- decay * E + (1 - decay) * |w * g|, then with the new E
    U <- uncertainty_decay * U + (1 - uncertainty_decay) * | |w * g| - E |, both in place.

    Args and errors as `importance_ema_`; uncertainty is float32 state of the same shape.
    Returns: importance (E).
    """
    _check_state("uncertainty", uncertainty, weight)
    _check_unit("uncertainty_decay", uncertainty_decay)
    importance_ema_(importance, weight, grad, decay, skip=skip)
    deviation = (score(weight, grad) - importance).abs()
    new = torch.lerp(uncertainty, deviation, 1.0 - uncertainty_decay)
    uncertainty.copy_(new if skip is None else torch.where(skip, uncertainty, new))
    return importance


def adamw_importance_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    importance: Tensor | None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    decay: float,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """AdamW (Loshchilov and Hutter 2019, as torch.optim.AdamW) and the importance of the weight before the update.

    importance <- decay * importance + (1 - decay) * |w * g|            (Eq. 3, 4; skipped when importance is None)
    g <- grad_scale * g
    m <- beta1 * m + (1 - beta1) * g;   v <- beta2 * v + (1 - beta2) * g^2
    w <- w * (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    Args:
        weight: float32, bfloat16 or float16; overwritten, rounded from float32.
        grad: same shape as weight; unchanged.
        exp_avg, exp_avg_sq: m and v, float32 state; overwritten.
        importance: float32 state or None; overwritten.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        step: number of this step, counted from 1; a 0-d tensor keeps the count on the device.
        decay: weight of the old importance, in [0, 1].
        grad_scale: 0-d tensor, factor of the gradient in AdamW (global-norm clipping); importance sees the
            gradient without it.
        skip: 0-d bool tensor; where true no tensor changes.

    Returns: weight.
    Raises: ValueError as `importance_ema_`.
    """
    _check_state("exp_avg", exp_avg, weight, grad=grad)
    _check_state("exp_avg_sq", exp_avg_sq, weight)
    if importance is not None:
        importance_ema_(importance, weight, grad, decay, skip=skip)
    beta1, beta2 = betas
    g = grad.float() if grad_scale is None else grad.float() * grad_scale
    w = weight.float()
    m = torch.lerp(exp_avg, g, 1.0 - beta1)
    v = torch.lerp(exp_avg_sq, g * g, 1.0 - beta2)
    bias1, bias2 = 1.0 - beta1**step, 1.0 - beta2**step
    w = w * (1.0 - lr * weight_decay) - (lr / bias1) * (m / (v.sqrt() / bias2**0.5 + eps))
    for state, new in ((exp_avg, m), (exp_avg_sq, v), (weight, w)):
        state.copy_(new if skip is None else torch.where(skip, state, new.to(state.dtype)))
    return weight


def mask_size(density: float, n: int) -> int:
    """k = ceil(density * n), at least 1: how many of n elements a mask of this density keeps when none tie.

    The density is taken as the decimal number it prints as, so that 0.1 of 30 is 3 and not 4.
    """
    _check_unit("density", density)
    return max(1, math.ceil(Fraction(repr(float(density))) * n))


def importance_threshold(importance: Tensor, density: float, exact: bool = True, *, numel: int | None = None) -> Tensor:
    """The k-th largest importance, k = ceil(density * n), at least 1 (the delta of Eq. 8).

    The mask I >= threshold holds every element that is at least as large as the k-th largest: k elements when
    none tie with it, k - 1 + t when t elements have its value. If fewer than k scores are positive the threshold
    is 0 and the mask holds all n elements: where nothing tells the elements apart, nothing is pruned.

    Args:
        importance: scores >= 0 without NaN, any shape.
        density: fraction of elements to keep, in [0, 1].
        exact: false allows an implementation to be off by a small rank error; this one is exact always.
        numel: n, where it is less than the tensor's own size because the tensor ends in or holds zeros that are
            padding. Zeros never rank above a real score, so they do not change the result.

    Returns: 0-d tensor of importance's dtype on its device.
    Raises: ValueError for an empty tensor, a density outside [0, 1] or a numel that does not fit.
    """
    n = _check_numel(importance, numel)
    flat = importance.detach().reshape(-1)
    return flat.kthvalue(flat.numel() - mask_size(density, n) + 1).values


def importance_quantile(importance: Tensor, density: float, *, numel: int | None = None) -> Tensor:
    """The (1 - density) quantile with linear interpolation, as torch.quantile, for any number of elements.

    The authors' released code uses it with the mask I > quantile, which holds at most ceil(density * (n - 1))
    elements and none at all when every score is equal. Arguments, result and errors as `importance_threshold`.
    """
    n = _check_numel(importance, numel)
    flat = importance.detach().reshape(-1)
    _check_unit("density", density)
    rank = density * (n - 1)  # counted from the largest, so that padding zeros stay out of it
    above = math.floor(rank)
    upper = flat.kthvalue(flat.numel() - above).values
    if rank == above:
        return upper
    lower = flat.kthvalue(flat.numel() - above - 1).values
    return torch.lerp(upper, lower, rank - above)


def fuse_(
    theta: Tensor,
    theta_start: Tensor,
    theta_inner: Tensor,
    importance_in: Tensor,
    importance_out: Tensor,
    threshold_in: Tensor,
    threshold_out: Tensor,
    table: FusionTable = PAPER,
    *,
    strict: bool = False,
) -> Tensor:
    """theta <- theta_start + w_in * tau_in + w_out * tau_out, in place (Eq. 9); theta_start receives the same.

    tau_in = theta_inner - theta_start (Eq. 2), tau_out = theta - theta_inner (Eq. 5), and (w_in, w_out) is
    looked up in `table` by the masks m_in = (importance_in >= threshold_in) and m_out likewise (Eq. 8). A task
    vector of weight 0 has no effect, whatever it holds.

    Args:
        theta: float32, theta_M in (after the outer steps), theta_{b+1} out.
        theta_start: float32, theta_b in, theta_{b+1} out (the next round's start).
        theta_inner: float32, theta_Q (after the inner steps); unchanged.
        importance_in, importance_out: float32 scores.
        threshold_in, threshold_out: 0-d tensors on the same device.
        table: weights by the two masks.
        strict: masks with > instead of >= (released code).

    Returns: theta.
    Raises: ValueError for shapes that differ.
    """
    for name, tensor in (("theta_start", theta_start), ("theta_inner", theta_inner)):
        _check_state(name, tensor, theta)
    for name, tensor in (("importance_in", importance_in), ("importance_out", importance_out)):
        if tensor.shape != theta.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, theta has {tuple(theta.shape)}")
    compare = torch.gt if strict else torch.ge
    m_in, m_out = compare(importance_in, threshold_in), compare(importance_out, threshold_out)
    fused = theta_start.clone()
    for tau, column in ((theta_inner - theta_start, 0), (theta - theta_inner, 1)):
        w = torch.where(
            m_in,
            torch.where(m_out, table.both[column], table.inner_only[column]),
            torch.where(m_out, table.outer_only[column], table.neither[column]),
        )
        fused += torch.where(w == 0, 0.0, w * tau)
    theta_start.copy_(fused)
    return theta.copy_(fused)


def _check_state(name: str, state: Tensor, weight: Tensor, **others: Tensor) -> None:
    """`state` must be float32 and have the weight's shape; `others` must have that shape."""
    if state.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {state.dtype}")
    for label, tensor in {name: state, **others}.items():
        if tensor.shape != weight.shape:
            raise ValueError(f"{label} has shape {tuple(tensor.shape)}, expected {tuple(weight.shape)}")


def _check_unit(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _check_numel(importance: Tensor, numel: int | None) -> int:
    n = importance.numel() if numel is None else numel
    if not 0 < n <= importance.numel():
        raise ValueError(f"importance has {importance.numel()} elements; cannot rank {n} of them")
    return n
