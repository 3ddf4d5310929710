"""The memory and time model of a round against measurements at three sizes, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling --json benchmarks/results/scaling.json

The formulas are in `benchmarks.scaling_model`. The rates that they need are measured first, by copies, a matrix product
and models of next to no size; then each size and form is measured in a process of its own, so that its peak is its own.
Prints the measured table of docs/scaling.md; `benchmarks.scaling_large` prints those that are computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks import scaling_model as model
from benchmarks.machine import Machine, _version, environment
from benchmarks.memory import Peak, frozen_bytes
from benchmarks.scaling_model import Decoder, Rates
from kif.arena import ParameterArena
from kif.config import KIFConfig
from kif.decoder import DecoderModel
from kif.engine import RecurrentKIF
from kif.families import Encoded
from kif.models import checkpoint_layers
from kif_kernels.eager import CHUNK
from kif_kernels.selection import kth_largest

SIZES = {
    "tiny": Decoder(512, 16, 32, 2, 2),
    "0.3M": Decoder(1024, 64, 172, 4, 4),
    "3M": Decoder(2048, 256, 688, 3, 4),
    "30M": Decoder(4096, 512, 1376, 8, 8),
}
"""By the elements of the whole model; `tiny` is for tests."""

FORMS = {"full": (0, False), "checkpointed": (0, True), "lora": (8, False)}
"""(rank, checkpointed): everything trained, or LoRA on q and v of a frozen base."""

CONFIG = KIFConfig(inner_steps=4)
ROWS, LENGTH, TARGETS, LR = 4, 128, 8, 1e-4

UNITS = {"arena": 2**20, "base": 2**20, "activations": 2**20, "resident": 2**20, "passes": 1e-3, "bookkeeping": 1e-3}
"""What is compared, in bytes or seconds, and the unit of the table: MiB or ms."""


class Whole(DecoderModel):
    """A model without an adapter, all of which is trained."""

    base = property(lambda self: self.model)


def build(shape: Decoder, form: str) -> DecoderModel:
    """The model with random weights in fp32, ready to train."""
    import transformers
    from peft import LoraConfig, get_peft_model

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values: Any = dict(zip(names, (shape.vocab, shape.width, shape.inner, shape.layers, shape.heads), strict=True))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**values, num_key_value_heads=shape.kv_heads or None, pad_token_id=0)
    net: Any = transformers.LlamaForCausalLM._from_config(config, dtype=torch.float32)
    if FORMS[form][1]:
        checkpoint_layers(net)
    if rank := FORMS[form][0]:
        net = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=["q_proj", "v_proj"]))
    net.train()
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    return (DecoderModel if rank else Whole)(net, tokenizer, max_length=10**6, max_target_length=TARGETS)


def backward(lm: DecoderModel) -> None:
    """Forward and backward pass of a step on rows of random tokens."""
    ids = torch.randint(2, lm.base.config.vocab_size, (ROWS, LENGTH)).tolist()
    cut = LENGTH - TARGETS
    loss, count = lm.loss(lm.collate([Encoded(tuple(row[:cut]), tuple(row[cut:]), "random", False) for row in ids]))
    (loss / count).backward()


def train_round(engine: RecurrentKIF, passes: Callable[[], None]) -> tuple[list[float], float]:
    """Seconds of each step's passes, and of all bookkeeping."""
    steps: list[float] = []
    bookkeeping = 0.0
    for number in range(CONFIG.inner_steps + CONFIG.outer_steps):
        begun = time.perf_counter()
        passes()
        middle = time.perf_counter()
        (engine.inner_step if number < CONFIG.inner_steps else engine.outer_step)(LR)
        steps.append(middle - begun)
        bookkeeping += time.perf_counter() - middle
    begun = time.perf_counter()
    engine.fuse()
    return steps, bookkeeping + time.perf_counter() - begun


def allocated_peak(run: Callable[[], None]) -> int:
    """The most that torch's CPU allocator had handed out in `run`, beyond what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events: Any = profiler.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in memory), initial=0))


def run(
    shape: Decoder, form: str, rounds: int, restart: Callable[[], None] = lambda: None
) -> tuple[DecoderModel, RecurrentKIF, dict[str, float]]:
    """Model, engine and median seconds of a step's passes and of a round's bookkeeping, after an untimed round."""
    lm = build(shape, form)
    engine = RecurrentKIF.of(lm.model, CONFIG)
    train_round(engine, lambda: backward(lm))
    restart()
    times = [train_round(engine, lambda: backward(lm)) for _ in range(rounds)]
    passes = statistics.median(second for steps, _ in times for second in steps)
    return lm, engine, {"passes": passes, "bookkeeping": statistics.median(seconds for _, seconds in times)}


def measure(shape: Decoder, form: str, rounds: int) -> dict[str, float]:
    """One size and form in this process: bytes and seconds."""
    run(SIZES["tiny"], form, 1)  # what libraries allocate for good is not the model's
    peak = Peak(torch.device("cpu"))
    before = peak.now()
    lm, engine, seconds = run(shape, form, rounds, peak.restart)
    resident = peak.highest() - before
    arena = engine.arena
    return {
        "arena": sum(buffer.nbytes for buffer in (arena.data, arena.grad, *arena.buffers.values())),
        "base": sum(frozen_bytes(lm.model).values()),
        "activations": allocated_peak(lambda: backward(lm)),
        "resident": resident,
        **seconds,
    }


def predict(shape: Decoder, form: str, rates: Rates) -> dict[str, float]:
    """The same by the model."""
    rank, checkpointed = FORMS[form]
    trained, step = shape.trained(rank), (shape, ROWS, LENGTH, TARGETS)
    arena, base = model.arena_bytes(trained, CONFIG), model.base_bytes(shape, "fp32") if rank else 0
    activations = model.activation_bytes(*step, rank, checkpointed)
    # partitioning copies the scores of a side, when the activations are gone
    return {
        "arena": arena,
        "base": base,
        "activations": activations,
        "resident": arena + base + max(activations, 4 * sum(trained)),
        "passes": model.compute_seconds(*step, rates, rank, checkpointed),
        "bookkeeping": model.bookkeeping_seconds(sum(trained), len(trained), CONFIG, rates),
    }


def clocked(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after two untimed."""
    clocks = [time.perf_counter()]
    for _ in range(repeats + 2):
        call()
        clocks.append(time.perf_counter())
    return statistics.median(after - before for before, after in pairwise(clocks[2:]))


def probe() -> dict[str, Rates]:
    """The rates of this machine, by form. What the engine and the passes take beyond the formulas at width 16 depends
    on no size: it is what a launch and a layer cost."""
    matrix = torch.randn(1024, 1024)
    flops = 2 * 1024**3 / clocked(lambda: matrix @ matrix, 20)
    memory = 1e9 * Machine("cpu").copy_gbps
    x, y, z = torch.rand(3, CHUNK)
    cache = 12 * CHUNK / clocked(lambda: torch.mul(x, y, out=z), 200)
    scores = (torch.randn(2**21) * torch.randn(2**21)).abs()
    scores[: len(scores) // 10] = 0.0  # as of words that a batch has not
    partition = clocked(lambda: kth_largest(scores, len(scores) // 5), 9) / len(scores)
    many = ParameterArena([(str(i), nn.Parameter(torch.ones(1))) for i in range(1000)])
    bare = Rates(flops, memory, 0.0, clocked(many.check, 20) / 1000, cache, partition)
    found = {}
    for form in FORMS:
        passes, launch = {}, []
        for layers in (2, 6):
            small = Decoder(64, 16, 32, layers, 2)
            measured, formula = run(small, form, 6)[2], predict(small, form, bare)
            passes[layers] = measured["passes"] - formula["passes"]
            launch.append((measured["bookkeeping"] - formula["bookkeeping"]) / model.launches(CONFIG))
        layer = (passes[6] - passes[2]) / 4
        found[form] = replace(bare, launch=statistics.mean(launch), model=passes[2] - 2 * layer, layer=layer)
    return found


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Markdown: predicted, measured and relative error of each case, memory in MiB and time in ms."""
    names = [f"{name}, {'MiB' if unit == 2**20 else 'ms'}" for name, unit in UNITS.items()]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for case in cases:
        cells = []
        for name, unit in UNITS.items():
            a, b = case["predicted"][name] / unit, case["measured"][name] / unit
            cells.append(f"{a:.1f}, {b:.1f}, {100 * (a / b - 1):+.0f}%" if a else "")
        lines.append(f"| {case['size']}, {case['form']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.3M", "3M", "30M"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one that is not")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--here", action="store_true", help="measure the one case in this process and print it")
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(measure(SIZES[args.sizes[0]], args.forms[0], args.rounds)))
        return 0
    rates, cases = probe(), []
    command = [sys.executable, "-m", "benchmarks.scaling", "--here", f"--rounds={args.rounds}"]
    for size in args.sizes:
        for form in args.forms:
            done = subprocess.run([*command, "--sizes", size, "--forms", form], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                return done.returncode
            measured = json.loads(done.stdout.splitlines()[-1])
            predicted = predict(SIZES[size], form, rates[form])
            error = {name: value / measured[name] - 1 for name, value in predicted.items() if value}
            trained = SIZES[size].trained(FORMS[form][0])
            cases.append({"size": size, "form": form, "elements": sum(trained), "tensors": len(trained)})
            cases[-1] |= {"predicted": predicted, "measured": measured, "error": error}
    print(table(cases))
    if args.json is not None:
        versions = {name: _version(name) for name in ("transformers", "peft", "numpy")}
        content: dict[str, Any] = {"environment": {**environment(torch.device("cpu")), **versions}}
        content["settings"] = vars(CONFIG) | {"rounds": args.rounds, "rows": ROWS, "length": LENGTH, "targets": TARGETS}
        content |= {"rates": {form: vars(found) for form, found in rates.items()}, "cases": cases}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
