"""What PEFT offers, trained by the engine: saved, loaded by unmodified PEFT, merged, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from method_setup import start, train_task
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import topic_task
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM
from trl_setup import supervised

from kif import KIFConfig, OptimizerConfig, RecurrentKIF
from kif.arena import ArenaError, ParameterArena
from kif.config import RunConfig
from kif.configfile import ConfigError, dump_config, load_config, parse_run_config
from kif.export import export
from kif.methods import METHODS
from kif.models import load_language_model
from kif.run import train
from kif.stored import Earlier, check_continues

AUTO: dict[str, Any] = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM, "bert": AutoModel}
TARGETS = {"t5": ["q", "v"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
NORM = {"t5": "final_layer_norm", "llama": "model.norm", "bert": "output.LayerNorm"}
KINDS = pytest.mark.parametrize("kind", AUTO)
TASK = topic_task(24)
Folders = dict[str, Path]

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "r": 3},
    "ranks": {"rank_pattern": {"q|q_proj|query": 2}},
    "whole": {"modules_to_save": ["norm"]},
    "dora": {"use_dora": True},
    "lora-bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
}


def base_of(tiny_models: Folders, kind: str) -> Any:
    return AUTO[kind].from_pretrained(tiny_models[kind], dtype=torch.float32)


def outputs(model: Any, kind: str, shift: int = 0) -> torch.Tensor:
    """Logits, or an encoder's hidden states, of fixed tokens; with gradient where it is on."""
    ids = torch.arange(5, 41).view(4, 9).roll(shift, 0)
    more = {"decoder_input_ids": ids[:, :5]} if kind == "t5" else {}
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    result: torch.Tensor = found.last_hidden_state if kind == "bert" else found.logits
    return result


def no_grad_outputs(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return outputs(model.eval(), kind)


def some_rounds(model: Any, kind: str, rounds: int = 2, weight_decay: float = 0.0) -> RecurrentKIF:
    engine = RecurrentKIF.of(model, KIFConfig(inner_steps=2), OptimizerConfig(weight_decay=weight_decay))
    model.eval()
    for number in range(rounds):
        for step, shift in ((engine.inner_step, number), (engine.inner_step, 1), (engine.outer_step, 2)):
            outputs(model, kind, shift)[..., :7].square().mean().backward()
            step(2e-2)
        engine.fuse()
    return engine


@KINDS
@pytest.mark.parametrize("name", ADAPTERS)
def test_trained_saved_loaded_merged(tiny_models: Folders, tmp_path: Path, kind: str, name: str) -> None:
    if name == "bias" and kind == "bert" and Version(peft.__version__) < Version("0.21"):
        pytest.skip("PEFT before 0.21 does not save the biases of layers with LoRA")
    options = dict(ADAPTERS[name])
    if name == "whole":
        options["modules_to_save"] = [NORM[kind]]
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], **options})
    model = get_peft_model(base_of(tiny_models, kind), config)
    engine = some_rounds(model, kind)
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    assert [segment.name for segment in engine.arena.segments] == trainable
    extra = {"whole": "modules_to_save", "dora": "lora_magnitude_vector", "lora-bias": "lora_B.default.bias"}
    if name in extra:
        assert any(extra[name] in key for key in trainable)
        scores = dict(engine.arena.views(engine.arena.buffer("importance_in")))
        assert all(score.any() for key, score in scores.items() if extra[name] in key)

    trained = no_grad_outputs(model, kind)
    fresh = no_grad_outputs(base_of(tiny_models, kind), kind)
    assert (trained - fresh).abs().max() > 1e-2
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base_of(tiny_models, kind), str(tmp_path))
    assert torch.equal(no_grad_outputs(again, kind), trained)
    if name == "lora-bias" and kind != "bert":
        with pytest.raises(RuntimeError, match="because the base layer has no bias"):
            again.merge_and_unload()
        return
    merged = again.merge_and_unload()
    torch.testing.assert_close(no_grad_outputs(merged, kind), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "kind", "options"), [
    ("recurrent-kif", "t5", {"target_modules": ["all-linear"], "use_rslora": True}),
    ("recurrent-kif", "llama", {"rank_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head", "model.norm"]}),
    ("olora", "llama", {"rank_pattern": {"q_proj": 3}, "use_rslora": True, "modules_to_save": ["model.norm"]}),
    ("seqlora", "bert", {"target_modules": ["all-linear"], "head": "linear", "modules_to_save": ["output.LayerNorm"]}),
    ("migu", "bert", {"modules_to_save": ["output.LayerNorm"], "use_rslora": True}),
])  # fmt: skip
def test_runs_are_loaded_by_peft_and_exported(
    written: Path, tiny_models: Folders, tmp_path: Path, method: str, kind: str, options: dict[str, Any]
) -> None:
    import transformers

    config = RunConfig(
        model=str(tiny_models[kind]), data=str(written), output=str(tmp_path / "run"), method=method, device="cpu",
        tasks=["colours", "sizes"], steps_per_task=6, lr=3e-2, lora_r=2, max_length=64, max_new_tokens=4, limit_eval=2,
        cache_dir=str(tmp_path / "cache"), **options,
    )  # fmt: skip
    train(config, progress=False)
    labels: Any = {name: tuple(["red", "green"] if name == "colours" else ["big", "small", "tiny"]) for name in
                   config.tasks}  # fmt: skip
    lm = load_language_model(config, labels, adapter=tmp_path / "run" / "adapter")
    head = options.get("head", "cosine")
    loader = "AutoModelForSequenceClassification" if head == "linear" else AUTO[kind].__name__
    own = {"num_labels": 5} if head == "linear" else {}
    base = getattr(transformers, loader).from_pretrained(tiny_models[kind], dtype=torch.float32, **own)
    plain = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    family = "llama" if head == "linear" else kind  # read from logits
    ours = no_grad_outputs(lm.model, family)
    assert torch.equal(no_grad_outputs(plain, family), ours)
    with lm.model.disable_adapter():
        assert (no_grad_outputs(lm.model, family) - ours).abs().max() > 1e-2
    export(tmp_path / "run", tmp_path / "out")
    merged = getattr(transformers, loader).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(no_grad_outputs(merged, family), ours, rtol=1e-4, atol=1e-4)


def load(tiny_models: Folders, kind: str, **options: Any) -> Any:
    return load_language_model(
        RunConfig(model=str(tiny_models[kind]), device="cpu", **options), {"topics": TASK.labels}
    )


def test_ranks_and_scales_are_the_configured_ones(tiny_models: Folders) -> None:
    pattern = {"layers.0.self_attn.q_proj": 2, ".*_attn.*": 5}
    lm = load(tiny_models, "llama", target_modules=["all-linear"], rank_pattern=pattern, use_rslora=True, lora_alpha=6)
    found = {name: module for name, module in lm.model.named_modules() if hasattr(module, "lora_A")}
    ranks = {name.rpartition(".")[2]: len(module.lora_A["default"].weight) for name, module in found.items()}
    expected = {"q_proj": 2, "k_proj": 5, "v_proj": 5, "o_proj": 5, "gate_proj": 8, "up_proj": 8, "down_proj": 8}
    assert ranks == expected
    for module in found.values():
        assert module.scaling["default"] == pytest.approx(6 / len(module.lora_A["default"].weight) ** 0.5)
    assert not any("pooler" in name for name, p in load(
        tiny_models, "bert", target_modules=["all-linear"]).model.named_parameters() if p.requires_grad)  # fmt: skip


def test_modules_in_fp32_between_those_in_bf16(tiny_models: Folders) -> None:
    options: dict[str, Any] = {"modules_to_save": ["embed_tokens", "model.norm", "input_layernorm", "lm_head"]}
    lm, exact = (load(tiny_models, "llama", precision=precision, **options) for precision in ("bf16", "fp32"))
    whole = [p for name, p in lm.model.named_parameters() if "modules_to_save" in name]
    assert len(whole) == 4 and all(p.dtype == torch.float32 and p.requires_grad for p in whole)
    logits = no_grad_outputs(lm.model, "llama")
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, no_grad_outputs(exact.model, "llama"), rtol=0.1, atol=0.1)
    with lm.model.disable_adapter():
        assert no_grad_outputs(lm.model, "llama").dtype == torch.bfloat16
    some_rounds(lm.model, "llama")
    assert (no_grad_outputs(lm.model, "llama") - logits).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "options", "message"), [
    ("llama", {"rank_pattern": {"query": 4}}, "rank_pattern: 'query' gives no layer its rank.*q_proj, v_proj"),
    ("llama", {"rank_pattern": {".*proj": 4, "q_proj": 2}}, "rank_pattern: 'q_proj' gives no layer its rank"),
    ("llama", {"rank_pattern": {"(": 4}}, "rank_pattern: '\\(' is no regular expression"),
    ("llama", {"modules_to_save": ["pooler"]}, "modules_to_save: no module's name ends with 'pooler'.*lm_head"),
    ("llama", {"modules_to_save": ["q_proj"]}, "q_proj is trained whole, and target_modules gives .*q_proj LoRA"),
    ("llama", {"modules_to_save": ["self_attn"]}, "self_attn is trained whole, and target_modules gives .*q_proj LoRA"),
    ("llama", {"modules_to_save": ["mlp", "up_proj"]}, "up_proj is part of .*mlp"),
    ("llama", {"modules_to_save": ["act_fn"]}, "act_fn has no parameters"),
    ("t5", {"modules_to_save": ["shared"]}, "shared.weight is tied to .*tie_word_embeddings: false"),
    ("t5", {"modules_to_save": ["lm_head"]}, "lm_head.weight is tied to shared.weight"),
])  # fmt: skip
def test_what_the_base_cannot_have_is_refused(
    tiny_models: Folders, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tiny_models, kind, **options)


def test_what_a_method_cannot_train_is_refused(tiny_models: Folders) -> None:
    for name, options in (
        ("moelora", {"rank_pattern": {"q": 2}}),
        ("moelora", {"use_rslora": True}),
        ("l2p", {"modules_to_save": ["final_layer_norm"]}),
        ("lfpt5", {"modules_to_save": ["final_layer_norm"]}),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))} does not work with {name}"):
            METHODS[name].adapter_config(RunConfig(method=name, **options), 2)
    for option in ("use_dora", "lora_bias"):
        for name in ("inclora", "olora", "sapt", "moelora"):
            lm = load(tiny_models, "t5")
            lm.model = get_peft_model(lm.model.unload(), LoraConfig(target_modules=["q"], **{option: True}))
            with pytest.raises(
                ValueError, match=rf"\.q has {option}: make the adapter with LoraConfig\({option}=False"
            ):
                METHODS[name](lm, RunConfig(method=name))


def test_options_survive_files_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ndata: d\nuse_rslora: true\nrank_pattern:\n  layers.0.q: 4\n  '.*v': 2\n"
        "target_modules: [all-linear]\nmodules_to_save: [norm]\nquantization: nf4\n"
    )
    config = load_config(file)
    assert config.rank_pattern == {"layers.0.q": 4, ".*v": 2} and config.use_rslora
    assert config.target_modules == ["all-linear"] and config.modules_to_save == ["norm"]
    dump_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    assert parse_run_config(["--config", str(file)]) == config
    changed = parse_run_config(["--config", str(file), "--rank-pattern", "k", "3", ".*o", "1", "--no-use-rslora",
                                "--modules-to-save", "a", "b", "--quantization", "int8"])  # fmt: skip
    assert changed.rank_pattern == {"k": 3, ".*o": 1} and not changed.use_rslora
    assert changed.modules_to_save == ["a", "b"] and changed.quantization == "int8"
    for text, message in (("rank_pattern: {q: 0}", "positive"), ("rank_pattern: {q: two}", "integer"),
                          ("target_modules: [all-linear, q]", "alone"), ("quantization: int4", "int8")):  # fmt: skip
        file.write_text(f"model: m\ndata: d\n{text}\n")
        with pytest.raises(ConfigError, match=f"{file}:3.*{message}"):
            load_config(file)
    with pytest.raises(SystemExit):
        parse_run_config(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("use-rslora", "rank-pattern", "modules-to-save", "quantization"))


@pytest.mark.parametrize("change", [
    {"use_rslora": True}, {"rank_pattern": {"q": 2}}, {"modules_to_save": ["norm"]}, {"quantization": "int8"}
])  # fmt: skip
def test_a_run_goes_on_with_its_own_adapter_only(change: dict[str, Any], tmp_path: Path) -> None:
    earlier = Earlier(tmp_path, RunConfig(model="m"), (), 1, {}, {}, {})
    check_continues(RunConfig(model="m"), earlier)
    with pytest.raises(ValueError, match=f"was trained with {next(iter(change))}"):
        check_continues(RunConfig(model="m", **change), earlier)


def two_adapters(tiny_models: Folders) -> Any:
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}
    model = get_peft_model(base_of(tiny_models, "llama"), LoraConfig(r=4, target_modules=["q_proj"], **options))
    other = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False, **options)
    model.add_adapter("other", other)
    return model


def test_the_other_adapters_stay_as_they_are(tiny_models: Folders, tmp_path: Path) -> None:
    model = two_adapters(tiny_models)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.set_adapter("other")
    answers = no_grad_outputs(model, "llama")
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".other" not in name)
    engine = some_rounds(model, "llama", weight_decay=0.1)
    assert all(".default." in segment.name for segment in engine.arena.segments)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".default." not in name), name
    trained = no_grad_outputs(model, "llama")
    model.set_adapter("other")
    assert torch.equal(no_grad_outputs(model, "llama"), answers)
    with pytest.raises(ArenaError, match=r"lora_A.default.weight is no longer trained.*set_adapter"):
        engine.inner_step(1e-3)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base_of(tiny_models, "llama"), str(tmp_path))
    assert torch.equal(no_grad_outputs(again, "llama"), trained)


def test_a_trainable_adapter_that_is_not_active_is_refused(tiny_models: Folders) -> None:
    model = two_adapters(tiny_models)
    model.set_adapter("other")
    # PEFT leaves the copies of whole modules trainable
    with pytest.raises(ArenaError, match=r"'default' is not active: .*requires_grad_\(False\)"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("default" in name or parameter.requires_grad)
        ParameterArena.of(model)


@pytest.mark.parametrize("again", [True, False])
def test_an_adapter_that_was_taken_away_is_named(tiny_models: Folders, again: bool) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(base_of(tiny_models, "llama"), config)
    engine = RecurrentKIF.of(model)
    if again:
        model.delete_adapter("default")
        model.add_adapter("default", config)
        model.set_adapter("default")
    else:
        model = model.merge_and_unload()
    with pytest.raises(ArenaError, match=r"q_proj\.lora_A\.default\.weight is no longer in the model"):
        engine.inner_step(1e-3)


def test_a_pair_that_two_layers_share(tiny_models: Folders, tmp_path: Path) -> None:
    model = get_peft_model(base_of(tiny_models, "llama"), LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    attention = model.base_model.model.model.layers[0].self_attn
    for part in ("lora_A", "lora_B"):
        getattr(attention.k_proj, part)["default"].weight = getattr(attention.q_proj, part)["default"].weight
    engine = some_rounds(model, "llama")
    assert len(engine.arena.segments) == 2
    assert attention.k_proj.lora_A["default"].weight is attention.q_proj.lora_A["default"].weight
    trained = no_grad_outputs(model, "llama")
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base_of(tiny_models, "llama"), str(tmp_path))
    assert torch.equal(no_grad_outputs(again, "llama"), trained)
    torch.testing.assert_close(no_grad_outputs(again.merge_and_unload(), "llama"), trained, rtol=1e-4, atol=1e-4)
    attention.k_proj.lora_A["default"].weight = torch.nn.Parameter(torch.zeros(4, 16))
    with pytest.raises(ArenaError, match=r"k_proj.lora_A.default.weight was tied to .*q_proj.lora_A.default.weight"):
        engine.inner_step(1e-3)


@KINDS
def test_full_fine_tuning(tiny_models: Folders, tmp_path: Path, kind: str) -> None:
    model = base_of(tiny_models, kind)
    if kind == "llama":
        model.config.tie_word_embeddings = True
        model = LlamaForCausalLM(model.config)
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    engine = RecurrentKIF.of(model.eval())
    for shift in range(3):
        optimizer.zero_grad()
        for net in (reference, model):
            outputs(net, kind, shift)[..., :7].square().mean().backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        engine.plain_step(1e-3)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if name.endswith("key.bias"):
            continue  # a softmax does not see it: its gradient is rounding
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    some_rounds(model, kind)
    trained = no_grad_outputs(model, kind)
    assert (trained - no_grad_outputs(reference, kind)).abs().max() > 1e-2
    if kind != "bert":
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AUTO[kind].from_pretrained(tmp_path)
    assert torch.equal(no_grad_outputs(again, kind), trained)


def test_ties_that_the_arena_cannot_keep() -> None:
    one = torch.nn.Linear(4, 4, bias=False)
    two = torch.nn.Linear(4, 4, bias=False)
    two.weight.data = one.weight.data
    for trained in (True, False):
        two.weight.requires_grad_(trained)
        with pytest.raises(ArenaError, match=r"parameters .*\.weight are different ones in the same memory.*clone one"):
            ParameterArena.of(torch.nn.Sequential(one, two))
    two.weight.data = one.weight.data.clone()
    assert len(ParameterArena.of(torch.nn.Sequential(one, two)).segments) == 1
    two.weight.requires_grad_(True)
    # next to each other is not in one another
    one.weight.data, two.weight.data = torch.randn(2, 4, 4)
    assert len(ParameterArena.of(torch.nn.Sequential(one, two)).segments) == 2
    two.weight = one.weight
    both = torch.nn.Sequential(one, two)
    arena = ParameterArena.of(both)
    both.load_state_dict(copy.deepcopy(both.state_dict()), assign=True)
    with pytest.raises(ArenaError, match=r"1\.weight was tied to 0\.weight and no longer is: tie them again"):
        arena.check()


def test_stacked_pairs_of_several_ranks(tiny_models: Folders, tmp_path: Path) -> None:
    options = {"rank_pattern": {"q": 3}, "use_rslora": True, "modules_to_save": ["final_layer_norm"]}
    method, rows = start(tiny_models, "inclora", "t5", **options)
    for index in range(2):
        train_task(method, index, rows[index])
    method.save_adapter(tmp_path)
    plain = PeftModel.from_pretrained(base_of(tiny_models, "t5"), str(tmp_path))
    ranks = {n.split(".")[-4]: len(p) for n, p in plain.named_parameters() if "lora_A" in n}
    assert ranks == {"q": 6, "v": 16}
    torch.testing.assert_close(
        no_grad_outputs(plain, "t5"), no_grad_outputs(method.lm.model, "t5"), rtol=1e-4, atol=1e-4
    )


def test_the_trainer_takes_a_peft_model(tiny_models: Folders, tmp_path: Path) -> None:
    from kif import KIFTrainer, KIFTrainingArguments

    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]
    )
    model = get_peft_model(base_of(tiny_models, "llama"), config)
    lm = load(tiny_models, "llama")
    rows = lm.encode(TASK, TASK.train)
    args = KIFTrainingArguments(
        output_dir=str(tmp_path / "runs"), kif=KIFConfig(inner_steps=2), max_steps=4, learning_rate=2e-2, use_cpu=True,
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = KIFTrainer(model=model, args=args, train_dataset=rows, memory_dataset=rows[:8], data_collator=lm.collate)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert trainer.engine.rounds == 2 and len(trainer.engine.arena.segments) == 7
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(base_of(tiny_models, "llama"), str(tmp_path / "adapter"))
    trained = no_grad_outputs(model, "llama")
    assert (trained - no_grad_outputs(base_of(tiny_models, "llama"), "llama")).abs().max() > 1e-2
    assert torch.equal(no_grad_outputs(again, "llama"), trained)
    torch.testing.assert_close(no_grad_outputs(again.merge_and_unload(), "llama"), trained, rtol=1e-4, atol=1e-4)


def trains_in_fp32(trainer: Any, model: Any) -> None:
    """Train; the adapter, in bf16 before, ends in fp32, and nothing else changes its type or value."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and before[name].dtype == torch.bfloat16 for name in trained)
    trainer.train()
    assert trainer.engine.rounds == 2 and trainer.engine.skipped == 0
    assert {segment.name for segment in trainer.engine.arena.segments} == trained
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.dtype == torch.float32 and not torch.equal(parameter, before[name].float()), name
        else:
            assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name]), name


TRAINING: dict[str, Any] = {
    "kif": KIFConfig(inner_steps=2), "max_steps": 4, "learning_rate": 2e-2, "use_cpu": True, "save_strategy": "no",
    "disable_tqdm": True, "per_device_train_batch_size": 4,
}  # fmt: skip


def test_the_trainer_takes_an_adapter_in_bf16(tiny_models: Folders, tmp_path: Path) -> None:
    from kif import KIFTrainer, KIFTrainingArguments

    base = base_of(tiny_models, "llama").bfloat16()
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    lm = load(tiny_models, "llama")
    rows = lm.encode(TASK, TASK.train)
    args = KIFTrainingArguments(str(tmp_path), remove_unused_columns=False, **TRAINING)
    more: dict[str, Any] = {"train_dataset": rows, "memory_dataset": rows[:8], "data_collator": lm.collate}
    trains_in_fp32(KIFTrainer(model=model, args=args, **more), model)
    # a whole model is not the trainer's to cast: it would need twice the memory
    with pytest.raises(ArenaError, match=r"embed_tokens.weight is torch.bfloat16.*cast it first"):
        KIFTrainer(model=base_of(tiny_models, "llama").bfloat16(), args=args, **more).train()


def test_trl_trains_on_a_quantised_base(tiny_models: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("bitsandbytes")
    Supervised, Arguments = supervised(monkeypatch)
    lm = load(tiny_models, "llama", quantization="nf4", precision="bf16")
    lm.tokenizer.pad_token = lm.tokenizer.pad_token or lm.tokenizer.eos_token
    rows = datasets.Dataset.from_list([{"input_ids": [*row.input_ids]} for row in lm.encode(TASK, TASK.train)])
    args = Arguments(str(tmp_path), report_to=[], **TRAINING)
    more: dict[str, Any] = {"train_dataset": rows, "memory_dataset": rows.select(range(8))}
    trainer = Supervised(model=lm.model, args=args, processing_class=lm.tokenizer, **more)
    trains_in_fp32(trainer, lm.model)
