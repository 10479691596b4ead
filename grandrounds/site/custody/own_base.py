"""A site's own copies of base models: where they are, and the hash of their files."""

from __future__ import annotations

from pathlib import Path

from grandrounds.config.bases import bases_folder, find_base, names_a_base
from grandrounds.data.formulary import FORMULARY, base_path
from grandrounds.errors import ModelError
from grandrounds.site.custody import policy
from grandrounds.site.custody.base_content import KnownHashes, content_sha256
from grandrounds.site.custody.site_file import SiteFile


def checked_base(site: SiteFile, name: str) -> str:
    """Return the SHA-256 of the site's copy of a base, compared with what the site expects.

    Raises
    ------
    PolicyError
        If it differs from the hash in the site's file.
    ModelError
        If the files cannot be read, or have changed since this process first used them.
    """
    sha256 = base_sha256(site, name)
    policy.check_base(site, name, sha256)
    check_unchanged(name, base_location(site, name), sha256)
    return sha256


def base_location(site: SiteFile, name: str) -> str:
    """Return the path or name that loads the site's copy of a base."""
    if site.bases[name].path:
        return str(base_folder(site, name))
    return name if names_a_base(name) else FORMULARY


def base_folder(site: SiteFile, name: str) -> Path:
    """Return the folder of the site's copy of a base; without a path, the one of that name here."""
    if path := site.bases[name].path:
        return site.place(path)
    return bases_folder() / name if names_a_base(name) else base_path()


_known = KnownHashes()


def base_sha256(site: SiteFile, name: str) -> str:
    """Return the SHA-256 of the files in the site's copy of a base, each read once a day.

    Raises
    ------
    ModelError
        If the files cannot be read, or the base has not been fetched.
    """
    if not site.bases[name].path:
        find_base(name)
    return content_sha256(base_folder(site, name), _known)


_loaded: dict[str, str] = {}
"""Location of a base → the SHA-256 of its files when this process first used it."""


def check_unchanged(name: str, location: str, sha256: str) -> None:
    """Raise `ModelError` if a base's files have changed since this process first used it."""
    if (loaded := _loaded.setdefault(location, sha256)) != sha256:
        raise ModelError(
            f"The files of the base {name!r} have changed since the site's agent loaded them: "
            f"their sha256 was {loaded} and is now {sha256}. Restart the agent."
        )
