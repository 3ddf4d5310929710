"""Scoring a task: answers in batches of rows alike in length, then exact match or Rouge-L."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kif.distributed import gather, share, world
from kif.families import LanguageModel
from kif.tasks import Example, Task
from kif.tokenization import TokenCache


@dataclass
class Evaluation:
    """Result of scoring a task.

    Args:
        score: mean over the rows, in percent.
        predictions: the answers, in the rows' order.
        seconds: time for tokenisation, answers and scoring.
    """

    score: float
    predictions: list[str]
    seconds: float


def evaluate(
    lm: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    *,
    mode: Literal["generate", "rank"],
    batch_size: int,
    max_new_tokens: int,
    cache: TokenCache | None = None,
    whole_answers: bool = False,
) -> Evaluation:
    """Answer `examples` and score the answers by the task's metric.

    The model is in evaluation mode meanwhile and returns to its former mode; no random numbers are drawn, so
    training goes on as if nothing had been scored. Several processes share the rows; each returns the whole result.

    Args:
        lm: model with adapter.
        task: the rows' task.
        examples: the rows.
        mode: `generate` (greedy) or `rank` (label with the highest likelihood).
        batch_size: rows that a process answers at once.
        max_new_tokens: longest generated answer in tokens.
        cache: where tokenised rows are kept; None: tokenised here.
        whole_answers: generate to the end also what cannot match any more. By default such answers of a task scored
            by accuracy are cut short, which changes no score.
    Raises: ValueError without rows, for an unknown mode and for ranking in a task without a label list.
    """
    if not examples:
        raise ValueError(f"task {task.name!r}: there are no rows to score")
    if mode not in ("generate", "rank"):
        raise ValueError(f"unknown evaluation mode {mode!r}; there are generate and rank")
    start = time.perf_counter()
    rows = (cache or TokenCache(None)).encode(lm, task, examples)
    # longest first: memory runs out at once or not at all
    order = sorted(range(len(rows)), key=lambda i: rows[i].length, reverse=True)
    own = list(share(order))
    if lm.lockstep and len(own) * world()[1] < len(order):
        # as many rows, and so passes, as the first process has
        own.append(order[0])
    answers: dict[int, str] = {}
    acceptable = None
    if task.metric == "accuracy" and not whole_answers:
        acceptable = {text for example in examples for text in example.references} | set(task.labels or ())
    modes = {module: module.training for module in lm.model.modules()}
    lm.model.eval()
    try:
        for first in range(0, len(own), batch_size):
            batch = own[first : first + batch_size]
            texts = lm.answer(task, [rows[i] for i in batch], mode, max_new_tokens, acceptable)
            answers.update(zip(batch, texts, strict=True))
    finally:
        for module, training in modes.items():
            module.training = training
    found = {i: text for part in gather(answers) for i, text in part.items()}
    predictions = [found[i] for i in range(len(rows))]
    score = mean_score(task.metric, predictions, [example.references for example in examples])
    return Evaluation(score, predictions, time.perf_counter() - start)


def check_scoring(lm: LanguageModel, task: Task, mode: str) -> None:
    """Raise what would keep `evaluate` from scoring the task: ValueError for ranking without labels, ImportError."""
    if mode == "rank" and task.labels is None and lm.family != "encoder":
        raise ValueError(f"task {task.name!r} is free text and has no labels to rank; use eval_mode generate")
    if task.metric == "rougeL":
        _rouge_scorer()


def mean_score(
    metric: Literal["accuracy", "rougeL"], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """Mean over the rows in percent.

    `accuracy`: the answer is one of the references, white space at the ends and case aside. `rougeL`: F-measure of
    the longest common subsequence of stemmed words, the highest over the references, as Super-NaturalInstructions
    scores it.
    """
    if metric == "accuracy":
        hits = [
            normal(answer) in {normal(reference) for reference in acceptable}
            for answer, acceptable in zip(predictions, references, strict=True)
        ]
        return 100.0 * sum(hits) / len(hits)
    scorer = _rouge_scorer()
    scores = [
        max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in acceptable)
        for answer, acceptable in zip(predictions, references, strict=True)
    ]
    return 100.0 * sum(scores) / len(scores)


def normal(answer: str) -> str:
    """The form in which answers are compared."""
    return answer.strip().lower()


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("Rouge-L needs the package rouge_score: pip install rouge_score") from error
    return RougeScorer(["rougeL"], use_stemmer=True)
