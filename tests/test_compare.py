"""`kif compare`: which cells there are, resuming, refusing changed settings, one failed cell among others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kif import cli, compare
from kif.config import KIFConfig, RunConfig
from kif.configfile import ConfigError, dump_config, load_config, parse_run_config
from kif.faults import PREEMPTED, Preempted
from kif.files import claimed
from kif.methods import ALIASES, METHODS
from kif.preemption import preemption


def base(output: Path, **options: Any) -> RunConfig:
    return RunConfig(model="m", data="d", order="abc", output=str(output), **options)


def test_cells_are_methods_and_presets_by_seed(tmp_path: Path) -> None:
    cells = compare.plan(base(tmp_path, kif=KIFConfig(outer_steps=4)), ["seqlora", "kif", "kif:no-die"], [0, 1])
    assert [cell.folder.relative_to(tmp_path).as_posix() for cell in cells] == [
        f"{name}/seed-{seed}" for seed in (0, 1) for name in ("seqlora", "kif", "kif-no-die")
    ]
    assert [cell.config.seed for cell in cells] == [0, 0, 0, 1, 1, 1]
    no_die = cells[2].config
    assert no_die.method == "recurrent-kif" and no_die.kif == KIFConfig(outer_steps=4, history="frozen")
    assert compare.variant_config(base(tmp_path), "kif:single-step").kif.inner_steps == 10**9
    assert compare.variant_config(base(tmp_path), "kif:released-code").kif == KIFConfig.preset("released-code")


def test_methods_have_short_names_everywhere(tmp_path: Path) -> None:
    assert ALIASES.keys().isdisjoint(METHODS)
    path = tmp_path / "run.yaml"
    for alias, method in ALIASES.items():
        assert METHODS[method].name == compare.variant_config(base(tmp_path), alias).method == method
        path.write_text(f"method: {alias}\nmodel: m\ndata: d\norder: abc\n")
        assert load_config(path).method == method
        options = ["--method", alias, "--model", "m", "--data", "d", "--order", "abc"]
        assert parse_run_config(options).method == method


def test_a_name_can_set_fields(tmp_path: Path) -> None:
    given = base(tmp_path, kif=KIFConfig(outer_steps=4))
    names = ["seqlora:lr=1e-2", " kif:no-die:density=0.5", "kif:lr=2e-3:target_modules=q+v", "seqlora"]
    first, second, third, _ = compare.plan(given, names, [0])
    assert first.config.lr == 1e-2 and first.folder.parent.name == "seqlora-lr-1e-2"
    assert second.config.kif == KIFConfig(outer_steps=4, history="frozen", density=0.5)
    assert second.folder.parent.name == "kif-no-die-density-0.5"
    assert third.config.target_modules == ["q", "v"] and third.config.lr == 2e-3 and third.config.kif == given.kif


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["seqlora:lrr=1"], "'seqlora:lrr=1': unknown field 'lrr'; did you mean 'lr'"),
        (["kif:density=2"], r"'kif:density=2': kif.density must lie in \[0, 1\]"),
        (["kif:gm:adaptive"], "more than one preset"),
        (["seqlora:lr=1:lr=2"], "'seqlora:lr=1:lr=2': lr is given twice"),
        (["kif:density=0.1:kif.density=0.2"], "kif.density is given twice"),
        (["seqlorra"], "unknown method 'seqlorra'; did you mean 'seqlora'"),
        (["seqlora", ""], "unknown method ''; there are recurrent-kif, seqlora, "),
        (["qqqq"], "unknown method 'qqqq'; there are recurrent-kif, seqlora, "),
        (["kif:no-dye"], "unknown preset 'no-dye'; did you mean 'no-die'"),
        (["kif:xyz"], "unknown preset 'xyz'; there are paper, "),
        (["ewc:gm"], "only recurrent-kif has presets"),
        (["ewc", "ewc"], "named twice"),
        (["seqlora:seed=1"], "'seqlora:seed=1': seed makes no other method of it"),
        (["seqlora:method=ewc"], "method makes no other method of it"),
        (["seqlora:output=x"], "output makes no other method of it"),
        (["kif:continue_from=x"], "'kif:continue_from=x': a comparison trains from the start"),
        (["kif:lr=1e-3", "kif:lr=1e+3"], r"'kif:lr=1e-3' and 'kif:lr=1e\+3' would share the folder kif-lr-1e-3"),
        (["recurrent-kif", "seqlora", "kif"], "named twice: 'recurrent-kif' and 'kif' are the same run"),
        (["seqlora:lr=1e-3", "seqlora:lr=0.001"], "named twice: 'seqlora:lr=1e-3' and 'seqlora:lr=0.001'"),
    ],
)
def test_unknown_names_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.plan(base(tmp_path), names, [0])


def arguments(written: Path, model: Path, output: Path, *more: str) -> list[str]:
    return [
        "compare", "--model", str(model), "--data", str(written), "--order", "abc", "--output", str(output),
        "--steps-per-task", "2", "--limit-eval", "2", "--max-new-tokens", "2", "--seeds", "1", *more,
    ]  # fmt: skip


def test_finished_cells_are_not_run_again(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run = arguments(written, tiny_models["bert"], output, "--methods", "seqlora,kif:no-share")
    interrupted = output / "seqlora" / "seed-0.partial"
    interrupted.mkdir(parents=True)
    (interrupted / "metrics.jsonl").write_text("{}")
    assert cli.main(run) == 0
    table = capsys.readouterr().out
    assert "seqlora" in table and "no-share (M=1)" in table and "GiB" in table
    results = sorted(output.glob("*/seed-*/results.json"))
    assert len(results) == 2 and not interrupted.exists()
    assert json.loads((output / "report" / "results.json").read_text())["summary"][0]["seeds"] == [0]
    times = [path.stat().st_mtime_ns for path in results]
    results[1].parent.rename(tmp_path / "lost")
    assert cli.main([*run, "--methods", "seqlora,kif:no-share,seqlora:lr=1e-2"]) == 0
    again = [path.stat().st_mtime_ns for path in results]
    assert again[0] == times[0] and again[1] > times[1]
    # rows of a sweep are told apart
    table = capsys.readouterr().out
    assert "seqlora (lr=0.0003) " in table and "seqlora (lr=0.01) " in table and "settings" not in table
    assert cli.main([*run, "--lr", "1e-2"]) == 2
    assert "was run with lr=0.0003, now it is 0.01" in capsys.readouterr().err


def test_sigterm_is_passed_on_and_the_cell_goes_on(
    written: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(
        model=str(tiny_models["bert"]), data=str(written), order="abc", output=str(tmp_path), steps_per_task=400,
        limit_eval=2, checkpoint_rounds=1,
    )  # fmt: skip
    first, second = compare.plan(config, ["seqlora", "mtl"], [0])
    unfinished = tmp_path / "seqlora" / "seed-0.partial"
    begun: list[subprocess.Popen[bytes]] = []

    class Process(subprocess.Popen[bytes]):
        """Sends this process SIGTERM once it has written a checkpoint."""

        def wait(self, timeout: float | None = None) -> int:
            if not begun and any((unfinished / "state").glob("*")):
                begun.append(self)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Process)
    with pytest.raises(Preempted, match="the same command goes on with what is not finished"):
        compare.run([first, second], jobs=1)
    # it has ended by itself, and the next one was not begun
    assert begun[0].returncode == PREEMPTED and not first.finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seqlora"]
    environment = (unfinished / "environment.json").stat().st_mtime_ns
    rounds = len((unfinished / "metrics.jsonl").read_text().splitlines())

    assert compare.run([first], jobs=1) == [] and not unfinished.exists()
    assert (first.folder / "environment.json").stat().st_mtime_ns == environment
    lines = [json.loads(line) for line in (first.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "step" in line and line["phase"] == 0]
    assert 0 < rounds < len(lines) and steps == list(range(10, 401, 10))


def test_only_a_run_of_the_same_settings_goes_on(tmp_path: Path) -> None:
    cell = compare.plan(base(tmp_path), ["seqlora"], [0])[0]
    unfinished = tmp_path / "run"
    assert not compare._can_go_on(cell, unfinished)
    unfinished.mkdir()
    dump_config(replace(cell.config, output=str(unfinished)), unfinished / "config.yaml")
    assert compare._can_go_on(cell, unfinished)
    assert not compare._can_go_on(compare.Cell(cell.folder, replace(cell.config, lr=1.0)), unfinished)
    (unfinished / "config.yaml").write_text("lr: [")
    assert not compare._can_go_on(cell, unfinished)


def test_modules_in_the_working_folder_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "argparse.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([*compare._command(), "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("kif ")


def test_a_failed_cell_leaves_the_others(written: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    cells = compare.plan(
        RunConfig(
            model=str(tiny_models["bert"]), data=str(written), order="abc", output=str(tmp_path / "out"),
            steps_per_task=2, limit_eval=2,
        ),
        ["seqlora", "mtl"],
        [0],
    )  # fmt: skip
    broken = compare.Cell(cells[0].folder, replace(cells[0].config, target_modules=["nothing"]))
    failed = compare.run([broken, cells[1]], jobs=1)
    assert len(failed) == 1 and "exit status 2" in failed[0]
    assert "no linear layer is named 'nothing'" in (broken.folder.parent / "seed-0.log").read_text()
    assert cells[1].finished and not broken.finished


def test_a_cell_that_another_command_trains_is_left_to_it(tmp_path: Path) -> None:
    cell = compare.plan(base(tmp_path), ["seqlora"], [0])[0]
    unfinished = tmp_path / "seqlora" / "seed-0.partial"
    unfinished.mkdir(parents=True)
    with claimed(tmp_path / "seqlora" / "seed-0.claim"):
        failed = compare.run([cell], jobs=1)
    assert len(failed) == 1 and failed[0].startswith(f"{cell.folder}: is being trained by another command; wait for it")
    assert [path.name for path in (tmp_path / "seqlora").iterdir()] == ["seed-0.partial"]


def test_a_cell_that_another_command_has_finished_meanwhile_is_not_run_again(tmp_path: Path) -> None:
    cell = compare.plan(base(tmp_path), ["seqlora"], [0])[0]
    other = compare.Cell(cell.folder, replace(cell.config, lr=1.0))
    with preemption("") as stop:
        cell.folder.mkdir(parents=True)
        dump_config(cell.config, cell.folder / "config.yaml")
        (cell.folder / "results.json").write_text("{}")
        assert compare._train(stop, cell) == ""
        assert "was run with lr=0.0003, now it is 1.0" in compare._train(stop, other)
    assert [path.name for path in cell.folder.parent.iterdir()] == ["seed-0"]


KILLED = """
import os, signal, sys, threading, time

from kif import compare
from kif.config import RunConfig

code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
compare._command = lambda: [sys.executable, "-c", code]
cells = compare.plan(RunConfig(model="m", data="d", order="abc", output=sys.argv[1]), ["seqlora"], [0])
threading.Thread(target=compare.run, args=(cells, 1), daemon=True).start()
log = cells[0].folder.with_name("seed-0.log")
while not log.is_file() or not log.read_text():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_cell_stays_claimed_while_its_process_outlives_the_command(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    claim = tmp_path / "seqlora" / "seed-0.claim"
    left = int((tmp_path / "seqlora" / "seed-0.log").read_text())
    try:
        with pytest.raises(FileExistsError), claimed(claim):
            pass
    finally:
        os.kill(left, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while True:
        try:
            with claimed(claim):
                break
        except FileExistsError:
            assert time.monotonic() < deadline


def test_several_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(arguments(tmp_path, tmp_path, tmp_path / "out", "--methods", "seqlora")) == 2
    assert "starts its runs itself, each as one process: leave torchrun out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--seed", "7"], ["--seed=0"], ["--method", "ewc"]])
def test_options_that_every_run_replaces_are_refused(
    tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = option[0].split("=")[0]
    assert cli.main(arguments(tmp_path, tmp_path, tmp_path / "out", "--methods", "seqlora", *option)) == 2
    assert f"give it {name}s and no {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
