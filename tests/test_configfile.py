"""YAML files and options of `kif train`: precedence, and what is refused in which words."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kif.config import PRESETS, EWCConfig, KIFConfig, L2PConfig, RunConfig
from kif.configfile import (
    ConfigError,
    _KIFOptions,
    changed,
    check_inputs,
    dump_config,
    load_config,
    nearest,
    parse_run_config,
)

BASICS = ["--model", "m", "--data", "d"]


@pytest.fixture(autouse=True)
def _no_data_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KIF_DATA", raising=False)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == RunConfig()
    assert load_config(write(tmp_path, "kif:\n")) == RunConfig()


def test_values_become_the_fields_types(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "lr: 3e-4\norder: 1\nepochs: '3'\nlimit_eval: null\nkif: {density: 1}\n"))
    assert config == replace(RunConfig(lr=3e-4, order="1", epochs=3), kif=KIFConfig(density=1.0))
    assert isinstance(config.lr, float) and isinstance(config.order, str) and isinstance(config.kif.density, float)


def test_values_given_in_python_are_checked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for options, message in (
        ({"precision": "bfloat16"}, "^precision must be one of fp32, bf16, fp16, got 'bfloat16'"),
        ({"eval_mode": "ranks"}, "^eval_mode must be one of generate, rank, got"),
        ({"lr": "1e-3"}, "^lr must be of type float, got '1e-3'"),
        ({"lr": float("nan")}, "^lr must be of type float, got nan"),
        ({"epochs": 2.5}, r"^epochs must be of type int, got 2\.5"),
        ({"seed": True}, "^seed must be of type int, got True"),
        ({"resume": 1}, "^resume must be of type bool, got 1"),
        ({"tasks": "mood"}, r"^tasks must be of type list\[str\], got 'mood'"),
        ({"limit_eval": "4"}, r"^limit_eval must be of type int \| None, got '4'"),
        ({"rank_pattern": {"q": "4"}}, r"^rank_pattern must be of type dict\[str, int\] \| None, got"),
        ({"kif": {"outer_steps": 2}}, "^kif must be of type KIFConfig, got {'outer_steps': 2}"),
        ({"seed": 2**32}, r"^seed must lie in \[0, 2\^32\), got 4294967296"),
    ):
        with pytest.raises(ValueError, match=message):
            RunConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^ewc.strength must be of type float, got '1'"):
        EWCConfig(strength="1")  # type: ignore[arg-type]
    given: Any = {"data": Path("d"), "output": Path("o"), "target_modules": ("q", "v"), "weight_decay": 0}
    assert (RunConfig(**given).data, RunConfig(**given).output) == ("d", "o")
    with pytest.raises(ValueError, match=r"^l2p.init must be one of uniform, vocabulary, got 'random'"):
        L2PConfig(init="random")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown method 'ewv'; did you mean 'ewc'"):
        check_inputs(RunConfig(model="m", data="d", method="ewv"))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = check_inputs(RunConfig(model="~/m", data="~", output="~/out", method="kif"))
    assert (found.model, found.data, found.output) == (f"{tmp_path}/m", str(tmp_path), f"{tmp_path}/out")
    assert found.method == "recurrent-kif"
    write(tmp_path, "lr: 0.5\n").rename(tmp_path / "config.yaml")
    for options in (["--config=~/config.yaml"], ["--from=~"]):
        assert parse_run_config([*BASICS, *options]).lr == 0.5


def test_preset_is_the_base_and_other_keys_override_it(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "kif:\n  outer_steps: 2\n  preset: released-code\n"))
    assert config.kif == KIFConfig.preset("released-code", outer_steps=2)


def test_command_line_overrides_file_overrides_preset(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\ndata: d\nlr: 1e-3\nseed: 5\nkif: {preset: released-code, outer_steps: 2}\n")
    config = parse_run_config(["--config", str(path), "--lr", "1e-4", "--kif.inner-steps", "6", "--tasks", "x", "y"])
    expected = KIFConfig.preset("released-code", outer_steps=2, inner_steps=6)
    assert config == RunConfig(model="a", data="d", lr=1e-4, seed=5, tasks=["x", "y"], kif=expected)


def test_preset_on_the_command_line(tmp_path: Path) -> None:
    options = [*BASICS, "--kif.preset", "released-code", "--kif.outer_steps", "3"]
    assert parse_run_config(options).kif == KIFConfig.preset("released-code", outer_steps=3)
    path = write(tmp_path, "kif: {preset: released-code, density: 0.4}\n")
    assert parse_run_config([*BASICS, "--config", str(path), "--kif.preset=paper"]).kif == KIFConfig()
    dump_config(RunConfig(kif=KIFConfig(density=0.4)), path)  # spells out every switch
    options = [*BASICS, "--config", str(path), "--kif.preset", "released-code"]
    assert parse_run_config(options).kif == KIFConfig.preset("released-code")


def test_presets_on_the_command_line_are_all_presets() -> None:
    assert set(get_args(get_type_hints(_KIFOptions)["preset"])) == set(PRESETS)


@pytest.mark.parametrize(
    ("text", "options", "order", "tasks"),
    [("order: 1", ["--tasks", "x"], None, ["x"]), ("tasks: [x, y]", ["--order", "2"], "2", [])],
)
def test_order_and_tasks_replace_each_other(
    tmp_path: Path, text: str, options: Sequence[str], order: str | None, tasks: Sequence[str]
) -> None:
    config = parse_run_config([*BASICS, "--config", str(write(tmp_path, text)), *options])
    assert (config.order, config.tasks) == (order, tasks)


def test_epochs_alone_replace_steps_of_lower_precedence(tmp_path: Path) -> None:
    given = ["--config", str(write(tmp_path, "steps_per_task: 4\n"))]
    for options, steps in (([], 4), (["--epochs", "3"], None), (["--epochs=3", "--steps_per_task=5"], 5)):
        config = parse_run_config([*BASICS, *given, *options])
        assert (config.epochs, config.steps_per_task) == (3 if options else 10, steps)
    dump_config(RunConfig(steps_per_task=4), tmp_path / "config.yaml")
    more = write(tmp_path, f"continue_from: {tmp_path}\nepochs: 3\n")
    config = parse_run_config([*BASICS, "--config", str(more)])
    assert (config.epochs, config.steps_per_task) == (3, None)
    config = changed(RunConfig(steps_per_task=4), {"epochs": "3"}, "here")
    assert (config.epochs, config.steps_per_task) == (3, None)


def test_a_field_of_the_own_method_is_suggested() -> None:
    config = RunConfig(method="tasl")
    for name, message in (("decya", "'tasl.decay'"), ("quantil", "'tasl.quantile'"), ("sede", "'seed'")):
        with pytest.raises(ConfigError, match=f"^here: unknown field '{name}'; did you mean {message}"):
            changed(config, {name: "1"}, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nleanring_rate: 1\n", r"run.yaml:2: unknown field 'leanring_rate'; .*help"),
        ("learning_rate: 1\n", r"run.yaml:1: unknown field 'learning_rate'; did you mean 'lr'"),
        ("batchsize: 8\n", r"run.yaml:1: unknown field 'batchsize'; did you mean 'batch_size'"),
        ("kif:\n  alpha1: 0.5\n  outer_step: 2\n", r"run.yaml:3: unknown field 'kif.outer_step'.*'kif.outer_steps'"),
        ("outer_steps: 4\n", r"run.yaml:1: unknown field 'outer_steps'; did you mean 'kif.outer_steps'"),
        ("kif: {lr: 1}\n", r"run.yaml:1: unknown field 'kif.lr'; did you mean 'lr'"),
        ("seed: 1\nlr: fast\n", r"run.yaml:2: field 'lr': .*valid number.*'fast'"),
        ("seed: true\n", r"run.yaml:1: field 'seed' cannot be true"),
        ("epochs: 1.5\n", r"run.yaml:1: field 'epochs'"),
        ("tasks: dbpedia\n", r"run.yaml:1: field 'tasks': .*list"),
        ("precision: fp8\n", r"run.yaml:1: field 'precision': .*'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ("lr: .nan\n", r"run.yaml:1: field 'lr': .*finite"),
        ("seed: 1\n\nlr: -1\n", r"run.yaml:3: lr must be positive"),
        ("template: Answer this.\n", r"run.yaml:1: template must hold \{input\} once"),
        ("kif:\n  density: 2\n", r"run.yaml:2: kif.density must lie in \[0, 1\]"),
        ("kif: {preset: release}\n", r"run.yaml:1: field 'kif.preset': .*'paper', 'released-code'"),
        ("kif: 3\n", r"run.yaml:1: field 'kif' must hold"),
        ("method: seqlra\n", r"run.yaml:1: unknown method 'seqlra'; did you mean 'seqlora'\?"),
        ("lr: 1\nseed: 2\nlr: 2\n", r"run.yaml:3: field 'lr' is given twice, first in line 1"),
        ("order: 1\ntasks: [a]\n", r"run.yaml: give either order or tasks"),
        ("lr: 1\nseed: [1\n", r"run.yaml:3: invalid YAML"),
        ("lr: !!python/object:os.system 1\n", r"run.yaml:1: invalid YAML"),
        ("- lr\n", r"run.yaml:1: expected `key: value` lines, got a list"),
        ("seed: 2024-13-45\n", r"run.yaml: invalid YAML"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml: cannot be read: not UTF-8"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", "1"], "unknown option '--learning-rate'; did you mean '--lr'"),
        (["--kif.outer-step=3"], r"unknown option '--kif.outer-step(=3)?'; did you mean '--kif.outer-steps'"),
        (["dbpedia"], "unexpected argument 'dbpedia'"),
        (["--lr", "-1"], "command line: lr must be positive"),
        (["--lr", "nan"], "command line: field 'lr': .*finite"),
        (["--kif.density", "3"], r"command line: kif.density must lie in \[0, 1\]"),
        (["--kif.preset", "relesed-code"], "unknown preset 'relesed-code'; did you mean 'released-code'"),
        (["--steps", "3"], "unknown option '--steps'; did you mean '--steps-per-task'"),
        (["--desity", "3"], "unknown option '--desity'; did you mean '--kif.density'"),
        (["--method", "KIF"], "command line: unknown method 'KIF'; did you mean 'kif'"),
        (["--method", "mlt"], "command line: unknown method 'mlt'; did you mean 'mtl'"),
        (["--order", "1", "--tasks", "a"], "command line: give either order or tasks"),
    ],
)
def test_bad_options_are_refused_by_name(options: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_config([*BASICS, *options])


def test_option_of_the_wrong_type_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_run_config([*BASICS, "--epochs", "many"])
    assert stop.value.code == 2
    assert "--epochs" in capsys.readouterr().err


def test_help_comes_from_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_run_config(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    for words in ("--lr FLOAT", "peak learning rate", "--kif.outer-steps INT", "--kif.preset", "--config"):
        assert words in text


def test_model_and_data_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no model: .*--model"):
        check_inputs(RunConfig(data="d"))
    with pytest.raises(ConfigError, match=r"no data: .*KIF_DATA"):
        check_inputs(RunConfig(model="m"))
    monkeypatch.setenv("KIF_DATA", "elsewhere")
    assert check_inputs(RunConfig(model="m")).data == "elsewhere"
    assert check_inputs(RunConfig(model="m", data="here")).data == "here"
    assert parse_run_config(["--model", "m"]).data == "elsewhere"


def test_nearest_ignores_dashes_and_case() -> None:
    assert nearest("Batch-Size", ["batch_size", "lr"]) == "batch_size"
    assert nearest("zzz", ["batch_size", "lr"]) is None


names = st.text(st.sampled_from(string.printable + "éß漢🙂:#'\"{}\u0085\u2028"), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=names,
    tasks=st.lists(names, max_size=3),
    lr=st.floats(1e-12, 1e3),
    limit=st.none() | st.integers(1, 10**9),
    targets=st.none() | st.lists(names, max_size=2),
    density=st.floats(0, 1),
    preset=st.sampled_from(sorted(PRESETS)),
)
def test_dump_and_load_are_inverse(
    tmp_path: Path,
    model: str,
    tasks: list[str],
    lr: float,
    limit: int | None,
    targets: list[str] | None,
    density: float,
    preset: str,
) -> None:
    kif = KIFConfig.preset(preset, density=density)
    config = RunConfig(model=model, tasks=tasks, lr=lr, limit_train=limit, target_modules=targets, kif=kif)
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
