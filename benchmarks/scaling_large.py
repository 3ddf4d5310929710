"""The computed tables of docs/scaling.md: LoRA and full fine-tuning of 7B and 70B on GPUs by their data sheets.

    python -m benchmarks.scaling_large

Nothing here is measured; the formulas are in `benchmarks.scaling_model`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks import scaling_model as model
from benchmarks.scaling_model import Decoder, Rates
from kif.config import KIFConfig

LARGE = {"7B": Decoder(32000, 4096, 11008, 32, 32), "70B": Decoder(32000, 8192, 28672, 80, 64, 8)}
"""Shapes of Llama 2."""

RANKS = (1, 8, 64, 256)
ROWS, LENGTH, LORA = 8, 512, 8
"""A step on one GPU, all tokens labels, and the rank of an adapter on q and v."""

LAUNCH = 5e-6
"""Assumed seconds of a launch."""


class GPU(NamedTuple):
    """An SXM card by its data sheet: dense bf16 FLOP/s, bytes/s of memory, and of NVLink in one direction."""

    flops: float
    memory: float
    link: float

    @property
    def rates(self) -> Rates:
        return Rates(self.flops, self.memory, LAUNCH)


GPUS = {
    "A100 80 GB": GPU(312e12, 2.039e12, 300e9),
    "H100 80 GB": GPU(989e12, 3.35e12, 450e9),
    "H200 141 GB": GPU(989e12, 4.8e12, 450e9),
}

CONFIGS = {"own outer optimizer": KIFConfig(), "shared": KIFConfig(outer_optimizer="shared")}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def activations(shape: Decoder, rank: int) -> list[str]:
    """GB of a step in float32, without and with checkpointed layers."""
    found = (model.activation_bytes(shape, ROWS, LENGTH, LENGTH, rank, again) for again in (False, True))
    return [f"{size / 1e9:.1f}" for size in found]


def shards() -> str:
    """GB a GPU of full fine-tuning: the arena, sharded where R > 1, and activations."""
    rows = []
    for size, shape in LARGE.items():
        for name, config in CONFIGS.items():
            cells = [model.arena_bytes(shape.trained(), config)]
            cells += [model.shard_bytes(shape.parameters, ranks, config) for ranks in RANKS[1:]]
            rows.append([f"{size}, {name}", *(f"{cell / 1e9:.1f}" for cell in cells), *activations(shape, 0)])
    head = ["full, GB", *(f"arena, R = {ranks}" for ranks in RANKS), "activations", "checkpointed"]
    return markdown(head, rows)


def split() -> str:
    """GB a GPU of LoRA: a frozen bf16 base that `shard_base` has split, the arena, whole on each, and activations."""
    rows = []
    for size, shape in LARGE.items():
        base = [model.split_base_bytes(shape, ranks) for ranks in RANKS]
        arena = model.arena_bytes(shape.trained(LORA), KIFConfig())
        rows.append([size, *(f"{n / 1e9:.1f}" for n in base), f"{arena / 1e9:.2f}", *activations(shape, LORA)])
    head = ["LoRA, GB", *(f"base, R = {ranks}" for ranks in RANKS), "arena", "activations", "checkpointed"]
    return markdown(head, rows)


def bookkeeping() -> str:
    """Milliseconds of a round's bookkeeping on one GPU, and its share of bookkeeping and matrix products: of LoRA, the
    same on any number of GPUs, and of full fine-tuning on R shards."""
    config, rows = KIFConfig(), []
    steps = config.inner_steps + config.outer_steps

    def cell(shape: Decoder, gpu: GPU, rank: int, numel: int, tensors: int, sharded: bool) -> str:
        passes = steps * model.step_flops(shape, ROWS, LENGTH, LENGTH, rank) / gpu.flops
        own = model.bookkeeping_seconds(numel, tensors, config, gpu.rates, sharded)
        return f"{1e3 * own:.1f} ms, {100 * own / (own + passes):.2f}%"

    for size, shape in LARGE.items():
        for name, gpu in GPUS.items():
            adapter = shape.trained(LORA)
            cells = [cell(shape, gpu, LORA, sum(adapter), len(adapter), False)]
            cells += [cell(shape, gpu, 0, shape.parameters // ranks, 1, True) for ranks in RANKS[1:]]
            rows.append([f"{size}, {name.split()[0]}", *cells])
    return markdown(["a round", "LoRA", *(f"full, R = {ranks}" for ranks in RANKS[1:])], rows)


def sums() -> str:
    """A step's float32 gradient, summed over 8 GPUs by the NVLink of an H100."""
    cells = []
    for size, shape in LARGE.items():
        for name, rank in (("LoRA", LORA), ("whole", 0)):
            gradient = 4 * sum(shape.trained(rank))
            ms = 1e3 * model.all_reduce_seconds(gradient, 8, GPUS["H100 80 GB"].link)
            cells.append(f"{size} {name}, {gradient / 1e9:.2f} GB: {ms:.2f} ms")
    return "; ".join(cells)


TABLES = (shards, split, bookkeeping, sums)


def main() -> int:
    print("\n\n".join(table() for table in TABLES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
