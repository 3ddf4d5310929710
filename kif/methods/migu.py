"""MIGU: only the rows of a linear layer whose outputs are large are updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kif.arena import Segment
from kif.config import RunConfig
from kif.distributed import all_reduce_
from kif.families import Encoded, LanguageModel
from kif.methods.base import SingleAdapterMethod


class MIGU(SingleAdapterMethod):
    """From the second task on, gradient rows of linear layers are masked by output magnitude.

    For output j of a layer, n_j = sum over the step's tokens of |h_j|, padding too, as it was padded for the pass; row
    j of its weight's gradient is kept where n_j >= quantile(n, q). The layers are those of the adapter: each LoRA A and
    each LoRA B by its own output. What is trained but is no linear layer's weight is updated whole.
    """

    name = "migu"
    summary = "gradients of the adapter's outputs with the smallest magnitudes are masked"
    source = "Du et al. 2024, LoRA form; baseline of section 4"
    section = "migu"
    unused = ("outer_lr", "outer_batch_size", "memory_fraction", "memory_balanced")
    refused_options: ClassVar[Mapping[str, str]] = {"shard_base": "which would count some rows twice"}

    @classmethod
    def of_micro_batches(cls, config: RunConfig) -> str | None:
        return "share of padding in the magnitudes"

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        super().__init__(lm, config)
        self._active = False
        self._magnitudes: dict[str, Tensor] = {}
        self._layers: list[Segment] = []
        for segment in self.arena.segments:
            owner, _, attribute = segment.name.rpartition(".")
            module = lm.model.get_submodule(owner)
            if attribute == "weight" and isinstance(module, nn.Linear):
                self._layers.append(segment)
                module.register_forward_hook(self._observer(segment.name))

    def begin_task(self, index: int, memory: Sequence[Encoded]) -> None:
        super().begin_task(index, memory)
        self._active = index > 0
        self._magnitudes.clear()

    def modify_gradient(self) -> None:
        if not self._active or not self._layers:
            return
        # a layer that no forward pass reached has no gradient either
        magnitudes = [
            self._magnitudes[s.name] if s.name in self._magnitudes else self.arena.grad.new_zeros(s.shape[0])
            for s in self._layers
        ]
        summed = all_reduce_(torch.cat(magnitudes)).split([len(n) for n in magnitudes])
        for segment, n in zip(self._layers, summed, strict=True):
            keep = n >= n.quantile(self.config.migu.quantile)
            segment.view(self.arena.grad).mul_(keep[:, None])
        self._magnitudes.clear()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "active": self._active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._active = state["active"]

    def _observer(self, name: str) -> Any:
        def observe(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self._active and torch.is_grad_enabled():
                n = output.detach().float().abs().flatten(0, -2).sum(0)
                self._magnitudes[name] = self._magnitudes[name] + n if name in self._magnitudes else n

        return observe
