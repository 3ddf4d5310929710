"""`kif compare`: several methods side by side, on equal data and seeds, resumable cell by cell."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from kif.checkpoint import difference
from kif.config import PRESETS, SECTIONS, KIFConfig, RunConfig
from kif.configfile import ConfigError, changed, dump_config, full_method_name, load_config, nearest_or_raise
from kif.files import claimed
from kif.methods import METHODS
from kif.preemption import Preemption, preemption
from kif.resume import with_absolute_folders
from kif.training import INCIDENTAL

KIF = "recurrent-kif"
POLL = 0.2
"""Seconds between two looks at whether SIGTERM came."""


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: the folder says which."""

    folder: Path
    config: RunConfig

    @property
    def finished(self) -> bool:
        return (self.folder / "results.json").is_file()


def variant_config(base: RunConfig, name: str) -> RunConfig:
    """The run of a method, `seqlora`, of Recurrent-KIF with a preset, `recurrent-kif:no-die` or `kif:no-die`, and
    either with fields of its own, `seqlora:lr=1e-3` or `kif:no-die:density=0.5`.

    A preset starts anew from its own switches but keeps `outer_steps` and `inner_steps` of `base` where it says
    nothing of them. Fields of the method's own section need no prefix. Raises: ConfigError naming the nearest known
    name, or the field.
    """
    method, *parts = name.split(":")
    presets = [part for part in parts if "=" not in part]
    if len(presets) > 1:
        raise ConfigError(f"{name!r}: more than one preset")
    config = _preset_config(base, name, method, presets[0] if presets else "")
    section = METHODS[config.method].section
    own = {f.name for f in fields(SECTIONS[section])} if section else set()
    named: dict[str, str] = {}
    for given, value in (part.split("=", 1) for part in parts if "=" in part):
        field = f"{section}.{given}" if given in own else given
        if field in named:
            raise ConfigError(f"{name!r}: {field} is given twice")
        named[field] = value
    for field in ("method", "seed", *INCIDENTAL):
        if field in named:
            raise ConfigError(f"{name!r}: {field} makes no other method of it; leave it out")
    if "continue_from" in named:
        raise ConfigError(f"{name!r}: a comparison trains from the start; leave continue_from out")
    return changed(config, named, repr(name))


def _preset_config(base: RunConfig, name: str, method: str, preset: str) -> RunConfig:
    method = full_method_name(method)
    if not preset:
        return replace(base, method=method)
    if method != KIF:
        raise ConfigError(f"{name!r}: only {KIF} has presets")
    nearest_or_raise(preset, PRESETS, "unknown preset")
    own = {"inner_steps": base.kif.inner_steps, "outer_steps": base.kif.outer_steps, **PRESETS[preset]}
    return replace(base, method=method, kif=KIFConfig(**own))


def plan(base: RunConfig, names: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells, seed by seed, so that an interrupted comparison is even.

    Raises: ConfigError as `variant_config`, for two names of the same run or folder, and for a folder that holds a
        finished cell of other settings, naming the field that differs.
    """
    base = with_absolute_folders(base)
    names = [name.strip() for name in names]
    configs = [variant_config(base, name) for name in names]
    for index, config in enumerate(configs):
        if config in configs[:index]:
            other = names[configs.index(config)]
            raise ConfigError(f"a method is named twice: {other!r} and {names[index]!r} are the same run")
    folders: dict[str, str] = {}
    for name in names:
        place = re.sub(r"[^\w.-]", "-", name)
        if place in folders:
            raise ConfigError(f"{folders[place]!r} and {name!r} would share the folder {place}: write one otherwise")
        folders[place] = name
    cells = []
    for seed in seeds:
        for place, config in zip(folders, configs, strict=True):
            folder = Path(base.output) / place / f"seed-{seed}"
            cell = Cell(folder, replace(config, seed=seed, output=str(folder)))
            if cell.finished and (other := _other_settings(cell)):
                raise ConfigError(other)
            cells.append(cell)
    return cells


def run(cells: Sequence[Cell], jobs: int) -> list[str]:
    """Train the cells that are not finished, each in a process of its own; returns what failed, one line each.

    A cell appears under its name only when it is finished. One that was interrupted goes on from its last checkpoint,
    unless it was begun with other settings: then it begins anew. One that another command trains is left to it, and
    counts as failed. SIGTERM is passed on, and no more cells are begun.
    Raises: Preempted after SIGTERM, when all processes have ended.
    """
    with preemption("the same command goes on with what is not finished") as stop:
        stop.hold()
        with ThreadPoolExecutor(jobs) as pool:
            lines = list(pool.map(partial(_train, stop), [cell for cell in cells if not cell.finished]))
        stop.release()
    return [line for line in lines if line]


def _train(stop: Preemption, cell: Cell) -> str:
    if stop.received:
        return ""
    with ExitStack() as held:
        try:
            # the folder that is trained in is claimed by the process that trains
            claim = held.enter_context(claimed(cell.folder.with_name(cell.folder.name + ".claim")))
        except FileExistsError:
            return f"{cell.folder}: is being trained by another command; wait for it, or choose another --output"
        if cell.finished:
            # by another command, since this one began
            return _other_settings(cell)
        return _train_claimed(stop, cell, claim)


def _train_claimed(stop: Preemption, cell: Cell, claim: int) -> str:
    """As `_train`; the process that trains shares the claim, since it may outlive this one."""
    unfinished = cell.folder.with_name(cell.folder.name + ".partial")
    resume = _can_go_on(cell, unfinished)
    if not resume:
        shutil.rmtree(unfinished, ignore_errors=True)
    settings = cell.folder.with_name(cell.folder.name + ".yaml")
    dump_config(replace(cell.config, output=str(unfinished), resume=resume), settings)
    log = cell.folder.with_name(cell.folder.name + ".log")
    command = [*_command(), "train", "--config", str(settings)]
    with log.open("a" if resume else "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, pass_fds=[claim])
        status = _wait(process, stop)
    if status != 0:
        return f"{cell.folder}: exit status {status}, see {log}"
    unfinished.rename(cell.folder)
    dump_config(cell.config, cell.folder / "config.yaml")
    settings.unlink()
    log.rename(cell.folder / "train.log")
    return ""


def _command() -> list[str]:
    """`kif` as a command that finds the modules this process finds: -c alone looks into the working folder first."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from kif.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code]


def _wait(process: subprocess.Popen[bytes], stop: Preemption) -> int:
    """The exit status of a process, which is told when SIGTERM comes."""
    told = False
    while True:
        try:
            return process.wait(POLL)
        except subprocess.TimeoutExpired:
            if stop.received and not told:
                process.terminate()
                told = True


def _can_go_on(cell: Cell, unfinished: Path) -> bool:
    """Whether the folder holds a run of the cell's settings, which `resume` continues."""
    try:
        return _difference(cell, unfinished) is None
    except (OSError, ConfigError):
        return False


def _other_settings(cell: Cell) -> str:
    """What to say of a finished cell of other settings; nothing of one of the same."""
    found = _difference(cell, cell.folder)
    if found is None:
        return ""
    name, then, now = found
    advice = "choose another --output, or remove the folder"
    return f"{cell.folder} was run with {name}={then!r}, now it is {now!r}: {advice}"


def _difference(cell: Cell, folder: Path) -> tuple[str, Any, Any] | None:
    """The first field in which the run in a folder differs from the cell, with both values."""
    then, now = asdict(load_config(folder / "config.yaml")), asdict(cell.config)
    for name in INCIDENTAL:
        del then[name], now[name]
    return difference(then, now)
