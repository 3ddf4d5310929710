"""A run from configuration to results: data, model, phases, evaluation, run folder."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kif import stored
from kif.attention import without_cudnn
from kif.checkpoint import Checkpoints
from kif.config import SECTIONS, RunConfig
from kif.distributed import broadcast_, first_process_first, local_device, world
from kif.evaluate import check_scoring
from kif.families import LanguageModel
from kif.faults import less_memory_in_loading, memory_advice
from kif.files import claimed, is_empty, write_json
from kif.layers import check_liger
from kif.memory_data import read_memory_data
from kif.methods import METHODS, Method
from kif.models import load_language_model, resolve_device
from kif.notes import warn_of_data
from kif.preemption import Preemption, preemption
from kif.progress import Progress
from kif.resume import (
    RESULTS,
    STATE,
    check_alike,
    finished_results,
    identity_of,
    note_environment,
    state_to_resume,
    with_absolute_folders,
)
from kif.runlog import RunLog
from kif.stored import Earlier, KnownTask
from kif.tasks import Task, hold_out, limit_rows, load_order, load_tasks
from kif.tokenization import cache_folder, check_origin, token_cache
from kif.training import Training, adapter_folder, eval_rows, evaluate_task

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


def known_tasks(config: RunConfig, known: Sequence[KnownTask]) -> list[Task]:
    """Tasks that earlier runs learned, with their rows where the data folder holds them, else without any.

    Raises: DataError for anything wrong in the files; ValueError where metric or labels are not those learned.
    """
    folder = cache_folder(config.cache_dir) / "hub" if config.data == "hub" else Path(config.data or "")
    there = [task.name for task in known if (folder / task.name).is_dir()]
    found = {task.name: task for task in prepare_tasks(replace(config, order=None, tasks=there))} if there else {}
    tasks = []
    for before in known:
        task = found.get(before.name, before.task())
        for what in ("metric", "labels"):
            old, new = getattr(before, what), getattr(task, what)
            if old != new:
                raise ValueError(f"task {task.name!r} was learned with {what}={old!r}, {folder} has {new!r}")
        tasks.append(replace(task, template=before.template))
    return tasks


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

    Writes the run folder `config.output`: config.yaml, environment.json, metrics.jsonl, checkpoints/, adapter/, what
    `kif.stored` describes and, last, results.json; meanwhile also state/, from which `config.resume` continues. On the
    same device a resumed run ends as one that was not interrupted, bit for bit where the device's kernels are
    deterministic; so does one that continues another (`config.continue_from`), as one run over all tasks, where
    neither the classes of an encoder nor the experts of MoELoRA depend on their number. Steps and seconds are its own;
    old tasks whose data are gone are not scored. Within `kif.distributed.process_group` all processes train together
    and the first one writes.
    Raises: ValueError or DataError before training for anything wrong in configuration or data, and where a run to
        resume or to continue was begun with others; FileExistsError when the folder holds a run, or another process
        writes one there; FileNotFoundError when there is nothing to resume or continue; `kif.faults.RunError` for no
        memory, a full disk, gradients that are not finite; `kif.preemption.Preempted` after SIGTERM.
    """
    from kif.configfile import check_inputs

    config = check_inputs(config)
    if config.shard_base and world()[1] == 1:
        raise ValueError("shard_base splits the base over several processes: start them with torchrun, or leave it out")
    if config.resume and (Path(config.output) / RESULTS).is_file():
        return finished_results(config)
    with preemption("nothing is written yet, start it again") as stop, without_cudnn(), ExitStack() as held:
        return _train(config, progress, stop, held)


def _train(config: RunConfig, progress: bool, stop: Preemption, held: ExitStack) -> dict[str, Any]:
    from kif.configfile import dump_config
    from kif.doctor import environment

    output = Path(config.output)
    rank, size = world()
    with first_process_first():
        # what is not there cannot be resumed
        if rank == 0 and (not config.resume or output.is_dir()):
            held.enter_context(claimed(output))
        if rank == 0 and not config.resume:
            check_unused(output)
        earlier = _earlier(config)
        tasks, new = _all_tasks(config, earlier)
    adapter_tasks = earlier.adapter_tasks if earlier is not None else len(tasks)
    with memory_advice(f"loading {config.model}", less_memory_in_loading(config)):
        lm, method = _load(config, tasks, earlier, adapter_tasks)
    cache = token_cache(config.cache_dir)
    with first_process_first():
        encoded = {task.name: cache.encode(lm, task, task.train) for task in new}
        scored = [task for task in tasks if task.train]
        for task in scored:  # what cannot be scored must be known before training, not after
            check_scoring(lm, task, config.eval_mode)
            cache.encode(lm, task, eval_rows(config, task))
        if rank == 0:
            warn_unused(config, method)
            warn_of_data(config, lm, new, partial(eval_rows, config), partial(cache.encode, lm))
        if earlier is not None:
            earlier = _still_valid(config, earlier, tasks)

    checkpoints = Checkpoints(output / STATE, config.keep_checkpoints)
    identity = identity_of(config, tasks, lm, earlier.memory if earlier is not None else {})
    check_alike(config, identity)
    state = state_to_resume(config, checkpoints, identity, lm.device) if config.resume else None
    if rank == 0 and state is None:
        dump_config(with_absolute_folders(config), output / "config.yaml")
        place = {"device": str(lm.device), "processes": size, "seed": config.seed}
        write_json(output / "environment.json", {**environment(), **place})
    elif rank == 0:
        note_environment(output / "environment.json", environment())
    stop.advice = f"the same command with --resume goes on with the run in {output}"
    with Progress(progress and rank == 0) as bar, RunLog(output / "metrics.jsonl", bar, state) as log:
        training = Training(config, tasks, lm, method, encoded, cache, log, bar, checkpoints, identity, stop, earlier)
        results = training.run(state)
    # what is left takes moments, and a run that ends in it would be finished no sooner
    stop.hold()
    final = training.final()
    if rank == 0:
        training.save_adapter(output / "adapter")
        old = {task.name: task for task in earlier.tasks} if earlier is not None else {}
        learned = [
            stored.known_task(task, eval_rows(config, task), old.get(task.name)) if task.train else old[task.name]
            for task in tasks
        ]
        replays = "memory_fraction" not in method.unused
        stored.keep(output, learned, adapter_tasks, training.remembered() if replays else {}, final)
        write_json(output / RESULTS, results)
        shutil.rmtree(checkpoints.folder)
    return results


def _earlier(config: RunConfig) -> Earlier | None:
    """The run to continue, if there is one. Raises: ValueError for memory that no method here would replay."""
    replays = "memory_fraction" not in METHODS[config.method].unused
    if config.memory_data is not None and config.continue_from is None:
        raise ValueError("memory_data holds rows of earlier tasks: give it with --from, the run that learned them")
    if config.memory_data is not None and not replays:
        raise ValueError(f"memory_data has no effect with {config.method}, which replays no rows")
    if config.continue_from is None:
        return None
    earlier = stored.read_earlier(Path(config.continue_from))
    if config.memory_data is not None:
        earlier = replace(earlier, memory=read_memory_data(config.memory_data, earlier.tasks))
    elif replays and earlier.config.method == config.method:
        stored.check_memory(earlier)
    forgotten = [task.name for task in earlier.tasks if not earlier.memory.get(task.name)]
    if replays and forgotten and world()[0] == 0:
        place = config.memory_data or earlier.run / stored.MEMORY
        warnings.warn(f"nothing is replayed of {', '.join(forgotten)}: {place} holds no rows of it", stacklevel=2)
    return earlier


def _load(
    config: RunConfig, tasks: Sequence[Task], earlier: Earlier | None, adapter_tasks: int
) -> tuple[LanguageModel, Method]:
    """The model with its adapter, equal in all processes, and the method. Raises: ValueError for what cannot be."""
    torch.manual_seed(config.seed)
    method_type = METHODS[config.method]
    adapter = method_type.adapter_config(replace(config, device=local_device(config.device)), adapter_tasks)
    if config.use_liger_kernel:
        # before the model is read, which may take minutes
        check_liger(resolve_device(adapter.device))
    lm = load_language_model(adapter, {task.name: task.labels for task in tasks}, shard=config.shard_base)
    if earlier is not None:
        stored.check_classes(lm, config, earlier.tasks)
        check_origin(earlier.run / "adapter", lm.tokenizer, config.model)
    method = method_type(lm, config)
    if earlier is not None:
        stored.check_method(method, tasks)
    broadcast_(method.arena.data)
    rank = world()[0]
    if rank > 0:
        # rows of different processes get different dropout
        torch.manual_seed(config.seed + rank)
    return lm, method


def evaluate_run(
    run: Path,
    *,
    adapter: Path | None = None,
    checkpoint: int | None = None,
    progress: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Score a saved adapter of a run on the tasks that it learned, those that the data folder holds.

    Within `kif.distributed.process_group` the processes share the rows, and with `shard_base` the base model, and each
    returns the whole result.

    Args:
        run: run folder.
        adapter: adapter folder; default: the run's final one.
        checkpoint: instead, the adapter after this task, counted from 1.
        progress: show a progress bar.
        changes: configuration fields to replace, such as eval_split, eval_mode, limit_eval or data.
    Returns: {"adapter", "tasks", "scores" (percent, in training order), "op" (their mean), "seconds"}.
    Raises: FileNotFoundError naming the missing file; ValueError for adapter and checkpoint both, and where the data
        folder holds none of the tasks, or one with another metric or other labels.
    """
    from kif.configfile import check_inputs, load_config

    if adapter is not None and checkpoint is not None:
        raise ValueError("give either an adapter folder or a checkpoint number, not both")
    trained = load_config(run / "config.yaml")
    config = check_inputs(replace(trained, **changes))
    if config.eval_split == "heldout" and trained.eval_split != "heldout":
        raise ValueError(f"{run} was trained on all training rows: none are held out to score (eval_split heldout)")
    if config.continue_from or (run / stored.TASKS).is_file():
        # the data may have got further tasks, and a continued run's configuration names its own only
        data_folder(config)
        tasks = known_tasks(config, stored.read_tasks(run)[0])
    else:
        # a run that is not finished, whose checkpoints can be scored
        tasks = prepare_tasks(config)
    scored = [task for task in tasks if task.train]
    if not scored:
        raise ValueError(f"{config.data} holds none of the tasks of {run}: {', '.join(task.name for task in tasks)}")
    folder = adapter or adapter_folder(run, [task.name for task in tasks], checkpoint)
    rank, size = world()
    config = replace(config, device=local_device(config.device))
    labels = {task.name: task.labels for task in tasks}
    lm = load_language_model(config, labels, adapter=folder, shard=config.shard_base and size > 1)
    METHODS[config.method].attach(lm, config, folder)
    cache = token_cache(config.cache_dir)
    start = time.perf_counter()
    scores = []
    if rank == 0:
        _warn_of_absent(config, tasks)
    with Progress(progress and rank == 0) as bar, without_cudnn():
        for task in scored:
            bar.start(f"scoring {task.name}")
            scores.append(evaluate_task(config, lm, task, cache).score)
    return {
        "adapter": str(folder),
        "tasks": [task.name for task in scored],
        "scores": scores,
        "op": sum(scores) / len(scores),
        "seconds": time.perf_counter() - start,
    }


def check_unused(output: Path, advice: str = "choose another --output, remove it, or --resume the run in it") -> None:
    """Raise FileExistsError for a folder that holds anything but a lock: a run never overwrites another."""
    if output.exists() and not is_empty(output):
        raise FileExistsError(f"{output} is not empty: {advice}")


def warn_unused(config: RunConfig, method: Method) -> None:
    """Warn of fields that were set although the method, the model's family or other fields make no use of them."""
    default = RunConfig()
    others = [section for section in SECTIONS if section != method.section]
    names = (*method.unused, *method.lm.unused, *others)
    unused = [name for name in names if getattr(config, name) != getattr(default, name)]
    if unused:
        warnings.warn(f"no effect with {method.name} and this model: {', '.join(unused)}", stacklevel=3)
    if config.holdout != default.holdout and config.eval_split != "heldout":
        warnings.warn(f"holdout has no effect with eval_split {config.eval_split}", stacklevel=3)


def _all_tasks(config: RunConfig, earlier: Earlier | None) -> tuple[list[Task], list[Task]]:
    """(all tasks from the first one learned on, those to train). Raises: ValueError for what cannot be continued."""
    if earlier is None:
        tasks = prepare_tasks(config)
        return tasks, tasks
    stored.check_continues(config, earlier)
    new = prepare_tasks(config)
    known = {task.name for task in earlier.tasks}
    again = [task.name for task in new if task.name in known]
    if again:
        raise ValueError(f"{earlier.run} has learned task {again[0]!r} already: name new tasks only")
    return [*known_tasks(config, earlier.tasks), *new], new


def _still_valid(config: RunConfig, earlier: Earlier, tasks: Sequence[Task]) -> Earlier:
    """`earlier` with only those of its scores that the same rows and settings gave; says which tasks lack scores."""
    then = earlier.config
    same = then.eval_mode == config.eval_mode and then.max_new_tokens == config.max_new_tokens
    old = [(known, task) for known, task in zip(earlier.tasks, tasks, strict=False) if task.train]
    valid = {
        known.name for known, task in old if same and known.scored == stored.rows_key(task, eval_rows(config, task))
    }
    changed = [task.name for _, task in old if task.name not in valid]
    if world()[0] == 0:
        _warn_of_absent(config, tasks)
        if changed:
            warnings.warn(
                f"scored otherwise than in {earlier.run}, so without its scores: {', '.join(changed)}", stacklevel=3
            )
    accuracy = {key: score for key, score in earlier.accuracy.items() if key[0] in valid}
    return replace(
        earlier, accuracy=accuracy, zero_shot={name: s for name, s in earlier.zero_shot.items() if name in valid}
    )


def _warn_of_absent(config: RunConfig, tasks: Sequence[Task]) -> None:
    absent = [task.name for task in tasks if not task.train]
    if absent:
        warnings.warn(f"not scored, since {config.data} does not hold them: {', '.join(absent)}", stacklevel=4)
