"""VR-MCL: meta-learning on new and memory rows, with a meta-gradient of reduced variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kif.config import RunConfig
from kif.distributed import all_reduce_
from kif.families import Encoded, LanguageModel, to_device
from kif.methods.base import Method
from kif_kernels import gradient_state_

Rows = Sequence[Encoded]


class VRMCL(Method):
    """Rounds of K inner SGD steps on the new task, then one meta-update of the weights the round began with.

    Inner: w <- w - alpha * g, with a learned rate alpha for each parameter. Meta-gradient at the end point w_b of
    round b, on the last new batch and a memory batch together, epsilon_b: g_b(w_b) = mean of the two gradients. Then
    d_b = g_b(w_b) + s * (d_{b-1} - g_b(w_{b-1})), both gradients on epsilon_b;   theta <- theta - eta * d_b
    alpha <- max(0, alpha + eta_alpha * d_b * sum of the round's inner gradients)

    First order: the derivative of w_b by theta is taken as 1. Gradients are clipped to `max_grad_norm`. Without an
    outer step (first task; a last round too short for one) the meta-gradient is of the last new batch. Rates and d are
    kept from task to task. A round costs up to three more backward passes than its steps.
    """

    name = "vr-mcl"
    summary = "meta-learning on new and memory rows with variance-reduced meta-gradients (first order)"
    source = "Wu et al. 2024, first order, on LoRA; baseline of section 4"
    section = "vrmcl"
    unused = ("lr", "outer_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "eps")
    refused_options: ClassVar[Mapping[str, str]] = {"shard_base": "whose meta-gradient takes passes of its own"}

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        super().__init__(lm, config)
        self._has_memory = False
        self._inner_done = 0
        self._seen: list[Rows] = []
        self._new_rows: list[Rows] = []
        device = self.arena.device
        self._scale = torch.ones((), dtype=torch.float32, device=device)
        self._skip = torch.zeros((), dtype=torch.bool, device=device)
        self._steps = torch.zeros((), dtype=torch.float64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.arena.buffer("inner_rates").fill_(config.vrmcl.inner_lr)

    @property
    def skipped(self) -> int:
        return int(self._skipped.item())

    @property
    def inner_steps(self) -> int:
        return self.config.vrmcl.inner_steps

    @property
    def outer_steps(self) -> int:
        return 1 if self._has_memory else 0

    def begin_task(self, index: int, memory: Sequence[Encoded]) -> None:
        self._has_memory = bool(memory)
        self._inner_done = 0
        self._seen.clear()

    def loss(self, rows: Rows) -> tuple[Tensor, int]:
        self._seen.append(rows)
        return super().loss(rows)

    def inner_step(self, lr: float) -> None:
        arena = self.arena
        arena.check()
        with self.stopwatch.section("optimizer", arena.device):
            if self._inner_done == 0:
                arena.buffer("start").copy_(arena.data)
                arena.buffer("inner_gradients").zero_()
            gradient = self._clipped()
            arena.buffer("inner_gradients").add_(gradient)
            arena.data.addcmul_(arena.buffer("inner_rates"), gradient, value=-1.0)
            arena.zero_grad()
        self._new_rows, self._seen = self._seen, []
        self._inner_done += 1

    def outer_step(self, lr: float) -> None:
        steps = [self._new_rows, self._seen]
        memory_gradient = self._clipped().clone()
        self._meta_update(steps, 0.5 * (memory_gradient + self._gradient([self._new_rows])))

    def end_round(self) -> None:
        if self._inner_done:
            self._meta_update([self._new_rows], self._gradient([self._new_rows]))

    def state_dict(self) -> dict[str, Any]:
        if self._inner_done:
            raise RuntimeError("VR-MCL is saved between rounds")
        return {
            "arena": self.arena.state_dict(),
            "has_memory": self._has_memory,
            "steps": self._steps,
            "skipped": self._skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.arena.load_state_dict(state["arena"])
        self._has_memory = state["has_memory"]
        self._steps.copy_(state["steps"])
        self._skipped.copy_(state["skipped"])

    def _meta_update(self, steps: list[list[Rows]], here: Tensor) -> None:
        arena, config = self.arena, self.config.vrmcl
        d = arena.buffer("meta_gradient")
        if "last_point" in arena.buffers and config.momentum > 0:
            point = arena.data.clone()
            arena.data.copy_(arena.buffer("last_point"))
            d.sub_(self._gradient(steps)).mul_(config.momentum).add_(here)
            arena.data.copy_(point)
        else:
            d.copy_(here)
        arena.buffer("last_point").copy_(arena.data)
        rates = arena.buffer("inner_rates")
        rates.addcmul_(d, arena.buffer("inner_gradients"), value=config.inner_lr_lr).clamp_(min=0.0)
        torch.add(arena.buffer("start"), d, alpha=-config.outer_lr, out=arena.data)
        arena.zero_grad()
        self._inner_done = 0
        self._seen = []

    def _gradient(self, steps: list[list[Rows]]) -> Tensor:
        """Mean over steps of the clipped gradient of a step's mean loss, at the present weights."""
        total = torch.zeros_like(self.arena.grad)
        for step in steps:
            self.arena.zero_grad()
            count = all_reduce_(to_device(torch.tensor(sum(map(self.lm.label_count, step))), total.device))
            for rows in step:
                loss, _ = self.lm.loss(self.lm.collate(rows))
                (loss / count).backward()
            self.arena.check()
            all_reduce_(self.arena.grad)
            total.add_(self._clipped(), alpha=1.0 / len(steps))
        self.arena.zero_grad()
        return total

    def _clipped(self) -> Tensor:
        """`arena.grad`, clipped in place; zeros where it is not finite."""
        grad = self.arena.grad
        gradient_state_(grad, self._scale, self._skip, self._steps, self._skipped, max_norm=self.config.max_grad_norm)
        return grad.copy_(torch.where(self._skip, 0.0, grad * self._scale))
