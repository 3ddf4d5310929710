"""Forgetting and accuracy of each method on real text, at equal optimizer steps: the project's quality table.

    python -m benchmarks.quality --data FOLDER --model FOLDER --output benchmarks/results/quality.json

Every variant gets the same number of optimizer steps a task (inner and outer together) from the same seeds, on every
order. Runs are kept in --runs and are not run again, so an interrupted table continues. `--jobs` runs use one thread
each. The rows scored are a fixed random subset of the chosen split. Seconds are not reported: runs side by side
disturb each other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kif.config import EWCConfig, KIFConfig, L2PConfig, LFPT5Config, RunConfig, VRMCLConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "SeqLoRA": {"method": "seqlora"},
    "LoRAReplay": {"method": "lora-replay"},
    "control M=1 (no masks)": {"kif": KIFConfig(fusion="no-masks", outer_steps=1)},
    "control M=4 (no masks)": {"kif": KIFConfig(fusion="no-masks", outer_steps=4)},
    "Recurrent-KIF paper M=1": {"kif": KIFConfig(outer_steps=1)},
    "Recurrent-KIF paper M=4": {"kif": KIFConfig(outer_steps=4)},
    "Recurrent-KIF released-code": {"kif": KIFConfig.preset("released-code")},
    "MTL": {"method": "mtl"},
}
"""The rows of the quality table."""

SHORT_LFPT5 = LFPT5Config(prompt_length=32, lm_length=64, pseudo_candidates=16)
"""A tenth of the source's prompt, since its 300 vectors would be most of a short input's cost."""

_M4 = {"outer_steps": 4}

RATES = {
    "LoRAReplay": (2e-3, 4e-3),
    "control M=4 (no masks)": (1e-3, 2e-3, 4e-3),
    "Recurrent-KIF paper M=1": (4e-3,),
    "Recurrent-KIF paper M=4": (1e-3, 2e-3, 4e-3, 8e-3),
    "Recurrent-KIF released-code": (2e-3, 4e-3),
}
"""Learning rates that were tried, on rows held out of train."""

TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "quality": VARIANTS,
    "rates": {f"{row}, {lr:g}": {**VARIANTS[row], "lr": lr} for row, rates in RATES.items() for lr in rates},
    "table1": {
        "SeqLoRA": {"method": "seqlora"},
        "IncLoRA": {"method": "inclora"},
        "LoRAReplay": {"method": "lora-replay"},
        "EWC": {"method": "ewc"},
        "O-LoRA": {"method": "olora"},
        "MoELoRA": {"method": "moelora"},
        "SAPT": {"method": "sapt"},
        "TaSL": {"method": "tasl"},
        "MIGU": {"method": "migu"},
        "VR-MCL": {"method": "vr-mcl"},
        "L2P": {"method": "l2p", "lr": 0.03},
        "LFPT5": {"method": "lfpt5", "lr": 0.5, "weight_decay": 1e-5, "lfpt5": SHORT_LFPT5},
        "Recurrent-KIF": {"kif": KIFConfig(**_M4)},
        "MTL": {"method": "mtl"},
    },
    "table2": {
        "Recurrent-KIF": {"kif": KIFConfig(**_M4)},
        "- DIE": {"kif": KIFConfig.preset("no-die", **_M4)},
        "- KI": {"kif": KIFConfig.preset("no-ki", **_M4)},
        "+ GM": {"kif": KIFConfig.preset("gm", **_M4)},
        "+ Adaptive": {"kif": KIFConfig.preset("adaptive", **_M4)},
        "- Share": {"kif": KIFConfig.preset("no-share", **_M4)},
    },
    "table10": {
        "Recurrent-KIF": {"kif": KIFConfig(**_M4)},
        "importance by |gradient|": {"kif": KIFConfig.preset("gradient-importance", **_M4)},
        "no EMA": {"kif": KIFConfig.preset("no-ema", **_M4)},
    },
}
"""Tables by name: the README's two, and those of the paper."""

PROBES: dict[str, dict[str, Any]] = {
    "M=4, density 50%": {"kif": KIFConfig(outer_steps=4, density=0.5)},
    "M=4, threshold per tensor": {"kif": KIFConfig(outer_steps=4, threshold_scope="tensor")},
    "M=4, shared optimizer": {"kif": KIFConfig(outer_steps=4, outer_optimizer="shared")},
    "M=4, Q=4": {"kif": KIFConfig(inner_steps=4, outer_steps=4)},
    "M=4, released weights": {"kif": KIFConfig(outer_steps=4, fusion="released-code")},
    "EWC strength 1e5": {"method": "ewc", "ewc": EWCConfig(strength=1e5)},
    **{
        f"VR-MCL {inner:g}/{outer:g}": {"method": "vr-mcl", "vrmcl": VRMCLConfig(inner_lr=inner, outer_lr=outer)}
        for inner in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
        for outer in (0.03, 0.1, 0.35, 1.0, 3.0, 10.0, 30.0)
    },
    "L2P vocabulary": {"method": "l2p", "lr": 0.03, "l2p": L2PConfig(init="vocabulary")},
}
"""Hyperparameters changed, to choose one or to find out what an effect comes from. Not run by default."""


Cell = tuple[str, str, int]
"""Row, order, seed."""


def run_cell(config: RunConfig) -> dict[str, Any]:
    """One run, unless its folder holds a finished one."""
    from kif.configfile import load_config
    from kif.resume import with_absolute_folders
    from kif.run import train

    folder = Path(config.output)
    results = folder / "results.json"
    if not results.is_file():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        train(config, progress=False)
    elif load_config(folder / "config.yaml") != with_absolute_folders(config):
        raise ValueError(f"{folder} holds a run of other settings: remove it or choose another --runs")
    return json.loads(results.read_text())


def summarise(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of one variant and order."""
    row: dict[str, Any] = {
        "label": cells[0]["label"],
        "seeds": [cell["seed"] for cell in cells],
        "steps": cells[0]["steps"],
    }
    for key in ("op", "bwt"):
        values = [cell[key] for cell in cells if cell[key] is not None]
        if values:
            row[key] = {
                "mean": round(statistics.fmean(values), 2),
                "std": round(statistics.stdev(values), 2) if len(values) > 1 else None,
                "values": [round(value, 2) for value in values],
            }
    learned = [
        statistics.fmean(cell["accuracy"][i][i] for i in range(len(cell["tasks"])))
        for cell in cells
        if cell["bwt"] is not None
    ]
    if learned:
        row["learned"] = round(statistics.fmean(learned), 2)
    return row


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Markdown, one row a variant, OP and BWT for each order."""
    orders = list(next(iter(summary.values())))
    lines = [
        "| | " + " | ".join(f"OP order {order} | BWT order {order}" for order in orders) + " |",
        "|---|" + "---|---|" * len(orders),
    ]
    for variant, rows in summary.items():
        cells = []
        for order in orders:
            for key in ("op", "bwt"):
                value = rows.get(order, {}).get(key)
                cells.append(_mean_std(value) if value else "")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_std(value: dict[str, Any]) -> str:
    spread = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return f"{value['mean']:.1f}{spread}"


def portable(config: RunConfig) -> dict[str, Any]:
    """What a cell is known by on any machine: the settings that are not the default, model and data by name."""
    from kif.training import INCIDENTAL, model_name

    default = asdict(RunConfig())
    settings: dict[str, Any] = {}
    for name, value in asdict(config).items():
        if isinstance(value, dict):
            value = {part: inner for part, inner in value.items() if inner != default[name][part]}
            if value:
                settings[name] = value
        elif name not in INCIDENTAL and value != default[name]:
            settings[name] = value
    return {**settings, "model": model_name(config.model), "data": Path(config.data or "").name}


def plan(args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> dict[Cell, RunConfig]:
    """Every cell's run, seed by seed, so that an interrupted table is even."""
    rates = {row: float(lr) for row, lr in (text.rsplit("=", 1) for text in args.lr_of)}
    cells: dict[Cell, RunConfig] = {}
    for seed, order, variant in itertools.product(args.seeds, args.orders, args.variants):
        config = RunConfig(
            model=args.model,
            data=args.data,
            order=order,
            seed=seed,
            steps_per_task=args.steps,
            limit_eval=args.rows,
            eval_split=args.split,
            batch_size=args.batch_size,
            template=args.template,
            max_length=args.max_length,
            max_new_tokens=args.max_new_tokens,
            precision=args.precision,
            lr=args.lr,
            warmup_steps=10,
            eval_batch_size=16,
        )
        config = replace(config, **rows[variant])
        config = replace(config, lr=rates.get(variant, config.lr))
        name = f"{variant}-{order}-{seed}-{args.split}-{config.lr}-{args.steps}"
        folder = args.runs / "".join(c if c.isalnum() else "-" for c in name)
        cells[variant, order, seed] = replace(config, output=str(folder))
    return cells


def stored_cells(paths: list[Path]) -> list[dict[str, Any]]:
    """The cells of result files, each with the environment it was measured in."""
    documents = [json.loads(path.read_text()) for path in paths]
    return [{"environment": found["environment"], **cell} for found in documents for cell in found["cells"]]


def document(
    args: argparse.Namespace,
    cells: dict[Cell, RunConfig],
    finished: dict[Cell, dict[str, Any]],
    elsewhere: dict[Cell, dict[str, Any]],
) -> dict[str, Any]:
    """What is written: settings, means over the seeds that are finished, and every cell.

    Cells that were not run here, in `elsewhere`, have an environment of their own.
    """
    from kif.doctor import environment
    from kif.training import model_name

    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings["model"], settings["data"] = model_name(args.model), Path(args.data).name
    for name in ("runs", "output", "known", "jobs"):
        del settings[name]
    summary: dict[str, dict[str, Any]] = {}
    for variant, order in itertools.product(args.variants, args.orders):
        done = [finished[variant, order, seed] for seed in args.seeds if (variant, order, seed) in finished]
        if done:
            summary.setdefault(variant, {})[order] = summarise(done)
    return {
        "settings": settings,
        "environment": environment(),
        "summary": summary,
        "cells": [
            {
                "row": key[0],
                "config": portable(config),
                **({"environment": elsewhere[key]} if key in elsewhere else {}),
                "results": finished[key],
            }
            for key, config in cells.items()
            if key in finished
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("KIF_DATA"), help="task folder; default KIF_DATA")
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, anew after each cell")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the single runs")
    parser.add_argument("--orders", nargs="+", default=["1", "3"], help="names of task orders")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", choices=list(TABLES), default="quality", help="which rows")
    parser.add_argument("--variants", nargs="+", help="some rows of the table, or probes; default: the whole table")
    parser.add_argument("--steps", type=int, default=144, help="optimizer steps a task, inner and outer together")
    parser.add_argument("--rows", type=int, default=150, help="rows scored for each task")
    parser.add_argument("--split", default="test", choices=["test", "heldout"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=64, help="longest text in tokens")
    parser.add_argument("--template", help="prompt, with {input}; default: the task folder's")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest generated answer")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of the base model")
    parser.add_argument("--lr", type=float, default=1e-3, help="of all rows without one of their own")
    parser.add_argument("--lr-of", nargs="+", default=[], metavar="ROW=LR", help="learning rates of single rows")
    parser.add_argument(
        "--known", nargs="+", type=Path, default=[], metavar="FILE",
        help="results, perhaps of another machine, whose cells are not run again",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    rows = {**PROBES, **TABLES[args.table]}
    args.variants = args.variants or list(TABLES[args.table])
    for variant in [*args.variants, *(text.rsplit("=", 1)[0] for text in args.lr_of)]:
        if variant not in rows:
            parser.error(f"no row {variant!r} in {args.table}; there are {', '.join(rows)}")

    cells = plan(args, rows)
    stored = stored_cells(args.known)
    finished: dict[Cell, dict[str, Any]] = {}
    elsewhere: dict[Cell, dict[str, Any]] = {}
    for key, config in cells.items():
        settings = portable(config)
        for cell in stored:  # of equal ones the last file's counts
            if cell["config"] == settings:
                finished[key], elsewhere[key] = cell["results"], cell["environment"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(run_cell, config): key for key, config in cells.items() if key not in finished}
        for future in as_completed(futures):
            key = futures[future]
            finished[key] = future.result()
            print(f"{len(finished)}/{len(cells)} {key}: OP {finished[key]['op']:.1f}", flush=True)
            args.output.write_text(json.dumps(document(args, cells, finished, elsewhere), indent=1) + "\n")
    found = document(args, cells, finished, elsewhere)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["summary"]))


if __name__ == "__main__":
    main()
