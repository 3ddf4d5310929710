"""EWC: a quadratic penalty on moving parameters that old tasks need."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from kif.distributed import all_reduce_, share
from kif.families import Encoded
from kif.methods.base import SingleAdapterMethod


class EWC(SingleAdapterMethod):
    """Loss = cross-entropy + strength * sum_i F_i (theta_i - theta*_i)^2, on the adapter.

    theta* are the weights at the end of the last task. F, the diagonal of the Fisher information, is the mean over rows
    of the squared gradient of a row's mean loss, without dropout; after each task F <- decay * F + F_task (online EWC).
    The penalty's gradient is added to the flat gradient, so it costs one pass and is clipped with the rest.
    """

    name = "ewc"
    summary = "a penalty on moving adapter parameters with high Fisher information for old tasks"
    source = "Kirkpatrick et al. 2017, online form of Schwarz et al. 2018; baseline (4) of section 4"
    section = "ewc"
    plain_passes = True
    unused = ("outer_lr", "outer_batch_size", "memory_fraction", "memory_balanced")
    refused_options: ClassVar[Mapping[str, str]] = {
        "shard_base": "whose Fisher information takes other passes in each process"
    }

    _rows: Sequence[Encoded] = ()

    def training_rows(self, rows: Sequence[Encoded], memory: Sequence[Encoded]) -> list[Encoded]:
        self._rows = list(rows)
        return list(rows)

    def modify_gradient(self) -> None:
        if "fisher" in self.arena.buffers:
            moved = self.arena.data - self.arena.buffer("anchor")
            self.arena.grad.addcmul_(self.arena.buffer("fisher"), moved, value=2.0 * self.config.ewc.strength)

    def end_task(self, index: int) -> None:
        count = min(self.config.ewc.fisher_rows, len(self._rows))
        chosen = random.Random(f"{self.config.seed}/fisher/{index}").sample(list(self._rows), count)
        fisher = torch.zeros_like(self.arena.grad)
        training = self.lm.model.training
        self.lm.model.eval()
        for row in share(chosen):
            self.arena.zero_grad()
            loss, labels = self.lm.loss(self.lm.collate([row]))
            (loss / labels).backward()
            self.arena.check()
            fisher.addcmul_(self.arena.grad, self.arena.grad, value=1.0 / count)
        self.arena.zero_grad()
        self.lm.model.train(training)
        # a row whose gradient is not finite tells nothing about what is important
        torch.nan_to_num_(all_reduce_(fisher), nan=0.0, posinf=0.0)
        self.arena.buffer("fisher").mul_(self.config.ewc.decay).add_(fisher)
        self.arena.buffer("anchor").copy_(self.arena.data)
