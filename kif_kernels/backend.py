"""Which implementation of the operations runs on a device."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

BACKENDS = ("reference", "eager", "compile", "triton", "interpret")
"""reference: the definition. eager: flat PyTorch for the CPU. compile: the definition under torch.compile. triton: the
kernels, on CUDA and ROCm. interpret: the kernels in Triton's interpreter, on CPU tensors."""

_MODULES = {
    "reference": ".reference",
    "eager": ".eager",
    "compile": ".compiled",
    "triton": ".kernels",
    "interpret": ".kernels",
}


def backend_name(device_type: str) -> str:
    """The implementation that tensors on `device_type` ("cpu", "cuda", ...) get: eager on the CPU, triton on CUDA.

    The environment variable KIF_BACKEND overrides the choice.
    Raises: ValueError when KIF_BACKEND names none of `BACKENDS`, or one that cannot run on the device.
    """
    wanted = os.environ.get("KIF_BACKEND") or {"cpu": "eager", "cuda": "triton"}.get(device_type, "reference")
    if wanted not in BACKENDS:
        raise ValueError(f"KIF_BACKEND={wanted!r} on {device_type}: there are {', '.join(BACKENDS)}")
    only = {"eager": "cpu", "triton": "cuda", "interpret": "cpu"}.get(wanted, device_type)
    if only != device_type:
        raise ValueError(f"KIF_BACKEND={wanted!r} runs on {only} tensors only, got {device_type}")
    return wanted


def implementation(device_type: str) -> ModuleType:
    """The module with the functions of `backend_name(device_type)`.

    Raises: ValueError as `backend_name`; ImportError, with what to do, when triton is needed and missing.
    """
    name = backend_name(device_type)
    if name == "interpret":
        _turn_interpreter_on()
    try:
        return importlib.import_module(_MODULES[name], __package__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            "the kernels need triton (pip install triton); KIF_BACKEND=reference runs plain PyTorch instead"
        ) from error


def _turn_interpreter_on() -> None:
    """Triton decides between compiling and interpreting when a kernel is defined, by this variable."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] != "1":
        raise ValueError("KIF_BACKEND=interpret needs TRITON_INTERPRET=1")
