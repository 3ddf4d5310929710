"""`kif memory`: what is stored of a run is shown, exported and removed."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
import torch

from kif.cli import main
from kif.config import RunConfig
from kif.configfile import dump_config
from kif.stored import KnownTask, keep, known_task, read_earlier, read_memory, read_tasks
from kif.tasks import DataError, Example, Task

FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
LABELS = ("red", "green")
ROWS = [
    Example("Which? ", "Jane Doe\u2028 likes red", "red", ("red",)),
    Example("Which? ", "a green door", "green", ("green", "red")),
    Example("Which? ", "nobody, says JANE DOE", "green", ("green",)),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a finished run keeps, without the rest of it."""
    folder = tmp_path / "run"
    folder.mkdir()
    dump_config(
        RunConfig(model="m", data="the/data", tasks=["colours", "summaries"], cache_dir="the/cache"),
        folder / "config.yaml",
    )
    tasks = [
        known_task(Task("colours", "accuracy", LABELS, "{instruction}{input}", tuple(ROWS)), ROWS, None),
        KnownTask("summaries", "rougeL", None, "{instruction}{input}", None, None),
    ]
    memory = {"colours": ROWS, "summaries": [Example("Say. ", "x", "a long answer", ("a long answer",))]}
    keep(folder, tasks, 2, memory, {"method": {"w": torch.ones(2)}, "random": []})
    return folder


def lines(run: Path, task: str = "colours") -> list[str]:
    return [json.loads(line)["input"] for line in (run / "memory" / f"{task}.jsonl").read_bytes().split(b"\n") if line]


def test_what_is_kept_is_read_back(run: Path) -> None:
    tasks, adapter_tasks = read_tasks(run)
    assert adapter_tasks == 2 and [task.name for task in tasks] == ["colours", "summaries"]
    assert tasks[0].labels == LABELS and tasks[0].instruction == "Which? " and tasks[1].labels is None
    assert read_memory(run, tasks[0]) == list(enumerate(ROWS, 1))
    first = json.loads((run / "memory" / "colours.jsonl").read_bytes().split(b"\n")[0])
    assert first == {"instruction": "Which? ", "input": "Jane Doe\u2028 likes red", "label": "red"}


def test_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "show", str(run)]) == 0
    size = (run / "memory" / "colours.jsonl").stat().st_size
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"colours: 3 rows, {size} bytes (red: 1, green: 2)" and out[1].startswith("summaries: 1 rows")
    assert main(["memory", "show", str(run), "--rows"]) == 0
    assert (
        '  2: {"instruction": "Which? ", "input": "a green door", "label": "green", "references"'
        in capsys.readouterr().out
    )


def test_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "all.jsonl"
    assert main(["memory", "export", str(run), str(file)]) == 0
    rows = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
    assert [row["task"] for row in rows] == ["colours"] * 3 + ["summaries"]
    assert rows[1] == {"task": "colours", "instruction": "Which? ", "input": "a green door", "label": "green",
                       "references": ["green", "red"]}  # fmt: skip
    assert main(["memory", "export", str(run), str(file)]) == 2
    assert "exists: choose another name" in capsys.readouterr().err


def test_drop_by_text_line_and_task(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "drop", str(run), "--task", "colours", "--match", "jane doe"]) == 0
    out = capsys.readouterr().out
    assert "task colours: 2 rows removed, 1 left" in out
    assert "the/data" in out and "the/cache" in out and "learned from them" in out
    assert lines(run) == ["a green door"]
    assert main(["memory", "drop", str(run), "--task", "colours", "--match", "jane doe"]) == 0
    assert capsys.readouterr().out == "task colours: 0 rows removed, 1 left\n"
    assert main(["memory", "drop", str(run), "--task", "summaries", "--yes"]) == 0
    assert lines(run, "summaries") == [] and lines(run) == ["a green door"]
    assert not [path for path in run.rglob("*") if path.is_file() and b"Jane" in path.read_bytes()]


@pytest.mark.parametrize("form", FORMS)
def test_texts_match_in_any_unicode_form(run: Path, form: Literal["NFC", "NFD"]) -> None:
    known, _ = read_tasks(run)
    rows = [Example("Which? ", unicodedata.normalize(other, "from JOSÉ, red"), "red", ("red",)) for other in FORMS]
    keep(run, known, 2, {"colours": [*rows, ROWS[1]]}, {"method": {}, "random": []})
    match = unicodedata.normalize(form, "José")
    assert main(["memory", "drop", str(run), "--task", "colours", "--match", match]) == 0
    assert lines(run) == ["a green door"]


def test_drop_lines(run: Path) -> None:
    assert main(["memory", "drop", str(run), "--task", "colours", "--line", "1", "3"]) == 0
    assert lines(run) == ["a green door"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "colours"], "would remove all 3 rows of task colours: give --yes"),
        (["--task", "colours", "--match", "which"], "would remove all 3 rows"),
        (["--task", "colors"], "no task 'colors'; did you mean 'colours'?"),
        (["--task", "colours", "--line", "2", "4"], "has no row in line 4; it holds 3 rows"),
        (["--task", "colours", "--match", ""], "--match needs a text"),
        (["--task", "colours", "--line", "2", "--match", "x"], "not allowed with argument"),
        ([], "required: --task"),
    ],
)
def test_bad_drops_remove_nothing(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "memory" / "colours.jsonl").read_bytes()
    assert main(["memory", "drop", str(run), *options]) == 2
    assert message in capsys.readouterr().err
    assert (run / "memory" / "colours.jsonl").read_bytes() == before


def test_broken_files_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "memory" / "colours.jsonl"
    file.write_text(file.read_text() + '{"instruction": "", "input": "x", "label": "blue"}\n')
    assert main(["memory", "show", str(run)]) == 2
    assert "colours.jsonl:4: field 'label': 'blue' is no label" in capsys.readouterr().err
    assert main(["memory", "show", str(tmp_path)]) == 2
    assert "tasks.json does not exist" in capsys.readouterr().err
    (run / "tasks.json").write_text('{"tasks": [{"name": "a"}]}')
    with pytest.raises(DataError, match=r"tasks\.json: is damaged"):
        read_earlier(run)


def test_methods_without_replay_keep_no_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path, [KnownTask("a", "accuracy", LABELS, "{input}", None, None)], 1, {}, {"method": {}, "random": []})
    assert main(["memory", "show", str(tmp_path)]) == 0
    assert "does not replay any" in capsys.readouterr().out
