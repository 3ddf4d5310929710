"""O-LoRA: a new LoRA for each task, in a subspace orthogonal to those of the old ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kif.families import Encoded
from kif.methods.inclora import IncLoRA


class OLoRA(IncLoRA):
    """IncLoRA with loss + orthogonal * sum |A_old A_new^T| + norm * sum (||A_new||_2 + ||B_new||_2), over all layers.

    The first sum is over the elements of the product of the stacked old A with the new one, and empty in the first
    task; the norms are not squared.
    """

    name = "olora"
    summary = "IncLoRA with a penalty that keeps the new LoRA orthogonal to the old ones"
    source = "Wang et al. 2023; baseline of section 4"
    section = "olora"

    def loss(self, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
        loss, count = super().loss(rows)
        return loss + count * self.penalty(), count

    def penalty(self) -> Tensor:
        """The two terms, a 0-d tensor with gradient."""
        config = self.config.olora
        total = torch.zeros((), device=self.arena.device)
        for name, module in self.layers.items():
            a, b = _weights(module)
            if config.orthogonal and name in self.old:
                total = total + config.orthogonal * (self.old[name][0] @ a.T).abs().sum()
            if config.norm:
                total = total + config.norm * (a.norm() + b.norm())
        return total


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    return module.lora_A["default"].weight, module.lora_B["default"].weight
