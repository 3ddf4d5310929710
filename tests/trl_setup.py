"""What tests of TRL's trainers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from kif.trainer import KIFArguments, KIFMixin


def with_rounds(method: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """TRL's trainer of a method ("SFT", "DPO", ...) with rounds, and the class of its arguments."""
    trl = pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")  # TRL counts its users, but not in tests
    trainer, config = getattr(trl, f"{method}Trainer"), getattr(trl, f"{method}Config")

    @dataclass
    class Arguments(KIFArguments, config):  # type: ignore[misc, valid-type]
        pass

    class Trainer(KIFMixin, trainer):  # type: ignore[misc, valid-type]
        pass

    return Trainer, Arguments


def supervised(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """TRL's SFTTrainer with rounds, and the class of its arguments."""
    return with_rounds("SFT", monkeypatch)
