"""How much memory a base model takes, quantised or not, with adapter and arena, at rest and in training.

    python -m benchmarks.memory --model FOLDER --json FILE
    python -m benchmarks.memory --shape llama2-7b --forms bf16 int8 nf4 --device cuda --rows 8 --length 512

With --shape a model of that shape (`benchmarks.models.MODELS`) with random weights in bf16 is written to a
temporary folder first, 13 GB for llama2-7b. Each form is loaded as `kif train` loads it, and trained for a round of
Recurrent-KIF on rows of random tokens, in a process of its own, so that its peak is its own. On a CPU the last four
columns are the process's resident memory, the interpreter and its libraries included (`before`), and a fp32 model may
lie in its file until it is read; on a GPU they are torch's allocations.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import _version, environment, write_json
from benchmarks.models import MODELS, random_base
from kif.config import KIFConfig, RunConfig
from kif.engine import RecurrentKIF
from kif.families import Encoded, LanguageModel

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "bf16", "quantization": "int8"},
    "nf4": {"precision": "bf16", "quantization": "nf4"},
    "fp4": {"precision": "bf16", "quantization": "fp4"},
}
"""Settings of RunConfig by the name in the table. What is not quantised is bf16."""

FILE = "2GB"
"""The most that one file of random weights holds."""
TARGET = 8
"""Tokens of a label."""

PARTS = ("base", "adapter", "arena")
PEAKS = ("before", "loaded", "loading", "training")


class Peak:
    """Bytes in use now and at most since the last `restart`: of the process on a CPU, of torch's allocator on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def restart(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # the peak then counts from the start of the process
                Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> int:
        gc.collect()
        if not self.cuda and sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
                ctypes.CDLL("libc.so.6").malloc_trim(0)
        return torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")

    def highest(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status; where there is none, the highest ever."""
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def frozen_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of all that is not trained, by dtype: parameters, buffers, and the scales of quantised weights."""
    sizes: Counter[str] = Counter()
    seen = set()
    for tensor in (*model.parameters(), *model.buffers(), *(s for module in model.modules() for s in _scales(module))):
        if not tensor.requires_grad and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return dict(sizes)


def _scales(module: Any) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside the quantised weight of a layer."""
    weight = vars(module).get("_parameters", {}).get("weight")
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (part for part in (state.absmax, state.code, getattr(state, "offset", None)) if part is not None)
        state = getattr(state, "state2", None)
    # an 8-bit layer takes its scales from the weight when it first runs
    for owner in (weight, vars(module).get("state")):
        if getattr(owner, "SCB", None) is not None:
            yield owner.SCB


def rows_of(lm: LanguageModel, count: int, length: int) -> list[Encoded]:
    """Rows of random tokens, all of one length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(lm.tokenizer), (count, length), generator=generator).tolist()
    targets = [tuple(row[-TARGET:]) if lm.family != "encoder" else (0,) for row in ids]
    return [Encoded(tuple(row), target, "random", False) for row, target in zip(ids, targets, strict=True)]


def measure(model: str, form: str, device: str, rows: int, length: int) -> dict[str, Any]:
    """One form in this process: bytes of its parts and peaks, and the mean loss of the first step."""
    from kif.models import load_language_model, resolve_device

    for package in ("transformers", "peft", *(["bitsandbytes"] if "quantization" in FORMS[form] else [])):
        importlib.import_module(package)  # so that they count before the model
    peak = Peak(resolve_device(device))
    before = peak.now()
    peak.restart()
    config = RunConfig(model=model, device=device, max_length=length, max_target_length=TARGET, **FORMS[form])
    lm = load_language_model(config, {"random": ("one", "two")})
    loading, loaded = peak.highest(), peak.now()
    engine = RecurrentKIF.of(lm.model, KIFConfig(inner_steps=2, outer_steps=1))
    peak.restart()
    lm.model.train()
    losses = []
    for step in ("inner_step", "inner_step", "outer_step"):
        loss, count = lm.loss(lm.collate(rows_of(lm, rows, length)))
        (loss / count).backward()
        losses.append(float(loss.detach()) / count)
        getattr(engine, step)(1e-4)
    engine.fuse()
    arena = engine.arena
    flat = {"data": arena.data, "grad": arena.grad, **arena.buffers}
    by_dtype = frozen_bytes(lm.model)
    return {
        "form": form,
        "base": sum(by_dtype.values()),
        "base_by_dtype": by_dtype,
        "adapter": 4 * arena.numel,
        "arena": sum(buffer.numel() * buffer.element_size() for buffer in flat.values()),
        "arena_buffers": list(flat),
        "before": before,
        "loading": loading,
        "loaded": loaded,
        "training": peak.highest(),
        "first_loss": losses[0],
    }


def write_random(shape: str, folder: Path, device: torch.device) -> None:
    """Write a model of random weights in bf16, and a tokenizer that knows as many words as the model has tokens.

    A file at a time: not all of the model has to fit into memory. Matrices are normal with deviation 0.02, all else 1.
    """
    import transformers
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    base = random_base(shape, torch.device("meta"), torch.bfloat16, eos_token_id=1)
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(folder)
    # weights that are tied are named once
    named = dict(base.named_parameters())
    files = split_torch_state_dict_into_shards(named, max_shard_size=FILE)
    for file, names in files.filename_to_tensors.items():
        made = {name: torch.ones_like(named[name], device=device) for name in names}
        for tensor in made.values():
            if tensor.dim() > 1:
                tensor.normal_(0.0, 0.02)
        save_file(made, folder / file, {"format": "pt"})
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(base.config.vocab_size)}, unk_token="<2>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<0>", eos_token="<1>", unk_token="<2>"
    ).save_pretrained(folder)


HEADER = "| | " + " | ".join((*PARTS, *PEAKS)) + " |\n" + "|---" * (1 + len(PARTS) + len(PEAKS)) + "|"
"""Of the table, in Markdown."""


def line(result: dict[str, Any]) -> str:
    """A form's line of the table, in MiB."""
    cells = [f"{result[name] / 2**20:.1f}" for name in (*PARTS, *PEAKS)]
    return f"| {result['form']} | " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder or hub name of the base model")
    which.add_argument("--shape", choices=list(MODELS), help="a model of random weights instead")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["fp32", "bf16", "int8", "nf4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--here", action="store_true", help="measure the one form in this process and print it")
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(measure(args.model, args.forms[0], args.device, args.rows, args.length)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if args.shape is not None:
            write_random(args.shape, Path(folder), torch.device(args.device))
            args.model = folder
        return _in_turn(args)


def _in_turn(args: argparse.Namespace) -> int:
    """Each form in a process of its own; one that fails costs no other. Returns the exit status."""
    versions = {name: _version(name) for name in ("transformers", "peft", "bitsandbytes")}
    results: list[dict[str, Any]] = []
    content = {
        "environment": {**environment(torch.device(args.device)), **versions},
        "model": args.shape or Path(args.model).name,
        "rows": args.rows,
        "length": args.length,
        "results": results,
    }
    shared = ["--model", args.model, "--device", args.device, "--rows", str(args.rows), "--length", str(args.length)]
    failed = []
    print(HEADER, flush=True)
    for form in args.forms:
        command = [sys.executable, "-m", "benchmarks.memory", "--here", "--forms", form, *shared]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(f"{form} (status {done.returncode})")
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(line(results[-1]), flush=True)
        if args.json is not None:
            # the time allowed may end with the next one
            write_json(args.json, content)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
