"""The microbenchmark command at tiny size on the CPU: complete results, budget, goals, plot; and pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from benchmarks import goals, kernels, machine, measure, roofline
from benchmarks.baselines import CONTENDERS, Flat
from benchmarks.machine import Machine
from benchmarks.measure import Case, Row, plan
from benchmarks.operations import OPERATIONS
from benchmarks.shapes import SETS, elements

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cpu() -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(machine.COPY_BYTES, "cpu", 2**20)
        yield Machine("cpu")


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**20)


def test_the_kernels_come_first_and_the_rest_is_left_out(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = plan(["tiny", "t5-large"], ["importance", "round-m1"], ["kif", "flat", "reference"])
    order = [(case.contender.name, case.set, case.operation.name) for case in cases]
    assert [name for name, _, _ in order] == ["kif"] * 4 + ["flat"] * 4 + ["reference"] * 4
    assert order[:2] == [("kif", "tiny", "importance"), ("kif", "tiny", "round-m1")]
    rows = measure.run(cases, cpu, budget=0)
    assert [(row.status, row.reason) for row in rows] == [("not run", "budget")] * len(cases)

    def fake(case: Case, *args: Any) -> Row:
        row = case.row()
        row.status, row.seconds = "ok", 1.0
        return row

    monkeypatch.setattr(measure, "measure", fake)
    statuses = {(row.contender, row.set): row.status for row in measure.run(cases, cpu, budget=60)}
    # 2,412 times the elements of tiny, so about 2,412 s
    assert statuses["flat", "tiny"] == "ok" and statuses["flat", "t5-large"] == "not run"


def test_too_much_memory_is_not_tried_on_a_cpu(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "memory_free", lambda: 10_000)
    row = measure.measure(Case(OPERATIONS["importance"], Flat, "tiny"), cpu)
    assert row.status == "out of memory" and "free" in row.reason


def test_command_writes_everything(
    small_copies: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    result, picture = tmp_path / "out" / "result.json", tmp_path / "out" / "plot.png"
    monkeypatch.setattr(kernels, "QUICK_ROW_SECONDS", 0.001)
    contenders = "kif,flat,per-tensor,torch.sort"
    argv = ["--device", "cpu", "--sets", "tiny", "--contenders", contenders, "--quick", "--variants", "bf16"]
    assert kernels.main([*argv, "--json", str(result), "--plot", str(picture), "--budget", "60"]) == 0
    data = json.loads(result.read_text())
    assert data["format"] == kernels.FORMAT
    assert set(data) == {"format", "env", "machine", "settings", "rows", "goals"}
    environment = {"gpu", "cpu", "torch", "triton", "cuda_runtime", "driver", "python", "git_revision", "date"}
    assert environment <= set(data["env"])
    assert data["machine"]["copy_gbps"] > 0 and data["machine"]["copy_gbps_end"] > 0
    names = {field.name for field in fields(Row)}
    assert all(set(row) == names for row in data["rows"])
    assert {row["operation"] for row in data["rows"]} == set(OPERATIONS)
    for row in data["rows"]:
        assert row["status"] == "ok", row
        assert row["median_us"] > 0 and row["repeats"] >= 3 and len(row["halves_us"]) == 2
        assert row["gbps"] == pytest.approx(row["min_bytes"] / row["median_us"] / 1e3)
        assert row["fraction"] == pytest.approx(row["gbps"] / data["machine"]["copy_gbps"])
        # what only a GPU has
        assert row["event_us"] is row["graph_us"] is row["host_us"] is row["launches"] is None
        assert row["contender"] != "kif" or row["note"] == "backend eager"
    narrow = [(row["operation"], row["contender"]) for row in data["rows"] if row["dtype"] == "bf16"]
    assert narrow == [("importance", "kif"), ("adamw-importance", "kif")]
    assert {goal["verdict"] for goal in data["goals"]} == {"not measured here"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for text in ("goals:", "round-m4-adamw, tiny (978 elements in 7 tensors)", "of copy", "torch.sort"):
        assert text in printed


def test_what_is_measured_is_kept_when_the_time_is_up(
    small_copies: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure.measure

    def until_the_third(case: Case, *args: Any) -> Row:
        if case.contender.name == "per-tensor":
            raise KeyboardInterrupt
        return measured(case, *args)

    monkeypatch.setattr(measure, "measure", until_the_third)
    result = tmp_path / "result.json"
    argv = ["--device", "cpu", "--sets", "tiny", "--ops", "fusion", "--contenders", "kif,flat,per-tensor", "--quick"]
    with pytest.raises(KeyboardInterrupt):
        kernels.main([*argv, "--json", str(result)])
    data = json.loads(result.read_text())
    assert [row["contender"] for row in data["rows"]] == ["kif", "flat"] and data["machine"]["copy_gbps_end"] is None


def test_the_script_for_a_gpu_knows_its_parts(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out"), "cpu", "step"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "there is no part step" in done.stderr and not (tmp_path / "out").exists()


def test_a_wrong_contender_fails_the_command(small_copies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flat, "fusion", lambda self, threshold_in, threshold_out: None)
    argv = ["--device", "cpu", "--sets", "tiny", "--ops", "fusion", "--contenders", "flat", "--quick"]
    assert kernels.main(argv) == 1


def test_command_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    for option, name in (("--sets", "t6"), ("--ops", "all,fusion"), ("--contenders", "kif,kit"), ("--variants", "fp8")):
        with pytest.raises(SystemExit):
            kernels.main([option, name])
        assert "there are" in capsys.readouterr().err


def test_plot_without_matplotlib_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Case(OPERATIONS["importance"], Flat, "tiny").row()
    assert "no row" in roofline.plot([row], tmp_path / "a.png", 10.0, 0.0, "")
    row.median_us = 3.0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert "matplotlib" in roofline.plot([row], tmp_path / "a.png", 10.0, 0.0, "")
    assert not (tmp_path / "a.png").exists()


def done(operation: str, contender: str, set_name: str, us: float, fraction: float = 0.0) -> Row:
    """A row as if measured."""
    row = Case(OPERATIONS[operation], CONTENDERS[contender], set_name).row()
    row.status, row.median_us, row.fraction = "ok", us, fraction
    return row


def test_goals_are_judged_where_they_can_be() -> None:
    rows = [
        done("importance", "kif", "256M", 900.0, 0.95),
        done("importance", "kif", "1B", 3600.0, 0.93),
        done("importance", "kif", "llama2-7b-all", 900.0, 0.1),
        done("fusion", "kif", "1B", 3600.0, 0.8),
        done("importance", "kif", "t5-large", 11.0),
        done("fusion", "kif", "t5-large", 21.0),
        done("round-m1", "kif", "t5-large", 100.0),
        done("round-m1", "flat", "t5-large", 240.0),
        done("round-m1", "per-tensor", "t5-large", 11_000.0),
    ]
    verdicts = [goal.verdict for goal in goals.goals(rows, "NVIDIA H200")]
    here, no = "reached", "not measured here"
    assert verdicts == [here, no, "missed", here, no, "missed", here, here, "missed", no]
    on_h100 = goals.goals(rows, "NVIDIA H100 80GB HBM3")
    assert [goal.verdict for goal in on_h100] == [here, no, "missed", no, no, no, no, here, "missed", no]
    assert on_h100[3].value == "11.0 us on NVIDIA H100 80GB HBM3" and on_h100[0].value == "93% (1B)"
    assert {goal.verdict for goal in goals.goals(rows, None)} == {no}


def test_revision_comes_from_git_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KIF_GIT_REVISION", raising=False)
    monkeypatch.setattr(machine, "_output", lambda command: {"rev-parse": "abc", "status": ""}[command[3]])
    assert machine.git_revision() == "abc"
    monkeypatch.setattr(machine, "_output", lambda command: {"rev-parse": "abc", "status": "M file"}[command[3]])
    assert machine.git_revision() == "abc+changes"
    monkeypatch.setenv("KIF_GIT_REVISION", "def")
    assert machine.git_revision() == "def"
    monkeypatch.delenv("KIF_GIT_REVISION")
    monkeypatch.setattr(machine, "_output", lambda command: None)
    assert machine.git_revision() == "unknown"


def in_process(*command: str, **env: str) -> str:
    """Output of a Python process in the checkout, which must succeed."""
    paths = [path for path in [os.environ.get("PYTHONPATH")] if path]
    finished = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        # behind what is there: another triton may be
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(ROOT), str(ROOT / "tests")]), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_benchmarks_need_torch_alone() -> None:
    names = ("triton", "numpy", "matplotlib", "transformers", "datasets", "bitsandbytes", "pydantic", "rich", "cupy")
    block = f"import sys\nfor name in {names!r}: sys.modules[name] = None\n"
    in_process("-c", block + "import benchmarks.kernels as k; assert k.plan(['tiny'], list(k.OPERATIONS))")


def test_interpreted_kernels_are_counted(tmp_path: Path) -> None:
    """Launches, passes and bytes of the kernels themselves, where no GPU is needed for them."""
    pytest.importorskip("triton")
    code = (
        "import sys; from kernel_tests.interpreter import correct_interpreter; correct_interpreter(); "
        "from benchmarks import kernels, machine, timing; machine.COPY_BYTES['cpu'] = 2**20; "
        "kernels.QUICK_ROW_SECONDS = 0.001; timing.MIN_REPEATS = 4; timing.SLOW_SECONDS = 0.01; "
        "sys.exit(kernels.main(sys.argv[1:]))"
    )
    argv = ["--device=cpu", "--sets=tiny", "--ops=threshold,round-m1-adamw", "--contenders=kif,kif-counted", "--quick"]
    in_process("-c", code, *argv, f"--json={tmp_path}/x.json", KIF_BACKEND="interpret", TRITON_INTERPRET="1")
    rows = {(row["operation"], row["contender"]): row for row in json.loads((tmp_path / "x.json").read_text())["rows"]}
    n = elements(SETS["tiny"])
    counted = rows["threshold", "kif-counted"]
    assert counted["status"] == "ok" and counted["kernels"] == {"refine_kernel": 4, "select_kernel": 1}
    assert counted["bytes"] == 4 * n * counted["passes"]
    assert rows["threshold", "kif"]["launches"] == 6 and rows["threshold", "kif"]["passes"] > counted["passes"]
    whole = rows["round-m1-adamw", "kif"]
    # 9 x (gradient norm, its state, AdamW), 4 refinements, selection, fusion
    assert whole["launches"] == 9 * 3 + 4 + 1 + 1 and whole["syncs"] == 0
    assert whole["bytes"] == whole["min_bytes"] + n * (9 * 4 + 4 * whole["passes"])
    assert whole["note"] == "backend interpret"


def test_pytest_benchmark_has_the_same_cases(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    chosen = "tiny-round-m1-flat or tiny-importance-flat or tiny-threshold-cupy"
    options = ["--benchmark-only", "-q", "-p", "no:cacheprovider", "-k", chosen, f"--benchmark-json={tmp_path}/b.json"]
    # pytest-benchmark times nothing where it sees a worker of xdist, as this process may be one
    output = in_process(
        "-m", "pytest", "benchmarks/test_kernels.py", *options, KIF_BENCH_SETS="tiny", PYTEST_XDIST_WORKER=""
    )
    assert "2 passed" in output and "1 skipped" in output
    for entry in json.loads((tmp_path / "b.json").read_text())["benchmarks"]:
        info = entry["extra_info"]
        assert info["gbps"] == pytest.approx(info["min_bytes"] / entry["stats"]["median"] / 1e9)
        assert info["operations"] == {"tiny importance": 3, "tiny round-m1": 41}[entry["group"]]
