"""Products with the adapter in bf16 while its weights stay fp32: no casts of activations and weights in each layer."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kif.arena import ParameterArena, Segment
from kif.families import LanguageModel


class BF16Adapter:
    """LoRA pairs that multiply in bf16 in training, with fp32 master weights, gradients and moments in the arena.

    PEFT turns the input of every layer with LoRA into fp32 and the result back. Here the whole arena is turned into
    bf16 once before each forward pass, in one operation, and the layers read views of that copy. A gradient is rounded
    to bf16 once, as under autocast. W x + scaling B A x takes no passes for scaling and adding, which PEFT has: B's
    product is added to that of W as it is made. Layers whose input is fp32, and all layers in evaluation, do what PEFT
    does.

    Args:
        lm: model with LoRA layers by PEFT, without DoRA and bias; it keeps the changed layers for good.
        arena: holds their parameters.

    Attributes:
        shadow: flat bf16 copy of the arena's weights, of the present forward pass.
    """

    def __init__(self, lm: LanguageModel, arena: ParameterArena) -> None:
        from peft.tuners.lora import Linear, LoraLayer

        self.arena = arena
        self._layers: list[tuple[Segment, _Linear]] = []
        for module in lm.model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False
            if type(module) is Linear:
                module.__class__ = _pair(Linear)
        for segment in arena.segments:
            owner, _, attribute = segment.name.rpartition(".")
            module = lm.model.get_submodule(owner)
            if (
                attribute == "weight"
                and isinstance(module, nn.Linear)
                and owner.split(".")[-2:-1] in (["lora_A"], ["lora_B"])
            ):
                # a class of its own and not a function for each layer, which torch.compile would trace for each layer
                module.__class__ = _Linear
                self._layers.append((segment, cast(_Linear, module)))
        self._round()
        # not at the base: PEFT before 0.21 calls its `forward`, past its hooks
        lm.model.register_forward_pre_hook(self._refresh)

    def _refresh(self, model: nn.Module, inputs: Any) -> None:
        if model.training:
            self._round()

    def _round(self) -> None:
        # a new tensor: the pass before may still wait for its backward
        self.shadow = self.arena.data.to(torch.bfloat16)
        for segment, layer in self._layers:
            layer.shadow = self.shadow[segment.start : segment.start + segment.numel]


class _Linear(nn.Linear):
    """A layer of LoRA; `shadow`: its weight in bf16, flat, of the present forward pass."""

    shadow: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.dtype == torch.bfloat16:
            return F.linear(x, self.rounded())
        return F.linear(x.to(self.weight.dtype), self.weight)

    def rounded(self) -> Tensor:
        # its shape here and not before: torch.compile would take a rank of 8 for a batch of 8
        weight: Tensor = _Shadow.apply(self.weight, self.shadow.view(self.weight.shape))
        return weight


@cache
def _pair(kind: Any) -> Any:
    """PEFT's layer of a linear one and a LoRA pair, whose second product is scaled and added as it is made."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        # of a frozen or merged adapter, of several, of DoRA PEFT knows more; hooks want to be called
        if (
            args or kwargs or not self.training or x.dtype != torch.bfloat16 or self.disable_adapters or self.merged
            or len(names) != 1 or names[0] in self.lora_variant
            or not (_plain(self.base_layer, nn.Linear) and _plain(self.lora_B[names[0]], _Linear))
        ):  # fmt: skip
            return kind.forward(self, x, *args, **kwargs)
        (name,) = names
        # in two dimensions, or what is added to would be a view
        result = self.base_layer(x.flatten(0, -2))
        within = self.lora_A[name](self.lora_dropout[name](x)).flatten(0, -2)
        second = self.lora_B[name].rounded().t()
        return result.addmm_(within, second, alpha=self.scaling[name]).unflatten(0, x.shape[:-1])

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _plain(module: nn.Module, kind: type) -> bool:
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


class _Shadow(torch.autograd.Function):
    """A bf16 copy in the place of the fp32 weight, which gets the gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[0].float(), None
