"""The Triton kernels without a GPU, and the engine on them: a process of its own, as Triton decides when imported."""

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


def collected(environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "pytest", "tests/kernel_tests", "-q", "--collect-only"]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    ).stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_and_engine_under_the_interpreter() -> None:
    # the kernel tests' conftest also corrects the interpreter for the engine's tests
    command = [sys.executable, "-m", "pytest", "tests/kernel_tests", "tests/test_engine.py", "-q", "-rfE"]
    environment = os.environ | {"KIF_BACKEND": "interpret", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= AT_LEAST, done.stdout[-2000:]


def test_nothing_is_collected_where_the_kernels_cannot_run() -> None:
    neither = {"KIF_BACKEND": "", "TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": ""}
    assert re.search(r"no tests (collected|ran)", collected(neither))
