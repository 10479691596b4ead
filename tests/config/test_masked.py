"""What a masked recipe may not contain, and the defaults that do not apply to it."""

from __future__ import annotations

from typing import Any

import pytest

from grandrounds.config import masked, recipes
from grandrounds.config.digest import recipe_sha256
from grandrounds.config.resets import resets
from grandrounds.config.strategies import STRATEGIES
from grandrounds.errors import ConfigError
from grandrounds.wire.masks import attempt

MASKED = {"secure-aggregation": "masked32"}

REFUSED: dict[str, dict[str, Any]] = {
    "needs each site's update": {"strategy.name": "krum", "strategy.fraction-train": 1.0},
    "server has their sum only": {"defence.min-cosine": 0.0},
    "defence.update-norm-bound = 1.0": {"defence.update-norm-bound": 1.0},
    "defence.largest-norm = 2.0": {"defence.largest-norm": 2.0},
    "defence.largest-spread = 1.5": {"defence.largest-spread": 1.5},
    "masked vectors have a codec": {"communication.uplink-codec": "int8"},
    "must receive the same message": {
        "communication.downlink": "incremental",
        "communication.downlink-codec": "int4",
    },
    "are random to whoever": {"communication.entropy-coding": True},
    "steps counted in epochs": {"train.training-arguments.max-steps": -1},
    "the range of its magnitudes": {
        "strategy.name": "fedavg",
        "strategy.proximal-mu": 0.0,
        "model.lora.peft-use-dora": True,
    },
    "every site holds a share": {"data.num-partitions": 300},
    "of a sum of two": {"strategy.fraction-train": 0.1},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_go_with_masks_is_refused_with_the_reason(why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        recipes.resolve({**MASKED, **REFUSED[why]})


@pytest.mark.parametrize("rule", STRATEGIES)
def test_robust_rules_with_masks_are_refused_and_functions_of_the_mean_are_not(rule: str) -> None:
    asked: dict[str, Any] = {**MASKED, "strategy.name": rule, "strategy.fraction-train": 1.0}
    if rule == "fedavg":
        asked["strategy.proximal-mu"] = 0.0
    linear = {
        "fedexp",
        "fedavg",
        "fedprox",
        "ffa",
        "fedsvd",
        "la-lora",
        "rolora",
        "fedavgm",
        "fedadam",
        "fedyogi",
        "fedadagrad",
    }
    if rule in linear:
        assert recipes.resolve(asked).is_masked
        return
    with pytest.raises(ConfigError, match=f"strategy.name = '{rule}' does not go with secure"):
        recipes.resolve(asked)


def test_defaults_that_do_not_apply_are_reset_and_told() -> None:
    told = [str(reset) for reset in resets(MASKED, recipes.defaults())]
    assert any("defence.largest-norm = 0.0: its default 3.0" in line for line in told)
    config = recipes.resolve(MASKED)
    assert (config.strategy.name, config.defence.largest_norm) == ("fedexp", 0.0)


def test_a_private_masked_recipe_keeps_the_rule_of_private_ones() -> None:
    private = {"privacy.unit-guarantee": "example", "privacy.target-epsilon": 8.0}
    assert recipes.resolve({**MASKED, **private}).strategy.name == "ffa"


def test_a_recipe_without_masks_keeps_its_hash() -> None:
    plain = recipes.resolve({})
    assert recipe_sha256(plain) == recipe_sha256(recipes.resolve({"secure-aggregation": "none"}))
    assert recipe_sha256(plain) != recipe_sha256(recipes.resolve(MASKED))


def test_limits_are_those_of_the_protocol() -> None:
    assert (masked.LEAST_COHORT, masked.MOST_SITES) == (attempt.LEAST_COHORT, attempt.MOST_SITES)
