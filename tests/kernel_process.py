"""The kernels' and the engine's tests in a process of their own: where kernels run is settled at their import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from zlib import crc32

ROOT = Path(__file__).parents[1]

IMPORTS = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
"""PYTHONPATH of processes that import what this one does, from the checkout and the tests."""


def part_of(tests: list[str], part: str) -> set[str]:
    """Of "1/3" the first third of each test's cases, and at least one, in an order that their parameters do not set."""
    number, parts = (int(text) for text in part.split("/"))
    cases = defaultdict[str, list[str]](list)
    for name in sorted(tests, key=lambda name: crc32(name.encode())):
        cases[name.partition("[")[0]].append(name)
    return {name for test in cases.values() for name in test[(number - 1) % len(test) :: parts]}


def run_kernel_tests(cases: str, at_least: int, **environment: str) -> None:
    """`cases`: which part, as in KIF_CASES. A folder that is not collected must not pass for one that is fine."""
    environment["KIF_CASES"] = cases
    # the kernel tests' conftest prepares the process for the engine's tests too
    command = [sys.executable, "-m", "pytest", "tests/kernel_tests", "tests/test_engine.py", "-q", "-rfE"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= at_least, done.stdout[-2000:]
