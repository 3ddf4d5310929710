"""The README's Python example runs as it stands there, and what it says of presets and commands is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from kif.cli import COMMANDS
from kif.config import PRESETS, KIFConfig

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


TRAINER, LOOP = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_trainer_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(build_tiny("llama", tmp_path / "model"), pad_token="</s>")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    texts = ("the team won the match: Sports", "the market rose: Business", "the movie was good: Good")
    rows = [dict(tokenizer(text)) for text in texts]
    names: dict[str, Any] = {
        "model": model, "new_task": rows * 80, "memory": rows[:1],
        "collator": DataCollatorForLanguageModeling(tokenizer, mlm=False),
    }  # fmt: skip
    exec(compile(TRAINER, "README.md", "exec"), names)
    engine = names["trainer"].engine
    # 240 rows in batches of 8, three times: 90 steps, and a fusion after each eighth
    assert engine.rounds == 12 and engine.skipped.item() == 0 and len(names["memory"]) == 1 + 4
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_python_example_trains() -> None:
    example = LOOP
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
