"""The hash of a recipe: the same from a recipe file, a run directory, and a message at a site.

The canonical form is JSON with sorted keys, no spaces and no line break, of every key of the
resolved configuration except `LEFT_OUT`. Numbers are written as Python writes them; the hash is
SHA-256 of its UTF-8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from grandrounds.config.keys import (
    PLACES_AND_TRACKERS,
    Config,
    PersonalisationConfig,
    PrivacyConfig,
)
from grandrounds.config.values import Scalar

LEFT_OUT = (
    *PLACES_AND_TRACKERS,
    "model.lora.from-adapter",
    "static.dataset.name",
    "static.dataset.config",
    "static.dataset.split",
    "static.dataset.revision",
    "data.template-date",
    "data.partitioner",
    "data.partition-by",
    "data.dirichlet-alpha",
    "data.held-out-fraction",
    "data.question-column",
    "data.answer-column",
    "data.rejected-column",
)
"""Keys that say where a run lives, who watches it, or which data it divides: at a site with its own
data they mean nothing. The date of a chat template is the day on which a run starts, and an adapter
from which one goes on counts by its hash."""

LEFT_OUT_IF: Mapping[str, Scalar] = {
    "earlier-schedules": "",
    "secure-aggregation": "none",
    "model.revision": "",
    "model.lora.use-rslora": False,
    "model.lora.from-adapter-sha256": "",
    "model.lora.rank-pattern": "",
    "model.lora.alpha-pattern": "",
    "train.objective": "sft",
    "train.dpo-beta": 0.1,
    "train.dpo-length-normalised": False,
    "train.dpo-reference": "base",
    "train.devices": 1,
    "data.template-options": "",
    "data.system-prompt": "",
    "data.subgroup-columns": "",
    "data.train-on": "answers",
    "strategy.rank-decay": 1.0,
    "strategy.rank-penalty": 1e-3,
    "strategy.ridge": 0.01,
    "strategy.outer-nesterov": False,
    "defence.largest-spread": 0.0,
    "defence.preset": "none",
    "privacy.report-train-loss": False,
}
"""Keys added later → the value without effect, so that a recipe without them keeps its hash. So
were all of `privacy.` and `personalisation.`."""


def _is_left_out(key: str, value: Scalar, config: Config) -> bool:
    if key.startswith(PrivacyConfig.prefix) and not config.is_private:
        return True
    if key.startswith(PersonalisationConfig.prefix) and not config.is_personal:
        return True
    return key in LEFT_OUT or LEFT_OUT_IF.get(key) == value


def canonical(config: Config) -> dict[str, Scalar]:
    """Return the keys and values that the hash covers, sorted by key."""
    return {
        key: value
        for key, value in sorted(config.flat().items())
        if not _is_left_out(key, value, config)
    }


def recipe_sha256(config: Config) -> str:
    """Return the hash of a recipe, 64 hex digits."""
    text = json.dumps(canonical(config), separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
