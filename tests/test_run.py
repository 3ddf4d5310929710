"""A run from configuration to run folder, on real text where it is at hand and on written text always."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tasks

from kif.config import KIFConfig, RunConfig
from kif.configfile import ConfigError, load_config
from kif.files import LOCK, claimed
from kif.methods import METHODS
from kif.run import evaluate_run, prepare_tasks, train
from kif.tasks import DataError


def config(written: Path, model: Path, output: Path, **options: Any) -> RunConfig:
    settings = {"order": "abc", "steps_per_task": 10, "lr": 1e-2, "max_length": 64, **options}
    if model.name[:4] != "bert":
        settings.setdefault("max_new_tokens", 4)
    return RunConfig(
        model=str(model), data=str(written), output=str(output), cache_dir=str(output.parent / "cache"), **settings
    )


@pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
@pytest.mark.parametrize("method", list(METHODS))
def test_run_folder_and_matrix(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, kind: str, method: str
) -> None:
    if kind == "bert" and "encoder" in METHODS[method].refused:
        pytest.skip(f"{method} refuses encoders")
    run = tmp_path / "run"
    results = train(
        config(written, tiny_models[kind], run, method=method, kif=KIFConfig(inner_steps=3)), progress=False
    )
    assert json.loads((run / "results.json").read_text()) == results
    measured = [[value is not None for value in row] for row in results["accuracy"]]
    if method == "mtl":
        assert measured == [[False, False, True]] * 3 and results["bwt"] is None
    else:
        assert measured == [[i <= j for j in range(3)] for i in range(3)]
        a = results["accuracy"]
        assert results["bwt"] == pytest.approx((a[0][2] - a[0][0] + a[1][2] - a[1][1]) / 2)
    assert results["op"] == pytest.approx(sum(row[2] for row in results["accuracy"]) / 3)
    assert sum(results["steps"].values()) == 30
    assert results["steps"]["outer"] == {"recurrent-kif": 6, "vr-mcl": 4}.get(method, 0)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(record.get("event") == "score" for record in records) == (3 if method == "mtl" else 6)
    stages = [record for record in records if record.get("event") == "stage"]
    assert stages[-1] == records[-1] == {"event": "stage", "after": 2, "op": results["op"], "bwt": results["bwt"]}
    if method != "mtl":
        assert stages[0] == {"event": "stage", "after": 0, "op": a[0][0], "bwt": None}
        assert stages[1]["op"] == pytest.approx((a[0][1] + a[1][1]) / 2)
        assert stages[1]["bwt"] == pytest.approx(a[0][1] - a[0][0])
    assert json.loads((run / "environment.json").read_text())["seed"] == 0
    assert load_config(run / "config.yaml").method == method
    last = run / "checkpoints" / "task-03-moods" / "adapter_model.safetensors"
    assert last.read_bytes() == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert evaluate_run(run, progress=False)["scores"] == [row[2] for row in results["accuracy"]]
    if method != "mtl":
        second = evaluate_run(run, checkpoint=2, progress=False)["scores"]
        assert second[:2] == [results["accuracy"][i][1] for i in range(2)]


def test_a_saved_adapter_can_be_scored_otherwise(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(written, tiny_models["t5"], run), progress=False)
    ranked = evaluate_run(run, progress=False, eval_mode="rank", eval_split="validation")
    assert all(0.0 <= score <= 100.0 for score in ranked["scores"])


def test_the_adapter_is_a_plain_peft_folder(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    train(config(written, tiny_models["t5"], tmp_path / "run"), progress=False)
    model = PeftModel.from_pretrained(
        AutoModelForSeq2SeqLM.from_pretrained(tiny_models["t5"]), tmp_path / "run/adapter"
    )
    weights = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert weights and all(p.abs().sum() > 0 for p in weights)


def test_equal_seeds_give_equal_runs(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        torch.manual_seed(len(name))  # the state before the run must not matter
        train(config(written, tiny_models["t5"], tmp_path / name, seed=seed), progress=False)
        return (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    assert weights("a", 0) == weights("longer", 0) != weights("c", 1)


@pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
def test_bf16_trains_with_an_fp32_adapter(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    from safetensors.torch import load_file

    train(config(written, tiny_models[kind], tmp_path / "run", precision="bf16"), progress=False)
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values())
    assert any(w.any() for name, w in weights.items() if "lora_B" in name)


def test_gradient_accumulation_does_not_change_the_run(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    ends = []
    for accumulation in (1, 4):
        run = tmp_path / str(accumulation)
        options = {"gradient_accumulation": accumulation, "lora_dropout": 0.0, "lr": 1e-3, "method": "seqlora"}
        train(config(written, tiny_models["llama"], run, **options), progress=False)
        ends.append(load_file(run / "adapter" / "adapter_model.safetensors"))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-2, atol=1e-4)


def test_forward_transfer(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    results = train(config(written, tiny_models["bert"], tmp_path / "run", eval_forward=True), progress=False)
    a, zero = results["accuracy"], results["zero_shot"]
    assert a[1][0] is not None and a[2][1] is not None and a[2][0] is None
    assert results["fwt"] == pytest.approx((a[1][0] - zero[1] + a[2][1] - zero[2]) / 2)


def test_the_template_can_be_replaced(written: Path, tmp_path: Path) -> None:
    given = RunConfig(model="m", data=str(written), order="abc", template="{input} is")
    task = prepare_tasks(given)[0]
    assert task.prompt(task.train[0]) == f"{task.train[0].input} is"
    usual = prepare_tasks(replace(given, template=None))[0]
    assert usual.prompt(usual.train[0]).startswith("Which of the colours? train row 0")


def test_held_out_rows_are_not_trained_on(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from kif.run import prepare_tasks

    settings = config(written, tiny_models["t5"], tmp_path / "run", eval_split="heldout", holdout=0.2)
    for task in prepare_tasks(settings):
        held = {row.input for row in task.rows("heldout")}
        assert len(held) == 6 and len(task.train) == 24 and not held & {row.input for row in task.train}
    other = prepare_tasks(replace(settings, seed=5))
    assert [task.rows("heldout") for task in other] == [task.rows("heldout") for task in prepare_tasks(settings)]


def test_what_cannot_be_scored_stops_the_run_before_training(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    row = json.dumps({"instruction": "Say it. ", "input": "a b c", "label": "c"}) + "\n"
    for task in ("first", "second"):
        (data / task).mkdir(parents=True)
        (data / task / "train.jsonl").write_text(row * 3)
        (data / task / "validation.jsonl").write_text(row)
    (data / "first" / "test.jsonl").write_text(row)
    options: dict[str, Any] = {"order": None, "tasks": ["first", "second"]}
    with pytest.raises(DataError, match=r"second.test\.jsonl"):
        train(config(data, tiny_models["t5"], run, **options), progress=False)
    options |= {"eval_split": "validation", "eval_mode": "rank"}
    with pytest.raises(ValueError, match="'first' is free text"):
        train(config(data, tiny_models["t5"], run, **options), progress=False)
    assert not run.exists()


def test_rows_that_were_trained_on_are_not_scored_as_held_out(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    train(config(written, tiny_models["bert"], tmp_path / "all"), progress=False)
    with pytest.raises(ValueError, match="none are held out"):
        evaluate_run(tmp_path / "all", progress=False, eval_split="heldout")
    results = train(config(written, tiny_models["bert"], tmp_path / "part", eval_split="heldout"), progress=False)
    assert evaluate_run(tmp_path / "part", progress=False)["op"] == results["op"]


def test_only_tasks_that_were_learned_are_scored(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """An encoder's classes are those of all its tasks, so that a further one would change the others' scores."""
    data, run = write_tasks(tmp_path / "data"), tmp_path / "run"
    (data / "orders.json").write_text(json.dumps({"abc": {"tasks": ["moods", "sizes"]}}))
    results = train(config(data, tiny_models["bert"], run, steps_per_task=2), progress=False)
    (data / "orders.json").write_text(json.dumps({"abc": {"tasks": ["colours", "moods", "sizes"]}}))
    again = evaluate_run(run, progress=False)
    assert (again["tasks"], again["scores"]) == (["moods", "sizes"], [row[1] for row in results["accuracy"]])
    (data / "moods").rename(tmp_path / "moods")
    with pytest.warns(UserWarning, match="not scored, since .*data does not hold them: moods"):
        assert evaluate_run(run, progress=False)["scores"] == again["scores"][1:]
    (data / "sizes").rename(tmp_path / "sizes")
    with pytest.raises(ValueError, match=r"data holds none of the tasks of .*run: moods, sizes"):
        evaluate_run(run, progress=False)
    # of a run that is not finished, its configuration says what its checkpoints are scored on
    (run / "tasks.json").unlink()
    (data / "orders.json").write_text(json.dumps({"abc": {"tasks": ["colours"]}}))
    (run / "checkpoints" / "task-01-moods").rename(run / "checkpoints" / "task-01-colours")
    assert evaluate_run(run, checkpoint=1, progress=False)["tasks"] == ["colours"]


def test_data_comes_from_the_environment_and_folders_become_absolute(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIF_DATA", str(written))
    monkeypatch.chdir(tiny_models["bert"].parent)
    results = train(
        replace(config(written, Path(tiny_models["bert"].name), tmp_path / "run"), data=None), progress=False
    )
    monkeypatch.chdir(tmp_path)
    assert evaluate_run(tmp_path / "run", progress=False)["op"] == results["op"]


def test_fields_without_effect_are_named(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "seqlora", "kif": KIFConfig(density=0.5), "head": "linear", "holdout": 0.4}
    with (
        pytest.warns(UserWarning, match="no effect with seqlora and this model: head, kif"),
        pytest.warns(UserWarning, match="holdout has no effect with eval_split test"),
    ):
        train(config(written, tiny_models["t5"], tmp_path / "run", **options), progress=False)


def test_skipped_steps_are_reported(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kif.seq2seq import EncoderDecoderModel

    real, calls = EncoderDecoderModel.loss, []

    def broken(self: Any, batch: Any) -> Any:
        calls.append(1)
        loss, count = real(self, batch)
        return (loss * float("nan") if len(calls) in (2, 25) else loss), count

    monkeypatch.setattr(EncoderDecoderModel, "loss", broken)
    results = train(config(written, tiny_models["t5"], tmp_path / "run"), progress=False)
    assert results["skipped"] == 2
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [record for record in records if "loss" in record]
    assert rounds[0]["loss"] is None and rounds[-1]["skipped"] == 2


def test_what_is_wrong_stops_the_run_before_training(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KIF_DATA", raising=False)
    run = tmp_path / "run"
    good = config(written, tiny_models["t5"], run)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"order": None}, ValueError, "no tasks"),
        ({"data": None}, ValueError, "no data"),
        ({"order": None, "tasks": ["colours", "sices"]}, DataError, "sizes"),
        ({"precision": "fp16"}, ValueError, "overflow"),
        ({"model": ""}, ValueError, "no model"),
        ({"model": str(tmp_path / "nosuch")}, ValueError, "no such folder"),
        ({"device": "cuda:99"}, ValueError, "not available"),
        ({"device": "gpu"}, ValueError, "unknown device"),
        ({"device": "meta"}, ValueError, "'meta' is not supported; use auto, cpu"),
        ({"max_length": 3}, ValueError, "no room for the input"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            train(replace(good, **change), progress=False)
        assert not run.exists()
    monkeypatch.setenv("KIF_BACKEND", "triton")
    with pytest.raises(ValueError, match="KIF_BACKEND='triton'"):
        train(good, progress=False)
    run.mkdir()
    (run / "results.json").write_text("{}")
    with pytest.raises(FileExistsError, match="not empty"):
        train(good, progress=False)
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read"):
        evaluate_run(tmp_path / "nowhere", progress=False)
    with pytest.raises(ValueError, match="either an adapter folder or a checkpoint"):
        evaluate_run(run, adapter=run, checkpoint=1, progress=False)


def test_two_processes_never_write_one_folder(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    good = config(written, tiny_models["t5"], run)
    with claimed(run):
        for resume in (False, True):
            with pytest.raises(FileExistsError, match="run is being written by another process: choose another"):
                train(replace(good, resume=resume), progress=False)
    assert not run.exists(), "nothing was written there"
    # the claim ends with the process that made it, and what that leaves is no run
    kill = "import os, signal, sys; from pathlib import Path; from kif.files import claimed\n"
    kill += "with claimed(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", kill, str(run)], check=False)
    assert [path.name for path in run.iterdir()] == [LOCK]
    seen: list[list[str]] = []

    def tasks_of(config: RunConfig) -> Any:
        seen.append([path.name for path in run.iterdir()])
        raise ValueError("enough")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="enough"):
        patch.setattr("kif.run.prepare_tasks", tasks_of)
        train(good, progress=False)
    assert seen == [[LOCK]] and list(run.iterdir()) == []


def test_a_claim_needs_no_locks_and_says_what_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"file/run cannot be written: Not a directory; choose another --output"),
        claimed(tmp_path / "file" / "run"),
    ):
        pass

    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with claimed(tmp_path / "run"):
        (tmp_path / "run" / "results.json").write_text("{}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["results.json"]


def test_three_real_tasks_end_to_end(benchmark_data: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from kif.cli import main

    run, names = tmp_path / "run", ["agnews", "copa", "rte"]
    arguments = [
        "train", "--model", str(tiny_models["t5"]), "--data", str(benchmark_data), "--tasks", *names,
        "--output", str(run), "--limit-train", "200", "--limit-eval", "20", "--steps-per-task", "30",
        "--max-length", "96", "--lr", "1e-2",
        "--max-new-tokens", "8", "--kif.outer-steps", "4", "--cache-dir", str(tmp_path / "cache"),
    ]  # fmt: skip
    assert main(arguments) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["tasks"] == names and results["steps"] == {"inner": 66, "outer": 24}
    assert all((results["accuracy"][i][j] is None) == (i > j) for i in range(3) for j in range(3))
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first_task = [record["loss"] for record in losses if record.get("phase") == 0]
    assert first_task[-1] < first_task[0]
    again = evaluate_run(run, progress=False)
    assert again["scores"] == [row[-1] for row in results["accuracy"]]
    assert main(["eval", str(run), "--checkpoint", "1", "--eval-mode", "rank"]) == 0
    assert main(["report", str(run), "--output", str(tmp_path / "report")]) == 0
    assert list((tmp_path / "report").glob("*.png"))
