"""The memory and time model: its counts are those of the engine and of real models, and the page shows what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, scaling, scaling_large
from benchmarks import scaling_model as model
from benchmarks.contract.variants import VARIANTS
from benchmarks.operations import OPERATIONS
from benchmarks.scaling_model import Decoder, Rates
from benchmarks.workload import Problem
from kif.arena import ParameterArena
from kif.config import KIFConfig
from kif.engine import RecurrentKIF
from kif.sharding import shard_base
from kif_kernels import StreamingThreshold
from kif_kernels.backend import implementation

ROOT = Path(__file__).parents[1]
SHAPES = ((3, 7), (1,), (33,), (8, 4), (130,))
SMALL = Decoder(256, 32, 80, 2, 2)
STEP = (scaling.ROWS, scaling.LENGTH, scaling.TARGETS)
TOKENS = scaling.ROWS * scaling.LENGTH
FORMS = {**scaling.FORMS, "lora, checkpointed": (8, True)}
CONFIGS = {
    "own": KIFConfig(inner_steps=2),
    "shared": KIFConfig(inner_steps=2, outer_optimizer="shared"),
    "uncertainty": KIFConfig(inner_steps=2, score="ema_uncertainty"),
    "released": KIFConfig.preset("released-code", inner_steps=2),
}


def new_engine(config: KIFConfig, shapes: Any = SHAPES, shards: Any = None) -> RecurrentKIF:
    generator = torch.Generator().manual_seed(1)
    named = [(f"t{i}", nn.Parameter(torch.randn(shape, generator=generator))) for i, shape in enumerate(shapes)]
    return RecurrentKIF(ParameterArena(named), config, shards=shards)


def train_round(engine: RecurrentKIF) -> None:
    """A round with gradients so large that they are clipped."""
    for step in range(engine.config.inner_steps + engine.config.outer_steps):
        with torch.utils._python_dispatch._disable_current_modes():
            engine.arena.grad.normal_()
        (engine.inner_step if step < engine.config.inner_steps else engine.outer_step)(1e-3)
    engine.fuse()


class Operations(TorchDispatchMode):
    """Counts the bytes that operations read and write, each value once an operation, and launches, those of the
    package's operations by `kernels` where it is given."""

    skipped = ("mm", "_scaled_dot_product_flash_attention_for_cpu")
    views = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view")

    def __init__(self, kernels: dict[str, int] | None = None) -> None:
        super().__init__()
        self.kernels, self.bytes, self.launches = kernels, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "kif" and self.kernels is None:
            with self:
                return getattr(implementation("cpu"), name)(*args)
        result = func(*args, **(kwargs or {}))
        if func.is_view or name in self.views or func.namespace == "c10d":
            return result
        self.launches += (self.kernels or {}).get(name, 1)
        if not name.startswith(self.skipped):
            self.bytes += self.moved(name, args, kwargs or {}, result)
        return result

    def moved(self, name: str, args: Any, kwargs: Any, result: Any) -> int:
        read = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        if name in ("zero_", "copy_", "fill_"):
            read = read[1:]
        inputs = {(t.data_ptr(), t.numel()): min(t.nbytes, t.untyped_storage().nbytes()) for t in read}
        return sum(inputs.values()) + sum(t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'port'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CONFIGS)
def test_arena_bytes_are_those_of_the_buffers(name: str) -> None:
    engine = new_engine(CONFIGS[name])
    train_round(engine)
    arena = engine.arena
    held = sum(buffer.nbytes for buffer in (arena.data, arena.grad, *arena.buffers.values()))
    assert model.arena_bytes([s.numel for s in arena.segments], CONFIGS[name]) == held
    expected = {"own": 10, "shared": 8, "uncertainty": 12, "released": 10}[name]
    assert model.buffers(CONFIGS[name]) == 2 + len(arena.buffers) == expected


@pytest.mark.parametrize("groups", [1, 3])
def test_workspace_bytes_are_those_of_the_selection(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("KIF_BACKEND", "interpret")
    segments = None if groups == 1 else new_engine(KIFConfig(threshold_scope="tensor"), SHAPES[:groups])._segments
    selection = StreamingThreshold(0.2, 22, sides=2, segments=segments)
    held = [value for value in vars(selection).values() if isinstance(value, Tensor)]
    assert len(held) == 5 and model.workspace_bytes(groups) == sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize("size", scaling_large.LARGE)
def test_elements_are_those_of_the_named_models(size: str) -> None:
    import transformers

    shape = scaling_large.LARGE[size]
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads or None,
    )  # fmt: skip
    with torch.device("meta"):
        real = transformers.LlamaForCausalLM(config)
    sizes = [parameter.numel() for parameter in real.parameters()]
    assert sorted(shape.trained()) == sorted(sizes) and shape.parameters == sum(sizes)


@pytest.mark.parametrize("form", scaling.FORMS)
def test_trained_tensors_are_those_of_the_model(form: str) -> None:
    lm = scaling.build(SMALL, form)
    sizes = [parameter.numel() for parameter in lm.model.parameters() if parameter.requires_grad]
    assert sorted(SMALL.trained(scaling.FORMS[form][0])) == sorted(sizes)


def test_base_bytes_are_those_that_were_measured() -> None:
    shape = Decoder(49152, 576, 1536, 30, 9, 3, tied=True)
    measured = json.loads((ROOT / "benchmarks" / "results" / "memory-smollm2.json").read_text())["results"]
    assert {row["form"] for row in measured} == {"fp32", "bf16", "int8", "nf4"}
    for row in measured:
        assert model.base_bytes(shape, row["form"]) == pytest.approx(row["base"], rel=1e-3)


def test_a_split_base() -> None:
    # rows of 32, 32, 32, 32, 80, 80, 32 and norms, halved; embedding, output layer and last norm whole
    layer = 4 * 32 * 32 + 3 * 32 * 80 + 64
    assert model.split_base_bytes(SMALL, 2) == 2 * (2 * 256 * 32 + 32 + 2 * layer // 2 + layer)
    # 3 processes: 11 of 32 rows, 27 of 80
    share = 32 * (4 * 11 + 2 * 27) + 80 * 11 + 2 * 11
    assert model.split_base_bytes(SMALL, 3, 4) == 4 * (2 * 256 * 32 + 32 + 2 * share + layer)


def test_a_base_split_over_one_process(group: Any) -> None:
    lm = scaling.build(SMALL, "lora")
    shard_base(lm.model)
    held = [p.to_local() if hasattr(p, "to_local") else p for p in lm.model.parameters() if not p.requires_grad]
    assert model.split_base_bytes(SMALL, 1, 4) == sum(tensor.nbytes for tensor in held)
    assert model.split_base_bytes(SMALL, 1, 4) == model.base_bytes(SMALL, "fp32")


def test_bytes_of_a_round_are_those_of_the_contract() -> None:
    kernels = {variant.name: next(iter(variant.bytes.values())) for variant in VARIANTS}
    steps = ["first inner step", "inner step", "last inner step", "last outer step"]
    made = ["gradient"] * 4 + [f"engine: {name}" for name in steps] + ["thresholds"] * 4 + ["engine: fuse"]
    passes = [kernels[name] for name in made]
    config = KIFConfig(inner_steps=3)
    assert sum(model.round_bytes(config).values()) == sum(one.load + one.store for one in passes)
    released = ["first step", "step", "last inner step", "step"]
    made = ["gradient"] * 4 + [f"released code: {name}" for name in released] + ["released code: fuse"]
    config = KIFConfig(inner_steps=3, score="ema_uncertainty", threshold="approximate")
    assert sum(model.round_bytes(config).values()) == sum(kernels[name].load + kernels[name].store for name in made)


@pytest.mark.parametrize("m", [1, 4])
def test_bytes_of_a_round_are_those_of_the_page_and_the_benchmarks(m: int) -> None:
    total = sum(model.round_bytes(KIFConfig(outer_steps=m)).values())
    # clipping 4, AdamW 28, zeroing the gradient 4; the rest is what docs/performance.md says a round adds
    assert total == 36 * (8 + m) + 8 * (8 + m) + 44
    problem = Problem(((3, 5),))
    assert total * problem.numel == OPERATIONS[f"round-m{m}-adamw"].kif_bytes(problem, passes=4)


@pytest.mark.parametrize(
    "switch",
    [{"threshold": "interpolated"}, {"threshold_scope": "tensor"}, {"fusion": "adaptive"}, {"history": "frozen"}],
)
def test_what_is_not_modelled_is_refused(switch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"kif.{next(iter(switch))}={next(iter(switch.values()))} are not modelled"):
        model.round_bytes(KIFConfig(**switch))
    with pytest.raises(ValueError, match="only score=ema"):
        model.cached_bytes(KIFConfig(score="ema_uncertainty"))


@pytest.mark.parametrize("m", [1, 4])
def test_launches_are_those_of_the_record(m: int) -> None:
    record = json.loads((ROOT / "benchmarks" / "contract" / "counts.json").read_text())["engine"]
    assert model.launches(KIFConfig(outer_steps=m)) == record[f"paper, M={m}"]["launches"]


@pytest.mark.parametrize("m", [1, 3])
def test_launches_and_sums_of_shards(m: int, group: Any) -> None:
    config = KIFConfig(inner_steps=2, outer_steps=m)
    summed = []
    reduce = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        summed.append(tensor.nbytes)
        return reduce(tensor, *args, **kwargs)

    for shards in (None, group):
        engine = new_engine(config, shards=shards)
        train_round(engine)
        kernels = {"gradient_state_": 2, "thresholds_": 5}
        with mock.patch.object(dist, "all_reduce", all_reduce), Operations(kernels) as counted:
            train_round(engine)
        assert counted.launches == model.launches(config, sharded=shards is not None)
        assert sum(summed) == (model.summed_bytes(engine.arena.numel, config, True) if shards else 0)
    assert model.summed_bytes(100, config) == 400 * (2 + m)


def test_a_shard_holds_its_part(group: Any) -> None:
    config, numel = KIFConfig(inner_steps=2), 32 * 20_000
    engine = new_engine(config, [(numel,)], group)
    train_round(engine)
    engine.arena.grad.normal_()
    extra = scaling.allocated_peak(lambda: engine.inner_step(1e-3))
    # the CPU's operations work in chunks, and allocate less than one more buffer
    assert extra < 4 * numel
    assert model.shard_bytes(numel, 1, config) == model.arena_bytes([numel], config)
    assert model.shard_bytes(8 * numel, 8, config) == model.shard_bytes(numel, 1, config)
    assert model.shard_bytes(numel + 1, 2, config) == 40 * (numel // 2 + 1)


def test_bytes_in_the_cache_are_those_of_the_operations() -> None:
    for q, m in ((2, 1), (4, 2)):
        config, moved = KIFConfig(inner_steps=q, outer_steps=m), []
        for numel in (3200, 6400):
            engine = new_engine(config, [(numel,)])
            train_round(engine)
            with Operations() as counted:
                train_round(engine)
            moved.append(counted.bytes)
        # what is left does not depend on the number of elements
        assert moved[1] - moved[0] == 3200 * model.cached_bytes(config)


def form_of(name: str, shape: Decoder) -> Any:
    with mock.patch.dict(scaling.FORMS, FORMS):
        return scaling.build(shape, name)


@pytest.mark.parametrize("form", FORMS)
def test_activations_are_those_that_torch_allocates(form: str) -> None:
    # torch 2.8 does not fuse grouped-query attention on the CPU
    grouped = 2 if torch.__version__ >= "2.11" else 4
    for shape in (Decoder(256, 64, 172, 3, 4, grouped), Decoder(4096, 64, 128, 2, 2)):
        lm = form_of(form, shape)
        RecurrentKIF.of(lm.model)
        scaling.backward(lm)
        found = scaling.allocated_peak(lambda lm=lm: scaling.backward(lm))  # type: ignore[misc]
        assert model.activation_bytes(shape, *STEP, *FORMS[form]) == pytest.approx(found, rel=0.04)


@pytest.mark.parametrize("form", FORMS)
def test_passes_do_what_is_counted(form: str) -> None:
    rank, checkpointed = FORMS[form]
    moved: list[int] = []
    flops: list[int] = []
    shapes = [Decoder(256, 64, 172, layers, 4) for layers in (2, 3)]
    for shape in shapes:
        lm = form_of(form, shape)
        RecurrentKIF.of(lm.model)
        scaling.backward(lm)
        with Operations() as counted:
            scaling.backward(lm)
        moved.append(counted.bytes)
        with FlopCounterMode(display=False) as counter:
            scaling.backward(lm)
        products = counter.get_flop_counts()["Global"]
        flops.append(sum(n for op, n in products.items() if "attention" not in str(op)))

    def difference(of: Callable[[Decoder], int]) -> int:
        return of(shapes[1]) - of(shapes[0])

    traffic = difference(lambda shape: model.step_traffic(shape, TOKENS, rank, checkpointed))
    assert traffic == pytest.approx(moved[1] - moved[0], rel=0.02)

    def products_of(shape: Decoder) -> int:
        attention = (3 + checkpointed) * 4 * shape.layers * shape.width * scaling.LENGTH * TOKENS
        return model.step_flops(shape, *STEP, rank, checkpointed) - attention

    assert difference(products_of) == flops[1] - flops[0]
    # the first layer's input needs no gradient where what is in front of it is frozen; PEFT asks for one to checkpoint
    spared = 2 * TOKENS * 3 * 64 * 64 + 2 * TOKENS * 2 * 8 * 64 if rank and not checkpointed else 0
    # transformers up to 5.17 compute the angles of rotary embeddings as a product
    angles = 2 * scaling.LENGTH * 8
    assert products_of(shapes[0]) - flops[0] in (spared, spared - angles)


def test_times_add_up() -> None:
    config, slow = KIFConfig(inner_steps=3), Rates(1e9, 1e9, 1e-5, 1e-6, 4e9, 5e-9, 1e-3, 2e-3)
    # launches, checks, bytes in memory without thresholds, partition of both sides, other bytes of the operations
    memory, all_bytes = 4 * 44 - 4 + 8 + 24, 4 * 148 + 136
    parts = [18 * 1e-5, 5 * 7 * 1e-6, 1000 * memory / 1e9, 2 * 1000 * 5e-9, 1000 * (all_bytes - memory) / 4e9]
    assert model.bookkeeping_seconds(1000, 7, config, slow) == pytest.approx(sum(parts))
    fast = Rates(1e12, 1e12, 5e-6)
    sharded = 4 * 44 - 4 + 8 + 32 + 24
    expected = (9 * 4 + 179) * 5e-6 + 1000 * sharded / 1e12
    assert model.bookkeeping_seconds(1000, 7, config, fast, sharded=True) == pytest.approx(expected)
    passes = model.step_flops(SMALL, *STEP) / 1e9 + model.step_traffic(SMALL, TOKENS) / 1e9 + 1e-3 + 2 * 2e-3
    assert model.compute_seconds(SMALL, *STEP, slow) == pytest.approx(passes)
    assert model.all_reduce_seconds(8000, 4, 1e6) == pytest.approx(0.012) and model.all_reduce_seconds(8, 1, 1.0) == 0


def test_the_script_measures_what_it_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**20)
    target = tmp_path / "scaling.json"
    assert scaling.main(["--sizes", "tiny", "--forms", "lora", "--rounds", "1", "--json", str(target)]) == 0
    content = json.loads(target.read_text())
    (case,) = content["cases"]
    assert (case["elements"], case["tensors"]) == (2 * 4 * 8 * 16, 8)
    assert set(case["measured"]) == set(case["predicted"]) == set(scaling.UNITS)
    assert case["measured"]["passes"] > 0 and case["measured"]["bookkeeping"] > 0 and case["error"]["arena"] == 0.0
    # rotary frequencies are no weights
    assert 0 <= case["measured"]["base"] - case["predicted"]["base"] <= 64
    assert abs(case["error"]["activations"]) < 0.1
    assert set(content["rates"]) == set(scaling.FORMS) and content["rates"]["lora"]["flops"] > 1e8
    assert scaling.table(content["cases"]) in capsys.readouterr().out


def test_the_page_shows_the_tables() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in scaling_large.TABLES:
        assert table() in page, table.__name__
    result = ROOT / "benchmarks" / "results" / "scaling.json"
    if not result.is_file():
        pytest.skip("no recorded result")
    content = json.loads(result.read_text())
    assert {case["size"] for case in content["cases"]} == {"0.3M", "3M", "30M"}
    assert scaling.table(content["cases"]) in page
