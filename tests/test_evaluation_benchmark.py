"""The benchmark of scoring at a tiny size: equal scores by both ways, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import evaluation


def test_all_ways_are_timed(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "new" / "evaluation.json"
    options = ["--order", "abc", "--rows", "3", "--batch-size", "2", "--max-new-tokens", "4", "--device", "cpu"]
    arguments = ["--model", str(tiny_models["llama"]), "--data", str(written), *options, "--json", str(target)]
    assert evaluation.main(arguments) == 0
    document = json.loads(target.read_text())
    assert list(document["tasks"]) == ["colours", "sizes", "moods"]
    for row in document["tasks"].values():
        assert row["rows"] == 3 and row["plain"]["score"] == row["kif"]["score"]
    assert document["seconds"]["kif"] == pytest.approx(sum(r["kif"]["seconds"] for r in document["tasks"].values()))
    assert document["settings"]["data"] == written.name and document["environment"]["torch"]


def test_scores_that_differ_are_an_error(
    written: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "plain", lambda *_: 101.0)
    with pytest.raises(RuntimeError, match=r"colours: 101\.0 by whole answers"):
        evaluation.main(
            ["--model", str(tiny_models["t5"]), "--data", str(written), "--order", "abc", "--rows", "2", "--device=cpu"]
        )
