"""Recurrent-KIF with transformers' Trainer: two tasks one after the other, on a model made on the spot.

    python examples/trainer.py
    python examples/trainer.py --memory 0 --max_steps 96
    python examples/trainer.py --model FOLDER --output_dir runs/mine --kif released-code --report_to tensorboard

Every option of TrainingArguments works, and `--kif` with a preset's name or JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from toy_tasks import TASKS, accuracy, load, rows
from transformers import DataCollatorForSeq2Seq, HfArgumentParser

from kif import KIFTrainer, KIFTrainingArguments


@dataclass
class Options:
    model: str | None = field(default=None, metadata={"help": "Folder of a Llama-like model."})
    memory: float = field(default=0.1, metadata={"help": "Share of a task's rows that is kept."})


@dataclass
class Arguments(KIFTrainingArguments):
    output_dir: str | None = "runs/trainer-example"
    max_steps: int = 96
    per_device_train_batch_size: int = 16
    learning_rate: float = 5e-3
    lr_scheduler_type: str = "constant"
    logging_steps: float = 16
    save_strategy: str = "no"
    kif: str | None = '{"outer_steps": 4}'


def main() -> None:
    options, args = HfArgumentParser([Options, Arguments]).parse_args_into_dataclasses()
    model, tokenizer = load(options.model)
    collator = DataCollatorForSeq2Seq(tokenizer)
    memory: Any = None
    seen: list[str] = []
    for task in TASKS:
        trainer = KIFTrainer(
            model=model,
            args=args,
            train_dataset=rows(tokenizer, task, 400, seed=0),
            memory_dataset=memory,
            data_collator=collator,
            processing_class=tokenizer,
        )
        trainer.train()
        if options.memory:
            memory = trainer.draw_memory(options.memory, name=task)
        seen.append(task)
        scores = (f"{name} {accuracy(model, collator, rows(tokenizer, name, 200, seed=1)):.1f}%" for name in seen)
        print(f"after {task}: {', '.join(scores)}")
    trainer.save_model()


if __name__ == "__main__":
    main()
