"""What a recipe that trains on preferences may not contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.errors import ConfigError

DPO = {"train.objective": "dpo", "static.dataset.name": "formulary-preferences"}


def problem(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        recipes.resolve(DPO, changes)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_the_packaged_preferences_are_divided_as_the_formulary_is_and_replay_nothing() -> None:
    config = recipes.resolve(DPO)
    assert config.is_formulary_by_site
    assert (config.arguments.max_steps, config.train.replay_examples) == (6, 0)
    assert config.loss_unit == "nats per pair"
    assert recipes.resolve().loss_unit == "nats per answer token"


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("static.dataset.name", "formulary", 'Set "formulary-preferences".'),
        ("secure-aggregation", "masked32", "masked sums have not been tested with it"),
        ("personalisation.name", "local-tail", "personal adapters are trained and chosen by"),
        ("data.subgroup-columns", "site", "losses by subgroup are of answers. Leave it out."),
        ("train.replay-examples", 2, "the reference already holds the model to the base. Set 0."),
        ("train.devices", 2, "its processes share the loss of answers only. Set 1."),
        ("data.prompt-template", "text", "both answers of a preference follow a prompt"),
        ("data.rejected-column", "", "it is needed for the rejected answer"),
        ("data.rejected-column", "output", "in a column of its own. Name that column."),
    ],
)
def test_what_does_not_go_with_preferences_is_refused_with_the_reason(
    key: str, value: Any, why: str
) -> None:
    said = problem(**{key: value})
    assert f'{key} = {value!r} does not go with train.objective = "dpo": ' in said
    assert why in said


def test_a_guarantee_is_refused() -> None:
    private = {"privacy.unit-guarantee": "example", "privacy.target-epsilon": 8.0}
    said = problem(**private)
    assert "clipping by unit has not been tested on the loss of pairs" in said


@pytest.mark.parametrize("beta", [0, -1.0, "0.1"])
def test_beta_is_a_number_above_0(beta: Any) -> None:
    assert "train.dpo-beta = " in problem(**{"train.dpo-beta": beta})


@pytest.mark.parametrize(
    ("key", "value"),
    [("dpo-beta", 0.5), ("dpo-length-normalised", True), ("dpo-reference", "received")],
)
def test_settings_of_dpo_have_no_effect_without_it(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{key} = .* has no effect without"):
        recipes.resolve({f"train.{key}": value})


def test_the_packaged_preferences_need_the_objective() -> None:
    with pytest.raises(ConfigError, match=r'holds preferences: set train\.objective = "dpo"'):
        recipes.resolve({"static.dataset.name": "formulary-preferences"})


def test_an_entry_that_asks_for_preferences_is_refused(tmp_path: Path) -> None:
    entry = tmp_path / "pyproject.toml"
    entry.write_text(
        '[tool.flwr.app.config]\nmodel.name = "a/b"\ntrain.objective = "dpo"\n'
        '[tool.flwr.app.config.static]\ndataset.name = "c/d"\n'
    )
    with pytest.raises(ConfigError, match=r"train\.objective = 'dpo' cannot be honoured: a Flower"):
        recipes.load_recipe(entry)
