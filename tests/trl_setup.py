"""What tests of TRL's trainers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from kif.trainer import KIFArguments, KIFMixin


def supervised(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """TRL's SFTTrainer with rounds, and the class of its arguments."""
    trl = pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")  # TRL counts its users, but not in tests

    @dataclass
    class Arguments(KIFArguments, trl.SFTConfig):  # type: ignore[misc, name-defined]
        pass

    class Supervised(KIFMixin, trl.SFTTrainer):  # type: ignore[misc, name-defined]
        pass

    return Supervised, Arguments
