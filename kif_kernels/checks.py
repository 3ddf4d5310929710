"""What the operations require of their arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .layout import BINS
from .segments import Segments

STATE_DTYPES = (torch.float32, torch.bfloat16)
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mask_size(density: float, n: int) -> int:
    """k = ceil(density * n), at least 1: how many of n elements a mask of this density keeps when none tie.

    A product that lies above a whole number by rounding only counts as that number: 0.1 of 30 is 3 and not 4.
    Raises: ValueError for a density outside [0, 1].
    """
    check_unit("density", density)
    return max(1, math.ceil(density * n * (1.0 - 2.0**-52)))


def check_unit(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_not_negative(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_adamw(
    lr: float | Tensor, betas: Sequence[float], eps: float, weight_decay: float, step: float | Tensor
) -> None:
    """The numbers that the host knows; tensors are not read."""
    if not isinstance(lr, Tensor):
        check_not_negative("lr", lr)
    check_not_negative("eps", eps)
    check_not_negative("weight_decay", weight_decay)
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    if not isinstance(step, Tensor) and not 1 <= step < math.inf:
        raise ValueError(f"step must be at least 1, which the first step is, got {step}")


def check_table(table: Sequence[Sequence[float]]) -> None:
    if len(table) != 4 or any(len(pair) != 2 or not all(map(math.isfinite, pair)) for pair in table):
        raise ValueError(
            f"table must hold four pairs of finite weights (both, inner_only, outer_only, neither), got {table}"
        )


def check_same_shape(of: str, shape: torch.Size, device: torch.device, tensors: Mapping[str, Tensor | None]) -> None:
    """Every given tensor has the shape of what is named `of`, and lies on the same device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {of} has {tuple(shape)}")
    check_device(of, device, tensors)


def check_device(of: str, device: torch.device, tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, {of} on {device}")


def check_dtype(tensors: Mapping[str, Tensor | None], allowed: Sequence[torch.dtype]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise ValueError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_scalars(device: torch.device, tensors: Mapping[str, Tensor | None]) -> None:
    """Every given tensor has one element and lies on `device`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a 0-d tensor on {device}, got {tensor!r}")
        if tensor.numel() != 1 or tensor.device != device:
            raise ValueError(f"{name} must be a 0-d tensor on {device}, got {tuple(tensor.shape)} on {tensor.device}")


def check_histogram(device: torch.device, histogram: Tensor | None, window: Tensor | None) -> None:
    """Both or none, as `StreamingThreshold` hands them out."""
    if (histogram is None) != (window is None):
        raise ValueError("histogram and window are given together or not at all")
    for name, tensor, size in (("histogram", histogram, BINS), ("window", window, 2)):
        if tensor is not None and not (
            tensor.shape == (size,) and tensor.dtype == torch.int64 and tensor.is_contiguous()
        ):
            raise ValueError(f"{name} must be int64 [{size}] and contiguous, got {tensor.dtype} {tuple(tensor.shape)}")
    check_device("importance", device, {"histogram": histogram, "window": window})


def check_numel(importance: Tensor, numel: int | None) -> int:
    n = importance.numel() if numel is None else numel
    if not 0 < n <= importance.numel():
        raise ValueError(f"importance has {importance.numel()} elements; cannot rank {n} of them")
    return n


def check_scores(
    scores: Sequence[Tensor],
    factors: Sequence[Tensor],
    sides: int,
    segments: Segments | None,
    numels: Sequence[int],
    device: torch.device,
) -> None:
    if len(scores) != sides or len(factors) not in (0, sides):
        raise ValueError(f"{len(scores)} score and {len(factors)} factor buffers for {sides} sides")
    needed = segments.end if segments is not None else numels[0]
    for name, tensors in (("scores", scores), ("factors", factors)):
        for i, tensor in enumerate(tensors):
            check_dtype({f"{name}[{i}]": tensor}, STATE_DTYPES)
            check_device("the threshold", device, {f"{name}[{i}]": tensor})
            if tensor.numel() != scores[0].numel():
                raise ValueError(f"{name}[{i}] has {tensor.numel()} elements, scores[0] has {scores[0].numel()}")
            if tensor.numel() < needed:
                raise ValueError(f"{name}[{i}] has {tensor.numel()} elements, {needed} are to be ranked")
    for i, tensor in enumerate(factors):
        check_same_shape(f"scores[{i}]", scores[i].shape, device, {f"factors[{i}]": tensor})
