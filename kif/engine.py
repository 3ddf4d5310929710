"""Recurrent-KIF on a parameter arena: Algorithm 1 without model and data.

A round is Q x `inner_step`, M x `outer_step`, `fuse`. The caller computes gradients (backward into the arena)
before each step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

import kif_kernels
from kif.arena import ParameterArena
from kif.config import KIFConfig
from kif.optimizer import ArenaAdamW, GradientState, OptimizerConfig, inspect_gradient
from kif.timing import Stopwatch


class RecurrentKIF:
    """Inner and outer updates, importances, thresholds and fusion (section 3, Algorithm 1).

    Flat arena buffers: `theta_start` (theta_b), `theta_inner` (theta_b(Q)), `importance_in`, `importance_out`, and
    `uncertainty_in`, `uncertainty_out` with `score=ema_uncertainty`.

    Args:
        arena: the trainable parameters; gradients are read from `arena.grad` and zeroed after each step.
        config: switches of the method.
        optimizer: hyperparameters of AdamW, for both loops.

    Attributes:
        stopwatch: seconds spent in `optimizer`, `importance`, `threshold` and `fusion` (with its snapshots).
    """

    def __init__(
        self, arena: ParameterArena, config: KIFConfig | None = None, optimizer: OptimizerConfig | None = None
    ) -> None:
        self.arena = arena
        self.config = config or KIFConfig()
        self.optimizer_config = optimizer or OptimizerConfig()
        self.inner_optimizer = ArenaAdamW(arena, "inner", self.optimizer_config)
        shared = self.config.outer_optimizer == "shared"
        self.outer_optimizer = self.inner_optimizer if shared else ArenaAdamW(arena, "outer", self.optimizer_config)
        self.stopwatch = Stopwatch()
        self.begin_task()

    @property
    def skipped(self) -> Tensor:
        """0-d tensor on the device: steps skipped because of a non-finite gradient, over all tasks."""
        if self.outer_optimizer is self.inner_optimizer:
            return self.inner_optimizer.skipped
        return self.inner_optimizer.skipped + self.outer_optimizer.skipped

    def begin_task(self) -> None:
        """Forget moments and importances and start a round from the present weights."""
        self.inner_optimizer.reset()
        self.outer_optimizer.reset()
        for name in ("importance_in", "importance_out"):
            self.arena.buffer(name).zero_()
        if self.config.score == "ema_uncertainty":
            for name in ("uncertainty_in", "uncertainty_out"):
                self.arena.buffer(name).zero_()
        self._inner_done = self._outer_done = 0

    def plain_step(self, lr: float) -> None:
        """An AdamW step without importance: the first task, which has no memory to fuse with, is plain LoRA.

        Raises: RuntimeError inside a round, which must be ended by `fuse` first.
        """
        if self._inner_done:
            raise RuntimeError("plain_step in the middle of a round: call fuse first")
        self._step(self.inner_optimizer, lr, importance=None)

    def inner_step(self, lr: float) -> None:
        """A step on the new task: AdamW and importance (Eq. 3, 4). The first of a round keeps theta_b.

        Raises: RuntimeError after outer steps of the same round.
        """
        if self._outer_done:
            raise RuntimeError("inner_step after outer_step: call fuse to end the round first")
        if self._inner_done == 0:
            self.arena.check()
            with self._section("fusion"):
                self.arena.buffer("theta_start").copy_(self.arena.data)
            self.arena.buffer("importance_in").zero_()
            if self.config.score == "ema_uncertainty":
                self.arena.buffer("uncertainty_in").zero_()
        self._step(self.inner_optimizer, lr, lambda state: self._score("in", self.config.alpha1, state))
        self._inner_done += 1

    def outer_step(self, lr: float) -> None:
        """A step on replay memory: AdamW and importance (Eq. 7). The first of a round keeps theta_b(Q).

        Raises: RuntimeError before any inner step of the round.
        """
        if not self._inner_done:
            raise RuntimeError("outer_step before inner_step: a round starts with the new task")
        if self._outer_done == 0:
            self.arena.check()
            with self._section("fusion"):
                self.arena.buffer("theta_inner").copy_(self.arena.data)
        alpha2 = self.config.alpha2
        decay = 1.0 - alpha2 if self.config.alpha2_weighs == "new" else alpha2
        self._step(self.outer_optimizer, lr, lambda state: self._score("out", decay, state))
        self._outer_done += 1

    def fuse(self) -> None:
        """End the round: thresholds (Eq. 8) and fusion of both task vectors (Eq. 9).

        A round that had no outer step (the last one of a task may be that short) has an outer task vector of 0.
        Raises: RuntimeError before any inner step of the round.
        """
        if not self._inner_done:
            raise RuntimeError("fuse before inner_step: there is nothing to fuse")
        arena, config = self.arena, self.config
        arena.check()
        if not self._outer_done:
            with self._section("fusion"):
                arena.buffer("theta_inner").copy_(arena.data)
        with self._section("threshold"):
            scores_in, scores_out = self._thresholded("in"), self._thresholded("out")
        strict = config.mask == "above"
        table = kif_kernels.FUSION_TABLES[config.fusion]
        for part, numel in self._scopes():
            with self._section("threshold"):
                threshold_in = self._threshold(scores_in[part], numel)
                threshold_out = self._threshold(scores_out[part], numel)
            with self._section("fusion"):
                kif_kernels.fuse_(
                    arena.data[part],
                    arena.buffer("theta_start")[part],
                    arena.buffer("theta_inner")[part],
                    scores_in[part],
                    scores_out[part],
                    threshold_in,
                    threshold_out,
                    table,
                    strict=strict,
                )
        self._inner_done = self._outer_done = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; tensors are live ones, not copies."""
        return {
            "arena": self.arena.state_dict(),
            "inner_optimizer": self.inner_optimizer.state_dict(),
            "outer_optimizer": self.outer_optimizer.state_dict(),
            "inner_done": self._inner_done,
            "outer_done": self._outer_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, in the middle of a round too. Raises: ArenaError when the layout differs."""
        self.arena.load_state_dict(state["arena"])
        self.inner_optimizer.load_state_dict(state["inner_optimizer"])
        self.outer_optimizer.load_state_dict(state["outer_optimizer"])
        self._inner_done, self._outer_done = state["inner_done"], state["outer_done"]

    def _step(self, optimizer: ArenaAdamW, lr: float, importance: Callable[[GradientState], None] | None) -> None:
        self.arena.check()
        gradient = inspect_gradient(self.arena.grad, self.optimizer_config.max_grad_norm)
        if importance and self.config.importance_at == "gradient":
            importance(gradient)
        with self._section("optimizer"):
            optimizer.step(lr, gradient)
        if importance and self.config.importance_at == "update":
            self.arena.grad.mul_(gradient.scale)
            importance(gradient)
        self.arena.zero_grad()

    def _score(self, side: str, decay: float, gradient: GradientState) -> None:
        arena, config = self.arena, self.config
        with self._section("importance"):
            if config.score == "ema":
                kif_kernels.importance_ema_(
                    arena.buffer(f"importance_{side}"), arena.data, arena.grad, decay, skip=gradient.skip
                )
            else:
                kif_kernels.importance_uncertainty_ema_(
                    arena.buffer(f"importance_{side}"),
                    arena.buffer(f"uncertainty_{side}"),
                    arena.data,
                    arena.grad,
                    decay,
                    config.uncertainty_decay,
                    skip=gradient.skip,
                )

    def _section(self, name: str) -> AbstractContextManager[None]:
        return self.stopwatch.section(name, self.arena.device)

    def _thresholded(self, side: str) -> Tensor:
        importance = self.arena.buffer(f"importance_{side}")
        if self.config.score == "ema":
            return importance
        return importance * self.arena.buffer(f"uncertainty_{side}")

    def _threshold(self, scores: Tensor, numel: int) -> Tensor:
        if self.config.threshold == "interpolated":
            return kif_kernels.importance_quantile(scores, self.config.density, numel=numel)
        return kif_kernels.importance_threshold(scores, self.config.density, numel=numel)

    def _scopes(self) -> list[tuple[slice, int]]:
        """(part of the flat buffers, number of parameters in it) that share a threshold."""
        if self.config.threshold_scope == "global":
            return [(slice(None), self.arena.numel)]
        return [(slice(s.start, s.start + s.numel), s.numel) for s in self.arena.segments]
