"""Loading: base model and tokenizer by transformers' Auto classes, adapter by PEFT, wrapped by model family."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kif.config import RunConfig
from kif.decoder import DecoderModel
from kif.encoder import EncoderModel, union_of_labels
from kif.families import Family, LanguageModel
from kif.seq2seq import EncoderDecoderModel

HEADS = ("classifier", "score")
"""Names of classification layers that PEFT trains and saves by itself."""


def load_language_model(
    config: RunConfig, labels: Mapping[str, tuple[str, ...] | None], adapter: str | Path | None = None
) -> LanguageModel:
    """The configured base model with a LoRA adapter, on the configured device; code from model folders never runs.

    The base model has the configured precision and is frozen, adapter and classification layer are fp32. New
    weights are drawn on the CPU from `config.seed`; the global random state stays as it was.

    Args:
        config: model, precision, device, adapter, head and lengths.
        labels: label list of each task, in training order; None for free text.
        adapter: PEFT folder to continue from, instead of a new adapter. Its own rank, alpha and target modules hold.
    Raises: ValueError naming the cause: no or an unsupported model, fp16, unknown target modules, a sequence longer
        than the model's positions, a task without labels for an encoder, an adapter of another kind or base model.
        FileNotFoundError if `adapter` holds none.
    """
    from transformers import AutoConfig, AutoTokenizer

    if not config.model:
        raise ValueError("no model: give --model FOLDER_OR_NAME")
    # absolute, so that the adapter's note of its base model holds in any working directory
    name = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    device = resolve_device(config.device)
    model_config = _from_pretrained(AutoConfig, name)
    family = family_of(model_config)
    _check_precision(config.precision, model_config.model_type)
    classes = union_of_labels(labels) if family == "encoder" else ()
    tokenizer = _from_pretrained(AutoTokenizer, name)
    _check_tokenizer(tokenizer, family, name)
    _check_lengths(config, family, model_config, tokenizer)

    with _seeded(config.seed):
        base, new_layers = _load_base(name, model_config, family, config, len(classes))
        if adapter is None:
            model = _new_adapter(base, family, config, new_layers)
        else:
            model = _load_adapter(base, family, config, name, Path(adapter))
    _adapter_in_fp32(model)
    model.to(device)

    lengths = {"max_length": config.max_length, "max_target_length": config.max_target_length}
    if family == "encoder-decoder":
        return EncoderDecoderModel(model, tokenizer, **lengths)
    if family == "decoder":
        return DecoderModel(model, tokenizer, **lengths)
    return EncoderModel(model, tokenizer, labels=labels, label_space=config.label_space, head=config.head, **lengths)


def model_family(name: str) -> Family:
    """The family of a model folder or hub name. Raises: ValueError where there is none or its type is of no family."""
    from transformers import AutoConfig

    return family_of(_from_pretrained(AutoConfig, name))


def family_of(model_config: Any) -> Family:
    """The family by a transformers config. Raises: ValueError for a model type of none."""
    from transformers.models.auto import modeling_auto as auto

    model_type = model_config.model_type
    if getattr(model_config, "is_encoder_decoder", False):
        if model_type in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            return "encoder-decoder"
    elif model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(model_config, "is_decoder", False):
        return "encoder"
    elif model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    raise ValueError(
        f"model type {model_type!r} is not supported: it is no encoder-decoder (like T5), no causal language model "
        f"(like Llama) and no masked language model (like BERT)"
    )


def resolve_device(device: str) -> torch.device:
    """The device by its configured name; `auto` is the GPU if there is one. Raises: ValueError if there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise ValueError(f"device {device!r} is not available: torch sees {seen} GPU; use device auto or cpu")
    return found


def _from_pretrained(auto_class: Any, name: str) -> Any:
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = "the folder cannot be loaded" if Path(name).is_dir() else "no such folder, nor can the hub give it"
        raise ValueError(f"model {name}: {where}: {str(error).splitlines()[0]}") from error


def _check_precision(precision: str, model_type: str) -> None:
    if precision != "fp16":
        return
    if "t5" in model_type:
        raise ValueError(
            "precision fp16 is refused for T5: its feed-forward activations overflow fp16, so that `wo` must stay "
            "fp32 and training diverges; use bf16 or fp32"
        )
    raise ValueError("precision fp16 is not supported here; use bf16 or fp32")


def _check_tokenizer(tokenizer: Any, family: Family, name: str) -> None:
    if not tokenizer.is_fast:
        raise ValueError(f"model {name}: its tokenizer gives no offsets; a fast tokenizer (tokenizer.json) is needed")
    if family != "encoder" and tokenizer.eos_token_id is None:
        raise ValueError(f"model {name}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"model {name}: its tokenizer has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token


def _check_lengths(config: RunConfig, family: Family, model_config: Any, tokenizer: Any) -> None:
    positions = getattr(model_config, "max_position_embeddings", None)
    needed, what = config.max_length, "max_length"
    if family == "decoder":
        needed += max(config.max_target_length, config.max_new_tokens)
        what = "max_length and the longer one of max_target_length and max_new_tokens"
    elif family == "encoder" and positions is not None:
        # some models reserve positions, which their tokenizers know
        positions = min(positions, tokenizer.model_max_length)
    if positions is not None and needed > positions:
        raise ValueError(f"{what} come to {needed} tokens, but the model has {positions} positions only")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generator within the block. `torch.manual_seed` would re-seed the GPUs for good."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _load_base(name: str, model_config: Any, family: Family, config: RunConfig, classes: int) -> tuple[Any, list[str]]:
    """The base model, and the names of those of its layers that the checkpoint does not hold."""
    import transformers

    # T5's `wo` must not pass through bf16; transformers keeps it in fp32 for fp16 only
    wo_in_fp32 = family == "encoder-decoder" and "t5" in model_config.model_type and config.precision == "bf16"
    options: dict[str, Any] = {
        "config": model_config,
        "dtype": torch.bfloat16 if config.precision == "bf16" and not wo_in_fp32 else torch.float32,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    if family == "encoder-decoder":
        auto: Any = transformers.AutoModelForSeq2SeqLM
    elif family == "decoder":
        auto = transformers.AutoModelForCausalLM
    elif config.head == "linear":
        auto = transformers.AutoModelForSequenceClassification
        model_config.num_labels = classes
    else:
        auto = transformers.AutoModel
    base, info = auto.from_pretrained(name, **options)
    if wo_in_fp32:
        for parameter_name, parameter in base.named_parameters():
            if "wo" not in parameter_name.split("."):
                parameter.data = parameter.data.to(torch.bfloat16)

    new_layers = sorted({key.rpartition(".")[0] for key in info["missing_keys"]})
    if family == "encoder" and config.head == "cosine":
        # the pooler is not used
        new_layers = [layer for layer in new_layers if "pooler" not in layer.split(".")]
    if new_layers and not (family == "encoder" and config.head == "linear"):
        raise ValueError(f"model {name}: the checkpoint lacks weights of {', '.join(new_layers)}")
    if family != "encoder":
        _forget_generation_settings(base)
    return base, new_layers


def _forget_generation_settings(base: Any) -> None:
    """Keep only the special tokens, since generate() fills what a call leaves open from the model's own settings."""
    from transformers import GenerationConfig

    own = base.generation_config
    start = own.decoder_start_token_id
    if start is None and base.config.is_encoder_decoder:
        start = base.config.decoder_start_token_id
    base.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        decoder_start_token_id=start,
    )


def _task_type(family: Family, head: str) -> str:
    if family == "encoder":
        return "SEQ_CLS" if head == "linear" else "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if family == "encoder-decoder" else "CAUSAL_LM"


def _new_adapter(base: Any, family: Family, config: RunConfig, new_layers: Collection[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type=_task_type(family, config.head),
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(base, config.target_modules),
        # the classification layer itself is added by PEFT
        modules_to_save=[layer for layer in new_layers if not layer.split(".")[0].endswith(HEADS)] or None,
    )
    return get_peft_model(base, lora)


def target_modules(base: Any, wanted: list[str] | None) -> list[str] | str:
    """The layers that get an adapter: `wanted`, or PEFT's choice for the model type (query and value).

    Raises: ValueError listing the model's linear layers, if a name matches none of them or PEFT has no choice.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as choices

    layers = linear_layers(base)
    listed = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
    if wanted is None:
        if base.config.model_type not in choices:
            raise ValueError(
                f"there is no default for target_modules of model type {base.config.model_type!r}; "
                f"set it to some of the model's linear layers: {listed}"
            )
        choice = choices[base.config.model_type]
        return choice if isinstance(choice, str) else list(choice)
    for name in wanted:
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            raise ValueError(f"target_modules: no linear layer is named {name!r}; there are {listed}")
    return list(wanted)


def linear_layers(base: Any) -> list[str]:
    """Full names of all linear layers but those that make the output."""
    from transformers.pytorch_utils import Conv1D

    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not output and not name.startswith(HEADS)
    ]


def _load_adapter(base: Any, family: Family, config: RunConfig, name: str, folder: Path) -> Any:
    from peft import LoraConfig, PeftConfig, PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder / 'adapter_config.json'} does not exist: no adapter there")
    saved = PeftConfig.from_pretrained(str(folder))
    recorded = saved.base_model_name_or_path or "an unknown model"
    both = f"the adapter in {folder} was made for {recorded}, the run uses {name}"
    if not isinstance(saved, LoraConfig):
        raise ValueError(f"the adapter in {folder} is of type {saved.peft_type}, only LoRA is supported")
    if saved.task_type != _task_type(family, config.head):
        raise ValueError(f"{both}: its task type is {saved.task_type}, needed is {_task_type(family, config.head)}")
    if not _same_model(recorded, name):
        raise ValueError(both)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            return PeftModel.from_pretrained(base, str(folder), is_trainable=True, torch_device="cpu")
        except (RuntimeError, ValueError, UserWarning) as error:
            raise ValueError(f"{both}: it does not fit: {error}") from error


def _same_model(recorded: str, name: str) -> bool:
    """Equal names or folders; a recorded folder that is not there any more may have been moved as it was."""
    if recorded == name:
        return True
    if Path(recorded).is_dir():
        return Path(recorded).resolve() == Path(name).resolve()
    return Path(recorded).name == Path(name).name


def _adapter_in_fp32(model: Any) -> None:
    """Trained parameters in fp32, and inputs in fp32 for the layers that are trained whole."""
    from peft.utils import ModulesToSaveWrapper

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.register_forward_pre_hook(_inputs_in_fp32)


def _inputs_in_fp32(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if torch.is_tensor(value) and value.is_floating_point() else value for value in inputs)
