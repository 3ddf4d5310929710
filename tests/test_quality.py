"""The quality tables: which runs a table is made of, what of them is kept, and cells taken from other machines."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from kif.config import KIFConfig, RunConfig


def arguments(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    values = {
        "data": "/some/texts", "model": "/some/where/model", "output": tmp_path / "table.json",
        "runs": tmp_path / "runs", "orders": ["1"], "seeds": [0, 1], "table": "table1", "variants": ["EWC", "L2P"],
        "steps": 6, "rows": 5, "split": "test", "batch_size": 2, "max_length": 16, "template": None,
        "max_new_tokens": 4, "precision": "fp32", "lr": 1e-3, "lr_of": ["EWC=4e-3"], "known": [], "jobs": 1,
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def results(config: RunConfig, op: float) -> dict[str, Any]:
    return {
        "label": config.method, "seed": config.seed, "steps": {"inner": 12, "outer": 0}, "op": op, "bwt": -1.0,
        "accuracy": [[50.0, 40.0], [None, 60.0]], "tasks": ["a", "b"],
    }  # fmt: skip


def test_rows_have_their_own_rates(tmp_path: Path) -> None:
    cells = quality.plan(arguments(tmp_path), quality.TABLES["table1"])
    assert list(cells) == [("EWC", "1", 0), ("L2P", "1", 0), ("EWC", "1", 1), ("L2P", "1", 1)]
    assert [config.lr for config in cells.values()] == [4e-3, 0.03, 4e-3, 0.03]
    assert len({config.output for config in cells.values()}) == 4
    all_rows = {row for table in quality.TABLES.values() for row in table}
    assert len(quality.TABLES["table1"]) == 14 and all_rows >= {"- DIE", "no EMA", "LFPT5", "MTL"}


def test_a_cell_is_known_by_what_differs_from_the_defaults() -> None:
    one = RunConfig(model="/a/b/c", data="/x/texts", output="here", kif=KIFConfig(density=0.5), lr=1e-2)
    assert quality.portable(one) == {"model": "/a/b/c", "data": "texts", "kif": {"density": 0.5}, "lr": 1e-2}


def test_unfinished_tables_are_written_and_known_cells_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(tmp_path)
    cells = quality.plan(args, quality.TABLES["table1"])
    first = {key: results(config, 50.0) for key, config in list(cells.items())[:3]}
    found = quality.document(args, cells, first, {})
    assert found["summary"]["EWC"]["1"]["seeds"] == [0, 1] and found["summary"]["L2P"]["1"]["seeds"] == [0]
    assert found["summary"]["EWC"]["1"]["learned"] == 55.0 and len(found["cells"]) == 3
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps({**found, "environment": {"cpu": "another"}}))

    ran: list[RunConfig] = []

    class Here:
        """Runs at once, in this process."""

        def __init__(self, jobs: int) -> None:
            pass

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, run: Any, config: RunConfig) -> Any:
            from concurrent.futures import Future

            ran.append(config)
            future: Future[dict[str, Any]] = Future()
            future.set_result(results(config, 70.0))
            return future

    monkeypatch.setattr(quality, "ProcessPoolExecutor", Here)
    command = (
        "quality --model /some/where/model --data /some/texts --orders 1 --seeds 0 1 --table table1 --variants EWC L2P "
        f"--steps 6 --rows 5 --batch-size 2 --max-length 16 --max-new-tokens 4 --lr-of EWC=4e-3 --known {stored} "
        f"--output {tmp_path / 'table.json'}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    quality.main()
    assert [(config.method, config.seed) for config in ran] == [("l2p", 1)]
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["summary"]["L2P"]["1"]["op"]["values"] == [50.0, 70.0]
    assert [cell.get("environment") for cell in written["cells"]] == 3 * [{"cpu": "another"}] + [None]
    assert written["environment"] != {"cpu": "another"}
    assert "| EWC | 50.0 ± 0.0 |" in capsys.readouterr().out
