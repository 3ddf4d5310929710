"""YAML files and command-line options for `RunConfig`.

Precedence, lowest first: the defaults of `kif.config`, the preset of `kif.preset`, the YAML file, the command
line. Nothing is accepted and ignored: an unknown key, a wrong type or a value out of range is a ConfigError
that names the file and line, or the command line, and the field.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from kif.config import PRESETS, SECTIONS, KIFConfig, RunConfig

# Names of the same thing, most of them in transformers' TrainingArguments, that difflib would not connect.
_SYNONYMS = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "max_steps": "steps_per_task", "steps": "steps_per_task",
    "bf16": "precision",
}  # fmt: skip


OF_ONE_RUN = (
    "order", "tasks", "output", "resume", "continue_from", "memory_data", "checkpoint_rounds", "keep_checkpoints",
)  # fmt: skip
"""Fields that a run does not take from the one it continues."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names file and line, or the command line, and field."""


def load_config(path: str | Path) -> RunConfig:
    """The run that a YAML file describes. Its keys are the fields of `RunConfig`, those of a method below its name.

    `kif: {preset: released-code, outer_steps: 4}` starts from a preset; the other keys override it.

    Raises ConfigError for a file that cannot be read, invalid YAML, unknown or repeated keys, wrong types and
    values out of range.
    """
    source = _read_yaml(Path(path))
    return _build(source.values, source.where)


def dump_config(config: RunConfig, path: str | Path) -> None:
    """Write `config` as YAML with every field spelled out; `load_config` reads back an equal object."""
    import yaml

    from kif.files import write_text

    # other than ASCII is escaped: PyYAML would write U+0085 raw and read it back as a space
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    write_text(Path(path), text)


def parse_run_config(argv: Sequence[str]) -> RunConfig:
    """The run that the options of `kif train` describe: `--config x.yaml --lr 1e-3 --kif.outer-steps 4`.

    `data` falls back to the environment variable KIF_DATA. A preset on the command line replaces the file's `kif`.
    With `--from RUN`, another name of `--continue-from`, what is not given comes from that run's own configuration.
    `epochs` given alone replace a `steps_per_task` of lower precedence, beside which they would have no effect.

    Raises ConfigError as `load_config` does, for unknown options, and where model or data are not given. An
    option value of the wrong type, and --help, end in SystemExit after a message, as in argparse.
    """
    import tyro

    early = argparse.ArgumentParser(prog="kif train", add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--kif.preset", dest="preset")
    early.add_argument("--continue-from", "--continue_from", dest="continue_from")
    early.add_argument("--epochs")
    early.add_argument("--steps-per-task", "--steps_per_task", dest="steps_per_task")
    argv = [re.sub(r"^--from(?==|$)", "--continue-from", argument) for argument in argv]
    chosen, _ = early.parse_known_args(argv)
    source = _read_yaml(Path(chosen.config).expanduser()) if chosen.config is not None else _Source("", {}, {})
    earlier = chosen.continue_from or source.values.get("continue_from")
    if earlier is not None:
        inherited = _read_yaml(Path(str(earlier)).expanduser() / "config.yaml").values
        own = {key for key in inherited if "kif.preset" in source.values and key.startswith("kif.")}
        left = {key: value for key, value in inherited.items() if key not in {*OF_ONE_RUN, *own}}
        if "epochs" in source.values:
            left.pop("steps_per_task", None)
        source.values = {**left, **source.values}
    if chosen.preset is not None:
        nearest_or_raise(chosen.preset, PRESETS, "command line: unknown preset")
        # a run's own config.yaml spells out every switch; a preset asked for here must not lose against them
        source.values = {key: value for key, value in source.values.items() if not key.startswith("kif.")}
        source.values["kif.preset"] = chosen.preset
    if chosen.epochs is not None and chosen.steps_per_task is None:
        source.values.pop("steps_per_task", None)
    base = _build(source.values, source.where)
    preset = source.values.get("kif.preset", "paper")

    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    default = _RunOptions(**{**values, "kif": _KIFOptions(**dataclasses.asdict(base.kif), preset=preset)})
    options, unknown = tyro.cli(
        _RunOptions,
        args=argv,
        default=default,
        prog="kif train",
        description="Train a model on a sequence of tasks and write a run folder: config, environment, metrics, "
        "results.json and the adapter in PEFT's format.",
        return_unknown_args=True,
    )
    if unknown:
        raise ConfigError(_unknown_option(unknown))
    # `order` and `tasks` say the same thing: the one on the command line replaces the one in the file.
    if options.order is not None and options.tasks:
        if base.tasks and options.tasks == base.tasks:
            options.tasks = []
        elif base.order is not None and options.order == base.order:
            options.order = None
    flat = {f.name: getattr(options, f.name) for f in dataclasses.fields(RunConfig) if f.name not in SECTIONS}
    for section, kind in SECTIONS.items():
        flat |= {f"{section}.{f.name}": getattr(getattr(options, section), f.name) for f in dataclasses.fields(kind)}
    return check_inputs(_build(flat, lambda key: "command line"))


def changed(config: RunConfig, changes: Mapping[str, str], where: str) -> RunConfig:
    """`config` with fields replaced, by dotted name and as text; lists are joined by "+".

    `epochs` alone replace `steps_per_task`. Raises: ConfigError that begins with `where`.
    """
    from kif.methods import METHODS

    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        flat |= {f"{name}.{part}": inner for part, inner in value.items()} if name in SECTIONS else {name: value}
    for name, text in changes.items():
        if name not in flat:
            raise ConfigError(f"{where}: unknown field {name!r}{_suggestion(name, METHODS[config.method].section)}")
        flat[name] = text.split("+") if "list" in str(_types()[name]) else text
    if "epochs" in changes and "steps_per_task" not in changes:
        flat["steps_per_task"] = None
    return _build(flat, lambda key: where)


def check_inputs(config: RunConfig) -> RunConfig:
    """`config` with `data` filled from KIF_DATA, `~` in its paths and a method's short name replaced.

    Raises: ConfigError where model or data are not given, and for an unknown method.
    """
    if not config.model:
        raise ConfigError(
            "no model: give the folder or hub name of the base model with --model or as `model:` in the YAML file, "
            "for example --model google-t5/t5-large"
        )
    data = config.data or os.environ.get("KIF_DATA")
    if not data:
        raise ConfigError(
            "no data: give the folder that holds the tasks with --data, as `data:` in the YAML file or in the "
            "environment variable KIF_DATA; `--data hub` reads them from the Hugging Face hub"
        )
    method = full_method_name(config.method)
    paths = {"data": data} | {
        name: getattr(config, name) for name in ("model", "output", "continue_from", "memory_data")
    }
    homes = {name: os.path.expanduser(path) for name, path in paths.items() if path and path.startswith("~")}
    return dataclasses.replace(config, **{"data": data, "method": method, **homes})


def full_method_name(name: str, problem: str = "unknown method") -> str:
    """The name of a method that may be given by its short one. Raises: ConfigError, `problem` first, for none."""
    from kif.methods import ALIASES, METHODS

    name = ALIASES.get(name, name)
    nearest_or_raise(name, [*METHODS, *ALIASES], problem)
    return name


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name most like `name`, if any is; `-` and `_`, and upper and lower case, count as equal."""
    plain = {candidate.lower().replace("-", "_"): candidate for candidate in valid}
    wanted = name.lower().replace("-", "_")
    if _SYNONYMS.get(wanted) in plain:
        return plain[_SYNONYMS[wanted]]
    found = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.5)
    return plain[found[0]] if found else None


@dataclass
class _FileOption:
    """Options.

    Args:
        config: YAML file with any of the fields below; other options override it.
    """

    config: str | None = None


@dataclass
class _KIFOptions(KIFConfig):
    """Options.

    Args:
        preset: set of switches to start from; the others override it.
    """

    # hides the class method of this name, which options do not need
    preset: Literal[
        "paper", "released-code", "no-die", "no-ki", "no-share", "gm", "adaptive", "gradient-importance", "no-ema",
        "single-step",
    ] = "paper"  # type: ignore[assignment]  # fmt: skip

    def __post_init__(self) -> None:
        """Ranges are checked once, in `_build`."""


@dataclass
class _RunOptions(RunConfig, _FileOption):
    """Options.

    Args:
        kif: switches of Recurrent-KIF.
    """

    kif: _KIFOptions = field(default_factory=_KIFOptions)

    def __post_init__(self) -> None:
        """Ranges are checked once, in `_build`."""


@dataclass
class _Source:
    """A YAML file: values and lines by dotted key (`lr`, `kif.density`)."""

    path: str
    values: dict[str, Any]
    lines: dict[str, int]

    def where(self, key: str) -> str:
        return f"{self.path}:{self.lines[key]}" if key in self.lines else (self.path or "command line")


@functools.cache
def _types() -> dict[str, Any]:
    """Dotted key -> type, for everything a YAML file may hold."""
    types = {name: hint for name, hint in get_type_hints(RunConfig).items() if name not in SECTIONS}
    for section, kind in {**SECTIONS, "kif": _KIFOptions}.items():
        types |= {f"{section}.{name}": hint for name, hint in get_type_hints(kind).items()}
    return types


def _read_yaml(path: Path) -> _Source:
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines = _key_lines(node, str(path))
        content = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{line}: invalid YAML: {error.problem or error.context}") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: invalid YAML: {error}") from error
    source = _Source(str(path), {}, lines)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}:1: expected `key: value` lines, got a {type(content).__name__}")
    for name in SECTIONS:
        section = content.pop(name, None)
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"{source.where(name)}: field {name!r} must hold `key: value` lines, got {section!r}")
        source.values |= {f"{name}.{key}": value for key, value in (section or {}).items()}
    source.values |= {str(key): value for key, value in content.items()}
    return source


def _key_lines(node: Any, path: str, prefix: str = "") -> dict[str, int]:
    """Line of every key of a mapping node and of the methods' mappings in it; refuses repeated keys."""
    import yaml

    lines: dict[str, int] = {}
    if not isinstance(node, yaml.MappingNode):
        return lines
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = prefix + key.value, key.start_mark.line + 1
        if name in lines:
            raise ConfigError(f"{path}:{line}: field {name!r} is given twice, first in line {lines[name]}")
        lines[name] = line
        if name in SECTIONS:
            lines |= _key_lines(value, path, f"{name}.")
    return lines


def _build(values: Mapping[str, Any], where: Any) -> RunConfig:
    """RunConfig from raw values by dotted key; `where(key)` says where a value came from."""
    types = _types()
    for key in values:
        if key not in types:
            raise ConfigError(f"{where(key)}: unknown field {key!r}{_suggestion(key)}")
    checked = {key: _converted(key, value, types[key], where(key)) for key, value in values.items()}
    if "method" in checked:
        checked["method"] = full_method_name(checked["method"], f"{where('method')}: unknown method")
    run = {key: value for key, value in checked.items() if "." not in key}
    parts: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in checked.items():
        section, dot, name = key.partition(".")
        if dot:
            parts[section][name] = value
    try:
        built = {section: SECTIONS[section](**part) for section, part in parts.items() if section != "kif"}
        return RunConfig(**run, **built, kif=KIFConfig.preset(parts["kif"].pop("preset", "paper"), **parts["kif"]))
    except ValueError as error:
        # messages of kif.config begin with the field's name
        raise ConfigError(f"{where(str(error).split()[0])}: {error}") from error


def _converted(key: str, value: Any, hint: Any, where: str) -> Any:
    """`value` as the field's type, by pydantic's lax rules, but true and false are no numbers."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if isinstance(value, bool) and bool not in (hint, *get_args(hint)):
        raise ConfigError(f"{where}: field {key!r} cannot be {str(value).lower()}")
    try:
        # YAML reads `order: 1` as a number and `lr: 3e-4` as text
        return TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)).validate_python(
            value
        )
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ConfigError(f"{where}: field {key!r}: {message[:1].lower()}{message[1:]}, got {value!r}") from error


def _suggestion(key: str, own: str | None = None) -> str:
    """The nearest valid field in words: below a parent that is named, first there, then anywhere.

    Of equal names below several parents, the one below the same or the `own` parent.
    """
    section, _, leaf = key.rpartition(".")
    leaves = {name.rpartition(".")[2]: name for name in reversed(_types())}
    same = {name.rpartition(".")[2]: name for name in _types() if name.rpartition(".")[0] in (section, own)}
    leaves |= same
    plain = leaf.lower().replace("-", "_")
    close = nearest(leaf, same) if section else None
    found = plain if plain in leaves else close or nearest(leaf, leaves)
    return f"; did you mean {leaves[found]!r}?" if found else "; `kif train --help` lists them all"


def _unknown_option(tokens: Sequence[str]) -> str:
    option = next((token for token in tokens if token.startswith("-")), None)
    if option is None:
        return f"command line: unexpected argument {tokens[0]!r}; `kif train --help` lists them all"
    name = option.lstrip("-").split("=")[0]
    suggestion = _suggestion(name).replace("_", "-").replace("mean '", "mean '--")
    return f"command line: unknown option {option!r}{suggestion}"


def nearest_or_raise(name: str, valid: Iterable[str], problem: str) -> None:
    """Raises ConfigError with the nearest valid name unless `name` is valid."""
    names = list(valid)
    if name not in names:
        close = nearest(name, names)
        hint = f"did you mean {close!r}? " if close else ""
        raise ConfigError(f"{problem} {name!r}; {hint}there are {', '.join(names)}")
