"""Random arguments for an operation, and its outcome beside that of the definition."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kif_kernels import eager, reference

CHUNK = 64
SIZES = st.one_of(st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK]), st.integers(1, 5 * CHUNK))
SEEDS = st.integers(0, 2**31 - 1)
SKIPS = st.sampled_from([None, False, True])
DECAYS = st.sampled_from([0.0, 0.45, 0.55, 1.0])
NAN = float("nan")
EPS = torch.finfo(torch.float32).eps


class Numbers:
    """Normal numbers with zeros, ties, denormals and very large ones."""

    def __init__(self, seed: int, n: int) -> None:
        self.generator, self.n = torch.Generator().manual_seed(seed), n

    def __call__(self, dtype: torch.dtype = torch.float32, bad: bool = False) -> Tensor:
        x = torch.randn(self.n, generator=self.generator)
        kind = torch.randint(0, 12, (self.n,), generator=self.generator)
        odd = (0.0, 0.5, 1e-40, 1e30) + ((NAN, float("inf"), -float("inf")) if bad else ())
        for i, value in enumerate(odd):
            x[kind == i] = value
        return x.to(dtype)

    def scores(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self().abs().to(dtype)

    def poison(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """To be written before it is read."""
        return torch.full((self.n,), NAN, dtype=dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of x, as a view of that kind where x is a buffer."""
    if not x.is_floating_point() or x.dim() != 1 or x.numel() < 4:
        return x.clone()
    if layout == "strided":
        return torch.stack([x, x], dim=1)[:, 1]
    if layout == "flat" or len(x) % 2:
        return x.clone()
    return x.clone().view(2, -1) if layout == "matrix" else x.clone().view(2, -1).t()


def flattened(x: Tensor, layout: str) -> Tensor:
    """The opposite of `laid_out`."""
    return x.t().reshape(-1) if layout == "transposed" else x.reshape(-1)


def outcome(module: ModuleType, name: str, arguments: list[Any], layout: str) -> dict[str, Tensor]:
    """The tensors by name after a call with copies of the arguments; what the schema calls inputs must be unchanged."""
    copies: list[Any] = []
    for x in arguments:
        if isinstance(x, list):
            copies.append([laid_out(y, layout) if isinstance(y, Tensor) else y for y in x])
        else:
            copies.append(laid_out(x, layout) if isinstance(x, Tensor) else x)
    assert getattr(module, name)(*copies) is None
    schema = getattr(torch.ops.kif, name).default._schema
    after = {}
    for before, copy, declared in zip(arguments, copies, schema.arguments, strict=True):
        for i, (x, y) in enumerate(zip(before, copy, strict=True) if isinstance(before, list) else [(before, copy)]):
            if isinstance(x, Tensor):
                mutable = declared.alias_info is not None and declared.alias_info.is_write
                assert mutable or equal(laid_out(x, layout), y), f"{name} changed its input {declared.name}"
                after[f"{declared.name}[{i}]" if isinstance(before, list) else declared.name] = y
    return after


def equal(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.nan_to_num(nan=-77.0), y.nan_to_num(nan=-77.0))


def check(name: str, *arguments: Any, layout: str = "flat") -> dict[str, Tensor]:
    """Returns: the tensors after the call, equal for the definition and the CPU path."""
    expected = outcome(reference, name, list(arguments), layout)
    result = outcome(eager, name, list(arguments), layout)
    for key, x in expected.items():
        y = result[key]
        assert equal(x, y), f"{key} of {name} differs by up to {(x.double() - y.double()).abs().max()}"
    return result


def flag(value: bool | None) -> Tensor | None:
    return None if value is None else torch.tensor(value)


class Kinds(NamedTuple):
    """Dtypes of weights and gradients and of importances, and the layout: the fast path takes the default only."""

    value: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    layout: str = "flat"


every_kind = pytest.mark.parametrize(
    "kinds",
    [
        Kinds(),
        Kinds(layout="matrix"),
        Kinds(layout="strided"),
        Kinds(layout="transposed"),
        Kinds(value=torch.bfloat16),
        Kinds(value=torch.float16),
        Kinds(state=torch.bfloat16),
    ],
    ids=str,
)
