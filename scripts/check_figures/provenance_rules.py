"""Recipe, versions and hashes on the page of one run, and the numbers of a recipe."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from pathlib import Path

from scripts.check_figures.raw import PYPROJECT, Raw, flat, is_number
from scripts.check_figures.sheet import Sheet
from scripts.check_figures.shown import numbers_in


def configured(raw: Raw) -> Iterable[float]:
    """Return every number of the configuration, and the counts of its sites."""
    for value in raw.config.values():
        if is_number(value):
            yield value
        elif isinstance(value, str):
            yield from (shown.value for shown in numbers_in(value))
    config, sites = raw.config, len(raw.sites)
    share = config["strategy.fraction-train"]
    yield from (sites, max(1, round(share * config["data.num-partitions"])))
    batch = "train.training-arguments."
    yield (
        config[f"{batch}per-device-train-batch-size"]
        * config[f"{batch}gradient-accumulation-steps"]
    )
    yield from (8, 4, 20, 100 * config["data.held-out-fraction"])  # bits, and the leaderboard's
    for site in raw.sites:
        yield from (value for value in site.values() if is_number(value))


def provenance(sheet: Sheet, raw: Raw) -> None:
    known = list(configured(raw))
    for place in sheet.under("note/learning/"):
        sheet.among(place, known)
    for place in sheet.under("command/"):
        sheet.among(place, known)
    for place in sheet.under("table/recipe/Summary/"):
        sheet.among(place, known)
    for start in ("table/recipe/Changed from the defaults", "table/recipe/Defaults: "):
        for place in sheet.under(start):
            at, _, column = place.rpartition("/")
            if "/cell/" not in place:
                continue
            key, shown = (sheet.texts.get(f"{at}/{i}", "") for i in (0, 1))
            if key not in DEFAULTS:
                continue  # so that no rule explains it
            # a key that is younger than the run is not in its config.toml
            value = text_of(raw.config.get(key, shown))
            told = {"0": key, "1": value, "2": text_of(DEFAULTS[key])}
            sheet.verbatim(place, told[column])
    own = {"grandrounds", "python", "platform", "cpu"}
    versions = {k: v for k, v in raw.environment.items() if k in own}
    versions |= raw.environment.get("packages") or {}
    for place in sheet.under("table/environment/Server versions/cell/"):
        if place.endswith("/1"):
            name = sheet.texts.get(f"{place.removesuffix('/1')}/0", "")
            sheet.verbatim(place, str(versions.get(name) or "not installed"))
    for row, key in enumerate(OF_SITES):
        told = dict.fromkeys(str(site[key]) for site in raw.sites if key in site)
        sheet.verbatim(f"table/environment/Sites/cell/{row}/1", ", ".join(told) or "-")
    for place in sheet.under("table/environment/Hashes/cell/"):
        if place.endswith("/1"):
            name = sheet.texts.get(f"{place.removesuffix('/1')}/0", "")
            if not (raw.path / name).is_file():
                continue  # so that no rule explains it
            sheet.verbatim(f"{place.removesuffix('/1')}/0", name)
            sheet.verbatim(place, hashlib.sha256((raw.path / name).read_bytes()).hexdigest())


OF_SITES = (
    *("base", "prompt", "device", "precision", "version"),
    *("torch", "python", "threads", "cpu-matmul"),
)
"""Facts of sites.json in the order of their table."""

DEFAULTS = flat(
    tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
)
"""Key → packaged default, from pyproject.toml."""


def text_of(value: object) -> str:
    """Return a value as in TOML, strings without quotes; of a path only the last part."""
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value) or '""'
