"""Recurrent-KIF in a PyTorch loop of one's own: two tasks one after the other, on a model made on the spot.

python examples/custom_loop.py
python examples/custom_loop.py --memory 0          # without replay memory: the first task is forgotten
python examples/custom_loop.py --model FOLDER      # LoRA on a Llama-like model
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from toy_tasks import TASKS, accuracy, load, rows
from transformers import DataCollatorForSeq2Seq

from kif import KIFConfig, RecurrentKIF


def batches(data: list[Any], collator: Any, device: Any, size: int = 16) -> Iterator[Any]:
    """Padded batches, epoch after epoch in a new order."""
    draw = random.Random(0)
    while data:
        order = draw.sample(data, len(data))
        for start in range(0, len(order), size):
            yield collator(order[start : start + size]).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Llama-like model")
    parser.add_argument("--memory", type=float, default=0.1, help="share of a task's rows that is kept")
    parser.add_argument("--rounds", type=int, default=12, help="rounds a task")
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    collator = DataCollatorForSeq2Seq(tokenizer)
    config = KIFConfig(inner_steps=8, outer_steps=4)
    engine = RecurrentKIF.of(model, config)
    memory: list[Any] = []
    seen: list[str] = []
    for task in TASKS:
        data = rows(tokenizer, task, 400, seed=0)
        new, replay = batches(data, collator, model.device), batches(memory, collator, model.device)
        engine.begin_task()
        for _ in range(args.rounds):
            for batch in islice(new, config.inner_steps):
                model(**batch).loss.backward()
                engine.inner_step(args.lr) if memory else engine.plain_step(args.lr)
            for batch in islice(replay, config.outer_steps):
                model(**batch).loss.backward()
                engine.outer_step(args.lr)
            if memory:
                engine.fuse()
        memory += random.Random(task).sample(data, int(args.memory * len(data)))
        seen.append(task)
        scores = (f"{name} {accuracy(model, collator, rows(tokenizer, name, 200, seed=1)):.1f}%" for name in seen)
        print(f"after {task}: {', '.join(scores)}")


if __name__ == "__main__":
    main()
