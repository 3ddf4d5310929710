"""What the pages take from elsewhere when the site is built: sections of other files, and what `--help` prints.

<!-- include: FILE -->              a Markdown file of the project without its title
<!-- include: FILE#HEADING -->      the text under one heading of it
<!-- help: COMMAND -->              `kif COMMAND --help`
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"kif_kernels/README.md": "reference/kif_kernels.md"}
"""Pages that show files from outside of docs."""


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    here = posixpath.dirname(page.file.src_uri)

    def included(match: re.Match[str]) -> str:
        file, _, heading = match[1].partition("#")
        return links(section(file, heading), posixpath.dirname(file), here)

    markdown = links(markdown, posixpath.normpath(posixpath.join("docs", here)), here)
    markdown = re.sub(r"<!-- include: (.+?) -->", included, markdown)
    return re.sub(r"<!-- help: (\w*) -->", lambda match: f"```text\n{help_text(match[1])}\n```", markdown)


def section(file: str, heading: str = "") -> str:
    """The text under a heading, up to the next one of its level; without one, all but the title."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if not heading:
        return re.sub(r"\A# .*\n", "", text)
    match = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise ValueError(f"{file} has no heading {heading!r}")
    return match[2].strip()


def links(text: str, source: str, here: str) -> str:
    """Relative links of a file in the folder `source` of the project, as links of a page in the folder `here` of docs.

    Where they lead to no page, the text alone is left.
    """

    def moved(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if "://" in target or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(source, target))
        path = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if not path:
            return match[1]
        return f"[{match[1]}]({posixpath.relpath(path, here or '.')}{'#' if anchor else ''}{anchor})"

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)", moved, text)


def help_text(command: str) -> str:
    """What `kif COMMAND --help` prints, at one width everywhere."""
    from kif.cli import main

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = main([command, "--help"] if command else ["--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    if status != 0:
        raise RuntimeError(f"kif {command} --help ended with status {status}")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
    return "\n".join(line.rstrip() for line in plain.splitlines()).strip()
