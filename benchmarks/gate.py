"""The regression gate: did a kernel become slower, launch more or move more bytes?

    python -m benchmarks.gate compare RECORDED.json NEW.json     two results of `python -m benchmarks.kernels`
    python -m benchmarks.gate pair BASE [HEAD]                   two checkouts, measured in turn in one run
    python -m benchmarks.gate self-test                          an injected slowdown must fail, A against A must pass

Exit status: 0 pass, 1 regression, 2 no verdict (another GPU, torch or triton, nothing to compare, or a file that
is no result).

A row is slower when its time grew by more than the noise allows: 1 + max(5%, 3 x noise). For `compare` the noise is
what each result says of itself, quartile distance and difference of its first and second half, relative to the
median; for `pair` and `self-test` it is how much runs of the same code differ. Where that allows a doubling, the row
has no verdict, unless it is slower still. Launches, operations, syncs and bytes must not grow at all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FLOOR = 0.05
NOISE_FACTOR = 3.0
MAX_LIMIT = 2.0
CONTENDER = "kif"
PASS, REGRESSION, NO_VERDICT = 0, 1, 2
WORDS = {PASS: "pass", REGRESSION: "REGRESSION", NO_VERDICT: "no verdict"}
COUNTS = ("launches", "operations", "syncs", "bytes")

Result = dict[str, Any]
RowKey = tuple[str, str, str]


@dataclass
class Report:
    """Outcome of a comparison.

    Args:
        verdict: PASS, REGRESSION or NO_VERDICT.
        lines: what to print, one finding a line.
    """

    verdict: int
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([*self.lines, WORDS[self.verdict]])


def key(result: Result) -> tuple[Any, ...]:
    """What two results must have in common to be compared: GPU (or CPU and threads), torch, triton."""
    env = result["env"]
    device = (env["gpu"],) if env["gpu"] else (env["cpu"], env["threads"])
    return (*device, env["torch"], env["triton"])


def compare(base: Sequence[Result], head: Sequence[Result]) -> Report:
    """Compare results of two versions, one or several of each.

    Raises: ValueError for a file without the rows of `benchmarks.kernels`.
    """
    results = [*base, *head]
    for result in results:
        _check(result)
    keys = {key(result) for result in results}
    if len(keys) > 1:
        return Report(NO_VERDICT, ["measured on different machines or versions:", *map(str, sorted(keys, key=str))])
    rows_base, rows_head = [_rows(result) for result in base], [_rows(result) for result in head]
    common = [name for name in rows_base[0] if all(name in rows for rows in rows_base)]
    if not common:
        return Report(NO_VERDICT, [f"the recorded result has no row of {CONTENDER} with a time"])
    report = Report(NO_VERDICT)
    for name in common:
        label = " ".join(name)
        present = [rows[name] for rows in rows_head if name in rows]
        if len(present) < len(rows_head):
            report.verdict = REGRESSION
            report.lines.append(f"{label}: {_why_missing(head, name)}")
            continue
        for problem in _row_problems([rows[name] for rows in rows_base], present, report, label):
            report.verdict = REGRESSION
            report.lines.append(f"{label}: {problem}")
    return report


def _check(result: Result) -> None:
    if "rows" not in result or "env" not in result:
        raise ValueError("not a result of python -m benchmarks.kernels: it has no rows")


def _row_problems(base: list[Result], head: list[Result], report: Report, label: str) -> list[str]:
    problems = []
    for count in COUNTS:
        was, now = base[0].get(count), head[0].get(count)
        if was is not None and now is not None and now > was:
            problems.append(f"{count} {was} -> {now}")
    # a graph leaves out the host; both or neither. Its time is a difference, which may be less than nothing
    in_graph = all((row.get("graph_us") or 0.0) > 0.0 for row in [*base, *head])
    field_name = "graph_us" if in_graph else "median_us"
    times = [[row[field_name] for row in rows] for rows in (base, head)]
    was, now = (statistics.median(values) for values in times)
    limit = 1.0 + max(FLOOR, NOISE_FACTOR * _noise(base, head, times))
    text = f"{was:.1f} us -> {now:.1f} us, ratio {now / was:.3f}, limit {limit:.3f}"
    if now / was > limit:
        problems.append(f"slower: {text}")
    elif limit > MAX_LIMIT:
        report.lines.append(f"{label}: too noisy: {text}")
    else:
        report.lines.append(f"{label}: {text}")
        report.verdict = PASS if report.verdict == NO_VERDICT else report.verdict
    return problems


def _noise(base: list[Result], head: list[Result], times: list[list[float]]) -> float:
    """Relative difference of equal code: between runs where there are several, else within the run."""
    if all(len(values) > 1 for values in times):
        return max((max(values) - min(values)) / statistics.median(values) for values in times)
    found = []
    for row in [*base, *head]:
        first, second = row["halves_us"]
        found.append(max(row["iqr_us"], abs(first - second)) / row["median_us"])
    return max(found)


def _rows(result: Result) -> dict[RowKey, Result]:
    """Those with a time; NaN would be no slower than anything."""
    return {
        (row["operation"], row["set"], row["dtype"]): row
        for row in result["rows"]
        if row["contender"] == CONTENDER and row["status"] == "ok" and 0.0 < row["median_us"] < math.inf
    }


def _why_missing(results: Sequence[Result], name: RowKey) -> str:
    for result in results:
        if name in _rows(result):
            continue
        for row in result["rows"]:
            if (row["operation"], row["set"], row["dtype"]) == name and row["contender"] == CONTENDER:
                reason = row["reason"] if row["status"] != "ok" else f"{row['median_us']} us is no time"
                return f"was measured before, now {row['status']}: {reason}"
    return "was measured before, now missing"


def pair(base: Path, head: Path, rounds: int, options: Sequence[str]) -> Report:
    """Measure the kif_kernels of two folders in turn, in processes of their own, with this checkout's benchmarks.

    Args:
        base, head: folders that hold `kif_kernels`.
        rounds: runs of each; at least 2, so that there is a spread.
        options: further arguments of `python -m benchmarks.kernels`.

    Raises: FileNotFoundError for a folder without kif_kernels; RuntimeError when a measurement fails.
    """
    for folder in (base, head):
        if not (folder / "kif_kernels").is_dir():
            raise FileNotFoundError(f"{folder} has no kif_kernels")
    results: dict[str, list[Result]] = {"base": [], "head": []}
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in (("base", base), ("head", head)):
            # only the kernels of that version: the benchmarks are the same for both
            shutil.copytree(folder / "kif_kernels", Path(scratch) / name / "kif_kernels")
            shutil.copytree(ROOT / "benchmarks", Path(scratch) / name / "benchmarks", ignore=_no_results)
        for number in range(rounds):
            # A B, B A, A B: a drift of the clock meets both alike
            for name in ("base", "head") if number % 2 == 0 else ("head", "base"):
                results[name].append(_run(Path(scratch) / name, options))
    return compare(results["base"], results["head"])


def _no_results(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name in ("results", "__pycache__")]


def _run(folder: Path, options: Sequence[str]) -> Result:
    output = folder / "result.json"
    command = [sys.executable, "-m", "benchmarks.kernels", "--contenders", CONTENDER, "--quiet"]
    done = subprocess.run(
        [*command, "--json", str(output), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    if not output.is_file():
        raise RuntimeError(f"measuring {folder.name} failed:\n{done.stderr[-2000:]}")
    result: Result = json.loads(output.read_text())
    output.unlink()
    return result


def self_test(rounds: int, options: Sequence[str]) -> Report:
    """A against A, and A against A with every operation slowed down by copies of its first argument."""
    same = pair(ROOT, ROOT, rounds, options)
    with tempfile.TemporaryDirectory() as scratch:
        slow = Path(scratch)
        shutil.copytree(ROOT / "kif_kernels", slow / "kif_kernels")
        slow_down(slow / "kif_kernels")
        slower = pair(ROOT, slow, rounds, options)
    lines = ["A against A:", str(same), "", "A against A slowed down:", str(slower), ""]
    good = same.verdict == PASS and slower.verdict == REGRESSION
    lines.append("the gate tells them apart" if good else "THE GATE DOES NOT WORK HERE")
    return Report(PASS if good else REGRESSION, lines)


def slow_down(package: Path) -> None:
    """Change a copy of kif_kernels so that every operation first copies its first tensor six times."""
    path = package / "ops.py"
    text = path.read_text()
    call = "        getattr(implementation("
    if text.count(call) != 1:
        raise RuntimeError(f"{path} has changed: there is no single call of the implementation to slow down")
    path.write_text(text.replace(call, f"        [args[0].clone() for _ in range(6)]\n{call}"))


def _read(path: Path) -> Result:
    """A result. Raises: OSError; ValueError that names the file for one that is none."""
    try:
        result: Result = json.loads(path.read_text())
        _check(result)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns: the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("compare", help="two result files")
    one.add_argument("base", type=Path)
    one.add_argument("head", type=Path)
    two = commands.add_parser("pair", help="two checkouts in one run")
    two.add_argument("base", type=Path, help="checkout of the version to compare with")
    two.add_argument("head", type=Path, nargs="?", default=ROOT, help="default: this checkout")
    for command in (two, commands.add_parser("self-test", help="does the gate work here")):
        command.add_argument("--rounds", type=int, default=3, help="runs of each version, at least 2 (default 3)")
        command.add_argument("--sets", default="t5-large", help="as for benchmarks.kernels")
        command.add_argument("--ops", default="importance,adamw-importance,threshold,fusion", help="likewise")
        command.add_argument("--budget", default="60", help="seconds for each run")
        command.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if args.command == "compare":
        try:
            report = compare([_read(args.base)], [_read(args.head)])
        except (OSError, ValueError) as error:
            # not status 1: nothing became slower
            parser.error(str(error))
    else:
        if args.rounds < 2:
            parser.error("--rounds must be at least 2: one run has no spread")
        for folder in (args.base, args.head) if args.command == "pair" else ():
            if not (folder / "kif_kernels").is_dir():
                parser.error(f"{folder} has no kif_kernels")
        options = [f"--{name}={getattr(args, name)}" for name in ("sets", "ops", "budget", "device")]
        if args.command == "pair":
            report = pair(args.base, args.head, args.rounds, options)
        else:
            report = self_test(args.rounds, options)
    print(report)
    return report.verdict


if __name__ == "__main__":
    raise SystemExit(main())
