"""Parameters spread over processes: thresholds exact over all shards, and an engine that trains as on one arena."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from kif.arena import ParameterArena
from kif.config import KIFConfig
from kif.engine import RecurrentKIF
from kif.optimizer import OptimizerConfig
from kif_kernels import mask_size, sharded_threshold

RANKS = 3
SHAPES = {"a": (16, 9), "b": (3,), "c": (7, 33), "d": (1, 1)}
SHARDS = (("a",), ("b", "c"), ("d",))
CONFIGS: dict[str, KIFConfig] = {
    "paper": KIFConfig(inner_steps=3, outer_steps=2),
    "uncertainty": KIFConfig(inner_steps=3, outer_steps=2, score="ema_uncertainty", outer_optimizer="shared"),
    "global-merge": KIFConfig(inner_steps=2, fusion="global-merge"),
    "adaptive": KIFConfig(inner_steps=2, fusion="adaptive"),
    "approximate": KIFConfig(inner_steps=2, density=0.5, threshold="approximate"),
}
DENSITIES = (0.0, 0.01, 0.2, 0.7, 1.0)


def scores(kind: str, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    x = (torch.randn(n, generator=generator) * torch.randn(n, generator=generator)).abs()
    if kind == "mostly zero":
        x *= torch.rand(n, generator=generator) < 0.1
    elif kind == "denormal":
        x *= 1e-42
    elif kind == "ties":
        x = (4 * x).round()
    elif kind == "equal":
        x.fill_(0.3)
    elif kind == "infinite":
        x[:: n // 3 + 1] = float("inf")
    return x


KINDS = ("normal", "mostly zero", "denormal", "ties", "equal", "infinite")


@given(st.sampled_from(KINDS), st.integers(1, 5000), st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_one_shard_is_the_kth_largest(kind: str, n: int, density: float, dtype: torch.dtype) -> None:
    x = scores(kind, n).to(dtype)
    expected = x.float().sort(descending=True).values[mask_size(density, n) - 1]
    padded = torch.cat([x, torch.zeros(13, dtype=dtype)])
    for found in (sharded_threshold(x, density), sharded_threshold(padded, density, numel=n, total=n)):
        assert found.dtype == torch.float32 and found.shape == () and found == expected


def test_uncertainty_is_a_factor() -> None:
    x, u = scores("normal", 500), scores("ties", 500)
    assert sharded_threshold(x, 0.2, uncertainty=u) == (x * u).sort(descending=True).values[99]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": torch.zeros(0)}, "cannot rank 0"),
        ({"density": 1.5}, "density must lie in"),
        ({"numel": 9}, "cannot rank 9"),
        ({"uncertainty": torch.ones(3)}, "uncertainty has shape"),
        ({"importance": torch.ones(8, dtype=torch.float16)}, "importance must be float32 or bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharded_threshold(**{"importance": torch.ones(8), "density": 0.2, **options})


def train(names: tuple[str, ...], config: KIFConfig, shards: Any) -> dict[str, Tensor]:
    """Seven rounds on some of the tensors, with gradients that are large, of which the third one is not finite."""
    module = nn.ParameterDict(
        {name: torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(ord(name))) for name in names}
    )
    engine = RecurrentKIF(ParameterArena.of(module), config, OptimizerConfig(max_grad_norm=0.5), shards)
    for step in range(7 * (config.inner_steps + config.outer_steps)):
        for name in names:
            generator = torch.Generator().manual_seed(1000 * step + ord(name))
            module[name].grad.copy_(torch.randn(SHAPES[name], generator=generator))
            if step == 2 and name == "d":
                module[name].grad.fill_(float("nan"))
        place = step % (config.inner_steps + config.outer_steps)
        (engine.inner_step if place < config.inner_steps else engine.outer_step)(0.1)
        if place == config.inner_steps + config.outer_steps - 1:
            engine.fuse()
    assert engine.skipped == 1
    return {name: module[name].detach().clone() for name in names}


def work(rank: int, port: Path, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=RANKS)
    for name, config in CONFIGS.items():
        save_file(train(SHARDS[rank], config, dist.group.WORLD), output / f"{name}-{rank}.safetensors")
    found = {}
    for kind in KINDS:
        # the last shard has one element
        part = scores(kind, 700).split((400, 299, 1))[rank]
        found[kind] = torch.stack([sharded_threshold(part, density, dist.group.WORLD) for density in DENSITIES])
    save_file(found, output / f"thresholds-{rank}.safetensors")
    with pytest.raises(ValueError, match="threshold_scope=tensor does not work with shards"):
        train(SHARDS[rank], KIFConfig(threshold_scope="tensor"), dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sharded")
    multiprocessing.spawn(work, (output / "port", output), nprocs=RANKS)
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_the_threshold_is_that_of_all_shards(ended: Path, kind: str) -> None:
    x = scores(kind, 700)
    expected = x.sort(descending=True).values[[mask_size(density, 700) - 1 for density in DENSITIES]]
    for rank in range(RANKS):
        assert torch.equal(load_file(ended / f"thresholds-{rank}.safetensors")[kind], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_train_as_one_arena(ended: Path, name: str) -> None:
    whole = train(tuple(SHAPES), CONFIGS[name], None)
    parts: dict[str, Tensor] = {}
    for rank in range(RANKS):
        parts |= load_file(ended / f"{name}-{rank}.safetensors")
    assert parts.keys() == whole.keys()
    for tensor, value in whole.items():
        # sums over shards round otherwise than one sum
        torch.testing.assert_close(parts[tensor], value, rtol=1e-4, atol=1e-5)
