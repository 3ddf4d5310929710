"""The benchmark of attention: its cases are what it says, and what is wrong shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import attention

CPU = torch.device("cpu")


def scores(case: str, low: float) -> torch.Tensor:
    (query, key, _, _), options = attention.inputs(case, 2, 24, low, CPU)
    scale = options.get("scale", query.size(-1) ** -0.5)
    return query.double() @ key.double().mT * scale + options.get("attn_mask", torch.zeros(())).double()


def test_cases_are_measured_and_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "attention.json"
    options = ["--rows", "2", "--widths", "9", "16", "--seconds", "0.001", "--device", "cpu", "--json", str(path)]
    torch.manual_seed(0)
    assert attention.main(options) == 0
    document = json.loads(path.read_text())
    assert document["environment"]["torch"] == torch.__version__
    found = document["cases"]
    assert [(row["case"], row["low"], row["width"]) for row in found] == [
        (case, low, width) for case in attention.CASES for low in (0.0, -128.0) for width in (9, 16)
    ]
    for row in found:
        for way in ("own", "plain"):
            assert (
                row[way]["ms"] > 0
                and row[way]["first_ms"] > 0
                and set(row[way]["error"]) == {"result", "query", "key", "value"}
            )
            assert all(0 < error < 0.03 for error in row[way]["error"].values())
            kept = row[way]["kept"]
            assert kept == pytest.approx(1, abs=0.05)
            assert (kept == pytest.approx(1, abs=1e-5)) == (row["case"] == "causal")
    assert len(capsys.readouterr().out.splitlines()) == len(found)


@pytest.mark.parametrize(("dropped", "expected"), [(0.1, 1.0), (0.125, 0.875 / 0.9), (0.0625, 0.9375 / 0.9)])
def test_another_share_of_dropout_shows(dropped: float, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = F.scaled_dot_product_attention

    def rounding(*args: torch.Tensor, dropout_p: float, **options: Any) -> torch.Tensor:
        # scaled up as for the share that was asked for
        return attend(*args, dropout_p=dropped, **options) * (1 - dropped) / (1 - dropout_p)

    monkeypatch.setattr(F, "scaled_dot_product_attention", rounding)
    torch.manual_seed(0)
    tensors, options = attention.inputs("t5", 8, 64, 0.0, CPU)
    assert attention.kept(tensors, {**options, "dropout_p": 0.1}) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("case", list(attention.CASES))
def test_low_is_what_is_added_to_all_scores(case: str) -> None:
    plain, low = scores(case, 0.0), scores(case, -128.0)
    hidden = plain < -1e30
    assert 0.5 < plain[~hidden].std() < 5
    assert bool(hidden.any()) == (case != "causal") and not hidden.all(-1).any()
    assert hidden.equal(low < -1e30)
    # bf16 has eight bits
    assert (low - plain)[~hidden].median().item() == pytest.approx(-128, abs=2)
    assert (low[~hidden].logsumexp(-1) if case != "causal" else low.logsumexp(-1)).max() < -89


def test_what_is_no_number_or_refused_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = F.scaled_dot_product_attention

    def broken(query: torch.Tensor, *args: torch.Tensor, **options: object) -> torch.Tensor:
        result = attend(query, *args, **options)  # type: ignore[arg-type]
        return result if query.dtype == torch.float64 else result * float("nan")

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    found = attention.measure("causal", 1, 8, 0.0, CPU, 0.001)
    assert attention.line(found).count("error nan") == 2

    def refusing(query: torch.Tensor, *args: torch.Tensor, **options: object) -> torch.Tensor:
        if query.dtype != torch.float64:
            raise RuntimeError("no kernel for it")
        return broken(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", refusing)
    found = attention.measure("causal", 1, 8, 0.0, CPU, 0.001)
    assert found["own"] == {"refused": "no kernel for it"} and attention.line(found).count("refused") == 2
