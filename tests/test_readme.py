"""The README's Python example runs as it stands there, and what it says of presets and commands is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kif.cli import COMMANDS
from kif.config import PRESETS, KIFConfig

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_example_trains() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line and not line.startswith(("import", "from"))]) <= 11
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    arena = names["engine"].arena
    assert names["model"].weight.data_ptr() == arena.data.data_ptr()
    assert arena.buffer("importance_in").any() and arena.buffer("importance_out").any()
    assert not arena.grad.any() and names["engine"].skipped.item() == 0


@pytest.mark.parametrize("column, preset", [(1, "paper"), (2, "released-code")])
def test_preset_table_is_the_code(column: int, preset: str) -> None:
    rows = [line.split("|")[1:-1] for line in README.splitlines() if re.match(r"\| `\w+`", line)]
    seen = set()
    for row in rows:
        values = [cell.partition("(")[0].partition(":")[0].strip().replace("`", "") for cell in row]
        for name, value in zip(values[0].split(", "), _spread(values[column], values[0].count(",") + 1), strict=True):
            assert str(getattr(KIFConfig.preset(preset), name)) == value, name
            seen.add(name)
    assert seen >= set(PRESETS["released-code"]) - {"uncertainty_decay"}


def _spread(value: str, count: int) -> list[str]:
    parts = value.split(", ")
    return parts if len(parts) == count else parts * count


def test_every_command_shown_exists() -> None:
    shown = set(re.findall(r"^kif (\w+)", README, re.MULTILINE))
    assert shown and shown <= set(COMMANDS)
