"""MoELoRA and SAPT: blocks of a LoRA mixed by weights of each token or row, against plain computations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_setup import KINDS, TASKS, start, train_task
from torch import Tensor, nn

from kif.config import MoELoRAConfig, SAPTConfig
from kif.methods import METHODS, Method
from kif.methods.base import METHOD_FILE
from kif.methods.lora_layers import lora_layers
from kif.models import load_language_model


def gated_layer(tiny_models: dict[str, Path], name: str, kind: str, **options: Any) -> tuple[Any, Any, Any]:
    """A method whose blocks are drawn at random, one of its layers, and a batch of rows."""
    method, rows = start(tiny_models, name, kind, **options)
    torch.manual_seed(0)
    for _, layer in sorted(getattr(method, "layers", lora_layers(method.lm.model)).items()):
        layer.lora_B["default"].weight.data.normal_()
    return method, next(iter(lora_layers(method.lm.model).values())), rows


def heard(module: nn.Module) -> dict[str, Tensor]:
    """Input and output of the module's last forward pass."""
    found: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found.update(x=inputs[0].detach(), y=output.detach())

    module.register_forward_hook(keep)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_moelora_mixes_experts_for_each_token(tiny_models: dict[str, Path], kind: str) -> None:
    method, layer, rows = gated_layer(tiny_models, "moelora", kind, moelora=MoELoRAConfig(experts=3, balance=0.5))
    layer.moe_router.weight.data.normal_()
    seen = heard(layer)
    method.lm.model.eval()
    loss, count = method.loss(rows[0][:3])
    x, r = seen["x"], method.config.lora_r
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    assert len(a) == 3 * r and layer.scaling["default"] == method.config.lora_alpha / r
    g = torch.softmax(x @ layer.moe_router.weight.detach().T, -1)
    expected = layer.base_layer(x)
    for e in range(3):
        block = slice(e * r, (e + 1) * r)
        expected = expected + 4.0 * g[..., e : e + 1] * (x @ a[block].T @ b[:, block].T)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-4)

    flat = g.reshape(-1, 3)
    share = torch.stack([(flat.argmax(1) == e).float().mean() for e in range(3)])
    torch.testing.assert_close(method._gates[layer_name(method, layer)].weights.detach(), g)
    others = [gates for name, gates in method._gates.items() if name != layer_name(method, layer)]
    terms = [3 * (share * flat.mean(0)).sum()]
    for gates in others:
        w = gates.weights.detach().reshape(-1, 3)
        used = torch.stack([(w.argmax(1) == e).float().mean() for e in range(3)])
        terms.append(3 * (used * w.mean(0)).sum())
    plain = method.lm.loss(method.lm.collate(rows[0][:3]))[0]
    torch.testing.assert_close((loss - plain).detach(), count * 0.5 * torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)


def layer_name(method: Method, layer: Any) -> str:
    return next(name for name, module in lora_layers(method.lm.model).items() if module is layer)


def test_moelora_with_one_expert_is_seqlora(tiny_models: dict[str, Path]) -> None:
    one, rows = start(tiny_models, "moelora", moelora=MoELoRAConfig(experts=1))
    seq, _ = start(tiny_models, "seqlora")
    for method in (one, seq):
        for index in (0, 1):
            train_task(method, index, rows[index])
    weights = {name: view for name, view in one.arena.views(one.arena.data) if "moe_router" not in name}
    for name, view in seq.arena.views(seq.arena.data):
        torch.testing.assert_close(weights[name], view)


@pytest.mark.parametrize("kind", KINDS)
def test_sapt_mixes_tasks_for_each_row(tiny_models: dict[str, Path], kind: str) -> None:
    method, rows = start(tiny_models, "sapt", kind)
    for index in (0, 1):
        train_task(method, index, rows[index])
    name, layer = next(iter(method.layers.items()))
    seen = heard(layer)
    lm = method.lm
    lm.model.eval()
    batch = [rows[0][3], rows[1][0]]
    lm.loss(lm.collate(batch))

    attention, d = lm.model.sapt_attention, lm.model.sapt_key.numel()
    table = lm.base.get_input_embeddings().weight.detach()
    keys = torch.stack([*method._old_keys, lm.model.sapt_key.detach()])
    w = []
    for row in batch:
        e = table[torch.tensor(row.input_ids)].max(0).values
        h = F.silu(attention.up.weight @ (attention.down.weight @ e))
        h = F.layer_norm(h, (d,), attention.norm.weight, attention.norm.bias)
        w.append(torch.softmax(keys @ h.detach() / math.sqrt(d), 0))
    assert not torch.allclose(w[0], w[1])
    x, (old_a, old_b) = seen["x"], method.old[name]
    pairs = [(old_a, old_b), (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())]
    expected = layer.base_layer(x)
    for task, (a, b) in enumerate(pairs):
        weight = torch.stack([row[task] for row in w])[:, None, None]
        expected = expected + 4.0 * weight * (x @ a.T @ b.T)
    torch.testing.assert_close(seen["y"], expected.detach(), rtol=1e-4, atol=1e-4)

    stored = torch.stack([method._attend([row])[0] for row in rows[1]]).mean(0).detach()
    torch.testing.assert_close(method.means["sentiment"], stored)
    assert method.means["topics"].tolist() == [1.0]
    drift = method.drift({"topics": [rows[0][3]], "sentiment": [rows[1][0]]})
    first = -math.log(float(w[0][0]))
    second = sum(float(s * (s / p).log()) for s, p in zip(stored, w[1], strict=True))
    assert drift.item() == pytest.approx(first + second, rel=1e-4)


def test_sapt_trains_the_new_pair_and_key_only(tiny_models: dict[str, Path]) -> None:
    method, rows = start(tiny_models, "sapt")
    train_task(method, 0, rows[0])
    pairs = {n: m.lora_A["default"].weight.clone() for n, m in method.layers.items()}
    key = method.lm.model.sapt_key.clone()
    train_task(method, 1, rows[1], memory=rows[0][:4])
    assert torch.equal(method._old_keys[0], key) and not torch.equal(method.lm.model.sapt_key, key)
    assert all(torch.equal(method.old[name][0], a) for name, a in pairs.items())


def test_sapt_strength_holds_the_attention(tiny_models: dict[str, Path]) -> None:
    drifts = []
    for strength in (0.0, 100.0):
        method, rows = start(tiny_models, "sapt", sapt=SAPTConfig(strength=strength), steps_per_task=12)
        train_task(method, 0, rows[0])
        train_task(method, 1, rows[1], memory=rows[0][:4])
        drifts.append(method.drift({"topics": rows[0]}).item())
    assert drifts[1] < 0.5 * drifts[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["moelora", "sapt"])
def test_gated_adapters_answer_alike_when_loaded(
    tiny_models: dict[str, Path], name: str, kind: str, tmp_path: Path
) -> None:
    method, rows = start(tiny_models, name, kind, lr=5e-2)
    for index in (0, 1):
        train_task(method, index, rows[index])
    method.save_adapter(tmp_path)
    method.lm.model.eval()
    labels = {task.name: task.labels for task in TASKS}
    lm = load_language_model(method.config, labels, adapter=tmp_path)
    METHODS[name].attach(lm, method.config, tmp_path)
    lm.model.eval()
    without = load_language_model(method.config, labels, adapter=tmp_path)
    without.model.eval()
    for task, part in zip(TASKS, rows, strict=True):
        losses = [m.loss(m.collate(part))[0].detach() for m in (method.lm, lm, without)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(losses[2], losses[0], rtol=1e-3)
        for mode in ("rank", "generate"):
            ours, loaded = (m.answer(task, part, mode, 4) for m in (method.lm, lm))
            assert loaded == ours
            # rows are weighed by themselves: no answer depends on the others of its batch
            assert [lm.answer(task, [row], mode, 4)[0] for row in part] == loaded
    (tmp_path / METHOD_FILE).write_bytes(b"no")
    with pytest.raises(ValueError, match=f"{METHOD_FILE} is damaged"):
        METHODS[name].attach(without, method.config, tmp_path)
    (tmp_path / METHOD_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="was not saved by this method"):
        METHODS[name].attach(without, method.config, tmp_path)
