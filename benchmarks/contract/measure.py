"""Compiles all variants and prints their figures as JSON. A process of its own: Triton must not interpret in it."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import triton

from benchmarks.contract.compile import ARCHITECTURES, compiled
from benchmarks.contract.entries import Entry, engine_launches, entries
from benchmarks.contract.read import Unreadable, facts

WORKERS = 2
_entries: list[Entry] = []


def _measured(index: int, architecture: int) -> dict[str, Any]:
    entry = _entries[index]
    kernel = compiled(entry.launch, architecture)
    try:
        return {"hash": kernel.hash, **facts(kernel, architecture, entry.elements)}
    except Unreadable as error:
        return {"hash": kernel.hash, "unreadable": str(error)}


def measured(entries: list[Entry]) -> dict[str, dict[str, Any]]:
    """Figures by entry name and architecture (`sm_80`, ...), and what the formula allows (`bytes`).

    Entries that compile to the same kernel as one before them are left out.
    """
    global _entries
    # inherited by the workers: a launch holds functions that cannot be pickled
    _entries = entries
    for entry in entries:
        # in triton 3.6 a source's key depends on which were computed before it: all processes shall have the same
        _ = entry.launch.kernel.cache_key
    jobs = [(index, architecture) for index in range(len(entries)) for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork")) as pool:
        results = dict(zip(jobs, pool.map(_measured, *zip(*jobs, strict=True)), strict=True))
    table: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for index, entry in enumerate(entries):
        rows = {f"sm_{arch}": results[index, arch] for arch in ARCHITECTURES}
        if rows["sm_80"]["hash"] in seen:
            continue
        seen.add(rows["sm_80"]["hash"])
        table[entry.name] = {"bytes": asdict(entry.bytes) if entry.bytes else None, **rows}
    return table


def engine_kernels(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`listed`: how many kernels of the engine are in the table; `unlisted`: the launches whose kernels are not."""
    known = {rows["sm_80"]["hash"] for rows in table.values()}
    listed, found = set(), {}
    for launch in engine_launches():
        kernel = compiled(launch, 80)
        if kernel.hash in known:
            listed.add(kernel.hash)
        else:
            constants = {name: value for name, value in launch.kwargs.items() if name.isupper()}
            given = [n for n, a in zip(launch.kernel.arg_names, launch.args, strict=False) if a is not None]
            found[kernel.hash] = f"{launch.name} {constants} with {', '.join(given)}"
    return {"listed": len(listed), "unlisted": list(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--controls", action="store_true", help="kernels that must fail, instead of the real ones")
    arguments = parser.parse_args()
    if arguments.controls:
        # their kernels are compiled for nothing but this
        from benchmarks.contract import controls

        result = {"kernels": measured(controls.entries()), "listed": 0, "unlisted": []}
    else:
        table = measured(entries())
        result = {"kernels": table, **engine_kernels(table)}
    print(json.dumps({"triton": triton.__version__, **result}))


if __name__ == "__main__":
    main()
