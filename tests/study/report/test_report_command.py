"""`grandrounds report` as a person meets it."""

from __future__ import annotations

import stat
import webbrowser
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from grandrounds.cli import app
from tests.runs import play
from tests.study.report.run_files import comparison, write, write_run


def report(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def told(*arguments: object) -> tuple[int, str]:
    """Return exit code and message of a call that is refused in one line."""
    result = report(*arguments)
    assert result.stderr.startswith("grandrounds: ")
    assert result.stderr.count("\n") == 1
    return result.exit_code, result.stderr


@pytest.mark.slow
def test_the_page_of_a_real_run_lies_in_its_directory(settings: dict[str, object]) -> None:
    run = play(settings)
    result = report(run)
    assert result.exit_code == 0, result.stderr
    content = (run / "report.html").read_text()
    assert f"written: {run / 'report.html'}" in result.stdout
    assert "Completed: 3 rounds" in content
    for key in ("loss", "communication", "seconds", "participation", "coverage"):
        assert f'id="figure-{key}"' in content
    for key in ("update-norms", "update-cosines"):
        assert f'id="figure-{key}"' in content


def test_several_runs_go_where_they_are_told_to(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    result = report(*runs, "--out", tmp_path / "three.html")
    assert result.exit_code == 0
    assert "3 runs side by side" in (tmp_path / "three.html").read_text()


def test_several_runs_go_to_the_current_folder_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert report(*runs).exit_code == 0
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("name", ["wards", "wards/comparison.json"])
def test_a_comparison_is_given_by_its_folder_or_its_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / "wards/comparison.json", comparison())
    result = report(tmp_path / name)
    assert result.exit_code == 0, result.stderr
    content = (tmp_path / "wards/report.html").read_text()
    assert "Comparison: wards" in content


def test_without_chromium_the_svg_files_are_written_and_png_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    result = report(write_run(tmp_path / "run"), "--figures", tmp_path / "figures")
    assert result.exit_code == 0
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 9
    assert not list((tmp_path / "figures").glob("*.png"))
    assert "none of chromium, chromium-browser, google-chrome is on PATH" in result.stdout


def test_with_chromium_every_figure_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin/google-chrome"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\nfor o; do case $o in --screenshot=*) echo x > "${o#*=}";; esac; done'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{fake.parent}:/bin:/usr/bin")
    monkeypatch.setattr("grandrounds.study.report.browser.CHROMIUMS", ("google-chrome",))
    result = report(write_run(tmp_path / "run"), "--figures", tmp_path / "figures")
    assert f"written: 9 PNG files in {tmp_path / 'figures'}, rendered by {fake}" in result.stdout
    assert len(list((tmp_path / "figures").glob("*.png"))) == 9


@pytest.mark.parametrize(("found", "said"), [(True, False), (False, True)])
def test_open_says_so_where_there_is_no_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bool, said: bool
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or found)
    result = report(write_run(tmp_path / "run"), "--open")
    assert result.exit_code == 0
    assert opened == [(tmp_path / "run/report.html").as_uri()]
    assert ("no browser found" in result.stdout) is said


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    code, message = told(tmp_path)
    assert code == 1
    assert f"{tmp_path} is not a run directory" in message
    assert not (tmp_path / "report.html").exists()
    assert "is not a run directory" in told(tmp_path / "nowhere")[1]
    assert "cannot be read" in told(tmp_path / "nowhere.json")[1]
    (tmp_path / "other.json").write_text("{}")
    assert "is not a comparison: it has no arms" in told(tmp_path / "other.json")[1]


def test_a_comparison_among_runs_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "wards/comparison.json", comparison())
    code, message = told(write_run(tmp_path / "run"), tmp_path / "wards")
    assert code == 2
    assert "is a comparison, which has its own page" in message


def test_a_run_given_twice_and_a_folder_as_page_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert told(run, run)[0] == 2
    code, message = told(run, "--out", tmp_path)
    assert code == 2
    assert f"give a file, such as {tmp_path / 'report.html'}" in message


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = write_run(tmp_path / "run")
    assert "cannot be written" in told(run, "--out", tmp_path / "file/report.html")[1]
    assert "--figures" in told(run, "--figures", tmp_path / "file")[1]
