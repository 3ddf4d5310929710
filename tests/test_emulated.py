"""The tests of the kernels on what these compile to: PTX for an H100 or H200 (`tests/ptx`)."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AT_LEAST = 290
"""Tests: a folder that is not collected must not pass for one that is fine."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_and_engine_as_compiled_for_a_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "tests/kernel_tests", "tests/test_engine.py", "-q", "-rfE"]
    environment = os.environ | {"KIF_PTX": "90", "KIF_PTX_ORDER": "", "KIF_BACKEND": "", "TRITON_INTERPRET": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= AT_LEAST, done.stdout[-2000:]
