"""What encoder-decoder and decoder-only models share: token losses, greedy answers and label ranking."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from inspect import signature
from math import isqrt
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kif.distributed import gather
from kif.families import IGNORE, Encoded, LanguageModel, to_device
from kif.tasks import Task

RANK_ELEMENTS = 2**27
"""Label ranking takes as many labels at once as keep logits, repeated states and masks below so many elements."""


Stop = Callable[..., Tensor]
"""Stopping criterion of `generate`: which rows are done, by (token ids, scores)."""


class GenerativeModel(LanguageModel):
    """A model that writes the label, token by token."""

    unused = ("head", "label_space")

    @torch.no_grad()
    def answer(
        self,
        task: Task,
        rows: Sequence[Encoded],
        mode: Literal["generate", "rank"],
        max_new_tokens: int,
        acceptable: Collection[str] | None = None,
    ) -> list[str]:
        if mode == "generate":
            return [text.strip() for text in self._generate(rows, max_new_tokens, acceptable)]
        if mode != "rank":
            raise ValueError(f"unknown evaluation mode {mode!r}; there are generate and rank")
        candidates = self.label_tokens(task)
        scores = self._rank(rows, list(candidates.values()))
        labels = list(candidates)
        return [labels[i] for i in scores.argmax(1).tolist()]

    def label_tokens(self, task: Task) -> dict[str, tuple[int, ...]]:
        if task.labels is None:
            raise ValueError(f"task {task.name!r} is free text and has no labels to rank; use mode generate")
        return dict(zip(task.labels, self._targets(task, task.labels), strict=True))

    @abstractmethod
    def logits_before_last(self, rows: Tensor) -> Tensor:
        """Logits of rows of token ids on the device, at the places before the last token, as the model is trained."""

    @abstractmethod
    def _generate(self, rows: Sequence[Encoded], max_new_tokens: int, acceptable: Collection[str] | None) -> list[str]:
        """Greedy answers without special tokens."""

    @abstractmethod
    def _rank(self, rows: Sequence[Encoded], candidates: Sequence[tuple[int, ...]]) -> Tensor:
        """Log-likelihood of each candidate target for each row, shape (rows, candidates)."""

    def _stopping(self, begin: int, acceptable: Collection[str] | None) -> list[Stop] | None:
        """What ends answers, which begin at position `begin`, besides the end-of-sequence token."""
        if acceptable is None:
            return None
        known = {_compact(text) for text in acceptable}
        # rows of a batch mostly begin alike
        hopeless: dict[tuple[int, ...], bool] = {}

        def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            answers = [tuple(row) for row in input_ids[:, begin:].tolist()]
            new = list({ids for ids in answers if ids not in hopeless})
            for ids, text in zip(new, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                # a token may end within a character
                start = _compact(text.rstrip("\N{REPLACEMENT CHARACTER}"))
                hopeless[ids] = not any(text.startswith(start) for text in known)
            return torch.tensor([hopeless[ids] for ids in answers], device=input_ids.device)

        return [stop]

    def _labels_at_once(self, per_label: int, per_pair: int = 0) -> int:
        """How many labels to rank at once, of `per_label` elements each; n side by side have n * n * `per_pair` too."""
        count = max(1, RANK_ELEMENTS // per_label)
        if per_pair:
            count = max(1, min(count, isqrt(RANK_ELEMENTS // per_pair)))
        return min(gather(count)) if self.lockstep else count

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


def _compact(text: str) -> str:
    """A form in which a text that goes on never stops to begin as it began: no white space, no case."""
    return "".join(text.split()).casefold()


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """(sum over labelled positions of -log softmax(logits)[label], their number).

    Only labelled positions are turned into fp32.

    Args:
        logits: (rows, positions, vocabulary).
        labels: (rows, positions), `IGNORE` where there is none; on the CPU, nothing waits for the device.
    """
    flat = labels.flatten()
    index = (flat != IGNORE).nonzero().squeeze(1)
    chosen = logits.flatten(0, 1).index_select(0, to_device(index, logits.device)).float()
    loss = F.cross_entropy(chosen, to_device(flat[index], logits.device), reduction="sum")
    return loss, index.numel()


def fixed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of `summed_cross_entropy`, with labels on the logits' device and all positions turned into fp32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of log softmax(logits)[label] over each row's labelled positions, shape (rows,)."""
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    return -losses.sum(1)


def log_likelihoods_beside(logits: Tensor, labels: Tensor, lengths: Sequence[int]) -> Tensor:
    """As `log_likelihood`, of labels of so many tokens that lie side by side in each row, shape (rows, labels).

    Args:
        logits: (rows, tokens of all labels, vocabulary).
        labels: (tokens of all labels,), the same for each row.
    """
    every = labels.expand(len(logits), -1)
    losses = F.cross_entropy(logits.float().transpose(1, 2), every, reduction="none")
    return -torch.stack([one.sum(1) for one in losses.split(list(lengths), 1)], 1)
