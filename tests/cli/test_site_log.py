"""`grandrounds site log` shows the audit log and finds what was changed in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.site.custody import audit
from grandrounds.site.custody.site_file import SiteFile
from tests.own_sites import make_site

ANSWERED = {
    "run": "abcdef0123456789",
    "round": 3,
    "asked": "train",
    "outcome": "answered",
    "steps": 4,
    "examples": 64,
    "rank": 16,
    "learning-rate": 3e-4,
    "norm-in": 1.25,
    "seconds": 2.5,
    "left": {"norm": 0.3125, "told": ["num-examples"]},
}
REFUSED = {
    "run": "cd",
    "round": 0,
    "asked": "query",
    "outcome": "refused",
    "reason": "max-rank = 4",
}
CRASHED = {"run": "cd", "round": 1, "asked": "train", "outcome": "crashed", "error": "KeyError"}


@pytest.fixture
def site(tmp_path: Path) -> SiteFile:
    site = make_site(tmp_path / "site", {"formulary": ""})
    site.place("state").mkdir()
    for line in (ANSWERED, REFUSED, {**CRASHED, "where": ["training.py:88 train"]}):
        audit.write(site.place("state"), line)
    return site


def log(site: SiteFile, *words: str) -> Result:
    return CliRunner().invoke(app, ["site", "log", "--config", str(site.path), *words])


def test_the_log_is_a_table_of_what_was_asked_and_what_left(site: SiteFile) -> None:
    head, *lines = log(site).stdout.splitlines()
    assert head.split()[:6] == ["time", "run", "round", "message", "outcome", "requested"]
    assert "abcdef01  3" in lines[0]
    assert "4 steps, 64 examples, r 16, rate 0.0003  norm 1.25 in, 0.312 out" in lines[0]
    assert lines[1].endswith("max-rank = 4")
    assert lines[2].endswith("KeyError; at training.py:88 train")


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (("--run", "cd"), 2),
        (("--kind", "train"), 2),
        (("--outcome", "refused"), 1),
        (("--since", "9999"), 0),
        (("--run", "cd", "--kind", "train"), 1),
        (("--last", "1"), 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_lines_can_be_chosen(site: SiteFile, words: tuple[str, ...], count: int) -> None:
    lines = log(site, *words, "--json").stdout.splitlines()
    assert len(lines) == count
    assert all(audit.PREVIOUS in json.loads(line) for line in lines)


def test_what_is_not_shown_is_said(site: SiteFile) -> None:
    with (site.place("state") / audit.FILE).open("a") as file:
        file.write('{"torn')
    *_, earlier, torn = log(site, "--last", "1").stdout.splitlines()
    assert earlier == "2 earlier lines: --last 0 shows all"
    assert torn == "1 line cannot be read: see --verify"


def test_a_whole_log_is_verified_and_a_changed_one_is_not(site: SiteFile) -> None:
    whole = log(site, "--verify")
    assert whole.exit_code == 0
    said = whole.stdout.splitlines()
    assert said[:2] == ["3 lines in 1 file", "every line continues the one before it"]
    last = said[2].removeprefix("last hash: ")
    assert log(site, "--verify", "--noted", last).exit_code == 0

    file = site.place("state") / audit.FILE
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    shorter = log(site, "--verify", "--noted", last)
    assert shorter.exit_code == 1
    assert "lines were removed from the end" in shorter.stdout
    file.write_text(lines[0] + lines[2])
    changed = log(site, "--verify")
    assert changed.exit_code == 1
    assert "audit.jsonl:2 does not continue the line before it" in changed.stdout
    assert log(site, "--noted", last).exit_code == 2


@pytest.mark.parametrize(
    "line",
    [
        b'{"steps": "x", "examples": {}, "left": 5, "where": 5, "seconds": "x", "run": [1]}',
        b'{"left": [1], "where": {}, "identifiers": [1], "messages": [], "learning-rate": []}',
        b'{"identifiers": {"e-mail": "b"}}',
        b'{"steps": Infinity, "examples": NaN}',
        b"[" * 100_000,
        b'{"run": "\\ud800"}',
    ],
)
def test_a_line_that_somebody_changed_does_not_end_the_log(site: SiteFile, line: bytes) -> None:
    file = site.place("state") / audit.FILE
    file.write_bytes(file.read_bytes() + line + b"\n")
    for words in ((), ("--verify",), ("--json",)):
        result = log(site, *words)
        assert result.exception is None or isinstance(result.exception, SystemExit)


def test_what_a_message_brought_does_not_reach_the_terminal(site: SiteFile) -> None:
    """A run's key of escape sequences cleared the screen of whoever read the log."""
    audit.write(site.place("state"), {"run": "\x1b[2J\nab", "reason": "a\x9b2J\x07"})
    shown = log(site).stdout
    assert r"\x1b[2J\nab" in shown
    assert r"a\x9b2J\x07" in shown
    assert not set(shown) & set("\x1b\x9b\x07")
