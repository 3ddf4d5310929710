"""Models of the shapes of Appendix D with random weights, and rows of random tokens for them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from kif.decoder import DecoderModel
from kif.families import Encoded, LanguageModel
from kif.seq2seq import EncoderDecoderModel

_T5 = {"vocab_size": 32128, "d_kv": 64, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
_LLAMA = {"vocab_size": 32000, "pad_token_id": 0, "max_position_embeddings": 4096}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-t5": ("t5", {**_T5, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}),
    "tiny-llama": (
        "llama",
        {**_LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "t5-small": ("t5", {**_T5, "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152, "pad_token_id": 0, "max_position_embeddings": 8192, "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "t5-large": ("t5", {**_T5, "d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}),
    "flan-t5-xl": (
        "t5",
        {
            **_T5, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        },
    ),
    "llama2-7b": (
        "llama",
        {**_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "llama2-13b": (
        "llama",
        {**_LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    ),
}  # fmt: skip
"""Shapes of the models of Appendix D, small ones for CPUs, and tiny ones for tests."""

TARGET = 8
"""Tokens of a label."""


def build(name: str, device: torch.device, dtype: torch.dtype, dropout: bool = False) -> LanguageModel:
    """The model with random weights and LoRA (r=8 on query and value), the adapter in fp32.

    `dropout`: that of Appendix D on the adapter, and T5's own; else none.
    """
    from peft import LoraConfig, get_peft_model

    kind, _ = MODELS[name]
    torch.manual_seed(0)
    base = random_base(name, device, dtype, **({"dropout_rate": 0.1 if dropout else 0.0} if kind == "t5" else {}))
    with torch.device(device):
        task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
        targets = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
        share = 0.05 if dropout else 0.0
        lora = LoraConfig(task_type=task, r=8, lora_alpha=32, lora_dropout=share, target_modules=targets)
        model = get_peft_model(base, lora)
    family = EncoderDecoderModel if kind == "t5" else DecoderModel
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    model.train()
    return family(model, tokenizer, max_length=10**6, max_target_length=TARGET)


def random_base(name: str, device: torch.device, dtype: torch.dtype, **changes: Any) -> Any:
    """The transformers model of that shape with random weights; `changes`: fields of its config."""
    import transformers

    kind, values = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**values, **changes})
    auto: Any = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device(device):
        return auto.from_config(config, dtype=dtype)


def rows_of(count: int, lengths: Sequence[int], seed: int) -> list[Encoded]:
    """Rows of random tokens, whose prompts have these lengths in turn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 30000, (count, max(lengths) + TARGET), generator=generator).tolist()
    return [
        Encoded(tuple(row[TARGET : TARGET + length]), tuple(row[:TARGET]), "random", False)
        for row, length in zip(ids, itertools.cycle(lengths), strict=False)
    ]
