"""The adapter's products in bf16: close to those in fp32, never with old weights, and none of it in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTuner
from tiny import build_tiny, topic_task, without_dropout
from torch import Tensor

from kif.config import RunConfig
from kif.families import LanguageModel
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
