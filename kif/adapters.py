"""The adapter that `kif.models` puts on a base model: LoRA by PEFT as configured, checked before anything is trained.

Refused is what PEFT would take and train or save otherwise than it was meant: names that fit nothing, a module that is
trained whole and has LoRA too, and weights that are tied to others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kif.config import RunConfig
from kif.families import Family, text_config

HEADS = ("classifier", "score")
"""Names of classification layers that PEFT trains and saves by itself."""

ALL_LINEAR = "all-linear"


def task_type(family: Family, head: str) -> str:
    """PEFT's name of the kind of model."""
    if family == "encoder":
        return "SEQ_CLS" if head == "linear" else "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if family == "encoder-decoder" else "CAUSAL_LM"


def new_adapter(base: Any, family: Family, config: RunConfig, new_layers: Collection[str]) -> Any:
    """The PEFT model of `base` with a new LoRA adapter; `new_layers`, which the checkpoint lacks, are trained whole.

    Raises: ValueError naming field and module: see `target_modules` and `check_whole`; a key of `rank_pattern` that is
        no regular expression, or decides the rank of no layer.
    """
    from peft import LoraConfig, get_peft_model

    # the classification layer itself is added by PEFT
    added = [layer for layer in new_layers if not layer.split(".")[0].endswith(HEADS)]
    saved = [*(config.modules_to_save or ()), *added]
    whole = whole_modules(base, saved)
    # head=cosine does not use a pooler
    unused = [name for name in linear_layers(base) if "pooler" in name.split(".")] if config.head == "cosine" else []
    targets = target_modules(base, family, config.target_modules, [*whole, *unused, *new_layers])
    adapted = [name for name, _ in base.named_modules() if _is_target(name, targets)]
    check_whole(base, saved, whole, adapted)
    check_ranks(config.rank_pattern or {}, adapted)
    lora = LoraConfig(
        task_type=task_type(family, config.head),
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        rank_pattern=dict(config.rank_pattern or {}),
        target_modules=targets,
        modules_to_save=saved or None,
    )
    return get_peft_model(base, lora)


def target_modules(
    base: Any, family: Family, wanted: list[str] | None, without: Collection[str] = ()
) -> list[str] | str:
    """The layers that get an adapter: `wanted`, or PEFT's choice for the model type (query and value).

    `all-linear` is every linear layer but the output layer and those in the modules `without`. Of a model that also
    sees or hears, layers outside the part for texts get none, unless PEFT's choice is a regular expression.
    Raises: ValueError listing the model's linear layers, if a name matches none of them or PEFT has no choice.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as choices

    part = text_part(base, family)
    layers = [layer for layer in linear_layers(base) if part is None or _is_inside(layer, part)]
    listed = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
    if wanted is None:
        if base.config.model_type not in choices:
            raise ValueError(
                f"there is no default for target_modules of model type {base.config.model_type!r}; "
                f"set it to some of the model's linear layers: {listed}"
            )
        choice = choices[base.config.model_type]
        if isinstance(choice, str):
            return choice
        wanted = list(choice)
    elif wanted == [ALL_LINEAR]:
        return [layer for layer in layers if not any(_is_inside(layer, module) for module in without)]
    else:
        for name in wanted:
            if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
                raise ValueError(f"target_modules: no linear layer is named {name!r}; there are {listed}")
    if part is None:
        return list(wanted)
    return [name for name, _ in base.named_modules() if _is_inside(name, part) and _is_target(name, wanted)]


def text_part(base: Any, family: Family) -> str | None:
    """Full name of the part for texts of a decoder that also sees or hears, None for others."""
    if text_config(base.config, family) is base.config:
        return None
    decoder = base.get_decoder()
    return next((name for name, module in base.named_modules() if module is decoder), None) or None


def linear_layers(base: Any) -> list[str]:
    """Full names of all linear layers but those that make the output."""
    from transformers.pytorch_utils import Conv1D

    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and not name.startswith(HEADS)
    ]


def whole_modules(base: nn.Module, saved: Sequence[str]) -> list[str]:
    """Full names of the modules that PEFT trains whole for `modules_to_save`: all whose names end with one of them."""
    return [name for name, _ in base.named_modules(remove_duplicate=False) if name and name.endswith(tuple(saved))]


def check_whole(base: nn.Module, saved: Sequence[str], whole: Sequence[str], adapted: Sequence[str]) -> None:
    """Raise ValueError for modules that cannot be trained whole.

    These are: a name that no module's ends with, one without parameters, one inside another, one that has or holds
    LoRA, quantised weights, and weights that are tied to a module outside, from which PEFT's copy would part.
    """
    for ending in saved:
        if not any(name.endswith(ending) for name in whole):
            owners = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in base.named_parameters()} - {""}
            raise ValueError(
                f"modules_to_save: no module's name ends with {ending!r}; there are {', '.join(sorted(owners))}"
            )
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for module in whole:
        for other in whole:
            if other != module and _is_inside(module, other):
                raise ValueError(f"modules_to_save: {module} is part of {other}: name one of them")
        for layer in adapted:
            if _is_inside(layer, module):
                raise ValueError(
                    f"modules_to_save: {module} is trained whole, and target_modules gives {layer} LoRA: leave out one"
                )
        parameters = list(base.get_submodule(module).named_parameters())
        if not parameters:
            raise ValueError(f"modules_to_save: {module} has no parameters to train")
        for name, parameter in parameters:
            if not parameter.is_floating_point():
                raise ValueError(
                    f"modules_to_save: {module}.{name} is quantised and cannot be trained: give {module} LoRA by "
                    "target_modules, or set quantization to none"
                )
            tied = [other for other in names[id(parameter)] if not _is_inside(other, module)]
            if tied:
                raise ValueError(
                    f"modules_to_save: {module}.{name} is tied to {tied[0]}; trained as a copy it would part from it, "
                    "and the merged model could not hold both: leave it out, or use a base model whose config says "
                    "tie_word_embeddings: false"
                )


def check_ranks(pattern: dict[str, int], adapted: Sequence[str]) -> None:
    """Raise ValueError for a key that is no regular expression, or that is the first to fit no layer of `adapted`."""
    used = set()
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"rank_pattern: {key!r} is no regular expression: {error}") from error
    for layer in adapted:
        # what PEFT does
        used.add(next((key for key in pattern if re.match(rf"(.*\.)?({key})$", layer)), None))
    for key in pattern:
        if key not in used:
            listed = ", ".join(sorted({layer.rpartition(".")[2] for layer in adapted}))
            raise ValueError(
                f"rank_pattern: {key!r} gives no layer its rank: layers with LoRA are named {listed}, and the first "
                "key that fits holds"
            )


def adapter_in_fp32(model: Any, outputs: Collection[str]) -> None:
    """Trained parameters in fp32; modules that are trained whole take fp32 and give what the base's would.

    Args:
        model: the PEFT model.
        outputs: full names of modules whose results stay fp32, as they are or lead to the output.
    """
    from peft.utils import ModulesToSaveWrapper

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    output = model.get_base_model().get_output_embeddings() if hasattr(model, "get_base_model") else None
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        dtype = next(module.original_module.parameters()).dtype
        if dtype == torch.float32:
            continue
        final = module is output or name in outputs or name.startswith(HEADS)
        for copied in module.modules_to_save.values():
            copied.register_forward_pre_hook(_inputs_in_fp32, with_kwargs=True)
            if not final:
                copied.register_forward_hook(lambda module, inputs, result, dtype=dtype: _cast(result, dtype))


def _inputs_in_fp32(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    return _cast(inputs, torch.float32), _cast(named, torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in another type, in tuples and dicts too."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) is tuple:
        return tuple(_cast(part, dtype) for part in value)
    if type(value) is dict:
        return {key: _cast(part, dtype) for key, part in value.items()}
    return value


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _is_target(name: str, targets: list[str] | str) -> bool:
    """Whether PEFT gives the module of this name LoRA."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or name.endswith(tuple(f".{target}" for target in targets))
