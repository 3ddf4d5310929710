"""The namespace of the operations: `torch.ops.kif`, or one of its own where this package has another name.

A namespace can be registered once in a process. A copy of the package under another name, as the `kernels` library
imports it, therefore takes its name as namespace. `kernel-builder` replaces this file by one with the same two names.
"""

from __future__ import annotations

import torch

_NAMESPACE = "kif" if __package__ == "kif_kernels" else __package__.replace(".", "_")

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an operation, as torch.library wants it."""
    return f"{_NAMESPACE}::{name}"
