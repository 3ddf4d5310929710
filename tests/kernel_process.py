"""The kernels' and the engine's tests in a process of their own: where kernels run is settled at their import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = 110
"""At least so many in any part: a folder that is not collected must not pass for one that is fine."""


def run_kernel_tests(cases: str, **environment: str) -> None:
    """`cases`: which part of each test's cases, of KIF_CASES."""
    environment["KIF_CASES"] = cases
    # the kernel tests' conftest prepares the process for the engine's tests too
    command = [sys.executable, "-m", "pytest", "tests/kernel_tests", "tests/test_engine.py", "-q", "-rfE"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= TESTS, done.stdout[-2000:]
