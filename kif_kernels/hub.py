"""Lay this package out as a kernel repository for the Hugging Face hub: `python -m kif_kernels.hub OUT`.

OUT receives `build/torch-<backend>/`, what `kernels.get_kernel` downloads and `kernels.get_local_kernel` imports, and
`torch-ext/` with `build.toml`, the source from which `kernel-builder` makes the same.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
NOT_PUBLISHED = ("hub.py",)


def sources() -> list[Path]:
    """The files of the package that are published, relative to its folder."""
    files = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return [*sorted(path for path in files if str(path) not in NOT_PUBLISHED), Path("py.typed")]


def lay_out(out: Path) -> list[Path]:
    """Write the repository into a new or empty folder. Returns: the folders of the variants, one a backend.

    Raises: FileExistsError for a folder that holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    # every value in this table is JSON too, and Python 3.10 has no tomllib
    pairs = re.findall(r"^(\w+) = (.+)$", (PACKAGE / "build.toml").read_text(encoding="utf-8"), re.MULTILINE)
    general = {name: json.loads(value) for name, value in pairs}
    module = general["name"].replace("-", "_")
    _copy(out / "torch-ext" / module)
    shutil.copyfile(PACKAGE / "build.toml", out / "build.toml")
    heading = f"---\nlibrary_name: kernels\nlicense: {general['license']}\n---\n\n"
    (out / "README.md").write_text(heading + (PACKAGE / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    variants = []
    for backend in general["backends"]:
        variant = out / "build" / f"torch-{backend}"
        _copy(variant)
        metadata = _metadata(general, module, backend, variant)
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        variants.append(variant)
    return variants


def _metadata(general: dict[str, Any], module: str, backend: str, variant: Path) -> dict[str, Any]:
    """The id is the name under which it is imported, and so the namespace in torch.ops: other contents, another id."""
    hashes = {path.as_posix(): hashlib.sha256((variant / path).read_bytes()).digest() for path in sources()}
    contents = hashlib.sha256(b"".join(name.encode() + digest for name, digest in hashes.items())).hexdigest()
    return {
        "name": general["name"],
        "id": f"_{module}_{backend}_{contents[:12]}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in hashes.items()},
        },
    }


def _copy(folder: Path) -> None:
    for path in sources():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / path, folder / path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m kif_kernels.hub", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    for folder in lay_out(parser.parse_args().out):
        print(f"written: {folder}")
