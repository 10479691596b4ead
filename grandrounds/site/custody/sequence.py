"""The file that knows how many charges a site's privacy budget has.

It is kept apart from the table of charges: a table that was restored from a backup is behind it. A
site without the file has not begun to count. Nobody knows then what earlier runs have spent, so
that its operator must say once that they have spent nothing (`grandrounds site init`, or
`grandrounds privacy budget --start`).
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from grandrounds import storage
from grandrounds.errors import ConfigError, GrandRoundsError, PolicyError, first_line
from grandrounds.site.custody.site_file import SiteFile

SEQUENCE = "budget.sequence"
"""Its name, where `privacy.sequence-file` gives none."""

NOTHING = "0" * 64
"""The hash before the first charge."""

ADVICE = (
    "Restore the newest site.sqlite and budget.sequence together; without them nobody knows what "
    "was spent, and the site makes no private visits."
)

START = "grandrounds privacy budget --start"


def in_doubt(why: str) -> PolicyError:
    """Return the refusal of a budget that cannot be trusted."""
    return PolicyError(f"The privacy budget of this site is in doubt: {why}. {ADVICE}")


def sequence_file(site: SiteFile) -> Path:
    """Return the path of the sequence file."""
    named = site.privacy.sequence_file
    return site.place(named) if named else site.place(site.agent.state) / SEQUENCE


def known_sequence(file: Path) -> tuple[int, str] | None:
    """Return the number and the hash of the last charge; None if there is no such file.

    Raises
    ------
    PolicyError
        If the file cannot be read.
    """
    if not file.exists():
        return None
    try:
        known = storage.read_json(file)
        number, sha256 = int(known["number"]), str(known["sha256"])
    except (GrandRoundsError, ValueError, KeyError, TypeError, OSError) as error:
        raise in_doubt(f"{file.name} cannot be read") from error
    if number < 0:
        raise in_doubt(f"{file.name} cannot be read")
    return number, sha256


def check_started(site: SiteFile) -> None:
    """Raise `PolicyError` if a site has not begun to count what private runs spend."""
    if not sequence_file(site).exists():
        raise PolicyError(
            "The privacy budget of this site has not been started: it has no "
            f"{sequence_file(site).name}. If no private run has ever visited its data, the site's "
            f"operator says so with {START}; otherwise restore that file and site.sqlite."
        )


def write_sequence(file: Path, number: int, sha256: str) -> None:
    """Write the number and the hash of the last charge, on disk when this returns.

    Raises
    ------
    ConfigError
        If the file cannot be written: then nothing is trained.
    """
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as written:
            json.dump({"number": number, "sha256": sha256}, written)
            written.flush()
            os.fsync(handle)
        partial.replace(file)
        storage.flush_folder(file.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(
            f"privacy.sequence-file: {file} cannot be written ({first_line(error)}). Nothing is "
            "trained until it can."
        ) from error


def start_new(state: Path) -> None:
    """Start the budget of a new site, whose data no run has visited, in its state folder."""
    state.mkdir(mode=0o700)
    write_sequence(state / SEQUENCE, 0, NOTHING)
