"""results.json read and checked; tables and pictures of several runs."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from kif import report
from kif.config import RunConfig
from kif.configfile import dump_config
from kif.faults import DiskFull
from kif.report import ReportError, Results, comparison_table, load_results, load_runs, parse_results, write_report

TASKS = ["dbpedia", "amazon", "yahoo", "agnews"]


def content(label: str = "seqlora", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A valid results.json: 80 right after training, 10 less after each further task."""
    tasks = changes.get("tasks", TASKS)
    size = len(tasks)
    accuracy = [[None if j < i else 80.0 + seed - 10.0 * (j - i) for j in range(size)] for i in range(size)]
    values = {
        "method": label.split()[0],
        "label": label,
        "model": "tiny",
        "tasks": tasks,
        "accuracy": accuracy,
        "op": sum(row[-1] or 0.0 for row in accuracy) / size,
        "bwt": -10.0 * size / 2,
        "fwt": None,
        "zero_shot": None,
        "seconds": 100.0 + seed,
        "time": {"train": 80.0, "evaluate": 20.0, "importance": 4.0, "threshold": 3.0, "fusion": 1.0},
        "steps": {"inner": 500, "outer": 60},
        "seed": seed,
        "eval_split": "test",
        "eval_mode": "generate",
        "settings": "",
        "skipped": 0,
    }
    return {**values, **changes}


def make(label: str = "seqlora", seed: int = 0, **changes: Any) -> Results:
    return parse_results(content(label, seed, **changes), "results.json")


def joint(size: int) -> dict[str, Any]:
    accuracy = [[None] * (size - 1) + [90.0] for _ in range(size)]
    return {"accuracy": accuracy, "op": 90.0, "bwt": None}


def save(folder: Path, values: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def row(table: str, start: str) -> list[str]:
    """Cells of the table row that begins with `start`."""
    return next(line for line in table.splitlines() if line.strip().startswith(start)).split()


def test_results_round_trip(tmp_path: Path) -> None:
    results = load_results(save(tmp_path / "run", content()))
    assert results.tasks == TASKS and results.accuracy[0] == [80.0, 70.0, 60.0, 50.0]
    assert results.update_share == pytest.approx(10.0)
    assert not results.joint and make(**joint(4)).joint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "high"}, r"results.json: key 'op': .*valid number"),
        ({"op": 12.0}, r"results.json: key 'op': 12.00, but the last column's mean is 65.00"),
        ({"tasks": TASKS[:3], "accuracy": content()["accuracy"]}, "key 'accuracy': 4 rows for the 3 names"),
        ({"accuracy": [[1.0], [2.0, 3.0], [], []]}, r"key 'accuracy': accuracy\[0\] holds 1 values"),
        ({"accuracy": [[80.0, "x", 60.0, 50.0]] * 4}, r"key 'accuracy\.0\.1"),
        ({"zero_shot": [1.0]}, "key 'zero_shot': 1 values for the 4 names"),
        ({"seconds": float("nan")}, "key 'seconds': .*finite"),
    ],
)
def test_damaged_results_name_file_and_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        load_results(save(tmp_path / "run", {**content(), **changes}))


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    values = content()
    del values["seed"]
    with pytest.raises(ReportError, match=r"results.json: key 'seed'"):
        load_results(save(tmp_path / "key", values))
    with pytest.raises(ReportError, match="none: no such run folder"):
        load_results(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=r"results.json: missing"):
        load_results(tmp_path / "empty")
    with pytest.raises(ReportError, match=r"results.json:2: invalid JSON"):
        load_results(save(tmp_path / "half", '{"method": "seqlora",\n'))
    with pytest.raises(ReportError, match="key 'top level'"):
        load_results(save(tmp_path / "list", []))


def test_comparison_table_of_single_runs() -> None:
    table = comparison_table([make(), make("mtl", **joint(4), steps={"inner": 560, "outer": 0})])
    assert row(table, "seqlora") == ["seqlora", "1", "65.0", "-20.0", "100", "500", "+", "60", "10.0%"]
    assert row(table, "mtl") == ["mtl", "1", "90.0", "-", "100", "560", "10.0%"]
    assert "FWT" not in table and "±" not in table


def test_seeds_become_mean_and_standard_deviation() -> None:
    table = comparison_table([make(seed=0), make(seed=2)])
    # sample standard deviation of 65 and 67
    assert row(table, "seqlora")[:5] == ["seqlora", "2", "66.0", "±", "1.4"]


def test_forward_transfer_has_a_column_if_measured() -> None:
    table = comparison_table([make(fwt=1.25), make("mtl", **joint(4))])
    assert "FWT" in table and "+1.2" in row(table, "seqlora") and row(table, "mtl")[3:5] == ["-", "-"]


def test_runs_that_are_no_repetitions_stay_apart() -> None:
    groups = report.group_runs([make(), make(eval_split="validation"), make(seed=1)])
    assert [(name, len(runs)) for name, runs in groups] == [("seqlora (test)", 2), ("seqlora (validation)", 1)]
    table = comparison_table([make(), make(tasks=TASKS[::-1])])
    assert "seqlora (sequence 1)" in table and "sequence 2: agnews, yahoo, amazon, dbpedia" in table


def test_summary_is_json_with_mean_and_deviation() -> None:
    found = json.loads(json.dumps(report.summary([make(seed=0), make(seed=2), make("mtl", **joint(4))])))
    first, second = found["summary"]
    assert (first["label"], first["seeds"], first["op"]) == ("seqlora", [0, 2], 66.0)
    assert first["op_std"] == pytest.approx(2**0.5)
    assert (second["op_std"], second["bwt"]) == (None, None)
    assert len(found["runs"]) == 3 and found["runs"][1] == {**content(seed=2), "peak_memory": None}


def test_accuracy_matrix_table() -> None:
    table = report.accuracy_matrix_table(make(zero_shot=[1.0, 2.0, 3.0, 4.0]))
    assert row(table, "1 dbpedia") == ["1", "dbpedia", "1.0", "80.0", "70.0", "60.0", "50.0"]
    assert row(table, "4 agnews") == ["4", "agnews", "4.0", "80.0"]


def test_scores_table_ends_in_the_mean() -> None:
    table = report.scores_table(["a", "b"], [50.0, 60.0], title="t")
    assert row(table, "b") == ["b", "60.0"] and row(table, "mean") == ["mean", "55.0"]


def test_write_report(tmp_path: Path) -> None:
    runs = [save(tmp_path / f"s{seed}", content("recurrent-kif M=4", seed)) for seed in (0, 1)]
    runs.append(save(tmp_path / "again", content("recurrent-kif M=4", 0)))
    runs.append(save(tmp_path / "mtl", content("mtl", **joint(4))))
    written = write_report(runs, tmp_path / "out")
    assert [path.name for path in written] == [
        "accuracy-recurrent-kif-m-4-seed0.png",
        "accuracy-recurrent-kif-m-4-seed1.png",
        "accuracy-recurrent-kif-m-4-seed0-2.png",
        "accuracy-mtl-seed0.png",
        "tasks.png",
        "results.json",
    ]
    for path in written[:-1]:
        assert min(png_size(path)) > 300
    assert len(json.loads(written[-1].read_text())["runs"]) == 4


def test_pictures_grow_with_the_tasks(tmp_path: Path) -> None:
    many = [f"task{i}_with_a_rather_long_name_of_its_own" for i in range(15)]
    report.plot_tasks([make(tasks=many)], tmp_path / "15.png")
    report.plot_tasks([make()], tmp_path / "4.png")
    assert png_size(tmp_path / "15.png")[1] > 2 * png_size(tmp_path / "4.png")[1]
    report.plot_accuracy_matrix(make(tasks=many), tmp_path / "m15.png")
    report.plot_accuracy_matrix(make(), tmp_path / "m4.png")
    assert png_size(tmp_path / "m15.png")[1] > 2 * png_size(tmp_path / "m4.png")[1]


def test_lines_of_the_tasks_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line a method in each panel, nan before the first measurement, and a level for joint training."""
    from kif import plots

    figures: list[Figure] = []
    make_figure = plots._figure

    def remember(width: float, height: float) -> Figure:
        figures.append(make_figure(width, height))
        return figures[-1]

    monkeypatch.setattr(plots, "_figure", remember)
    report.plot_tasks([make(seed=0), make(seed=2), make("mtl", **joint(4))], tmp_path / "tasks.png")
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == ["1. dbpedia", "2. amazon", "3. yahoo", "4. agnews"]
    method, level = panels[1].lines[:2]
    assert np.array_equal(method.get_xdata(), [0, 1, 2, 3, 4])
    assert np.array_equal(method.get_ydata(), [np.nan, np.nan, 81.0, 71.0, 61.0], equal_nan=True)
    assert np.array_equal(level.get_ydata(), [90.0, 90.0]) and level.get_linestyle() == "--"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["seqlora", "mtl"]


def test_methods_of_the_tasks_picture_all_look_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fourteen systems are compared."""
    from kif import plots

    looks: dict[str, tuple[str, str]] = {}
    draw = plots._draw_task

    def remember(axes: Any, name: str, runs: Any, task: int, style: Any) -> None:
        looks[runs[0].label] = (style["color"], style["marker"])
        draw(axes, name, runs, task, style)

    monkeypatch.setattr(plots, "_draw_task", remember)
    report.plot_tasks([make(f"method {i}") for i in range(14)], tmp_path / "tasks.png")
    assert len(set(looks.values())) == len(looks) == 14


def test_names_are_no_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands between two dollar signs is drawn as it is; matplotlib would read it, and fail where it cannot."""
    drawn: list[tuple[str, Any]] = []
    preprocess = Text._preprocess_math

    def remember(self: Text, text: str) -> tuple[str, Any]:
        drawn.append(preprocess(self, text))
        return drawn[-1]

    monkeypatch.setattr(Text, "_preprocess_math", remember)
    names = ["$^$ and $_$", "$x$", "$y$", "$z$"]
    runs = [make("$^$", tasks=names), make("$x$", tasks=names)]
    report.plot_tasks(runs, tmp_path / "tasks.png")
    report.plot_accuracy_matrix(runs[0], tmp_path / "matrix.png")
    assert ("$^$", False) in drawn and ("1. $^$ and $_$", False) in drawn
    assert all(not formula for _, formula in drawn)


def test_sequences_get_their_own_pictures(tmp_path: Path) -> None:
    runs = [save(tmp_path / "1", content()), save(tmp_path / "2", content(tasks=TASKS[::-1]))]
    names = [path.name for path in write_report(runs, tmp_path / "out")]
    assert "tasks-1.png" in names and "tasks-2.png" in names
    with pytest.raises(ReportError, match="one task sequence"):
        report.plot_tasks([load_results(run) for run in runs], tmp_path / "x.png")


def test_a_runs_own_results_are_never_replaced(tmp_path: Path) -> None:
    run = save(tmp_path / "run", content())
    before = (run / "results.json").read_text()
    with pytest.raises(ReportError, match="is a run folder"):
        write_report([run], run)
    other = save(tmp_path / "other", content())
    (other / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ReportError, match="is a run folder"):
        write_report([run], other)
    with pytest.raises(ReportError, match="no runs"):
        write_report([], tmp_path / "out")
    assert (run / "results.json").read_text() == before


@pytest.mark.parametrize("text", ["precious\n", '["summary"]', '{"op": 1}'])
def test_results_of_another_kind_are_never_replaced(tmp_path: Path, text: str) -> None:
    run, other = save(tmp_path / "run", content()), save(tmp_path / "other", text)
    with pytest.raises(ReportError, match=r"other/results\.json: is no report, and would be replaced"):
        write_report([run], other)
    assert [path.name for path in other.iterdir()] == ["results.json"]
    assert (other / "results.json").read_text() == text
    # a report is
    for _ in range(2):
        write_report([run], tmp_path / "out")


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save(tmp_path / "run", content())
    merged = write_report([run], tmp_path / "report")[-1]
    before = merged.read_bytes()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DiskFull, match="No space left"):
            write_report([run], tmp_path / "report")
    assert merged.read_bytes() == before
    write_report([run], tmp_path / "report")


def test_a_run_that_is_named_twice_is_one(tmp_path: Path) -> None:
    run = save(tmp_path / "run", content())
    (tmp_path / "link").symlink_to(run)
    assert len(load_runs([run, tmp_path / "link", run / ".." / "run"])) == 1


def test_steps_that_differ_are_said() -> None:
    table = comparison_table([make(), make(seed=1, steps={"inner": 400, "outer": 60})])
    assert "differ" in row(table, "seqlora")


def test_runs_of_other_settings_are_no_repetitions() -> None:
    groups = report.group_runs(
        [make(settings="a"), make(seed=1, settings="a"), make(settings="b"), make("kif", settings="c")]
    )
    assert [(name, len(runs)) for name, runs in groups] == [
        ("seqlora (settings a)", 2),
        ("seqlora (settings b)", 1),
        ("kif", 1),
    ]


def test_runs_of_a_sweep_are_named_by_the_fields_in_which_they_differ(tmp_path: Path) -> None:
    runs = []
    for lr, seed in ((1e-3, 0), (1e-3, 1), (1e-2, 0)):
        runs.append(save(tmp_path / f"{lr}-{seed}", content(seed=seed, settings=str(lr))))
        dump_config(RunConfig(model="m", data="d", lr=lr, seed=seed, output=str(runs[-1])), runs[-1] / "config.yaml")
    other = save(tmp_path / "other", content("kif", settings="c"))
    groups = report.group_runs(load_runs([*runs, other]))
    assert [(name, len(found)) for name, found in groups] == [
        ("seqlora (lr=0.001)", 2),
        ("seqlora (lr=0.01)", 1),
        ("kif", 1),
    ]
    write_report(runs, tmp_path / "report")
    summary = json.loads((tmp_path / "report" / "results.json").read_text())["summary"]
    assert [entry["label"] for entry in summary] == ["seqlora (lr=0.001)", "seqlora (lr=0.01)"]
    # without the configuration of one it is not known in what they differ
    for damage in ("lr: [", None):
        (runs[1] / "config.yaml").write_text(damage) if damage else (runs[1] / "config.yaml").unlink()
        assert [name for name, _ in report.group_runs(load_runs(runs))] == [
            "seqlora (settings 0.001)",
            "seqlora (settings 0.01)",
        ]
