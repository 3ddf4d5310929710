"""Recurrent-KIF: the method of the paper, through the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kif.config import PRESETS, KIFConfig, RunConfig
from kif.engine import RecurrentKIF
from kif.families import Encoded, LanguageModel
from kif.methods.base import Method, optimizer_config


class RecurrentKIFMethod(Method):
    """Rounds of Q inner and M outer steps with fusion; the first task, without memory, is plain LoRA (Algorithm 1)."""

    name = "recurrent-kif"
    summary = "inner loop on the new task, outer loop on replay memory, fused through importance masks"
    source = "Recurrent-KIF, section 3 and Algorithm 1"
    section = "kif"
    plain_passes = True

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        super().__init__(lm, config)
        self.engine = RecurrentKIF(self.arena, config.kif, optimizer_config(config))
        self.stopwatch = self.engine.stopwatch
        self._has_memory = False

    @property
    def label(self) -> str:
        return f"{self.name} {variant(self.config.kif)}"

    @property
    def skipped(self) -> int:
        return int(self.engine.skipped.item())

    @property
    def kept(self) -> dict[str, float] | None:
        """Means over the present task's rounds: `inner`, `outer` and `both` masks."""
        if not self.engine.rounds:
            return None
        total = self.engine.rounds * self.arena.numel
        counts = self.engine.kept.tolist()
        return {name: count / total for name, count in zip(("inner", "outer", "both"), counts, strict=True)}

    def unreached(self) -> list[str]:
        return self.engine.inner_optimizer.unreached()

    @property
    def inner_steps(self) -> int:
        return self.config.kif.inner_steps

    @property
    def outer_steps(self) -> int:
        return self.config.kif.outer_steps if self._has_memory else 0

    def begin_task(self, index: int, memory: Sequence[Encoded]) -> None:
        self._has_memory = bool(memory)
        self.engine.begin_task()

    def inner_step(self, lr: float) -> None:
        if self._has_memory:
            self.engine.inner_step(lr)
        else:
            self.engine.plain_step(lr)

    def outer_step(self, lr: float) -> None:
        self.engine.outer_step(lr)

    def end_round(self) -> None:
        if self._has_memory:
            self.engine.fuse()

    def state_dict(self) -> dict[str, Any]:
        return {"engine": self.engine.state_dict(), "has_memory": self._has_memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.engine.load_state_dict(state["engine"])
        self._has_memory = state["has_memory"]


def variant(kif: KIFConfig) -> str:
    """The preset that is nearest and every switch that differs from it: `paper (M=4, density=0.5)`."""

    def changes(preset: str) -> dict[str, Any]:
        base = asdict(KIFConfig.preset(preset, outer_steps=kif.outer_steps))
        return {name: value for name, value in asdict(kif).items() if value != base[name]}

    nearest = min(PRESETS, key=lambda preset: len(changes(preset)))
    parts = [f"M={kif.outer_steps}", *(f"{name}={value}" for name, value in changes(nearest).items())]
    return f"{nearest} ({', '.join(parts)})"
