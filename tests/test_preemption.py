"""SIGTERM saves and ends a run with status 143, and the run that is resumed ends as an uninterrupted one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import outcome
from torch import multiprocessing

from kif import run as run_module
from kif.checkpoint import Checkpoints
from kif.cli import main
from kif.config import KIFConfig, RunConfig
from kif.configfile import dump_config
from kif.distributed import process_group
from kif.faults import PREEMPTED, Preempted
from kif.preemption import Preemption, preemption
from kif.run import train
from kif.training import RunLog, Training

Hook = Callable[..., Any]


def settings(written: Path, model: Path, output: Path, **options: Any) -> RunConfig:
    values = {
        "steps_per_task": 15, "limit_eval": 4, "lr": 1e-2, "max_length": 64, "max_new_tokens": 4,
        "kif": KIFConfig(inner_steps=3, outer_steps=2), **options,
    }  # fmt: skip
    return RunConfig(
        model=str(model), data=str(written), order="abc", output=str(output), device="cpu",
        cache_dir=str(output.parent / "cache"), **values,
    )  # fmt: skip


def before(patch: pytest.MonkeyPatch, owner: Any, name: str, hook: Hook) -> None:
    """Call `hook` with a function's arguments before each of its calls."""
    usual = getattr(owner, name)

    def hooked(*arguments: Any, **options: Any) -> Any:
        hook(*arguments)
        return usual(*arguments, **options)

    patch.setattr(owner, name, hooked)


def sigterm(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(written: Path, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(settings(written, tiny_models["t5"], folder), progress=False)
    return outcome(folder)


def after_a_round(log: RunLog, record: dict[str, Any]) -> None:
    if record.get("phase") == 1 and record["round"] == 0:
        sigterm()


def after_the_last_round(log: RunLog, record: dict[str, Any]) -> None:
    if record.get("phase") == 1 and record["round"] == record["rounds"] - 1:
        sigterm()


def while_scoring(training: Training, row: int, after: int | None) -> None:
    if (row, after) == (1, 1):
        sigterm()


@pytest.mark.parametrize(
    ("owner", "name", "hook", "rounds"),
    [
        (RunLog, "__call__", after_a_round, 6),
        (RunLog, "__call__", after_the_last_round, 8),
        (Training, "_score", while_scoring, 8),
    ],
)
def test_the_state_is_saved_and_the_run_goes_on(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, whole: dict[str, Any], owner: Any, name: str,
    hook: Hook, rounds: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = settings(written, tiny_models["t5"], tmp_path / "run")
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="the same command with --resume goes on"):
        before(patch, owner, name, hook)
        train(config, progress=False)
    assert signal.getsignal(signal.SIGTERM) is handler
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    # checkpoints within tasks are off, and no round is begun after the signal
    assert sum('"loss"' in line for line in lines) == rounds
    assert len(Checkpoints(tmp_path / "run" / "state")._numbers()) == 2
    train(replace(config, resume=True), progress=False)
    assert outcome(tmp_path / "run") == whole


def test_before_anything_is_written(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, run_module, "load_language_model", sigterm)
    with pytest.raises(Preempted, match="nothing is written yet, start it again") as stop:
        train(settings(written, tiny_models["t5"], tmp_path / "run"), progress=False)
    assert stop.value.code == PREEMPTED and not (tmp_path / "run").exists()


def test_a_run_that_saves_its_results_is_finished(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, Training, "final", sigterm)
    train(settings(written, tiny_models["t5"], tmp_path / "run"), progress=False)
    assert outcome(tmp_path / "run") == whole


def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: RunConfig, progress: bool, stop: Preemption, held: Any) -> None:
        stop.advice = "it goes on there"
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "_train", interrupted)
    options = ["--model", "m", "--data", "d", "--tasks", "a", "--output", str(tmp_path / "run")]
    assert main(["train", *options]) == 130
    assert capsys.readouterr().err == "kif: interrupted: it goes on there\n"


def test_threads_leave_signals_alone() -> None:
    handler, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with preemption(""):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]


def test_a_process_ends_with_143_and_says_how_to_go_on(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("whole", "cut"):
        config = settings(written, tiny_models["t5"], tmp_path / name, steps_per_task=60, kif=KIFConfig(inner_steps=1))
        dump_config(config, tmp_path / f"{name}.yaml")
    assert main(["train", "--config", str(tmp_path / "whole.yaml")]) == 0
    command = [sys.executable, "-m", "kif", "train", "--config", str(tmp_path / "cut.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    logged = tmp_path / "cut" / "metrics.jsonl"
    while process.poll() is None and not (logged.is_file() and logged.stat().st_size > 2000):
        time.sleep(0.01)
    process.terminate()
    _, message = process.communicate()
    assert process.returncode == PREEMPTED == 143
    assert f"kif: stopped by SIGTERM: {tmp_path / 'cut'} has a checkpoint" in message and "Traceback" not in message
    assert main(["train", "--config", str(tmp_path / "cut.yaml"), "--resume"]) == 0
    ends = {name: outcome(tmp_path / name) for name in ("whole", "cut")}
    assert ends["cut"] == ends["whole"]


def two_processes(rank: int, ports: list[int], written: Path, model: Path, folder: Path) -> None:
    """An uninterrupted run, and one of which the second process alone gets SIGTERM, in training and in scoring."""
    torch.set_num_threads(1)
    where = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": ports[0],
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in where.items()})

    config = settings(written, model, folder / "cut", method="seqlora")
    with process_group("cpu"):
        train(replace(config, output=str(folder / "whole")), progress=False)
    points: list[tuple[Any, str, Hook]] = [
        (RunLog, "__call__", after_a_round), (Training, "_score", while_scoring),
    ]  # fmt: skip
    for number, (port, point) in enumerate(zip(ports[1:3], points, strict=True)):
        os.environ["MASTER_PORT"] = str(port)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted), process_group("cpu"):
            if rank == 1:
                before(patch, *point)
            train(replace(config, resume=number > 0), progress=False)
    os.environ["MASTER_PORT"] = str(ports[3])
    with process_group("cpu"):
        train(replace(config, resume=True), progress=False)


def test_a_signal_to_one_of_two_processes_stops_both(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    sockets = [socket.socket() for _ in range(4)]
    for free in sockets:
        free.bind(("localhost", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    multiprocessing.spawn(two_processes, (ports, written, tiny_models["t5"], tmp_path), nprocs=2)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
