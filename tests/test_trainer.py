"""KIFTrainer and KIFCallback: the trajectory of `kif train`, accumulation, resuming, and what is refused."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import topic_task
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from trl_setup import supervised

import kif
from kif import KIFCallback, KIFConfig, KIFTrainer, KIFTrainingArguments, OptimizerConfig, RecurrentKIF
from kif.arena import ArenaError
from kif.batches import BatchStream
from kif.callback import IMPORTANCE_FILE
from kif.config import RunConfig
from kif.families import LanguageModel
from kif.loop import schedule, train_phase
from kif.memory import ReplayMemory
from kif.methods import METHODS
from kif.models import load_language_model
from kif.trainer import KIFArguments, KIFMixin, KIFSeq2SeqTrainer, KIFSeq2SeqTrainingArguments, MemoryStream, kif_config

EXAMPLES = Path(__file__).parents[1] / "examples"
TASK = topic_task(40)
SWITCHES = KIFConfig(inner_steps=3, outer_steps=2)
STEPS = 10  # of 4 rows: three rounds and a short one


def load(tiny_models: dict[str, Path], kind: str = "llama", dropout: float = 0.0) -> tuple[Any, RunConfig]:
    settings = {"lora_dropout": dropout, "batch_size": 4, "lr": 1e-2, "max_length": 400, "warmup_steps": 0, "epochs": 1}
    config = RunConfig(model=str(tiny_models[kind]), kif=SWITCHES, **settings)
    lm = load_language_model(config, {TASK.name: TASK.labels})
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout
    return lm, config


def batches(lm: LanguageModel, seed: str, rows: int, count: int) -> list[Any]:
    """The rows of the first batches that the loop draws, in its order."""
    stream = BatchStream(lm.encode(TASK, TASK.train)[:rows], 4, seed)
    return [row for _ in range(count) for row in stream.next()]


def train(
    lm: LanguageModel,
    output: Path,
    memory: int = 12,
    callbacks: list[TrainerCallback] | None = None,
    resume: str | bool | None = None,
    eval_dataset: Any = None,
    **options: Any,
) -> KIFTrainer:
    """One task on the rows of `kif train`, in its order; `memory` batches of them."""
    settings = {
        "learning_rate": 1e-2, "per_device_train_batch_size": 4, "num_train_epochs": 1, "save_strategy": "no",
        "train_sampling_strategy": "sequential", "remove_unused_columns": False, "disable_tqdm": True,
        "logging_steps": 1, "use_cpu": True, "kif": SWITCHES, **options,
    }  # fmt: skip
    made = KIFTrainer(
        model=lm.model,
        args=KIFTrainingArguments(output_dir=str(output), **settings),
        train_dataset=batches(lm, "0/new/1", 40, STEPS),
        memory_dataset=batches(lm, "0/replay/1", 12, memory) if memory else None,
        eval_dataset=eval_dataset,
        data_collator=lm.collate,
        processing_class=lm.tokenizer,
        callbacks=callbacks,
    )
    made.train(resume_from_checkpoint=resume)
    return made


def weights(lm: LanguageModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in lm.model.parameters() if p.requires_grad])


def by_loop(tiny_models: dict[str, Path], kind: str, memory: bool = True) -> torch.Tensor:
    """The weights that `kif train` ends with."""
    lm, config = load(tiny_models, kind)
    method = METHODS["recurrent-kif"](lm, config)
    rows = lm.encode(TASK, TASK.train)
    kept = rows[:12] if memory else []
    train_phase(lm, method, config, index=1, tasks=1, rows=rows, memory=kept, log=lambda record: None)
    return weights(lm)


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("memory", [True, False])
def test_the_trainer_ends_as_kif_train(tiny_models: dict[str, Path], tmp_path: Path, kind: str, memory: bool) -> None:
    lm, _ = load(tiny_models, kind)
    before = weights(lm)
    trainer = train(lm, tmp_path, 12 if memory else 0)
    expected = by_loop(tiny_models, kind, memory)
    assert (expected - before).norm() > 0.1 * before.norm()
    torch.testing.assert_close(weights(lm), expected, rtol=1e-6, atol=1e-6)
    assert trainer.state.global_step == STEPS and trainer.engine.rounds == (4 if memory else 0)
    logs = trainer.state.log_history[:-1]
    assert len(logs) == STEPS and all(entry["skipped"] == 0 for entry in logs)
    ends = [entry["step"] for entry in logs if "memory_loss" in entry]
    assert ends == ([3, 6, 9, 10] if memory else [])
    assert not memory or 0.2 <= logs[-1]["kept_inner"] <= 0.25


def test_torch_compile_is_the_trainers(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        lm, _ = load(tiny_models, "llama")
        assert train(lm, tmp_path, **options).engine.rounds == 4
        found.append(weights(lm))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_is_the_trainers(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    lm, _ = load(tiny_models, "llama")
    train(lm, tmp_path, gradient_checkpointing=True)
    assert lm.base.is_gradient_checkpointing
    torch.testing.assert_close(weights(lm), by_loop(tiny_models, "llama"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_loop_of_ones_own_ends_as_kif_train(tiny_models: dict[str, Path], kind: str) -> None:
    lm, _ = load(tiny_models, kind)
    rows, replay = batches(lm, "0/new/1", 40, STEPS), batches(lm, "0/replay/1", 12, 12)
    engine = RecurrentKIF.of(lm.model, SWITCHES, OptimizerConfig(max_grad_norm=1.0))
    lm.model.train()
    done = 0
    for round_steps in (3, 3, 3, 1):
        for _ in range(round_steps):
            lm.model(**lm.collate(rows[4 * done : 4 * done + 4])).loss.backward()
            engine.inner_step(1e-2 * schedule(done, STEPS, 0))
            done += 1
        for _ in range(2):
            lm.model(**lm.collate([replay.pop(0) for _ in range(4)])).loss.backward()
            engine.outer_step(1e-2 * schedule(done - 1, STEPS, 0))
        engine.fuse()
    torch.testing.assert_close(weights(lm), by_loop(tiny_models, kind), rtol=1e-6, atol=1e-6)


def test_no_step_takes_attention_from_cudnn(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    step = Trainer.training_step

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", watched)
    lm, _ = load(tiny_models)
    trainer = train(lm, tmp_path, max_steps=2)
    steps = len(seen)
    lm.model.register_forward_pre_hook(lambda *given: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    trainer.evaluate(trainer.train_dataset)
    assert len(seen) > steps > 2 and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()


def test_without_memory_it_is_plain_training(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    lm, _ = load(tiny_models)
    train(lm, tmp_path, memory=0)
    plain, _ = load(tiny_models)
    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-2, per_device_train_batch_size=4, num_train_epochs=1,
        save_strategy="no", train_sampling_strategy="sequential", remove_unused_columns=False, disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    rows = batches(plain, "0/new/1", 40, STEPS)
    Trainer(model=plain.model, args=args, train_dataset=rows, data_collator=plain.collate).train()
    torch.testing.assert_close(weights(lm), weights(plain), rtol=1e-4, atol=1e-5)


def test_accumulation_does_not_change_the_result(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    lm, _ = load(tiny_models)
    whole = train(lm, tmp_path, max_grad_norm=0.0)
    split, _ = load(tiny_models)
    parts = train(split, tmp_path, max_grad_norm=0.0, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    torch.testing.assert_close(weights(split), weights(lm), rtol=1e-4, atol=1e-5)
    key = "grad_norm"
    norms = [[entry[key] for entry in t.state.log_history if key in entry] for t in (whole, parts)]
    assert len(norms[0]) == STEPS and norms[0] == pytest.approx(norms[1], rel=1e-3)
    losses = [[e["memory_loss"] for e in t.state.log_history if "memory_loss" in e] for t in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("step", [6, 7, 8])
def test_resuming_ends_bit_for_bit_alike(tiny_models: dict[str, Path], tmp_path: Path, step: int) -> None:
    """At the end of a round and within one; dropout, shuffled rows, a memory in its second epoch."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": step, "train_sampling_strategy": "random"}
    lm, _ = load(tiny_models, dropout=0.1)
    train(lm, tmp_path, 3, **options)
    resumed, _ = load(tiny_models, dropout=0.1)
    trainer = train(resumed, tmp_path, 3, resume=str(tmp_path / f"checkpoint-{step}"), **options)
    assert torch.equal(weights(resumed), weights(lm))
    assert trainer.state.global_step == STEPS and trainer.engine.rounds == 4
    saved = torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["kif"]
    assert saved["memory"] == {"epoch": 1, "position": 1} and saved["inner_done"] == step % 3


def test_resuming_with_batches_of_like_lengths(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """The order of the rows is drawn from torch's random numbers; the memory is in its second epoch."""
    found = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        lm, _ = load(tiny_models)
        rows = [{"input_ids": [*r.input_ids], "labels": [*r.input_ids]} for r in lm.encode(TASK, TASK.train)]
        lm.tokenizer.pad_token = lm.tokenizer.eos_token
        args = KIFTrainingArguments(
            str(tmp_path), kif=SWITCHES, train_sampling_strategy="group_by_length", max_steps=8, save_steps=4,
            per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(lm.tokenizer)
        trainer = KIFTrainer(lm.model, args, train_dataset=rows, memory_dataset=rows[:4], data_collator=collator)
        trainer.train(resume_from_checkpoint=resume)
        found.append(weights(lm))
    assert torch.equal(*found)


def test_the_order_of_the_memory_is_its_own() -> None:
    def stream() -> MemoryStream:
        return MemoryStream(torch.utils.data.DataLoader(range(40), batch_size=10, shuffle=True), seed=3)  # type: ignore[arg-type]

    before = torch.get_rng_state()
    whole = stream()
    drawn = [next(whole).tolist() for _ in range(8)]
    first, second = ([row for batch in epoch for row in batch] for epoch in (drawn[:4], drawn[4:]))
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    resumed = stream()
    resumed.load_state_dict({"epoch": 1, "position": 2})
    torch.rand(5)
    assert [next(resumed).tolist() for _ in range(2)] == drawn[6:]


def test_a_checkpoint_needs_its_memory_and_switches(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    lm, _ = load(tiny_models)
    train(lm, tmp_path, save_strategy="steps", save_steps=8)
    with pytest.raises(ValueError, match="memory_dataset"):
        train(load(tiny_models)[0], tmp_path, memory=0, resume=True)
    with pytest.raises(ValueError, match=r"kif\.outer_steps=2, here it is 1"):
        train(load(tiny_models)[0], tmp_path, resume=True, kif=KIFConfig(inner_steps=3, outer_steps=1))
    lm, _ = load(tiny_models)
    frozen = next(name for name, p in lm.model.named_parameters() if p.requires_grad)
    lm.model.get_parameter(frozen).requires_grad_(False)
    with pytest.raises(ArenaError, match=rf"does not fit: .*there \('{frozen}'"):
        train(lm, tmp_path, resume=True)


def test_the_gradient_is_clipped_once_and_scored_unclipped(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """The importance is of the loss's own gradient (Eq. 3); the moments get it clipped."""
    switches = {"inner_steps": 3, "importance_of": "gradient"}
    trainer = train(load(tiny_models)[0], tmp_path, max_grad_norm=0.25, max_steps=1, kif=switches)
    arena, logged = trainer.engine.arena, trainer.state.log_history[0]["grad_norm"]
    assert logged > 0.5
    # alpha1 is 0.55, beta1 0.9
    assert arena.buffer("importance_in").norm().item() == pytest.approx(0.45 * logged, rel=1e-5)
    assert arena.buffer("inner.exp_avg").norm().item() == pytest.approx(0.1 * 0.25, rel=1e-5)


def test_a_norm_below_zero_does_not_clip(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for norm in (0.0, -1.0):
        lm, _ = load(tiny_models)
        train(lm, tmp_path, max_grad_norm=norm, max_steps=2)
        found.append(weights(lm))
    assert torch.equal(*found)


def test_rows_of_differing_lengths_memory_and_tokenizer(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """A padding collator and columns that the model does not know, as in anyone's script; two tasks in a row."""
    from datasets import Dataset

    lm, _ = load(tiny_models, "t5")
    encoded = lm.encode(TASK, TASK.train)
    columns = [{"input_ids": r.input_ids, "labels": r.target, "text": "unused"} for r in encoded]
    assert len({len(row["input_ids"]) for row in columns}) > 4
    dataset, memory = Dataset.from_list(columns), None
    for task in range(2):
        args = KIFSeq2SeqTrainingArguments(
            output_dir=str(tmp_path), kif=SWITCHES, per_device_train_batch_size=8, max_steps=4, use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        assert args.report_to == []
        trainer = KIFSeq2SeqTrainer(
            model=lm.model,
            args=args,
            train_dataset=dataset,
            memory_dataset=memory,
            data_collator=DataCollatorForSeq2Seq(lm.tokenizer, lm.model),
            processing_class=lm.tokenizer,
        )
        trainer.train()
        assert trainer.engine.rounds == 2 * task
        memory = trainer.draw_memory(0.1, name=f"task{task}", labels=[e.label for e in TASK.train])
        assert isinstance(memory, Dataset) and len(memory) == 4 * (task + 1)
    rule = ReplayMemory(0.1, True, args.seed)
    rule.add("task0", encoded, [example.label for example in TASK.train])
    assert memory[:4]["input_ids"] == [list(row.input_ids) for row in rule.rows()]

    trainer.save_model()
    assert (tmp_path / "tokenizer.json").is_file()
    assert not list(tmp_path.glob("runs*"))
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    again = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(tiny_models["t5"]), tmp_path)
    batch = lm.collate(encoded[:2])
    lm.model.eval()
    assert torch.equal(again.eval()(**batch).logits, lm.model(**batch).logits)


def test_memory_of_a_list(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    lm, _ = load(tiny_models)
    trainer = train(lm, tmp_path, max_steps=1)
    memory = trainer.draw_memory(0.1)
    assert len(memory) == 48 + 4 and memory[50] in trainer.train_dataset
    labels = ["a"] * 39 + ["b"]
    drawn = [trainer.draw_memory(0.1, labels=kind) for kind in (labels, np.array(labels))]
    assert list(drawn[0]) == list(drawn[1]) and trainer.train_dataset[39] in drawn[0]
    trainer.memory_dataset, old = memory, trainer.engine
    trainer.train()
    assert trainer.engine is not old and trainer.engine.rounds == 1
    trainer.memory_dataset = []
    trainer.train()
    assert trainer.engine.rounds == 0


@pytest.mark.parametrize("fraction", [2, 1.0, 0, -0.1, float("nan")])
def test_draw_memory_refuses_what_kif_train_does(tiny_models: dict[str, Path], tmp_path: Path, fraction: float) -> None:
    lm, _ = load(tiny_models)
    args = KIFTrainingArguments(str(tmp_path), use_cpu=True)
    trainer = KIFTrainer(model=lm.model, args=args, train_dataset=batches(lm, "0/new/1", 40, STEPS))
    message = f"fraction must lie above 0 and below 1, got {fraction}"
    with pytest.raises(ValueError, match=r"^memory_fraction must "):
        RunConfig(model="m", memory_fraction=fraction)
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer.draw_memory(fraction)


class Unreadable(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        raise OSError("disk")


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_a_round_that_is_stopped_early_is_fused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    lm, _ = load(tiny_models)
    ended: list[int] = []

    class AtEnd(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            ended.append(optimizer.optimizer.engine.rounds)

    trainer = train(lm, tmp_path, callbacks=[AtEnd(), StopAt(4)])
    assert trainer.state.global_step == 4 and trainer.engine.rounds == 2 and ended == [2]
    assert trainer.kif_optimizer.inner_done == 0


@pytest.mark.parametrize("load_best", [True, False])
def test_the_best_checkpoint_is_loaded(tiny_models: dict[str, Path], tmp_path: Path, load_best: bool) -> None:
    """At the end, over the weights of a round that was stopped early, which then has nothing to fuse."""
    lm, _ = load(tiny_models)
    trainer = train(
        lm, tmp_path, callbacks=[StopAt(5)], eval_dataset=batches(lm, "0/eval/1", 4, 1), eval_strategy="steps",
        eval_steps=3, save_strategy="steps", save_steps=3, metric_for_best_model="loss",
        load_best_model_at_end=load_best,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert trainer.state.global_step == 5 and trainer.engine.rounds == (1 if load_best else 2)
    best = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    now = {name.replace(".default.", "."): p for name, p in lm.model.named_parameters() if p.requires_grad}
    assert now.keys() == best.keys()
    assert all(torch.equal(now[name], best[name]) for name in best) == load_best
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.engine.rounds == (1 if load_best else 2)


def test_outer_steps_have_their_own_rate(tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    rates: list[float] = []
    step = RecurrentKIF.outer_step
    monkeypatch.setattr(RecurrentKIF, "outer_step", lambda self, lr: (rates.append(lr), step(self, lr))[1])
    train(load(tiny_models)[0], tmp_path, outer_learning_rate=2e-2)
    expected = [2e-2 * schedule(done - 1, STEPS, 0) for done in (3, 6, 9, 10) for _ in range(2)]
    assert rates == pytest.approx(expected)


class Reference(TrainerCallback):
    """The importance as written in the paper, beside the callback's."""

    def __init__(self) -> None:
        self.importance: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, p in model.named_parameters():
            if p.requires_grad:
                new = (p.detach().double() * p.grad.double()).abs()
                self.importance[name] = 0.7 * self.importance.get(name, 0.0) + 0.3 * new


def test_the_callback_scores_and_changes_nothing(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    def plain(callbacks: list[Any], resume: str | None = None) -> torch.Tensor:
        lm, _ = load(tiny_models)
        args = TrainingArguments(
            output_dir=str(tmp_path), learning_rate=1e-2, per_device_train_batch_size=4, max_steps=6, use_cpu=True,
            save_steps=3, remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        rows = batches(lm, "0/new/1", 40, STEPS)
        trainer = Trainer(model=lm.model, args=args, train_dataset=rows, data_collator=lm.collate, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return weights(lm)

    callback, reference = KIFCallback(alpha=0.7, save=True), Reference()
    assert torch.equal(plain([callback, reference]), plain([]))
    assert callback.importance.keys() == reference.importance.keys() and len(callback.importance) > 1
    for name, score in callback.importance.items():
        torch.testing.assert_close(score.double(), reference.importance[name], rtol=1e-5, atol=1e-12)

    mask = callback.mask(0.2)
    total = sum(score.numel() for score in callback.importance.values())
    kept = sum(int(m.sum()) for m in mask.values())
    assert 0.2 * total <= kept <= 0.2 * total + 2
    lowest = min(float(callback.importance[n][m].min()) for n, m in mask.items() if m.any())
    assert all(float(callback.importance[n][~m].max()) < lowest for n, m in mask.items() if not m.all())

    again = KIFCallback(alpha=0.7, save=True)
    plain([again], resume=str(tmp_path / "checkpoint-3"))
    assert (tmp_path / "checkpoint-3" / IMPORTANCE_FILE).is_file()
    for name, score in callback.importance.items():
        assert torch.equal(again.importance[name], score)
    (tmp_path / "checkpoint-3" / IMPORTANCE_FILE).unlink()
    with pytest.warns(UserWarning, match=rf"{IMPORTANCE_FILE} does not exist: importance begins anew at step 3"):
        plain([again], resume=str(tmp_path / "checkpoint-3"))


def test_the_callback_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="alpha"):
        KIFCallback(alpha=1.5)
    with pytest.raises(ValueError, match="train first"):
        KIFCallback().mask(0.2)
    model = torch.nn.Sequential(torch.nn.Linear(2, 1)).double()
    model(torch.ones(1, 2).double()).sum().backward()
    with pytest.raises(ValueError, match=r"cannot score parameter 0\.weight: weight must be float32 .* got float64"):
        KIFCallback().on_pre_optimizer_step(None, None, None, model=model)
    with pytest.raises(ValueError, match=r"save=True.* hyperparameter_search"):
        KIFCallback(save=True).on_train_begin(None, TrainerState(is_hyper_param_search=True), None)


def test_arguments_survive_to_dict_and_the_command_line(tmp_path: Path) -> None:
    args = KIFTrainingArguments(str(tmp_path), kif=KIFConfig(outer_steps=4, density=0.5), outer_learning_rate=1e-3)
    again = KIFTrainingArguments(**json.loads(args.to_json_string()))
    assert kif_config(again.kif) == KIFConfig(outer_steps=4, density=0.5) and again.outer_learning_rate == 1e-3
    assert again.to_dict() == args.to_dict()

    parser = HfArgumentParser(KIFTrainingArguments)  # type: ignore[arg-type]
    one, two, three = (
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *options])[0]
        for options in ([], ["--kif", "released-code"], ["--kif", '{"preset": "no-die", "outer_steps": 4}'])
    )
    assert kif_config(one.kif) == KIFConfig()
    assert kif_config(two.kif) == KIFConfig.preset("released-code")
    assert kif_config(three.kif) == KIFConfig(outer_steps=4, history="frozen")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kif": {"inner_step": 8}}, "no switch 'inner_step'"),
        ({"kif": {"inner_steps": 0}}, "at least 1"),
        ({"kif": {"inner_steps": "8"}}, "of type int"),
        ({"kif": {"inner_steps": 2.5}}, "of type int"),
        ({"kif": {"fusion": "all"}}, "must be one of paper"),
        ({"kif": "paper2"}, "unknown preset"),
        ({"kif": '{"outer_steps": 4'}, r"kif is neither a preset's name nor JSON \(Expecting .*: {\"outer_steps\": 4"),
        ({"kif": 5}, r"kif must be a KIFConfig, .* got 5"),
        ({"outer_learning_rate": 0.0}, "outer_learning_rate"),
        ({"outer_learning_rate": float("nan")}, "outer_learning_rate"),
        ({"outer_learning_rate": 1e-3, "learning_rate": 0.0}, r"got 0\.001 and 0\.0"),
        ({"optim": "adafactor"}, "adafactor"),
        ({"fp16": True}, "fp16"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "DeepSpeed"),
        ({"fsdp": "full_shard"}, "FSDP"),
    ],
)
def test_arguments_refuse(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KIFTrainingArguments(str(tmp_path), **options)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_chosen_by_the_launcher_is_refused(tmp_path: Path, monkeypatch: Any, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="torchrun"):
        KIFTrainingArguments(str(tmp_path))


def test_the_trainer_refuses(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    args = KIFTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="KIFTrainingArguments"):
        KIFTrainer(model=model, args=TrainingArguments(str(tmp_path)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="makes the optimizer"):
        KIFTrainer(model=model, args=args, optimizers=(optimizer, None))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match=r"leave out optimizers; .*lr_scheduler_type .*override create_scheduler"):
        KIFTrainer(model=model, args=args, optimizers=(None, schedule))
    trainer = KIFTrainer(model=model, args=args)
    with pytest.raises(AttributeError, match=r"no engine yet: train\(\) makes it"):
        _ = trainer.engine
    trainer.create_optimizer()
    trainer.callback_handler.lr_scheduler = schedule
    with pytest.raises(ValueError, match="scheduler is of another optimizer"):
        trainer.callback_handler.on_train_begin(args, trainer.state, trainer.control)
    with pytest.raises(ValueError, match="optim='adafactor' does not work"):
        KIFTrainer(model=model, args=KIFTrainingArguments(str(tmp_path)).set_optimizer("adafactor")).create_optimizer()
    args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun"):
        KIFTrainer(model=model, args=args)


def test_trackers_get_what_the_method_logs(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`report_to` as of any Trainer: its trackers are callbacks by name."""
    from transformers.integrations import integration_utils

    logged: list[dict[str, float]] = []
    configs: list[Any] = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            configs.append(args.to_dict()["kif"])

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logged.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mine", Tracker)
    lm, _ = load(tiny_models)
    train(lm, tmp_path, report_to=["mine"])
    assert configs[0]["inner_steps"] == SWITCHES.inner_steps
    assert sum("memory_loss" in entry and "kept_both" in entry for entry in logged) == 4
    assert len([entry for entry in logged if "loss" in entry]) == STEPS
    assert KIFTrainingArguments(str(tmp_path)).report_to == []


def texts_of(task: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"text": [f"{row.input} Answer: {row.label}" for row in task.train]})


def test_packed_rows(tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's packing: rows of several texts, for new task and memory alike."""
    Packing, Arguments = supervised(monkeypatch)
    lm, _ = load(tiny_models)
    lm.tokenizer.pad_token = lm.tokenizer.pad_token or lm.tokenizer.eos_token
    texts = texts_of(TASK)
    args = Arguments(
        str(tmp_path), kif={"inner_steps": 3, "outer_steps": 2}, packing=True, packing_strategy="wrapped",
        max_length=128, per_device_train_batch_size=2, max_steps=6, learning_rate=1e-2, save_strategy="no",
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
    )  # fmt: skip
    first = Packing(model=lm.model, args=args, train_dataset=texts, processing_class=lm.tokenizer)
    lengths = [len(row["input_ids"]) for row in first.train_dataset]
    assert set(lengths[:-1]) == {128} and len(lengths) < len(texts)
    first.train()
    memory = first.draw_memory(0.5)
    second = Packing(
        model=lm.model, args=args, train_dataset=texts, memory_dataset=memory, processing_class=lm.tokenizer
    )
    before = weights(lm)
    second.train()
    assert second.engine.rounds == 2 and second.engine.skipped == 0
    assert weights(lm).isfinite().all() and not torch.equal(weights(lm), before)


@pytest.mark.parametrize("kind", ["supervised", "plain", "broken"])
def test_memory_rows_that_are_not_prepared(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In SFTTrainer no column is left; elsewhere the collator fails at the end of a round; or the row itself does."""
    lm, _ = load(tiny_models)
    lm.tokenizer.pad_token = lm.tokenizer.pad_token or lm.tokenizer.eos_token
    Supervised, Arguments = supervised(monkeypatch) if kind == "supervised" else (KIFTrainer, KIFTrainingArguments)
    texts = texts_of(TASK)
    args = Arguments(str(tmp_path), kif=SWITCHES, max_steps=3, save_strategy="no", use_cpu=True, report_to=[])
    rows, memory, cause = texts, texts, "No columns in the dataset match"
    if kind != "supervised":
        rows = texts.map(lambda row: {"labels": (ids := lm.tokenizer(row["text"]).input_ids), "input_ids": ids})
        memory, cause = [{"text": "as it came"}] * 8, "You should supply an encoding"
    if kind == "broken":
        memory, cause = Unreadable(), "disk"
    trainer = Supervised(
        model=lm.model, args=args, train_dataset=rows, memory_dataset=memory, processing_class=lm.tokenizer,
        **({} if kind == "supervised" else {"data_collator": DataCollatorForSeq2Seq(lm.tokenizer)}),
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"(?s)memory_dataset .*prepared as .*draw_memory.*{cause}") as caught:
        trainer.train()
    assert cause in str(caught.value.__cause__) and trainer.train_dataset is not memory


def test_what_trl_logs_is_of_new_rows(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the memory are other ones; the first round's inner steps are the same with and without it."""
    Supervised, Arguments = supervised(monkeypatch)
    texts = texts_of(TASK)
    args = Arguments(
        str(tmp_path), kif=SWITCHES, max_steps=6, logging_steps=3, learning_rate=1e-2, save_strategy="no", use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to=[], per_device_train_batch_size=2,
    )  # fmt: skip
    found, memory = [], None
    for _ in range(2):
        lm, _ = load(tiny_models)
        lm.tokenizer.pad_token = lm.tokenizer.pad_token or lm.tokenizer.eos_token
        trainer = Supervised(
            model=lm.model, args=args, train_dataset=texts, memory_dataset=memory, processing_class=lm.tokenizer
        )
        trainer.train()
        found.append([entry for entry in trainer.state.log_history if "mean_token_accuracy" in entry])
        memory = trainer.draw_memory(0.2)
    without, with_memory = found
    assert trainer.engine.rounds == 2 and len(with_memory) == 2 and "memory_loss" in with_memory[0]
    assert with_memory[0]["mean_token_accuracy"] == pytest.approx(without[0]["mean_token_accuracy"])
    assert with_memory[0]["entropy"] == pytest.approx(without[0]["entropy"])
    tokens = [[entry["num_tokens"] for entry in entries] for entries in found]
    assert tokens[0] == tokens[1] and tokens[0][1] > tokens[0][0] > 0


def test_running_out_of_memory_is_not_the_memory_datasets_fault() -> None:
    def batches() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA"):
        next(MemoryStream(batches()))


def test_memory_rows_without_a_column_that_the_model_takes() -> None:
    with pytest.raises(ValueError, match=r"(?s)memory_dataset .*prepared as .*no column that the model takes"):
        next(MemoryStream([{}]))


def test_names_are_exported() -> None:
    assert issubclass(kif.KIFTrainer, kif.KIFMixin) and kif.KIFMixin is KIFMixin
    assert issubclass(kif.KIFTrainingArguments, KIFArguments)


TWO_PROCESSES = """
import os
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_trainer import load, train, weights
import torch
lm, _ = load({"llama": Path(sys.argv[2])})
trainer = train(lm, Path(sys.argv[3]), per_device_train_batch_size=2)
torch.save(weights(lm), f"{sys.argv[3]}/weights-{trainer.args.process_index}.pt")
torch.distributed.destroy_process_group()
# threads of torch's may still be at work when a process ends as usual, which aborts it now and then
os._exit(0)
"""


def test_two_processes_train_as_one(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    arguments = [str(Path(__file__).parent), str(tiny_models["llama"]), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    lm, _ = load(tiny_models)
    train(lm, tmp_path)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weights(lm), rtol=1e-4, atol=1e-5)


def example(name: str, monkeypatch: Any, capsys: Any, *arguments: str) -> dict[str, str]:
    """Run an example in this process; what it prints after each task."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    return dict(line.removeprefix("after ").split(": ") for line in lines if line.startswith("after "))


def test_the_loop_example_remembers_with_memory(monkeypatch: Any, capsys: Any) -> None:
    assert example("custom_loop.py", monkeypatch, capsys)["topic"] == "mood 100.0%, topic 100.0%"
    forgotten = example("custom_loop.py", monkeypatch, capsys, "--memory", "0")
    assert forgotten == {"mood": "mood 100.0%", "topic": "mood 0.0%, topic 100.0%"}


@pytest.mark.parametrize("name", ["trainer.py", "sft.py"])
def test_the_trainer_examples_remember(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    if name == "sft.py":
        pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")  # TRL counts its users, but not in tests
    options = ("--output_dir", str(tmp_path), "--disable_tqdm", "true", "--use_cpu", "true")
    assert example(name, monkeypatch, capsys, *options)["topic"] == "mood 100.0%, topic 100.0%"
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "tokenizer.json").is_file()
