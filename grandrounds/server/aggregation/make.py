"""The rule of a given name."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import cast

from grandrounds.config.keys import Config
from grandrounds.errors import ConfigError, nearest
from grandrounds.server.aggregation.rule import Rule, RuleSettings


def make_rule(settings: RuleSettings) -> Rule:
    """Return a new rule: what `make` in the file `settings.name` of this folder makes.

    Raises
    ------
    ConfigError
        If there is no such rule, or a setting that it reads is out of range.
    """
    path = f"{__package__}.{settings.name}"
    files = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    make = getattr(importlib.import_module(path), "make", None) if settings.name in files else None
    if make is None:
        raise ConfigError(
            f"strategy.name = {settings.name!r} is no aggregation rule."
            f"{nearest(settings.name, files)}"
        )
    return cast(Rule, make(settings))


def rule_settings(config: Config) -> RuleSettings:
    """Return what the aggregation rule is told."""
    strategy = config.strategy
    hostile = strategy.num_malicious_nodes
    return RuleSettings(
        name=strategy.name,
        rank=config.lora.peft_lora_r,
        max_rank=config.max_rank,
        num_malicious_nodes=hostile,
        num_nodes_to_select=strategy.num_nodes_to_select or max(1, config.cohort_size - hostile),
        trimmed_share=strategy.trimmed_share,
        server_learning_rate=strategy.server_learning_rate,
        server_momentum=strategy.server_momentum,
        beta_1=strategy.beta_1,
        beta_2=strategy.beta_2,
        tau=strategy.tau,
    )
