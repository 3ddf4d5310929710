"""Launches recorded instead of run, and compiled for GPUs that are not there.

What is compiled is what a launch would compile: Triton itself derives types, alignment and constants from the
arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90)
"""A100; H100 and H200."""


@dataclass
class Launch:
    """One kernel launch: the jit function and its arguments, without the grid."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the jit function, with the level where it has one."""
        level = self.kwargs.get("LEVEL")
        return self.kernel.fn.__name__ if level is None else f"{self.kernel.fn.__name__} level {level}"

    def replaced(self, argument: str, value: Any) -> Launch:
        """The launch with another value of one positional argument. Raises: ValueError when it has none."""
        place = self.kernel.arg_names.index(argument)
        return Launch(self.kernel, (*self.args[:place], value, *self.args[place + 1 :]), self.kwargs)


class OfflineDriver:
    """Stands in for a GPU of the given architecture; its number serves as the device's."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Nothing that the body launches runs; the list receives it. The operations take CPU tensors in the body."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, args, kwargs))

    # the kernels are imported, compiled mode is settled: this makes the operations accept CPU tensors
    import kif_kernels.kernels  # noqa: F401

    environment = {"KIF_BACKEND": "interpret", "TRITON_INTERPRET": "1"}
    with mock.patch.dict(os.environ, environment), mock.patch.object(JITFunction, "run", record):
        yield launches


def compiled(launch: Launch, architecture: int) -> Any:
    """The CompiledKernel of a launch; Triton's caches are used."""
    driver.set_active(OfflineDriver(architecture))
    return launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.kwargs)
