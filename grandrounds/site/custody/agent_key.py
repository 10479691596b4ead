"""With whom a site takes part in masked sums, and as whom: its agent key, its accepted roster."""

from __future__ import annotations

from collections.abc import Iterator

from grandrounds import storage
from grandrounds.config.keys import Config
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.wire.masks.roster import Roster, roster_of

IDENTITY = "identity.key"
"""File of a site: its agent key, with which it signs in masked sums."""


def objections(site: SiteFile, config: Config) -> Iterator[str]:
    """Yield why a site's `[privacy]` and `[secure]` refuse a recipe."""
    asked = config.federation.secure_aggregation
    if site.privacy.requires_masks and not config.is_masked:
        yield (
            f"privacy.require = {site.privacy.require!r}, requested secure-aggregation = {asked!r} "
            '(set it to "masked32")'
        )
    if config.is_masked and config.cohort_size < (least := site.secure.min_cohort):
        yield (
            f"secure.min-cohort = {least}, requested {config.cohort_size} sites a round "
            "(--sites-per-round)"
        )


def accepted(site: SiteFile) -> Roster | None:
    """Return the roster that a site has accepted; None if there is none.

    Raises
    ------
    ConfigError
        If the file is damaged.
    """
    file = site.place(site.secure.roster)
    if not file.is_file():
        return None
    return roster_of(storage.read_json(file).get("content"), str(file))
