"""What is measured: the operations of the method, the bytes they must move, and how a contender is made to do them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.baselines import CONTENDERS
from benchmarks.quantiles import SELECTORS, Selector
from benchmarks.workload import MOMENTS, ROUND_BUFFERS, Contender, Phase, Problem, Unavailable

INNER_STEPS = 8
"""Q of a measured round."""

FUSION_THRESHOLD = {"paper": 2.32e-4, "released": 3.3e-8}
"""About the 80th percentile of the random scores, for fusions that are timed on their own."""


@dataclass(frozen=True)
class Operation:
    """One thing to measure.

    Args:
        name: of the operation.
        about: what it does.
        outer_steps: M, for rounds.
        adamw: the round has clipping and AdamW in it.
    """

    name: str
    about: str
    outer_steps: int = 0
    adamw: bool = False

    @property
    def is_round(self) -> bool:
        return self.outer_steps > 0

    def buffers(self, method: str) -> tuple[str, ...]:
        """Names of the flat buffers it needs."""
        released = method == "released"
        if self.is_round:
            moments = MOMENTS[:2] if released else MOMENTS
            names = (*ROUND_BUFFERS, *(moments if self.adamw else ()))
        elif self.name == "fusion":
            names = ("weight", "theta_start", "theta_inner", "importance_in", "importance_out")
        elif self.name == "threshold":
            names = ("importance_in",)
        elif self.name == "adamw-importance":
            names = ("weight", "grad", "exp_avg_in", "exp_avg_sq_in", "importance_in")
        else:
            names = ("weight", "grad", "importance_in")
        scores = [name for name in names if name.startswith("importance_")]
        return (*names, *(name.replace("importance", "uncertainty") for name in scores if released))

    def min_bytes(self, problem: Problem) -> int:
        """Bytes that the paper's operation must read and write: each input once, each output once.

        A round reads no old inner importance in its first step, keeps theta_Q once, and finds theta_0 where the last
        fusion wrote it; with AdamW, clipping reads every gradient once more.
        """
        v = problem.dtype.itemsize
        importance, fusion, steps = 2 * v + 8, 28, INNER_STEPS + self.outer_steps
        if self.is_round and self.adamw:
            per_element = steps * (importance + v + 16 + v) - 4 + v + fusion
        elif self.is_round:
            per_element = steps * importance - 4 + 2 * v + fusion
        else:
            per_element = {
                "importance": importance,
                "adamw-importance": importance + v + 16,
                "threshold": 4,
                "fusion": fusion,
            }[self.name]
        return per_element * problem.numel

    def kif_bytes(self, problem: Problem, passes: float) -> int:
        """Bytes that the kernels move; `passes` over scores of one side were needed for the thresholds.

        More than the minimum: those passes (4 B/element each), and zeroing the gradient inside the AdamW pass.
        """
        n, v = problem.numel, problem.dtype.itemsize
        if self.name == "threshold":
            return round(4 * passes * n)
        zeroing = v * (INNER_STEPS + self.outer_steps) if self.adamw else 0
        return self.min_bytes(problem) + round((zeroing + 4 * passes) * n)

    def contenders(self) -> dict[str, type[Contender]]:
        """Who can do it, by name, the most telling first."""
        if self.name == "threshold":
            return dict(SELECTORS)
        return {name: contender for name, contender in CONTENDERS.items() if self.is_round or not contender.rounds_only}

    def prepare(self, contender: type[Contender], problem: Problem) -> tuple[Contender, list[Phase]]:
        """A contender with fresh buffers, and the phases that do the operation; they can be run again and again.

        Raises: Unavailable when it cannot do this here.
        """
        if problem.dtype != torch.float32 and (self.is_round or self.name in ("fusion", "threshold")):
            raise Unavailable("has no weights or gradients that could be narrower")
        it = contender(problem, self.buffers(contender.method))
        if isinstance(it, Selector):
            return it, it.phases()
        if self.is_round:
            return it, it.round(INNER_STEPS, self.outer_steps, self.adamw)
        if self.name == "fusion":
            delta = torch.tensor(FUSION_THRESHOLD[contender.method], device=problem.device)
            it.prepare_fusion()
            return it, [Phase("fusion", partial(it.fusion, delta, delta))]
        return it, [Phase(self.name, it.adamw_importance if self.name == "adamw-importance" else it.importance)]


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("importance", "I <- decay * I + (1 - decay) * |w * g|"),
        Operation("adamw-importance", "AdamW and importance"),
        Operation("fusion", "masks and fusion"),
        Operation("threshold", "one threshold over all scores"),
        Operation("round-m1", "a round of Q=8, M=1 without the optimizer", outer_steps=1),
        Operation("round-m1-adamw", "a round of Q=8, M=1 with clipping and AdamW", outer_steps=1, adamw=True),
        Operation("round-m4", "a round of Q=8, M=4 without the optimizer", outer_steps=4),
        Operation("round-m4-adamw", "a round of Q=8, M=4 with clipping and AdamW", outer_steps=4, adamw=True),
    )
}
