"""Accuracy of the streaming threshold on importances of real training.

    python -m benchmarks.threshold_error --data FOLDER --model FOLDER --output FILE [--order 1] [--steps 120]

Trains Recurrent-KIF on real text, keeps both importances at the end of every round, and selects their thresholds as
the engine does on a GPU: counted in a window around the last round's threshold, then refined where needed. Without a
GPU the kernels run in Triton's interpreter. The JSON has, for each side: rank error | #{I >= t} - k | / n of
the approximate selection, passes over the scores that selection needed after the counted one (approximate and exact),
and by how many nats the threshold moved from round to round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/proc/driver/nvidia/version") else "1")

import torch
from torch import Tensor

import kif_kernels as kk
from benchmarks.machine import environment
from kif.config import KIFConfig, RunConfig
from kif.methods import METHODS
from kif.methods.recurrent_kif import RecurrentKIFMethod
from kif.run import train

Round = tuple[int, Tensor, Tensor]
"""Task index, inner importance, outer importance, without padding."""


def record(config: RunConfig) -> list[Round]:
    """Train and return the importances of every fused round."""
    rounds: list[Round] = []

    class Recorder(RecurrentKIFMethod):
        index = 0

        def begin_task(self, index: int, memory: Any) -> None:
            self.index = index
            super().begin_task(index, memory)

        def end_round(self) -> None:
            if self._has_memory:
                flat = [
                    torch.cat([view.flatten() for _, view in self.arena.views(self.arena.buffer(name))]).cpu()
                    for name in ("importance_in", "importance_out")
                ]
                rounds.append((self.index, flat[0], flat[1]))
            super().end_round()

    original = METHODS["recurrent-kif"]
    METHODS["recurrent-kif"] = Recorder
    try:
        train(config)
    finally:
        METHODS["recurrent-kif"] = original
    return rounds


def measure(rounds: list[Round], density: float) -> dict[str, Any]:
    """Error, passes and drift of the selection over the recorded rounds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["KIF_BACKEND"] = "interpret"
    n = rounds[0][1].numel()
    k = kk.mask_size(density, n)
    out: dict[str, Any] = {"elements": n, "density": density, "rounds": len(rounds), "sides": {}}
    for side, name in enumerate(("inner", "outer")):
        approximate = kk.StreamingThreshold(density, n, exact=False, device=device)
        exact = kk.StreamingThreshold(density, n, device=device)
        errors: list[float] = []
        drifts: list[float] = []
        passes: dict[str, list[int]] = {"approximate": [], "exact": []}
        task, last = None, 0.0
        for index, *scores in rounds:
            x = scores[side].to(device)
            if index != task:
                approximate.reset()
                exact.reset()
                task, last = index, 0.0
            truth = float(scores[side].sort(descending=True).values[k - 1])
            for selection, kind in ((approximate, "approximate"), (exact, "exact")):
                before = int(selection.refinements)
                histogram, window = selection.histogram(0), selection.window(0)
                assert histogram is not None and window is not None
                torch.ops.kif.histogram_(histogram, window, x, None)
                threshold = selection.select((x,), counted=True)
                passes[kind].append(int(selection.refinements) - before)
                if kind == "exact" and float(threshold) != truth:
                    raise AssertionError(f"exact threshold {float(threshold)!r}, sorted {truth!r}")
                if kind == "approximate":
                    errors.append(abs(int((x >= threshold).sum()) - int((x >= truth).sum())) / n)
            if last > 0.0 and truth > 0.0:
                drifts.append(abs(math.log(truth / last)))
            last = truth
        out["sides"][name] = {
            "rank_error": {"mean": statistics.fmean(errors), "max": max(errors)},
            "passes_approximate": _histogram(passes["approximate"]),
            "passes_exact": _histogram(passes["exact"]),
            "drift_nats": {"median": statistics.median(drifts), "max": max(drifts)},
            "zero_thresholds": sum(1 for _, *s in rounds if float(s[side].sort(descending=True).values[k - 1]) == 0.0),
        }
    return out


def _histogram(values: list[int]) -> dict[str, int]:
    return {str(value): values.count(value) for value in sorted(set(values))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("KIF_DATA"), help="task folder; default KIF_DATA")
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--order", default="1", help="name of a task order")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps a task")
    parser.add_argument("--outer-steps", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lora-r", type=int, default=8)
    parser.add_argument("--targets", nargs="+", help="linear layers with an adapter; default query and value")
    parser.add_argument("--density", type=float, default=0.2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model=args.model,
            data=args.data,
            order=args.order,
            output=f"{folder}/run",
            steps_per_task=args.steps,
            limit_eval=8,
            max_length=64,
            lr=args.lr,
            lora_r=args.lora_r,
            target_modules=args.targets,
            warmup_steps=10,
            kif=KIFConfig(outer_steps=args.outer_steps, density=args.density),
        )
        rounds = record(config)
    result = {
        "environment": environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "settings": vars(args) | {"output": args.output.name},
    }
    # folders of this machine say nothing about the result
    result["settings"].update(model=Path(args.model).name, data=Path(args.data or "").name)
    result.update(measure(rounds, args.density))
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("elements", "rounds", "sides")}, indent=1))


if __name__ == "__main__":
    main()
