"""The benchmark of a whole round at tiny sizes: it measures what it says, and both ways train alike."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import rerun

from benchmarks import train_step
from kif import captured
from kif.attention import cudnn_where_safe, without_cudnn
from kif.captured import CapturedSteps
from kif.decoder import DecoderModel
from kif.families import Batch, Encoded, LanguageModel
from kif.seq2seq import EncoderDecoderModel

CONTENDERS = (
    "trainer", "per-tensor", "kif", "kif-checkpointing", "kif-graph", "kif-bf16", "kif-bf16-cudnn",
    "kif-bf16-cudnn-graph", "kif-bf16-compile-graph",
)  # fmt: skip
SMALL = ["--length=8", "--batch=2", "--rounds=2", "--inner-steps=2", "--outer-steps=1", "--device=cpu"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (model, name)
        for model in ("tiny-t5", "tiny-llama")
        for name in CONTENDERS
        # T5 is traced as Llama is, and takes much longer
        if not ("compile" in name and model == "tiny-t5")
    ],
)
def test_a_contender_is_measured(
    model: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # traced, not compiled to machine code, which takes half a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(train_step, "CapturedSteps", partial(CapturedSteps, record=rerun))
    if name == "trainer":
        pytest.importorskip("accelerate")
    precision = "bf16" if "bf16" in name else "fp32"
    assert train_step.main(["--model", model, *SMALL, "--precision", precision, "--only", name]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["round_ms"]) == 2 and min(found["round_ms"]) > 0
    # 3 steps of 2 rows, 8 + 8 tokens each
    assert found["tokens_per_second"] == pytest.approx(3 * 2 * 16 * 1e3 / found["median_ms"])
    assert found["peak_bytes"] > 2**20
    if name == "trainer":
        assert found["parts_ms"] == {} and "bookkeeping_share" not in found
        return
    assert 0 < found["last_loss"] < 20
    parts = {"data", "forward", "backward", "optimizer", "threshold", "fusion", "other"}
    assert set(found["parts_ms"]) == (parts - {"data", "forward"} if "graph" in name else parts)
    assert sum(found["parts_ms"].values()) == pytest.approx(sum(found["round_ms"]) / 2)
    assert min(found["parts_ms"].values()) >= 0 and 0 < found["bookkeeping_share"] < 100


@pytest.mark.parametrize("name", ["trainer", "kif"])
@pytest.mark.parametrize("model", ["tiny-t5", "tiny-llama"])
def test_rows_of_a_batch_may_differ_in_length(
    model: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "trainer":
        pytest.importorskip("accelerate")
    seen: list[list[int]] = []
    family = EncoderDecoderModel if model == "tiny-t5" else DecoderModel
    collate = family.collate

    def watched(self: LanguageModel, rows: Sequence[Encoded]) -> Batch:
        seen.append([len(row.input_ids) for row in rows])
        return collate(self, rows)

    monkeypatch.setattr(family, "collate", watched)
    options = ["--model", model, *SMALL, "--batch=3", "--shortest=3"]
    assert train_step.main([*options, "--only", name]) == 0
    assert len(seen) == 9 and all(lengths == [8, 6, 3] for lengths in seen)
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    # 3 steps of rows with 8, 6 and 3 tokens, 8 more each
    assert found["tokens_per_second"] == pytest.approx(3 * (16 + 14 + 11) * 1e3 / found["median_ms"])


@pytest.mark.parametrize("name", ["trainer", "kif-graph", "per-tensor"])
def test_rounds_of_several_m(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "trainer":
        pytest.importorskip("accelerate")
    monkeypatch.setattr(train_step, "CapturedSteps", partial(CapturedSteps, record=rerun))
    begun: list[int] = []
    engine = train_step.RecurrentKIF
    monkeypatch.setattr(
        train_step, "RecurrentKIF", lambda arena, config: begun.append(config.outer_steps) or engine(arena, config)
    )
    options = [*SMALL, "--outer-steps", "3", "1", "--profile", "--only", name]
    assert train_step.main(options) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert begun == ([3, 1, 3] if name == "kif-graph" else [])
    assert [len(result["round_ms"]) for result in found] == [2, 2]
    assert found[0]["round_ms"] != found[1]["round_ms"]
    for steps, result in zip((5, 3), found, strict=True):
        assert result["tokens_per_second"] == pytest.approx(steps * 2 * 16 * 1e3 / result["median_ms"])
    assert found[0]["profile"]["kernels"] and "profile" not in found[1]


def test_results_of_several_m_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if command[-1] == "per-tensor":
            return subprocess.CompletedProcess(command, 3, "", "no memory")
        results = [
            {"round_ms": [m], "median_ms": m, "tokens_per_second": 1.0, "parts_ms": {}, "peak_bytes": 1} for m in (8, 5)
        ]
        return subprocess.CompletedProcess(command, 0, f"said\n{json.dumps(results)}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    path = tmp_path / "result.json"
    options = ["--outer-steps", "4", "1", "--turns", "2", "--contenders", "kif", "per-tensor", "--json", str(path)]
    assert train_step.main([*SMALL, *options]) == 1
    found = json.loads(path.read_text())["contenders"]
    assert {name: row.get("round_ms") for name, row in found.items()} == {
        "kif M=4": [8, 8], "kif M=1": [5, 5], "per-tensor": None,
    }  # fmt: skip
    assert found["per-tensor"]["error"] == "status 3\nno memory"


@pytest.mark.parametrize("name", ["kif-graph-bf16", "kif-bf16-bf16", "kif-fast", "trainer-bf16", "bf16", ""])
def test_names_that_are_no_contenders(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.main([*SMALL, "--contenders", "kif-checkpointing-bf16-graph", name])
    assert (
        f"argument --contenders: no contender {name!r}: there are trainer, per-tensor, kif" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "launched", "recorded", "safe", "unsafe"),
    [
        ("trainer", True, False, True, False),
        ("kif-graph", False, False, True, False),
        ("kif-cudnn-graph", True, True, True, True),
        ("kif-own-graph", False, False, False, False),
    ],
)
def test_whose_attention_may_be_cudnns(
    name: str, launched: bool, recorded: bool, safe: bool, unsafe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(*args: Any, **options: Any) -> bool:
        return torch.backends.cuda.cudnn_sdp_enabled()

    def measured(options: argparse.Namespace) -> list[Any]:
        found: list[Any] = [attend()]
        with captured.without_cudnn():
            found.append(attend())
            with captured.cudnn_where_safe():
                for width in (72, 64):
                    x = torch.zeros(1, 1, width, 8)
                    found.append(F.scaled_dot_product_attention(x, x, x, torch.zeros(width, width)))
        return found

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(train_step, "_measure", measured)
    assert train_step.measure(argparse.Namespace(only=name)) == [launched, recorded, safe, unsafe]
    assert captured.without_cudnn is without_cudnn and captured.cudnn_where_safe is cudnn_where_safe
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("shortest", ["0", "9"])
def test_the_shortest_row_is_none_beyond_the_longest(shortest: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.main([*SMALL, "--shortest", shortest])
    assert f"--shortest must be 1 to 8, the --length, got {shortest}" in capsys.readouterr().err


def test_rows_have_their_lengths_in_turn() -> None:
    rows = train_step.rows_of(5, [8, 3], 1)
    assert [len(row.input_ids) for row in rows] == [8, 3, 8, 3, 8]
    assert {len(row.target) for row in rows} == {8} and len({row.target for row in rows}) == 5


@pytest.mark.parametrize("model", ["tiny-t5", "tiny-llama"])
def test_the_fast_path_trains_as_the_plain_one(model: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "trajectory.json"
    assert train_step.main(["--model", model, *SMALL, "--trajectory", "30", "--json", str(target)]) == 0
    document = json.loads(target.read_text())
    found = document["trajectory"]
    assert found["steps"] == 30 and found["largest_relative_difference"] < 1e-2
    assert found["first_loss"] != found["last_loss"]
    assert document["settings"]["model"] == model and document["environment"]["torch"]


def test_bf16_products_train_as_fp32_ones(tmp_path: Path) -> None:
    options = ["--precision", "bf16", "--contenders", "kif-bf16", "--json", str(tmp_path / "bf16.json")]
    assert train_step.main([*SMALL, "--trajectory", "12", *options]) == 0
    found = json.loads((tmp_path / "bf16.json").read_text())["trajectory"]
    assert found["contender"] == "kif-bf16" and 0 < found["largest_relative_difference"] < 0.05
    with pytest.raises(ValueError, match="kif-bf16 needs --precision bf16"):
        train_step.main([*SMALL, "--only", "kif-bf16"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--outer-steps", "4", "1"], "for one of --outer-steps"),
        (["--contenders", "kif", "trainer"], "makes no rounds"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_step.main([*SMALL, "--trajectory", "4", *options])
    assert message in capsys.readouterr().err


def test_losses_are_compared_with_each_ones_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, bool] = {}

    def losses(options: argparse.Namespace, name: str) -> list[float]:
        seen[name] = torch.backends.cuda.cudnn_sdp_enabled()
        return [1.0]

    monkeypatch.setattr(train_step, "_losses", losses)
    assert train_step.main([*SMALL, "--trajectory", "1", "--contenders", "kif-cudnn"]) == 0
    assert seen == {"per-tensor": False, "kif-cudnn": True}


def test_dropout_is_that_of_the_paper() -> None:
    found = {}
    for dropout in (False, True):
        lm = train_step.build("tiny-t5", torch.device("cpu"), torch.float32, dropout)
        found[dropout] = {m.p for name, m in lm.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    # without, the adapter has no such layer
    assert found == {False: {0.0}, True: {0.05, 0.1}}
    with pytest.raises(SystemExit):
        train_step.main([*SMALL, "--dropout", "--trajectory", "4"])


def test_contenders_take_turns_in_processes_of_which_one_may_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    names = ["kif-bf16", "kif"]
    assert train_step.main([*SMALL, "--turns", "2", "--contenders", *names, "--json", str(path)]) == 1
    found = json.loads(path.read_text())["contenders"]
    assert list(found) == names and "kif-bf16 needs --precision bf16" in found["kif-bf16"]["error"]
    assert found["kif-bf16"]["error"].startswith("status 1\n")
    row = found["kif"]
    assert len(row["round_ms"]) == 4 and row["median_ms"] == pytest.approx(statistics.median(row["round_ms"]))
    assert row["tokens_per_second"] == pytest.approx(3 * 2 * 16 * 1e3 / row["median_ms"])
    printed = capsys.readouterr()
    assert "kif-bf16 failed:" in printed.err and re.search(r"^kif-bf16 +failed$", printed.out, re.M)
    assert re.search(rf"^kif +{row['median_ms']:.1f} ", printed.out, re.M)
    # the others alone are no failure
    monkeypatch.setattr(train_step, "_in_turns", lambda *_: iter([{"kif": row}]))
    assert train_step.main([*SMALL, "--contenders", "kif"]) == 0
