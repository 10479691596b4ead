"""The documentation matches the code: generated pages are current, commands parse, examples run."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.config.keys import ALIASES, FIELD_OF_KEY, SECTIONS
from grandrounds.server.directory import RunDirectory
from tests.conftest import write_flashcards
from tests.places import ROOT

COMMANDS = Path(sys.executable).parent
OFFLINE_ONE_CORE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Environment of the commands: no model hub, one thread."""


def code_blocks(page: str, language: str) -> list[str]:
    """Return the fenced code blocks of the README or of a page of docs/, by language."""
    text = (ROOT / page if page == "README.md" else ROOT / "docs" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_commands(page: str, program: str) -> list[list[str]]:
    """Return the commands of one program in a page's shell blocks, split into words."""
    text = "\n".join(code_blocks(page, "bash")).replace("\\\n", " ").replace("&&", "\n")
    split = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in split if words and words[0] == program]


def parse(command: Any, words: list[str]) -> None:
    """Parse a command line with click without running it.

    Raises
    ------
    click.UsageError
        If there is no such command or option, or a value is of the wrong type.
    """
    import click

    name, *arguments = words
    parent = None
    while isinstance(command, click.Group):
        parent = command.make_context(name, arguments, parent=parent)
        arguments = [*getattr(parent, "_protected_args", []), *parent.args]
        resolved, command, arguments = command.resolve_command(parent, arguments)
        assert resolved
        assert command
        name = resolved
    command.make_context(name, arguments, parent=parent)


@pytest.fixture(scope="module")
def make_docs() -> dict[str, Any]:
    """Return the names of scripts/make_docs.py."""
    return runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))


def test_generated_pages_are_fresh(make_docs: dict[str, Any]) -> None:
    for name, page in make_docs["PAGES"].items():
        assert (ROOT / "docs" / name).read_text() == page(), "run: python scripts/make_docs.py"


def test_check_names_the_stale_page_and_writes_nothing(
    make_docs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = make_docs["main"]
    main.__globals__["DOCS"] = tmp_path
    head, mark, _ = (ROOT / "docs" / "deployment.md").read_text().partition(": begin -->")
    (tmp_path / "deployment.md").write_text(f"{head}{mark}\nold\n<!-- end -->\nkept")
    try:
        assert main([]) == 0
        assert main(["--check"]) == 0
        (tmp_path / "cli.md").write_text("old")
        assert main(["--check"]) == 1
        assert "docs/cli.md" in (said := capsys.readouterr().err)
        assert "docs/configuration.md" not in said
        assert (tmp_path / "cli.md").read_text() == "old"
        made = (tmp_path / "deployment.md").read_text()
        assert made.startswith(head)
        assert made.endswith("kind of an unexpected error |\n<!-- end -->\nkept")
    finally:
        main.__globals__["DOCS"] = ROOT / "docs"


def test_every_field_has_a_docstring(make_docs: dict[str, Any]) -> None:
    documented = make_docs["field_docstrings"]()
    fields = {
        (section.__name__, field.name)
        for section in SECTIONS.values()
        for field in dataclasses.fields(section)
    }
    assert fields <= set(documented)
    assert all(documented[field].rstrip("`").endswith((".", "`")) for field in fields)


def test_every_option_and_argument_of_the_command_line_has_a_meaning() -> None:
    rows = [
        line for line in (ROOT / "docs/cli.md").read_text().splitlines() if line.startswith("| `")
    ]
    assert rows
    cells = [re.split(r"(?<!\\)\|", row.strip("|")) for row in rows]
    assert [row for row in cells if len(row) != 2 or not row[1].strip()] == []


def test_configuration_page_has_every_key_and_alias() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for key in [*FIELD_OF_KEY, *ALIASES]:
        assert f"| `{key}` |" in page


PAGES = [
    "README.md",
    "quickstart.md",
    "flowertune.md",
    "evaluation.md",
    "planning.md",
    "communication.md",
    "aggregation.md",
    "report.md",
    "compare.md",
    "personal.md",
    "export.md",
    "deployment.md",
    "bases.md",
    "leaderboard-entry.md",
    "serving.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_page_parse(page: str) -> None:
    import typer

    from grandrounds.cli import app

    commands = shell_commands(page, "grandrounds")
    assert commands
    ours = typer.main.get_command(app)
    for words in commands:
        parse(ours, words)
        given = list(pairwise(words))
        assignments = [value for option, value in given if option == "--set"]
        files = [ROOT / value for _, value in given if value.startswith("configs/")]
        assert all(file.is_file() for file in files)
        recipe = recipes.load_recipe(files[0]) if files else {}
        recipes.resolve(recipe, recipes.parse_overrides(assignments))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flower's own command line
@pytest.mark.parametrize("page", ["quickstart.md"])
def test_flower_commands_of_the_page_parse(page: str) -> None:
    import typer
    from flwr.cli.app import app
    from flwr.common.config import parse_config_args

    commands = shell_commands(page, "flwr")
    assert commands
    for words in commands:
        parse(typer.main.get_command(app), words)
        federation = parse_config_args([words[words.index("--federation-config") + 1]])
        sites = recipes.defaults()["data.num-partitions"]
        assert federation["num-supernodes"] == sites


HAND_WRITTEN = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere() -> None:
    for page in HAND_WRITTEN:
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_files_that_a_page_names_exist() -> None:
    named = re.compile(
        r"(?<![\w/.-])(?:benchmarks|configs|docs|grandrounds|scripts|tests)/[\w./-]*\w/?"
    )
    for page in HAND_WRITTEN:
        for path in named.findall(re.sub(r"\S*(?:<|NAME)\S*", "", page.read_text())):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_masks_are_called_secure_with_their_state_only() -> None:
    """Beta and unreviewed, in pages, messages and docstrings; the paper's title is its own."""
    bare = re.compile(r"(?<!practical )secure aggregation(?! \(beta, unreviewed\))", re.IGNORECASE)
    code = [*(ROOT / "grandrounds").rglob("*.py"), *(ROOT / "grandrounds").rglob("*.toml")]
    for file in (*HAND_WRITTEN, *(ROOT / "docs").glob("*.md"), *code):
        text = re.sub(r"\]\([^)]*\)|[\[\"#*]", "", file.read_text())  # links, quotes, comments
        assert not bare.search(re.sub(r"\s+", " ", text)), file


def interrupt_after_a_round(words: list[str], directory: Path, folder: Path) -> None:
    """Start a run, press Ctrl-C after its first round, and check its exit code."""
    command = [str(COMMANDS / words[0]), *words[1:]]
    with subprocess.Popen(command, cwd=folder, env=OFFLINE_ONE_CORE) as process:
        while len(RunDirectory(directory).read_metrics()) < 2:
            assert process.poll() is None, "the run ended before it could be interrupted"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_runs_from_top_to_bottom_offline(tmp_path: Path) -> None:
    """Run every command on the embedded base in order, with Ctrl-C where the page asks for it."""
    write_flashcards(tmp_path / "flashcards.jsonl", 120)
    commands = [c for c in shell_commands("quickstart.md", "grandrounds") if "--config" not in c]
    assert commands[0] == ["grandrounds", "run", "--run-dir", "runs/first"]
    if made := os.environ.get("FIRST_RUN"):  # CI has run it
        shutil.copytree(Path(made) / "run", tmp_path / "runs" / "first")
        del commands[0]
    resumed = [c[c.index("--resume") + 1] for c in commands if "--resume" in c]
    assert resumed
    for words in commands:
        directory = words[words.index("--run-dir") + 1] if "--run-dir" in words else ""
        if directory in resumed:
            interrupt_after_a_round(words, tmp_path / directory, tmp_path)
            continue
        command = [str(COMMANDS / words[0]), *words[1:]]
        subprocess.run(command, cwd=tmp_path, check=True, env=OFFLINE_ONE_CORE)
        summary = RunDirectory(tmp_path / (directory or resumed[0])).read_json("summary.json")
        assert summary["status"] == "completed"
    [block] = code_blocks("quickstart.md", "python")
    said = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        env=OFFLINE_ONE_CORE,
    )
    question, answer, flashcard = re.split(r" -> | \| flashcard: ", said.stdout.strip())
    assert question
    assert answer
    assert flashcard
