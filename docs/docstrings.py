"""Docstrings as this project writes them, for the API reference: formulas as code, and `Returns: x` on one line."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """Paragraphs that are formulas throughout become code; sections of one line get a bold heading."""
    head, *rest = re.split(r"\n\n(?=\S)", text)
    return "\n\n".join([head, *(_paragraph(part) for part in rest)])


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if all(" <- " in line or re.match(r"^[a-z]+ = ", line) for line in lines):
        return "\n".join(["```text", *lines, "```"])
    # "Returns: x" in one line is no section to the parser, and neighbours must not run together
    parts = re.split(r"\n(?=(?:Returns|Raises): \S)", text)
    return "\n\n".join(re.sub(r"^(Returns|Raises): (?=\S)", r"**\1:** ", part) for part in parts)
