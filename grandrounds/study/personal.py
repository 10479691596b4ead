"""The personal adapter of a site of a rehearsal, in the place of the run's last checkpoint.

Those of real sites are at the sites, where `grandrounds site export` writes them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from grandrounds.errors import ConfigError, RunDirectoryError, first_line
from grandrounds.server.described import are_real
from grandrounds.server.directory import Checkpoint
from grandrounds.site.personal_files import FACTS, FOLDER, site_folder
from grandrounds.wire.names import names_of


def of_site(checkpoint: Checkpoint, site: str) -> Checkpoint:
    """Return a site's personal adapter as the checkpoint that it was made of.

    Parameters
    ----------
    checkpoint
        The last one of a run.
    site : str
        The site's number or name.

    Raises
    ------
    ConfigError
        If the run has no personal adapters here, or there is no such site.
    RunDirectoryError
        If the site has none, or its files cannot be read.
    """
    run, config = checkpoint.run, checkpoint.config
    introduced = run.read_json("sites.json") or []
    if not config.is_personal:
        raise ConfigError(
            f'--site {site}: {run.path} has personalisation.name = "none", so that all sites have '
            "the same adapter. Leave --site out."
        )
    if are_real(introduced):
        raise ConfigError(
            f"--site {site}: {run.path} is a run of a deployment: its personal adapters are at the "
            "sites, where grandrounds site export writes them."
        )
    number = _number(site, introduced, config.data.num_partitions)
    if not checkpoint.is_last:
        raise ConfigError(
            f"--site {site}: personal adapters are made of the last checkpoint; leave "
            "--checkpoint out."
        )
    folder = site_folder(run.path / FOLDER, number)
    made = facts_in(folder) if (folder / FACTS).is_file() else {}
    if made.get("round") != checkpoint.round:
        failed = ((run.read_json("summary.json") or {}).get("personal") or {}).get("failed", {})
        why = failed.get(str(number), "the run has not come to its end")
        raise RunDirectoryError(
            f"site {number} of {run.path} has no personal adapter after round {checkpoint.round}: "
            f"{why}."
        )
    return dataclasses.replace(checkpoint, folder=folder)


def check_whole(checkpoint: Checkpoint) -> None:
    """Raise `ConfigError` if a run has no whole adapter: A is shared, and each site has its B."""
    config, path = checkpoint.config, checkpoint.run.path
    if config.personalisation.name != "shared-a":
        return
    instead = "name a site (--site 0)"
    if are_real(checkpoint.run.read_json("sites.json") or []):
        instead = "each site has its own: grandrounds site export"
    raise ConfigError(
        f"{path} has no whole adapter: A is shared, and each site keeps its own B "
        f'(personalisation.name = "shared-a"); {instead}.'
    )


def facts_in(folder: Path) -> dict[str, Any]:
    """Return how a personal adapter was made and what it scores, as its folder says.

    Raises
    ------
    RunDirectoryError
        If the file cannot be read.
    """
    file = folder / FACTS
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
        if missing := {"personalisation", "round"} - found.keys():
            raise ValueError(f"it has no {min(missing)!r}")
        return found
    except (OSError, ValueError, TypeError) as error:
        raise RunDirectoryError(f"{file} cannot be read ({first_line(error)}).") from error


def _number(site: str, introduced: list[dict[str, Any]], count: int) -> int:
    """Return the number of the site that is meant."""
    if site.isascii() and site.isdigit() and int(site) < count:
        return int(site)
    labels = names_of(introduced).labels
    for number, name in labels.items():
        if name.casefold() == site.casefold():
            return number
    named = f", or a name: {', '.join(labels.values())}" if labels else ""
    raise ConfigError(
        f"--site {site!r} is no site of this run: give a number from 0 to {count - 1}{named}."
    )
