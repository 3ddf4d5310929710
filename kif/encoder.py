"""Encoder models (BERT and its like) as classifiers over label names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kif.families import IGNORE, Batch, Encoded, LanguageModel
from kif.tasks import Example, Task

COSINE_SCALE = 20.0
LABEL_BATCH = 64


class EncoderModel(LanguageModel):
    """BERT-like. Reads the example's input text only, since the instruction is the same in all rows of a task.

    Scores of the classes, in fp32:

    - head `cosine`: 20 * cos(p(text), e(label)), where p is the mean of the last hidden states over the text's
      tokens and e(label) the same for the label's name by the base model without adapter, computed once. It has
      no parameters of its own.
    - head `linear`: the classification layer of the transformers model.

    Args:
        labels: label list of each task. The classes are their union in order of first appearance.
        label_space: `union`: all classes compete; `task`: only those of the row's own task, in loss and answers.
        head: see above.
    Raises: ValueError naming the task that has no label list.
    """

    family = "encoder"
    unused = ("template", "max_target_length", "max_new_tokens", "eval_mode")

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        labels: Mapping[str, Sequence[str] | None],
        label_space: Literal["union", "task"],
        head: Literal["cosine", "linear"],
        max_length: int,
        max_target_length: int,
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length, max_target_length=max_target_length)
        self.classes = union_of_labels(labels)
        self._index = {label: i for i, label in enumerate(self.classes)}
        self._task_labels = {task: frozenset(names or ()) for task, names in labels.items()}
        self.label_space = label_space
        self.label_embeddings = self._embed_labels() if head == "cosine" else None

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        return self._batch(rows)

    def _batch(self, rows: Sequence[Encoded], fixed: bool = False) -> Batch:
        batch = self._padded_inputs(rows, "right", fixed)
        batch["labels"] = torch.tensor([row.target[0] for row in rows])
        if self.label_space == "task":
            batch["allowed"] = torch.tensor(
                [[label in self._task_labels[row.task] for label in self.classes] for row in rows]
            )
        return batch

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        return self.fixed_loss(self._to_device(batch)), len(batch["labels"])

    def fixed_loss(self, batch: Batch) -> Tensor:
        inputs = dict(batch)
        labels = inputs.pop("labels")
        return F.cross_entropy(self._scores(inputs), labels, ignore_index=IGNORE, reduction="sum")

    def _fixed_batch(self, rows: Sequence[Encoded]) -> Batch:
        return self._batch(rows, fixed=True)

    @property
    def _no_target(self) -> tuple[int, ...]:
        return (IGNORE,)

    @torch.no_grad()
    def answer(
        self,
        task: Task,
        rows: Sequence[Encoded],
        mode: Literal["generate", "rank"],
        max_new_tokens: int,
        acceptable: Collection[str] | None = None,
    ) -> list[str]:
        """The class with the highest score for each row, whatever the mode."""
        inputs = self._to_device(self.collate(rows))
        del inputs["labels"]
        return [self.classes[i] for i in self._scores(inputs).argmax(1).tolist()]

    def _scores(self, inputs: Batch) -> Tensor:
        """Class scores, shape (rows, classes); minus infinity for classes that are not allowed."""
        allowed = inputs.pop("allowed", None)
        self._announce(**inputs)
        if self.label_embeddings is None:
            scores: Tensor = self.model(**inputs).logits.float()
        else:
            scores = COSINE_SCALE * self._pooled(inputs) @ self.label_embeddings.T
        return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)

    def _pooled(self, inputs: Batch) -> Tensor:
        """Mean of the last hidden states over the attention mask, at length 1, in fp32."""
        states = self.model(**inputs).last_hidden_state.float()
        mask = (inputs["attention_mask"] * (inputs["input_ids"] >= 0)).unsqueeze(-1).float()
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    def label_tokens(self, task: Task) -> dict[str, tuple[int, ...]]:
        if self.label_embeddings is None:
            return {}
        known = self._task_labels[task.name] if self.label_space == "task" else self._index
        tokens = zip(self.classes, self._tokenize_classes(), strict=True)
        return {label: ids for label, ids in tokens if label in known}

    def _tokenize_classes(self) -> list[tuple[int, ...]]:
        encoding = self.tokenizer(list(self.classes), return_attention_mask=False, verbose=False)
        return [tuple(ids[: self.max_length]) for ids in encoding["input_ids"]]

    @torch.no_grad()
    def _embed_labels(self) -> Tensor:
        rows = [Encoded(ids, (), "", False) for ids in self._tokenize_classes()]
        training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter():
                parts = [
                    self._pooled(self._to_device(self._padded_inputs(rows[i : i + LABEL_BATCH], "right")))
                    for i in range(0, len(rows), LABEL_BATCH)
                ]
        finally:
            self.model.train(training)
        return torch.cat(parts)

    def _prompt_parts(self, task: Task, example: Example) -> tuple[str, str, str]:
        return "", example.input, ""

    def _targets(self, task: Task, labels: Sequence[str]) -> list[tuple[int, ...]]:
        known = self._task_labels.get(task.name)
        if not known:
            raise ValueError(f"task {task.name!r} is not one of the tasks this encoder was loaded for")
        for label in labels:
            if label not in known:
                raise ValueError(f"task {task.name!r}: label {label!r} is not in the task's label list")
        return [(self._index[label],) for label in labels]

    def _encoding_settings(self) -> dict[str, Any]:
        return {**super()._encoding_settings(), "classes": self.classes}


def union_of_labels(labels: Mapping[str, Sequence[str] | None]) -> tuple[str, ...]:
    """All labels of all tasks, duplicates merged, in order of first appearance.

    Raises: ValueError naming the first task without a label list.
    """
    for task, names in labels.items():
        if not names:
            raise ValueError(f"task {task!r} has no label list; encoders can only classify, use a T5 or Llama model")
    return tuple(dict.fromkeys(label for names in labels.values() for label in names or ()))
