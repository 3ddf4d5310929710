"""Replay memory from elsewhere: rows of earlier tasks in any place that `datasets` reads."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kif.stored import KnownTask
from kif.tasks import DataError, Example, _example, suggest

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
"""Kinds of files by how their names end, `.gz` aside."""

COLUMNS = ("task", "instruction", "input", "label")


def read_memory_data(place: str, tasks: Sequence[KnownTask]) -> dict[str, tuple[Example, ...]]:
    """Rows of the tasks that a run has learned, by task; in the form of `kif memory export`.

    Args:
        place: file (JSON lines, CSV, Parquet, Arrow), folder written by `Dataset.save_to_disk`, or name on the Hugging
            Face hub, whose split `train` is taken. Columns: task, instruction, input, label and, if wanted, references.
        tasks: tasks that rows may be of.
    Raises: ImportError without `datasets`; FileNotFoundError, or ValueError for a place that it cannot read; DataError
        naming the row (from 1; in CSV its line) for a column that is missing, an unknown task, and all that is refused
        in task folders.
    """
    known = {task.name: task for task in tasks}
    rows: dict[str, list[Example]] = {name: [] for name in known}
    path = Path(place)
    for number, row in enumerate(_load(place), 1):
        try:
            name, example = _read_row(path, number, row, known)
        except DataError as error:
            raise DataError(error.message, path, _line_of(path, number), error.field) from error
        rows[name].append(example)
    return {name: tuple(found) for name, found in rows.items()}


def _read_row(path: Path, number: int, row: dict[str, Any], known: Mapping[str, KnownTask]) -> tuple[str, Example]:
    """A row's task and what it holds."""
    # columns that some rows lack are None in them
    given = {name: value for name, value in row.items() if value is not None}
    if given.get("task") not in known:
        raise DataError(
            f"{given.get('task')!r} is no task of the run that is continued; "
            f"{suggest(str(given.get('task')), list(known))}",
            path, number, "task",
        )  # fmt: skip
    task = known[given.pop("task")]
    line = json.dumps({name: given[name] for name in (*COLUMNS[1:], "references") if name in given}).encode()
    return task.name, _example(path, number, line, task.labels)


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


def _load(place: str) -> Any:
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
            ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
            if not path.is_file():
                raise FileNotFoundError(f"memory_data: {place} does not exist")
            if ending not in BUILDERS:
                raise ValueError(f"memory_data: {place} must be a folder or end in {', '.join(BUILDERS)}")
            found = datasets.load_dataset(BUILDERS[ending], data_files=place, split="train")
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
    missing = [name for name in COLUMNS if name not in found.column_names]
    if missing:
        raise DataError(f"lacks the columns {', '.join(missing)}; it has {', '.join(found.column_names)}", path)
    return found
