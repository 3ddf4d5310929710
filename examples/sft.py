"""Recurrent-KIF with TRL's SFTTrainer: two tasks of prompts and completions, on a Llama-like model made on the spot.

pip install "recurrent-kif[train,trl]"
python examples/sft.py
python examples/sft.py --memory 0
python examples/sft.py --model FOLDER --output_dir runs/mine --kif released-code
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from toy_tasks import TASKS, accuracy, load, rows, texts
from transformers import DataCollatorForSeq2Seq, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from kif import KIFArguments, KIFMixin


@dataclass
class Options:
    model: str | None = field(default=None, metadata={"help": "Folder of a Llama-like model."})
    memory: float = field(default=0.1, metadata={"help": "Share of a task's rows that is kept."})


@dataclass
class KIFSFTConfig(KIFArguments, SFTConfig):
    output_dir: str | None = "runs/sft-example"
    max_steps: int = 96
    per_device_train_batch_size: int = 16
    learning_rate: float = 5e-3
    lr_scheduler_type: str = "constant"
    logging_steps: float = 16
    save_strategy: str = "no"
    bf16: bool | None = False
    gradient_checkpointing: bool = False
    kif: str | None = '{"outer_steps": 4}'


class KIFSFTTrainer(KIFMixin, SFTTrainer):
    """SFTTrainer with rounds of inner steps on train_dataset and outer steps on memory_dataset."""


def main() -> None:
    options, args = HfArgumentParser([Options, KIFSFTConfig]).parse_args_into_dataclasses()
    model, tokenizer = load(options.model)
    memory: Any = None
    seen: list[str] = []
    for task in TASKS:
        pairs = texts(task, 400, seed=0)
        trainer = KIFSFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": text, "completion": " " + label} for text, label in pairs]),
            memory_dataset=memory,
            processing_class=tokenizer,
        )
        trainer.train()
        # these rows are tokenised already, as the memory must be
        if options.memory:
            memory = trainer.draw_memory(options.memory, name=task)
        seen.append(task)
        collator = DataCollatorForSeq2Seq(tokenizer)
        scores = (f"{name} {accuracy(model, collator, rows(tokenizer, name, 200, seed=1)):.1f}%" for name in seen)
        print(f"after {task}: {', '.join(scores)}")
    trainer.save_model()


if __name__ == "__main__":
    main()
