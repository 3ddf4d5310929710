"""Scoring all tasks of an order, timed: to the end and in file order, as kif does it, and by ranking the labels.

    python -m benchmarks.evaluation --model FOLDER --data FOLDER --order 4 --rows 16 --json FILE [--run RUN]

Ways: `plain`, greedy answers of at most --max-new-tokens in batches in file order, as a loop over `generate` has them;
`kif`, the same answers with rows sorted by length, where an answer ends as soon as it can match no label; `rank`, the
label with the highest likelihood, with the prompt run once. The ways take turns task by task, in one process. Each
task's scores by `plain` and `kif` must be equal. With --run the adapter of a finished run answers, else a new one,
which changes nothing in the base model.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import environment, write_json
from kif.config import RunConfig
from kif.evaluate import evaluate, mean_score
from kif.families import LanguageModel
from kif.models import load_language_model, resolve_device
from kif.run import prepare_tasks
from kif.tasks import Example, Task
from kif.training import eval_rows, model_name

WAYS = ("plain", "kif", "rank")


def plain(lm: LanguageModel, task: Task, rows: Sequence[Example], batch_size: int, max_new_tokens: int) -> float:
    """Score in percent of whole answers in batches in file order."""
    encoded = lm.encode(task, rows)
    answers = []
    for start in range(0, len(encoded), batch_size):
        answers += lm.answer(task, encoded[start : start + batch_size], "generate", max_new_tokens)
    return mean_score(task.metric, answers, [row.references for row in rows])


def measure(config: RunConfig, adapter: Path | None) -> dict[str, dict[str, Any]]:
    """For each task its rows, and by each way seconds and score. Raises: RuntimeError where scores differ."""
    tasks = prepare_tasks(config)
    lm = load_language_model(config, {task.name: task.labels for task in tasks}, adapter=adapter)
    lm.model.eval()
    lm.answer(tasks[0], lm.encode(tasks[0], eval_rows(config, tasks[0])[:1]), "generate", 2)  # to warm up
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        rows = eval_rows(config, task)
        row: dict[str, Any] = {"rows": len(rows)}
        for way in WAYS:
            begun = time.perf_counter()
            if way == "plain":
                score = plain(lm, task, rows, config.eval_batch_size, config.max_new_tokens)
            else:
                score = evaluate(
                    lm, task, rows, mode="rank" if way == "rank" else "generate", batch_size=config.eval_batch_size,
                    max_new_tokens=config.max_new_tokens,
                ).score  # fmt: skip
            row[way] = {"seconds": time.perf_counter() - begun, "score": score}
        if row["plain"]["score"] != row["kif"]["score"]:
            raise RuntimeError(f"{task.name}: {row['plain']['score']} by whole answers, {row['kif']['score']} by kif")
        found[task.name] = row
        print(f"{task.name:10}" + "".join(f"{way:>7} {row[way]['seconds']:6.1f} s" for way in WAYS), flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", default=os.environ.get("KIF_DATA"), help="task folder; default KIF_DATA")
    parser.add_argument("--order", default="4", help="name of a task order")
    parser.add_argument("--run", type=Path, help="finished run whose adapter answers")
    parser.add_argument("--rows", type=int, default=16, help="rows scored for each task")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512, help="longest prompt in tokens")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--template", help="prompt, with {input}; default: the task folder's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the base model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    options = parser.parse_args(arguments)
    config = RunConfig(
        model=options.model, data=options.data, order=options.order, template=options.template, device=options.device,
        precision=options.precision, max_length=options.max_length, limit_eval=options.rows,
        eval_batch_size=options.batch_size, max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
    tasks = measure(config, options.run / "adapter" if options.run else None)
    seconds = {way: sum(row[way]["seconds"] for row in tasks.values()) for way in WAYS}
    print("all tasks " + "".join(f"{way:>7} {seconds[way]:6.1f} s" for way in WAYS))
    if options.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        del settings["json"]
        settings.update(
            model=model_name(options.model), data=Path(options.data).name, run=options.run.name if options.run else None
        )
        found = environment(resolve_device(options.device))
        document = {"settings": settings, "environment": found, "seconds": seconds, "tasks": tasks}
        write_json(options.json, document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
