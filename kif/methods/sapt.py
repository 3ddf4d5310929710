"""SAPT: a LoRA for each task, mixed for each input by attention over keys of the tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kif.config import RunConfig
from kif.families import Encoded, LanguageModel
from kif.methods.base import METHOD_FILE, load_method_file, save_method_file
from kif.methods.inclora import IncLoRA
from kif.methods.lora_layers import lora_layers

ROWS_AT_ONCE = 256


class SAPT(IncLoRA):
    """y = W x + s sum_{k<=t} w_k B_k A_k x with w = softmax(K h / sqrt(d)), one w for each input.

    h = LayerNorm(SiLU(W2 W1 e)), where e is the maximum over the prompt's tokens of their input embeddings, of size d,
    and W1 leads to a bottleneck. In task t the pair A_t, B_t, the key K_t and the network of h are trained; old pairs
    and keys are frozen. To keep h attending to the right task for old inputs, each step adds for each old task j
    strength * KL(m_j || w), mean over a few of its pseudo samples: m_j is the mean w over task j's training rows when
    it ended, 0 for later tasks. Pseudo samples are the rows of the replay memory; the source generates them.

    A saved adapter holds the pairs as one LoRA of rank t * r, keys and network in `METHOD_FILE`; PEFT alone would
    weigh all tasks 1.
    """

    name = "sapt"
    summary = "a LoRA for each task, mixed by attention of the input over task keys; pseudo samples are memory rows"
    source = "Zhao et al. 2024, SAPT-LoRA; baseline of section 4"
    section = "sapt"
    plain_adapter = False
    unused: ClassVar[tuple[str, ...]] = ("outer_lr", "outer_batch_size")

    @classmethod
    def attach(cls, lm: LanguageModel, config: RunConfig, folder: Path) -> None:
        tensors = load_method_file(folder)
        try:
            keys = tensors.pop("keys").to(lm.device)
            attention = _Attention(keys.shape[1], tensors["down.weight"].shape[0]).to(lm.device)
            attention.load_state_dict(tensors)
        except (KeyError, IndexError, RuntimeError) as error:
            raise ValueError(f"{folder / METHOD_FILE}: no attention over task keys: {error}") from error
        mixer = _Mixer(lm, attention, lambda: keys)
        for layer in lora_layers(lm.model).values():
            layer.lora_B["default"].register_forward_pre_hook(mixer.weigh_all)

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        size = lm.base.get_input_embeddings().weight.shape[1]
        generator = torch.Generator().manual_seed(config.seed)
        attention = _Attention(size, config.sapt.bottleneck, generator).to(lm.device)
        lm.model.add_module("sapt_attention", attention)
        key = torch.empty(size).uniform_(-1.0, 1.0, generator=generator).to(lm.device)
        lm.model.register_parameter("sapt_key", nn.Parameter(key))
        super().__init__(lm, config)
        self._old_keys = torch.empty(0, size, device=lm.device)
        self.means: dict[str, Tensor] = {}
        self._mixer = _Mixer(lm, attention, self.keys)
        self._rows: Sequence[Encoded] = ()
        self._pseudo: dict[str, list[Encoded]] = {}
        self._phase = self._steps = 0
        for layer in self.layers.values():
            layer.lora_B["default"].register_forward_pre_hook(self._mixer.weigh_last)

    @property
    def label(self) -> str:
        return f"{super().label}, memory rows as pseudo samples"

    def unreached(self) -> list[str]:
        # with one task there is nothing to choose from, so that keys and attention have no gradient
        return []

    def keys(self) -> Tensor:
        """Keys of all tasks so far, shape (t, d); the last is trained."""
        return torch.cat([self._old_keys, self.lm.model.sapt_key[None]])

    def begin_task(self, index: int, memory: Sequence[Encoded]) -> None:
        super().begin_task(index, memory)
        self._phase, self._steps = index, 0
        self._pseudo = {}
        for row in memory:
            # of a task that this method did not see end there is nothing to keep
            if row.task in self.means:
                self._pseudo.setdefault(row.task, []).append(row)

    def training_rows(self, rows: Sequence[Encoded], memory: Sequence[Encoded]) -> list[Encoded]:
        self._rows = rows
        return list(rows)

    def loss(self, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
        loss, count = super().loss(rows)
        if self._pseudo and self.config.sapt.strength:
            draw = random.Random(f"{self.config.seed}/sapt/{self._phase}/{self._steps}")
            batches = {
                task: draw.sample(known, min(self.config.sapt.pseudo_rows, len(known)))
                for task, known in self._pseudo.items()
            }
            loss = loss + count * self.config.sapt.strength * self.drift(batches)
        return loss, count

    def inner_step(self, lr: float) -> None:
        super().inner_step(lr)
        self._steps += 1

    def drift(self, batches: dict[str, list[Encoded]]) -> Tensor:
        """sum_j mean over rows of KL(m_j || w), for rows of old tasks j; a 0-d tensor with gradient."""
        total = torch.zeros((), device=self.arena.device)
        for task, rows in batches.items():
            w = self._attend(rows)
            stored = torch.zeros(w.size(1), device=w.device)
            stored[: len(self.means[task])] = self.means[task]
            # a stored 0 adds nothing
            total = total + (torch.xlogy(stored, stored) - stored * w.clamp_min(1e-30).log()).sum(1).mean()
        return total

    @torch.no_grad()
    def end_task(self, index: int) -> None:
        parts = [
            self._attend(self._rows[start : start + ROWS_AT_ONCE]).sum(0)
            for start in range(0, len(self._rows), ROWS_AT_ONCE)
        ]
        self.means[self._rows[0].task] = torch.stack(parts).sum(0) / len(self._rows)

    def save_adapter(self, folder: Path) -> None:
        super().save_adapter(folder)
        save_method_file(folder, {**self._mixer.attention.state_dict(), "keys": self.keys()})

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "old_keys": self._old_keys, "means": dict(self.means), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._old_keys = state["old_keys"].to(self.arena.device)
        self.means = {task: mean.to(self.arena.device) for task, mean in state["means"].items()}
        self._steps = state["steps"]

    @torch.no_grad()
    def _freeze(self, index: int) -> None:
        super()._freeze(index)
        key = self.lm.model.sapt_key
        self._old_keys = self.keys()
        generator = torch.Generator().manual_seed(self.config.seed * 1000 + index)
        key.copy_(torch.empty(key.shape).uniform_(-1.0, 1.0, generator=generator))

    def _weigh_old(self, hidden: Tensor) -> Tensor:
        return self._mixer.spread(hidden, self._mixer.weights[:, :-1])

    def _attend(self, rows: Sequence[Encoded]) -> Tensor:
        """w of rows, shape (rows, t)."""
        prompts = self.lm.prompts(rows)
        return self._mixer.attend(prompts["input_ids"], prompts["attention_mask"])


class _Attention(nn.Module):
    """h from the largest input embeddings: LayerNorm(SiLU(W2 W1 e))."""

    def __init__(self, size: int, bottleneck: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(size, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, size, bias=False)
        self.norm = nn.LayerNorm(size)
        for layer in (self.down, self.up):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)

    def forward(self, embedding: Tensor) -> Tensor:
        hidden: Tensor = self.norm(nn.functional.silu(self.up(self.down(embedding))))
        return hidden


class _Mixer:
    """The present batch's weights, and hooks that put them on the blocks of a LoRA between A and B.

    Attributes:
        weights: w, shape (rows, t), from the last batch that was announced.
    """

    weights: Tensor

    def __init__(self, lm: LanguageModel, attention: _Attention, keys: Any) -> None:
        self.embed, self.attention, self.keys = lm.base.get_input_embeddings(), attention, keys
        lm.listeners.append(self._listen)

    def attend(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.no_grad():
            embedded = self.embed(input_ids).float().masked_fill(attention_mask.unsqueeze(-1) == 0, -torch.inf).amax(1)
        keys = self.keys()
        return (self.attention(embedded) @ keys.T / keys.shape[1] ** 0.5).softmax(-1)

    def spread(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """`hidden`, shape (rows * c, ..., t * r), times the weights of its row, each for r elements.

        Raises: ValueError where a layer is not given all rows, one after the other.
        """
        if hidden.size(0) % weights.size(0):
            raise ValueError(
                f"sapt weighs the tasks for each row, and a layer with LoRA is given {hidden.size(0)} inputs of "
                f"{weights.size(0)} rows: leave the names of experts' layers out of target_modules"
            )
        weights = weights.repeat_interleave(hidden.size(-1) // weights.size(1), 1)
        weights = weights.repeat_interleave(hidden.size(0) // weights.size(0), 0)
        return hidden * weights.unflatten(0, (-1, *[1] * (hidden.dim() - 2))).to(hidden.dtype)

    def weigh_last(self, b: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (self.spread(inputs[0], self.weights[:, -1:]),)

    def weigh_all(self, b: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (self.spread(inputs[0], self.weights),)

    def _listen(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.weights = self.attend(input_ids, attention_mask)
