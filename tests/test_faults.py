"""What befalls a run that is right: no memory, a full disk, numbers that overflow, another tokenizer."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import tokenize
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import outcome
from safetensors import SafetensorError

from kif import run as run_module
from kif.checkpoint import Checkpoints
from kif.cli import main
from kif.config import KIFConfig, RunConfig
from kif.configfile import dump_config, load_config
from kif.faults import (
    DiskFull,
    Diverged,
    OutOfMemory,
    SkippedSteps,
    disk_space,
    is_out_of_memory,
    less_memory_in_scoring,
    less_memory_in_training,
)
from kif.files import write_text
from kif.run import evaluate_run, train
from kif.seq2seq import EncoderDecoderModel
from kif.tokenization import ORIGIN
from kif.training import RunLog

SOURCES = [path for package in ("kif", "kif_kernels") for path in (Path(__file__).parents[1] / package).rglob("*.py")]


def settings(written: Path, model: Path, output: Path, **options: Any) -> RunConfig:
    values = {
        "steps_per_task": 10, "limit_eval": 4, "lr": 1e-2, "max_length": 64, "max_new_tokens": 4, "method": "seqlora",
        "lora_dropout": 0.0, **options,
    }  # fmt: skip
    return RunConfig(
        model=str(model), data=str(written), order="abc", output=str(output), device="cpu",
        cache_dir=str(output.parent / "cache"), **values,
    )  # fmt: skip


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


# memory


def allocate_too_much() -> None:
    """The CPU's own error."""
    torch.empty(1 << 60, dtype=torch.uint8)


def gpu_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("fail", [allocate_too_much, gpu_error])
def test_no_memory_in_a_training_step(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, fail: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # the draws of dropout depend on how a step is split
    model = Path(shutil.copytree(tiny_models["t5"], tmp_path / "model"))
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**content, "dropout_rate": 0.0}))
    config = settings(written, model, tmp_path / "run", lr=1e-3)
    train(replace(config, output=str(tmp_path / "whole")), progress=False)
    real, calls = EncoderDecoderModel.loss, []

    def loss(self: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 15:
            fail()
        return real(self, batch)

    dump_config(config, tmp_path / "run.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(EncoderDecoderModel, "loss", loss)
        assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 1
    message = capsys.readouterr().err
    advice = r"kif: failed: out of memory while training task 2/3 sizes: resume with gradient_accumulation 2 \(now 1\)"
    assert re.search(advice, message) and "smaller batch_size (now 8)" in message and "precision bf16" in message
    assert "Traceback" not in message
    with pytest.warns(UserWarning, match="goes on with {'gradient_accumulation': 2}"):
        train(replace(config, gradient_accumulation=2, resume=True), progress=False)
    assert load_config(tmp_path / "run" / "config.yaml").gradient_accumulation == 2
    from safetensors.torch import load_file

    ends = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("run", "whole")]
    for name, tensor in ends[1].items():
        torch.testing.assert_close(ends[0][name], tensor, rtol=1e-2, atol=1e-4)
    # finished, it is the run of either
    with pytest.warns(UserWarning, match="is finished"):
        train(replace(config, resume=True), progress=False)


def test_graphs_are_given_up_before_the_rest() -> None:
    advice = "resume without cuda_graphs, which keep the memory of a pass; or "
    for config in (RunConfig(cuda_graphs=True), RunConfig(cuda_graphs=True, eval_batch_size=1)):
        assert advice in less_memory_in_training(config) and less_memory_in_scoring(config).startswith(advice)
        # which cannot be had together
        assert "gradient_checkpointing" not in less_memory_in_training(config)
    plain = RunConfig()
    assert "resume with gradient_checkpointing" in less_memory_in_training(plain)
    assert "cuda_graphs" not in less_memory_in_training(plain) + less_memory_in_scoring(plain)


def test_no_memory_in_scoring(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(written, tiny_models["t5"], tmp_path / "run")
    train(replace(config, output=str(tmp_path / "whole")), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(EncoderDecoderModel, "answer", lambda *_: allocate_too_much())
        with pytest.raises(OutOfMemory, match=r"while scoring colours: resume with eval_batch_size 16 \(now 32\)"):
            train(config, progress=False)
    train(replace(config, eval_batch_size=16, resume=True), progress=False)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_no_memory_for_the_model(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load_language_model", lambda *_, **__: allocate_too_much())
    with pytest.raises(OutOfMemory, match=r"while loading .*: use precision bf16 .*quantization nf4 .* smaller model"):
        train(settings(written, tiny_models["t5"], tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()


def test_other_errors_are_not_taken_for_no_memory() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("the sizes do not match")) and not is_out_of_memory(ValueError("memory"))


# disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; tests that need it are skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no block of a file system free."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return


@pytest.mark.parametrize("when", ["training", "scoring", "saving"])
def test_a_disk_that_fills_up(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, small_disk: Path, when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A real one: what was saved before survives, and with room again the run ends as an uninterrupted one."""
    options: dict[str, Any] = {"checkpoint_rounds": 1, "method": "recurrent-kif", "kif": KIFConfig(inner_steps=3)}
    config = settings(written, tiny_models["t5"], small_disk / "run", **options)
    config = replace(config, cache_dir=str(tmp_path / "cache"))
    train(replace(config, output=str(tmp_path / "whole")), progress=False)
    usual = RunLog.__call__

    def log(self: RunLog, record: dict[str, Any]) -> None:
        usual(self, record)
        now = {
            "training": record.get("phase") == 1 and record.get("round") == 1,
            "scoring": record.get("after") == 1,
            "saving": record.get("after") == 2 and record.get("task") == "moods",
        }
        if now[when]:
            fill(small_disk)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "__call__", log)
        with pytest.raises(
            DiskFull, match=r"disk/run/.* cannot be written: No space left on device; .* needed, .*free there.*--resume"
        ):
            train(config, progress=False)
    kept = Checkpoints(small_disk / "run" / "state").read(torch.device("cpu"))
    assert kept is not None and kept["phase"] == (1 if when != "saving" else 2)
    (small_disk / "ballast").unlink()
    train(replace(config, resume=True), progress=False)
    assert outcome(small_disk / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    "reason",
    [
        "I/O error: No space left on device (os error 28)",
        # safetensors 0.5
        'IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
    ],
)
def test_a_checkpoint_without_room_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    checkpoints = Checkpoints(tmp_path / "state")
    state = {"weights": torch.ones(1 << 18), "number": 1}
    checkpoints.write(state)

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: {reason}")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(DiskFull, match=r"state/000002 cannot be written: No space left on device; 1\.0 MiB are"):
            checkpoints.write({**state, "number": 2})
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["000001"], "the half is removed, it needs room"
    checkpoints.write({**state, "number": 3})
    read = Checkpoints(tmp_path / "state").read(torch.device("cpu"))
    assert read is not None and read["number"] == 3


def test_processes_must_go_on_from_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "state")
    checkpoints.write({"number": 1})
    monkeypatch.setattr("kif.checkpoint.gather", lambda last: [last, last + 1])
    with pytest.raises(RuntimeError, match=r"different checkpoints in .*state: it must be shared by all"):
        Checkpoints(tmp_path / "state").read(torch.device("cpu"))


def test_a_log_and_a_file_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kif.progress import Progress

    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(DiskFull, match=r"metrics.jsonl cannot be written: No space left on device; \d+ bytes are"),
        RunLog(tmp_path / "metrics.jsonl", Progress(False), None) as log,
    ):
        log({"event": "score"})
    (tmp_path / "a.json").write_text("before")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(122, "Disk quota exceeded")))
    with pytest.raises(DiskFull, match=r"a.json cannot be written: Disk quota exceeded"):
        write_text(tmp_path / "a.json", "after")
    assert (tmp_path / "a.json").read_text() == "before" and not (tmp_path / "a.json.tmp").exists()
    with pytest.raises(PermissionError), disk_space(tmp_path):
        raise PermissionError(13, "Permission denied")


# numbers


def test_a_run_that_diverges_ends(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = EncoderDecoderModel.loss, []

    def loss(self: Any, batch: Any) -> Any:
        calls.append(1)
        total, count = real(self, batch)
        return total * (float("inf") if len(calls) > 10 else 1.0), count

    monkeypatch.setattr(EncoderDecoderModel, "loss", loss)
    with (
        pytest.warns(UserWarning, match=r"10 of 10 steps of a round changed nothing.*lower lr \(now 0.01\)"),
        pytest.raises(Diverged, match=r"the last 50 steps changed nothing, .* NaN or infinite: lower lr \(now 0.01\)"),
    ):
        train(settings(written, tiny_models["t5"], tmp_path / "run", steps_per_task=100), progress=False)
    assert len(calls) == 60


def test_when_skipped_steps_end_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(precision="bf16")
    watch = SkippedSteps(config, before=7)
    watch.after_round(30, 7, 30, last=False)
    with pytest.warns(UserWarning, match="29 of 30 steps .* use precision fp32"):
        watch.after_round(30, 36, 60, last=False)
    watch.after_round(30, 66, 90, last=True)
    with pytest.raises(Diverged, match="the last 4 steps"):
        SkippedSteps(config, 0).after_round(4, 4, 4, last=True)
    with pytest.raises(Diverged, match="the last 50 steps"):
        SkippedSteps(config, 0, in_a_row=40).after_round(10, 10, 70, last=False)


# adapters


def test_an_adapter_with_another_tokenizer_is_refused(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    model = Path(shutil.copytree(tiny_models["t5"], tmp_path / "model"))
    config = settings(written, model, tmp_path / "run")
    results = train(config, progress=False)
    assert evaluate_run(tmp_path / "run", progress=False)["op"] == results["op"]
    # two words of the vocabulary change places
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content))
    assert AutoTokenizer.from_pretrained(model)("a b")["input_ids"] != []
    for command in (["eval", str(tmp_path / "run")], ["export", str(tmp_path / "run"), str(tmp_path / "out")]):
        assert main(command) == 2
        assert "was trained with another tokenizer than the one of" in capsys.readouterr().err
    again = replace(config, continue_from=config.output, output=str(tmp_path / "again"), order=None, tasks=["moods"])
    (tmp_path / "run" / "tasks.json").write_text(
        (tmp_path / "run" / "tasks.json").read_text().replace('"moods"', '"minds"')
    )
    with pytest.raises(ValueError, match="another tokenizer"):
        train(again, progress=False)
    # adapters of others say nothing of it, and a damaged note is named
    (tmp_path / "run" / "adapter" / ORIGIN).write_text("[")
    assert main(["eval", str(tmp_path / "run")]) == 2 and f"{ORIGIN} is damaged" in capsys.readouterr().err
    (tmp_path / "run" / "adapter" / ORIGIN).unlink()
    assert main(["eval", str(tmp_path / "run")]) == 0


# the table of faults


def test_every_row_of_the_table_names_tests_that_exist() -> None:
    root = Path(__file__).parents[1]
    rows = re.findall(r"^\| (?!what happens)(.*) \|$", (root / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        assert len(cells) == 4, row
        named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", cells[3])
        assert named, row
        for file, test in named:
            assert f"\ndef {test}(" in (root / file).read_text(), test


# code


def test_nothing_is_read_that_could_run_code() -> None:
    forbidden = re.compile(
        r"\b(pickle|cPickle|dill|joblib|marshal|shelve)\b|torch\.load\b|yaml\.(unsafe_|full_)?load\b|\b(eval|exec)\("
        r"|trust_remote_code=(?!False)|allow_pickle=True"
    )
    found = []
    for path in SOURCES:
        with path.open("rb") as file:
            tokens = tokenize.tokenize(file.readline)
            code = " ".join(token.string for token in tokens if token.type in (tokenize.NAME, tokenize.OP))
        code = re.sub(r" ([.(=]) ", r"\1", code).replace(" (", "(")
        # a method of that name is no call of the built-in function
        found += [(path.name, match[0]) for match in forbidden.finditer(re.sub(r"\.(eval|exec)\(", ".", code))]
    assert len(SOURCES) > 40 and found == []
