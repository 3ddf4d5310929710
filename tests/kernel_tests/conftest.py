"""Where the kernels run: interpreted or emulated if the process was started for that, else on a GPU; nowhere else.

Triton decides when it is imported, so `tests/test_interpreter.py` starts a process with KIF_BACKEND=interpret and
TRITON_INTERPRET=1. With KIF_PTX=80 or 90 what is compiled for that architecture runs in `tests/ptx`, with KIF_PTX_ORDER
a seed for the order of warps. KIF_CASES=1/3 takes a third of each test's cases (`part_of`).
"""

from __future__ import annotations

import os

import pytest
import torch
from kernel_process import part_of

INTERPRETED = os.environ.get("KIF_BACKEND") == "interpret" and os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = not INTERPRETED and bool(os.environ.get("KIF_PTX"))
ON_CPU = INTERPRETED or EMULATED
ON_CUDA = not ON_CPU and torch.cuda.is_available() and os.environ.get("KIF_BACKEND") in (None, "", "triton")
NO_GPU = "needs a GPU"

if INTERPRETED:
    from kernel_tests.interpreter import correct_interpreter

    correct_interpreter()
elif EMULATED:
    from ptx.launch import emulate

    import kif_kernels.kernels  # noqa: F401  compiled mode is settled

    order = os.environ.get("KIF_PTX_ORDER")
    emulate(int(os.environ["KIF_PTX"]), int(order) if order else None)
elif not ON_CUDA:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on a GPU only")
    config.addinivalue_line("markers", "emulated: of what compiled kernels do, runs with KIF_PTX only")
    # numpy's words about inputs that are meant to overflow
    for what in ("overflow", "invalid value", "divide by zero", "underflow"):
        config.addinivalue_line("filterwarnings", f"ignore:{what} encountered:RuntimeWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = part_of([item.nodeid for item in items], os.environ.get("KIF_CASES") or "1/1")
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in items if item.nodeid in chosen]
    for item in items:
        if not ON_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        if not EMULATED and item.get_closest_marker("emulated"):
            item.add_marker(pytest.mark.skip(reason="needs KIF_PTX"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that the kernels run on; CPU when they are interpreted."""
    return torch.device("cuda", torch.cuda.current_device()) if ON_CUDA else torch.device("cpu")


@pytest.fixture(autouse=True)
def operations_take_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the beginning: kernels of tests would be interpreted."""
    if EMULATED:
        monkeypatch.setenv("KIF_BACKEND", "interpret")
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a program costs as much as a block: two show what six do. Some tests take other numbers."""
    if ON_CPU:
        from kif_kernels.kernels import launch

        monkeypatch.setattr(launch, "PROGRAMS_PER_SM", 2)
