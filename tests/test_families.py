"""Families: losses, answers and ranking against the plain model, and prompts that are cut in the right place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_tiny, free_text_task, masks_of_attention, sentiment_task, topic_task
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kif import generative
from kif.config import RunConfig
from kif.encoder import EncoderModel
from kif.families import Encoded, LanguageModel, cut_inside, to_device
from kif.models import load_language_model
from kif.tasks import Example, Task

TOPICS, SENTIMENT, FREE = topic_task(), sentiment_task(), free_text_task()
Loader = Callable[..., LanguageModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """A tiny model whose adapter is not zero, in evaluation mode."""
    root = tmp_path_factory.mktemp("models")
    folders: dict[str, Path] = {kind: build_tiny(kind, root / kind) for kind in ("t5", "llama", "gpt2", "bert")}

    def loader(kind: str, **changes: Any) -> LanguageModel:
        tasks = [TOPICS, SENTIMENT] if kind == "bert" else [TOPICS, FREE]
        config = RunConfig(model=str(folders[kind]), device="cpu", **changes)
        lm = load_language_model(config, {task.name: task.labels for task in tasks})
        generator = torch.Generator().manual_seed(1)
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        lm.model.eval()
        return lm

    return loader


GENERATIVE = pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
ALL = pytest.mark.parametrize("kind", ["t5", "llama", "gpt2", "bert"])


class Host:
    """Stands in for a tensor on the host, and notes what is done to it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pin_memory(self) -> Host:
        self.calls.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool) -> Host:
        self.calls.append(f"to {device}, {non_blocking}")
        return self


def test_copies_to_a_gpu_come_from_pinned_memory() -> None:
    here, there = Host(), Host()
    assert to_device(here, torch.device("cpu")) is here  # type: ignore[arg-type, comparison-overlap]
    assert to_device(there, torch.device("cuda:1")) is there  # type: ignore[arg-type, comparison-overlap]
    assert here.calls == ["to cpu, True"] and there.calls == ["pinned", "to cuda:1, True"]


@GENERATIVE
def test_loss_is_the_models_own(load: Loader, kind: str) -> None:
    lm = load(kind)
    batch = lm.collate(lm.encode(TOPICS, TOPICS.train))
    loss, count = lm.loss(batch)
    assert count == sum(map(len, (row.target for row in lm.encode(TOPICS, TOPICS.train))))
    assert count == lm.label_count(lm.encode(TOPICS, TOPICS.train))
    torch.testing.assert_close(loss, lm.model(**batch).loss * count)


def test_linear_head_loss_is_the_models_own(load: Loader) -> None:
    lm = load("bert", head="linear")
    batch = lm.collate(lm.encode(TOPICS, TOPICS.train))
    loss, count = lm.loss(batch)
    assert count == len(TOPICS.train)
    torch.testing.assert_close(loss, lm.model(**batch).loss * count)


@ALL
def test_loss_does_not_depend_on_batch_or_padding(load: Loader, kind: str) -> None:
    lm = load(kind)
    rows = lm.encode(TOPICS, TOPICS.train)
    whole, count = lm.loss(lm.collate(rows))
    alone = [lm.loss(lm.collate([row])) for row in rows]
    torch.testing.assert_close(torch.stack([loss for loss, _ in alone]).sum(), whole)
    assert sum(number for _, number in alone) == count
    fill = {"input_ids": lm.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    wide = {
        name: F.pad(tensor, (0, 7), value=fill[name]) if tensor.dim() == 2 else tensor
        for name, tensor in lm.collate(rows).items()
    }
    torch.testing.assert_close(lm.loss(wide)[0], whole)


@ALL
def test_micro_batches_give_the_gradient_of_the_batch(load: Loader, kind: str) -> None:
    lm = load(kind)
    rows = lm.encode(TOPICS, TOPICS.train)
    loss, count = lm.loss(lm.collate(rows))
    (loss / count).backward()
    trained = [p for p in lm.model.parameters() if p.requires_grad]
    expected = [p.grad.clone() for p in trained if p.grad is not None]
    assert len(expected) == len(trained) > 0 and all(gradient.abs().sum() > 0 for gradient in expected)
    lm.model.zero_grad()
    for part in (rows[:1], rows[1:6], rows[6:]):
        (lm.loss(lm.collate(part))[0] / count).backward()
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_end_of_sequence_is_trained_where_it_is_also_the_padding(load: Loader) -> None:
    lm = load("llama")
    eos = lm.tokenizer.eos_token_id
    assert lm.tokenizer.pad_token_id == eos
    rows = lm.encode(TOPICS, TOPICS.train)
    batch = lm.collate(rows)
    for i, row in enumerate(rows):
        assert row.target[-1] == eos and eos not in row.input_ids
        assert batch["attention_mask"][i].sum() == row.length
        labelled = batch["labels"][i] != -100
        assert tuple(batch["labels"][i][labelled].tolist()) == row.target
        assert labelled.nonzero()[0] == len(row.input_ids)
    without_eos = {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == eos, -100)}
    assert lm.loss(without_eos)[1] == lm.loss(batch)[1] - len(rows)


@pytest.mark.parametrize("template", ["{instruction}{input}\nAnswer:", "Input: {input}\n{instruction}\nOutput: "])
def test_decoder_target_continues_the_prompt(load: Loader, template: str) -> None:
    lm = load("llama")
    task = topic_task(template=template)
    for example, row in zip(task.train, lm.encode(task, task.train), strict=True):
        text = task.prompt(example).rstrip(" ") + " " + example.label
        assert [*row.input_ids, *row.target] == [*lm.tokenizer(text)["input_ids"], lm.tokenizer.eos_token_id]


@pytest.mark.parametrize("merges", [True, False])
def test_decoder_target_by_other_tokenizers(load: Loader, merges: bool) -> None:
    """One that merges the prompt's end with the label; one that, as Llama 2's, begins every text with a blank."""
    lm = load("llama")
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    if not merges:
        bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    bpe.train_from_iterator([TOPICS.prompt(row).rstrip(" ") + " " + row.label for row in TOPICS.train] * 2, trainer)
    lm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")
    for label in TOPICS.labels or ():
        (target,) = lm._targets(TOPICS, [label])
        prompt, text = (bpe.encode(text).ids for text in ("\nAnswer:", f"\nAnswer: {label}"))
        assert (text[: len(prompt)] != prompt) == merges
        if not merges:
            assert target == (*text[len(prompt) :], lm.tokenizer.eos_token_id)
        assert lm.tokenizer.decode(target, skip_special_tokens=True).strip() == label


def test_decoder_target_where_the_template_ends_with_the_input(load: Loader) -> None:
    lm = load("llama")
    task = topic_task(template="{instruction}{input}")
    row = lm.encode(task, task.train[:1])[0]
    assert lm.tokenizer.decode(row.target) == f" {task.train[0].label}</s>"


@pytest.mark.parametrize(
    ("template", "text"),
    [("{instruction}{input} ", "the team won "), ("{instruction}{input}", ""), ("{input}\n{instruction} ", "a ")],
)
def test_decoder_prompt_ends_without_blanks(load: Loader, template: str, text: str) -> None:
    """Wherever the blanks come from: the template, the text or the instruction."""
    lm = load("llama")
    task = topic_task(template=template)
    example = Example("Which topic? ", text, "World", ("World",))
    row = lm.encode(task, [example])[0]
    prompt = task.prompt(example)
    assert prompt.endswith(" ") and [*row.input_ids] == lm.tokenizer(prompt.rstrip(" "))["input_ids"]
    assert lm.tokenizer.decode(row.target) == " World</s>"


def test_encoder_decoder_target_is_the_label(load: Loader) -> None:
    lm = load("t5")
    for example, row in zip(TOPICS.train, lm.encode(TOPICS, TOPICS.train), strict=True):
        assert lm.tokenizer.decode(row.target) == f"{example.label}</s>"
        assert lm.tokenizer.decode(row.input_ids) == f"{TOPICS.prompt(example)}</s>"


@GENERATIVE
def test_long_targets_are_cut_in_front_of_the_end(load: Loader, kind: str) -> None:
    whole = load(kind).encode(TOPICS, TOPICS.train)
    cut = load(kind, max_target_length=3).encode(TOPICS, TOPICS.train)
    assert max(len(row.target) for row in whole) > 3
    for long, short in zip(whole, cut, strict=True):
        assert short.target == (long.target if len(long.target) <= 3 else (*long.target[:2], long.target[-1]))


@GENERATIVE
def test_long_prompts_keep_instruction_and_ending(load: Loader, kind: str) -> None:
    lm = load(kind, max_length=60)
    example = Example(TOPICS.train[0].instruction, "the market rose — é " * 20, "World", ("World",))
    (row,) = lm.encode(TOPICS, [example])
    assert row.truncated and 50 < len(row.input_ids) <= 60
    text = lm.tokenizer.decode(row.input_ids, skip_special_tokens=True)
    assert text.startswith(example.instruction + "the market rose") and text.endswith("\nAnswer:")
    assert "�" not in text
    assert row.target == lm.encode(TOPICS, TOPICS.train[:1])[0].target
    assert not lm.encode(TOPICS, TOPICS.train[:1])[0].truncated


def test_encoders_read_and_cut_the_input_only(load: Loader) -> None:
    lm = load("bert", max_length=12)
    rows = lm.encode(TOPICS, TOPICS.train)
    assert any(row.truncated for row in rows) and not all(row.truncated for row in rows)
    for example, row in zip(TOPICS.train, rows, strict=True):
        whole = lm.tokenizer(example.input)["input_ids"]
        if row.truncated:
            assert 10 <= len(row.input_ids) <= 12
            assert list(row.input_ids) == [*whole[: len(row.input_ids) - 1], whole[-1]]
        else:
            assert list(row.input_ids) == whole


@ALL
def test_max_length_without_room_for_the_text(load: Loader, kind: str) -> None:
    lm = load(kind, max_length=2 if kind == "bert" else 20)
    with pytest.raises(ValueError, match=r"task 'topics': max_length \d+ leaves no room"):
        lm.encode(TOPICS, TOPICS.train)


@pytest.mark.parametrize(("kind", "form"), [("gpt2", "$A"), ("gpt2", "$A </s>"), ("t5", "$A")])
def test_a_prompt_without_tokens_is_named(load: Loader, kind: str, form: str) -> None:
    """Tokenizers as GPT-2's put nothing in front of a text."""
    lm, task = load(kind), topic_task(template="{input}")
    special = [("</s>", lm.tokenizer.eos_token_id)]
    lm.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=special)
    assert lm.tokenizer.decode(lm.encode(task, task.train)[0].input_ids) == "the market rose"
    with pytest.raises(ValueError, match=r"task 'topics': the prompt '' has no tokens: give it a text"):
        lm.encode(task, [*task.train, Example("a", "", "World", ("World",))])


@given(st.text(max_size=60), st.text(max_size=10), st.text(max_size=10), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_cut_inside(text: str, before: str, after: str, surplus: int) -> None:
    # one token a byte, as the worst case for characters of several tokens
    offsets, ids = [], []
    for i, character in enumerate(before + text + after):
        for byte in character.encode("utf-8", "surrogatepass"):
            ids.append(byte)
            offsets.append((i, i + 1))
    span = (len(before), len(before) + len(text))
    kept = cut_inside(ids, offsets, [0] * len(ids), span, surplus)
    if kept is None:
        assert surplus > len(text[1:].encode("utf-8", "surrogatepass"))
    else:
        back = bytes(kept).decode("utf-8", "surrogatepass")
        assert len(kept) <= len(ids) - surplus < len(kept) + 4
        assert back.startswith(before + text[:1]) and back.endswith(after)


@GENERATIVE
def test_greedy_answers_equal_generate_row_by_row(load: Loader, kind: str) -> None:
    lm = load(kind)
    rows = lm.encode(TOPICS, TOPICS.train)
    answers = lm.answer(TOPICS, rows, "generate", 6)
    for row, answer in zip(rows, answers, strict=True):
        ids = torch.tensor([row.input_ids])
        output = lm.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        if kind != "t5":
            output = output[ids.size(1) :]
        assert answer == lm.tokenizer.decode(output, skip_special_tokens=True).strip()
    assert len(set(answers)) > 1


def likelihood(lm: LanguageModel, row: Encoded, target: tuple[int, ...]) -> float:
    """Log-likelihood by one plain forward without padding."""
    labels = torch.tensor([target])
    if lm.family == "encoder-decoder":
        logits = lm.model(input_ids=torch.tensor([row.input_ids]), labels=labels).logits
    else:
        logits = lm.model(input_ids=torch.tensor([[*row.input_ids, *target]])).logits[:, len(row.input_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).sum().item()


@GENERATIVE
@pytest.mark.parametrize("elements", [1, 2**27])
def test_ranking_equals_likelihoods_one_by_one(
    load: Loader, kind: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generative, "RANK_ELEMENTS", elements)
    lm: Any = load(kind)
    rows = lm.encode(TOPICS, TOPICS.train)
    assert TOPICS.labels is not None
    candidates = lm._targets(TOPICS, TOPICS.labels)
    with torch.no_grad():
        scores = lm._rank(rows, candidates)
        expected = torch.tensor([[likelihood(lm, row, target) for target in candidates] for row in rows])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    best = [TOPICS.labels[i] for i in expected.argmax(1).tolist()]
    assert lm.answer(TOPICS, rows, "rank", 1) == best
    assert [lm.answer(TOPICS, [row], "rank", 1)[0] for row in rows] == best


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_many_labels_are_ranked_in_parts(load: Loader, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the vocabulary is small, the mask of labels side by side takes more than their logits."""
    lm: Any = load(kind)
    if lm.base.config._attn_implementation != "sdpa":
        pytest.skip("this version of transformers has no attention by torch for T5")
    rows = lm.encode(TOPICS, TOPICS.train[:2])
    candidates = list(lm.label_tokens(replace(TOPICS, labels=tuple(map(str, range(200))))).values())
    with torch.no_grad():
        whole = lm._rank(rows, candidates)
        monkeypatch.setattr(generative, "RANK_ELEMENTS", 800_000)
        with masks_of_attention() as masks:
            torch.testing.assert_close(lm._rank(rows, candidates), whole)
    side = max(mask.size(-2) for mask in masks if mask is not None)
    heads = lm.base.config.num_attention_heads if kind == "t5" else 1
    assert 100_000 < len(rows) * heads * side**2 <= 800_000


@GENERATIVE
def test_what_cannot_be_answered(load: Loader, kind: str) -> None:
    lm = load(kind)
    rows = lm.encode(FREE, FREE.train)
    with pytest.raises(ValueError, match="'summaries' is free text"):
        lm.answer(FREE, rows, "rank", 4)
    with pytest.raises(ValueError, match="unknown evaluation mode 'guess'"):
        lm.answer(FREE, rows, "guess", 4)  # type: ignore[arg-type]
    assert len(lm.answer(FREE, rows, "generate", 4)) == 2


def test_template_must_hold_the_input_once(load: Loader) -> None:
    with pytest.raises(ValueError, match=r"'topics': the template must hold \{input\} once"):
        load("llama").encode(topic_task(template="{input}{instruction}{input}"), TOPICS.train)


def pooled(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
    return states[0].mean(0)


def test_cosine_scores(load: Loader) -> None:
    lm = load("bert")
    assert isinstance(lm, EncoderModel)
    assert lm.classes == ("World", "Sports", "Science or Technology", "Bad")
    with lm.model.disable_adapter():
        names = torch.stack([pooled(lm.model, lm.tokenizer, label) for label in lm.classes])
    texts = torch.stack([pooled(lm.model, lm.tokenizer, example.input) for example in TOPICS.train])
    expected = 20 * F.cosine_similarity(texts[:, None], names[None], dim=-1)
    rows = lm.encode(TOPICS, TOPICS.train)
    assert [row.target for row in rows] == [(i % 3,) for i in range(8)]
    batch = lm.collate(rows)
    torch.testing.assert_close(lm.loss(batch)[0], F.cross_entropy(expected, batch["labels"], reduction="sum"))
    answers = lm.answer(TOPICS, rows, "generate", 1)
    assert answers == lm.answer(TOPICS, rows, "rank", 1) == [lm.classes[i] for i in expected.argmax(1).tolist()]


def test_label_embeddings_do_not_follow_the_adapter(load: Loader) -> None:
    lm = load("bert")
    assert isinstance(lm, EncoderModel) and lm.label_embeddings is not None
    torch.testing.assert_close(lm.label_embeddings, lm._embed_labels())
    assert not lm.label_embeddings.requires_grad
    assert torch.allclose(lm.label_embeddings.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("head", ["cosine", "linear"])
def test_label_space_of_the_task_only(load: Loader, head: str) -> None:
    union, own = load("bert", head=head), load("bert", head=head, label_space="task")
    rows = own.encode(TOPICS, TOPICS.train) + own.encode(SENTIMENT, SENTIMENT.train)
    batch = own.collate(rows)
    allowed = torch.tensor([[True, True, True, False]] * 8 + [[True, False, False, True]] * 2)
    assert batch["allowed"].tolist() == allowed.tolist()
    assert isinstance(union, EncoderModel)
    scores = union._scores({name: batch[name] for name in ("input_ids", "attention_mask")})
    masked = scores.masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(own.loss(batch)[0], F.cross_entropy(masked, batch["labels"], reduction="sum"))
    assert own.loss(batch)[0] < union.loss(union.collate(rows))[0]
    assert own.answer(SENTIMENT, rows[8:], "rank", 1) == [union.classes[i] for i in masked[8:].argmax(1).tolist()]


def test_encoder_refuses_what_it_cannot_classify(load: Loader) -> None:
    lm = load("bert")
    with pytest.raises(ValueError, match="task 'summaries' is not one of the tasks"):
        lm.encode(FREE, FREE.train)
    with pytest.raises(ValueError, match="task 'topics': label 'Bad' is not in the task's label list"):
        lm.encode(TOPICS, [Example("", "text", "Bad", ("Bad",))])


@ALL
def test_no_rows(load: Loader, kind: str) -> None:
    assert load(kind).encode(TOPICS, []) == []


def test_task_is_unchanged_by_braces_in_texts(load: Loader) -> None:
    lm = load("t5")
    task = Task("braces", "accuracy", ("a",), "{instruction}{input}\nAnswer:", ())
    example = Example("Fill {input}: ", "{instruction} {x}", "a", ("a",))
    (row,) = lm.encode(task, [example])
    assert lm.tokenizer.decode(row.input_ids) == "Fill {input}: {instruction} {x}\nAnswer:</s>"
