"""What encoder-decoder and decoder-only models share: token losses, greedy answers and label ranking."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kif.families import Encoded, LanguageModel
from kif.tasks import Task

IGNORE = -100
"""Label of positions that carry no loss, as in transformers."""

RANK_ELEMENTS = 2**27
"""Label ranking takes as many labels at once as keep logits and repeated states below so many elements."""


class GenerativeModel(LanguageModel):
    """A model that writes the label, token by token."""

    unused = ("head", "label_space")

    @torch.no_grad()
    def answer(
        self, task: Task, rows: Sequence[Encoded], mode: Literal["generate", "rank"], max_new_tokens: int
    ) -> list[str]:
        if mode == "generate":
            return [text.strip() for text in self._generate(rows, max_new_tokens)]
        if mode != "rank":
            raise ValueError(f"unknown evaluation mode {mode!r}; there are generate and rank")
        if task.labels is None:
            raise ValueError(f"task {task.name!r} is free text and has no labels to rank; use mode generate")
        scores = self._rank(rows, self._targets(task, task.labels))
        return [task.labels[i] for i in scores.argmax(1).tolist()]

    @abstractmethod
    def _generate(self, rows: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        """Greedy answers without special tokens."""

    @abstractmethod
    def _rank(self, rows: Sequence[Encoded], candidates: Sequence[tuple[int, ...]]) -> Tensor:
        """Log-likelihood of each candidate target for each row, shape (rows, candidates)."""

    def _end(self, ids: Sequence[int]) -> tuple[int, ...]:
        """A target's ids with the end-of-sequence token, cut to `max_target_length` in front of it."""
        eos = self.tokenizer.eos_token_id
        content = ids[:-1] if ids and ids[-1] == eos else ids
        return (*content[: self.max_target_length - 1], eos)

    def _forward_accepts(self, argument: str) -> bool:
        return argument in signature(self.base.forward).parameters

    def _greedy(self, max_new_tokens: int) -> Any:
        """Settings of plain greedy decoding; `kif.models` has emptied the model folder's own."""
        from transformers import GenerationConfig

        # the model may name further tokens that end an answer; the tokenizer's is the one it is trained with here
        own = self.base.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(ends),
        )


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """(sum over labelled positions of -log softmax(logits)[label], their number).

    Only labelled positions are turned into fp32.

    Args:
        logits: (rows, positions, vocabulary).
        labels: (rows, positions), `IGNORE` where there is none; on the CPU, nothing waits for the device.
    """
    flat = labels.flatten()
    index = (flat != IGNORE).nonzero().squeeze(1)
    chosen = logits.flatten(0, 1).index_select(0, index.to(logits.device, non_blocking=True)).float()
    loss = F.cross_entropy(chosen, flat[index].to(logits.device, non_blocking=True), reduction="sum")
    return loss, index.numel()


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of log softmax(logits)[label] over each row's labelled positions, shape (rows,)."""
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    return -losses.sum(1)
