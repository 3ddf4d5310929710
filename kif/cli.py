"""The command `kif`: train, eval, predict, memory, export, report, compare, methods, demo, doctor.

Exit status: 0 only when all of it worked; 2 for bad usage, configuration or data, with one paragraph on stderr;
1 for a run that failed; 130 when interrupted; 143 when SIGTERM stopped a run, which can be resumed. Nothing heavy is
imported before a command needs it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from kif.doctor import extra_of
from kif.faults import FULL, PREEMPTED, Preempted, RunError

Command = Callable[[Sequence[str]], int]


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` defaults to the process's own arguments."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # closed, as by `>&-`: what is said there is for nobody
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a terminal that cannot show a character of a table is no reason to fail
            stream.reconfigure(errors="replace")
    try:
        status = _status(arguments)
        sys.stdout.flush()
        return status
    except Preempted as stop:
        return _complain(str(stop), PREEMPTED)
    except KeyboardInterrupt as stop:
        return _complain(": ".join(["interrupted", *map(str, stop.args)]), 130)
    except BrokenPipeError:  # the reader of our output went away, as in `kif methods | head -1`
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:
                # or the interpreter would try again, say so, and end with a status of its own
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 1
    except ModuleNotFoundError as error:
        wanted = _package(error.name or "")
        if wanted is None:
            return _failed(error)
        return _complain(f"{error.name} is not installed; install it with: pip install {wanted}", 2)
    except RunError as error:
        return _complain(f"failed: {error}", 1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            return _complain(f"failed: {error}", 1)
        return _complain(str(error), 2) if _refused(error) else _failed(error)


def _status(arguments: Sequence[str]) -> int:
    """Run one command; argparse and tyro end it themselves for --help, and where they have printed a message."""
    try:
        if arguments and arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]](arguments[1:])
        return _top_level(arguments)
    except Preempted:
        raise
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def train(argv: Sequence[str]) -> int:
    """Train a method on a sequence of tasks; writes a run folder and prints the scores."""
    from kif.configfile import parse_run_config

    config = parse_run_config(argv)
    from kif.distributed import process_group, world
    from kif.report import accuracy_matrix_table, comparison_table, parse_results
    from kif.run import train as run_training

    with process_group(config.device):
        found = run_training(config, progress=True)
        if world()[0] > 0:
            return 0
    results = parse_results(found, str(Path(config.output) / "results.json"))
    print(accuracy_matrix_table(results))
    print(comparison_table([results]))
    print(f"run folder: {config.output}")
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Score a finished run's adapter again, from its folder."""
    parser = _parser("eval", evaluate)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--adapter", type=Path, metavar="DIR", help="adapter folder (default: RUN/adapter)")
    which.add_argument("--checkpoint", type=_positive, metavar="N", help="the adapter after task N, counted from 1")
    parser.add_argument("--split", choices=["test", "validation", "heldout"], help="rows to score (default: the run's)")
    parser.add_argument("--eval-mode", choices=["generate", "rank"], help="how to score (default: the run's)")
    parser.add_argument("--limit-eval", type=_positive, metavar="N", help="score at most N rows of each task")
    parser.add_argument("--data", metavar="DIR", help="task folder (default: the run's; KIF_DATA if that is gone)")
    parser.add_argument("--model", metavar="MODEL", help="base model (default: the run's)")
    parser.add_argument("--device", help="where to run (default: the run's)")
    options = parser.parse_args(argv)
    if not (options.run / "config.yaml").is_file():
        raise FileNotFoundError(f"{options.run / 'config.yaml'} does not exist: {options.run} is no run folder")
    changes = {"eval_split": options.split, "eval_mode": options.eval_mode, "limit_eval": options.limit_eval}
    changes |= {"model": options.model, "device": options.device}
    changes["data"] = options.data or _moved_data(options.run)
    changes = {name: value for name, value in changes.items() if value is not None}

    from kif.configfile import load_config
    from kif.distributed import process_group, world
    from kif.report import scores_table
    from kif.run import evaluate_run

    with process_group(options.device or load_config(options.run / "config.yaml").device):
        found = evaluate_run(options.run, adapter=options.adapter, checkpoint=options.checkpoint, **changes)
        if world()[0] > 0:
            return 0
    print(scores_table(found["tasks"], found["scores"], title=f"{found['adapter']}, {found['seconds']:.0f} s"))
    return 0


def predict(argv: Sequence[str]) -> int:
    """Answer the rows of a JSON-lines file or standard input with a finished run; one JSON object a line."""
    parser = _parser("predict", predict)
    parser.epilog = "Stops at the first line that cannot be used, with status 2; all lines before it are answered."
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("file", nargs="?", default="-", metavar="FILE", help="default: -, standard input")
    parser.add_argument("--text", action="store_true", help="lines are inputs themselves, not JSON")
    parser.add_argument("--task", metavar="TASK", help="task that gives instruction, template and labels to rank")
    parser.add_argument("--eval-mode", choices=["generate", "rank"], help="how to answer (default: the run's)")
    parser.add_argument("--checkpoint", type=_positive, metavar="N", help="the adapter after task N, counted from 1")
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="lines at once (default: eval_batch_size)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="new file (default: standard output)")
    parser.add_argument("--model", metavar="MODEL", help="base model (default: the run's)")
    parser.add_argument("--device", help="where to run (default: the run's)")
    # FILE may stand behind options
    options = vars(parser.parse_intermixed_args(argv))
    for name in ("eval_mode", "model", "device"):
        if options[name] is None:
            del options[name]
    from kif.predict import predict_file

    predict_file(**options)
    return 0


def memory(argv: Sequence[str]) -> int:
    """Show, export or remove the replay memory that a finished run keeps as text."""
    from kif.stored import command

    return command(_parser("memory", memory), argv)


def export(argv: Sequence[str]) -> int:
    """Merge a run's adapter into its base model and write a model folder that transformers loads by itself."""
    parser = _parser("export", export)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write, which must be empty")
    parser.add_argument("--checkpoint", type=_positive, metavar="N", help="the adapter after task N, counted from 1")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of the weights (default: the run's precision)")
    parser.add_argument("--model", metavar="MODEL", help="base model (default: the run's)")
    options = parser.parse_args(argv)
    from kif.export import export as write_model

    changes = {"model": options.model} if options.model else {}
    loader = write_model(options.run, options.output, checkpoint=options.checkpoint, dtype=options.dtype, **changes)
    print(f"written: {options.output}; it is loaded by {loader}.from_pretrained")
    return 0


def report(argv: Sequence[str]) -> int:
    """Compare finished runs: a table here, pictures and a merged results.json in a folder."""
    parser = _parser("report", report)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help="folder (default: report)")
    options = parser.parse_args(argv)

    from kif.report import accuracy_matrix_table, comparison_table, load_runs, write_report

    results = load_runs(options.runs)
    written = write_report(options.runs, options.output)
    if len(results) == 1:
        print(accuracy_matrix_table(results[0]))
    print(comparison_table(results))
    print("\n".join(f"written: {path}" for path in written))
    return 0


def compare(argv: Sequence[str]) -> int:
    """Train several methods side by side, with several seeds; finished runs are not run again."""
    parser = _parser("compare", compare)
    parser.epilog = "All options of `kif train` can be given too and hold for every run; each is a process of its own."
    parser.add_argument(
        "--methods", required=True, metavar="A,B,...", help="of `kif methods`; also kif:no-die, ewc:lr=1e-3"
    )
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at once (default: 1)")
    # options of `kif train` that would be replaced for every run
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--seed", help=argparse.SUPPRESS)
    options, others = parser.parse_known_args(argv)
    for name in ("method", "seed"):
        if getattr(options, name) is not None:
            raise ValueError(f"a comparison has several: give it --{name}s and no --{name}")
    from kif.configfile import parse_run_config

    base = parse_run_config(others)
    if base.resume:
        raise ValueError("a comparison goes on by itself where it stopped, run by run: give it no --resume")
    if base.continue_from:
        raise ValueError("a comparison trains from the start: give it no --from")
    from kif.compare import plan, run
    from kif.distributed import started

    if started() > 1:
        raise ValueError("a comparison starts its runs itself, each as one process: leave torchrun out")
    from kif.report import comparison_table, load_runs, write_report

    cells = plan(base, options.methods.split(","), range(options.seeds))
    failed = run(cells, options.jobs)
    runs = [cell.folder for cell in cells if cell.finished]
    if runs:
        write_report(runs, Path(base.output) / "report")
        print(comparison_table(load_runs(runs)))
        print(f"written: {Path(base.output) / 'report'}")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def methods(argv: Sequence[str]) -> int:
    """List the methods that `kif train --method` knows: source, models they work with, who can load their adapters."""
    _parser("methods", methods).parse_args(argv)
    from kif.methods import ALIASES, METHODS

    width = max(map(len, METHODS))
    families = {"encoder-decoder": "T5", "decoder": "Llama", "encoder": "BERT"}
    for name, method in METHODS.items():
        works = ", ".join(word for family, word in families.items() if family not in method.refused)
        adapter = "PEFT adapter" if method.plain_adapter else "adapter for kif only"
        short = "".join(f"; short: {alias}" for alias, meant in ALIASES.items() if meant == name)
        print(f"{name:<{width}}  {method.summary} ({method.source}) [{works}; {adapter}{short}]")
    return 0


def demo(argv: Sequence[str]) -> int:
    """Train three methods on real text with a small real model and show what each forgets, in minutes on a CPU."""
    parser = _parser("demo", demo)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--data", metavar="DIR", help="another task folder (default: texts of the `demo` extra)")
    parser.add_argument("--model", metavar="MODEL", help="another model, folder or hub name (default: MiniLM)")
    parser.add_argument("--steps", type=_positive, metavar="N", help="optimizer steps for each task and method")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all runs (default: 0)")
    options = parser.parse_args(argv)
    from kif.demo import run_demo

    data = options.data or os.environ.get("KIF_DATA")
    return run_demo(options.output, data, options.model, options.steps, options.seed)


def doctor(argv: Sequence[str]) -> int:
    """Say what this machine has for training and what is missing; status 1 where training cannot work."""
    parser = _parser("doctor", doctor)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--data", metavar="DIR", help="task folder to look at (default: KIF_DATA)")
    options = parser.parse_args(argv)
    import json

    from kif.doctor import collect, render

    found = collect(options.data)
    print(json.dumps(found, indent=1) if options.json else render(found))
    return 0 if found["ok"] else 1


COMMANDS: dict[str, Command] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "memory": memory,
    "export": export,
    "report": report,
    "compare": compare,
    "methods": methods,
    "demo": demo,
    "doctor": doctor,
}


def _top_level(arguments: Sequence[str]) -> int:
    """`kif`, `kif --help`, `kif --version`, and anything that is no command."""
    if arguments and not arguments[0].startswith("-"):
        from kif.configfile import nearest

        close = nearest(arguments[0], COMMANDS)
        hint = f"did you mean {close!r}? " if close else ""
        return _complain(f"no command {arguments[0]!r}; {hint}there are {', '.join(COMMANDS)}", 2)
    commands = "\n".join(f"  {name:<8} {inspect.getdoc(command)}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="kif",
        description="Continual fine-tuning of language models with Recurrent-KIF and the methods it is compared with.",
        epilog=f"commands:\n{commands}\n\n`kif COMMAND --help` describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kif {_version()}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="one of those below, then its own options")
    parser.parse_args(arguments)
    parser.error(f"the first argument must be a command: {', '.join(COMMANDS)}")


def _parser(name: str, command: Command) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"kif {name}", description=inspect.getdoc(command), allow_abbrev=False)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _version() -> str:
    try:
        return metadata.version("recurrent-kif")
    except metadata.PackageNotFoundError:
        return str(importlib.import_module("kif").__version__)


def _moved_data(run: Path) -> str | None:
    """KIF_DATA, if the task folder of a run is not there (any more)."""
    from kif.configfile import load_config

    data = load_config(run / "config.yaml").data
    return None if data == "hub" or (data and Path(data).exists()) else os.environ.get("KIF_DATA")


def _package(module: str) -> str | None:
    """What to install to get a missing module, if it is one that we use."""
    extra = extra_of(module)
    return "torch" if module == "torch" else f"'recurrent-kif[{extra}]'" if extra else None


def _refused(error: BaseException) -> bool:
    """Whether this is a refusal written for the user, not a failure of a run.

    Paths that are not as needed are, wherever that is noticed; so are ValueErrors and OSErrors that our own code
    raised. The same types from deep inside a library are failures, whose trace is needed.
    """
    if isinstance(error, (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return isinstance(error, (ValueError, OSError)) and module.split(".")[0] in ("kif", "kif_kernels")


def _complain(message: str, status: int) -> int:
    print(f"kif: {message}", file=sys.stderr)
    return status


def _failed(error: BaseException) -> int:
    """Report an unexpected failure with its trace."""
    traceback.print_exception(error)
    return _complain(f"failed: {type(error).__name__}: {error}", 1)
