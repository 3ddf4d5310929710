"""What every contender works on: the same random buffers, and the round of Algorithm 1 as a list of phases.

A round costs what its timed phases cost. What is no bookkeeping (a backward pass that writes the gradient, the
optimizer of rounds that are timed without one) runs as an untimed phase, so that every step finds a fresh gradient
and every task vector holds numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape, elements
from kif_kernels import StreamingThreshold

Side = Literal["in", "out"]

LR, BETAS, EPS, MAX_NORM = 3e-4, (0.9, 0.999), 1e-8, 1.0
"""AdamW as the method uses it: no weight decay, global-norm clipping at 1."""
FIRST_STEP = 10
"""Steps taken before the first one here, for the bias correction."""
DENSITY = 0.2
DECAY = {"paper": {"in": 0.55, "out": 0.45}, "released": {"in": 0.85, "out": 0.85}}
"""Weight of the old importance in its EMA (Eq. 4; Eq. 7: 1 - alpha2)."""
UNCERTAINTY_DECAY = 0.85
GRADIENTS = 3
"""Different gradients that a round goes through."""

KERNEL_BACKENDS = ("triton", "interpret")
"""Backends of `kif_kernels` that are the kernels, whose bytes are known."""

ROUND_BUFFERS = ("weight", "grad", "theta_start", "theta_inner", "importance_in", "importance_out")
MOMENTS = ("exp_avg_in", "exp_avg_sq_in", "exp_avg_out", "exp_avg_sq_out")


class Unavailable(RuntimeError):
    """A contender that cannot run here; the message says why."""


class Phase(NamedTuple):
    """A part of an operation; only timed ones count."""

    name: str
    run: Callable[[], object]
    timed: bool = True


@dataclass
class Problem:
    """Random data over tensors of these shapes, the same for every contender on a device.

    Args:
        shapes: of the tensors, in the order in which they lie in the flat buffers (without padding).
        device: where the buffers are.
        dtype: of weights and gradients; state is float32.
        seed: of the random numbers.
    """

    shapes: tuple[Shape, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def numel(self) -> int:
        return elements(self.shapes)

    @property
    def gradients(self) -> int:
        """Different gradients there is room for: one where a buffer takes gigabytes."""
        return GRADIENTS if self.numel < 2**28 else 1

    def buffer(self, name: str) -> Tensor:
        """A fresh flat buffer with the numbers that belong to its name; no zeros, no NaN, scores over many octaves."""
        # a seed of its own for each name: a buffer does not depend on which others a contender asks for
        seed = self.seed * 1000 + sum(name.encode())
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(self.numel, device=self.device, generator=generator)
        if name.startswith("grad"):
            scales = torch.randn(len(self.shapes), generator=torch.Generator().manual_seed(seed)).exp_()
            for part, scale in zip(self.tensors(x), scales.tolist(), strict=True):
                part.mul_(0.01 * scale)
        elif name.startswith("exp_avg_sq"):
            x.mul_(0.01).square_().add_(1e-10)
        elif name.startswith(("importance", "uncertainty")):
            x.exp_().mul_(1e-4)
        elif name.startswith("exp_avg"):
            x.mul_(1e-3)
        else:
            x.mul_(0.05)
        narrow = name.startswith(("weight", "grad"))
        return x.to(self.dtype) if narrow else x

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """The tensors as views into a flat buffer."""
        parts = flat.split([elements([shape]) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class Contender:
    """One way to do the bookkeeping. All have the same buffers, operations and results.

    Args:
        problem: shapes, device and data.
        buffers: names of the flat buffers that the operations to be called need.

    Attributes:
        flat: the buffers by name.
        note: what a reader of the result should know (backend, a fallback that was taken).
        selections: the streaming selections it uses, which count their passes.
    """

    name = ""
    method: Literal["paper", "released"] = "paper"
    about = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    mask_slack = 1e-5
    """Fraction of elements that may fall on the other side of a threshold: scores differ by rounding."""
    countable = True
    """Whether its PyTorch operations can be counted one by one."""
    rebinds = False
    """Whether its buffers are other tensors after every step: a CUDA graph would go on with the first, freed ones."""
    rounds_only = False
    """Whether it differs from another contender in its rounds alone."""
    bytes_known = False
    """Whether `Operation.kif_bytes` describes what it moves."""

    def __init__(self, problem: Problem, buffers: Iterable[str]) -> None:
        if problem.dtype not in self.dtypes:
            raise Unavailable(f"{self.name} takes {' and '.join(map(str, self.dtypes))} only")
        self.problem = problem
        self.note = ""
        self.selections: list[StreamingThreshold] = []
        self.flat = {name: problem.buffer(name) for name in buffers}
        self.steps = {"in": FIRST_STEP, "out": FIRST_STEP}
        if "theta_start" in self.flat and "grad" in self.flat:
            # a round starts where the last fusion ended
            self.flat["theta_start"].copy_(self.flat["weight"])
        self.setup()

    def setup(self) -> None:
        """Make what the operations need beside the flat buffers."""

    def importance(self, side: Side = "in", reset: bool = False, last: bool = False) -> None:
        """I <- decay * I + (1 - decay) * |w * g|; `last` says that a threshold of this side comes next."""
        raise NotImplementedError

    def adamw_importance(self) -> None:
        """Importance, then one AdamW step, of the inner side and without clipping."""
        raise NotImplementedError

    def training_step(self, side: Side, reset: bool, last: bool) -> None:
        """Importance, clipping by the global norm and AdamW, and the snapshots that belong to this step."""
        raise NotImplementedError

    def snapshot(self, name: str) -> None:
        """Keep the weights as `theta_start` or `theta_inner` (rounds without AdamW)."""
        raise NotImplementedError

    def thresholds(self) -> tuple[Tensor, Tensor]:
        """delta_in, delta_out at the density (Eq. 8)."""
        raise NotImplementedError

    def prepare_fusion(self) -> None:
        """Make what `fusion` finds in a round and not in the flat buffers."""

    def fusion(self, threshold_in: Tensor, threshold_out: Tensor) -> None:
        """theta <- theta_0 + w_in * tau_in + w_out * tau_out (Eq. 9)."""
        raise NotImplementedError

    def finish(self) -> None:
        """End the round: thresholds and fusion."""
        self.fusion(*self.thresholds())

    def sync_state(self) -> dict[str, Tensor]:
        """Flat results by buffer name; state that lies elsewhere is gathered."""
        return self.flat

    def count_passes(self, phases: Iterable[Phase]) -> int:
        """Run the phases. Returns: passes over the scores of one side that the selections made in them."""
        before = self._passes()
        run_phases(phases)
        return self._passes() - before

    def _passes(self) -> int:
        return sum(int(selection.refinements.sum()) for selection in self.selections)

    def load_gradient(self, index: int) -> None:
        """What a backward pass does: a fresh gradient in the gradient buffer."""
        self.flat["grad"].copy_(self.sources[index % len(self.sources)])

    def move_weights(self) -> None:
        """An optimizer that is not part of what is timed."""
        self.flat["weight"].add_(self.flat["grad"], alpha=-0.01)

    def round(self, q: int, m: int, adamw: bool) -> list[Phase]:
        """The phases of one round with q inner and m outer steps; they can be run again and again."""
        self.sources = [self.problem.buffer(f"grad{i}") for i in range(self.problem.gradients)]
        phases = [] if adamw else [Phase("snapshot", partial(self.snapshot, "theta_start"))]
        for i in range(q + m):
            side: Side = "in" if i < q else "out"
            reset, last = i == 0, i in (q - 1, q + m - 1)
            phases.append(Phase("backward", partial(self.load_gradient, i), timed=False))
            if adamw:
                phases.append(Phase("step", partial(self.training_step, side, reset, last)))
                continue
            score = Phase("importance", partial(self.importance, side, reset, last))
            move = Phase("optimizer", self.move_weights, timed=False)
            phases += [score, move] if self.method == "paper" else [move, score]
            if i == q - 1:
                phases.append(Phase("snapshot", partial(self.snapshot, "theta_inner")))
        phases.append(Phase("finish", self.finish))
        return phases


def run_phases(phases: Iterable[Phase]) -> None:
    """All phases once, timed or not."""
    for phase in phases:
        phase.run()
