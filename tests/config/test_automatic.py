"""Which data `auto` divides by site, what else follows from it, and that it can be read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from grandrounds.config import automatic, recipes
from grandrounds.config.keys import Config
from grandrounds.data.formulary.facts import SITES, flashcards
from tests.runs import RUNS, Settings, config_of

STEPS = "train.training-arguments.max-steps"
BY_SITE = ("natural", "site", 6)


def settled(config: Config) -> tuple[str, str, int]:
    """Return partitioner, column and steps of a visit."""
    return config.data.partitioner, config.data.partition_by, config.arguments.max_steps


def test_the_formulary_is_divided_by_its_own_sites() -> None:
    config = recipes.resolve()
    assert settled(config) == BY_SITE
    assert config.is_formulary_by_site
    assert len({card["site"] for card in flashcards()}) == SITES == automatic.FORMULARY_SITES


@pytest.mark.parametrize(
    "changes",
    [
        {"static.dataset.name": "cards.jsonl"},
        {"data.num-partitions": 5},
        {"data.partition-by": "kind"},
        {"data.partitioner": "iid"},
    ],
)
def test_all_else_keeps_iid_partitions_and_five_steps(changes: Settings) -> None:
    config = recipes.resolve(changes)
    column = changes.get("data.partition-by", "")
    assert settled(config) == ("iid", column, 5)
    assert not config.is_formulary_by_site


def test_an_explicit_natural_partition_has_the_steps_of_before() -> None:
    config = recipes.resolve({"data.partitioner": "natural", "data.partition-by": "site"})
    assert settled(config) == ("natural", "site", 5)


def test_explicit_steps_are_kept() -> None:
    assert settled(recipes.resolve({STEPS: 3})) == ("natural", "site", 3)


def test_a_flowertune_entry_stays_iid_even_on_the_formulary(tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text(
        '[tool.flwr.app.config]\nmodel.name = "formulary"\nstatic.dataset.name = "formulary"\n'
    )
    assert settled(recipes.resolve(recipes.load_recipe(file))) == ("iid", "", 10)


@pytest.mark.parametrize("name", ["finished", "flora"])
def test_a_run_directory_of_before_keeps_what_it_ran(name: str) -> None:
    assert settled(config_of(RUNS / name)) == ("iid", "", 2)


def test_a_run_directory_records_what_auto_stood_for(tmp_path: Path) -> None:
    """Otherwise a later meaning of `auto` would change what a resumed run does."""
    file = tmp_path / "config.toml"
    file.write_text(recipes.to_toml(recipes.resolve().flat()))
    recorded = recipes.load_recipe(file)
    assert (recorded["data.partitioner"], recorded[STEPS]) == ("natural", 6)
    again = recipes.resolve(recorded, {"data.partitioner": "auto"})
    assert recipes.differences(recipes.resolve(recorded), again) == []


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, {}),
        ({"data.num-partitions": 5}, {}),
        ({STEPS: 7}, {STEPS: 7}),
        ({"data.partitioner": "iid"}, {"data.partitioner": "iid"}),
        (
            {"data.partitioner": "iid", STEPS: 6},
            {"data.partitioner": "iid", STEPS: 6},
        ),
        (
            {"data.partitioner": "natural", "data.partition-by": "site"},
            {STEPS: 5},
        ),
        (
            {
                "static.dataset.name": "cards.jsonl",
                "data.partition-by": "ward",
                "data.partitioner": "iid",
            },
            {"data.partition-by": "ward", "data.partitioner": "iid"},
        ),
    ],
)
def test_a_configuration_is_read_back_with_as_much_auto_as_possible(
    changes: Settings, kept: Settings
) -> None:
    flat = recipes.resolve(changes).flat()
    back = automatic.unsettle(flat)
    assert recipes.resolve(back).flat() == flat
    keys = ("data.partitioner", "data.partition-by", STEPS)
    default = recipes.defaults()
    assert {key: back[key] for key in keys if back[key] != default[key]} == kept
