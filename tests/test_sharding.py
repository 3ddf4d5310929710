"""A base model split over two processes trains and answers bit for bit as a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_tiny, topic_task
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import kif.generative
import kif.run
from kif.arena import ArenaError
from kif.callback import KIFCallback
from kif.config import KIFConfig, RunConfig
from kif.engine import RecurrentKIF
from kif.families import LanguageModel
from kif.methods import METHODS
from kif.models import load_language_model
from kif.sharding import shard_base

RANKS = 2
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("t5", "recurrent-kif", {"eval_mode": "rank", "gradient_checkpointing": True}),
    "llama": ("llama", "recurrent-kif", {"eval_mode": "generate"}),
    "llama-rank": ("llama", "sapt", {"eval_mode": "rank", "precision": "bf16", "adapter_precision": "bf16"}),
    "bert": ("bert", "recurrent-kif", {}),
    "l2p": ("t5", "l2p", {}),
}
"""Kind of model, method and settings by name."""
CASES = (("llama", "fp32"), ("t5", "fp32"), ("t5", "bf16"), ("bert", "fp32"))


def load(folder: Path, precision: Any) -> LanguageModel:
    config = RunConfig(model=str(folder), device="cpu", precision=precision)
    lm = load_language_model(config, {"topics": topic_task().labels})
    # as transformers keeps it in fp16
    for name, parameter in lm.model.named_parameters():
        if name.endswith("wo.weight"):
            parameter.data = parameter.data.float()
    return lm


def local_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this process holds while no layer is at work."""
    tensors: list[torch.Tensor] = []
    for parameter in model.parameters():
        tensors.append(parameter.to_local() if isinstance(parameter, DTensor) else parameter)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def train(rank: int, lm: LanguageModel, sharded: bool) -> dict[str, Any]:
    """Two rounds, then answers; both kinds of models draw the same dropout."""
    engine = RecurrentKIF.of(lm.model, KIFConfig(inner_steps=2))
    whole = local_bytes(lm.model)
    if sharded:
        shard_base(lm.model)
    torch.manual_seed(rank)
    lm.model.train()
    rows = lm.encode(topic_task(), topic_task().train)
    for _ in range(2):
        for step in range(3):
            loss, count = lm.loss(lm.collate(rows[4 * (step % 2) + 2 * rank :][:2]))
            (loss / count).backward()
            dist.all_reduce(engine.arena.grad)
            (engine.inner_step if step < 2 else engine.outer_step)(1e-2)
        engine.fuse()
    lm.model.eval()
    answers = [lm.answer(topic_task(), rows, mode, 4) for mode in ("generate", "rank")]
    return {"weights": engine.arena.data, "answers": answers, "share": local_bytes(lm.model) / whole}


def train_runs(data: Path, output: Path) -> None:
    """Whole runs in which a process may have no row of a step, fewer rows to score, and other labels at once."""
    kif.generative.RANK_ELEMENTS = 20_000
    for name, (kind, method, options) in RUNS.items():
        for sharded in (False, True):
            config = RunConfig(
                model=str(output / kind), method=method, data=str(data), tasks=["colours", "sizes"], device="cpu",
                output=str(output / "runs" / f"{name}-{sharded}"), cache_dir=str(output / "cache"), batch_size=5,
                limit_train=11, limit_eval=7, eval_batch_size=2, gradient_accumulation=2, lr=1e-2, steps_per_task=8,
                max_length=64, max_new_tokens=3, kif=KIFConfig(inner_steps=2), shard_base=sharded,
                **options,
            )  # fmt: skip
            kif.run.train(config, progress=False)
            # the first process writes the folder, the other one does not wait for it
            dist.barrier()
            scores = kif.run.evaluate_run(Path(config.output), progress=False)["scores"]
            (Path(config.output) / f"again-{dist.get_rank()}.json").write_text(json.dumps(scores))


def work(rank: int, data: Path, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{output / 'port'}", rank=rank, world_size=RANKS)
    train_runs(data, output)
    for kind, precision in CASES:
        found = []
        for sharded in (False, True):
            lm = load(output / kind, precision)
            found.append(train(rank, lm, sharded))
        assert found[0]["share"] == 1.0
        name = output / f"{kind}-{precision}-{rank}"
        save_file({str(i): result.pop("weights") for i, result in enumerate(found)}, f"{name}.safetensors")
        Path(f"{name}.json").write_text(json.dumps(found))
        if rank == 0:
            lm.model.save_pretrained(str(name))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ended(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sharding")
    for kind in {kind for kind, _ in CASES}:
        build_tiny(kind, output / kind)  # type: ignore[arg-type]
    multiprocessing.spawn(work, (written, output), nprocs=RANKS)
    return output


@pytest.mark.parametrize(("kind", "precision"), CASES)
def test_a_split_base_is_as_good_as_a_whole_one(ended: Path, kind: str, precision: str) -> None:
    weights = []
    for rank in range(RANKS):
        whole, split = json.loads((ended / f"{kind}-{precision}-{rank}.json").read_text())
        assert split["answers"] == whole["answers"]
        # embeddings and output layer are most of a tiny model
        assert split["share"] < 0.96
        tensors = load_file(ended / f"{kind}-{precision}-{rank}.safetensors")
        assert torch.equal(tensors["0"], tensors["1"])
        weights.append(tensors["1"])
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_split_base_is_the_run_on_a_whole_one(ended: Path, name: str) -> None:
    folders = [ended / "runs" / f"{name}-{sharded}" for sharded in (False, True)]
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    whole, split = (json.loads((folder / "results.json").read_text()) for folder in folders)
    assert split["accuracy"] == whole["accuracy"] and split["steps"] == whole["steps"] and split["skipped"] == 0
    assert split["settings"] == whole["settings"]
    # the finished run's adapter, scored again
    for folder in folders:
        for rank in range(RANKS):
            scores = json.loads((folder / f"again-{rank}.json").read_text())
            assert scores == [row[-1] for row in whole["accuracy"]]


@pytest.mark.parametrize("method", ["ewc", "migu", "vr-mcl", "lfpt5"])
def test_methods_with_passes_of_their_own_refuse(method: str) -> None:
    config = RunConfig(method=method, shard_base=True)
    with pytest.raises(ValueError, match=f"shard_base does not work with {method}, whose|which .*: leave it out"):
        METHODS[method].adapter_config(config, 2)


def test_what_a_run_on_a_split_base_needs(written: Path) -> None:
    with pytest.raises(ValueError, match="several processes: start them with torchrun, or leave it out"):
        kif.run.train(RunConfig(model="none", data=str(written), tasks=["colours"], shard_base=True), progress=False)
    with pytest.raises(ValueError, match="cannot split a quantised base: leave out quantization nf4"):
        RunConfig(shard_base=True, quantization="nf4")


def test_the_adapter_is_saved_whole(ended: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(ended / "llama")
    loaded = PeftModel.from_pretrained(base, str(ended / "llama-fp32-0"), is_trainable=True)
    trained = sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    flat = load_file(ended / "llama-fp32-0.safetensors")["1"]
    sums = sum(p.detach().double().sum().item() for p in loaded.parameters() if p.requires_grad)
    assert trained <= flat.numel() and sums == pytest.approx(flat.double().sum().item(), rel=1e-12)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="process group: start the processes with torchrun"):
        shard_base(nn.Linear(2, 2))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'port'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="Linear has no list of layers"):
            shard_base(nn.Linear(2, 2))
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
        layer: Any = model["layers"]
        layer[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"layers\.0\.weight is torch\.int8: a quantised base cannot be split"):
            shard_base(model)
        whole: Any = nn.Linear(2, 2)
        fully_shard(whole, mesh=init_device_mesh("cpu", (1,)))
        whole(torch.ones(1, 2)).sum().backward()
        with pytest.raises(ArenaError, match=r"parameter weight is spread over processes .*shard_base"):
            RecurrentKIF.of(whole)
        with pytest.raises(ValueError, match="cannot score parameter weight, which is spread over processes"):
            KIFCallback().on_pre_optimizer_step(None, None, None, model=whole)
    finally:
        dist.destroy_process_group()
