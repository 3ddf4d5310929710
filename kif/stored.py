"""What a finished run keeps, to be continued, looked at and thinned out.

RUN/tasks.json            the tasks learned so far: metric, labels, template, instruction
RUN/memory/<task>.jsonl   the replay memory as text, rows as in a task folder; of methods that replay only
RUN/final/                the method's state (`kif.checkpoint`), which holds no rows
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kif.config import SECTIONS, RunConfig
from kif.files import write_text
from kif.tasks import DataError, Example, Task, _example, _lines, _read_object, suggest

TASKS, MEMORY, FINAL = "tasks.json", "memory", "final"

FREE = (
    "data", "order", "tasks", "output", "resume", "continue_from", "checkpoint_rounds", "keep_checkpoints", "device",
    "shard_base", "cache_dir", "limit_train", "limit_eval", "lr", "outer_lr", "epochs", "steps_per_task", "batch_size",
    "outer_batch_size", "gradient_accumulation", "gradient_checkpointing", "cuda_graphs", "use_liger_kernel",
    "warmup_steps", "weight_decay", "beta1", "beta2", "eps", "max_grad_norm", "memory_fraction", "memory_balanced",
    "memory_data", "eval_split", "holdout", "eval_mode", "eval_batch_size", "max_new_tokens", "eval_forward",
)  # fmt: skip
"""Fields of RunConfig that a continued run may have otherwise than the run before it."""


@dataclass(frozen=True)
class KnownTask:
    """A task that a run has learned.

    Args:
        name, metric, labels, template: as in `Task`.
        instruction: of all its training rows; None where they differ.
        scored: hash of the rows that were scored; None: none were.
    """

    name: str
    metric: Literal["accuracy", "rougeL"]
    labels: tuple[str, ...] | None
    template: str
    instruction: str | None
    scored: str | None

    def task(self) -> Task:
        """The task without rows."""
        return Task(self.name, self.metric, self.labels, self.template, ())


@dataclass(frozen=True)
class Earlier:
    """A finished run that another one continues.

    Args:
        run: its folder.
        config: its configuration.
        tasks: what it and the runs before it learned, in that order.
        adapter_tasks: the number of tasks that its adapter was made for.
        memory: replay rows of each task.
        accuracy: its scores in percent, by task and by the task after whose training they were taken.
        zero_shot: scores before any training.
    """

    run: Path
    config: RunConfig
    tasks: tuple[KnownTask, ...]
    adapter_tasks: int
    memory: Mapping[str, tuple[Example, ...]]
    accuracy: Mapping[tuple[str, str], float]
    zero_shot: Mapping[str, float]


def rows_key(task: Task, rows: Sequence[Example]) -> str:
    """Hash of all that a score of the rows depends on besides model and settings."""
    content = [task.template, task.labels, task.metric, [[row.instruction, row.input, row.references] for row in rows]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def known_task(task: Task, scored: Sequence[Example], earlier: KnownTask | None) -> KnownTask:
    """What is kept of a task that was trained here or in an `earlier` run."""
    instructions = {row.instruction for row in task.train}
    instruction = instructions.pop() if len(instructions) == 1 else None
    if earlier is not None:
        instruction = earlier.instruction
    return KnownTask(task.name, task.metric, task.labels, task.template, instruction, rows_key(task, scored))


def keep(
    run: Path,
    tasks: Sequence[KnownTask],
    adapter_tasks: int,
    memory: Mapping[str, Sequence[Example]],
    state: dict[str, Any],
) -> None:
    """Write all three. `state` is {"method": its state_dict, "random": of `kif.checkpoint.random_state`}."""
    from kif.checkpoint import Checkpoints

    _write(run / TASKS, [json.dumps({"adapter_tasks": adapter_tasks, "tasks": [asdict(t) for t in tasks]}, indent=1)])
    if memory:
        (run / MEMORY).mkdir(exist_ok=True)
    for name, rows in memory.items():
        _write(run / MEMORY / f"{name}.jsonl", map(_line, rows))
    if "pseudo" in state["method"]:
        # rows that LFPT5 wrote itself may repeat what it was trained on, and the next task makes new ones
        state = {**state, "method": {**state["method"], "pseudo": []}}
    shutil.rmtree(run / FINAL, ignore_errors=True)
    Checkpoints(run / FINAL).write(state)


def read_tasks(run: Path) -> tuple[tuple[KnownTask, ...], int]:
    """(the tasks that a run has learned, the number of tasks its adapter was made for).

    Raises: FileNotFoundError for a folder without; DataError naming the file if it is damaged.
    """
    path = run / TASKS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {run} is no finished run, or one of an older version")
    from pydantic import TypeAdapter, ValidationError

    content = _read_object(path)
    try:
        tasks = TypeAdapter(tuple[KnownTask, ...]).validate_python(content.get("tasks"))
        adapter_tasks = TypeAdapter(int).validate_python(content.get("adapter_tasks"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"is damaged: {key + ': ' if key else ''}{first['msg']}", path) from error
    for task in tasks:
        # names are parts of paths
        if task.name in ("", ".", "..") or set(task.name) & {"/", "\0"}:
            raise DataError(f"is damaged: {task.name!r} cannot be a task's name", path)
    return tasks, adapter_tasks


def read_memory(run: Path, task: KnownTask) -> list[tuple[int, Example]]:
    """The stored rows of a task with their line numbers. Raises: DataError naming file, line and field."""
    path = run / MEMORY / f"{task.name}.jsonl"
    if not path.is_file():
        return []
    return [(number, _example(path, number, line, task.labels)) for number, line in _lines(path)]


def read_earlier(run: Path) -> Earlier:
    """A finished run, to continue it. Raises: FileNotFoundError or ValueError naming the file that is not as needed."""
    from kif.configfile import load_config
    from kif.results import load_results

    tasks, adapter_tasks = read_tasks(run)
    results = load_results(run)
    accuracy = {
        (task, after): score
        for task, scores in zip(results.tasks, results.accuracy, strict=True)
        for after, score in zip(results.tasks, scores, strict=True)
        if score is not None
    }
    memory = {task.name: tuple(row for _, row in read_memory(run, task)) for task in tasks}
    zero_shot = dict(zip(results.tasks, results.zero_shot or (), strict=False))
    return Earlier(run, load_config(run / "config.yaml"), tasks, adapter_tasks, memory, accuracy, zero_shot)


def check_memory(earlier: Earlier) -> None:
    """Raise DataError for a missing file of rows; an empty one was left by `drop`."""
    for task in earlier.tasks:
        path = earlier.run / MEMORY / f"{task.name}.jsonl"
        if not path.is_file():
            raise DataError(
                f"is missing: it holds the rows of task {task.name} to replay; put it back, or give rows of "
                "all earlier tasks by memory_data, which takes the place of what is stored",
                path,
            )


def read_state(run: Path, device: Any) -> dict[str, Any]:
    """What `keep` wrote into final/, its tensors on a device. Raises: ValueError if it is missing or damaged."""
    from kif.checkpoint import Checkpoints

    state = Checkpoints(run / FINAL).read(device)
    if state is None:
        raise ValueError(f"{run / FINAL} holds no state to continue from: it is missing or damaged")
    return state


def check_continues(config: RunConfig, earlier: Earlier) -> None:
    """Raise ValueError where `config` cannot go on from `earlier`: another method, model or adapter, named with both
    values; held-out rows to score that the earlier run trained on.
    """
    from kif.checkpoint import difference
    from kif.methods import METHODS
    from kif.models import _same_model

    own = METHODS[earlier.config.method].section
    free = {*FREE, *(section for section in SECTIONS if section != own)}
    then, now = (
        {name: value for name, value in asdict(c).items() if name not in free} for c in (earlier.config, config)
    )
    if _same_model(then["model"], now["model"]):
        then["model"] = now["model"]
    found = difference(then, now)
    if found is not None:
        name, old, new = found
        raise ValueError(
            f"{earlier.run} was trained with {name}={old!r}, which holds for what continues it; got {new!r}"
        )
    kept_back = [c.holdout if c.eval_split == "heldout" else None for c in (earlier.config, config)]
    if kept_back[1] is not None and kept_back[0] != kept_back[1]:
        raise ValueError(
            f"{earlier.run} was trained with eval_split={earlier.config.eval_split!r}, "
            f"holdout={earlier.config.holdout}: it has seen rows that eval_split='heldout', holdout={config.holdout} "
            "would score"
        )


def check_method(method: Any, tasks: Sequence[Task]) -> None:
    """Raise ValueError for a method that cannot go on with `tasks`, of which old ones may be without rows."""
    from kif.methods import Method

    if any(len(phase) > 1 for phase in method.phases(tasks)):
        raise ValueError(
            f"{method.name} trains all its tasks together and cannot continue: train it anew on all of them"
        )
    absent = [task.name for task in tasks if not task.train]
    if absent and type(method).phases is not Method.phases:
        raise ValueError(
            f"{method.name} needs the earlier tasks' own rows to continue; the data folder lacks {', '.join(absent)}"
        )


def check_classes(lm: Any, config: RunConfig, known: Sequence[KnownTask]) -> None:
    """Raise ValueError where a classification layer would need further classes."""
    if lm.family != "encoder" or config.head != "linear":
        return
    old = {label for task in known for label in task.labels or ()}
    more = [label for label in lm.classes if label not in old]
    if more:
        raise ValueError(
            f"head=linear has a classification layer for the {len(old)} labels of the run that is continued, and none "
            f"for {', '.join(more[:9])}"
        )


def show(run: Path, rows: bool = False) -> list[str]:
    """Lines that say what is stored: rows, bytes and labels of each task and, with `rows`, the rows by line number."""
    lines: list[str] = []
    tasks, _ = read_tasks(run)
    if not (run / MEMORY).is_dir():
        return [f"no rows are stored in {run}: its method does not replay any"]
    for task in tasks:
        stored = read_memory(run, task)
        path = run / MEMORY / f"{task.name}.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        counts = Counter(row.label for _, row in stored) if task.labels else {}
        named = ", ".join(f"{label}: {count}" for label, count in counts.items())
        lines.append(f"{task.name}: {len(stored)} rows, {size} bytes" + (f" ({named})" if named else ""))
        lines += [f"  {number}: {_line(row)}" for number, row in stored if rows]
    return lines


def export_rows(run: Path, file: Path) -> int:
    """Write all stored rows, each with its `task`, as one JSON-lines file; returns their number.

    Raises: FileExistsError for a file that exists.
    """
    if file.exists():
        raise FileExistsError(f"{file} exists: choose another name, or remove it")
    found = [(task.name, row) for task in read_tasks(run)[0] for _, row in read_memory(run, task)]
    _write(file, [json.dumps({"task": name, **_fields(row)}, ensure_ascii=False) for name, row in found])
    return len(found)


def drop(run: Path, name: str, match: str | None, lines: Collection[int], everything: bool) -> tuple[int, int]:
    """Remove stored rows of a task; returns (how many, how many are left).

    Args:
        run: run folder.
        name: the task.
        match: rows that hold this in any of their texts, whatever its case and Unicode form.
        lines: rows of these line numbers. With neither, all rows.
        everything: whether no row may be left.
    Raises: ValueError for an unknown task or line, an empty text, and where no row would be left although `everything`
        is false.
    """
    if match == "":
        raise ValueError("--match needs a text")
    tasks = {task.name: task for task in read_tasks(run)[0]}
    if name not in tasks:
        raise ValueError(f"{run} has learned no task {name!r}; {suggest(name, list(tasks))}")
    stored = read_memory(run, tasks[name])
    path = run / MEMORY / f"{name}.jsonl"
    unknown = [number for number in lines if number not in {line for line, _ in stored}]
    if unknown:
        raise ValueError(f"{path} has no row in line {unknown[0]}; it holds {len(stored)} rows")

    def goes(number: int, row: Example) -> bool:
        if match is not None:
            texts = (row.instruction, row.input, *row.references)
            return any(_folded(match) in _folded(text) for text in texts)
        return not lines or number in lines

    left = [row for number, row in stored if not goes(number, row)]
    if stored and not left and not everything:
        raise ValueError(f"that would remove all {len(stored)} rows of task {name}: give --yes if it is meant")
    if len(left) < len(stored):
        _write(path, map(_line, left))
    return len(stored) - len(left), len(left)


def _folded(text: str) -> str:
    """A text without its case, the same for all Unicode forms of it."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def command(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """`kif memory`; returns the exit status."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    showing = actions.add_parser("show", help="rows, bytes and labels of each task", allow_abbrev=False)
    exporting = actions.add_parser("export", help="write all rows to one file", allow_abbrev=False)
    dropping = actions.add_parser("drop", help="remove rows for good", allow_abbrev=False)
    for action in (showing, exporting, dropping):
        action.add_argument("run", type=Path, metavar="RUN", help="run folder")
    showing.add_argument("--rows", action="store_true", help="print the rows too, with their line numbers")
    exporting.add_argument("file", type=Path, metavar="FILE", help="JSON-lines file to write")
    dropping.add_argument("--task", required=True, metavar="TASK", help="whose rows")
    which = dropping.add_mutually_exclusive_group()
    which.add_argument("--match", metavar="TEXT", help="rows that hold TEXT, in any case and Unicode form")
    which.add_argument("--line", type=int, nargs="+", default=[], metavar="N", help="rows by line number, see show")
    dropping.add_argument("--yes", action="store_true", help="also if no row of the task is left")
    options = parser.parse_args(argv)
    if options.action == "show":
        print("\n".join(show(options.run, options.rows)))
    elif options.action == "export":
        print(f"{export_rows(options.run, options.file)} rows written: {options.file}")
    else:
        gone, left = drop(options.run, options.task, options.match, options.line, options.yes)
        print(f"task {options.task}: {gone} rows removed, {left} left")
        if gone:
            print(f"Not touched: {_elsewhere(options.run)}, and what the model has learned from them.")
    return 0


def _elsewhere(run: Path) -> str:
    """Where removed rows may still be, in words."""
    from kif.configfile import load_config
    from kif.tokenization import cache_folder

    config = load_config(run / "config.yaml")
    earlier = f", {Path(config.continue_from) / MEMORY}" if config.continue_from else ""
    return (
        f"the task folder {config.data}, tokenised texts in {cache_folder(config.cache_dir)}{earlier}, the memory of "
        "runs that continue this one"
    )


def _fields(row: Example) -> dict[str, Any]:
    fields = {"instruction": row.instruction, "input": row.input, "label": row.label}
    return fields if row.references == (row.label,) else {**fields, "references": list(row.references)}


def _line(row: Example) -> str:
    return json.dumps(_fields(row), ensure_ascii=False)


def _write(path: Path, lines: Iterable[str]) -> None:
    write_text(path, "".join(f"{line}\n" for line in lines))
