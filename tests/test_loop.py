"""The loop: order of steps, rounds across epochs, schedule, accumulation, equal steps for all methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import topic_task, without_dropout

from kif.config import KIFConfig, RunConfig, VRMCLConfig
from kif.families import Encoded, LanguageModel
from kif.loop import backward, plan_rounds, schedule, train_phase
from kif.methods import METHODS, Method
from kif.models import load_language_model

TASK = topic_task(20)


class Recorder(Method):
    """Notes what the loop asks for, in order."""

    name, summary, source = "recorder", "", ""
    skipped = 0
    inner_steps, outer_steps = 3, 2

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        super().__init__(lm, config)
        self.calls: list[str] = []
        self.rates: list[float] = []

    def begin_task(self, index: int, memory: Any) -> None:
        self.calls.append(f"task{index}")
        self.outer_steps = 2 if memory else 0

    def inner_step(self, lr: float) -> None:
        assert self.arena.grad.any()
        self.calls.append("in")
        self.rates.append(lr)
        self.arena.zero_grad()

    def outer_step(self, lr: float) -> None:
        self.calls.append("out")
        self.arena.zero_grad()

    def end_round(self) -> None:
        self.calls.append("fuse")

    def end_task(self, index: int) -> None:
        self.calls.append("end")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


def load(
    tiny_models: dict[str, Path], kind: str = "t5", **options: Any
) -> tuple[LanguageModel, RunConfig, list[Encoded]]:
    # max_length leaves room for prompts
    settings = {"lora_dropout": 0.0, "batch_size": 4, "lr": 1e-2, "max_length": 400, **options}
    config = RunConfig(model=str(tiny_models[kind]), **settings)
    lm = load_language_model(config, {TASK.name: TASK.labels})
    return lm, config, lm.encode(TASK, TASK.train)


def phase(
    lm: LanguageModel, method: Method, config: RunConfig, rows: list[Encoded], memory: list[Encoded]
) -> list[Any]:
    log: list[Any] = []
    method.phases([TASK, TASK])
    torch.manual_seed(0)  # the base models have dropout
    train_phase(lm, method, config, index=1, tasks=1, rows=rows, memory=memory, log=log.append)
    return log


def test_algorithm_1_with_rounds_across_epochs_and_a_short_last_round(tiny_models: dict[str, Path]) -> None:
    lm, config, rows = load(tiny_models, epochs=2)  # 5 batches an epoch: 10 inner steps in rounds of 3
    method = Recorder(lm, config)
    log = phase(lm, method, config, rows, rows[:3])
    full = ["in"] * 3 + ["out"] * 2 + ["fuse"]
    assert method.calls == ["task1", *full * 3, "in", "out", "out", "fuse", "end"]
    assert [record["epoch"] for record in log] == [0, 1, 1, 1]
    assert log[-1]["step"] == log[-1]["steps"] == 18
    assert all(record["memory_loss"] > 0 for record in log)


def test_without_memory_there_is_no_outer_loop(tiny_models: dict[str, Path]) -> None:
    lm, config, rows = load(tiny_models, epochs=1)
    method = Recorder(lm, config)
    log = phase(lm, method, config, rows, [])
    assert method.calls.count("out") == 0 and method.calls.count("in") == 5
    assert [record["memory_loss"] for record in log] == [None, None]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 5), st.integers(1, 4))
def test_steps_per_task_counts_inner_and_outer_steps(steps: int, inner: int, outer: int, tasks: int) -> None:
    method = type("M", (), {"inner_steps": inner, "outer_steps": outer})()
    rounds = list(plan_rounds(RunConfig(steps_per_task=steps), method, 7, tasks))
    assert sum(i + o for i, o in rounds) == steps * tasks
    assert all((i, o) == (inner, outer) for i, o in rounds[:-1])
    assert 1 <= rounds[-1][0] <= inner and 0 <= rounds[-1][1] <= outer


@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 5), st.integers(1, 4))
def test_epochs_count_inner_steps(batches: int, inner: int, outer: int, epochs: int) -> None:
    method = type("M", (), {"inner_steps": inner, "outer_steps": outer})()
    rounds = list(plan_rounds(RunConfig(epochs=epochs), method, batches, 1))
    assert sum(i for i, _ in rounds) == epochs * batches
    assert all(o == outer for _, o in rounds)


@given(st.integers(1, 500), st.integers(0, 100))
def test_schedule_rises_and_falls_linearly(total: int, warmup: int) -> None:
    factors = [schedule(step, total, warmup) for step in range(total)]
    peak = min(warmup, total // 10)
    assert all(0 < factor <= 1 for factor in factors) and factors[peak] == 1.0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert factors[-1] == pytest.approx(1 / (total - peak))


@pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
@pytest.mark.parametrize("accumulation", [2, 3, 8, 50])
def test_accumulation_does_not_change_the_gradient(tiny_models: dict[str, Path], kind: str, accumulation: int) -> None:
    lm, config, rows = load(tiny_models, kind)
    method = Recorder(lm, config)
    lm.model.eval()
    loss = backward(lm, method, rows[:8], 1)
    whole = method.arena.grad.clone()
    method.arena.zero_grad()
    split = backward(lm, method, rows[:8], accumulation)
    torch.testing.assert_close(split, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.arena.grad, whole, rtol=1e-3, atol=1e-6 + 1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_learns_with_every_family(tiny_models: dict[str, Path], kind: str, name: str) -> None:
    # VR-MCL has learning rates of its own, whose defaults are for rounds of real training
    vrmcl = VRMCLConfig(inner_lr=0.5, outer_lr=5.0)
    lm, config, rows = load(tiny_models, kind, epochs=8, method=name, kif=KIFConfig(density=0.5), vrmcl=vrmcl)
    if lm.family in METHODS[name].refused:
        pytest.skip(f"{name} refuses {lm.family} models")
    without_dropout(lm.model)  # its noise is more than what some learn
    method = METHODS[name](lm, config)
    before = method.arena.data.clone()
    log = phase(lm, method, config, rows, rows[:4])
    assert log[-1]["loss"] < log[0]["loss"]
    assert not torch.equal(method.arena.data, before) and method.arena.data.isfinite().all()


def test_the_first_task_is_plain_lora_for_all_methods(tiny_models: dict[str, Path]) -> None:
    ends = []
    for name in ("seqlora", "lora-replay", "recurrent-kif"):
        lm, config, rows = load(tiny_models, epochs=2, method=name)
        method = METHODS[name](lm, config)
        phase(lm, method, config, rows, [])
        ends.append(method.arena.data.clone())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_replay_trains_on_both_and_seqlora_on_new_rows_only(tiny_models: dict[str, Path]) -> None:
    lm, config, rows = load(tiny_models)
    assert METHODS["lora-replay"](lm, config).training_rows(rows[:5], rows[5:7]) == rows[:7]
    assert METHODS["seqlora"](lm, config).training_rows(rows[:5], rows[5:7]) == rows[:5]


def test_labels_name_the_variant(tiny_models: dict[str, Path]) -> None:
    lm, config, _ = load(tiny_models)
    cases = [
        (KIFConfig(), "recurrent-kif paper (M=1)"),
        (KIFConfig.preset("released-code"), "recurrent-kif released-code (M=4)"),
        (KIFConfig(fusion="no-masks", outer_steps=4), "recurrent-kif no-ki (M=4)"),
        (KIFConfig(inner_steps=4, outer_steps=4), "recurrent-kif paper (M=4, inner_steps=4)"),
        (KIFConfig(density=0.3), "recurrent-kif paper (M=1, density=0.3)"),
    ]
    for kif, label in cases:
        config.kif = kif
        assert METHODS["recurrent-kif"](lm, config).label == label


@pytest.mark.parametrize("name", list(METHODS))
def test_method_state_round_trip(tiny_models: dict[str, Path], name: str) -> None:
    lm, config, rows = load(tiny_models, method=name, epochs=1)
    method = METHODS[name](lm, config)
    phase(lm, method, config, rows, rows[:4])
    other_lm, _, _ = load(tiny_models, method=name, seed=3)
    other = METHODS[name](other_lm, config)
    assert not torch.equal(other.arena.data, method.arena.data)
    other.phases([TASK, TASK])
    other.begin_task(1, rows[:4])
    other.training_rows(rows, rows[:4])
    other.load_state_dict(method.state_dict())
    for a in (method, other):
        torch.manual_seed(0)
        a.lm.model.train()
        backward(a.lm, a, rows[:4], 1)
        a.inner_step(1e-2)
    assert torch.equal(other.arena.data, method.arena.data)
