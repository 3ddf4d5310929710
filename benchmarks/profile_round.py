"""One round of bookkeeping and nothing else, for a profiler.

    ncu ... python -m benchmarks.profile_round --elements 67108864

Two steps of each loop and a fusion on a flat buffer, twice; the second time is the one to read (the first compiles).
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from kif import KIFConfig, ParameterArena, RecurrentKIF


def main() -> None:
    """Run it on the GPU, or on the CPU where there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**26)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(args.elements, device=device))
    engine = RecurrentKIF(ParameterArena([("weight", parameter)]), KIFConfig(inner_steps=2, outer_steps=2))
    for _ in range(2):
        for step in (engine.inner_step, engine.inner_step, engine.outer_step, engine.outer_step):
            engine.arena.grad.normal_()
            step(lr=1e-3)
        engine.fuse()
    print(f"kept {[count / (engine.rounds * args.elements) for count in engine.kept.tolist()]} of {args.elements}")


if __name__ == "__main__":
    main()
