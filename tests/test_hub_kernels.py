"""kif_kernels as a package for the kernel hub: a copy under another name works alone, and beside kif_kernels itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

from kif_kernels import hub

ALLOWED = ("torch", "triton")
HAS_TRITON = util.find_spec("triton") is not None

IMPORT = """
import importlib.util, sys
def load(name, folder):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""

# I = 0.5 |w g| = 1..5 from I = 0; of n = 5 and density 0.4 the 2nd largest is 4; the outer scores are those reversed
NUMBERS = """
def check(k):
    import torch
    w, g = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0]), torch.tensor([2.0, 2.0, -2.0, 2.0, 2.0])
    inner = torch.zeros(5)
    k.importance_ema_(inner, w, g, 0.5)
    assert inner.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0], inner
    assert k.importance_threshold(inner, 0.4).item() == 4.0
    start, middle, theta = torch.zeros(5), torch.full((5,), 10.0), torch.full((5,), 11.0)
    outer = torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0])
    k.fuse_(theta, start, middle, inner, outer, torch.tensor(4.0), torch.tensor(4.0))
    # tau_in = 10 where inner >= 4, tau_out = 1 where outer >= 4, both for the last
    assert theta.tolist() == [1.0, 0.0, 0.0, 10.0, 11.0], theta
    assert torch.equal(start, theta)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "repository"
    hub.lay_out(out)
    return out


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with torch, triton where it is installed, and what these two need, by their own metadata."""
    folder = tmp_path_factory.mktemp("bare")
    wanted, seen = [name for name in ALLOWED if util.find_spec(name)], set()
    while wanted:
        name = wanted.pop()
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            # a requirement of another platform
            continue
        tops = {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(distribution.locate_file(top)))
        requirements = [part for part in distribution.requires or () if "extra ==" not in part]
        wanted += [re.split(r"[^\w.-]", part)[0] for part in requirements]
    return folder


def run(bare: Path, code: str, **environment: str) -> None:
    """Run code in an interpreter that finds the standard library and `bare`, and nothing else."""
    code = f"import sys; sys.path.append({str(bare)!r})\n{code}"
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=300, env=kept | environment
    )
    assert done.returncode == 0, done.stderr


def test_a_published_copy_works_with_torch_alone(repository: Path, bare: Path) -> None:
    code = f"{IMPORT}{NUMBERS}\nk = load('other_name', {str(repository / 'build' / 'torch-cpu')!r})\ncheck(k)\n"
    code += "import torch; assert hasattr(torch.ops.other_name, 'fuse_') and not hasattr(torch.ops.kif, 'fuse_')\n"
    code += (
        "assert not [m for m in sys.modules if m.split('.')[0] in ('kif', 'kif_kernels', 'transformers', 'numpy')]\n"
    )
    code += (
        "assert importlib.util.find_spec('kif_kernels') is None and importlib.util.find_spec('transformers') is None"
    )
    run(bare, code)


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels need triton")
def test_the_kernels_of_a_copy_need_torch_and_triton_alone(repository: Path, bare: Path) -> None:
    code = f"{IMPORT}\nload('other_name', {str(repository / 'build' / 'torch-cuda')!r})\n"
    code += "kernels = importlib.import_module('other_name.kernels')\n"
    code += "assert kernels.fuse_.__module__ == 'other_name.kernels.fuse' and 'kif_kernels' not in sys.modules\n"
    code += "from other_name.kernels import fuse; import triton\n"
    code += "assert [name for name, value in vars(fuse).items() if isinstance(value, triton.JITFunction)]"
    run(bare, code)


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels need triton")
def test_the_kernels_of_a_copy_compute_the_same(repository: Path) -> None:
    """In Triton's interpreter, which needs numpy besides, and corrections for new ones."""
    code = f"{IMPORT}{NUMBERS}\nk = load('other_name', {str(repository / 'build' / 'torch-cpu')!r})\n"
    # which turns the interpreter on, before anything of triton is imported
    code += f"k.backend.implementation('cpu'); sys.path.append({str(Path(__file__).parent)!r})\n"
    code += "from kernel_tests.interpreter import correct_interpreter; correct_interpreter(); check(k)\n"
    code += "assert 'other_name.kernels.fuse' in sys.modules and k.backend_name('cpu') == 'interpret'"
    environment = {**os.environ, "KIF_BACKEND": "interpret"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=repository, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_copies_and_the_package_itself_live_in_one_process(repository: Path, bare: Path) -> None:
    folder = str(repository / "build" / "torch-cpu")
    code = f"{IMPORT}{NUMBERS}\nsys.path.append({str(hub.PACKAGE.parent)!r})\nimport kif_kernels\n"
    code += f"one, two = load('version_1', {folder!r}), load('version_2', {folder!r})\n"
    code += "for k in (one, kif_kernels, two): check(k)\n"
    code += "import torch\nnames = ('kif', 'version_1', 'version_2')\n"
    code += "assert len({getattr(torch.ops, n).fuse_.default for n in names}) == 3\n"
    code += "assert one.api is not two.api and one.api is not kif_kernels.api"
    run(bare, code)


def test_a_plain_copy_of_the_folder_inside_another_package(tmp_path: Path, bare: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    shutil.copytree(hub.PACKAGE, tmp_path / "mine" / "fast", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"{NUMBERS}\nsys.path.append({str(tmp_path)!r})\nfrom mine import fast\ncheck(fast)\n"
    run(bare, code + "import torch; assert hasattr(torch.ops.mine_fast, 'fuse_')")


def test_the_package_never_names_itself_in_an_import() -> None:
    for path in hub.sources():
        text = (hub.PACKAGE / path).read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) kif", text, re.MULTILINE), path
        assert not re.search(r"torch\.ops\.kif\.\w+\(", text), path


def test_metadata_says_what_is_there(repository: Path) -> None:
    ids = set()
    for backend in ("cpu", "cuda"):
        variant = repository / "build" / f"torch-{backend}"
        found = json.loads((variant / "metadata.json").read_text())
        files = {p.relative_to(variant).as_posix() for p in variant.rglob("*") if p.is_file() and p.suffix != ".pyc"}
        assert files - {"metadata.json"} == set(found["digest"]["files"])
        assert files > {"__init__.py", "_ops.py", "kernels/fuse.py", "py.typed"}
        assert "hub.py" not in files and found["backend"] == {"type": backend}
        assert found["id"].isidentifier() and found["name"] == "kif-kernels"
        ids.add(found["id"])
    assert len(ids) == 2
    assert (repository / "torch-ext" / "kif_kernels" / "_ops.py").is_file() and (repository / "build.toml").is_file()
    with pytest.raises(FileExistsError):
        hub.lay_out(repository)


@pytest.mark.skipif(util.find_spec("kernels") is None, reason="needs the package kernels")
def test_the_kernels_library_loads_it(repository: Path) -> None:
    code = f"""{NUMBERS}
from pathlib import Path
from kernels import get_local_kernel
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
root = Path({str(repository)!r})
check(get_local_kernel(root / "build", backend="cpu"))
for folder in (root / "build").iterdir():
    found = Metadata.read_from_file(folder / "metadata.json")
    found.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
Build.open(root)  # raises for a build.toml it does not know
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=repository, env=environment
    )
    assert done.returncode == 0, done.stderr
