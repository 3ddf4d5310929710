"""Kills a small run of three tasks again and again, with SIGKILL, and compares what each resumed run ends with.

    python tests/crash.py --kills 20 --seed 0

Half of the kills come at a random moment, half at the n-th of the calls by which a checkpoint is written, n drawn at
random: before or after the call, or when half of a file is written. After each kill a copy of the run folder is resumed
to its end, which must be, byte for byte, that of an uninterrupted run; the killed run itself is resumed too, and
killed again. Prints one line of JSON; status 1 where any end differed.

Every run is a process of its own, forked from this one, which has imported what they need and trained nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# before torch is imported: threads that OpenMP has begun do not survive a fork
os.environ["OMP_NUM_THREADS"] = "1"

from conftest import write_tasks
from tiny import build_tiny

from kif.config import KIFConfig, RunConfig
from kif.run import train

POINTS = ("save_file", "write_text", "fsync", "rename", "rmtree")
"""Calls that a checkpoint is written by."""


def outcome(run: Path) -> dict[str, Any]:
    """Everything a run leaves, without times and peak memory."""

    def timeless(record: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in record.items() if key not in ("time", "seconds", "peak_memory")}

    assert not (run / "state").exists()
    return {
        "results": timeless(json.loads((run / "results.json").read_text())),
        "metrics": [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "weights": {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))},
    }


class Countdown:
    """Kills this process at the `at`-th event, or writes the number of events to `counts` when there is no `at`."""

    def __init__(self, at: int | None, noted: Path) -> None:
        self.at, self.noted, self.seen = at, noted, 0

    def event(self, point: str) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.noted.write_bytes(point.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, point: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.event(f"before {point}")
            result = call(*arguments, **options)
            self.event(f"after {point}")
            return result

        return counted

    def install(self) -> None:
        """Count the calls of `POINTS` from now on."""
        import safetensors.torch as st

        save, write = st.save_file, Path.write_text

        def save_file(tensors: Any, path: Any, *more: Any, **options: Any) -> None:
            save(tensors, path, *more, **options)
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: len(content) // 2])
            self.event("half of save_file")
            Path(path).write_bytes(content)

        def write_text(path: Path, text: str, *more: Any, **options: Any) -> int:
            write(path, text[: len(text) // 2], *more, **options)
            self.event("half of write_text")
            return write(path, text, *more, **options)

        st.save_file = self.around("save_file", save_file)
        Path.write_text = self.around("write_text", write_text)  # type: ignore[method-assign]
        os.fsync = self.around("fsync", os.fsync)
        Path.rename = self.around("rename", Path.rename)  # type: ignore[method-assign]
        shutil.rmtree = self.around("rmtree", shutil.rmtree)  # type: ignore[assignment]


def start(config: RunConfig, at: int | None, noted: Path) -> int:
    """Fork a process that trains; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        warnings.simplefilter("ignore")
        countdown = Countdown(at, noted)
        countdown.install()
        train(config, progress=False)
        if at is None:
            noted.write_bytes(str(countdown.seen).encode())
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Exit status, negative for the signal that ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Campaign:
    """Kills and resumes in a folder.

    Attributes:
        kills: by what the process did then.
        different: runs that did not end as the uninterrupted one.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        data = write_tasks(folder / "data")
        self.config = RunConfig(
            model=str(build_tiny("t5", folder / "model")), data=str(data), order="abc", device="cpu",
            output=str(folder / "whole"), cache_dir=str(folder / "cache"), steps_per_task=20, limit_eval=4, lr=1e-2,
            max_length=64, max_new_tokens=4, checkpoint_rounds=1, memory_fraction=0.1, keep_checkpoints=2,
            kif=KIFConfig(inner_steps=3, outer_steps=2),
        )  # fmt: skip
        self.noted = folder / "noted"
        self.kills: Counter[str] = Counter()
        self.different: list[str] = []
        began = time.monotonic()
        if wait(start(self.config, None, self.noted)) != 0:
            raise SystemExit("the uninterrupted run failed")
        self.duration = time.monotonic() - began
        self.events = int(self.noted.read_text())
        self.expected = outcome(folder / "whole")

    def run(self, kills: int) -> None:
        number = 0
        while self.kills.total() < kills:
            number += 1
            if self.chain(self.folder / f"run-{number}", kills) == 0 and number > 20 * kills:
                raise SystemExit("runs end before they are killed")

    def chain(self, output: Path, kills: int) -> int:
        """Kill one run again and again until it ends or `kills` are reached; returns how often it was."""
        before = self.kills.total()
        while self.kills.total() < kills:
            config = replace(self.config, output=str(output), resume=output.exists())
            point = self.kill(config)
            if point is None:
                self.compare(output, "ended by itself after kills")
                break
            self.kills[point] += 1
            copy = output.with_name(f"{output.name}-copy")
            if output.exists():
                shutil.copytree(output, copy)
            # a run that was killed before it had a folder is simply begun again
            resumed = replace(self.config, output=str(copy), resume=copy.exists())
            if wait(start(resumed, None, self.noted)) == 0:
                self.compare(copy, point)
            else:
                self.different.append(f"{point}: could not be resumed")
            shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
        return self.kills.total() - before

    def kill(self, config: RunConfig) -> str | None:
        """Start a run and kill it; says at what, None if it ended before."""
        if self.kills.total() % 2:
            at = self.draw.randint(1, self.events)
            status = wait(start(config, at, self.noted))
            return self.noted.read_text() if status == -signal.SIGKILL else self.ended(status)
        child = start(config, None, self.noted)
        time.sleep(self.draw.uniform(0.0, self.duration))
        os.kill(child, signal.SIGKILL)
        status = wait(child)
        return "at a random moment" if status == -signal.SIGKILL else self.ended(status)

    def ended(self, status: int) -> None:
        if status != 0:
            raise SystemExit(f"a run failed with status {status}")

    def compare(self, run: Path, point: str) -> None:
        if outcome(run) != self.expected:
            self.different.append(point)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), options.seed)
        campaign.run(options.kills)
    kills = campaign.kills
    print(json.dumps({"kills": kills.total(), "at": dict(kills), "different": campaign.different}))
    return 1 if campaign.different else 0


if __name__ == "__main__":
    sys.exit(main())
