"""Make the configured aggregation rule."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from pathlib import Path
from typing import cast

from grandrounds.config.keys import Config, StrategyConfig
from grandrounds.errors import ConfigError, nearest
from grandrounds.server.aggregation.fedavg import Average
from grandrounds.server.aggregation.outer import Nesterov
from grandrounds.server.aggregation.rule import Rule


def make_rule(config: StrategyConfig) -> Rule:
    """Return a new rule, built by `make` in the file of its name, with `_` for `-`.

    Raises
    ------
    ConfigError
        If there is no such rule, or one of its keys is out of range.
    """
    name = config.name
    files = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    file = name.replace("-", "_")
    module = importlib.import_module(f"{__package__}.{file}") if file in files else None
    if not hasattr(module, "make"):
        raise ConfigError(
            f"strategy.name = {name!r} is not an aggregation rule.{nearest(name, files)}"
        )
    rule = cast(Rule, module.make(config))  # type: ignore[union-attr]
    if config.outer_nesterov:
        return Nesterov(cast(Average, rule), config)
    return rule


def filled_in(config: Config) -> StrategyConfig:
    """Return the strategy's section with defaults in place of zeros.

    These are the maximum rank of the stack, and the number of replies that multikrum averages.
    """
    strategy = config.strategy
    honest = max(1, config.cohort_size - strategy.num_malicious_nodes)
    return dataclasses.replace(
        strategy,
        max_rank=config.max_rank,
        num_nodes_to_select=strategy.num_nodes_to_select or honest,
    )
