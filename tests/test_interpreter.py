"""A sixth of the kernels' and the engine's tests in Triton's interpreter, which is chosen when Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from kernel_process import ROOT, part_of, run_kernel_tests


def collected(environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "pytest", "tests/kernel_tests", "-q", "--collect-only"]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    ).stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_and_engine_under_the_interpreter() -> None:
    run_kernel_tests("2/6", 100, KIF_BACKEND="interpret", TRITON_INTERPRET="1")


def test_nothing_is_collected_where_the_kernels_cannot_run() -> None:
    neither = {"KIF_BACKEND": "", "TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": ""}
    assert re.search(r"no tests (collected|ran)", collected(neither))


def test_parts_are_the_whole_and_each_has_all_tests() -> None:
    many, one = [f"a.py::many[{i}-{exact}]" for i in range(12) for exact in (True, False)], "a.py::one"
    first, second = (part_of([*many, one], part) for part in ("1/2", "2/2"))
    assert first | second == {*many, one} and first & second == {one} and len(first) == len(second) == 13
    # no part is one value of a parameter
    assert all(len({name.endswith("True]") for name in part if name != one}) == 2 for part in (first, second))
    assert part_of([*many, one], "1/1") == {*many, one}
    with pytest.raises(ValueError):
        part_of([one], "half")
