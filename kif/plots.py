"""Pictures of finished runs: the accuracy matrix, and every task's score over the training stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kif.results import ReportError, Results, group_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; black last.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"


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
    axes.set_title(f"{_literal(results.label)}, seed {results.seed}\nOP {results.op:.1f}{bwt}", fontsize=11)
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
            # another marker each time the colours begin anew
            marker = _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)]
            style = {"color": _COLOURS[number % len(_COLOURS)], "marker": marker}
            _draw_task(panels[i], _literal(name) if i == 0 else "_", runs, i, style)
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


def _short(name: str, length: int) -> str:
    return _literal(name if len(name) <= length else name[: length - 1] + "…")


def _literal(text: str) -> str:
    """`text` such that matplotlib takes no part of it for a formula."""
    return text.replace("$", r"\$")
