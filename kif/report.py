"""Tables and pictures of finished runs, from their results.json."""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kif import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

# Okabe and Ito's palette, which colour-blind readers can tell apart; black last.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_BOOKKEEPING = ("importance", "threshold", "fusion")


class ReportError(ValueError):
    """Results that cannot be read or shown; the message names the file and the key."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """One run's results.json.

    Args:
        method: name of the method.
        label: method plus its variant; runs with equal labels are repetitions.
        model: name of the base model.
        tasks: K names in training order.
        accuracy: accuracy[i][j] = performance on task i after training on task j in percent, None: not measured.
        op: overall performance (Eq. 10), percent.
        bwt: backward transfer (Eq. 11), percentage points; None for joint training and one task.
        fwt: forward transfer, percentage points, if measured.
        zero_shot: performance before any training in percent, if measured.
        seconds: training and evaluation.
        time: seconds by section: `train` and `evaluate`; `importance`, `threshold`, `fusion` are parts of `train`.
        steps: optimizer steps, `inner` and `outer`.
        seed: of the run.
        eval_split: rows that were scored.
        eval_mode: how they were scored.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"allow_inf_nan": False}

    method: str
    label: str
    model: str
    tasks: list[str]
    accuracy: list[list[float | None]]
    op: float
    bwt: float | None
    fwt: float | None = None
    zero_shot: list[float] | None = None
    seconds: float
    time: dict[str, float]
    steps: dict[str, int] = field(default_factory=dict)
    seed: int
    eval_split: str
    eval_mode: str

    @property
    def bookkeeping(self) -> float | None:
        """Percent of the training time spent on importance, threshold and fusion; None without a training time."""
        train = self.time.get("train", 0.0)
        return 100.0 * sum(self.time.get(part, 0.0) for part in _BOOKKEEPING) / train if train > 0 else None

    @property
    def joint(self) -> bool:
        """Whether only the last column was measured, as when all tasks are trained together."""
        return len(self.tasks) > 1 and all(value is None for row in self.accuracy for value in row[:-1])


def load_results(run: Path) -> Results:
    """Read and check the results.json of a run folder.

    Raises ReportError naming the file, and the key where one is missing, of the wrong type or inconsistent.
    """
    path = run / "results.json"
    if not run.is_dir():
        raise ReportError(f"{run}: no such run folder")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ReportError(f"{path}: missing; a run writes it when it is finished") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}:{error.lineno}: invalid JSON: {error.msg}") from error
    return parse_results(content, str(path))


def parse_results(content: Any, where: str) -> Results:
    """Results from the content of results.json; ReportError as in `load_results`, with `where` as the file."""
    from pydantic import TypeAdapter, ValidationError

    try:
        results = TypeAdapter(Results).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "top level"
        raise ReportError(f"{where}: key '{key}': {first['msg'][:1].lower()}{first['msg'][1:]}") from error
    if len(results.tasks) != len(results.accuracy):
        raise ReportError(
            f"{where}: key 'accuracy': {len(results.accuracy)} rows for the {len(results.tasks)} names in 'tasks'"
        )
    if results.zero_shot is not None and len(results.zero_shot) != len(results.tasks):
        raise ReportError(
            f"{where}: key 'zero_shot': {len(results.zero_shot)} values for the {len(results.tasks)} names in 'tasks'"
        )
    try:
        performance = metrics.overall_performance(results.accuracy)
    except ValueError as error:
        raise ReportError(f"{where}: key 'accuracy': {error}") from error
    if abs(performance - results.op) > 0.1:
        raise ReportError(f"{where}: key 'op': {results.op:.2f}, but the last column's mean is {performance:.2f}")
    return results


def group_runs(results: Sequence[Results]) -> list[tuple[str, list[Results]]]:
    """Repetitions together, in order of first appearance: (name, runs).

    Runs are repetitions if they differ in the seed and in what was measured only. Where label alone does not
    tell two groups apart, their names carry the settings in which the given runs differ.
    """
    sequences = list(dict.fromkeys(tuple(result.tasks) for result in results))
    settings = {
        "tasks": [f"sequence {sequences.index(tuple(result.tasks)) + 1}" for result in results],
        "model": [result.model for result in results],
        "split": [result.eval_split for result in results],
        "mode": [result.eval_mode for result in results],
    }
    varying = [values for values in settings.values() if len(set(values)) > 1]
    groups: dict[str, list[Results]] = {}
    for index, result in enumerate(results):
        suffix = ", ".join(values[index] for values in varying)
        groups.setdefault(f"{result.label} ({suffix})" if suffix else result.label, []).append(result)
    return list(groups.items())


def comparison_table(results: Sequence[Results]) -> str:
    """One line a method: OP, BWT, FWT if any, seconds, inner + outer steps, share of training time for bookkeeping.

    Bookkeeping is what the method adds to training: importance, threshold and fusion. Several runs of one label become mean ± sample standard deviation.
    """
    from rich.table import Table

    forward = any(result.fwt is not None for result in results)
    table = Table(title="scores in percent; bookkeeping: importance, threshold and fusion in the training time")
    table.add_column("method")
    for name in ("runs", "OP", "BWT", *(["FWT"] if forward else []), "seconds", "steps", "bookkeeping"):
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
            _mean_std([run.bookkeeping for run in runs], unit="%"),
        )
    text = _render(table)
    sequences = list(dict.fromkeys(tuple(result.tasks) for result in results))
    if len(sequences) > 1:
        text += "".join(f"sequence {n}: {', '.join(names)}\n" for n, names in enumerate(sequences, 1))
    return text


def accuracy_matrix_table(results: Results) -> str:
    """The accuracy matrix: a row for each task, a column for each training stage, in percent."""
    from rich.table import Table

    table = Table(title=f"{results.label}, seed {results.seed}: {results.eval_split} score in percent")
    table.add_column("task")
    if results.zero_shot is not None:
        table.add_column("before", justify="right")
    for stage in range(len(results.tasks)):
        table.add_column(f"after {stage + 1}" if len(results.tasks) <= 8 else str(stage + 1), justify="right")
    for i, name in enumerate(results.tasks):
        start = [f"{results.zero_shot[i]:.1f}"] if results.zero_shot is not None else []
        table.add_row(f"{i + 1} {name}", *start, *("" if v is None else f"{v:.1f}" for v in results.accuracy[i]))
    return _render(table)


def plot_accuracy_matrix(results: Results, path: Path) -> None:
    """Draw the accuracy matrix as a PNG: rows are tasks, columns training stages, unmeasured cells grey."""
    import numpy as np

    size = len(results.tasks)
    values = np.array([[np.nan if v is None else v for v in row] for row in results.accuracy], dtype=float)
    names = [f"{i + 1}. {_short(name, 30)}" for i, name in enumerate(results.tasks)]
    inches = max(2.6, 0.5 * size)
    figure = _figure(inches + 1.8 + 0.09 * max(map(len, names)), inches + 1.2)
    axes = figure.subplots()
    axes.set_facecolor("#e4e4e4")
    image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis")
    for i, j in zip(*np.nonzero(~np.isnan(values)), strict=True):
        ink = "white" if values[i, j] < 60 else "black"
        axes.text(j, i, f"{values[i, j]:.0f}", ha="center", va="center", color=ink, fontsize=9 if size <= 8 else 8)
    axes.set_xticks(range(size), [str(i + 1) for i in range(size)])
    axes.set_yticks(range(size), names)
    axes.set_xlabel("after training on task")
    axes.set_ylabel("scored on task")
    bwt = "" if results.bwt is None else f", BWT {results.bwt:+.1f}"
    axes.set_title(f"{results.label}, seed {results.seed}\nOP {results.op:.1f}{bwt}", fontsize=11)
    figure.colorbar(image, ax=axes, label=f"{results.eval_split} score (%)", shrink=0.8)
    figure.savefig(path)


def plot_tasks(results: Sequence[Results], path: Path) -> None:
    """Draw the score of every task after each training stage as a PNG: a panel for each task, a line for each method.

    This is the picture that shows forgetting. Several runs of a label become their mean and a band of one
    standard deviation. Joint training, which has no stages, is a dashed level. Stage 0 is before any training.
    Raises ReportError if the runs have different task sequences.
    """
    if len({tuple(result.tasks) for result in results}) != 1:
        raise ReportError("one picture shows runs of one task sequence; these differ in it")
    tasks = results[0].tasks
    columns = min(len(tasks), 4 if len(tasks) <= 8 else 5)
    rows = -(-len(tasks) // columns)
    figure = _figure(1.0 + 2.6 * columns, 1.3 + 2.1 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    groups = group_runs(results)
    has_start = any(result.zero_shot is not None for result in results)
    stages = [*([0] if has_start else []), *range(1, len(tasks) + 1, 1 if len(tasks) <= 8 else 2)]
    for number, (name, runs) in enumerate(groups):
        for i in range(len(tasks)):
            style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
            _draw_task(panels[i], name if i == 0 else "_", runs, i, style)
    for i, axes in enumerate(panels):
        if i >= len(tasks):
            axes.set_visible(False)
            continue
        axes.set_title(f"{i + 1}. {_short(tasks[i], 26)}", fontsize=10)
        if i > 0:
            axes.axvspan(-0.5, i + 0.5, color="#ececec", zorder=0, linewidth=0)
        axes.set_xticks(stages)
        axes.tick_params(labelsize=8, labelbottom=i + columns >= len(tasks))
        axes.grid(axis="y", color="#d0d0d0", linewidth=0.5)
    panels[0].set_xlim(-0.3 if has_start else 0.6, len(tasks) + 0.4)
    top = max(value for result in results for row in result.accuracy for value in row if value is not None)
    panels[0].set_ylim(0, min(max(top * 1.1, 10), 103))
    start = "0: before any training; " if has_start else ""
    figure.supxlabel(f"tasks trained so far ({start}grey: before the task's own training)", fontsize=10)
    figure.supylabel(f"{results[0].eval_split} score (%)", fontsize=10)
    widest = max(len(name) for name, _ in groups)
    figure.legend(loc="outside upper center", fontsize=9, ncols=max(1, int(figure.get_figwidth() * 10 / (widest + 8))))
    figure.savefig(path)


def write_report(runs: Sequence[Path], output: Path) -> list[Path]:
    """Write pictures and the merged results.json of finished runs into the folder `output`; returns the files.

    accuracy-<label>-seed<n>.png for each run; tasks.png with all runs, or tasks-1.png, tasks-2.png, ... for each
    task sequence; results.json: {"summary": mean and standard deviation by method, "runs": all results}.
    Raises ReportError for damaged results, and if `output` is a run folder, whose results.json it would replace.
    """
    results = [load_results(run) for run in runs]
    if not results:
        raise ReportError("no runs to report on")
    if (output / "config.yaml").exists() or output.resolve() in {run.resolve() for run in runs}:
        raise ReportError(f"{output}: is a run folder; give another --output, so that its results.json is kept")
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
    merged = output / "results.json"
    merged.write_text(json.dumps(summary(results), indent=1) + "\n", encoding="utf-8")
    return [*written, merged]


def summary(results: Sequence[Results]) -> dict[str, Any]:
    """{"summary": one entry a method with mean and sample standard deviation (None for one run), "runs": all}."""
    entries = []
    for name, runs in group_runs(results):
        entry: dict[str, Any] = {"label": name, "method": runs[0].method, "seeds": [run.seed for run in runs]}
        for key in ("op", "bwt", "fwt", "seconds", "bookkeeping"):
            entry[key], entry[f"{key}_std"] = _statistics([getattr(run, key) for run in runs])
        entries.append(entry)
    return {"summary": entries, "runs": [asdict(result) for result in results]}


def _draw_task(axes: Axes, name: str, runs: Sequence[Results], task: int, style: Mapping[str, Any]) -> None:
    """One method's line in the panel of one task."""
    import numpy as np

    series = np.array(
        [
            [np.nan if run.zero_shot is None else run.zero_shot[task]]
            + [np.nan if value is None else value for value in run.accuracy[task]]
            for run in runs
        ],
        dtype=float,
    )
    if all(run.joint for run in runs):
        axes.axhline(series[:, -1].mean(), color=style["color"], linestyle="--", linewidth=1.3, label=name)
        return
    stages = np.arange(series.shape[1])
    mean = series.mean(axis=0)
    axes.plot(stages, mean, label=name, linewidth=1.4, markersize=4, **style)
    if len(runs) > 1:
        spread = series.std(axis=0, ddof=1)
        axes.fill_between(stages, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)


def _figure(width: float, height: float) -> Figure:
    """A figure outside pyplot's global state; savefig draws it with Agg, without a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


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


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "run"


def _render(table: Table) -> str:
    """The table as plain text, as wide as it needs to be."""
    from rich import box
    from rich.console import Console

    table.box = box.SIMPLE_HEAD
    table.title_justify = "left"
    stream = io.StringIO()
    Console(file=stream, width=240, color_system=None, force_terminal=False, highlight=False).print(table, markup=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
