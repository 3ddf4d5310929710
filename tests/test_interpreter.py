"""A third of the kernels' and the engine's tests in Triton's interpreter, which is chosen when Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from kernel_process import ROOT, run_kernel_tests


def collected(environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "pytest", "tests/kernel_tests", "-q", "--collect-only"]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    ).stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_and_engine_under_the_interpreter() -> None:
    run_kernel_tests("1/3", KIF_BACKEND="interpret", TRITON_INTERPRET="1")


def test_nothing_is_collected_where_the_kernels_cannot_run() -> None:
    neither = {"KIF_BACKEND": "", "TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": ""}
    assert re.search(r"no tests (collected|ran)", collected(neither))
