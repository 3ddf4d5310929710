"""Short greedy answers, timed, with the growing key-value cache that kif uses and with a static one; labels, ranked.

    python -m benchmarks.decode --model t5-large --json FILE

A static cache lets transformers compile a decoding step (on a GPU it does), which takes its time first. Answers of a
classification task are a few tokens long, so what could be saved is all but the `one token` column, the prompt's own
pass. Labels are ranked side by side, as kif does, and with the prompt's part repeated for each. Weights are random, as
in `benchmarks.train_step`; both ways take turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import environment, synchronize, write_json
from benchmarks.models import MODELS, build, rows_of
from kif.families import Encoded, LanguageModel
from kif.layers import fit_layers

WAYS = ("growing", "static")
RANKINGS = {"beside": True, "repeated": False}


def generate(lm: LanguageModel, batch: dict[str, Tensor], way: str, tokens: int) -> Tensor:
    """Exactly so many greedy tokens for each row; the new ones."""
    settings = lm._greedy(tokens)  # type: ignore[attr-defined]
    settings.min_new_tokens = tokens
    if way == "static":
        settings.cache_implementation = "static"
    found: Tensor = lm.model.generate(**batch, generation_config=settings)
    return found[:, -tokens:]


@torch.no_grad()
def measure(
    lm: LanguageModel, batch: dict[str, Tensor], tokens: int, repeats: int
) -> Iterator[dict[str, dict[str, Any]]]:
    """For each way ms of answers of one token and of all, medians, and of the first answers, which compile.

    The growing cache alone comes first: the time allowed may end while the other is compiled.
    """
    answers, first = {}, {}
    for ways in (WAYS[:1], WAYS):
        for way in ways:
            if way not in answers:
                answers[way], first[way] = _timed(lm, batch, way, tokens)
                _timed(lm, batch, way, 1)
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way in ways:
                times[way].append((_timed(lm, batch, way, 1)[1], _timed(lm, batch, way, tokens)[1]))
        yield {
            way: {
                "first_ms": first[way],
                "one_ms": statistics.median(one for one, _ in times[way]),
                "all_ms": statistics.median(total for _, total in times[way]),
                # bf16 sums in another order may choose another token
                "equal": float((answers[way] == answers["growing"]).float().mean()),
            }
            for way in ways
        }


@torch.no_grad()
def rank(lm: LanguageModel, rows: Sequence[Encoded], labels: int, tokens: int, repeats: int) -> dict[str, float]:
    """Ms of each way of ranking so many labels of so many tokens, medians, and how far scores are from each other."""
    generator = torch.Generator().manual_seed(2)
    candidates = torch.randint(2, 30000, (labels, tokens - 1), generator=generator).tolist()
    times: dict[str, list[float]] = {way: [] for way in RANKINGS}
    scores = {}
    for repeat in range(repeats + 1):
        for way, beside in RANKINGS.items():
            lm._ranks_beside = beside  # type: ignore[attr-defined]
            synchronize(lm.device)
            begun = time.perf_counter()
            scores[way] = lm._rank(rows, [(*ids, 1) for ids in candidates])  # type: ignore[attr-defined]
            synchronize(lm.device)
            # the first time warms up
            if repeat:
                times[way].append((time.perf_counter() - begun) * 1e3)
    difference = (scores["beside"] - scores["repeated"]).abs().max().item()
    return {**{f"{way}_ms": statistics.median(all_) for way, all_ in times.items()}, "difference": difference}


def _timed(lm: LanguageModel, batch: dict[str, Tensor], way: str, tokens: int) -> tuple[Tensor, float]:
    synchronize(lm.device)
    begun = time.perf_counter()
    answers = generate(lm, batch, way, tokens)
    synchronize(lm.device)
    return answers, (time.perf_counter() - begun) * 1e3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="tiny-t5")
    parser.add_argument("--batch", type=int, default=32, help="rows answered at once")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=4, help="tokens of an answer")
    parser.add_argument("--labels", type=int, default=14, help="labels to be ranked, of as many tokens as an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    lm = build(options.model, device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    # as when `kif` loads a model
    fit_layers(lm.base, device)
    lm.model.eval()
    rows = rows_of(options.batch, [options.length], 1)
    batch = lm.prompts(rows)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    ranking = rank(lm, rows, options.labels, options.tokens, options.repeats)
    document = {"settings": settings, "environment": environment(device), "ranking": ranking}
    for ways in measure(lm, batch, options.tokens, options.repeats):
        if options.json:
            write_json(options.json, {**document, "ways": ways})
    print(f"{'cache':10}{'one token, ms':>15}{'all, ms':>10}{'first, ms':>11}{'equal':>8}")
    for way, row in ways.items():
        print(f"{way:10}{row['one_ms']:15.1f}{row['all_ms']:10.1f}{row['first_ms']:11.0f}{row['equal']:8.2f}")
    print(f"{options.labels} labels ranked, ms: " + ", ".join(f"{way} {ranking[f'{way}_ms']:.1f}" for way in RANKINGS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
