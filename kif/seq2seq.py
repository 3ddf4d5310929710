"""Encoder-decoder models (T5 and its like): the prompt goes into the encoder, the label comes out of the decoder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kif.families import IGNORE, Batch, Encoded, pad, to_device
from kif.generative import GenerativeModel, fixed_cross_entropy, log_likelihood, summed_cross_entropy
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
        inputs = self._to_device(self._padded_inputs(rows, "right"))
        self._announce(**inputs)
        encoded = self.base.get_encoder()(**inputs)
        states = encoded.last_hidden_state
        labels = to_device(pad(candidates, IGNORE), self.device)
        per_label = len(rows) * labels.size(1) * self.base.config.vocab_size + states.numel()
        scores = []
        for part in labels.split(self._labels_at_once(per_label)):
            tiled = part.repeat(len(rows), 1)
            logits = self.model(
                encoder_outputs=type(encoded)(last_hidden_state=states.repeat_interleave(len(part), 0)),
                attention_mask=inputs["attention_mask"].repeat_interleave(len(part), 0),
                decoder_input_ids=self._decoder_inputs(tiled),
                use_cache=False,
            ).logits
            scores.append(log_likelihood(logits, tiled).view(len(rows), len(part)))
        return torch.cat(scores, 1)
