"""MoELoRA: several LoRA experts in each layer, mixed by a router for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kif.config import RunConfig
from kif.families import Encoded, LanguageModel
from kif.methods.base import METHOD_FILE, SingleAdapterMethod, load_method_file, save_method_file
from kif.methods.lora_layers import lora_layers

ROUTER = "moe_router"


class MoELoRA(SingleAdapterMethod):
    """y = W x + s sum_e g_e B_e A_e x with g = softmax(R x) over K experts, s = lora_alpha / lora_r.

    The experts of a layer are the rank blocks of one LoRA of rank K * r; R, of shape (K, inputs), starts at 0, so that
    all experts weigh 1/K at first. Experts and routers of all layers are trained on one task after the other. With
    `balance` > 0 the loss has the term balance * mean over layers of K sum_e f_e P_e, where f_e is the share of the
    positions whose largest weight is e's and P_e the mean of g_e (both over all positions of a micro-batch, padding
    too); it is 1 where the experts are used evenly.

    A saved adapter holds the experts as one LoRA and the routers in `METHOD_FILE`; PEFT alone would mix all experts
    with weight 1.
    """

    name = "moelora"
    summary = "several LoRA experts in each layer, mixed by a softmax router for each token"
    source = "mixture of LoRA experts, as in baseline MoELoRA of section 4"
    section = "moelora"
    plain_adapter = False
    unused = ("outer_lr", "outer_batch_size", "memory_fraction", "memory_balanced")

    refused_options: ClassVar[Mapping[str, str]] = {
        "rank_pattern": "whose experts are blocks of lora_r in every layer",
        "use_rslora": "whose scale would depend on the number of experts",
    }

    @classmethod
    def adapter_config(cls, config: RunConfig, tasks: int) -> RunConfig:
        config = super().adapter_config(config, tasks)
        experts = config.moelora.experts or tasks
        return replace(config, lora_r=config.lora_r * experts, lora_alpha=config.lora_alpha * experts)

    @classmethod
    def attach(cls, lm: LanguageModel, config: RunConfig, folder: Path) -> None:
        tensors = load_method_file(folder)
        for name, layer in lora_layers(lm.model).items():
            router = _add_router(layer, config.lora_r)
            if tensors.get(name, torch.empty(0)).shape != router.weight.shape:
                raise ValueError(f"{folder / METHOD_FILE}: no router for layer {name} of this model and lora_r")
            router.weight.data.copy_(tensors[name])
            _Gates(layer)

    @classmethod
    def of_micro_batches(cls, config: RunConfig) -> str | None:
        return "balance of the experts" if config.moelora.balance else None

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        layers = lora_layers(lm.model)
        for layer in layers.values():
            _add_router(layer, config.lora_r)
        super().__init__(lm, config)
        self._gates = {name: _Gates(layer) for name, layer in layers.items()}

    def loss(self, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
        loss, count = super().loss(rows)
        if self.config.moelora.balance:
            loss = loss + count * self.config.moelora.balance * self.imbalance()
        return loss, count

    def imbalance(self) -> Tensor:
        """Mean over layers of K sum_e f_e P_e in the last forward pass, a 0-d tensor with gradient."""
        terms = []
        for gates in self._gates.values():
            g = gates.weights.flatten(0, -2)
            experts = g.size(1)
            used = torch.bincount(g.argmax(1), minlength=experts) / len(g)
            terms.append(experts * (used * g.mean(0)).sum())
        return torch.stack(terms).mean()

    def save_adapter(self, folder: Path) -> None:
        super().save_adapter(folder)
        layers = lora_layers(self.lm.model)
        save_method_file(folder, {name: getattr(layer, ROUTER).weight for name, layer in layers.items()})


def _add_router(layer: Any, rank: int) -> nn.Linear:
    a = layer.lora_A["default"].weight
    router = nn.Linear(a.shape[1], a.shape[0] // rank, bias=False, device=a.device, dtype=torch.float32)
    nn.init.zeros_(router.weight)
    layer.add_module(ROUTER, router)
    return router


class _Gates:
    """Hooks on one layer: the router's weights for each position, put on the rank blocks between A and B.

    Attributes:
        weights: g of the last forward pass, shape (..., K).
    """

    weights: Tensor

    def __init__(self, layer: Any) -> None:
        self.router = getattr(layer, ROUTER)
        layer.register_forward_pre_hook(self._route)
        layer.lora_B["default"].register_forward_pre_hook(self._mix)

    def _route(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.weights = self.router(inputs[0].float()).softmax(-1)

    def _mix(self, b: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        experts = self.weights.size(-1)
        return ((x.unflatten(-1, (experts, -1)) * self.weights.unsqueeze(-1).to(x.dtype)).flatten(-2),)
