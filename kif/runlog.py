"""metrics.jsonl: what happened in a run, one record a line."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from kif import faults
from kif.distributed import world
from kif.progress import Progress

Record = dict[str, Any]
State = dict[str, Any]


class RunLog:
    """metrics.jsonl, one record a line, and the progress bar; processes but the first one write nothing.

    Args:
        path: the file.
        bar: shows the records of the training loop.
        state: a checkpoint to continue from; records after it are cut off. None: a new file.
    """

    def __init__(self, path: Path, bar: Progress, state: State | None) -> None:
        self._path, self._bar = path, bar
        self._stream: TextIO | None = None
        if world()[0] == 0:
            if state is not None:
                _cut(path, state["logged"])
            self._stream = path.open("w" if state is None else "a")

    def __call__(self, record: Record) -> None:
        """Raises: DiskFull."""
        if self._stream is None:
            return
        line = json.dumps(record) + "\n"
        with faults.disk_space(self._path, len(line)):
            self._stream.write(line)
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
            # all that could be written has been
            with suppress(OSError):
                self._stream.close()


def _cut(path: Path, size: int) -> None:
    """Cut a log to the bytes that it had at a checkpoint; says if it has lost some of them since."""
    found = path.stat().st_size if path.is_file() else 0
    if found < size:
        warnings.warn(f"{path} has {found} of the {size} bytes that were logged before the checkpoint", stacklevel=4)
    else:
        os.truncate(path, size)
