"""The training loop: Algorithm 1 from top to bottom, for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kif.batches import BatchStream
from kif.config import RunConfig
from kif.families import Encoded, LanguageModel
from kif.methods import Method

Record = dict[str, Any]


def train_phase(
    lm: LanguageModel,
    method: Method,
    config: RunConfig,
    *,
    index: int,
    tasks: int,
    rows: Sequence[Encoded],
    memory: Sequence[Encoded],
    log: Callable[[Record], None],
) -> dict[str, int]:
    """Train on one task (or, for MTL, on all) and return the number of `inner` and `outer` steps made.

    Data after the last full round of an epoch is carried into the next epoch's first round; the last round of the
    task may have fewer inner steps and is fused all the same. The learning rate follows the inner steps, also
    in the outer loop.

    Args:
        lm: model and adapter.
        method: the method, which was shown the phases before this one.
        config: the run's configuration.
        index: number of the phase from 0.
        tasks: how many tasks are trained in it; more than one only for MTL.
        rows: the phase's training rows.
        memory: rows of all tasks before it; empty in the first phase.
        log: called once a round with what happened; beside data and model, only this waits for the device.
    """
    method.begin_task(index, memory)
    new_rows = BatchStream(method.training_rows(rows, memory), config.batch_size, f"{config.seed}/new/{index}")
    outer_batch_size = config.outer_batch_size or config.batch_size
    replay = BatchStream(memory, outer_batch_size, f"{config.seed}/replay/{index}") if memory else None

    rounds = list(plan_rounds(config, method, new_rows.batches_per_epoch, tasks))
    total = sum(inner for inner, _ in rounds)
    done = outer_done = 0
    lm.model.train()
    for number, (inner_steps, outer_steps) in enumerate(rounds):
        losses, outer_losses = [], []
        for _ in range(inner_steps):
            losses.append(backward(lm, method, new_rows.next(), config.gradient_accumulation))
            method.inner_step(config.lr * schedule(done, total, config.warmup_steps))
            done += 1
        for _ in range(outer_steps):
            assert replay is not None
            outer_losses.append(backward(lm, method, replay.next(), config.gradient_accumulation))
            method.outer_step((config.outer_lr or config.lr) * schedule(done - 1, total, config.warmup_steps))
        method.end_round()

        outer_done += outer_steps
        log(
            {
                "phase": index,
                "round": number,
                "rounds": len(rounds),
                "step": done + outer_done,
                "steps": total + sum(outer for _, outer in rounds),
                "epoch": new_rows.epoch,
                "lr": config.lr * schedule(done - 1, total, config.warmup_steps),
                "loss": _mean(losses),
                "memory_loss": _mean(outer_losses),
                "skipped": method.skipped,
                "kept": method.kept,
                "time": time.time(),
            }
        )
    method.end_task(index)
    return {"inner": done, "outer": outer_done}


def plan_rounds(config: RunConfig, method: Method, batches_per_epoch: int, tasks: int) -> Iterator[tuple[int, int]]:
    """(inner steps, outer steps) of every round of a phase of `tasks` tasks.

    `epochs` fixes the inner steps and every round adds its outer ones; `steps_per_task` fixes the sum of both, so
    that methods with and without an outer loop can be given equal steps.
    """
    inner, outer = method.inner_steps, method.outer_steps
    if config.steps_per_task is None:
        left = config.epochs * batches_per_epoch
        for _ in range(left // inner):
            yield inner, outer
        if left % inner:
            yield left % inner, outer
    else:
        full, left = divmod(config.steps_per_task * tasks, inner + outer)
        for _ in range(full):
            yield inner, outer
        if left:
            # a short round keeps at least one inner step
            short_outer = min(outer, left - 1)
            yield left - short_outer, short_outer


def schedule(step: int, total: int, warmup: int) -> float:
    """Factor of the peak learning rate at inner step `step` (from 0) of `total`: linear warm-up, linear decay to 0.

    Warm-up takes `warmup` steps, at most a tenth of all. Unlike the usual schedule the first factor is not 0.
    """
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (total - step) / (total - warmup)


def backward(lm: LanguageModel, method: Method, rows: Sequence[Encoded], accumulation: int) -> Tensor:
    """Gradient of the mean loss over all label tokens of `rows`, in `accumulation` micro-batches; returns the loss.

    Each micro-batch's summed loss is divided by the number of label tokens of the whole step, so the gradient does
    not depend on how the rows are split.
    """
    micro = [rows[i::accumulation] for i in range(min(accumulation, len(rows)))]
    count = lm.label_count(rows)
    total = torch.zeros((), device=lm.device)
    for part in micro:
        loss, _ = method.loss(part)
        loss = loss / count
        loss.backward()
        total += loss.detach()
    return total


def _mean(losses: Sequence[Tensor]) -> float | None:
    """Mean loss; None without losses and where it is not finite, which JSON cannot hold."""
    mean = torch.stack(list(losses)).mean().item() if losses else math.nan
    return mean if math.isfinite(mean) else None
