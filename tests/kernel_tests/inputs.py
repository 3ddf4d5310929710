"""Inputs that kernels get wrong, buffers that notice writes beyond their ends, and the measure of an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

SIZES = st.sampled_from([2, 15, 16, 31, 255, 1023, 1024, 1025, 2049, 3000, 5008, 9999, 20000])
"""Tiny, odd, multiples of 16 or not, around a block of 1024, several blocks. A size of 1 has tests of its own: on a
GPU it is another kernel to compile."""

SEEDS = st.integers(0, 2**20)

MARGIN = 64
SENTINEL = -7.0

HALF_ULP = 2.0**-24
"""Half a unit in the last place of float32, relative to a power of two."""

T = TypeVar("T", Tensor, None)


def examples(count: int) -> settings:
    """The same inputs in every run: whether a bound on errors holds must not depend on luck.

    A failure is reported as it is found: to make it smaller takes minutes in the interpreter.
    """
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, phases=phases)


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator, dtype=torch.float64)


def _zeroed(fraction: float) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, generator: _normal(n, generator) * (torch.rand(n, generator=generator) >= fraction)


def _student(n: int, generator: torch.Generator) -> Tensor:
    """Two degrees of freedom: no variance."""
    chi = (_normal(n, generator) ** 2 + _normal(n, generator) ** 2) / 2
    return _normal(n, generator) / (chi + 1e-12).sqrt()


def _with(values: Tensor, generator: torch.Generator, *others: float) -> Tensor:
    kind = torch.randint(0, 12, values.shape, generator=generator)
    for i, other in enumerate(others):
        values[kind == i] = other
    return values


def _mixed(n: int, generator: torch.Generator) -> Tensor:
    """Normal values with zeros, ties, denormals and large ones among them."""
    return _with(_normal(n, generator), generator, 0.0, 0.5, 1e-40, -1e-38, 1e4)


def _not_finite(n: int, generator: torch.Generator) -> Tensor:
    return _with(_mixed(n, generator), generator, float("nan"), float("inf"), -float("inf"), 3e38)


KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": _normal,
    "mixed": _mixed,
    "zeros": lambda n, generator: torch.zeros(n, dtype=torch.float64),
    "half zeros": _zeroed(0.5),
    "85% zeros": _zeroed(0.85),
    "all equal": lambda n, generator: torch.full((n,), -0.37, dtype=torch.float64),
    "ties": lambda n, generator: torch.randint(-3, 4, (n,), generator=generator).double() / 4,
    "denormal": lambda n, generator: _normal(n, generator) * 1e-40,
    "1% spread": lambda n, generator: 1.0 + 0.01 * torch.rand(n, generator=generator, dtype=torch.float64),
    "lognormal": lambda n, generator: _normal(n, generator) * (3.0 * _normal(n, generator)).exp(),
    "student": _student,
}
FINITE = st.sampled_from(list(KINDS))
ANY = st.sampled_from([*KINDS, "not finite", "not finite"])


def values(kind: str, n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values with signs, on the CPU, so that they are the same on every device."""
    make = _not_finite if kind == "not finite" else KINDS[kind]
    return make(n, torch.Generator().manual_seed(seed)).to(dtype)


class Buffers:
    """Copies of tensors on a device, each between margins that nobody may write to."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bases: list[Tensor] = []

    def copy(self, tensor: T) -> T:
        if tensor is None:
            return tensor
        base = torch.full((tensor.numel() + 2 * MARGIN,), SENTINEL, dtype=torch.float64).to(tensor.dtype)
        base[MARGIN:-MARGIN] = tensor.reshape(-1)
        base = base.to(self.device)
        self._bases.append(base)
        return base[MARGIN:-MARGIN]

    def poison(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """NaN: what is only written to must not be read."""
        return self.copy(torch.full((n,), float("nan"), dtype=dtype))

    def check(self) -> None:
        for base in self._bases:
            margins = torch.cat([base[:MARGIN], base[-MARGIN:]])
            assert bool((margins == SENTINEL).all()), "something was written beyond the end of a buffer"


def errors(actual: Tensor, exact: Tensor, scale: Tensor) -> Tensor:
    """In units of HALF_ULP of the sum of the absolute terms that each value was computed from."""
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    relative = torch.where(actual.double() == exact, 0.0, (actual.double() - exact).abs() / scale)
    return relative.nan_to_num(nan=float("inf"), posinf=float("inf")) / HALF_ULP


def assert_as_accurate(
    ours: Tensor,
    theirs: Tensor,
    exact: Tensor,
    scale: Tensor,
    what: str,
    *,
    their_exact: Tensor | None = None,
    slack: float = 1.0,
) -> None:
    """The largest error is at most that of plain PyTorch (`theirs`), and `slack` times half an ulp of float32.

    Values stored in 16 bits get ten times that, as float32 errors can take one to the other side of a tie. Of fewer
    than 1000 values the largest error is luck: some half ulps more. Where plain PyTorch is not finite, the same value
    is wanted. `their_exact` differs from `exact` where the value was computed from another result, which may differ
    in its last bits.
    """
    finite = theirs.isfinite()
    assert_same(ours[~finite], theirs[~finite], what)
    if not bool(finite.any()):
        return
    own = float(errors(ours[finite], exact[finite], scale[finite]).max())
    their_exact = exact if their_exact is None else their_exact
    other = float(errors(theirs[finite], their_exact[finite], scale[finite]).max())
    allowed = (slack if ours.dtype == torch.float32 else 10.0 * slack) + (0.0 if finite.sum() >= 1000 else 4.0)
    assert own <= other + allowed, f"{what}: {own:.2f} half ulps from float64, plain PyTorch {other:.2f}"


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal, and NaN where NaN."""
    assert actual.dtype == expected.dtype, what
    wrong = actual != expected
    if actual.is_floating_point():
        wrong &= ~(actual.isnan() & expected.isnan())
    assert not bool(wrong.any()), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, such as "
        f"{actual[wrong][:3].tolist()} instead of {expected[wrong][:3].tolist()}"
    )
