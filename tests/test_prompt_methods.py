"""L2P and LFPT5: virtual tokens, choice and losses against plain computations, pseudo rows, state and folders."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_setup import KINDS, TASKS, start, train_task
from tiny import free_text_task, without_dropout
from torch import Tensor

from kif.config import L2PConfig, LFPT5Config, RunConfig
from kif.families import Encoded, LanguageModel
from kif.generative import IGNORE
from kif.methods import METHODS
from kif.methods.base import METHOD_FILE
from kif.methods.l2p import KEYS, PROMPTS
from kif.methods.lfpt5 import MARK, PREVIOUS, PROMPT, choose_pseudo, parse_pseudo, repetition_penalty
from kif.methods.prompts import VirtualTokens
from kif.models import load_language_model
from kif.tasks import Task

GENERATIVE = ("t5", "llama")
SMALL_POOL = L2PConfig(pool_size=6, prompt_length=2, top_k=2)
SMALL_PROMPT = LFPT5Config(prompt_length=7, lm_length=24, pseudo_candidates=8)
NEEDED = {"max_length": 200, "l2p": SMALL_POOL, "lfpt5": SMALL_PROMPT}


def begin(tiny_models: dict[str, Path], name: str, kind: str = "t5", **options: Any) -> tuple[Any, list[list[Encoded]]]:
    method, rows = start(tiny_models, name, kind, **{**NEEDED, **options})
    method.phases(TASKS)
    return method, rows


def load(tiny_models: dict[str, Path], kind: str, adapter: Path | None = None, **options: Any) -> LanguageModel:
    config = RunConfig(model=str(tiny_models[kind]), **{"lora_dropout": 0.0, "max_length": 200, **options})
    lm = load_language_model(config, {task.name: task.labels for task in TASKS}, adapter=adapter)
    lm.model.eval()
    return lm


def answers(lm: LanguageModel, task: Task, rows: list[Encoded]) -> list[list[str]]:
    lm.model.eval()
    return [lm.answer(task, rows, mode, 5) for mode in ("generate", "rank")]


def embedded(lm: LanguageModel, row: Encoded, vectors: Tensor, before: int) -> Tensor:
    """Input embeddings of a row with the first `before` vectors in front of it and the others behind it."""
    words = lm.base.get_input_embeddings().weight[list(row.input_ids)][None]
    return torch.cat([vectors[None, :before], words, vectors[None, before:]], 1)


def target_logits(lm: LanguageModel, inputs: Tensor, target: tuple[int, ...]) -> Tensor:
    """Logits at a target's tokens given embedded inputs, (tokens, vocabulary)."""
    ids = torch.tensor([target])
    if lm.family == "encoder-decoder":
        return lm.model(inputs_embeds=inputs, labels=ids).logits[0]
    words = lm.base.get_input_embeddings().weight[ids]
    return lm.model(inputs_embeds=torch.cat([inputs, words], 1)).logits[0, inputs.size(1) - 1 : -1]


def target_loss(lm: LanguageModel, inputs: Tensor, target: tuple[int, ...]) -> Tensor:
    return F.cross_entropy(target_logits(lm, inputs, target), torch.tensor(target), reduction="sum")


def greedy(lm: LanguageModel, inputs: Tensor, tokens: int) -> str:
    """Greedy decoding, a whole pass for every token."""
    written: list[int] = []
    while len(written) < tokens and lm.tokenizer.eos_token_id not in written:
        # the last place's own token does not matter
        written.append(int(target_logits(lm, inputs, (*written, 0))[-1].argmax()))
    text: str = lm.tokenizer.decode(written, skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize("before", [3, 0, 1])
@pytest.mark.parametrize("kind", GENERATIVE)
def test_virtual_tokens_are_embeddings_put_around_the_prompt(
    tiny_models: dict[str, Path], kind: str, before: int
) -> None:
    lm = load(tiny_models, kind)
    rows = lm.encode(TASKS[0], TASKS[0].train)[:6]
    # 0 is a token as others
    rows[0] = replace(rows[0], input_ids=(*rows[0].input_ids[:2], 0, *rows[0].input_ids[3:]))
    shared = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    own = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    tokens = VirtualTokens(lm, before, 3 - before)
    labels = TASKS[0].labels or ()
    targets = lm._targets(TASKS[0], labels)
    for vectors in (shared, own):
        each = list(vectors) if vectors.dim() == 3 else [vectors] * len(rows)
        tokens.vectors = None
        inputs = [embedded(lm, row, part, before) for row, part in zip(rows, each, strict=True)]
        expected = sum(target_loss(lm, part, row.target) for part, row in zip(inputs, rows, strict=True))
        with torch.no_grad():
            written = [greedy(lm, part, 5) for part in inputs]
            scores = torch.tensor([[-target_loss(lm, part, target) for target in targets] for part in inputs])
        best = [labels[i] for i in scores.argmax(1).tolist()]

        tokens.vectors = vectors
        loss, count = lm.loss(lm.collate(rows))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        assert count == sum(len(row.target) for row in rows)
        grads = [torch.autograd.grad(value, vectors)[0] for value in (loss, expected)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
        assert answers(lm, TASKS[0], rows) == [written, best]
        tokens.vectors = vectors[:1] if vectors.dim() == 3 else vectors
        assert answers(lm, TASKS[0], rows[:1]) == [written[:1], best[:1]]


def test_virtual_tokens_of_an_encoder(tiny_models: dict[str, Path]) -> None:
    lm = load(tiny_models, "bert")
    rows = lm.encode(TASKS[0], TASKS[0].train)[:6]
    tokens = VirtualTokens(lm, 2, 1)
    tokens.vectors = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    scores = []
    for row, vectors in zip(rows, tokens.vectors, strict=True):
        states = lm.model(inputs_embeds=embedded(lm, row, vectors, 2)).last_hidden_state[0, 2:-1].mean(0)
        scores.append(20 * F.normalize(states, dim=0) @ lm.label_embeddings.T)
    expected = F.cross_entropy(torch.stack(scores), torch.tensor([row.target[0] for row in rows]), reduction="sum")
    loss, _ = lm.loss(lm.collate(rows))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(value, tokens.vectors)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    assert lm.answer(TASKS[0], rows, "rank", 5) == [lm.classes[i] for i in torch.stack(scores).argmax(1).tolist()]


def plain_features(lm: LanguageModel, row: Encoded) -> Tensor:
    """A row's query, without batch, padding, virtual tokens and adapter."""
    body = {"encoder-decoder": "encoder", "decoder": "model"}.get(lm.family)
    model = getattr(lm.base, body) if body else lm.base
    with torch.no_grad():
        return F.normalize(model(input_ids=torch.tensor([row.input_ids])).last_hidden_state[0].mean(0), dim=0)


@pytest.mark.parametrize("kind", KINDS)
def test_l2p_choice_and_loss(tiny_models: dict[str, Path], kind: str) -> None:
    method, (rows, _) = begin(tiny_models, "l2p", kind)
    lm, pool = method.lm, method.pool
    lm.model.eval()
    keys = getattr(lm.model, KEYS)
    with torch.no_grad():
        spread = torch.randn(keys.shape, generator=torch.Generator().manual_seed(3))
        keys.copy_(0.5 * spread + plain_features(lm, rows[0]))
    cosines = torch.stack([plain_features(lm, row) @ F.normalize(keys, dim=1).T for row in rows])
    best = cosines.topk(2, dim=1).indices
    assert len({tuple(part) for part in best.tolist()}) > 1  # rows differ in their choice

    # evaluation: each row by itself
    lm.model.eval()
    loss, count = method.loss(rows)
    assert torch.equal(pool.chosen, best)
    torch.testing.assert_close(pool.match, cosines.gather(1, best).sum() / len(rows))
    plain, _ = lm.loss(lm.collate(rows))
    torch.testing.assert_close(loss, plain - count * 0.1 * pool.match)
    singly = sum(lm.loss(lm.collate([row]))[0] for row in rows)
    torch.testing.assert_close(plain, singly, rtol=1e-4, atol=1e-4)
    assert all(lm.answer(TASKS[0], [row], "rank", 4) == [answer] for row, answer in
               zip(rows, lm.answer(TASKS[0], rows, "rank", 4), strict=True))  # fmt: skip
    ids = torch.tensor([list(rows[0].input_ids)])
    if kind != "bert":
        vectors = getattr(lm.model, PROMPTS)[best[0]].flatten(0, 1)
        expected = target_loss(lm, embedded(lm, rows[0], vectors, 4), rows[0].target)
        torch.testing.assert_close(lm.loss(lm.collate(rows[:1]))[0], expected, rtol=1e-4, atol=1e-5)
    assert ids.size(1) > 1

    # training: the vote of the batch
    without_dropout(lm.model)
    lm.model.train()
    method.arena.zero_grad()
    loss, count = method.loss(rows)
    votes = [sum(j in part for part in best.tolist()) for j in range(6)]
    winners = sorted(range(6), key=lambda j: -votes[j])[:2]
    assert pool.chosen.tolist() == winners
    match = sum(cosines[i, j] for i in range(len(rows)) for j in winners) / len(rows)
    torch.testing.assert_close(pool.match, match)
    pull = torch.autograd.grad(-count * 0.1 * match, keys, retain_graph=True)[0]
    loss.backward()
    for name in (KEYS, PROMPTS):
        grad = getattr(lm.model, name).grad
        assert [bool(part.any()) for part in grad] == [j in winners for j in range(6)]
    torch.testing.assert_close(keys.grad, pull, rtol=1e-4, atol=1e-6)


def test_l2p_starts_from_its_distribution(tiny_models: dict[str, Path]) -> None:
    for kind in KINDS:
        method, _ = begin(tiny_models, "l2p", kind, l2p=L2PConfig())
        assert 0.9 < method.arena.data.abs().max() <= 1.0
        method, _ = begin(tiny_models, "l2p", kind, l2p=L2PConfig(init="vocabulary"))
        words = method.lm.base.get_input_embeddings().weight
        assert all((words == row).all(1).any() for row in getattr(method.lm.model, PROMPTS).flatten(0, 1))
        assert getattr(method.lm.model, KEYS).abs().max() <= 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["l2p", "lfpt5"])
def test_only_prompts_change_and_a_saved_folder_answers_alike(
    tiny_models: dict[str, Path], tmp_path: Path, name: str, kind: str
) -> None:
    if name == "lfpt5" and kind == "bert":
        pytest.skip("refused")
    method, rows = begin(tiny_models, name, kind, lr=0.3)
    lm = method.lm
    trained = {segment.name for segment in method.arena.segments}
    assert trained == ({KEYS, PROMPTS} if name == "l2p" else {PROMPT})
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    for index in (0, 1):
        train_task(method, index, rows[index])
    after = lm.model.state_dict()
    assert {key for key, value in after.items() if not torch.equal(value, before[key])} == trained
    method.save_adapter(tmp_path)
    kind_options = {"method": name, "l2p": SMALL_POOL, "lfpt5": SMALL_PROMPT}
    other = load(tiny_models, kind, adapter=tmp_path, **kind_options)
    config = method.config
    METHODS[name].attach(other, config, tmp_path)
    lm.model.eval()
    for task, part in zip(TASKS, rows, strict=True):
        assert answers(lm, task, part) == answers(other, task, part)
        assert torch.equal(lm.loss(lm.collate(part))[0], other.loss(other.collate(part))[0])
    plain = load(tiny_models, kind, adapter=tmp_path)
    assert not torch.equal(plain.loss(plain.collate(rows[0]))[0], lm.loss(lm.collate(rows[0]))[0])


def test_a_classification_layer_is_trained_along(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    method, rows = begin(tiny_models, "l2p", "bert", head="linear")
    layer = {name: p.clone() for name, p in method.lm.model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in layer) and not any("lora" in name for name in layer)
    train_task(method, 0, rows[0])
    for name, p in method.lm.model.named_parameters():
        assert (name not in layer) or not torch.equal(p, layer[name])
    method.save_adapter(tmp_path)
    other = load(tiny_models, "bert", adapter=tmp_path, head="linear")
    METHODS["l2p"].attach(other, method.config, tmp_path)
    method.lm.model.eval()
    assert torch.equal(*(lm.loss(lm.collate(rows[0]))[0] for lm in (method.lm, other)))


@pytest.mark.parametrize("name", ["l2p", "lfpt5"])
def test_a_damaged_method_file_is_named(tiny_models: dict[str, Path], tmp_path: Path, name: str) -> None:
    method, _ = begin(tiny_models, name)
    method.save_adapter(tmp_path)
    file = tmp_path / METHOD_FILE
    content = file.read_bytes()
    for damage, error in ((content[:40], ValueError), (None, FileNotFoundError)):
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        with pytest.raises(error, match=METHOD_FILE):
            METHODS[name].attach(load(tiny_models, "t5", adapter=tmp_path), method.config, tmp_path)
    file.write_bytes(content)
    other = copy.deepcopy(method.config)
    other.l2p.prompt_length, other.lfpt5.prompt_length = 3, 5
    with pytest.raises(ValueError, match=METHOD_FILE):
        METHODS[name].attach(load(tiny_models, "t5", adapter=tmp_path), other, tmp_path)


def test_refusals(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="lfpt5 does not work with encoder models: it generates pseudo samples"):
        start(tiny_models, "lfpt5", "bert")
    with pytest.raises(ValueError, match="25 virtual tokens bring rows to 537 tokens, but the model has 512"):
        start(tiny_models, "l2p", "bert")
    with pytest.raises(ValueError, match="the model has 2048 positions"):
        start(tiny_models, "lfpt5", "llama", lfpt5=LFPT5Config(lm_length=2000))
    with pytest.raises(ValueError, match="top_k must not exceed"):
        L2PConfig(pool_size=4)
    method, rows = start(tiny_models, "lfpt5", **NEEDED)
    method.begin_task(0, [])
    with pytest.raises(RuntimeError, match="phases"):
        method.training_rows(rows[0], [])
    method, rows = begin(tiny_models, "lfpt5", lfpt5=LFPT5Config(prompt_length=2, lm_length=4))
    method.begin_task(0, [])
    with pytest.raises(ValueError, match="'topics': lfpt5\\.lm_length 4 leaves no room"):
        method.training_rows(rows[0], [])


def with_pseudo(method: Any, rows: list[list[Encoded]]) -> list[Encoded]:
    """LFPT5 in its second task, with pseudo rows of the first as if they had been written."""
    texts = [f"the market rose {MARK} World", f"a match {MARK} Sports", f"nothing {MARK} Nothing"]
    method._candidates = lambda task, number: texts
    method.begin_task(1, [])
    trained: list[Encoded] = method.training_rows(rows[1], [])
    return trained


@pytest.mark.parametrize("kind", GENERATIVE)
def test_lfpt5_loss(tiny_models: dict[str, Path], kind: str) -> None:
    options = LFPT5Config(prompt_length=7, lm_length=24, lm_weight=0.3, kl_weight=0.2)
    method, rows = begin(tiny_models, "lfpt5", kind, lfpt5=options)
    train_task(method, 0, rows[0])
    lm = method.lm
    trained = with_pseudo(method, rows)
    assert trained[:2] == rows[1] and [row.task for row in trained[2:]] == ["topics"] * 2
    assert method.pseudo_kept == {"topics": 2}
    lm.model.eval()
    old = getattr(lm.model, PROMPT).detach().clone()
    method.arena.data.add_(0.5 * torch.randn(method.arena.data.shape, generator=torch.Generator().manual_seed(0)))
    new = getattr(lm.model, PROMPT)

    texts = [(TASKS[1].name, example.input, example.label) for example in TASKS[1].train]
    texts += [("topics", "the market rose", "World"), ("topics", "a match", "Sports")]
    ce = lm_loss = kl = torch.zeros(())
    ce_tokens = lm_tokens = kl_tokens = 0
    for row, (task, text, label) in zip(trained, texts, strict=True):
        ce = ce + target_loss(lm, embedded(lm, row, new, 0), row.target)
        ce_tokens += len(row.target)
        start_ids = tuple(lm.tokenizer(f"__{task}__")["input_ids"])
        written = lm.tokenizer(f"{text} {MARK} {label}", add_special_tokens=False)["input_ids"]
        written = (*written, lm.tokenizer.eos_token_id)
        assert len(written) <= 24
        lm_loss = lm_loss + target_loss(lm, embedded(lm, Encoded(start_ids, (), "", False), new, 0), written)
        lm_tokens += len(written)
        if task == "topics":
            p_new, p_old = (
                target_logits(lm, embedded(lm, row, prompt, 0), row.target).softmax(1) for prompt in (new, old)
            )
            kl = kl + (p_old * (p_old / p_new).log()).sum()
            kl_tokens += len(row.target)
    assert kl > 0.01
    expected = 0.8 * (ce / ce_tokens + 0.3 * lm_loss / lm_tokens) + 0.2 * kl / kl_tokens
    loss, count = method.loss(trained)
    assert count == ce_tokens
    torch.testing.assert_close(loss / count, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(value, new)[0] for value in (loss / count, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)

    # without pseudo rows there is no such term, and with equal prompts it is 0
    alone, count = method.loss(trained[:2])
    plain = sum(lm.loss(lm.collate([row]))[0] for row in trained[:2]) / count
    writing = [method._writing[row] for row in trained[:2]]
    plain = plain + 0.3 * lm.loss(lm.collate(writing))[0] / sum(len(row.target) for row in writing)
    torch.testing.assert_close(alone / count, 0.8 * plain)
    method.arena.buffer(PREVIOUS).copy_(method.arena.data)
    assert method._divergence(trained[2:]).item() == pytest.approx(0.0, abs=1e-6)


def test_pseudo_rows_are_parsed_and_filtered() -> None:
    labels = ("World", "Sports")
    assert parse_pseudo(f" a text {MARK} World ", labels) == ("a text", "World")
    assert parse_pseudo(f"a{MARK}World", labels) == ("a", "World")
    assert parse_pseudo(f"a {MARK} Any thing", None) == ("a", "Any thing")
    for text in (
        "a text World", f"a {MARK} World {MARK} World", f"a {MARK} Business", f"a {MARK} world", f" {MARK} World",
        f"a {MARK} ", "", MARK,
    ):  # fmt: skip
        assert parse_pseudo(text, labels) is None
    assert parse_pseudo(f"a {MARK} ", None) is None
    texts = [f"{text} {MARK} {label}" for text, label in ("aW", "aW", "bW", "cX", "dW", "eS")]
    names = {"W": "World", "S": "Sports", "X": "Other"}
    texts = [text[:-1] + names[text[-1]] for text in texts]
    assert choose_pseudo(texts, labels, 2) == [("a", "World"), ("b", "World"), ("e", "Sports")]
    assert choose_pseudo(texts, None, 2) == [("a", "World"), ("b", "World")]
    assert choose_pseudo(texts, labels, 0) == []


def test_the_repetition_penalty_spares_prompt_and_mark() -> None:
    scores = torch.tensor([[2.0, -2.0, 4.0, 1.0, 3.0]])
    ids = torch.tensor([[-1, -2, 4, 0, 1, 1, 3]])
    assert repetition_penalty(2.0, 3, [3])(ids, scores).tolist() == [[1.0, -4.0, 4.0, 1.0, 3.0]]
    assert torch.equal(repetition_penalty(2.0, 7, [3])(ids, scores), scores)


@pytest.mark.parametrize("kind", GENERATIVE)
def test_sampling_is_seeded_and_leaves_no_trace(tiny_models: dict[str, Path], kind: str) -> None:
    method, _ = begin(tiny_models, "lfpt5", kind)
    lm = method.lm
    lm.model.train()
    settings = lm.base.generation_config.to_dict()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = method._candidates(TASKS[0], 0)
    assert torch.equal(torch.rand(3), expected) and lm.model.training
    assert lm.base.generation_config.to_dict() == settings
    assert len(first) == 8 and len(set(first)) > 1
    assert method._candidates(TASKS[0], 0) == first != method._candidates(TASKS[0], 1)
    method._index = 1
    assert method._candidates(TASKS[0], 0) != first
    begin_text = lm.tokenizer.decode(lm.encode(TASKS[0], TASKS[0].train)[0].input_ids)
    assert not any(text.startswith(begin_text) or "__topics__" in text for text in first)


@pytest.mark.parametrize("kind", GENERATIVE)
def test_rows_that_the_model_writes_become_pseudo_rows(tiny_models: dict[str, Path], kind: str) -> None:
    method, rows = begin(tiny_models, "lfpt5", kind)
    lm = method.lm
    method.begin_task(0, [])
    method.training_rows(rows[0], [])
    known = rows[0][0]
    # a prompt alone cannot teach so small a model to write
    lm.model.requires_grad_(True)
    lm.model.eval()
    adam = torch.optim.Adam([p for p in lm.model.parameters() if p.grad is None], lr=0.01)
    for _ in range(120):
        adam.zero_grad()
        lm.loss(lm.collate([method._writing[known]]))[0].backward()
        adam.step()
    method.begin_task(1, [])
    trained = method.training_rows(rows[1], [])
    assert method.pseudo_kept == {"topics": 1}
    assert trained == [*rows[1], known]
    assert method._pseudo[known] == method._writing_rows(TASKS[0], TASKS[0].train)[0]


def test_the_first_prompt_is_made_of_label_and_frequent_tokens(tiny_models: dict[str, Path]) -> None:
    method, rows = begin(tiny_models, "lfpt5", lfpt5=LFPT5Config(prompt_length=200, lm_length=60))
    lm = method.lm
    method.begin_task(0, [])
    method.training_rows(rows[0], [])
    words = lm.base.get_input_embeddings().weight
    found = [int((words == vector).all(1).nonzero()[0]) for vector in getattr(lm.model, PROMPT)]
    eos = lm.tokenizer.eos_token_id
    labels = [token for label in TASKS[0].labels or () for token in lm.tokenizer(label)["input_ids"] if token != eos]
    labels = list(dict.fromkeys(labels))
    assert found[: len(labels)] == labels
    count: dict[int, int] = {}
    for row in rows[0]:
        for token in row.input_ids:
            count[token] = count.get(token, 0) + 1
    others = [token for token in sorted(count, key=lambda t: (-count[t], t)) if token not in (*labels, eos)]
    whole = labels + others
    assert found == (whole * math.ceil(200 / len(whole)))[:200]


def test_lfpt5_cuts_the_text_and_knows_free_text(tiny_models: dict[str, Path]) -> None:
    task = free_text_task()
    method, _ = start(tiny_models, "lfpt5", **{**NEEDED, "lfpt5": LFPT5Config(prompt_length=3, lm_length=40)})
    lm = method.lm
    method.phases([task, TASKS[0]])
    method.begin_task(0, [])
    rows = lm.encode(task, task.train)
    assert method.training_rows(rows, []) == rows
    long = method._writing_target(task, "the market rose and the team won the match " * 9, "a team won")
    text = lm.tokenizer.decode(long, skip_special_tokens=True)
    assert 38 <= len(long) <= 40 and long[-1] == lm.tokenizer.eos_token_id
    assert text.startswith("the market rose and") and text.endswith(f" {MARK} a team won")
    method._candidates = lambda task, number: [f"{i} {MARK} answer {i}" for i in range(5)]
    method.begin_task(1, [])
    assert method.pseudo_kept == {"summaries": 2}


def test_adafactor_step_with_clipping_and_without_bad_gradients(tiny_models: dict[str, Path]) -> None:
    from transformers.optimization import Adafactor

    method, _ = begin(tiny_models, "lfpt5", weight_decay=0.1, max_grad_norm=0.5)
    method.begin_task(0, [])
    prompt = torch.nn.Parameter(getattr(method.lm.model, PROMPT).detach().clone())
    plain = Adafactor([prompt], lr=0.3, weight_decay=0.1, scale_parameter=False, relative_step=False)
    for step in range(3):
        grad = torch.randn(prompt.shape, generator=torch.Generator().manual_seed(step))
        prompt.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_([prompt], 0.5)
        plain.step()
        method.arena.zero_grad()
        getattr(method.lm.model, PROMPT).grad.copy_(grad)
        method.inner_step(0.3)
        torch.testing.assert_close(getattr(method.lm.model, PROMPT), prompt)
    before = method.arena.data.clone()
    getattr(method.lm.model, PROMPT).grad.fill_(torch.nan)
    method.inner_step(0.3)
    assert method.skipped == 1 and torch.equal(method.arena.data, before) and not method.arena.grad.any()


@pytest.mark.parametrize("name", ["l2p", "lfpt5"])
def test_state_survives_saving_bit_for_bit(tiny_models: dict[str, Path], name: str) -> None:
    from kif.loop import backward

    method, rows = begin(tiny_models, name)
    train_task(method, 0, rows[0])
    if name == "lfpt5":
        trained = with_pseudo(method, rows)
    else:
        method.begin_task(1, [])
        trained = rows[1]

    def step(it: Any, number: int) -> None:
        torch.manual_seed(number)
        it.lm.model.train()
        backward(it.lm, it, trained, 1)
        it.inner_step(0.1)

    step(method, 0)
    state = copy.deepcopy(method.state_dict())
    other, _ = begin(tiny_models, name, seed=1)
    other.begin_task(1, [])
    other.training_rows(rows[1], [])
    other.load_state_dict(state)
    for number in (1, 2):
        step(method, number)
        step(other, number)
        assert torch.equal(method.arena.data, other.arena.data)
    if name == "lfpt5":
        assert other.pseudo_kept == method.pseudo_kept == {"topics": 2}
        assert torch.equal(method.arena.buffer(PREVIOUS), other.arena.buffer(PREVIOUS))


@pytest.mark.parametrize("name", ["l2p", "lfpt5"])
def test_a_state_fits_a_checkpoint(tiny_models: dict[str, Path], name: str) -> None:
    from kif.checkpoint import flatten

    method, rows = begin(tiny_models, name)
    train_task(method, 0, rows[0])
    if name == "lfpt5":
        with_pseudo(method, rows)
    structure, tensors = flatten(method.state_dict())
    assert structure and tensors


@pytest.mark.parametrize("name", ["l2p", "lfpt5"])
def test_a_run_is_scored_again_from_its_folder(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    from kif.run import evaluate_run, train

    config = RunConfig(
        method=name, model=str(tiny_models["t5"]), data=str(written), tasks=["colours", "moods"], lr=0.3,
        output=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), steps_per_task=6, max_new_tokens=4, **NEEDED
    )  # fmt: skip
    results = train(config, progress=False)
    final = evaluate_run(tmp_path / "run", progress=False)
    assert final["scores"] == [row[1] for row in results["accuracy"]]
    first = evaluate_run(tmp_path / "run", checkpoint=1, progress=False)
    assert first["scores"][0] == results["accuracy"][0][0]
    ranked = evaluate_run(tmp_path / "run", progress=False, eval_mode="rank")
    assert any(score > 0 for score in ranked["scores"])


def test_labels_are_masked_as_everywhere(tiny_models: dict[str, Path]) -> None:
    lm = load(tiny_models, "llama")
    VirtualTokens(lm, 2, 2)
    row = lm.encode(TASKS[0], TASKS[0].train)[0]
    batch = lm.collate([row])
    assert (batch["labels"] == IGNORE).sum() == len(row.input_ids) + 4
