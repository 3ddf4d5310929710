"""What is wrong with models that versions of transformers load without an error."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from kif.families import known_tokens, text_config
from kif.generative import GenerativeModel
from kif.tokenization import PROBES

TOLERANCE = 0.02
"""Share of the largest logit by which what is before a token may change with it, by rounding."""


def check_tokens(tokenizer: Any, name: str) -> None:
    """Warn where a tokenizer cuts texts otherwise than its own tokenizer.json.

    transformers 5 builds tokenizers anew by the name of their class, and not with every rule of the file.
    """
    import transformers
    from tokenizers import Tokenizer
    from transformers.utils import cached_file

    absent = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name, "tokenizer.json", **absent)
    if path is None:
        return
    own = Tokenizer.from_file(path)
    own.no_padding()
    own.no_truncation()
    for text in PROBES:
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if found != own.encode(text, add_special_tokens=False).ids:
            warnings.warn(
                f"model {name}: transformers {transformers.__version__} cuts texts otherwise than its tokenizer.json, "
                f"{text!r} becomes {tokenizer.decode(found)!r}: take another version of transformers, or set "
                "tokenizer_class to PreTrainedTokenizerFast in its tokenizer_config.json",
                stacklevel=3,
            )
            return


def check_ties(base: Any, name: str) -> None:
    """Raise ValueError for an encoder-decoder whose input embedding was taken from its output layer.

    transformers 5.0 to 5.17 do so with T5-like checkpoints that hold the embedding under another name than `shared`.
    """
    from transformers import PretrainedConfig

    output = base.get_output_embeddings()
    if output is None or output.weight is not base.get_input_embeddings().weight:
        return
    if PretrainedConfig.get_config_dict(name)[0].get("tie_word_embeddings") is False:
        raise ValueError(
            f"model {name}: its input and output embeddings are different ones (tie_word_embeddings: false), and this "
            "version of transformers has loaded one for both: take a newer one"
        )


@torch.no_grad()
def check_order(lm: GenerativeModel) -> None:
    """Raise ValueError for a model whose tokens see those that follow: it would learn from labels that it sees.

    Some model types do with some versions of transformers (umt5 with 5.17, Doge with 5.6 and 5.17). One short pass.
    """
    special = set(lm.tokenizer.all_special_ids)
    ids = [token for token in range(known_tokens(lm.base)) if token not in special][:4]
    if len(ids) < 4:
        return
    rows = torch.tensor([ids[:3], [*ids[:2], ids[3]]], device=lm.device)
    training = lm.model.training
    lm.model.eval()
    try:
        a, b = lm.logits_before_last(rows).float()
    finally:
        lm.model.train(training)
    if (a - b).abs().max() > TOLERANCE * a.abs().max():
        import transformers

        kind = text_config(lm.base.config, lm.family).model_type
        raise ValueError(
            f"tokens of model type {kind!r} see those that follow them with transformers {transformers.__version__}, "
            "so that it would be trained on labels that it sees: take another version"
        )
