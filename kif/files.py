"""Files that are written whole or not at all, and are on disk when the call returns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kif.faults import disk_space


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
