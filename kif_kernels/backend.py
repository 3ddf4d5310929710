"""Which implementation of the operations runs on a device."""

from __future__ import annotations

import os

BACKENDS = ("reference",)


def backend_name(device_type: str) -> str:
    """The implementation that tensors on `device_type` ("cpu", "cuda", ...) get.

    The environment variable KIF_BACKEND overrides the choice.
    Raises: ValueError when KIF_BACKEND names none of `BACKENDS`.
    """
    wanted = os.environ.get("KIF_BACKEND") or "reference"
    if wanted not in BACKENDS:
        raise ValueError(f"KIF_BACKEND={wanted!r} on {device_type}: this version has {', '.join(BACKENDS)}")
    return wanted
