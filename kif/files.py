"""Files that are written whole or not at all, and are on disk when the call returns; folders that one process holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from kif.faults import disk_space

LOCK = ".kif-lock"
"""In a run folder while a run writes it; one that was killed leaves it, and it then says nothing."""


def write_text(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text: temporary file, fsync, rename.

    Raises: DiskFull; OSError for anything else that is wrong with the place.
    """
    content = text.encode()
    temporary = path.with_name(path.name + ".tmp")
    with disk_space(path, len(content)):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def sync(path: Path) -> None:
    """Have a file or a folder on disk, not in the system's cache only."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_empty(output: Path) -> bool:
    """Whether a folder holds nothing but a lock."""
    return all(path.name == LOCK for path in output.iterdir())


@contextmanager
def claimed(output: Path) -> Iterator[int]:
    """Make a run's folder and hold it for the body, so that no other process writes it; a failed start leaves none.

    The system ends the claim with the process, whatever ends that, and with those that it has passed the yielded file
    descriptor. Where it has no locks, nothing is held.

    Raises: FileExistsError for a folder that another process holds; ValueError where it cannot be written; DiskFull.
    """
    path = output / LOCK
    try:
        with disk_space(output):
            made = not output.exists()
            output.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror}; choose another --output") from error
    with file:
        if _is_held(file, path):
            raise FileExistsError(f"{output} is being written by another process: choose another --output, or wait")
        try:
            yield file.fileno()
        finally:
            with suppress(OSError):
                path.unlink()
                if made:
                    # fails where anything is in it
                    output.rmdir()


def _is_held(file: IO[bytes], path: Path) -> bool:
    """Lock a file, or say that another process has it, or had it and removed it since it was opened here."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()))
