"""Bases in 8 and 4 bits by bitsandbytes: what is quantised, gradients, runs, export, refusals."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from method_setup import start, train_task
from peft import PeftModel
from tiny import build_tiny, topic_task
from transformers import AutoModelForCausalLM

from kif.arena import ParameterArena
from kif.config import RunConfig
from kif.export import export
from kif.layers import forget_8bit_inputs
from kif.models import load_language_model
from kif.run import train

TASK = topic_task(12)
KINDS = ("llama", "t5", "bert", "gpt2")
FORMS = ("int8", "nf4", "fp4")
Folders = dict[str, Path]

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: the extra bnb"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("models")
    return {kind: build_tiny(kind, root / kind) for kind in KINDS}  # type: ignore[arg-type]


def load(folder: Path, **options: Any) -> Any:
    return load_language_model(RunConfig(model=str(folder), device="cpu", **options), {"topics": TASK.labels})


def loss_of(lm: Any) -> torch.Tensor:
    loss, count = lm.loss(lm.collate(lm.encode(TASK, TASK.train)))
    mean: torch.Tensor = loss / count
    return mean


@needs_bitsandbytes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantised_and_that_gradients_arrive(folders: Folders, kind: str, form: str) -> None:
    exact = load(folders[kind], target_modules=["all-linear"])
    lm = load(folders[kind], target_modules=["all-linear"], quantization=form, precision="bf16")
    stored = torch.int8 if form == "int8" else torch.uint8
    for name, parameter in lm.model.named_parameters():
        linear = "base_layer.weight" in name and ".wo." not in name
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32 and "lora_" in name
        elif linear or "pooler.dense.weight" in name:
            assert parameter.dtype == stored, name
        else:
            assert parameter.dtype == torch.bfloat16, name
    if form == "int8":
        eight = [module for name, module in lm.model.named_modules() if name.endswith("base_layer")]
        # or it keeps its input
        assert {len(module._forward_hooks) for module in eight if hasattr(module, "state")} == {1}
    # the adapter begins as it does on an exact base; PEFT passes it through the base's bf16
    own, theirs = (ParameterArena.of(each.model) for each in (lm, exact))
    assert [segment.name for segment in own.segments] == [segment.name for segment in theirs.segments]
    torch.testing.assert_close(own.data, theirs.data, rtol=2**-8, atol=0.0)

    for each in (lm, exact):
        each.model.eval()
    loss, reference = loss_of(lm), loss_of(exact)
    torch.testing.assert_close(loss, reference, rtol=0.05, atol=0.05)
    loss.backward()
    reference.backward()
    cosine = torch.nn.functional.cosine_similarity(own.grad, theirs.grad, dim=0)
    assert cosine > (0.98 if form == "int8" else 0.5)


@needs_bitsandbytes
@pytest.mark.parametrize("training", [False, True])
def test_8_bit_layers_keep_no_input(training: bool) -> None:
    """bitsandbytes does a GPU's way and a CPU's by different functions; on a CPU the former outside training."""
    from bitsandbytes.nn import Linear8bitLt

    torch.manual_seed(0)
    weight, given = torch.randn(24, 16), torch.randn(2, 5, 16, dtype=torch.bfloat16)

    def run(forget: bool) -> tuple[bool, torch.Tensor, torch.Tensor]:
        layer = Linear8bitLt(16, 24, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.load_state_dict({"weight": weight})
        layer.requires_grad_(False).to("cpu").train(training)
        if forget:
            forget_8bit_inputs(layer)
        leaf = given.clone().requires_grad_()
        # of a sum nothing is kept
        x = leaf + 1
        place = x.data_ptr()
        result = layer(x)
        del x
        tensors = (each for each in gc.get_objects() if type(each) is torch.Tensor and not each.is_meta)
        kept = any(each.numel() and each.data_ptr() == place for each in tensors)
        result.sin().sum().backward()
        assert leaf.grad is not None
        return kept, result.detach(), leaf.grad

    kept, result, gradient = run(forget=True)
    usually, expected, expected_gradient = run(forget=False)
    assert usually and not kept
    assert result.equal(expected) and gradient.equal(expected_gradient) and gradient.abs().sum() > 0


@needs_bitsandbytes
@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation_leaves_the_gradient_as_it_was(folders: Folders, form: str) -> None:
    lm = load(folders["llama"], quantization=form, target_modules=["all-linear"], lora_dropout=0.0)
    arena = ParameterArena.of(lm.model)
    gradients = []
    for _ in range(2):
        lm.model.train()
        loss_of(lm).backward()
        gradients.append(arena.grad.clone())
        arena.zero_grad()
        lm.model.eval()
        rows = lm.encode(TASK, TASK.train)[:2]
        with torch.no_grad():
            loss_of(lm)
        lm.answer(TASK, rows, "generate", 3)
        lm.answer(TASK, rows, "rank", 3)
    assert gradients[0].any() and torch.equal(*gradients)


@needs_bitsandbytes
@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_no_gradient(folders: Folders, form: str) -> None:
    found = []
    for wanted in (False, True):
        torch.manual_seed(0)
        lm = load(folders["llama"], quantization=form, gradient_checkpointing=wanted, lora_dropout=0.0)
        arena = ParameterArena.of(lm.model)
        lm.model.train()
        layers: list[bool] = []
        lm.base.model.layers[0].mlp.register_forward_pre_hook(lambda *given: layers.append(True))  # noqa: B023
        for _ in range(2):
            loss_of(lm).backward()
        assert len(layers) == (4 if wanted else 2)
        found.append(arena.grad.clone())
    assert found[0].any() and torch.equal(*found)


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["recurrent-kif", "olora", "moelora", "sapt", "migu", "l2p", "vr-mcl"])
def test_methods_train_the_adapter_alone(folders: Folders, name: str) -> None:
    method, rows = start(folders, name, "llama", quantization="nf4")
    frozen = {key: p.detach().clone() for key, p in method.lm.model.named_parameters() if not p.requires_grad}
    data = method.arena.data.clone()
    for index in range(2):
        train_task(method, index, rows[index], rows[0][:4] if index else None)
    assert not torch.equal(method.arena.data, data) and method.skipped == 0
    changed = [
        key for key, p in method.lm.model.named_parameters() if key in frozen and not torch.equal(p, frozen[key])
    ]
    assert not changed


@needs_bitsandbytes
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_run_its_adapter_and_its_export(written: Path, folders: Folders, tmp_path: Path, form: Any) -> None:
    config = RunConfig(
        model=str(folders["llama"]), data=str(written), output=str(tmp_path / "run"), method="recurrent-kif",
        tasks=["colours", "sizes"], steps_per_task=12, lr=3e-2, max_length=64, max_new_tokens=4, limit_eval=2,
        device="cpu", quantization=form, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    train(config, progress=False)
    lm = load_language_model(config, {"colours": None, "sizes": None}, adapter=tmp_path / "run" / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    export(tmp_path / "run", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in merged.parameters()} == {torch.float32} and "quantization_config" not in merged.config
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        quantised, exact, written_out = (model.eval()(ids).logits for model in (lm.model, plain, merged))
    # the merged model is the unquantised base with the adapter; the quantised one is near it
    torch.testing.assert_close(written_out, exact, rtol=1e-4, atol=1e-4)
    assert (quantised - exact).norm() < 0.5 * exact.norm() and not torch.equal(quantised, exact)


@needs_bitsandbytes
def test_modules_that_are_quantised_cannot_be_trained_whole(folders: Folders) -> None:
    with pytest.raises(ValueError, match=r"mlp.up_proj.weight is quantised .*target_modules.* quantization to none"):
        load(folders["llama"], quantization="nf4", modules_to_save=["up_proj"])
    lm = load(folders["llama"], quantization="nf4", modules_to_save=["lm_head", "model.norm"])
    loss_of(lm).backward()
    whole = [p for name, p in lm.model.named_parameters() if "modules_to_save" in name]
    assert len(whole) == 2 and all(p.grad is not None and p.grad.any() for p in whole)


def test_refusals(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folders["llama"], tmp_path / "stored")
    config = json.loads((tmp_path / "stored" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "stored" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is stored quantised.*give the original one"):
        load(tmp_path / "stored")
    if importlib.util.find_spec("bitsandbytes") is not None:
        with pytest.raises(ValueError, match=r"int8 does not work with head=linear.*use head=cosine"):
            load(folders["bert"], head="linear", quantization="int8")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    with pytest.raises(ValueError, match=r'quantization nf4 needs bitsandbytes: pip install "recurrent-kif\[bnb\]"'):
        load(folders["llama"], quantization="nf4")
