"""Whatever lies in a file or stands on the command line is read or refused in words; nothing else is ever raised.

Half as many examples as the profile of hypothesis has: 50, or 5,000 with `--hypothesis-profile campaign`.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import build_tiny, topic_task

from kif.checkpoint import CONTENT, TENSORS, Checkpoints, flatten
from kif.cli import main
from kif.config import SECTIONS, KIFConfig, RunConfig
from kif.configfile import ConfigError, _types, dump_config, load_config, parse_run_config
from kif.families import Encoded
from kif.models import load_language_model
from kif.results import ReportError, Results, load_results
from kif.stored import MEMORY, TASKS, drop, keep, known_task, read_memory, read_tasks
from kif.tasks import DataError, load_tasks
from kif.tokenization import ORIGIN, TokenCache, check_origin, save_origin

FEW = settings.default.max_examples // 2 if settings.default is not None else 50
fuzz = settings(
    max_examples=FEW, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip

# edits of a file: where, as a share of its length; how many bytes go; what comes
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 20), st.binary(max_size=6)), min_size=1, max_size=4)
PIECES = st.sampled_from([b"null", b"-1", b"[]", b"{}", b'"', b"1e999", b"NaN", b"\xff", b"\\ud800", b"9" * 5000, b"["])
DAMAGE = EDITS | st.lists(st.tuples(st.floats(0, 1), st.integers(0, 20), PIECES), min_size=1, max_size=3)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=6
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner), max_leaves=6
)


def damaged(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for share, gone, new in edits:
        at = int(share * len(content))
        content = content[:at] + new + content[at + gone :]
    return content


def replaced(content: Any, path: list[int], value: Any) -> Any:
    """`content` with one of its entries, found by following `path`, replaced or (of an object) removed."""
    if not path or not isinstance(content, (dict, list)) or not content:
        return value
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[path[0] % len(keys)]
    copy = content.copy()
    if value is None and len(path) == 1 and isinstance(copy, dict):
        del copy[key]
    else:
        copy[key] = replaced(content[key], path[1:], value)
    return copy


# configuration

FIELDS = st.sampled_from(sorted({*_types(), *SECTIONS, "preset", "lrr", "kif.", "a.b.c"}))


def load(folder: Path, content: bytes) -> None:
    path = folder / "run.yaml"
    path.write_bytes(content)
    try:
        config = load_config(path)
    except ConfigError as error:
        assert str(path) in str(error)
        assert "Traceback" not in str(error)
    else:
        dump_config(config, folder / "again.yaml")
        assert load_config(folder / "again.yaml") == config


@fuzz
@given(text=st.text(max_size=60) | st.text("-:?[]{},&*!|>'\"%@`# \n\tab01.~<=", max_size=40))
def test_any_text_as_configuration(tmp_path: Path, text: str) -> None:
    load(tmp_path, text.encode("utf-8", "surrogatepass"))


@fuzz
@given(
    content=st.dictionaries(FIELDS, VALUES | st.dictionaries(st.sampled_from(["lr", "density"]), VALUES), max_size=4)
)
def test_any_values_as_configuration(tmp_path: Path, content: dict[str, Any]) -> None:
    load(tmp_path, yaml.safe_dump(content).encode())


@fuzz
@given(edits=DAMAGE)
def test_a_damaged_configuration(tmp_path: Path, edits: list[tuple[float, int, bytes]]) -> None:
    dump_config(RunConfig(model="m", kif=KIFConfig(density=0.3)), tmp_path / "whole.yaml")
    load(tmp_path, damaged((tmp_path / "whole.yaml").read_bytes(), edits))


# command line

OPTIONS = st.sampled_from(
    [f"--{name}".replace("_", "-") for name in _types()] + ["--config", "--from", "--", "-x", "--="]
)
WORDS = st.sampled_from(["1", "-1", "0.5", "nan", "True", "None", "paper", "a", "", "[1]", "{'a': 1}"]) | st.text(
    max_size=5
)
LINES = st.lists(OPTIONS | WORDS | st.tuples(OPTIONS, WORDS).map("=".join), max_size=6)


@fuzz
@given(words=LINES)
def test_any_command_line_of_a_run(words: list[str]) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            config = parse_run_config(["--model", "m", "--data", "d", *words])
        except ConfigError:
            return
        except SystemExit as stop:
            # `--help` may be spelled by chance
            assert stop.code in (0, 2)
            return
    assert isinstance(config, RunConfig)


COMMAND_OPTIONS = [
    "--checkpoint",
    "--split",
    "--data",
    "--task",
    "--yes",
    "--line",
    "--match",
    "--rows",
    "--output",
    "--text",
]


@fuzz
@given(
    command=st.sampled_from(["eval", "predict", "memory", "export", "report", "methods", "nonsense"]),
    words=st.lists(st.sampled_from(["show", "drop", "run", "nowhere", *COMMAND_OPTIONS]) | WORDS, max_size=5),
)
def test_any_command_line_of_other_commands(
    tmp_path: Path, command: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(io.StringIO()):
        status = main([command, *words])
    assert status in (0, 2) and "Traceback" not in out.getvalue(), out.getvalue()


# checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with two checkpoints, and the state of the first."""
    folder = tmp_path_factory.mktemp("checkpoint") / "state"
    state = {"weights": torch.arange(40.0), "counts": [torch.tensor(3), {"a": None, "b": 0.5}], "text": "é"}
    checkpoints = Checkpoints(folder)
    checkpoints.write({**state, "number": 1})
    checkpoints.write({**state, "number": 2})
    return folder, state


@fuzz
@given(file=st.sampled_from([CONTENT, TENSORS]), edits=DAMAGE | st.floats(0, 1) | st.none())
def test_a_damaged_checkpoint(tmp_path: Path, checkpoint: tuple[Path, Any], file: str, edits: Any) -> None:
    whole, state = checkpoint
    folder = tmp_path / "state"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    path = folder / "000002" / file
    before = path.read_bytes()
    if edits is None:
        path.unlink()
    else:
        path.write_bytes(before[: int(edits * len(before))] if isinstance(edits, float) else damaged(before, edits))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = Checkpoints(folder).read(torch.device("cpu"))
    assert read is not None
    assert read["number"] == (1 if caught else 2)
    # a checkpoint that is used is the one that was written, to the last bit
    assert str(flatten({**state, "number": read["number"]})) == str(flatten(read))
    if caught:
        assert "000002 is damaged and not used" in str(caught[0].message)


@fuzz
@given(content=JSON)
def test_any_json_as_checkpoint(tmp_path: Path, checkpoint: tuple[Path, Any], content: Any) -> None:
    folder = tmp_path / "state"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint[0], folder)
    (folder / "000002" / CONTENT).write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="000002 is damaged and not used"):
        read = Checkpoints(folder).read(torch.device("cpu"))
    assert read is not None and read["number"] == 1


# what a finished run keeps


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The files of a finished run that are read as JSON."""
    task, other = topic_task(6), topic_task(4)
    keep(
        tmp_path, [known_task(task, task.test, None)], 1, {task.name: other.train}, {"method": {}, "random": []},
    )  # fmt: skip
    results = Results(
        method="m", label="m", model="x", tasks=["topics"], accuracy=[[50.0]], op=50.0, bwt=None, seconds=1.0,
        time={"train": 1.0}, seed=0, eval_split="test", eval_mode="rank",
    )  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(vars(results)))
    return tmp_path


def tasks_of(run: Path) -> None:
    for task in read_tasks(run)[0]:
        task.task().prompt(topic_task(1).train[0])
        hash(task)


def memory_of(run: Path) -> None:
    (task,) = read_tasks(run)[0]
    for _, row in read_memory(run, task):
        row.input.encode()
    drop(run, task.name, "x", [], False)


READERS: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    TASKS: (tasks_of, DataError),
    f"{MEMORY}/topics.jsonl": (memory_of, DataError),
    "results.json": (load_results, ReportError),
}


def read_changed(finished: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Read a file of the run as `change` makes it: all well or refused, nothing else."""
    read, refusal = READERS[name]
    path = finished / name
    before = path.read_bytes()
    path.write_bytes(change(before))
    try:
        with contextlib.suppress(refusal):
            read(finished)
    finally:
        path.write_bytes(before)


@fuzz
@example(name="results.json", edits=[(0.0, 0, b"9" * 5000)])
@example(name="results.json", edits=[(0.0, 0, b"[" * 100_000)])
@example(name=TASKS, edits=[(0.5, 0, b"[" * 100_000)])
@given(name=st.sampled_from(sorted(READERS)), edits=DAMAGE)
def test_damaged_files_of_a_finished_run(finished: Path, name: str, edits: list[tuple[float, int, bytes]]) -> None:
    read_changed(finished, name, lambda before: damaged(before, edits))


@fuzz
@given(
    name=st.sampled_from([TASKS, "results.json"]),
    path=st.lists(st.integers(0, 30), max_size=4),
    value=JSON | st.sampled_from(["..", "a/b", "\ud800", "", "\0"]),
)
def test_any_value_in_files_of_a_finished_run(finished: Path, name: str, path: list[int], value: Any) -> None:
    read_changed(finished, name, lambda before: json.dumps(replaced(json.loads(before), path, value)).encode())


# tasks and tokens


@fuzz
@given(file=st.sampled_from(["train.jsonl", "../manifest.json", "test.jsonl.gz"]), edits=DAMAGE)
def test_a_damaged_task(tmp_path: Path, file: str, edits: list[tuple[float, int, bytes]]) -> None:
    import gzip

    folder = tmp_path / "task"
    folder.mkdir(exist_ok=True)
    row = {"instruction": "Which? ", "input": "naïve 🙂", "label": "blue", "references": ["blue"]}
    lines = b"".join(json.dumps(row, ensure_ascii=i % 2 == 0).encode() + b"\n" for i in range(3))
    (folder / "train.jsonl").write_bytes(lines)
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "manifest.json").write_text(json.dumps({"tasks": {"task": {"labels": ["blue", "red"]}}}))
    path = folder / file
    path.write_bytes(damaged(path.read_bytes(), edits))
    try:
        (task,) = load_tasks(tmp_path, ["task"])
    except DataError as error:
        assert str(tmp_path) in str(error)
    else:
        for example in (*task.train, *task.test):
            task.prompt(example).encode()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[Encoded]]:
    """A model, the folder of its token cache, and the rows in it."""
    folder, task = tmp_path_factory.mktemp("tokens"), topic_task(6)
    lm = load_language_model(RunConfig(model=str(build_tiny("t5", folder / "model")), device="cpu"), {"topics": None})
    rows = TokenCache(folder / "cache").encode(lm, task, task.train)
    save_origin(folder, lm.tokenizer)
    return lm, folder, rows


@fuzz
@given(edits=DAMAGE)
def test_damaged_tokens_and_notes(
    tokens: tuple[Any, Path, list[Encoded]], edits: list[tuple[float, int, bytes]]
) -> None:
    lm, folder, rows = tokens
    (path,) = (folder / "cache").iterdir()
    before = path.read_bytes()
    path.write_bytes(damaged(before, edits))
    task = topic_task(6)
    assert TokenCache(folder / "cache").encode(lm, task, task.train) == rows
    assert path.read_bytes() == before, "written anew"
    note = folder / ORIGIN
    known = note.read_bytes()
    note.write_bytes(damaged(known, edits))
    try:
        with contextlib.suppress(ValueError):
            check_origin(folder, lm.tokenizer, "m")
    finally:
        note.write_bytes(known)
