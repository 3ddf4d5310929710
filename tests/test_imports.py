"""What each package may need: kif_kernels torch alone, kif no optional package at import."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = (
    "triton", "datasets", "bitsandbytes", "matplotlib", "tyro", "pydantic", "rich", "yaml", "rouge_score", "accelerate",
)  # fmt: skip
HEAVY = (*OPTIONAL, "transformers", "peft", "tokenizers", "numpy", "safetensors", "tqdm")


def run_without(modules: tuple[str, ...], code: str) -> None:
    """Run code in an interpreter in which importing any of `modules` fails."""
    block = f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_kif_kernels_needs_torch_alone() -> None:
    code = "import torch, kif_kernels as k; x = torch.rand(9)\n"
    code += "k.importance_ema_(x, x, x, 0.5); assert k.importance_threshold(x, 0.2).ndim == 0\n"
    code += "assert not [m for m in sys.modules if m == 'kif' or m.startswith('kif.')]"
    run_without(tuple(name for name in HEAVY if name != "numpy"), code)


def test_the_engine_needs_torch_alone() -> None:
    run_without(tuple(name for name in HEAVY if name != "numpy"), "import kif; kif.RecurrentKIF; kif.KIFConfig()")


def test_trainer_names_are_found_without_importing_transformers() -> None:
    code = "import kif; assert 'KIFTrainer' in kif.__all__; import kif.engine\n"
    code += "try:\n    kif.KIFTrainer\nexcept ImportError as error:\n    assert 'transformers' in str(error)"
    run_without(("transformers",), code)


def test_modules_import_without_optional_packages() -> None:
    names = ["arena", "config", "engine", "loop", "run", "models", "evaluate", "cli", "report", "demo", "hub", "doctor"]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module('kif.' + name)"
    run_without(tuple(name for name in OPTIONAL if name != "accelerate"), code)


def test_help_does_not_import_torch() -> None:
    run_without(("torch",), "import kif.cli; assert kif.cli.main(['--help']) == 0")
