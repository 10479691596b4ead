"""site.toml: its defaults are the template's, and what is wrong in it is told in one line."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from grandrounds.config.strategies import STRATEGIES
from grandrounds.engines.deployment.set_up import with_value
from grandrounds.errors import ConfigError, ModelError
from grandrounds.site.custody.site_file import SECTIONS, TEMPLATE, read_site_file
from tests.own_sites import make_site


def test_every_key_stands_in_the_template_and_no_other() -> None:
    template = tomllib.loads(TEMPLATE.read_text())
    assert set(template) == {"name", *SECTIONS}
    for section, made in SECTIONS.items():
        names = {field.name.replace("_", "-") for field in dataclasses.fields(made)}
        assert set(template[section]) == names


def test_the_template_lets_every_rule() -> None:
    """The server computes it; what a site is asked by it has limits of its own."""
    listed = tomllib.loads(TEMPLATE.read_text())["policy"]["strategies"].split(",")
    assert sorted(listed) == sorted(STRATEGIES)


def test_what_a_file_leaves_out_is_the_templates(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('[data]\nsource = "cards.csv"\n[bases.formulary]\npath = ""\n')
    site = read_site_file(path)
    assert site.policy.max_rank == 32
    assert site.data.question_column == "input"
    assert site.place("cards.csv") == tmp_path / "cards.csv"
    assert site.place("/srv/cards.csv") == Path("/srv/cards.csv")


WRONG = [
    ("polcy__max_rank = 3", r"unknown key 'polcy'.* Did you mean 'policy'"),
    ("policy__max_ranc = 3", r"unknown key policy.max_ranc.* Did you mean 'max-rank'"),
    ("policy__max-rank = 0", "policy.max-rank = 0 is not allowed: it must be at least 1"),
    ('policy__max-rank = "8"', "policy.max-rank = '8' has the wrong type"),
    (
        'policy__prompt-templates = "alpaca,poem"',
        "prompt-templates = 'alpaca,poem' must be a comma",
    ),
    ("data__held-out-fraction = 1.5", "held-out-fraction = 1.5 is not allowed"),
    ('data__source = ""', "set exactly one of data.source"),
    ('data__database = "sqlite:///a.db"', "set exactly one of data.source"),
    ('data__query = "SELECT 1"', "data.database and data.query belong together"),
    ('data__answer-column = "input"', "must name two different columns"),
    ("node__partition-id = 5", "partition-id = 5 must be below node.num-partitions = 1"),
    ('secure__roster = " "', "secure.roster = ' ' must be the path of a file"),
    (r'secure__roster = "a\u0000"', "it has a NUL character"),
    ('agent__address = "127.0.0.1:9443"', "set exactly one of agent.socket"),
]


@pytest.mark.parametrize(("line", "reason"), WRONG)
def test_what_is_wrong_is_told_with_the_file(tmp_path: Path, line: str, reason: str) -> None:
    site = make_site(tmp_path, {"formulary": ""})
    key, _, value = line.partition(" = ")
    section, _, name = key.partition("__")
    text = site.path.read_text()
    try:
        text = with_value(text, section, name, tomllib.loads(f"v = {value}")["v"])
    except ConfigError:
        text += f"\n[{section}]\n{name} = {value}\n" if section == "polcy" else ""
        text = text.replace("[policy]", f"[policy]\n{name} = {value}", 1)
    site.path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_site_file(site.path)
    assert str(site.path) in str(caught.value)


def test_a_section_that_is_no_table_is_told_with_the_file(tmp_path: Path) -> None:
    site = make_site(tmp_path, {"formulary": ""})
    site.path.write_text("secure = 1")
    with pytest.raises(ConfigError, match=r"site.toml: secure = 1 must be a table: \[secure\]"):
        read_site_file(site.path)


def test_bases_are_tables_of_path_and_hash(tmp_path: Path) -> None:
    site = make_site(tmp_path, {"formulary": ""})
    good = site.path.read_text()
    for line, reason in (
        ('sha256 = "123"', "not a SHA-256: 64 hex digits"),
        ('sha256 = "' + "g" * 64 + '"', "not a SHA-256"),
        ('size = "8B"', "must be a table of path and sha256"),
    ):
        site.path.write_text(f"{good}{line}\n")
        with pytest.raises(ConfigError, match=reason):
            read_site_file(site.path)
    site.path.write_text(good.partition("[bases.")[0])
    with pytest.raises(ConfigError, match=r"no \[bases"):
        read_site_file(site.path)


def test_a_missing_file_and_one_that_is_no_toml_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the site's file .* site init"):
        read_site_file(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_site_file(tmp_path / "site.toml")


def test_a_value_is_changed_and_the_comments_stay() -> None:
    text = TEMPLATE.read_text()
    changed = with_value(text, "policy", "max-rank", 4)
    assert "max-rank = 4  # LoRA rank" in changed
    assert len(changed.splitlines()) == len(text.splitlines())
    assert tomllib.loads(changed)["policy"]["max-rank"] == 4
    with pytest.raises(ConfigError, match=r"has no line for policy\.colour"):
        with_value(text, "policy", "colour", 4)


def test_a_base_of_this_machine_needs_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grandrounds.config.bases import FOLDER_VARIABLE, REAL_BASE
    from grandrounds.site.custody.own_base import base_folder, base_location, base_sha256

    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "bases"))
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    (tmp_path / "bases" / "mine" / "config.json").write_text("{}")
    file = tmp_path / "site.toml"
    file.write_text(f'[data]\nsource = "a.csv"\n[bases.mine]\n[bases."{REAL_BASE}"]\n')
    site = read_site_file(file)
    assert base_location(site, "mine") == "mine"
    assert base_folder(site, "mine") == tmp_path / "bases" / "mine"
    assert len(base_sha256(site, "mine")) == 64
    with pytest.raises(ModelError, match=f"grandrounds base fetch {REAL_BASE}"):
        base_sha256(site, REAL_BASE)
