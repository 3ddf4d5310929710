"""Tasks as they lie on disk: JSON-lines files of prompts and answers, read and checked before anything is trained.

    FOLDER/manifest.json                             optional: metric, label list and prompt template
    FOLDER/orders.json                               named task orders
    FOLDER/<task>/{train,validation,test}.jsonl      or .jsonl.gz; a row is {"instruction", "input", "label"}

A row may also hold `references`, a list of further acceptable outputs; other keys are left alone. Blank lines are
skipped. Whatever is wrong raises `DataError`, which names file, line and field.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import json
import os
import random
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

DEFAULT_TEMPLATE = "{instruction}{input}\nAnswer:"
SPLITS = ("train", "validation", "test")
_SUFFIXES = (".jsonl", ".jsonl.gz")
_TASK_KEYS = ("metric", "labels")
"""What is read of a task's entry in manifest.json; others may describe the task."""


class DataError(ValueError):
    """Data that cannot be used. `path`, `line` (from 1) and `field` say where, `message` what."""

    def __init__(
        self, message: str, path: str | Path | None = None, line: int | None = None, field: str | None = None
    ) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + ("" if field is None else f"field '{field}': ") + message)
        self.message = message
        self.path = None if path is None else Path(path)
        self.line = line
        self.field = field


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `references` are all acceptable outputs; the first is `label`, the one that is trained on."""

    instruction: str
    input: str
    label: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task and its rows.

    Args:
        name: name of its folder.
        metric: `accuracy` (exact match) or `rougeL`.
        labels: the allowed labels in prompt order, or None for free text.
        template: prompt with the places {instruction} and {input}.
        train: rows to learn from.
        validation: rows of the file of that name; empty if there is none.
        test: rows to score; empty if there is no such file.
        heldout: rows that `hold_out` moved out of `train`.
        folder: where the task was read from, for messages.
    """

    name: str
    metric: Literal["accuracy", "rougeL"]
    labels: tuple[str, ...] | None
    template: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    heldout: tuple[Example, ...] = ()
    folder: Path | None = field(default=None, compare=False)

    def prompt(self, example: Example) -> str:
        """The template filled with the row's texts, which may hold braces themselves."""
        parts = {"{instruction}": example.instruction, "{input}": example.input}
        return re.sub(r"\{(?:instruction|input)\}", lambda place: parts[place[0]], self.template)

    def rows(self, split: str) -> tuple[Example, ...]:
        """Rows of `train`, `validation`, `test` or `heldout`.

        Raises:
            DataError: the split is empty; the message names the missing file.
            ValueError: there is no split of that name.
        """
        if split not in (*SPLITS, "heldout"):
            raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}, heldout")
        rows: tuple[Example, ...] = getattr(self, split)
        if not rows and split == "heldout":
            raise DataError(f"task {self.name}: no rows of train were held out")
        if not rows:
            file = Path(self.name if self.folder is None else self.folder) / f"{split}.jsonl"
            raise DataError(f"task {self.name} has no {split} rows: this file (or .jsonl.gz) is missing or empty", file)
        return rows


def load_tasks(folder: str | Path, names: Sequence[str]) -> list[Task]:
    """Read the named tasks, in that order. All of their files are read and checked before anything is returned.

    Raises:
        DataError: a folder, task, file or row cannot be used.
    """
    folder = Path(folder)
    available = _task_names(folder)
    if not names:
        raise DataError(f"no task is named; there are {', '.join(available)}", folder)
    for name, count in Counter(names).items():
        if name not in available:
            raise DataError(f"unknown task {name!r}; {suggest(name, available)}", folder)
        if count > 1:
            raise DataError(f"task {name!r} is named {count} times", folder)
    manifest = _read_object(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    return [_load_task(folder, name, manifest) for name in names]


def load_order(folder: str | Path, order: str) -> list[str]:
    """The task names of a named order in FOLDER/orders.json, in training order.

    Raises:
        DataError: no such file or order, or it does not hold a list of names of tasks in FOLDER.
    """
    path = Path(folder) / "orders.json"
    available = _task_names(Path(folder))  # a wrong folder is the likelier reason, and has its own message
    if not path.is_file():
        raise DataError("no such file, so there are no named orders; name the tasks themselves", path)
    orders = _read_object(path)
    if order not in orders:
        raise DataError(f"unknown order {order!r}; {suggest(order, list(orders))}", path)
    tasks = orders[order].get("tasks") if isinstance(orders[order], dict) else None
    if not isinstance(tasks, list) or not tasks or not all(isinstance(name, str) for name in tasks):
        raise DataError("must hold a list of task names", path, field=f"{order}.tasks")
    for name in tasks:
        if name not in available:
            raise DataError(f"unknown task {name!r}; {suggest(name, available)}", path, field=f"{order}.tasks")
    return list(tasks)


def hold_out(task: Task, share: float, seed: int) -> Task:
    """Move a random share of `train` to `heldout`, the same share of each label: at least one row, never all.

    Raises:
        DataError: train has fewer than two rows.
    """
    if len(task.train) < 2:
        raise DataError(f"task {task.name}: {len(task.train)} train rows cannot be split into train and heldout")
    shuffled = list(range(len(task.train)))
    random.Random(f"{task.name}/heldout/{seed}").shuffle(shuffled)
    label = [row.label if task.labels else "" for row in task.train]
    size, seen, depth = Counter(label), Counter[str](), {}
    for index in shuffled:
        depth[index] = (seen[label[index]] + 0.5) / size[label[index]]  # how far down its label's shuffled rows
        seen[label[index]] += 1
    count = min(max(1, round(share * len(shuffled))), len(shuffled) - 1)
    chosen = set(sorted(shuffled, key=depth.__getitem__)[:count])
    return replace(
        task,
        train=tuple(row for i, row in enumerate(task.train) if i not in chosen),
        heldout=tuple(row for i, row in enumerate(task.train) if i in chosen),
    )


def limit_rows(rows: tuple[Example, ...], limit: int | None, key: str) -> tuple[Example, ...]:
    """At most `limit` rows: a random subset fixed by `key` (such as "dbpedia/test"), in source order."""
    if limit is None or limit >= len(rows):
        return rows
    return tuple(rows[i] for i in sorted(random.Random(key).sample(range(len(rows)), limit)))


def write_rows(path: Path, instruction: str, rows: Iterable[tuple[str, str]]) -> None:
    """Write rows (input, label) of one instruction as a file that `load_tasks` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for source, label in rows:
            file.write(json.dumps({"instruction": instruction, "input": source, "label": label}) + "\n")


def _task_names(folder: Path) -> list[str]:
    """Sorted names of the task folders in `folder`; DataError if there is none."""
    if not folder.is_dir():
        raise DataError("no such folder", folder)

    def tasks_in(parent: Path) -> list[str]:
        files = [child / f"{split}{suffix}" for child in _folders(parent) for split in SPLITS for suffix in _SUFFIXES]
        return sorted({file.parent.name for file in files if file.is_file()})

    names = tasks_in(folder)
    if not names:
        inside = sorted(str(child) for child in _folders(folder) if tasks_in(child))
        hint = f"but {' and '.join(inside)} do: name one of these" if inside else "<task>/train.jsonl (or .jsonl.gz)"
        raise DataError(f"holds no tasks{', ' if inside else ': there is no '}{hint}", folder)
    return names


def _folders(parent: Path) -> list[Path]:
    try:
        return [child for child in parent.iterdir() if child.is_dir()]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", parent) from error


def suggest(name: str, known: Sequence[str]) -> str:
    """What to say of an unknown name: the nearest known one, and what there is."""
    name, lower = name.lower(), {k.lower(): k for k in known}
    near = difflib.get_close_matches(name, lower, n=1) or [k for k in lower if name and k.startswith(name)]
    more = "" if len(known) <= 15 else f", ... ({len(known)} in all)"
    return (f"did you mean {lower[near[0]]!r}? " if near else "") + f"there are {', '.join(known[:15])}{more}"


def _suggest_label(answer: str, labels: Sequence[str]) -> str:
    """As `suggest`; of a label that looks like a known one it is said which characters differ."""

    def visible(text: str) -> str:
        plain = unicodedata.normalize("NFKC", text)
        return "".join(character for character in plain if unicodedata.category(character) not in ("Cf", "Cc")).strip()

    def codes(text: str) -> str:
        return " ".join(f"U+{ord(character):04X}" for character in text)

    for label in labels:
        if visible(label) == visible(answer):
            return f"it looks like {label!r}, but its characters are {codes(answer)} and not {codes(label)}"
    return suggest(answer, labels)


def _load_task(folder: Path, name: str, manifest: dict[str, Any]) -> Task:
    path = folder / "manifest.json"
    template = manifest.get("prompt_template", DEFAULT_TEMPLATE)
    if not isinstance(template, str) or "{instruction}" not in template or "{input}" not in template:
        raise DataError("must be a text with {instruction} and {input}", path, field="prompt_template")
    tasks = manifest.get("tasks", {name: {}})
    entry = tasks.get(name) if isinstance(tasks, dict) else None
    if not isinstance(entry, dict):
        raise DataError(f"has no entry for the task folder {name!r}", path, field="tasks")
    for key in entry:
        close = difflib.get_close_matches(key.lower(), _TASK_KEYS, 1, 0.8)
        if close and close[0] not in entry:  # it would be left to its default
            raise DataError(f"unknown key {key!r}; did you mean {close[0]!r}?", path, field=f"tasks.{name}")
    metric, labels = entry.get("metric", "accuracy"), entry.get("labels")
    if metric not in ("accuracy", "rougeL"):
        raise DataError(f"must be accuracy or rougeL, not {metric!r}", path, field=f"tasks.{name}.metric")
    if labels is not None:
        named = isinstance(labels, list) and all(isinstance(label, str) and label.strip() for label in labels)
        if not named or not labels:
            raise DataError("must be null or a list of different texts", path, field=f"tasks.{name}.labels")
        # Answers are compared without case and outer blanks, so labels must differ beyond these.
        seen: dict[str, str] = {}
        for label in labels:
            form = label.strip().lower()
            if form in seen:
                raise DataError(
                    "must be null or a list of different texts, beyond case and outer blanks; "
                    f"{seen[form]!r} and {label!r} are not",
                    path, field=f"tasks.{name}.labels",
                )  # fmt: skip
            seen[form] = label
        labels = tuple(labels)
    splits = {split: _read_split(folder / name, split, labels) for split in SPLITS}
    if not splits["train"]:
        raise DataError(f"task {name!r} is empty: no train rows", folder / name / "train.jsonl")
    return Task(name, cast(Literal["accuracy", "rougeL"], metric), labels, template, **splits, folder=folder / name)


def _read_split(folder: Path, split: str, labels: tuple[str, ...] | None) -> tuple[Example, ...]:
    files = [folder / f"{split}{suffix}" for suffix in _SUFFIXES if (folder / f"{split}{suffix}").exists()]
    if len(files) > 1:
        raise DataError(f"lies beside {files[1].name}: keep one of the two", files[0])
    rows: list[Example] = []
    errors: list[DataError] = []
    for path in files:
        for number, line in _lines(path):
            try:
                rows.append(_example(path, number, line, labels))
            except DataError as error:
                errors.append(error)
    if errors:
        first, others = errors[0], [str(error.line) for error in errors[1:]]
        more = f" (bad too: line {', '.join(others[:9])}{', ...' if len(others) > 9 else ''})" if others else ""
        raise DataError(first.message + more, first.path, first.line, first.field) from first
    return tuple(rows)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a plain or gzip file that are not blank."""
    try:
        data = _content(path)
        if path.suffix == ".gz":
            with sound_gzip(path):
                data = gzip.decompress(data)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path) from error
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            yield number, line


@contextmanager
def sound_gzip(path: Path) -> Iterator[None]:
    """Within the block what a broken gzip file raises is a DataError of it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"broken gzip file: {error}", path) from error


def _content(path: Path) -> bytes:
    """All bytes of a file that nobody writes to meanwhile. Raises: DataError where somebody did; OSError."""
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        data = file.read()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError("changed while it was read: try again when it is complete", path)
    return data


def _parse(path: Path, number: int | None, data: bytes) -> dict[str, Any]:
    """One JSON object."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}", path, number) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if number is None else ""
        raise DataError(f"invalid JSON: {error.msg} ({where}column {error.colno})", path, number) from error
    except (ValueError, RecursionError) as error:  # an integer of too many digits; nested too deeply
        raise DataError(f"invalid JSON: {error}", path, number) from error
    if not isinstance(value, dict):
        raise DataError(f"must be a JSON object, not {_kind(value)}", path, number)
    return value


def _read_object(path: Path) -> dict[str, Any]:
    return _parse(path, None, b"\n".join(line for _, line in _lines(path)))


def _example(path: Path, number: int, line: bytes, labels: tuple[str, ...] | None) -> Example:
    row = _parse(path, number, line)

    def text(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise DataError(f"must be a text, not {_kind(value)}", path, number, name)
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError("holds half a surrogate pair, which is no character", path, number, name)
        return value

    for name in ("instruction", "input", "label"):
        if name not in row:
            raise DataError("is missing", path, number, name)
    instruction, source, label = (text(name, row[name]) for name in ("instruction", "input", "label"))
    if not (instruction + source).strip():
        raise DataError("is empty, and so is 'instruction'", path, number, "input")
    others = row.get("references", [])
    if not isinstance(others, list):
        raise DataError(f"must be a list of texts, not {_kind(others)}", path, number, "references")
    answers = [("label", label), *(("references", text("references", other)) for other in others)]
    for name, answer in answers:
        if not answer.strip():
            raise DataError("is empty, so there is nothing to learn or score: delete this line", path, number, name)
        if labels is not None and answer not in labels:
            raise DataError(
                f"{answer!r} is no label of this task; {_suggest_label(answer, labels)}", path, number, name
            )
    return Example(instruction, source, label, tuple(dict.fromkeys(answer for _, answer in answers)))


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
