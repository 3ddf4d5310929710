"""A sixth of the kernels' and the engine's tests on what these compile to: PTX for an H100 or H200 (`tests/ptx`)."""

from __future__ import annotations

import importlib.util

import pytest
from kernel_process import run_kernel_tests


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_and_engine_as_compiled_for_a_gpu() -> None:
    run_kernel_tests("1/6", 100, KIF_PTX="90", KIF_PTX_ORDER="", KIF_BACKEND="", TRITON_INTERPRET="")
