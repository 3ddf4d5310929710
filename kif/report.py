"""Tables and pictures of finished runs, from their results.json."""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kif.files import write_json
from kif.plots import plot_accuracy_matrix, plot_tasks
from kif.results import ReportError, Results, group_runs, load_results, load_runs, parse_results

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "ReportError",
    "Results",
    "accuracy_matrix_table",
    "comparison_table",
    "load_results",
    "load_runs",
    "parse_results",
    "plot_accuracy_matrix",
    "plot_tasks",
    "scores_table",
    "summary",
    "write_report",
]


def comparison_table(results: Sequence[Results]) -> str:
    """One line a method: OP, BWT, FWT if any, seconds, inner + outer steps, share of training time for the update.

    The update is what comes after the backward pass: optimizer, importance, thresholds and fusion. Several runs of
    one label become mean ± sample standard deviation.
    """
    from rich.table import Table

    forward = any(result.fwt is not None for result in results)
    table = Table()
    table.add_column("method")
    for name in ("runs", "OP", "BWT", *(["FWT"] if forward else []), "seconds", "steps", "update", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, runs in group_runs(results):
        table.add_row(
            name,
            str(len(runs)),
            _mean_std([run.op for run in runs]),
            _mean_std([run.bwt for run in runs], sign="+"),
            *([_mean_std([run.fwt for run in runs], sign="+")] if forward else []),
            _mean_std([run.seconds for run in runs], digits=0),
            _steps(runs),
            _mean_std([run.update_share for run in runs], unit="%"),
            _memory(runs),
        )
    text = (
        _render(table)
        + "OP, BWT in percent; update: share of training time for optimizer, importance, threshold, fusion\n"
    )
    sequences = list(dict.fromkeys(tuple(result.tasks) for result in results))
    if len(sequences) > 1:
        text += "".join(f"sequence {n}: {', '.join(names)}\n" for n, names in enumerate(sequences, 1))
    return text


def _memory(runs: Sequence[Results]) -> str:
    known = [run.peak_memory for run in runs if run.peak_memory is not None]
    return f"{max(known) / 2**30:.2f} GiB" if known else ""


def accuracy_matrix_table(results: Results) -> str:
    """The accuracy matrix: a row for each task, a column for each training stage, in percent."""
    from rich.table import Table

    table = Table()
    table.add_column("task")
    if results.zero_shot is not None:
        table.add_column("before", justify="right")
    for stage in range(len(results.tasks)):
        table.add_column(f"after {stage + 1}" if len(results.tasks) <= 8 else str(stage + 1), justify="right")
    for i, name in enumerate(results.tasks):
        start = [f"{results.zero_shot[i]:.1f}"] if results.zero_shot is not None else []
        table.add_row(f"{i + 1} {name}", *start, *("" if v is None else f"{v:.1f}" for v in results.accuracy[i]))
    return f"{results.label}, seed {results.seed}: {results.eval_split} score in percent\n{_render(table)}"


def scores_table(tasks: Sequence[str], scores: Sequence[float], title: str) -> str:
    """One score a task in percent and their mean, as `kif eval` prints them."""
    from rich.table import Table

    table = Table()
    table.add_column("task")
    table.add_column("score", justify="right")
    for name, score in zip(tasks, scores, strict=True):
        table.add_row(name, f"{score:.1f}")
    table.add_section()
    table.add_row("mean", f"{statistics.fmean(scores):.1f}")
    return f"{title}\n{_render(table)}"


def write_report(runs: Sequence[Path], output: Path) -> list[Path]:
    """Write pictures and the merged results.json of finished runs into the folder `output`; returns the files.

    accuracy-<label>-seed<n>.png for each run; tasks.png with all runs, or tasks-1.png, tasks-2.png, ... for each
    task sequence; results.json: {"summary": mean and standard deviation by method, "runs": all results}.
    Raises ReportError for damaged results, and if `output` is a run folder or holds a results.json of another kind,
    which it would replace.
    """
    results = load_runs(runs)
    if not results:
        raise ReportError("no runs to report on")
    if (output / "config.yaml").exists() or output.resolve() in {run.resolve() for run in runs}:
        raise ReportError(f"{output}: is a run folder; give another --output, so that its results.json is kept")
    merged = output / "results.json"
    if merged.exists() and not _is_report(merged):
        raise ReportError(f"{merged}: is no report, and would be replaced; give another --output, or move it away")
    output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for result in results:
        stem = f"accuracy-{_slug(result.label)}-seed{result.seed}"
        path = output / f"{stem}.png"
        while path in written:
            path = path.with_name(f"{stem}-{written.index(path) + 2}.png")
        plot_accuracy_matrix(result, path)
        written.append(path)
    sequences = list(dict.fromkeys(tuple(result.tasks) for result in results))
    for number, sequence in enumerate(sequences, 1):
        path = output / ("tasks.png" if len(sequences) == 1 else f"tasks-{number}.png")
        plot_tasks([result for result in results if tuple(result.tasks) == sequence], path)
        written.append(path)
    write_json(merged, summary(results))
    return [*written, merged]


def _is_report(path: Path) -> bool:
    """Whether a results.json is one that `write_report` has written."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "summary" in content


def summary(results: Sequence[Results]) -> dict[str, Any]:
    """{"summary": one entry a method with mean and sample standard deviation (None for one run), "runs": all}."""
    entries = []
    for name, runs in group_runs(results):
        entry: dict[str, Any] = {"label": name, "method": runs[0].method, "seeds": [run.seed for run in runs]}
        for key in ("op", "bwt", "fwt", "seconds", "update_share"):
            entry[key], entry[f"{key}_std"] = _statistics([getattr(run, key) for run in runs])
        entries.append(entry)
    return {"summary": entries, "runs": [asdict(result) for result in results]}


def _statistics(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where a value is missing, no deviation for a single one."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def _mean_std(values: Sequence[float | None], *, digits: int = 1, sign: str = "", unit: str = "") -> str:
    mean, deviation = _statistics(values)
    if mean is None:
        return "-"
    return f"{mean:{sign}.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}") + unit


def _steps(runs: Sequence[Results]) -> str:
    """Inner + outer optimizer steps of the runs, if they are the same."""
    kinds = {(run.steps.get("inner", 0), run.steps.get("outer", 0)) for run in runs}
    if len(kinds) > 1:
        return "differ"
    inner, outer = kinds.pop()
    return f"{inner} + {outer}" if outer else str(inner)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "run"


def _render(table: Table) -> str:
    """The table as plain text, as wide as it needs to be."""
    from rich import box
    from rich.console import Console

    table.box = box.SIMPLE_HEAD
    stream = io.StringIO()
    Console(file=stream, width=240, color_system=None, force_terminal=False, highlight=False).print(table, markup=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines()) + "\n"
