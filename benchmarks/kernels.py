"""Microbenchmarks of the operations and of whole rounds, against what a project would write without the kernels.

    python -m benchmarks.kernels --device auto --sets t5-large,llama2-7b --ops all --contenders all \\
        --json results.json --plot roofline.png --budget 240

Needs torch (and triton on a GPU); from a plain checkout with PYTHONPATH=. if the project is not installed. The JSON
holds `env`, `machine`, `settings`, `rows` (`benchmarks.measure.Row`) and `goals`. Exit status 1 when a contender was
wrong or the project's own code failed; what was left out for lack of time, memory or a package is no failure.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import CONTENDERS
from benchmarks.goals import Reached, goals
from benchmarks.machine import Machine, environment, write_json
from benchmarks.measure import DTYPES, Row, plan, run
from benchmarks.operations import OPERATIONS
from benchmarks.quantiles import SELECTORS
from benchmarks.roofline import plot
from benchmarks.shapes import SETS

FORMAT = 1
"""Of the JSON; changes when a key changes its meaning."""

OURS = tuple(name for name in (*CONTENDERS, *SELECTORS) if name.startswith("kif") or name in ("compile", "reference"))
"""Contenders that are code of this project."""

DEFAULT_SETS = {"cpu": ("t5-large",), "cuda": tuple(name for name in SETS if name != "tiny")}
ROW_SECONDS, QUICK_ROW_SECONDS = 0.3, 0.03


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns: the exit status."""
    args = _parser().parse_args(argv)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    sets = DEFAULT_SETS.get(device.type, DEFAULT_SETS["cpu"]) if args.sets == ["default"] else args.sets
    operations = list(OPERATIONS) if args.ops == ["all"] else args.ops
    contenders = None if args.contenders == ["all"] else args.contenders
    env = environment(device)
    machine = Machine(device)
    print(f"{env['gpu'] or env['cpu']}, torch {env['torch']}, triton {env['triton']}, revision {env['git_revision']}")
    print(f"copy {machine.copy_gbps:.1f} GB/s, empty launch {machine.launch_us:.1f} us, {_cache(machine)}", flush=True)
    cases = plan(sets, operations, contenders, ["fp32", *args.variants])
    settings = {"sets": list(sets), "ops": operations, "budget": args.budget, "quick": args.quick}
    progress = (lambda row: None) if args.quiet else _progress(len(cases))
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        progress(row)
        # the time allowed may end before the last row
        if args.json and row.status != "not run":
            write_json(args.json, document(rows, env, machine, settings))

    run(cases, machine, args.budget, QUICK_ROW_SECONDS if args.quick else ROW_SECONDS, keep)
    copy_end = machine.measure_copy()
    print(table(rows))
    print(goal_table(goals(rows, env["gpu"])))
    if args.json:
        write_json(args.json, document(rows, env, machine, settings, copy_end))
    if args.plot:
        name = f"{env['gpu'] or env['cpu']}, torch {env['torch']}, triton {env['triton']}"
        if missing := plot(rows, args.plot, machine.copy_gbps, machine.launch_us, name):
            print(missing)
    return int(any(row.status == "wrong" or (row.status == "error" and row.contender in OURS) for row in rows))


def document(
    rows: Sequence[Row], env: dict[str, Any], machine: Machine, settings: dict[str, Any], copy_end: float | None = None
) -> dict[str, Any]:
    """The JSON. `copy_end`: the bandwidth of a copy after all rows, in GB/s."""
    return {
        "format": FORMAT,
        "env": env,
        "machine": {
            "copy_gbps": machine.copy_gbps,
            "copy_gbps_end": copy_end,
            "launch_us": machine.launch_us,
            "cache_bytes": machine.cache_bytes,
            "cold_cache": machine.cuda,
        },
        "settings": settings,
        "rows": [row.as_dict() for row in rows],
        "goals": [goal.as_dict() for goal in goals(rows, env["gpu"])],
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as text: those with times by set, operation and contender, then the others with their reasons."""
    lines = []
    header = (
        f"{'contender':<20} {'dtype':<5} {'min MB':>8} {'MB':>8} {'GB/s':>8} {'of copy':>7} {'launches':>8} {'ops':>6} "
        f"{'event us':>10} {'graph us':>9} {'host us':>10} {'median us':>11} {'IQR us':>9}  note"
    )
    for set_name, operation in dict.fromkeys((row.set, row.operation) for row in rows if row.status == "ok"):
        group = [row for row in rows if (row.set, row.operation, row.status) == (set_name, operation, "ok")]
        size = f"{group[0].elements:,} elements in {group[0].tensors} tensors"
        lines += ["", f"{operation}, {set_name} ({size}): {OPERATIONS[operation].about}", header]
        lines += [_line(row) for row in group]
    others = [row for row in rows if row.status != "ok"]
    if others:
        lines += ["", "without times:"]
        grouped: dict[tuple[str, str, str, str], list[str]] = {}
        for row in others:
            grouped.setdefault((row.status, row.reason, row.contender, row.operation), []).append(row.set)
        for (status, reason, contender, operation), names in grouped.items():
            lines.append(f"  {status}: {contender}, {operation}, {', '.join(dict.fromkeys(names))}: {reason}")
    return "\n".join(lines)


def goal_table(reached: Sequence[Reached]) -> str:
    """The goals as text."""
    width = max(len(goal.goal) for goal in reached)
    return "\n".join(["", "goals:", *(f"  {goal.goal:<{width}}  {goal.verdict:<17}  {goal.value}" for goal in reached)])


def _line(row: Row) -> str:
    def number(value: float | None, width: int, digits: int = 1, scale: float = 1.0) -> str:
        return f"{'-':>{width}}" if value is None else f"{value * scale:>{width}.{digits}f}"

    cells = [
        f"{row.contender:<20} {row.dtype:<5}",
        number(row.min_bytes, 8, 1, 1e-6),
        number(row.bytes, 8, 1, 1e-6),
        number(row.gbps, 8),
        number(row.fraction, 7, 2),
        number(row.launches, 8, 0),
        number(row.operations, 6, 0),
        number(row.event_us, 10),
        number(row.graph_us, 9),
        number(row.host_us, 10),
        number(row.median_us, 11),
        number(row.iqr_us, 9),
    ]
    notes = [row.note, row.graph_note if row.event_us is not None else "", f"{row.syncs} syncs" if row.syncs else ""]
    return " ".join(cells) + "  " + "; ".join(note for note in notes if note)


def _progress(total: int) -> Any:
    done = 0

    def report(row: Row) -> None:
        nonlocal done
        done += 1
        if row.status != "not run":
            print(
                f"[{done}/{total}] {row.set} {row.operation} {row.contender} {row.dtype}: {row.status} "
                f"({row.seconds:.1f} s)",
                flush=True,
            )

    return report


def _cache(machine: Machine) -> str:
    size = f"{machine.cache_bytes / 2**20:.0f} MiB"
    return f"L2 {size}, flushed before every timed part" if machine.cuda else f"L3 {size}, not flushed"


def _names(known: Sequence[str], *special: str) -> Any:
    """An argparse type: names from a list, separated by commas."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known and names not in [[word] for word in special]]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: there are {', '.join(known)}")
        return names

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description="Microbenchmarks of kif_kernels.",
        epilog="\n".join(
            ["contenders:"]
            + [f"  {name:<20} {c.about}" for name, c in CONTENDERS.items()]
            + ["for the threshold:"]
            + [f"  {name:<20} {c.about}" for name, c in SELECTORS.items()]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(dict.fromkeys([*CONTENDERS, *SELECTORS]))
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--sets", type=_names(list(SETS), "default"), default=["default"], help=", ".join(SETS))
    parser.add_argument("--ops", type=_names(list(OPERATIONS), "all"), default=["all"], help=", ".join(OPERATIONS))
    parser.add_argument("--contenders", type=_names(names, "all"), default=["all"], help="see below")
    parser.add_argument(
        "--variants",
        type=_names([name for name in DTYPES if name != "fp32"]),
        default=[],
        help="also with weights and gradients of these dtypes: bf16, fp16",
    )
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for all measurements (default 240)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the repeats")
    parser.add_argument("--quiet", action="store_true", help="no line for each row while it runs")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--plot", type=Path, help="write the roofline plot here (PNG)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
