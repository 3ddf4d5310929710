"""The token cache: made once, found again, and made anew when anything differs or a file is damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import build_tiny, free_text_task, topic_task

from kif.config import RunConfig
from kif.families import Encoded, LanguageModel
from kif.models import load_language_model
from kif.tasks import Example, Task
from kif.tokenization import TokenCache, cache_folder, content_key, token_cache

TOPICS, FREE = topic_task(), free_text_task()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: build_tiny(kind, root / kind) for kind in ("t5", "llama", "bert")}


def load(folder: Path, labels: Any = None, **changes: Any) -> LanguageModel:
    config = RunConfig(model=str(folder), device="cpu", **changes)
    return load_language_model(config, labels or {"topics": TOPICS.labels})


class Counted:
    """A language model that counts its calls of `encode`."""

    def __init__(self, lm: LanguageModel) -> None:
        self.fingerprint, self.lm, self.calls = lm.fingerprint, lm, 0

    def encode(self, task: Task, examples: tuple[Example, ...]) -> list[Encoded]:
        self.calls += 1
        return self.lm.encode(task, examples)


@pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
def test_made_once_and_equal(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    lm: Any = Counted(load(folders[kind], max_length=50 if kind != "bert" else 12))
    expected = lm.lm.encode(TOPICS, TOPICS.train)
    assert any(row.truncated for row in expected)
    cache = TokenCache(tmp_path)
    assert cache.encode(lm, TOPICS, TOPICS.train) == expected
    assert cache.encode(lm, TOPICS, TOPICS.train) == expected
    assert lm.calls == 1
    assert TokenCache(tmp_path).encode(lm, TOPICS, TOPICS.train) == expected
    assert lm.calls == 1
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("topics-") and file.suffix == ".safetensors"


def test_in_memory_only(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lm: Any = Counted(load(folders["t5"]))
    cache = TokenCache(None)
    rows = cache.encode(lm, TOPICS, TOPICS.train)
    rows.clear()
    assert len(cache.encode(lm, TOPICS, TOPICS.train)) == len(TOPICS.train) and lm.calls == 1
    assert list(tmp_path.iterdir()) == []


def test_key_covers_everything_that_matters(folders: dict[str, Path], tmp_path: Path) -> None:
    lm = load(folders["llama"])
    other = build_tiny("llama", tmp_path / "other")
    tokenizer = (other / "tokenizer.json").read_text()
    assert tokenizer.count('"ĠMatch"') == 0 and '"unk_token": null' in tokenizer
    (other / "tokenizer.json").write_text(tokenizer.replace('"unk_token": null', '"unk_token": "<unk>"'))
    first, *rest = TOPICS.train
    variants = [
        (lm, TOPICS, TOPICS.train),
        (load(folders["llama"], max_length=40), TOPICS, TOPICS.train),
        (load(folders["llama"], max_target_length=9), TOPICS, TOPICS.train),
        (load(other), TOPICS, TOPICS.train),
        (load(folders["t5"]), TOPICS, TOPICS.train),
        (load(folders["bert"]), TOPICS, TOPICS.train),
        (load(folders["bert"], {"other": ("x",), "topics": TOPICS.labels}), TOPICS, TOPICS.train),
        (lm, replace(TOPICS, template="{instruction}{input}\nOutput:"), TOPICS.train),
        (lm, replace(TOPICS, labels=("World",)), TOPICS.train),
        (lm, replace(TOPICS, name="topics2"), TOPICS.train),
        (lm, TOPICS, TOPICS.train[:-1]),
        (lm, TOPICS, (*rest, first)),
        (lm, TOPICS, (replace(first, label="Sports"), *rest)),
        (lm, TOPICS, (replace(first, input=first.input + " "), *rest)),
        (lm, TOPICS, (replace(first, instruction=""), *rest)),
    ]
    keys = [content_key(*variant) for variant in variants]
    assert len(set(keys)) == len(keys)
    assert content_key(load(folders["llama"]), TOPICS, TOPICS.train) == keys[0]
    lm.tokenizer("some text", truncation=True, max_length=3, padding="max_length")
    del lm.__dict__["fingerprint"]
    assert content_key(lm, TOPICS, TOPICS.train) == keys[0]


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "empty", "other rows"])
def test_damaged_files_are_written_anew(folders: dict[str, Path], tmp_path: Path, damage: str) -> None:
    lm: Any = Counted(load(folders["t5"]))
    expected = TokenCache(tmp_path).encode(lm, FREE, FREE.train)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "other rows":
        TokenCache(tmp_path / "other").encode(lm, FREE, FREE.train[:1])
        (other,) = (tmp_path / "other").iterdir()
        damaged = other.read_bytes()
    else:
        damaged = {
            "cut": whole[:-3],
            "flip": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
            "header": b"\xff" * 16 + whole[16:],
            "empty": b"",
        }[damage]
    assert damaged != whole
    file.write_bytes(damaged)
    calls = lm.calls
    assert TokenCache(tmp_path).encode(lm, FREE, FREE.train) == expected
    assert lm.calls == calls + 1
    assert file.read_bytes() == whole
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [file]


def test_folder_that_cannot_be_written(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lm = load(folders["t5"])
    cache = TokenCache(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="tokenised texts are not cached"):
        rows = cache.encode(lm, FREE, FREE.train)
    assert rows == lm.encode(FREE, FREE.train)
    assert cache.encode(lm, FREE, FREE.test[:1]) == rows[:1]


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kif"
    assert cache_folder("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "kif"


def test_without_a_home_folder_rows_are_kept_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.warns(UserWarning, match="tokenised texts are not cached: no cache folder: .*give --cache-dir"):
        assert token_cache(None).folder is None
    assert token_cache(str(tmp_path)).folder == tmp_path
