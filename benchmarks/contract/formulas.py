"""What a pass may read and write, by formula."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bytes:
    """Bytes per element that a pass loads and stores.

    `atomics`: operations in its loop, on a way that only few elements take.
    """

    load: int
    store: int
    atomics: int = 0


def importance_bytes(value: int = 4, state: int = 4, *, reset: bool = False, uncertainty: bool = False) -> Bytes:
    """w and g of `value` bytes are read, I (and U) of `state` bytes written, and read but for the first step."""
    kept = state * (1 + uncertainty)
    return Bytes(2 * value + (0 if reset else kept), kept)


def adamw_bytes(
    value: int = 4,
    grad: int = 4,
    state: int = 4,
    *,
    uncertainty: bool = False,
    reset: bool = False,
    snapshots: int = 0,
    shadow: bool = False,
    zero_grad: bool = False,
) -> Bytes:
    """w, g, m, v (and I, U) are read; w, m, v (and I, U), snapshots, a 2-byte shadow and zeros for g are written.

    I and U take `state` bytes each; 0 is AdamW alone.
    """
    kept = state * (1 + uncertainty)
    stored = value * (1 + snapshots) + 8 + kept + 2 * shadow + grad * zero_grad
    return Bytes(value + grad + 8 + (0 if reset else kept), stored)


def scores_bytes(state: int = 4, *, uncertainty: bool = False) -> Bytes:
    """The scores of one side are read; few are counted by an atomic operation each, in a loop for either side."""
    return Bytes(state * (1 + uncertainty), 0, atomics=2)


def fuse_bytes(state: int = 4, *, uncertainty: bool = False, write_start: bool = True, shadow: bool = False) -> Bytes:
    """theta, theta_start, theta_inner and two scores are read; theta (and theta_start, a 2-byte shadow) written."""
    return Bytes(12 + 2 * state * (1 + uncertainty), 4 + 4 * write_start + 2 * shadow)
