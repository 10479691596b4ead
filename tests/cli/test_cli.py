"""The command as a person meets it: help, output, exit codes, Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import grandrounds
from grandrounds import cli
from grandrounds.cli import app
from grandrounds.server import lifecycle, rounds
from grandrounds.server.listeners.plain import round_line
from grandrounds.server.run import Run
from tests.runs import Settings, metrics_of, options

COMMAND = [sys.executable, "-m", "grandrounds"]
ANSI = re.compile(r"\x1b")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# --- Help and version -----------------------------------------------------------------------------


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"grandrounds {grandrounds.__version__}\n")


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", [None, "run"])
def test_help_names_and_explains_every_option(flag: str, name: str | None) -> None:
    root: Any = typer.main.get_command(app)
    command = root.commands[name] if name else root
    result = CliRunner().invoke(app, [*([name] if name else []), flag])
    assert result.exit_code == 0
    assert result.stderr == ""
    words = re.sub(r"[\s│]+", " ", result.output)
    options = [p for p in command.params if p.name != "help"]
    assert options
    for option in options:
        assert option.opts[0] in words
        assert option.help, f"{option.name} has no help text"
        first_words = " ".join(re.sub(r"[`*]", "", option.help).split()[:3])
        assert first_words in words
    assert max(len(line) for line in result.output.splitlines()) <= 100


def test_root_help_names_every_command_and_where_to_start() -> None:
    output = CliRunner().invoke(app, ["-h"]).output
    root: Any = typer.main.get_command(app)
    assert "run" in root.commands
    assert all(name in output for name in root.commands)
    assert "grandrounds run" in output


def test_no_argument_shows_help() -> None:
    result = CliRunner().invoke(app, [])
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["consortium", "init"], "Missing option '--name'"),
        (["run", "--rounds", "many"], "'many' is not a valid integer"),
        (["ask"], "Missing argument 'RUN_DIR'"),
        (["ruin"], "No such command 'ruin'"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_told_in_one_line(
    words: list[str], told: str
) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert told in line
    assert line.endswith("--help")


def test_an_unknown_command_is_refused_with_exit_code_2() -> None:
    result = CliRunner().invoke(app, ["ruin"])
    assert result.exit_code == 2
    assert "ruin" in result.stderr


@pytest.mark.parametrize("arguments", [["-h"], ["run", "-h"], ["--version"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = f"""
import sys
from grandrounds.cli import app
app({arguments!r}, standalone_mode=False)
heavy = {{"torch", "transformers", "peft", "flwr", "datasets", "numpy"}} & set(sys.modules)
print("loaded:", sorted(heavy))
"""
    assert python(code).stdout.endswith("loaded: []\n")


def test_a_wrong_key_is_refused_before_a_heavy_library_is_loaded() -> None:
    code = """
import sys
from grandrounds.cli import app
app(["run", "--set", "sead=1"], standalone_mode=False)
heavy = {"torch", "transformers", "peft", "flwr", "datasets"} & set(sys.modules)
print("loaded:", sorted(heavy))
"""
    result = python(code)
    assert "Did you mean 'seed'?" in result.stderr
    assert result.stdout == "loaded: []\n"


# --- Without the extras ---------------------------------------------------------------------------

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Blocked())
sys.argv = ["grandrounds", {arguments}]
from grandrounds.__main__ import main
main()
"""


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extras_the_command_answers_with_one_line(missing: str) -> None:
    result = python(BLOCK.format(names=[missing], arguments="'run'"))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"grandrounds: the command line needs {missing}, which is not installed: "
        'pip install "grandrounds[all]"\n'
    )


@pytest.mark.parametrize(
    "missing",
    ["torch", "flwr", "numpy", pytest.param("peft", marks=pytest.mark.slow)],
)
def test_without_the_training_libraries_run_answers_with_one_line(
    settings: Settings, missing: str
) -> None:
    arguments = ", ".join(map(repr, ["run", *options(settings)]))
    result = python(BLOCK.format(names=[missing], arguments=arguments))
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines[-1]
    assert lines[0].startswith("grandrounds: ")
    assert missing in lines[0]
    assert 'pip install "grandrounds[all]"' in lines[0]
    assert not Path(settings["run-directory"]).exists()


# --- A good run -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_good_run_exits_with_0_and_prints_plain_lines_and_nothing_else(
    settings: Settings, tmp_path: Path
) -> None:
    """In a process of its own, stdout and stderr being no terminal."""
    result = subprocess.run(
        [*COMMAND, "run", *options(settings)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert result.stderr == ""
    assert not ANSI.search(result.stdout)
    assert "\r" not in result.stdout
    titles = [line for line in result.stdout.splitlines() if re.fullmatch(r"[a-z]+", line)]
    assert titles == ["recipe", "plan", "sites", "result"]
    rounds = re.findall(r"^round (\d)/3 .* held-out loss \d\.\d{4}", result.stdout, re.MULTILINE)
    assert rounds == ["0", "1", "2", "3"]
    run = Path(settings["run-directory"])
    assert f"adapter: {run}/peft_3" in result.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["base_loads"], summary["processes"]) == ("completed", 1, 1)

    # the same seed in this process gives the same adapter to the bit
    other = tmp_path / "other"
    sets = options({**settings, "run-directory": other})
    told = CliRunner().invoke(app, ["run", "--json", *sets])
    assert told.exit_code == 0
    document = json.loads(told.stdout)
    assert document["directory"] == str(other)
    assert document["held_out_loss"] == summary["held_out_loss"]
    assert re.findall(r"^round (\d)/3 ", told.stderr, re.MULTILINE) == rounds
    name = "peft_3/adapter_model.safetensors"
    assert (other / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.slow
def test_plain_lines_are_printed_on_a_terminal_too_where_wanted(settings: Settings) -> None:
    output, code = on_a_terminal("--plain", *options(settings))
    assert code == 0
    assert not ANSI.search(output)
    assert "round 3/3" in output


@pytest.mark.slow
def test_a_terminal_gets_the_tree_and_the_table_and_no_warning(settings: Settings) -> None:
    output, code = on_a_terminal(*options(settings))
    assert code == 0
    assert ANSI.search(output)
    assert "Warning" not in output
    lines = [CONTROL.sub("", line).strip() for line in output.replace("\r", "\n").split("\n")]
    records = metrics_of(Path(settings["run-directory"]))
    assert [r["round"] for r in records] == [0, 1, 2, 3]
    for record in records:  # what a pipe shows is in the scroll-back
        assert round_line(record, 3) in lines
    moving = [line for line in lines if "━" in line]
    assert any("importing the libraries" in line for line in moving)
    assert "├── " in output
    assert "┏" in output or "┌" in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h")  # the cursor is given back


def on_a_terminal(*arguments: str) -> tuple[str, int]:
    """Run the command on a pseudo-terminal; return all output and the exit code."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "CI": ""}
    process = subprocess.Popen(
        [*COMMAND, "run", *arguments], stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux answers so when the other side has closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(ours)
    return b"".join(chunks).decode(), process.wait()


def test_options_win_over_overrides_and_overrides_over_the_recipe(
    settings: Settings, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("seed = 1\nnum-server-rounds = 1\ntrain.save-every-round = 1\n")
    sets = options({**settings, "num-server-rounds": 2})
    arguments = ["run", "-c", str(recipe), *sets, "--seed", "3"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    written = (Path(settings["run-directory"]) / "config.toml").read_text()
    assert '"seed" = 3\n' in written
    assert '"num-server-rounds" = 2\n' in written


def test_a_run_without_directory_goes_below_runs_under_date_and_model(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del settings["run-directory"]
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["run", *options(settings)]).exit_code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-" + Path(settings["model.name"]).name, run.name)
    assert (run / "summary.json").is_file()


# --- Ctrl-C ---------------------------------------------------------------------------------------

WITH_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
"""A process started in the background of a shell ignores Ctrl-C, and so would its children."""


KEPT = (
    "grandrounds: interrupted; finished rounds are kept; resume with grandrounds run --resume {}\n"
)


@pytest.mark.slow
def test_ctrl_c_ends_with_exit_code_130_and_keeps_finished_rounds(
    settings: Settings, tmp_path: Path
) -> None:
    run = Path(settings["run-directory"])
    code = WITH_CTRL_C + "from grandrounds.__main__ import main; main()"
    arguments = ["run", *options({**settings, "num-server-rounds": 500})]
    with (tmp_path / "out").open("w") as out, (tmp_path / "error").open("w") as error:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=out, stderr=error
        )
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None, (tmp_path / "error").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == cli.INTERRUPTED == 130
    assert (tmp_path / "error").read_text() == KEPT.format(run)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("stopped", "interrupted")
    finished = len(metrics.read_text().splitlines()) - 1
    assert summary["rounds"] == finished
    assert 2 <= finished < 500


def test_ctrl_c_in_a_later_round_is_one_line_and_a_stopped_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in this process, quickly."""
    play_round = rounds.play_round

    def interrupt(run: Run) -> None:
        if run.state.round == 2:
            raise KeyboardInterrupt
        play_round(run)

    monkeypatch.setattr(rounds, "play_round", interrupt)
    result = CliRunner().invoke(app, ["run", *options(settings)])
    assert result.exit_code == 130
    assert result.stderr == KEPT.format(settings["run-directory"])
    summary = json.loads((Path(settings["run-directory"]) / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("stopped", 2)
    assert summary["adapter"] == "peft_2"


@pytest.mark.parametrize(
    ("last", "found"),
    [("plan", None), ("round 2/3", ("stopped", 2)), ("result", ("completed", 3))],
    ids=["before it starts", "in its rounds", "after its end"],
)
def test_a_run_whose_output_nobody_reads_is_stopped_in_order(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, last: str, found: Any
) -> None:
    """As `grandrounds run | head`: nothing is taken from a certain line on."""
    written: list[str] = []

    def write(self: Any, text: str) -> int:
        written.append(text)
        if any(text.startswith(last) for text in written):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return len(text)

    run = Path(settings["run-directory"])
    runner = CliRunner()
    with monkeypatch.context() as patch:
        patch.setattr("click.testing._NamedTextIOWrapper.write", write)
        result = runner.invoke(app, ["run", *options(settings)])
    assert result.exit_code == 141
    if found is None:
        assert not run.exists()
        return
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == found


def test_ctrl_c_in_the_first_round_claims_no_finished_round(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(run: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "play_round", interrupt)
    result = CliRunner().invoke(app, ["run", *options(settings)])
    assert result.stderr == KEPT.format(settings["run-directory"]).replace(
        "finished rounds are kept", "no round was finished"
    )


def test_ctrl_c_before_the_first_round_leaves_no_directory(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lifecycle, "open_session", interrupt)
    result = CliRunner().invoke(app, ["run", *options(settings)])
    assert result.exit_code == 130
    assert len(result.stderr.splitlines()) == 1
    assert not Path(settings["run-directory"]).exists()
    assert "finished rounds are kept" not in result.stderr  # there are none, and no place
