"""Shared fixtures: tiny models, and the real benchmark data where it lies beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import build_tiny


@pytest.fixture(scope="session")
def benchmark_data() -> Path:
    """The folder of the 15 tasks; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("KIF_DATA") or Path(__file__).parents[2] / "shared" / "data" / "cl_benchmark")
    if not (folder / "manifest.json").is_file():
        pytest.skip("the benchmark data is not here; set KIF_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models: `t5`, `llama`, `bert`."""
    return {kind: build_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in ("t5", "llama", "bert")}
