"""The static performance contract holds for the installed triton, and notices each way to break it."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contract import check
from benchmarks.contract.__main__ import main

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A compiler cache of our own: nothing comes from an earlier run."""
    return {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}


@pytest.fixture(scope="module")
def measured(cache: dict[str, str]) -> dict[str, Any]:
    return check.measure(environment=cache)


@pytest.fixture(scope="module")
def controls(cache: dict[str, str]) -> dict[str, Any]:
    return check.measure("--controls", environment=cache)


def one_kernel(**figures: Any) -> dict[str, Any]:
    """A measurement that breaks no rule, of one kernel on one architecture."""
    row = {"load": 12, "store": 4, "width": 128, "loop_atomics": 0, "registers": 32, "stack": 0, "spills": 0,
           "shared": 0, "instructions": 100, "loop": 80, "warps": 64} | figures  # fmt: skip
    kernels = {"importance": {"bytes": {"load": 12, "store": 4, "atomics": 0}, "sm_90": row}}
    return {"triton": "9.9.1", "kernels": kernels, "unlisted": []}


@needs_triton
def test_no_kernel_breaks_a_rule(measured: dict[str, Any]) -> None:
    broken = check.broken_rules(measured)
    assert not broken, "\n".join(broken)


@needs_triton
def test_nothing_is_worse_than_recorded(measured: dict[str, Any]) -> None:
    path = check.record_path(measured["triton"])
    recorded = check.load(path)
    if recorded is None:
        pytest.skip(f"no {path.name}; to record it: {check.ACCEPT}")
    worse, _ = check.changes(recorded, measured)
    assert not worse, "\n".join([*worse, f"if that is justified: {check.ACCEPT}"])


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "load", "store"),
    [
        ("importance", 12, 4),
        ("importance, first", 8, 4),
        ("importance, histogram", 12, 4),
        ("importance, bf16", 8, 4),
        ("importance in bf16, bf16", 6, 2),
        ("importance, E*U", 16, 8),
        ("adamw", 16, 12),
        ("adamw+importance", 20, 16),
        ("adamw+importance, snapshot", 20, 20),
        ("adamw+importance, shadow", 20, 18),
        ("adamw+importance, bf16", 16, 14),
        ("engine: first inner step", 16, 24),
        ("engine: inner step", 20, 20),
        ("engine: last inner step", 20, 24),
        ("gradient: square_sum_kernel", 4, 0),
        ("thresholds: refine_kernel level 1", 4, 0),
        ("fuse", 20, 8),
        ("engine: fuse", 20, 4),
        ("engine: fuse per tensor", 20, 4),
        ("released code: fuse", 28, 4),
    ],
)
def test_bytes_are_those_of_the_documentation(measured: dict[str, Any], kernel: str, load: int, store: int) -> None:
    rows = measured["kernels"][kernel]
    assert (rows["bytes"]["load"], rows["bytes"]["store"]) == (load, store)
    assert [(rows[arch]["load"], rows[arch]["store"]) for arch in ("sm_80", "sm_90")] == [(load, store)] * 2


@needs_triton
def test_every_launch_of_the_engine_is_judged(measured: dict[str, Any]) -> None:
    assert measured["unlisted"] == []
    assert measured["listed"] > 10  # different kernels, by compiled code
    forgotten = measured | {"unlisted": ["fuse_kernel {} with theta_ptr"]}
    assert check.broken_rules(forgotten)[-1] == (
        "launched by the engine, missing in variants.py: fuse_kernel {} with theta_ptr"
    )


@needs_triton
@pytest.mark.parametrize(
    ("control", "complaint"),
    [
        ("unaligned", "width: narrowest access of an element loop 32 bits, wanted 128"),
        ("doubled load", "load: by formula 4 B/element -> now 8"),
        ("atomics in the loop", "1 atomic operations in the element loop, allowed 0"),
        ("atomics in assembly", "1 atomic operations in the element loop, allowed 0"),
        ("nested loops", "its trip count is not known"),
        ("spill", "spill instructions"),
    ],
)
def test_a_kernel_with_one_fault_is_refused_for_it(controls: dict[str, Any], control: str, complaint: str) -> None:
    alone = controls | {"kernels": {control: controls["kernels"][control]}}
    broken = check.broken_rules(alone)
    assert len(broken) == 2, broken  # on both architectures, and for nothing else
    assert all(line.startswith(f"{control} · sm_{arch}") for line, arch in zip(broken, (80, 90), strict=True))
    assert all(complaint in line for line in broken)


@needs_triton
def test_a_spill_is_counted(controls: dict[str, Any]) -> None:
    for arch in ("sm_80", "sm_90"):
        row = controls["kernels"]["spill"][arch]
        assert row["registers"] <= 40 and row["spills"] > 20 and row["stack"] > 0


@needs_triton
def test_a_kernel_without_machine_code_cannot_be_judged() -> None:
    from benchmarks.contract.measure import _row
    from benchmarks.contract.read import Compiled

    row = _row(Compiled("hash", "", "", b"", num_warps=4, shared=0), [], 90, elements=1024)
    assert row == {"hash": "hash", "unreadable": "no machine code"}


@needs_triton
def test_a_record_reads_back_and_a_stale_one_is_noticed(measured: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "triton.json"
    path.write_text(check.record(measured))
    recorded = check.load(path)
    assert recorded is not None and check.changes(recorded, measured) == ([], [])
    row = recorded["kernels"]["importance"]["sm_90"]
    row["registers"] -= 8
    path.write_text(json.dumps(recorded))
    stale = check.load(path)
    assert stale is not None
    now = measured["kernels"]["importance"]["sm_90"]["registers"]
    expected = f"importance · sm_90 · registers: recorded {now - 8} -> now {now} (limit {now - 6})"
    assert check.changes(stale, measured) == ([expected], [])


@pytest.mark.parametrize(
    ("field", "value", "verdict"),
    [
        ("load", 16, "worse"),
        ("load", 8, "better"),
        ("width", 64, "worse"),
        ("registers", 34, "same"),
        ("registers", 35, "worse"),
        ("registers", 24, "better"),
        ("warps", 60, "worse"),
        ("shared", 16, "worse"),
        ("spills", 1, "worse"),
        ("stack", 8, "worse"),
        ("instructions", 104, "same"),
        ("instructions", 105, "worse"),
        ("loop", 60, "better"),
    ],
)
def test_what_counts_as_worse(field: str, value: int, verdict: str) -> None:
    worse, better = check.changes(one_kernel(), one_kernel(**{field: value}))
    assert (len(worse), len(better)) == {"worse": (1, 0), "better": (0, 1), "same": (0, 0)}[verdict]
    for line in worse + better:
        was = one_kernel()["kernels"]["importance"]["sm_90"][field]
        assert line.startswith(f"importance · sm_90 · {field}: recorded {was} -> now {value}")


def test_large_kernels_may_grow_by_a_fraction() -> None:
    before = one_kernel(instructions=1000)
    assert check.changes(before, one_kernel(instructions=1020)) == ([], [])
    assert check.changes(before, one_kernel(instructions=1021))[0] == [
        "importance · sm_90 · instructions: recorded 1000 -> now 1021 (limit 1020)"
    ]


def test_kernels_and_figures_that_come_or_go_need_accepting() -> None:
    old, new = one_kernel(), one_kernel()
    new["kernels"]["fuse"] = new["kernels"].pop("importance")
    assert check.changes(old, new)[0] == ["importance: recorded, no longer compiled", "fuse: not recorded"]
    new = one_kernel()
    del new["kernels"]["importance"]["sm_90"]["load"]
    new["kernels"]["importance"]["sm_90"]["unreadable"] = "no line numbers"
    assert [line.split(": ", 1)[1] for line in check.changes(old, new)[0]] == [
        "recorded 12 -> now None",
        "recorded None -> now no line numbers",
    ]
    assert check.broken_rules(new) == ["importance · sm_90: no line numbers"]


COUNTED = {"torch": "2.0", "engine": {"paper": {"launches": 33, "host syncs": 0, "syncs": {}}}, "comparison": {}}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The command with its records in an empty folder; it measures what the dictionary holds."""
    state: dict[str, Any] = {"measure": one_kernel(), "counts": copy.deepcopy(COUNTED), "folder": tmp_path}

    def measure(*arguments: str, module: str = "measure", environment: Any = None) -> dict[str, Any]:
        return copy.deepcopy(state[module])

    monkeypatch.setattr(check, "measure", measure)
    monkeypatch.setattr(check, "FOLDER", tmp_path)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "COUNTS", tmp_path / "counts.json")
    return state


def test_without_a_record_the_rules_decide(command: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    output = capsys.readouterr().out
    assert f"There is no triton-9.9.json: only the rules were checked. To record it: {check.ACCEPT}" in output
    command["measure"] = one_kernel(width=32)
    assert main([]) == 1
    assert "32 bits, wanted 128" in capsys.readouterr().out


def test_accept_records_and_a_regression_then_fails(
    command: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--accept"]) == 0
    assert sorted(path.name for path in command["folder"].iterdir()) == ["counts.json", "triton-9.9.json"]
    assert main([]) == 0
    assert "1 kernels and 1 rounds are within the contract" in capsys.readouterr().out
    command["measure"] = one_kernel(registers=48, instructions=90)
    command["counts"]["engine"]["paper"]["launches"] = 34
    assert main([]) == 1
    output = capsys.readouterr().out
    assert "importance · sm_90 · registers: recorded 32 -> now 48 (limit 34)" in output
    assert "paper · launches: recorded 33 -> now 34" in output
    assert "Better than recorded:\n  importance · sm_90 · instructions: recorded 100 -> now 90" in output
    assert output.endswith(f"If that is justified: {check.ACCEPT}\n")
    assert main(["--accept"]) == 0
    assert main([]) == 0


def test_a_broken_rule_cannot_be_accepted(command: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    command["measure"] = one_kernel(spills=2)
    assert main(["--accept"]) == 1
    assert list(command["folder"].iterdir()) == []
    command["measure"] = one_kernel()
    command["counts"]["engine"]["paper"] |= {"host syncs": 1, "syncs": {"item": 1}}
    assert main(["--accept"]) == 1
    assert "paper: 1 host syncs, allowed 0: {'item': 1}" in capsys.readouterr().out


def test_show_prints_every_kernel(command: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("importance "))
    assert row.split() == ["importance", "sm_90", "12+4", "128", "32", "64", "0", "0", "0", "100", "80"]


def test_settings_that_change_compilation_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    seen: dict[str, str] = {}

    def run(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        seen.update(env)
        raise RuntimeError("enough")

    monkeypatch.setattr(check.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="enough"):
        check.measure()
    assert "TRITON_INTERPRET" not in seen and "DISABLE_PTXAS_OPT" not in seen
    assert seen["TRITON_CACHE_DIR"] == "kept" and "PATH" in seen
