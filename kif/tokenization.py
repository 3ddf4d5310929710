"""Texts are tokenised once: rows are kept in memory and, by a hash of everything they depend on, on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kif.families import Encoded, LanguageModel
from kif.files import write_json
from kif.tasks import Example, Task

FORMAT = 2
"""Raised when `Encoded`, or how it is made, changes, so that older files are not read."""

ORIGIN = "kif_origin.json"
"""In an adapter folder, what it was trained with besides what PEFT notes."""

PROBES = ("The quick brown fox, 12.5% of 1990!\n\tQ: Why?", "Straße, cœur, naïve — “quote”", "Привет, 你好, مرحبا 🙂")
"""Texts that tokenizers of equal vocabulary but other rules cut differently."""


def cache_folder(folder: str | Path | None = None) -> Path:
    """`folder`, or `kif` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).

    Raises: ValueError without a home folder.
    """
    try:
        if folder is not None:
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kif"
    except RuntimeError as error:
        raise ValueError(f"no cache folder: {error}; set HOME or XDG_CACHE_HOME, or give --cache-dir") from error


def token_cache(folder: str | None) -> TokenCache:
    """The cache in `cache_folder(folder)`; in memory only, with a warning, where there is no such folder."""
    try:
        return TokenCache(cache_folder(folder))
    except ValueError as error:
        warnings.warn(f"tokenised texts are not cached: {error}", stacklevel=2)
        return TokenCache(None)


class TokenCache:
    """Encoded rows by content.

    A file is a safetensors file of the rows' ids one after another. It is written under another name and moved, so
    that several processes may share the folder. Files that cannot be read or whose content does not match their
    checksum are written anew; a folder that cannot be written to gives one warning.

    Args:
        folder: where the files are kept; None: in memory only.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._rows: dict[str, list[Encoded]] = {}

    def encode(self, lm: LanguageModel, task: Task, examples: Sequence[Example]) -> list[Encoded]:
        """`lm.encode(task, examples)`, made at most once. Raises what that raises."""
        key = content_key(lm, task, examples)
        if key not in self._rows:
            path = None if self.folder is None else self.folder / f"{_file_name(task.name)}-{key[:24]}.safetensors"
            rows = None if path is None else _read(path, key, task.name, len(examples))
            if rows is None:
                rows = lm.encode(task, examples)
                if path is not None:
                    self._write(path, key, rows)
            self._rows[key] = rows
        return list(self._rows[key])

    def _write(self, path: Path, key: str, rows: Sequence[Encoded]) -> None:
        tensors = _to_tensors(rows)
        content = save(tensors, metadata={"check": _check(key, tensors)})
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                temporary = Path(file.name)
                file.write(content)
            temporary.replace(path)
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            warnings.warn(f"tokenised texts are not cached: {error}", stacklevel=3)
            self.folder = None


def content_key(lm: LanguageModel, task: Task, examples: Sequence[Example]) -> str:
    """Hash of tokenizer, family, lengths, task name, template, labels and all texts."""
    digest = hashlib.sha256()
    for part in (FORMAT, lm.fingerprint, task.name, task.template, task.labels):
        digest.update(json.dumps(part).encode() + b"\n")
    for example in examples:
        digest.update(json.dumps([example.instruction, example.input, example.label]).encode() + b"\n")
    return digest.hexdigest()


def tokenizer_key(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary and of what it makes of some texts; the same in all versions of transformers."""
    probes = [tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"] for text in PROBES]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([vocabulary, probes]).encode()).hexdigest()


def save_origin(folder: Path, tokenizer: Any) -> None:
    """Write into an adapter folder by which tokenizer the adapter was trained."""
    write_json(folder / ORIGIN, {"tokenizer": tokenizer_key(tokenizer)})


def check_origin(folder: Path, tokenizer: Any, model: str) -> None:
    """Raise ValueError where the adapter in `folder` was trained with another tokenizer; without a note nothing.

    Args:
        folder: adapter folder.
        tokenizer: the one of `model`.
        model: for the message.
    """
    path = folder / ORIGIN
    if not path.is_file():
        return
    try:
        recorded = json.loads(path.read_bytes())["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, if the tokenizer is surely the same") from error
    if recorded != tokenizer_key(tokenizer):
        raise ValueError(
            f"the adapter in {folder} was trained with another tokenizer than the one of {model}, so that its tokens "
            "would mean something else: give the model with the tokenizer of the training with --model"
        )


def _file_name(task: str) -> str:
    return re.sub(r"[^\w.-]", "_", task)


def _to_tensors(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([token for row in rows for token in row.input_ids], dtype=torch.int32),
        "input_lengths": torch.tensor([len(row.input_ids) for row in rows], dtype=torch.int32),
        "targets": torch.tensor([token for row in rows for token in row.target], dtype=torch.int32),
        "target_lengths": torch.tensor([len(row.target) for row in rows], dtype=torch.int32),
        "truncated": torch.tensor([row.truncated for row in rows], dtype=torch.uint8),
    }


def _check(key: str, tensors: dict[str, Tensor]) -> str:
    """Checksum of key and content, in one entry since safetensors writes several in random order."""
    digest = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str, task: str, count: int) -> list[Encoded] | None:
    """The rows of a file, or None if there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError):
        return None
    if metadata.get("check") != _check(key, tensors):
        return None
    inputs = _split(tensors["input_ids"], tensors["input_lengths"])
    targets = _split(tensors["targets"], tensors["target_lengths"])
    if len(inputs) != count:
        return None
    return [
        Encoded(ids, target, task, bool(truncated))
        for ids, target, truncated in zip(inputs, targets, tensors["truncated"].tolist(), strict=True)
    ]


def _split(values: Tensor, lengths: Tensor) -> list[tuple[int, ...]]:
    flat = values.tolist()
    ends = accumulate(lengths.tolist(), initial=0)
    return [tuple(flat[start:end]) for start, end in pairwise(ends)]
