"""Memory and time of a round of Recurrent-KIF by formula; nothing here is measured.

N trained elements, Q inner and M outer steps, R processes; a step on one process has T tokens in rows of one length,
of which C are labels. Of the model: width d, width of keys g, inner width f, L layers, vocabulary V. Sizes are bytes,
times are seconds. `benchmarks.scaling` holds the formulas against measurements, docs/scaling.md says what follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.contract.formulas import adamw_bytes, fuse_bytes, scores_bytes
from kif.arena import ALIGNMENT
from kif.config import KIFConfig
from kif_kernels.layout import BINS, LEVELS, ROW, SHARDED_SHIFTS

TRAFFIC = {(0, 0): (133, 14), (1, 0): (146, 14), (0, 1): (171, 19), (1, 1): (193, 19)}
"""Values that element-wise operations read and write for each token and layer, in units of (d, f), by (LoRA,
checkpointed); counted in transformers' Llama with as many keys as queries, without matrix products and attention."""


@dataclass(frozen=True)
class Decoder:
    """Shape of a Llama-like model.

    Args:
        vocab, width, inner, layers, heads: V, d, f, L and the heads of a layer.
        kv_heads: heads of keys and values; 0: as many.
        tied: the output layer is the embedding.
    """

    vocab: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int = 0
    tied: bool = False

    @property
    def kv_width(self) -> int:
        """g."""
        return self.width * (self.kv_heads or self.heads) // self.heads

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of the linear layers of a layer: q, k, v, o, gate, up, down."""
        d, g, f = self.width, self.kv_width, self.inner
        return ((d, d), (g, d), (g, d), (d, d), (f, d), (f, d), (d, f))

    @property
    def layer(self) -> int:
        """Elements of a layer's matrices: 2 d^2 + 2 d g + 3 d f."""
        return sum(a * b for a, b in self.matrices)

    @property
    def outside(self) -> int:
        """Elements that belong to no layer: embedding, output layer and last norm."""
        return self.vocab * self.width * (1 if self.tied else 2) + self.width

    @property
    def parameters(self) -> int:
        return self.outside + self.layers * (self.layer + 2 * self.width)

    def trained(self, rank: int = 0) -> list[int]:
        """Elements of each trained tensor: of LoRA of this rank on q and v, or, with 0, of the whole model."""
        d = self.width
        if rank:
            return [rank * d, d * rank, rank * d, self.kv_width * rank] * self.layers
        layer = [a * b for a, b in self.matrices] + [d, d]
        return layer * self.layers + [self.vocab * d] * (1 if self.tied else 2) + [d]


def buffers(config: KIFConfig) -> int:
    """Flat buffers of an engine: weights, gradients, theta_start, theta_inner, two importances; two moments for each
    optimizer; two uncertainties with `ema_uncertainty`."""
    return 6 + (4 if config.outer_optimizer == "own" else 2) + 2 * (config.score == "ema_uncertainty")


def arena_bytes(sizes: Iterable[int], config: KIFConfig) -> int:
    """4 B for each buffer and element, every tensor rounded up to a multiple of 32 elements."""
    return 4 * buffers(config) * sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def shard_bytes(numel: int, ranks: int, config: KIFConfig) -> int:
    """Arena of one of R equal shards."""
    return 4 * buffers(config) * -(-numel // ranks)


def workspace_bytes(groups: int = 1) -> int:
    """Of the thresholds of both sides, with the kernels: for each group (1, or a tensor) histograms and windows of all
    levels in int64, two thresholds, a rank and a limit. Independent of N."""
    return groups * (2 * LEVELS * (BINS + ROW) * 8 + 2 * 4 + 2 * 8)


def base_bytes(model: Decoder, precision: str) -> int:
    """Frozen weights. int8: a float32 scale for each output; nf4: half a byte, a float32 scale for 64 weights; what is
    not in a layer's matrices is bf16 then."""
    matrices, others = model.layers * model.layer, model.outside + 2 * model.layers * model.width
    if precision == "int8":
        return matrices + 4 * model.layers * sum(outputs for outputs, _ in model.matrices) + 2 * others
    if precision == "nf4":
        return matrices // 2 + 4 * matrices // 64 + 2 * others
    return {"fp32": 4, "bf16": 2}[precision] * (matrices + others)


def split_base_bytes(model: Decoder, ranks: int, value: int = 2) -> int:
    """`shard_base` on the first of R processes: its rows of every layer's weights, what is in no layer whole, and the
    one layer that is gathered while it works."""
    share = sum(-(-rows // ranks) * columns for rows, columns in (*model.matrices, *[(model.width, 1)] * 2))
    return value * (model.outside + model.layers * share + (ranks > 1) * (model.layer + 2 * model.width))


def activation_bytes(
    model: Decoder, rows: int, length: int, targets: int, rank: int = 0, checkpointed: bool = False, value: int = 4
) -> int:
    """The most that forward and backward pass allocate: what a layer keeps for its backward pass, times L, and the work
    of the backward pass of the output layer or of a feed-forward block. Checkpointed: d values of each layer, and one
    layer. Assumes attention that keeps no score for each pair of tokens, norms in fp32, no dropout."""
    d, f, tokens, labels = model.width, model.inner, rows * length, rows * targets
    # all trained: of both norms input, normalised and output; product of gate and up, input of o; else neither
    kept = (5 * d + 3 * f + 2 * rank if rank else 8 * d + 4 * f) + 2 * model.kv_width + model.heads + 2
    # of LoRA the last norm keeps one tensor, and what the first layer works on needs no gradient
    tail = (1 if rank else 2 * d + 1) * tokens + labels * (model.vocab + d)
    # a trained matrix's gradient is a tensor of its own until it is added to the arena
    head = max(2 * labels * model.vocab, 0 if rank else (model.vocab + labels) * d)
    block = (3 * f if rank else 2 * f) * tokens
    if checkpointed:
        return value * (model.layers * d * tokens + max(tail + head, kept * tokens + block))
    return value * (model.layers * kept * tokens + max(tail + head, block + (0 if rank else d * tokens)))


def round_bytes(config: KIFConfig, sharded: bool = False) -> dict[str, int]:
    """Bytes an element that the passes of a round read and write, by part; by the formulas of the static contract.

    Norm: 4 a step. Thresholds: two passes a side where exact and in their window, none where approximate; sharded four.
    Raises: ValueError for switches whose passes are not modelled.
    """
    refused = ("tensor", "gradient", "frozen", "interpolated", "global-merge", "adaptive")
    for name in ("threshold_scope", "importance_of", "history", "threshold", "fusion"):
        if getattr(config, name) in refused:
            raise ValueError(f"the passes of kif.{name}={getattr(config, name)} are not modelled")
    both = config.score == "ema_uncertainty"
    steps = [adamw_bytes(uncertainty=both, zero_grad=True)] * (config.inner_steps + config.outer_steps)
    first_and_last = 4 + 4 - 4 * (1 + both)  # two snapshots are written, importance is not read at first
    passes = len(SHARDED_SHIFTS) if sharded else 2 * (config.threshold == "kth_largest")
    score, fused = scores_bytes(uncertainty=both), fuse_bytes(uncertainty=both, write_start=False)
    return {
        "norm": 4 * len(steps),
        "steps": sum(step.load + step.store for step in steps) + first_and_last,
        "thresholds": 2 * passes * score.load,
        "fusion": fused.load + fused.store,
    }


def cached_bytes(config: KIFConfig) -> int:
    """Bytes an element that the CPU's operations read and write in a round, in memory or in the cache: 12 for the norm
    and 136 for AdamW with importance in a step, 116 for the fusion. Raises: ValueError for another score or fusion."""
    if config.score != "ema" or config.fusion != "paper":
        raise ValueError("only score=ema and fusion=paper are counted")
    return 148 * (config.inner_steps + config.outer_steps) + 20 + 116


def launches(config: KIFConfig, sharded: bool = False) -> int:
    """Kernels and operations of a round of the switches that `round_bytes` knows, collectives aside."""
    steps = config.inner_steps + config.outer_steps
    return 9 * steps + 179 if sharded else 3 * steps + 6


def step_flops(model: Decoder, rows: int, length: int, targets: int, rank: int = 0, checkpointed: bool = False) -> int:
    """FLOPs of a step's passes: for each element of a matrix and token 2 forward, 2 backward to its input and, if it is
    trained, 2 to itself. Attention: 4 d for each pair of tokens forward, 8 d backward, both halves. The output layer
    works on labels only. Checkpointed: each layer forward once more but for its last matrix."""
    tokens, d = rows * length, model.width
    layers, head = 2 * model.layers * model.layer * tokens, 2 * model.vocab * d * rows * targets
    attention = 4 * model.layers * d * length * tokens
    adapter = 2 * sum(model.trained(rank)) * tokens if rank else 0
    total = (2 if rank else 3) * (layers + head) + 3 * (attention + adapter)
    again = layers - 2 * model.layers * model.inner * d * tokens + attention + adapter
    return total + again * checkpointed


def step_traffic(model: Decoder, tokens: int, rank: int = 0, checkpointed: bool = False, value: int = 4) -> int:
    """Bytes that the element-wise operations of a step's passes move, each reading and writing all of its values; and
    three values for each trained element, whose gradient is added to the arena."""
    a, b = TRAFFIC[(int(rank > 0), int(checkpointed))]
    return value * (model.layers * (a * model.width + b * model.inner) * tokens + 3 * sum(model.trained(rank)))


@dataclass(frozen=True)
class Rates:
    """What a machine does.

    Args:
        flops: FLOP/s of matrix products.
        memory: bytes read and written in a second by a copy.
        launch: seconds of a launch (CPU: of what the engine calls instead).
        tensor: seconds to check that a tensor still lies in the arena; on a GPU they pass beside the device's work.
        cache: bytes/s of element-wise operations in the cache. CPU only, as the others below.
        partition: seconds an element to find the k-th largest; 0: thresholds are found in streaming passes.
        model, layer: seconds of a step's passes that depend on no size, without and for each layer.
    """

    flops: float
    memory: float
    launch: float
    tensor: float = 0.0
    cache: float = math.inf
    partition: float = 0.0
    model: float = 0.0
    layer: float = 0.0


def bookkeeping_seconds(numel: int, tensors: int, config: KIFConfig, rates: Rates, sharded: bool = False) -> float:
    """Of a round, AdamW and clipping included: launches, checks in Q + M + 1 calls, and bytes over bandwidth. The terms
    of a CPU are those of an arena that is not sharded."""
    parts, calls = round_bytes(config, sharded), config.inner_steps + config.outer_steps + 1
    moved = sum(parts.values())
    seconds = launches(config, sharded) * rates.launch + calls * tensors * rates.tensor
    if rates.partition:
        moved -= parts["thresholds"]
        # what an operation reads or writes in memory it does not find in the cache
        seconds += numel * (2 * rates.partition + (cached_bytes(config) - moved) / rates.cache)
    return seconds + numel * moved / rates.memory


def compute_seconds(
    model: Decoder, rows: int, length: int, targets: int, rates: Rates, rank: int = 0, checkpointed: bool = False
) -> float:
    """Of one step's forward and backward pass: FLOPs over their rate, bytes over bandwidth, and what has no size."""
    seconds = step_flops(model, rows, length, targets, rank, checkpointed) / rates.flops
    seconds += step_traffic(model, rows * length, rank, checkpointed) / rates.memory
    return seconds + rates.model + model.layers * rates.layer


def all_reduce_seconds(size: int, ranks: int, link: float) -> float:
    """2 (R - 1) / R times the bytes over what a process sends in a second; latency is left out."""
    return 2 * (ranks - 1) / ranks * size / link


def summed_bytes(numel: int, config: KIFConfig, sharded: bool = False) -> int:
    """What is summed over the processes in a round. Data-parallel: the gradient in each step. Shards: a norm in each
    step, and the counts of four levels on two sides; their gradients are the caller's business."""
    steps = config.inner_steps + config.outer_steps
    return 8 * steps + 2 * len(SHARDED_SHIFTS) * BINS * 8 if sharded else 4 * numel * steps
