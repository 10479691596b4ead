"""Studies: cells, their lines, what continues after a kill, and the tables made of them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.errors import ConfigError, RunDirectoryError
from grandrounds.study.studies import play as playing
from grandrounds.study.studies.cells import Cell, Lines, cells_of, chosen, computing, frozen
from grandrounds.study.studies.file import RUN, Study, read_study
from grandrounds.study.studies.play import play
from grandrounds.study.studies.tables import into_page, markdown, tables_of
from tests.places import ROOT
from tests.runs import Settings, adapter_bytes, interrupted_at, read_json


@pytest.fixture
def folder(settings: Settings, tmp_path: Path) -> Path:
    """A folder with study.toml: two recipes of the small federation, two seeds."""
    del settings["run-directory"]
    body = recipes.to_toml(settings)
    text = f"""
seeds = [1, 2]

[settings]
{body}
[recipes.plain]

[recipes."int4, both ways"]
seeds = [1]
communication.uplink-codec = "int4"
communication.downlink-codec = "int4"

[[tables]]
name = "codecs"
columns = [
    {{ figure = "held-out-loss", title = "loss" }},
    {{ figure = "held-out-loss", title = "behind plain", minus = "plain" }},
    {{ figure = "bytes", title = "MiB" }},
    {{ figure = "bytes", title = "times smaller", over = "plain" }},
]
"""
    (tmp_path / "study.toml").write_text(text)
    return tmp_path


def opened(folder: Path) -> tuple[Study, list[Cell]]:
    study = read_study(folder / "study.toml")
    return study, cells_of(study)


def study(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


def failure(result: Result) -> str:
    """Return the one line of an expected failure."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("grandrounds: ")
    assert result.exit_code in (1, 2)
    return line


def edited(folder: Path, old: str, new: str) -> None:
    file = folder / "study.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_cells_are_recipes_by_seeds_by_arms_the_first_seeds_first(folder: Path) -> None:
    edited(folder, "[recipes.plain]", '[recipes.plain]\narms = ["local", "run"]')
    _, cells = opened(folder)
    assert [cell.name for cell in cells] == [
        "plain/run/seed-1",
        "plain/local/seed-1",
        "int4-both-ways/run/seed-1",
        "plain/run/seed-2",
        "plain/local/seed-2",
    ]
    assert [c.name for c in chosen(cells, ["int4, both ways", "plain/*/seed-2"])] == [
        "int4-both-ways/run/seed-1",
        "plain/run/seed-2",
        "plain/local/seed-2",
    ]
    assert len({cell.hash for cell in cells}) == 2  # the seed is in the name


def test_every_key_is_frozen() -> None:
    """A new key: add it to frozen.json with the value that does what runs did before it came."""
    assert frozen().keys() == computing(recipes.resolve({})).keys()


def test_a_key_added_later_changes_no_hash_and_a_changed_default_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cells = opened(folder)
    key = "strategy.server-momentum"
    before = {k: v for k, v in frozen().items() if k != key}
    with monkeypatch.context() as patch:  # the key has come since
        patch.setattr("grandrounds.study.studies.cells.frozen", lambda: before)
        assert [cell.hash for cell in opened(folder)[1]] == [cell.hash for cell in cells]
    packaged = {**recipes.defaults(), key: 0.8}
    monkeypatch.setattr("grandrounds.config.recipes._defaults", lambda: packaged)
    assert not {cell.hash for cell in opened(folder)[1]} & {cell.hash for cell in cells}


def test_cells_that_were_played_for_the_pages_are_not_played_again() -> None:
    file = ROOT / "studies/formulary.toml"
    lines, cells = Lines(file.with_suffix("")), cells_of(read_study(file))
    assert not [cell.name for cell in cells if lines.has_changed(cell)]


def test_equal_visits_are_part_of_a_cell(folder: Path) -> None:
    how = 'arms = ["federated", "personal"]\npersonalisation.name = "local-tail"'
    edited(folder, "[recipes.plain]", f"[recipes.plain]\n{how}")
    added = opened(folder)[1][0]
    edited(folder, how, f"{how}\nequal-visits = true")
    equal = opened(folder)[1][0]
    assert added.hash != equal.hash
    assert "--arms federated,personal --equal-visits" in equal.command()
    assert "--equal-visits" not in added.command()
    edited(folder, "equal-visits = true", 'equal-visits = "yes"')
    with pytest.raises(ConfigError, match=r"plain\.equal-visits = 'yes' must be true or false"):
        opened(folder)
    edited(folder, '"federated", "personal"', '"federated"')
    edited(folder, 'equal-visits = "yes"', "equal-visits = true")
    with pytest.raises(ConfigError, match="equal-visits = true needs the arm personal"):
        opened(folder)


def test_a_study_is_played_once_and_told_in_a_table(folder: Path) -> None:
    first = study("run", folder / "study.toml", "--only", "plain")
    assert first.exit_code == 0, first.output
    assert first.stdout.splitlines()[0] == f"study in {folder / 'study'}: 2 cells"
    again = study("run", folder / "study.toml")
    assert again.stdout.splitlines()[0] == f"study in {folder / 'study'}: 3 cells, 2 played before"
    assert again.stdout.splitlines()[1].startswith("3/3  int4-both-ways/run/seed-1  loss ")
    assert len(study("run", folder / "study.toml").stdout.splitlines()) == 1

    lines = Lines(folder / "study").lines
    run = folder / "study" / lines[0]["place"]
    assert (
        lines[0]["figures"]["held-out-loss"]
        == read_json(run / "summary.json")["held_out_loss"]["last"]
    )
    assert (
        lines[0]["bytes"]["up"]
        == read_json(run / "ledger.json")["totals"]["train.up"]["tensor_bytes"]
    )
    assert "--set seed=1" in lines[0]["command"]

    table = study("table", folder / "study.toml").stdout.splitlines()
    assert table[0] == "| recipe | seeds | loss | behind plain | MiB | times smaller |"
    plain, int4 = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table[2:4])
    assert plain[0:2] == ["plain", "2"]
    assert "±" in plain[2]
    assert plain[3] == plain[5] == ""
    assert int4[0:2] == ["int4, both ways", "1"]
    sent = [sum(lines[place]["bytes"].values()) for place in (0, 2)]
    assert int4[5] == f"{sent[0] / sent[1]:.1f}"
    assert table[5] == f"`grandrounds study run {folder.name}/study.toml` plays its 3 cells."
    status = study("status", folder / "study.toml", "--json")
    assert [cell["state"] for cell in json.loads(status.stdout)["cells"]] == ["played"] * 3


def test_differences_are_paired_by_seed(folder: Path) -> None:
    """Losses 1.0, 2.0 and 1.5, 2.7: differences 0.5 and 0.7, mean 0.6.

    s = 0.1 sqrt(2), error s / sqrt(2) = 0.1, t(0.975, 1) = 12.706: half the interval is 1.271.
    """
    edited(folder, "seeds = [1]\n", "")
    found, cells = opened(folder)
    lines = Lines(folder / "study")
    (folder / "study").mkdir()
    losses = {"plain": (1.0, 2.0), "int4, both ways": (1.5, 2.7)}
    for cell in cells:
        lines.append(
            {
                **{"cell": cell.name, "recipe": cell.recipe.name, "arm": RUN, "seed": cell.seed},
                **{"hash": cell.hash, "set": cell.set(), "seconds": 1.0},
                "figures": {"held-out-loss": losses[cell.recipe.name][cell.seed - 1]},
                "bytes": {"up": 2**20, "down": 2**20},
            }
        )
    [table] = tables_of(found, cells, Lines(folder / "study"))
    assert table.rows[1][:4] == ("int4, both ways", "2", "2.100 ± 7.624", "+0.600 ± 1.271")
    page = folder / "page.md"
    begin = f"<!-- study {folder.name}/study.toml, table codecs: begin -->"
    page.write_text(f"above\n{begin}\nold\n<!-- end of the table -->\nbelow\n")
    text, count = into_page(page, found, cells, lines)
    body = markdown(found, table, cells, lines)
    assert (count, text) == (1, f"above\n{begin}\n\n{body}\n\n<!-- end of the table -->\nbelow\n")


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cells = opened(folder)
    whole = play(cells[:1], folder / "whole")
    assert whole == []
    with monkeypatch.context() as patch:
        patch.setattr(playing, "Listener", lambda: interrupted_at("round", 2))
        with pytest.raises(KeyboardInterrupt):
            play(cells[:1], folder / "stopped")
    assert Lines(folder / "stopped").lines == []
    assert play(cells[:1], folder / "stopped") == []
    place = cells[0].place
    assert adapter_bytes(folder / "whole" / place) == adapter_bytes(folder / "stopped" / place)
    one, other = (Lines(folder / name).lines[0] for name in ("whole", "stopped"))
    assert one["figures"] == other["figures"]


def test_a_finished_run_without_a_line_is_read_not_played(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the run's end and its line, or in the middle of the line."""
    _, cells = opened(folder)
    play(cells[:1], folder / "study")
    file = folder / "study" / "cells.jsonl"
    line = file.read_text()
    file.write_text(line[:50])
    monkeypatch.setattr("grandrounds.server_app.federate", None)
    assert play(cells[:1], folder / "study") == []
    assert json.loads(file.read_text()) == json.loads(line)


def test_a_cell_whose_settings_changed_is_played_anew_and_the_old_one_kept(folder: Path) -> None:
    _, cells = opened(folder)
    play(cells[:1], folder / "study")
    edited(folder, '"num-server-rounds" = 3', '"num-server-rounds" = 1')
    only = ("--only", "plain/run/seed-1")
    assert '"changed"' in study("status", folder / "study.toml", "--json").stdout
    result = study("run", folder / "study.toml", *only)
    told = "note: played anew, their settings have changed: plain/run/seed-1; the old ones are kept"
    assert told in result.stdout.splitlines()
    first, second = Lines(folder / "study").lines
    assert first["hash"] != second["hash"]
    assert all(
        (folder / "study" / line["place"] / "summary.json").is_file() for line in (first, second)
    )
    edited(folder, '"num-server-rounds" = 1', '"num-server-rounds" = 3')
    back = study("run", folder / "study.toml", *only).stdout
    assert back.splitlines() == [f"study in {folder / 'study'}: 1 cell, 1 played before"]


def test_arms_of_a_comparison_share_a_folder_and_have_figures_of_their_own(folder: Path) -> None:
    edited(folder, "[recipes.plain]", '[recipes.plain]\narms = ["base", "federated", "local"]')
    _, cells = opened(folder)
    own = [cell for cell in cells if cell.recipe.name == "plain" and cell.seed == 1]
    assert play(own, folder / "study") == []
    base, federated, local = Lines(folder / "study").lines
    assert [line["arm"] for line in (base, federated, local)] == ["base", "federated", "local"]
    assert len({line["place"] for line in (base, federated, local)}) == 1
    assert base["bytes"] == local["bytes"] == {}
    assert base["command"] == local["command"]
    assert "compare --arms federated,local --set" in base["command"]
    assert federated["bytes"]["up"] > 0
    key = "everywhere-held-out-loss"
    assert federated["figures"][key] == federated["figures"]["held-out-loss"]
    assert local["figures"][key] != local["figures"]["held-out-loss"]


def test_no_cell_begins_after_the_time_is_up(folder: Path) -> None:
    result = study("run", folder / "study.toml", "--seconds", 0)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].startswith(
        "time is up: 3 cells left; grandrounds study run"
    )


@pytest.mark.slow
def test_processes_play_what_one_process_plays_and_end_when_theirs_is_killed(folder: Path) -> None:
    command = [sys.executable, "-m", "grandrounds", "study", "run", str(folder / "study.toml")]
    killed = subprocess.Popen([*command, "--jobs", "2"], start_new_session=True, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(folder.glob("study/cells/*/*/run/config.toml")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    done = subprocess.run([*command, "--jobs", "2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, cells = opened(folder)
    assert play(cells[:1], folder / "alone") == []
    place = cells[0].place
    assert adapter_bytes(folder / "study" / place) == adapter_bytes(folder / "alone" / place)
    assert {line["cell"] for line in Lines(folder / "study").lines} == {c.name for c in cells}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("[recipes.plain]", "[recipes.plain]\nstrategy.nam = 'x'", "recipes.plain: Unknown"),
        ("[recipes.plain]", "[recipes.plain]\nseed = 3", "recipes.plain.seed is set by the study"),
        ("[recipes.plain]", "[recipes.plain]\nrun-directory = 'x'", "every cell has a folder"),
        ("[recipes.plain]", "[recipes.plain]\nx = [1]", "recipes.plain.x = [1] is a list"),
        ("[recipes.plain]", '[recipes.plain]\narms = ["locl"]', "Did you mean 'local'?"),
        (
            "[recipes.plain]",
            '[recipes.plain]\narms = ["private"]',
            "needs a recipe with a guarantee",
        ),
        (
            "[recipes.plain]",
            '[recipes.plain]\narms = ["personal"]',
            "personalisation.name=local-tail",
        ),
        ("[recipes.plain]", '[recipes.plain]\narms = ["leave-one-out"]', "use grandrounds compare"),
        ("[recipes.plain]", '[recipes."int4 both ways"]', "have the same folder name"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds has 1 twice"),
        ("seeds = [1, 2]", "seeds = []", "must be a list of integers"),
        ("seeds = [1, 2]", "seeds = [-1]", "seed = -1"),
        ("seeds = [1, 2]", "seads = [1]", "Did you mean 'seeds'?"),
        ('minus = "plain"', 'minus = "plan"', "Did you mean 'plain'?"),
        ('name = "codecs"', 'name = "Codecs of it"', "must be lower-case"),
        ('name = "codecs"', 'name = "codecs"\nrecipes = 5', "= 5 must be a list of recipes"),
        ('name = "codecs"', 'name = "codecs"\nrecipes = [{}]', "has {}, which is no recipe"),
        ("[recipes.plain]", f"[recipes.{'a' * 300}]", "at most 100"),
        ('figure = "bytes", title = "MiB"', 'title = "MiB"', "figure is missing"),
        ("[recipes.plain]", "[recipes.plain", "is not valid TOML"),
    ],
)
def test_a_study_that_cannot_be_is_one_line(folder: Path, old: str, new: str, told: str) -> None:
    edited(folder, old, new)
    for verb in ("run", "table", "status"):
        assert told.lower() in failure(study(verb, folder / "study.toml")).lower()
    assert not (folder / "study").exists()


def test_what_cannot_be_asked_of_a_study_is_one_line(folder: Path) -> None:
    file = folder / "study.toml"
    assert "names no cell" in failure(study("run", file, "--only", "plian"))
    assert "Did you mean 'plain'?" in failure(study("run", file, "--only", "plian"))
    assert "no cell of table 'codecs' has been played" in failure(study("table", file))
    assert "cannot be read" in failure(study("run", folder / "none.toml"))
    assert "is not a study" in failure(study("run", folder / "cells.jsonl"))
    assert "is a file" in failure(study("run", file, "--out", file))
    (folder / "page.md").write_text("no marker")
    assert "has no table of" in failure(study("table", file, "--into", folder / "page.md"))


WHOLE = {
    **{"cell": "plain/run/seed-1", "recipe": "plain", "arm": "run", "seed": 1, "hash": "0"},
    **{"figures": {"held-out-loss": 1.0}, "seconds": 1.0, "bytes": {"up": 1, "down": 1}},
}


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", '{"cell": "plain/run/seed-1"}'),
        *(
            json.dumps({**WHOLE, **other})
            for other in (
                {"seconds": None},
                {"figures": {"held-out-loss": "1"}},
                {"figures": {"held-out-loss": float("nan")}},
                {"bytes": {"up": 1}},
                {"bytes": 5},
            )
        ),
    ],
)
def test_a_damaged_line_is_named_by_its_number(folder: Path, line: str) -> None:
    (folder / "study").mkdir()
    (folder / "study" / "cells.jsonl").write_text(f"{line}\n")
    for verb in ("run", "table", "status"):
        told = failure(study(verb, folder / "study.toml"))
        assert "cells.jsonl, line 1, is damaged" in told


def test_a_line_may_have_every_character_of_a_name(tmp_path: Path) -> None:
    """U+2028 ends a line for `str.splitlines`, and not in JSON."""
    lines = Lines(tmp_path)
    lines.append({**WHOLE, "recipe": "a\u2028b\x85"})
    assert Lines(tmp_path).lines == lines.lines


def test_the_run_of_a_personal_recipe_keeps_its_adapters_in_its_folder(folder: Path) -> None:
    edited(
        folder,
        "[recipes.plain]",
        '[recipes.plain]\npersonalisation.name = "local-tail"\npersonalisation.steps = 1',
    )
    _, cells = opened(folder)
    assert play(cells[:1], folder / "study") == []
    (written,) = (folder / "study").glob("cells/plain/seed-1-*/run/sites/site-0/personal.json")
    assert read_json(written)["steps"] == 1


def test_a_folder_that_cannot_be_locked_is_told(folder: Path) -> None:
    (folder / "study" / ".lock").mkdir(parents=True)
    assert ".lock cannot be locked" in failure(study("run", folder / "study.toml"))


def test_a_figure_that_no_cell_has_is_told_with_those_there_are(folder: Path) -> None:
    _, cells = opened(folder)
    play(cells[:1], folder / "study")
    edited(folder, 'figure = "held-out-loss", title = "loss"', 'figure = "privat", title = "loss"')
    told = failure(study("table", folder / "study.toml"))
    assert "'privat', which no cell has; there are held-out-loss, train-loss, bytes" in told


def test_two_commands_do_not_play_one_study(folder: Path) -> None:
    _, cells = opened(folder)
    with (
        playing._locked(folder / "study"),
        pytest.raises(RunDirectoryError, match="another process"),
    ):
        play(cells, folder / "study")


# --- The studies of this repository ---------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.toml")), ids=lambda f: f.stem)
def test_every_packaged_study_resolves(file: Path) -> None:
    assert cells_of(read_study(file))


PAGES = ("aggregation", "communication", "compare", "forgetting")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_the_tables_of_the_cells_that_were_played(name: str) -> None:
    """To renew one: grandrounds study table studies/formulary.toml --into docs/NAME.md"""
    found = read_study(ROOT / "studies" / "formulary.toml")
    cells, lines = cells_of(found), Lines(found.folder)
    page = ROOT / "docs" / f"{name}.md"
    assert into_page(page, found, cells, lines) == (page.read_text(), 1)


def test_a_study_reads_recipe_files_relative_to_itself(folder: Path) -> None:
    edited(folder, "[recipes.plain]", '[recipes.plain]\nconfig = "nowhere.toml"')
    with pytest.raises(ConfigError, match=str(folder / "nowhere.toml")):
        opened(folder)
    (folder / "nowhere.toml").write_text("train.training-arguments.weight-decay = 0.5\n")
    _, cells = opened(folder)
    assert cells[0].set()["train.training-arguments.weight-decay"] == 0.5


@pytest.mark.slow
def test_the_sample_is_played_as_the_page_says(tmp_path: Path) -> None:
    """Two cells of seconds; the first one's figures are those of its own command."""
    result = study("run", ROOT / "studies" / "sample.toml", "--out", tmp_path / "sample")
    assert result.exit_code == 0, result.output
    line, other = Lines(tmp_path / "sample").lines
    assert other["bytes"]["up"] < line["bytes"]["up"] / 7
    words = shlex.split(line["command"])[1:]
    alone = CliRunner().invoke(app, [*words, "--run-dir", str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.output
    found = read_json(tmp_path / "alone" / "summary.json")["formulary"]["private"]["tuned"]
    assert found["correct"] / found["n"] == line["figures"]["private"]
