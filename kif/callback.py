"""Importance scores in a Trainer of one's own: `KIFCallback` looks at weights and gradients and changes nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from kif.distributed import is_spread
from kif_kernels import importance_ema_, importance_threshold

IMPORTANCE_FILE = "kif_importance.safetensors"
"""In a checkpoint folder, the importance of each parameter by name."""


class KIFCallback(TrainerCallback):
    """Keeps I <- alpha * I + (1 - alpha) * |w * grad| of all trainable parameters (Eq. 3, 4), from I = 0.

    It is updated before each optimizer step, with the gradient that the optimizer gets: of the whole step, averaged
    over processes and, by the Trainer's default, clipped (`max_grad_norm=0` turns that off).

    Args:
        alpha: EMA factor, in [0, 1].
        save: write `IMPORTANCE_FILE` into each of the Trainer's checkpoints and continue from it when training is
            resumed from one of them in `output_dir`; where it is not there, a warning says so.

    Attributes:
        importance: float32 tensors in the parameters' shapes, by the names of `model.named_parameters()`.

    Raises: ValueError for an alpha outside [0, 1]; in training, naming a parameter of another dtype than float32,
        bfloat16 and float16 or one that is a DTensor, and for `save` in `hyperparameter_search`.
    """

    def __init__(self, alpha: float = 0.55, save: bool = False) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        self.alpha, self.save = alpha, save
        self.importance: dict[str, Tensor] = {}

    def mask(self, density: float) -> dict[str, Tensor]:
        """Bool tensors: the `density` most important elements over all parameters together (Eq. 8).

        Raises: ValueError before any step, or for a density outside [0, 1].
        """
        if not self.importance:
            raise ValueError("there is no importance yet: train first")
        scores = torch.cat([score.flatten() for score in self.importance.values()])
        threshold = importance_threshold(scores, density)
        return {name: score >= threshold for name, score in self.importance.items()}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or parameter.grad is None:
                continue
            if is_spread(parameter):
                raise ValueError(f"KIFCallback cannot score parameter {name}, which is spread over processes (FSDP)")
            if name not in self.importance:
                self.importance[name] = torch.zeros_like(parameter, dtype=torch.float32)
            try:
                importance_ema_(self.importance[name], parameter.detach(), parameter.grad, self.alpha)
            except ValueError as error:
                raise ValueError(f"KIFCallback cannot score parameter {name}: {error}") from error

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.importance = {}
        if self.save and state.is_hyper_param_search:
            raise ValueError(
                "KIFCallback(save=True) does not work in hyperparameter_search, which does not tell callbacks where "
                "its checkpoints lie: leave out save"
            )
        file = _file(args, state)
        if self.save and state.global_step and not file.is_file():
            warnings.warn(f"{file} does not exist: importance begins anew at step {state.global_step}", stacklevel=2)
        elif self.save and state.global_step:
            from safetensors.torch import load_file

            devices = {name: parameter.device for name, parameter in model.named_parameters()}
            self.importance = {name: score.to(devices[name]) for name, score in load_file(file).items()}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.save and self.importance and state.is_world_process_zero:
            from safetensors.torch import save_file

            save_file({name: score.cpu() for name, score in self.importance.items()}, _file(args, state))


def _file(args: Any, state: Any) -> Path:
    """Where the importance lies in the Trainer's checkpoint after the present step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / IMPORTANCE_FILE
