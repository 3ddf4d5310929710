"""Attention without cuDNN, whose gradients can be NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
