"""A round of training, taken apart: how long data, forward, backward, optimizer, thresholds and fusion take.

    python -m benchmarks.train_step --model t5-large --json FILE
    python -m benchmarks.train_step --model tiny-t5 --trajectory 200

Contenders: `trainer`, LoRA replay by transformers' Trainer and PEFT; `per-tensor`, Recurrent-KIF by this package's loop
with plain PyTorch, one tensor after the other; `kif`, the same with the arena and its fused operations, and `kif-` with
parts, in this order: `checkpointing`, gradient checkpointing; `bf16`, the adapter's products in bf16 too
(`adapter_precision`, for --precision bf16); `liger`, parts of layers by liger-kernel (`use_liger_kernel`); what kif
does not do: `compile`, layers by torch.compile, `cudnn`, attention that may be cuDNN's everywhere, `own`, that is so
nowhere; `graph`, forward and backward replayed as a CUDA graph (`cuda_graphs`), which counts as backward. All make the
same number of optimizer steps on rows of the same lengths. What differs by design: this package computes logits where
there are labels only, the Trainer at all places; T5's position bias is masked once; on a GPU norms are one operation
(`kif.layers`), and the Trainer's attention may be cuDNN's (`kif.attention`). Weights are random, which does not matter
for time. Each contender runs in a process of its own, in turn, so that its peak memory is its own; rounds of several
--outer-steps M follow each other in it, and are in the result by names such as `kif M=4`. With --profile one round more
of the first M is recorded. With --trajectory the losses of `per-tensor` and another contender on the same rows from the
same weights are compared instead.
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
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.baselines import PerTensorKthvalue
from benchmarks.machine import environment, synchronize, write_json
from benchmarks.models import MODELS, TARGET, build, rows_of
from benchmarks.workload import LR, MOMENTS, Problem
from kif import captured
from kif.arena import ParameterArena
from kif.attention import without_cudnn
from kif.captured import CapturedSteps
from kif.config import KIFConfig
from kif.engine import RecurrentKIF
from kif.families import Encoded, LanguageModel
from kif.layers import fit_layers, use_liger
from kif.low_precision import BF16Adapter
from kif.models import checkpoint_layers
from kif.timing import Stopwatch

BASELINES = ("trainer", "per-tensor")
PARTS = ("checkpointing", "bf16", "liger", "compile", "cudnn", "own", "graph")
BOOKKEEPING = ("optimizer", "threshold", "fusion")
PROFILED = 40
"""Kernels that a profile names."""


def lengths_of(options: argparse.Namespace) -> list[int]:
    """Tokens of the prompts in a batch: evenly from the shortest to the longest."""
    longest, gaps = options.length, max(1, options.batch - 1)
    shortest = options.shortest or longest
    return [longest - (longest - shortest) * i // gaps for i in range(options.batch)]


def contender(name: str) -> str:
    """`name`, if it is a contender's. Raises: argparse.ArgumentTypeError."""
    first, *parts = name.split("-")
    if name not in BASELINES and (first != "kif" or parts != [part for part in PARTS if part in parts]):
        known = f"{', '.join(BASELINES)}, kif and kif- with parts, in this order, of {'-'.join(PARTS)}"
        raise argparse.ArgumentTypeError(f"no contender {name!r}: there are {known}")
    return name


class KIF:
    """This package: the arena and the fused operations; `name` is a contender's."""

    def __init__(self, lm: LanguageModel, watch: Stopwatch, name: str) -> None:
        self.arena, self.watch = ParameterArena.of(lm.model), watch
        parts = name.split("-")[1:]
        if "checkpointing" in parts:
            checkpoint_layers(lm.base)
        if "bf16" in parts:
            if lm.base.dtype != torch.bfloat16:
                raise ValueError(f"{name} needs --precision bf16")
            BF16Adapter(lm, self.arena)
        if "liger" in parts:
            use_liger(lm.base)
        if "compile" in parts:
            # once for all layers of a kind
            for module in lm.base.modules():
                if type(module).__name__ in lm.base._no_split_modules:
                    module.compile()
        self.captured = CapturedSteps(lm, self.arena, []) if "graph" in parts else None

    def begin(self, config: KIFConfig) -> None:
        self.engine = RecurrentKIF(self.arena, config)
        self.engine.stopwatch = self.watch

    def step(self, side: str, first: bool, last: bool) -> None:
        (self.engine.inner_step if side == "in" else self.engine.outer_step)(LR)

    def fuse(self) -> None:
        self.engine.fuse()


class PerTensor:
    """Plain PyTorch, one tensor after the other, on the model's own parameters."""

    def __init__(self, lm: LanguageModel, watch: Stopwatch) -> None:
        self.parameters = [p for p in lm.model.parameters() if p.requires_grad]
        self.device, self.watch = lm.device, watch
        buffers = ("weight", "grad", "theta_start", "theta_inner", "importance_in", "importance_out", *MOMENTS)
        self.bookkeeping = PerTensorKthvalue(Problem(tuple(p.shape for p in self.parameters), lm.device), buffers)
        self.bookkeeping.parts["weight"] = [p.data for p in self.parameters]
        self.captured: CapturedSteps | None = None

    def begin(self, config: KIFConfig) -> None:
        for name in MOMENTS:
            self.bookkeeping.flat[name].zero_()
        self.bookkeeping.steps = {"in": 0, "out": 0}

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


@contextmanager
def attention_of(name: str) -> Iterator[None]:
    """Within the block attention is as contender `name` has it: the Trainer as its users do, kif by its own rule."""
    parts = set(name.split("-"))
    with ExitStack() as stack:
        if "cudnn" in parts:
            stack.enter_context(patch.object(captured, "without_cudnn", nullcontext))
        elif name != "trainer":
            stack.enter_context(without_cudnn())
        if parts & {"cudnn", "own"}:
            stack.enter_context(patch.object(captured, "cudnn_where_safe", nullcontext))
        yield


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One contender, for each M: milliseconds of rounds, tokens in a second, parts, peak memory in bytes, last loss."""
    with attention_of(options.only):
        return _measure(options)


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    lm = build(options.model, device, dtype, options.dropout)
    if options.only == "trainer":
        return _trainer(lm, options)
    watch = Stopwatch()
    own = _bookkeeping(options.only, lm, watch)
    rows = rows_of(options.batch, lengths_of(options), 1)
    results = []
    for outer_steps in options.outer_steps:
        config = KIFConfig(inner_steps=options.inner_steps, outer_steps=outer_steps)
        own.begin(config)
        rounds = []
        before: dict[str, float] = {}
        for number in range(options.rounds + 1):
            synchronize(device)
            begun = time.perf_counter()
            losses = train_round(lm, own, config, lambda: rows, watch)
            synchronize(device)
            # the first one compiles, allocates and chooses algorithms
            if number == 0:
                before = watch.seconds()
            else:
                rounds.append((time.perf_counter() - begun) * 1e3)
        after = watch.seconds()
        parts = {name: (after[name] - before.get(name, 0.0)) * 1e3 / options.rounds for name in after}
        parts["other"] = statistics.fmean(rounds) - sum(parts.values())
        found = _result(options, outer_steps, rounds, _peak(device))
        found["parts_ms"] = parts
        found["bookkeeping_share"] = 100.0 * sum(parts.get(name, 0.0) for name in BOOKKEEPING) / found["median_ms"]
        found["last_loss"] = losses[-1].item()
        results.append(found)
    if options.profile:
        config = KIFConfig(inner_steps=options.inner_steps, outer_steps=options.outer_steps[0])
        own.begin(config)
        results[0]["profile"] = profiled(device, lambda: train_round(lm, own, config, lambda: rows, Stopwatch()))
    return results


def _result(options: argparse.Namespace, outer_steps: int, rounds: list[float], peak: int) -> dict[str, Any]:
    median = statistics.median(rounds)
    tokens = (options.inner_steps + outer_steps) * sum(length + TARGET for length in lengths_of(options))
    return {
        "round_ms": rounds,
        "median_ms": median,
        "tokens_per_second": 1e3 * tokens / median,
        "parts_ms": {},
        "peak_bytes": peak,
    }


def _bookkeeping(name: str, lm: LanguageModel, watch: Stopwatch) -> KIF | PerTensor:
    # as when `kif train` loads a model
    fit_layers(lm.base, lm.device)
    return PerTensor(lm, watch) if name == "per-tensor" else KIF(lm, watch, name)


def _trainer(lm: LanguageModel, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of so many steps of transformers' Trainer, after one round to warm up."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    steps = [options.inner_steps + outer_steps for outer_steps in options.outer_steps]
    rounds = [steps[0], *(count for count in steps for _ in range(options.rounds))]
    ends = list(itertools.accumulate(rounds))
    times: list[float] = []
    peaks: list[int] = []
    profiler = _profiler(lm.device)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in ends:
                synchronize(lm.device)
                times.append(time.perf_counter())
            if state.global_step == ends[-1]:
                peaks.append(_peak(lm.device))
                if options.profile:
                    profiler.start()

    count = ends[-1] + steps[0] * options.profile
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
    spans = [(b - a) * 1e3 for a, b in itertools.pairwise(times)]
    results = [
        _result(options, outer_steps, spans[i * options.rounds : (i + 1) * options.rounds], peaks[0])
        for i, outer_steps in enumerate(options.outer_steps)
    ]
    if options.profile:
        synchronize(lm.device)
        profiler.stop()
        results[0]["profile"] = _kernels(lm.device, profiler)
    return results


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


def trajectory(options: argparse.Namespace) -> dict[str, Any]:
    """Losses of `per-tensor` and the last contender over `options.trajectory` steps, same rows, same weights."""
    other = options.contenders[-1]
    found = {}
    for name in ("per-tensor", other):
        with attention_of(name):
            found[name] = _losses(options, name)
    pairs = list(zip(found["per-tensor"], found[other], strict=True))
    return {
        "contender": other,
        "steps": len(pairs),
        "first_loss": pairs[0][1],
        "last_loss": pairs[-1][1],
        "largest_relative_difference": max(abs(a - b) / abs(a) for a, b in pairs),
    }


def _losses(options: argparse.Namespace, name: str) -> list[float]:
    (outer_steps,) = options.outer_steps
    config = KIFConfig(inner_steps=options.inner_steps, outer_steps=outer_steps)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    lm = build(options.model, torch.device(options.device), dtype)
    watch = Stopwatch()
    own = _bookkeeping(name, lm, watch)
    own.begin(config)
    pool = rows_of(8 * options.batch, lengths_of(options), 2)
    starts = itertools.cycle(range(0, len(pool), options.batch))

    def next_rows() -> list[Encoded]:
        start = next(starts)
        return pool[start : start + options.batch]

    losses: list[Tensor] = []
    while len(losses) < options.trajectory:
        losses += train_round(lm, own, config, next_rows, watch)
    found: list[float] = torch.stack(losses[: options.trajectory]).tolist()
    return found


def table(contenders: dict[str, dict[str, Any]]) -> str:
    """The results for people: medians over the rounds of all turns."""
    names = ["data", "forward", "backward", *BOOKKEEPING, "other"]
    lines = [f"{'contender':26}{'round ms':>10}{'tokens/s':>10}{'peak GiB':>10}" + "".join(f"{n:>10}" for n in names)]
    for name, row in contenders.items():
        if "error" in row:
            lines.append(f"{name:26}{'failed':>10}")
            continue
        parts = "".join(f"{row['parts_ms'][n]:10.1f}" if n in row["parts_ms"] else " " * 10 for n in names)
        lines.append(
            f"{name:26}{row['median_ms']:10.1f}{row['tokens_per_second']:10.0f}{row['peak_bytes'] / 2**30:10.2f}{parts}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="tiny-t5")
    parser.add_argument("--contenders", nargs="+", type=contender, default=[*BASELINES, "kif"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--shortest", type=int, help="tokens of a batch's shortest prompt; default: all of --length")
    parser.add_argument("--inner-steps", type=int, default=8)
    parser.add_argument("--outer-steps", type=int, nargs="+", default=[4], help="one or several, in turn")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds in a turn, after one untimed")
    parser.add_argument("--turns", type=int, default=1, help="how often the contenders take turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the base model")
    parser.add_argument("--dropout", action="store_true", help="of Appendix D (LoRA, 0.05) and T5 (0.1)")
    parser.add_argument("--profile", action="store_true", help="one round more, of which kernels' times are written")
    parser.add_argument("--trajectory", type=int, metavar="STEPS", help="compare losses over so many steps instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--only", type=contender, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.shortest is not None and not 1 <= options.shortest <= options.length:
        parser.error(f"--shortest must be 1 to {options.length}, the --length, got {options.shortest}")
    if options.dropout and options.trajectory:
        parser.error("losses are compared without --dropout, whose draws would differ")
    if options.trajectory and len(options.outer_steps) > 1:
        parser.error("losses are compared for one of --outer-steps")
    if options.trajectory and options.contenders[-1] == "trainer":
        parser.error("losses are compared with those of kif, the Trainer makes no rounds")
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
    turns: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in options.contenders}
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
            found: dict[str, dict[str, Any]] = {}
            for known, results in turns.items():
                for i, outer_steps in enumerate(options.outer_steps if results else []):
                    label = known if len(options.outer_steps) == 1 else f"{known} M={outer_steps}"
                    found[label] = _merged([result[i] for result in results])
                if known in errors:
                    found[known] = found.get(known, {}) | errors[known]
            yield found


def _merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The result in the middle, with the rounds of all of them."""
    middle = sorted(results, key=lambda result: result["median_ms"])[len(results) // 2]
    rounds = [ms for result in results for ms in result["round_ms"]]
    median = statistics.median(rounds)
    rate = middle["tokens_per_second"] * middle["median_ms"] / median
    return {**middle, "round_ms": rounds, "median_ms": median, "tokens_per_second": rate}


def _peak(device: torch.device) -> int:
    from kif.training import peak_memory

    return peak_memory(device)


if __name__ == "__main__":
    raise SystemExit(main())
