"""Layers made fast: the same results as transformers' own, and what cannot be had is refused by name."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import Kind, build_tiny, build_type, topic_task, without_own_dropout
from torch import Tensor, nn
from transformers import AutoConfig, LongT5Config, LongT5ForConditionalGeneration
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from kif.attention import contiguous_position_bias, mask_position_bias_once
from kif.config import RunConfig
from kif.export import export
from kif.families import LanguageModel
from kif.layers import fuse_norms, use_liger
from kif.methods import METHODS
from kif.models import load_language_model
from kif.predict import Predictor
from kif.run import evaluate_run, train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOPICS = topic_task()
NORMS = (LlamaRMSNorm, T5LayerNorm)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models without dropout of their own."""
    return {kind: without_own_dropout(build_tiny(kind, tmp_path_factory.mktemp(kind))) for kind in get_args(Kind)}


def load(folder: Path, **options: Any) -> LanguageModel:
    config = RunConfig(model=str(folder), **{"device": "cpu", "lora_dropout": 0.0, **options})
    lm = load_language_model(config, {TOPICS.name: TOPICS.labels})
    lm.model.train()
    return lm


def gradient(lm: LanguageModel) -> tuple[float, Tensor]:
    """Loss and gradient where LoRA B is not zero."""
    generator = torch.Generator().manual_seed(1)
    trained = [p for p in lm.model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = None
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    loss, count = lm.loss(lm.collate(lm.encode(TOPICS, TOPICS.train)))
    (loss / count).backward()
    return loss.item() / count, torch.cat([p.grad.flatten() for p in trained if p.grad is not None])


def norm_of(kind: Any, size: int, dtype: torch.dtype, seed: int) -> nn.Module:
    norm: nn.Module = kind(size, eps=1e-6)
    norm.weight.data = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)  # type: ignore[union-attr]
    return norm


@given(
    st.sampled_from(NORMS), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 130),
    st.integers(1, 5), st.sampled_from([1e-3, 1.0, 100.0]), st.integers(0, 99),
)  # fmt: skip
def test_a_norm_is_as_exact_as_its_chain(
    kind: Any, dtype: torch.dtype, size: int, rows: int, scale: float, seed: int
) -> None:
    norm = norm_of(kind, size, dtype, seed)
    x = (torch.randn(rows, size, generator=torch.Generator().manual_seed(seed + 1)) * scale).to(dtype)
    weight, wide = norm.weight.detach().double(), x.double().requires_grad_()  # type: ignore[union-attr,operator]
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    exact.sum().backward()
    errors = []
    for fused in (False, True):
        assert not fused or fuse_norms(nn.Sequential(norm)) == 1
        own_x = x.clone().requires_grad_()
        out = norm(own_x)
        out.sum().backward()
        assert out.dtype == dtype and own_x.grad is not None and wide.grad is not None
        # a gradient is a difference of terms as large as weight / |x|
        terms = weight.norm() / wide.detach().norm().clamp(min=1e-3) * rows
        errors.append(((out - exact).norm() / exact.norm(), (own_x.grad - wide.grad).norm() / terms))
    for plain, ours in zip(*errors, strict=True):
        assert ours <= 1.5 * plain + torch.finfo(dtype).eps


def test_norms_stay_what_they_are_but_for_their_way(folders: dict[str, Path]) -> None:
    for kind, some in (("t5", True), ("llama", True), ("gpt2", False), ("bert", False)):
        lm = load(folders[kind], target_modules=["c_attn"] if kind == "gpt2" else None)
        loss, grads = gradient(lm)
        before = {name: type(module) for name, module in lm.base.named_modules()}
        found = fuse_norms(lm.base)
        assert (found > 0) == some
        changed = [name for name, module in lm.base.named_modules() if type(module) is not before[name]]
        assert len(changed) == found
        for name, module in lm.base.named_modules():
            assert isinstance(module, before[name]) and type(module).__name__ == before[name].__name__
        # once done, nothing is left to do
        assert fuse_norms(lm.base) == 0 and len({type(m) for m in lm.base.modules() if type(m) in NORMS}) == 0
        again, other = gradient(lm)
        assert again == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(other, grads, rtol=1e-3, atol=1e-6)
        assert lm.model.state_dict().keys() == copy.deepcopy(lm.model).state_dict().keys()


def test_only_what_computes_it_is_taken() -> None:
    class Shifted(LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.weight  # type: ignore[no-any-return]

    class More(LlamaRMSNorm):  # type: ignore[misc]
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.bias = nn.Parameter(torch.zeros(size))

    class Needy(LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return super().forward(x) * gate  # type: ignore[no-any-return]

    class Demanding(LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, x: Tensor, gate: Any = None) -> Tensor:
            return super().forward(x) * gate.float()  # type: ignore[no-any-return]

    others = [
        Shifted(8),
        More(8),
        Needy(8),
        Demanding(8),
        GemmaRMSNorm(8),
        nn.LayerNorm(8),
        nn.RMSNorm(8),
        nn.Linear(8, 8),
    ]
    kinds = [type(module) for module in others]
    assert fuse_norms(nn.Sequential(*others, LlamaRMSNorm(8))) == 1
    assert [type(module) for module in others] == kinds


def test_a_call_with_more_than_the_input_goes_the_old_way() -> None:
    class Gated(LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
            out: Tensor = super().forward(hidden_states)
            return out if gate is None else out * gate

    norm, x = Gated(8), torch.randn(2, 8)
    calls = [lambda: norm(x), lambda: norm(x, x), lambda: norm(x, gate=x), lambda: norm(hidden_states=x)]
    before = [call() for call in calls]
    assert fuse_norms(nn.Sequential(norm)) == 1
    for call, expected in zip(calls, before, strict=True):
        torch.testing.assert_close(call(), expected)


def test_a_norm_of_another_dtype_goes_the_old_way() -> None:
    for kind in NORMS:
        norm, x = norm_of(kind, 8, torch.bfloat16, 0), torch.randn(2, 8)
        before = norm(x)
        fuse_norms(nn.Sequential(norm))
        assert torch.equal(norm(x), before) and norm(x).dtype == before.dtype


def test_what_a_model_gets_depends_on_the_device(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    names = ("mask_position_bias_once", "fuse_norms", "contiguous_position_bias")
    for name in names:
        monkeypatch.setattr(f"kif.layers.{name}", lambda base, name=name: seen.append((name, type(base).__name__)))
    load(folders["t5"])
    kind = "T5ForConditionalGeneration"
    assert seen == [("mask_position_bias_once", kind)]
    seen.clear()
    monkeypatch.setattr("kif.models.resolve_device", lambda name: SimpleNamespace(type="cuda"))
    monkeypatch.setattr("torch.nn.Module.to", lambda self, *_, **__: self)
    load(folders["t5"])
    assert seen == [(name, kind) for name in names]


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
def test_the_position_bias_lies_in_rows(model_type: str, tmp_path: Path) -> None:
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0}
    lm = load(build_type(model_type, "encoder-decoder", tmp_path, **t5))
    contiguous_position_bias(lm.base)
    with_bias = [m for m in lm.base.modules() if getattr(m, "has_relative_attention_bias", False)]
    assert len(with_bias) == 2
    for module in with_bias:
        bias, plain = module.compute_bias(5, 6), type(module).compute_bias(module, 5, 6)
        assert torch.equal(bias, plain) and bias.is_contiguous() and not plain.is_contiguous()
        assert bias.shape == (1, 2, 5, 6)
    # a model without one is left alone
    contiguous_position_bias(nn.Linear(2, 2))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_the_position_bias_is_masked_once(
    model_type: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2, "dropout_rate": 0}
    folder = build_type(model_type, "encoder-decoder", tmp_path, **t5)
    monkeypatch.setattr("kif.models.fit_layers", lambda *_: None)
    # umt5 is refused with transformers 5.17, for its decoder
    monkeypatch.setattr("kif.models.check_order", lambda *_: None)
    lm = load(folder, precision="bf16" if precision == "bf16" else "fp32", target_modules=["q", "v"])
    width = lm.collate(lm.encode(TOPICS, TOPICS.train))["input_ids"].shape[1]
    attend, masks = F.scaled_dot_product_attention, []

    def watched(query: Tensor, key: Tensor, *args: Any, attn_mask: Tensor, **kwargs: Any) -> Tensor:
        if query.shape[2] == key.shape[2] == width:
            masks.append(attn_mask)
        return attend(query, key, *args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)

    def run() -> tuple[float, Tensor, int]:
        masks.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss, grad = gradient(lm)
        # all still live, so that places tell them apart
        return loss, grad, len({mask.data_ptr() for mask in masks})

    loss, grad, before = run()
    if not masks:
        pytest.skip("this transformers masks the bias once, by itself")
    mask_position_bias_once(lm.base)
    again, same, after = run()
    assert again == loss and torch.equal(same, grad) and grad.any()
    # in umt5 every layer has a bias of its own
    assert (before, after) == (3, 3 if model_type == "umt5" else 1)


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_called_in_other_ways_stays_what_it_was(
    autocast: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kif.models.fit_layers", lambda *_: None)
    lm = load(folders["t5"])
    if lm.base.config._attn_implementation != "sdpa":
        pytest.skip("this transformers masks T5's bias once, by itself")
    encoder, decoder = (m for m in lm.base.modules() if getattr(m, "has_relative_attention_bias", False))
    x, bias = torch.randn(3, 5, lm.base.config.d_model), torch.randn(1, encoder.n_heads, 5, 5)
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    # a row that sees nothing sees all alike, and not NaN
    mask[1, ..., 3:], mask[2] = False, False
    calls: list[dict[str, Any]] = [
        {"mask": mask, "position_bias": None},
        {"mask": mask, "position_bias": bias},
        {"mask": None, "position_bias": bias},
        {"mask": None, "position_bias": None},
        {"mask": torch.where(mask, 0.0, -1e4), "position_bias": None},
        {},
    ]

    def answers() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            named = encoder(hidden_states=x, mask=mask, position_bias=None)[0]
            return [named, *(module(x, **call)[0] for module in (encoder, decoder) for call in calls)]

    before = answers()
    mask_position_bias_once(lm.base)
    assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(answers(), before, strict=True))
    # what a decoder masks is small, and its bias depends on what is cached
    assert not decoder._forward_pre_hooks and encoder._forward_pre_hooks


def test_local_attention_is_left_alone() -> None:
    config = LongT5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, local_radius=3, dropout_rate=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = LongT5ForConditionalGeneration(config)
    ids = torch.randint(1, 50, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril(9), "labels": ids[:, :3].clone()}
    before = model(**batch).loss
    mask_position_bias_once(model)
    assert torch.equal(model(**batch).loss, before)


def test_liger_is_asked_for_what_pays(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(folders["llama"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'use_liger_kernel needs liger-kernel: pip install "recurrent-kif\[liger\]"'):
        use_liger(lm.base)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="use_liger_kernel needs a GPU, the model is on cpu: leave it out"):
        METHODS["seqlora"](lm, RunConfig(use_liger_kernel=True))
    asked: list[Any] = []
    fake: Any = ModuleType("liger_kernel.transformers")
    fake.monkey_patch = SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None}, _apply_liger_kernel_to_instance=lambda **how: asked.append(how)
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    on_gpu = [SimpleNamespace(device=torch.device("cuda"))]

    def base(kind: str, **options: Any) -> Any:
        return SimpleNamespace(config=AutoConfig.for_model(kind, **options), parameters=lambda: iter(on_gpu))

    with pytest.raises(ValueError, match="liger-kernel has nothing for model type 't5': leave use_liger_kernel out"):
        use_liger(base("t5"))
    with pytest.raises(ValueError, match="liger-kernel has no hidden_act 'relu' for model type 'llama': leave"):
        use_liger(base("llama", hidden_act="relu"))
    model = base("llama", hidden_act="swish")
    use_liger(model)
    off = {"rms_norm": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    assert asked == [{"model": model, **off}]


@pytest.mark.parametrize("found", [None, "liger"])
def test_what_liger_needs_is_known_before_a_model_is_read(
    found: str | None, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    config = RunConfig(
        model=str(tmp_path / "none"), data=str(written), tasks=["colours"], output=str(tmp_path / "run"), device="cpu",
        use_liger_kernel=True,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="use_liger_kernel needs " + ("a GPU, the model is on cpu" if found else "lig")
    ):
        train(config, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_with_liger_answers_without_it(folders: dict[str, Path], written: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = RunConfig(
        model=str(folders["llama"]), data=str(written), tasks=["colours"], output=str(run), method="seqlora",
        steps_per_task=2, limit_eval=2, device="cpu", cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    train(config, progress=False)
    before = evaluate_run(run, progress=False)["scores"]
    text = (run / "config.yaml").read_text()
    assert text.count("use_liger_kernel: false") == 1
    # as if it had been trained on a GPU
    (run / "config.yaml").write_text(text.replace("use_liger_kernel: false", "use_liger_kernel: true"))
    assert evaluate_run(run, progress=False)["scores"] == before
    assert Predictor(run, "colours").config.use_liger_kernel
    export(run, tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_liger_on_a_gpu_trains_as_the_model(precision: Any, folders: dict[str, Path]) -> None:
    pytest.importorskip("liger_kernel")
    options = {"device": "cuda", "precision": precision, "target_modules": ["q_proj", "up_proj", "down_proj"]}
    loss, grads = gradient(load(folders["llama"], **options))
    lm = load(folders["llama"], **options)
    use_liger(lm.base)
    found, others = gradient(lm)
    exact = precision == "fp32"
    assert found == pytest.approx(loss, rel=1e-4 if exact else 0.02)
    assert (others - grads).norm() < (1e-3 if exact else 0.1) * grads.norm()
