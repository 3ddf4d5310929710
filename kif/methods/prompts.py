"""What the prompt-based methods share: vectors in the places of virtual tokens, LoRA off, a file for the vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kif.config import RunConfig
from kif.families import LanguageModel, position_limit
from kif.methods.base import METHOD_FILE, load_method_file


class VirtualTokens:
    """Vectors in the places of a model's virtual tokens, in training, generation and ranking.

    Hooks on the input embeddings of the model (and of its encoder) look up token 0 for a negative id and put a vector
    there instead; what else is looked up by token is token 0's. Calls without negative ids pass as they are. It stays
    on the model for good.

    Args:
        lm: the model, without virtual tokens so far.
        before: virtual tokens in front of a prompt.
        after: virtual tokens behind it.

    Attributes:
        vectors: of all virtual tokens in order, (tokens, dimension), or of each row of the batch to come, (rows,
            tokens, dimension); gradients flow back to them. While it is None the model takes no virtual tokens.
    """

    def __init__(self, lm: LanguageModel, before: int = 0, after: int = 0) -> None:
        self.vectors: Tensor | None = None
        self._ids: Tensor | None = None
        lm.virtual_before, lm.virtual_after = before, after
        replaced = input_embeddings(lm)
        for module in replaced:
            module.register_forward_pre_hook(self._remember)
            module.register_forward_hook(self._insert)
        for module in lm.base.modules():
            # some models look up more for each token, such as a vector for each layer
            if isinstance(module, nn.Embedding) and module not in replaced:
                module.register_forward_pre_hook(self._known)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.vectors is None:
            return inputs
        self._ids = inputs[0]
        return (inputs[0].clamp(min=0), *inputs[1:])

    def _known(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # embeddings of positions may be called with a mask, a shape, or without anything
        tokens: Any = inputs[0] if inputs else None
        if self.vectors is None or not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
            return inputs
        return (inputs[0].clamp(min=0), *inputs[1:])

    def _insert(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.vectors is None or self._ids is None:
            return output
        # a row holds all virtual tokens in order or none; nothing here waits for the device
        virtual, self._ids = self._ids < 0, None
        columns = virtual.byte().argsort(dim=1, descending=True, stable=True)[:, : self.vectors.size(-2)]
        index = columns.unsqueeze(-1).expand(-1, -1, output.size(-1))
        vectors = self.vectors[..., : columns.size(1), :].to(output.dtype)
        if vectors.dim() == 3:
            # rows may be repeated for several candidate labels
            vectors = vectors.repeat_interleave(len(output) // len(vectors), 0)
        here = virtual.gather(1, columns).unsqueeze(-1)
        return output.scatter(1, index, torch.where(here, vectors, output.gather(1, index)))


def input_embeddings(lm: LanguageModel) -> list[nn.Module]:
    """The modules that embed prompts: the model's input embedding and, of an encoder-decoder, its encoder's."""
    modules = [lm.base.get_input_embeddings()]
    if lm.family == "encoder-decoder":
        modules.append(lm.base.get_encoder().get_input_embeddings())
    return list(dict.fromkeys(modules))


@torch.no_grad()
def embed(lm: LanguageModel, ids: Sequence[int]) -> Tensor:
    """Input embeddings of tokens, (tokens, dimension), float32."""
    vectors: Tensor = input_embeddings(lm)[-1](torch.tensor([list(ids)], device=lm.device))[0]
    return vectors.float()


def switch_off_lora(lm: LanguageModel) -> None:
    """Leave the base model alone: LoRA neither acts nor is trained. A classification layer stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in lm.model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


def check_positions(lm: LanguageModel, config: RunConfig, virtual: int, target: int = 0) -> None:
    """Raise ValueError where prompts with virtual tokens exceed the model's positions.

    Args:
        lm: the model.
        config: its lengths.
        virtual: number of virtual tokens.
        target: further tokens that a decoder-only model may write behind a prompt, where that is more than
            `max_target_length` and `max_new_tokens`.
    """
    positions = position_limit(lm.base.config, lm.family, lm.tokenizer)
    if positions is None:
        return
    needed = virtual + config.max_length
    if lm.family == "decoder":
        needed += max(target, config.max_target_length, config.max_new_tokens)
    if needed > positions:
        raise ValueError(
            f"{virtual} virtual tokens bring rows to {needed} tokens, but the model has {positions} positions only; "
            f"lower max_length ({config.max_length}) or the number of virtual tokens"
        )


def load_prompts(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read back what `save_method_file` wrote.

    Args:
        folder: adapter folder.
        shapes: the tensors there must be, with their shapes.
    Raises: FileNotFoundError or ValueError naming the file: it is missing, damaged, or holds other tensors.
    """
    tensors = load_method_file(folder)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise ValueError(
            f"{folder / METHOD_FILE} does not fit the run's configuration: it holds {found}, needed is {shapes}"
        )
    return tensors


def add_parameters(lm: LanguageModel, tensors: dict[str, Any], *, trained: bool) -> None:
    """Put float32 parameters on the PEFT model itself, where the arena and `model.to` find them."""
    for name, tensor in tensors.items():
        parameter = nn.Parameter(tensor.to(lm.device, torch.float32), requires_grad=trained)
        lm.model.register_parameter(name, parameter)
