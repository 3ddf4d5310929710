"""The roofline plot: time over bytes for every operation, between the copy bandwidth and the cost of a launch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.baselines import CONTENDERS
from benchmarks.measure import Row
from benchmarks.operations import OPERATIONS
from benchmarks.quantiles import SELECTORS

MARKERS = "osv^D<>PX*hpd8"


def style(contender: str) -> dict[str, Any]:
    """Colour and marker of a contender: the same in every panel and every run."""
    names = list(dict.fromkeys([*CONTENDERS, *SELECTORS]))
    index = names.index(contender)
    colour = "black" if contender == "kif" else f"C{index % 10}"
    return {"color": colour, "marker": MARKERS[index % len(MARKERS)], "zorder": 5 if contender == "kif" else 3}


def plot(rows: Sequence[Row], path: Path, copy_gbps: float, launch_us: float, title: str) -> str:
    """Draw the float32 rows that have times as a PNG, one panel an operation.

    Args:
        rows: of one run.
        path: of the PNG.
        copy_gbps: copy bandwidth of the run; its line is the least time of the bytes on the x axis.
        launch_us: cost of an empty launch; 0 draws no line.
        title: what was measured on.

    Returns: empty, or why there is no plot (no matplotlib, nothing to draw).
    """
    timed = [row for row in rows if row.median_us and row.dtype == "fp32"]
    if not timed:
        return "no plot: no row has a time"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed"
    operations = [name for name in OPERATIONS if any(row.operation == name for row in timed)]
    columns = min(4, len(operations))
    lines = -(-len(operations) // columns)
    figure = Figure(figsize=(4.3 * columns + 1.0, 3.6 * lines + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axis, operation in zip(axes, operations, strict=False):
        _panel(axis, operation, [row for row in timed if row.operation == operation], copy_gbps, launch_us, handles)
    for axis in axes[len(operations) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    for axis in axes[max(0, len(operations) - columns) :]:
        axis.set_xlabel("bytes that the operation must move")
    for axis in axes[::columns]:
        axis.set_ylabel("time, us")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return ""


def _panel(
    axis: Any, operation: str, rows: Sequence[Row], copy_gbps: float, launch_us: float, handles: dict[str, Any]
) -> None:
    sizes = sorted({row.min_bytes for row in rows})
    # more than a decade, so that the ticks are powers of ten
    ends = [sizes[0] / 4, sizes[-1] * 4]
    floor = axis.plot(ends, [size / copy_gbps / 1e3 for size in ends], color="grey", linestyle="--", linewidth=1)
    handles.setdefault(f"copy bandwidth, {copy_gbps:.0f} GB/s", floor[0])
    if launch_us > 0:
        launch = axis.axhline(launch_us, color="grey", linestyle=":", linewidth=1)
        handles.setdefault(f"one launch, {launch_us:.1f} us", launch)
    for contender in dict.fromkeys(row.contender for row in rows):
        points = sorted((row.min_bytes, row.median_us) for row in rows if row.contender == contender)
        drawn = axis.plot(*zip(*points, strict=True), linewidth=0.8, markersize=5, **style(contender))
        handles.setdefault(contender, drawn[0])
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_title(OPERATIONS[operation].about, fontsize="medium")
    axis.grid(alpha=0.3)
