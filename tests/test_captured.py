"""Recorded passes: the loss and gradient of launched ones, in few shapes, with nothing that a recording would miss."""

from __future__ import annotations

import gc
import inspect
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    Kind,
    build_tiny,
    build_type,
    masks_of_attention,
    rerun,
    sentiment_task,
    topic_task,
    without_own_dropout,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kif.arena import ParameterArena
from kif.attention import (
    _hides_what_follows,
    causal_masks_seen,
    cudnn_where_safe,
    without_causal_masks,
    without_cudnn,
)
from kif.captured import CapturedSteps, CudaGraphs
from kif.config import RunConfig
from kif.encoder import EncoderModel
from kif.families import IGNORE, Encoded, LanguageModel, rounded_width
from kif.low_precision import BF16Adapter
from kif.methods import METHODS
from kif.methods import base as methods_base
from kif.models import load_language_model
from kif.predict import Predictor
from kif.run import evaluate_run, train

KINDS: dict[str, dict[str, Any]] = {
    "t5": {},
    "llama": {},
    "gpt2": {"target_modules": ["c_attn"]},
    "bert": {},
    "bert-linear": {"head": "linear", "label_space": "task"},
}
TOPICS, SENTIMENT = topic_task(12), sentiment_task()

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models without dropout of their own."""
    return {kind: without_own_dropout(build_tiny(kind, tmp_path_factory.mktemp(kind))) for kind in get_args(Kind)}


def load(kind: str, folders: dict[str, Path], **options: Any) -> tuple[LanguageModel, ParameterArena, list[Encoded]]:
    """A model whose LoRA B are not zero, its arena, and rows of two tasks."""
    given = {"device": "cpu", "lora_dropout": 0.0, **KINDS.get(kind, {}), **options}
    config = RunConfig(model=str(folders[kind.split("-")[0]]), **given)
    lm = load_language_model(config, {task.name: task.labels for task in (TOPICS, SENTIMENT)})
    lm.model.train()
    arena = ParameterArena.of(lm.model)
    generator = torch.Generator().manual_seed(1)
    for name, view in arena.views(arena.data):
        if "lora_B" in name:
            view.copy_(torch.randn(view.shape, generator=generator) * 0.02)
    return lm, arena, [*lm.encode(TOPICS, TOPICS.train), *lm.encode(SENTIMENT, SENTIMENT.train)]


def launched(lm: LanguageModel, arena: ParameterArena, rows: list[Encoded]) -> tuple[float, Tensor]:
    arena.zero_grad()
    loss, count = lm.loss(lm.collate(rows))
    (loss / count).backward()
    return loss.item() / count, arena.grad.clone()


def looked_at_anew(lm: LanguageModel) -> None:
    """A model that a test has changed since it was loaded."""
    vars(lm).pop("_looks_back_only", None)


def wide(lm: LanguageModel, row: Encoded, width: int) -> Encoded:
    """`row` such that a batch with it has so many tokens, a decoder's with the label."""
    length = width - (len(row.target) if lm.family == "decoder" else 0)
    return replace(row, input_ids=(row.input_ids * width)[:length])


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_widths_are_few_and_little_is_added(width: int, limit: int) -> None:
    found = rounded_width(width, limit)
    assert width <= found <= max(width, limit)
    if width <= limit:
        assert found == limit or found % 8 == 0
        assert found - width < max(8, width / 16)
    assert len({rounded_width(w, 10**6) for w in range(257, 513)}) <= 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 5, 14])
def test_the_loss_of_few_shapes_is_the_loss(kind: str, count: int, folders: dict[str, Path]) -> None:
    lm, arena, rows = load(kind, folders)
    loss, gradient = launched(lm, arena, rows[-count:])
    arena.zero_grad()
    batch = lm.fixed_batch(rows[-count:], 14)
    assert {len(tensor) for tensor in batch.values()} == {14}
    assert batch["input_ids"].size(1) % 8 == 0
    found = lm.fixed_loss(batch) / lm.label_count(rows[-count:])
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(arena.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_are_those_launched_whatever_the_batch(kind: str, folders: dict[str, Path]) -> None:
    lm, arena, rows = load(kind, folders)
    recorded: list[int] = []

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        recorded.append(1)
        return rerun(run)

    captured = CapturedSteps(lm, arena, [4, 2], record)
    batches = [rows[:4], rows[4:8], rows[8:11], rows[-2:], rows[:1], rows[2:7]]
    state = torch.random.get_rng_state()
    for batch in [*batches, *batches]:
        # fusion and steps change the weights in place between passes
        arena.data.mul_(1.01)
        loss, gradient = launched(lm, arena, batch)
        arena.grad.fill_(0.25)
        found = captured.backward(batch, lm.label_count(batch))
        assert found.item() == pytest.approx(loss, rel=1e-5) and not found.requires_grad
        torch.testing.assert_close(arena.grad - 0.25, gradient, rtol=1e-3, atol=1e-6)
    assert torch.equal(state, torch.random.get_rng_state())
    shapes = {
        tuple(t.shape for t in lm.fixed_batch(batch, max(len(batch), 2 if len(batch) < 3 else 4)).values())
        for batch in batches
    }
    assert len(recorded) == len(shapes)

    # results are the caller's
    first = captured.backward(batches[0], 1)
    kept = first.item()
    captured.backward(batches[1], 1)
    assert first.item() == kept

    # an arena in another place
    before, old = len(recorded), (arena.data, arena.grad)  # these are kept, so that the new ones cannot lie there
    lm.model.double().float()
    arena.check()
    loss, gradient = launched(lm, arena, batches[0])
    arena.zero_grad()
    assert captured.backward(batches[0], lm.label_count(batches[0])).item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(arena.grad, gradient, rtol=1e-3, atol=1e-6)
    assert len(recorded) == before + 1 and arena.data is not old[0]


class NoHost(TorchDispatchMode):
    """Refuses what a recording cannot hold: reading a value, tensors of the host, sizes that depend on values."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), function
        return result


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a tensor from the host")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_a_pass_depends_on_the_host(
    kind: str, precision: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, _, rows = load(kind, folders, precision=precision, lora_dropout=0.1)
    if kind == "t5" and lm.base.config._attn_implementation == "eager":
        pytest.skip("the T5 of this transformers has no SDPA, and its mask is made with a number from the host")
    batch = {name: tensor.to("meta") for name, tensor in lm.fixed_batch(rows[:3], 4).items()}
    lm.model.to("meta")
    if getattr(lm, "label_embeddings", None) is not None:
        lm.label_embeddings = lm.label_embeddings.to("meta")  # type: ignore[attr-defined]
    arena = ParameterArena.of(lm.model)
    if precision == "bf16":
        BF16Adapter(lm, arena)
    # transformers asks before it looks at a mask
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    # these copy from the host, which a mode is not told
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    try:
        with NoHost():
            lm.fixed_loss(batch).backward()
    except RuntimeError as error:
        if "unknown device type for autocast" in str(error):
            pytest.skip("transformers 5.0 asks for autocast of the device, which meta has not")
        raise
    # a value cannot be read there, so this would have been noticed
    with pytest.raises((RuntimeError, NotImplementedError)), NoHost():
        batch["labels"].any().item()
    with pytest.raises(AssertionError), NoHost():
        torch.ones(1)


def run(model: Path, data: Path, output: Path, **options: Any) -> list[list[float]]:
    """Mean losses of the rounds of a run: on new rows and on memory."""
    config = RunConfig(
        model=str(model), data=str(data), tasks=["colours", "sizes"], output=str(output), lr=1e-3,
        steps_per_task=12, batch_size=5, gradient_accumulation=2, lora_dropout=0.0, limit_eval=2, memory_fraction=0.2,
        cache_dir=str(output.parent / "cache"), **{"device": "cpu", **options},
    )  # fmt: skip
    train(config, progress=False)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [[line["loss"], line["memory_loss"] or 0.0] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_trains_as_without_or_refuses(
    name: str, folders: dict[str, Path], written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods_base, "CapturedSteps", partial(CapturedSteps, record=rerun))
    train_one = partial(run, folders["t5"], written, method=name)
    if METHODS[name].plain_passes:
        found, expected = train_one(tmp_path / "recorded", cuda_graphs=True), train_one(tmp_path / "launched")
        assert len(expected) > 1
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    else:
        with pytest.raises(ValueError, match=f"cuda_graphs does not work with {name}, which changes passes"):
            train_one(tmp_path / "recorded", cuda_graphs=True)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_other_families_train_as_without(
    kind: str, folders: dict[str, Path], written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods_base, "CapturedSteps", partial(CapturedSteps, record=rerun))
    train_one = partial(run, folders[kind], written)
    found, expected = train_one(tmp_path / "recorded", cuda_graphs=True), train_one(tmp_path / "launched")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_full_micro_batches_are_not_filled_up(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_base, "world", lambda: (0, processes))
    for batch_size, outer, accumulation in ((8, None, 1), (5, 12, 2), (1, 3, 4)):
        config = RunConfig(batch_size=batch_size, outer_batch_size=outer, gradient_accumulation=accumulation)
        expected = []
        for size in (batch_size, outer or batch_size):
            first = range(size)[::processes]
            expected.append(len(first[::accumulation]))
        assert methods_base._batch_sizes(config) == expected


def test_what_cannot_be_recorded_is_refused(folders: dict[str, Path], written: Path, tmp_path: Path) -> None:
    for options in ({"quantization": "nf4"}, {"gradient_checkpointing": True}, {"shard_base": True}):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"cuda_graphs does not work with {name}: leave one of them out"):
            RunConfig(cuda_graphs=True, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cuda_graphs needs a GPU, the model is on cpu: leave it out"):
        run(folders["t5"], written, tmp_path / "run", cuda_graphs=True)
    lm, arena, _ = load("t5", folders)
    lm.listeners.append(lambda ids, mask: None)
    with pytest.raises(ValueError, match="listeners"):
        CapturedSteps(lm, arena, [4], rerun)


@pytest.mark.parametrize("kind", ["t5", "eager", "bert", "bert-linear"])
def test_a_pass_is_recorded_with_a_mask_and_without_cudnn(kind: str, folders: dict[str, Path]) -> None:
    lm, arena, rows = load("llama" if kind == "eager" else kind, folders)
    if kind == "eager":
        lm.base.config._attn_implementation = "eager"
        looked_at_anew(lm)
    seen: list[tuple[bool, bool]] = []
    decoders: list[bool] = []
    loss = lm.fixed_loss
    lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: decoders.append(bool(kwargs.get("decoder_attention_mask", torch.zeros(1)).all())),
        with_kwargs=True,
    )

    def watched(batch: Any) -> Tensor:
        seen.append((bool(batch["attention_mask"].all()), torch.backends.cuda.cudnn_sdp_enabled()))
        return loss(batch)

    lm.fixed_loss = watched  # type: ignore[method-assign]
    # prompts and labels as long as the batch is wide, so that they leave nothing to mask
    target = rows[0].target if lm.family == "encoder" else (rows[0].target * 8)[:8]
    alike = [replace(rows[0], input_ids=(rows[0].input_ids * 8)[:16], target=target)] * 4
    assert lm.fixed_batch(alike, 4)["attention_mask"].all()
    CapturedSteps(lm, arena, [4], rerun).backward(alike, lm.label_count(alike))
    assert seen == [(False, False), (True, False)]
    # a decoder's own, if it has one, has something to mask as well
    assert not decoders[0] and len(decoders) == 2
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("kind", "masked"), [("llama", []), ("gpt2", []), ("mistral", ["wide"])])
def test_decoders_are_recorded_without_a_mask_unless_it_hides_more(
    kind: str, masked: list[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Such as that of a sliding window in batches wider than it."""
    if kind == "mistral":
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, **heads}
        folders = {kind: build_type("mistral", "decoder", tmp_path, sliding_window=16, **small)}
    lm, arena, rows = load(kind, folders)
    captured = CapturedSteps(lm, arena, [4], rerun)
    for name, tokens in {"8": 8, "16": 16, "wide": 40}.items():
        batch = [
            replace(row, input_ids=(row.input_ids * 5)[: tokens - 5 - i], target=(1, 2, 3))
            for i, row in enumerate(rows[:3])
        ]
        loss, gradient = launched(lm, arena, batch)
        arena.zero_grad()
        with masks_of_attention() as seen:
            assert captured.backward(batch, lm.label_count(batch)).item() == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(arena.grad, gradient, rtol=1e-3, atol=1e-6)
        # the first pass only looks
        recorded = seen[len(seen) // 3 :]
        assert recorded and {mask is not None for mask in recorded} == {name in masked}


def test_which_masks_hide_what_follows_and_nothing_else() -> None:
    x = torch.zeros(2, 1, 5, 4)
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    additive = torch.zeros(5, 5).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (causal, causal.expand(2, 1, 5, 5), additive, additive.masked_fill(~causal, float("-inf"))):
        assert _hides_what_follows(x, x, mask)
    less, more = causal.clone(), causal.clone()
    less[..., 1, 2], more[..., 4, 0] = True, False
    padded = torch.cat([causal, more])
    biased, weak = additive.clone(), additive.clone()
    biased[..., 3, 1], weak[..., 1, 2] = -0.5, -1e4
    for mask in (less, more, padded, biased, weak, causal[..., :4], ~causal):
        assert not _hides_what_follows(x, x, mask)
    longer = torch.zeros(2, 1, 6, 4)
    assert not _hides_what_follows(x, longer, causal) and not _hides_what_follows(longer, x, causal)
    # of more keys than queries the first or the last ones may be those before
    assert not _hides_what_follows(x, longer, torch.ones(5, 6, dtype=torch.bool).tril())


@pytest.mark.parametrize("owner", ["transformers", "somebody"])
def test_attention_is_as_before_once_the_masks_are_back(owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if owner == "somebody":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", lambda *_: None)
    before, local = ALL_ATTENTION_FUNCTIONS["sdpa"], dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for block in (causal_masks_seen, without_causal_masks):
        with pytest.raises(KeyError), block():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
            raise KeyError
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before and ALL_ATTENTION_FUNCTIONS._local_mapping == local


def test_what_follows_is_hidden_whatever_the_caller_says_beside_its_mask() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    query, key, value = torch.randn(3, 1, 1, 5, 4)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    expected, _ = attend(torch.nn.Module(), query, key, value, mask, is_causal=False)
    with without_causal_masks():
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](torch.nn.Module(), query, key, value, mask, is_causal=False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "masked", "dropout", "version", "allowed"),
    [
        (64, 64, False, 0, 91900, True),
        (64, 64, True, 0.0, 91900, False),
        (72, 72, True, 0.0, 91900, True),
        (128, 128, True, 0.0, 92000, True),
        (128, 128, True, 0.0, 91500, False),
        (128, 128, False, 0.0, None, False),
        (192, 192, True, 0.0, 91900, False),
        (128, 128, True, 0.125, 91900, True),
        (128, 128, True, 0.1, 91900, False),
        (8, 128, True, 0.0, 91900, False),
        (8, 128, False, 0.0, 91900, False),
        (128, 192, False, 0.0, 91900, False),
        (56, 56, False, 0.0, 91900, False),
    ],
)
def test_where_attention_may_be_cudnns(
    queries: int,
    keys: int,
    masked: bool,
    dropout: float,
    version: int | None,
    allowed: bool,
    outside: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attend(*args: Any, **options: Any) -> tuple[bool, int, Any]:
        return torch.backends.cuda.cudnn_sdp_enabled(), len(args), options

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    query, key = torch.zeros(1, 1, queries, 8), torch.zeros(1, 1, keys, 8)
    with nullcontext() if outside else without_cudnn(), cudnn_where_safe():
        mask = torch.zeros(queries, keys) if masked else None
        found = F.scaled_dot_product_attention(query, key, key, mask, dropout, False, scale=1.0)
        assert found == (allowed, 6, {"scale": 1.0})
        options: Any = {"attn_mask": mask, "dropout_p": dropout, "is_causal": False}
        found = F.scaled_dot_product_attention(query, key, key, **options)
        assert found == (allowed, 3, options)
        assert torch.backends.cuda.cudnn_sdp_enabled() == outside
    assert F.scaled_dot_product_attention is attend


@pytest.mark.parametrize(
    ("kind", "width", "dropout", "allowed", "forbidden"),
    [
        ("t5", 72, 0.0, {(72, 72)}, {(8, 72), (8, 8)}),
        ("t5", 64, 0.0, set(), {(64, 64), (8, 64), (8, 8)}),
        ("t5", 72, 0.1, set(), {(72, 72), (8, 72), (8, 8)}),
        ("llama", 64, 0.0, {(64, 64)}, set()),
        ("llama-masked", 72, 0.0, set(), {(72, 72)}),
    ],
)
def test_recorded_attention_may_be_cudnns(
    kind: str,
    width: int,
    dropout: float,
    allowed: set[Any],
    forbidden: set[Any],
    folders: dict[str, Path],
    monkeypatch: Any,
) -> None:
    lm, arena, rows = load(kind.removesuffix("-masked"), folders)
    if lm.base.config._attn_implementation != "sdpa":
        pytest.skip("this version of transformers has no attention by torch for T5")
    for module in lm.base.modules():
        # of T5's attention
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout
    seen: dict[bool, set[Any]] = {True: set(), False: set()}
    attend = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        seen[torch.backends.cuda.cudnn_sdp_enabled()].add((query.size(2), key.size(2)))
        return attend(query, key, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    steps = CapturedSteps(lm, arena, [4], rerun)
    # only what is recorded is watched; where windows slide there is a mask
    monkeypatch.setattr(steps, "_only_causal", lambda inputs: kind == "llama")
    batch = [wide(lm, rows[0], width), *[replace(rows[0], input_ids=rows[0].input_ids[:3])] * 3]
    steps.backward(batch, lm.label_count(batch))
    assert seen == {True: allowed, False: forbidden} and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_without_label_or_prompt_predict_nothing(kind: str, folders: dict[str, Path]) -> None:
    lm: Any = load(kind, folders)[0]
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    labels = torch.tensor([[IGNORE] * 4, [5, 6, IGNORE, IGNORE], [IGNORE, IGNORE, 7, 8]])
    logits, following = lm._predictions({"input_ids": ids}, labels)
    assert following.tolist() == [[IGNORE, IGNORE], [IGNORE, 6], [7, 8]]
    whole = lm.model(input_ids=ids).logits
    torch.testing.assert_close(logits[1, 1], whole[1, 0])
    torch.testing.assert_close(logits[2], whole[2, 1:3])
    none, nothing = lm._predictions({"input_ids": ids[:1]}, labels[:1])
    assert none.shape[:2] == nothing.shape == (1, 0)


def test_the_longest_rows_share_a_shape(folders: dict[str, Path]) -> None:
    lm, _, rows = load("llama", folders, max_length=67, max_target_length=5)
    widths = set()
    for length, target in ((67, 5), (66, 5), (67, 3), (65, 4)):
        row = replace(rows[0], input_ids=(rows[0].input_ids * 9)[:length], target=tuple(range(1, target + 1)))
        widths.add(lm.fixed_batch([row], 1)["input_ids"].size(1))
    assert widths == {72}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_that_make_logits_everywhere(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm: Any = load(kind, folders)[0]
    prompts = lm.prompts(lm.encode(TOPICS, TOPICS.train[:2]))
    expected, _ = lm._last_logits(3, **prompts)
    monkeypatch.setattr(lm, "_forward_accepts", lambda argument: False)
    found, _ = lm._last_logits(3, **prompts)
    assert found.shape[:2] == (2, 3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_are_made_where_labels_are_predicted_only(kind: str, folders: dict[str, Path]) -> None:
    lm, _, rows = load(kind, folders)
    batch = [rows[0], replace(rows[1], input_ids=rows[1].input_ids[:3]), *rows[-2:]]
    longest = max(len(row.target) for row in batch)
    seen: list[tuple[int, ...]] = []
    lm.base.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:2])))
    lm.loss(lm.collate(batch))
    lm.fixed_loss(lm.fixed_batch(batch, 4))
    assert seen == [(4, longest), (4, rounded_width(longest, lm.max_target_length))]


def test_a_run_does_without_cudnn(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], written: Path) -> None:
    monkeypatch.setattr("kif.run._train", lambda *given: {"cudnn": torch.backends.cuda.cudnn_sdp_enabled()})
    config = RunConfig(model=str(folders["t5"]), data=str(written), tasks=["colours"], device="cpu")
    assert train(config) == {"cudnn": False} and torch.backends.cuda.cudnn_sdp_enabled()


def test_answers_of_a_finished_run_do_without_cudnn(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], written: Path, tmp_path: Path
) -> None:
    run(folders["bert"], written, tmp_path / "run", head="cosine")
    seen: list[bool] = []
    answer = EncoderModel.answer

    def watched(*given: Any) -> list[str]:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return answer(*given)

    monkeypatch.setattr(EncoderModel, "answer", watched)
    evaluate_run(tmp_path / "run", progress=False)
    scored = len(seen)
    Predictor(tmp_path / "run", "colours").run([b"a red one"], "rows", io.StringIO(), text=True)
    assert len(seen) > scored > 0 and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()


def test_the_order_in_which_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    @contextmanager
    def entered(name: str, *arguments: Any) -> Iterator[None]:
        events.append((name, *arguments))
        yield
        events.append(f"end of {name}")

    aside, now = Mock(), Mock()
    aside.wait_stream.side_effect = lambda stream: events.append("aside waits")
    now.wait_stream.side_effect = lambda stream: events.append("waits for aside")
    inspected = inspect.signature(torch.cuda.graph)
    for name, value in {
        "device": lambda device: entered("device"), "Stream": lambda: aside, "current_stream": lambda: now,
        "stream": lambda stream: entered("stream"), "graph_pool_handle": lambda: (0, len(events)), "CUDAGraph": Mock,
        "graph": lambda graph, **how: entered("graph", inspected.bind(graph, **how).arguments["pool"]),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    record = CudaGraphs(torch.device("cuda"))

    collecting: list[bool] = []

    def run() -> Tensor:
        events.append("run")
        collecting.append(gc.isenabled())
        return torch.zeros(())

    replay, _ = record(run)
    assert collecting == [True, True, True, False] and gc.isenabled()
    assert events == [
        ("device",), "aside waits", ("stream",), "run", "run", "run", "end of stream", "waits for aside",
        ("graph", (0, 8)), "run", "end of graph", "end of device",
    ]  # fmt: skip
    replay()
    # the second graph shares the first one's memory
    record(run)
    assert [event for event in events if event[0] == "graph"] == [("graph", (0, 8))] * 2

    def bad(error: Exception) -> Callable[[], Tensor]:
        def run() -> Tensor:
            raise error

        return run

    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph, leave cuda_graphs out: no sync"):
        record(bad(RuntimeError("no sync")))
    assert gc.isenabled()
    with pytest.raises(torch.OutOfMemoryError, match=r"^full$"):
        record(bad(torch.OutOfMemoryError("full")))


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_on_a_gpu_give_what_launched_passes_give(kind: str, folders: dict[str, Path]) -> None:
    lm, arena, rows = load(kind, folders, device="cuda")
    captured = CapturedSteps(lm, arena, [4])
    for i, batch in enumerate([rows[:4], rows[4:8], rows[8:11], rows[-2:]] * 3):
        arena.data.mul_(1.01)
        if i == 8:
            # to another place, where all is recorded anew
            lm.model.double().float()
            arena.check()
        loss, gradient = launched(lm, arena, batch)
        arena.zero_grad()
        found = captured.backward(batch, lm.label_count(batch))
        assert found.item() == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(arena.grad, gradient, rtol=1e-2, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_bf16_with_much_padding(kind: str, device: str, folders: dict[str, Path]) -> None:
    lm, arena, rows = load(kind, folders, device=device, precision="bf16")
    ids = (rows[0].input_ids * 64)[:56]
    batch = [replace(row, input_ids=ids[: 56 if i else 3]) for i, row in enumerate(rows[:4])]
    loss, gradient = launched(lm, arena, batch)
    arena.zero_grad()
    steps = CapturedSteps(lm, arena, [4], rerun if device == "cpu" else None)
    assert steps.backward(batch, lm.label_count(batch)).item() == pytest.approx(loss, rel=0.02)
    assert arena.grad.isfinite().all() and (arena.grad - gradient).norm() < 0.1 * gradient.norm()


@needs_gpu
@pytest.mark.parametrize("width", [64, 72, 128, 192])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_gradients_of_recorded_attention_on_a_gpu(kind: str, width: int, folders: dict[str, Path]) -> None:
    lm, arena, rows = load(kind, folders, device="cuda", precision="bf16")
    if kind == "t5":
        # attention does not change, but cuDNN's gradients with a mask are NaN at some widths
        lm.base.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.sub_(128)
    # and a row without labels
    batch = [replace(rows[0], input_ids=rows[0].input_ids[:3]), *[wide(lm, rows[0], width)] * 2]
    with without_cudnn():
        loss, gradient = launched(lm, arena, batch)
    arena.zero_grad()
    steps = CapturedSteps(lm, arena, [4])
    assert steps.backward(batch, lm.label_count(batch)).item() == pytest.approx(loss, rel=0.02)
    assert arena.grad.isfinite().all() and (arena.grad - gradient).norm() < 0.1 * gradient.norm()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        steps.backward(batch, lm.label_count(batch))
        torch.cuda.synchronize()
    if torch.cuda.get_device_capability() >= (9, 0) and (torch.backends.cudnn.version() or 0) >= 91900:
        expected = kind == "llama" or width % 128 != 64
        assert any("cudnn" in event.key for event in profiler.key_averages()) == expected


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replays_on_a_gpu_draw_new_dropout_that_a_seed_fixes(precision: Any, folders: dict[str, Path]) -> None:
    # that of torch, and that of attention by cuDNN
    own = 0.5 if precision == "bf16" else 0.0
    lm, arena, rows = load("t5", folders, device="cuda", lora_dropout=0.5 - own, precision=precision)
    for block in lm.base.encoder.block:
        block.layer[0].SelfAttention.dropout = own
    batch = [wide(lm, rows[0], 72), *rows[1:4]]

    def three() -> list[float]:
        captured = CapturedSteps(lm, arena, [4])
        torch.manual_seed(3)
        return [captured.backward(batch, 1).item() for _ in range(3)]

    first = three()
    assert len(set(first)) == 3 and first == three()


@needs_gpu
def test_a_run_on_a_gpu_with_graphs(folders: dict[str, Path], written: Path, tmp_path: Path) -> None:
    train_one = partial(run, folders["t5"], written, device="cuda")
    found, expected = train_one(tmp_path / "graphs", cuda_graphs=True), train_one(tmp_path / "launched")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("kind", "needed"), [("llama", False), ("gpt2", False), ("eager", True), ("sees", True)])
def test_padding_behind_a_row_needs_no_mask(
    kind: str, needed: bool, folders: dict[str, Path], monkeypatch: Any
) -> None:
    """Of a decoder by torch's attention; without a mask that takes its fastest way."""
    lm, _, rows = load("llama" if needed else kind, folders)
    batch = [rows[0], replace(rows[1], input_ids=rows[1].input_ids[:3]), *rows[-2:]]
    if kind == "eager":
        lm.base.config._attn_implementation = "eager"
    elif kind == "sees":
        # as a model whose encoder of pictures sees in both directions
        next(module for module in lm.base.modules() if hasattr(module, "is_causal")).is_causal = False
        monkeypatch.setattr(lm.base.config, "_attn_implementation", "sdpa")
    looked_at_anew(lm)
    losses = [lm.loss(lm.collate([row]))[0].item() for row in batch]
    seen: list[bool] = []
    lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append("attention_mask" in kwargs), with_kwargs=True
    )
    found = lm.loss(lm.collate(batch))[0].item()
    assert seen == [needed]
    if kind != "sees":
        assert found == pytest.approx(sum(losses), rel=1e-5)
