"""A round of training, taken apart: how long data, forward, backward, optimizer, thresholds and fusion take.

    python -m benchmarks.train_step --model t5-large --json FILE
    python -m benchmarks.train_step --model tiny-t5 --trajectory 200

Contenders: `trainer`, LoRA replay by transformers' Trainer and PEFT; `per-tensor`, Recurrent-KIF by this package's loop
with plain PyTorch, one tensor after the other; `kif`, the same with the arena and its fused operations, and `kif-` with
parts: `bf16`, the adapter's products in bf16 too (`adapter_precision`, for --precision bf16); `checkpointing`, gradient
checkpointing; `graph`, forward and backward replayed as a CUDA graph (`cuda_graphs`), which counts as backward;
`liger`, parts of layers by liger-kernel (`use_liger_kernel`); `compile`, by torch.compile, which kif does not do. All
make the same number of optimizer steps on rows of the same lengths. What differs by design: this package computes
logits where there are labels only, the Trainer at all places; T5's position bias is masked once; on a GPU norms are one
operation (`kif.layers`), and the Trainer's attention may be cuDNN's (`kif.attention`). Weights are random, which does
not matter for time. Each contender runs in a process of its own, in turn, so that its peak memory is its own. With
--trajectory the losses of `per-tensor` and another contender on the same rows from the same weights are compared
instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import PerTensorKthvalue
from benchmarks.machine import environment, write_json
from benchmarks.workload import LR, MOMENTS, Problem
from kif.arena import ParameterArena
from kif.attention import without_cudnn
from kif.captured import CapturedSteps
from kif.config import KIFConfig
from kif.decoder import DecoderModel
from kif.engine import RecurrentKIF
from kif.families import Encoded, LanguageModel
from kif.layers import fit_layers, use_liger
from kif.low_precision import BF16Adapter
from kif.models import checkpoint_layers
from kif.seq2seq import EncoderDecoderModel
from kif.timing import Stopwatch

_T5 = {"vocab_size": 32128, "d_kv": 64, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
_LLAMA = {"vocab_size": 32000, "pad_token_id": 0, "max_position_embeddings": 4096}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-t5": ("t5", {**_T5, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}),
    "tiny-llama": (
        "llama",
        {**_LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "t5-small": ("t5", {**_T5, "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152, "pad_token_id": 0, "max_position_embeddings": 8192, "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "t5-large": ("t5", {**_T5, "d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}),
    "flan-t5-xl": (
        "t5",
        {
            **_T5, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        },
    ),
    "llama2-7b": (
        "llama",
        {**_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "llama2-13b": (
        "llama",
        {**_LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    ),
}  # fmt: skip
"""Shapes of the models of Appendix D, small ones for CPUs, and tiny ones for tests."""

BASELINES = ("trainer", "per-tensor")
CONTENDERS = (
    *BASELINES, "kif", "kif-checkpointing", "kif-graph", "kif-bf16", "kif-bf16-compile", "kif-bf16-graph",
    "kif-bf16-compile-graph", "kif-bf16-liger", "kif-bf16-liger-graph",
)  # fmt: skip
BOOKKEEPING = ("optimizer", "threshold", "fusion")
PROFILED = 40
"""Kernels that a profile names."""
TARGET = 8
"""Tokens of a label."""


def build(name: str, device: torch.device, dtype: torch.dtype, dropout: bool = False) -> LanguageModel:
    """The model with random weights and LoRA (r=8 on query and value), the adapter in fp32.

    `dropout`: that of Appendix D on the adapter, and T5's own; else none.
    """
    from peft import LoraConfig, get_peft_model

    kind, _ = MODELS[name]
    torch.manual_seed(0)
    base = random_base(name, device, dtype, **({"dropout_rate": 0.1 if dropout else 0.0} if kind == "t5" else {}))
    with torch.device(device):
        task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
        targets = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
        share = 0.05 if dropout else 0.0
        lora = LoraConfig(task_type=task, r=8, lora_alpha=32, lora_dropout=share, target_modules=targets)
        model = get_peft_model(base, lora)
    family = EncoderDecoderModel if kind == "t5" else DecoderModel
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    model.train()
    return family(model, tokenizer, max_length=10**6, max_target_length=TARGET)


def random_base(name: str, device: torch.device, dtype: torch.dtype, **changes: Any) -> Any:
    """The transformers model of that shape with random weights; `changes`: fields of its config."""
    import transformers

    kind, values = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**values, **changes})
    auto: Any = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device(device):
        return auto.from_config(config, dtype=dtype)


def rows_of(count: int, lengths: Sequence[int], seed: int) -> list[Encoded]:
    """Rows of random tokens, whose prompts have these lengths in turn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 30000, (count, max(lengths) + TARGET), generator=generator).tolist()
    return [
        Encoded(tuple(row[TARGET : TARGET + length]), tuple(row[:TARGET]), "random", False)
        for row, length in zip(ids, itertools.cycle(lengths), strict=False)
    ]


def lengths_of(options: argparse.Namespace) -> list[int]:
    """Tokens of the prompts in a batch: evenly from the shortest to the longest."""
    longest, gaps = options.length, max(1, options.batch - 1)
    shortest = options.shortest or longest
    return [longest - (longest - shortest) * i // gaps for i in range(options.batch)]


class KIF:
    """This package: the arena and the fused operations; `name` is a contender's."""

    def __init__(self, lm: LanguageModel, config: KIFConfig, watch: Stopwatch, name: str) -> None:
        arena = ParameterArena.of(lm.model)
        parts = name.split("-")[1:]
        if "checkpointing" in parts:
            checkpoint_layers(lm.base)
        if "bf16" in parts:
            if lm.base.dtype != torch.bfloat16:
                raise ValueError(f"{name} needs --precision bf16")
            BF16Adapter(lm, arena)
        if "liger" in parts:
            use_liger(lm.base)
        if "compile" in parts:
            # once for all layers of a kind
            for module in lm.base.modules():
                if type(module).__name__ in lm.base._no_split_modules:
                    module.compile()
        self.captured = CapturedSteps(lm, arena, []) if "graph" in parts else None
        self.engine = RecurrentKIF(arena, config)
        self.engine.stopwatch = watch

    def step(self, side: str, first: bool, last: bool) -> None:
        (self.engine.inner_step if side == "in" else self.engine.outer_step)(LR)

    def fuse(self) -> None:
        self.engine.fuse()


class PerTensor:
    """Plain PyTorch, one tensor after the other, on the model's own parameters."""

    def __init__(self, lm: LanguageModel, config: KIFConfig, watch: Stopwatch) -> None:
        self.parameters = [p for p in lm.model.parameters() if p.requires_grad]
        self.device, self.watch = lm.device, watch
        buffers = ("weight", "grad", "theta_start", "theta_inner", "importance_in", "importance_out", *MOMENTS)
        self.bookkeeping = PerTensorKthvalue(Problem(tuple(p.shape for p in self.parameters), lm.device), buffers)
        self.bookkeeping.parts["weight"] = [p.data for p in self.parameters]
        for name in MOMENTS:
            self.bookkeeping.flat[name].zero_()
        self.bookkeeping.steps = {"in": 0, "out": 0}
        self.captured: CapturedSteps | None = None

    @torch.no_grad()
    def step(self, side: Any, first: bool, last: bool) -> None:
        with self.watch.section("optimizer", self.device):
            self.bookkeeping.parts["grad"] = [p.grad for p in self.parameters]
            self.bookkeeping.training_step(side, first, last)
            for parameter in self.parameters:
                parameter.grad = None

    @torch.no_grad()
    def fuse(self) -> None:
        with self.watch.section("threshold", self.device):
            thresholds = self.bookkeeping.thresholds()
        with self.watch.section("fusion", self.device):
            self.bookkeeping.fusion(*thresholds)


def train_round(
    lm: LanguageModel, own: KIF | PerTensor, config: KIFConfig, next_rows: Callable[[], list[Encoded]], watch: Stopwatch
) -> list[Tensor]:
    """One round; the losses, on the device."""
    losses = []
    inner, steps = config.inner_steps, config.inner_steps + config.outer_steps
    for i in range(steps):
        if own.captured is not None:
            rows = next_rows()
            with watch.section("backward", lm.device):
                losses.append(own.captured.backward(rows, lm.label_count(rows)))
        else:
            begun = time.perf_counter()
            batch = lm.collate(next_rows())
            watch.add("data", time.perf_counter() - begun)
            with watch.section("forward", lm.device):
                loss, count = lm.loss(batch)
                loss = loss / count
            with watch.section("backward", lm.device):
                loss.backward()
            losses.append(loss.detach())
        own.step("in" if i < inner else "out", i == 0, i in (inner - 1, steps - 1))
    own.fuse()
    return losses


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One contender: milliseconds of each round, tokens in a second, its parts, peak memory in bytes."""
    # the Trainer as its users have it, all of this package as `kif train` has it
    with nullcontext() if options.only == "trainer" else without_cudnn():
        return _measure(options)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    lm = build(options.model, device, dtype, options.dropout)
    config = KIFConfig(inner_steps=options.inner_steps, outer_steps=options.outer_steps)
    steps = config.inner_steps + config.outer_steps
    parts: dict[str, float] = {}
    profile: dict[str, Any] | None = None
    if options.only == "trainer":
        rounds, peak, profile = _trainer(lm, options, steps)
    else:
        watch = Stopwatch()
        own = _bookkeeping(options.only, lm, config, watch)
        rows = rows_of(options.batch, lengths_of(options), 1)
        rounds = []
        before: dict[str, float] = {}
        for number in range(options.rounds + 1):
            synchronize(device)
            begun = time.perf_counter()
            train_round(lm, own, config, lambda: rows, watch)
            synchronize(device)
            # the first one compiles, allocates and chooses algorithms
            if number == 0:
                before = watch.seconds()
            else:
                rounds.append((time.perf_counter() - begun) * 1e3)
        after = watch.seconds()
        peak = _peak(device)
        if options.profile:
            profile = profiled(device, lambda: train_round(lm, own, config, lambda: rows, Stopwatch()))
        parts = {name: (after[name] - before.get(name, 0.0)) * 1e3 / options.rounds for name in after}
        parts["other"] = statistics.fmean(rounds) - sum(parts.values())
    median = statistics.median(rounds)
    return {
        "round_ms": rounds,
        "median_ms": median,
        "tokens_per_second": 1e3 * steps * sum(length + TARGET for length in lengths_of(options)) / median,
        "parts_ms": parts,
        "bookkeeping_share": 100.0 * sum(parts.get(name, 0.0) for name in BOOKKEEPING) / median if parts else None,
        "peak_bytes": peak,
        **({"profile": profile} if profile else {}),
    }


def _bookkeeping(name: str, lm: LanguageModel, config: KIFConfig, watch: Stopwatch) -> KIF | PerTensor:
    # as when `kif train` loads a model
    fit_layers(lm.base, lm.device)
    return PerTensor(lm, config, watch) if name == "per-tensor" else KIF(lm, config, watch, name)


def _trainer(
    lm: LanguageModel, options: argparse.Namespace, steps: int
) -> tuple[list[float], int, dict[str, Any] | None]:
    """Milliseconds of each `steps` steps of transformers' Trainer after as many to warm up; peak memory; a profile."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []
    peaks: list[int] = []
    profiler = _profiler(lm.device)
    last = steps * (options.rounds + 1)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % steps == 0:
                synchronize(lm.device)
                times.append(time.perf_counter())
            if state.global_step == last:
                peaks.append(_peak(lm.device))
                if options.profile:
                    profiler.start()

    count = last + steps * options.profile
    rows: Any = rows_of(options.batch * count, lengths_of(options), 1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=options.batch,
            max_steps=count,
            # every batch has rows of all lengths
            train_sampling_strategy="sequential",
            learning_rate=LR,
            bf16=options.precision == "bf16",
            use_cpu=lm.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=lm.device.type == "cuda",
        )
        Trainer(lm.model, arguments, lm.collate, train_dataset=rows, callbacks=[Clock()]).train()
    found = None
    if options.profile:
        synchronize(lm.device)
        profiler.stop()
        found = _kernels(lm.device, profiler)
    return [(b - a) * 1e3 for a, b in itertools.pairwise(times[: options.rounds + 1])], peaks[0], found


def profiled(device: torch.device, run: Callable[[], Any]) -> dict[str, Any]:
    """What `run` does on the device: milliseconds and launches in all, and of the kernels that take longest.

    On a CPU torch's operations stand for kernels.
    """
    with _profiler(device) as profiler:
        run()
        synchronize(device)
    return _kernels(device, profiler)


def _profiler(device: torch.device) -> torch.profiler.profile:
    activity = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU])


def _kernels(device: torch.device, profiler: torch.profiler.profile) -> dict[str, Any]:
    gpu = device.type == "cuda"
    found = [
        (event.self_device_time_total if gpu else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
        if (event.device_type != torch.autograd.DeviceType.CPU) == gpu and not event.is_user_annotation
    ]
    found.sort(reverse=True)
    return {
        "device_ms": sum(us for us, _, _ in found) / 1e3,
        "launches": sum(count for _, count, _ in found),
        "kernels": [{"name": name[:160], "count": count, "ms": us / 1e3} for us, count, name in found[:PROFILED]],
    }


@without_cudnn()
def trajectory(options: argparse.Namespace) -> dict[str, Any]:
    """Losses of `per-tensor` and the last contender over `options.trajectory` steps, same rows, same weights."""
    device = torch.device(options.device)
    config = KIFConfig(inner_steps=options.inner_steps, outer_steps=options.outer_steps)
    found = {}
    other = options.contenders[-1]
    for name in ("per-tensor", other):
        lm = build(options.model, device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
        watch = Stopwatch()
        own = _bookkeeping(name, lm, config, watch)
        pool = rows_of(8 * options.batch, lengths_of(options), 2)
        drawn = iter(range(10**9))

        def next_rows(pool: list[Encoded] = pool, drawn: Any = drawn) -> list[Encoded]:
            start = next(drawn) * options.batch % len(pool)
            return pool[start : start + options.batch]

        losses: list[Tensor] = []
        while len(losses) < options.trajectory:
            losses += train_round(lm, own, config, next_rows, watch)
        found[name] = torch.stack(losses[: options.trajectory]).tolist()
    pairs = list(zip(found["per-tensor"], found[other], strict=True))
    return {
        "contender": other,
        "steps": len(pairs),
        "first_loss": pairs[0][1],
        "last_loss": pairs[-1][1],
        "largest_relative_difference": max(abs(a - b) / abs(a) for a, b in pairs),
    }


def table(contenders: dict[str, dict[str, Any]]) -> str:
    """The results for people: medians over the rounds of all turns."""
    names = ["data", "forward", "backward", *BOOKKEEPING, "other"]
    lines = [f"{'contender':18}{'round ms':>10}{'tokens/s':>10}{'peak GiB':>10}" + "".join(f"{n:>10}" for n in names)]
    for name, row in contenders.items():
        if "error" in row:
            lines.append(f"{name:18}{'failed':>10}")
            continue
        parts = "".join(f"{row['parts_ms'][n]:10.1f}" if n in row["parts_ms"] else " " * 10 for n in names)
        lines.append(
            f"{name:18}{row['median_ms']:10.1f}{row['tokens_per_second']:10.0f}{row['peak_bytes'] / 2**30:10.2f}{parts}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="tiny-t5")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*BASELINES, "kif"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--shortest", type=int, help="tokens of a batch's shortest prompt; default: all of --length")
    parser.add_argument("--inner-steps", type=int, default=8)
    parser.add_argument("--outer-steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds in a turn, after one untimed")
    parser.add_argument("--turns", type=int, default=1, help="how often the contenders take turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the base model")
    parser.add_argument("--dropout", action="store_true", help="of Appendix D (LoRA, 0.05) and T5 (0.1)")
    parser.add_argument("--profile", action="store_true", help="one round more, of which kernels' times are written")
    parser.add_argument("--trajectory", type=int, metavar="STEPS", help="compare losses over so many steps instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.shortest is not None and not 1 <= options.shortest <= options.length:
        parser.error(f"--shortest must be 1 to {options.length}, the --length, got {options.shortest}")
    if options.dropout and options.trajectory:
        parser.error("losses are compared without --dropout, whose draws would differ")
    if options.only:
        print(json.dumps(measure(options)))
        return 0
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "only")}
    document: dict[str, Any] = {"settings": settings, "environment": environment(torch.device(options.device))}
    if options.trajectory:
        document["trajectory"] = trajectory(options)
        print(json.dumps(document["trajectory"]))
        if options.json:
            write_json(options.json, document)
    else:
        for found in _in_turns(options, list(arguments if arguments is not None else sys.argv[1:])):
            document["contenders"] = found
            if options.json:
                write_json(options.json, document)
        print(table(document["contenders"]))
    return int(any("error" in row for row in document.get("contenders", {}).values()))


def _in_turns(options: argparse.Namespace, arguments: list[str]) -> Iterator[dict[str, dict[str, Any]]]:
    """What is known after each process: a failure or the end of the time allowed must not cost what was measured."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    errors: dict[str, dict[str, Any]] = {}
    for turn in range(options.turns):
        # there and back, so that none always follows the same one
        for name in options.contenders[:: -1 if turn % 2 else 1]:
            if name in errors:
                continue
            command = [sys.executable, "-m", "benchmarks.train_step", *arguments, "--only", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                turns[name].append(json.loads(done.stdout.splitlines()[-1]))
            else:
                # a process that was killed says nothing
                errors[name] = {"error": f"status {done.returncode}\n{done.stderr[-4000:]}"}
                print(f"{name} failed: {errors[name]['error']}", file=sys.stderr)
            merged = {name: _merged(results) for name, results in turns.items() if results}
            yield {name: merged.get(name, {}) | errors.get(name, {}) for name in turns if name in merged | errors}


def _merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The result in the middle, with the rounds of all of them."""
    middle = sorted(results, key=lambda result: result["median_ms"])[len(results) // 2]
    rounds = [ms for result in results for ms in result["round_ms"]]
    median = statistics.median(rounds)
    rate = middle["tokens_per_second"] * middle["median_ms"] / median
    return {**middle, "round_ms": rounds, "median_ms": median, "tokens_per_second": rate}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    from kif.training import peak_memory

    return peak_memory(device)


if __name__ == "__main__":
    raise SystemExit(main())
