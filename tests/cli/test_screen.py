"""What a command prints where: boxes and moving parts on a terminal only, one document as JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.cli.screen import Screen, draws, lifetime
from grandrounds.config.bases import FOLDER_VARIABLE
from grandrounds.errors import ConfigError
from grandrounds.server.listeners.boxes import draw


def console(**environment: str) -> Console:
    terminal = {"TERM": "xterm-256color", **environment}
    return Console(file=io.StringIO(), force_terminal=True, _environ=terminal)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, True),
        ({"TERM": "dumb"}, False),
        ({"CI": "true"}, False),
        ({"CI": "false"}, True),
        ({"CI": ""}, True),
        ({"CI": "true", "FORCE_COLOR": "1"}, True),
    ],
)
def test_a_terminal_is_drawn_on_unless_it_is_dumb_or_in_ci(
    environment: dict[str, str], expected: bool
) -> None:
    assert draws(console(**environment), environment) == expected


def test_a_pipe_is_never_drawn_on() -> None:
    pipe = Console(file=io.StringIO(), force_terminal=False)
    assert not draws(pipe, {})
    assert not draws(pipe, {"FORCE_COLOR": "1"})


def test_no_color_leaves_no_colour() -> None:
    shown = console(NO_COLOR="1")
    shown.print("[red]site 3 failed[/red]")
    assert "\x1b[31m" not in shown.file.getvalue()  # type: ignore[attr-defined]


def test_a_narrow_terminal_splits_no_number() -> None:
    columns, rows = ("model", "tokens", "MiB"), [("a base", "1,234,567,890", "12,345.67")]
    for width, is_boxed in ((40, True), (30, False)):
        shown = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
        draw(shown, "figures", columns, rows, (False, True, True))
        text = shown.file.getvalue()  # type: ignore[attr-defined]
        assert "1,234,567,890" in text
        assert ("┃" in text) == is_boxed
    assert text.splitlines()[1:] == ["  a base", "    tokens  1,234,567,890", "    MiB  12,345.67"]


def test_json_is_all_of_standard_output_and_the_rest_goes_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with lifetime():
        screen = Screen(plain=False, as_json=True)
        screen.working("reading")
        screen.table("accuracy", ("model", "%"), [("base", "25.0")])
        screen.notes(["a note"])
        screen.tell("written: somewhere")
        screen.emit({"accuracy": 0.25, "name": "Krankenhaus Süd"})
    print("afterwards", end="")
    out, err = capsys.readouterr()
    assert json.loads(out.removesuffix("afterwards")) == {
        "accuracy": 0.25,
        "name": "Krankenhaus Süd",
    }
    assert out.endswith("afterwards")  # standard output is given back
    assert err.splitlines() == [
        *("accuracy", "  model     %", "  base   25.0", "- a note", "written: somewhere")
    ]


def test_the_spinner_ends_with_the_command_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = console()
    monkeypatch.setattr("grandrounds.cli.screen.Console", lambda: shown)
    monkeypatch.setattr("grandrounds.cli.screen.draws", lambda _: True)

    def command() -> None:
        with lifetime():
            Screen(plain=False).working("reading the configuration")
            raise ConfigError("a slip")

    with pytest.raises(ConfigError):
        command()
    written = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "reading the configuration" in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1


def test_quiet_prints_the_result_only_and_verbose_prints_details(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for quiet, verbose in ((True, False), (False, False), (False, True)):
        screen = Screen(plain=True, quiet=quiet, verbose=verbose)
        screen.tell("progress")
        screen.detail("a step")
        screen.notes(["how to read it"])
        screen.table("result", ("name",), [("x",)])
        said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]
        assert said == [
            *(["progress"] if not quiet else []),
            *(["a step"] if verbose else []),
            *(["- how to read it"] if not quiet else []),
            "result",
        ]
    with pytest.raises(ConfigError, match="exclude each other"):
        Screen(plain=True, quiet=True, verbose=True)


def test_an_output_that_knows_no_arrow_and_no_umlaut_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "→ Süd"))
    shown = CliRunner(charset="ascii").invoke(app, ["base", "list", "--plain"])
    assert shown.exit_code == 0, shown.exception
    assert "-> Sud)" in shown.stdout
