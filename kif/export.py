"""A finished run as a model folder that needs neither kif nor PEFT: the adapter merged into the base model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kif.encoder import COSINE_SCALE
from kif.faults import disk_space
from kif.methods import METHODS
from kif.methods.base import METHOD_FILE
from kif.models import load_language_model
from kif.stored import read_tasks
from kif.training import adapter_folder

INFO, LABELS = "kif.json", "label_embeddings.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(run: Path, output: Path, *, checkpoint: int | None = None, dtype: str | None = None, **changes: Any) -> str:
    """Merge a run's adapter into its base model, in fp32, and write model, tokenizer and `kif.json`; returns the name
    of the Auto class that loads the folder.

    A base that was quantised in training is loaded unquantised, so that the written model lacks the rounding that the
    adapter was trained with: it answers nearly, not exactly, as the run does.

    `kif.json` says how prompts are made: family, longest prompt, and template, instruction and labels of each task. For
    an encoder with head=cosine the model is the encoder alone, and label_embeddings.safetensors holds what its pooled
    texts are compared with: the label names' embeddings by the original base model, which the merged one would not
    give. `kif.json` names the classes in their order.

    Args:
        run: run folder.
        output: folder to write; must be empty or not exist.
        checkpoint: the adapter after this task, counted from 1. Default: the final one.
        dtype: `fp32` or `bf16`, of the written weights. Default: the precision that the run was trained with.
        changes: configuration fields to replace: model.
    Raises: ValueError for a method whose adapter is more than LoRA; FileExistsError for a folder that holds anything;
        FileNotFoundError naming the missing file; DiskFull, with nothing written.
    """
    from safetensors.torch import save_file

    from kif.configfile import load_config

    known, _ = read_tasks(run)
    trained = load_config(run / "config.yaml")
    if not METHODS[trained.method].plain_adapter:
        raise ValueError(
            f"{trained.method} cannot be exported: what it learned is more than LoRA ({METHOD_FILE} in the adapter "
            "folder), it depends on each input or stands in front of it and cannot be merged into weights; "
            "`kif predict` answers with it"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is not empty: choose another folder, or remove it")
    wanted = dtype or trained.precision
    if wanted not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {wanted!r}")
    config = replace(trained, **{"device": "cpu", **changes, "precision": "fp32", "quantization": "none"})
    folder = adapter_folder(run, [task.name for task in known], checkpoint)
    lm: Any = load_language_model(config, {task.name: task.labels for task in known}, adapter=folder)
    info: dict[str, Any] = {
        "run": str(run.resolve()),
        "method": trained.method,
        "family": lm.family,
        "max_length": config.max_length,
        "tasks": [
            {"name": t.name, "template": t.template, "instruction": t.instruction, "labels": t.labels} for t in known
        ],
    }
    embeddings = lm.label_embeddings if lm.family == "encoder" else None
    merged = lm.model.merge_and_unload()
    if lm.family == "encoder":
        info["prompt"] = "the input text alone"
        info["classes"] = list(lm.classes)
        if embeddings is None:
            merged.config.id2label = dict(enumerate(lm.classes))
            merged.config.label2id = {label: number for number, label in enumerate(lm.classes)}
        else:
            info["score"] = (
                f"{COSINE_SCALE:g} * cosine of the mean of the last hidden states over the text's tokens and each row "
                f"of label_embeddings in {LABELS}"
            )
    merged.to(DTYPES[wanted])
    with disk_space(output, sum(p.nbytes for p in merged.parameters())):
        output.mkdir(parents=True, exist_ok=True)
        try:
            merged.save_pretrained(str(output), safe_serialization=True)
            lm.tokenizer.save_pretrained(str(output))
            if embeddings is not None:
                save_file({"label_embeddings": embeddings.float().cpu().contiguous()}, output / LABELS)
            (output / INFO).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        except BaseException:
            # half a model would be taken for a whole one, and stop the retry
            shutil.rmtree(output, ignore_errors=True)
            raise
    if lm.family == "encoder":
        return "AutoModelForSequenceClassification" if embeddings is None else "AutoModel"
    return "AutoModelForSeq2SeqLM" if lm.family == "encoder-decoder" else "AutoModelForCausalLM"
