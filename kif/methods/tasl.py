"""TaSL: which adapter matrices a task needs, and a merge of the models before and after it by that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kif.config import RunConfig
from kif.families import Encoded, LanguageModel
from kif.methods.base import SingleAdapterMethod
from kif.optimizer import Scoring


class TaSL(SingleAdapterMethod):
    """Trains as SeqLoRA; after each task but the first, every unit (each A, each B) is merged with its old self.

    Score of a unit: the mean over its elements of E * U, the EMAs of |w * g| and of its deviation, min-max normalised
    over the units. A unit is important above the `quantile` of the scores; asked of the new task's scores and of the
    history's. Where both say so w <- current * w_new + (1 - current) * w_old; only the history: w_old; only the new
    task: w_new; none: their mean. Then history <- minmax(current * new + (1 - current) * history). No memory is used.
    """

    name = "tasl"
    summary = "adapter matrices merged with their old values by how much the new and the old tasks need them"
    source = "Feng et al. 2024, LoRA form; baseline of section 4"
    section = "tasl"
    plain_passes = True
    unused = ("outer_lr", "outer_batch_size", "memory_fraction", "memory_balanced")

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        super().__init__(lm, config)
        self.history: Tensor | None = None

    def begin_task(self, index: int, memory: Sequence[Encoded]) -> None:
        super().begin_task(index, memory)
        self.arena.check()
        self.arena.buffer("old_weights").copy_(self.arena.data)
        for name in ("sensitivity", "uncertainty"):
            self.arena.buffer(name).zero_()

    def scoring(self) -> Scoring:
        decay = self.config.tasl.decay
        return Scoring(
            self.arena.buffer("sensitivity"),
            decay,
            uncertainty=self.arena.buffer("uncertainty"),
            uncertainty_decay=decay,
        )

    def end_task(self, index: int) -> None:
        products = self.arena.buffer("sensitivity") * self.arena.buffer("uncertainty")
        new = minmax(torch.stack([part.mean() for _, part in self.arena.views(products)]))
        if self.history is None:
            self.history = new
            return
        quantile, share = self.config.tasl.quantile, self.config.tasl.current
        weights = merge_weights(new > new.quantile(quantile), self.history > self.history.quantile(quantile), share)
        self.arena.check()
        old = self.arena.buffer("old_weights")
        for segment, weight in zip(self.arena.segments, weights, strict=True):
            part = segment.view(self.arena.data)
            part.copy_(torch.lerp(segment.view(old), part, weight))
        self.history = minmax(share * new + (1.0 - share) * self.history)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.history = state["history"]


def merge_weights(new_needs: Tensor, old_needs: Tensor, share: float) -> Tensor:
    """Weight of each unit's new value, float32, by whether the new task and the history need it."""
    with_new = torch.where(old_needs, share, 1.0)
    return torch.where(new_needs, with_new, torch.where(old_needs, 0.0, 0.5))


def minmax(scores: Tensor) -> Tensor:
    """Scaled to [0, 1]; all 0 where all are equal."""
    span = scores.max() - scores.min()
    return torch.where(span > 0, (scores - scores.min()) / span, 0.0)
