"""The definitions, the definitions under torch.compile, and the product, each on one flat buffer."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

import kif_kernels
from benchmarks.workload import (
    BETAS,
    DECAY,
    DENSITY,
    EPS,
    FIRST_STEP,
    KERNEL_BACKENDS,
    LR,
    MAX_NORM,
    Contender,
    Side,
    Unavailable,
)
from kif_kernels import PAPER, StreamingThreshold, mask_size

WEIGHTS = [w for pair in PAPER for w in pair]


class Reference(Contender):
    """The definitions, `kif_kernels.reference`, on one flat buffer."""

    name = "reference"
    about = "kif_kernels.reference on one flat buffer"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    def load_module(self) -> ModuleType:
        """Functions with the names and arguments of `kif_kernels.reference`."""
        from kif_kernels import reference

        return reference

    def setup(self) -> None:
        self.ops = self.load_module()
        n, device = self.problem.numel, self.problem.device
        self.scalars = {side: _step_scalars(device) for side in ("in", "out")}
        self.deltas = torch.zeros(2, 1, device=device)
        self.ranks = torch.tensor([mask_size(DENSITY, n)], device=device)
        self.limits = torch.zeros(1, dtype=torch.int64, device=device)

    def importance(self, side: Side = "in", reset: bool = False, last: bool = False) -> None:
        self.ops.importance_ema_(
            self.flat[f"importance_{side}"], self.flat["weight"], self.flat["grad"], DECAY["paper"][side], reset,
            None, 0.0, None, None, None,
        )  # fmt: skip

    def adamw_importance(self) -> None:
        self.scalars["in"]["step"].add_(1.0)
        self._step("in", reset=False, last=False, clip=False)

    def training_step(self, side: Side, reset: bool, last: bool) -> None:
        s = self.scalars[side]
        self.ops.gradient_state_(
            self.flat["grad"], s["scale"], s["skip"], s["step"], s["skipped"], MAX_NORM, None, None
        )
        self._step(side, reset, last, clip=True)

    def _step(self, side: Side, reset: bool, last: bool, clip: bool) -> None:
        s = self.scalars[side]
        start = self.flat["theta_start"] if reset else None
        inner = self.flat["theta_inner"] if side == "in" and last else None
        self.ops.adamw_importance_(
            self.flat["weight"], self.flat["grad"], self.flat[f"exp_avg_{side}"], self.flat[f"exp_avg_sq_{side}"],
            self.flat[f"importance_{side}"], None, start, inner, None, None, None, LR, None, 0.0, s["step"], *BETAS,
            EPS, 0.0, DECAY["paper"][side], 0.0, reset, False, False, s["scale"] if clip else None, None,
            s["skip"] if clip else None,
        )  # fmt: skip

    def snapshot(self, name: str) -> None:
        self.flat[name].copy_(self.flat["weight"])

    def thresholds(self) -> tuple[Tensor, Tensor]:
        scores = [self.flat["importance_in"], self.flat["importance_out"]]
        self.ops.thresholds_(self.deltas, None, None, self.ranks, self.limits, scores, [], False, [], [], None)
        return self.deltas[0, 0], self.deltas[1, 0]

    def fusion(self, threshold_in: Tensor, threshold_out: Tensor) -> None:
        names = ("weight", "theta_start", "theta_inner", "importance_in", "importance_out")
        self.ops.fuse_(
            *(self.flat[name] for name in names), None, None, threshold_in, threshold_out, WEIGHTS, False, True,
            None, None, self.problem.numel, [], [], None,
        )  # fmt: skip


class Compiled(Reference):
    """The definitions under torch.compile, `kif_kernels.compiled`; the threshold by a sort on a GPU."""

    name = "compile"
    about = "kif_kernels.compiled (torch.compile of the definitions) on one flat buffer"
    countable = False

    def load_module(self) -> ModuleType:
        try:
            from kif_kernels import compiled
        except ImportError as error:
            raise Unavailable(f"kif_kernels.compiled: {error}") from error
        return compiled


class Kif(Contender):
    """The product: the public functions of `kif_kernels` on one flat buffer, with a `StreamingThreshold`."""

    name = "kif"
    about = "kif_kernels on one flat buffer: the Triton kernels on a GPU"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    exact = True
    bytes_known = True

    def setup(self) -> None:
        device = self.problem.device
        try:
            backend = kif_kernels.backend_name(device.type)
        except ValueError as error:
            raise Unavailable(str(error)) from error
        self.note = f"backend {backend}"
        self.bytes_known = self.bytes_known and backend in KERNEL_BACKENDS
        self.scalars = {side: _step_scalars(device) for side in ("in", "out")}
        self.kept = torch.zeros(3, dtype=torch.int64, device=device)
        self.selection = StreamingThreshold(DENSITY, self.problem.numel, sides=2, exact=self.exact, device=device)
        self.selections = [self.selection]
        self.start_kept = False

    def importance(self, side: Side = "in", reset: bool = False, last: bool = False) -> None:
        histogram, window = self._count(side, last)
        kif_kernels.importance_ema_(
            self.flat[f"importance_{side}"],
            self.flat["weight"],
            self.flat["grad"],
            DECAY["paper"][side],
            reset=reset,
            histogram=histogram,
            window=window,
        )

    def adamw_importance(self) -> None:
        self.steps["in"] += 1
        kif_kernels.adamw_importance_(
            self.flat["weight"],
            self.flat["grad"],
            self.flat["exp_avg_in"],
            self.flat["exp_avg_sq_in"],
            self.flat["importance_in"],
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=0.0,
            step=self.steps["in"],
            decay=DECAY["paper"]["in"],
        )

    def training_step(self, side: Side, reset: bool, last: bool) -> None:
        s = self.scalars[side]
        kif_kernels.gradient_state_(
            self.flat["grad"], s["scale"], s["skip"], s["step"], s["skipped"], max_norm=MAX_NORM
        )
        histogram, window = self._count(side, last)
        self.start_kept = True
        kif_kernels.adamw_importance_(
            self.flat["weight"],
            self.flat["grad"],
            self.flat[f"exp_avg_{side}"],
            self.flat[f"exp_avg_sq_{side}"],
            self.flat[f"importance_{side}"],
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=0.0,
            step=s["step"],
            decay=DECAY["paper"][side],
            reset=reset,
            grad_scale=s["scale"],
            skip=s["skip"],
            snapshot_before=self.flat["theta_start"] if reset else None,
            snapshot_after=self.flat["theta_inner"] if side == "in" and last else None,
            histogram=histogram,
            window=window,
            zero_grad=True,
        )

    def _count(self, side: Side, last: bool) -> tuple[Tensor | None, Tensor | None]:
        index = ("in", "out").index(side)
        return (self.selection.histogram(index), self.selection.window(index)) if last else (None, None)

    def snapshot(self, name: str) -> None:
        # theta_start was written by the last round's fusion
        if name == "theta_inner":
            self.flat[name].copy_(self.flat["weight"])

    def thresholds(self) -> tuple[Tensor, Tensor]:
        scores = (self.flat["importance_in"], self.flat["importance_out"])
        deltas = self.selection.select(scores, counted=True)
        return deltas[0, 0], deltas[1, 0]

    def fusion(self, threshold_in: Tensor, threshold_out: Tensor) -> None:
        names = ("weight", "theta_start", "theta_inner", "importance_in", "importance_out")
        kif_kernels.fuse_(
            *(self.flat[name] for name in names),
            threshold_in,
            threshold_out,
            # the training step keeps theta_start in its own pass
            write_start=not self.start_kept,
            kept=self.kept,
        )


class KifApproximate(Kif):
    """`Kif` with thresholds that may keep 0.001 * n elements more or fewer."""

    name = "kif-approximate"
    about = "kif with approximate thresholds (within 0.001 of the elements)"
    exact = False
    rounds_only = True
    mask_slack = 0.002


def _step_scalars(device: torch.device) -> dict[str, Tensor]:
    """What `gradient_state_` writes, on the device."""
    return {
        "scale": torch.ones((), device=device),
        "skip": torch.zeros((), dtype=torch.bool, device=device),
        "step": torch.full((), float(FIRST_STEP), dtype=torch.float64, device=device),
        "skipped": torch.zeros((), dtype=torch.int64, device=device),
    }
