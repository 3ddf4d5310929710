"""torch.ops.kif: schemas that tell the truth, fakes, and torch.compile of code that calls the public functions."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

import kif_kernels as kk
from kif_kernels.layout import BINS, LEVELS, ROW, WHOLE_SHIFT
from kif_kernels.ops import SCHEMAS

N = 96
BF16, FP16, FP64, INT64 = torch.bfloat16, torch.float16, torch.float64, torch.int64


class Numbers:
    def __init__(self, n: int = N) -> None:
        self.n, self.generator = n, torch.Generator().manual_seed(n)

    def __call__(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.n, generator=self.generator).to(dtype)

    def scores(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self().abs().to(dtype)


def histogram() -> tuple[Tensor, Tensor]:
    return torch.zeros(BINS, dtype=INT64), torch.tensor([WHOLE_SHIFT, 0])


def calls() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operation: with as few tensors as possible, and with all of them."""
    make, no, yes = Numbers(), torch.tensor(False), torch.tensor(True)
    one, step, count = torch.tensor(1.0), torch.tensor(3.0, dtype=FP64), torch.tensor(0)
    weights = [w for pair in kk.RELEASED_CODE for w in pair]
    segments = kk.Segments.of([(0, 40), (48, 48)])
    places = (list(segments.starts), list(segments.numels), segments.chunks(torch.device("cpu")))
    state = torch.zeros(2, 1, LEVELS, ROW, dtype=INT64)
    state[:, :, 0, 0] = WHOLE_SHIFT
    moments = make(), make.scores()
    return {
        "gradient_state_": [
            (make(), one.clone(), no.clone(), step.clone(), count.clone(), 1.0, None, None),
            (
                make(FP16).view(8, 12), one.clone(), yes.clone(), step.clone(), count.clone(), 0.0, torch.tensor(0.5),
                one.clone(),
            ),
        ],
        "importance_ema_": [
            (make.scores(), make(), make(), 0.5, False, None, 0.0, None, None, None),
            (make.scores(BF16), make(BF16), make(), 0.5, True, make.scores(BF16), 0.7, no, *histogram()),
        ],
        "adamw_importance_": [
            (
                make(), make(), *moments, None, None, None, None, None, None, None, 0.1, None, 2.0, None, 0.9, 0.99,
                1e-8, 0.1, 0.0, 0.0, False, False, False, None, None, None,
            ),
            (
                make(), make(), make(), make.scores(), make.scores(), make.scores(), make(), make(), make(BF16),
                *histogram(), 0.0, torch.tensor(0.1), 0.0, step, 0.9, 0.99, 1e-8, 0.1, 0.5, 0.7, True, True, True,
                torch.tensor(0.3), torch.tensor(2.0), no,
            ),
        ],
        "histogram_": [(*histogram(), make.scores(), None), (*histogram(), make.scores(BF16), make.scores(BF16))],
        "thresholds_": [
            (
                torch.zeros(1, 1), None, None, torch.tensor([20]), torch.tensor([0]), [make.scores()], [], False, [],
                [], None,
            ),
            (
                torch.zeros(2, 1), torch.zeros(2, LEVELS, 1, BINS, dtype=INT64), state, torch.tensor([20]),
                torch.tensor([0]), [make.scores(), make.scores()], [make.scores(), make.scores()], False, [], [],
                None,
            ),
            (
                torch.zeros(1, 2), None, None, torch.tensor([5, 6]), torch.tensor([0, 0]), [make.scores()], [], False,
                *places,
            ),
        ],
        "fuse_": [
            (
                make(), make(), make(), make.scores(), make.scores(), None, None, one, one, weights, False, True, None,
                None, N, [], [], None,
            ),
            (
                make(), make(), make(), make.scores(BF16), make.scores(BF16), make.scores(BF16), make.scores(BF16),
                torch.ones(2), torch.zeros(2), weights, True, False, make(FP16), torch.zeros(3, dtype=INT64), N,
                *places,
            ),
        ],
    }  # fmt: skip


def copied(x: Any) -> Any:
    if isinstance(x, list):
        return [copied(y) for y in x]
    return x.clone() if isinstance(x, Tensor) else x


CASES = [(name, i) for name, variants in calls().items() for i in range(len(variants))]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_opcheck(name: str, variant: int) -> None:
    torch.library.opcheck(getattr(torch.ops.kif, name).default, calls()[name][variant])


def test_every_operation_is_checked() -> None:
    assert set(calls()) == set(SCHEMAS)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("name", list(SCHEMAS))
def test_the_schema_names_all_that_changes(monkeypatch: pytest.MonkeyPatch, name: str, backend: str) -> None:
    """With all tensors given: those declared as mutated change, no other does."""
    monkeypatch.setenv("KIF_BACKEND", backend)
    arguments = calls()[name][1]
    after = copied(list(arguments))
    operation = getattr(torch.ops.kif, name).default
    assert operation(*after) is None
    unused = {"histograms", "state", "theta_start", "scale", "skipped"}  # by the CPU, or by these arguments
    for declared, before, now in zip(operation._schema.arguments, arguments, after, strict=True):
        if isinstance(before, list) and before and isinstance(before[0], Tensor):
            assert all(torch.equal(x, y) for x, y in zip(before, now, strict=True)), declared.name
        elif isinstance(before, Tensor):
            mutated = declared.alias_info is not None and declared.alias_info.is_write
            assert torch.equal(before, now) != mutated or declared.name in unused, declared.name


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_autograd_notices_what_is_written(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = types.SimpleNamespace(**{name: lambda *args: None})  # a kernel writes without PyTorch
    monkeypatch.setattr("kif_kernels.ops.implementation", lambda device: module)
    arguments = copied(list(calls()[name][1]))
    operation = getattr(torch.ops.kif, name).default
    before = [x._version if isinstance(x, Tensor) else None for x in arguments]
    operation(*arguments)
    for declared, version, now in zip(operation._schema.arguments, before, arguments, strict=True):
        if version is not None:
            mutated = declared.alias_info is not None and declared.alias_info.is_write
            assert (now._version > version) == mutated, declared.name


def test_operations_work_in_inference_mode() -> None:
    normal = torch.ones(4)
    with torch.inference_mode():
        made = torch.ones(4)
        for importance in (made, normal):
            kk.importance_ema_(importance, torch.full((4,), 3.0), torch.ones(4), 0.5)
    assert made.tolist() == normal.tolist() == [2.0] * 4


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_parameter_is_written_as_a_tensor_is(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("KIF_BACKEND", backend)
    results = []
    for kind in (torch.nn.Parameter, torch.Tensor):
        make = Numbers()
        weight, grad = kind(make()), make()
        scores = kk.importance_ema_(make.scores(), weight, grad, 0.5)
        kk.adamw_importance_(
            weight, grad, make(), make.scores(), scores, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=2
        )
        kk.fuse_(weight, make(), make(), scores, make.scores(), torch.tensor(0.5), torch.tensor(0.5))
        assert not scores.requires_grad and weight.grad_fn is None
        results.append((weight.detach(), scores))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def phases(
    weight: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], scores: tuple[Tensor, Tensor], start: Tensor,
    inner: Tensor, state: tuple[Tensor, ...], kept: Tensor, density: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a round does, through the public functions, with operations of PyTorch around them."""
    scale, skip, step, skipped = state
    grad = grad * 2.0
    kk.gradient_state_(grad, scale, skip, step, skipped, max_norm=1.0)
    kk.importance_ema_(scores[0], weight, grad, 0.55, reset=True, skip=skip)
    kk.adamw_importance_(
        weight, grad, *moments, scores[1], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=step, decay=0.4,
        grad_scale=scale, skip=skip, zero_grad=True,
    )  # fmt: skip
    t_in, t_out = (kk.importance_threshold(score, density) for score in scores)
    kk.fuse_(weight, start, inner, *scores, t_in, t_out, kept=kept)
    return weight + grad, t_in * 2.0, t_out


@pytest.mark.parametrize(
    "density",
    [
        pytest.param(0.2, id="number"),
        pytest.param(torch.tensor(0.2), id="tensor"),
    ],
)
def test_compiled_code_equals_eager(monkeypatch: pytest.MonkeyPatch, density: float | Tensor) -> None:
    monkeypatch.delenv("KIF_BACKEND", raising=False)
    results = []
    for function in (phases, torch.compile(phases, fullgraph=True, backend="aot_eager")):
        for n in (N, 160):  # the second size with symbolic shapes
            make = Numbers(n)
            arguments = (
                make(), make(), (make(), make.scores()), (make.scores(), make.scores()), make(), make(),
                (torch.zeros(()), torch.zeros((), dtype=torch.bool), torch.zeros((), dtype=FP64), torch.tensor(0)),
                torch.zeros(3, dtype=INT64),
            )  # fmt: skip
            returned = function(*arguments, density)
            results.append([*returned, *(t for a in arguments for t in (a if isinstance(a, tuple) else (a,)))])
    for eager, compiled in zip(results[:2], results[2:], strict=True):
        for expected, actual in zip(eager, compiled, strict=True):
            assert torch.equal(expected, actual)
        assert int(compiled[-1][0]) >= 20 and float(compiled[-3]) == 1.0


def test_a_selection_made_outside_is_used_by_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KIF_BACKEND", raising=False)
    selection, make = kk.StreamingThreshold(0.2, N, sides=2), Numbers()
    a, b, weight = make.scores(), make.scores(), make()

    def select(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        kk.importance_ema_(x, w, y, 0.5)
        return selection.select((x, y)) * 1.0

    wanted = select(a.clone(), b, weight)
    assert torch.equal(torch.compile(select, fullgraph=True, backend="aot_eager")(a, b, weight), wanted)
