"""The contenders: ways to keep importances, thresholds and fusion, from the plainest PyTorch to the kernels.

All work on the same data. Those of one method (`paper`, or `released` for the authors' variant of it) leave the same
numbers. Here are those a project would write in PyTorch; `CONTENDERS` has all of them by name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from benchmarks.product import Compiled, Kif, KifApproximate, Reference
from benchmarks.quantiles import by_kthvalue, by_sort, interpolated_quantile
from benchmarks.released import KifReleased, Released
from benchmarks.workload import BETAS, DECAY, DENSITY, EPS, LR, MAX_NORM, Contender, Side


class PerTensor(Contender):
    """A loop over the tensors: 5 operations each for a score, 11 for the fusion; torch.quantile over all of them."""

    name = "per-tensor"
    about = "plain PyTorch, one tensor after the other; torch.quantile"

    def setup(self) -> None:
        self.parts = {name: self.problem.tensors(buffer) for name, buffer in self.flat.items()}

    def importance(self, side: Side = "in", reset: bool = False, last: bool = False) -> None:
        decay = DECAY["paper"][side]
        name = f"importance_{side}"
        for w, g, old in zip(self.parts["weight"], self.parts["grad"], self.parts[name], strict=True):
            if reset:
                old.zero_()
            torch.add(decay * old, (1.0 - decay) * (w * g).abs(), out=old)

    def adamw_importance(self) -> None:
        self.importance()
        self._adamw("in")

    def training_step(self, side: Side, reset: bool, last: bool) -> None:
        if reset:
            self.snapshot("theta_start")
        self.importance(side, reset)
        grads = self.parts["grad"]
        norm = torch.stack([g.norm() for g in grads]).norm()
        scale = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(scale)
        self._adamw(side)
        if side == "in" and last:
            self.snapshot("theta_inner")

    def _adamw(self, side: Side) -> None:
        self.steps[side] += 1
        bias1, bias2 = (1.0 - beta ** self.steps[side] for beta in BETAS)
        moments = zip(self.parts[f"exp_avg_{side}"], self.parts[f"exp_avg_sq_{side}"], strict=True)
        for w, g, (m, v) in zip(self.parts["weight"], self.parts["grad"], moments, strict=True):
            m.lerp_(g, 1.0 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1.0 - BETAS[1])
            w.addcdiv_(m, v.sqrt().div_(math.sqrt(bias2)).add_(EPS), value=-LR / bias1)

    def snapshot(self, name: str) -> None:
        for kept, w in zip(self.parts[name], self.parts["weight"], strict=True):
            kept.copy_(w)

    def thresholds(self) -> tuple[Tensor, Tensor]:
        return self._threshold("in"), self._threshold("out")

    def _threshold(self, side: Side) -> Tensor:
        scores = torch.cat([part.flatten() for part in self.parts[f"importance_{side}"]])
        delta, self.note = interpolated_quantile(scores, DENSITY)
        return delta

    def fusion(self, threshold_in: Tensor, threshold_out: Tensor) -> None:
        names = ("weight", "theta_start", "theta_inner", "importance_in", "importance_out")
        for theta, start, inner, i_in, i_out in zip(*(self.parts[name] for name in names), strict=True):
            m_in, m_out = (i_in >= threshold_in).float(), (i_out >= threshold_out).float()
            theta.copy_(start + m_in * (inner - start) + m_out * (theta - inner))


class PerTensorKthvalue(PerTensor):
    """`PerTensor` with torch.kthvalue in place of torch.quantile."""

    name = "per-tensor-kthvalue"
    about = "plain PyTorch, one tensor after the other; torch.kthvalue"
    rounds_only = True

    def _threshold(self, side: Side) -> Tensor:
        return by_kthvalue(torch.cat([part.flatten() for part in self.parts[f"importance_{side}"]]), DENSITY)


class Foreach(PerTensor):
    """Lists of tensors through torch._foreach_*; torch.cat and torch.sort for the threshold."""

    name = "foreach"
    about = "torch._foreach_* over the list of tensors; torch.sort"

    def importance(self, side: Side = "in", reset: bool = False, last: bool = False) -> None:
        importance = self.parts[f"importance_{side}"]
        if reset:
            torch._foreach_zero_(importance)
        scores = torch._foreach_mul(self.parts["weight"], self.parts["grad"])
        torch._foreach_abs_(scores)
        torch._foreach_lerp_(importance, scores, 1.0 - DECAY["paper"][side])

    def training_step(self, side: Side, reset: bool, last: bool) -> None:
        if reset:
            self.snapshot("theta_start")
        self.importance(side, reset)
        grads = self.parts["grad"]
        norm = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(grads))))
        torch._foreach_mul_(grads, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        self._adamw(side)
        if side == "in" and last:
            self.snapshot("theta_inner")

    def _adamw(self, side: Side) -> None:
        self.steps[side] += 1
        bias1, bias2 = (1.0 - beta ** self.steps[side] for beta in BETAS)
        w, g = self.parts["weight"], self.parts["grad"]
        m, v = self.parts[f"exp_avg_{side}"], self.parts[f"exp_avg_sq_{side}"]
        torch._foreach_lerp_(m, g, 1.0 - BETAS[0])
        torch._foreach_mul_(v, BETAS[1])
        torch._foreach_addcmul_(v, g, g, 1.0 - BETAS[1])
        root = torch._foreach_sqrt(v)
        torch._foreach_div_(root, math.sqrt(bias2))
        torch._foreach_add_(root, EPS)
        torch._foreach_addcdiv_(w, m, root, -LR / bias1)

    def snapshot(self, name: str) -> None:
        torch._foreach_copy_(self.parts[name], self.parts["weight"])

    def _threshold(self, side: Side) -> Tensor:
        return by_sort(torch.cat([part.flatten() for part in self.parts[f"importance_{side}"]]), DENSITY)

    def fusion(self, threshold_in: Tensor, threshold_out: Tensor) -> None:
        theta, start, inner = (self.parts[name] for name in ("weight", "theta_start", "theta_inner"))
        # a list cannot be compared with a 0-d tensor in one call: the masks take a launch a tensor
        m_in = [(part >= threshold_in).float() for part in self.parts["importance_in"]]
        m_out = [(part >= threshold_out).float() for part in self.parts["importance_out"]]
        tau_out = torch._foreach_sub(theta, inner)
        torch._foreach_mul_(tau_out, m_out)
        tau_in = torch._foreach_sub(inner, start)
        torch._foreach_mul_(tau_in, m_in)
        torch._foreach_copy_(theta, start)
        torch._foreach_add_(theta, tau_in)
        torch._foreach_add_(theta, tau_out)


class Flat(Contender):
    """One flat buffer and as few PyTorch operations as it takes, with PyTorch's own fused AdamW."""

    name = "flat"
    about = (
        "PyTorch on one flat buffer: mul, abs_, lerp_; fused AdamW of torch.optim; torch.sort on a GPU, kthvalue else"
    )

    def setup(self) -> None:
        device = self.problem.device
        self.counts = {side: torch.tensor(float(count), device=device) for side, count in self.steps.items()}

    def importance(self, side: Side = "in", reset: bool = False, last: bool = False) -> None:
        importance, s = self.flat[f"importance_{side}"], torch.mul(self.flat["weight"], self.flat["grad"]).abs_()
        decay = DECAY["paper"][side]
        if reset:
            torch.mul(s, 1.0 - decay, out=importance)
        else:
            importance.lerp_(s, 1.0 - decay)

    def adamw_importance(self) -> None:
        self.importance()
        self._adamw("in")

    def training_step(self, side: Side, reset: bool, last: bool) -> None:
        if reset:
            self.snapshot("theta_start")
        self.importance(side, reset)
        norm = torch.linalg.vector_norm(self.flat["grad"])
        self.flat["grad"].mul_((MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        self._adamw(side)
        if side == "in" and last:
            self.snapshot("theta_inner")

    def _adamw(self, side: Side) -> None:
        adamw(
            [self.flat["weight"]],
            [self.flat["grad"]],
            [self.flat[f"exp_avg_{side}"]],
            [self.flat[f"exp_avg_sq_{side}"]],
            [],
            [self.counts[side]],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=LR,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def snapshot(self, name: str) -> None:
        self.flat[name].copy_(self.flat["weight"])

    def thresholds(self) -> tuple[Tensor, Tensor]:
        select = by_kthvalue if self.problem.device.type == "cpu" else by_sort
        return select(self.flat["importance_in"], DENSITY), select(self.flat["importance_out"], DENSITY)

    def fusion(self, threshold_in: Tensor, threshold_out: Tensor) -> None:
        theta, start, inner = (self.flat[name] for name in ("weight", "theta_start", "theta_inner"))
        # float masks: in-place products with boolean ones are several times slower on a CPU
        tau_out = torch.sub(theta, inner).mul_((self.flat["importance_out"] >= threshold_out).float())
        tau_in = torch.sub(inner, start).mul_((self.flat["importance_in"] >= threshold_in).float())
        torch.add(start, tau_in, out=theta).add_(tau_out)


CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (
        Kif, Flat, Compiled, PerTensor, Released, Foreach, PerTensorKthvalue, Reference, KifReleased, KifApproximate,
    )
}  # fmt: skip
"""By name, the most telling first."""
