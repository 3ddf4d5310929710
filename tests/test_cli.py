"""The command `kif`: what it calls, what it prints, and its exit status."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kif.cli import COMMANDS, main
from kif.config import RunConfig
from kif.configfile import dump_config

TASKS = ["dbpedia", "amazon"]
RESULTS = {
    "method": "seqlora",
    "label": "seqlora",
    "model": "tiny",
    "tasks": TASKS,
    "accuracy": [[80.0, 60.0], [None, 70.0]],
    "op": 65.0,
    "bwt": -20.0,
    "fwt": None,
    "zero_shot": None,
    "seconds": 3.0,
    "time": {"train": 2.0, "evaluate": 1.0},
    "steps": {"inner": 4, "outer": 0},
    "seed": 0,
    "eval_split": "test",
    "eval_mode": "generate",
}


@pytest.fixture(autouse=True)
def _no_data_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KIF_DATA", raising=False)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Put a module with this content in place of `name`."""
    stand_in = ModuleType(name)
    vars(stand_in).update(content)
    monkeypatch.setitem(sys.modules, name, stand_in)


def run_folder(folder: Path, data: str = "d") -> Path:
    folder.mkdir(parents=True)
    dump_config(RunConfig(model="m", data=data, order="1"), folder / "config.yaml")
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: kif {command}" in out
    if command != "train":
        assert (COMMANDS[command].__doc__ or "")[:40] in " ".join(out.split())


def test_help_lists_the_commands_without_torch() -> None:
    code = (
        "import sys\nfrom kif.cli import main\n"
        "status = main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    name, version = capsys.readouterr().out.split()
    assert name == "kif" and version[0].isdigit()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the first argument must be a command"),
        (["trian", "--help"], "no command 'trian'; did you mean 'train'?"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["train", "--model", "m", "--order", "1"], "kif: no data: give the folder"),
        (["train", "--learning-rate", "1"], "did you mean '--lr'?"),
        (["train", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["train", "--epochs", "many"], "--epochs"),
        (["eval", "nowhere"], "nowhere is no run folder"),
        (["eval", "nowhere", "--checkpoint", "0"], "must be at least 1"),
        (["eval", "nowhere", "--checkpoint", "last"], "must be a whole number, got 'last'"),
        (["eval", "nowhere", "--checkpoint", "1", "--adapter", "a"], "not allowed with argument"),
        (["predict"], "required: RUN"),
        (["predict", "nowhere", "--batch-size", "0"], "must be at least 1"),
        (["memory"], "required: ACTION"),
        (["memory", "drop", "nowhere"], "required: --task"),
        (["memory", "show", "nowhere"], "nowhere is no finished run"),
        (["export", "nowhere"], "required: OUT"),
        (["train", "--from", "nowhere"], "nowhere/config.yaml: cannot be read"),
        (["report"], "required: RUN"),
        (["report", "nowhere"], "nowhere: no such run folder"),
        (["methods", "all"], "unrecognized arguments: all"),
        (["demo", "--steps", "0"], "must be at least 1"),
        (["doctor", "--jsno"], "unrecognized arguments"),
    ],
)
def test_bad_usage_is_status_2_with_a_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and not captured.out


def test_train_passes_the_configuration_and_prints_the_scores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[RunConfig] = []

    def train(config: RunConfig, *, progress: bool) -> dict[str, Any]:
        seen.append(config)
        return RESULTS

    module(monkeypatch, "kif.run", train=train)
    assert main(["train", "--model", "m", "--data", "d", "--order", "1", "--lr", "1e-3", "--output", "here"]) == 0
    assert seen == [RunConfig(model="m", data="d", order="1", lr=1e-3, output="here")]
    out = capsys.readouterr().out
    assert "65.0" in out and "-20.0" in out and "run folder: here" in out


@pytest.mark.parametrize(
    ("error", "status", "trace"),
    [
        (FileExistsError("runs/x is not empty"), 2, False),
        (RuntimeError("the loss is nan"), 1, True),
        (ValueError("from deep inside a library"), 1, True),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 2, False),
        (ModuleNotFoundError("No module named 'nobody_knows'", name="nobody_knows"), 1, True),
        (KeyboardInterrupt(), 130, False),
    ],
)
def test_status_of_failures(
    error: BaseException, status: int, trace: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: RunConfig, *, progress: bool) -> dict[str, Any]:
        raise error

    module(monkeypatch, "kif.run", train=train)
    assert main(["train", "--model", "m", "--data", "d", "--order", "1"]) == status
    message = capsys.readouterr().err
    assert ("Traceback" in message) is trace
    assert message.splitlines()[-1].startswith("kif: ")
    if getattr(error, "name", None) == "peft":
        assert "pip install 'recurrent-kif[train]'" in message


def test_refusals_of_our_own_code_need_no_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: RunConfig, *, progress: bool) -> dict[str, Any]:
        RunConfig(epochs=0)
        return RESULTS

    module(monkeypatch, "kif.run", train=train)
    assert main(["train", "--model", "m", "--data", "d", "--order", "1"]) == 2
    assert capsys.readouterr().err == "kif: epochs must be positive, got 0\n"


def test_eval_passes_what_was_given_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []

    def evaluate_run(run: Path, **options: Any) -> dict[str, Any]:
        seen.append({"run": run, **options})
        return {"adapter": "somewhere/adapter", "tasks": TASKS, "scores": [61.0, 72.0], "op": 66.5, "seconds": 2.0}

    module(monkeypatch, "kif.run", evaluate_run=evaluate_run)
    data = tmp_path / "data"
    data.mkdir()
    run = run_folder(tmp_path / "run", str(data))
    assert main(["eval", str(run)]) == 0
    assert seen[-1] == {"run": run, "adapter": None, "checkpoint": None}
    out = capsys.readouterr().out
    assert "61.0" in out and "66.5" in out and "somewhere/adapter" in out

    options = ["--checkpoint", "2", "--split", "validation", "--eval-mode", "rank", "--limit-eval", "5", "--data", "e"]
    assert main(["eval", str(run), *options]) == 0
    changes = {"eval_split": "validation", "eval_mode": "rank", "limit_eval": 5, "data": "e"}
    assert seen[-1] == {"run": run, "adapter": None, "checkpoint": 2, **changes}

    monkeypatch.setenv("KIF_DATA", "elsewhere")
    assert main(["eval", str(run), "--adapter", "a"]) == 0
    assert seen[-1] == {"run": run, "adapter": Path("a"), "checkpoint": None}
    data.rmdir()
    assert main(["eval", str(run)]) == 0
    assert seen[-1]["data"] == "elsewhere"


def test_report_prints_the_table_and_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run")
    assert main(["report", str(run), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "seqlora" in out and "-20.0" in out
    files = [Path(line.removeprefix("written: ")) for line in out.splitlines() if line.startswith("written: ")]
    assert len(files) == 3 and all(path.is_file() for path in files)


def test_methods_are_listed_one_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Method:
        summary, source = "does nothing", "nowhere"
        refused, plain_adapter = {"encoder": "why not"}, False

    module(monkeypatch, "kif.methods", METHODS={"a": Method, "long-name": Method}, ALIASES={"l": "long-name"})
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rest = "does nothing (nowhere) [T5, Llama; adapter for kif only"
    assert lines == [f"a          {rest}]", f"long-name  {rest}; short: l]"]


def test_demo_forwards_its_options_and_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    def run_demo(*arguments: Any) -> int:
        seen.append(arguments)
        return len(seen) - 1

    module(monkeypatch, "kif.demo", run_demo=run_demo)
    assert main(["demo"]) == 0
    assert main(["demo", "--output", "o", "--data", "d", "--model", "m", "--steps", "3", "--seed", "4"]) == 1
    monkeypatch.setenv("KIF_DATA", "k")
    main(["demo"])
    assert seen == [
        (Path("runs/demo"), None, None, None, 0),
        (Path("o"), "d", "m", 3, 4),
        (Path("runs/demo"), "k", None, None, 0),
    ]


def test_doctor_status_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("KIF_BACKEND", raising=False)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    monkeypatch.setenv("KIF_BACKEND", "abacus")
    assert main(["doctor"]) == 1
    assert "abacus" in capsys.readouterr().out


def test_own_arguments_are_the_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kif", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("kif ")


@pytest.mark.parametrize(("argv", "streams"), [(["doctor"], [1]), (["--help"], [1]), (["eval", "--help"], [1, 2])])
def test_a_closed_pipe_is_no_traceback(argv: list[str], streams: list[int]) -> None:
    """As in `kif doctor | true`."""
    lines = (
        "import os, sys",
        "from kif.cli import main",
        "reader, writer = os.pipe()",
        *(f"os.dup2(writer, {stream})" for stream in streams),
        "os.close(writer), os.close(reader)",
        f"sys.exit(main({argv}))",
    )
    # Python's own buffer holds what is printed until the end
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False, env=variables
    )
    assert (done.returncode, done.stderr) == (1, "")


def test_closed_streams_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `kif methods >&- 2>&-`, where Python has None for both."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert (main(["methods"]), main(["report", "nowhere"])) == (0, 2)


def test_a_closed_input_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["predict", "nowhere"]) == 2
    assert "kif: standard input is closed: name a file" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_the_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch, open("/dev/full", "wb", buffering=0) as full:
        patch.setattr(sys, "stdout", io.TextIOWrapper(full))
        assert main(["methods"]) == 1
    assert capsys.readouterr().err == "kif: failed: [Errno 28] No space left on device\n"
