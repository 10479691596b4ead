"""A default that does not apply is reset and said; what was set is never changed."""

from __future__ import annotations

from typing import Any

import pytest

from grandrounds.config.recipes import defaults, resolve
from grandrounds.config.resets import resets
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError

ARGUMENTS = "train.training-arguments."


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        ({"strategy.name": "fedavg"}, "strategy.proximal-mu", 0.0),
        ({"data.held-out-fraction": 0}, "strategy.fraction-evaluate", 0.0),
        ({"train.learning-rate-max": 3e-5}, "train.learning-rate-min", 1e-6),
        (
            {f"{ARGUMENTS}warmup-steps": 2},
            f"{ARGUMENTS}lr-scheduler-type",
            "constant_with_warmup",
        ),
        ({f"{ARGUMENTS}gradient-checkpointing": True}, "model.gradient-checkpointing", True),
        (
            {"data.partition-by": "ward", "static.dataset.name": "cards.csv"},
            "data.partitioner",
            "natural",
        ),
        (
            {
                "defence.preset": "robust",
                "defence.min-cosine": -0.1,
                "strategy.largest-weight": 1.0,
            },
            "defence.largest-spread",
            1.4,
        ),
        (
            {
                "data.partition-by": "ward",
                "data.dirichlet-alpha": 0.1,
                "static.dataset.name": "cards.csv",
            },
            "data.partitioner",
            "dirichlet",
        ),
    ],
)
def test_a_default_that_does_not_apply_is_reset_and_said(
    values: dict[str, Scalar], key: str, value: Scalar
) -> None:
    [reset] = resets(values, defaults())
    assert (reset.key, reset.value, reset.default) == (key, value, defaults()[key])
    assert str(reset).startswith(f"{key} = {value!r}: its default {defaults()[key]!r} does not")
    assert resolve(values).flat()[key] == value


def test_a_value_that_was_set_is_an_error_instead() -> None:
    with pytest.raises(ConfigError, match=r"proximal-mu = 0\.01 does not apply to FedAvg"):
        resolve({"strategy.name": "fedavg", "strategy.proximal-mu": 0.01})


def test_a_preset_sets_its_keys_and_refuses_others_values() -> None:
    config = resolve({"defence.preset": "robust"})
    assert (config.defence.largest_spread, config.defence.min_cosine) == (1.4, -0.1)
    assert config.strategy.largest_weight == 1
    assert resolve(config.flat()) == config  # as its own config.toml writes it
    with pytest.raises(ConfigError, match=r"'robust' sets defence.min-cosine = -0.1, .* to 0.0"):
        resolve({"defence.preset": "robust", "defence.min-cosine": 0.0})
    with pytest.raises(ConfigError, match=r"defence\.largest-spread = 0\.5 is below the spread"):
        resolve({"defence.largest-spread": 0.5})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"strategy.name": "fedprox"},
        {"train.learning-rate-max": 1e-3},
        {"train.learning-rate-max": "fast", f"{ARGUMENTS}warmup-steps": None},
        {"train.learning-rate-max": 10**400, f"{ARGUMENTS}warmup-steps": True},
        defaults(),
    ],
)
def test_nothing_else_is_reset(values: dict[str, Any]) -> None:
    assert list(resets(values, defaults())) == []
