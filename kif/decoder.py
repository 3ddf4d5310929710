"""Decoder-only models (Llama and its like): the label continues the prompt."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kif.families import IGNORE, Batch, Encoded, pad, rounded_width, text_config, to_device
from kif.generative import (
    GenerativeModel,
    fixed_cross_entropy,
    log_likelihood,
    log_likelihoods_beside,
    summed_cross_entropy,
)
from kif.tasks import Example, Task


class DecoderModel(GenerativeModel):
    """Llama-like. The row is prompt + " " + label + EOS, with loss on label and EOS only.

    Prompt and target are tokenised so that training, generation and ranking see the same ids: the prompt by itself
    (blanks at its end go to the label's side, an EOS that the tokenizer appends is taken off), and the label as it
    is tokenised after the template's last words (`Answer: World` minus `Answer:`), which gives the ids of the
    whole text wherever the tokenizer does not merge across them. Where it does, " label" is tokenised by itself. After
    a line break no blank is put in front of the label.
    """

    family = "decoder"

    def _prompt_parts(self, task: Task, example: Example) -> tuple[str, str, str]:
        before, text, after = super()._prompt_parts(task, example)
        after = after.rstrip(" ")
        # the blanks may begin before the template's last part
        text = text if after else text.rstrip(" ")
        return before if text or after else before.rstrip(" "), text, after

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _targets(self, task: Task, labels: Sequence[str]) -> list[tuple[int, ...]]:
        # the template's words after its last placeholder; a colon stands in where there are none
        context = re.split(r"\{(?:instruction|input)\}", task.template)[-1].rstrip(" ") or ":"
        blank = "" if context.endswith("\n") else " "
        texts = [context, *(context + blank + label for label in labels), *(blank + label for label in labels)]
        encoding = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        prefix, *others = encoding["input_ids"]
        whole, alone = others[: len(labels)], others[len(labels) :]
        return [
            self._end(ids[len(prefix) :] if ids[: len(prefix)] == prefix else by_itself)
            for ids, by_itself in zip(whole, alone, strict=True)
        ]

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        ids = self._whole(rows)
        labels = [
            (*[IGNORE] * (len(whole) - len(row.target)), *row.target) for whole, row in zip(ids, rows, strict=True)
        ]
        return {
            "input_ids": pad(ids, self.tokenizer.pad_token_id),
            "attention_mask": pad([(1,) * len(whole) for whole in ids], 0),
            "labels": pad(labels, IGNORE),
        }

    def _whole(self, rows: Sequence[Encoded]) -> list[tuple[int, ...]]:
        """Prompts with their targets."""
        return [(*self._prompt(row), *row.target) for row in rows]

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        inputs = self._to_device({"input_ids": batch["input_ids"]})
        if self.listeners:
            prompt = self._to_device({"mask": batch["attention_mask"] * (batch["labels"] == IGNORE)})
            self._announce(inputs["input_ids"], prompt["mask"])
        if not self._looks_back_only:
            inputs |= self._to_device({"attention_mask": batch["attention_mask"]})
        return summed_cross_entropy(*self._predictions(inputs, batch["labels"]))

    @cached_property
    def _looks_back_only(self) -> bool:
        """Whether tokens never see what follows them, by torch's attention: padding on the right then needs no mask,
        and without one attention takes its fastest implementation, which also leaves out what is not seen."""
        marks = [
            module.is_causal for module in self.base.modules() if isinstance(getattr(module, "is_causal", None), bool)
        ]
        config = text_config(self.base.config, self.family)
        return getattr(config, "_attn_implementation", None) == "sdpa" and bool(marks) and all(marks)

    @cached_property
    def _ranks_beside(self) -> bool:
        """Whether prompts are ranked with padding on the right, and so without a mask, and labels side by side.

        The labels' pass has a mask and positions of its own, which leave the padding and other labels out; windows of
        so many keys would count these, and states run through them.
        """
        config = text_config(self.base.config, self.family)
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
        return self._looks_back_only and not (any(windows) or kinds) and self._forward_accepts("position_ids")

    def logits_before_last(self, rows: Tensor) -> Tensor:
        inputs = {"input_ids": rows}
        if not self._looks_back_only:
            inputs["attention_mask"] = torch.ones_like(rows)
        places = torch.arange(rows.size(1) - 1, device=rows.device).expand(len(rows), -1)
        return self._logits_at(places, inputs)[0]

    def _predictions(self, inputs: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, what they predict), of (rows, tokens of the longest label); labels are on the CPU."""
        known = labels != IGNORE
        count, first = known.sum(1, keepdim=True), known.int().argmax(1, keepdim=True)
        token = torch.arange(int(count.max()))
        place = (first + token).clamp(max=labels.size(1) - 1)
        # nothing predicts a row's first token
        following = labels.gather(1, place).masked_fill((token >= count) | (place == 0), IGNORE)
        logits, _ = self._logits_at(to_device((place - 1).clamp(min=0), self.device), inputs)
        return logits, following

    def fixed_loss(self, batch: Batch) -> Tensor:
        inputs = dict(batch)
        labels = inputs.pop("labels")
        if "predicting" in inputs:
            logits, _ = self._logits_at(inputs.pop("predicting"), inputs)
            return fixed_cross_entropy(logits, labels)
        # of the last label nothing is predicted; it is there for a width that suits matrix products
        logits, _ = self._last_logits(labels.size(1) + 1, **inputs, use_cache=False)
        return fixed_cross_entropy(logits[:, :-1], labels)

    def _fixed_batch(self, rows: Sequence[Encoded]) -> Batch:
        """Rows filled up on the right, with the places of the tokens that predict labels; or, where that would need a
        mask, such that all labels begin at the same place: prompts filled up on the left, labels on the right."""
        labels = self._fixed_labels(rows)
        if self._looks_back_only:
            ids = self._whole(rows)
            width = rounded_width(max(map(len, ids)), self.max_length + labels.size(1))
            first = torch.tensor([len(whole) - len(row.target) for whole, row in zip(ids, rows, strict=True)])
            return {
                "input_ids": pad(ids, self.tokenizer.pad_token_id, width=width),
                "predicting": (first[:, None] - 1 + torch.arange(labels.size(1))).clamp(max=width - 1),
                "labels": labels,
            }
        prompts = self._padded_inputs(rows, "left", fixed=True)
        mask = torch.cat([prompts["attention_mask"], (labels != IGNORE).long()], 1)
        written = labels.masked_fill(labels == IGNORE, self.tokenizer.pad_token_id)
        return {
            "input_ids": torch.cat([prompts["input_ids"], written], 1),
            "attention_mask": mask,
            "labels": labels,
            **self._positions(mask, mask.size(1)),
        }

    def _generate(self, rows: Sequence[Encoded], max_new_tokens: int, acceptable: Collection[str] | None) -> list[str]:
        inputs = self._to_device(self._padded_inputs(rows, "left"))
        self._announce(**inputs)
        begin = inputs["input_ids"].size(1)
        stopping = self._stopping(begin, acceptable)
        sequences = self.model.generate(
            **inputs,
            generation_config=self._greedy(max_new_tokens),
            stopping_criteria=stopping,
            synced_gpus=self.lockstep,
        )
        texts: list[str] = self.tokenizer.batch_decode(sequences[:, begin:].tolist(), skip_special_tokens=True)
        return texts

    def _rank(self, rows: Sequence[Encoded], candidates: Sequence[tuple[int, ...]]) -> Tensor:
        """The prompts run once; the labels go on from their keys and values."""
        beside = self._ranks_beside
        prompts = self._to_device(self._padded_inputs(rows, "right" if beside else "left"))
        mask = prompts["attention_mask"]
        self._announce(**prompts)
        if beside:
            last = mask.sum(1, keepdim=True) - 1
            first, cache = self._logits_at(last, {"input_ids": prompts["input_ids"]}, use_cache=True)
        else:
            first, cache = self._last_logits(1, **prompts, **self._positions(mask, mask.size(1)), use_cache=True)
        if not _repeatable(cache):
            return self._rank_anew(rows, candidates)
        return (self._rank_beside if beside else self._rank_repeated)(first, cache, mask, candidates)

    def _rank_beside(self, first: Tensor, cache: Any, mask: Tensor, candidates: Sequence[tuple[int, ...]]) -> Tensor:
        """As many labels at once as one long row behind each prompt; a token sees the prompt and its own label."""
        rows, vocabulary = len(mask), text_config(self.base.config, self.family).vocab_size
        longest = max(map(len, candidates))
        count = self._labels_at_once(rows * longest * vocabulary, rows * longest**2)
        starts, lengths = first[:, 0].float().log_softmax(1), mask.sum(1, keepdim=True)
        scores = []
        for begin in range(0, len(candidates), count):
            part = candidates[begin : begin + count]
            score = starts[:, to_device(torch.tensor([ids[0] for ids in part]), self.device)]
            # the last token of a label predicts nothing that is scored
            rest = [(i, at, *ids[at : at + 2]) for i, ids in enumerate(part) for at in range(len(ids) - 1)]
            if rest:
                label, at, token, following = to_device(torch.tensor(rest).T, self.device)
                own = (label[:, None] == label) & (at[:, None] >= at)
                seen = torch.cat([mask.bool()[:, None].expand(-1, len(rest), -1), own.expand(rows, -1, -1)], 2)
                logits = self.model(
                    input_ids=token.expand(rows, -1),
                    attention_mask=seen[:, None],
                    position_ids=lengths + at,
                    past_key_values=cache,
                    use_cache=True,
                ).logits
                cache.crop(-len(rest))
                score = score + log_likelihoods_beside(logits, following, [len(ids) - 1 for ids in part])
            scores.append(score)
        return torch.cat(scores, 1)

    def _rank_repeated(
        self, first: Tensor, prompt_cache: Any, mask: Tensor, candidates: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """Keys and values are repeated for a group of labels at a time."""
        rows = mask.size(0)
        labels = to_device(pad(candidates, IGNORE), self.device)
        config = text_config(self.base.config, self.family)
        cached = mask.numel() * 2 * config.num_hidden_layers * config.hidden_size
        per_label = rows * labels.size(1) * config.vocab_size + cached
        scores = []
        for part in labels.split(self._labels_at_once(per_label)):
            tiled = part.repeat(rows, 1)
            # the last token predicts nothing that is scored
            known = tiled[:, :-1]
            whole_mask = torch.cat([mask.repeat_interleave(len(part), 0), (known != IGNORE).long()], 1)
            cache = copy.deepcopy(prompt_cache)
            cache.batch_repeat_interleave(len(part))
            following = self.model(
                input_ids=known.masked_fill(known == IGNORE, self.tokenizer.pad_token_id),
                attention_mask=whole_mask,
                past_key_values=cache,
                use_cache=True,
                **self._positions(whole_mask, known.size(1)),
            ).logits
            logits = torch.cat([first.repeat_interleave(len(part), 0), following], 1)
            scores.append(log_likelihood(logits, tiled).view(rows, len(part)))
        return torch.cat(scores, 1)

    def _rank_anew(self, rows: Sequence[Encoded], candidates: Sequence[tuple[int, ...]]) -> Tensor:
        """As `_rank`, with the prompts run again for every label."""
        config = text_config(self.base.config, self.family)
        lengths = [len(self._prompt(row)) for row in rows]
        width = max(lengths) + max(map(len, candidates))
        per_label = len(rows) * ((width - min(lengths)) * config.vocab_size + width * config.hidden_size)
        count = self._labels_at_once(per_label)
        scores = []
        for begin in range(0, len(candidates), count):
            part = candidates[begin : begin + count]
            batch = self.collate([replace(row, target=target) for row in rows for target in part])
            labels = batch.pop("labels")
            logits, following = self._predictions(self._to_device(batch), labels)
            scores.append(log_likelihood(logits, to_device(following, self.device)).view(len(rows), len(part)))
        return torch.cat(scores, 1)

    def _logits_at(self, places: Tensor, inputs: Batch, use_cache: bool = False) -> tuple[Tensor, Any]:
        """Logits of each row at some places of its own, (rows, places, vocabulary), computed there only; the cache."""

        def choose(head: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states, *others = args
            return (states.gather(1, places.unsqueeze(2).expand(-1, -1, states.size(2))), *others)

        hook = self.base.get_output_embeddings().register_forward_pre_hook(choose)
        try:
            output = self.model(**inputs, use_cache=use_cache)
        finally:
            hook.remove()
        return output.logits, getattr(output, "past_key_values", None)

    def _last_logits(self, count: int, **inputs: Any) -> tuple[Tensor, Any]:
        """Logits at the last places, computed there only where the model can; its cache or None."""
        if self._forward_accepts("logits_to_keep"):
            output = self.model(**inputs, logits_to_keep=count)
        else:
            output = self.model(**inputs)
        return output.logits[:, -count:], getattr(output, "past_key_values", None)

    def _positions(self, mask: Tensor, count: int) -> Batch:
        """Positions of the last `count` tokens, counted from each row's first real token."""
        if not self._forward_accepts("position_ids"):
            return {}
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -count:]}


def _repeatable(cache: Any) -> bool:
    """Whether a cache holds keys and values alone: states of linear attention cannot be gone on from in every model,
    and transformers does not repeat them."""
    layers = getattr(cache, "layers", None) or []
    plain = [hasattr(layer, "batch_repeat_interleave") and not hasattr(layer, "conv_states") for layer in layers]
    return bool(plain) and all(plain)
