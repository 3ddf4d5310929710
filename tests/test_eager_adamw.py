"""AdamW with importance on the CPU against the definition and against torch.optim, every option drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_reference import (
    CHUNK,
    DECAYS,
    EPS,
    SEEDS,
    SIZES,
    Kinds,
    Numbers,
    check,
    equal,
    every_kind,
    flag,
    flattened,
    laid_out,
    outcome,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kif_kernels as kk
from kif_kernels import eager, reference
from kif_kernels.layout import BINS


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CHUNK", CHUNK)


ADAMW = [argument.name for argument in torch.ops.kif.adamw_importance_.default._schema.arguments]


def adamw_arguments(make: Numbers, value: torch.dtype, state: torch.dtype, draw: Any) -> list[Any]:
    """Arguments of adamw_importance_, every option drawn."""
    skip, yes = draw(st.sampled_from([None, None, False, False, True])), st.booleans()
    scored, reset, counted = draw(st.sampled_from([True, True, False])), draw(yes), draw(yes)
    uncertain = scored and draw(yes)
    on_device = draw(yes)
    lr = draw(st.sampled_from([1e-3, 0.1]))
    step = float(draw(st.integers(1, 2000)))
    return [
        make(value),
        make(value, bad=draw(yes)),
        make(),
        make.scores(),
        (make.poison(state) if reset else make.scores(state)) if scored else None,
        (make.poison(state) if reset else make.scores(state)) if uncertain else None,
        make.poison(value) if draw(yes) else None,
        make.poison(value) if draw(yes) else None,
        make.poison(draw(st.sampled_from([torch.bfloat16, torch.float16]))) if draw(yes) else None,
        torch.zeros(BINS, dtype=torch.int64) if counted else None,
        torch.tensor([22, 3]) if counted else None,
        0.0 if on_device else lr,
        torch.tensor(lr) if on_device else None,
        0.0 if on_device else step,
        torch.tensor(step, dtype=torch.float64) if on_device else None,
        0.9,
        0.999,
        draw(st.sampled_from([1e-8, 1e-3])),
        draw(st.sampled_from([0.0, 0.1])),
        draw(DECAYS),
        0.7,
        reset,
        draw(yes),
        draw(yes),
        torch.tensor(draw(st.sampled_from([1.0, 0.25]))) if draw(yes) else None,
        torch.tensor(draw(st.sampled_from([1.0, 2.0**-14, 0.3]))) if draw(yes) else None,
        flag(skip),
    ]


@every_kind
@given(st.data(), SIZES, SEEDS)
@settings(max_examples=120, deadline=None)
def test_adamw_with_importance(kinds: Kinds, data: st.DataObject, n: int, seed: int) -> None:
    arguments = adamw_arguments(Numbers(seed, n), kinds.value, kinds.state, data.draw)
    expected = outcome(reference, "adamw_importance_", arguments, kinds.layout)
    result = outcome(eager, "adamw_importance_", arguments, kinds.layout)
    if kinds.value == torch.float32:
        # AdamW rounds in another order here: weights differ by roundings of what they were and are
        size = expected["weight"].abs() + laid_out(arguments[0], kinds.layout).abs()
        rounded = {"weight": EPS, "snapshot_after": EPS, "shadow": 2.0**-7, "exp_avg_sq": EPS}
        for key in set(rounded) & set(expected):
            x, y = expected.pop(key).float(), result[key].float()
            near = (x - y).abs() <= 4 * rounded[key] * (x if key == "exp_avg_sq" else size) + 1e-37
            assert bool((near | (x == y) | (x.isnan() & y.isnan())).all()), key
        if "importance" in expected:
            expected |= rescored(dict(zip(ADAMW, arguments, strict=True)), result["weight"], kinds.layout)
    for key in expected:
        assert equal(expected[key], result[key]), key


def rescored(given: dict[str, Any], updated: Tensor, layout: str) -> dict[str, Tensor]:
    """What a step from these arguments must leave in the importance, if it led to these weights."""
    grad = given["grad"] * (1.0 if given["inv_scale"] is None else given["inv_scale"])
    weight = given["weight"]
    if given["after_update"]:
        grad, weight = grad * (1.0 if given["grad_scale"] is None else given["grad_scale"]), flattened(updated, layout)
    score = [given["decay"], given["reset"], given["uncertainty"], given["uncertainty_decay"], given["skip"]]
    arguments = [given["importance"], weight, grad, *score, given["histogram"], given["window"]]
    after = outcome(reference, "importance_ema_", arguments, layout)
    return {key: after[key] for key in ("importance", "uncertainty", "histogram") if key in after}


def test_adamw_is_as_precise_as_that_of_torch() -> None:
    generator, options = torch.Generator().manual_seed(3), dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    start, *grads = (torch.randn(20000, generator=generator) for _ in range(4))
    exact = torch.nn.Parameter(start.double())
    theirs, ours = torch.nn.Parameter(start.clone()), start.clone()
    m, v = torch.zeros(20000), torch.zeros(20000)
    optimizers = [torch.optim.AdamW([p], foreach=False, **options) for p in (exact, theirs)]
    for step, grad in enumerate(grads, start=1):
        exact.grad, theirs.grad = grad.double(), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        kk.adamw_importance_(ours, grad, m, v, None, step=step, **options)
    moments = [optimizers[i].state[p] for i, p in enumerate((exact, theirs))]
    for name, x, y, z in (
        ("weight", exact.detach(), theirs.detach(), ours),
        ("exp_avg", *(state["exp_avg"] for state in moments), m),
        ("exp_avg_sq", *(state["exp_avg_sq"] for state in moments), v),
    ):
        # a tenth of slack: these are the largest of many roundings
        allowed, error = float((x - y).abs().max()), float((x - z).abs().max())
        assert 0.0 < error <= 1.1 * allowed, f"{name}: {error}, torch has {allowed}"


def test_a_skipped_step_still_copies_zeroes_and_resets() -> None:
    make = Numbers(0, 3 * CHUNK)
    weight = make()
    after = check(
        "adamw_importance_", weight, make.poison(), make(), make.scores(), make.poison(), make.poison(),
        make.poison(), make.poison(), make.poison(torch.bfloat16), torch.zeros(BINS, dtype=torch.int64),
        torch.tensor([22, 0]), 0.1, None, 1.0, None, 0.9, 0.999, 1e-8, 0.1, 0.5, 0.5, True, False, True, None, None,
        torch.tensor(True),
    )  # fmt: skip
    for key in ("weight", "snapshot_before", "snapshot_after"):
        assert torch.equal(after[key], weight)
    assert torch.equal(after["shadow"], weight.bfloat16())
    assert not any(after[key].any() for key in ("grad", "importance", "uncertainty"))
    assert after["histogram"][0] == len(weight)
