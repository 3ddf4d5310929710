"""The machine that is measured on: what it is, how fast it copies, what the emptiest launch costs."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Size of the buffer whose copy gives the bandwidth: several times any cache."""

FLUSH_BYTES = 2**28
"""Written between timed parts; at least twice the L2."""


class Machine:
    """A device with its clock, its cache and its ceilings.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Attributes:
        cache_bytes: size of the last-level cache (L2 of a GPU, L3 of a CPU; 0 where it cannot be read).
        copy_gbps: bytes read and written in a second by a device-to-device copy of a large buffer, in 1e9.
        launch_us: a launch that does next to nothing, between two events; 0 on a CPU.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
            torch.cuda.set_device(self.device)
            self.cache_bytes = int(torch.cuda.get_device_properties(self.device).L2_cache_size)
            size = max(FLUSH_BYTES, 2 * self.cache_bytes)
            self._flushed = torch.empty(size // 4, dtype=torch.int32, device=self.device)
        else:
            self.cache_bytes = _cpu_cache_bytes()
        self.flush_us = statistics.median(self._times(self.flush, 20)) if self.cuda else 0.0
        self.copy_gbps = self.measure_copy()
        self.launch_us = self._measure_launch()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Fill the L2 with other data (dirty lines, as a backward pass leaves them). Nothing on a CPU."""
        if self.cuda:
            self._flushed.zero_()

    def measure_copy(self) -> float:
        """Copy bandwidth now, GB/s, bytes read plus bytes written."""
        size = COPY_BYTES[self.device.type]
        if self.cuda:
            size = min(size, torch.cuda.mem_get_info(self.device)[0] // 4)
        source = torch.randint(0, 127, (size,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        times = self._times(lambda: target.copy_(source), 30 if self.cuda else 7)
        return 2 * size / statistics.median(times) / 1e3

    def memory_free(self) -> int:
        """Bytes that can still be allocated."""
        if self.cuda:
            return torch.cuda.mem_get_info(self.device)[0]
        for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
        return 2**63

    def _measure_launch(self) -> float:
        if not self.cuda:
            return 0.0
        x = torch.ones(1, device=self.device)

        def launch() -> None:
            x.add_(1.0)

        return statistics.median(self._times(launch, 50, hide=True))

    def _times(self, run: Callable[[], object], repeats: int, hide: bool = False) -> list[float]:
        """Microseconds of each of `repeats` runs after three more; `hide` lets the host enqueue behind a flush."""
        times = []
        for i in range(repeats + 3):
            if not self.cuda:
                begun = time.perf_counter()
                run()
                elapsed = (time.perf_counter() - begun) * 1e6
            else:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                if hide:
                    self.flush()
                start.record()
                run()
                end.record()
                torch.cuda.synchronize(self.device)
                elapsed = start.elapsed_time(end) * 1e3
            if i >= 3:
                times.append(elapsed)
        return times


PACKAGES = ("transformers", "peft", "accelerate", "liger-kernel")
"""What a result depends on where it is installed."""


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on, for the JSON: versions, devices, revision, date."""
    env: dict[str, Any] = {
        **{name: version for name in PACKAGES if (version := _version(name))},
        "device": str(device),
        "gpu": None,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda_runtime": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": None,
        "python": platform.python_version(),
        "git_revision": git_revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        env["gpu"] = properties.name
        env["capability"] = f"{properties.major}.{properties.minor}"
        env["multiprocessors"] = properties.multi_processor_count
        env["memory_bytes"] = properties.total_memory
        env["driver"] = _driver()
    return env


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a result, in folders that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def git_revision() -> str:
    """KIF_GIT_REVISION; else the commit of the checkout, with `+changes` where files differ from it; else `unknown`."""
    if given := os.environ.get("KIF_GIT_REVISION"):
        return given
    folder = Path(__file__).resolve().parents[1]
    revision = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if revision:
        return revision + ("+changes" if _output(["git", "-C", str(folder), "status", "--porcelain"]) else "")
    return "unknown"


def _driver() -> str | None:
    lines = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return lines.splitlines()[0] if lines else None


def _output(command: list[str]) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_cache_bytes() -> int:
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not path.exists():
        return 0
    text = path.read_text().strip()
    return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1)
