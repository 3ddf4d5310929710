"""The adapter's products in bf16: close to those in fp32, never with old weights, and none of it in evaluation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTuner
from tiny import build_tiny, topic_task, without_dropout
from torch import Tensor, nn

from kif.arena import ParameterArena
from kif.config import RunConfig
from kif.families import LanguageModel
from kif.low_precision import BF16Adapter
from kif.methods import METHODS, Method
from kif.models import load_language_model

KINDS = ("t5", "llama", "bert")
ROWS = topic_task().train


def load(folder: Path, adapter_precision: Any, **options: Any) -> tuple[LanguageModel, Method]:
    """A model in bf16 whose LoRA B are not zero."""
    config = RunConfig(
        model=str(folder), method="seqlora", device="cpu", adapter_precision=adapter_precision,
        **{"precision": "bf16", "lora_dropout": 0.0, **options},
    )  # fmt: skip
    lm = load_language_model(config, {"topics": topic_task().labels})
    method = METHODS["seqlora"](lm, config)
    generator = torch.Generator().manual_seed(1)
    for name, view in method.arena.views(method.arena.data):
        if "lora_B" in name:
            view.copy_(torch.randn(view.shape, generator=generator) * 0.02)
    return lm, method


def gradient(lm: LanguageModel, method: Method) -> tuple[float, Tensor]:
    """Loss and gradient of the tiny models without their own dropout."""
    without_dropout(lm.model)
    lm.model.train()
    method.arena.zero_grad()
    loss, count = lm.loss(lm.collate(lm.encode(topic_task(), ROWS)))
    (loss / count).backward()
    return loss.item() / count, method.arena.grad.clone()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: build_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_that_of_a_bf16_base(kind: str, folders: dict[str, Path]) -> None:
    _, exact = gradient(*load(folders[kind], "fp32", precision="fp32"))
    loss, plain = gradient(*load(folders[kind], "fp32"))
    rounded_loss, rounded = gradient(*load(folders[kind], "bf16"))
    assert rounded.dtype == torch.float32 and rounded_loss == pytest.approx(loss, rel=0.1)
    assert not torch.equal(rounded, plain)
    # of the base's own error, which for these random weights is up to half of the gradient
    assert (rounded - exact).norm() < 2.0 * (plain - exact).norm() + 0.01 * exact.norm()


@pytest.mark.parametrize("hooks_of_the_base", [True, False], ids=["", "PEFT 0.20"])
def test_layers_multiply_with_the_rounded_present_weights(
    folders: dict[str, Path], hooks_of_the_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hooks_of_the_base:
        monkeypatch.setattr(BaseTuner, "forward", lambda self, *given, **named: self.model.forward(*given, **named))
    lm, method = load(folders["llama"], "bf16")
    layer = next(module for name, module in lm.model.named_modules() if name.endswith("q_proj.lora_A.default"))
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    for scale in (1.0, 3.0):
        # as fusion does: nobody is told
        method.arena.data.mul_(scale)
        gradient(lm, method)
        inputs, output = seen[-1]
        assert inputs.dtype == output.dtype == torch.bfloat16
        assert torch.equal(output, F.linear(inputs, layer.weight.bfloat16()))
    # of a pass whose backward is still to come the weights are kept
    first, _ = lm.loss(lm.collate(lm.encode(topic_task(), ROWS)))
    method.arena.zero_grad()
    with torch.no_grad():
        lm.loss(lm.collate(lm.encode(topic_task(), ROWS)))
    first.backward()
    assert method.arena.grad.isfinite().all() and method.arena.grad.abs().sum() > 0


def lora_layer(**options: Any) -> tuple[Any, ParameterArena, Tensor]:
    """A linear layer of 24 to 40 with LoRA in bf16 products, its arena, and an input."""
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("linear", nn.Linear(24, 40, bias=True, dtype=torch.bfloat16))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=24, target_modules=["linear"], **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3
    arena = ParameterArena.of(model)
    BF16Adapter(SimpleNamespace(model=model), arena)  # type: ignore[arg-type]
    layer = base.get_submodule("linear")
    layer.add = lambda: model.add_adapter("more", LoraConfig(r=8, target_modules=["linear"]))  # type: ignore[assignment]
    return layer, arena, torch.randn(3, 5, 24).bfloat16()


def passes(layer: Any, arena: ParameterArena, x: Tensor, kind: Any = None) -> list[Tensor]:
    """Result, gradient of the input and of the adapter, by the layer's class or another one."""
    own, layer.__class__ = layer.__class__, kind or layer.__class__
    x = x.detach().requires_grad_()
    arena.zero_grad()
    result = layer(x)
    result.backward(torch.linspace(-1, 1, result.numel()).view(result.shape).to(result.dtype))
    layer.__class__ = own
    return [result.detach().double(), x.grad.double(), arena.grad.clone().double()]  # type: ignore[union-attr]


def test_scaling_and_adding_within_the_product_errs_no_more_than_peft() -> None:
    layer, arena, x = lora_layer()
    assert type(layer) is not Linear and isinstance(layer, Linear)
    found, plain = passes(layer, arena, x), passes(layer, arena, x, Linear)
    weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias.double()
    first, second = (layer.get_submodule(f"lora_{part}.default").weight.bfloat16().double() for part in "AB")
    exact_x = x.double()
    gradient = torch.linspace(-1, 1, found[0].numel()).view(found[0].shape).bfloat16().double()
    inner = exact_x @ first.T
    exact = [
        exact_x @ weight.T + bias + 3.0 * inner @ second.T,
        gradient @ weight + 3.0 * gradient @ second @ first,
        torch.cat([
            (3.0 * (gradient @ second).flatten(0, 1).T @ exact_x.flatten(0, 1)).flatten(),
            (3.0 * gradient.flatten(0, 1).T @ inner.flatten(0, 1)).flatten(),
        ]),
    ]  # fmt: skip
    for mine, peft, right in zip(found, plain, exact, strict=True):
        assert mine.shape == right.shape and not mine.equal(peft)
        assert (mine - right).norm() <= 1.05 * (peft - right).norm()


def test_dropout_is_on_the_adapters_side_alone() -> None:
    layer, arena, x = lora_layer(lora_dropout=0.5)
    torch.manual_seed(3)
    found = passes(layer, arena, x)
    torch.manual_seed(3)
    for mine, peft in zip(found, passes(layer, arena, x, Linear), strict=True):
        assert (mine - peft).norm() < 0.01 * peft.norm()


@pytest.mark.parametrize(
    "case", ["evaluation", "fp32", "disabled", "merged", "two", "dora", "hook", "pre-hook", "hook of the base", "base"]
)
def test_where_peft_does_more_than_add_it_is_peft(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, x = lora_layer(use_dora=case == "dora")
    second = layer.lora_B["default"]
    seen: list[str] = []
    monkeypatch.setattr(Linear, "forward", lambda self, x: seen.append("peft") or x)
    layer(x)
    # two-dimensional inputs, too
    layer(x[0])
    assert seen == (["peft"] * 2 if case == "dora" else [])
    seen.clear()
    if case == "evaluation":
        layer.eval()
    elif case == "fp32":
        x = x.float()
    elif case == "disabled":
        layer.enable_adapters(False)
    elif case == "merged":
        layer.merge()
    elif case == "two":
        layer.add()
        layer.set_adapter(["default", "more"])
    elif case == "hook":
        second.register_forward_hook(lambda *_: None)
    elif case == "pre-hook":
        second.register_forward_pre_hook(lambda *_: None)
    elif case == "hook of the base":
        layer.base_layer.register_forward_hook(lambda *_: None)
    elif case == "base":
        layer.base_layer.__class__ = type("Other", (nn.Linear,), {})
    layer(x)
    assert seen == ["peft"]


def test_only_the_products_with_bf16_inputs_change(folders: dict[str, Path]) -> None:
    lm, _ = load(folders["t5"], "bf16", target_modules=["q", "wo"])
    # T5 turns what `wo` reads into the dtype of its weight, which transformers keeps in fp32 beside fp16
    for name, parameter in lm.model.named_parameters():
        if name.endswith(".wo.base_layer.weight"):
            parameter.data = parameter.data.float()
    kept = {name: layer for name, layer in lm.model.named_modules() if name.endswith("lora_A.default")}
    seen: dict[str, torch.dtype] = {}
    for name, layer in kept.items():
        layer.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output.dtype}))
    lm.model.train()
    lm.loss(lm.collate(lm.encode(topic_task(), ROWS)))
    assert {name: dtype == torch.float32 for name, dtype in seen.items()} == {name: ".wo." in name for name in kept}


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_that_of_peft(kind: str, folders: dict[str, Path]) -> None:
    found = []
    for precision in ("fp32", "bf16"):
        lm, _ = load(folders[kind], precision)
        lm.model.eval()
        batch = lm.collate(lm.encode(topic_task(), ROWS))
        found.append((lm.loss(batch)[0].item(), lm.answer(topic_task(), lm.encode(topic_task(), ROWS), "rank", 4)))
    assert found[0] == found[1]


def test_it_needs_a_base_in_bf16() -> None:
    with pytest.raises(ValueError, match="adapter_precision bf16 needs precision bf16, got precision fp32"):
        RunConfig(adapter_precision="bf16")
