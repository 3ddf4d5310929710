"""Measured figures against the rules and against the recorded ones. Needs neither torch nor triton.

Rules hold always and cannot be accepted away: bytes by formula, 128-bit accesses, no spill, no stack, no atomic in the
element loop but for the formula's. Recorded figures may get better at any time, and worse by `SLACK`; launches and host
syncs may not grow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
ACCEPT = "python -m benchmarks.contract --accept"
COUNTS = FOLDER / "counts.json"
INTERPRET = {"TRITON_INTERPRET": "1"}
TIMEOUT = 600

NAME = 48
"""Characters that tables leave for a name."""

LOWER_IS_BETTER = ("load", "store", "loop_atomics", "registers", "stack", "spills", "shared", "instructions", "loop")
HIGHER_IS_BETTER = ("width", "warps")
SLACK: dict[str, tuple[int, float]] = {"registers": (2, 0.0), "instructions": (4, 0.02), "loop": (4, 0.02)}
"""What a figure may grow by: a number, or a fraction if that is more. Below these, unrelated edits show."""


def measure(*arguments: str, module: str = "measure", environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What `benchmarks.contract.<module>` prints, run in a process whose environment does not change compilation.

    Raises: RuntimeError with the process's error output.
    """
    kept = ("TRITON_CACHE_DIR", "TRITON_HOME")
    clean = {name: value for name, value in os.environ.items() if name in kept or not _steers_compiler(name)}
    command = [sys.executable, "-m", f"benchmarks.contract.{module}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=clean | (environment or {}), capture_output=True, text=True, timeout=TIMEOUT
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def record_path(triton: str) -> Path:
    """Where the figures of this triton's minor version are recorded."""
    return FOLDER / f"triton-{'.'.join(triton.split('.')[:2])}.json"


def load(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def record(measured: dict[str, Any]) -> str:
    """The figures as they are committed: a line for each kernel and architecture."""
    lines = []
    for name, rows in measured["kernels"].items():
        inner = [f"   {json.dumps(arch)}: {json.dumps(_figures(rows[arch]))}" for arch in _architectures(rows)]
        lines.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(inner) + "\n  }")
    body = ",\n".join(lines)
    return f'{{\n "triton": {json.dumps(measured["triton"])},\n "kernels": {{\n{body}\n }}\n}}\n'


def broken_rules(measured: dict[str, Any]) -> list[str]:
    """One line for each rule that a kernel breaks, and each kernel of the engine that nobody judges."""
    found = []
    for name, rows in measured["kernels"].items():
        allowed = rows["bytes"]
        for arch in _architectures(rows):
            row, where = rows[arch], f"{name} · {arch}"
            if "unreadable" in row:
                found.append(f"{where}: {row['unreadable']}")
                continue
            if row["spills"] or row["stack"]:
                found.append(f"{where}: {row['spills']} spill instructions, {row['stack']} bytes of stack, allowed 0")
            if allowed is None:
                continue
            for field in ("load", "store"):
                if row[field] != allowed[field]:
                    found.append(f"{where} · {field}: by formula {allowed[field]} B/element -> now {row[field]}")
            if row["width"] != 128:
                found.append(f"{where} · width: narrowest access of an element loop {row['width']} bits, wanted 128")
            if row["loop_atomics"] > allowed["atomics"]:
                made = f"{row['loop_atomics']} atomic operations in the element loop, allowed {allowed['atomics']}"
                found.append(f"{where}: {made}")
    return found + [f"launched by the engine, missing in variants.py: {text}" for text in measured["unlisted"]]


def changes(recorded: dict[str, Any], measured: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what got worse than recorded, what got better), a line each: kernel, architecture, field: recorded -> now."""
    worse, better = [], []
    old, new = recorded["kernels"], measured["kernels"]
    worse += [f"{name}: recorded, no longer compiled" for name in old if name not in new]
    worse += [f"{name}: not recorded" for name in new if name not in old]
    for name in (name for name in new if name in old):
        for arch in _architectures(new[name]):
            then, now = old[name].get(arch, {}), _figures(new[name][arch])
            for field in dict.fromkeys((*then, *now)):
                was, is_now = then.get(field), now.get(field)
                if was == is_now:
                    continue
                text = f"{name} · {arch} · {field}: recorded {was} -> now {is_now}"
                if was is None or is_now is None:
                    worse.append(text)
                elif is_worse(field, was, is_now):
                    limit = allowed(field, was)
                    worse.append(text + (f" (limit {limit})" if limit != was else ""))
                elif (is_now < was) == (field in LOWER_IS_BETTER):
                    better.append(text)
    return worse, better


def allowed(field: str, was: int) -> int:
    """The largest value of a figure that passes, where less is better."""
    absolute, fraction = SLACK.get(field, (0, 0.0))
    return was + max(absolute, int(was * fraction))


def is_worse(field: str, was: int, now: int) -> bool:
    return now < was if field in HIGHER_IS_BETTER else now > allowed(field, was)


def count_record(measured: dict[str, Any]) -> str:
    """Counts as they are committed: a line for each round."""
    groups = []
    for group in ("engine", "comparison"):
        rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in measured[group].items()]
        groups.append(f" {json.dumps(group)}: {{\n" + ",\n".join(rows) + "\n }")
    return f'{{\n "torch": {json.dumps(measured["torch"])},\n' + ",\n".join(groups) + "\n}\n"


def broken_count_rules(measured: dict[str, Any]) -> list[str]:
    """One line for each round of the engine that waits for the host."""
    return [
        f"{name}: {row['host syncs']} host syncs, allowed 0: {row['syncs']}"
        for name, row in measured["engine"].items()
        if row["host syncs"]
    ]


def count_changes(recorded: dict[str, Any], measured: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(launches and syncs that came, those that went) in the engine's rounds, a line each."""
    worse, better = [], []
    old, new = recorded["engine"], measured["engine"]
    worse += [f"{name}: not recorded" for name in new if name not in old]
    worse += [f"{name}: recorded, no longer counted" for name in old if name not in new]
    for name in (name for name in new if name in old):
        then, now = _flat(old[name]), _flat(new[name])
        for field in dict.fromkeys((*now, *then)):
            was, is_now = then.get(field, 0), now.get(field, 0)
            if was != is_now:
                (worse if is_now > was else better).append(f"{name} · {field}: recorded {was} -> now {is_now}")
    return worse, better


def count_table(measured: dict[str, Any]) -> str:
    """Launches and syncs of a round, for reading."""
    head = f"{'round of 8 inner and M outer steps':{NAME + 2}} {'launches':>8} {'syncs':>5}"
    lines = [f"torch {measured['torch']}", head]
    for group in ("engine", "comparison"):
        for name, row in measured.get(group, {}).items():
            label = name if group == "comparison" else f"engine on the kernels, {name}"
            lines.append(f"{label:{NAME + 2}} {row['launches']:8} {row['host syncs']:5}")
    return "\n".join(lines)


def table(measured: dict[str, Any]) -> str:
    """All figures, for reading."""
    fields = ("width", "registers", "warps", "shared", "spills", "stack", "instructions", "loop")
    widths = {field: max(5, len(field)) for field in fields}
    titles = " ".join(f"{field:>{widths[field]}}" for field in fields)
    head = f"{'kernel':{NAME}} {'arch':5} {'B/element':>9} {titles}"
    lines = [f"triton {measured['triton']}", head]
    for name, rows in measured["kernels"].items():
        for arch in _architectures(rows):
            row = rows[arch]
            moved = f"{row['load']}+{row['store']}" if "load" in row else "-"
            cells = " ".join(f"{row.get(field, '-'):>{widths[field]}}" for field in fields)
            lines.append(f"{name:{NAME}} {arch:5} {moved:>9} " + row.get("unreadable", cells))
    return "\n".join(lines)


def _flat(row: dict[str, Any]) -> dict[str, int]:
    """Numbers by name, those of a part as `part: name`."""
    found: dict[str, int] = {}
    for name, value in row.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{name}: {part}" if part else name: number for part, number in parts}
    return found


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "hash"}


def _architectures(rows: dict[str, Any]) -> list[str]:
    return [name for name in rows if name.startswith("sm_")]


def _steers_compiler(name: str) -> bool:
    return name.startswith(("TRITON_", "PTXAS_", "LLVM_", "MLIR_", "KIF_BACKEND")) or name == "DISABLE_PTXAS_OPT"
