"""Tiny random models with tokenizers of their own, written to a folder in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from torch import Tensor, nn

from kif.families import Family
from kif.tasks import Example, Task

Kind = Literal["t5", "llama", "gpt2", "bert"]

WORDS = (
    "What is the topic of the following paragraph? Choose one from the option. Option: World, Sports, Business, "
    "Science or Technology, True, False, positive, negative, Good, Bad.\nTitle: Text: word: Answer: the market rose "
    "and the team won the match while the movie was good and the product was bad"
)


def build_tiny(kind: Kind, folder: str | Path) -> Path:
    """Write a random model and a byte-level BPE tokenizer to `folder`; the same each time.

    About 20,000 parameters. `gpt2` has absolute positions. Its tokenizer is that of `llama`, which has no padding
    token, as the real one. The global random state
    stays as it was.
    """
    folder = Path(folder)
    tokenizer = _tokenizer("llama" if kind == "gpt2" else kind)
    tokenizer.save_pretrained(folder)
    _write_model(lambda: _model(kind, tokenizer), 8 if kind != "t5" else 1.5, folder)
    return folder


@contextmanager
def masks_of_attention() -> Iterator[list[Tensor | None]]:
    """The mask of each call of torch's attention in the block; None: it hides what follows."""
    masks: list[Tensor | None] = []
    attend = F.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any) -> Tensor:
        assert is_causal == (attn_mask is None)
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    with patch.object(F, "scaled_dot_product_attention", watched):
        yield masks


def without_own_dropout(folder: Path) -> Path:
    """Have a written model drop nothing of its own; the adapter's dropout is an option."""
    none = {"dropout_rate": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    none |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | none))
    return folder


def build_type(model_type: str, family: Family, folder: str | Path, **config: Any) -> Path:
    """As `build_tiny`, of any model type of transformers, with fields of its config."""
    import transformers

    folder = Path(folder)
    tokenizer = _tokenizer({"encoder-decoder": "t5", "decoder": "llama", "encoder": "bert"}[family])  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if family == "encoder-decoder":
        special["decoder_start_token_id"] = tokenizer.pad_token_id
    made = transformers.AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **special, **config})
    auto: Any = {
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
        "decoder": transformers.AutoModelForCausalLM,
        "encoder": transformers.AutoModel,
    }[family]
    _write_model(lambda: auto.from_config(made), 4 if family != "encoder-decoder" else 2, folder)
    return folder


def topic_task(rows: int = 8, template: str = "{instruction}{input}\nAnswer:") -> Task:
    """A classification task of three labels with `rows` short texts of differing lengths."""
    texts = ("the market rose", "the team won the match", "a", "Title: movie\nText: the movie was good {input} — é")
    instruction = "What is the topic of the paragraph? Option: World, Sports, Science or Technology.\n"
    labels = ("World", "Sports", "Science or Technology")
    examples = tuple(
        Example(instruction, " and ".join([texts[i % 4]] * (1 + i // 4)), labels[i % 3], (labels[i % 3],))
        for i in range(rows)
    )
    return Task("topics", "accuracy", labels, template, examples, examples, examples)


def sentiment_task() -> Task:
    """A classification task of two labels, one of which `topic_task` has too."""
    rows = (("the product was good", "World"), ("the product was bad", "Bad"))
    examples = tuple(Example("World or Bad? ", text, label, (label,)) for text, label in rows)
    return Task(
        "sentiment", "accuracy", ("World", "Bad"), "{instruction}{input}\nAnswer:", examples, examples, examples
    )


def free_text_task() -> Task:
    """A task without labels, with two references in its first row."""
    examples = (
        Example("Summarise. ", "the team won the match", "a team won", ("a team won", "they won")),
        Example("Summarise. ", "the market rose", "markets up", ("markets up",)),
    )
    template = "Definition: {instruction}\n\nInput: {input}\nOutput: "
    return Task("summaries", "rougeL", None, template, examples, examples, examples)


def without_dropout(model: nn.Module) -> None:
    """Turn off the dropout that a base model has of its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def rerun(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """A recording that calls the function again; it runs once before, as graphs do. Transformers takes it for one."""

    def recorded() -> Tensor:
        with patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
            return run()

    result = recorded().clone()
    return lambda: result.copy_(recorded()), result


def _write_model(make: Callable[[], Any], factor: float, folder: Path) -> None:
    """Write a random model, the same each time: with weights of usual size logits would be nearly equal."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    model.save_pretrained(folder)


def _tokenizer(kind: Kind) -> Any:
    from transformers import PreTrainedTokenizerFast

    special = {
        "t5": ["<pad>", "</s>", "<unk>"],
        "llama": ["<unk>", "<s>", "</s>"],
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    }[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    form = {"t5": "$A </s>", "llama": "<s> $A", "bert": "[CLS] $A [SEP]"}[kind]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(token, tokenizer.token_to_id(token)) for token in special]
    )
    names = {
        "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "bert": {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
    }[kind]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def _model(kind: Kind, tokenizer: Any) -> Any:
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_decoder_layers=1,
                num_heads=2,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **{"decoder_start_token_id": tokenizer.pad_token_id},
            )
        )
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=16,
                n_layer=1,
                n_head=2,
                n_positions=1024,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    return BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
