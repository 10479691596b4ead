"""Sites with their own site.toml, data and base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grandrounds.config import recipes
from grandrounds.engines.deployment import local
from grandrounds.engines.deployment.set_up import with_value
from grandrounds.site.custody import sequence
from grandrounds.site.custody.site_file import TEMPLATE, SiteFile, read_site_file
from tests.runs import Settings


def make_site(
    folder: Path, bases: dict[str, str], source: str = "cards.jsonl", **changes: Any
) -> SiteFile:
    """Write a site.toml into a new folder.

    Parameters
    ----------
    bases
        Name of each base → its path, empty for the embedded one.
    changes
        `section__key` of site.toml → its value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = TEMPLATE.read_text()
    values = {"data__source": source, "policy__min_examples": 1, "policy__max_rank": 64, **changes}
    values.setdefault("policy__min_examples_per_visit", 1)
    values.setdefault("tell__min_held_out_examples", 1)
    for name, value in values.items():
        section, _, key = name.partition("__")
        text = with_value(text, section, key.replace("_", "-"), value)
    for name, path in bases.items():
        text += f"\n[bases.{json.dumps(name)}]\npath = {json.dumps(path)}\n"
    (folder / "site.toml").write_text(text)
    site = read_site_file(folder / "site.toml")
    if site.privacy.declared_units and not site.place(site.agent.state).exists():
        sequence.start_new(site.place(site.agent.state))  # as `grandrounds site init` does
    return site


def write_partition(file: Path, settings: Settings, partition_id: int) -> None:
    """Write the rows that a run assigns to one of its sites, in the same order."""
    local.write_partition(file, recipes.resolve(settings), partition_id)


def sites_of(settings: Settings, folder: Path, **changes: Any) -> list[SiteFile]:
    """Make a site of each partition of a run, with the same rows and held-out split."""
    config = recipes.resolve(settings)
    count = config.data.num_partitions
    name = config.model.name
    sites = []
    for i in range(count):
        write_partition(folder / f"site{i}" / "cards.jsonl", settings, i)
        base = "" if name == "formulary" else name
        own = {
            "node__partition_id": i,
            "node__num_partitions": count,
            "data__held_out_seed": config.federation.seed,
            "data__held_out_fraction": config.data.held_out_fraction,
            **changes,
        }
        sites.append(make_site(folder / f"site{i}", {name: base}, **own))
    return sites
