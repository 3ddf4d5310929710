"""`benchmarks.memory`: what it counts is there, and what is written is what was measured."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from benchmarks import memory, models


def test_parts_and_peaks(tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--model",
        str(tiny_models["llama"]),
        "--rows",
        "2",
        "--length",
        "16",
        "--json",
        str(tmp_path / "m.json"),
    ]
    assert memory.main([*options, "--forms", "fp32"]) == 0
    printed = capsys.readouterr().out
    content: Any = json.loads((tmp_path / "m.json").read_text())
    full, half = *content["results"], memory.measure(str(tiny_models["llama"]), "bf16", "cpu", 2, 16)
    # tiny llama: embeddings and output 384 x 16, attention 4 x 16 x 16, feed-forward 3 x 16 x 32, three norms of 16
    elements = 2 * 384 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16
    buffers = full["base_by_dtype"]["float32"] - 4 * elements
    assert 0 <= buffers <= 64  # rotary frequencies
    assert half["base_by_dtype"] == {"bfloat16": 2 * elements, "float32": buffers}
    assert full["adapter"] == half["adapter"] == 4 * 2 * (8 * 16 + 16 * 8)
    assert full["arena"] == half["arena"] == 4 * 4 * 8 * 16 * len(full["arena_buffers"])
    assert {"data", "grad", "importance_in", "importance_out", "theta_start"} <= set(full["arena_buffers"])
    assert full["before"] <= full["training"] and full["loaded"] <= full["loading"]
    assert f"| fp32 | {full['base'] / 2**20:.1f} | {full['adapter'] / 2**20:.1f} |" in printed
    assert content["environment"]["transformers"] and content["model"] == tiny_models["llama"].name


def test_a_form_that_fails_costs_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured is written before the next form, whose time may be up."""
    target = tmp_path / "m.json"
    known = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        form = command[command.index("--forms") + 1]
        known.append([result["form"] for result in json.loads(target.read_text())["results"]] if known else [])
        found = {"form": form, **dict.fromkeys((*memory.PARTS, *memory.PEAKS), 2**20)}
        return subprocess.CompletedProcess(command, 9 if form == "int8" else 0, json.dumps(found))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(memory, "environment", lambda device: {})
    options = ["--forms", "nf4", "int8", "bf16", "--json", str(target)]
    assert memory.main(["--model", "x", *options]) == 1
    assert known == [[], ["nf4"], ["nf4"]]
    assert [result["form"] for result in json.loads(target.read_text())["results"]] == ["nf4", "bf16"]
    printed = capsys.readouterr().out
    assert "| bf16 | 1.0 |" in printed and "failed: int8 (status 9)" in printed


def test_scales_of_quantised_weights_count(tiny_models: dict[str, Path]) -> None:
    pytest.importorskip("bitsandbytes")
    full, small = (memory.measure(str(tiny_models["llama"]), form, "cpu", 2, 16) for form in ("bf16", "nf4"))
    quantised = 4 * 16 * 16 + 3 * 16 * 32
    assert small["base_by_dtype"]["uint8"] == quantised // 2
    assert small["base_by_dtype"]["bfloat16"] == full["base_by_dtype"]["bfloat16"] - 2 * quantised
    # one scale for 64 weights, and the 16 values of the code for each layer
    assert small["base_by_dtype"]["float32"] >= full["base_by_dtype"]["float32"] + 4 * quantised // 64 + 4 * 16
    assert small["arena"] == full["arena"]
    eight = memory.measure(str(tiny_models["llama"]), "int8", "cpu", 2, 16)
    assert eight["base_by_dtype"]["int8"] == quantised
    # one scale for each output of a layer
    assert eight["base_by_dtype"]["float32"] == full["base_by_dtype"]["float32"] + 4 * (4 * 16 + 2 * 32 + 16)


@pytest.mark.parametrize("shape", ["tiny-t5", "tiny-llama"])
def test_a_shape_of_random_weights(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target = tmp_path / "m.json"
    options = ["--rows", "2", "--length", "16", "--forms", "bf16", "--json", str(target)]
    assert memory.main(["--shape", shape, *options]) == 0
    content: Any = json.loads(target.read_text())
    _, values = models.MODELS[shape]
    assert content["model"] == shape and [path.name for path in tmp_path.iterdir()] == ["m.json"]
    (found,) = content["results"]
    # bf16, of embeddings alone this much
    width = values.get("d_model") or values["hidden_size"]
    assert 2 * values["vocab_size"] * width < found["base_by_dtype"]["bfloat16"] < 6 * values["vocab_size"] * width
    with pytest.raises(SystemExit):
        memory.main(["--shape", shape, "--model", "x", *options])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "size", "files"), [("tiny-t5", "1GB", 1), ("tiny-llama", "1MB", 3)])
def test_random_weights_are_written_a_file_at_a_time(
    shape: str, size: str, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "FILE", size)
    memory.write_random(shape, tmp_path, torch.device("cpu"))
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    auto = AutoModelForSeq2SeqLM if shape == "tiny-t5" else AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.dim() == 1:
            assert parameter.eq(1).all(), name
        else:
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.3), name
