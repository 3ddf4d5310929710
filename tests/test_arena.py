"""The arena: views stay views, values survive, and a parameter that left is reported."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_model
from torch import nn

from kif.arena import ALIGNMENT, ArenaError, ParameterArena


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@given(st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_layout(shapes: list[list[int]]) -> None:
    parameters = [(f"p{i}", nn.Parameter(torch.randn(shape))) for i, shape in enumerate(shapes)]
    values = [p.detach().clone() for _, p in parameters]
    arena = ParameterArena(parameters)
    assert arena.numel == sum(v.numel() for v in values)
    end = 0
    for segment, (name, parameter), value in zip(arena.segments, parameters, values, strict=True):
        assert segment.name == name and segment.start % ALIGNMENT == 0 and segment.start >= end
        end = segment.start + segment.numel
        assert torch.equal(parameter.data, value) and torch.equal(segment.view(arena.data), value)
    padding = torch.ones_like(arena.data, dtype=torch.bool)
    for segment in arena.segments:
        padding[segment.start : segment.start + segment.numel] = False
    assert int(padding.sum()) == arena.data.numel() - arena.numel
    assert not arena.data[padding].any()


def test_backward_accumulates_into_the_flat_gradient() -> None:
    plain, ours = model(), model()
    arena = ParameterArena.of(ours)
    x = torch.randn(4, 5)
    for net in (plain, ours):
        net(x).sum().backward()
        net(2 * x).pow(2).sum().backward()
    for (_, grad), parameter in zip(arena.views(arena.grad), plain.parameters(), strict=True):
        assert torch.equal(grad, parameter.grad)
    arena.data.add_(1.0)
    assert torch.allclose(ours[0].weight, plain[0].weight + 1.0)


def test_gradients_set_to_none_or_replaced_come_back() -> None:
    net = model()
    arena = ParameterArena.of(net)
    net(torch.randn(4, 5)).sum().backward()
    net.zero_grad(set_to_none=True)
    net[0].weight.grad = torch.full_like(net[0].weight, 3.0)
    arena.check()
    assert (net[0].weight.grad == 3.0).all() and not net[2].weight.grad.any()
    net(torch.randn(4, 5)).sum().backward()
    assert net[0].weight.grad.data_ptr() == arena.grad.data_ptr()


def test_load_state_dict_and_deepcopy() -> None:
    net, other = model(), model()
    with torch.no_grad():
        other[0].weight.fill_(9.0)
    arena = ParameterArena.of(net)
    net.load_state_dict(other.state_dict())
    arena.check()
    assert (arena.segments[0].view(arena.data) == 9.0).all()
    state = copy.deepcopy(net.state_dict())
    state["0.weight"].fill_(4.0)
    net.load_state_dict(state, assign=True)
    arena.check()
    assert (arena.segments[0].view(arena.data) == 4.0).all()
    assert net[0].weight.data_ptr() == arena.data.data_ptr()


def test_parameters_are_saved_as_if_there_were_no_arena(tmp_path: Path) -> None:
    net = model()
    arena = ParameterArena.of(net)
    arena.data.add_(1.0)
    save_model(net, tmp_path / "model.safetensors")
    torch.save(net.state_dict(), tmp_path / "model.pt")
    state = net.state_dict()
    for saved in (load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "model.pt")):
        assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    accelerate = pytest.importorskip("accelerate").Accelerator(cpu=True)
    accelerate.save_model(net, tmp_path / "folder")
    assert load_file(tmp_path / "folder" / "model.safetensors").keys() == state.keys()


def test_the_arena_follows_a_moved_model() -> None:
    net = model()
    arena = ParameterArena.of(net)
    arena.buffer("moment").fill_(2.0)
    values = arena.data.clone()
    net.to("meta")
    net.to_empty(device="cpu")
    for (_, view), parameter in zip(arena.views(values), net.parameters(), strict=True):
        parameter.data.copy_(view)
    arena.check()
    assert torch.equal(arena.data, values)
    assert net[2].bias.data_ptr() == arena.segments[-1].view(arena.data).data_ptr()
    assert (arena.buffer("moment") == 2.0).all()


def test_a_parameter_that_left_alone_is_named() -> None:
    net = model()
    arena = ParameterArena.of(net)
    net[0].bias.data = torch.zeros(7)
    with pytest.raises(ArenaError, match=r"0\.bias was re-assigned outside the arena \(1 of 4\)"):
        arena.check()
    arena.rebind()
    arena.check()
    net[2].weight = nn.Parameter(torch.ones(3, 7))
    with pytest.raises(ArenaError, match=r"2\.weight was re-assigned"):
        arena.check()
    arena.rebind()
    arena.check()
    assert not arena.segments[1].view(arena.data).any()
    for parameter in net.parameters():
        parameter.data = torch.ones(1)
    with pytest.raises(ArenaError, match=r"0\.weight has the shape \(1,\) now and \(7, 5\) in the arena"):
        arena.check()


def test_a_module_that_was_exchanged_is_named() -> None:
    net = nn.Sequential(model(), nn.Linear(3, 2))
    arena, first = ParameterArena.of(net), net[0][0]
    net[0][0] = nn.Linear(5, 7)
    for _ in range(2):
        with pytest.raises(ArenaError, match=r"parameter 0\.0\.weight is no longer in the model.*make a new arena"):
            arena.check()
    net[0][0] = first
    arena.check()
    # a wrapper leaves the parameters in the model, under other names
    net[0] = nn.Sequential(net[0])
    arena.check()
    net[0][0] = model()
    with pytest.raises(ArenaError, match=r"parameter 0\.0\.weight is no longer in the model"):
        arena.check()
    net = model()
    arena = ParameterArena.of(net)
    del net[2].weight
    with pytest.raises(ArenaError, match=r"parameter 2\.weight is no longer in the model"):
        arena.check()


def test_a_tied_module_that_was_exchanged_is_named() -> None:
    net = nn.ModuleDict({"first": nn.Linear(4, 4), "inner": nn.Sequential(nn.Linear(4, 4))})
    net.inner[0].weight = net.first.weight
    arena, inner = ParameterArena.of(net), net.inner
    net["inner"] = nn.Sequential(nn.Linear(4, 4))
    net.inner[0].bias = inner[0].bias
    for _ in range(2):
        with pytest.raises(ArenaError, match=r"inner\.0\.weight was tied to first\.weight and no longer is"):
            arena.check()
    net["inner"] = nn.Sequential(inner)
    arena.check()
    net.inner[0][0].weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ArenaError, match=r"inner\.0\.0\.weight was tied to first\.weight"):
        arena.check()


def test_the_arena_is_copied_with_its_model_and_does_not_keep_it() -> None:
    net = nn.Sequential(model(), nn.Linear(3, 2))
    arena = ParameterArena.of(net)
    for other, copied in (copy.deepcopy((net, arena)), pickle.loads(pickle.dumps((net, arena)))):
        copied.check()
        copied.data.add_(1.0)
        assert torch.equal(other[0][0].weight, net[0][0].weight + 1.0)
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None
    arena.check()


def test_a_sparse_gradient_is_named() -> None:
    net = nn.Sequential(nn.Embedding(4, 3, sparse=True))
    arena = ParameterArena.of(net)
    net.zero_grad()
    net(torch.tensor([1])).sum().backward()
    with pytest.raises(ArenaError, match=r"parameter 0\.weight has a sparse gradient.*without sparse=True"):
        arena.check()


def test_a_parameter_is_set_apart_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to export what lies on another GPU than the current one."""
    current: list[torch.Tensor] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    export = torch.from_dlpack
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch, "from_dlpack", lambda view: export(view) if current[-1] is view else pytest.fail())
    arena = ParameterArena.of(model())
    assert len(arena.segments) == 4 and not current


def test_a_changed_dtype_is_named() -> None:
    net = model()
    arena = ParameterArena.of(net)
    net.half()
    with pytest.raises(ArenaError, match=r"0\.weight is torch\.float16"):
        arena.check()


def test_what_cannot_be_in_an_arena_is_named() -> None:
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    cases = [
        ([], "no trainable parameter"),
        ([("a", p), ("b", p)], "a and b are the same tensor"),
        ([("a", p), ("a", q)], "two parameters have the name a"),
        ([("a", nn.Parameter(torch.zeros(2), requires_grad=False))], "a does not require"),
        ([("a", nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))], "a is torch.bfloat16"),
        ([("a", p), ("b", nn.Parameter(torch.zeros(2, device="meta")))], "b is on meta"),
        ([("a", p), ("b", nn.Parameter(torch.zeros(0, 3)))], "b has no elements"),
    ]
    for parameters, message in cases:
        with pytest.raises(ArenaError, match=message):
            ParameterArena(parameters)


def test_state_round_trip_and_mismatch() -> None:
    a, b = ParameterArena.of(model()), ParameterArena.of(model())
    a.data.normal_()
    a.buffer("m").normal_()
    b.buffer("stale").fill_(1.0)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert torch.equal(a.data, b.data) and torch.equal(a.buffer("m"), b.buffer("m")) and "stale" not in b.buffers
    other = ParameterArena.of(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)))
    with pytest.raises(ArenaError, match=r"'2\.weight', \(4, 7\).*'2\.weight', \(3, 7\)"):
        other.load_state_dict(a.state_dict())
    shorter = ParameterArena.of(nn.Sequential(nn.Linear(5, 7)))
    with pytest.raises(ArenaError, match=r"here nothing, there \('2\.weight'"):
        shorter.load_state_dict(a.state_dict())
