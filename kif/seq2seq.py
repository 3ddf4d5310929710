"""Encoder-decoder models (T5 and its like): the prompt goes into the encoder, the label comes out of the decoder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kif.families import IGNORE, Batch, Encoded, pad, to_device
from kif.generative import (
    GenerativeModel,
    fixed_cross_entropy,
    log_likelihood,
    log_likelihoods_beside,
    summed_cross_entropy,
)
from kif.tasks import Task


class EncoderDecoderModel(GenerativeModel):
    """T5-like. A target is the label as the tokenizer writes target texts, with EOS."""

    family = "encoder-decoder"

    def _targets(self, task: Task, labels: Sequence[str]) -> list[tuple[int, ...]]:
        encoding = self.tokenizer(text_target=list(labels), return_attention_mask=False, verbose=False)
        return [self._end(ids) for ids in encoding["input_ids"]]

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        return {**self._padded_inputs(rows, "right"), "labels": pad([row.target for row in rows], IGNORE)}

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        inputs = self._to_device(batch)
        self._announce(inputs["input_ids"], inputs["attention_mask"])
        return summed_cross_entropy(self._logits(inputs), batch["labels"])

    def fixed_loss(self, batch: Batch) -> Tensor:
        # what follows a row's label bears no loss; with a mask transformers does the same whatever it holds
        mask = F.pad((batch["labels"][:, :-1] != IGNORE).long(), (1, 0), value=1)
        return fixed_cross_entropy(self._logits(batch, decoder_attention_mask=mask), batch["labels"])

    def _fixed_batch(self, rows: Sequence[Encoded]) -> Batch:
        return {**self._padded_inputs(rows, "right", fixed=True), "labels": self._fixed_labels(rows)}

    def _logits(self, batch: Batch, **more: Tensor) -> Tensor:
        """Logits at all positions of the labels, of a batch on the device."""
        logits: Tensor = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=self._decoder_inputs(batch["labels"]),
            use_cache=False,
            **more,
        ).logits
        return logits

    def logits_before_last(self, rows: Tensor) -> Tensor:
        # what follows the last label is left out of the decoder's input
        labels = F.pad(rows, (0, 1), value=IGNORE)
        batch = {"input_ids": rows[:1].expand_as(rows), "attention_mask": torch.ones_like(rows), "labels": labels}
        return self._logits(batch)[:, :-1]

    def _decoder_inputs(self, labels: Tensor) -> Tensor:
        """The labels behind the token that answers begin with, without the last one.

        Models shift by themselves in several ways; some begin with the label's own last token, which is none where a
        row has no label, and not always what `generate` begins with.
        """
        shifted = F.pad(labels[:, :-1], (1, 0), value=self.base.generation_config.decoder_start_token_id)
        return shifted.masked_fill(shifted == IGNORE, self.tokenizer.pad_token_id)

    def _generate(self, rows: Sequence[Encoded], max_new_tokens: int, acceptable: Collection[str] | None) -> list[str]:
        inputs = self._to_device(self._padded_inputs(rows, "right"))
        self._announce(**inputs)
        # an answer begins behind the decoder's start token
        stopping = self._stopping(1, acceptable)
        sequences = self.model.generate(
            **inputs,
            generation_config=self._greedy(max_new_tokens),
            stopping_criteria=stopping,
            synced_gpus=self.lockstep,
        )
        texts: list[str] = self.tokenizer.batch_decode(sequences.tolist(), skip_special_tokens=True)
        return texts

    def _greedy(self, max_new_tokens: int) -> Any:
        settings = super()._greedy(max_new_tokens)
        settings.decoder_start_token_id = self.base.generation_config.decoder_start_token_id
        return settings

    def _rank(self, rows: Sequence[Encoded], candidates: Sequence[tuple[int, ...]]) -> Tensor:
        """The encoder runs once."""
        inputs = self._to_device(self._padded_inputs(rows, "right"))
        self._announce(**inputs)
        encoded = self.base.get_encoder()(**inputs)
        rank = self._rank_beside if self._ranks_beside else self._rank_repeated
        return rank(encoded, inputs["attention_mask"], candidates)

    @cached_property
    def _ranks_beside(self) -> bool:
        """Whether labels are ranked side by side: where the decoder's positions are T5's, relative and nothing else, it
        does not matter where in a row a label begins. Experts that take so many tokens of a row would count them all.
        """
        decoder = self.base.get_decoder()
        relative = any(hasattr(module, "compute_bias") for module in decoder.modules())
        limited = hasattr(decoder.config, "expert_capacity")
        return relative and not limited and decoder.config._attn_implementation in ("eager", "sdpa")

    def _rank_beside(self, encoded: Any, mask: Tensor, candidates: Sequence[tuple[int, ...]]) -> Tensor:
        """As many labels at once as one long row, each behind a start token of its own; a token sees its own label."""
        start = self.base.generation_config.decoder_start_token_id
        dtype = encoded.last_hidden_state.dtype
        rows, longest, heads = len(mask), max(map(len, candidates)), self.base.get_decoder().config.num_attention_heads
        # the bias of the positions gives each head a mask of its own
        count = self._labels_at_once(rows * longest * self.base.config.vocab_size, rows * heads * longest**2)
        scores = []
        for begin in range(0, len(candidates), count):
            part = candidates[begin : begin + count]
            places = [(i, *pair) for i, ids in enumerate(part) for pair in zip((start, *ids), ids, strict=False)]
            label, token, following = to_device(torch.tensor(places).T, self.device)
            own = (label[:, None] == label).tril()
            if self.base.get_decoder().config._attn_implementation == "eager":
                own = torch.zeros_like(own, dtype=dtype).masked_fill(~own, torch.finfo(dtype).min)
            logits = self.model(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_input_ids=token.expand(len(mask), -1),
                decoder_attention_mask=own.expand(len(mask), 1, -1, -1),
                use_cache=False,
            ).logits
            scores.append(log_likelihoods_beside(logits, following, [len(ids) for ids in part]))
        return torch.cat(scores, 1)

    def _rank_repeated(self, encoded: Any, mask: Tensor, candidates: Sequence[tuple[int, ...]]) -> Tensor:
        """The encoder's states are repeated for a group of labels at a time."""
        states = encoded.last_hidden_state
        labels = to_device(pad(candidates, IGNORE), self.device)
        per_label = len(mask) * labels.size(1) * self.base.config.vocab_size + states.numel()
        scores = []
        for part in labels.split(self._labels_at_once(per_label)):
            tiled = part.repeat(len(mask), 1)
            logits = self.model(
                encoder_outputs=type(encoded)(last_hidden_state=states.repeat_interleave(len(part), 0)),
                attention_mask=mask.repeat_interleave(len(part), 0),
                decoder_input_ids=self._decoder_inputs(tiled),
                use_cache=False,
            ).logits
            scores.append(log_likelihood(logits, tiled).view(len(mask), len(part)))
        return torch.cat(scores, 1)
