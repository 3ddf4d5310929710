"""SeqLoRA: one adapter, task after task, nothing against forgetting."""

from __future__ import annotations

from kif.methods.base import SingleAdapterMethod


class SeqLoRA(SingleAdapterMethod):
    """Cross-entropy on the new task only, the same LoRA adapter continued over all tasks."""

    name = "seqlora"
    summary = "one LoRA adapter trained on task after task; forgets"
    source = "baseline (1) of section 4"
    plain_passes = True
    unused = ("outer_lr", "outer_batch_size", "memory_fraction", "memory_balanced")
