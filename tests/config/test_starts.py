"""Starts of an adapter other than a run's own are refused by name, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from grandrounds.config.keys import FIELD_OF_KEY
from grandrounds.config.recipes import load_recipe, parse_overrides, resolve
from grandrounds.config.starts import wanted_start
from grandrounds.errors import ConfigError

REFUSED = {
    "pissa": "it would change the base at every site",
    "pissa_niter_16": "PiSSA takes A and B from a decomposition",
    "olora": "needs its weights on the server, which never loads them",
    "loftq": "LoftQ quantises the base anew",
    "eva": "its start would tell of its data",
    "corda": "no two sites would train over the same one",
    "lora_ga": "LoRA-GA starts from gradients",
    "mica": "MiCA starts from a decomposition",
    "gaussian": "another law",
    "orthogonal": "others than those that server and sites draw",
    "false": "its B is not zero",
    "random": "PEFT has no such start",
}


@pytest.mark.parametrize("start", REFUSED)
def test_a_start_is_refused_by_name(start: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[start]) as caught:
        resolve(parse_overrides([f"model.lora.init-lora-weights={start}"]))
    assert "model.lora.init-lora-weights = " in str(caught.value)
    assert "Leave it out; A is drawn from the seed" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        'model.lora.init_lora_weights = "pissa"',
        'model.lora.peft-init-lora-weights = "PiSSA"',
        'peft_init_lora_weights = "pissa_niter_4"',
        'model.lora.peft-lora-init-lora-weights = "pissa"',
        'model.lora.peft-lora-init = "pissa"',
        'init_weights = "pissa"',
        "model.lora.use-pissa = true",
        "use_pissa = 1",
        'model.lora.peft-use-pissa = "on"',
    ],
)
def test_however_it_is_spelled_in_a_recipe_or_an_entry(line: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(line)
    for file in (recipe, entry(tmp_path, line)):
        written = load_recipe(file)
        with pytest.raises(ConfigError, match="PiSSA takes A and B"):
            resolve(written)


@pytest.mark.parametrize(
    "line",
    [
        "model.lora.peft_init_lora_weights = true",
        'model.lora.init-lora-weights = "default"',
        "use-pissa = false",
        "model.lora.use-olora = 0",
    ],
)
def test_an_entry_may_ask_for_the_start_that_every_run_has(line: str, tmp_path: Path) -> None:
    assert resolve(load_recipe(entry(tmp_path, line))).lora.peft_lora_r == 32
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(line)
    with pytest.raises(ConfigError, match="leave it out, for there is no other start"):
        resolve(load_recipe(recipe))


def test_no_key_of_the_configuration_is_about_a_start() -> None:
    others = ("strategy.init", "data.eva", "privacy.gaussian", "num-rounds")
    keys = (*FIELD_OF_KEY, *others)
    assert [key for key in keys if wanted_start(key, "pissa") is not None] == []


def entry(folder: Path, line: str) -> Path:
    file = folder / "pyproject.toml"
    file.write_text(
        '[project]\nname = "entry"\n[tool.flwr.app.config]\nmodel.name = "org/base"\n'
        f'static.dataset.name = "org/cards"\n{line}\n'
    )
    return file
