"""Checkpoints of a run: nested state as safetensors and JSON, written whole or not at all, checked when read.

A checkpoint is a folder `<number>` of `tensors.safetensors` and `state.json`; the latter holds the sha256 of the former
and of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kif.distributed import gather, world
from kif.families import Encoded
from kif.faults import disk_space
from kif.files import sync

State = dict[str, Any]

TENSORS, CONTENT = "tensors.safetensors", "state.json"
LEAF = "$tensor"
"""In JSON, {LEAF: name} stands for the tensor of this name."""


class Checkpoints:
    """The checkpoints in a folder, of which the last ones are kept.

    Args:
        folder: made when the first one is written.
        keep: how many are kept, at least one.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._last = 0

    def write(self, state: State) -> None:
        """Write the next checkpoint; a process or machine that dies meanwhile leaves the ones before as they are.

        Raises: TypeError naming the entry that is no dict with string keys, list, tensor, number, string or None;
            DiskFull, with the checkpoints before as they are.
        """
        structure, tensors = flatten(state)
        target = self._path(self._last + 1)
        with disk_space(target, sum(t.nbytes for t in tensors.values()) + len(json.dumps(structure))):
            temporary = self._write_unfinished(structure, tensors)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        sync(self.folder)
        self._last += 1
        for number in self._numbers():
            # a later one was found damaged
            if not self._last - self.keep < number <= self._last:
                shutil.rmtree(self._path(number))

    def _write_unfinished(self, structure: Any, tensors: dict[str, Tensor]) -> Path:
        """The folder with both files, on disk but without its number; nothing where that fails."""
        from safetensors.torch import save_file

        temporary = self.folder / "unfinished"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            save_file(tensors, temporary / TENSORS)
            content = {"sha256": _checksum(temporary / TENSORS, structure), "state": structure}
            (temporary / CONTENT).write_text(json.dumps(content), encoding="utf-8")
            for path in (temporary / TENSORS, temporary / CONTENT, temporary):
                sync(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return temporary

    def read(self, device: torch.device) -> State | None:
        """The last checkpoint that is whole, its tensors on `device`; None if there is none.

        Later ones that are damaged are named in a warning, and replaced by those written next.
        Raises: RuntimeError where several processes do not see the same one.
        """
        state, self._last = None, 0
        for number in reversed(self._numbers()):
            path = self._path(number)
            try:
                state = _read(path, device)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                if world()[0] == 0:
                    warnings.warn(f"checkpoint {path} is damaged and not used: {error}", stacklevel=2)
                continue
            self._last = number
            break
        if len(set(gather(self._last))) > 1:
            raise RuntimeError(f"the processes see different checkpoints in {self.folder}: it must be shared by all")
        return state

    def __bool__(self) -> bool:
        """Whether there is any, whole or damaged."""
        return bool(self._numbers())

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def _numbers(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.glob("*") if re.fullmatch("[0-9]{6,9}", path.name))


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """(what JSON holds, tensors by name, on the CPU and of a memory each). Tuples become lists.

    Raises: TypeError naming the first entry of another type, as `Checkpoints.write`.
    """
    tensors: dict[str, Tensor] = {}
    memories: set[int] = set()

    def visit(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensor = value.detach().cpu().contiguous()
            memory = tensor.untyped_storage().data_ptr()
            # safetensors refuses tensors that share memory, such as the step count of a shared optimizer
            tensors[name] = tensor.clone() if memory in memories else tensor
            memories.add(memory)
            return {LEAF: name}
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str) or key == LEAF:
                    raise TypeError(f"state {name or 'at the top'} has the key {key!r}; keys must be strings")
            return {key: visit(entry, f"{name}/{key}" if name else key) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [visit(entry, f"{name}/{i}") for i, entry in enumerate(value)]
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise TypeError(f"state {name or 'at the top'} is a {type(value).__name__}, which a checkpoint cannot hold")

    return visit(state, ""), tensors


def unflatten(structure: Any, tensors: dict[str, Tensor]) -> Any:
    """What `flatten` was given. Raises: KeyError for a tensor that is missing."""
    if isinstance(structure, list):
        return [unflatten(entry, tensors) for entry in structure]
    if not isinstance(structure, dict):
        return structure
    if LEAF in structure:
        return tensors[structure[LEAF]]
    return {key: unflatten(entry, tensors) for key, entry in structure.items()}


def pack_rows(rows: Sequence[Encoded], known: Sequence[Encoded]) -> State:
    """`rows` as positions in `known`; those that are not there (a method made them) whole, with negative positions."""
    positions = {id(row): i for i, row in enumerate(known)}
    made = [row for row in rows if id(row) not in positions]
    positions |= {id(row): -1 - i for i, row in enumerate(made)}
    return {
        "positions": torch.tensor([positions[id(row)] for row in rows], dtype=torch.int32),
        "made": [[list(row.input_ids), list(row.target), row.task, row.truncated] for row in made],
    }


def unpack_rows(packed: State, known: Sequence[Encoded]) -> list[Encoded]:
    """The rows of `pack_rows`, given an equal `known`."""
    made = [Encoded(tuple(ids), tuple(target), task, truncated) for ids, target, task, truncated in packed["made"]]
    return [known[i] if i >= 0 else made[-1 - i] for i in packed["positions"].tolist()]


def random_state(device: torch.device) -> list[State]:
    """torch's generators of every process: the CPU's and, on a GPU, that of the process's device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return gather(state)


def restore_random_state(states: Sequence[State], device: torch.device) -> None:
    """Continue this process's random numbers; those of a GPU only where the state was saved on one."""
    state = states[world()[0]]
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def config_hash(identity: State) -> str:
    """sha256 of all that must be equal for a run to be continued."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def difference(then: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(dotted name, value then, value now) of the first entry in which two nested dicts differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in then if key not in now)]:
            found = difference(then.get(key), now.get(key), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    return None if then == now else (name, then, now)


def _read(path: Path, device: torch.device) -> State:
    """Raises: OSError, ValueError, KeyError, TypeError or RecursionError for a checkpoint that is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    content = json.loads((path / CONTENT).read_text(encoding="utf-8"))
    if content["sha256"] != _checksum(path / TENSORS, content["state"]):
        raise ValueError("its content does not match its checksum")
    try:
        tensors = load_file(path / TENSORS, device=str(device))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    state: State = unflatten(content["state"], tensors)
    return state


def _checksum(tensors: Path, structure: Any) -> str:
    digest = hashlib.sha256()
    with tensors.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    digest.update(json.dumps(structure).encode())
    return digest.hexdigest()
