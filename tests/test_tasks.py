"""Reading and checking task folders: every refusal names file, line and field."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kif.tasks import DEFAULT_TEMPLATE, DataError, Example, Task, hold_out, limit_rows, load_order, load_tasks

ROW = {"instruction": "Which colour? ", "input": "the sky", "label": "blue"}
MANIFEST: dict[str, Any] = {
    "prompt_template": "{instruction}{input} =",
    "tasks": {"colours": {"metric": "accuracy", "labels": ["blue", "red"]}},
}


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def make(folder: Path, files: dict[str, bytes], manifest: dict[str, Any] | None = MANIFEST) -> Path:
    """A folder with the task `colours` whose files have the given content."""
    for name, content in files.items():
        path = folder / "colours" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def refusal(folder: Path, names: list[str] | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        load_tasks(folder, ["colours"] if names is None else names)
    return caught.value


def row(**changes: Any) -> dict[str, Any]:
    return {**ROW, **changes}


def test_a_task_is_read_whole(tmp_path: Path) -> None:
    more = row(input="blood", label="red", references=["red", "dark red", "red"])
    manifest = {"prompt_template": "Q: {instruction}{input}", "tasks": {"colours": {"metric": "rougeL"}}}
    make(
        tmp_path,
        {"train.jsonl": jsonl(ROW, more), "test.jsonl.gz": gzip.compress(b"\n" + jsonl(ROW) + b"  \r\n")},
        manifest,
    )
    (task,) = load_tasks(tmp_path, ["colours"])
    assert (task.name, task.metric, task.labels) == ("colours", "rougeL", None)
    assert task.train == (
        Example("Which colour? ", "the sky", "blue", ("blue",)),
        Example("Which colour? ", "blood", "red", ("red", "dark red")),
    )
    assert task.rows("test") == task.train[:1]
    assert task.prompt(task.train[0]) == "Q: Which colour? the sky"


def test_without_manifest(tmp_path: Path) -> None:
    make(tmp_path, {"train.jsonl": "\ufeff".encode() + jsonl(row(label="anything"))}, manifest=None)
    (task,) = load_tasks(tmp_path, ["colours"])
    assert (task.metric, task.labels, task.template) == ("accuracy", None, DEFAULT_TEMPLATE)
    assert task.prompt(task.train[0]) == "Which colour? the sky\nAnswer:"


def test_texts_with_braces_are_filled_in_once() -> None:
    task = Task("t", "accuracy", None, "{instruction}|{input}|{other}", ())
    example = Example("{input} {0}", "{instruction} {}", "x", ("x",))
    assert task.prompt(example) == "{input} {0}|{instruction} {}|{other}"


BAD_ROWS: list[tuple[Any, str | None, str]] = [
    (b'{"instruction": \n', None, "invalid JSON"),
    (b"1" * 5000 + b"\n", None, "JSON"),
    (b"[" * 100_000 + b"\n", None, "JSON"),
    (b'{"instruction": "\xff"}\n', None, "not UTF-8: byte 0xff at position 17"),
    ([1, 2], None, "must be a JSON object, not a list"),
    ("text", None, "must be a JSON object, not a text"),
    ({"input": "a", "label": "blue"}, "instruction", "is missing"),
    ({"instruction": "a", "label": "blue"}, "input", "is missing"),
    ({"instruction": "a", "input": "b"}, "label", "is missing"),
    (row(instruction=None), "instruction", "must be a text, not null"),
    (row(input=["a"]), "input", "must be a text, not a list"),
    (row(label=3), "label", "must be a text, not a number"),
    (row(label=True), "label", "must be a text, not a boolean"),
    (row(label=""), "label", "is empty"),
    (row(label=" \n\t"), "label", "is empty"),
    (row(instruction=" ", input="\n"), "input", "is empty"),
    (row(label="Blue"), "label", "'Blue' is no label of this task; did you mean 'blue'? there are blue, red"),
    (row(label="green"), "label", "'green' is no label of this task; there are blue, red"),
    (row(references="blue"), "references", "must be a list of texts, not a text"),
    (row(references=["blue", 1]), "references", "must be a text, not a number"),
    (row(references=["blue", " "]), "references", "is empty"),
    (row(references=["blue", "gren"]), "references", "'gren' is no label"),
    (row(input="\ud800"), "input", "half a surrogate pair"),
]


@pytest.mark.parametrize(("bad", "field", "message"), BAD_ROWS)
@pytest.mark.parametrize("file", ["train.jsonl", "test.jsonl.gz"])
def test_a_bad_row_is_named(tmp_path: Path, file: str, bad: Any, field: str | None, message: str) -> None:
    content = jsonl(ROW) + b"\n" + (bad if isinstance(bad, bytes) else jsonl(bad)) + jsonl(ROW)
    files = {"train.jsonl": jsonl(ROW), file: gzip.compress(content) if file.endswith(".gz") else content}
    error = refusal(make(tmp_path, files))
    path = tmp_path / "colours" / file
    assert (error.path, error.line, error.field) == (path, 3, field)
    assert str(error).startswith(f"{path}:3: " + (f"field '{field}': " if field else ""))
    assert message in error.message


def test_all_bad_rows_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    error = refusal(make(tmp_path, {"train.jsonl": jsonl(ROW, row(label=""), ROW, row(label="x"), [])}))
    assert error.line == 2
    assert str(error).endswith("delete this line (bad too: line 4, 5)")


def test_the_nearest_of_many_labels_is_named(tmp_path: Path) -> None:
    labels = [f"colour {i}" for i in range(40)]
    manifest = {"tasks": {"colours": {"labels": labels}}}
    error = refusal(make(tmp_path, {"train.jsonl": jsonl(row(label="colour 38x"))}, manifest))
    assert "did you mean 'colour 38'?" in str(error)
    assert "(40 in all)" in str(error)
    assert "colour 25" not in str(error)


# names of their own: gzip writes the time, and all processes of pytest-xdist must collect the same names
@pytest.mark.parametrize(
    "content",
    [b"no gzip at all", gzip.compress(jsonl(ROW) * 99)[:-12], gzip.compress(jsonl(ROW))[:30] + b"\0" * 40],
    ids=["no gzip", "cut", "overwritten"],
)
def test_broken_gzip(tmp_path: Path, content: bytes) -> None:
    error = refusal(make(tmp_path, {"train.jsonl.gz": content}))
    assert error.path == tmp_path / "colours" / "train.jsonl.gz"
    assert "broken gzip file" in str(error)


@pytest.mark.parametrize("files", [{"train.jsonl": b" \n\n"}, {"test.jsonl": jsonl(ROW)}])
def test_a_task_without_train_rows(tmp_path: Path, files: dict[str, bytes]) -> None:
    error = refusal(make(tmp_path, files))
    assert error.path == tmp_path / "colours" / "train.jsonl"
    assert "task 'colours' is empty: no train rows" in str(error)


def test_a_missing_split_is_missed_only_when_asked_for(tmp_path: Path) -> None:
    (task,) = load_tasks(make(tmp_path, {"train.jsonl": jsonl(ROW)}), ["colours"])
    assert task.validation == task.test == ()
    with pytest.raises(DataError, match="task colours has no validation rows") as caught:
        task.rows("validation")
    assert caught.value.path == tmp_path / "colours" / "validation.jsonl"
    with pytest.raises(DataError, match="no rows of train were held out"):
        task.rows("heldout")
    with pytest.raises(ValueError, match="unknown split 'dev'; there are train, validation, test, heldout"):
        task.rows("dev")


def test_plain_and_gzip_file_of_one_split(tmp_path: Path) -> None:
    error = refusal(make(tmp_path, {"train.jsonl": jsonl(ROW), "train.jsonl.gz": gzip.compress(jsonl(ROW))}))
    assert error.path == tmp_path / "colours" / "train.jsonl"
    assert "lies beside train.jsonl.gz: keep one" in str(error)


def test_task_names(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", {"train.jsonl": jsonl(ROW)})
    assert "unknown task 'colour'; did you mean 'colours'? there are colours" in str(refusal(folder, ["colour"]))
    assert "unknown task 'col'; did you mean 'colours'?" in str(refusal(folder, ["col"]))
    assert "unknown task 'x'; there are colours" in str(refusal(folder, ["colours", "x"]))
    assert "unknown task '../data/colours'" in str(refusal(folder, ["../data/colours"]))
    assert "'colours' is named 2 times" in str(refusal(folder, ["colours", "colours"]))
    assert "no task is named; there are colours" in str(refusal(folder, []))
    for error in (refusal(folder, ["x"]), refusal(folder, [])):
        assert error.path == folder


def test_folders(tmp_path: Path) -> None:
    assert "no such folder" in str(refusal(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "holds no tasks: there is no <task>/train.jsonl" in str(refusal(tmp_path / "empty"))
    make(tmp_path / "benchmarks" / "one", {"train.jsonl": jsonl(ROW)})
    make(tmp_path / "benchmarks" / "two", {"train.jsonl": jsonl(ROW)})
    error = refusal(tmp_path / "benchmarks")
    assert f"{tmp_path / 'benchmarks' / 'one'} and {tmp_path / 'benchmarks' / 'two'} do: name one" in str(error)
    with pytest.raises(DataError, match="name one of these"):
        load_order(tmp_path / "benchmarks", "1")


BAD_MANIFESTS: list[tuple[Any, str | None, str]] = [
    ([], None, "must be a JSON object"),
    ({"prompt_template": 1}, "prompt_template", "must be a text with"),
    ({"prompt_template": "{input}"}, "prompt_template", "{instruction}"),
    ({"tasks": []}, "tasks", "no entry for the task folder 'colours'"),
    ({"tasks": {"other": {}}}, "tasks", "no entry for the task folder 'colours'"),
    ({"tasks": {"colours": {"metric": "bleu"}}}, "tasks.colours.metric", "must be accuracy or rougeL, not 'bleu'"),
    ({"tasks": {"colours": {"label": ["blue"]}}}, "tasks.colours", "unknown key 'label'; did you mean 'labels'?"),
    ({"tasks": {"colours": {"metrics": "rougeL"}}}, "tasks.colours", "unknown key 'metrics'; did you mean 'metric'?"),
    ({"tasks": {"colours": {"labels": []}}}, "tasks.colours.labels", "list of different texts"),
    ({"tasks": {"colours": {"labels": "blue"}}}, "tasks.colours.labels", "list of different texts"),
    ({"tasks": {"colours": {"labels": ["blue", 1]}}}, "tasks.colours.labels", "list of different texts"),
    ({"tasks": {"colours": {"labels": ["blue", "Blue "]}}}, "tasks.colours.labels", "list of different texts"),
    ({"tasks": {"colours": {"labels": ["blue", "red", "Red "]}}}, "tasks.colours.labels", "'red' and 'Red ' are not"),
    ({"tasks": {"colours": {"labels": ["A", "B", "A"]}}}, "tasks.colours.labels", "'A' and 'A' are not"),
]


@pytest.mark.parametrize(("manifest", "field", "message"), BAD_MANIFESTS)
def test_bad_manifests(tmp_path: Path, manifest: Any, field: str | None, message: str) -> None:
    error = refusal(make(tmp_path, {"train.jsonl": jsonl(ROW)}, manifest))
    assert (error.path, error.field) == (tmp_path / "manifest.json", field)
    assert message in str(error)


def test_a_manifest_may_describe_its_tasks(tmp_path: Path) -> None:
    entry = {"labels": ["blue", "red"], "source": {"path": "x"}, "splits": {"train": 1}, "Ünknown": "none"}
    # close to the right one, which is there
    entry |= {"n_labels": 2, "label": "colour", "metric": "accuracy", "metric_2": "f1"}
    folder = make(tmp_path, {"train.jsonl": jsonl(ROW)}, {"name": "mine", "tasks": {"colours": entry}})
    assert load_tasks(folder, ["colours"])[0].labels == ("blue", "red")


def test_manifest_that_is_no_json(tmp_path: Path) -> None:
    make(tmp_path, {"train.jsonl": jsonl(ROW)})
    (tmp_path / "manifest.json").write_text("{\n oops")
    assert f"{tmp_path / 'manifest.json'}: invalid JSON" in str(refusal(tmp_path))
    assert "line 2, column 2" in str(refusal(tmp_path))


def test_orders(tmp_path: Path) -> None:
    path = make(tmp_path, {"train.jsonl": jsonl(ROW)}) / "orders.json"
    with pytest.raises(DataError, match="no such file, so there are no named orders") as caught:
        load_order(tmp_path, "1")
    assert caught.value.path == path
    orders = {"long": ["colours", "colours"], "none": [], "gone": ["colours", "colour"]}
    path.write_text(json.dumps({**{name: {"tasks": tasks} for name, tasks in orders.items()}, "odd": ["a"]}))
    assert load_order(tmp_path, "long") == ["colours", "colours"]
    with pytest.raises(DataError, match=r"unknown order 'lnog'; did you mean 'long'\? there are long, none, gone, odd"):
        load_order(tmp_path, "lnog")
    with pytest.raises(DataError, match="unknown task 'colour'; did you mean 'colours'") as caught:
        load_order(tmp_path, "gone")
    assert (caught.value.path, caught.value.field) == (path, "gone.tasks")
    for name in ("none", "odd"):
        with pytest.raises(DataError, match="must hold a list of task names") as caught:
            load_order(tmp_path, name)
        assert (caught.value.path, caught.value.field) == (path, f"{name}.tasks")


def test_errors_survive_a_process_border(tmp_path: Path) -> None:
    error = refusal(make(tmp_path, {"train.jsonl": jsonl(row(label=""))}))
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.line, copy.field) == (str(error), error.path, error.line, error.field)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ROW, "references"]), inner),
    max_leaves=8,
)
ROWS = st.fixed_dictionaries(
    {key: st.just(value) | JSON for key, value in ROW.items()},
    optional={"references": st.lists(st.sampled_from(["blue", "red", ""]) | JSON, max_size=3) | JSON},
)
LINES = st.lists(st.binary(max_size=40) | (JSON | ROWS).map(lambda value: json.dumps(value).encode()), max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, packed=st.booleans(), cut=st.integers(0, 3), manifest=st.just(MANIFEST) | JSON)
def test_whatever_lies_there_is_read_or_refused(
    tmp_path: Path, lines: list[bytes], packed: bool, cut: int, manifest: Any
) -> None:
    for old in (tmp_path / "colours").glob("*"):
        old.unlink()
    content = b"\n".join(lines)
    data = gzip.compress(content) if packed else content
    make(tmp_path, {"train.jsonl.gz" if packed else "train.jsonl": data[: len(data) - cut]}, manifest)
    (tmp_path / "orders.json").write_text(json.dumps(manifest))
    try:
        (task,) = load_tasks(tmp_path, ["colours"])
    except DataError as error:
        assert str(tmp_path) in str(error)
    else:
        for example in task.train:
            task.prompt(example).encode("utf-8")
            assert example.references[0] == example.label != ""
    try:
        assert load_order(tmp_path, "tasks")
    except DataError as error:
        assert str(tmp_path) in str(error)


def numbered(labels: list[str], known: tuple[str, ...] | None) -> Task:
    rows = tuple(Example("", str(i), label, (label,)) for i, label in enumerate(labels))
    return Task("t", "accuracy", known, DEFAULT_TEMPLATE, rows)


@given(
    labels=st.lists(st.sampled_from("abc"), min_size=2, max_size=60),
    share=st.floats(0.001, 0.999),
    seed=st.integers(0, 3),
    known=st.sampled_from([None, ("a", "b", "c")]),
)
def test_hold_out_splits_train(labels: list[str], share: float, seed: int, known: tuple[str, ...] | None) -> None:
    task = numbered(labels, known)
    split = hold_out(task, share, seed)
    assert split == hold_out(task, share, seed)
    assert sorted(split.train + split.heldout, key=lambda e: int(e.input)) == list(task.train)
    assert len(split.heldout) == min(max(1, round(share * len(labels))), len(labels) - 1)
    assert split.rows("heldout") == split.heldout
    if known:
        for label, size in Counter(labels).items():
            held = sum(example.label == label for example in split.heldout)
            # Rounding to whole rows, of each label and in all, moves a label by less than two rows.
            assert abs(held - share * size) < 2


def test_hold_out_depends_on_the_seed_and_is_refused_for_one_row() -> None:
    task = numbered(["a", "b"] * 50, ("a", "b"))
    assert hold_out(task, 0.2, 0).heldout != hold_out(task, 0.2, 1).heldout
    with pytest.raises(DataError, match="task t: 1 train rows cannot be split"):
        hold_out(numbered(["a"], None), 0.5, 0)


def test_limit_rows() -> None:
    rows = numbered(["a"] * 100, None).train
    assert limit_rows(rows, None, "t/test") is limit_rows(rows, 100, "t/test") is rows
    few = limit_rows(rows, 10, "t/test")
    numbers = [int(example.input) for example in few]
    assert len(few) == 10
    assert numbers == sorted(numbers) != list(range(10))
    assert few == limit_rows(rows, 10, "t/test") != limit_rows(rows, 10, "u/test")


# The benchmark data itself

COUNTS = {
    "yelp": (1000, 500, 2500), "amazon": (1000, 500, 2500), "dbpedia": (1000, 500, 7000), "yahoo": (1000, 500, 500),
    "agnews": (1000, 500, 2000), "mnli": (1000, 494, 1500), "qqp": (1000, 500, 1000), "rte": (1000, 277, 277),
    "sst-2": (1000, 500, 872), "wic": (1000, 500, 638), "cb": (250, 56, 56), "copa": (400, 100, 100),
    "boolqa": (1000, 500, 1000), "multirc": (1000, 500, 1000), "imdb": (1000, 500, 1000),
}  # fmt: skip
SUPERNI_SMALL = {"1572": (160, 20), "181": (338, 43), "639": (142, 18), "073": (975, 100), "1590": (126, 16)}


@pytest.fixture(scope="module")
def benchmarks() -> Path:
    """The folder that holds cl_benchmark and superni."""
    data = os.environ.get("KIF_DATA")
    folder = Path(data).parent if data else Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "cl_benchmark").is_dir() or not (folder / "superni").is_dir():
        pytest.skip("the benchmark data is not here; set KIF_DATA to its cl_benchmark folder")
    return folder


def test_cl_benchmark_loads(benchmarks: Path) -> None:
    folder = benchmarks / "cl_benchmark"
    tasks = load_tasks(folder, load_order(folder, "4"))
    assert {t.name: tuple(len(t.rows(s)) for s in ("train", "validation", "test")) for t in tasks} == COUNTS
    assert [load_order(folder, str(i))[0] for i in range(1, 7)] == [
        "dbpedia", "dbpedia", "yahoo", "mnli", "multirc", "yelp",
    ]  # fmt: skip
    for task in tasks:
        assert task.metric == "accuracy"
        assert set(task.labels or ()) == {example.label for example in task.train}
        assert task.prompt(task.train[0]).endswith("\nAnswer:")


def test_superni_loads_but_for_the_task_with_empty_references(benchmarks: Path) -> None:
    folder = benchmarks / "superni"
    names = load_order(folder, "1")
    bad = "task511_reddit_tifu_long_text_summarization"
    tasks = load_tasks(folder, [name for name in names if name != bad])
    for task in tasks:
        train, rest = SUPERNI_SMALL.get(task.name[4:].split("_")[0], (1000, 100))
        assert (len(task.train), len(task.validation), len(task.test)) == (train, rest, rest)
        assert task.metric == "rougeL"
    several = next(task for task in tasks if task.name.startswith("task002"))
    assert max(len(example.references) for example in several.test) > 1

    error = refusal(folder, names)
    assert (error.path, error.line, error.field) == (folder / bad / "train.jsonl.gz", 80, "label")
    assert "delete this line (bad too: line 371, 429, 724, 880, 940)" in str(error)


def test_the_folder_above_is_explained(benchmarks: Path) -> None:
    error = refusal(benchmarks, ["agnews"])
    assert str(benchmarks / "cl_benchmark") in str(error)
    assert str(benchmarks / "superni") in str(error)
    assert "unknown task 'ag'; did you mean 'agnews'?" in str(refusal(benchmarks / "cl_benchmark", ["ag"]))
