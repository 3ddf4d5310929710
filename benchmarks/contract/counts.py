"""Launches and host syncs of a round of bookkeeping, counted on a CPU.

A kernel is one launch. A PyTorch operation that is no view is one launch; on a GPU some are more, so that the
numbers of plain PyTorch are lower bounds. An operation that hands a value or a size to the host is a sync there, and
so is data that comes from the host. As a program (with TRITON_INTERPRET=1), prints all counts as JSON: the engine on
the kernels and, with --comparison, other ways to do a round.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kif.arena import ParameterArena
from kif.config import KIFConfig
from kif.engine import RecurrentKIF
from kif_kernels.backend import implementation

INNER_STEPS = 8
OUTER_STEPS = (1, 4)
SHAPES = ((2, 16), (16, 2)) * 144
"""As many tensors as LoRA on the queries and values of T5-large; their sizes do not matter here."""

CONTENDERS = ("per-tensor", "foreach", "flat", "released")
"""Ways to do a round in plain PyTorch, of `benchmarks.baselines`."""

METHODS = {getattr(Tensor, name): name for name in ("tolist", "numpy", "__array__", "cpu")}
"""Ways to read a tensor that are no operation."""

SYNCS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose",
    "nonzero", "nonzero_static", "argwhere", "masked_select", "repeat_interleave", "bincount",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
    "lift_fresh",
}  # fmt: skip
"""Operations whose value or size the host has to know; lift_fresh is what torch.tensor does with data of the host."""

NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "detach", "alias",
}  # fmt: skip


@dataclass
class Counts:
    """What ran, by name."""

    kernels: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    assigning: bool = False

    def summary(self) -> dict[str, Any]:
        """Totals, and the numbers they are made of."""
        launches = self.kernels.total() + self.operations.total()
        parts = {"kernels": self.kernels, "operations": self.operations, "syncs": self.syncs}
        return {"launches": launches, "host syncs": self.syncs.total()} | {
            name: dict(sorted(part.items())) for name, part in parts.items()
        }


class _Operations(TorchDispatchMode):
    """Sees every operation; looks into those of `kif_kernels`."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "kif":
            with self:
                return getattr(implementation(args[0].device.type), name)(*args)
        if name == "lift_fresh" and self.counts.assigning:
            return func(*args)  # on a GPU the number is an argument of the kernel that fills with it
        if name in SYNCS or _selects_by_mask(name, args):
            self.counts.syncs[name] += 1
        elif not func.is_view and name not in NO_LAUNCH:
            self.counts.operations[name] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Sees the methods that read a tensor without an operation, and numbers assigned to parts of one."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            self.counts.syncs[METHODS[func]] += 1
        self.counts.assigning = func is Tensor.__setitem__ and not isinstance(args[2], Tensor)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counts.assigning = False


@contextmanager
def counting(counts: Counts) -> Iterator[None]:
    """Adds what the body runs. With KIF_BACKEND=interpret, kernels are counted and not run."""
    if os.environ.get("KIF_BACKEND") != "interpret":
        with _Methods(counts), _Operations(counts):
            yield
        return
    from triton.runtime.interpreter import GridExecutor

    from kif_kernels.kernels.launch import count_launches

    # counted, not run: what a kernel computes cannot matter to the host, or there would be a sync to see
    idle = mock.patch.object(GridExecutor, "__call__", lambda *args, **kwargs: None)
    with idle, count_launches() as kernels, _Methods(counts), _Operations(counts):
        yield
    counts.kernels.update(kernels)


def round_of(engine: RecurrentKIF, rounds: int = 2) -> Counts:
    """The last of some rounds, without the gradients, which are random."""
    counts = Counts()
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        counts = Counts()
        steps: list[Callable[[float], None]] = [engine.inner_step] * engine.config.inner_steps
        steps += [engine.outer_step] * engine.config.outer_steps
        for step in steps:
            engine.arena.grad.normal_(generator=generator)
            with counting(counts):
                step(1e-3)
        with counting(counts):
            engine.fuse()
    return counts


def new_engine(config: KIFConfig, kind: type[RecurrentKIF] = RecurrentKIF) -> RecurrentKIF:
    """An engine over `SHAPES` with random weights."""
    generator = torch.Generator().manual_seed(1)
    named = [(f"t{i}", nn.Parameter(torch.randn(shape, generator=generator))) for i, shape in enumerate(SHAPES)]
    return kind(ParameterArena(named), config)


def engine_rounds() -> dict[str, Any]:
    """Counts by configuration, on the backend of this process."""
    configs = {f"paper, M={m}": KIFConfig(inner_steps=INNER_STEPS, outer_steps=m) for m in OUTER_STEPS}
    configs["per-tensor thresholds, M=1"] = KIFConfig(inner_steps=INNER_STEPS, threshold_scope="tensor")
    configs["released code, M=4"] = KIFConfig.preset("released-code", inner_steps=INNER_STEPS)
    return {name: round_of(new_engine(config)).summary() for name, config in configs.items()}


def contender_round(name: str, outer_steps: int) -> Counts:
    """One round with AdamW of a contender of the microbenchmarks, without the phases that are not timed."""
    from benchmarks import baselines
    from benchmarks.workload import MOMENTS, ROUND_BUFFERS, Problem

    uncertainty = ("uncertainty_in", "uncertainty_out")
    contender = baselines.CONTENDERS[name](Problem(SHAPES), (*ROUND_BUFFERS, *MOMENTS, *uncertainty))
    counts = Counts()
    for phase in contender.round(INNER_STEPS, outer_steps, adamw=True):
        if not phase.timed:
            phase.run()
            continue
        with counting(counts):
            phase.run()
    return counts


def _selects_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Indexing by booleans: the size of the result is known on the device only."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparison", action="store_true", help="count other ways to do a round, too")
    arguments = parser.parse_args()
    os.environ["KIF_BACKEND"] = "interpret"
    result: dict[str, Any] = {"torch": torch.__version__.split("+")[0], "engine": engine_rounds()}
    if arguments.comparison:
        os.environ["KIF_BACKEND"] = "reference"
        rows = {}
        for m in OUTER_STEPS:
            rows[f"engine on the definitions, M={m}"] = round_of(new_engine(KIFConfig(outer_steps=m)))
            for name in CONTENDERS:
                rows[f"{name}, M={m}"] = contender_round(name, m)
        result["comparison"] = {name: counts.summary() for name, counts in rows.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
