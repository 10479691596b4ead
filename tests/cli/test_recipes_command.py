"""`grandrounds recipes` and `grandrounds docs`, and recipes by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import packaged
from grandrounds.errors import ConfigError
from grandrounds.study.chosen import chosen_recipe
from tests.places import ROOT

RECIPES = {path.stem for path in (ROOT / "configs").glob("*.toml")}


def said(*words: str, code: int = 0) -> str:
    """Run a command; return what it printed."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output
    return result.output


def test_every_recipe_is_listed_with_its_cohort() -> None:
    found = json.loads(said("recipes", "list", "--json"))
    assert set(found) == RECIPES
    jsl = found["jsl-medllama-3-8b"]
    assert (jsl["sites_per_round"], jsl["sites"], jsl["rounds"]) == (3, 20, 10)
    table = said("recipes", "list", "--plain")
    assert all(name in table for name in RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_is_taken_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert chosen_recipe(Path(name), None) == ROOT / "configs" / f"{name}.toml"


def test_a_file_of_the_same_name_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("qwen2.5-7b-instruct").write_text("seed = 1\n")
    assert chosen_recipe(Path("qwen2.5-7b-instruct"), None) == Path("qwen2.5-7b-instruct")


def test_a_folder_of_the_same_name_hides_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("qwen2.5-7b-instruct").mkdir()
    assert chosen_recipe(Path("qwen2.5-7b-instruct"), None) == (
        ROOT / "configs" / "qwen2.5-7b-instruct.toml"
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("jsl-medllama-3-8", "No recipe is called 'jsl-medllama-3-8'. Did you mean "),
        ("qwen2.5-7b", "Did you mean qwen2.5-7b-instruct?"),
        ("configs/jsl-medllama-3-8b.toml", "The package has it: give its name, jsl-medllama-3-8b."),
        ("other.toml", "`grandrounds recipes list` shows those of the package."),
    ],
)
def test_a_name_that_no_recipe_has_is_told_with_what_is_near(
    given: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        chosen_recipe(Path(given), None)
    assert told in str(error.value)


def test_a_copy_is_the_recipe_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "grandrounds run" in said("recipes", "copy", "smollm2-135m-laptop")
    copied, original = (
        Path("smollm2-135m-laptop.toml"),
        said("recipes", "show", "smollm2-135m-laptop"),
    )
    assert copied.read_text().rstrip("\n") == original.rstrip("\n")
    told = said("recipes", "copy", "smollm2-135m-laptop", str(copied), code=2)
    assert "exists; give another file" in told
    assert "cannot be written" in said("recipes", "copy", "smollm2-135m-laptop", "no/a", code=2)


def test_every_page_is_listed_by_its_title_and_printed() -> None:
    listed = said("docs").splitlines()
    assert {line.split()[0] for line in listed} == {p.stem for p in (ROOT / "docs").glob("*.md")}
    assert all(len(line.split()) > 1 for line in listed)
    assert said("docs", "masks") == (ROOT / "docs" / "masks.md").read_text()
    assert "no page 'mask'. Did you mean 'masks'?" in said("docs", "mask", code=2)


def test_an_installation_without_recipes_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "__file__", str(tmp_path / "a" / "config" / "packaged.py"))
    packaged.packaged_recipes.cache_clear()
    with pytest.raises(ConfigError, match="Reinstall the package"):
        packaged.packaged_recipes()
    monkeypatch.undo()
    packaged.packaged_recipes.cache_clear()
