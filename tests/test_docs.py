"""The pages of docs: what they show as runnable runs, and tests, options and variables that they name exist."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from tiny import build_tiny

from kif.cli import COMMANDS, main
from kif.doctor import EXTRAS, VARIABLES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MODEL = "google-t5/t5-small"
"""The pages' model; in the tests a folder of that name, with a tiny random model, lies where they run."""

BLOCK = re.compile(r"^<!-- (runnable|file: (\S+)) -->\n```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """The marked blocks of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [match[4] for match in BLOCK.finditer(text) if match[3] == language]


RUN = """
import sys
for page in sys.argv[1:]:
    with open(page) as file:
        exec(compile(file.read(), page, "exec"), {"__name__": page})
"""


def run_python(pages: list[str], folder: Path) -> None:
    """The runnable Python blocks of each page as one script, one page after the other, in a process of their own."""
    for page in pages:
        code = "\n".join(blocks(page, "python"))
        assert code, page
        (folder / page).write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "KIF_DATA"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, "-c", RUN, *pages], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def commands(text: str) -> list[list[str]]:
    """`kif ...` at the beginning of a line, behind `-m` or in backquotes: its words."""
    found = re.findall(r"(?:^|`|-m )kif ([a-z][^`\n]*)", text, re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line).split() for line in found]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page on data has been followed up to its commands, with a tiny model in place of the named one."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / MODEL).mkdir(parents=True)
    build_tiny("t5", folder / MODEL)
    run_python(["data.md"], folder)
    (name,) = re.findall(r"<!-- file: (\S+) -->", (DOCS / "data.md").read_text(encoding="utf-8"))
    (content,) = blocks("data.md", "yaml")
    assert yaml.safe_load(content)["model"] == MODEL
    (folder / name).write_text(content)
    return folder


def test_code_runs(tmp_path: Path) -> None:
    run_python(["concepts.md", "own-loop.md", "add-a-kernel.md", "trainer.md"], tmp_path)


def test_every_runnable_block_is_run() -> None:
    found = {page.name for page in PAGES if "<!-- runnable -->\n```python" in page.read_text(encoding="utf-8")}
    assert found == {"concepts.md", "own-loop.md", "add-a-kernel.md", "trainer.md", "data.md", "add-a-method.md"}
    marks = sum(page.read_text(encoding="utf-8").count("<!-- runnable -->") for page in PAGES)
    assert marks == sum(len(BLOCK.findall(page.read_text(encoding="utf-8"))) for page in PAGES) - 1  # one is a file


def test_the_example_of_a_method_runs(workplace: Path) -> None:
    run_python(["add-a-method.md"], workplace)


def test_commands_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    monkeypatch.delenv("KIF_DATA", raising=False)
    shown = [line for page in ("data.md", "resume.md") for block in blocks(page, "bash") for line in block.splitlines()]
    assert {line.split()[1] for line in shown} >= {"train", "eval", "report", "memory", "predict", "export"}
    for line in shown:
        program, *arguments = line.split()
        assert program == "kif" and main(arguments) == 0, line
    assert (workplace / "runs" / "second" / "adapter" / "adapter_model.safetensors").is_file()
    assert len((workplace / "answers.jsonl").read_text().splitlines()) == 10
    assert (workplace / "model-out" / "config.json").is_file()


def help_of(words: list[str]) -> str:
    arguments = words[:2] if words[0] == "memory" and words[1:2] in (["show"], ["export"], ["drop"]) else words[:1]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*arguments, "--help"]) == 0
    return printed.getvalue()


def test_commands_and_options_exist() -> None:
    known: dict[str, str] = {}
    seen = 0
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kif_kernels" / "README.md"]:
        for words in commands(page.read_text(encoding="utf-8")):
            if words[0] == "COMMAND":
                continue
            assert words[0] in COMMANDS, f"{page.name}: kif {words[0]}"
            options = {word.split("=")[0].rstrip(",.;:)") for word in words if word.startswith("--")}
            for option in options - {"--help"}:
                key = " ".join(words[:2]) if words[0] == "memory" else words[0]
                known.setdefault(key, help_of(words) + (help_of(["train"]) if words[0] == "compare" else ""))
                assert re.search(rf"{re.escape(option)}\b", known[key]) or option == "--from", f"{page.name}: {option}"
                seen += 1
    assert seen > 20


def test_options_in_running_text_exist() -> None:
    everything = "".join(help_of([command]) for command in COMMANDS) + help_of(["memory", "drop"])
    everything += help_of(["memory", "show"])
    others = {
        "--from",
        "--accept",
        "--help",
        "--strict",
        "--report_to",
        "--json",
        "--compare",
        "--fail",
        "--comparison",
    }
    for page in PAGES:
        for option in re.findall(r"`(--[\w.-]+)", page.read_text(encoding="utf-8")):
            assert option in others or re.search(rf"{re.escape(option)}\b", everything), f"{page.name}: {option}"


def test_every_expectation_names_tests_that_exist() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "expectations.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| what")
    ]
    assert len(rows) >= 17
    for what, answer, tests in rows:
        assert re.split("[:,]", answer)[0] in ("yes", "partly", "no"), what
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named or answer.startswith("no"), f"{what}: no test"
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (file, test)


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    assert sorted(pages(config["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)
    assert config["strict"] and config["theme"]["font"] is False


def test_environment_variables_and_extras_are_listed() -> None:
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    files = [path for folder in ("kif", "kif_kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    read = set(re.findall(r"environ(?:\.get\(|\.setdefault\(|\[)\"(\w+)\"", source)) - {"OMP_NUM_THREADS"}
    for name in (*VARIABLES, *sorted(read)):
        assert f"`{name}`" in page, name
    for extra in EXTRAS:
        assert f"| `{extra}` |" in page, extra


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_included_sections_exist_and_links_are_moved() -> None:
    module = hooks()
    for page in PAGES:
        for file, heading in re.findall(r"<!-- include: ([^#\s]+)#?(.*?) -->", page.read_text(encoding="utf-8")):
            assert len(module.section(file, heading)) > 100, (page.name, file, heading)
    with pytest.raises(ValueError, match="no heading"):
        module.section("README.md", "Nothing")
    text = "[a](../kif_kernels/README.md#x) [b](methods.md) [c](../benchmarks/gate.py)"
    assert module.links(text, "docs", "") == "[a](reference/kif_kernels.md#x) [b](methods.md) c"
    assert module.links("[a](../docs/performance.md)", "kif_kernels", "reference") == "[a](../performance.md)"


def test_the_command_line_page_has_every_command() -> None:
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- help: (\w+) -->", page) == list(COMMANDS)
    assert "--limit-eval" in hooks().help_text("eval") and "\x1b" not in hooks().help_text("train")


def test_the_figure_is_a_picture_of_its_own() -> None:
    figure = (DOCS / "assets" / "round.svg").read_text(encoding="utf-8")
    # drawn here, readable without other files, with a background of its own for dark pages
    assert "<title" in figure and "<image" not in figure and "href" not in figure
    assert re.search(r'<rect x="1" y="1" width="958" height="558"[^>]*fill="#fbfbfd"', figure)


def test_both_packages_are_typed_and_the_oldest_python_is_declared() -> None:
    assert (ROOT / "kif" / "py.typed").is_file() and (ROOT / "kif_kernels" / "py.typed").is_file()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in project and 'target-version = "py310"' in project
    assert 'python_version = "3.10"' in project


def test_the_readme_has_a_measured_picture_and_names_the_hardware() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", readme)
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
    measured = json.loads((ROOT / "benchmarks" / "results" / "quality-minilm.json").read_text())
    cpu = re.sub(r"\(R\)| Processor", "", measured["environment"]["cpu"])
    assert cpu in readme.split(picture)[1].split("\n## ")[0]
