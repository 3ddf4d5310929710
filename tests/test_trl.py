"""TRL's trainers beside SFTTrainer (tests/test_trainer.py): preferences, rewards, answers of the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl_setup import with_rounds

Folders = dict[str, Path]

ARGUMENTS: dict[str, Any] = {
    "kif": {"inner_steps": 2, "outer_steps": 2},
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 2,
}


def rows(method: str, word: str, count: int = 16) -> Any:
    datasets = pytest.importorskip("datasets")
    made = [{"prompt": f"{word} {i}", "chosen": " rose", "rejected": " was bad"} for i in range(count)]
    if method in ("GRPO", "RLOO"):
        made = [{"prompt": row["prompt"]} for row in made]
    return datasets.Dataset.from_list(made)


def trainer_of(method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> Any:
    """A trainer of new rows that begin with "market", and the prompts that are rewarded."""
    from peft import LoraConfig

    Trainer, Arguments = with_rounds(method, monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    rewarded: list[list[str]] = []
    more: dict[str, Any] = {}
    if method == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    if method in ("GRPO", "RLOO"):

        def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
            rewarded.append(prompts)
            return [float(len(completion) % 5) for completion in completions]

        more["reward_funcs"] = reward
        arguments = {"num_generations": 2, "max_completion_length": 4, **arguments}
    trainer = Trainer(
        model,
        Arguments(str(tmp_path), **{**ARGUMENTS, **arguments}),
        train_dataset=rows(method, "market"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS" if method == "Reward" else None),
        **more,
    )
    return trainer, rewarded


@pytest.mark.parametrize("method", ["DPO", "Reward"])
def test_preferences(method: str, tiny_models: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = trainer_of(method, tiny_models["llama"], tmp_path, monkeypatch)
    trainer.train()
    assert trainer.engine.rounds == 0
    trainer.memory_dataset = trainer.draw_memory(0.25)
    before = trainer.engine.arena.data.clone()
    trainer.train()
    assert trainer.engine.rounds == 2 and not trainer.engine.arena.data.equal(before)
    assert [0.0 < log["memory_loss"] < 10.0 for log in trainer.state.log_history if "loss" in log][-2:] == [True] * 2


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_outer_steps_answer_rows_of_the_memory(
    method: str, accumulation: int, tiny_models: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, rewarded = trainer_of(
        method, tiny_models["llama"], tmp_path, monkeypatch, gradient_accumulation_steps=accumulation
    )
    trainer.memory_dataset = rows(method, "match", 8)
    # what TRL keeps where vLLM answers: the step whose weights that has
    trainer._last_loaded_step = 99
    trainer.train()
    assert trainer._last_loaded_step == -1
    assert trainer.engine.rounds == 2
    words = [{prompt.split()[0] for prompt in prompts} for prompts in rewarded]
    assert words == [{"market"}, {"market"}, {"match"}, {"match"}] * 2
    # what is logged is of new rows alone
    tokens = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    assert tokens[-1] == trainer.state.num_input_tokens_seen
    assert {prompt.split()[0] for prompt in trainer._logs["prompt"]} == {"market"}
    assert len(trainer._logs["rewards"]["reward"]) == len(trainer._logs["prompt"])
    assert tokens[-1] <= 4 * 4 * accumulation * (4 + max(len(p) for prompts in rewarded for p in prompts))


def test_answers_for_several_steps_are_refused(
    tiny_models: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in ({"steps_per_generation": 2}, {"num_iterations": 2}):
        with pytest.raises(ValueError, match="answers generated for 2 passes would be used in several steps"):
            trainer_of("GRPO", tiny_models["llama"], tmp_path, monkeypatch, **more)
