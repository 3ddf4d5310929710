"""AdamW on a parameter arena: one flat update, clipping and the non-finite check on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from kif.arena import ParameterArena
from kif_kernels import (
    adamw_importance_,
    backend_name,
    gradient_state_,
    importance_ema_,
    importance_uncertainty_ema_,
)
from kif_kernels.checks import check_adamw


@dataclass(frozen=True)
class OptimizerConfig:
    """Hyperparameters of AdamW (Appendix D and the released code: no weight decay).

    Args:
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        max_grad_norm: the global gradient norm is clipped to this; 0 turns clipping off.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Scoring:
    """The importance to update in the optimizer's pass; arguments as `kif_kernels.adamw_importance_`.

    Args:
        importance: flat state.
        decay: weight of its old value.
        reset: take the old value as 0 (first step of a round).
        after_update: score the updated weight with the clipped gradient (released code).
        of_gradient: score |g| instead of |w * g|, in a pass of its own (Table 10).
        uncertainty, uncertainty_decay: state and EMA factor of the released code's second score.
        histogram, window: of a `kif_kernels.StreamingThreshold`, to count the new scores.
    """

    importance: Tensor
    decay: float
    reset: bool = False
    after_update: bool = False
    of_gradient: bool = False
    uncertainty: Tensor | None = None
    uncertainty_decay: float = 0.0
    histogram: Tensor | None = None
    window: Tensor | None = None


class ArenaAdamW:
    """AdamW over an arena. Moments are arena buffers `<name>.exp_avg` and `<name>.exp_avg_sq`.

    Args:
        arena: the parameters.
        name: prefix of its buffers; two optimizers on one arena need two names.
        config: hyperparameters.
        shards: processes whose arenas together are the parameters; clipping and skipping go by the norm over all of
            them. Default: this arena holds them all.

    Attributes:
        skipped: 0-d tensor on the device, steps skipped because of a non-finite gradient, over all tasks.

    Raises: ValueError when KIF_BACKEND names no implementation.
    """

    def __init__(
        self, arena: ParameterArena, name: str, config: OptimizerConfig, shards: dist.ProcessGroup | None = None
    ) -> None:
        backend_name(arena.device.type)  # an impossible KIF_BACKEND is refused here, not ignored
        self.arena, self.name, self.config, self.shards = arena, name, config, shards
        device = arena.device
        self._steps = torch.zeros((), dtype=torch.float64, device=device)
        self._scale = torch.ones((), dtype=torch.float32, device=device)
        self._skip = torch.zeros((), dtype=torch.bool, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget the moments and the step count."""
        for moment in ("exp_avg", "exp_avg_sq"):
            self.arena.buffer(f"{self.name}.{moment}").zero_()
        self._steps.zero_()

    def step(
        self,
        lr: float,
        scoring: Scoring | None = None,
        *,
        snapshot_before: Tensor | None = None,
        snapshot_after: Tensor | None = None,
    ) -> None:
        """One update of every parameter from `arena.grad`, which is zeroed; in three launches on a GPU.

        A gradient whose norm is not finite changes no weight, moment or importance, and is not counted in the bias
        correction.

        Args:
            lr: learning rate.
            scoring: importance to update in the same pass.
            snapshot_before, snapshot_after: flat buffers that receive the weights before and after the update.

        Raises: ValueError for a learning rate or hyperparameter out of its range, before anything changes.
        """
        arena, config = self.arena, self.config
        check_adamw(lr, config.betas, config.eps, config.weight_decay, step=1)
        if self._steps.device != arena.device:
            for name in ("_steps", "_scale", "_skip", "skipped"):
                setattr(self, name, getattr(self, name).to(arena.device))
        # one number has the norm that it is
        measured = arena.grad if self.shards is None else self._norm(self.shards).reshape(1)
        gradient_state_(measured, self._scale, self._skip, self._steps, self.skipped, max_norm=config.max_grad_norm)
        fused: dict[str, Any] = {"importance": None}
        if scoring is not None and scoring.of_gradient:
            self._score_gradient(scoring)
        elif scoring is not None:
            fused = {name: value for name, value in vars(scoring).items() if name != "of_gradient"}
        adamw_importance_(
            arena.data,
            arena.grad,
            arena.buffer(f"{self.name}.exp_avg"),
            arena.buffer(f"{self.name}.exp_avg_sq"),
            lr=lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            step=self._steps,
            grad_scale=self._scale,
            skip=self._skip,
            snapshot_before=snapshot_before,
            snapshot_after=snapshot_after,
            zero_grad=True,
            **fused,
        )
        arena.changed()

    def unreached(self) -> list[str]:
        """Names of the parameters whose gradient was 0 in all steps since `reset`. Waits for the device."""
        names, squares = zip(*self.arena.views(self.arena.buffer(f"{self.name}.exp_avg_sq")), strict=True)
        reached = torch.stack([square.any() for square in squares]).tolist()
        return [name for name, some in zip(names, reached, strict=True) if not some]

    def _norm(self, shards: dist.ProcessGroup) -> Tensor:
        """The gradient's norm over all shards, float32, 0-d."""
        norm, *unused = (torch.empty_like(scalar) for scalar in (self._scale, self._steps, self.skipped))
        gradient_state_(self.arena.grad, self._scale, self._skip, *unused, max_norm=0.0, norm=norm)
        squares = norm.double().square()
        dist.all_reduce(squares, group=shards)
        return squares.sqrt().float()

    def _score_gradient(self, scoring: Scoring) -> None:
        grad = self.arena.grad * self._scale if scoring.after_update else self.arena.grad
        one = torch.ones_like(grad)
        options: dict[str, Any] = {
            "reset": scoring.reset, "skip": self._skip, "histogram": scoring.histogram, "window": scoring.window,
        }  # fmt: skip
        if scoring.uncertainty is None:
            importance_ema_(scoring.importance, one, grad, scoring.decay, **options)
        else:
            importance_uncertainty_ema_(
                scoring.importance, scoring.uncertainty, one, grad, scoring.decay, scoring.uncertainty_decay, **options
            )

    def state_dict(self) -> dict[str, Any]:
        """The counts; the moments are saved with the arena."""
        return {"steps": self._steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps.copy_(state["steps"])
        self.skipped.copy_(state["skipped"])
