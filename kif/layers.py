"""The base model's layers in fewer passes over memory and with less of it: norms, liger-kernel, 8-bit layers."""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kif.attention import contiguous_position_bias, mask_position_bias_once


def fit_layers(base: nn.Module, device: torch.device) -> None:
    """What every model gets that is to run on `device`.

    `kif.attention.mask_position_bias_once` and `forget_8bit_inputs`; on a GPU `fuse_norms` and
    `kif.attention.contiguous_position_bias`, too.
    """
    mask_position_bias_once(base)
    forget_8bit_inputs(base)
    if device.type == "cuda":
        fuse_norms(base)
        contiguous_position_bias(base)


def forget_8bit_inputs(base: nn.Module) -> None:
    """Have bitsandbytes' 8-bit layers keep no input for the backward pass.

    It is there for the gradient of the weight, which a frozen layer has none of; the results are the same bits.
    """
    for module in base.modules():
        kind = type(module)
        # PEFT's layers around them have the same name
        if kind.__name__ == "Linear8bitLt" and kind.__module__.startswith("bitsandbytes"):
            module.register_forward_hook(_forget_input)


def _forget_input(module: Any, args: Any, output: Tensor) -> None:
    if module.weight.requires_grad:
        return
    node: Any = output.grad_fn
    # on a GPU and in evaluation; in training on a CPU
    if type(node).__name__ == "MatMul8bitLtBackward":
        node.tensors = (None, None, None)
    elif type(node).__name__ == "MatMul8bitFpBackward":
        node.A = None


def fuse_norms(base: nn.Module) -> int:
    """Have the model's RMS norms computed by one operation of torch each; returns how many.

    x / sqrt(mean(x^2) + eps) * weight, in fp32 within, rounded once at the end. transformers' modules for it are
    chains of six or more operations. Taken are those that have just a `weight` and a `variance_epsilon`, as the
    norms of T5, Llama and their like, and that are seen to compute this; inputs of another dtype than the weight,
    and calls with more than the input, go the old way.
    """
    norms: list[Any] = [module for module in base.modules() if _is_rms_norm(module)]
    for norm in norms:
        # a class and not a function for each module, for which torch.compile would trace its layer anew
        kind: Any = type(norm)
        norm.__class__ = _fused(kind)
    return len(norms)


def check_liger(device: torch.device) -> None:
    """Raise ValueError where `use_liger` must fail whatever the model: without liger-kernel, and but on a GPU."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError('use_liger_kernel needs liger-kernel: pip install "recurrent-kif[liger]"')
    if device.type != "cuda":
        raise ValueError(f"use_liger_kernel needs a GPU, the model is on {device}: leave it out")


def use_liger(base: Any) -> None:
    """Have liger-kernel compute what it has kernels for in this model: rotary positions and gated feed-forwards.

    Norms stay with `fuse_norms`, and the loss with the model, since logits are taken at label positions only.

    Raises: ValueError without liger-kernel, for a model that is not on a GPU, for a model type or an activation that it
        does not know.
    """
    check_liger(next(base.parameters()).device)
    from liger_kernel.transformers import monkey_patch

    kind = base.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"liger-kernel has nothing for model type {kind!r}: leave use_liger_kernel out")
    # its feed-forwards have the activation that is usual for the type, whatever the model's is
    for name in ("hidden_act", "hidden_activation"):
        own, usual = getattr(base.config, name, None), getattr(type(base.config)(), name, None)
        if own != usual and {own, usual} != {"silu", "swish"}:
            raise ValueError(f"liger-kernel has no {name} {own!r} for model type {kind!r}: leave use_liger_kernel out")
    monkey_patch._apply_liger_kernel_to_instance(
        model=base, rms_norm=False, cross_entropy=False, fused_linear_cross_entropy=False
    )


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    weight, eps = parameters.get("weight"), getattr(module, "variance_epsilon", None)
    if weight is None or len(parameters) > 1 or weight.dim() != 1 or not isinstance(eps, float):
        return False
    if sum(p.default is p.empty for p in inspect.signature(module.forward).parameters.values()) != 1:
        return False
    x = torch.linspace(-2.0, 3.0, 2 * weight.numel(), device=weight.device).view(2, -1).to(weight.dtype)
    try:
        own = module(x)
    except Exception:  # it needs more than the input, whatever its signature says
        return False
    fused, exact = F.rms_norm(x, weight.shape, weight, eps), torch.finfo(x.dtype)
    # the chains round up to three times
    return own.dtype == fused.dtype and torch.allclose(own, fused, rtol=4 * exact.eps, atol=exact.tiny)


@cache
def _fused(kind: Any) -> Any:
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        # some take a gate besides
        if named or len(given) != 1 or given[0].dtype != self.weight.dtype:
            return kind.forward(self, *given, **named)
        return F.rms_norm(given[0], self.weight.shape, self.weight, self.variance_epsilon)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
