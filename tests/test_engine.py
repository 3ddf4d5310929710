"""The engine against a per-tensor implementation written out here, for every switch and both presets."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kif_kernels
from kif.arena import ParameterArena
from kif.config import KIFConfig
from kif.engine import RecurrentKIF
from kif.optimizer import OptimizerConfig

SHAPES = {"a": (8, 5), "b": (3,), "c": (4, 33), "d": (1, 1)}
OPTIMIZER = OptimizerConfig(betas=(0.9, 0.99), eps=1e-6, weight_decay=0.05, max_grad_norm=1.0)
LR = 0.1  # large, so that a few steps change which elements are important
SWITCHES: dict[str, dict[str, Any]] = {
    "paper": {},
    "released-code": {**vars(KIFConfig.preset("released-code"))},
    "alpha1": {"alpha1": 0.9},
    "alpha2": {"alpha2": 0.8},
    "alpha2_weighs": {"alpha2": 0.8, "alpha2_weighs": "old"},
    "score": {"score": "ema_uncertainty", "uncertainty_decay": 0.7},
    "importance_at": {"importance_at": "update"},
    "density": {"density": 0.5},
    "threshold_scope": {"threshold_scope": "tensor"},
    "threshold": {"threshold": "interpolated"},
    "mask": {"mask": "above"},
    "fusion": {"fusion": "no-share"},
    "no-masks": {"fusion": "no-masks"},
    "outer_optimizer": {"outer_optimizer": "shared"},
    "importance_of": {"importance_of": "gradient"},
    "history": {"history": "frozen"},
    "global-merge": {"fusion": "global-merge"},
    "adaptive": {"fusion": "adaptive"},
}


def start_values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    values["b"].zero_()  # as LoRA's B at the start
    return values


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class PerTensor:
    """Recurrent-KIF as one would write it naively: dictionaries of tensors, float64, one optimizer object each."""

    def __init__(self, config: KIFConfig) -> None:
        self.c = config
        self.p = {n: nn.Parameter(v.double()) for n, v in start_values().items()}
        make = lambda: torch.optim.AdamW(  # noqa: E731
            self.p.values(), lr=1.0, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay
        )
        self.inner = make()
        self.outer = self.inner if config.outer_optimizer == "shared" else make()
        zeros = lambda: {n: torch.zeros_like(p) for n, p in self.p.items()}  # noqa: E731
        self.zeros = zeros
        self.ema = {"in": zeros(), "out": zeros()}
        self.unc = {"in": zeros(), "out": zeros()}
        self.rounds = 0

    def step(self, side: str | None, grads: dict[str, Tensor], lr: float) -> None:
        optimizer = self.outer if side == "out" else self.inner
        raw = {n: g.double() for n, g in grads.items()}
        before = {n: p.detach().clone() for n, p in self.p.items()}
        for n, p in self.p.items():
            p.grad = raw[n].clone()
        nn.utils.clip_grad_norm_(self.p.values(), OPTIMIZER.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        if side is None:
            return
        for n, p in self.p.items():
            if side == "out" and self.c.history == "frozen" and self.rounds > 0:
                continue
            s = (before[n] * raw[n]).abs() if self.c.importance_at == "gradient" else (p.detach() * p.grad).abs()
            if self.c.importance_of == "gradient":
                s = raw[n].abs()
            new = 1 - self.c.alpha1
            if side == "out":
                new = self.c.alpha2 if self.c.alpha2_weighs == "new" else 1 - self.c.alpha2
            self.ema[side][n] = (1 - new) * self.ema[side][n] + new * s
            u = self.c.uncertainty_decay
            self.unc[side][n] = u * self.unc[side][n] + (1 - u) * (s - self.ema[side][n]).abs()

    def masks(self, side: str) -> dict[str, Tensor]:
        with_uncertainty = self.c.score == "ema_uncertainty"
        scores = {n: e * self.unc[side][n] if with_uncertainty else e for n, e in self.ema[side].items()}
        scopes = [[n] for n in scores] if self.c.threshold_scope == "tensor" else [list(scores)]
        masks = {}
        for names in scopes:
            everything = np.concatenate([scores[n].flatten().numpy() for n in names])
            if self.c.threshold == "interpolated":
                delta = np.quantile(everything, 1 - self.c.density)
            else:
                delta = np.sort(everything)[::-1][max(1, math.ceil(self.c.density * len(everything))) - 1]
            for n in names:
                masks[n] = scores[n] > delta if self.c.mask == "above" else scores[n] >= delta
        return masks

    def round(self, inner: list[dict[str, Tensor]], outer: list[dict[str, Tensor]], lr: float) -> None:
        theta_0 = {n: p.detach().clone() for n, p in self.p.items()}
        self.ema["in"], self.unc["in"] = self.zeros(), self.zeros()
        for grads in inner:
            self.step("in", grads, lr)
        theta_q = {n: p.detach().clone() for n, p in self.p.items()}
        for grads in outer:
            self.step("out", grads, 2 * lr)
        self.rounds += 1
        if self.c.fusion in ("global-merge", "adaptive"):
            sums = [sum(float(e.sum()) for e in self.ema[side].values()) for side in ("in", "out")]
            for n, p in self.p.items():
                share = self.ema["in"][n] / (self.ema["in"][n] + self.ema["out"][n])
                w = sums[0] / sum(sums) if self.c.fusion == "global-merge" else share.nan_to_num(0.5)
                inner, outer = theta_q[n] - theta_0[n], p.detach() - theta_q[n]
                p.data = theta_0[n] + w * inner + (1 - w) * outer
            return
        m_in, m_out = self.masks("in"), self.masks("out")
        weights = {
            "paper": {(1, 1): (1, 1), (1, 0): (1, 0), (0, 1): (0, 1), (0, 0): (0, 0)},
            "released-code": {(1, 1): (0.4, 0.6), (1, 0): (1, 0), (0, 1): (0, 1), (0, 0): (0.5, 0.5)},
            "no-share": {(1, 1): (0, 1), (1, 0): (1, 0), (0, 1): (0, 1), (0, 0): (0, 0)},
            "no-masks": {(1, 1): (1, 1), (1, 0): (1, 1), (0, 1): (1, 1), (0, 0): (1, 1)},
        }[self.c.fusion]
        for n, p in self.p.items():
            for i in np.ndindex(*p.shape):
                w_in, w_out = weights[(int(m_in[n][i]), int(m_out[n][i]))]
                tau_in, tau_out = theta_q[n][i] - theta_0[n][i], p.detach()[i] - theta_q[n][i]
                p.data[i] = theta_0[n][i] + w_in * tau_in + w_out * tau_out


def engine(config: KIFConfig) -> tuple[RecurrentKIF, dict[str, nn.Parameter]]:
    parameters = {name: nn.Parameter(value) for name, value in start_values().items()}
    return RecurrentKIF(ParameterArena(parameters.items()), config, OPTIMIZER), parameters


def feed(parameters: dict[str, nn.Parameter], grads: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.grad.copy_(grads[name])


def run_round(kif: RecurrentKIF, parameters: dict[str, nn.Parameter], start: int, inner: int, outer: int) -> int:
    for _ in range(inner):
        feed(parameters, gradients(start))
        kif.inner_step(LR)
        start += 1
    for _ in range(outer):
        feed(parameters, gradients(start))
        kif.outer_step(2 * LR)
        start += 1
    kif.fuse()
    return start


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_equals_the_per_tensor_implementation(name: str) -> None:
    config = KIFConfig(**{"inner_steps": 3, "outer_steps": 2, **SWITCHES[name]})
    kif, parameters = engine(config)
    naive = PerTensor(config)
    for step in range(2):  # the first task is plain LoRA
        feed(parameters, gradients(step))
        kif.plain_step(0.01)
        naive.step(None, gradients(step), 0.01)
    # a new task starts with fresh moments
    kif.begin_task()
    fresh = PerTensor(config)
    for n in SHAPES:
        fresh.p[n].data.copy_(naive.p[n].data)
    step = 2
    for inner, outer in [(3, 2), (3, 2), (3, 1), (1, 2)]:  # the last rounds of a task may be short
        after = run_round(kif, parameters, step, inner, outer)
        fresh.round(
            [gradients(s) for s in range(step, step + inner)],
            [gradients(s) for s in range(step + inner, after)],
            LR,
        )
        step = after
        for n in SHAPES:
            torch.testing.assert_close(parameters[n].detach().double(), fresh.p[n].detach(), rtol=1e-4, atol=2e-5)
    assert not kif.arena.grad.any()


def test_each_switch_matters() -> None:
    def end(overrides: dict[str, Any]) -> Tensor:
        kif, parameters = engine(KIFConfig(**{"inner_steps": 3, "outer_steps": 2, **overrides}))
        step = run_round(kif, parameters, 0, 3, 2)
        run_round(kif, parameters, step, 3, 2)
        return kif.arena.data.clone()

    paper = end({})
    for name, overrides in SWITCHES.items():
        if name not in ("paper", "mask", "threshold"):  # these two move a single element at most
            assert not torch.equal(end(overrides), paper), name
    assert torch.equal(end({}), paper)


def test_a_round_without_outer_steps_keeps_the_masked_inner_task_vector() -> None:
    kif, parameters = engine(KIFConfig(density=0.25))
    before = kif.arena.data.clone()
    run_round(kif, parameters, 0, 2, 0)
    moved = (kif.arena.data != before).sum().item()
    assert moved == math.ceil(0.25 * kif.arena.numel)


def test_density_limits() -> None:
    kif, parameters = engine(KIFConfig(density=1.0))
    run_round(kif, parameters, 0, 2, 2)
    plain, plain_parameters = engine(KIFConfig(fusion="no-masks"))
    run_round(plain, plain_parameters, 0, 2, 2)
    torch.testing.assert_close(kif.arena.data, plain.arena.data)
    kif, parameters = engine(KIFConfig(density=0.0))
    before = kif.arena.data.clone()
    run_round(kif, parameters, 0, 2, 2)
    assert 1 <= (kif.arena.data != before).sum().item() <= 2


def test_kept_counts_what_the_masks_hold() -> None:
    kif, parameters = engine(KIFConfig(inner_steps=3, outer_steps=2, density=0.25))
    run_round(kif, parameters, 0, 3, 2)
    buffers = kif.arena.buffers
    masks = []
    for side in ("in", "out"):
        scores = torch.cat([view.flatten() for _, view in kif.arena.views(buffers[f"importance_{side}"])])
        k = math.ceil(0.25 * kif.arena.numel)
        masks.append(scores >= scores.sort(descending=True).values[k - 1])
    expected = [int(masks[0].sum()), int(masks[1].sum()), int((masks[0] & masks[1]).sum())]
    assert kif.kept.tolist() == expected and kif.rounds == 1
    run_round(kif, parameters, 5, 3, 2)
    assert kif.rounds == 2 and kif.kept[0].item() == 2 * math.ceil(0.25 * kif.arena.numel)
    kif.begin_task()
    assert kif.rounds == 0 and not kif.kept.any()


def test_more_or_fewer_steps_than_configured_give_the_same_round() -> None:
    """What is done in passing at the configured last step is made good where the round is not as configured."""
    ends = []
    for inner, outer in [(3, 2), (2, 1), (8, 4)]:
        kif, parameters = engine(KIFConfig(inner_steps=inner, outer_steps=outer))
        step = run_round(kif, parameters, 0, 3, 2)
        run_round(kif, parameters, step, 3, 2)
        ends.append(kif.arena.data.clone())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_weights_may_change_between_rounds() -> None:
    kif, parameters = engine(KIFConfig(inner_steps=2, outer_steps=1, fusion="paper", density=0.0))
    run_round(kif, parameters, 0, 2, 1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)
    before = kif.arena.data.clone()
    run_round(kif, parameters, 3, 2, 1)
    assert (kif.arena.data != before).sum().item() <= 2


@pytest.mark.parametrize("after", ["inner", "outer"])
def test_an_arena_that_moves_in_a_round_gets_a_new_selection(after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for moves in (False, True):
        kif, parameters = engine(KIFConfig(inner_steps=1, outer_steps=2))
        with monkeypatch.context() as plain:
            plain.delenv("KIF_BACKEND", raising=False)
            elsewhere = kif_kernels.StreamingThreshold(0.2, kif.arena.numel, sides=2, device="meta")
        for step, take in enumerate([kif.inner_step, kif.outer_step, kif.outer_step]):
            feed(parameters, gradients(step))
            take(LR)
            if moves and step == (0 if after == "inner" else 2):
                kif._selection = elsewhere
        kif.fuse()
        assert kif._selection is not elsewhere
        ends.append(kif.arena.data.clone())
    assert torch.equal(ends[0], ends[1])


def test_a_non_finite_gradient_skips_the_whole_step() -> None:
    kif, parameters = engine(KIFConfig())
    feed(parameters, gradients(0))
    kif.inner_step(0.01)
    before = copy.deepcopy(kif.state_dict())
    for bad in (float("nan"), float("inf")):
        feed(parameters, gradients(1))
        parameters["c"].grad[1, 2] = bad
        kif.inner_step(0.01)
    assert kif.skipped.item() == 2
    assert torch.equal(kif.arena.data, before["arena"]["data"])
    for name, buffer in before["arena"]["buffers"].items():
        assert torch.equal(kif.arena.buffer(name), buffer), name
    assert not kif.arena.grad.any()
    feed(parameters, gradients(2))
    kif.inner_step(0.01)
    assert not torch.equal(kif.arena.data, before["arena"]["data"]) and kif.arena.data.isfinite().all()


@pytest.mark.parametrize("preset", ["paper", "released-code"])
def test_state_continues_in_the_middle_of_a_round_bit_for_bit(preset: str) -> None:
    config = KIFConfig.preset(preset, inner_steps=3, outer_steps=2)
    a, a_parameters = engine(config)
    step = run_round(a, a_parameters, 0, 3, 2)
    feed(a_parameters, gradients(step))
    a.inner_step(0.01)
    state = copy.deepcopy(a.state_dict())
    b, b_parameters = engine(config)
    b.load_state_dict(state)
    for kif, parameters in ((a, a_parameters), (b, b_parameters)):
        feed(parameters, gradients(step + 1))
        kif.outer_step(0.02)
        kif.fuse()
        run_round(kif, parameters, step + 2, 3, 2)
    assert torch.equal(a.arena.data, b.arena.data)
    assert all(torch.equal(a.arena.buffer(n), b.arena.buffer(n)) for n in a.arena.buffers)


@pytest.mark.parametrize("counts", [True, False])
def test_state_continues_before_the_fusion(counts: bool) -> None:
    """Also one from a device without the kernels, which counts no importances."""
    config = KIFConfig(inner_steps=1, outer_steps=1)
    a, a_parameters = engine(config)
    for step, take in enumerate([a.inner_step, a.outer_step]):
        feed(a_parameters, gradients(step))
        take(LR)
    state = copy.deepcopy(a.state_dict())
    b, _ = engine(config)
    b.load_state_dict(state if counts else {**state, "selection": {}})
    a.fuse()
    b.fuse()
    assert torch.equal(a.arena.data, b.arena.data) and torch.equal(a.kept, b.kept)
    assert 0 < a.kept[0] < a.arena.numel


@pytest.mark.parametrize(
    "switch", [{"outer_optimizer": "shared"}, {"score": "ema_uncertainty"}, {"inner_steps": 3}, {"density": 0.5}]
)
def test_state_of_other_switches_is_refused(switch: dict[str, Any]) -> None:
    (name, value), (a, _), (b, _) = *switch.items(), engine(KIFConfig(**switch)), engine(KIFConfig())
    state, before = a.state_dict(), b.arena.data.clone()
    a.arena.data.add_(1.0)
    with pytest.raises(ValueError, match=rf"kif\.{name}={value!r}, here it is {getattr(b.config, name)!r}: continue"):
        b.load_state_dict(state)
    assert torch.equal(b.arena.data, before)
    a.load_state_dict(state)
    del state["config"]  # as saved by earlier versions
    a.load_state_dict(state)


@pytest.mark.parametrize("change", ["inner step", "outer step", "fuse", "loading"])
def test_a_backward_pass_through_old_weights_is_refused(change: str) -> None:
    kif, parameters = engine(KIFConfig(inner_steps=2, outer_steps=1))
    done = {"inner step": 0, "outer step": 1, "fuse": 2, "loading": 3}[change]
    steps = [lambda: kif.inner_step(LR), lambda: kif.outer_step(LR), kif.fuse]
    steps.append(lambda: kif.load_state_dict(kif.state_dict()))
    for step in steps[:done]:
        feed(parameters, gradients(done))
        step()
    loss = torch.stack([parameter.square().sum() for parameter in parameters.values()]).sum()
    feed(parameters, gradients(done))
    steps[done]()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_steps_out_of_order_are_refused() -> None:
    kif, _ = engine(KIFConfig())
    with pytest.raises(RuntimeError, match="outer_step before inner_step"):
        kif.outer_step(0.1)
    with pytest.raises(RuntimeError, match="nothing to fuse"):
        kif.fuse()
    kif.inner_step(0.1)
    with pytest.raises(RuntimeError, match="middle of a round"):
        kif.plain_step(0.1)
    kif.outer_step(0.1)
    with pytest.raises(RuntimeError, match="inner_step after outer_step"):
        kif.inner_step(0.1)


def test_every_kind_of_step_takes_gradients_that_lie_elsewhere() -> None:
    """As a backward pass leaves them after `zero_grad(set_to_none=True)`."""
    found = []
    for apart in (False, True):
        kif, parameters = engine(KIFConfig(inner_steps=1))
        for number, step in enumerate((kif.plain_step, kif.inner_step, kif.outer_step)):
            for parameter in parameters.values() if apart else ():
                parameter.grad = torch.zeros_like(parameter)
            feed(parameters, gradients(number))
            step(LR)
        kif.fuse()
        found.append(kif.arena.data.clone())
    assert torch.equal(*found)


def test_a_learning_rate_out_of_range_changes_nothing() -> None:
    kif, parameters = engine(KIFConfig())
    feed(parameters, gradients(0))
    before = copy.deepcopy(kif.state_dict())
    for lr in (-0.1, math.nan):
        with pytest.raises(ValueError, match="lr must be finite and not negative"):
            kif.inner_step(lr)
    assert torch.equal(kif.arena.data, before["arena"]["data"]) and kif.arena.grad.any()
    assert not kif.inner_optimizer.state_dict()["steps"]


def test_config_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"kif\.density must lie"):
        KIFConfig(density=1.2)
    with pytest.raises(ValueError, match=r"kif\.outer_steps must be at least 1"):
        KIFConfig(outer_steps=0)
    with pytest.raises(ValueError, match=r"^kif.mask must be one of at_least, above, got 'abvoe'"):
        KIFConfig(mask="abvoe")  # type: ignore[arg-type]
    for name, kind, value in (("density", "float", "0.2"), ("inner_steps", "int", 2.5), ("outer_steps", "int", True)):
        with pytest.raises(ValueError, match=rf"^kif\.{name} must be of type {kind}, got {value!r}$"):
            KIFConfig(**{name: value})
    assert KIFConfig(density=1, inner_steps=np.int64(2)).density == 1  # type: ignore[arg-type]
    given: Any = {"density": np.float32(0.25), "inner_steps": np.int64(2)}
    # as YAML and JSON know them
    assert [(type(getattr(KIFConfig(**given), name)), value) for name, value in given.items()] == [
        (float, 0.25), (int, 2),
    ]  # fmt: skip
    with pytest.raises(TypeError, match=r"config must be a KIFConfig, got dict"):
        RecurrentKIF.of(nn.Linear(2, 2), {"outer_steps": 4})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown preset 'papre'"):
        KIFConfig.preset("papre")
