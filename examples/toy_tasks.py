"""What the examples share: a small Llama (random, or one from a folder), two tasks of words, and their accuracy."""

from __future__ import annotations

import random
from typing import Any

import torch

FILLER = [
    "the", "a", "we", "it", "was", "and", "of", "in", "at", "on", "they", "saw", "that", "this", "day", "there", "then",
    "again", "very",
]  # fmt: skip
TASKS = {
    "mood": {"happy": ["joy", "smile", "sunny", "love"], "sad": ["tears", "grief", "gloomy", "loss"]},
    "topic": {"sports": ["goal", "match", "coach", "team"], "money": ["bank", "market", "price", "stock"]},
}
"""Labels and the words that give them away, by task. The prompts do not name the task."""

Row = dict[str, list[int]]


def texts(task: str, count: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, label) pairs: filler of 3 to 8 words with one telling word."""
    draw = random.Random(f"{task}/{seed}")
    pairs = []
    for _ in range(count):
        label = draw.choice(list(TASKS[task]))
        words = draw.choices(FILLER, k=draw.randint(3, 8))
        words.insert(draw.randrange(len(words)), draw.choice(TASKS[task][label]))
        pairs.append((" ".join(words) + " :", label))
    return pairs


def rows(tokenizer: Any, task: str, count: int, seed: int) -> list[Row]:
    """Token ids of prompt and label; the loss is on the label only."""
    encoded = []
    for prompt, label in texts(task, count, seed):
        start = tokenizer(prompt)["input_ids"]
        end = tokenizer(" " + label, add_special_tokens=False)["input_ids"]
        ids = [*start, *end]
        encoded.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(start) + end})
    return encoded


def load(folder: str | None) -> tuple[Any, Any]:
    """(model, tokenizer): LoRA on the model of a folder, or without one a small random model that is trained whole."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    if folder is not None:
        from peft import LoraConfig, get_peft_model

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        base = AutoModelForCausalLM.from_pretrained(folder)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")), tokenizer

    from tokenizers import Tokenizer, models, pre_tokenizers

    telling = [word for labels in TASKS.values() for label, words in labels.items() for word in (label, *words)]
    words = ["<pad>", "<unk>", "</s>", ":", *FILLER, *telling]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


@torch.no_grad()
def accuracy(model: Any, collator: Any, rows: list[Row]) -> float:
    """Percentage of rows whose label tokens all are the most likely ones."""
    model.eval()
    batch = {name: tensor.to(model.device) for name, tensor in collator(rows).items()}
    labels = batch.pop("labels")[:, 1:]
    best = model(**batch).logits[:, :-1].argmax(-1)
    model.train()
    return 100 * ((best == labels) | (labels == -100)).all(1).float().mean().item()
