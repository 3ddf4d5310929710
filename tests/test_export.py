"""`kif export`: a plain transformers folder that answers as the run does."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from kif.cli import main
from kif.config import RunConfig
from kif.configfile import load_config
from kif.models import load_language_model
from kif.run import train
from kif.stored import read_tasks

TEXTS = ["the market rose", "a small green door", "happy"]
CASES = [
    ("recurrent-kif", "t5", {}), ("inclora", "llama", {}), ("seqlora", "bert", {"head": "linear"}),
    ("seqlora", "bert", {}),
]  # fmt: skip
LOADERS = {"t5": "AutoModelForSeq2SeqLM", "llama": "AutoModelForCausalLM"}


def finished(written: Path, model: Path, output: Path, method: str, **options: Any) -> RunConfig:
    config = RunConfig(
        model=str(model), data=str(written), output=str(output), method=method, tasks=["colours", "sizes"],
        steps_per_task=6, lr=3e-2, max_length=64, max_new_tokens=4, limit_eval=2, device="cpu",
        cache_dir=str(output.parent / "cache"), **options,
    )  # fmt: skip
    train(config, progress=False)
    return config


def outputs(model: Any, tokenizer: Any, kind: str, head: str) -> torch.Tensor:
    """What the model makes of a few texts: logits, or the last hidden states of an encoder."""
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    if kind == "t5":
        batch["decoder_input_ids"] = torch.tensor([[0, 5, 9]] * len(TEXTS))
    with torch.no_grad():
        found = model(**batch)
    states = found.last_hidden_state if kind == "bert" and head == "cosine" else found.logits
    result: torch.Tensor = states * (batch["attention_mask"].unsqueeze(-1) if kind == "llama" else 1)
    return result


@pytest.mark.parametrize(("method", "kind", "options"), CASES)
def test_an_exported_model_answers_alike(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, method: str, kind: str, options: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = finished(written, tiny_models[kind], tmp_path / "run", method, **options)
    head = options.get("head", "cosine")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    loader = LOADERS.get(kind, "AutoModel" if head == "cosine" else "AutoModelForSequenceClassification")
    assert f"{loader}.from_pretrained" in capsys.readouterr().out
    model = getattr(transformers, loader).from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not [name for name in model.state_dict() if "lora" in name]

    labels = {task.name: task.labels for task in read_tasks(tmp_path / "run")[0]}
    lm: Any = load_language_model(config, labels, adapter=tmp_path / "run" / "adapter")
    lm.model.eval()
    before = outputs(lm.model, lm.tokenizer, kind, head)
    torch.testing.assert_close(outputs(model, tokenizer, kind, head), before, rtol=1e-4, atol=1e-4)
    with lm.model.disable_adapter():
        assert (outputs(lm.model, lm.tokenizer, kind, head) - before).abs().max() > 1e-2, "the adapter does something"

    info = json.loads((tmp_path / "out" / "kif.json").read_text())
    assert [task["name"] for task in info["tasks"]] == ["colours", "sizes"] and info["method"] == method
    assert info["tasks"][0]["instruction"] == "Which of the colours? "
    if kind == "bert":
        assert info["classes"] == ["red", "green", "big", "small", "tiny"]
    if head == "linear":
        assert model.config.id2label == dict(enumerate(info["classes"]))
    elif kind == "bert":
        embeddings = load_file(tmp_path / "out" / "label_embeddings.safetensors")["label_embeddings"]
        batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
        mask = batch["attention_mask"].unsqueeze(-1)
        with torch.no_grad():
            states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            expected = lm._scores(inputs)
        scores = 20 * torch.nn.functional.cosine_similarity(
            ((states * mask).sum(1) / mask.sum(1))[:, None], embeddings[None], dim=-1
        )
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)


def test_checkpoint_and_dtype(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    config = finished(written, tiny_models["llama"], tmp_path / "run", "seqlora", precision="bf16")
    assert load_config(tmp_path / "run" / "config.yaml").precision == config.precision
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "half")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "full"), "--dtype", "fp32"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "one"), "--checkpoint", "1", "--dtype", "fp32"]) == 0
    half, full, one = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "full", "one"))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert all(torch.equal(full[name].to(torch.bfloat16), half[name]) for name in full)
    changed = [name for name in full if not torch.equal(full[name], one[name])]
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)


def test_refusals(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(written, tiny_models["t5"], tmp_path / "run", "sapt")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "sapt cannot be exported: what it learned is more than LoRA" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    finished(written, tiny_models["t5"], tmp_path / "plain", "seqlora")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "out")]) == 2
    assert "out is not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "out" / "mine.txt")]) == 2
    assert "mine.txt is not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2
    assert "tasks.json does not exist" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "new"), "--checkpoint", "9"]) == 2
    assert "plain has no checkpoint 9; there is 1 (colours), 2 (sizes)" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_model(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    finished(written, tiny_models["t5"], tmp_path / "run", "seqlora")
    output = tmp_path / "out"

    def full(*_: Any, **__: Any) -> None:
        assert (output / "model.safetensors").is_file()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
        assert main(["export", str(tmp_path / "run"), str(output)]) == 1
    said = capsys.readouterr().err
    assert f"{output} cannot be written: No space left on device; " in said and "Traceback" not in said
    assert not output.exists() and main(["export", str(tmp_path / "run"), str(output)]) == 0
