"""Loading: families, precision, adapters that unmodified PEFT reads, and refusals."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import build_tiny, free_text_task, sentiment_task, topic_task
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    ViTConfig,
)

from kif.config import RunConfig
from kif.families import LanguageModel
from kif.models import family_of, load_language_model, resolve_device
from kif.soundness import check_order, check_ties, check_tokens

TOPICS, SENTIMENT, FREE = topic_task(), sentiment_task(), free_text_task()
LABELS = {"topics": TOPICS.labels, "sentiment": SENTIMENT.labels}
AUTO: dict[str, Any] = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM, "bert": AutoModel}
ALL = pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("models")
    return {kind: build_tiny(kind, root / kind) for kind in ("t5", "llama", "bert")}


def load(folder: Path, adapter: Path | None = None, **changes: Any) -> LanguageModel:
    return load_language_model(RunConfig(model=str(folder), device="cpu", **changes), LABELS, adapter)


def trained(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in lm.model.named_parameters() if p.requires_grad}


def take_steps(lm: LanguageModel, steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in lm.model.parameters() if p.requires_grad], lr=0.1)
    batch = lm.collate(lm.encode(TOPICS, TOPICS.train))
    lm.model.train()
    for _ in range(steps):
        loss, count = lm.loss(batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    lm.model.eval()


@ALL
def test_family_and_adapter(folders: Folders, kind: str) -> None:
    lm = load(folders[kind], lora_r=4, lora_alpha=16, lora_dropout=0.1)
    assert lm.family == {"t5": "encoder-decoder", "llama": "decoder", "bert": "encoder"}[kind]
    lora = lm.model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (4, 16, 0.1)
    names = {"t5": {"q", "v"}, "llama": {"q_proj", "v_proj"}, "bert": {"query", "value"}}[kind]
    assert {name.split(".")[-4] for name in trained(lm) if name.endswith("lora_A.default.weight")} == names
    assert all("lora_" in name for name in trained(lm))


def test_families_by_configuration() -> None:
    assert family_of(BertConfig()) == "encoder"
    assert family_of(BertConfig(is_decoder=True)) == "decoder"
    assert family_of(LlamaConfig()) == "decoder"
    with pytest.raises(ValueError, match="model type 'vit' is not supported"):
        family_of(ViTConfig())


@ALL
def test_seed_decides_the_adapter_and_nothing_else(folders: Folders, kind: str) -> None:
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    head: Any = {"head": "linear"} if kind == "bert" else {}
    first, again, other = (trained(load(folders[kind], seed=seed, **head)) for seed in (0, 0, 1))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if "lora_A" in name or name.endswith("classifier.modules_to_save.default.weight")]
    assert len(drawn) >= 2 and not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("kind, head", [("t5", "cosine"), ("llama", "cosine"), ("bert", "cosine"), ("bert", "linear")])
def test_unmodified_peft_loads_what_is_saved(folders: Folders, tmp_path: Path, kind: str, head: Any) -> None:
    lm = load(folders[kind], head=head)
    take_steps(lm)
    lm.model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

    if head == "linear":
        base = AutoModelForSequenceClassification.from_pretrained(folders[kind], num_labels=4)
    else:
        base = AUTO[kind].from_pretrained(folders[kind], dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = lm.collate(lm.encode(TOPICS, TOPICS.train))
    if kind == "bert":
        del batch["labels"]
    with torch.no_grad():
        ours, theirs, fresh = lm.model(**batch), plain(**batch), load(folders[kind], head=head).model.eval()(**batch)
    key = "last_hidden_state" if kind == "bert" and head == "cosine" else "logits"
    assert torch.equal(ours[key], theirs[key])
    assert not torch.allclose(ours[key], fresh[key])

    continued = load(folders[kind], tmp_path / "adapter", head=head, seed=9)
    assert trained(continued).keys() == trained(lm).keys()
    assert all(torch.equal(value, trained(continued)[name]) for name, value in trained(lm).items())
    take_steps(continued)
    assert not any(torch.equal(value, trained(continued)[name]) for name, value in trained(lm).items())


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_layers_that_the_checkpoint_lacks_are_trained_and_saved(folders: Folders, tmp_path: Path, kind: str) -> None:
    # a checkpoint without pooler, and one whose classification head has two layers
    shutil.copytree(folders["bert"], tmp_path / "base")
    if kind == "bert":
        BertModel.from_pretrained(folders["bert"], add_pooling_layer=False).save_pretrained(tmp_path / "base")
    else:
        vocabulary = AutoConfig.from_pretrained(folders["bert"]).vocab_size
        small = DistilBertConfig(vocab_size=vocabulary, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
        DistilBertModel(small).save_pretrained(tmp_path / "base")
    lm = load(tmp_path / "base", head="linear", target_modules=["query"] if kind == "bert" else ["q_lin"])
    added = "pooler.dense" if kind == "bert" else "pre_classifier"
    assert any(f"{added}.modules_to_save" in name for name in trained(lm))
    take_steps(lm)
    lm.model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=4)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = lm.collate(lm.encode(TOPICS, TOPICS.train))
    del batch["labels"]
    with torch.no_grad():
        assert torch.equal(lm.model(**batch).logits, plain(**batch).logits)


def test_language_model_without_all_its_weights(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path / "base")
    AutoModel.from_pretrained(folders["llama"]).save_pretrained(tmp_path / "base")
    config = json.loads((folders["llama"] / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the checkpoint lacks weights of lm_head"):
        load(tmp_path / "base")


def test_a_model_without_gradient_checkpointing_is_refused(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no gradient_checkpointing: leave it out"):
        load(folders["llama"], gradient_checkpointing=True)


def test_a_file_is_no_model(folders: Folders) -> None:
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(ValueError, match=f"model .*{name} is a file: give the folder that holds it"):
            load(folders["t5"] / name)


@pytest.mark.parametrize("kind, head", [("t5", "cosine"), ("llama", "cosine"), ("bert", "cosine"), ("bert", "linear")])
def test_bf16(folders: Folders, kind: str, head: Any) -> None:
    lm, exact = load(folders[kind], precision="bf16", head=head), load(folders[kind], head=head)
    for name, parameter in lm.model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    rows = lm.encode(TOPICS, TOPICS.train)
    lm.model.eval()
    exact.model.eval()
    loss, reference = lm.loss(lm.collate(rows))[0], exact.loss(exact.collate(rows))[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=0.1, atol=0.1)
    take_steps(lm)
    assert all(torch.isfinite(value).all() for value in trained(lm).values())
    assert set(lm.answer(TOPICS, rows, "rank", 4)) <= {*(TOPICS.labels or ()), "Bad"}
    assert len(lm.answer(TOPICS, rows, "generate", 4)) == len(rows)


def test_fp16_is_refused(folders: Folders) -> None:
    with pytest.raises(ValueError, match=r"refused for T5: its feed-forward activations overflow fp16.*use bf16"):
        load(folders["t5"], precision="fp16")
    for kind in ("llama", "bert"):
        with pytest.raises(ValueError, match="fp16 is not supported here; use bf16"):
            load(folders[kind], precision="fp16")


def test_target_modules(folders: Folders, tmp_path: Path) -> None:
    lm = load(folders["t5"], target_modules=["k", "wo"])
    assert {name.split(".")[-4] for name in trained(lm) if "lora_A" in name} == {"k", "wo"}
    with pytest.raises(ValueError, match="no linear layer is named 'q_proj'; there are k, o, q, v, wi, wo"):
        load(folders["t5"], target_modules=["q", "q_proj"])
    shutil.copytree(folders["bert"], tmp_path / "base")
    vocabulary = AutoConfig.from_pretrained(folders["bert"]).vocab_size
    DistilBertModel(
        DistilBertConfig(vocab_size=vocabulary, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    ).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"no default for target_modules of model type 'distilbert'.*k_lin, .*q_lin"):
        load(tmp_path / "base")


def test_generation_settings_of_the_folder_do_not_interfere(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path / "base")
    own = {"do_sample": True, "temperature": 9.0, "top_k": 3, "repetition_penalty": 5.0, "min_new_tokens": 7}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **own}))
    plain, odd = load(folders["llama"]), load(tmp_path / "base")
    plain.model.eval()
    odd.model.eval()
    rows = plain.encode(TOPICS, TOPICS.train)
    state = torch.get_rng_state()
    assert odd.answer(TOPICS, rows, "generate", 12) == plain.answer(TOPICS, rows, "generate", 12)
    assert torch.equal(state, torch.get_rng_state())


def saved(folder: Path, lm: LanguageModel) -> Path:
    lm.model.save_pretrained(str(folder))
    return folder


def test_adapters_that_do_not_fit(folders: Folders, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", load(folders["llama"]))
    other = build_tiny("llama", tmp_path / "other")
    with pytest.raises(ValueError, match=f"was made for {folders['llama'].resolve()}, the run uses {other.resolve()}"):
        load(other, adapter)
    with pytest.raises(FileNotFoundError, match=r"nowhere/adapter_config.json does not exist"):
        load(folders["llama"], tmp_path / "nowhere")

    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, message in (
        ({"r": 2}, "size mismatch"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "missing adapter keys"),
        ({"task_type": "SEQ_CLS"}, "its task type is SEQ_CLS, needed is CAUSAL_LM"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message) as error:
            load(folders["llama"], adapter)
        assert str(error.value).count(str(folders["llama"])) >= 2

    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    get_peft_model(base, VeraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "vera"))
    with pytest.raises(ValueError, match="only LoRA is supported"):
        load(folders["llama"], tmp_path / "vera")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_named(folders: Folders, tmp_path: Path, name: str) -> None:
    file = saved(tmp_path / "adapter", load(folders["t5"])) / name
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"[]"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged: "):
            load(folders["t5"], file.parent)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist: no "):
        load(folders["t5"], file.parent)


def test_linear_head_for_other_labels_is_refused(folders: Folders, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", load(folders["bert"], head="linear"))
    config = RunConfig(model=str(folders["bert"]), device="cpu", head="linear")
    with pytest.raises(ValueError, match="size mismatch"):
        load_language_model(config, {"topics": TOPICS.labels}, adapter)
    with pytest.raises(ValueError, match="needed is FEATURE_EXTRACTION"):
        load(folders["bert"], adapter)


def test_adapter_of_a_moved_base_model(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path / "before" / "llama")
    adapter = saved(tmp_path / "adapter", load(tmp_path / "before" / "llama"))
    assert LoraConfig.from_pretrained(str(adapter)).base_model_name_or_path == str(tmp_path / "before" / "llama")
    (tmp_path / "before").rename(tmp_path / "after")
    assert load(tmp_path / "after" / "llama", adapter).family == "decoder"


@pytest.mark.parametrize("change", [lambda path: path, lambda path: path.relative_to(Path.cwd())])
def test_relative_model_folders(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Path]
) -> None:
    monkeypatch.chdir(folders["llama"].parent)
    adapter = saved(tmp_path / "adapter", load(change(folders["llama"])))
    monkeypatch.chdir(tmp_path)
    assert load(folders["llama"], adapter).family == "decoder"


def test_sequences_longer_than_the_model(folders: Folders) -> None:
    with pytest.raises(ValueError, match="max_length come to 513 tokens, but the model has 512 positions"):
        load(folders["bert"], max_length=513)
    with pytest.raises(ValueError, match="come to 2049 tokens, but the model has 2048 positions"):
        load(folders["llama"], max_length=2048 - 128, max_new_tokens=129)
    assert load(folders["t5"], max_length=4096).max_length == 4096


def test_other_refusals(folders: Folders) -> None:
    with pytest.raises(ValueError, match="no model"):
        load_language_model(RunConfig(), LABELS)
    with pytest.raises(ValueError, match="task 'summaries' has no label list"):
        load_language_model(RunConfig(model=str(folders["bert"])), {**LABELS, "summaries": None})
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda:1' is not available"):
            resolve_device("cuda:1")
        assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_model_that_sees_what_follows_is_refused(folders: Folders, kind: str, monkeypatch: Any) -> None:
    """As umt5 does with transformers 5.17."""
    attend = F.scaled_dot_product_attention

    def sees(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        if query.size(2) == key.size(2):
            attn_mask = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=query.dtype)
            options["is_causal"] = False
        return attend(query, key, value, attn_mask=attn_mask, **options)

    lm = load_language_model(RunConfig(model=str(folders[kind]), device="cpu"), LABELS)
    if lm.base.config._attn_implementation != "sdpa":
        pytest.skip("this version of transformers has no attention by torch for T5")
    for parameter in lm.base.parameters():
        parameter.data.mul_(4)
    lm.model.train()
    check_order(lm)  # type: ignore[arg-type]
    monkeypatch.setattr(F, "scaled_dot_product_attention", sees)
    with pytest.raises(ValueError, match=rf"tokens of model type '{kind}' see those that follow them with tr"):
        check_order(lm)  # type: ignore[arg-type]
    assert lm.model.training
    with pytest.raises(ValueError, match="see those that follow"):
        weights = load_file(folders[kind] / "model.safetensors")
        other = shutil.copytree(folders[kind], folders[kind].with_name(f"{kind}-large"), dirs_exist_ok=True)
        save_file({name: tensor * 4 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
        load_language_model(RunConfig(model=str(other), device="cpu"), LABELS)


def test_one_embedding_for_two_is_refused(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["t5"], tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    base = AutoModelForSeq2SeqLM.from_pretrained(folder)
    base.lm_head.weight = base.get_input_embeddings().weight
    check_ties(base, str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="input and output embeddings are different ones"):
        check_ties(base, str(folder))
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())
    check_ties(base, str(folder))


def test_a_tokenizer_that_is_not_its_file_is_said(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_tokens(tokenizer, str(folder))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "q"}, "behavior": "Removed", "invert": False}
    # lengths that the file asks for are left to the caller
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="cuts texts otherwise than its tokenizer.json, 'The quick"):
        check_tokens(tokenizer, str(folder))
    path.unlink()
    check_tokens(tokenizer, str(folder))
