"""The phases of a run one after another, each scored, kept in checkpoints and logged."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kif import faults, metrics
from kif.checkpoint import Checkpoints, State, config_hash, random_state, restore_random_state
from kif.config import SECTIONS, RunConfig
from kif.distributed import gather, world
from kif.evaluate import Evaluation, evaluate
from kif.families import Encoded, LanguageModel
from kif.loop import train_phase
from kif.memory import ReplayMemory
from kif.methods import Method
from kif.preemption import Preemption
from kif.progress import Progress
from kif.runlog import RunLog
from kif.stored import Earlier, read_state
from kif.tasks import Example, Task, limit_rows
from kif.tokenization import TokenCache, save_origin

INCIDENTAL = ("output", "resume", "checkpoint_rounds", "keep_checkpoints", "device", "shard_base", "cache_dir")
"""Fields of RunConfig that do not change what is trained and scored."""


class Training:
    """The phases of a run one after another, each followed by its scores, from the start or from a checkpoint.

    With `earlier`, `tasks` begins with the tasks of that run; those without rows are not scored.
    """

    def __init__(
        self,
        config: RunConfig,
        tasks: Sequence[Task],
        lm: LanguageModel,
        method: Method,
        encoded: dict[str, list[Encoded]],
        cache: TokenCache,
        log: RunLog,
        bar: Progress,
        checkpoints: Checkpoints,
        identity: State,
        stop: Preemption,
        earlier: Earlier | None = None,
    ) -> None:
        self.config, self.tasks, self.lm, self.method, self.encoded = config, tasks, lm, method, encoded
        self.cache, self.log, self.bar, self.checkpoints, self.identity = cache, log, bar, checkpoints, identity
        self.stop, self.earlier = stop, earlier
        self.names = [task.name for task in tasks]
        self.scored = [row for row, task in enumerate(tasks) if task.train]
        self.memory = ReplayMemory(config.memory_fraction, config.memory_balanced, config.seed)
        self.zero_shot: list[float | None] | None = None
        self.accuracy: list[list[float | None]] = [[None] * len(tasks) for _ in tasks]
        self.seconds = {"train": 0.0, "evaluate": 0.0}
        self.steps = {"inner": 0, "outer": 0}
        # what an interrupted run brought to its checkpoint
        self.elapsed, self.peak, self.stopwatch = 0.0, 0, dict[str, float]()
        self.start = time.perf_counter()

    def run(self, state: State | None) -> dict[str, Any]:
        """Train and score from checkpoint `state` on; returns results.json's content."""
        self.stop.release()
        if self.earlier is not None:
            for task in self.tasks[: len(self.earlier.tasks)]:
                self.memory.restore(task.name, self.lm.encode(task, self.earlier.memory[task.name]))
        if state is not None:
            self._restore(state)
        else:
            self._begin()
        last, before = -1, len(self.earlier.tasks) if self.earlier is not None else 0
        for index, phase in enumerate(self.method.phases(self.tasks)):
            first, last = last + 1, last + len(phase)
            if index < before:
                continue
            if state is None or index >= state["phase"]:
                resumed = state if state is not None and index == state["phase"] else None
                self._phase(index, phase, first, last, resumed)
            self._remember(phase)
            if state is not None and index < state["phase"]:
                continue
            if world()[0] == 0:
                self.save_adapter(checkpoint_folder(Path(self.config.output), last, self.names[last]))
            for row in self.scored:
                if row <= last:
                    self.accuracy[row][last] = self._score(row, last)
            self._log_stage(last)
        return self._results()

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter, and by which tokenizer it was trained. Raises: DiskFull."""
        with faults.disk_space(folder, self.method.arena.data.nbytes):
            self.method.save_adapter(folder)
        save_origin(folder, self.lm.tokenizer)

    def remembered(self) -> dict[str, list[Example]]:
        """The replay memory's rows as they were read."""
        old = self.earlier.memory if self.earlier is not None else {}
        return {
            task.name: list(old[task.name])
            if task.name in old
            else [task.train[i] for i in self.memory.indices[task.name]]
            for task in self.tasks
        }

    def final(self) -> State:
        """What a run that continues this one begins with; all processes must call it."""
        return {"method": self.method.state_dict(), "random": random_state(self.lm.device)}

    def _begin(self) -> None:
        """Take over what an earlier run learned and scored; before that, score the untrained model if wanted."""
        earlier, config = self.earlier, self.config
        if config.eval_forward:
            self.bar.start("before training")
            known = earlier.zero_shot if earlier is not None else {}
            self.zero_shot = [None] * len(self.tasks)
            for row in self.scored:
                name = self.names[row]
                self.zero_shot[row] = known[name] if name in known else self._score(row, None)
        if earlier is None:
            return
        state = read_state(earlier.run, self.lm.device)
        self.method.load_state_dict(state["method"])
        if len(state["random"]) == world()[1]:
            restore_random_state(state["random"], self.lm.device)
        self.accuracy = [[earlier.accuracy.get((task, after)) for after in self.names] for task in self.names]

    def _phase(self, index: int, phase: Sequence[Task], first: int, last: int, state: State | None) -> None:
        """Train phase `index`, of the tasks `first` to `last`, or what a checkpoint in it leaves to be trained."""
        if state is None and self.zero_shot and index > 0:
            self.accuracy[first][first - 1] = self._score(first, first - 1)
        one = f"task {last + 1}/{len(self.tasks)} {phase[-1].name}"
        title = one if len(phase) == 1 else f"{len(phase)} tasks"
        self.bar.start(title)
        if state is not None and self.memory.indices != state["memory"]:
            raise RuntimeError("the replay memory is not the one of the checkpoint")
        if state is not None and state["trained"]:
            self.method.load_state_dict(state["method"])
            restore_random_state(state["random"], self.lm.device)
            return
        began = time.perf_counter()

        def save(loop: State) -> None:
            self._save(index, time.perf_counter() - began, loop=loop)

        self.stop.hold()
        split = self.method.of_micro_batches(self.config)
        with faults.memory_advice(f"training {title}", faults.less_memory_in_training(self.config, split)):
            made = train_phase(
                self.lm,
                self.method,
                self.config,
                index=index,
                tasks=len(phase),
                rows=[row for task in phase for row in self.encoded[task.name]],
                memory=self.memory.rows(),
                log=self.log,
                save=save,
                state=state["loop"] if state is not None else None,
                stop=self.stop,
            )
        self.steps = {kind: self.steps[kind] + made[kind] for kind in self.steps}
        self.seconds["train"] += time.perf_counter() - began
        self._save(index, 0.0, method=self.method.state_dict(), random=random_state(self.lm.device))
        self._end_if_asked()
        self.stop.release()

    def _save(self, index: int, training: float, **what: Any) -> None:
        """Write a checkpoint of phase `index`, `training` seconds after it began or, with 0, at its end."""
        if world()[0] > 0:
            return
        state = {
            "identity": self.identity,
            "config_hash": config_hash(self.identity),
            "phase": index,
            "trained": "loop" not in what,
            "memory": self.memory.indices,
            "zero_shot": self.zero_shot,
            "accuracy": self.accuracy,
            "seconds": {**self.seconds, "train": self.seconds["train"] + training},
            "steps": self.steps,
            "elapsed": self._elapsed(),
            "stopwatch": self._stopwatch(),
            "peak_memory": self._peak(),
            "logged": self.log.size(),
        }
        self.checkpoints.write({**state, **what})
        self.stop.advice = f"{self.config.output} has a checkpoint; the same command with --resume goes on from there"

    def _restore(self, state: State) -> None:
        self.zero_shot, self.accuracy = state["zero_shot"], state["accuracy"]
        self.seconds, self.steps = state["seconds"], state["steps"]
        self.elapsed, self.peak, self.stopwatch = state["elapsed"], state["peak_memory"], state["stopwatch"]

    def _remember(self, phase: Sequence[Task]) -> None:
        for task in phase:
            self.memory.add(task.name, self.encoded[task.name], [example.label for example in task.train])

    def _score(self, row: int, after: int | None) -> float:
        began = time.perf_counter()
        self.bar.say(f"scoring {self.names[row]}")
        with faults.memory_advice(f"scoring {self.names[row]}", faults.less_memory_in_scoring(self.config)):
            result = evaluate_task(self.config, self.lm, self.tasks[row], self.cache)
        self.seconds["evaluate"] += time.perf_counter() - began
        named = {"event": "score", "task": self.names[row], "after": after}
        self.log({**named, "score": result.score, "seconds": result.seconds})
        self._end_if_asked()
        return result.score

    def _end_if_asked(self) -> None:
        """Raise Preempted in all processes if SIGTERM came to one."""
        if self.stop.agreed(self.lm.device):
            # the first process has written before any ends, which would end it too
            gather(True)
            raise self.stop.preempted()

    def _elapsed(self) -> float:
        return self.elapsed + time.perf_counter() - self.start

    def _peak(self) -> int:
        return max(self.peak, peak_memory(self.lm.device))

    def _stopwatch(self) -> dict[str, float]:
        now = self.method.stopwatch.seconds()
        return {name: self.stopwatch.get(name, 0.0) + now.get(name, 0.0) for name in {**self.stopwatch, **now}}

    def _log_stage(self, last: int) -> None:
        """What OP and BWT would be if task `last` were the last one."""
        found = _op_and_bwt(self._accuracy([row for row in self.scored if row <= last]))
        self.log({"event": "stage", "after": last, **found})
        self.bar.say(", ".join(f"{name.upper()} {value:.1f}" for name, value in found.items() if value is not None))

    def _accuracy(self, rows: list[int]) -> list[list[float | None]]:
        return [[self.accuracy[row][column] for column in rows] for row in rows]

    def _results(self) -> dict[str, Any]:
        config, scored = self.config, self.scored
        accuracy = self._accuracy(scored)
        # of the tasks that are scored none is missing
        zero_shot = [z for row in scored if (z := self.zero_shot[row]) is not None] if self.zero_shot else None
        return {
            "method": self.method.name,
            "label": self.method.label,
            "model": model_name(config.model),
            "tasks": [self.names[row] for row in scored],
            "accuracy": accuracy,
            **_op_and_bwt(accuracy),
            "fwt": metrics.forward_transfer(accuracy, zero_shot) if zero_shot and _measured(accuracy, 1) else None,
            "zero_shot": zero_shot,
            "seconds": self._elapsed(),
            "time": {**self.seconds, **self._stopwatch()},
            "steps": self.steps,
            "skipped": self.method.skipped,
            "peak_memory": self._peak(),
            "seed": config.seed,
            "eval_split": config.eval_split,
            "eval_mode": config.eval_mode,
            "settings": settings_key(config),
        }


def _op_and_bwt(accuracy: metrics.AccuracyMatrix) -> dict[str, float | None]:
    bwt = metrics.backward_transfer(accuracy) if _measured(accuracy, 0) else None
    return {"op": metrics.overall_performance(accuracy), "bwt": bwt}


def _measured(accuracy: metrics.AccuracyMatrix, ahead: int) -> bool:
    """Whether every task but the first or last was scored right after its training or, with `ahead` 1, before it.

    In a continued run not every one need have been.
    """
    return all(accuracy[i + ahead][i] is not None for i in range(len(accuracy) - 1))


def evaluate_task(config: RunConfig, lm: LanguageModel, task: Task, cache: TokenCache) -> Evaluation:
    """Score one task on the configured split and rows."""
    return evaluate(
        lm,
        task,
        eval_rows(config, task),
        mode=config.eval_mode,
        batch_size=config.eval_batch_size,
        max_new_tokens=config.max_new_tokens,
        cache=cache,
    )


def eval_rows(config: RunConfig, task: Task) -> tuple[Example, ...]:
    """The rows of a task that are scored. Raises: DataError where the split is missing."""
    return limit_rows(task.rows(config.eval_split), config.limit_eval, f"{task.name}/{config.eval_split}")


def checkpoint_folder(run: Path, index: int, task: str) -> Path:
    """Where the adapter after task `index` (from 0) is kept."""
    return run / "checkpoints" / f"task-{index + 1:02d}-{task}"


def adapter_folder(run: Path, tasks: Sequence[str], checkpoint: int | None) -> Path:
    """The final adapter of a run, or the one after task `checkpoint`, from 1.

    Raises: ValueError where there is none, naming those that there are.
    """
    if checkpoint is None:
        return run / "adapter"
    folders = {n: checkpoint_folder(run, n - 1, task) for n, task in enumerate(tasks, 1)}
    # of a run that continues another, and of one that trains all tasks at once, not every task has one
    there = {n: folder for n, folder in folders.items() if folder.is_dir()}
    if checkpoint not in there:
        known = ", ".join(f"{n} ({tasks[n - 1]})" for n in there) or "none"
        raise ValueError(f"{run} has no checkpoint {checkpoint}; there is {known}{_earlier(run, checkpoint, there)}")
    return there[checkpoint]


def _earlier(run: Path, checkpoint: int, there: Collection[int]) -> str:
    """Where a checkpoint may be that comes before those of a run."""
    from kif.configfile import load_config

    earlier = load_config(run / "config.yaml").continue_from
    return f"; those before are in {earlier}" if earlier and there and 1 <= checkpoint < min(there) else ""


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a GPU; on the CPU the most that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_name(model: str) -> str:
    """The model's name for tables: of a folder its last two parts, since packages call the last one `model`."""
    return "/".join(Path(model).resolve().parts[-2:]) if Path(model).is_dir() else model


def settings_key(config: RunConfig) -> str:
    """Short hash of what must be equal for two runs of a method and sequence to be repetitions of each other."""
    return hashlib.sha256(json.dumps(settings(asdict(config)), sort_keys=True).encode()).hexdigest()[:8]


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration of which `settings_key` is made."""
    named = {"method", "model", "data", "order", "tasks", "eval_split", "eval_mode", "continue_from", *SECTIONS}
    return {name: value for name, value in config.items() if name not in named | {"seed", *INCIDENTAL}}
