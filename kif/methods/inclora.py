"""IncLoRA: a new LoRA for each task, the old ones frozen and summed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kif.config import RunConfig
from kif.families import Encoded, LanguageModel
from kif.methods.base import SingleAdapterMethod
from kif.methods.lora_layers import lora_layers


class IncLoRA(SingleAdapterMethod):
    """y = W x + s sum_{k<t} B_k A_k x + s B_t A_t x; only A_t and B_t are trained in task t. LoRA's x is after dropout.

    The old pairs are kept as one pair each layer, [A_1; ...; A_{t-1}] and [B_1 ... B_{t-1}], whose product is the sum.
    A saved adapter is a plain LoRA of rank t * r with that and the new pair. What the adapter trains besides LoRA
    (a classification layer) goes on over all tasks.
    """

    name = "inclora"
    summary = "a new LoRA adapter for each task; the old ones stay, frozen"
    source = "O-LoRA's repository without its penalty; baseline (2) of section 4"
    unused: ClassVar[tuple[str, ...]] = ("outer_lr", "outer_batch_size", "memory_fraction", "memory_balanced")

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        super().__init__(lm, config)
        self.layers = lora_layers(lm.model)
        self.old: dict[str, tuple[Tensor, Tensor]] = {}
        self._inputs: dict[str, Tensor] = {}
        for name, module in self.layers.items():
            module.lora_A["default"].register_forward_pre_hook(self._keeper(name))
            module.register_forward_hook(self._adder(name))

    def begin_task(self, index: int, memory: Sequence[Encoded]) -> None:
        super().begin_task(index, memory)
        if index > 0:
            self._freeze(index)

    def save_adapter(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu() for name, tensor in get_peft_model_state_dict(self.lm.model).items()}
        rank = 1
        for layer, (a, b) in self.old.items():
            tensors[f"{layer}.lora_A.weight"] = torch.cat([a.cpu(), tensors[f"{layer}.lora_A.weight"]])
            tensors[f"{layer}.lora_B.weight"] = torch.cat([b.cpu(), tensors[f"{layer}.lora_B.weight"]], 1)
            rank = 1 + len(a) // self.layers[layer].r["default"]
        super().save_adapter(folder)
        if self.old:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                folder / "adapter_model.safetensors",
                metadata={"format": "pt"},
            )
            _scale_rank(folder / "adapter_config.json", rank)

    def state_dict(self) -> dict[str, Any]:
        old = {f"{name}.{part}": pair[i] for name, pair in self.old.items() for i, part in enumerate("AB")}
        return {**super().state_dict(), "old": old}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        old = state["old"]
        device = self.arena.device
        self.old = {
            name: (old[f"{name}.A"].to(device), old[f"{name}.B"].to(device))
            for name in self.layers
            if f"{name}.A" in old
        }

    @torch.no_grad()
    def _freeze(self, index: int) -> None:
        """Add the trained pairs to the old ones and start new pairs, as PEFT initialises them."""
        generator = torch.Generator().manual_seed(self.config.seed * 1000 + index)
        for name, module in self.layers.items():
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            if name in self.old:
                self.old[name] = (torch.cat([self.old[name][0], a]), torch.cat([self.old[name][1], b], 1))
            else:
                self.old[name] = (a.detach().clone(), b.detach().clone())
            fresh = torch.empty(a.shape)
            nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=generator)
            a.copy_(fresh)
            b.zero_()

    def _weigh_old(self, hidden: Tensor) -> Tensor:
        """What the old B are applied to, of (rows, positions, old ranks)."""
        return hidden

    def _keeper(self, name: str) -> Any:
        def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
            if name in self.old:
                self._inputs[name] = inputs[0]

        return keep

    def _adder(self, name: str) -> Any:
        def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name not in self.old or module.disable_adapters:
                return output
            a, b = self.old[name]
            x = self._inputs.pop(name).to(a.dtype)
            return output + (self._weigh_old(x @ a.T) @ b.T * module.scaling["default"]).to(output.dtype)

        return add


def _scale_rank(path: Path, factor: int) -> None:
    """A LoRA of `factor` times the rank in every layer with the same scale, alpha / r or alpha / sqrt(r)."""
    import json

    config = json.loads(path.read_text(encoding="utf-8"))
    config["r"] *= factor
    config["rank_pattern"] = {key: rank * factor for key, rank in config["rank_pattern"].items()}
    config["lora_alpha"] *= factor**0.5 if config["use_rslora"] else factor
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
