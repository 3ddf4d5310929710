"""The 15 tasks of the Long Sequence Benchmark from the Hugging Face hub, by the paper's protocol.

Section 4, "Dataset": 1000 rows of each task are sampled for training and 500 per class are held out. Here:

- train: 1000 random rows of the hub's train split, or all of them if there are fewer (CB, COPA);
- test: 500 random rows per class of the hub's labelled evaluation split, or all rows of a class that has fewer;
- validation: 500 further random rows of the train split. Where none are left (CB, COPA) it is the test rows, as in
  the data that the authors released.

Rows whose text occurs in test are not drawn for train, nor those of either for validation. Prompts are those of
Table 13 with the options of the released data, orders those of Table 12.

No hub could be reached where this was written: the paths, configurations and column names below are from the dataset
cards and were checked against data sets of the same schema, not against the hub. Three paths are a choice:
`aps/super_glue` is read from the hub's own Parquet conversion of it, as `datasets` >= 4 runs no loading scripts;
`sh0416/ag_news` keeps title and text of an article apart, which `fancyzhx/ag_news` does not; Amazon reviews with five
grades have no official copy there.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kif.tasks import DEFAULT_TEMPLATE, DataError, suggest, write_rows

TRAIN_ROWS = 1000
VALIDATION_ROWS = 500
TEST_ROWS_PER_CLASS = 500

Row = Mapping[str, Any]

# Table 13
_CHOOSE = "Choose one from the option."
_NLI = f'What is the logical relationship between the "sentence 1" and the "sentence 2"? {_CHOOSE}'
_QQP = f'Whether the "first sentence" and the "second sentence" have the same meaning? {_CHOOSE}'
_SC = f"What is the sentiment of the following paragraph? {_CHOOSE}"
_TC = f"What is the topic of the following paragraph? {_CHOOSE}"
_BOOLQA = f"According to the following passage, is the question true or false? {_CHOOSE}"
_MULTIRC = f"According to the following passage and question, is the candidate answer true or false? {_CHOOSE}"
_WIC = f"Given a word and two sentences, whether the word is used with the same sense in both sentence? {_CHOOSE}"

_GRADES = ("very negative", "negative", "neutral", "positive", "very positive")
_PARQUET = "refs/convert/parquet"


@dataclass(frozen=True)
class HubTask:
    """Where a task is on the hub and how its rows become prompts.

    Args:
        prompt: instruction of Table 13, without the options.
        labels: the labels in the order in which the prompt names them.
        text: a hub row -> the input text.
        path: hub path of the data set.
        classes: class name on the hub (or the number as text, if the column holds plain numbers) -> label.
        config: name of the hub configuration.
        evaluation: the labelled split that test is drawn from.
        column: the column of the class.
        revision: git revision on the hub.
    """

    prompt: str
    labels: tuple[str, ...]
    text: Callable[[Row], str]
    path: str
    classes: Mapping[str, str]
    config: str | None = None
    evaluation: str = "validation"
    column: str = "label"
    revision: str | None = None

    @property
    def instruction(self) -> str:
        return f"{self.prompt} Option: {', '.join(self.labels)}.\n"


def _yahoo(row: Row) -> str:
    if row["question_content"].strip():
        return "Title: {question_title}\nQuestion: {question_content}\nAnswer: {best_answer}\n".format_map(row)
    return "Question: {question_title}\nAnswer: {best_answer}\n".format_map(row)


_PAIR = "sentence 1: {premise}\nsentence 2: {hypothesis}".format_map
_TRUTH = {"False": "False", "True": "True"}
_TOPICS = ("World", "Sports", "Business", "Science or Technology")
_DBPEDIA = (
    "Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation", "Building",
    "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work",
)  # fmt: skip
_YAHOO = (
    "Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet", "Sports",
    "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government",
)  # fmt: skip
_COPA = 'Which sentence is the {question} of "{premise}"? Choose one between A and B.\nA: {choice1}\nB: {choice2}'

HUB_TASKS: dict[str, HubTask] = {
    "yelp": HubTask(
        _SC, _GRADES, "Text: {text}\n".format_map, "Yelp/yelp_review_full",
        dict(zip(("1 star", "2 star", "3 stars", "4 stars", "5 stars"), _GRADES, strict=True)), evaluation="test",
    ),
    "amazon": HubTask(
        _SC, _GRADES, "Title: {review_title}\nText: {review_text}\n".format_map,
        "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes",
        dict(zip("12345", _GRADES, strict=True)), evaluation="test", column="class_index",
    ),
    "dbpedia": HubTask(
        _TC, _DBPEDIA, "Title: {title}\nText: {content}\n".format_map, "fancyzhx/dbpedia_14",
        {label.title().replace(" ", ""): label for label in _DBPEDIA}, evaluation="test",
    ),
    "yahoo": HubTask(
        _TC, _YAHOO, _yahoo, "community-datasets/yahoo_answers_topics", {label: label for label in _YAHOO},
        evaluation="test", column="topic",
    ),
    "agnews": HubTask(
        _TC, _TOPICS, "Title: {title}\nText: {description}\n".format_map, "sh0416/ag_news",
        dict(zip("1234", _TOPICS, strict=True)), evaluation="test",
    ),
    "mnli": HubTask(
        _NLI, ("neutral", "entailment", "contradiction"), _PAIR, "nyu-mll/glue",
        {label: label for label in ("neutral", "entailment", "contradiction")},
        config="mnli", evaluation="validation_matched",
    ),
    "qqp": HubTask(
        _QQP, ("False", "True"), "first sentence: {question1}\nsecond sentence: {question2}".format_map, "nyu-mll/glue",
        {"not_duplicate": "False", "duplicate": "True"}, config="qqp",
    ),
    "rte": HubTask(
        _NLI, ("contradiction", "entailment"), "sentence 1: {sentence1}\nsentence 2: {sentence2}".format_map,
        "nyu-mll/glue", {"not_entailment": "contradiction", "entailment": "entailment"}, config="rte",
    ),
    "sst-2": HubTask(
        _SC, ("Good", "Bad"), "Text: {sentence}".format_map, "nyu-mll/glue", {"positive": "Good", "negative": "Bad"},
        config="sst2",
    ),
    "wic": HubTask(
        _WIC, ("True", "False"), "word: {word}\n{sentence1}\n{sentence2}".format_map, "aps/super_glue", _TRUTH,
        config="wic", revision=_PARQUET,
    ),
    "cb": HubTask(
        _NLI, ("entailment", "contradiction", "neutral"), _PAIR, "aps/super_glue",
        {label: label for label in ("entailment", "contradiction", "neutral")}, config="cb", revision=_PARQUET,
    ),
    "copa": HubTask(  # with the instruction of BoolQA, as in the released data
        _BOOLQA, ("A", "B"), _COPA.format_map, "aps/super_glue", {"choice1": "A", "choice2": "B"},
        config="copa", revision=_PARQUET,
    ),
    "boolqa": HubTask(
        _BOOLQA, ("True", "False"), "question: {question}\npassage: {passage}".format_map, "aps/super_glue", _TRUTH,
        config="boolq", revision=_PARQUET,
    ),
    "multirc": HubTask(
        _MULTIRC, ("False", "True"),
        "paragraph: {paragraph}\nquestion: {question}\ncandidate answer: {answer}".format_map, "aps/super_glue", _TRUTH,
        config="multirc", revision=_PARQUET,
    ),
    "imdb": HubTask(
        _SC, ("Good", "Bad"), "{text}".format_map, "stanfordnlp/imdb", {"pos": "Good", "neg": "Bad"}, evaluation="test",
    ),
}  # fmt: skip

# Table 12, in the form of orders.json; "ag" is `agnews`
ORDERS: dict[str, dict[str, list[str]]] = {
    order: {"tasks": tasks.split()}
    for order, tasks in {
        "1": "dbpedia amazon yahoo agnews",
        "2": "dbpedia amazon agnews yahoo",
        "3": "yahoo amazon agnews dbpedia",
        "4": "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
        "5": "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
        "6": "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
    }.items()
}


def download(names: Sequence[str], folder: str | Path, seed: int) -> None:
    """Sample the named tasks from the hub into `folder`, in the layout that `load_tasks` reads.

    A task appears complete or not at all; tasks that are there already are kept. `seed` fixes the sample, and a folder
    has one: `manifest.json` says which.

    Raises:
        DataError: unknown task, hub not reachable or not as expected, or the folder was made with another seed.
    """
    folder = Path(folder)
    for name in names:
        if name not in HUB_TASKS:
            raise DataError(f"unknown task {name!r}; {suggest(name, list(HUB_TASKS))}")
    folder.mkdir(parents=True, exist_ok=True)
    _write_once(folder / "manifest.json", _manifest(seed))
    _write_once(folder / "orders.json", ORDERS)
    for name in names:
        if (folder / name).exists():
            continue
        task = HUB_TASKS[name]
        splits = _sample(task, _load(task, "train"), _load(task, task.evaluation), seed)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as temporary:
            for split, rows in splits.items():
                write_rows(Path(temporary, name, f"{split}.jsonl"), task.instruction, rows)
            try:
                os.rename(Path(temporary, name), folder / name)
            except OSError:
                if not (folder / name).exists():  # else another process was faster
                    raise


def _manifest(seed: int) -> dict[str, Any]:
    tasks = {
        name: {
            "metric": "accuracy",
            "labels": list(task.labels),
            "source": {"path": task.path, "config": task.config, "revision": task.revision, "test": task.evaluation},
        }
        for name, task in HUB_TASKS.items()
    }
    return {"name": "hub", "seed": seed, "prompt_template": DEFAULT_TEMPLATE, "tasks": tasks}


def _write_once(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, or check that the one that is there says the same."""
    if path.exists():
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == content
        except ValueError:
            same = False
        if not same:
            raise DataError("was not written by this version with this seed; choose another folder", path)
        return
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _load(task: HubTask, split: str) -> Any:
    """A `datasets.Dataset` of the hub."""
    try:
        import datasets
    except ImportError as error:
        raise DataError('reading from the hub needs the package datasets: pip install "recurrent-kif[hub]"') from error
    try:
        return datasets.load_dataset(task.path, task.config, split=split, revision=task.revision)
    except Exception as error:  # of requests, httpx, fsspec, huggingface_hub or datasets, by their versions
        first = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"cannot read {task.path} ({split}) from the Hugging Face hub: {type(error).__name__}: {first}\n"
            "Without a hub, give a folder that holds the tasks: --data FOLDER, or the environment variable KIF_DATA."
        ) from error


def _sample(task: HubTask, train: Any, evaluation: Any, seed: int) -> dict[str, list[tuple[str, str]]]:
    """The rows (input, label) of each split, by the protocol at the top of this file."""
    per_class: Counter[str] = Counter()
    test: list[tuple[str, str]] = []
    for text, label in _rows(task, evaluation, seed):
        if per_class[label] < TEST_ROWS_PER_CLASS:
            per_class[label] += 1
            test.append((text, label))
        if len(test) == TEST_ROWS_PER_CLASS * len(task.labels):
            break
    used = {_key(text) for text, _ in test}
    rest: list[tuple[str, str]] = []
    for text, label in _rows(task, train, seed):
        if _key(text) not in used:
            used.add(_key(text))
            rest.append((text, label))
        if len(rest) == TRAIN_ROWS + VALIDATION_ROWS:
            break
    return {"train": rest[:TRAIN_ROWS], "validation": rest[TRAIN_ROWS:] or test, "test": test}


def _rows(task: HubTask, data: Any, seed: int) -> Iterator[tuple[str, str]]:
    """The labelled rows (input, label) of a hub split in random order; the hub marks rows without a label by -1."""
    feature = data.features.get(task.column)
    names = getattr(feature, "names", None)  # None: a column of plain numbers
    if names is not None and set(names) != set(task.classes):
        raise DataError(f"{task.path} has the classes {names}, not {list(task.classes)}", field=task.column)
    for row in data.shuffle(seed=seed):
        try:
            value, text = row[task.column], task.text({name: "" if v is None else v for name, v in row.items()})
        except KeyError as error:
            raise DataError(f"{task.path} has no such column, but {list(row)}", field=str(error.args[0])) from error
        if value is None or value == -1:
            continue
        name = str(value) if names is None else names[value]
        if name not in task.classes:
            raise DataError(f"{task.path} has the unknown class {name!r}", field=task.column)
        yield text, task.classes[name]


def _key(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().lower()
