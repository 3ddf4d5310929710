"""What a finished run found: its results.json, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from kif import metrics

_UPDATE = ("optimizer", "importance", "threshold", "fusion")


class ReportError(ValueError):
    """Results that cannot be read or shown; the message names the file and the key."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """One run's results.json.

    Args:
        method: name of the method.
        label: method plus its variant; runs with equal labels are repetitions.
        model: name of the base model.
        tasks: K names in training order.
        accuracy: accuracy[i][j] = performance on task i after training on task j in percent, None: not measured.
        op: overall performance (Eq. 10), percent.
        bwt: backward transfer (Eq. 11), percentage points; None for joint training and one task.
        fwt: forward transfer, percentage points, if measured.
        zero_shot: performance before any training in percent, if measured.
        seconds: training and evaluation.
        time: seconds by section: `train` and `evaluate`; `importance`, `threshold`, `fusion` are parts of `train`.
        steps: optimizer steps, `inner` and `outer`.
        seed: of the run.
        eval_split: rows that were scored.
        eval_mode: how they were scored.
        settings: hash of everything else that was configured; runs of different settings are no repetitions.
        skipped: steps that changed nothing because their gradient was not finite.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"allow_inf_nan": False}

    method: str
    label: str
    model: str
    tasks: list[str]
    accuracy: list[list[float | None]]
    op: float
    bwt: float | None
    fwt: float | None = None
    zero_shot: list[float] | None = None
    seconds: float
    time: dict[str, float]
    steps: dict[str, int] = field(default_factory=dict)
    seed: int
    eval_split: str
    eval_mode: str
    settings: str = ""
    skipped: int = 0
    peak_memory: int | None = None

    @property
    def update_share(self) -> float | None:
        """Percent of the training time spent after the backward pass; None without a training time."""
        train = self.time.get("train", 0.0)
        return 100.0 * sum(self.time.get(part, 0.0) for part in _UPDATE) / train if train > 0 else None

    @property
    def joint(self) -> bool:
        """Whether only the last column was measured, as when all tasks are trained together."""
        return len(self.tasks) > 1 and all(value is None for row in self.accuracy for value in row[:-1])


def load_results(run: Path) -> Results:
    """Read and check the results.json of a run folder.

    Raises ReportError naming the file, and the key where one is missing, of the wrong type or inconsistent.
    """
    path = run / "results.json"
    if not run.is_dir():
        raise ReportError(f"{run}: no such run folder")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ReportError(f"{path}: missing; a run writes it when it is finished") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}:{error.lineno}: invalid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # an integer of too many digits; nested too deeply
        raise ReportError(f"{path}: invalid JSON: {error}") from error
    return parse_results(content, str(path))


def load_runs(runs: Sequence[Path]) -> list[Results]:
    """As `load_results`; a label of runs that were configured otherwise gets the fields in which they differ.

    Where one of them has no readable config.yaml it stays as it is, and `group_runs` tells the runs apart by the hash.
    A folder that is named twice is one run.
    """
    runs = list({run.resolve(): run for run in runs}.values())
    results = [load_results(run) for run in runs]
    for label in {result.label for result in results}:
        same = [index for index, result in enumerate(results) if result.label == label]
        if len({results[index].settings for index in same}) > 1:
            for index, fields in zip(same, _differing([runs[index] for index in same]), strict=True):
                results[index] = replace(results[index], label=f"{label} ({fields})" if fields else label)
    return results


def _differing(runs: Sequence[Path]) -> list[str]:
    """Of each run the fields in which the runs' settings differ, `lr=0.001, epochs=2`; nothing if that is unknown."""
    from kif.training import settings  # imports torch

    configs = [settings(_configuration(run)) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    varying = [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]
    return [", ".join(f"{name}={config.get(name)}" for name in varying) if all(configs) else "" for config in configs]


def _configuration(run: Path) -> Mapping[str, Any]:
    """What a run's config.yaml holds, of whatever version it is; nothing if it cannot be read."""
    import yaml

    try:
        content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def parse_results(content: Any, where: str) -> Results:
    """Results from the content of results.json; ReportError as in `load_results`, with `where` as the file."""
    from pydantic import TypeAdapter, ValidationError

    try:
        results = TypeAdapter(Results).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "top level"
        raise ReportError(f"{where}: key '{key}': {first['msg'][:1].lower()}{first['msg'][1:]}") from error
    if len(results.tasks) != len(results.accuracy):
        raise ReportError(
            f"{where}: key 'accuracy': {len(results.accuracy)} rows for the {len(results.tasks)} names in 'tasks'"
        )
    if results.zero_shot is not None and len(results.zero_shot) != len(results.tasks):
        raise ReportError(
            f"{where}: key 'zero_shot': {len(results.zero_shot)} values for the {len(results.tasks)} names in 'tasks'"
        )
    try:
        performance = metrics.overall_performance(results.accuracy)
    except ValueError as error:
        raise ReportError(f"{where}: key 'accuracy': {error}") from error
    if abs(performance - results.op) > 0.1:
        raise ReportError(f"{where}: key 'op': {results.op:.2f}, but the last column's mean is {performance:.2f}")
    return results


def group_runs(results: Sequence[Results]) -> list[tuple[str, list[Results]]]:
    """Repetitions together, in order of first appearance: (name, runs).

    Runs are repetitions if they differ in the seed and in what was measured only. Where label alone does not
    tell two groups apart, their names carry the settings in which the given runs differ.
    """
    sequences = list(dict.fromkeys(tuple(result.tasks) for result in results))
    settings = {
        "tasks": [f"sequence {sequences.index(tuple(result.tasks)) + 1}" for result in results],
        "model": [result.model for result in results],
        "split": [result.eval_split for result in results],
        "mode": [result.eval_mode for result in results],
    }
    varying = [values for values in settings.values() if len(set(values)) > 1]
    configured: dict[str, set[str]] = {}
    for result in results:
        configured.setdefault(result.label, set()).add(result.settings)
    groups: dict[str, list[Results]] = {}
    for index, result in enumerate(results):
        parts = [values[index] for values in varying]
        # methods differ in what they are configured with; only runs of one label must not
        parts += [f"settings {result.settings}"] if len(configured[result.label]) > 1 else []
        suffix = ", ".join(parts)
        groups.setdefault(f"{result.label} ({suffix})" if suffix else result.label, []).append(result)
    return list(groups.items())
