"""A run from configuration to results: data, model, phases, evaluation, run folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from kif import metrics
from kif.checkpoint import Checkpoints, State, difference, random_state, restore_random_state
from kif.config import SECTIONS, RunConfig
from kif.distributed import broadcast_, first_process_first, local_device, world
from kif.evaluate import Evaluation, check_scoring, evaluate
from kif.families import Encoded, LanguageModel
from kif.loop import Record, train_phase
from kif.memory import ReplayMemory
from kif.methods import METHODS, Method
from kif.models import load_language_model
from kif.progress import Progress
from kif.tasks import Example, Task, hold_out, limit_rows, load_order, load_tasks
from kif.tokenization import TokenCache, cache_folder, content_key

RESULTS = "results.json"
STATE = "state"
INCIDENTAL = ("output", "resume", "checkpoint_rounds", "device", "cache_dir")
"""Fields of RunConfig that do not change what is trained and scored."""
DATA_SEED = 0
"""Seed of data splits: not the run's, so that runs of several seeds train and are scored on equal rows."""


def prepare_tasks(config: RunConfig) -> list[Task]:
    """Read, check, split and limit the tasks that a configuration names, in training order.

    Raises: ValueError when no data or no task is named; DataError for anything wrong in the files.
    """
    folder = data_folder(config)
    names = config.tasks or load_order(folder, config.order or "")
    tasks = load_tasks(folder, names)
    if config.template is not None:
        tasks = [replace(task, template=config.template) for task in tasks]
    if config.eval_split == "heldout":
        tasks = [hold_out(task, config.holdout, DATA_SEED) for task in tasks]
    return [replace(task, train=limit_rows(task.train, config.limit_train, f"{task.name}/train")) for task in tasks]


def data_folder(config: RunConfig) -> Path:
    """The folder of the tasks; `hub` downloads them first. Raises: ValueError without order or tasks."""
    assert config.data is not None
    if not config.order and not config.tasks:
        raise ValueError("no tasks: give --order NAME or --tasks NAME NAME ...")
    if config.data != "hub":
        return Path(config.data)
    from kif.hub import ORDERS, download

    if not config.tasks and config.order not in ORDERS:
        raise ValueError(f"no order {config.order!r} on the hub; there are {', '.join(ORDERS)}")
    folder = cache_folder(config.cache_dir) / "hub"
    download(config.tasks or ORDERS[config.order or ""]["tasks"], folder, seed=DATA_SEED)
    return folder


def train(config: RunConfig, *, progress: bool = True) -> dict[str, Any]:
    """Train the configured method on the task sequence, evaluating after each task; returns results.json's content.

    Writes the run folder `config.output`: config.yaml, environment.json, metrics.jsonl, checkpoints/, adapter/ and,
    last, results.json; meanwhile also state/, from which `config.resume` continues. On the same device a resumed run
    ends as one that was not interrupted, bit for bit where the device's kernels are deterministic. Within
    `kif.distributed.process_group` all processes train together and the first one writes.
    Raises: ValueError or DataError before training for anything wrong in configuration or data, and where a run to
        resume was begun with others; FileExistsError when the folder holds a run; FileNotFoundError when there is
        nothing to resume.
    """
    from kif.configfile import check_inputs, dump_config
    from kif.doctor import environment

    config = check_inputs(config)
    output = Path(config.output)
    rank, size = world()
    if config.resume and (output / RESULTS).is_file():
        return _finished(config)
    with first_process_first():
        if rank == 0 and not config.resume:
            check_unused(output)
        tasks = prepare_tasks(config)
    torch.manual_seed(config.seed)
    method_type = METHODS[config.method]
    adapter = method_type.adapter_config(replace(config, device=local_device(config.device)), len(tasks))
    lm = load_language_model(adapter, {task.name: task.labels for task in tasks})
    method = method_type(lm, config)
    broadcast_(method.arena.data)
    if rank > 0:
        # rows of different processes get different dropout
        torch.manual_seed(config.seed + rank)
    cache = TokenCache(cache_folder(config.cache_dir))
    with first_process_first():
        if rank == 0:
            warn_unused(config, method)
        encoded = {task.name: cache.encode(lm, task, task.train) for task in tasks}
        for task in tasks:  # what cannot be scored must be known before training, not after
            check_scoring(lm, task, config.eval_mode)
            cache.encode(lm, task, eval_rows(config, task))

    checkpoints = Checkpoints(output / STATE)
    identity = _identity(config, tasks, lm)
    state = _resumed(config, checkpoints, identity, lm.device) if config.resume else None
    if rank == 0 and state is None:
        output.mkdir(parents=True, exist_ok=True)
        dump_config(with_absolute_folders(config), output / "config.yaml")
        place = {"device": str(lm.device), "processes": size, "seed": config.seed}
        write_json(output / "environment.json", {**environment(), **place})
    with Progress(progress and rank == 0) as bar, RunLog(output / "metrics.jsonl", bar, state) as log:
        training = _Training(config, tasks, lm, method, encoded, cache, log, bar, checkpoints, identity)
        results = training.run(state)
    if rank == 0:
        method.save_adapter(output / "adapter")
        write_json(output / RESULTS, results)
        shutil.rmtree(checkpoints.folder)
    return results


class RunLog:
    """metrics.jsonl, one record a line, and the progress bar; processes but the first one write nothing.

    Args:
        path: the file.
        bar: shows the records of the training loop.
        state: a checkpoint to continue from; records after it are cut off. None: a new file.
    """

    def __init__(self, path: Path, bar: Progress, state: State | None) -> None:
        self._bar = bar
        self._stream: TextIO | None = None
        if world()[0] == 0:
            if state is not None:
                os.truncate(path, state["logged"])
            self._stream = path.open("w" if state is None else "a")

    def __call__(self, record: Record) -> None:
        if self._stream is None:
            return
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()
        if "loss" in record:
            self._bar.update(record)

    def size(self) -> int:
        """Bytes of the file, which are on disk then."""
        if self._stream is None:
            return 0
        os.fsync(self._stream.fileno())
        return os.fstat(self._stream.fileno()).st_size

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()


class _Training:
    """The phases of a run one after another, each followed by its scores, from the start or from a checkpoint."""

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
    ) -> None:
        self.config, self.tasks, self.lm, self.method, self.encoded = config, tasks, lm, method, encoded
        self.cache, self.log, self.bar, self.checkpoints, self.identity = cache, log, bar, checkpoints, identity
        self.names = [task.name for task in tasks]
        self.memory = ReplayMemory(config.memory_fraction, config.memory_balanced, config.seed)
        self.zero_shot: list[float] | None = None
        self.accuracy: list[list[float | None]] = [[None] * len(tasks) for _ in tasks]
        self.seconds = {"train": 0.0, "evaluate": 0.0}
        self.steps = {"inner": 0, "outer": 0}
        # what an interrupted run brought to its checkpoint
        self.elapsed, self.peak, self.stopwatch = 0.0, 0, dict[str, float]()
        self.start = time.perf_counter()

    def run(self, state: State | None) -> dict[str, Any]:
        """Train and score from checkpoint `state` on; returns results.json's content."""
        if state is not None:
            self._restore(state)
        elif self.config.eval_forward:
            self.bar.start("before training")
            self.zero_shot = [self._score(row, None) for row in range(len(self.tasks))]
        last = -1
        for index, phase in enumerate(self.method.phases(self.tasks)):
            first, last = last + 1, last + len(phase)
            if state is None or index >= state["phase"]:
                resumed = state if state is not None and index == state["phase"] else None
                self._phase(index, phase, first, last, resumed)
            self._remember(phase)
            if state is not None and index < state["phase"]:
                continue
            if world()[0] == 0:
                self.method.save_adapter(checkpoint_folder(Path(self.config.output), last, self.names[last]))
            for row in range(last + 1):
                self.accuracy[row][last] = self._score(row, last)
        return self._results()

    def _phase(self, index: int, phase: Sequence[Task], first: int, last: int, state: State | None) -> None:
        """Train phase `index`, of the tasks `first` to `last`, or what a checkpoint in it leaves to be trained."""
        if state is None and self.zero_shot and index > 0:
            self.accuracy[first][first - 1] = self._score(first, first - 1)
        one = f"task {last + 1}/{len(self.tasks)} {phase[-1].name}"
        self.bar.start(one if len(phase) == 1 else f"{len(phase)} tasks")
        if state is not None and self.memory.indices != state["memory"]:
            raise RuntimeError("the replay memory is not the one of the checkpoint")
        if state is not None and state["trained"]:
            self.method.load_state_dict(state["method"])
            restore_random_state(state["random"], self.lm.device)
            return
        began = time.perf_counter()

        def save(loop: State) -> None:
            self._save(index, time.perf_counter() - began, loop=loop)

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
        )
        self.steps = {kind: self.steps[kind] + made[kind] for kind in self.steps}
        self.seconds["train"] += time.perf_counter() - began
        self._save(index, 0.0, method=self.method.state_dict(), random=random_state(self.lm.device))

    def _save(self, index: int, training: float, **what: Any) -> None:
        """Write a checkpoint of phase `index`, `training` seconds after it began or, with 0, at its end."""
        if world()[0] > 0:
            return
        state = {
            "identity": self.identity,
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
        result = evaluate_task(self.config, self.lm, self.tasks[row], self.cache)
        self.seconds["evaluate"] += time.perf_counter() - began
        named = {"event": "score", "task": self.names[row], "after": after}
        self.log({**named, "score": result.score, "seconds": result.seconds})
        return result.score

    def _elapsed(self) -> float:
        return self.elapsed + time.perf_counter() - self.start

    def _peak(self) -> int:
        return max(self.peak, peak_memory(self.lm.device))

    def _stopwatch(self) -> dict[str, float]:
        now = self.method.stopwatch.seconds()
        return {name: self.stopwatch.get(name, 0.0) + now.get(name, 0.0) for name in {**self.stopwatch, **now}}

    def _results(self) -> dict[str, Any]:
        config, accuracy = self.config, self.accuracy
        return {
            "method": self.method.name,
            "label": self.method.label,
            "model": model_name(config.model),
            "tasks": self.names,
            "accuracy": accuracy,
            "op": metrics.overall_performance(accuracy),
            "bwt": metrics.backward_transfer(accuracy),
            "fwt": metrics.forward_transfer(accuracy, self.zero_shot) if self.zero_shot else None,
            "zero_shot": self.zero_shot,
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


def evaluate_run(
    run: Path,
    *,
    adapter: Path | None = None,
    checkpoint: int | None = None,
    progress: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Score a saved adapter of a finished run on the tasks of its configuration.

    Args:
        run: run folder.
        adapter: adapter folder; default: the run's final one.
        checkpoint: instead, the adapter after this task, counted from 1.
        progress: show a progress bar.
        changes: configuration fields to replace, such as eval_split, eval_mode, limit_eval or data.
    Returns: {"adapter", "tasks", "scores" (percent, in training order), "op" (their mean), "seconds"}.
    Raises: FileNotFoundError naming the missing file; ValueError for adapter and checkpoint both.
    """
    from kif.configfile import check_inputs, load_config

    if adapter is not None and checkpoint is not None:
        raise ValueError("give either an adapter folder or a checkpoint number, not both")
    trained = load_config(run / "config.yaml")
    config = check_inputs(replace(trained, **changes))
    if config.eval_split == "heldout" and trained.eval_split != "heldout":
        raise ValueError(f"{run} was trained on all training rows: none are held out to score (eval_split heldout)")
    tasks = prepare_tasks(config)
    if checkpoint is not None:
        if not 1 <= checkpoint <= len(tasks):
            raise ValueError(f"checkpoint must lie between 1 and {len(tasks)}, got {checkpoint}")
        adapter = checkpoint_folder(run, checkpoint - 1, tasks[checkpoint - 1].name)
    folder = adapter or run / "adapter"
    lm = load_language_model(config, {task.name: task.labels for task in tasks}, adapter=folder)
    METHODS[config.method].attach(lm, config, folder)
    cache = TokenCache(cache_folder(config.cache_dir))
    start = time.perf_counter()
    scores = []
    with Progress(progress) as bar:
        for task in tasks:
            bar.start(f"scoring {task.name}")
            scores.append(evaluate_task(config, lm, task, cache).score)
    return {
        "adapter": str(folder),
        "tasks": [task.name for task in tasks],
        "scores": scores,
        "op": sum(scores) / len(scores),
        "seconds": time.perf_counter() - start,
    }


def checkpoint_folder(run: Path, index: int, task: str) -> Path:
    """Where the adapter after task `index` (from 0) is kept."""
    return run / "checkpoints" / f"task-{index + 1:02d}-{task}"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a GPU; on the CPU the most that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_unused(output: Path) -> None:
    """Raise FileExistsError for a folder that holds anything: a run never overwrites another."""
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty: choose another --output, remove it, or --resume the run in it")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def model_name(model: str) -> str:
    """The model's name for tables: of a folder its last two parts, since packages call the last one `model`."""
    return "/".join(Path(model).resolve().parts[-2:]) if Path(model).is_dir() else model


def with_absolute_folders(config: RunConfig) -> RunConfig:
    """The configuration with model and data folders as absolute paths, so that it holds in any working directory.

    It does not ask to resume, so that a new run can be made of it.
    """
    found: dict[str, Any] = {
        name: str(Path(value).resolve())
        for name, value in (("model", config.model), ("data", config.data))
        if value and Path(value).is_dir()
    }
    return replace(config, resume=False, **found)


def settings_key(config: RunConfig) -> str:
    """Short hash of what must be equal for two runs of a method and sequence to be repetitions of each other."""
    named = {"method", "model", "data", "order", "tasks", "eval_split", "eval_mode", *SECTIONS}
    content = {name: value for name, value in asdict(config).items() if name not in named | {"seed", *INCIDENTAL}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def warn_unused(config: RunConfig, method: Method) -> None:
    """Warn of fields that were set although the method or the model's family makes no use of them."""
    default = RunConfig()
    others = [section for section in SECTIONS if section != method.section]
    names = (*method.unused, *method.lm.unused, *others)
    unused = [name for name in names if getattr(config, name) != getattr(default, name)]
    if unused:
        warnings.warn(f"no effect with {method.name} and this model: {', '.join(unused)}", stacklevel=3)


def _identity(config: RunConfig, tasks: Sequence[Task], lm: LanguageModel) -> State:
    """What must be equal for a run to be continued: configuration, data by content, number of processes."""
    settings = asdict(with_absolute_folders(config))
    for name in (*INCIDENTAL, "data"):
        del settings[name]
    data = {
        task.name: {
            f"{len(rows)} rows to {use}": content_key(lm, task, rows)
            for use, rows in (("train", task.train), ("score", eval_rows(config, task)))
        }
        for task in tasks
    }
    return {**settings, "names": [task.name for task in tasks], "data": data, "processes": world()[1]}


def _resumed(config: RunConfig, checkpoints: Checkpoints, identity: State, device: torch.device) -> State:
    """The checkpoint to continue from. Raises: FileNotFoundError without one; ValueError for one of another run."""
    state = checkpoints.read(device)
    if state is None:
        raise FileNotFoundError(
            f"{checkpoints.folder} holds no checkpoint to resume from: remove {config.output} and start again without "
            "resume"
        )
    _check_same(config, state["identity"], identity)
    return state


def _finished(config: RunConfig) -> dict[str, Any]:
    """The results of a finished run that is asked to resume. Raises: ValueError where its configuration differs."""
    from kif.configfile import load_config

    output = Path(config.output)
    then, now = (asdict(with_absolute_folders(c)) for c in (load_config(output / "config.yaml"), config))
    for name in INCIDENTAL:
        del then[name], now[name]
    _check_same(config, then, now)
    if world()[0] == 0:
        # of a run that ended before it could remove them
        shutil.rmtree(output / STATE, ignore_errors=True)
        warnings.warn(f"{output} is finished: there is nothing to resume, these are its results", stacklevel=3)
    results: dict[str, Any] = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    return results


def _check_same(config: RunConfig, then: State, now: State) -> None:
    found = difference(then, now)
    if found is not None:
        name, old, new = found
        raise ValueError(
            f"{config.output} was begun with {name}={old!r}, now it is {new!r}: resume it as it was, or choose another "
            "--output"
        )
