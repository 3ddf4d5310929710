"""Each method's defining equation, computed here by itself, and its limit cases."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from method_setup import KINDS, TASKS, start, train_task
from tiny import without_own_dropout
from torch import Tensor, nn

from kif.config import (
    EWCConfig,
    KIFConfig,
    LFPT5Config,
    MIGUConfig,
    MoELoRAConfig,
    OLoRAConfig,
    RunConfig,
    TaSLConfig,
    VRMCLConfig,
)
from kif.families import Encoded, LanguageModel
from kif.faults import less_memory_in_training
from kif.methods import METHODS, Method
from kif.methods.tasl import merge_weights, minmax
from kif.models import load_language_model


def row_gradients(lm: LanguageModel, method: Method, rows: list[Encoded]) -> list[dict[str, Tensor]]:
    """The gradient of each row's mean loss, by autograd, without the arena."""
    names = {segment.name for segment in method.arena.segments}
    parameters = {name: p for name, p in lm.model.named_parameters() if name in names}
    lm.model.eval()
    found = []
    for row in rows:
        loss, count = lm.loss(lm.collate([row]))
        grads = torch.autograd.grad(loss / count, list(parameters.values()))
        found.append(dict(zip(parameters, grads, strict=True)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ewc_fisher_is_the_mean_squared_gradient(tiny_models: dict[str, Path], kind: str) -> None:
    method, rows = start(tiny_models, "ewc", kind, ewc=EWCConfig(fisher_rows=1000))
    train_task(method, 0, rows[0])
    expected = row_gradients(method.lm, method, rows[0])
    for name, fisher in method.arena.views(method.arena.buffer("fisher")):
        mean = torch.stack([grads[name].square() for grads in expected]).mean(0)
        torch.testing.assert_close(fisher, mean, rtol=1e-4, atol=1e-10)
    assert method.arena.buffer("fisher").any()
    assert torch.equal(method.arena.buffer("anchor"), method.arena.data)


def test_ewc_adds_the_gradient_of_its_penalty(tiny_models: dict[str, Path]) -> None:
    method, rows = start(tiny_models, "ewc", ewc=EWCConfig(strength=3.0))
    train_task(method, 0, rows[0])
    theta = (method.arena.data + torch.randn_like(method.arena.data)).requires_grad_()
    penalty = 3.0 * (method.arena.buffer("fisher") * (theta - method.arena.buffer("anchor")).square()).sum()
    (expected,) = torch.autograd.grad(penalty, theta)
    method.arena.data.copy_(theta.detach())
    method.arena.grad.fill_(0.5)
    method.modify_gradient()
    torch.testing.assert_close(method.arena.grad, expected + 0.5)


def test_ewc_fisher_accumulates_with_decay_and_strength_limits_movement(tiny_models: dict[str, Path]) -> None:
    moved = []
    for strength in (0.0, 1e9):
        method, rows = start(
            tiny_models, "ewc", ewc=EWCConfig(strength=strength, decay=0.5), max_grad_norm=0.0, lr=1e-3
        )
        train_task(method, 0, rows[0])
        first, anchor = (method.arena.buffer(name).clone() for name in ("fisher", "anchor"))
        needed = first > first.quantile(0.9)
        train_task(method, 1, rows[1])
        moved.append((method.arena.data - anchor)[needed].abs().sum().item())
        assert (method.arena.buffer("fisher") >= 0.5 * first * (1 - 1e-6)).all()
        assert not torch.equal(method.arena.buffer("fisher"), 0.5 * first)
    seq, rows = start(tiny_models, "seqlora", max_grad_norm=0.0, lr=1e-3)
    train_task(seq, 0, rows[0])
    train_task(seq, 1, rows[1])
    free, _ = start(tiny_models, "ewc", ewc=EWCConfig(strength=0.0), max_grad_norm=0.0, lr=1e-3)
    train_task(free, 0, rows[0])
    train_task(free, 1, rows[1])
    torch.testing.assert_close(free.arena.data, seq.arena.data)
    assert moved[1] < 0.8 * moved[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["inclora", "olora"])
def test_old_adapters_are_frozen_and_summed(tiny_models: dict[str, Path], name: str, kind: str) -> None:
    method, rows = start(tiny_models, name, kind)
    train_task(method, 0, rows[0])
    method.lm.model.eval()
    batch = method.lm.collate(rows[1][:3])
    before = method.lm.loss(batch)[0]
    pairs = {
        n: (m.lora_A["default"].weight.clone(), m.lora_B["default"].weight.clone()) for n, m in method.layers.items()
    }
    method.begin_task(1, [])
    torch.testing.assert_close(method.lm.loss(batch)[0], before)  # a new pair starts at a product of 0
    for layer, module in method.layers.items():
        assert torch.equal(method.old[layer][0], pairs[layer][0]) and torch.equal(method.old[layer][1], pairs[layer][1])
        assert not torch.equal(module.lora_A["default"].weight, pairs[layer][0])
        assert not module.lora_B["default"].weight.any()
    method.arena.check()
    train_task(method, 1, rows[1])
    assert any(module.lora_B["default"].weight.any() for module in method.layers.values())
    for layer in method.layers:
        # begin_task ran twice: the second time it froze an untrained pair behind the first
        assert torch.equal(method.old[layer][0][: len(pairs[layer][0])], pairs[layer][0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_inclora_is_a_plain_lora_of_higher_rank(
    tiny_models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    method, rows = start(tiny_models, "inclora", kind)
    for index in (0, 1):
        train_task(method, index, rows[index])
        method.save_adapter(tmp_path / str(index))
    method.lm.model.eval()
    for index, rank in ((0, 8), (1, 16)):
        lm = load_language_model(
            method.config, {task.name: task.labels for task in TASKS}, adapter=tmp_path / str(index)
        )
        lm.model.eval()
        config = lm.model.peft_config["default"]
        assert (config.r, config.lora_alpha) == (rank, 4 * rank)
        same = all(
            torch.allclose(method.lm.loss(batch)[0], lm.loss(batch)[0], rtol=1e-4, atol=1e-5)
            for batch in [lm.collate(part[:3]) for part in rows]
        )
        assert same == (index == 1)


def test_olora_penalty_and_its_gradient(tiny_models: dict[str, Path]) -> None:
    method, rows = start(tiny_models, "olora", olora=OLoRAConfig(orthogonal=0.5, norm=0.25))
    train_task(method, 0, rows[0])
    method.begin_task(1, [])
    expected, overlap = 0.0, 0.0
    for layer, module in method.layers.items():
        module.lora_B["default"].weight.data.normal_()
        old, a, b = method.old[layer][0].double(), module.lora_A["default"].weight, module.lora_B["default"].weight
        overlap += sum(abs(float(x @ y)) for x in old for y in a.detach().double())
        expected += 0.25 * (math.sqrt(float(a.double().square().sum())) + math.sqrt(float(b.double().square().sum())))
    assert method.penalty().item() == pytest.approx(expected + 0.5 * overlap, rel=1e-5)
    method.lm.model.eval()
    batch = method.lm.collate(rows[1][:2])
    plain, count = method.lm.loss(batch)
    penalised, _ = method.loss(rows[1][:2])
    torch.testing.assert_close(penalised, plain + count * method.penalty())
    method.config.olora.norm = 0.0
    layer, module = next(iter(method.layers.items()))
    a, old = module.lora_A["default"].weight, method.old[layer][0]
    (grad,) = torch.autograd.grad(method.penalty(), a)
    torch.testing.assert_close(grad, 0.5 * (torch.sign(old @ a.T).T @ old))
    for layer, module in method.layers.items():
        # rows orthogonal to the old ones: the rest of an orthonormal basis
        basis = torch.linalg.svd(method.old[layer][0], full_matrices=True)[2]
        rank = len(method.old[layer][0])
        module.lora_A["default"].weight.data.copy_(basis[rank : 2 * rank])
    assert method.penalty().item() == pytest.approx(0.0, abs=1e-3)


def test_olora_keeps_the_first_pair_small_too(tiny_models: dict[str, Path]) -> None:
    method, rows = start(tiny_models, "olora", olora=OLoRAConfig(orthogonal=0.5, norm=0.25))
    method.begin_task(0, [])
    method.lm.model.eval()
    plain, count = method.lm.loss(method.lm.collate(rows[0][:2]))
    norms = sum(part.norm().item() for _, part in method.arena.views(method.arena.data))
    assert method.loss(rows[0][:2])[0].item() == pytest.approx(plain.item() + count * 0.25 * norms, rel=1e-5)


def test_old_pairs_see_the_dropped_inputs_of_the_new_one(tiny_models: dict[str, Path]) -> None:
    method, _ = start(tiny_models, "inclora", lora_dropout=0.5)
    name, module = next(iter(method.layers.items()))
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    nn.init.normal_(b)
    x = torch.randn(3, 5, a.shape[1])
    changes = []
    for old in ({}, {name: (a, b)}):
        method.old = old
        torch.manual_seed(0)
        changes.append(module(x) - module.base_layer(x))
    assert changes[0].any()
    torch.testing.assert_close(changes[1], 2 * changes[0])


def test_olora_without_penalty_is_inclora(tiny_models: dict[str, Path]) -> None:
    ends = []
    for name, options in (("inclora", {}), ("olora", {"olora": OLoRAConfig(orthogonal=0.0)}), ("olora", {})):
        method, rows = start(tiny_models, name, **options)
        for index in (0, 1):
            train_task(method, index, rows[index])
        ends.append(method.arena.data.clone())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_tasl_scores_and_merge(tiny_models: dict[str, Path]) -> None:
    method, rows = start(tiny_models, "tasl", tasl=TaSLConfig(decay=0.6, quantile=0.5, current=0.3))
    train_task(method, 0, rows[0])
    history = method.history.clone()
    method.begin_task(1, [])
    e = u = torch.zeros_like(method.arena.data).double()
    for step in range(3):
        method.arena.grad.normal_(generator=torch.Generator().manual_seed(step))
        s = (method.arena.data.double() * method.arena.grad.double()).abs()
        e = 0.6 * e + 0.4 * s
        u = 0.6 * u + 0.4 * (s - e).abs()
        method.inner_step(1e-2)
    units = [part.mean().item() for _, part in method.arena.views(e * u)]
    low, high = min(units), max(units)
    scores = torch.tensor([(value - low) / (high - low) for value in units])
    old, new = method.arena.buffer("old_weights").clone(), method.arena.data.clone()
    method.end_task(1)
    new_needs, old_needs = scores > scores.quantile(0.5), history > history.quantile(0.5)
    seen = set()
    for i, segment in enumerate(method.arena.segments):
        case = (bool(new_needs[i]), bool(old_needs[i]))
        seen.add(case)
        share = {(True, True): 0.3, (False, True): 0.0, (True, False): 1.0, (False, False): 0.5}[case]
        expected = share * segment.view(new) + (1 - share) * segment.view(old)
        torch.testing.assert_close(segment.view(method.arena.data), expected, rtol=1e-5, atol=1e-7)
    assert len(seen) >= 2
    torch.testing.assert_close(method.history, minmax(0.3 * scores + 0.7 * history), rtol=1e-3, atol=1e-5)


def test_tasl_merge_table() -> None:
    new = torch.tensor([True, True, False, False])
    old = torch.tensor([True, False, True, False])
    assert merge_weights(new, old, 0.3).tolist() == pytest.approx([0.3, 1.0, 0.0, 0.5])
    assert minmax(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert minmax(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_migu_keeps_gradient_rows_of_large_outputs(tiny_models: dict[str, Path], kind: str) -> None:
    method, rows = start(tiny_models, "migu", kind)
    for segment in method.arena.segments:
        segment.view(method.arena.data).normal_(generator=torch.Generator().manual_seed(segment.start))
    method.lm.model.eval()
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            n = output.detach().abs().reshape(-1, output.shape[-1]).sum(0)
            outputs[name] = outputs.get(name, 0) + n

        return hook

    for segment in method.arena.segments:
        method.lm.model.get_submodule(segment.name.removesuffix(".weight")).register_forward_hook(watch(segment.name))

    def backward() -> dict[str, Tensor]:
        outputs.clear()
        method.arena.zero_grad()
        for part in (rows[0][:2], rows[0][2:5]):  # two micro-batches of one step
            method.lm.loss(method.lm.collate(part))[0].backward()
        return {name: grad.clone() for name, grad in method.arena.views(method.arena.grad)}

    method.begin_task(0, [])
    whole = backward()
    method.modify_gradient()
    assert all(torch.equal(grad, whole[name]) for name, grad in method.arena.views(method.arena.grad))
    method.begin_task(1, [])
    whole = backward()
    method.modify_gradient()
    for name, grad in method.arena.views(method.arena.grad):
        n = outputs[name]
        dropped = n < n.quantile(0.7)
        assert dropped.sum().item() == math.ceil(0.7 * (len(n) - 1))
        assert not grad[dropped].any()
        assert torch.equal(grad[~dropped], whole[name][~dropped])


def test_migu_limits(tiny_models: dict[str, Path]) -> None:
    """Quantile 0 is SeqLoRA; quantile 1 leaves one row of each layer."""
    ends = {}
    for name, options in (("seqlora", {}), ("migu", {"migu": MIGUConfig(quantile=0.0)})):
        method, rows = start(tiny_models, name, **options)
        for index in (0, 1):
            train_task(method, index, rows[index])
        ends[name] = method.arena.data.clone()
    assert torch.equal(ends["seqlora"], ends["migu"])


def test_vrmcl_round_is_its_equation(tiny_models: dict[str, Path]) -> None:
    options = VRMCLConfig(inner_lr=0.02, inner_lr_lr=0.1, momentum=0.3, outer_lr=0.05, inner_steps=2)
    # Llama: rounding may put an activation of T5 on the other side of its ReLU
    method, rows = start(
        tiny_models, "vr-mcl", "llama", vrmcl=options, max_grad_norm=0.0, steps_per_task=None, epochs=1
    )
    lm, arena = method.lm, method.arena

    def gradient(point: Tensor, part: list[Encoded]) -> Tensor:
        before = arena.data.clone()
        arena.data.copy_(point)
        arena.zero_grad()
        loss, count = lm.loss(lm.collate(part))
        (loss / count).backward()
        found = arena.grad.clone()
        arena.zero_grad()
        arena.data.copy_(before)
        return found

    def feed(part: list[Encoded]) -> None:
        loss, count = method.loss(part)
        (loss / count).backward()

    method.begin_task(1, rows[1])
    theta, alpha = arena.data.clone(), torch.full_like(arena.data, options.inner_lr)
    last_d = last_w = None
    news = [[rows[0][:2], rows[0][2:4]], [rows[0][4:6], rows[0][6:8]], [rows[0][8:10], rows[0][10:12]]]
    for number, (a, b) in enumerate(news):
        memory = rows[1][number % 2 : number % 2 + 1]
        for part in (a, b):
            feed(part)
            method.inner_step(0.0)
        feed(memory)
        method.outer_step(0.0)
        method.end_round()
        first = gradient(theta, a)
        second = gradient(theta - alpha * first, b)
        w = theta - alpha * (first + second)
        d = 0.5 * (gradient(w, b) + gradient(w, memory))
        if last_d is not None:
            d = d + options.momentum * (last_d - 0.5 * (gradient(last_w, b) + gradient(last_w, memory)))
        alpha = (alpha + options.inner_lr_lr * d * (first + second)).clamp(min=0.0)
        theta, last_d, last_w = theta - options.outer_lr * d, d, w
        torch.testing.assert_close(arena.data, theta, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(arena.buffer("inner_rates"), alpha, rtol=1e-4, atol=1e-5)


def test_vrmcl_learns_its_rates_over_all_tasks(tiny_models: dict[str, Path]) -> None:
    method, rows = start(tiny_models, "vr-mcl", vrmcl=VRMCLConfig(inner_lr=0.05, inner_lr_lr=0.5))
    train_task(method, 0, rows[0])
    learned = {name: method.arena.buffer(name).clone() for name in ("inner_rates", "meta_gradient", "last_point")}
    assert (learned["inner_rates"] != 0.05).any()
    method.begin_task(1, rows[0][:3])
    assert all(torch.equal(method.arena.buffer(name), values) for name, values in learned.items())


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"mtl", "lfpt5"}))
def test_state_survives_saving_bit_for_bit(tiny_models: dict[str, Path], name: str) -> None:
    method, rows = start(tiny_models, name)
    train_task(method, 0, rows[0])
    state = copy.deepcopy(method.state_dict())
    other, _ = start(tiny_models, name, seed=0)
    other.load_state_dict(state)
    for end in (method, other):
        train_task(end, 1, rows[1], memory=rows[0][:3])
    assert torch.equal(method.arena.data, other.arena.data)
    batch = method.lm.collate(rows[0][:3])
    for end in (method, other):
        end.lm.model.eval()
    assert torch.equal(method.lm.loss(batch)[0], other.lm.loss(batch)[0])


def test_plain_adapters_need_nothing_of_ours() -> None:
    for method in METHODS.values():
        assert method.plain_adapter == (method.attach.__func__ is Method.attach.__func__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", METHODS)
def test_what_depends_on_micro_batches_says_so(tiny_models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """How a step is split changes rounding only, or the method says what else, and so does the advice on memory."""
    model = without_own_dropout(Path(shutil.copytree(tiny_models["llama"], tmp_path / "model")))
    sections = {"moelora": MoELoRAConfig(balance=1.0), "lfpt5": LFPT5Config(prompt_length=4, pseudo_candidates=0)}
    ends = []
    for accumulation in (1, 3):
        method, rows = start(
            {"llama": model}, name, "llama", batch_size=6, gradient_accumulation=accumulation, max_length=400,
            kif=KIFConfig(inner_steps=2), **sections,
        )  # fmt: skip
        method.phases(TASKS)
        train_task(method, 0, rows[0])
        # the other way round each task trains on rows of several lengths
        train_task(method, 1, rows[0] if name != "lfpt5" else rows[1], rows[0][:3])
        ends.append(method.arena.data.clone())
    apart = (ends[0] - ends[1]).abs().max().item() / ends[0].abs().max().item()
    own = method.of_micro_batches(method.config)
    assert (apart > 1e-3) == (own is not None), apart
    advice = less_memory_in_training(method.config, own)
    assert ("gradient_accumulation 6 (now 3), which gives the same result" in advice) == (own is None)
    # what keeps the result comes first
    assert own is None or advice.index("gradient_checkpointing") < advice.index(f"each micro-batch has its own {own}")


def test_balance_alone_looks_at_micro_batches_in_moelora() -> None:
    assert METHODS["moelora"].of_micro_batches(RunConfig(method="moelora")) is None
