"""The regression gate on results written down here: what it lets pass, what it fails, where it gives no verdict."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gate

ENV = {"gpu": "NVIDIA X", "cpu": "a CPU", "threads": 1, "torch": "2.11.0", "triton": "3.6.0"}


def row(operation: str = "fusion", median: float = 100.0, **changes: Any) -> dict[str, Any]:
    values = {
        "operation": operation, "contender": "kif", "set": "t5-large", "dtype": "fp32", "status": "ok", "reason": "",
        "median_us": median, "graph_us": None, "iqr_us": 1.0, "halves_us": [median, median], "launches": 1,
        "operations": 1, "syncs": 0, "bytes": 1000,
    }  # fmt: skip
    return {**values, **changes}


def result(*rows: dict[str, Any], **env: Any) -> dict[str, Any]:
    return {"env": {**ENV, **env}, "rows": list(rows)}


def verdict(base: dict[str, Any], head: dict[str, Any]) -> int:
    return gate.compare([base], [head]).verdict


def test_equal_results_pass_and_say_so() -> None:
    report = gate.compare([result(row())], [result(row())])
    assert report.verdict == gate.PASS and str(report).endswith("pass") and "ratio 1.000" in str(report)


@pytest.mark.parametrize(("median", "expected"), [(104.0, gate.PASS), (106.0, gate.REGRESSION), (50.0, gate.PASS)])
def test_a_quiet_row_may_grow_by_five_percent(median: float, expected: int) -> None:
    assert verdict(result(row()), result(row(median=median))) == expected


@pytest.mark.parametrize(
    "noisy",
    [{"iqr_us": 10.0}, {"halves_us": [95.0, 105.0]}],
    ids=["quartiles", "halves"],
)
def test_noise_widens_the_limit_to_three_times_itself(noisy: dict[str, Any]) -> None:
    assert verdict(result(row(**noisy)), result(row(median=128.0))) == gate.PASS
    assert verdict(result(row(**noisy)), result(row(median=132.0))) == gate.REGRESSION


def test_a_row_whose_noise_allows_a_doubling_has_no_verdict() -> None:
    noisy = result(row(iqr_us=40.0))
    assert verdict(noisy, noisy) == gate.NO_VERDICT
    assert verdict(noisy, result(row(median=300.0))) == gate.REGRESSION
    quiet = row("importance")
    both = result(row(iqr_us=40.0), quiet)
    assert verdict(both, both) == gate.PASS
    assert verdict(both, result(row(), row("importance", 200.0))) == gate.REGRESSION


def test_noise_between_runs_counts_where_there_are_several() -> None:
    base = [result(row(median=median, iqr_us=90.0)) for median in (99.0, 100.0, 101.0)]
    slow = [result(row(median=median, iqr_us=90.0)) for median in (109.0, 110.0, 111.0)]
    assert gate.compare(base, slow).verdict == gate.REGRESSION
    assert gate.compare(base[:2], slow[:2]).verdict == gate.REGRESSION
    assert gate.compare(base, base).verdict == gate.PASS


@pytest.mark.parametrize("count", gate.COUNTS)
def test_counts_must_not_grow(count: str) -> None:
    more = row()
    more[count] += 1
    report = gate.compare([result(row())], [result(more)])
    assert report.verdict == gate.REGRESSION and count in str(report)
    assert verdict(result(more), result(row())) == gate.PASS


def test_graph_times_decide_where_both_have_them() -> None:
    base = result(row(graph_us=10.0, median=100.0))
    assert verdict(base, result(row(graph_us=20.0, median=100.0))) == gate.REGRESSION
    assert verdict(base, result(row(graph_us=10.0, median=200.0, iqr_us=0.1))) == gate.PASS
    assert verdict(base, result(row(graph_us=None, median=200.0))) == gate.REGRESSION


def test_a_graph_time_below_nothing_is_none() -> None:
    base = result(row(graph_us=-0.5))
    assert verdict(base, result(row(graph_us=5.0, median=200.0))) == gate.REGRESSION
    assert verdict(base, result(row(graph_us=5.0))) == gate.PASS


@pytest.mark.parametrize("time", [math.nan, math.inf, 0.0])
def test_a_row_without_a_time_is_lost(time: float) -> None:
    none = result(row(median=time, graph_us=1.0))
    report = gate.compare([result(row(graph_us=1.0))] * 2, [result(row(graph_us=1.0)), none])
    assert report.verdict == gate.REGRESSION and f"now ok: {time} us is no time" in str(report)
    assert verdict(none, result(row())) == gate.NO_VERDICT


@pytest.mark.parametrize("other", [{"gpu": "NVIDIA Y"}, {"torch": "2.12.0"}, {"triton": "3.9.0"}])
def test_another_machine_or_version_gives_no_verdict(other: dict[str, str]) -> None:
    assert verdict(result(row()), result(row(median=900.0), **other)) == gate.NO_VERDICT
    assert verdict(result(row()), result(row(), cpu="another CPU")) == gate.PASS  # the GPU is what was measured
    assert verdict(result(row(), gpu=None), result(row(), gpu=None, cpu="another CPU")) == gate.NO_VERDICT


def test_a_row_that_is_lost_or_wrong_is_a_regression() -> None:
    base = result(row(), row("importance"))
    report = gate.compare([base], [result(row())])
    assert report.verdict == gate.REGRESSION and "importance t5-large fp32" in str(report)
    wrong = row("importance", status="wrong", reason="max error 3")
    assert "now wrong: max error 3" in str(gate.compare([base], [result(row(), wrong)]))
    assert verdict(result(row()), base) == gate.PASS  # a new row has nothing to be compared with
    assert verdict(result(row(contender="compile")), base) == gate.NO_VERDICT


def test_the_command_line_ends_with_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, content in (("base", result(row())), ("slow", result(row(median=200.0))), ("y", result(row(), gpu="Y"))):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    base, slow, other = map(str, files)
    assert gate.main(["compare", base, base]) == 0
    assert gate.main(["compare", base, slow]) == 1
    assert "slower: 100.0 us -> 200.0 us" in capsys.readouterr().out
    assert gate.main(["compare", base, other]) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), ('{"env": {}, "rows": [', "Expecting value"), ('{"env": {}}', "it has no rows")],
)
def test_what_cannot_be_read_is_named_and_is_no_regression(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(result(row())))
    if content is not None:
        bad.write_text(content)
    for files in ((good, bad), (bad, good)):
        with pytest.raises(SystemExit) as end:
            gate.main(["compare", *map(str, files)])
        error = capsys.readouterr().err
        assert end.value.code == gate.NO_VERDICT and str(bad) in error and words in error
    with pytest.raises(SystemExit) as end:
        gate.main(["pair", str(tmp_path)])
    assert end.value.code == gate.NO_VERDICT and f"{tmp_path} has no kif_kernels" in capsys.readouterr().err


def test_a_file_that_is_no_result_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        gate.compare([{"quality": 1}], [result(row())])


def test_pair_measures_both_folders_in_turn_with_one_set_of_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(folder: Path, options: Any) -> dict[str, Any]:
        ran.append(folder.name)
        assert (folder / "kif_kernels" / "ops.py").is_file() and (folder / "benchmarks" / "kernels.py").is_file()
        assert not (folder / "benchmarks" / "results").exists()
        slow = "clone() for _ in range(6)" in (folder / "kif_kernels" / "ops.py").read_text()
        return copy.deepcopy(result(row(median=200.0 if slow else 100.0)))

    monkeypatch.setattr(gate, "_run", run)
    report = gate.self_test(3, [])
    assert ran == ["base", "head", "head", "base", "base", "head"] * 2
    assert report.verdict == gate.PASS and "tells them apart" in str(report)
    monkeypatch.setattr(gate, "slow_down", lambda package: None)
    assert gate.self_test(2, []).verdict == gate.REGRESSION


def test_pair_names_a_folder_without_kernels(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no kif_kernels"):
        gate.pair(tmp_path, gate.ROOT, 2, [])
