"""The systems of Table 1 behind one interface."""

from __future__ import annotations

from kif.methods.base import Method, SingleAdapterMethod
from kif.methods.lora_replay import LoRAReplay
from kif.methods.mtl import MTL
from kif.methods.recurrent_kif import RecurrentKIFMethod
from kif.methods.seqlora import SeqLoRA

METHODS: dict[str, type[Method]] = {method.name: method for method in (RecurrentKIFMethod, SeqLoRA, LoRAReplay, MTL)}
"""Every method by its name on the command line."""

__all__ = ["METHODS", "MTL", "LoRAReplay", "Method", "RecurrentKIFMethod", "SeqLoRA", "SingleAdapterMethod"]
