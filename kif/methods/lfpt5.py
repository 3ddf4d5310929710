"""LFPT5: one soft prompt that also learns to write its tasks' rows, which are then trained again."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kif.config import RunConfig
from kif.distributed import gather
from kif.families import Encoded, Family, LanguageModel, cut_inside
from kif.generative import IGNORE, GenerativeModel
from kif.methods.base import Method, save_method_file
from kif.methods.prompts import (
    VirtualTokens,
    add_parameters,
    check_positions,
    embed,
    load_prompts,
    switch_off_lora,
)
from kif.tasks import Example, Task
from kif_kernels import gradient_state_

PROMPT = "lfpt5_prompt"
PREVIOUS = "lfpt5.previous"

MARK = "__ans__"
"""Between text and label in what the language model learns to write."""

TOP_K = 64
REPETITION_PENALTY = 2.5


class LFPT5(Method):
    """Loss = (1 - kl_weight) * (CE + lm_weight * LM) + kl_weight * KL, on one prompt behind every input.

        CE: of the label given the row's prompt
        LM: cross-entropy of "text __ans__ label" given "__task__" (the task's name), for the same rows
        KL: KL(p_previous || p) at the label tokens of pseudo rows, p_previous with the prompt as it was before the task

    Each term is the mean over its own tokens in the micro-batch; KL is 0 without pseudo rows. p_previous is taken
    without dropout. The text is the row's input, cut so that the whole fits `lm_length` tokens.

    Before each task but the first, the present prompt writes `pseudo_candidates` rows for each earlier task (sampling
    from the 64 most likely tokens, repetition penalty 2.5 on all but the tokens of `__ans__`), by a random state of
    their own. Different ones with one `__ans__`, a text and a label of the task's list are kept, the first
    `pseudo_per_class` of each label, and join the training rows under the instruction of the task's first row. In a
    task without label list any answer counts and all rows are of one class.

    The prompt begins as random token embeddings (which is what `eval_forward` scores before training) and, with the
    first task, as the embeddings of the tokens of that task's labels, then of the most frequent other tokens of its
    prompts, from the start again if these are too few.

    Optimizer: transformers' Adafactor with the run's `lr` (0.5 in the source) and `weight_decay` (1e-5 in the source),
    anew for each task; it waits for the device once a step. LoRA is off. A saved adapter is the base model's (LoRA with
    B = 0), with the prompt in `METHOD_FILE`.

    Raises: ValueError for encoders, where the virtual tokens exceed the model's positions, and for a tokenizer that has
        no tokens for `__ans__`.
    """

    name = "lfpt5"
    summary = "one soft prompt that also generates pseudo rows of earlier tasks; the model stays frozen"
    source = "Qin & Joty 2022; baseline of section 4"
    section = "lfpt5"
    plain_adapter = False
    refused: ClassVar[Mapping[Family, str]] = {"encoder": "it generates pseudo samples, which an encoder cannot"}
    unused = (
        "adapter_precision", "lora_r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "target_modules",
        "beta1", "beta2", "eps", "outer_lr", "outer_batch_size", "memory_fraction", "memory_balanced",
    )  # fmt: skip

    refused_options: ClassVar[Mapping[str, str]] = {
        "modules_to_save": "whose model stays frozen",
        "shard_base": "whose pseudo rows take other passes in each process",
    }

    @classmethod
    def attach(cls, lm: LanguageModel, config: RunConfig, folder: Path) -> None:
        switch_off_lora(lm)
        shape = (config.lfpt5.prompt_length, embed(lm, [0]).size(1))
        add_parameters(lm, load_prompts(folder, {PROMPT: shape}), trained=False)
        _append(lm, config)

    @classmethod
    def of_micro_batches(cls, config: RunConfig) -> str | None:
        return "weights of the loss's terms"

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        self.check_family(lm)
        check_positions(lm, config, config.lfpt5.prompt_length, config.lfpt5.lm_length)
        written = lm.tokenizer.decode(lm.tokenizer(f"a {MARK} b", add_special_tokens=False)["input_ids"])
        if parse_pseudo(written, None) is None:
            raise ValueError(f"lfpt5 needs a tokenizer that can write {MARK}; this one makes {written!r} of it")
        switch_off_lora(lm)
        generator = torch.Generator().manual_seed(config.seed)
        ids = torch.randint(len(lm.tokenizer), (config.lfpt5.prompt_length,), generator=generator).tolist()
        add_parameters(lm, {PROMPT: embed(lm, ids)}, trained=True)
        self.tokens = _append(lm, config)
        super().__init__(lm, config)
        self._tasks: list[Task] = []
        self._index = 0
        self._writing: dict[Encoded, Encoded] = {}
        self._pseudo: dict[Encoded, Encoded] = {}
        device = self.arena.device
        self._scale = torch.ones((), dtype=torch.float32, device=device)
        self._skip = torch.zeros((), dtype=torch.bool, device=device)
        self._steps = torch.zeros((), dtype=torch.float64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.optimizer = self._adafactor()

    @property
    def skipped(self) -> int:
        return int(self._skipped.item())

    @property
    def pseudo_kept(self) -> dict[str, int]:
        """Number of pseudo rows of each earlier task in the present phase."""
        count = Counter(row.task for row in self._pseudo)
        return {task.name: count[task.name] for task in self._tasks[: self._index]}

    def phases(self, tasks: Sequence[Task]) -> list[list[Task]]:
        self._tasks = list(tasks)
        return super().phases(tasks)

    def begin_task(self, index: int, memory: Sequence[Encoded]) -> None:
        self._index = index
        self.optimizer = self._adafactor()
        self._pseudo = {}
        self.arena.buffer(PREVIOUS).copy_(self.arena.data)
        for number, task in enumerate(self._tasks[:index]):
            found = choose_pseudo(self._candidates(task, number), task.labels, self.config.lfpt5.pseudo_per_class)
            examples = [Example(task.train[0].instruction, text, label, (label,)) for text, label in found]
            rows = self.lm.encode(task, examples)
            self._pseudo |= dict(zip(rows, self._writing_rows(task, examples), strict=True))

    def training_rows(self, rows: Sequence[Encoded], memory: Sequence[Encoded]) -> list[Encoded]:
        if self._index >= len(self._tasks):
            raise RuntimeError("LFPT5 needs the tasks' texts: call phases(tasks) before the first task")
        task = self._tasks[self._index]
        self._writing = dict(zip(rows, self._writing_rows(task, task.train), strict=True))
        if self._index == 0:
            self._start_from_words(task, rows)
        return [*rows, *self._pseudo]

    def loss(self, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
        config = self.config.lfpt5
        label_loss, count = self.lm.loss(self.lm.collate(rows))
        writing_rows = [self._pseudo.get(row) or self._writing[row] for row in rows]
        writing_loss, tokens = self.lm.loss(self.lm.collate(writing_rows))
        loss = (1.0 - config.kl_weight) * (label_loss / count + config.lm_weight * writing_loss / tokens)
        pseudo = [row for row in rows if row in self._pseudo]
        if pseudo and config.kl_weight:
            loss = loss + config.kl_weight * self._divergence(pseudo)
        return loss * count, count

    def inner_step(self, lr: float) -> None:
        arena = self.arena
        arena.check()
        with self.stopwatch.section("optimizer", arena.device):
            gradient_state_(
                arena.grad, self._scale, self._skip, self._steps, self._skipped, max_norm=self.config.max_grad_norm
            )
            if not self._skip.item():
                arena.grad.mul_(self._scale)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self.optimizer.step()
            arena.zero_grad()

    def save_adapter(self, folder: Path) -> None:
        super().save_adapter(folder)
        save_method_file(folder, {PROMPT: getattr(self.lm.model, PROMPT)})

    def state_dict(self) -> dict[str, Any]:
        moments = self.optimizer.state_dict()["state"]
        return {
            "arena": self.arena.state_dict(),
            "adafactor": {str(number): dict(values) for number, values in moments.items()},
            "steps": self._steps,
            "skipped": self._skipped,
            "pseudo": [[_plain(row), _plain(writing)] for row, writing in self._pseudo.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.arena.load_state_dict(state["arena"])
        self.optimizer = self._adafactor()
        # torch would take over the very tensors
        moments = {int(number): copy.deepcopy(values) for number, values in state["adafactor"].items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self._steps.copy_(state["steps"])
        self._skipped.copy_(state["skipped"])
        self._pseudo = {_encoded(row): _encoded(writing) for row, writing in state["pseudo"]}

    def _adafactor(self) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor

        return Adafactor(
            [getattr(self.lm.model, PROMPT)],
            lr=self.config.lr,
            weight_decay=self.config.weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )

    @torch.no_grad()
    def _start_from_words(self, task: Task, rows: Sequence[Encoded]) -> None:
        targets = self.lm._targets(task, task.labels) if task.labels else []
        labels = [token for target in targets for token in target]
        frequent = Counter(token for row in rows for token in row.input_ids)
        special = set(self.lm.tokenizer.all_special_ids)
        words = [
            token
            for token in dict.fromkeys([*labels, *sorted(frequent, key=lambda token: (-frequent[token], token))])
            if token not in special
        ]
        count = self.config.lfpt5.prompt_length
        prompt = getattr(self.lm.model, PROMPT)
        prompt.copy_(embed(self.lm, [words[i % len(words)] for i in range(count)]))

    def _writing_rows(self, task: Task, examples: Sequence[Example]) -> list[Encoded]:
        """Rows that teach to write the examples.

        Raises: ValueError where `lm_length` leaves no room for a text beside mark and answer.
        """
        start = self._start(task)
        return [
            Encoded(start, self._writing_target(task, example.input, example.label), task.name, False)
            for example in examples
        ]

    def _writing_target(self, task: Task, text: str, label: str) -> tuple[int, ...]:
        encoding = self.lm.tokenizer(
            f"{text} {MARK} {label}", add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids: list[int] = encoding["input_ids"]
        surplus = len(ids) + 1 - self.config.lfpt5.lm_length
        if surplus > 0:
            shorter = cut_inside(ids, encoding["offset_mapping"], [0] * len(ids), (0, len(text)), surplus)
            if shorter is None:
                raise ValueError(
                    f"task {task.name!r}: lfpt5.lm_length {self.config.lfpt5.lm_length} leaves no room for the text "
                    f"beside the answer {label!r}"
                )
            ids = shorter
        return (*ids, self.lm.tokenizer.eos_token_id)

    def _start(self, task: Task) -> tuple[int, ...]:
        ids = self.lm.tokenizer(f"__{task.name}__", return_attention_mask=False)["input_ids"]
        if self.lm.family == "decoder" and ids[-1] == self.lm.tokenizer.eos_token_id:
            ids = ids[:-1]
        return tuple(ids)

    def _candidates(self, task: Task, number: int) -> list[str]:
        """What the present prompt writes for a task, the same on all processes."""
        lm, config = cast(GenerativeModel, self.lm), self.config
        row = Encoded(self._start(task), (lm.tokenizer.eos_token_id,), task.name, False)
        settings = lm._greedy(config.lfpt5.lm_length)
        settings.decoder_start_token_id = lm.base.generation_config.decoder_start_token_id
        settings.do_sample, settings.top_k, settings.top_p, settings.temperature = True, TOP_K, 1.0, 1.0
        texts: list[str] = []
        training = lm.model.training
        lm.model.eval()
        with _random_state((config.seed * 1000 + self._index) * 1000 + number, lm.device), torch.no_grad():
            while len(texts) < config.lfpt5.pseudo_candidates:
                size = min(config.eval_batch_size, config.lfpt5.pseudo_candidates - len(texts))
                inputs = lm._to_device(lm._padded_inputs([row] * size, "left"))
                # an encoder-decoder's answer begins behind its start token, a decoder's behind the prompt
                begin = 1 if lm.family == "encoder-decoder" else inputs["input_ids"].size(1)
                penalty = repetition_penalty(REPETITION_PENALTY, begin, self._mark_tokens())
                sequences = lm.model.generate(**inputs, generation_config=settings, logits_processor=[penalty])
                texts += lm.tokenizer.batch_decode(sequences[:, begin:], skip_special_tokens=True)
        lm.model.train(training)
        return gather(texts)[0]

    def _mark_tokens(self) -> list[int]:
        ids = self.lm.tokenizer([MARK, f"a {MARK}"], add_special_tokens=False)["input_ids"]
        return sorted({token for part in ids for token in part})

    def _divergence(self, rows: Sequence[Encoded]) -> Tensor:
        """Mean of KL(p_previous || p) over the label tokens of rows."""
        before = dict(self.arena.views(self.arena.buffer(PREVIOUS)))[PROMPT]
        training = self.lm.model.training
        self.lm.model.eval()
        with torch.no_grad():
            old = self._log_probabilities(rows, before)
        self.lm.model.train(training)
        new = self._log_probabilities(rows, getattr(self.lm.model, PROMPT))
        return F.kl_div(new, old, reduction="sum", log_target=True) / len(new)

    def _log_probabilities(self, rows: Sequence[Encoded], prompt: Tensor) -> Tensor:
        """Log-probabilities at the label tokens of rows with some prompt, (tokens, vocabulary), fp32."""
        lm: Any = self.lm
        batch = lm.collate(rows)
        labels = batch.pop("labels")
        inputs = lm._to_device(batch)
        self.tokens.vectors = prompt
        if lm.family == "encoder-decoder":
            logits = lm._logits({**inputs, "labels": labels.to(lm.device)})
        else:
            logits, labels = lm._predictions(inputs, labels)
        self.tokens.vectors = getattr(lm.model, PROMPT)
        return logits[(labels != IGNORE).to(lm.device)].float().log_softmax(1)


def parse_pseudo(text: str, labels: Sequence[str] | None) -> tuple[str, str] | None:
    """(text, label) of "text __ans__ label", stripped.

    None unless the mark occurs once, neither part is empty and the label is one of `labels`, where these are given.
    """
    parts = [part.strip() for part in text.split(MARK)]
    if len(parts) != 2 or not all(parts) or (labels is not None and parts[1] not in labels):
        return None
    return parts[0], parts[1]


def choose_pseudo(texts: Sequence[str], labels: Sequence[str] | None, per_class: int) -> list[tuple[str, str]]:
    """The first `per_class` different rows of each label; without label list, of all."""
    chosen: list[tuple[str, str]] = []
    count: Counter[str] = Counter()
    for pair in dict.fromkeys(parse_pseudo(text, labels) for text in texts):
        if pair is not None and count[group := pair[1] if labels is not None else ""] < per_class:
            count[group] += 1
            chosen.append(pair)
    return chosen


def repetition_penalty(penalty: float, begin: int, exempt: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Scores of tokens that occur from position `begin` on are divided by `penalty`, negative ones multiplied.

    Unlike transformers' own it can leave out tokens, and the prompt, whose virtual tokens have negative ids.
    """

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, input_ids[:, begin:], True)
        seen[:, list(exempt)] = False
        return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)

    return process


def _append(lm: LanguageModel, config: RunConfig) -> VirtualTokens:
    tokens = VirtualTokens(lm, after=config.lfpt5.prompt_length)
    tokens.vectors = getattr(lm.model, PROMPT)
    return tokens


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of CPU and `device` within the block; afterwards they are as before."""
    index = None if device.type != "cuda" else torch.cuda.current_device() if device.index is None else device.index
    with torch.random.fork_rng(devices=[] if index is None else [index]):
        torch.default_generator.manual_seed(seed)
        if index is not None:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _plain(row: Encoded) -> list[Any]:
    return [list(row.input_ids), list(row.target), row.task, row.truncated]


def _encoded(plain: Sequence[Any]) -> Encoded:
    return Encoded(tuple(plain[0]), tuple(plain[1]), plain[2], plain[3])
