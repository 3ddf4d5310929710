"""Loading: base model and tokenizer by transformers' Auto classes, adapter by PEFT, wrapped by model family."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kif.adapters import adapter_in_fp32, new_adapter, task_type
from kif.config import RunConfig
from kif.decoder import DecoderModel
from kif.encoder import EncoderModel, union_of_labels
from kif.families import Family, LanguageModel, known_tokens, position_limit
from kif.generative import GenerativeModel
from kif.layers import fit_layers
from kif.seq2seq import EncoderDecoderModel
from kif.sharding import shard_base
from kif.soundness import check_order, check_ties, check_tokens
from kif.tokenization import check_origin

UNMASKED = ("fnet", "rwkv", "yoso")
"""Model types that do not heed the attention mask."""


def load_language_model(
    config: RunConfig,
    labels: Mapping[str, tuple[str, ...] | None],
    adapter: str | Path | None = None,
    *,
    shard: bool = False,
) -> LanguageModel:
    """The configured base model with a LoRA adapter, on the configured device; code from model folders never runs.

    The base model has the configured precision and is frozen, adapter and classification layer are fp32. New
    weights are drawn on the CPU from `config.seed`; the global random state stays as it was. A quantised base needs no
    further preparation: what bitsandbytes leaves alone has the configured precision, and gradients pass through its
    layers to the adapter's.

    Args:
        config: model, precision, quantization, device, adapter, head and lengths.
        labels: label list of each task, in training order; None for free text.
        adapter: PEFT folder to continue from, instead of a new adapter. Its own rank, alpha and target modules hold.
        shard: split the base over the processes (`kif.sharding.shard_base`), layer by layer, so that no device has to
            hold all of it; all processes then make the same passes.
    Raises: ValueError naming the cause: no or an unsupported model, fp16, quantization or gradient checkpointing that
        cannot be had, what `kif.adapters` refuses, a sequence longer than the model's positions, a task without labels
        for an encoder, an adapter of another kind or base model, what `kif.soundness` finds.
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
    check_tokens(tokenizer, name)
    _check_lengths(config, family, model_config, tokenizer)
    quantized = _quantization(config, family, model_config, name, device)

    with _seeded(config.seed):
        base, new_layers = _load_base(name, model_config, family, config, len(classes), quantized)
        if family == "encoder-decoder":
            check_ties(base, name)
        fit_layers(base, device)
        _check_padding(tokenizer, base, name)
        if adapter is None:
            model = new_adapter(base, family, config, new_layers)
        else:
            model = _load_adapter(base, family, config, name, Path(adapter))
            check_origin(Path(adapter), tokenizer, name)
    adapter_in_fp32(model, new_layers)
    if config.gradient_checkpointing:
        checkpoint_layers(base)
    if shard:
        shard_base(model, device)
    if not quantized:
        # a quantised base was loaded where it is to run, and PEFT put the adapter there
        model.to(device)

    lengths = {"max_length": config.max_length, "max_target_length": config.max_target_length}
    lm: LanguageModel
    if family == "encoder-decoder":
        lm = EncoderDecoderModel(model, tokenizer, **lengths)
    elif family == "decoder":
        lm = DecoderModel(model, tokenizer, **lengths)
    else:
        more = {"labels": labels, "label_space": config.label_space, "head": config.head}
        lm = EncoderModel(model, tokenizer, **lengths, **more)  # type: ignore[arg-type]
    lm.lockstep = shard
    if isinstance(lm, GenerativeModel):
        check_order(lm)
    return lm


def checkpoint_layers(base: Any) -> None:
    """Switch gradient checkpointing on in a transformers model. Raises: ValueError for a model that has none."""
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(base).__name__} has no gradient_checkpointing: leave it out")
    # transformers renamed it
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    # the other kind needs inputs with gradients, which a frozen embedding does not give
    enable({"use_reentrant": False})


def model_family(name: str) -> Family:
    """The family of a model folder or hub name. Raises: ValueError where there is none or its type is of no family."""
    from transformers import AutoConfig

    return family_of(_from_pretrained(AutoConfig, name))


def family_of(model_config: Any) -> Family:
    """The family by a transformers config. Raises: ValueError for a model type of none."""
    from transformers.models.auto import modeling_auto as auto

    model_type = model_config.model_type
    if model_type in UNMASKED:
        raise ValueError(
            f"model type {model_type!r} is not supported: it takes padding for text, so that what it makes of a row "
            "depends on the rows beside it"
        )
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
    """The device by its configured name; `auto` is the GPU if there is one.

    Raises: ValueError if there is none, and for devices other than CPU and GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise ValueError(f"device {device!r} is not available: torch sees {seen} GPU; use device auto or cpu")
    return found


def _from_pretrained(auto_class: Any, name: str) -> Any:
    if Path(name).is_file():
        raise ValueError(f"model {name} is a file: give the folder that holds it")
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


def _quantization(
    config: RunConfig, family: Family, model_config: Any, name: str, device: torch.device
) -> dict[str, Any]:
    """Options of `from_pretrained` for the configured quantization; none for `none`. Raises: ValueError."""
    if getattr(model_config, "quantization_config", None) is not None:
        raise ValueError(
            f"model {name} is stored quantised, so that nothing could be merged into it: give the original one, and "
            "set quantization"
        )
    kind = config.quantization
    if kind == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f'quantization {kind} needs bitsandbytes: pip install "recurrent-kif[bnb]"')
    if family == "encoder" and config.head == "linear":
        raise ValueError(
            f"quantization {kind} does not work with head=linear, whose new classification layer would be quantised "
            "before it is trained: use head=cosine, or quantization none"
        )
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        wanted = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = torch.bfloat16 if config.precision == "bf16" else torch.float32
        wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=compute)
    return {"quantization_config": wanted, "device_map": {"": device}}


def _is_of_note(record: logging.LogRecord) -> bool:
    return not any(part in str(record.msg) for part in ("inputs will be cast", "gemm_4bit_forward"))


# bitsandbytes warns of every product, and when PEFT imports it of a kernel for packed weights (see `_load_base`)
for _part in ("autograd._functions", "backends.cpu.ops"):
    logging.getLogger(f"bitsandbytes.{_part}").addFilter(_is_of_note)


def _check_tokenizer(tokenizer: Any, family: Family, name: str) -> None:
    if not tokenizer.is_fast:
        raise ValueError(f"model {name}: its tokenizer gives no offsets; a fast tokenizer (tokenizer.json) is needed")
    if family != "encoder" and tokenizer.eos_token_id is None:
        raise ValueError(f"model {name}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"model {name}: its tokenizer has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token


def _check_padding(tokenizer: Any, base: Any, name: str) -> None:
    known = known_tokens(base)
    if tokenizer.pad_token_id >= known:
        raise ValueError(
            f"model {name}: the tokenizer's padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, "
            f"and the model knows {known} tokens only: set pad_token in tokenizer_config.json to one of these"
        )


def _check_lengths(config: RunConfig, family: Family, model_config: Any, tokenizer: Any) -> None:
    positions = position_limit(model_config, family, tokenizer)
    needed, what = config.max_length, "max_length"
    if family == "decoder":
        needed += max(config.max_target_length, config.max_new_tokens)
        what = "max_length and the longer one of max_target_length and max_new_tokens"
    if positions is not None and needed > positions:
        raise ValueError(f"{what} come to {needed} tokens, but the model has {positions} positions only")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generator within the block. `torch.manual_seed` would re-seed the GPUs for good."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _load_base(
    name: str, model_config: Any, family: Family, config: RunConfig, classes: int, quantized: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """The base model, and the names of those of its layers that the checkpoint does not hold."""
    import transformers

    options: dict[str, Any] = {
        "config": model_config,
        "dtype": torch.bfloat16 if config.precision == "bf16" else torch.float32,
        "trust_remote_code": False,
        "output_loading_info": True,
        **quantized,
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

    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # a 4-bit layer on such a CPU is packed for good by its first evaluation, and no gradient passes any more
            module.support_avx512bf16_for_cpu = False

    new_layers = sorted({key.rpartition(".")[0] for key in info["missing_keys"]})
    if family == "encoder" and config.head == "cosine":
        # the pooler is not used
        new_layers = [layer for layer in new_layers if "pooler" not in layer.split(".")]
    if new_layers and not (family == "encoder" and config.head == "linear"):
        raise ValueError(f"model {name}: the checkpoint lacks weights of {', '.join(new_layers)}")
    if family != "encoder":
        _forget_generation_settings(base, name)
    return base, new_layers


def _forget_generation_settings(base: Any, name: str) -> None:
    """Keep only the special tokens, since generate() fills what a call leaves open from the model's own settings."""
    from transformers import GenerationConfig

    own = base.generation_config
    start = own.decoder_start_token_id
    if start is None and base.config.is_encoder_decoder:
        start = base.config.decoder_start_token_id
        # as `generate` does
        start = own.bos_token_id if start is None else start
        if start is None:
            raise ValueError(f"model {name}: its config names no decoder_start_token_id, with which answers begin")
    base.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        decoder_start_token_id=start,
    )


def _load_adapter(base: Any, family: Family, config: RunConfig, name: str, folder: Path) -> Any:
    from peft import LoraConfig, PeftConfig, PeftModel
    from safetensors import SafetensorError, safe_open

    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder / 'adapter_config.json'} does not exist: no adapter there")
    try:
        saved = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'adapter_config.json'} is damaged: {error}") from error
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        # PEFT would ask the hub for it
        raise FileNotFoundError(f"{weights} does not exist: no weights of the adapter there")
    try:
        with safe_open(weights, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights} is damaged: {error}") from error
    recorded = saved.base_model_name_or_path or "an unknown model"
    both = f"the adapter in {folder} was made for {recorded}, the run uses {name}"
    if not isinstance(saved, LoraConfig):
        raise ValueError(f"the adapter in {folder} is of type {saved.peft_type}, only LoRA is supported")
    if saved.task_type != task_type(family, config.head):
        raise ValueError(f"{both}: its task type is {saved.task_type}, needed is {task_type(family, config.head)}")
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
