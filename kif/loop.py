"""The training loop: Algorithm 1 from top to bottom, for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kif.batches import BatchStream
from kif.checkpoint import pack_rows, random_state, restore_random_state, unpack_rows
from kif.config import RunConfig
from kif.distributed import alike, all_reduce_, gather, share, world
from kif.families import Encoded, LanguageModel
from kif.faults import Disagreement, SkippedSteps
from kif.methods import Method
from kif.notes import warn_of_unreached
from kif.preemption import Preemption

Record = dict[str, Any]
State = dict[str, Any]


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
    save: Callable[[State], None] | None = None,
    state: State | None = None,
    stop: Preemption | None = None,
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
        save: called after every `config.checkpoint_rounds` rounds but the last, and before the loop ends for `stop`,
            with all that what follows depends on. Tensors in it are live ones.
        state: what `save` was called with, to continue from there; `log` is not called again for the rounds before.
        stop: asked after every round but the last whether the run is to end.
    Raises: Diverged when steps in a row had a gradient that is not finite; Disagreement when masks or updates were not
        the same in all processes; Preempted.
    """
    if state is not None:
        # a task may begin with what is known of earlier ones
        method.load_state_dict(state["method"])
    method.begin_task(index, memory)
    trained = method.training_rows(rows, memory)
    if state is not None:
        # what a method made itself depends on weights that are not there any more
        trained = unpack_rows(state["rows"], [*rows, *memory])
    new_rows = BatchStream(trained, config.batch_size, f"{config.seed}/new/{index}")
    outer_batch_size = config.outer_batch_size or config.batch_size
    # sorted by length a batch would hold rows of fewer tasks
    replay = BatchStream(memory, outer_batch_size, f"{config.seed}/replay/{index}", by_length=False) if memory else None

    rounds = list(plan_rounds(config, method, new_rows.batches_per_epoch, tasks))
    total = sum(inner for inner, _ in rounds)
    begin = done = outer_done = 0
    if state is not None:
        begin, done, outer_done = state["round"], state["inner"], state["outer"]
        new_rows.load_state_dict(state["new_rows"])
        if replay is not None:
            replay.load_state_dict(state["replay"])
        method.load_state_dict(state["method"])
        restore_random_state(state["random"], lm.device)
    watch = SkippedSteps(config, method.skipped, state["skipped_in_a_row"] if state is not None else 0)
    lm.model.train()
    for number, (inner_steps, outer_steps) in enumerate(rounds[begin:], begin):
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
        if not alike(method.arena.data):
            raise Disagreement(
                f"after round {number + 1} the processes hold different weights: they must run the same versions of "
                "torch, triton and this package on the same kind of device"
            )

        outer_done += outer_steps
        skipped = method.skipped
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
                "skipped": skipped,
                "kept": method.kept,
                "time": time.time(),
            }
        )
        finished = number + 1
        watch.after_round(inner_steps + outer_steps, skipped, done + outer_done, finished == len(rounds))
        if finished == len(rounds):
            break
        stopping = stop is not None and stop.agreed(lm.device)
        if save and (stopping or (config.checkpoint_rounds and finished % config.checkpoint_rounds == 0)):
            save(
                {
                    "round": finished,
                    "inner": done,
                    "outer": outer_done,
                    "rows": pack_rows(trained, [*rows, *memory]),
                    "new_rows": new_rows.state_dict(),
                    "replay": replay.state_dict() if replay is not None else None,
                    "method": method.state_dict(),
                    "random": random_state(lm.device),
                    "skipped_in_a_row": watch.in_a_row,
                }
            )
        if stop is not None and stopping:
            # the first process has written before any ends, which would end it too
            gather(True)
            raise stop.preempted()
    # LoRA's A has a gradient from the second step on
    if index == 0 and done > 1 and world()[0] == 0:
        warn_of_unreached(method.unreached(), method.arena)
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
    not depend on how the rows are split. Several processes each take a part of the rows, which may be none, and sum
    their gradients; the loss returned is that of the process's own part.
    """
    own = share(rows)
    micro = [own[i::accumulation] for i in range(min(accumulation, len(own)))]
    count = lm.label_count(rows)
    total = torch.zeros((), device=lm.device)
    for part in micro:
        total += method.backward(part, count)
    if lm.lockstep:
        # every process makes as many passes as the first one, which has the most rows
        idle = min(accumulation, -(-len(rows) // world()[1])) - len(micro)
        with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else [], enabled=idle > 0):
            for _ in range(idle):
                (method.loss(rows[:1])[0] * 0.0).backward()
    if world()[1] > 1:
        method.arena.check()
        with method.stopwatch.section("all_reduce", lm.device):
            all_reduce_(method.arena.grad)
    return total


def _mean(losses: Sequence[Tensor]) -> float | None:
    """Mean loss over steps, summed over processes; None without losses and where JSON cannot hold it (not finite)."""
    mean = all_reduce_(torch.stack(list(losses)).mean()).item() if losses else math.nan
    return mean if math.isfinite(mean) else None
