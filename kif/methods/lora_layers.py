"""The adapter's LoRA layers, for methods that reach into them."""

from __future__ import annotations

from typing import Any

from torch import nn


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Linear layers with a LoRA pair of the adapter "default", by full name.

    Raises: ValueError where there is none; naming the layer, for LoRA that is more than its pair (DoRA, lora_bias) and
        for LoRA on weights that are no linear layer's (those of experts).
    """
    layers = {name: module for name, module in model.named_modules() if _is_lora(module)}
    if not layers:
        raise ValueError('this method needs linear layers with LoRA in an adapter "default"; there is none')
    for name, module in layers.items():
        if hasattr(module, "parameter_name"):
            raise ValueError(
                f"this method reaches between the A and B of a LoRA pair, which PEFT multiplies at once on the experts "
                f"of {name}: leave the names of experts' layers out of target_modules"
            )
        for option in ("use_dora", "lora_bias"):
            if getattr(module, option, {}).get("default", False):
                raise ValueError(
                    f"this method reaches between the A and B of a LoRA pair, and {name} has {option}: make the "
                    f"adapter with LoraConfig({option}=False)"
                )
    return layers


def _is_lora(module: nn.Module) -> bool:
    pairs = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    return all(isinstance(part, nn.ModuleDict) and "default" in part for part in pairs)
