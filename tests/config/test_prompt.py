"""Templates of one's own are read where a run is started, and travel as text."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from grandrounds.config import recipes
from grandrounds.config.digest import canonical, recipe_sha256
from grandrounds.config.prompt import (
    KEY,
    MOST_CHARACTERS,
    identities,
    is_listable,
    name_of,
    packaged,
    sha256_of,
)
from grandrounds.errors import ConfigError
from grandrounds.study.report.provenance import repeat_command

TEXT = "Q: {{ question }}\nA: {{ answer }}\n"


def given(value: object) -> str:
    return str(recipes.parse_overrides([f"{KEY}={value}"])[KEY])


def test_a_file_is_read_where_it_is_named_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my.jinja"
    file.write_text(TEXT)
    assert given(file) == TEXT
    monkeypatch.chdir(tmp_path)
    assert given("my.jinja") == given("./my.jinja") == TEXT
    with pytest.raises(ConfigError, match="is not allowed: it must be one of 'alpaca', 'chat'"):
        recipes.resolve({KEY: str(file)})  # as a server would hand it to a site


def test_a_recipe_finds_its_template_beside_it(tmp_path: Path) -> None:
    (tmp_path / "my.j2").write_text(TEXT)
    (recipe := tmp_path / "recipe.toml").write_text('[data]\nprompt-template = "my.j2"\n')
    config = recipes.resolve(recipes.load_recipe(recipe))
    assert config.data.prompt_template == TEXT
    (again := tmp_path / "config.toml").write_text(recipes.to_toml(config.recipe()))
    assert recipes.resolve(recipes.load_recipe(again)) == config
    assert recipe_sha256(config) != recipe_sha256(recipes.resolve({}))
    assert canonical(config)[KEY] == TEXT


def test_line_ends_and_marks_of_other_editors_change_no_hash(tmp_path: Path) -> None:
    (file := tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert sha256_of(given(file)) == sha256_of(TEXT)


def test_a_text_is_repeated_on_a_command_line() -> None:
    config = recipes.resolve({KEY: TEXT, "data.system-prompt": "Be brief."})
    words = shlex.split(repeat_command(config))
    assignments = [word for before, word in pairwise(words) if before == "--set"]
    assert recipes.resolve(recipes.parse_overrides(assignments)) == config


FAULTS = {
    "missing": (None, "there is no such file"),
    "empty": (b" \n", "is empty"),
    "without places": (b"Question and answer", "has no place for question and answer"),
    "too long": (b"{{ question }}" + b"x" * MOST_CHARACTERS, "of at most 4,096"),
    "latin 1": ("Größe {{ answer }}".encode("latin-1"), "byte 3 is not UTF-8"),
    "escapes": (b"\x1b[2J {{ question }}{{ answer }}", "control character"),
}


@pytest.mark.parametrize(("content", "told"), FAULTS.values(), ids=FAULTS)
def test_a_file_that_is_no_template_is_refused(
    tmp_path: Path, content: bytes | None, told: str
) -> None:
    file = tmp_path / "my.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        given(file)


def test_a_misspelt_file_or_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "my.jinja").write_text(TEXT)
    with pytest.raises(ConfigError, match=r"Did you mean 'my\.jinja'"):
        given(tmp_path / "mine.jinja")
    with pytest.raises(ConfigError, match="Did you mean 'alpaca'"):
        recipes.resolve({KEY: "alpacca"})


def test_packaged_templates_are_named_without_their_ending() -> None:
    assert packaged() == ("alpaca-indented", "chatml", "llama2")
    assert "[INST]" in given("llama2")
    assert given("alpaca") == "alpaca"


def test_a_text_is_named_by_its_hash() -> None:
    assert name_of(TEXT) == f"own template {sha256_of(TEXT)[:12]}"
    assert name_of("chat") == "chat"
    words = ("alpaca", "llama2", sha256_of(TEXT))
    assert all(map(is_listable, words))
    assert not is_listable("llama3")
    assert identities(words) == ("alpaca", sha256_of(given("llama2")), sha256_of(TEXT))


def test_a_system_prompt_is_allowed_beside_a_template_of_ones_own() -> None:
    config = recipes.resolve({KEY: TEXT, "data.system-prompt": 'Say "so".'})
    assert config.data.prompt == '{% set system = "Say \\"so\\"." %}\n' + TEXT
    assert config.data.chat == ("", "", "")
    with pytest.raises(ConfigError, match="has no effect"):
        recipes.resolve({KEY: TEXT, "data.template-date": "2026-01-01"})
