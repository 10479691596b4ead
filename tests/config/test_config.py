"""The keys of the configuration: their one home, their documentation, their rules."""

from __future__ import annotations

import ast
import dataclasses
import math
import tomllib
from pathlib import Path

import pytest

from grandrounds.config import keys as config_module
from grandrounds.config.keys import ALIASES, FIELD_OF_KEY, SECTIONS, Config, share_of
from grandrounds.config.recipes import defaults, flatten, resolve
from grandrounds.config.validation import parse
from grandrounds.config.values import OneOf, Range
from tests.places import ROOT

PYPROJECT = ROOT / "pyproject.toml"


def keys_of_pyproject() -> set[str]:
    table = tomllib.loads(PYPROJECT.read_text())
    return set(flatten(table["tool"]["flwr"]["app"]["config"]))


def test_every_key_of_pyproject_is_a_field_or_an_alias() -> None:
    assert keys_of_pyproject() - FIELD_OF_KEY.keys() - ALIASES.keys() == set()


def test_every_field_and_every_alias_has_a_default_in_pyproject() -> None:
    assert (FIELD_OF_KEY.keys() | ALIASES.keys()) - keys_of_pyproject() == set()


def test_no_alias_is_also_a_field() -> None:
    assert not FIELD_OF_KEY.keys() & ALIASES.keys()
    assert set(ALIASES.values()) <= FIELD_OF_KEY.keys()


def test_the_dataclasses_have_no_defaults_of_their_own() -> None:
    for section in SECTIONS.values():
        for field in dataclasses.fields(section):
            assert field.default is dataclasses.MISSING, field.name
            assert field.default_factory is dataclasses.MISSING, field.name


def test_every_field_is_documented_below_it() -> None:
    tree = ast.parse(Path(config_module.__file__).read_text())
    sections = {section.__name__ for section in SECTIONS.values()}
    found = 0
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name not in sections:
            continue
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or "ClassVar" in ast.dump(statement):
                continue
            assert isinstance(following, ast.Expr), ast.unparse(statement)
            assert isinstance(following.value, ast.Constant), ast.unparse(statement)
            assert isinstance(following.value.value, str), ast.unparse(statement)
            found += 1
    assert found == len(FIELD_OF_KEY)


def test_flat_is_read_back_as_the_same_configuration() -> None:
    config = resolve({"strategy.fraction-fit": 0.4, "seed": 7, "data.dirichlet-alpha": 0.1})
    assert parse(config.flat(), defaults()) == config
    assert config.flat().keys() == FIELD_OF_KEY.keys()


def test_flat_has_the_alias_under_its_name_of_today() -> None:
    flat = resolve({"strategy.fraction-fit": 0.4}).flat()
    assert flat["strategy.fraction-train"] == 0.4
    assert "strategy.fraction-fit" not in flat


@pytest.mark.parametrize(
    ("fraction", "count", "share"),
    [
        (0.29, 100, 29),  # 0.29 * 100 = 28.999999999999996 in binary
        (0.15, 20, 3),
        (0.1, 20, 2),
        (0.1, 19, 1),
        (0.1, 9, 1),  # never nobody
        (1.0, 7, 7),
        (0.0, 7, 0),
    ],
)
def test_a_share_is_rounded_down_but_not_by_binary_fractions(
    fraction: float, count: int, share: int
) -> None:
    assert share_of(fraction, count) == share


def test_cohort_and_examples_of_a_step() -> None:
    config: Config = resolve(
        {
            "strategy.fraction-train": 0.15,
            "data.num-partitions": 20,
            "train.training-arguments.per-device-train-batch-size": 6,
            "train.training-arguments.gradient-accumulation-steps": 3,
        }
    )
    assert config.cohort_size == 3
    assert config.examples_per_step == 18


def test_a_range_admits_finite_numbers_between_its_ends() -> None:
    assert Range(0, 1).admits(0)
    assert Range(0, 1).admits(1)
    assert not Range(0, 1, above=True).admits(0)
    assert not Range(0, 1).admits(1.0001)
    assert not Range(0).admits(-1e-9)
    assert not Range(0).admits(math.inf)
    assert not Range(0).admits(math.nan)


def test_a_range_says_what_it_allows() -> None:
    assert str(Range(0, 1)) == "at least 0, at most 1"
    assert str(Range(0, above=True)) == "more than 0"


def test_one_of_tells_true_from_one() -> None:
    assert OneOf((0, 4, 8)).admits(4)
    assert not OneOf((0, 4, 8)).admits(False)
    assert not OneOf((False,)).admits(0)
    assert str(OneOf((0, "a"))) == "one of 0, 'a'"
