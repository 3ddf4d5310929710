"""Attention without cuDNN, whose gradients can be NaN, and T5's in the layout that fast implementations take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Within the block torch's attention takes another of its implementations on a GPU.

    From torch 2.11 on, cuDNN's is the default for bf16 on an H100 or H200. With a mask and at every other multiple of
    64 tokens its gradients are NaN for rows of very low scores, such as padding on the left (pytorch issue 196678).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def contiguous_position_bias(base: nn.Module) -> None:
    """Have T5's position bias laid out by rows.

    It comes as a transposed view, and the mask that transformers 5.17 makes of it is one, too (5.23 copies it in each
    layer). Such a mask torch's attention takes in its slow implementation only, in fp32 with all scores in memory.
    """
    modules: Iterable[Any] = base.modules()
    for module in modules:
        if hasattr(module, "compute_bias"):
            module.compute_bias = partial(_contiguous, module.compute_bias)


def _contiguous(compute: Any, *args: Any, **kwargs: Any) -> Tensor:
    bias: Tensor = compute(*args, **kwargs)
    return bias.contiguous()
