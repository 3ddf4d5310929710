"""L2P: a pool of prompts from which each input picks some by its own features; the model stays frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kif.config import RunConfig
from kif.families import Encoded, LanguageModel
from kif.methods.base import SingleAdapterMethod, save_method_file
from kif.methods.prompts import (
    VirtualTokens,
    add_parameters,
    check_positions,
    embed,
    load_prompts,
    switch_off_lora,
)

KEYS, PROMPTS = "l2p_keys", "l2p_prompts"


class PromptPool:
    """Keys and prompts, the choice among them, and the chosen prompts in front of the model's input.

        q_i = mean over the prompt's tokens of the frozen model's last hidden states (encoder, or decoder body),
              without virtual tokens, dropout and gradient;    c_ij = cos(q_i, k_j)
        evaluation: row i takes its top_k prompts of largest c_ij, in that order
        training: each row has its top_k; all rows take the top_k prompts chosen most often, the first of equals

    Args:
        lm: the model; LoRA must be off, keys (pool_size, features) and prompts (pool_size, prompt_length, dimension) be
            parameters `KEYS` and `PROMPTS` of `lm.model`.
        config: the run's configuration.

    Attributes:
        chosen: of the last batch, the numbers of its prompts, (top_k,) in training, (rows, top_k) in evaluation.
        match: of the last batch, sum over rows and chosen keys of c_ij, divided by the rows.
    """

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        self.lm, self.top_k = lm, config.l2p.top_k
        self.tokens = VirtualTokens(lm, before=config.l2p.top_k * config.l2p.prompt_length)
        self.chosen = self.match = torch.zeros(())
        lm.listeners.append(self._choose)

    def _choose(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.tokens.vectors = None
        queries = F.normalize(features(self.lm, input_ids, attention_mask), dim=1)
        cosines = queries @ F.normalize(getattr(self.lm.model, KEYS), dim=1).T
        best = cosines.detach().topk(self.top_k, dim=1).indices
        if self.lm.model.training:
            votes = torch.zeros(cosines.size(1), dtype=torch.int64, device=best.device)
            votes.scatter_add_(0, best.flatten(), torch.ones_like(best).flatten())
            self.chosen = votes.argsort(descending=True, stable=True)[: self.top_k]
            self.match = cosines[:, self.chosen].sum() / len(cosines)
        else:
            self.chosen = best
            self.match = cosines.gather(1, best).sum() / len(cosines)
        self.tokens.vectors = getattr(self.lm.model, PROMPTS)[self.chosen].flatten(-3, -2)


@torch.no_grad()
def features(lm: LanguageModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of the frozen model's last hidden states over each prompt's real tokens, (rows, features), fp32.

    Args:
        lm: the model, whose virtual tokens must be off.
        input_ids: (rows, width), padded on either side; virtual tokens are left out.
        attention_mask: 1 at the prompt's tokens.
    """
    real = attention_mask.bool() & (input_ids >= 0)
    # real tokens to the left, so that positions count from the first of them
    width = input_ids.size(1) - lm.virtual_before - lm.virtual_after
    order = real.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
    mask = real.gather(1, order)
    ids = input_ids.gather(1, order).masked_fill(~mask, lm.tokenizer.pad_token_id)
    body = lm.base.get_encoder() if lm.family == "encoder-decoder" else lm.base.base_model
    options = {"use_cache": False} if lm.family == "decoder" else {}
    training = body.training
    body.eval()
    try:
        states = body(input_ids=ids, attention_mask=mask.long(), **options).last_hidden_state.float()
    finally:
        body.train(training)
    weights = mask.unsqueeze(-1).float()
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1.0)


class L2P(SingleAdapterMethod):
    """Loss = cross-entropy - pull * sum_i sum_{j chosen} cos(q_i, k_j) / rows, on keys and prompts alone.

    The choice and q are those of `PromptPool`; the top_k * prompt_length chosen vectors stand in front of the prompt.
    The second term draws the chosen keys towards the rows. LoRA is off; a classification layer (`head=linear`) is
    trained along and reads the first virtual token's state. Prompts are learned with rates far above LoRA's: the source
    has 0.03. Micro-batches (`gradient_accumulation`, several processes) vote by themselves, which changes the result.

    A saved adapter is the base model's (LoRA with B = 0), with keys and prompts in `METHOD_FILE`.
    Raises: ValueError where the virtual tokens exceed the model's positions.
    """

    name = "l2p"
    summary = "a pool of soft prompts, chosen by the input's own features; the model stays frozen"
    source = "Wang et al. 2022 (vision), here for text; baseline of section 4"
    section = "l2p"
    plain_adapter = False
    unused = (
        "adapter_precision", "lora_r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "target_modules",
        "outer_lr", "outer_batch_size", "memory_fraction", "memory_balanced",
    )  # fmt: skip

    refused_options: ClassVar[Mapping[str, str]] = {"modules_to_save": "whose model stays frozen"}

    @classmethod
    def attach(cls, lm: LanguageModel, config: RunConfig, folder: Path) -> None:
        switch_off_lora(lm)
        add_parameters(lm, load_prompts(folder, _shapes(lm, config)), trained=False)
        PromptPool(lm, config)

    @classmethod
    def of_micro_batches(cls, config: RunConfig) -> str | None:
        return "choice of prompts"

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        check_positions(lm, config, config.l2p.top_k * config.l2p.prompt_length)
        switch_off_lora(lm)
        generator = torch.Generator().manual_seed(config.seed)
        fresh = {
            name: torch.empty(shape).uniform_(-1.0, 1.0, generator=generator)
            for name, shape in _shapes(lm, config).items()
        }
        if config.l2p.init == "vocabulary":
            count = config.l2p.pool_size * config.l2p.prompt_length
            ids = torch.randint(len(lm.tokenizer), (count,), generator=generator).tolist()
            fresh[PROMPTS] = embed(lm, ids).view(fresh[PROMPTS].shape)
        add_parameters(lm, fresh, trained=True)
        self.pool = PromptPool(lm, config)
        super().__init__(lm, config)

    def loss(self, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
        loss, count = super().loss(rows)
        return loss - count * self.config.l2p.pull * self.pool.match, count

    def save_adapter(self, folder: Path) -> None:
        super().save_adapter(folder)
        save_method_file(folder, {name: getattr(self.lm.model, name) for name in (KEYS, PROMPTS)})


def _shapes(lm: LanguageModel, config: RunConfig) -> dict[str, tuple[int, ...]]:
    # a model's features may have another size than its embeddings
    token = torch.ones((1, 1), dtype=torch.int64, device=lm.device)
    pool = config.l2p
    return {
        KEYS: (pool.pool_size, features(lm, token, token).size(1)),
        PROMPTS: (pool.pool_size, pool.prompt_length, embed(lm, [1]).size(1)),
    }
