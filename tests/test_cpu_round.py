"""The benchmark of a round on the CPU: its contenders agree, and its report says what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import cpu_round
from benchmarks.shapes import SETS
from benchmarks.workload import Phase, Problem

PAPER = ("kif", "per-tensor", "per-tensor-kthvalue", "flat", "reference")
RELEASED = ("released", "kif-released")


@pytest.mark.parametrize("adamw", [False, True], ids=["bookkeeping", "with AdamW"])
def test_contenders_of_a_method_end_with_the_same_weights(adamw: bool) -> None:
    # 40 elements: 0.2 of them is a whole number, where torch.quantile and the k-th largest make the same mask
    problem = Problem(((4, 5), (5, 4)))
    result = cpu_round.measure((*PAPER, *RELEASED), problem, adamw, turns=3)
    differing = {name: row["differing"] for name, row in result["contenders"].items()}
    assert differing == {name: None if name in ("kif", "kif-released") else 0 for name in (*PAPER, *RELEASED)}
    assert set(result["ratios"]) == {*PAPER, *RELEASED} - {"kif"}
    assert all(
        len(row["ms"]) == 3 and row["low"] <= row["median"] <= row["high"] for row in result["contenders"].values()
    )


def test_a_wrong_contender_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.baselines import Flat

    monkeypatch.setattr(Flat, "fusion", lambda self, threshold_in, threshold_out: None)
    result = cpu_round.measure(("kif", "flat"), Problem(((64,),)), False, turns=1)
    assert result["contenders"]["flat"]["differing"] > 32


def test_only_timed_phases_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(cpu_round.time, "perf_counter", lambda: float(next(clock)))
    phases = [Phase("a", lambda: None), Phase("b", lambda: None, timed=False), Phase("c", lambda: None)]
    assert cpu_round.clocked(phases) == 2000.0


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "round.json"
    command = [
        "--shapes",
        "tiny",
        "--turns",
        "2",
        "--json",
        str(target),
        "--contenders",
        "kif",
        "per-tensor",
        "released",
    ]
    assert cpu_round.main(command) == 0
    document = json.loads(target.read_text())
    assert document["round"]["elements"] == Problem(SETS["tiny"]).numel
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["threads"] == torch.get_num_threads()
    assert document["ratios"]["per-tensor"]["goal"] == 12.0 and document["ratios"]["released"]["goal"] is None
    assert "released" in capsys.readouterr().out
    monkeypatch.setitem(cpu_round.GOALS, "per-tensor", 1e9)
    assert cpu_round.main([*command, "--check"]) == 1
    assert "below 1 of its goal: per-tensor" in capsys.readouterr().out
    assert cpu_round.main([*command, "--check", "1e-12"]) == 0
    # with AdamW in the round there is no goal
    assert cpu_round.main([*command, "--check", "--with-adamw"]) == 0


def test_the_recorded_result_is_of_this_benchmark() -> None:
    file = Path(cpu_round.__file__).parent / "results" / "cpu-round.json"
    document = json.loads(file.read_text())
    assert document["round"]["elements"] == 2_359_296 and document["round"]["tensors"] == 288
    assert {name: document["ratios"][name]["goal"] for name in cpu_round.GOALS} == cpu_round.GOALS
    assert not document["round"]["adamw"]
