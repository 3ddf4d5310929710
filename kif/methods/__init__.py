"""The systems of Table 1 behind one interface."""

from __future__ import annotations

from kif.methods.base import Method, SingleAdapterMethod
from kif.methods.ewc import EWC
from kif.methods.inclora import IncLoRA
from kif.methods.l2p import L2P
from kif.methods.lfpt5 import LFPT5
from kif.methods.lora_replay import LoRAReplay
from kif.methods.migu import MIGU
from kif.methods.moelora import MoELoRA
from kif.methods.mtl import MTL
from kif.methods.olora import OLoRA
from kif.methods.recurrent_kif import RecurrentKIFMethod
from kif.methods.sapt import SAPT
from kif.methods.seqlora import SeqLoRA
from kif.methods.tasl import TaSL
from kif.methods.vrmcl import VRMCL

_ALL = (RecurrentKIFMethod, SeqLoRA, IncLoRA, LoRAReplay, EWC, OLoRA, MoELoRA, SAPT, TaSL, MIGU, VRMCL, L2P, LFPT5, MTL)

METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}
"""Every method by its name on the command line."""

ALIASES = {"kif": RecurrentKIFMethod.name, "replay": LoRAReplay.name}
"""Other names that a configuration may use."""

__all__ = [
    "ALIASES",
    "EWC",
    "L2P",
    "LFPT5",
    "METHODS",
    "MIGU",
    "MTL",
    "SAPT",
    "VRMCL",
    "IncLoRA",
    "LoRAReplay",
    "Method",
    "MoELoRA",
    "OLoRA",
    "RecurrentKIFMethod",
    "SeqLoRA",
    "SingleAdapterMethod",
    "TaSL",
]
