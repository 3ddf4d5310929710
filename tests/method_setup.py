"""What the tests of the methods share: two tasks, a method on a tiny model, one task of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import sentiment_task, topic_task

from kif.config import RunConfig
from kif.families import Encoded
from kif.loop import train_phase
from kif.methods import METHODS, Method
from kif.models import load_language_model

KINDS = ("t5", "llama", "bert")
TASKS = (topic_task(12), sentiment_task())


def start(tiny_models: dict[str, Path], name: str, kind: str = "t5", **options: Any) -> tuple[Any, list[list[Encoded]]]:
    """The method on a tiny model, and the rows of two tasks."""
    values = {"lora_dropout": 0.0, "batch_size": 4, "lr": 1e-2, "steps_per_task": 4, "warmup_steps": 0, **options}
    config = RunConfig(model=str(tiny_models[kind]), method=name, **values)
    adapter = METHODS[name].adapter_config(config, len(TASKS))
    lm = load_language_model(adapter, {task.name: task.labels for task in TASKS})
    return METHODS[name](lm, config), [lm.encode(task, task.train) for task in TASKS]


def train_task(method: Method, index: int, rows: list[Encoded], memory: list[Encoded] | None = None) -> None:
    torch.manual_seed(index)
    train_phase(
        method.lm, method, method.config, index=index, tasks=1, rows=rows, memory=memory or [], log=lambda record: None
    )
