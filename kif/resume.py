"""Whether and from where a run goes on: its identity, its last checkpoint, its results if it is finished."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from kif.checkpoint import Checkpoints, State, config_hash, difference
from kif.config import RunConfig
from kif.distributed import gather, world
from kif.families import LanguageModel
from kif.faults import RETRY
from kif.files import is_empty, write_json
from kif.methods import METHODS
from kif.tasks import Example, Task
from kif.tokenization import content_key
from kif.training import INCIDENTAL, eval_rows

RESULTS = "results.json"
STATE = "state"


def with_absolute_folders(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths of model and data, so that it holds in any working directory.

    It does not ask to resume, so that a new run can be made of it.
    """
    places = {name: getattr(config, name) for name in ("model", "data", "continue_from", "memory_data")}
    found: dict[str, Any] = {
        name: str(Path(value).resolve())
        for name, value in places.items()
        if value and (Path(value).is_dir() or (name == "memory_data" and Path(value).is_file()))
    }
    return replace(config, resume=False, **found)


def identity_of(
    config: RunConfig, tasks: Sequence[Task], lm: LanguageModel, memory: Mapping[str, Sequence[Example]]
) -> State:
    """What must be equal for a run to be continued: configuration, data by content, number of processes."""
    settings = asdict(with_absolute_folders(config))
    for name in (*INCIDENTAL, *RETRY, "data"):
        del settings[name]
    data = {
        task.name: {
            f"{len(rows)} rows to {use}": content_key(lm, task, rows)
            for use, rows in (
                ("replay", memory[task.name]) if task.name in memory else ("train", task.train),
                ("score", eval_rows(config, task) if task.train else ()),
            )
        }
        for task in tasks
    }
    return {**settings, "names": [task.name for task in tasks], "data": data, "processes": world()[1]}


def check_alike(config: RunConfig, identity: State) -> None:
    """Raise ValueError in all processes where one was given another configuration or other data than the first."""
    first, *others = gather({**identity, "resume": config.resume, "checkpoint_rounds": config.checkpoint_rounds})
    for rank, other in enumerate(others, 1):
        found = difference(first, other)
        if found is not None:
            name, given, here = found
            raise ValueError(
                f"process {rank} was given {name}={here!r}, process 0 {given!r}: all must get the same options and "
                "read the same files"
            )


def state_to_resume(config: RunConfig, checkpoints: Checkpoints, identity: State, device: torch.device) -> State | None:
    """The checkpoint to continue from; None where the run ended before its first one, which begins anew.

    Raises: FileNotFoundError without a run, and where all checkpoints are damaged; ValueError for one of another run.
    """
    state = checkpoints.read(device)
    if state is None:
        output = Path(config.output)
        begun = output.is_dir() and ((output / "config.yaml").is_file() or is_empty(output))
        # no process changes the folder before all have seen it
        gather(True)
        if checkpoints or not begun:
            advice = f"remove {config.output} and start again without resume"
            if output.is_dir() and not checkpoints:
                advice = f"{config.output} is no run folder, choose another --output"
            raise FileNotFoundError(f"{checkpoints.folder} holds no checkpoint to resume from: {advice}")
        _warn(f"{config.output} ended before its first checkpoint: it starts from the beginning")
        return None
    if state["config_hash"] != config_hash(identity):
        check_same(config, state["identity"], identity)
    _take_over(config)
    return state


def note_environment(path: Path, now: dict[str, Any]) -> None:
    """Warn of what differs from the environment that a run was in until now, and add it to the file as `resumed`."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        before = {name: known.get(name) for name in now}
        for changes in known.get("resumed", []):
            before |= changes
    except (OSError, ValueError, AttributeError, TypeError):
        known, before = {}, {}
    changed = {name: value for name, value in now.items() if before.get(name) != value}
    if changed:
        _warn(f"the run goes on in another environment, its bits may be others: {', '.join(changed)} differ")
        write_json(path, {**known, "resumed": [*known.get("resumed", []), changed]})


def finished_results(config: RunConfig) -> dict[str, Any]:
    """The results of a finished run that is asked to resume.

    Raises: ValueError where its configuration differs; ReportError where results.json is damaged.
    """
    from kif.configfile import load_config
    from kif.results import load_results

    output = Path(config.output)
    then, now = (asdict(with_absolute_folders(c)) for c in (load_config(output / "config.yaml"), config))
    for name in (*INCIDENTAL, *RETRY):
        del then[name], now[name]
    check_same(config, then, now)
    load_results(output)
    if world()[0] == 0:
        # of a run that ended before it could remove them
        shutil.rmtree(output / STATE, ignore_errors=True)
    _warn(f"{output} is finished: there is nothing to resume, these are its results")
    results: dict[str, Any] = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    return results


def check_same(config: RunConfig, then: State, now: State) -> None:
    """Raise ValueError with the first difference between what a run was begun with and what it is given now."""
    found = difference(then, now)
    if found is not None:
        name, old, new = found
        raise ValueError(
            f"{config.output} was begun with {name}={old!r}, now it is {new!r}: resume it as it was, or choose another "
            "--output"
        )


def _take_over(config: RunConfig) -> None:
    """Note in the run's config.yaml with which `RETRY` fields it goes on."""
    from kif.configfile import dump_config, load_config

    path = Path(config.output) / "config.yaml"
    before = load_config(path)
    changed = {name: getattr(config, name) for name in RETRY if getattr(config, name) != getattr(before, name)}
    if not changed:
        return
    own = METHODS[config.method].of_micro_batches(config) if "gradient_accumulation" in changed else None
    more = "nothing else" if own is None else f"and more: with {config.method} each micro-batch has its own {own}"
    _warn(f"{config.output} goes on with {changed}: which changes rounding and the draws of dropout, {more}")
    if world()[0] == 0:
        dump_config(replace(before, **changed), path)


def _warn(message: str) -> None:
    if world()[0] == 0:
        warnings.warn(message, stacklevel=4)
