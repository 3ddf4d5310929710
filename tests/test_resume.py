"""Interrupted runs go on as if nothing had happened, bit for bit; what cannot be continued is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import topic_task

from kif.checkpoint import (
    CONTENT,
    TENSORS,
    Checkpoints,
    difference,
    flatten,
    pack_rows,
    restore_random_state,
    unflatten,
    unpack_rows,
)
from kif.cli import main
from kif.config import KIFConfig, LFPT5Config, RunConfig
from kif.configfile import load_config
from kif.families import Encoded
from kif.loop import train_phase
from kif.methods import METHODS, SeqLoRA
from kif.models import load_language_model
from kif.resume import note_environment, with_absolute_folders
from kif.run import RunLog, train

CPU = torch.device("cpu")


class Interrupted(Exception):
    """Stands for whatever ends a run."""


def settings(written: Path, model: Path, output: Path, **options: Any) -> RunConfig:
    values = {
        "steps_per_task": 15, "limit_eval": 4, "lr": 1e-2, "max_length": 64, "max_new_tokens": 4, "lora_dropout": 0.05,
        "checkpoint_rounds": 1, "kif": KIFConfig(inner_steps=3, outer_steps=2),
        "lfpt5": LFPT5Config(prompt_length=5, lm_length=24, pseudo_candidates=4), **options,
    }  # fmt: skip
    return RunConfig(
        model=str(model), data=str(written), order="abc", output=str(output), device="cpu",
        cache_dir=str(output.parent / "cache"), **values,
    )  # fmt: skip


def interrupt(monkeypatch: pytest.MonkeyPatch, config: RunConfig, when: Callable[[dict[str, Any]], bool]) -> None:
    """Train until a record for which `when` holds is logged."""
    usual = RunLog.__call__

    def log(self: RunLog, record: dict[str, Any]) -> None:
        usual(self, record)
        if when(record):
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "__call__", log)
        with pytest.raises(Interrupted):
            train(config, progress=False)


def in_second_task(record: dict[str, Any]) -> bool:
    return record.get("phase") == 1 and record["round"] == 1


def outcome(run: Path) -> dict[str, Any]:
    """Everything a run leaves, without times and peak memory."""

    def timeless(record: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in record.items() if key not in ("time", "seconds", "peak_memory")}

    files = sorted(path for path in run.rglob("*.safetensors"))
    assert not (run / "state").exists()
    return {
        "results": timeless(json.loads((run / "results.json").read_text())),
        "metrics": [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "weights": {str(path.relative_to(run)): path.read_bytes() for path in files},
        "config": {**vars(load_config(run / "config.yaml")), "output": ""},
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(run: str) -> RunConfig:
        return settings(written, tiny_models["t5"], tmp_path / run, method=name)

    train(config("whole"), progress=False)
    phase, scored = (0, 2) if name == "mtl" else (1, 1)
    interrupt(monkeypatch, config("cut"), lambda record: record.get("phase") == phase and record["round"] == 1)
    again = replace(config("cut"), resume=True)
    interrupt(monkeypatch, again, lambda record: record.get("after") == scored)
    results = train(again, progress=False)
    whole, cut = outcome(tmp_path / "whole"), outcome(tmp_path / "cut")
    assert cut == whole and len(whole["weights"]) >= 2
    counted = results["time"]["train"] + results["time"]["evaluate"]
    assert results["seconds"] >= counted > 0 and results["time"].keys() >= {"train", "evaluate", "optimizer"}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_other_families_resume_too(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"eval_forward": True, **({"head": "linear"} if kind == "bert" else {})}
    whole, cut = (settings(written, tiny_models[kind], tmp_path / run, **options) for run in ("whole", "cut"))
    train(whole, progress=False)
    interrupt(monkeypatch, cut, in_second_task)
    train(replace(cut, resume=True), progress=False)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_another_environment_is_noted(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = settings(written, tiny_models["bert"], tmp_path / "cut")
    places = [lambda: {"torch": "1", "cpus": 2}, lambda: {"torch": "2", "cpus": 2}, lambda: {"torch": "2", "cpus": 4}]
    monkeypatch.setattr("kif.doctor.environment", places[0])
    with monkeypatch.context() as patch:
        interrupt(patch, cut, in_second_task)
    again = replace(cut, resume=True)
    for place, name in zip(places[1:], ("torch", "cpus"), strict=True):
        monkeypatch.setattr("kif.doctor.environment", place)
        with pytest.warns(UserWarning, match=f"in another environment, its bits may be others: {name} differ"):
            if name == "torch":
                with monkeypatch.context() as patch:
                    interrupt(patch, again, lambda record: record.get("after") == 1)
            else:
                train(again, progress=False)
    path = tmp_path / "cut" / "environment.json"
    noted = json.loads(path.read_text())
    assert noted["torch"] == "1" and noted["resumed"] == [{"torch": "2"}, {"cpus": 4}]
    # nothing more to say where it went on; back at the beginning both are others again
    note_environment(path, {"torch": "2", "cpus": 4})
    assert json.loads(path.read_text()) == noted
    with pytest.warns(UserWarning, match="torch, cpus differ"):
        note_environment(path, {"torch": "1", "cpus": 2})


def test_killed_processes_leave_what_can_be_resumed() -> None:
    """A few of the kills that `python tests/crash.py --kills N` makes."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("crash.py")), "--kills", "3", "--seed", str(time.time_ns())],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["kills"] == 3


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (
        settings(written, tiny_models["t5"], tmp_path / run, method="seqlora", checkpoint_rounds=None)
        for run in ("whole", "cut")
    )
    train(whole, progress=False)
    interrupt(monkeypatch, cut, lambda record: record.get("round") == 0)
    (tmp_path / "cut" / "state" / "unfinished").mkdir(parents=True)
    with pytest.warns(UserWarning, match="cut ended before its first checkpoint: it starts from the beginning"):
        train(replace(cut, resume=True), progress=False)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("no run")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint to resume from: .* is no run folder, choose"):
        train(replace(cut, output=str(other), resume=True), progress=False)


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_wanted(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    cut = settings(written, tiny_models["t5"], tmp_path / "cut", method="seqlora", keep_checkpoints=keep)
    interrupt(monkeypatch, cut, lambda record: record.get("phase") == 2)
    # each of the two tasks had a checkpoint after its first round and one at its end
    kept = sorted(path.name for path in (tmp_path / "cut" / "state").iterdir())
    assert kept == ["000004", "000003", "000002"][:keep][::-1]
    assert json.loads((tmp_path / "cut" / "state" / "000004" / CONTENT).read_text())["state"]["config_hash"]


def test_a_log_that_lost_lines_is_said(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (settings(written, tiny_models["t5"], tmp_path / run, method="seqlora") for run in ("whole", "cut"))
    train(whole, progress=False)
    interrupt(monkeypatch, cut, in_second_task)
    (tmp_path / "cut" / "metrics.jsonl").write_text("")
    with pytest.warns(UserWarning, match=r"metrics.jsonl has 0 of the \d+ bytes that were logged"):
        train(replace(cut, resume=True), progress=False)
    ends = [outcome(tmp_path / run) for run in ("cut", "whole")]
    assert ends[0]["weights"] == ends[1]["weights"] and ends[0]["results"] == ends[1]["results"]


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (settings(written, tiny_models["t5"], tmp_path / run) for run in ("whole", "cut"))
    train(whole, progress=False)
    interrupt(monkeypatch, cut, lambda record: record.get("phase") == 1 and record["round"] == 2)
    shutil.copytree(tmp_path / "cut", tmp_path / "hopeless")
    state = tmp_path / "cut" / "state"
    before, last = sorted(state.iterdir())
    content = bytearray((last / TENSORS).read_bytes())
    content[-5] ^= 1
    (last / TENSORS).write_bytes(content)
    with pytest.warns(UserWarning, match=f"{last.name} is damaged and not used: its content does not match"):
        train(replace(cut, resume=True), progress=False)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")

    state = tmp_path / "hopeless" / "state"
    (state / before.name / CONTENT).write_text('{"sha256": "')
    (state / last.name / TENSORS).unlink()
    hopeless = replace(cut, output=str(tmp_path / "hopeless"), resume=True)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(FileNotFoundError, match="no checkpoint to resume from"),
    ):
        train(hopeless, progress=False)


def test_another_configuration_or_other_data_is_refused(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(written, tmp_path / "data"))
    cut = settings(data, tiny_models["t5"], tmp_path / "cut", method="seqlora")
    interrupt(monkeypatch, cut, in_second_task)
    with pytest.raises(FileExistsError, match="not empty"):
        train(cut, progress=False)
    again = replace(cut, resume=True)
    for change, message in (
        ({"lr": 2e-2}, "lr=0.01, now it is 0.02"),
        ({"kif": KIFConfig(inner_steps=4, outer_steps=2)}, "kif.inner_steps=3, now it is 4"),
        ({"order": None, "tasks": ["colours", "moods", "sizes"]}, "order='abc', now it is None"),
        ({"limit_eval": 5}, "limit_eval=4, now it is 5"),
    ):
        with pytest.raises(ValueError, match=message):
            train(replace(again, **change), progress=False)
    rows = (data / "sizes" / "train.jsonl").read_text()
    (data / "sizes" / "train.jsonl").write_text(rows.replace("row 7", "row 77"))
    with pytest.raises(ValueError, match=r"begun with data\.sizes\.30 rows to train="):
        train(again, progress=False)
    # the same rows elsewhere, and other checkpoints, are no other run
    train(replace(again, data=str(written), checkpoint_rounds=None), progress=False)


@pytest.mark.parametrize(("method", "effect"), [("seqlora", "nothing else"), ("migu", "and more: with migu")])
def test_what_other_micro_batches_change_is_said(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str,
    effect: str,
) -> None:  # fmt: skip
    cut = settings(written, tiny_models["t5"], tmp_path / "cut", method=method)
    interrupt(monkeypatch, cut, in_second_task)
    with pytest.warns(UserWarning, match=f"'gradient_accumulation': 2.*{effect}"):
        train(replace(cut, resume=True, gradient_accumulation=2), progress=False)


def test_nothing_to_resume(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = settings(written, tiny_models["t5"], run, method="seqlora", steps_per_task=5, resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from: remove"):
        train(config, progress=False)
    results = train(replace(config, resume=False), progress=False)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.warns(UserWarning, match="is finished: there is nothing to resume"):
        assert train(config, progress=False) == results
    with pytest.raises(ValueError, match="begun with lr"):
        train(replace(config, lr=1.0), progress=False)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    # the run's own file describes a run that is not resumed
    with pytest.warns(UserWarning, match="is finished"):
        assert main(["train", "--config", str(run / "config.yaml"), "--resume"]) == 0
    assert not load_config(run / "config.yaml").resume and f"run folder: {run}" in capsys.readouterr().out
    compared = ["compare", "--methods", "seqlora", "--config", str(run / "config.yaml"), "--resume"]
    assert main(compared) == 2 and "give it no --resume" in capsys.readouterr().err


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.arange(6, dtype=torch.float64)
    state = {
        "weights": {"a/b": shared, "same": shared, "part": shared[2:4], "empty": torch.empty(0, 3)},
        "flags": [True, None, 3, 0.1, "x", [torch.tensor(2), {}]],
    }
    structure, tensors = flatten(state)
    back = unflatten(json.loads(json.dumps(structure)), tensors)
    assert back["flags"][:5] == state["flags"][:5] and type(back["flags"][0]) is bool
    checkpoints = Checkpoints(tmp_path / "state")
    assert checkpoints.read(CPU) is None
    for number in range(4):
        checkpoints.write({**state, "number": number})
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["000003", "000004"]
    read = Checkpoints(tmp_path / "state").read(CPU)
    assert read is not None and read["number"] == 3
    for name, tensor in state["weights"].items():
        assert torch.equal(read["weights"][name], tensor) and read["weights"][name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": {1, 2}}}, "state a/b is a set"),
        ({"a": [torch.float32]}, "state a/0 is a dtype"),
        ({"a": {3: 1}}, "state a has the key 3"),
        ({"a": {"$tensor": 1}}, r"has the key '\$tensor'"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named(state: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        flatten(state)


def test_rows_are_packed_by_position_and_made_ones_whole() -> None:
    known = [Encoded((i,), (1,), "task", False) for i in range(4)]
    made = [Encoded((7, 8), (2,), "old", True), Encoded((9,), (2,), "old", False)]
    rows = [known[2], made[0], known[0], made[1], made[0]]
    packed = pack_rows(rows, known)
    structure, tensors = flatten(packed)
    assert unpack_rows(unflatten(json.loads(json.dumps(structure)), tensors), known) == rows


def test_the_first_difference_is_named() -> None:
    assert difference({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 2]}}) is None
    assert difference({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 3]}}) == ("b.c", [1, 2], [1, 3])
    assert difference({"a": 1, "old": 2}, {"a": 1}) == ("old", 2, None)


def test_a_method_that_makes_rows_itself_gets_the_same_ones_back(tiny_models: dict[str, Path]) -> None:
    class Inventive(SeqLoRA):
        """Adds a row that depends on the weights with which the task began."""

        def training_rows(self, rows: Any, memory: Any) -> list[Encoded]:
            token = 1 + int(self.arena.data.abs().sum().item() * 1e4) % 300
            return [*rows, replace(rows[0], input_ids=(token,) * 4)]

    task = topic_task(9)
    config = RunConfig(model=str(tiny_models["t5"]), batch_size=2, epochs=5, lr=1e-2, checkpoint_rounds=1)

    def begin(states: list[Any], state: Any = None) -> torch.Tensor:
        def keep(saved: Any) -> None:
            structure, tensors = flatten(saved)
            states.append(unflatten(structure, {name: tensor.clone() for name, tensor in tensors.items()}))

        lm = load_language_model(config, {task.name: task.labels})
        method, rows = Inventive(lm, config), lm.encode(task, task.train)
        torch.manual_seed(0 if state is None else 1)
        train_phase(
            lm, method, config, index=0, tasks=1, rows=rows, memory=[], log=lambda record: None, save=keep, state=state
        )
        return method.arena.data

    states: list[Any] = []
    whole = begin(states)
    assert [state["round"] for state in states] == [1, 2] and len(states[0]["rows"]["made"]) == 1
    assert torch.equal(begin([], states[0]), whole) and torch.equal(begin([], states[1]), whole)


def test_places_hold_in_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    here = with_absolute_folders(RunConfig(model="model", data="hub", memory_data="rows.jsonl", resume=True))
    assert (here.model, here.memory_data) == (str(tmp_path / "model"), str(tmp_path / "rows.jsonl"))
    assert here.data == "hub" and not here.resume
    # names on the hub
    there = with_absolute_folders(RunConfig(model="org/model", data="gone", memory_data="org/rows"))
    assert (there.model, there.data, there.memory_data) == ("org/model", "gone", "org/rows")


def test_random_numbers_of_a_gpu_are_left_where_there_is_none() -> None:
    state = torch.get_rng_state()
    expected = torch.rand(3)
    restore_random_state([{"cpu": state, "cuda": torch.zeros(16, dtype=torch.uint8)}], torch.device("cpu"))
    assert torch.rand(3).equal(expected)
