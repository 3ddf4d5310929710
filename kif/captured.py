"""Forward and backward pass as a CUDA graph, recorded once for each shape of batch: one launch instead of thousands."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kif.arena import ParameterArena
from kif.attention import causal_masks_seen, cudnn_where_safe, without_causal_masks, without_cudnn
from kif.families import IGNORE, Batch, Encoded, LanguageModel, pinned

WARM_UP = 3
"""Passes before recording, in which libraries choose algorithms and allocate; as many as in torch's documentation."""

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]
"""Runs a function of no arguments and returns what repeats it from then on, and where its result lies after that."""


class CapturedSteps:
    """Gradients of the mean loss, by forward and backward passes that were recorded.

    Batches come in few shapes (`LanguageModel.fixed_batch`), each of which is recorded when it first occurs and then
    replayed with other rows; a replay reads the arena's present weights and draws its own dropout. The loss is that of
    `LanguageModel.loss` up to rounding. What was recorded holds where tensors lie: all of it is recorded anew after the
    arena has moved, but whatever else of the model is replaced or switched later is not seen.

    Args:
        lm: model in training mode.
        arena: its trainable parameters; gradients are added to `arena.grad`.
        sizes: numbers of rows that batches are filled up to; larger ones keep their own.
        record: how a pass is recorded. Default: as a CUDA graph (`CudaGraphs`), for a model on a GPU.
    Raises: ValueError for a model with listeners and, without `record`, for one on another device.
    """

    def __init__(
        self, lm: LanguageModel, arena: ParameterArena, sizes: Collection[int], record: Record | None = None
    ) -> None:
        if record is None and lm.device.type != "cuda":
            raise ValueError(f"cuda_graphs needs a GPU, the model is on {lm.device}: leave it out")
        if lm.listeners:
            raise ValueError("a model with listeners cannot be recorded: they would not be called again")
        self.lm, self.arena, self.sizes = lm, arena, sorted(set(sizes))
        self._given, self._place = record, (0, 0)
        self._forget()

    def backward(self, rows: Sequence[Encoded], count: int) -> Tensor:
        """Add the gradient of (sum of the loss of `rows`) / `count` to the arena; returns that loss, 0-d."""
        place = self.arena.data.data_ptr(), self.arena.grad.data_ptr()
        if place != self._place:
            self._forget()
            self._place = place
        batch = self.lm.fixed_batch(rows, next((size for size in self.sizes if size >= len(rows)), len(rows)))
        shapes = tuple(tensor.shape for tensor in batch.values())
        if shapes not in self._recorded:
            self._recorded[shapes] = self._new(batch)
        recorded = self._recorded[shapes]
        for name, tensor in batch.items():
            recorded.inputs[name].copy_(pinned(tensor, self.lm.device), non_blocking=True)
        recorded.count.fill_(count)
        recorded.replay()
        return recorded.loss.clone()

    def _forget(self) -> None:
        self._recorded: dict[tuple[torch.Size, ...], _Recorded] = {}
        # a pool of memory cannot be used again when its graphs are gone
        self._record = self._given or CudaGraphs(self.lm.device)

    def _new(self, batch: Batch) -> _Recorded:
        device = self.lm.device
        inputs = {name: tensor.to(device, copy=True) for name, tensor in batch.items()}
        # where nothing is masked transformers leaves the mask out, but not while a graph is recorded: the passes to
        # warm up must be the same ones. Replays begin with rows of their own
        if "attention_mask" in inputs:
            inputs["attention_mask"][..., 0] = 0
        if self.lm.family == "encoder-decoder":
            # of these the decoder's mask is made
            inputs["labels"][:, -2:] = IGNORE
        count = torch.ones((), device=device)
        gradient = self.arena.grad.clone()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            only_causal = self._only_causal(inputs)
            unmasked = without_causal_masks if only_causal else nullcontext
            # padding in front of a decoder's prompt sees nothing
            chosen = cudnn_where_safe if only_causal or self.lm.family != "decoder" else nullcontext

            def run() -> Tensor:
                # the backward pass takes the implementation that the forward pass took
                with without_cudnn(), chosen(), unmasked():
                    loss = self.lm.fixed_loss(inputs) / count
                loss.backward()
                return loss.detach()

            replay, loss = self._record(run)
        self.arena.grad.copy_(gradient)
        return _Recorded(inputs, count, loss, replay)

    @torch.no_grad()
    def _only_causal(self, inputs: Batch) -> bool:
        """Whether nothing but what follows a token is hidden; sliding windows, say, hide more in wide batches."""
        if "attention_mask" in inputs:
            return False
        with causal_masks_seen() as seen:
            self.lm.fixed_loss(inputs)
        return all(seen)


@dataclass(frozen=True)
class _Recorded:
    """A pass over `inputs` divided by `count`; each replay adds to the gradients and overwrites `loss`."""

    inputs: Batch
    count: Tensor
    loss: Tensor
    replay: Callable[[], Any]


class CudaGraphs:
    """Records functions as CUDA graphs, which share one pool of memory. The results of all must be kept.

    Raises: RuntimeError for a function that cannot be recorded: it waits for the device or copies from the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._aside: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        try:
            return self._capture(run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the model's passes cannot be recorded as a CUDA graph, leave cuda_graphs out: {error}"
            ) from error

    def _capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        with torch.cuda.device(self.device):
            # one for all shapes: libraries keep a workspace for each stream
            self._aside = aside = self._aside or torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(aside)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # other threads, such as NCCL's watchdog, may go on meanwhile
            with _no_garbage(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run()
        return graph.replay, result


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect none within the block, but before it: another graph that goes meanwhile ends the recording."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
