"""A site's personal adapter, out of its state into a folder that PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grandrounds import storage
from grandrounds.config.keys import Config
from grandrounds.config.recipes import resolve
from grandrounds.config.words import counted
from grandrounds.errors import ConfigError, RunDirectoryError
from grandrounds.site import personal_files
from grandrounds.site.custody import kept_runs
from grandrounds.site.custody.own_run import localized
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import SiteState
from grandrounds.wire.adapter import Adapter


def export(site: SiteFile, state: SiteState, run: str, to: Path) -> dict[str, Any]:
    """Write the site's personal adapter of a run into a new or empty folder; return its facts.

    Only the owner can read the folder: the adapter may have memorised rows of the site.

    Parameters
    ----------
    run : str
        The run's key, or its first digits; empty: the only run with a personal adapter.

    Raises
    ------
    ConfigError
        If the site has no personal adapter of the run, or several runs are meant.
    RunDirectoryError
        If the folder is not empty, or cannot be written.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunDirectoryError(
            f"{to} exists and is not an empty folder. Remove it, or choose another one with --to."
        )
    key = _meant(state, run)
    found = personal_files.kept(kept_runs.load(state, key))
    if found is None:
        raise ConfigError(
            f"this site keeps no personal adapter of run {key}: the run has none "
            '(personalisation.name = "none"), or it has not come to its end here.'
        )
    config = pinned(state, key)
    adapter, facts = found
    own, base = localized(site, config), config.model.name
    with storage.writing(str(to), "Choose another folder with --to.", RunDirectoryError):
        personal_files.write_folder(to, own, adapter, facts, base, mode=0o700)
    return {**facts, "run": key}


def _meant(state: SiteState, run: str) -> str:
    """Return the key of the run that is meant among those that the site keeps."""
    keys = [one.run for one in kept_runs.listed(state)]
    meant = [key for key in keys if key.startswith(run)]
    if not run:
        meant = [key for key in keys if _adapter(state, key) is not None]
    if len(meant) == 1:
        return meant[0]
    what = f"run {run!r}" if run else "a personal adapter"
    if not meant:
        raise ConfigError(f"this site keeps nothing of {what}; grandrounds site runs lists runs.")
    raise ConfigError(
        f"this site keeps {counted(len(meant), 'run')} that may be meant: name one of "
        f"{', '.join(meant[:5])}."
    )


def _adapter(state: SiteState, key: str) -> tuple[Adapter, dict[str, Any]] | None:
    return personal_files.kept(kept_runs.load(state, key))


def pinned(state: SiteState, run: str) -> Config:
    """Return the configuration of a kept run, as its last visit had it."""
    row = state.table.execute("select pinned from kept_runs where run = ?", (run,)).fetchone()
    return resolve(json.loads(row[0]))
