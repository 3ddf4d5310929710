"""A base model too large for one GPU: its frozen weights split over the processes, the adapter whole on each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def shard_base(model: nn.Module, device: torch.device | None = None) -> None:
    """Split the frozen weights of the model's layers over all processes by FSDP (`fully_shard`), in place.

    A layer's weights are gathered for its forward and its backward pass and freed after each. Trained parameters
    stay whole and the same on every process, as in plain data-parallel training, so arena, engine and saved adapters
    are untouched: sum `arena.grad` over the processes before each step. Embeddings and output layer stay whole too.

    All processes must run the same number of forward and backward passes.

    Args:
        model: base model with its adapter, equal on all processes.
        device: the process's device. Default: where the model is. From elsewhere its layers are moved there one at a
            time, the rest of the model is not.
    Raises: RuntimeError without a process group; ValueError for a model without a list of layers, and for quantised
        weights, which FSDP cannot split.
    """
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("shard_base needs a process group: start the processes with torchrun")
    found = list(_layers(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of layers to split")
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    place = device or next(model.parameters()).device
    options: dict[str, Any] = {
        "mesh": init_device_mesh(place.type, (dist.get_world_size(),)),
        "ignored_params": trained,
        # each layer is a root, which by default keeps its weights after forward
        "reshard_after_forward": True,
    }
    for name, layer in found:
        for parameter_name, parameter in layer.named_parameters():
            if parameter not in trained and not parameter.dtype.is_floating_point:
                raise ValueError(f"{name}.{parameter_name} is {parameter.dtype}: a quantised base cannot be split")
        fully_shard(layer, **options)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of the model's outermost lists of modules."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    for name in lists:
        if not any(name.startswith(f"{outer}.") for outer in lists):
            layers: Any = model.get_submodule(name)
            for number, layer in enumerate(layers):
                if any(not parameter.requires_grad for parameter in layer.parameters()):
                    yield f"{name}.{number}", layer
