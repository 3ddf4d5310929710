"""The adapter's LoRA layers, for methods that reach into them."""

from __future__ import annotations

from typing import Any

from torch import nn


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Linear layers with a LoRA pair, by full name. Raises: ValueError where there is none."""
    layers = {name: module for name, module in model.named_modules() if _is_lora(module)}
    if not layers:
        raise ValueError("this method needs linear layers with LoRA; the adapter has none")
    return layers


def _is_lora(module: nn.Module) -> bool:
    pairs = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    return all(isinstance(part, nn.ModuleDict) and "default" in part for part in pairs)
