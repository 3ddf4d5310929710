"""What can befall a run that is right: no memory, a full disk, numbers that overflow; each says what to do about it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kif.config import RunConfig

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left on the device, in the quota, or under the limit on the size of a file."""

RETRY = ("gradient_accumulation", "gradient_checkpointing", "cuda_graphs", "use_liger_kernel", "eval_batch_size")
"""Fields of RunConfig that change memory use and, up to rounding and the draws of dropout, nothing else (but for
`Method.of_micro_batches`): a run may be resumed with others."""


PREEMPTED = 143
"""Exit status of a run that SIGTERM stopped: 128 + 15, as shells report a process that it ended."""


class Preempted(SystemExit):
    """SIGTERM stopped the run. Not caught, it ends the process with `PREEMPTED`; its text says how to go on."""

    def __init__(self, message: str) -> None:
        super().__init__(PREEMPTED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class RunError(RuntimeError):
    """A run that failed though configuration and data are right; the message says what to do, a trace says no more."""


class OutOfMemory(RunError):
    """The device or the machine has no memory left."""


class DiskFull(RunError):
    """A file cannot be written for lack of space."""


class Disagreement(RunError):
    """Processes that train together hold different weights."""


class Diverged(RunError):
    """Gradients are not finite any more, step after step."""


@contextmanager
def memory_advice(doing: str, advice: str) -> Iterator[None]:
    """Turn "out of memory" within the block into OutOfMemory: what was going on, and what needs less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        raise OutOfMemory(
            f"out of memory while {doing}: {advice}. What was saved before is kept. ({reason})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or a CPU, or Python could not allocate memory."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    texts = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


_WITHOUT_GRAPHS = "resume without cuda_graphs, which keep the memory of a pass; or "


def less_memory_in_training(config: RunConfig, of_micro_batches: str | None = None) -> str:
    """What to change when a training step does not fit, what keeps the result first.

    Args:
        config: of the run.
        of_micro_batches: as the method says it of itself.
    """
    outer = config.outer_batch_size or config.batch_size
    most = max(config.batch_size, outer)
    resumed: list[str] = []
    if config.gradient_accumulation < most:
        more = min(most, 2 * config.gradient_accumulation)
        effect = "gives the same result up to rounding and the draws of dropout"
        if of_micro_batches is not None:
            effect = f"changes the result, since with {config.method} each micro-batch has its own {of_micro_batches}"
        now = config.gradient_accumulation
        resumed.append(f"resume with gradient_accumulation {more} (now {now}), which {effect}; or ")
    if config.cuda_graphs:
        resumed.append(_WITHOUT_GRAPHS)
    elif not config.gradient_checkpointing:
        resumed.append(
            "resume with gradient_checkpointing, which takes longer and changes the result by rounding only; or "
        )
    if of_micro_batches is not None:
        resumed.reverse()
    return "".join(resumed) + (
        f"start a new run with a smaller batch_size (now {config.batch_size}), a smaller max_length (now "
        f"{config.max_length}), {_smaller_weights(config)}or a smaller model"
    )


def less_memory_in_scoring(config: RunConfig) -> str:
    """What to change when a batch of rows to score does not fit."""
    graphs = _WITHOUT_GRAPHS if config.cuda_graphs else ""
    if config.eval_batch_size == 1:
        return f"{graphs}start a new run with a smaller max_length (now {config.max_length}) or a smaller model"
    return (
        f"{graphs}resume with eval_batch_size {config.eval_batch_size // 2} (now {config.eval_batch_size}), which "
        "gives the same scores up to rounding"
    )


def less_memory_in_loading(config: RunConfig) -> str:
    """What to change when the model itself does not fit."""
    return f"use {_smaller_weights(config)}another device (now {config.device}) or a smaller model"


def _smaller_weights(config: RunConfig) -> str:
    precision = "" if config.precision == "bf16" else f"precision bf16 (now {config.precision}), "
    return precision + ("" if config.quantization != "none" else "quantization nf4 (now none), ")


@contextmanager
def disk_space(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a full disk within the block into DiskFull, which names `path`, the bytes needed and those free.

    Args:
        path: what is written.
        needed: its bytes, where they are known.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _os_error(str(error))
        if number not in FULL:
            raise
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        size = "" if needed is None else f"{bytes_in_words(needed)} are needed, "
        raise DiskFull(
            f"{path} cannot be written: {os.strerror(number)}; {size}{bytes_in_words(shutil.disk_usage(there).free)} "
            "are free there. Make room, then give the same command, `kif train` with --resume: what was saved before "
            "is kept"
        ) from error


def bytes_in_words(count: int) -> str:
    """As MiB with one decimal, below that as bytes."""
    return f"{count} bytes" if count < 1 << 20 else f"{count / (1 << 20):.1f} MiB"


def _os_error(message: str) -> int:
    """The errno in a message of safetensors, whose errors carry it as text only; 0 without one."""
    found = re.search(r"(?:os error |Os \{ code: )(\d+)", message)
    return int(found[1]) if found else 0


class SkippedSteps:
    """Watches for steps that were skipped since their loss or gradient was not finite: one is said, too many end a run.

    Args:
        config: of the run, for the advice.
        before: steps that were skipped before this task.
        in_a_row: whole rounds that were skipped last, as steps, of a checkpoint to continue from.
    """

    LIMIT = 50
    """So many in a row end the run, or all of a task: nothing is learned any more."""

    def __init__(self, config: RunConfig, before: int, in_a_row: int = 0) -> None:
        self.config, self.in_a_row = config, in_a_row
        self._seen, self._said = before, False

    def after_round(self, steps: int, skipped: int, made: int, last: bool) -> None:
        """After a round of `steps` steps, when `made` of the task were made and `skipped` of all tasks were skipped.

        Raises: Diverged.
        """
        from kif.distributed import world

        new, self._seen = skipped - self._seen, skipped
        self.in_a_row = self.in_a_row + steps if new >= steps else 0
        advice = f"lower lr (now {self.config.lr})"
        if self.config.precision != "fp32":
            advice += f", use precision fp32 (now {self.config.precision})"
        advice += ", and look at the rows for texts without sense"
        if self.in_a_row >= self.LIMIT or (last and self.in_a_row == made):
            raise Diverged(
                f"the last {self.in_a_row} steps changed nothing, since their loss or gradient was NaN or infinite: "
                f"{advice}; then start a new run"
            )
        if new and not self._said and world()[0] == 0:
            self._said = True
            warnings.warn(
                f"{new} of {steps} steps of a round changed nothing, since their loss or gradient was NaN or infinite; "
                f"if more follow, {advice}",
                stacklevel=3,
            )
