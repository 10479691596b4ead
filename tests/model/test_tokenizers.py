"""A run's tokenizer has the run's settings in its template; a base may be one commit of the hub."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from transformers import AutoTokenizer

from grandrounds.api.played import with_day
from grandrounds.config import recipes
from grandrounds.config.bases import hub_name
from grandrounds.data.chat import rendered
from grandrounds.data.chat_settings import ChatSettings
from grandrounds.errors import ConfigError, ModelError
from grandrounds.model import base as bases
from grandrounds.model.tokenizers import dated, run_tokenizer, template_of, tokenizer_of
from tests.data.test_chat_settings import LEAP, TEMPLATE

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def dated_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a chat template that prints the date of the day."""
    folder = tmp_path_factory.mktemp("dated") / "base"
    shutil.copytree(tiny_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def config_on(folder: Path, **data: Any) -> Any:
    keys = {f"data.{name.replace('_', '-')}": value for name, value in data.items()}
    return recipes.resolve({"model.name": str(folder), "data.prompt-template": "chat", **keys})


def test_a_run_has_the_day_on_which_it_began_in_its_recipe(dated_base: Path) -> None:
    config = config_on(dated_base)
    begun = dated(config)
    assert begun.data.template_date == datetime.date.today().isoformat()
    assert dated(config, LEAP).data.template_date == LEAP
    assert dated(begun, LEAP) is begun  # one that is set is kept
    for other in ({"prompt_template": "alpaca"}, {"template_date": LEAP}):
        config = config_on(dated_base, **other)
        assert dated(config) is config
    text = rendered(
        run_tokenizer(dated(config_on(dated_base), LEAP)), [("user", "?")], answering=True
    )
    assert "29 Feb 2024" in text


def test_a_server_without_the_base_leaves_the_day_to_the_recipe(dated_base: Path) -> None:
    config = config_on(dated_base)
    assert with_day(config, at_sites=True) == dated(config)
    elsewhere = config_on(dated_base.with_name("elsewhere"))
    assert with_day(elsewhere, at_sites=True) is elsewhere
    with pytest.raises(ModelError):
        with_day(elsewhere, at_sites=False)


def test_a_template_that_prints_no_date_leaves_the_recipe_as_it_is() -> None:
    config = recipes.resolve({"data.prompt-template": "chat"})
    assert dated(config) is config
    assert run_tokenizer(config) is run_tokenizer(config)


def test_a_site_refuses_a_run_whose_day_is_not_known(dated_base: Path) -> None:
    """A run that `flwr run` starts has no day: each site would print its own."""
    with pytest.raises(ConfigError, match=r"set data.template-date, for example to \"20"):
        run_tokenizer(config_on(dated_base))


def test_a_template_without_a_system_role_is_told(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    for template, told in (
        (
            "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}",
            "no system role",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('never') }}{% endif %}"
            "{{ messages[0].content }}",
            "no system role",
        ),
        (None, "has no chat template"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        tokenizer.chat_template = template
        shutil.rmtree(tmp_path / "base")
        shutil.copytree(tiny_base, tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        tokenizer_of.cache_clear()
        with pytest.raises(ConfigError, match=told):
            tokenizer_of(str(tmp_path / "base"), ChatSettings(system_prompt="Be brief."))


def test_several_templates_without_a_default_are_told(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    assert template_of(tokenizer) == "a"
    tokenizer.chat_template = {"rag": "a", "tool_use": "b"}
    with pytest.raises(ConfigError, match="no default chat template"):
        template_of(tokenizer)
    tokenizer.chat_template = None
    assert template_of(tokenizer) == ""


# --- Revisions ------------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return cached_hub(tiny_base, tmp_path / "hub", monkeypatch)


def cached_hub(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a hub's cache with two commits of `someone/tiny`, which differ in one setting."""
    place = cache / "models--someone--tiny"
    for commit, positions in ((OLD, 64), (NEW, 128)):
        folder = place / "snapshots" / commit
        shutil.copytree(base, folder)
        described = json.loads((folder / "config.json").read_text())
        described["max_position_embeddings"] = positions
        (folder / "config.json").write_text(json.dumps(described))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(NEW)
    (place / "refs" / "v1").write_text(OLD)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def test_a_base_is_loaded_at_its_revision_and_its_commit_is_known(hub: Path) -> None:
    for revision, commit, positions in (("", NEW, 128), ("v1", OLD, 64), (OLD, OLD, 64)):
        config = recipes.resolve({"model.name": "someone/tiny", "model.revision": revision})
        source = config.model.source
        assert bases.base_config(source).max_position_embeddings == positions
        assert bases.base_commit(source) == commit
        assert bases.load_tokenizer(source).eos_token_id is not None
    assert bases.base_fingerprint("someone/tiny@v1") != bases.base_fingerprint("someone/tiny")
    model = bases.load_base(bases.BaseSpec("someone/tiny@v1", 0, "float32"))
    assert model.config.max_position_embeddings == 64
    with pytest.raises(ModelError, match="'someone/tiny@v9' cannot be loaded"):
        bases.base_config("someone/tiny@v9")


def test_a_revision_belongs_to_the_hub_alone(tmp_path: Path, tiny_base: Path) -> None:
    assert hub_name("someone/tiny@v1") == ("someone/tiny", "v1")
    assert hub_name("someone/tiny") == ("someone/tiny", "")
    odd = tmp_path / "a@b"
    odd.mkdir()
    assert hub_name(str(odd)) == (str(odd), "")
    for settings in (
        {"model.revision": "v1"},
        {"model.name": str(tiny_base), "model.revision": "v1"},
        {"static.dataset.revision": "v1"},
    ):
        with pytest.raises(ConfigError, match=r"is for the Hugging Face hub"):
            recipes.resolve(settings)
    assert bases.base_commit(str(tiny_base)) == ""
