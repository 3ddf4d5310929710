"""Replay memory from elsewhere: rows of earlier tasks in any place that `datasets` reads."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kif.stored import KnownTask
from kif.tasks import DataError, Example, _example, _kind, _lines, _parse, suggest

JSON = (".jsonl", ".json")
BUILDERS = {".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
"""Kinds of files that are read by `datasets`, by how their names end, `.gz` aside."""

COLUMNS = ("task", "instruction", "input", "label")

AS_TEXT: dict[str, Any] = {
    "converters": dict.fromkeys(COLUMNS, str), "keep_default_na": False, "na_values": {"references": [""]},
}  # fmt: skip
"""For pandas, which would take the labels 0 and 1 for numbers, True for a boolean, and None for nothing."""


def read_memory_data(place: str, tasks: Sequence[KnownTask]) -> dict[str, tuple[Example, ...]]:
    """Rows of the tasks that a run has learned, by task; in the form of `kif memory export`.

    Args:
        place: file (JSON lines or one JSON list, CSV, Parquet, Arrow), folder written by `Dataset.save_to_disk`, or
            name on the Hugging Face hub, whose split `train` is taken. Columns: task, instruction, input, label and, if
            wanted, references.
        tasks: tasks that rows may be of.
    Raises: ImportError without `datasets`, which JSON does not need; FileNotFoundError, or ValueError for a place that
        cannot be read; DataError naming the row (from 1; its line in CSV and JSON lines) for a column that is missing,
        an unknown task, and all that is refused in task folders.
    """
    known = {task.name: task for task in tasks}
    rows: dict[str, list[Example]] = {name: [] for name in known}
    path = Path(place)
    for number, row in _load(place):
        try:
            name, example = _read_row(path, number, row, known)
        except DataError as error:
            raise DataError(error.message, path, _line_of(path, number), error.field) from error
        rows[name].append(example)
    return {name: tuple(found) for name, found in rows.items()}


def _read_row(path: Path, number: int, row: dict[str, Any], known: Mapping[str, KnownTask]) -> tuple[str, Example]:
    """A row's task and what it holds."""
    # columns that some rows lack are None in them
    given = {name: row[name] for name in (*COLUMNS, "references") if row.get(name) is not None}
    name = given.pop("task", None)
    if not isinstance(name, str) or name not in known:
        raise DataError(
            f"{name!r} is no task of the run that is continued; {suggest(str(name), list(known))}",
            path, number, "task",
        )  # fmt: skip
    for column, value in given.items():
        # such as dates of Parquet, which JSON could not hold
        if not isinstance(value, (str, list, dict, int, float)):
            raise DataError(f"must be a text, not a {type(value).__name__}", path, number, column)
    return name, _example(path, number, json.dumps(given).encode(), known[name].labels)


def _line_of(path: Path, number: int) -> int | None:
    """The line in which a row begins: in CSV behind the header, where rows may have several; else its number.

    None where Python's csv does not find it.
    """
    if ".csv" not in path.suffixes[-2:]:
        return number
    unpacked = gzip.open if path.suffix == ".gz" else open
    with unpacked(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        reader, begins, seen = csv.reader(file), 1, -1
        try:
            for cells in reader:
                # blank lines are no rows
                seen += len(cells) > 1 or bool("".join(cells).strip())
                if seen == number:
                    return begins
                begins = reader.line_num + 1
        except csv.Error:
            return None
    return None


def _load(place: str) -> Iterable[tuple[int, dict[str, Any]]]:
    """Numbered rows."""
    path = Path(place)
    if _ending(path) in JSON and path.is_file():
        rows: Iterable[tuple[int, dict[str, Any]]] = _load_json(path)
        found = list(dict.fromkeys(name for _, row in rows for name in row))
        if not rows:
            raise ValueError(f"memory_data: {place} cannot be read: it holds no rows")
    else:
        dataset = _load_dataset(place)
        rows, found = enumerate(dataset, 1), dataset.column_names
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise DataError(f"lacks the columns {', '.join(missing)}; it has {', '.join(found)}", path)
    return rows


def _ending(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _load_json(path: Path) -> Sequence[tuple[int, dict[str, Any]]]:
    """Texts as they are, which `datasets` would take for dates where all of a column look like some."""
    lines = list(_lines(path))
    if not lines or not lines[0][1].lstrip().startswith(b"["):
        return [(number, _parse(path, number, line)) for number, line in lines]
    # an object of which it is the only field
    whole = b'{"rows":' + b"\n".join(line for _, line in lines) + b"}"
    rows = _parse(path, None, whole)["rows"]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"must be a JSON object, not {_kind(row)}", path, number)
    return list(enumerate(rows, 1))


def _load_dataset(place: str) -> Any:
    """A `datasets.Dataset`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError('memory_data needs the package datasets: pip install "recurrent-kif[hub]"') from error
    path = Path(place)
    try:
        if path.is_dir():
            found = datasets.load_from_disk(place)
        elif path.exists() or path.suffix or path.is_absolute():
            if not path.is_file():
                raise FileNotFoundError(f"memory_data: {place} does not exist")
            if _ending(path) not in BUILDERS:
                raise ValueError(f"memory_data: {place} must be a folder or end in {', '.join([*JSON, *BUILDERS])}")
            found = datasets.load_dataset(
                BUILDERS[_ending(path)],
                data_files=place,
                split="train",
                **(AS_TEXT if _ending(path) == ".csv" else {}),
            )
        else:
            found = datasets.load_dataset(place, split="train")
    except (FileNotFoundError, ValueError) as error:
        if str(error).startswith("memory_data"):
            raise
        raise ValueError(f"memory_data: {place} cannot be read: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of pyarrow, requests, huggingface_hub or datasets, by their versions
        # datasets says that something went wrong, its cause what did; an empty file ends in a StopIteration
        cause = error.__cause__ or error
        why = "it holds no rows" if isinstance(cause, StopIteration) else f"{type(cause).__name__}: {cause}"
        raise ValueError(f"memory_data: {place} cannot be read: {why}") from error
    if not isinstance(found, datasets.Dataset):
        raise ValueError(f"memory_data: {place} holds several splits: give one of them")
    return found
