"""`grandrounds compare` as a person meets it: lines, tables, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from grandrounds.api.progress import Clock
from grandrounds.cli import app
from grandrounds.study.comparison import runner as comparison_runner
from tests.runs import Settings, options


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def one_line(result: Result) -> str:
    """Return the one line of an expected failure."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("grandrounds: ")
    return line


def told(result: Result) -> list[str]:
    """Return the lines of a comparison, without the warnings about its few examples."""
    return [line for line in result.stdout.splitlines() if not line.startswith("warning: ")]


@pytest.fixture
def small(settings: Settings) -> list[object]:
    """Arguments of a small comparison."""
    del settings["run-directory"]
    return [*options({**settings, "num-server-rounds": 1})]


def test_a_comparison_prints_plain_lines_and_tables_and_exits_with_0(
    small: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = compare(*small, "--arms", "local,federated", "--seeds", 1, "--out", out)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    lines = told(result)
    assert lines[0] == f"comparison in {out}: 6 parts"
    assert lines[1].startswith("1/6  base, seed 42: loss ")
    assert lines[6].startswith("6/6  local, seed 42, site 3: loss ")
    assert [line for line in lines[7:] if not line.startswith((" ", "-"))] == [
        "arms, 1 seed",
        "gain of the federation (positive: the federation is better)",
        "gain of each site over training alone (alone → joined)",
        f"written: {out}/comparison.json",
    ]
    content = json.loads((out / "comparison.json").read_text())
    assert content["arms-asked"] == ["federated", "local"]

    again = compare("--config", out / "config.toml", "--arms", "local,federated", "--out", out)
    assert told(again)[0] == f"comparison in {out}: 6 parts, 6 finished before"
    assert told(again)[1:] == lines[7:]
    arms = ("--arms", "local,federated", "--out", out)
    document = compare("--config", out / "config.toml", *arms, "--json")
    assert json.loads(document.stdout) == content
    assert document.stderr == again.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--arms", "federated,locl"],
            "unknown arm 'locl'; allowed: federated, personal, private, centralised, ",
        ),
        (["--arms", "federated,locl"], "Did you mean 'local'?"),
        (["--seeds", "0"], "--seeds = 0: at least 1 seed is required"),
        (["--sites", "20"], "--sites '20': 20 is not a site"),
        (["--set", "seed=2147483647", "--seeds", "2"], "seed = 2147483648"),
        (["--set", "run-directory=runs/x"], "give the comparison's folder as --out"),
        (["--set", "data.held-out-fraction=0"], "leaves no examples to evaluate the arms on"),
        (["--benchmarks", "medqu"], "Did you mean 'medqa'?"),
    ],
)
def test_bad_input_is_one_line_and_exits_with_2(arguments: list[str], told: str) -> None:
    result = compare(*arguments)
    assert result.exit_code == 2
    assert told in one_line(result)


def test_a_folder_with_another_comparison_is_one_line(small: list[object], tmp_path: Path) -> None:
    out = ["--arms", "local", "--out", tmp_path / "out"]
    assert compare(*small, *out).exit_code == 0
    result = compare(*small, *out, "--set", "train.seq-length=64")
    assert result.exit_code == 1
    assert "another configuration: train.seq-length: 512 → 64" in one_line(result)


def test_ctrl_c_says_how_to_go_on(
    small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison_runner, "run_unit", stop)
    result = compare(*small, "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert f"the same command with --out {tmp_path}/out continues" in one_line(result)


def test_the_time_left_goes_by_the_work_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("grandrounds.api.progress.time.monotonic", lambda: now[0])
    clock = Clock()
    clock("planned", {"units": 2, "kept": 0, "work": 40.0})
    assert clock.left() == ""
    now[0] += 10
    clock("visited", {"count": 10})
    assert clock.left() == "about 30 s left"
    clock("finished", {"work": 20.0})
    assert clock.left() == "about 10 s left"
    clock("finished", {"work": 20.0})
    assert clock.left() == ""
