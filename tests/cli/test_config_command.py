"""The resolved configuration is shown with the origin of every key that differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config.recipes import load_recipe, resolve


def show(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["config", "show", *arguments])
    assert result.exit_code == 0, result.stderr
    return result


def test_every_source_of_a_key_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'seed = 7\nnum-server-rounds = 9\nstrategy.name = "fedavg"\nstrategy.fraction-fit = 0.5\n'
        "train.seq-length = 512\n"
    )
    result = show(
        *(str(recipe), "--rounds", "3", "--set", "model.lora.peft-lora-r=8", "--sites", "4"),
        *("--sites-per-round", "3", "--json"),
    )
    shown: dict[str, dict[str, Any]] = json.loads(result.stdout)["keys"]
    origins = {key: about["from"] for key, about in shown.items() if about["from"] != "default"}
    assert origins == {
        "seed": f"recipe {recipe}",
        "num-server-rounds": "--rounds",
        "strategy.name": f"recipe {recipe}",
        "train.seq-length": f"recipe {recipe}",
        "model.lora.peft-lora-r": "--set",
        "data.num-partitions": "--sites",
        "strategy.fraction-train": "--sites-per-round",
        "strategy.proximal-mu": "reset",
        "data.partitioner": "auto",
        "train.training-arguments.max-steps": "auto",
        "train.replay-examples": "auto",
    }
    assert shown["num-server-rounds"] == {"value": 3, "default": 24, "from": "--rounds"}
    [note] = json.loads(result.stdout)["notes"]
    assert note.startswith("strategy.proximal-mu = 0.0: its default 0.01 does not apply to fedavg")


def test_what_is_shown_is_a_recipe_that_says_the_same(tmp_path: Path) -> None:
    result = show("--set", "strategy.name=fedavg", "--rounds", "3")
    assert '"num-server-rounds" = 3  # --rounds; default 24' in result.stdout.splitlines()
    assert '"strategy.proximal-mu" = 0.0  # reset; default 0.01' in result.stdout.splitlines()
    assert result.stderr.startswith("note: strategy.proximal-mu")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(result.stdout)
    written = resolve(load_recipe(recipe))
    assert written == resolve({"strategy.name": "fedavg", "num-server-rounds": 3})


def test_natural_sites_come_from_the_data(flashcards: Path) -> None:
    shown = show("--data", str(flashcards), "--set", "data.partition-by=ward", "--json")
    about = json.loads(shown.stdout)["keys"]["data.num-partitions"]
    assert about == {"value": 4, "default": 20, "from": "the values of column 'ward'"}
