"""The demo and the quality benchmark from end to end, on written text and tiny models."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from kif.demo import DEMO_METHODS, _order, finding, run_demo
from kif.results import load_results
from kif.tasks import DataError

QUALITY = Path(__file__).parents[1] / "benchmarks" / "quality.py"


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_demo_ends_in_a_table_a_picture_and_what_was_measured(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert run_demo(tmp_path / "demo", str(written), str(tiny_models[kind]), 12, 0) == 0
    shown = capsys.readouterr().out
    results = [load_results(tmp_path / "demo" / name) for name in DEMO_METHODS]
    assert {sum(result.steps.values()) for result in results} == {36}
    assert {result.accuracy[0][0] for result in results} == {results[0].accuracy[0][0]}  # first tasks are the same
    for result in results:
        assert finding(result) in shown and f"{result.op:.1f}" in shown
    assert "settings" not in shown
    pictures = sorted((tmp_path / "demo").glob("*.png"))
    assert pictures and all(path.stat().st_size > 5000 for path in pictures)


def test_demo_refuses_before_training(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = str(tiny_models["bert"])
    (tmp_path / "used" / "recurrent-kif").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"used is not empty: choose another --output, or remove it$"):
        run_demo(tmp_path / "used", str(written), model, 12, 0)
    with pytest.raises(ValueError, match="tasks of the hub"):
        run_demo(tmp_path / "new", "hub", model, 12, 0)
    single = shutil.copytree(written, tmp_path / "single")
    (single / "orders.json").write_text(json.dumps({"one": {"tasks": ["sizes"]}}))
    with pytest.raises(ValueError, match="'one' has one task"):
        run_demo(tmp_path / "new", str(single), model, 12, 0)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"orders\.json: must be a JSON object, not a list"),
        ("{}", r"orders\.json: holds no order"),
        ("{", r"orders\.json: invalid JSON"),
        ('{"a": []}', r"orders\.json: field 'a\.tasks': must hold a list"),
    ],
)
def test_bad_orders_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "train.jsonl").touch()
    (tmp_path / "orders.json").write_text(text)
    with pytest.raises(DataError, match=message):
        _order(tmp_path)
    with pytest.raises(DataError, match="none: no such folder"):
        _order(tmp_path / "none")


def test_orders_are_read_as_by_train(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "data")
    (folder / "orders.json").write_bytes(b"\xef\xbb\xbf" + (written / "orders.json").read_bytes())
    assert _order(folder) == "abc"


def test_finding_says_what_was_lost() -> None:
    from test_report import make

    results = make(
        "kif", accuracy=[[80.0, 70.0, 55.5], [None, 60.0, 61.0], [None, None, 90.0]], tasks=list("abc"), op=68.83
    )
    assert finding(results) == "kif: lost 24.5 points on a; 68.8% over all tasks at the end."
    kept = make("kif", accuracy=[[80.0, 80.0], [None, 60.0]], tasks=list("ab"), op=70.0)
    assert "lost nothing" in finding(kept)


def test_quality_table_is_resumed_and_refuses_other_settings(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*options: str) -> dict[str, Any]:
        arguments = ["--data", str(written), "--model", str(tiny_models["bert"]), "--orders", "abc", "--steps", "12"]
        arguments += ["--seeds", "0", "1", "--variants", "SeqLoRA", "MTL", "--jobs", "1"]
        arguments += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "q.json"), *options]
        monkeypatch.setattr(sys, "argv", [str(QUALITY), *arguments])
        runpy.run_path(str(QUALITY), run_name="__main__")
        return dict(json.loads((tmp_path / "q.json").read_text()))

    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", _InProcess)
    first = run()
    assert set(first["summary"]) == {"SeqLoRA", "MTL"} and first["settings"]["steps"] == 12
    op = first["summary"]["SeqLoRA"]["abc"]["op"]
    assert len(op["values"]) == 2 and op["mean"] == pytest.approx(sum(op["values"]) / 2, abs=0.02)
    assert "bwt" not in first["summary"]["MTL"]["abc"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert len(stamps) == 4 and run()["summary"] == first["summary"]
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    with pytest.raises(ValueError, match="run of other settings"):
        run("--rows", "3")


class _InProcess:
    """ProcessPoolExecutor's interface without processes, which would import torch again."""

    def __init__(self, jobs: int) -> None:
        pass

    def __enter__(self) -> _InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, function: Any, *arguments: Any) -> Any:
        from concurrent.futures import Future

        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future
