"""The public functions: arguments checked, then `torch.ops.kif.*`, which runs what fits the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._ops import ops
from .checks import (
    STATE_DTYPES,
    VALUE_DTYPES,
    check_adamw,
    check_dtype,
    check_histogram,
    check_numel,
    check_same_shape,
    check_scalars,
    check_table,
    check_unit,
)
from .fusion_table import PAPER, FusionTable
from .segments import Segments
from .streaming import StreamingThreshold


def gradient_state_(
    grad: Tensor,
    scale: Tensor,
    skip: Tensor,
    step: Tensor,
    skipped: Tensor,
    *,
    max_norm: float,
    inv_scale: Tensor | None = None,
    norm: Tensor | None = None,
) -> None:
    """What a step needs to know of the whole gradient, without a host sync: clipping factor and non-finite flag.

    norm <- inv_scale * ||grad||_2;  scale <- min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_
    skip <- norm is not finite (one that overflows float32 counts as that);  step += not skip;  skipped += skip

    The kernels add the squares of 16,384 elements in float32, so there 1.5e17 in each of them counts as overflow too.

    Args:
        grad: float32, bfloat16 or float16, any shape; unchanged. Reads it once.
        scale: 0-d float32, overwritten. 1 when max_norm is 0 (no clipping) or the norm is not finite.
        skip: 0-d bool, overwritten.
        step: 0-d float64 count of steps taken, for the bias correction of AdamW.
        skipped: 0-d int64 count of steps skipped.
        max_norm: largest norm that is not clipped; 0 turns clipping off.
        inv_scale: 0-d float32, the reciprocal of a loss scale (GradScaler).
        norm: 0-d float32, overwritten; default: it is not kept.

    Raises: ValueError for a scalar that is not one, or elsewhere, or of another dtype; for a max_norm below 0.
    """
    check_dtype({"grad": grad}, VALUE_DTYPES)
    reals = {"scale": scale, "inv_scale": inv_scale, "norm": norm}
    check_scalars(grad.device, {**reals, "skip": skip, "step": step, "skipped": skipped})
    check_dtype(reals, (torch.float32,))
    check_dtype({"skip": skip}, (torch.bool,))
    check_dtype({"step": step}, (torch.float64,))
    check_dtype({"skipped": skipped}, (torch.int64,))
    if not max_norm >= 0.0:
        raise ValueError(f"max_norm must not be negative, got {max_norm}")
    ops.gradient_state_(grad, scale, skip, step, skipped, max_norm, inv_scale, norm)


def importance_ema_(
    importance: Tensor,
    weight: Tensor,
    grad: Tensor,
    decay: float,
    *,
    reset: bool = False,
    skip: Tensor | None = None,
    histogram: Tensor | None = None,
    window: Tensor | None = None,
) -> Tensor:
    """importance <- decay * importance + (1 - decay) * |weight * grad|, in place (Eq. 3, 4; Eq. 7: decay = 1 - alpha2).

    A product that is not finite counts as 0, so importance never becomes NaN. 12 + 4 B/element in float32.

    Args:
        importance: float32 or bfloat16 state, any shape; overwritten.
        weight: float32, bfloat16 or float16, same shape.
        grad: same shape, one of the same dtypes.
        decay: weight of the old value, in [0, 1]; 0 overwrites without the old value having any effect.
        reset: take the old value as 0, without reading it (first step of a round).
        skip: 0-d bool tensor; where true nothing changes (importance becomes 0 with `reset`).
        histogram, window: of `StreamingThreshold`: the new scores are counted into it on the way.

    Returns: importance.
    Raises: ValueError for shapes or devices that differ, a decay outside [0, 1] or a dtype that is not among these.
    """
    _check_importance(importance, weight, grad, decay, skip, histogram, window)
    ops.importance_ema_(importance, weight, grad, decay, reset, None, 0.0, skip, histogram, window)
    return importance


def importance_uncertainty_ema_(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    grad: Tensor,
    decay: float,
    uncertainty_decay: float,
    *,
    reset: bool = False,
    skip: Tensor | None = None,
    histogram: Tensor | None = None,
    window: Tensor | None = None,
) -> Tensor:
    """The pair (E, U) of the authors' released code, whose product E * U is thresholded there (as in AdaLoRA).

    E <- decay * E + (1 - decay) * |w * g|, then with the new E
    U <- uncertainty_decay * U + (1 - uncertainty_decay) * | |w * g| - E |, both in place.

    Args and errors as `importance_ema_`; uncertainty has importance's shape and dtype; E * U is counted.
    Returns: importance (E).
    """
    _check_importance(importance, weight, grad, decay, skip, histogram, window)
    _check_uncertainty(importance, uncertainty, uncertainty_decay)
    ops.importance_ema_(importance, weight, grad, decay, reset, uncertainty, uncertainty_decay, skip, histogram, window)
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
    decay: float = 0.0,
    reset: bool = False,
    after_update: bool = False,
    uncertainty: Tensor | None = None,
    uncertainty_decay: float = 0.0,
    grad_scale: Tensor | None = None,
    inv_scale: Tensor | None = None,
    skip: Tensor | None = None,
    snapshot_before: Tensor | None = None,
    snapshot_after: Tensor | None = None,
    shadow: Tensor | None = None,
    histogram: Tensor | None = None,
    window: Tensor | None = None,
    zero_grad: bool = False,
) -> Tensor:
    """AdamW (Loshchilov and Hutter 2019, as torch.optim.AdamW) and the importance of the weight, in one pass.

    g <- inv_scale * g;   c = grad_scale * g
    importance <- decay * importance + (1 - decay) * |w * g|            (Eq. 3, 4)
    m <- beta1 * m + (1 - beta1) * c;   v <- beta2 * v + (1 - beta2) * c^2
    w <- w * (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    20 + 16 B/element in float32 with importance, and 4 more for each snapshot and for zero_grad.

    Args:
        weight: float32, bfloat16 or float16; overwritten, rounded from float32.
        grad: same shape as weight, one of the same dtypes; unchanged, or zeroed by `zero_grad`.
        exp_avg, exp_avg_sq: m and v, float32 state; overwritten.
        importance: float32 or bfloat16 state, overwritten; None leaves plain AdamW.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW; a 0-d float32 tensor keeps lr on the device.
        step: number of this step, counted from 1; a 0-d float64 tensor keeps the count on the device.
        decay, reset: as in `importance_ema_`.
        after_update: score |w * c| with the updated w instead (released code).
        uncertainty, uncertainty_decay: as in `importance_uncertainty_ema_`.
        grad_scale: 0-d float32 tensor, factor of the gradient in AdamW (global-norm clipping); importance sees the
            gradient without it.
        inv_scale: 0-d float32 tensor, the reciprocal of a loss scale; importance sees it.
        skip: 0-d bool tensor; where true no weight, moment or importance changes. Snapshots, the shadow, the
            histogram and zero_grad do what they do in any step.
        snapshot_before, snapshot_after: weight's dtype; receive the weights before and after the update
            (theta_b, theta_b(Q)).
        shadow: bfloat16 or float16; receives the updated weights, for the forward pass.
        histogram, window: as in `importance_ema_`.
        zero_grad: leave zeros in grad.

    Returns: weight.
    Raises: ValueError as `importance_ema_`; for lr, eps or weight_decay below 0 or not finite, betas outside [0, 1), a
        step below 1. A tensor's value is not looked at.
    """
    check_adamw(lr, betas, eps, weight_decay, step)
    shape, device = weight.shape, weight.device
    check_dtype({"weight": weight, "grad": grad}, VALUE_DTYPES)
    check_dtype({"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, (torch.float32,))
    check_dtype({"snapshot_before": snapshot_before, "snapshot_after": snapshot_after}, (weight.dtype,))
    check_dtype({"shadow": shadow}, (torch.bfloat16, torch.float16))
    tensors = {
        "grad": grad,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "snapshot_before": snapshot_before,
        "snapshot_after": snapshot_after,
        "shadow": shadow,
    }
    check_same_shape("weight", shape, device, tensors)
    if importance is not None:
        _check_importance(importance, weight, grad, decay, skip, histogram, window)
    elif uncertainty is not None or histogram is not None:
        raise ValueError("uncertainty and histogram need importance")
    if uncertainty is not None and importance is not None:
        _check_uncertainty(importance, uncertainty, uncertainty_decay)
    lr_tensor = lr if isinstance(lr, Tensor) else None
    step_tensor = step if isinstance(step, Tensor) else None
    scalars = {"lr": lr_tensor, "step": step_tensor, "grad_scale": grad_scale, "inv_scale": inv_scale, "skip": skip}
    check_scalars(device, scalars)
    check_dtype({"lr": lr_tensor, "grad_scale": grad_scale, "inv_scale": inv_scale}, (torch.float32,))
    check_dtype({"step": step_tensor}, (torch.float64,))
    check_dtype({"skip": skip}, (torch.bool,))
    ops.adamw_importance_(
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        importance,
        uncertainty,
        snapshot_before,
        snapshot_after,
        shadow,
        histogram,
        window,
        0.0 if isinstance(lr, Tensor) else float(lr),
        lr_tensor,
        0.0 if isinstance(step, Tensor) else float(step),
        step_tensor,
        betas[0],
        betas[1],
        eps,
        weight_decay,
        decay,
        uncertainty_decay,
        reset,
        after_update,
        zero_grad,
        grad_scale,
        inv_scale,
        skip,
    )
    return weight


def importance_threshold(
    importance: Tensor, density: float | Tensor, exact: bool = True, *, numel: int | None = None
) -> Tensor:
    """The k-th largest importance, k = ceil(density * n), at least 1 (the delta of Eq. 8).

    The mask I >= threshold holds every element that is at least as large as the k-th largest: k elements when
    none tie with it, k - 1 + t when t elements have its value. If fewer than k scores are positive the threshold
    is 0 and the mask holds all n elements: where nothing tells the elements apart, nothing is pruned.

    Args:
        importance: scores >= 0 without NaN, any shape, float32 or bfloat16.
        density: fraction of elements to keep, in [0, 1]; or a 0-d float tensor on the device.
        exact: false allows the kernels to keep up to 0.001 * n elements more or fewer, for fewer passes; see
            `StreamingThreshold`, which saves more when a threshold is wanted every round.
        numel: n, where it is less than the tensor's own size because the tensor ends in or holds zeros that are
            padding. Zeros never rank above a real score, so they do not change the result.

    Returns: 0-d tensor of importance's dtype on its device.
    Raises: ValueError for an empty tensor, a density outside [0, 1] (that of a tensor is not looked at) or a numel
        that does not fit.
    """
    n = check_numel(importance, numel)
    selection = StreamingThreshold(density, n, exact=exact, device=importance.device)
    return selection.select((importance.detach(),))[0, 0].to(importance.dtype)


def importance_thresholds(
    importance: Tensor, density: float | Tensor, segments: Segments, exact: bool = True
) -> Tensor:
    """`importance_threshold` of each segment of a flat buffer. Returns: [len(segments)] of importance's dtype.

    Raises: ValueError when the segments do not fit into the buffer.
    """
    selection = StreamingThreshold(density, segments.end, segments=segments, exact=exact, device=importance.device)
    return selection.select((importance.detach(),))[0].to(importance.dtype)


def importance_quantile(importance: Tensor, density: float, *, numel: int | None = None) -> Tensor:
    """The (1 - density) quantile with linear interpolation, as torch.quantile, for any number of elements.

    The authors' released code uses it with the mask I > quantile, which holds at most ceil(density * (n - 1))
    elements and none at all when every score is equal. Arguments, result and errors as `importance_threshold`.
    """
    n = check_numel(importance, numel)
    check_unit("density", density)
    rank = density * (n - 1)  # counted from the largest, so that padding zeros stay out of it
    above = math.floor(rank)
    upper = _kth_largest(importance, above + 1, n)
    if rank == above:
        return upper
    return torch.lerp(upper, _kth_largest(importance, above + 2, n), rank - above)


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
    uncertainty_in: Tensor | None = None,
    uncertainty_out: Tensor | None = None,
    write_start: bool = True,
    shadow: Tensor | None = None,
    kept: Tensor | None = None,
    numel: int | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """theta <- theta_start + w_in * tau_in + w_out * tau_out, in place (Eq. 9); theta_start receives the same.

    tau_in = theta_inner - theta_start (Eq. 2), tau_out = theta - theta_inner (Eq. 5), and (w_in, w_out) is
    looked up in `table` by the masks m_in = (importance_in >= threshold_in) and m_out likewise (Eq. 8). A task
    vector of weight 0 has no effect, whatever it holds. 20 + 8 B/element.

    Args:
        theta: float32, theta_M in (after the outer steps), theta_{b+1} out.
        theta_start: float32, theta_b in, theta_{b+1} out (the next round's start).
        theta_inner: float32, theta_Q (after the inner steps); unchanged.
        importance_in, importance_out: float32 or bfloat16 scores.
        threshold_in, threshold_out: 0-d float32 tensors on the same device; [len(segments)] with `segments`.
        table: weights by the two masks.
        strict: masks with > instead of >= (released code).
        uncertainty_in, uncertainty_out: both or none; the masks then compare importance * uncertainty (released code).
        write_start: false leaves theta_start as it is (4 B/element less).
        shadow: bfloat16 or float16; receives theta_{b+1}, for the forward pass.
        kept: int64 [3]; the numbers of elements that the inner, the outer and both masks hold are added to it.
        numel: number of elements that are no padding (zero scores); matters to `kept` only.
        segments: every segment has thresholds of its own; elements outside of them stay as they are.

    Returns: theta.
    Raises: ValueError for shapes, dtypes or devices that differ, or a table of another form.
    """
    check_table(table)
    check_dtype({"theta": theta, "theta_start": theta_start, "theta_inner": theta_inner}, (torch.float32,))
    scores = {
        "importance_in": importance_in,
        "importance_out": importance_out,
        "uncertainty_in": uncertainty_in,
        "uncertainty_out": uncertainty_out,
    }
    check_dtype(scores, STATE_DTYPES)
    check_dtype({"shadow": shadow}, (torch.bfloat16, torch.float16))
    tensors = {"theta_start": theta_start, "theta_inner": theta_inner, "shadow": shadow, **scores}
    check_same_shape("theta", theta.shape, theta.device, tensors)
    if (uncertainty_in is None) != (uncertainty_out is None):
        raise ValueError("uncertainty_in and uncertainty_out are given together or not at all")
    if numel is None:
        numel = theta.numel()
    elif not 0 <= numel <= theta.numel():
        raise ValueError(f"theta has {theta.numel()} elements, numel is {numel}")
    thresholds = {"threshold_in": threshold_in, "threshold_out": threshold_out}
    if segments is None:
        check_scalars(theta.device, thresholds)
    else:
        check_same_shape("segments", torch.Size([len(segments)]), theta.device, thresholds)
        if theta.dim() != 1 or segments.end > theta.numel():
            raise ValueError(
                f"segments end at {segments.end}; theta must be flat and as long, it is {tuple(theta.shape)}"
            )
    if kept is not None:
        check_dtype({"kept": kept}, (torch.int64,))
        check_same_shape("the three masks", torch.Size([3]), theta.device, {"kept": kept})
    counts = (
        kept if kept is None or kept.is_contiguous() else torch.zeros_like(kept, memory_format=torch.contiguous_format)
    )
    ops.fuse_(
        theta,
        theta_start,
        theta_inner,
        importance_in,
        importance_out,
        uncertainty_in,
        uncertainty_out,
        threshold_in.float().contiguous(),
        threshold_out.float().contiguous(),
        [w for pair in table for w in pair],
        strict,
        write_start,
        shadow,
        counts,
        numel,
        list(segments.starts) if segments else [],
        list(segments.numels) if segments else [],
        segments.chunks(theta.device) if segments else None,
    )
    if kept is not None and counts is not None and counts is not kept:
        kept += counts
    return theta


def _kth_largest(importance: Tensor, k: int, n: int) -> Tensor:
    selection = StreamingThreshold(0.0, n, device=importance.device)
    selection.set_rank(k)
    return selection.select((importance.detach(),))[0, 0].to(importance.dtype)


def _check_importance(
    importance: Tensor,
    weight: Tensor,
    grad: Tensor,
    decay: float,
    skip: Tensor | None,
    histogram: Tensor | None,
    window: Tensor | None,
) -> None:
    check_dtype({"importance": importance}, STATE_DTYPES)
    check_dtype({"weight": weight, "grad": grad}, VALUE_DTYPES)
    check_same_shape("weight", weight.shape, weight.device, {"importance": importance, "grad": grad})
    check_unit("decay", decay)
    check_scalars(weight.device, {"skip": skip})
    check_histogram(importance.device, histogram, window)


def _check_uncertainty(importance: Tensor, uncertainty: Tensor, uncertainty_decay: float) -> None:
    check_dtype({"uncertainty": uncertainty}, (importance.dtype,))
    check_same_shape("importance", importance.shape, importance.device, {"uncertainty": uncertainty})
    check_unit("uncertainty_decay", uncertainty_decay)
