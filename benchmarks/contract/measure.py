"""Compiles all variants and prints their figures as JSON. A process of its own: Triton must not interpret in it."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import repeat
from typing import Any

import triton

from benchmarks.contract.compile import ARCHITECTURES, compiled
from benchmarks.contract.entries import Entry, engine_launches, entries
from benchmarks.contract.machine_code import Instruction, Unreadable, disassembled
from benchmarks.contract.read import Compiled, facts

WORKERS = 2
_entries: list[Entry] = []


def _compiled(index: int, architecture: int) -> Compiled:
    kernel = compiled(_entries[index].launch, architecture)
    code, about = kernel.asm, kernel.metadata
    return Compiled(kernel.hash, code["ttgir"], code["ptx"], code["cubin"], about.num_warps, about.shared)


def _row(kernel: Compiled, machine: list[Instruction], architecture: int, elements: int) -> dict[str, Any]:
    try:
        return {"hash": kernel.hash, **facts(kernel, machine, architecture, elements)}
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
    results: dict[tuple[int, int], dict[str, Any]] = {}
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork")) as pool:
        for architecture in ARCHITECTURES:
            kernels = list(pool.map(_compiled, range(len(entries)), repeat(architecture)))
            code = disassembled([kernel.cubin for kernel in kernels], architecture)
            for index, (kernel, machine) in enumerate(zip(kernels, code, strict=True)):
                results[index, architecture] = _row(kernel, machine, architecture, entries[index].elements)
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
