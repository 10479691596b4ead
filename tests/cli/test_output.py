"""What happens once nobody takes a command's output, and characters that an output lacks."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.cli.output import PLAIN, Failure, Output
from tests.places import ROOT

FULL = Path("/dev/full")


class Failing:
    """A stream that takes nothing."""

    def __init__(self, number: int, *, is_terminal: bool = False) -> None:
        self._error = OSError(number, os.strerror(number))
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, text: str) -> int:
        raise self._error

    flush = fileno = lambda self: self.write("")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["--version"], ["plan", "--help"]], ids=" ".join)
def test_a_full_disk_is_one_line_and_an_exit_code(words: list[str]) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "grandrounds", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == (b"grandrounds: the output cannot be written: No space left on device\n")


def test_a_closed_pipe_interrupts_once_and_later_output_is_dropped() -> None:
    failure = Failure()
    out, error = (Output(Failing(errno.EPIPE), failure) for _ in range(2))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        out.write("round 1/3\n")
    assert out.write("kept\n") == 5
    error.write("grandrounds: interrupted\n")  # as `2>&1 | head`
    error.flush()
    assert (failure.told, failure.exit_code) == ("the output was closed", 141)


def test_a_terminal_that_has_gone_is_no_failure() -> None:
    """SIGHUP says what follows; under `disown` a run goes on."""
    failure = Failure()
    gone: Any = Failing(errno.EIO, is_terminal=True)
    Output(gone, failure).write("round 1/3\n")
    assert failure.error is None


def test_characters_that_an_encoding_lacks_are_written_in_its_own() -> None:
    assert "• 9.1 → 6.1, ε 8 ± 1, Zoë, 漢…".encode("ascii", PLAIN) == (
        b"* 9.1 -> 6.1, epsilon 8 +- 1, Zoe, ?."
    )
    assert "ε of Zoë".encode("latin-1", PLAIN) == b"epsilon of Zo\xeb"


def test_a_help_page_in_ascii_has_no_replaced_character() -> None:
    result = CliRunner(charset="ascii").invoke(app, ["run", "--help"])
    assert result.exit_code == 0
    assert "* grandrounds run configs/" in result.stdout
    assert "?" not in result.stdout


def test_a_run_directory_whose_name_is_no_utf8_is_reported_and_exported(tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        shutil.copytree(ROOT / "tests" / "fixtures" / "runs" / "plain", run)
    except OSError as error:
        pytest.skip(f"this file system takes no such name: {error}")
    for words in (["report", str(run)], ["export", str(run)]):
        result = CliRunner().invoke(app, words)
        assert (result.exit_code, result.stderr) == (0, "")
    assert "caf\\udce9" in (run / "report.html").read_text()
    refused = CliRunner().invoke(app, ["export", str(run), "--merge", "--checkpoint", "2"])
    assert "caf\\udce9/export/merged_2 is not UTF-8" in refused.stderr
    refused = CliRunner().invoke(app, ["run", "--from-adapter", str(run)])
    assert refused.exit_code == 2
    assert "caf\\udce9 is not UTF-8, as a recipe must be" in refused.stderr
    refused = CliRunner().invoke(
        app, ["run", "--engine", "simulation", "--run-dir", str(run / "x")]
    )
    assert refused.exit_code == 2
    assert "is not UTF-8, as Flower requires" in refused.stderr
