"""AdamW on a parameter arena: one flat update, clipping and the non-finite check on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kif.arena import ParameterArena
from kif_kernels import adamw_importance_, backend_name


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
class GradientState:
    """What a step does with its gradient: both 0-d tensors on the device.

    Args:
        scale: clipping factor min(1, max_grad_norm / norm), float32.
        skip: true when the norm is not finite; then the step changes nothing.
    """

    scale: Tensor
    skip: Tensor


def inspect_gradient(grad: Tensor, max_grad_norm: float) -> GradientState:
    """Global-norm clipping factor and non-finite flag of a flat gradient, without a host sync.

    The factor is torch.nn.utils.clip_grad_norm_'s max_grad_norm / (norm + 1e-6), at most 1. A norm that overflows
    float32 counts as not finite.
    """
    norm = torch.linalg.vector_norm(grad)
    scale = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if max_grad_norm > 0 else torch.ones_like(norm)
    return GradientState(scale=scale, skip=~norm.isfinite())


class ArenaAdamW:
    """AdamW over an arena. Moments are arena buffers `<name>.exp_avg` and `<name>.exp_avg_sq`.

    Args:
        arena: the parameters.
        name: prefix of its buffers; two optimizers on one arena need two names.
        config: hyperparameters.

    Attributes:
        skipped: 0-d tensor on the device, steps skipped because of a non-finite gradient, over all tasks.

    Raises: ValueError when KIF_BACKEND names no implementation.
    """

    def __init__(self, arena: ParameterArena, name: str, config: OptimizerConfig) -> None:
        backend_name(arena.device.type)  # an impossible KIF_BACKEND is refused here, not ignored
        self.arena, self.name, self.config = arena, name, config
        self._steps = torch.zeros((), dtype=torch.float64, device=arena.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=arena.device)
        self.reset()

    def reset(self) -> None:
        """Forget the moments and the step count."""
        for moment in ("exp_avg", "exp_avg_sq"):
            self.arena.buffer(f"{self.name}.{moment}").zero_()
        self._steps.zero_()

    def step(self, lr: float, gradient: GradientState) -> None:
        """One update of every parameter from `arena.grad`; a skipped step is not counted in the bias correction."""
        if self._steps.device != self.arena.device:
            self._steps, self.skipped = self._steps.to(self.arena.device), self.skipped.to(self.arena.device)
        self.skipped += gradient.skip
        self._steps += (~gradient.skip).to(self._steps.dtype)
        adamw_importance_(
            self.arena.data,
            self.arena.grad,
            self.arena.buffer(f"{self.name}.exp_avg"),
            self.arena.buffer(f"{self.name}.exp_avg_sq"),
            None,
            lr=lr,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            # a skipped first step must not divide by 1 - beta**0
            step=self._steps.clamp(min=1.0),
            decay=0.0,
            grad_scale=gradient.scale,
            skip=gradient.skip,
        )

    def state_dict(self) -> dict[str, Any]:
        """The counts; the moments are saved with the arena."""
        return {"steps": self._steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps.copy_(state["steps"])
        self.skipped.copy_(state["skipped"])
