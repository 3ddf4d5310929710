"""Answers of a finished run to rows from a file or standard input, one JSON object a line."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from kif.attention import without_cudnn
from kif.config import RunConfig
from kif.evaluate import mean_score
from kif.families import Encoded, LanguageModel
from kif.methods import METHODS
from kif.models import load_language_model
from kif.stored import KnownTask, read_tasks
from kif.tasks import DataError, Example, Task, _kind, _parse, sound_gzip, suggest
from kif.training import adapter_folder


@dataclass(frozen=True)
class Line:
    """A line to answer: what its object holds, the prompt made of it, and the acceptable answers if it names any."""

    content: dict[str, Any]
    row: Encoded
    references: tuple[str, ...]


class Predictor:
    """A finished run that answers.

    Args:
        run: run folder.
        task: one of its tasks, whose instruction, template and labels hold; those of encoders with label_space=task
            only, as in scoring. Default: its only one; of several none, which will do where the lines have an
            instruction each and all tasks have the same template.
        checkpoint: the adapter after this task, counted from 1. Default: the final one.
        changes: configuration fields to replace: eval_mode, model, device.
    Raises: FileNotFoundError naming the missing file; ValueError for an unknown task or checkpoint, and where a task
        must be named.
    """

    def __init__(self, run: Path, task: str | None = None, checkpoint: int | None = None, **changes: Any) -> None:
        from kif.configfile import load_config

        known, _ = read_tasks(run)
        self.config: RunConfig = replace(load_config(run / "config.yaml"), **changes)
        folder = adapter_folder(run, [task.name for task in known], checkpoint)
        self.known = _chosen(run, known, task)
        self.lm: LanguageModel = load_language_model(
            self.config, {task.name: task.labels for task in known}, adapter=folder
        )
        self._encoder = self.lm.family == "encoder"
        if self.known is None:
            self._check_without_task(known)
        METHODS[self.config.method].attach(self.lm, self.config, folder)
        self.lm.model.eval()
        metrics = {task.metric for task in known}
        unnamed = replace(known[0], name="", labels=None, metric=metrics.pop() if len(metrics) == 1 else "accuracy")
        self.task: Task = (self.known or unnamed).task()
        if self.config.eval_mode == "rank" and self.task.labels is None and not self._encoder:
            raise ValueError(f"task {self.task.name!r} is free text and has no labels to rank; use eval_mode generate")

    def run(
        self, source: Iterable[bytes], name: str, output: TextIO, *, text: bool, batch_size: int | None = None
    ) -> tuple[int, float | None, int]:
        """Answer lines in their order; each batch is written and flushed before the next is read.

        Lines are objects with `input` and, where no task gives it, `instruction`; `label` and `references` are compared
        with the answer. An answered line is its object with `answer` added, which it must not hold yet. Blank lines are
        left out.

        Args:
            source: the lines.
            name: of the source, for messages.
            output: where to write.
            text: lines are inputs themselves, not JSON.
            batch_size: lines answered at once. Default: the run's eval_batch_size.
        Returns: (lines answered, score in percent of those with a label, their number).
        Raises: DataError naming the first line that cannot be used, when those before it are answered; nothing behind
            it is.
        """
        answers: list[str] = []
        references: list[tuple[str, ...]] = []
        count = 0
        lines = self._lines(source, name, text)
        # a character that the output's encoding lacks is escaped, not lost
        plain = (output.encoding or "utf-8").lower().replace("-", "") != "utf8"
        for batch, error in _batches(lines, batch_size or self.config.eval_batch_size):
            for line, answer in zip(batch, self._answer([line.row for line in batch]), strict=True):
                output.write(json.dumps({**line.content, "answer": answer}, ensure_ascii=plain) + "\n")
                if line.references:
                    answers.append(answer)
                    references.append(line.references)
            output.flush()
            count += len(batch)
            if error is not None:
                done = "no line is answered" if count == 0 else f"the {count} before it are answered"
                raise DataError(
                    f"{error.message} ({done}, nothing from it on is)", error.path, error.line, error.field
                ) from error
        score = mean_score(self.task.metric, answers, references) if answers else None
        return count, score, len(answers)

    def _answer(self, rows: list[Encoded]) -> list[str]:
        with without_cudnn():
            return self.lm.answer(self.task, rows, self.config.eval_mode, self.config.max_new_tokens) if rows else []

    def _lines(self, source: Iterable[bytes], name: str, text: bool) -> Iterator[Line]:
        for number, data in enumerate(source, 1):
            if data.strip():
                yield self._text_line(name, number, data) if text else self._json_line(name, number, data)

    def _text_line(self, name: str, number: int, data: bytes) -> Line:
        try:
            content = data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: byte 0x{data[error.start]:02x}", name, number) from error
        return self._line(name, number, {"input": content}, self._instruction(name, number), ())

    def _json_line(self, name: str, number: int, data: bytes) -> Line:
        content = _parse(Path(name), number, data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data)
        if "input" not in content:
            raise DataError("is missing", name, number, "input")
        for field, value in content.items():
            try:
                json.dumps(value, allow_nan=False)
            except ValueError as error:
                # read as infinity or NaN, which the answered line could not hold
                raise DataError("holds a number that is none in JSON, such as 1e400", name, number, field) from error
        if "answer" in content:
            raise DataError("would be overwritten: rename it, or remove it", name, number, "answer")
        for field in ("instruction", "input", "label"):
            value = content.get(field, "")
            if not isinstance(value, str):
                raise DataError(f"must be a text, not {_kind(value)}", name, number, field)
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise DataError("holds half a surrogate pair, which is no character", name, number, field)
        others = content.get("references", [])
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise DataError("must be a list of texts", name, number, "references")
        instruction = content["instruction"] if "instruction" in content else self._instruction(name, number)
        label = [content["label"]] if content.get("label", "").strip() else []
        return self._line(name, number, content, instruction, (*label, *others))

    def _line(
        self, name: str, number: int, content: dict[str, Any], instruction: str, references: tuple[str, ...]
    ) -> Line:
        example = Example(instruction, content["input"], "", references)
        try:
            ((ids, cut),) = self.lm._tokenize_prompts(self.task, [self.lm._prompt_parts(self.task, example)])
        except ValueError as error:
            raise DataError(str(error), name, number) from error
        # a batch has targets, though answers do not depend on them
        return Line(content, Encoded(ids, (0,), self.task.name, cut), references)

    def _instruction(self, name: str, number: int) -> str:
        if self._encoder or "{instruction}" not in self.task.template:
            return ""
        found = self.known.instruction if self.known is not None else None
        if found is None:
            why = "no task is named" if self.known is None else f"task {self.known.name!r} has several"
            raise DataError(f"is missing, and {why}", name, number, "instruction")
        return found

    def _check_without_task(self, known: tuple[KnownTask, ...]) -> None:
        why = None
        if self._encoder:
            if self.config.label_space == "task":
                why = "with label_space=task the answers depend on it"
        elif self.config.eval_mode == "rank":
            why = "ranking needs its labels"
        elif len({task.template for task in known}) > 1:
            why = "the tasks have different templates"
        if why is not None:
            raise ValueError(f"name the task with --task, {why}; there are {', '.join(task.name for task in known)}")


def _chosen(run: Path, known: tuple[KnownTask, ...], name: str | None) -> KnownTask | None:
    if name is None:
        return known[0] if len(known) == 1 else None
    tasks = {task.name: task for task in known}
    if name not in tasks:
        raise ValueError(f"{run} has learned no task {name!r}; {suggest(name, list(tasks))}")
    return tasks[name]


def _batches(lines: Iterator[Line], size: int) -> Iterator[tuple[list[Line], DataError | None]]:
    """Batches of lines; the last one comes with the error that ended it, if one did."""
    batch: list[Line] = []
    while True:
        try:
            batch.append(next(lines))
        except StopIteration:
            if batch:
                yield batch, None
            return
        except DataError as error:
            yield batch, error
            return
        if len(batch) == size:
            yield batch, None
            batch = []


def _unpacked(path: Path) -> Iterator[bytes]:
    """Lines of a gzip file. Raises: DataError where it is broken."""
    with sound_gzip(path), gzip.open(path) as file:
        yield from file


@contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """A new file to write. One in which nothing is written before an error is removed, or it would stop the retry."""
    file = path.open("x", encoding="utf-8")
    try:
        with file:
            yield file
    except BaseException:
        if path.stat().st_size == 0:
            path.unlink()
        raise


def predict_file(
    run: Path,
    file: str,
    output: Path | None,
    *,
    text: bool = False,
    task: str | None = None,
    checkpoint: int | None = None,
    batch_size: int | None = None,
    **changes: Any,
) -> None:
    """`Predictor.run` on a file, which may be a .gz, or on standard input for `-`, into a new file or to standard
    output; a score is told on standard error.

    Raises: as Predictor; FileNotFoundError or IsADirectoryError for the file, FileExistsError for an output that
        exists, ValueError where standard input is closed.
    """
    if file != "-" and not Path(file).exists():
        raise FileNotFoundError(f"{file} does not exist")
    if Path(file).is_dir():
        raise IsADirectoryError(f"{file} is a folder: name a file of it")
    if file == "-" and sys.stdin is None:
        raise ValueError("standard input is closed: name a file, or give lines there")
    if output is not None and output.exists():
        raise FileExistsError(f"{output} exists: choose another --output, or remove it")
    predictor = Predictor(run, task, checkpoint, **changes)
    with ExitStack() as stack:
        source: Iterable[bytes]
        if file == "-":
            source = sys.stdin.buffer
        elif file.endswith(".gz"):
            source = _unpacked(Path(file))
        else:
            source = stack.enter_context(open(file, "rb"))
        written = sys.stdout if output is None else stack.enter_context(_new_file(output))
        name = "<stdin>" if file == "-" else file
        _, score, labelled = predictor.run(source, name, written, text=text, batch_size=batch_size)
    if score is not None:
        print(f"{predictor.task.metric}: {score:.1f}% over {labelled} lines with a label", file=sys.stderr)
