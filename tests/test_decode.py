"""The benchmark of short answers: both caches write the same tokens, as many as were asked for; ranking both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import decode, models


@pytest.mark.parametrize("model", ["tiny-t5", "tiny-llama"])
def test_both_caches_answer_and_both_ways_rank_alike(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[str] = []
    monkeypatch.setattr(decode, "fit_layers", lambda base, device: fitted.append(device.type))
    target = tmp_path / "new" / "decode.json"
    options = ["--model", model, "--length", "8", "--batch", "2", "--tokens", "3", "--repeats", "1", "--device", "cpu"]
    assert decode.main([*options, "--json", str(target)]) == 0
    document = json.loads(target.read_text())
    assert fitted == ["cpu"]
    assert set(document["ways"]) == set(decode.WAYS) and document["settings"]["tokens"] == 3
    for row in document["ways"].values():
        assert row["equal"] == 1.0 and row["one_ms"] > 0 and row["all_ms"] > 0 and row["first_ms"] > 0
    ranking = document["ranking"]
    assert ranking["difference"] < 1e-3
    assert ranking["beside_ms"] > 0 and ranking["repeated_ms"] > 0
    printed = capsys.readouterr().out
    assert "static" in printed and "14 labels ranked" in printed


def test_answers_are_the_models_own() -> None:
    lm = models.build("tiny-llama", torch.device("cpu"), torch.float32)
    lm.model.eval()
    batch = lm.prompts(models.rows_of(2, [8], 1))
    ids = batch["input_ids"]
    for _ in range(4):
        logits = lm.model(input_ids=ids).logits[:, -1]
        # an answer may not end before its time
        logits[:, 1] = -torch.inf
        ids = torch.cat([ids, logits.argmax(1, keepdim=True)], 1)
    with torch.no_grad():
        assert torch.equal(decode.generate(lm, batch, "static", 4), ids[:, -4:])
