"""`kif predict`: the answers of a finished run to a file or standard input, and the line that stops it."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from kif.cli import main
from kif.config import RunConfig
from kif.evaluate import evaluate
from kif.predict import Predictor
from kif.run import evaluate_run, prepare_tasks, train
from kif.tasks import DataError

METHODS = [("recurrent-kif", "t5"), ("seqlora", "llama"), ("seqlora", "bert"), ("sapt", "t5"), ("l2p", "llama")]


class Runs:
    """Finished runs, each trained when it is first asked for."""

    def __init__(self, written: Path, models: dict[str, Path], folder: Path) -> None:
        self.written, self.models, self.folder = written, models, folder

    def config(self, method: str, kind: str, **options: Any) -> RunConfig:
        name = "-".join([method, kind, *map(str, options.values())])
        values = {"tasks": ["colours", "sizes"], "steps_per_task": 6, "lr": 1e-2, "max_length": 64, **options}
        return RunConfig(
            model=str(self.models[kind]), data=str(self.written), output=str(self.folder / name), method=method,
            max_new_tokens=4, device="cpu", cache_dir=str(self.folder / "cache"), **values,
        )  # fmt: skip

    def __call__(self, method: str, kind: str, **options: Any) -> Path:
        config = self.config(method, kind, **options)
        if not Path(config.output).exists():
            train(config, progress=False)
        return Path(config.output)


@pytest.fixture(scope="module")
def runs(written: Path, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(written, tiny_models, tmp_path_factory.mktemp("runs"))


def answers(text: str) -> list[str]:
    return [json.loads(line)["answer"] for line in text.splitlines()]


@pytest.mark.parametrize(("method", "kind"), METHODS)
@pytest.mark.parametrize("mode", ["generate", "rank"])
def test_answers_are_those_that_were_scored(
    runs: Runs, method: str, kind: str, mode: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(method, kind)
    scores = evaluate_run(run, progress=False, eval_mode=mode)["scores"]
    predictor = Predictor(run, "sizes", eval_mode=mode)
    task = prepare_tasks(runs.config(method, kind))[1]
    whole = evaluate(predictor.lm, task, task.test, mode=mode, batch_size=9, max_new_tokens=4, whole_answers=True)
    file = runs.written / "sizes" / "test.jsonl"
    capsys.readouterr()
    assert main(["predict", str(run), str(file), "--task", "sizes", "--eval-mode", mode, "--batch-size", "4"]) == 0
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    asked = [json.loads(line) for line in file.read_text().splitlines()]
    assert [{**row, "answer": None} for row in found] == [{**row, "answer": None} for row in asked]
    assert [row["answer"] for row in found] == whole.predictions and whole.score == scores[1]
    assert f"accuracy: {scores[1]:.1f}% over 9 lines with a label" in captured.err


def test_a_checkpoint_and_plain_lines(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs("recurrent-kif", "t5")
    config = runs.config("recurrent-kif", "t5")
    task = prepare_tasks(config)[0]
    (tmp_path / "a.txt").write_text("".join(f"{row.input}\r\n\n" for row in task.test))
    output = tmp_path / "out.jsonl"
    options = ["--text", "--task", "colours", "--checkpoint", "1"]
    assert main(["predict", str(run), str(tmp_path / "a.txt"), *options, "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["input"] for row in rows] == [row.input for row in task.test] and set(rows[0]) == {"input", "answer"}
    capsys.readouterr()
    file = str(runs.written / "colours" / "test.jsonl")
    assert main(["predict", str(run), "--task", "colours", file, "--checkpoint", "1"]) == 0
    assert answers(capsys.readouterr().out) == [row["answer"] for row in rows]
    assert main(["predict", str(run), file, "--output", str(output)]) == 2
    assert "out.jsonl exists" in capsys.readouterr().err


def test_without_a_task_the_lines_bring_their_instruction(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = runs("recurrent-kif", "t5"), str(runs.written / "colours" / "test.jsonl")
    assert main(["predict", str(run), file]) == 0
    alone = capsys.readouterr().out
    assert main(["predict", str(run), file, "--task", "colours"]) == 0
    assert capsys.readouterr().out == alone
    assert main(["predict", str(runs("seqlora", "bert")), file]) == 0
    assert set(answers(capsys.readouterr().out)) <= {"red", "green", "big", "small", "tiny"}


def test_the_only_task_of_a_run_needs_no_name(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = runs("seqlora", "t5", tasks=["colours"]), tmp_path / "a.txt"
    file.write_text("the sky\n")
    assert main(["predict", str(run), str(file), "--text", "--task", "colours"]) == 0
    named = capsys.readouterr().out
    assert main(["predict", str(run), str(file), "--text"]) == 0
    assert capsys.readouterr().out == named and answers(named)


def test_free_text_cannot_be_ranked_which_is_said_before_a_line_is_read(runs: Runs, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs("recurrent-kif", "t5"), tmp_path / "run"))
    known = json.loads((run / "tasks.json").read_text())
    known["tasks"][0]["labels"] = None
    (run / "tasks.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match="task 'colours' is free text and has no labels to rank"):
        Predictor(run, "colours", eval_mode="rank")
    assert Predictor(run, "colours", eval_mode="generate").task.labels is None


def test_standard_input_is_answered_in_batches(runs: Runs) -> None:
    run, flushed = runs("recurrent-kif", "t5"), []

    class Output(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue().count("\n"))

    def source() -> Any:
        for number in range(5):
            # a batch is out before the line after it is asked for
            assert not flushed or flushed[-1] == number // 2 * 2
            yield json.dumps({"instruction": "", "input": f"a{number}", "id": number}).encode()

    output = Output()
    counted = Predictor(run).run(source(), "<stdin>", output, text=False, batch_size=2)
    assert counted == (5, None, 0) and flushed == [2, 4, 5]
    assert [json.loads(line)["id"] for line in output.getvalue().splitlines()] == [0, 1, 2, 3, 4]


def test_a_broken_line_stops_after_those_before_it(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps({"instruction": "Which? ", "input": "a red one", "label": "red"}) + "\n"
    text = good * 3 + "{broken\n" + good
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(["predict", str(runs("recurrent-kif", "t5")), "--batch-size", "2"]) == 2
    captured = capsys.readouterr()
    assert len(answers(captured.out)) == 3
    assert "kif: <stdin>:4: invalid JSON" in captured.err and "the 3 before it are answered" in captured.err


def test_a_prompt_without_tokens_is_a_broken_line(runs: Runs) -> None:
    predictor, output = Predictor(runs("seqlora", "llama"), "colours"), io.StringIO()
    predictor.task = replace(predictor.task, template="{input}")
    predictor.lm.tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    with pytest.raises(DataError, match=r"^rows:2: task 'colours': the prompt '' has no tokens: .*the 1 before it are"):
        predictor.run([b'{"input": "a"}', b'{"input": ""}'], "rows", output, text=False)
    assert len(answers(output.getvalue())) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "must be a JSON object"),
        ('{"instruction": ""}', "field 'input': is missing"),
        ('{"instruction": "", "input": "x", "answer": "mine"}', "field 'answer': would be overwritten"),
        ('{"input": "x"}', "field 'instruction': is missing, and no task is named"),
        ('{"instruction": "", "input": 3}', "field 'input': must be a text, not a number"),
        ('{"instruction": "", "input": "\\ud800"}', "half a surrogate pair"),
        ('{"instruction": "", "input": "x", "references": "y"}', "field 'references': must be a list"),
        ('{"instruction": "", "input": "x", "id": [1e400]}', "field 'id': holds a number that is none in JSON"),
        (json.dumps({"instruction": "long " * 99, "input": "x"}), "max_length 64 leaves no room"),
    ],
)
def test_bad_lines_are_named(
    runs: Runs, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text("\n" + line + "\n")
    assert main(["predict", str(runs("recurrent-kif", "t5")), str(tmp_path / "in.jsonl")]) == 2
    captured = capsys.readouterr()
    assert "in.jsonl:2: " in captured.err and message in captured.err and "no line is answered" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval-mode", "rank"], "name the task with --task, ranking needs its labels; there are colours, sizes"),
        (["--task", "color"], "no task 'color'; did you mean 'colours'?"),
        (["--checkpoint", "3"], "has no checkpoint 3; there is 1 (colours), 2 (sizes)"),
        (["nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["."], ". is a folder: name a file of it"),
        (["--batch-size", "0"], "must be at least 1"),
    ],
)
def test_bad_options(runs: Runs, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(runs("recurrent-kif", "t5")), *options]) == 2
    assert message in capsys.readouterr().err


def test_an_output_without_answers_does_not_stop_the_retry(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = json.dumps({"instruction": "Which? ", "input": "a red one"}) + "\n"
    command = ["predict", str(runs("recurrent-kif", "t5")), str(file), "--output", str(output)]
    file.write_text("{broken\n" + good)
    assert main(command) == 2 and not output.exists()
    # answers that were written stay
    file.write_text(good + "{broken\n")
    assert main(command) == 2 and len(answers(output.read_text())) == 1
    assert main(command) == 2
    assert "out.jsonl exists" in capsys.readouterr().err


def test_a_pipe_is_answered_as_a_file(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `kif predict RUN <(zcat rows.jsonl.gz)` names one."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    line = json.dumps({"instruction": "Which? ", "input": "a red one"}) + "\n"
    writer = threading.Thread(target=pipe.write_text, args=(line,), daemon=True)
    writer.start()
    assert main(["predict", str(runs("recurrent-kif", "t5")), str(pipe)]) == 0
    assert len(answers(capsys.readouterr().out)) == 1


def test_packed_lines(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, plain = str(runs("recurrent-kif", "t5")), runs.written / "colours" / "test.jsonl"
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert main(["predict", run, str(plain)]) == main(["predict", run, str(packed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :] != []
    for broken in (b"no gzip", packed.read_bytes()[:-12]):
        packed.write_bytes(broken)
        assert main(["predict", run, str(packed)]) == 2
        assert "rows.jsonl.gz: broken gzip file: " in capsys.readouterr().err
