"""`kif compare`: several methods side by side, on equal data and seeds, resumable cell by cell."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from kif.config import PRESETS, SECTIONS, KIFConfig, RunConfig
from kif.configfile import ConfigError, changed, dump_config, load_config, nearest
from kif.methods import ALIASES, METHODS
from kif.resume import with_absolute_folders
from kif.training import INCIDENTAL

KIF = "recurrent-kif"


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
    changes = dict(part.split("=", 1) for part in parts if "=" in part)
    named = {f"{section}.{field}" if field in own else field: value for field, value in changes.items()}
    return changed(config, named, repr(name))


def _preset_config(base: RunConfig, name: str, method: str, preset: str) -> RunConfig:
    method = ALIASES.get(method, method)
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; did you mean {nearest(method, METHODS)!r}?")
    if not preset:
        return replace(base, method=method)
    if method != KIF:
        raise ConfigError(f"{name!r}: only {KIF} has presets")
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; did you mean {nearest(preset, PRESETS)!r}?")
    own = {"inner_steps": base.kif.inner_steps, "outer_steps": base.kif.outer_steps, **PRESETS[preset]}
    return replace(base, method=method, kif=KIFConfig(**own))


def plan(base: RunConfig, names: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells, seed by seed, so that an interrupted comparison is even.

    Raises: ConfigError as `variant_config`, for a name given twice, and for a folder that holds a finished cell of
        other settings, naming the field that differs.
    """
    if len(set(names)) < len(names):
        raise ConfigError("a method is named twice")
    base = with_absolute_folders(base)
    cells = []
    for seed in seeds:
        for name in names:
            folder = Path(base.output) / re.sub(r"[^\w.-]", "-", name) / f"seed-{seed}"
            cell = Cell(folder, replace(variant_config(base, name), seed=seed, output=str(folder)))
            if cell.finished:
                _check_same(cell)
            cells.append(cell)
    return cells


def run(cells: Sequence[Cell], jobs: int) -> list[str]:
    """Train the cells that are not finished, each in a process of its own; returns what failed, one line each.

    A cell appears under its name only when it is finished; what an interrupted one left is removed.
    """
    with ThreadPoolExecutor(jobs) as pool:
        return [line for line in pool.map(_train, [cell for cell in cells if not cell.finished]) if line]


def _train(cell: Cell) -> str:
    partial = cell.folder.with_name(cell.folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    settings = cell.folder.with_name(cell.folder.name + ".yaml")
    dump_config(replace(cell.config, output=str(partial)), settings)
    log = cell.folder.with_name(cell.folder.name + ".log")
    code = "import sys; from kif.cli import main; sys.exit(main())"
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, "-c", code, "train", "--config", str(settings)], stdout=stream, stderr=subprocess.STDOUT
        )
    if done.returncode != 0:
        return f"{cell.folder}: exit status {done.returncode}, see {log}"
    partial.rename(cell.folder)
    dump_config(cell.config, cell.folder / "config.yaml")
    settings.unlink()
    log.rename(cell.folder / "train.log")
    return ""


def _check_same(cell: Cell) -> None:
    recorded = asdict(load_config(cell.folder / "config.yaml"))
    wanted = asdict(cell.config)
    different = [name for name in wanted if name not in INCIDENTAL and recorded.get(name) != wanted[name]]
    if different:
        name = different[0]
        raise ConfigError(
            f"{cell.folder} was run with {name}={recorded.get(name)!r}, now it is {wanted[name]!r}: choose another "
            "--output, or remove the folder"
        )
