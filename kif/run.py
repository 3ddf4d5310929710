"""A run from configuration to results: data, model, phases, evaluation, run folder."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from kif import metrics
from kif.config import SECTIONS, RunConfig
from kif.evaluate import Evaluation, check_scoring, evaluate
from kif.families import Encoded, LanguageModel
from kif.loop import Record, train_phase
from kif.memory import ReplayMemory
from kif.methods import METHODS, Method
from kif.models import load_language_model
from kif.progress import Progress
from kif.tasks import Example, Task, hold_out, limit_rows, load_order, load_tasks
from kif.tokenization import TokenCache, cache_folder

RESULTS = "results.json"
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
    last, results.json.
    Raises: ValueError or DataError before training for anything wrong in configuration or data; FileExistsError
        when the folder holds a run.
    """
    from kif.configfile import check_inputs, dump_config
    from kif.doctor import environment

    config = check_inputs(config)
    output = Path(config.output)
    check_unused(output)
    tasks = prepare_tasks(config)
    torch.manual_seed(config.seed)
    method_type = METHODS[config.method]
    adapter = method_type.adapter_config(config, len(tasks))
    lm = load_language_model(adapter, {task.name: task.labels for task in tasks})
    method = method_type(lm, config)
    warn_unused(config, method)
    cache = TokenCache(cache_folder(config.cache_dir))
    encoded = {task.name: cache.encode(lm, task, task.train) for task in tasks}
    for task in tasks:  # what cannot be scored must be known before training, not after
        check_scoring(lm, task, config.eval_mode)
        cache.encode(lm, task, eval_rows(config, task))

    output.mkdir(parents=True, exist_ok=True)
    dump_config(with_absolute_folders(config), output / "config.yaml")
    write_json(output / "environment.json", {**environment(), "device": str(lm.device), "seed": config.seed})
    with (output / "metrics.jsonl").open("w") as stream, Progress(progress) as bar:
        log = _logger(stream, bar)
        results = _train_sequence(config, tasks, lm, method, encoded, cache, log, bar, output)
    method.save_adapter(output / "adapter")
    write_json(output / RESULTS, results)
    return results


def _train_sequence(
    config: RunConfig,
    tasks: Sequence[Task],
    lm: LanguageModel,
    method: Method,
    encoded: dict[str, list[Encoded]],
    cache: TokenCache,
    log: Callable[[Record], None],
    bar: Progress,
    output: Path,
) -> dict[str, Any]:
    names = [task.name for task in tasks]
    accuracy: list[list[float | None]] = [[None] * len(tasks) for _ in tasks]
    memory = ReplayMemory(config.memory_fraction, config.memory_balanced, config.seed)
    seconds = {"train": 0.0, "evaluate": 0.0}
    steps = {"inner": 0, "outer": 0}
    start = time.perf_counter()

    def score(row: int, after: int | None) -> float:
        began = time.perf_counter()
        bar.say(f"scoring {names[row]}")
        result = evaluate_task(config, lm, tasks[row], cache)
        seconds["evaluate"] += time.perf_counter() - began
        log({"event": "score", "task": names[row], "after": after, "score": result.score, "seconds": result.seconds})
        return result.score

    zero_shot = None
    if config.eval_forward:
        bar.start("before training")
        zero_shot = [score(row, None) for row in range(len(tasks))]
    last = -1
    for index, phase in enumerate(method.phases(tasks)):
        if zero_shot and index > 0:
            accuracy[last + 1][last] = score(last + 1, last)
        last += len(phase)
        began = time.perf_counter()
        bar.start(f"task {last + 1}/{len(tasks)} {phase[-1].name}" if len(phase) == 1 else f"{len(phase)} tasks")
        rows = [row for task in phase for row in encoded[task.name]]
        made = train_phase(lm, method, config, index=index, tasks=len(phase), rows=rows, memory=memory.rows(), log=log)
        steps = {kind: steps[kind] + made[kind] for kind in steps}
        seconds["train"] += time.perf_counter() - began
        for task in phase:
            memory.add(task.name, encoded[task.name], [example.label for example in task.train])
        method.save_adapter(checkpoint_folder(output, last, names[last]))
        for row in range(last + 1):
            accuracy[row][last] = score(row, last)

    return {
        "method": method.name,
        "label": method.label,
        "model": model_name(config.model),
        "tasks": names,
        "accuracy": accuracy,
        "op": metrics.overall_performance(accuracy),
        "bwt": metrics.backward_transfer(accuracy),
        "fwt": metrics.forward_transfer(accuracy, zero_shot) if zero_shot else None,
        "zero_shot": zero_shot,
        "seconds": time.perf_counter() - start,
        "time": {**seconds, **method.stopwatch.seconds()},
        "steps": steps,
        "skipped": method.skipped,
        "peak_memory": peak_memory(lm.device),
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
        raise FileExistsError(f"{output} is not empty: choose another --output or remove it")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def model_name(model: str) -> str:
    """The model's name for tables: of a folder its last two parts, since packages call the last one `model`."""
    return "/".join(Path(model).resolve().parts[-2:]) if Path(model).is_dir() else model


def with_absolute_folders(config: RunConfig) -> RunConfig:
    """The configuration with model and data folders as absolute paths, so that it holds in any working directory."""
    found: dict[str, Any] = {
        name: str(Path(value).resolve())
        for name, value in (("model", config.model), ("data", config.data))
        if value and Path(value).is_dir()
    }
    return replace(config, **found)


def settings_key(config: RunConfig) -> str:
    """Short hash of what must be equal for two runs of a method and sequence to be repetitions of each other."""
    named = {"method", "model", "data", "order", "tasks", "eval_split", "eval_mode", *SECTIONS}
    incidental = {"seed", "output", "device", "cache_dir"}
    content = {name: value for name, value in asdict(config).items() if name not in named | incidental}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def warn_unused(config: RunConfig, method: Method) -> None:
    """Warn of fields that were set although the method or the model's family makes no use of them."""
    default = RunConfig()
    others = [section for section in SECTIONS if section != method.section]
    names = (*method.unused, *method.lm.unused, *others)
    unused = [name for name in names if getattr(config, name) != getattr(default, name)]
    if unused:
        warnings.warn(f"no effect with {method.name} and this model: {', '.join(unused)}", stacklevel=3)


def _logger(stream: Any, bar: Progress) -> Callable[[Record], None]:
    def log(record: Record) -> None:
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        if "loss" in record:
            bar.update(record)

    return log
