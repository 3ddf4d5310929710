"""Shared fixtures: tiny models, and the real benchmark data where it lies beside the checkout."""

from __future__ import annotations

import json
import os

# workers of pytest-xdist share the cores; before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tiny import build_tiny

# `pytest --hypothesis-profile campaign tests/test_fuzz.py` looks for longer
settings.register_profile("campaign", max_examples=10_000, deadline=None)


LONGEST = ("test_interpreter.py", "test_emulated.py", "test_contract.py", "test_distributed.py", "test_resume.py")
"""Files that take longest: they begin first, so that no worker of pytest-xdist is left with one at the end."""


def pytest_configure(config: pytest.Config) -> None:
    # by itself it begins with the files of most tests, which are quick ones
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def benchmark_data() -> Path:
    """The folder of the 15 tasks; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("KIF_DATA") or Path(__file__).parents[2] / "shared" / "data" / "cl_benchmark")
    if not (folder / "manifest.json").is_file():
        pytest.skip("the benchmark data is not here; set KIF_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models: `t5`, `llama`, `bert`."""
    return {kind: build_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in ("t5", "llama", "bert")}


LABELS = {"colours": ["red", "green"], "sizes": ["big", "small", "tiny"], "moods": ["happy", "sad"]}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small tasks in the data layout."""
    return write_tasks(tmp_path_factory.mktemp("data"))


def write_tasks(folder: Path) -> Path:
    """The tasks of `written`, in a folder."""
    manifest: dict[str, Any] = {"prompt_template": "{instruction}{input}\nAnswer:", "tasks": {}}
    for task, labels in LABELS.items():
        (folder / task).mkdir(parents=True)
        manifest["tasks"][task] = {"metric": "accuracy", "labels": labels}
        for split, count in (("train", 30), ("validation", 8), ("test", 9)):
            rows = [
                {"instruction": f"Which of the {task}? ", "input": f"{split} row {i} says {labels[i % len(labels)]}",
                 "label": labels[i % len(labels)]}
                for i in range(count)
            ]  # fmt: skip
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "orders.json").write_text(json.dumps({"abc": {"tasks": list(LABELS)}}))
    return folder
