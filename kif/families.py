"""What all model families share: rows as token ids, batches, and prompts that are cut inside the text only.

The families are in `kif.seq2seq`, `kif.decoder` (what these two share: `kif.generative`) and `kif.encoder`;
`kif.models` loads them.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kif.tasks import Example, Task

Family = Literal["encoder-decoder", "decoder", "encoder"]
Batch = dict[str, Tensor]
Listener = Callable[[Tensor, Tensor], None]

IGNORE = -100
"""Label of positions and rows that carry no loss, as in transformers and in torch's cross-entropy."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as token ids.

    Args:
        input_ids: the prompt (encoders: the text).
        target: the label's tokens with the end-of-sequence token; for encoders the index of its class.
        task: name of the row's task.
        truncated: whether the prompt was cut.
    """

    input_ids: tuple[int, ...]
    target: tuple[int, ...]
    task: str
    truncated: bool

    @property
    def length(self) -> int:
        """Input and target tokens together, for sorting rows by length."""
        return len(self.input_ids) + len(self.target)


class LanguageModel(ABC):
    """A base model with its adapter: text in, loss or answers out.

    Args:
        model: the PEFT model, on the device it is to run on.
        tokenizer: its tokenizer, with offsets ("fast") and a padding token.
        max_length: longest prompt in tokens.
        max_target_length: longest target in tokens.

    Class attributes:
        family: kind of model.
        unused: fields of RunConfig that have no effect on it.

    Attributes:
        listeners: called with (token ids, attention mask) of a batch's prompts, on the device and padded, before the
            batch runs; later calls of the model for the same batch may repeat each row for several candidate labels.
        lockstep: all processes must make the same passes, since each holds a part of every layer.
        virtual_before, virtual_after: virtual tokens in front of and behind every prompt, with the ids -1, -2, ... in
            that order; who sets them also replaces their embeddings (`kif.methods.prompts`).
    """

    family: ClassVar[Family]
    unused: ClassVar[tuple[str, ...]]

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, max_target_length: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.max_target_length = max_length, max_target_length
        self.listeners: list[Listener] = []
        self.lockstep = False
        self.virtual_before = self.virtual_after = 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def base(self) -> Any:
        """The transformers model with the adapter's layers in it."""
        return self.model.get_base_model()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything but the texts that `encode` depends on: tokenizer, family, lengths."""
        return hashlib.sha256(json.dumps(self._encoding_settings(), sort_keys=True).encode()).hexdigest()

    def encode(self, task: Task, examples: Sequence[Example]) -> list[Encoded]:
        """Token ids of prompts and labels.

        A prompt above `max_length` loses the end of its input text, so that instruction and template stay whole.

        Raises: ValueError if instruction and template alone exceed `max_length`, for a prompt without tokens and for
            tokens that the model does not know; encoders: for a task without a label list and for labels outside it.
        """
        if not examples:
            return []
        prompts = self._tokenize_prompts(task, [self._prompt_parts(task, example) for example in examples])
        targets = self._targets(task, [example.label for example in examples])
        if self.family != "encoder":
            self._check_known(task, targets)
        return [
            Encoded(ids, target, task.name, truncated)
            for (ids, truncated), target in zip(prompts, targets, strict=True)
        ]

    @abstractmethod
    def label_tokens(self, task: Task) -> dict[str, tuple[int, ...]]:
        """The labels among which a row of `task` is answered, with the token ids by which the model knows them.

        Empty where it does not read labels. Raises: ValueError for a task without a label list.
        """

    def prompts(self, rows: Sequence[Encoded]) -> Batch:
        """input_ids and attention_mask of the rows' prompts on the device, padded on the right."""
        return self._to_device(self._padded_inputs(rows, "right"))

    def label_count(self, rows: Sequence[Encoded]) -> int:
        """The number that `loss` is a sum over: label tokens (encoders: rows, whose target is one class)."""
        return sum(len(row.target) for row in rows)

    @abstractmethod
    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """A training batch on the CPU, padded on the right to its longest row."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """(sum of the cross-entropies in fp32, number of label tokens; for encoders of rows).

        Sums of micro-batches add up to the sum of the whole batch. Moves the batch to the device.
        """

    def fixed_batch(self, rows: Sequence[Encoded], size: int) -> Batch:
        """A training batch on the CPU in one of few shapes, for `fixed_loss`.

        It is filled up to `size` rows with rows without labels, and to widths by `rounded_width`.
        """
        blank = replace(rows[0], input_ids=rows[0].input_ids[:1], target=self._no_target)
        return self._fixed_batch([*rows, *[blank] * (size - len(rows))])

    @abstractmethod
    def fixed_loss(self, batch: Batch) -> Tensor:
        """The sum that `loss` gives, of a `fixed_batch` on the device.

        What is done does not depend on what the batch holds and the host neither waits nor reads anything, so that
        it can be recorded for one batch and repeated for another. Not for models with listeners.
        """

    @abstractmethod
    def answer(
        self,
        task: Task,
        rows: Sequence[Encoded],
        mode: Literal["generate", "rank"],
        max_new_tokens: int,
        acceptable: Collection[str] | None = None,
    ) -> list[str]:
        """Answers to one batch of rows of `task`; the caller sets evaluation mode.

        Args:
            task: the rows' task.
            rows: the batch.
            mode: `generate`: greedy decoding; `rank`: the label with the highest log-likelihood, summed over its
                tokens and the end of the sequence, the first of equals. Encoders classify, whatever the mode.
            max_new_tokens: longest generated answer in tokens.
            acceptable: if given, a generated answer ends as soon as it can become none of these texts any more (case
                and white space aside), so that a batch does not wait for answers that are wrong already.
        Raises: ValueError for another mode, and for ranking in a task without a label list.
        """

    @abstractmethod
    def _fixed_batch(self, rows: Sequence[Encoded]) -> Batch:
        """`fixed_batch` of rows of which some have `_no_target`."""

    @property
    def _no_target(self) -> tuple[int, ...]:
        """The target of a row without loss."""
        return ()

    @abstractmethod
    def _targets(self, task: Task, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """Target token ids of labels."""

    def _prompt_parts(self, task: Task, example: Example) -> tuple[str, str, str]:
        """The prompt's text before, of and after the input."""
        before, _, after = task.template.rpartition("{input}")
        before, after = (part.replace("{instruction}", example.instruction) for part in (before, after))
        if before + example.input + after != task.prompt(example):
            raise ValueError(f"task {task.name!r}: the template must hold {{input}} once, got {task.template!r}")
        return before, example.input, after

    def _tokenize_prompts(
        self, task: Task, prompts: Sequence[tuple[str, str, str]]
    ) -> list[tuple[tuple[int, ...], bool]]:
        """Token ids with special tokens, and whether the text was cut."""
        encoding = self.tokenizer(
            ["".join(parts) for parts in prompts],
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        self._check_known(task, encoding["input_ids"])
        result: list[tuple[tuple[int, ...], bool]] = []
        for i, (before, text, _) in enumerate(prompts):
            ids: list[int] = encoding["input_ids"][i]
            surplus = len(ids) - self.max_length
            if surplus > 0:
                span = (len(before), len(before) + len(text))
                shorter = cut_inside(
                    ids, encoding["offset_mapping"][i], encoding["special_tokens_mask"][i], span, surplus
                )
                if shorter is None:
                    raise ValueError(
                        f"task {task.name!r}: max_length {self.max_length} leaves no room for the input text beside "
                        f"instruction and template"
                    )
                ids = shorter
            ids = self._without_end(ids)
            if not ids:
                raise ValueError(
                    f"task {task.name!r}: the prompt {''.join(prompts[i])!r} has no tokens: give it a text, in its row "
                    "or in the template"
                )
            result.append((tuple(ids), surplus > 0))
        return result

    def _without_end(self, ids: list[int]) -> list[int]:
        """A prompt's ids without what the tokenizer puts behind texts that do not go on."""
        return ids

    def _check_known(self, task: Task, rows: Sequence[Sequence[int]]) -> None:
        """Raise ValueError for a token that the model does not embed, on which a GPU would fail for good."""
        known = known_tokens(self.base)
        highest = max((max(ids) for ids in rows if ids), default=0)
        if highest >= known:
            raise ValueError(
                f"task {task.name!r}: the tokenizer gives {self.tokenizer.convert_ids_to_tokens(highest)!r} the id "
                f"{highest}, and the model knows {known} tokens only: give the model its own tokenizer"
            )

    def _encoding_settings(self) -> dict[str, Any]:
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # state of the last call, not a property of the tokenizer
        backend.pop("truncation", None)
        backend.pop("padding", None)
        return {
            "family": self.family,
            "tokenizer": backend,
            "eos": self.tokenizer.eos_token_id,
            "max_length": self.max_length,
            "max_target_length": self.max_target_length,
        }

    def _padded_inputs(self, rows: Sequence[Encoded], side: Literal["left", "right"], fixed: bool = False) -> Batch:
        """input_ids and attention_mask; the mask goes by length, since padding may share its id with EOS."""
        inputs = [self._prompt(row) for row in rows]
        longest = max(map(len, inputs))
        width = rounded_width(longest, self.max_length) if fixed else longest
        return {
            "input_ids": pad(inputs, self.tokenizer.pad_token_id, side, width),
            "attention_mask": pad([(1,) * len(ids) for ids in inputs], 0, side, width),
        }

    def _fixed_labels(self, rows: Sequence[Encoded]) -> Tensor:
        """Targets as rows of labels, filled up with `IGNORE`."""
        width = rounded_width(max(len(row.target) for row in rows), self.max_target_length)
        return pad([row.target for row in rows], IGNORE, width=width)

    def _prompt(self, row: Encoded) -> tuple[int, ...]:
        """The row's prompt with the virtual tokens."""
        before, after = self.virtual_before, self.virtual_after
        return (*range(-1, -1 - before, -1), *row.input_ids, *range(-1 - before, -1 - before - after, -1))

    def _announce(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        for listener in self.listeners:
            listener(input_ids, attention_mask)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: to_device(tensor, self.device) for name, tensor in batch.items()}


def text_config(config: Any, family: Family) -> Any:
    """A transformers config; of a decoder that also sees or hears, that of its part for texts."""
    return config.get_text_config(decoder=True) if family == "decoder" else config


def position_limit(config: Any, family: Family, tokenizer: Any) -> int | None:
    """The most tokens of a row for which a model of this transformers config has positions; None: any number."""
    positions: int | None = getattr(text_config(config, family), "max_position_embeddings", None)
    if family == "encoder" and positions is not None:
        # some models reserve positions, which their tokenizers know
        positions = min(positions, tokenizer.model_max_length)
    return positions


def known_tokens(base: Any) -> int:
    """The number of tokens that a transformers model embeds."""
    count: int = base.get_input_embeddings().weight.shape[0]
    return count


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`; where it is to be copied from the host to a GPU, in pinned memory: else the host might wait for the
    passes before the copy."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for it."""
    return pinned(tensor, device).to(device, non_blocking=True)


def rounded_width(width: int, limit: int) -> int:
    """`width`, rounded up so that there are at most 16 widths in an octave, all multiples of 8; at most `limit`.

    Above 128 this adds less than a sixteenth.
    """
    step = max(8, 1 << max(0, width.bit_length() - 5))
    return max(width, min(-(-width // step) * step, limit))


def pad(
    rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"] = "right", width: int | None = None
) -> Tensor:
    """Rows of token ids as one int64 tensor, filled up with `value` to `width`, by default that of the longest."""
    width = max(map(len, rows)) if width is None else width
    fill = [[value] * (width - len(row)) for row in rows]
    if side == "left":
        return torch.tensor([[*extra, *row] for extra, row in zip(fill, rows, strict=True)])
    return torch.tensor([[*row, *extra] for extra, row in zip(fill, rows, strict=True)])


def cut_inside(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    special: Sequence[int],
    span: tuple[int, int],
    surplus: int,
) -> list[int] | None:
    """`ids` without at least `surplus` tokens at the end of the characters `span`, or None if it has too few tokens.

    Tokens that reach over the span's ends count as outside and stay. At least one token of the span is left.
    """
    inside = [i for i, (a, b) in enumerate(offsets) if not special[i] and span[0] <= a and b <= span[1]]
    kept = len(inside) - surplus
    # a character of several tokens is dropped whole
    while kept > 0 and offsets[inside[kept]][0] < offsets[inside[kept - 1]][1]:
        kept -= 1
    if kept < 1:
        return None
    return [*ids[: inside[kept]], *ids[inside[-1] + 1 :]]
