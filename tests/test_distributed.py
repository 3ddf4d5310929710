"""Two processes against one: equal weights on both, and those of one process with the same batches."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_tiny, topic_task
from torch import multiprocessing
from transformers.models.t5.modeling_t5 import T5LayerFF

from kif.config import KIFConfig, LFPT5Config, RunConfig, VRMCLConfig
from kif.distributed import all_reduce_, first_process_first, gather, local_device, process_group, share, world
from kif.evaluate import evaluate
from kif.families import Encoded
from kif.faults import Disagreement
from kif.loop import train_phase
from kif.methods import METHODS
from kif.models import load_language_model

ALIKE = (
    "seqlora", "inclora", "lora-replay", "recurrent-kif", "ewc", "migu", "vr-mcl", "olora", "tasl", "mtl",
)  # fmt: skip
"""Methods to which it does not matter how a step's rows are split."""
RANKS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 without dropout and kinks: where ReLU is near 0, sums in another order change whole gradients."""
    folder = build_tiny("t5", tmp_path_factory.mktemp("t5"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**settings, "dropout_rate": 0.0, "feed_forward_proj": "gelu", "dense_act_fn": "gelu"})
    )
    return folder


def train_two_tasks(model: Path, name: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Weights at the end, the losses logged and the answers; 13 rows in batches of 4: the last one has one row."""
    task = topic_task(22)
    tasks = [replace(task, train=task.train[:13]), replace(task, name="others", train=task.train[13:])]
    config = RunConfig(
        model=str(model), method=name, device="cpu", lora_dropout=0.0, batch_size=4, epochs=2, lr=1e-2, eps=1e-4,
        warmup_steps=0, gradient_accumulation=2, kif=KIFConfig(inner_steps=3, outer_steps=2),
        # larger rates of VR-MCL make of rounding differences that can be seen
        vrmcl=VRMCLConfig(outer_lr=0.1), lfpt5=LFPT5Config(prompt_length=5, lm_length=64, pseudo_candidates=4),
    )  # fmt: skip
    config = replace(config, **options)
    lm = load_language_model(METHODS[name].adapter_config(config, 2), {task.name: task.labels for task in tasks})
    method, log, memory = METHODS[name](lm, config), list[Any](), list[Encoded]()
    method.phases(tasks)
    for index, part in enumerate(tasks):
        rows = lm.encode(part, part.train)
        if name == "migu":
            # padding counts in its magnitudes and depends on the rows beside
            ids = rows[0].input_ids
            rows = [replace(rows[0], input_ids=(*ids[i:], *ids[:i])) for i in range(len(rows))]
        train_phase(lm, method, config, index=index, tasks=1, rows=rows, memory=memory, log=log.append)
        memory = rows[:5]
    losses = torch.tensor([[record["loss"], record["memory_loss"] or 0.0] for record in log])
    scored = evaluate(lm, task, task.test, mode="generate", batch_size=3, max_new_tokens=4)
    return method.arena.data, losses, scored.predictions


def run_settings(model: Path, data: Path, output: Path) -> RunConfig:
    return RunConfig(
        model=str(model), data=str(data), order="abc", output=str(output), cache_dir=str(output.parent / "cache"),
        device="cpu", method="recurrent-kif", kif=KIFConfig(inner_steps=2), steps_per_task=9, lr=1e-2, max_length=64,
        max_new_tokens=4, checkpoint_rounds=1,
    )  # fmt: skip


def work(rank: int, ports: list[int], model: Path, data: Path, output: Path) -> None:
    """What each process does, all one after another: starting a process takes longer."""
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "localhost", "MASTER_PORT": ports[0]}
    os.environ.update({name: str(value) for name, value in where.items()})
    found: dict[str, torch.Tensor] = {}
    answers: dict[str, list[str]] = {}
    with process_group("auto" if not torch.cuda.is_available() else "cpu"):
        assert world() == (rank, RANKS) and gather(rank) == [0, 1] and share("abc") == ("ac", "b")[rank]
        assert all_reduce_(torch.tensor([rank + 1.0])).item() == 3.0
        order = output / "order"
        with first_process_first():
            assert order.exists() == (rank == 1)
            order.touch()
        for name in METHODS:
            found[f"{name}/weights"], found[f"{name}/losses"], answers[name] = train_two_tasks(model, name)
        with pytest.raises(Disagreement, match="after round 1 the processes hold different weights"):
            one_process_masks_otherwise(model, rank)
        interrupted_and_resumed(model, data, output)
        different_inputs_are_refused(model, data, output, rank)
    assert world() == (0, 1)
    for port, fail in zip(ports[1:], (fail_alone, fail_before_the_others), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with pytest.raises((RuntimeError, SystemExit)), process_group("cpu"):
            fail(rank)
    save_file(found, output / f"{rank}.safetensors")
    (output / f"{rank}.json").write_text(json.dumps(answers))


def one_process_masks_otherwise(model: Path, rank: int) -> None:
    train_two_tasks(model, "recurrent-kif", kif=KIFConfig(inner_steps=3, outer_steps=2, density=0.2 + 0.1 * rank))


def fail_alone(rank: int) -> None:
    """One process fails; the other, which waits for it, does not wait forever."""
    if rank == 1:
        raise RuntimeError("out of memory")
    for _ in range(2):
        all_reduce_(torch.zeros(1))


def fail_before_the_others(rank: int) -> None:
    with first_process_first():
        assert rank == 0, "the other processes do not come here"
        raise RuntimeError("no such file")


def interrupted_and_resumed(model: Path, data: Path, output: Path) -> None:
    """Two runs with dropout, of which one is interrupted in its second task and resumed."""
    import kif.run

    class Interrupted(Exception):
        pass

    class Log(kif.run.RunLog):
        def __call__(self, record: dict[str, Any]) -> None:
            super().__call__(record)
            if record.get("phase") == 1 and record["round"] == 1:
                raise Interrupted

    kif.run.train(run_settings(model, data, output / "whole"), progress=False)
    settings, usual = run_settings(model, data, output / "resumed"), kif.run.RunLog
    kif.run.RunLog = Log  # type: ignore[misc]
    try:
        with pytest.raises(Interrupted):
            kif.run.train(settings, progress=False)
    finally:
        kif.run.RunLog = usual  # type: ignore[misc]
    if world()[0] == 0:
        shutil.copytree(output / "resumed", output / "interrupted")
    kif.run.train(replace(settings, resume=True), progress=False)


def different_inputs_are_refused(model: Path, data: Path, output: Path, rank: int) -> None:
    import kif.run

    settings = run_settings(model, data, output / "different")
    others = [replace(settings, lr=2e-2), replace(settings, checkpoint_rounds=2), replace(settings, limit_train=20)]
    messages = ["lr=0.02, process 0 0.01", "checkpoint_rounds=2, process 0 1", "limit_train=20, process 0 None"]
    changed = output / "changed"
    with first_process_first():
        if rank == 0:
            shutil.copytree(data, changed)
            rows = (changed / "sizes" / "train.jsonl").read_text()
            (changed / "sizes" / "train.jsonl").write_text(rows.replace("row", "line"))
    others.append(replace(settings, data=str(changed)))
    messages.append("data.sizes.30 rows to train='[0-9a-f]+', process 0 '[0-9a-f]+'")
    for other, message in zip(others, messages, strict=True):
        with pytest.raises(ValueError, match=f"process 1 was given {message}: all must get the same options"):
            kif.run.train(other if rank == 1 else settings, progress=False)
    assert rank == 1 or not (output / "different").exists()


@pytest.fixture(scope="module")
def ended(model: Path, written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes found."""
    output = tmp_path_factory.mktemp("ranks")
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for free in sockets:
            free.bind(("localhost", 0))
        ports = [free.getsockname()[1] for free in sockets]
    multiprocessing.spawn(work, (ports, model, written, output), nprocs=RANKS)
    return output


@pytest.mark.parametrize("name", METHODS)
def test_both_processes_have_the_same_bits(name: str, ended: Path) -> None:
    first, second = (load_file(ended / f"{rank}.safetensors") for rank in range(RANKS))
    assert torch.equal(first[f"{name}/weights"], second[f"{name}/weights"])
    assert first[f"{name}/weights"].isfinite().all()
    assert torch.equal(first[f"{name}/losses"], second[f"{name}/losses"])


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_as_one(name: str, ended: Path, model: Path) -> None:
    first = load_file(ended / "0.safetensors")
    weights, losses, answers = train_two_tasks(model, name)
    torch.testing.assert_close(first[f"{name}/weights"], weights, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(first[f"{name}/losses"], losses, rtol=1e-4, atol=1e-5)
    assert [json.loads((ended / f"{rank}.json").read_text())[name] for rank in range(RANKS)] == [answers] * RANKS


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_in_bf16(name: str, model: Path) -> None:
    """The adapter's products in fp32 and in bf16; without LoRA both are the same."""
    weights, losses, _ = train_two_tasks(model, name, precision="bf16")
    assert weights.dtype == torch.float32 and weights.isfinite().all() and losses.isfinite().all()
    others, lower, _ = train_two_tasks(model, name, precision="bf16", adapter_precision="bf16")
    assert torch.equal(weights, others) == ("adapter_precision" in METHODS[name].unused)
    torch.testing.assert_close(lower[:2], losses[:2], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["recurrent-kif", "moelora", "sapt", "migu", "vr-mcl", "lfpt5"])
def test_gradient_checkpointing_changes_nothing(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods whose hooks see each layer again; the same dropout is drawn."""
    forward, layers = T5LayerFF.forward, list[bool]()
    monkeypatch.setattr(T5LayerFF, "forward", lambda *given: (layers.append(True), forward(*given))[1])
    found, passes = [], []
    for wanted in (False, True):
        torch.manual_seed(0)
        found.append(train_two_tasks(model, name, gradient_checkpointing=wanted, lora_dropout=0.2))
        passes.append(len(layers))
        layers.clear()
    (weights, losses, answers), again = found
    torch.testing.assert_close(again[0], weights, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(again[1], losses, rtol=1e-5, atol=1e-6)
    assert again[2] == answers and passes[1] > passes[0]


def test_a_run_of_two_processes_is_resumed_bit_for_bit(ended: Path) -> None:
    whole, resumed = (ended / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert json.loads((ended / "whole" / "environment.json").read_text())["processes"] == RANKS


def test_another_number_of_processes_is_refused(ended: Path, model: Path, written: Path) -> None:
    import kif.run

    settings = run_settings(model, written, ended / "interrupted")
    with pytest.raises(ValueError, match="was begun with processes=2, now it is 1"):
        kif.run.train(replace(settings, resume=True), progress=False)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, "-m", "kif", *arguments], capture_output=True, text=True, check=False, timeout=300, env=variables
    )


def test_torchrun_writes_one_run_folder(written: Path, model: Path, tmp_path: Path) -> None:
    from kif.cli import main

    def arguments(output: str) -> list[str]:
        return [
            "train", "--model", str(model), "--data", str(written), "--order", "abc", "--steps-per-task", "6",
            "--lr", "1e-2", "--eps", "1e-4", "--lora-dropout", "0", "--max-length", "64", "--max-new-tokens", "4",
            "--device", "cpu", "--output", str(tmp_path / output), "--cache-dir", str(tmp_path / "cache"),
        ]  # fmt: skip

    done = torchrun(*arguments("two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1
    assert main(arguments("one")) == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["accuracy"] == one["accuracy"] and two["steps"] == one["steps"]
    assert 0.0 < two["time"]["all_reduce"] < two["time"]["train"] and "all_reduce" not in one["time"]
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1])
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5)

    # the folder is taken: process 0 says so, and all end
    again = torchrun(*arguments("two"))
    assert again.returncode != 0 and again.stderr.count("is not empty") == 1
    shutil.rmtree(tmp_path / "two")


def test_devices_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (local_device("auto"), local_device("cpu")) == ("auto", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device("auto") == local_device("cuda") == "cuda:1"
    with pytest.raises(ValueError, match="cannot share device 'cuda:0'"):
        local_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="has no GPU"):
        local_device("auto")
