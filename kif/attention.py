"""Attention by cuDNN where its gradients are right, and without a mask; T5's position bias, masked once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MASKED = "_kif_masked"
"""Attribute of a position bias that has the mask in it."""

_CUDNN = 91900
"""The oldest cuDNN whose attention was measured here; up to 9.15 recording it failed at some widths (pytorch pull
request 167101)."""


def without_cudnn() -> AbstractContextManager[None]:
    """Within the block torch's attention takes another of its implementations on a GPU.

    torch 2.11, say, prefers cuDNN's for bf16 on an H100 or H200. With a mask and at every other multiple of 64 tokens
    its gradients are NaN for rows of very low scores, such as padding on the left (pytorch issue 196678); for what else
    is wrong with it see `cudnn_where_safe`.
    """
    return _cudnn(False)


@contextmanager
def _cudnn(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def cudnn_where_safe() -> Iterator[None]:
    """Within the block `torch.nn.functional.scaled_dot_product_attention` may be cuDNN's where its gradient is right.

    That is, by cuDNN 9.19 or newer, with as many queries as keys, at least 64, and

    - without a mask, or with one but at numbers of keys of 64 more than a multiple of 128 (`without_cudnn`);
    - without dropout, or of a multiple of 1/16, to which it is rounded (pytorch pull request 174245), which T5's 0.1 is
      not.

    Few queries have NaN gradients over a multiple of 128 keys when scores are very low (cudnn-frontend issue 1072). Not
    for rows that see nothing. cuDNN takes a tenth of a second for every shape when it first occurs: for passes of few
    shapes.
    """
    attend: Any = F.scaled_dot_product_attention

    def chosen(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        # in which a position bias is already
        mask = rest[0] if rest else options.get("attn_mask")
        dropout = rest[1] if len(rest) > 1 else options.get("dropout_p", 0.0)
        with _cudnn(_is_safe(query.size(-2), key.size(-2), mask is not None, dropout)):
            return attend(query, key, value, *rest, **options)

    F.scaled_dot_product_attention = chosen
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend


def _is_safe(queries: int, keys: int, masked: bool, dropout: float) -> bool:
    if (torch.backends.cudnn.version() or 0) < _CUDNN or not queries == keys >= 64:
        return False
    return not (masked and keys % 128 == 64) and dropout * 16 % 1 == 0


@contextmanager
def causal_masks_seen() -> Iterator[list[bool]]:
    """Within the block: of each mask that torch's attention is given by transformers, whether it hides what follows a
    token and nothing else. Reads them back from the device."""
    seen: list[bool] = []

    def look(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        seen.append(_hides_what_follows(query, key, mask))
        return mask

    with _changed_masks(look):
        yield seen


def without_causal_masks() -> AbstractContextManager[None]:
    """Within the block torch's attention, as transformers calls it, takes every mask for one that hides what follows.

    It then takes its fastest implementation, which also leaves out what is hidden. For passes of which
    `causal_masks_seen` has shown that there is no other mask: while a CUDA graph is recorded, transformers makes a mask
    where it makes none else, since it cannot look at values.
    """
    return _changed_masks(lambda query, key, mask: None)


@contextmanager
def _changed_masks(change: Callable[[Tensor, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def changed(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        if attention_mask is not None:
            attention_mask = change(query, key, attention_mask)
            if attention_mask is None:
                options["is_causal"] = True
        return attend(module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = changed
    try:
        yield
    finally:
        # what is registered for all must not stay hidden behind a copy
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not attend:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = attend


def _hides_what_follows(query: Tensor, key: Tensor, mask: Tensor) -> bool:
    """Whether a mask, which is True or 0 where attention is paid, is the lower triangle."""
    if query.size(2) != key.size(2) or mask.shape[-2:] != (query.size(2), key.size(2)):
        return False
    before = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == before).all())
    return bool(torch.where(before, mask == 0, mask <= torch.finfo(mask.dtype).min).all())


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


def mask_position_bias_once(base: nn.Module) -> None:
    """Have all layers of T5's encoder share one masked position bias, of [rows, heads, tokens, tokens].

    transformers 5.17 masks the bias anew in each layer, for torch's attention, and every layer keeps its copy for the
    backward pass. Results are the same bits.
    """
    modules: Iterable[Any] = base.modules()
    for module in modules:
        compute: Any = getattr(type(module), "compute_bias", None)
        # what a decoder masks is small
        if getattr(module, "is_decoder", True) or compute is None:
            continue
        # local attention has a bias of blocks
        if "key_length" in inspect.signature(compute).parameters:
            module.register_forward_pre_hook(_masked_once, with_kwargs=True)


def _masked_once(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """The first layer adds the mask to its bias, which the model hands on to the others; these leave the mask out."""
    mask: Any = kwargs.get("mask")
    bias: Any = kwargs.get("position_bias")
    if not args or getattr(mask, "dtype", None) != torch.bool or "position_bias" not in kwargs:
        return None
    if bias is None and module.has_relative_attention_bias:
        x = args[0]
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = module.compute_bias(x.shape[1], x.shape[1], device=x.device)
        # in rows, or transformers 5.23 copies it in each layer
        bias = torch.where(mask, bias, torch.finfo(dtype).min).contiguous()
        setattr(bias, _MASKED, True)
    if not getattr(bias, _MASKED, False):
        return None
    return args, {**kwargs, "mask": None, "position_bias": bias}
