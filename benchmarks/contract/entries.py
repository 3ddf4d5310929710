"""The launches that calls of the operations and rounds of the engine make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.contract.compile import Launch, recorded
from benchmarks.contract.formulas import Bytes
from benchmarks.contract.variants import VARIANTS, N, Variant
from kif.arena import ParameterArena
from kif.config import PRESETS, KIFConfig
from kif.engine import RecurrentKIF


@dataclass
class Entry:
    """A launch with what is asked of it; `bytes` is None for a kernel that makes no pass over the elements."""

    name: str
    launch: Launch
    bytes: Bytes | None

    @property
    def elements(self) -> int:
        """Of a block, for a kernel that works through all elements in blocks; else 0."""
        return self.launch.kwargs["BLOCK"] if self.bytes else 0


def entries(variants: Sequence[Variant] = VARIANTS) -> list[Entry]:
    """Every launch of these variants."""
    found = []
    for variant in variants:
        with recorded() as launches:
            variant.call()
        made = [launch for launch in launches if launch.kwargs.get("LEVEL", -1) in (-1, *variant.levels)]
        for launch in made:
            name = variant.name if len(made) == 1 else f"{variant.name}: {launch.name}"
            formula = variant.bytes.get(launch.kernel.fn.__name__)
            if variant.numel is not None and "n" in launch.kernel.arg_names:
                launch = launch.replaced("n", variant.numel)
            found.append(Entry(name, launch, formula))
    return found


def engine_launches() -> list[Launch]:
    """Of a plain step and two short rounds, for each preset and for thresholds per tensor."""
    short = {"inner_steps": 3, "outer_steps": 2}
    configs = [KIFConfig.preset(name, **short) for name in PRESETS] + [KIFConfig(threshold_scope="tensor", **short)]
    with recorded() as launches:
        for config in configs:
            parameters = [(name, nn.Parameter(torch.zeros(N // 2))) for name in "ab"]
            engine = RecurrentKIF(ParameterArena(parameters), config)
            engine.plain_step(1e-3)
            for _ in range(2):
                for _ in range(config.inner_steps):
                    engine.inner_step(1e-3)
                for _ in range(config.outer_steps):
                    engine.outer_step(1e-3)
                engine.fuse()
    return launches
