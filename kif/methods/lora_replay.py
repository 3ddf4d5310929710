"""LoRAReplay: new rows and memory rows shuffled together."""

from __future__ import annotations

from collections.abc import Sequence

from kif.families import Encoded
from kif.methods.base import SingleAdapterMethod


class LoRAReplay(SingleAdapterMethod):
    """SeqLoRA on D_k united with M_<k; each row, new or remembered, is seen once an epoch."""

    name = "lora-replay"
    summary = "one LoRA adapter trained on new rows and replay memory shuffled together"
    source = "baseline (3) of section 4"
    plain_passes = True
    unused = ("outer_lr", "outer_batch_size")

    def training_rows(self, rows: Sequence[Encoded], memory: Sequence[Encoded]) -> list[Encoded]:
        return [*rows, *memory]
