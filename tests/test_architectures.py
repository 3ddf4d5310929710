"""Model types beside those of the paper: what a row gives must not depend on how it is batched, padded or ranked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_tiny, build_type, masks_of_attention, rerun, sentiment_task, topic_task, without_dropout
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto import modeling_auto as auto

from kif.adapters import linear_layers
from kif.arena import ParameterArena
from kif.captured import CapturedSteps
from kif.config import RunConfig
from kif.families import Family, LanguageModel
from kif.layers import fit_layers
from kif.methods import METHODS
from kif.methods.lora_layers import lora_layers
from kif.methods.sapt import _Mixer
from kif.models import load_language_model
from kif.run import evaluate_run, train

TOPICS, SENTIMENT = topic_task(), sentiment_task()
Loader = Callable[..., LanguageModel]

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512, **HEADS}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 512, "dropout": 0.0,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "dropout_rate": 0}
BERT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip
SIGHT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

TYPES: dict[str, tuple[Family, dict[str, Any]]] = {
    "qwen3": ("decoder", LLAMA),
    "mixtral": ("decoder", {**LLAMA, **EXPERTS}),
    "gpt_neox": ("decoder", LLAMA),
    "opt": (
        "decoder",
        {
            "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 512, "dropout": 0.0,
        },
    ),
    # also sees
    "gemma3": (
        "decoder",
        {
            "text_config": {**LLAMA, "vocab_size": 384, "sliding_window": 16},
            "vision_config": {**SIGHT, "image_size": 16, "patch_size": 8}, "mm_tokens_per_image": 4,
        },
    ),
    # with layers whose cache is a state
    "qwen3_next": (
        "decoder",
        {
            **LLAMA, **EXPERTS, "layer_types": ["linear_attention", "full_attention"], "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ),
    # its output has no cache
    "openai-gpt": (
        "decoder",
        {
            "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    ),
    "bart": ("encoder-decoder", BART),
    # shift labels by themselves in another way, or leave that to others
    "mbart": ("encoder-decoder", BART),
    "blenderbot-small": ("encoder-decoder", BART),
    "switch_transformers": ("encoder-decoder", {**T5, "num_experts": 4, "expert_capacity": 512}),
    "mt5": ("encoder-decoder", T5),
    "roberta": ("encoder", {**BERT, "max_position_embeddings": 514}),
    "distilbert": ("encoder", {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}),
    "modernbert": (
        "encoder",
        {**BERT, "num_hidden_layers": 2, "global_attn_every_n_layers": 2, "local_attention": 16},
    ),
    "deberta-v2": ("encoder", {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
}  # fmt: skip
"""Family and config of each."""

MORE_TYPES: dict[str, tuple[Family, dict[str, Any]]] = {
    "marian": ("encoder-decoder", BART),
    "bert": ("encoder", BERT),
    "led": (
        "encoder-decoder",
        {**BART, "attention_window": 16, "max_encoder_position_embeddings": 512, "max_decoder_position_embeddings": 64},
    ),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """A tiny model of a type, with LoRA on all its linear layers (of experts' none) that is not zero."""
    root = tmp_path_factory.mktemp("types")

    def loader(model_type: str, **changes: Any) -> LanguageModel:
        family, config = TYPES[model_type]
        skip_where_experts_cannot_run(config)
        folder = root / model_type
        if not folder.exists():
            build_type(model_type, family, folder, **config)
        labels = {task.name: task.labels for task in (TOPICS, SENTIMENT)}
        # PEFT takes the names of experts' layers for the experts' weights
        targets = ["q_proj", "v_proj", "in_proj_qkvz"] if model_type == "qwen3_next" else ["all-linear"]
        values = {"target_modules": targets, "max_length": 128, **changes}
        lm = load_language_model(RunConfig(model=str(folder), device="cpu", **values), labels)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        without_dropout(lm.model)
        lm.model.eval()
        return lm

    return loader


def skip_where_experts_cannot_run(config: dict[str, Any]) -> None:
    if config.keys() >= EXPERTS.keys() and not experts_run_here():
        pytest.skip("this torch has no grouped products on the CPU, by which transformers runs experts")


def experts_run_here() -> bool:
    one = torch.ones(8, 8, dtype=torch.bfloat16)
    try:
        torch._grouped_mm(one, one[None], offs=torch.tensor([8], dtype=torch.int32))
    except (AttributeError, RuntimeError):
        return False
    return True


def of(*families: Family) -> Any:
    return pytest.mark.parametrize("model_type", [name for name, (family, _) in TYPES.items() if family in families])


def loss_of(lm: LanguageModel, rows: Any) -> torch.Tensor:
    return lm.loss(lm.collate(rows))[0].detach()


@of("decoder", "encoder-decoder", "encoder")
def test_loss_does_not_depend_on_batch_padding_or_form(load: Loader, model_type: str) -> None:
    lm = load(model_type)
    rows = lm.encode(TOPICS, TOPICS.train)
    whole = loss_of(lm, rows)
    assert torch.isfinite(whole)
    torch.testing.assert_close(sum(loss_of(lm, [row]) for row in rows), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lm.fixed_loss(lm.fixed_batch(rows, 11)).detach(), whole, rtol=1e-4, atol=1e-4)


@of("decoder", "encoder-decoder", "encoder")
def test_what_a_gpu_gets_changes_nothing(load: Loader, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kif.models.fit_layers", lambda *_: None)
    lm = load(model_type)
    rows = lm.encode(TOPICS, TOPICS.train)
    before = loss_of(lm, rows)
    fit_layers(lm.base, torch.device("cuda"))
    torch.testing.assert_close(loss_of(lm, rows), before, rtol=1e-4, atol=1e-4)


@of("decoder", "encoder-decoder", "encoder")
def test_every_parameter_gets_a_gradient_recorded_or_not(load: Loader, model_type: str) -> None:
    lm = load(model_type)
    lm.model.train()
    arena = ParameterArena.of(lm.model)
    arena.zero_grad()
    rows = lm.encode(TOPICS, TOPICS.train)
    loss, count = lm.loss(lm.collate(rows))
    (loss / count).backward()
    arena.check()
    assert not [name for name, grad in arena.views(arena.grad) if not grad.any()]
    expected = arena.grad.clone()
    arena.zero_grad()
    CapturedSteps(lm, arena, [16], rerun).backward(rows, count)
    torch.testing.assert_close(arena.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@of("decoder", "encoder-decoder")
def test_ranking_equals_likelihoods_one_by_one(load: Loader, model_type: str) -> None:
    lm: Any = load(model_type)
    rows = lm.encode(TOPICS, TOPICS.train)
    candidates = lm._targets(TOPICS, TOPICS.labels)
    with torch.no_grad():
        scores = lm._rank(rows, candidates)
    expected = [[-loss_of(lm, [replace(row, target=target)]) for target in candidates] for row in rows]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model_type", "changes", "masked"),
    [
        # the prompts' layers, then the labels'
        ("mistral", {"sliding_window": None}, [False, False, True, True]),
        ("mistral", {"sliding_window": 16}, [True] * 4),
        # its other layer has a state that goes on through what follows
        ("minimax", {**EXPERTS, "layer_types": ["full_attention", "linear_attention"]}, [True] * 2),
    ],
)
def test_prompts_are_ranked_without_a_mask_unless_padding_would_count(
    model_type: str, changes: dict[str, Any], masked: list[bool], tmp_path: Path
) -> None:
    skip_where_experts_cannot_run(changes)
    folder = build_type(model_type, "decoder", tmp_path / "model", **LLAMA, **changes)
    config = RunConfig(model=str(folder), device="cpu", max_length=128, target_modules=["q_proj", "v_proj"])
    lm: Any = load_language_model(config, {TOPICS.name: TOPICS.labels})
    lm.model.eval()
    rows = lm.encode(TOPICS, TOPICS.train)
    assert len({len(row.input_ids) for row in rows}) > 1 and min(len(row.input_ids) for row in rows) > 16
    candidates = [*lm._targets(TOPICS, TOPICS.labels), (lm.tokenizer.eos_token_id,)]
    with torch.no_grad(), masks_of_attention() as masks:
        scores = lm._rank(rows, candidates)
    assert [mask is not None for mask in masks] == masked
    expected = [[-loss_of(lm, [replace(row, target=target)]) for target in candidates] for row in rows]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model_type", "beside"), [("mt5", True), ("t5", True), ("bart", False), ("switch_transformers", False)]
)
def test_t5_sees_the_encoders_states_once_for_all_labels(
    load: Loader, model_type: str, beside: bool, tmp_path: Path
) -> None:
    if model_type == "t5":
        lm: Any = load_language_model(RunConfig(model=str(build_tiny("t5", tmp_path)), device="cpu"), {"topics": None})
        lm.model.eval()
    else:
        lm = load(model_type)
    rows = lm.encode(TOPICS, TOPICS.train)
    # of one token, and twice the same
    candidates = [*lm._targets(TOPICS, TOPICS.labels), (lm.tokenizer.eos_token_id,), (5, 6, 7), (5, 6, 7)]
    shapes: list[torch.Size] = []
    lm.base.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["encoder_hidden_states"].shape), with_kwargs=True
    )
    with torch.no_grad():
        scores = lm._rank(rows, candidates)
    assert [shape[0] for shape in shapes] == [len(rows) * (1 if beside else len(candidates))]
    expected = [[-loss_of(lm, [replace(row, target=target)]) for target in candidates] for row in rows]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=1e-3)


@of("decoder", "encoder-decoder", "encoder")
def test_answers_do_not_depend_on_the_batch(load: Loader, model_type: str) -> None:
    lm = load(model_type)
    rows = lm.encode(TOPICS, TOPICS.train)
    answers = lm.answer(TOPICS, rows, "generate", 6)
    assert answers == [lm.answer(TOPICS, [row], "generate", 6)[0] for row in rows]


@of("encoder-decoder")
def test_training_begins_answers_as_generate_does(load: Loader, model_type: str) -> None:
    """Given what `generate` said, the passes of training predict it."""
    lm: Any = load(model_type)
    row = lm.encode(TOPICS, TOPICS.train)[0]
    said = lm.model.generate(
        input_ids=torch.tensor([row.input_ids]), max_new_tokens=6, min_new_tokens=6, num_beams=1, do_sample=False
    )[0, 1:].tolist()
    logits = lm._logits(lm.collate([replace(row, target=tuple(said))]))
    assert logits[0, 1:-1].argmax(-1).tolist() == said[1:-1]


def test_labels_are_shifted_as_the_models_own_are(tmp_path: Path) -> None:
    lm: Any = load_language_model(RunConfig(model=str(build_tiny("t5", tmp_path)), device="cpu"), {"topics": None})
    batch = lm.collate(lm.encode(TOPICS, TOPICS.train))
    own = lm.base.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    assert lm._decoder_inputs(batch["labels"]).equal(own)


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"]])
def test_of_a_model_that_also_sees_the_part_for_texts_gets_lora(load: Loader, targets: list[str]) -> None:
    lm = load("gemma3", target_modules=targets)
    adapted = [name for name, module in lm.model.named_modules() if hasattr(module, "lora_A")]
    assert any("vision" in name for name in linear_layers(lm.base))
    assert adapted and all("language_model.layers" in name for name in adapted)
    assert len(adapted) == 2 * (2 if len(targets) > 1 else 7)
    with pytest.raises(ValueError, match=r"no linear layer is named 'fc1'; there are [a-z_, ]*q_proj"):
        load("gemma3", target_modules=["fc1"])


def test_positions_are_those_of_the_part_for_texts(load: Loader) -> None:
    with pytest.raises(ValueError, match="the model has 512 positions only"):
        load("gemma3", max_length=500)
    config = RunConfig(device="cpu", method="l2p", max_length=380)
    with pytest.raises(ValueError, match=r"virtual tokens bring rows to .* the model has 512 positions only"):
        METHODS["l2p"](load("gemma3", max_length=380), config)


@pytest.mark.parametrize("model_type", ["roberta", "distilbert"])
def test_new_layers_are_trained_whole_and_get_no_lora(load: Loader, model_type: str) -> None:
    lm = load(model_type, head="linear")
    loss, _ = lm.loss(lm.collate(lm.encode(TOPICS, TOPICS.train)))
    loss.backward()
    head = [name for name, p in lm.model.named_parameters() if "classifier" in name and p.requires_grad]
    assert head and not [name for name in head if "lora" in name]


@pytest.mark.parametrize("model_type", ["fnet", "rwkv", "yoso"])
def test_what_takes_padding_for_text_is_refused(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model type '{model_type}' is not supported: it takes padding for text"):
        load_language_model(RunConfig(model=str(tmp_path), device="cpu"), {"topics": TOPICS.labels})


def test_answers_must_begin_with_something(tmp_path: Path) -> None:
    build_type("bart", "encoder-decoder", tmp_path, **BART, bos_token_id=None, decoder_start_token_id=None)
    with pytest.raises(ValueError, match="its config names no decoder_start_token_id"):
        load_language_model(RunConfig(model=str(tmp_path), device="cpu"), {"topics": TOPICS.labels})


def test_virtual_tokens_where_more_is_looked_up_for_each(tmp_path: Path) -> None:
    if "gemma4_text" not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this transformers has no gemma4_text")
    build_type(
        "gemma4_text", "decoder", tmp_path, **LLAMA, vocab_size_per_layer_input=384, hidden_size_per_layer_input=8
    )
    config = RunConfig(model=str(tmp_path), device="cpu", target_modules=["q_proj"], method="l2p", max_length=64)
    lm = load_language_model(config, {"topics": TOPICS.labels})
    method = METHODS["l2p"](lm, config)
    method.begin_task(0, [])
    rows = lm.encode(TOPICS, TOPICS.train)
    method.backward(rows, lm.label_count(rows))
    assert method.arena.grad.any() and method.arena.grad.isfinite().all()
    assert len(lm.answer(TOPICS, rows, "rank", 4)) == len(rows)


def test_tokens_that_the_model_does_not_know(tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["market"])
    tokenizer.save_pretrained(folder)
    config = RunConfig(model=str(folder), device="cpu")
    lm = load_language_model(config, {"topics": TOPICS.labels})
    known = lm.base.get_input_embeddings().weight.shape[0]
    with pytest.raises(ValueError, match=f"'topics': the tokenizer gives 'market' the id {known}, .* {known} tokens"):
        lm.encode(TOPICS, TOPICS.train)
    assert lm.encode(TOPICS, TOPICS.train[1:3])
    named = replace(TOPICS, labels=("market", "Sports"))
    with pytest.raises(ValueError, match="the tokenizer gives 'market'"):
        lm.encode(named, [replace(TOPICS.train[1], label="market")])
    tokenizer.pad_token = "market"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"padding token 'market' has the id {known}, and the model knows {known}"):
        load_language_model(config, {"topics": TOPICS.labels})


@pytest.mark.parametrize(
    ("method", "model_type", "changes"),
    [
        # positions are embedded by shape, by mask, by number
        ("l2p", "marian", {}),
        ("l2p", "opt", {}),
        ("l2p", "bart", {}),
        # layers that see one vector a row (a pooler), and all rows' tokens as one list (feed-forward)
        ("sapt", "bert", {"head": "linear"}),
        ("sapt", "opt", {}),
        ("moelora", "opt", {}),
        ("inclora", "opt", {}),
    ],
)
def test_methods_that_reach_into_layers(
    method: str, model_type: str, changes: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    results = train(run_of(model_type, written, tmp_path, method=method, **changes), progress=False)
    scores = evaluate_run(tmp_path / "run", progress=False)["scores"]
    assert scores == [row[-1] for row in results["accuracy"]]


def test_sapt_weighs_whole_rows() -> None:
    mixer = _Mixer.__new__(_Mixer)
    spread = mixer.spread(torch.ones(6, 2), torch.tensor([[1.0], [2.0]]))
    assert spread.tolist() == [[1.0, 1.0]] * 3 + [[2.0, 2.0]] * 3
    with pytest.raises(ValueError, match="given 5 inputs of 2 rows: leave the names of experts' layers out"):
        mixer.spread(torch.ones(5, 2), torch.tensor([[1.0], [2.0]]))


@pytest.mark.parametrize("method", ["recurrent-kif", "seqlora"])
def test_what_no_gradient_reaches_is_said(method: str, written: Path, tmp_path: Path) -> None:
    """LED has layers for global attention, which nothing here asks for."""
    config = run_of("led", written, tmp_path, method=method, target_modules=["query", "query_global", "v_proj"])
    with pytest.warns(UserWarning, match=r"no gradient reached 2 of 8 trained tensors \(25\.0% .*query_global\.lora_A"):
        train(config, progress=False)


def run_of(model_type: str, data: Path, folder: Path, **changes: Any) -> RunConfig:
    """A short run over two tasks of a new tiny model with LoRA on all its linear layers."""
    family, values = TYPES.get(model_type) or MORE_TYPES[model_type]
    build_type(model_type, family, folder / "model", **values)
    return RunConfig(
        model=str(folder / "model"), data=str(data), tasks=["colours", "moods"], device="cpu",
        output=str(folder / "run"), cache_dir=str(folder / "cache"), batch_size=4, steps_per_task=3, limit_eval=4,
        max_length=64, max_target_length=8, max_new_tokens=2, **{"target_modules": ["all-linear"], **changes},
    )  # fmt: skip


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))


def test_lora_on_experts_has_nothing_between_a_and_b() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        nn.ModuleDict({"experts": Experts(), "linear": nn.Linear(8, 8)}),  # type: ignore[arg-type]
        LoraConfig(target_modules=["linear"], target_parameters=["experts.weight"]),
    )
    with pytest.raises(ValueError, match=r"the experts of .*experts: leave the names of experts' layers out"):
        lora_layers(model)
