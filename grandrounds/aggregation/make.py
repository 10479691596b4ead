"""The rule of a given name."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import cast

from grandrounds.aggregation.rule import Rule, RuleSettings
from grandrounds.errors import ConfigError, nearest


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
