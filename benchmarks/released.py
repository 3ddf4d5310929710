"""The bookkeeping of the authors' release, operation by operation, and the kernels doing the same method.

It differs from the paper: the score is the product of two EMAs (of |w * g| and of its deviation, as in AdaLoRA), taken
after the optimizer step with the clipped gradient; the threshold is torch.quantile and the mask strictly above it;
both masks weigh the task vectors 0.4 and 0.6, none 0.5 and 0.5; one optimizer serves both loops.

Written from a description of the release, not from its text. For T5-large (288 tensors, Q=8, M=4) the release was
counted at about 50,140 launches and 3,456 host syncs: 12 launches and a sync a tensor and step, and about 30 a tensor
and round. Which 30 is our reading.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import kif_kernels
from benchmarks.product import Kif
from benchmarks.quantiles import interpolated_quantile
from benchmarks.workload import (
    BETAS,
    DECAY,
    DENSITY,
    EPS,
    LR,
    MAX_NORM,
    UNCERTAINTY_DECAY,
    Contender,
    Side,
)
from kif_kernels import RELEASED_CODE, StreamingThreshold


class Released(Contender):
    """Dictionaries of tensors by parameter, rebound at every step, as the release keeps them."""

    name = "released"
    method = "released"
    about = "the operation sequence of the authors' release, tensor by tensor"
    rebinds = True

    def setup(self) -> None:
        flat = {name: buffer for name, buffer in self.flat.items() if name != "grad"}
        self.parts = {name: dict(enumerate(self.problem.tensors(buffer))) for name, buffer in flat.items()}
        if "grad" in self.flat:
            self.grads = self.problem.tensors(self.flat["grad"])
            # the parameters are rebound: the flat buffers would only hold memory
            self.flat = {"grad": self.flat["grad"]}

    def importance(self, side: Side = "in", reset: bool = False, last: bool = False) -> None:
        parts, decay = self.parts, DECAY["released"][side]
        ema, deviation = parts[f"importance_{side}"], parts[f"uncertainty_{side}"]
        if reset:
            for i, w in parts["weight"].items():
                ema[i], deviation[i] = torch.zeros_like(w), torch.zeros_like(w)
        for i, w in parts["weight"].items():
            g = self.grads[i]
            if torch.isnan(g).any():
                break
            s = (w * g).abs()
            ema[i] = decay * ema[i] + (1.0 - decay) * s
            deviation[i] = UNCERTAINTY_DECAY * deviation[i] + (1.0 - UNCERTAINTY_DECAY) * (s - ema[i]).abs()

    def adamw_importance(self) -> None:
        self._adamw()
        self.importance()

    def training_step(self, side: Side, reset: bool, last: bool) -> None:
        if reset:
            self.snapshot("theta_start")
        norm = torch.stack([g.norm() for g in self.grads]).norm()
        scale = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        for g in self.grads:
            g.mul_(scale)
        self._adamw()
        self.importance(side, reset)
        if side == "in" and last:
            self.snapshot("theta_inner")

    def _adamw(self) -> None:
        """AdamW of transformers: eps is added before the bias correction."""
        self.steps["in"] += 1
        bias1, bias2 = (1.0 - beta ** self.steps["in"] for beta in BETAS)
        rate = LR * math.sqrt(bias2) / bias1
        moments = zip(self.parts["exp_avg_in"].values(), self.parts["exp_avg_sq_in"].values(), strict=True)
        for w, g, (m, v) in zip(self.parts["weight"].values(), self.grads, moments, strict=True):
            m.mul_(BETAS[0]).add_(g, alpha=1.0 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1.0 - BETAS[1])
            w.addcdiv_(m, v.sqrt().add_(EPS), value=-rate)

    def snapshot(self, name: str) -> None:
        self.parts[name] = {i: w.clone() for i, w in self.parts["weight"].items()}

    def thresholds(self) -> tuple[Tensor, Tensor]:
        return self._threshold("in"), self._threshold("out")

    def _threshold(self, side: Side) -> Tensor:
        pairs = zip(self.parts[f"importance_{side}"].values(), self.parts[f"uncertainty_{side}"].values(), strict=True)
        products = {i: ema * deviation for i, (ema, deviation) in enumerate(pairs)}
        self.parts[f"score_{side}"] = products
        delta, self.note = interpolated_quantile(torch.cat([s.flatten() for s in products.values()]), DENSITY)
        return delta

    def prepare_fusion(self) -> None:
        self.thresholds()

    def fusion(self, threshold_in: Tensor, threshold_out: Tensor) -> None:
        parts = self.parts
        (both_in, both_out), (none_in, _) = RELEASED_CODE.both, RELEASED_CODE.neither
        for i, theta in parts["weight"].items():
            start, inner = parts["theta_start"][i], parts["theta_inner"][i]
            tau_in, tau_out = inner - start, theta - inner
            m_in, m_out = parts["score_in"][i] > threshold_in, parts["score_out"][i] > threshold_out
            shared = both_in * tau_in + both_out * tau_out
            merged = shared * (m_in & m_out) + tau_in * (m_in & ~m_out) + tau_out * (~m_in & m_out)
            merged = merged + none_in * (tau_in + tau_out) * ~(m_in | m_out)
            parts["weight"][i] = start + merged

    def move_weights(self) -> None:
        torch._foreach_add_(list(self.parts["weight"].values()), self.grads, alpha=-0.01)

    def sync_state(self) -> dict[str, Tensor]:
        return {name: torch.cat([part.flatten() for part in parts.values()]) for name, parts in self.parts.items()}


class KifReleased(Kif):
    """`Kif` with the switches of the release: E * U, scored after the update; one optimizer; an interpolated threshold.

    The threshold lies between two neighbouring ranks, so each side is selected twice.
    """

    name = "kif-released"
    method = "released"
    about = "kif_kernels with the method of the authors' release"
    dtypes = (torch.float32,)
    bytes_known = False

    def setup(self) -> None:
        super().setup()
        n, device = self.problem.numel, self.problem.device
        rank = DENSITY * (n - 1)
        self.fraction = rank - math.floor(rank)
        # a selection for each rank: the workspace keeps the window of its own last threshold
        self.selections = [StreamingThreshold(DENSITY, n, sides=2, device=device) for _ in range(2)]
        for offset, selection in enumerate(self.selections):
            selection.set_rank(min(math.floor(rank) + 1 + offset, n))
        self.selection = self.selections[0]

    def importance(self, side: Side = "in", reset: bool = False, last: bool = False) -> None:
        histogram, window = self._count(side, last)
        kif_kernels.importance_uncertainty_ema_(
            self.flat[f"importance_{side}"],
            self.flat[f"uncertainty_{side}"],
            self.flat["weight"],
            self.flat["grad"],
            DECAY["released"][side],
            UNCERTAINTY_DECAY,
            reset=reset,
            histogram=histogram,
            window=window,
        )

    def adamw_importance(self) -> None:
        self.scalars["in"]["step"].add_(1.0)
        self._step("in", reset=False, last=False, clip=False)

    def training_step(self, side: Side, reset: bool, last: bool) -> None:
        s = self.scalars["in"]
        kif_kernels.gradient_state_(
            self.flat["grad"], s["scale"], s["skip"], s["step"], s["skipped"], max_norm=MAX_NORM
        )
        self._step(side, reset, last, clip=True)

    def _step(self, side: Side, reset: bool, last: bool, clip: bool) -> None:
        s = self.scalars["in"]
        histogram, window = self._count(side, last)
        self.start_kept = clip
        kif_kernels.adamw_importance_(
            self.flat["weight"],
            self.flat["grad"],
            self.flat["exp_avg_in"],
            self.flat["exp_avg_sq_in"],
            self.flat[f"importance_{side}"],
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=0.0,
            step=s["step"],
            decay=DECAY["released"][side],
            reset=reset,
            after_update=True,
            uncertainty=self.flat[f"uncertainty_{side}"],
            uncertainty_decay=UNCERTAINTY_DECAY,
            grad_scale=s["scale"] if clip else None,
            skip=s["skip"] if clip else None,
            snapshot_before=self.flat["theta_start"] if reset else None,
            snapshot_after=self.flat["theta_inner"] if side == "in" and last else None,
            histogram=histogram,
            window=window,
            zero_grad=clip,
        )

    def thresholds(self) -> tuple[Tensor, Tensor]:
        scores = (self.flat["importance_in"], self.flat["importance_out"])
        factors = (self.flat["uncertainty_in"], self.flat["uncertainty_out"])
        upper = self.selections[0].select(scores, factors, counted=True)
        if self.fraction:
            upper = torch.lerp(upper, self.selections[1].select(scores, factors), self.fraction)
        return upper[0, 0], upper[1, 0]

    def fusion(self, threshold_in: Tensor, threshold_out: Tensor) -> None:
        names = ("weight", "theta_start", "theta_inner", "importance_in", "importance_out")
        kif_kernels.fuse_(
            *(self.flat[name] for name in names),
            threshold_in,
            threshold_out,
            RELEASED_CODE,
            strict=True,
            write_start=not self.start_kept,
            uncertainty_in=self.flat["uncertainty_in"],
            uncertainty_out=self.flat["uncertainty_out"],
            kept=self.kept,
        )
