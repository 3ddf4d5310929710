"""Recurrent-KIF on a parameter arena: Algorithm 1 without model and data.

A round is Q x `inner_step`, M x `outer_step`, `fuse`. The caller computes gradients (backward into the arena)
before each step.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import kif_kernels
from kif.arena import ParameterArena
from kif.config import KIFConfig
from kif.optimizer import ArenaAdamW, OptimizerConfig, Scoring
from kif.timing import Stopwatch


class RecurrentKIF:
    """Inner and outer updates, importances, thresholds and fusion (section 3, Algorithm 1).

    Flat arena buffers: `theta_start` (theta_b), `theta_inner` (theta_b(Q)), `importance_in`, `importance_out`, and
    `uncertainty_in`, `uncertainty_out` with `score=ema_uncertainty`. A step is one pass over the parameters after
    that over the gradient's norm: importance, snapshots, zeroing the gradient, and in the last step of
    each loop (the configured Q-th and M-th) the counting for the thresholds, are part of the optimizer's pass.

    Args:
        arena: the trainable parameters; gradients are read from `arena.grad` and zeroed after each step. Inside a
            round nothing else may change the weights.
        config: switches of the method.
        optimizer: hyperparameters of AdamW, for both loops.
        shards: processes whose arenas together are the parameters, such as shards of a large adapter. Gradient norm and
            thresholds are then those of all elements, equal on all processes; the thresholds are exact.
            Default: this arena holds all parameters (as each process does in data-parallel training).

    Attributes:
        stopwatch: seconds spent in `optimizer` (with importance), `threshold` and `fusion`.
        kept: int64 [3] on the device: elements that the inner, the outer and both masks held, over the rounds
            of the present task.
        rounds: rounds of the present task that were fused.

    Raises: TypeError for a config that is no KIFConfig; ValueError for switches that cannot be honoured with `shards`.
    """

    def __init__(
        self,
        arena: ParameterArena,
        config: KIFConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        shards: dist.ProcessGroup | None = None,
    ) -> None:
        self.arena, self.shards = arena, shards
        self.config = KIFConfig() if config is None else config
        if not isinstance(self.config, KIFConfig):
            raise TypeError(f"config must be a KIFConfig, got {type(config).__name__}: KIFConfig(**fields) makes one")
        self.optimizer_config = optimizer or OptimizerConfig()
        self._total = arena.numel if shards is None else self._total_of(shards)
        self.inner_optimizer = ArenaAdamW(arena, "inner", self.optimizer_config, shards)
        self.outer_optimizer = self.inner_optimizer
        if self.config.outer_optimizer == "own":
            self.outer_optimizer = ArenaAdamW(arena, "outer", self.optimizer_config, shards)
        self.stopwatch = Stopwatch()
        self.kept = torch.zeros(3, dtype=torch.int64, device=arena.device)
        self._segments = None
        if self.config.threshold_scope == "tensor":
            self._segments = kif_kernels.Segments.of([(s.start, s.numel) for s in arena.segments])
        self._selection = self._new_selection()
        self.begin_task()

    @classmethod
    def of(
        cls, model: nn.Module, config: KIFConfig | None = None, optimizer: OptimizerConfig | None = None
    ) -> RecurrentKIF:
        """An engine on an arena of the model's trainable parameters."""
        return cls(ParameterArena.of(model), config, optimizer)

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
        self._selection.reset()
        self.kept.zero_()
        self.rounds = 0
        self._begin_round()

    def plain_step(self, lr: float) -> None:
        """An AdamW step without importance: the first task, which has no memory to fuse with, is plain LoRA.

        Raises: RuntimeError inside a round, which must be ended by `fuse` first.
        """
        if self._inner_done:
            raise RuntimeError("plain_step in the middle of a round: call fuse first")
        self.arena.check()
        with self.stopwatch.section("optimizer", self.arena.device):
            self.inner_optimizer.step(lr)

    def inner_step(self, lr: float) -> None:
        """A step on the new task: AdamW and importance (Eq. 3, 4). The first of a round keeps theta_b.

        Raises: RuntimeError after outer steps of the same round.
        """
        if self._outer_done:
            raise RuntimeError("inner_step after outer_step: call fuse to end the round first")
        self.arena.check()
        first, last = self._inner_done == 0, self._inner_done + 1 == self.config.inner_steps
        with self.stopwatch.section("optimizer", self.arena.device):
            self.inner_optimizer.step(
                lr,
                self._scoring("in", self.config.alpha1, reset=first, count=last),
                snapshot_before=self.arena.buffer("theta_start") if first else None,
                snapshot_after=self.arena.buffer("theta_inner") if last else None,
            )
        self._has_theta_inner = last
        self._inner_done += 1

    def outer_step(self, lr: float) -> None:
        """A step on replay memory: AdamW and importance (Eq. 7). The first of a round keeps theta_b(Q).

        Raises: RuntimeError before any inner step of the round.
        """
        if not self._inner_done:
            raise RuntimeError("outer_step before inner_step: a round starts with the new task")
        self.arena.check()
        self._keep_theta_inner()
        alpha2 = self.config.alpha2
        decay = 1.0 - alpha2 if self.config.alpha2_weighs == "new" else alpha2
        last = self._outer_done + 1 == self.config.outer_steps
        with self.stopwatch.section("optimizer", self.arena.device):
            # "- DIE": what the first round of a task found stays
            frozen = self.config.history == "frozen" and self.rounds > 0
            self.outer_optimizer.step(lr, None if frozen else self._scoring("out", decay, reset=False, count=last))
        self._outer_done += 1

    def fuse(self) -> None:
        """End the round: thresholds (Eq. 8) and fusion of both task vectors (Eq. 9).

        A round that had no outer step (the last one of a task may be that short) has an outer task vector of 0.
        Raises: RuntimeError before any inner step of the round.
        """
        if not self._inner_done:
            raise RuntimeError("fuse before inner_step: there is nothing to fuse")
        arena = self.arena
        arena.check()
        self._keep_theta_inner()
        if self.kept.device != arena.device:
            self.kept = self.kept.to(arena.device)
        if self.config.fusion in ("global-merge", "adaptive"):
            with self.stopwatch.section("fusion", arena.device):
                self._weighted_fusion()
        else:
            self._masked_fusion()
        arena.changed()
        self.rounds += 1
        self._begin_round()

    def _masked_fusion(self) -> None:
        arena = self.arena
        with self.stopwatch.section("threshold", arena.device):
            threshold_in, threshold_out = self._thresholds()
        uncertainty_in, uncertainty_out = self._uncertainties() or (None, None)
        with self.stopwatch.section("fusion", arena.device):
            kif_kernels.fuse_(
                arena.data,
                arena.buffer("theta_start"),
                arena.buffer("theta_inner"),
                arena.buffer("importance_in"),
                arena.buffer("importance_out"),
                threshold_in,
                threshold_out,
                kif_kernels.FUSION_TABLES[self.config.fusion],
                strict=self.config.mask == "above",
                uncertainty_in=uncertainty_in,
                uncertainty_out=uncertainty_out,
                # weights may be changed between rounds, so the next round keeps its own theta_start
                write_start=False,
                kept=self.kept,
                numel=arena.numel,
                segments=self._segments,
            )

    def _weighted_fusion(self) -> None:
        """theta <- theta_b + w * tau_in + (1 - w) * tau_out, w = I_in / (I_in + I_out), 1/2 where both are 0."""
        arena = self.arena
        inner, outer = self._scores()
        if self.config.fusion == "global-merge":
            inner, outer = inner.sum(), outer.sum()
            if self.shards is not None:
                dist.all_reduce(inner, group=self.shards)
                dist.all_reduce(outer, group=self.shards)
        total = inner + outer
        w = torch.where(total > 0, inner / total, 0.5)
        start, middle = arena.buffer("theta_start"), arena.buffer("theta_inner")
        arena.data.copy_(start + w * (middle - start) + (1.0 - w) * (arena.data - middle))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; tensors are live ones, not copies."""
        return {
            "arena": self.arena.state_dict(),
            "inner_optimizer": self.inner_optimizer.state_dict(),
            "outer_optimizer": self.outer_optimizer.state_dict(),
            "selection": self._selection.state_dict(),
            "kept": self.kept,
            "rounds": self.rounds,
            "inner_done": self._inner_done,
            "outer_done": self._outer_done,
            "has_theta_inner": self._has_theta_inner,
            "counted": dict(self._counted),
            "config": asdict(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, in the middle of a round too.

        Raises: ValueError naming a switch that differs from the saved engine's; ArenaError when the layout differs.
        """
        now = asdict(self.config)
        # a state saved before switches were saved has none
        for name, then in state.get("config", now).items():
            if then != now.get(name):
                raise ValueError(
                    f"the saved state is of kif.{name}={then!r}, here it is {now.get(name)!r}: continue with the "
                    "switches that it was saved with"
                )
        self.arena.load_state_dict(state["arena"])
        self.inner_optimizer.load_state_dict(state["inner_optimizer"])
        self.outer_optimizer.load_state_dict(state["outer_optimizer"])
        self.kept.copy_(state["kept"])
        self.rounds = state["rounds"]
        self._inner_done, self._outer_done = state["inner_done"], state["outer_done"]
        self._has_theta_inner = state["has_theta_inner"]
        # a state from another kind of device has no counts: they are taken anew
        fits = self._selection.load_state_dict(state["selection"])
        self._counted = {side: fits and counted for side, counted in state["counted"].items()}

    def _begin_round(self) -> None:
        self._inner_done = self._outer_done = 0
        self._has_theta_inner = False
        self._counted = {"in": False, "out": False}

    def _scoring(self, side: str, decay: float, *, reset: bool, count: bool) -> Scoring:
        arena, config = self.arena, self.config
        selection = self._selection_here()
        index = 0 if side == "in" else 1
        count = count and config.threshold != "interpolated" and self.shards is None
        self._counted[side] = count
        return Scoring(
            importance=arena.buffer(f"importance_{side}"),
            decay=decay,
            reset=reset,
            after_update=config.importance_at == "update",
            of_gradient=config.importance_of == "gradient",
            uncertainty=arena.buffer(f"uncertainty_{side}") if config.score == "ema_uncertainty" else None,
            uncertainty_decay=config.uncertainty_decay,
            histogram=selection.histogram(index) if count else None,
            window=selection.window(index) if count else None,
        )

    def _keep_theta_inner(self) -> None:
        """theta_b(Q), where the inner loop ended before its configured last step."""
        if not self._has_theta_inner:
            with self.stopwatch.section("fusion", self.arena.device):
                self.arena.buffer("theta_inner").copy_(self.arena.data)
            self._has_theta_inner = True

    def _thresholds(self) -> tuple[Tensor, Tensor]:
        """Of the inner and the outer scores: 0-d, or one for each tensor."""
        if self.shards is not None:
            return self._sharded_threshold("in"), self._sharded_threshold("out")
        if self.config.threshold != "interpolated":
            selection = self._selection_here()
            scores = (self.arena.buffer("importance_in"), self.arena.buffer("importance_out"))
            found = selection.select(scores, self._uncertainties() or (), counted=all(self._counted.values()))
            return (found[0], found[1]) if self._segments else (found[0, 0], found[1, 0])
        inner, outer = self._scores()
        return self._quantile(inner), self._quantile(outer)

    def _sharded_threshold(self, side: str) -> Tensor:
        arena = self.arena
        return kif_kernels.sharded_threshold(
            arena.buffer(f"importance_{side}"),
            self.config.density,
            self.shards,
            numel=arena.numel,
            total=self._total,
            uncertainty=arena.buffer(f"uncertainty_{side}") if self.config.score == "ema_uncertainty" else None,
        )

    def _total_of(self, shards: dist.ProcessGroup) -> int:
        """Elements of all shards."""
        refused = {"threshold": "interpolated", "threshold_scope": "tensor"}
        for name, value in refused.items():
            if getattr(self.config, name) == value:
                raise ValueError(f"kif.{name}={value} does not work with shards: a tensor may lie on several processes")
        total = torch.tensor(self.arena.numel, dtype=torch.int64, device=self.arena.device)
        dist.all_reduce(total, group=shards)
        return int(total)

    def _scores(self) -> tuple[Tensor, Tensor]:
        """What is compared: importance, or importance * uncertainty."""
        inner, outer = self.arena.buffer("importance_in"), self.arena.buffer("importance_out")
        factors = self._uncertainties()
        return (inner * factors[0], outer * factors[1]) if factors else (inner, outer)

    def _uncertainties(self) -> tuple[Tensor, Tensor] | None:
        if self.config.score == "ema":
            return None
        return self.arena.buffer("uncertainty_in"), self.arena.buffer("uncertainty_out")

    def _quantile(self, scores: Tensor) -> Tensor:
        density = self.config.density
        if self._segments is None:
            return kif_kernels.importance_quantile(scores, density, numel=self.arena.numel)
        parts = [scores[s.start : s.start + s.numel] for s in self.arena.segments]
        return torch.stack([kif_kernels.importance_quantile(part, density) for part in parts])

    def _selection_here(self) -> kif_kernels.StreamingThreshold:
        """The selection on the arena's device; where the arena has moved, a new one, for which nothing is counted."""
        if self._selection.thresholds.device != self.arena.device:
            self._selection = self._new_selection()
            self._counted = {"in": False, "out": False}
        return self._selection

    def _new_selection(self) -> kif_kernels.StreamingThreshold:
        return kif_kernels.StreamingThreshold(
            self.config.density,
            self.arena.numel,
            sides=2,
            segments=self._segments,
            exact=self.config.threshold != "approximate",
            device=self.arena.device,
        )
