"""Data that change, that cannot be learned, that do not fit, and texts of all scripts: refused or said, in words."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crash import outcome
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kif import tasks as tasks_module
from kif.cli import main
from kif.config import RunConfig
from kif.configfile import dump_config
from kif.models import load_language_model
from kif.notes import warn_of_data
from kif.run import train
from kif.stored import read_memory, read_tasks
from kif.tasks import DataError, Example, Task, load_tasks
from kif.training import RunLog

NOTES = ("texts longer", "labels that", "labels of", "only one label", "fewer rows")


def row(text: str, label: str, instruction: str = "Which? ") -> str:
    return json.dumps({"instruction": instruction, "input": text, "label": label}, ensure_ascii=False) + "\n"


def write(folder: Path, train_rows: list[str], test_rows: list[str], labels: list[str] | None, name: str = "t") -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "train.jsonl").write_text("".join(train_rows), encoding="utf-8")
    (folder / name / "test.jsonl").write_text("".join(test_rows), encoding="utf-8")
    manifest = {"prompt_template": "{instruction}{input} =", "tasks": {name: {"labels": labels}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def settings(data: Path, model: Path, output: Path, **options: Any) -> RunConfig:
    values = {"tasks": ["t"], "steps_per_task": 4, "lr": 1e-2, "max_new_tokens": 4, "method": "seqlora", **options}
    return RunConfig(
        model=str(model), data=str(data), output=str(output), device="cpu", cache_dir=str(output.parent / "cache"),
        **values,
    )  # fmt: skip


def notes(config: RunConfig) -> list[str]:
    """What a run says of its data."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config, progress=False)
    return [str(warning.message) for warning in caught if str(warning.message).startswith(NOTES)]


ROWS = [row(f"text {i}", "ab"[i % 2]) for i in range(12)]


def test_ordinary_data_need_no_words(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "data", ROWS, ROWS[:3], ["a", "b"])
    assert notes(settings(data, tiny_models["t5"], tmp_path / "run")) == []


def test_labels_that_no_training_row_has_are_said(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    data = write(
        tmp_path / "data", ROWS, [*ROWS[:2], row("x", "c"), row("y", "c"), row("z", "d")], ["a", "b", "c", "d"]
    )
    (note,) = notes(settings(data, tiny_models["t5"], tmp_path / "run"))
    assert note.startswith(
        "labels that no training row has cannot be learned, add rows for them or do not score them: "
    )
    assert note.endswith("t: 'c', 'd' in 3 of 5 rows to score")


def test_one_label_only_is_said(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "data", [ROWS[0]] * 9, ROWS[:1], ["a", "b"])
    (note,) = notes(settings(data, tiny_models["bert"], tmp_path / "run"))
    assert note.startswith("only one label in all training rows") and note.endswith("t: 'a' in 9 rows")


SAME = "labels of equal tokens cannot be told apart, name them otherwise or take another model: "
LOST = "labels that the tokenizer cannot write are never answered, rename them or use eval_mode rank: "


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("t5", {}, [SAME + "t: '😀' = '😢'", LOST + "t: '😀' becomes '', '😢' becomes '', 'b!' becomes 'b'"]),
        ("t5", {"eval_mode": "rank"}, [SAME + "t: '😀' = '😢'"]),
        ("bert", {}, [SAME + "t: '😀' = '😢' = '😱'; u: '😀' = '😢' = '😱'"]),
        ("bert", {"label_space": "task"}, [SAME + "t: '😀' = '😢'"]),
        ("bert", {"head": "linear"}, []),
    ],
)
def test_labels_that_the_tokenizer_lacks_are_said(
    tiny_models: dict[str, Path], kind: str, options: dict[str, Any], expected: list[str]
) -> None:
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    labels = {"t": ("😀", "😢", "A", "b!"), "u": ("a", "😱")}
    config = RunConfig(model=str(tiny_models[kind]), device="cpu", batch_size=1, **options)
    lm = load_language_model(config, labels)
    lm.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )
    tasks = []
    for name in ("t", "u") if kind == "bert" else ("t",):
        rows = tuple(Example("a", "a", label, (label,)) for label in labels[name])
        tasks.append(Task(name, "accuracy", labels[name], "{instruction} {input}", rows, test=rows))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_data(config, lm, tasks, lambda task: task.test, lm.encode)
    assert [str(warning.message) for warning in caught] == expected


@pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
def test_labels_longer_than_an_answer_are_said(tiny_models: dict[str, Path], kind: str) -> None:
    """The end of the sequence need not be generated."""
    label = "Science or Technology"
    rows = tuple(Example("a", "a", name, (name,)) for name in ("a", label))
    task = Task("t", "accuracy", ("a", label), "{instruction} {input}", rows, test=rows)
    lm = load_language_model(RunConfig(model=str(tiny_models[kind]), device="cpu"), {"t": task.labels})
    length = len(lm.label_tokens(task)[label]) - 1

    def notes(**options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_data(RunConfig(batch_size=1, **options), lm, [task], lambda task: task.test, lm.encode)
        return [str(warning.message) for warning in caught]

    assert length > 1 and notes(max_new_tokens=length) == []
    expected = f"labels of more than max_new_tokens={length - 1} tokens are never answered whole, raise it: "
    said = [f"{expected}t: {label!r} has {length}"] if kind != "bert" else []
    assert notes(max_new_tokens=length - 1) == said
    assert notes(max_new_tokens=length - 1, eval_mode="rank") == []


def test_a_batch_larger_than_the_task_takes_all_rows(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "data", ROWS[:5], ROWS[:3], ["a", "b"])
    (note,) = notes(settings(data, tiny_models["t5"], tmp_path / "big", batch_size=64, lora_dropout=0.0))
    assert note == "fewer rows than batch_size=64, so that every step takes all of them: t: 5 rows to train"
    assert notes(settings(data, tiny_models["t5"], tmp_path / "fits", batch_size=5, lora_dropout=0.0)) == []
    ends = [outcome(tmp_path / run)["weights"] for run in ("big", "fits")]
    assert ends[0] == ends[1]


def test_texts_over_the_maximum_length_are_counted(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    long = [row("word " * 200, "a"), row("word " * 300, "b")]
    data = write(tmp_path / "data", [*ROWS, *long], [*ROWS[:3], long[0]], None)
    options = {"max_length": 50, "max_target_length": 2}
    found = notes(settings(data, tiny_models["t5"], tmp_path / "run", **options))
    assert found == [
        "texts longer than max_length=50 tokens are cut at their end, raise it to keep them whole: t: 2 of 14 rows to "
        "train, 1 of 4 to score",
        "labels that fill max_target_length=2 tokens may be cut, raise it to be sure: t: 14 of 14 rows to train",
    ]


def test_memory_holds_no_more_rows_than_there_are(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", ROWS[:1], ROWS[:1], ["a", "b"])
    write(tmp_path / "more", ROWS, ROWS[:3], ["a", "b"], name="u")
    shutil.move(tmp_path / "more" / "u", data / "u")
    (data / "manifest.json").unlink()
    options = {"tasks": ["t", "u"], "method": "recurrent-kif", "memory_fraction": 0.99, "outer_batch_size": 16}
    config = settings(data, tiny_models["t5"], tmp_path / "run", **options)
    train(config, progress=False)
    kept = [len(read_memory(tmp_path / "run", task)) for task in read_tasks(tmp_path / "run")[0]]
    assert kept == [1, 11]
    dump_config(config, tmp_path / "run.yaml")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--memory-fraction", "1.5"]) == 2
    assert "memory_fraction must lie above 0 and below 1, got 1.5" in capsys.readouterr().err


# files


def test_data_may_change_while_a_run_trains(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run reads all of its data before it trains."""
    data = Path(shutil.copytree(written, tmp_path / "data"))
    config = settings(data, tiny_models["t5"], tmp_path / "run", tasks=["colours", "sizes"], max_length=64)
    train(replace(config, output=str(tmp_path / "whole")), progress=False)
    usual = RunLog.__call__

    def log(self: RunLog, record: dict[str, Any]) -> None:
        usual(self, record)
        shutil.rmtree(data, ignore_errors=True)

    monkeypatch.setattr(RunLog, "__call__", log)
    train(config, progress=False)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole") and not data.exists()


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, ROWS, ROWS, None) / "t" / "train.jsonl"
    usual = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        found = usual(descriptor)
        with file.open("a") as other:
            other.write(ROWS[0])
        return found

    monkeypatch.setattr(tasks_module.os, "fstat", fstat)
    with pytest.raises(DataError, match=r"train.jsonl: changed while it was read: try again"):
        load_tasks(tmp_path, ["t"])


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", ROWS, ROWS, None)
    (folder / "t" / "train.jsonl").unlink()
    (folder / "t" / "train.jsonl").mkdir()
    with pytest.raises(DataError, match=r"train.jsonl: cannot be read: Is a directory"):
        load_tasks(folder, ["t"])
    (folder / "t" / "train.jsonl").rmdir()
    (folder / "t" / "train.jsonl.gz").write_bytes(gzip.compress("".join(ROWS).encode())[:-20])
    with pytest.raises(DataError, match=r"train.jsonl.gz: broken gzip file"):
        load_tasks(folder, ["t"])
    (folder / "t" / "train.jsonl.gz").write_bytes(gzip.compress("".join(ROWS).encode()))
    usual = Path.open

    def denied(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == "test.jsonl":
            raise PermissionError(13, "Permission denied", str(self))
        return usual(self, *arguments, **options)

    # root reads everything
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match=r"test.jsonl: cannot be read: Permission denied"):
        load_tasks(folder, ["t"])


# texts

TEXTS = {
    "composed": "caf\u00e9 na\u00efve",
    "decomposed": "cafe\u0301 nai\u0308ve",
    "emoji": "🙂 👩\u200d👩\u200d👧 \U0001f3f3\ufe0f\u200d🌈",
    "right to left": "\u202b\u0645\u0631\u062d\u0628\u0627 שלום\u202c",
    "zero width": "a\u200bb\u200dc\ufeffd",
    "line separators": "one\u2028two\u2029three\u0085four\x0b\x0cfive",
    "beyond the basic plane": "𝒳𐍈",
    "controls": "\x00\x01\x1f\x7f",
}


@pytest.mark.parametrize("escaped", [False, True])
def test_texts_of_all_scripts_come_as_they_are(tmp_path: Path, escaped: bool) -> None:
    rows = [{"instruction": name, "input": text, "label": text.strip()} for name, text in TEXTS.items()]
    lines = [json.dumps(content, ensure_ascii=escaped) + "\n" for content in rows]
    (task,) = load_tasks(write(tmp_path, lines, lines[:1], None), ["t"])
    assert [(example.instruction, example.input) for example in task.train] == list(TEXTS.items())


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_texts_of_all_scripts_are_trained_and_kept(tiny_models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    rows = [row(text, name) for name, text in TEXTS.items()]
    data = write(tmp_path / "data", rows, rows, list(TEXTS))
    config = settings(data, tiny_models[kind], tmp_path / "run", method="recurrent-kif", memory_fraction=0.9)
    assert 0.0 <= train(config, progress=False)["op"] <= 100.0
    (task,) = read_tasks(tmp_path / "run")[0]
    kept = [example.input for _, example in read_memory(tmp_path / "run", task)]
    assert len(kept) == 7 and set(kept) < set(TEXTS.values())


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("cafe\u0301", r"looks like 'caf\xe9', but its characters are U\+0063 .* U\+0065 U\+0301 and not .* U\+00E9$"),
        ("caf\u00e9\u200b", r"looks like 'caf\xe9', but its characters are .* U\+00E9 U\+200B and not .* U\+00E9$"),
        ("cafee", r"did you mean 'caf\xe9'\?"),
    ],
)
def test_labels_that_look_alike_are_told_apart(tmp_path: Path, label: str, hint: str) -> None:
    with pytest.raises(DataError, match=hint):
        load_tasks(write(tmp_path, [row("x", label)], [], ["caf\u00e9", "tea"]), ["t"])
