"""A finished run goes on with new tasks as if it had never ended; what cannot go on is refused."""

from __future__ import annotations

import datetime
import gzip
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kif import stored
from kif.cli import main
from kif.config import EWCConfig, KIFConfig, L2PConfig, LFPT5Config, RunConfig
from kif.configfile import load_config, parse_run_config
from kif.memory_data import read_memory_data
from kif.methods.recurrent_kif import RecurrentKIFMethod
from kif.run import _earlier, evaluate_run, train
from kif.stored import KnownTask, drop, read_memory, read_state, read_tasks
from kif.tasks import DataError
from kif.training import RunLog

NAMES = ["colours", "sizes", "moods"]


def settings(written: Path, model: Path, output: Path, **options: Any) -> RunConfig:
    values = {
        "tasks": NAMES, "steps_per_task": 6, "limit_eval": 4, "lr": 1e-2, "max_length": 64, "max_new_tokens": 4,
        "lora_dropout": 0.0, "memory_fraction": 0.2, "kif": KIFConfig(inner_steps=3, outer_steps=2),
        "ewc": EWCConfig(fisher_rows=5), "l2p": L2PConfig(pool_size=3, prompt_length=2, top_k=2),
        "lfpt5": LFPT5Config(prompt_length=5, lm_length=24, pseudo_candidates=4), **options,
    }  # fmt: skip
    return RunConfig(
        model=str(model), data=str(written), output=str(output), device="cpu",
        cache_dir=str(output.parent / "cache"), **values,
    )  # fmt: skip


def further(run: RunConfig, output: str, tasks: list[str], **options: Any) -> RunConfig:
    """A run that continues the one of `run`."""
    folder = Path(run.output)
    return replace(run, output=str(folder.with_name(output)), continue_from=str(folder), tasks=tasks, **options)


def weights(run: RunConfig) -> dict[str, bytes]:
    folder = Path(run.output)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))
            if "checkpoints" not in path.parts}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("seqlora", "t5", {"eval_forward": True}),
        ("lora-replay", "t5", {}),
        ("recurrent-kif", "t5", {"lora_dropout": 0.1}),
        ("recurrent-kif", "llama", {}),
        ("ewc", "t5", {}),
        ("inclora", "t5", {}),
        ("sapt", "t5", {}),
        ("tasl", "t5", {}),
        ("l2p", "t5", {}),
        ("lfpt5", "t5", {}),
    ],
)
def test_two_runs_end_as_one(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, method: str, kind: str, options: dict[str, Any]
) -> None:
    whole = settings(written, tiny_models[kind], tmp_path / "whole", method=method, **options)
    first = replace(whole, output=str(tmp_path / "first"), tasks=NAMES[:2])
    second = further(first, "second", NAMES[2:])
    one = train(whole, progress=False)
    train(first, progress=False)
    two = train(second, progress=False)
    assert weights(second) == weights(whole)
    for key in ("tasks", "accuracy", "op", "bwt", "fwt", "zero_shot", "label", "skipped", "settings"):
        assert two[key] == one[key], key
    kept = [
        {file.name: file.read_text() for file in (tmp_path / run / "memory").glob("*")} for run in ("whole", "second")
    ]
    assert kept[0] == kept[1]
    assert bool(kept[0]) is (method in ("lora-replay", "recurrent-kif", "sapt"))
    assert read_tasks(tmp_path / "second")[0] == read_tasks(tmp_path / "whole")[0]
    assert evaluate_run(tmp_path / "second", progress=False)["scores"] == [row[-1] for row in one["accuracy"]]


def test_an_interrupted_continuation_is_resumed(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = settings(written, tiny_models["t5"], tmp_path / "first", tasks=NAMES[:1], checkpoint_rounds=1)
    train(first, progress=False)
    usual, calls = RunLog.__call__, []

    def log(self: RunLog, record: dict[str, Any]) -> None:
        usual(self, record)
        calls.append(record)
        if record.get("phase") == 1 and record["round"] == 1:
            raise KeyboardInterrupt

    whole, cut = further(first, "whole", ["sizes"]), further(first, "cut", ["sizes"])
    train(whole, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "__call__", log)
        with pytest.raises(KeyboardInterrupt):
            train(cut, progress=False)
    results = train(replace(cut, resume=True), progress=False)
    assert weights(cut) == weights(whole)
    assert results["accuracy"] == json.loads((tmp_path / "whole" / "results.json").read_text())["accuracy"]


def test_old_data_may_be_gone_and_removed_rows_stay_removed(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = settings(written, tiny_models["bert"], tmp_path / "first", tasks=NAMES[:2], label_space="union")
    train(first, progress=False)
    assert [len(read_memory(tmp_path / "first", task)) for task in read_tasks(tmp_path / "first")[0]] == [6, 6]
    drop(tmp_path / "first", "colours", None, [2, 5], False)
    drop(tmp_path / "first", "sizes", None, [], True)
    with pytest.warns(UserWarning, match="nothing is replayed of sizes: .*first/memory holds no rows of it"):
        _earlier(further(first, "third", ["moods"]))
    gone = tmp_path / "first" / "memory" / "sizes.jsonl"
    gone.rename(tmp_path / "kept")
    with pytest.raises(
        DataError, match=r"memory/sizes.jsonl: is missing: .* task sizes .*rows of all earlier tasks by memory_data"
    ):
        train(further(first, "third", ["moods"]), progress=False)
    (tmp_path / "kept").rename(gone)
    kept = (tmp_path / "first" / "memory" / "colours.jsonl").read_text()
    data = tmp_path / "data"
    data.mkdir()
    shutil.copytree(written / "moods", data / "moods")
    shutil.copy(written / "manifest.json", data)
    seen: list[int] = []
    classes: list[str] = []
    usual = RecurrentKIFMethod.begin_task

    def begin_task(self: Any, index: int, memory: Any) -> None:
        seen.extend((index, len(memory)))
        classes.extend(self.lm.classes)
        usual(self, index, memory)

    second = further(first, "second", ["moods"], data=str(data))
    monkeypatch.setattr(RecurrentKIFMethod, "begin_task", begin_task)
    with pytest.warns(UserWarning, match=r"not scored.*: colours, sizes"):
        results = train(second, progress=False)
    assert seen == [2, 4]
    assert results["tasks"] == ["moods"] and len(results["accuracy"]) == 1 and results["bwt"] is None
    assert (tmp_path / "second" / "memory" / "colours.jsonl").read_text() == kept
    assert (tmp_path / "second" / "memory" / "sizes.jsonl").read_text() == ""
    assert [path.name for path in (tmp_path / "second" / "checkpoints").iterdir()] == ["task-03-moods"]
    with pytest.raises(ValueError, match=r"second has no checkpoint 7; there is 3 \(moods\)$"):
        evaluate_run(tmp_path / "second", progress=False, checkpoint=7)
    with pytest.raises(ValueError, match=r"there is 3 \(moods\); those before are in .*first$"):
        evaluate_run(tmp_path / "second", progress=False, checkpoint=2)
    assert classes == ["red", "green", "big", "small", "tiny", "happy", "sad"], "old classes first"
    assert evaluate_run(tmp_path / "second", progress=False)["tasks"] == ["moods"]
    # where the data are back they are scored, though without the column in which they were not
    again = evaluate_run(tmp_path / "second", progress=False, data=str(written))
    assert again["tasks"] == NAMES and again["scores"][2] == results["accuracy"][0][0]


def test_the_matrix_goes_on_only_with_equal_rows_and_settings(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    first = settings(written, tiny_models["t5"], tmp_path / "first", tasks=NAMES[:1], method="moelora")
    then = train(first, progress=False)
    second = further(first, "second", ["sizes"], limit_eval=5)
    with pytest.warns(UserWarning, match=r"scored otherwise than in .*first.*: colours"):
        results = train(second, progress=False)
    measured = [[value is not None for value in row] for row in results["accuracy"]]
    assert measured == [[False, True], [False, True]] and results["bwt"] is None and results["op"] is not None
    third = further(second, "third", ["moods"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="scored otherwise")
        results = train(third, progress=False)
    measured = [[value is not None for value in row] for row in results["accuracy"]]
    assert measured == [[False, True, True], [False, True, True], [False, False, True]] and then["bwt"] is None
    ranks = [
        json.loads((tmp_path / run / "adapter/adapter_config.json").read_text())["r"] for run in ("first", "third")
    ]
    assert ranks == [8, 8], "as many experts as the first run had tasks"
    assert read_tasks(tmp_path / "third")[1] == 1
    again = evaluate_run(tmp_path / "third", progress=False)
    assert again["scores"] == [row[-1] for row in results["accuracy"]]


def test_what_cannot_go_on_is_refused(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    first = settings(written, tiny_models["bert"], tmp_path / "first", tasks=NAMES[:1], head="linear")
    train(first, progress=False)
    good = further(first, "second", ["sizes"])
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"method": "seqlora"}, ValueError, "trained with method='recurrent-kif', .* got 'seqlora'"),
        ({"lora_r": 4}, ValueError, "lora_r=8, .* got 4"),
        ({"kif": KIFConfig(inner_steps=3, outer_steps=2, density=0.5)}, ValueError, r"kif.density=0\.2, .* got 0\.5"),
        ({"model": str(tiny_models["t5"])}, ValueError, "trained with model="),
        ({"tasks": ["sizes", "colours"]}, ValueError, "has learned task 'colours' already"),
        ({"tasks": []}, ValueError, "no tasks"),
        ({"eval_split": "heldout"}, ValueError, "it has seen rows"),
        ({}, ValueError, "a classification layer for the 2 labels .* none for big, small, tiny"),
        ({"continue_from": str(tmp_path / "nowhere")}, FileNotFoundError, r"nowhere.tasks\.json does not exist"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            train(replace(good, **change), progress=False)
        assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(("method", "message"), [("mtl", "trains all its tasks together"), ("lfpt5", "lacks colours")])
def test_methods_that_cannot_go_on_say_so(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, method: str, message: str
) -> None:
    first = settings(written, tiny_models["t5"], tmp_path / "first", tasks=NAMES[:1], method=method)
    train(first, progress=False)
    data = tmp_path / "data"
    shutil.copytree(written / "moods", data / "moods")
    with pytest.raises(ValueError, match=f"{method} .*{message}"):
        train(further(first, "second", ["moods"], data=str(data)), progress=False)


def test_a_damaged_state_is_named(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    first = settings(written, tiny_models["t5"], tmp_path / "first", tasks=NAMES[:1], method="lfpt5")
    train(settings(written, tiny_models["t5"], tmp_path / "two", tasks=NAMES[:2], method="lfpt5"), progress=False)
    assert read_state(tmp_path / "two", torch.device("cpu"))["method"]["pseudo"] == [], (
        "pseudo rows may repeat real ones"
    )
    train(first, progress=False)
    file = tmp_path / "first" / "final" / "000001" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match=r"first.final holds no state"):
        train(further(first, "second", ["sizes"]), progress=False)


def test_from_on_the_command_line(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KIF_DATA", raising=False)
    first = settings(written, tiny_models["t5"], tmp_path / "first", tasks=NAMES[:1], method="seqlora", lora_r=3)
    train(first, progress=False)
    monkeypatch.chdir(tmp_path)
    read = parse_run_config(["--from", "first", "--tasks", "sizes", "--output", "second"])
    assert read == replace(first, continue_from="first", tasks=["sizes"], output="second")
    assert parse_run_config(["--from=first", "--order", "abc"]).output == "runs/latest"
    (tmp_path / "more.yaml").write_text("continue_from: first\nlr: 5e-3\ntasks: [moods]\n")
    assert parse_run_config(["--config", "more.yaml", "--lora-r", "3"]) == replace(
        read, lr=5e-3, tasks=["moods"], output="runs/latest"
    )
    assert main(["train", "--from", "first", "--tasks", "sizes", "--output", "second"]) == 0
    written_config = load_config(tmp_path / "second" / "config.yaml")
    assert (written_config.continue_from, written_config.lora_r) == (str(tmp_path / "first"), 3)
    assert main(["eval", "second"]) == 0
    assert main(["train", "--from", "first", "--tasks", "sizes", "--output", "third", "--lora-r", "4"]) == 2
    assert main(["train", "--from", "nowhere", "--tasks", "sizes"]) == 2
    assert main(["compare", "--methods", "seqlora", "--from", "first", "--tasks", "sizes"]) == 2


ROW = '{"task": "colours", "instruction": "a", "input": "b", "label": "red"}'


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv", "folder"])
def test_memory_from_elsewhere(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    datasets = pytest.importorskip("datasets")
    first = settings(written, tiny_models["t5"], tmp_path / "first", tasks=NAMES[:2], method="lora-replay")
    train(first, progress=False)
    exported = tmp_path / "memory.jsonl"
    assert main(["memory", "export", first.output, str(exported)]) == 0
    place = exported if form == "jsonl" else tmp_path / f"rows.{form}"
    rows = datasets.Dataset.from_list([json.loads(line) for line in exported.read_text().splitlines()])
    if form == "folder":
        rows.save_to_disk(place)
    elif form != "jsonl":
        getattr(rows, f"to_{form}")(place)
    train(further(first, "second", ["moods"]), progress=False)
    monkeypatch.chdir(tmp_path)
    same = further(first, "same", ["moods"], memory_data=place.name)
    train(same, progress=False)
    assert load_config(tmp_path / "same" / "config.yaml").memory_data == str(place)
    assert weights(same) == weights(replace(same, output=str(tmp_path / "second")))

    # fewer rows there, fewer rows here
    fewer = further(first, "fewer", ["moods"], memory_data=str(tmp_path / "few.jsonl"))
    (tmp_path / "few.jsonl").write_text(exported.read_text().splitlines()[0] + "\n")
    train(fewer, progress=False)
    assert [len(read_memory(Path(fewer.output), task)) for task in read_tasks(Path(fewer.output))[0][:2]] == [1, 0]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (ROW.replace("colours", "colour"), {}, r"rows.jsonl:1: field 'task': .*'colours'"),
        (ROW.replace("red", "blue"), {}, r"rows.jsonl:1: field 'label': 'blue' is no"),
        ('{"task": "colours", "input": "b", "label": "red"}', {}, "lacks the columns instruction; it has"),
        ("{", {}, r"rows.jsonl:1: invalid JSON: "),
        (f"{ROW}\n\n[]", {}, "rows.jsonl:3: must be a JSON object, not a list"),
        (f"[{ROW},\n3]", {}, "rows.jsonl:2: must be a JSON object, not a number"),
        (ROW.replace('"colours"', '["colours"]'), {}, r"rows.jsonl:1: field 'task': \['colours'\] is no task"),
        ("", {}, "rows.jsonl cannot be read: it holds no rows"),
        (None, {}, "rows.jsonl does not exist"),
        ("x", {"memory_data": "rows.txt"}, "must be a folder or end in .jsonl, .json, .csv"),
        ("x", {"continue_from": None}, "give it with --from"),
        ("x", {"method": "seqlora"}, "no effect with seqlora"),
    ],
)  # fmt: skip
def test_memory_that_cannot_be_used(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    content: str | None, options: dict[str, Any], message: str,
) -> None:  # fmt: skip
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    first = settings(written, tiny_models["t5"], tmp_path / "first", tasks=NAMES[:1], method="lora-replay")
    earlier = stored.Earlier(
        tmp_path, first, (KnownTask("colours", "accuracy", ("red", "green"), "", None, None),), 1, {}, {}, {}
    )
    monkeypatch.setattr(stored, "read_earlier", lambda run: earlier)
    for name in ("rows.jsonl", "rows.txt"):
        if content is not None:
            (tmp_path / name).write_text(content and content + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(replace(further(first, "second", ["moods"], memory_data="rows.jsonl"), **options), progress=False)
    assert not (tmp_path / "second").exists()


def test_rows_of_csv_are_named_by_their_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    place = tmp_path / "rows.csv"
    good, bad = 'colours,a,"several\nlines",red\n', "colours,a,b,blue\n"
    known = [KnownTask("colours", "accuracy", ("red", "green"), "", None, None)]
    place.write_text("task,instruction,input,label\n" + good + "\n" + good)
    assert [row.input for row in read_memory_data(str(place), known)["colours"]] == ["several\nlines"] * 2
    for packed in (False, True):
        # another name each time, since datasets keeps what it has read
        place = tmp_path / f"bad.csv{'.gz' * packed}"
        text = ("task,instruction,input,label\n" + good + "\n" + bad + good).encode()
        place.write_bytes(gzip.compress(text) if packed else text)
        with pytest.raises(DataError, match=r"bad\.csv(\.gz)?:5: field 'label': 'blue' is no label"):
            read_memory_data(str(place), known)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "csv"])
@pytest.mark.parametrize("text", ["2024-01-01", "007", "True", "null", "NA", "None"])
def test_texts_that_look_like_something_else_stay_texts(tmp_path: Path, form: str, text: str) -> None:
    row = {"task": "colours", "instruction": "Which? ", "input": text, "label": text}
    place = tmp_path / f"rows.{form}"
    if form == "csv":
        pytest.importorskip("datasets")
        place.write_text(f"{','.join(row)},references\n{','.join(row.values())},\n")
    else:
        content = json.dumps([row, row]) if form == "json" else json.dumps(row) + "\n"
        place.write_bytes(gzip.compress(content.encode()) if form == "jsonl.gz" else content.encode())
    known = [KnownTask("colours", "accuracy", (text, "other"), "", None, None)]
    found = read_memory_data(str(place), known)["colours"]
    assert [(example.input, example.label) for example in found] == [(text, text)] * (2 if form == "json" else 1)


def test_a_column_of_dates_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    row = {"task": "colours", "instruction": "Which? ", "input": datetime.datetime(2024, 1, 1), "label": "red"}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    known = [KnownTask("colours", "accuracy", ("red", "green"), "", None, None)]
    with pytest.raises(DataError, match=r"rows\.parquet:1: field 'input': must be a text, not a datetime"):
        read_memory_data(str(tmp_path / "rows.parquet"), known)
