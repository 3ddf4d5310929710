"""torch's attention, forward and backward, by its own kernels and by cuDNN's: time, error against float64, dropout.

    python -m benchmarks.attention --json FILE

Three cases, in bf16: `t5`, scores as they are, plus a position bias in which padding is hidden, as T5's encoder has it
here (`kif.attention.mask_position_bias_once`), with its dropout where time is measured; `cross`, the same of 64 tokens
over as many as there are, as of a long label in T5's decoder; `causal`, without a mask, as decoders have it. `low` is
added to all scores: attention does not depend on it, but from -89 on what takes exp of minus a row's log-sum overflows
(pytorch issue 196678: cuDNN's gradient with a mask, at widths of 64 more than a multiple of 128). `kept` is the mean of
the result where all values are 1, which is 1 unless dropout is of another share than asked for (pytorch pull request
174245: cuDNN's has sixteenths). On a CPU the plain implementation stands for cuDNN's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from benchmarks.machine import environment, synchronize, write_json

CASES = {"t5": (16, 64), "cross": (16, 64), "causal": (32, 128)}
"""Heads, and numbers of each: those of T5-large and LLaMA-2 7B."""
LABEL = 64
"""Queries of `cross`."""
DROPOUT = 0.1
"""T5's."""
WIDTHS = (64, 72, 128, 192, 320, 448, 512, 520)
OWN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def inputs(case: str, rows: int, width: int, low: float, device: torch.device) -> tuple[list[Tensor], dict[str, Any]]:
    """[query, key, value, gradient of the result], all bf16, and the options of torch's attention."""
    heads, size = CASES[case]
    generator = torch.Generator(device).manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    queries = LABEL if case == "cross" else width
    query, gradient = (normal(rows, heads, queries, size) for _ in range(2))
    key, value = (normal(rows, heads, width, size) for _ in range(2))
    if case == "causal":
        # scores are divided by the root of `size`; spread over all numbers, or gradients would cancel out of them
        query, key = query + 4.0, key + low / (4.0 * size**0.5)
        options: dict[str, Any] = {"is_causal": True}
    else:
        query = query / size**0.5
        # rows of all lengths, none of which sees nothing
        lengths = torch.linspace(width, max(1, width // 8), rows, device=device).long()
        seen = torch.arange(width, device=device) < lengths[:, None]
        bias = torch.where(seen[:, None, None], normal(1, heads, queries, width) + low, torch.finfo(torch.bfloat16).min)
        options = {"attn_mask": bias.bfloat16(), "scale": 1.0}
    return [tensor.bfloat16() for tensor in (query, key, value, gradient)], options


def passes(tensors: Sequence[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """The result and the gradients of query, key and value."""
    *given, gradient = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    result = F.scaled_dot_product_attention(*leaves, **options)
    return [result.detach(), *torch.autograd.grad(result, leaves, gradient)]


def kept(tensors: Sequence[Tensor], options: dict[str, Any]) -> float:
    """The mean of what is left of each row's attention, and scaled up, by dropout."""
    query, key, value, _ = tensors
    result = F.scaled_dot_product_attention(query, key, torch.ones_like(value), **options)
    return result.mean(dtype=torch.float64).item()


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """The largest error of each tensor, as a share of the largest exact number; NaN where a number is none."""
    names = ("result", "query", "key", "value")
    return {
        name: float((a.double() - b).abs().max() / b.abs().max())
        for name, a, b in zip(names, found, exact, strict=True)
    }


def measure(case: str, rows: int, width: int, low: float, device: torch.device, seconds: float) -> dict[str, Any]:
    """For each implementation its errors, milliseconds, and those of its first run, or why it refuses the case."""
    tensors, options = inputs(case, rows, width, low, device)
    double = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    with sdpa_kernel(SDPBackend.MATH):
        exact = passes([tensor.double() for tensor in tensors], double)
    timed = {**options, "dropout_p": 0.0 if case == "causal" else DROPOUT}
    ways = {"own": OWN, "cudnn": [SDPBackend.CUDNN_ATTENTION]}
    if device.type == "cpu":
        # its own kernels have no dropout there
        ways = {"own": [*OWN, SDPBackend.MATH], "plain": [SDPBackend.MATH]}
    found: dict[str, Any] = {"case": case, "rows": rows, "width": width, "low": low}
    for name, kernels in ways.items():
        try:
            with sdpa_kernel(kernels):
                synchronize(device)
                begun = time.perf_counter()
                first = passes(tensors, options)
                synchronize(device)
                first_ms = (time.perf_counter() - begun) * 1e3
                error = errors(first, exact)
                timer = Timer("passes(tensors, timed)", globals={"passes": passes, "tensors": tensors, "timed": timed})
                ms = timer.blocked_autorange(min_run_time=seconds).median * 1e3
                found[name] = {"error": error, "first_ms": first_ms, "ms": ms, "kept": kept(tensors, timed)}
        except RuntimeError as refusal:
            found[name] = {"refused": str(refusal)}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--low", type=float, nargs="+", default=[0.0, -128.0])
    parser.add_argument("--seconds", type=float, default=0.1, help="to measure an implementation for")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    document: dict[str, Any] = {"environment": environment(device), "cases": []}
    for case in CASES:
        for low in options.low:
            for width in options.widths:
                found = measure(case, options.rows, width, low, device, options.seconds)
                document["cases"].append(found)
                print(line(found))
                if options.json:
                    # the time allowed may end with the next one
                    write_json(options.json, document)
    return 0


def line(found: dict[str, Any]) -> str:
    """A case for people."""
    text = f"{found['case']:8}{found['width']:6}{found['low']:8.0f}"
    for name, way in found.items():
        if not isinstance(way, dict):
            continue
        if "refused" in way:
            text += f"   {name} refused"
        else:
            worst = max(way["error"].values(), key=lambda error: (isnan(error), error))
            text += (
                f"   {name} {way['ms']:9.3f} ms, first {way['first_ms']:.0f}, error {worst:.1e}, kept {way['kept']:.4f}"
            )
    return text


if __name__ == "__main__":
    raise SystemExit(main())
