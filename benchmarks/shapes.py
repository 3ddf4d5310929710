"""Named sets of trainable tensors: LoRA tensors of real models, flat buffers of round sizes, a tiny one for tests."""

from __future__ import annotations

import math
from collections.abc import Iterable

Shape = tuple[int, ...]


def lora(linears: Iterable[tuple[int, int]], rank: int) -> tuple[Shape, ...]:
    """A [rank, in] and B [out, rank] of every (in, out) linear layer."""
    return tuple(shape for inputs, outputs in linears for shape in ((rank, inputs), (outputs, rank)))


def _t5_large() -> tuple[Shape, ...]:
    # q and v of 24 encoder self-attentions, 24 decoder self-attentions and 24 decoder cross-attentions
    return lora([(1024, 1024)] * (3 * 24 * 2), rank=8)


def _llama_qv(hidden: int, layers: int) -> tuple[Shape, ...]:
    return lora([(hidden, hidden)] * (2 * layers), rank=8)


def _llama2_7b_all_linear() -> tuple[Shape, ...]:
    hidden, intermediate, layers = 4096, 11008, 32
    layer = [(hidden, hidden)] * 4 + [(hidden, intermediate)] * 2 + [(intermediate, hidden)]
    return lora(layer * layers, rank=16)


SETS: dict[str, tuple[Shape, ...]] = {
    "tiny": (*lora([(96, 64), (33, 17)], rank=4), (1,), (7,), (130,)),
    "t5-large": _t5_large(),
    "llama2-7b": _llama_qv(4096, 32),
    "llama2-13b": _llama_qv(5120, 40),
    "llama2-7b-all": _llama2_7b_all_linear(),
    "256M": ((2**28,),),
    "1B": ((2**30,),),
}
"""Tensor shapes by name. t5-large, llama2-7b, llama2-13b: LoRA r=8 on q and v; llama2-7b-all: r=16 on all linear
layers; 256M, 1B: one flat buffer (1B passes 2**31 bytes)."""

MODEL_SETS = ("t5-large", "llama2-7b", "llama2-13b", "llama2-7b-all")
"""The sets that are adapters of a model."""


def elements(shapes: Iterable[Shape]) -> int:
    """Number of elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes)
