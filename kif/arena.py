"""Parameter arena: all trainable parameters in one flat buffer, so that a phase of the method is one operation.

`param.data` and `param.grad` become views of two flat float32 buffers. Optimizer moments, importances and
snapshots are named buffers of the same layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from kif.distributed import is_spread

ALIGNMENT = 32
"""Elements a parameter's start is aligned to (128 bytes): vector loads stay aligned, cache lines are not shared."""


class ArenaError(RuntimeError):
    """A parameter no longer lies in its arena, or cannot be put there."""


_Link = tuple[ref[nn.Module], str, ref[nn.Module], int]
"""A module, a name in it that is on the way to a parameter, the module of that name, the first such parameter."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one parameter lies in every flat buffer: elements [start, start + numel)."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int

    def view(self, buffer: Tensor) -> Tensor:
        """This parameter's part of a flat buffer, in the parameter's shape."""
        return buffer[self.start : self.start + self.numel].view(self.shape)


class ParameterArena:
    """Takes over parameters: their data and gradients become views of `data` and `grad`.

    It stays valid under `state_dict`, `load_state_dict`, PEFT saving and `model.to(device)` (noticed at the next
    `check`, which moves all buffers along). A parameter re-assigned on its own is reported by name. A parameter that
    the model uses in several places (tied embeddings, shared adapters) lies in it once, under its first name.

    Args:
        parameters: (name, parameter) pairs, float32, on one device; for instance the trainable ones of
            `model.named_parameters()`.
        model: the module the names belong to; lets `check` notice parameters and modules that were exchanged. A copy
            of the arena (deepcopy, pickle) notices parameters only. The arena does not keep the model alive.

    Attributes:
        data: flat float32 buffer of the weights; the elements between segments are padding and stay 0.
        grad: flat float32 buffer of the gradients, same layout.
        segments: where each parameter lies.
        numel: number of elements that are parameters, without padding.
        buffers: further flat buffers by name, made by `buffer`.

    Raises: ArenaError for no parameters at all, a name or tensor given twice, a dtype other than float32, several
        devices, a parameter that does not require a gradient, is a DTensor, shares memory with another one, or is of
        an adapter that is not active; the message names it.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], model: nn.Module | None = None) -> None:
        named = list(parameters)
        _check_parameters(named)
        everything = list(model.named_parameters(remove_duplicate=False)) if model is not None else []
        _check_memory(named, everything)
        self._owners: list[tuple[nn.Module, str]] = []
        self._ties: list[tuple[str, nn.Module, str, int]] = []
        self._links: list[_Link] = []
        self._model = None if model is None else ref(model)
        self._parameters = [parameter for _, parameter in named]
        if model is not None:
            _check_adapters(model)
            self._find(model, [name for name, _ in named], everything)
        self.segments: list[Segment] = []
        end = 0
        for name, parameter in named:
            self.segments.append(Segment(name, tuple(parameter.shape), end, parameter.numel()))
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.numel = sum(segment.numel for segment in self.segments)
        device = self._parameters[0].device
        self.data = torch.zeros(end, dtype=torch.float32, device=device)
        self.grad = torch.zeros_like(self.data)
        self.buffers: dict[str, Tensor] = {}
        self._adopt()

    @classmethod
    def of(cls, model: nn.Module) -> ParameterArena:
        """An arena of the model's trainable parameters, in the order of `named_parameters`."""
        return cls(((name, p) for name, p in model.named_parameters() if p.requires_grad), model)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def buffer(self, name: str) -> Tensor:
        """The flat float32 buffer of this name, zeros when it is new. It moves and is saved with the arena."""
        if name not in self.buffers:
            self.buffers[name] = torch.zeros_like(self.data)
        return self.buffers[name]

    def views(self, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view in the parameter's shape) of every segment of a flat buffer."""
        return ((segment.name, segment.view(buffer)) for segment in self.segments)

    def zero_grad(self) -> None:
        self.grad.zero_()

    def changed(self) -> None:
        """Tell autograd that the weights were written: it then refuses a backward pass through their old values.

        A write to `data` is not noticed by itself, since each parameter counts its own changes.
        """
        torch.autograd.graph.increment_version(self._parameters)

    def check(self) -> None:
        """Make sure that every parameter and gradient still is its view; called at every step.

        Gradients that were set to None or replaced are put back into the arena with their values. When every
        parameter lies elsewhere (`model.to`, `load_state_dict(assign=True)`) the arena follows.
        Raises: ArenaError naming a single parameter that was re-assigned, one that is no longer in the model, no longer
            float32, no longer tied to what it was tied to, no longer trained, or has a sparse gradient.
        """
        self._check_modules()
        base, present = self.data.data_ptr(), self._live()
        strays = [
            segment.name
            for segment, ours, live in zip(self.segments, self._parameters, present, strict=True)
            if live is not ours or live.data_ptr() != base + 4 * segment.start
        ]
        for name, module, attribute, number in self._ties:
            if module._parameters.get(attribute) is not present[number]:
                raise self._untied(name, number)
        if strays:
            self._check_present(present)
        if len(strays) == len(self.segments):
            self.rebind()
        elif strays:
            raise ArenaError(
                f"parameter {strays[0]} was re-assigned outside the arena ({len(strays)} of {len(self.segments)}): "
                "copy into it in place (parameter.data.copy_), or let arena.rebind() take over the new value"
            )
        base = self.grad.data_ptr()
        for segment, parameter in zip(self.segments, self._parameters, strict=True):
            if not parameter.requires_grad:
                raise ArenaError(
                    f"parameter {segment.name} is no longer trained: make its adapter the active one again "
                    "(model.set_adapter), or a new arena of what is trained now"
                )
            grad = parameter.grad
            if grad is None or grad.layout is not torch.strided or grad.data_ptr() != base + 4 * segment.start:
                view = segment.view(self.grad)
                if grad is None:
                    view.zero_()
                elif grad.layout is not torch.strided:
                    raise ArenaError(
                        f"parameter {segment.name} has a sparse gradient, which the arena does not hold: make its "
                        "layer without sparse=True"
                    )
                else:
                    view.copy_(grad)
                parameter.grad = view

    def rebind(self) -> None:
        """Take over the parameters' present values and device; all buffers move along.

        Raises: ArenaError naming one that is no longer in the model, has another shape, or cannot be in an arena.
        """
        live = self._live()
        self._check_present(live)
        for segment, parameter in zip(self.segments, live, strict=True):
            # what fits by broadcasting would be taken for it
            if tuple(parameter.shape) != segment.shape:
                raise ArenaError(
                    f"parameter {segment.name} has the shape {tuple(parameter.shape)} now and {segment.shape} in the "
                    "arena: make a new arena, or engine, of what is trained now"
                )
        self._parameters = live
        _check_parameters([(s.name, p) for s, p in zip(self.segments, self._parameters, strict=True)])
        device = self._parameters[0].device
        self.data = torch.zeros_like(self.data, device=device)
        self.grad = self.grad.to(device)
        self.buffers = {name: buffer.to(device) for name, buffer in self.buffers.items()}
        self._adopt()

    def state_dict(self) -> dict[str, Any]:
        """Layout, weights and all named buffers; tensors are the live ones, not copies."""
        layout = [[s.name, list(s.shape)] for s in self.segments]
        return {"layout": layout, "data": self.data, "buffers": dict(self.buffers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy weights and buffers in. Raises: ArenaError naming the first parameter that differs in name or shape."""
        theirs = [(name, tuple(shape)) for name, shape in state["layout"]]
        ours = [(s.name, s.shape) for s in self.segments]
        if theirs != ours:
            pairs = zip(ours + [None] * len(theirs), theirs + [None] * len(ours), strict=False)
            mine, other = next((a, b) for a, b in pairs if a != b)
            raise ArenaError(f"the saved state does not fit: here {mine or 'nothing'}, there {other or 'nothing'}")
        self.check()
        self.data.copy_(state["data"])
        for name in self.buffers.keys() - state["buffers"].keys():
            del self.buffers[name]
        for name, buffer in state["buffers"].items():
            self.buffer(name).copy_(buffer)
        self.changed()

    def __getstate__(self) -> dict[str, Any]:
        # a weak reference cannot be pickled, and in a copy it would still be to the model that was copied
        return {**self.__dict__, "_model": None, "_links": []}

    def _find(self, model: nn.Module, names: list[str], everything: list[tuple[str, nn.Parameter]]) -> None:
        """Note the modules that hold the parameters under these names, and those on the way to them."""
        self._owners = [_owner(model, name) for name in names]
        numbers = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        ties = [(name, numbers[id(p)]) for name, p in everything if id(p) in numbers]
        ties = [(name, number) for name, number in ties if name != names[number]]
        self._ties = [(name, *_owner(model, name), number) for name, number in ties]
        self._links = _links(model, [*enumerate(names), *((number, name) for name, number in ties)])

    def _check_modules(self) -> None:
        """Raise ArenaError for a parameter whose module is no longer in the model; one around it may be new."""
        number = self._first_exchanged()
        if number is None:
            return
        model = None if self._model is None else self._model()
        everything = [] if model is None else list(model.named_parameters(remove_duplicate=False))
        names = {id(parameter): name for name, parameter in reversed(everything)}
        for segment, parameter in zip(self.segments[number:], self._parameters[number:], strict=True):
            if id(parameter) not in names:
                raise _gone(segment.name)
        if model is not None:
            # a module around them is new: a wrapper
            ours = {id(parameter) for parameter in self._parameters}
            if sum(id(parameter) in ours for _, parameter in everything) < len(ours) + len(self._ties):
                here = dict(everything)
                lost = [tie for tie in self._ties if here.get(tie[0]) is not self._parameters[tie[-1]]]
                name, *_, number = (lost or self._ties)[0]
                raise self._untied(name, number)
            self._find(model, [names[id(parameter)] for parameter in self._parameters], everything)

    def _first_exchanged(self) -> int | None:
        """The number of the first parameter below a module that was exchanged; called at every step."""
        for parent, name, child, number in self._links:
            module, inner = parent(), child()
            if module is not None and (inner is None or module._modules.get(name) is not inner):
                return number
        return None

    def _check_present(self, live: list[nn.Parameter]) -> None:
        for segment, parameter in zip(self.segments, live, strict=True):
            if parameter is None:
                raise _gone(segment.name)

    def _untied(self, name: str, number: int) -> ArenaError:
        return ArenaError(
            f"parameter {name} was tied to {self.segments[number].name} and no longer is: tie them again "
            "(model.tie_weights()), or make a new arena"
        )

    def _live(self) -> list[nn.Parameter]:
        """The parameter objects that the model uses now."""
        if not self._owners:
            return self._parameters
        return [cast(nn.Parameter, module._parameters.get(attribute)) for module, attribute in self._owners]

    def _adopt(self) -> None:
        for segment, parameter in zip(self.segments, self._parameters, strict=True):
            view = segment.view(self.data)
            view.copy_(parameter.data)
            parameter.data = _apart(view)
            grad = segment.view(self.grad)
            if parameter.grad is not None:
                grad.copy_(parameter.grad)
            parameter.grad = grad


def _apart(view: Tensor) -> Tensor:
    """The same memory as a storage of its own: who saves models takes parameters that share one for tied ones."""
    if type(view) is not Tensor or view.device.type == "meta":
        return view
    # of tensors on a GPU that is not the current one dlpack gives none away
    with torch.cuda.device_of(view):
        return torch.from_dlpack(view)


def _check_parameters(named: list[tuple[str, nn.Parameter]]) -> None:
    if not named:
        raise ArenaError("there is no trainable parameter to put into an arena")
    seen: dict[int, str] = {}
    names: set[str] = set()
    for name, parameter in named:
        if not parameter.requires_grad:
            raise ArenaError(f"parameter {name} does not require a gradient")
        if is_spread(parameter):
            raise ArenaError(
                f"parameter {name} is spread over processes (FSDP, tensor parallel), and the arena holds whole ones: "
                "leave what is trained whole (kif.sharding.shard_base splits the frozen layers alone)"
            )
        if not parameter.numel():
            raise ArenaError(f"parameter {name} has no elements: freeze it (requires_grad_(False))")
        if parameter.dtype != torch.float32:
            raise ArenaError(
                f"parameter {name} is {parameter.dtype}; the arena holds float32 master weights, cast it first"
            )
        if parameter.device != named[0][1].device:
            raise ArenaError(f"parameter {name} is on {parameter.device}, {named[0][0]} on {named[0][1].device}")
        if id(parameter) in seen:
            raise ArenaError(f"parameters {seen[id(parameter)]} and {name} are the same tensor: give it once")
        if name in names:
            raise ArenaError(f"two parameters have the name {name}")
        seen[id(parameter)] = name
        names.add(name)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the attribute there."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _links(model: nn.Module, names: Iterable[tuple[int, str]]) -> list[_Link]:
    """Every step from a module into another on the way to the (number, name) parameters, once."""
    links: dict[tuple[int, str], _Link] = {}
    for number, name in names:
        module = model
        for atom in name.split(".")[:-1]:
            child: nn.Module = getattr(module, atom)
            # a wrapper may forward names to what it wraps
            if module._modules.get(atom) is child:
                links.setdefault((id(module), atom), (ref(module), atom, ref(child), number))
            module = child
    return list(links.values())


def _gone(name: str) -> ArenaError:
    return ArenaError(
        f"parameter {name} is no longer in the model, where it or a module around it was exchanged or removed: make a "
        "new arena, or engine, of what is trained now"
    )


def _check_memory(named: list[tuple[str, nn.Parameter]], everything: list[tuple[str, nn.Parameter]]) -> None:
    """Raise ArenaError where a parameter overlaps with another one: in the arena they would part unnoticed."""
    trained = {id(parameter) for _, parameter in named}
    spans = []
    for name, parameter in dict((id(p), (n, p)) for n, p in (*everything, *named)).values():
        if parameter.device == named[0][1].device and parameter.device.type != "meta" and parameter.numel():
            pairs = zip(parameter.shape, parameter.stride(), strict=True)
            size = parameter.element_size() * (1 + sum((length - 1) * stride for length, stride in pairs))
            spans.append((parameter.data_ptr(), parameter.data_ptr() + size, name, id(parameter) in trained))
    furthest = (0, 0, "", False)
    for span in sorted(spans):
        if span[0] < furthest[1] and (span[3] or furthest[3]):
            raise ArenaError(
                f"parameters {furthest[2]} and {span[2]} are different ones in the same memory, and in the arena each "
                "has its own: use one parameter in both places, or clone one"
            )
        furthest = max(furthest, span, key=lambda entry: entry[1])


def _check_adapters(model: nn.Module) -> None:
    """Raise ArenaError for trainable parameters of an inactive PEFT adapter, which weight decay would change."""
    for path, module in model.named_modules():
        active = getattr(module, "active_adapters", None)
        if not isinstance(active, list) or not hasattr(module, "adapter_layer_names"):
            continue
        for kind in module.adapter_layer_names:
            adapters = getattr(module, kind, None)
            if not isinstance(adapters, (nn.ModuleDict, nn.ParameterDict)):
                continue
            for adapter, held in adapters.items():
                parameters = [held] if isinstance(held, nn.Parameter) else list(held.parameters())
                if adapter not in active and any(parameter.requires_grad for parameter in parameters):
                    raise ArenaError(
                        f"parameter {path}.{kind}.{adapter} is trainable, but its adapter {adapter!r} is not active: "
                        "call model.set_adapter with the one to train, or requires_grad_(False) on it"
                    )
