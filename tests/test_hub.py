"""The hub's data sets as small in-memory data sets of the hub's own schemas; no hub is reached."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kif import hub
from kif.hub import HUB_TASKS, ORDERS, download
from kif.tasks import DataError, load_order, load_tasks

datasets = pytest.importorskip("datasets")
from datasets import ClassLabel, Dataset, Features, Value  # noqa: E402

INT, TEXT = Value("int32"), Value("string")
TRUTH = ["False", "True"]
STARS = ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]
DBPEDIA = [
    "Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building",
    "NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork",
]  # fmt: skip
YAHOO = [
    "Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet", "Sports",
    "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government",
]  # fmt: skip
SPAN = {name: INT for name in ("start1", "start2", "end1", "end2", "idx")}
MULTIRC_ID = {name: INT for name in ("paragraph", "question", "answer")}

# (path, config) -> columns, column of the class, splits with their number of rows
SCHEMAS: dict[tuple[str, str | None], tuple[dict[str, Any], str, dict[str, int]]] = {
    ("Yelp/yelp_review_full", None): (
        {"label": ClassLabel(names=STARS), "text": TEXT}, "label", {"train": 60, "test": 60}),
    ("yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes", None): (
        {"class_index": Value("int64"), "review_title": TEXT, "review_text": TEXT}, "class_index",
        {"train": 60, "test": 60}),
    ("fancyzhx/dbpedia_14", None): (
        {"label": ClassLabel(names=DBPEDIA), "title": TEXT, "content": TEXT}, "label", {"train": 60, "test": 70}),
    ("community-datasets/yahoo_answers_topics", None): (
        {"id": INT, "topic": ClassLabel(names=YAHOO), "question_title": TEXT, "question_content": TEXT,
         "best_answer": TEXT}, "topic", {"train": 60, "test": 60}),
    ("sh0416/ag_news", None): (
        {"label": Value("int64"), "title": TEXT, "description": TEXT}, "label", {"train": 60, "test": 60}),
    ("nyu-mll/glue", "mnli"): (
        {"premise": TEXT, "hypothesis": TEXT, "label": ClassLabel(names=["entailment", "neutral", "contradiction"]),
         "idx": INT}, "label",
        {"train": 60, "validation_matched": 60, "validation_mismatched": 9, "test_matched": 9}),
    ("nyu-mll/glue", "qqp"): (
        {"question1": TEXT, "question2": TEXT, "label": ClassLabel(names=["not_duplicate", "duplicate"]), "idx": INT},
        "label", {"train": 60, "validation": 60, "test": 9}),
    ("nyu-mll/glue", "rte"): (
        {"sentence1": TEXT, "sentence2": TEXT, "label": ClassLabel(names=["entailment", "not_entailment"]), "idx": INT},
        "label", {"train": 60, "validation": 12, "test": 9}),
    ("nyu-mll/glue", "sst2"): (
        {"sentence": TEXT, "label": ClassLabel(names=["negative", "positive"]), "idx": INT}, "label",
        {"train": 60, "validation": 60, "test": 9}),
    ("aps/super_glue", "wic"): (
        {"word": TEXT, "sentence1": TEXT, "sentence2": TEXT, **SPAN, "label": ClassLabel(names=TRUTH)}, "label",
        {"train": 60, "validation": 60, "test": 9}),
    ("aps/super_glue", "cb"): (
        {"premise": TEXT, "hypothesis": TEXT, "idx": INT,
         "label": ClassLabel(names=["entailment", "contradiction", "neutral"])}, "label",
        {"train": 25, "validation": 6, "test": 9}),
    ("aps/super_glue", "copa"): (
        {"premise": TEXT, "choice1": TEXT, "choice2": TEXT, "question": TEXT, "idx": INT,
         "label": ClassLabel(names=["choice1", "choice2"])}, "label", {"train": 28, "validation": 10, "test": 9}),
    ("aps/super_glue", "boolq"): (
        {"question": TEXT, "passage": TEXT, "idx": INT, "label": ClassLabel(names=TRUTH)}, "label",
        {"train": 60, "validation": 60, "test": 9}),
    ("aps/super_glue", "multirc"): (
        {"paragraph": TEXT, "question": TEXT, "answer": TEXT, "idx": MULTIRC_ID, "label": ClassLabel(names=TRUTH)},
        "label", {"train": 60, "validation": 60, "test": 9}),
    ("stanfordnlp/imdb", None): (
        {"text": TEXT, "label": ClassLabel(names=["neg", "pos"])}, "label",
        {"train": 60, "test": 60, "unsupervised": 9}),
}  # fmt: skip


def make_split(path: str, config: str | None, split: str) -> Dataset:
    """Rows that say of themselves what they are: the text of a column is `<column> <split> <number> {class}`."""
    columns, class_column, splits = SCHEMAS[path, config]
    feature = columns[class_column]
    numbers = range(feature.num_classes) if isinstance(feature, ClassLabel) else range(1, 6 - ("ag_news" in path))
    rows = []
    for i in range(splits[split]):
        value = numbers[i % len(numbers)]
        name = feature.names[value] if isinstance(feature, ClassLabel) else str(value)
        row = {column: f"{column} {split} {i} {{{name}}}" for column, kind in columns.items() if kind == TEXT}
        row |= {column: i for column, kind in columns.items() if kind == INT}
        row |= {"idx": dict.fromkeys(MULTIRC_ID, i)} if columns.get("idx") == MULTIRC_ID else {}
        row[class_column] = -1 if split.startswith("test") and "validation" in "".join(splits) else value
        if config == "copa":
            row["question"] = ("cause", "effect")[i % 2]
        if "question_content" in columns and i % 2:
            row["question_content"] = ""
        rows.append(row)
    features = Features(columns)
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns}, features=features)


Loader = Callable[..., Dataset]


@pytest.fixture
def hub_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replaces the hub by `make_split`, with a sample of 20 train, 10 validation and 5 test rows per class."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, *, split: str, revision: str | None = None) -> Dataset:
        calls.append((path, name, split, revision))
        return make_split(path, name, split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, value in (("TRAIN_ROWS", 20), ("VALIDATION_ROWS", 10), ("TEST_ROWS_PER_CLASS", 5)):
        monkeypatch.setattr(hub, name, value)
    return calls


# What an input looks like, by task; the same patterns are held against the released data below.
FORMS = {
    "yelp": r"Text: .+\n",
    "amazon": r"Title: .*\nText: .+\n",
    "dbpedia": r"Title: .+\nText: .+\n",
    "yahoo": r"(Title: .+\nQuestion: .+|Question: .+)\nAnswer: .*\n",
    "agnews": r"Title: .+\nText: .+\n",
    "mnli": r"sentence 1: .+\nsentence 2: .+",
    "qqp": r"first sentence: .+\nsecond sentence: .+",
    "rte": r"sentence 1: .+\nsentence 2: .+",
    "sst-2": r"Text: [^\n]+",
    "wic": r"word: [^\n]+\n[^\n]+\n[^\n]+",
    "cb": r"sentence 1: .+\nsentence 2: .+",
    "copa": r'Which sentence is the (cause|effect) of ".+"\? Choose one between A and B\.\nA: [^\n]+\nB: [^\n]+',
    "boolqa": r"question: .+\npassage: .+",
    "multirc": r"paragraph: .+\nquestion: .+\ncandidate answer: .+",
    "imdb": r"(?!Text:).+",
}
EXAMPLES = {
    "yelp": ("Text: text train 1 {2 star}\n", "negative"),
    "amazon": ("Title: review_title train 4 {5}\nText: review_text train 4 {5}\n", "very positive"),
    "dbpedia": ("Title: title train 5 {MeanOfTransportation}\nText: content train 5 {MeanOfTransportation}\n",
                "Mean of Transportation"),
    "agnews": ("Title: title train 3 {4}\nText: description train 3 {4}\n", "Science or Technology"),
    "mnli": ("sentence 1: premise train 2 {contradiction}\nsentence 2: hypothesis train 2 {contradiction}",
             "contradiction"),
    "qqp": ("first sentence: question1 train 1 {duplicate}\nsecond sentence: question2 train 1 {duplicate}", "True"),
    "rte": ("sentence 1: sentence1 train 1 {not_entailment}\nsentence 2: sentence2 train 1 {not_entailment}",
            "contradiction"),
    "sst-2": ("Text: sentence train 0 {negative}", "Bad"),
    "wic": ("word: word train 1 {True}\nsentence1 train 1 {True}\nsentence2 train 1 {True}", "True"),
    "cb": ("sentence 1: premise train 2 {neutral}\nsentence 2: hypothesis train 2 {neutral}", "neutral"),
    "copa": ('Which sentence is the effect of "premise train 1 {choice2}"? Choose one between A and B.\n'
             "A: choice1 train 1 {choice2}\nB: choice2 train 1 {choice2}", "B"),
    "boolqa": ("question: question train 0 {False}\npassage: passage train 0 {False}", "False"),
    "multirc": ("paragraph: paragraph train 1 {True}\nquestion: question train 1 {True}\n"
                "candidate answer: answer train 1 {True}", "True"),
    "imdb": ("text train 1 {pos}", "Good"),
    "yahoo": ("Question: question_title train 1 {Science & Mathematics}\n"
              "Answer: best_answer train 1 {Science & Mathematics}\n", "Science & Mathematics"),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_TASKS)
def test_a_row_becomes_a_prompt(name: str, hub_calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TRAIN_ROWS", 100)
    task = HUB_TASKS[name]
    splits = hub._sample(task, *(hub._load(task, split) for split in ("train", task.evaluation)), seed=0)
    assert EXAMPLES[name] in splits["train"]
    for text, label in (row for rows in splits.values() for row in rows):
        assert re.fullmatch(FORMS[name], text, re.DOTALL)
        assert label in task.labels


def test_all_tasks_are_written_in_the_layout_that_is_read(tmp_path: Path, hub_calls: list[Any]) -> None:
    download(list(HUB_TASKS), tmp_path, seed=0)
    tasks = load_tasks(tmp_path, load_order(tmp_path, "4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*HUB_TASKS, "manifest.json", "orders.json"])
    for task in tasks:
        train, validation, test = (
            {example.input for example in rows} for rows in (task.train, task.validation, task.test)
        )
        assert not train & test
        assert not validation & (train | test)
        # CB has 25 train rows here and COPA 28; CB has 2 test rows of each class.
        assert (len(train), len(validation)) == (20, {"cb": 5, "copa": 8}.get(task.name, 10))
        assert len(test) == len(task.test) == {"cb": 6}.get(task.name, 5 * len(task.labels or ()))
        assert max(Counter(example.label for example in task.test).values()) <= 5
    assert {call[3] for call in hub_calls if call[0] == "aps/super_glue"} == {"refs/convert/parquet"}
    assert {call[2] for call in hub_calls if call[1] == "mnli"} == {"train", "validation_matched"}


def test_validation_is_test_where_no_train_row_is_left(
    tmp_path: Path, hub_calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "TRAIN_ROWS", 1000)
    download(["cb", "copa"], tmp_path, seed=0)
    for task in load_tasks(tmp_path, ["cb", "copa"]):
        assert len(task.train) == {"cb": 25, "copa": 28}[task.name]
        assert task.validation == task.test


def test_rows_of_test_are_not_trained_on(hub_calls: list[Any]) -> None:
    task = HUB_TASKS["qqp"]
    train, evaluation = hub._load(task, "train"), hub._load(task, "validation")
    both = datasets.concatenate_datasets([train, evaluation, evaluation, train])
    splits = hub._sample(task, both, evaluation, seed=0)
    texts = [text for rows in splits.values() for text, _ in rows]
    assert len(texts) == len(set(texts)) == 20 + 10 + 10


def test_rows_without_label_and_empty_columns(hub_calls: list[Any]) -> None:
    task = HUB_TASKS["amazon"]
    rows = Dataset.from_dict(
        {"class_index": [-1, None, 3], "review_title": ["a", "b", None], "review_text": ["c", "d", "e"]}
    )
    assert list(hub._rows(task, rows, seed=0)) == [("Title: \nText: e\n", "neutral")]


def test_seeds_and_finished_tasks(tmp_path: Path, hub_calls: list[Any]) -> None:
    def content(folder: str) -> bytes:
        return (tmp_path / folder / "yelp" / "train.jsonl").read_bytes()

    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        download(["yelp"], tmp_path / folder, seed)
    assert content("a") == content("b") != content("c")

    hub_calls.clear()
    download(["yelp", "imdb"], tmp_path / "a", seed=0)
    assert {call[0] for call in hub_calls} == {"stanfordnlp/imdb"}
    with pytest.raises(DataError, match="was not written by this version with this seed") as caught:
        download(["yelp"], tmp_path / "a", seed=1)
    assert caught.value.path == tmp_path / "a" / "manifest.json"


def test_a_failure_leaves_no_half_task(tmp_path: Path, hub_calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Loader = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Dataset:
        if path == "stanfordnlp/imdb":
            raise ConnectionError("Couldn't reach the Hub\nmore")
        return fake(path, name, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        download(["yelp", "imdb"], tmp_path, seed=0)
    message = str(caught.value)
    assert message.startswith("cannot read stanfordnlp/imdb (train) from the Hugging Face hub: ConnectionError: ")
    assert "--data FOLDER" in message
    assert "more\n" not in message
    assert len(load_tasks(tmp_path, ["yelp"])) == 1
    assert not (tmp_path / "imdb").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "orders.json", "yelp"]


def test_a_changed_hub_is_noticed(hub_calls: list[Any]) -> None:
    task = HUB_TASKS["qqp"]
    other = make_split("nyu-mll/glue", "rte", "train")
    with pytest.raises(DataError, match=r"field 'label': nyu-mll/glue has the classes \['entailment'"):
        list(hub._rows(task, other, 0))
    renamed = make_split("nyu-mll/glue", "qqp", "train").rename_column("question2", "other")
    with pytest.raises(DataError, match="field 'question2': nyu-mll/glue has no such column"):
        list(hub._rows(task, renamed, 0))
    with pytest.raises(DataError, match="field 'label': nyu-mll/glue has no such column"):
        list(hub._rows(task, renamed.remove_columns("label"), 0))
    with pytest.raises(DataError, match="unknown class '0'"):
        list(hub._rows(HUB_TASKS["agnews"], Dataset.from_dict({"label": [0], "title": ["a"], "description": [""]}), 0))


def test_unknown_task_and_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="unknown task 'AG'; did you mean 'agnews'"):
        download(["AG"], tmp_path, seed=0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "recurrent-kif\[hub\]"'):
        download(["cb"], tmp_path, seed=0)


def test_the_form_is_that_of_the_released_data(benchmark_data: Path) -> None:
    manifest = json.loads((benchmark_data / "manifest.json").read_text())
    assert list(HUB_TASKS) == list(manifest["tasks"])
    for task in load_tasks(benchmark_data, list(HUB_TASKS)):
        ours = HUB_TASKS[task.name]
        assert {example.instruction for example in task.train} == {ours.instruction}
        assert task.labels == ours.labels
        odd = [e.input for e in task.train + task.test if not re.fullmatch(FORMS[task.name], e.input, re.DOTALL)]
        assert odd == []
    assert {name: order["tasks"] for name, order in ORDERS.items()} == {
        name: load_order(benchmark_data, name) for name in "123456"
    }
