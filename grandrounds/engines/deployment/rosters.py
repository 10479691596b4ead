"""The roster of agent keys, with which sites know each other in masked sums.

consortium roster   admissions → roster.json, signed by the authority
site accept-roster  roster.json → a copy beside site.toml; only this command replaces it
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from grandrounds import storage
from grandrounds.engines.deployment import keys, signed
from grandrounds.engines.deployment.admissions import next_serial
from grandrounds.engines.deployment.joining import AUTHORITY, revocations
from grandrounds.engines.deployment.set_up import AGENT_KEY, IDENTITY
from grandrounds.errors import ConfigError
from grandrounds.server.admitted import admission_of, consortium_of
from grandrounds.site.custody.agent_key import accepted
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.together import replace_together
from grandrounds.wire.masks.roster import FILE, Roster, roster_of


def write_roster(folder: Path) -> Roster:
    """Write the roster of all admitted sites, signed by the authority; return it.

    Raises
    ------
    ConfigError
        If a site was admitted without an agent key, or there are too few sites.
    """
    consortium, entries = consortium_of(folder), []
    for file in sorted((folder / "admissions").glob("*.json")):
        content = admission_of(file, "name")
        if not isinstance(content.get(AGENT_KEY), str):
            raise ConfigError(
                f"{file} has no agent key: let {content['name']!r} run grandrounds site "
                "rotate-key, and admit it again with the request that it writes."
            )
        entries.append({key: content[key] for key in ("name", "partition-id", AGENT_KEY)})
    authority = keys.read_private_key(folder / "authority.key")
    described = {"consortium": consortium["name"], "serial": 0, "sites": entries}
    roster_of(described, str(folder / FILE))  # before a serial is used up
    described["serial"] = next_serial(folder)
    storage.write_text(folder / FILE, signed.signed_text(described, authority))
    return roster_of(described, str(folder / FILE))


@dataclass(frozen=True)
class Offered:
    """A roster that a site may accept."""

    file: Path
    roster: Roster
    before: Roster | None
    """The one that it has accepted."""

    @property
    def changes(self) -> list[str]:
        """What accepting it changes, one line each."""
        new, old = self.roster.members, self.before.members if self.before else {}
        lines = []
        for number in sorted({*new, *old}):
            after, before = new.get(number), old.get(number)
            if after == before:
                continue
            if after is None:
                lines.append(f"site {number} {old[number].name!r} leaves")
                continue
            verb = "is" if before is None else f"was {before.name!r} and is now"
            lines.append(
                f"site {number} {verb} {after.name!r}, agent key {keys.fingerprint(after.key)}"
            )
        return lines


def offered(site: SiteFile, file: Path) -> Offered:
    """Return a roster for a site, verified; nothing is written.

    Raises
    ------
    ConfigError
        If it is not signed by the authority that the site has joined with, is older than the one
        that the site has accepted, or does not list the site with its own agent key.
    """
    folder = site.path.parent
    if not (folder / AUTHORITY).is_file():
        raise ConfigError(f"{folder / AUTHORITY} is missing: join first (grandrounds site join).")
    authority = keys.read_public_text(storage.read_text(folder / AUTHORITY))
    roster = roster_of(signed.read_signed(file, "roster", authority), str(file))
    before = accepted(site)
    if before and roster.serial < before.serial:
        raise ConfigError(
            f"{file} has serial {roster.serial}, but this site has accepted serial "
            f"{before.serial}: it is an old roster. Ask the consortium for the latest."
        )
    own = keys.read_private_key(folder / IDENTITY).public_key()
    listed = roster.members.get(site.node.partition_id)
    if listed is None or keys.fingerprint(listed.key) != keys.fingerprint(own):
        raise ConfigError(
            f"{file} does not list this site as site {site.node.partition_id} with its agent key "
            f"{keys.fingerprint(own)}. Ask the consortium to admit this site's request.json, and "
            "for another roster."
        )
    return Offered(file, roster, before)


def accept(site: SiteFile, found: Offered) -> None:
    """Keep a roster as the site's own; raise `ConfigError` if it cannot be written."""
    folder = site.path.parent
    place = site.place(site.secure.roster)
    if place.is_dir() or not place.parent.is_dir():  # before anything is left to put in place
        raise ConfigError(
            f"secure.roster = {site.secure.roster!r} in {site.path.name} must be a file in a "
            f"folder that exists, such as {FILE!r}; {place} cannot be written."
        )
    replace_together(folder, {place: storage.read_text(found.file)})


def digest_text(roster: Roster) -> str:
    """Return a roster's digest, as sites compare it over the phone."""
    return f"SHA256:{base64.b64encode(roster.digest).decode().rstrip('=')}"


def revoked_members(site: SiteFile, roster: Roster) -> list[str]:
    """Return the names in a roster that the consortium has revoked since."""
    gone = {entry["name"] for entry in revocations(site.path.parent)}
    return sorted(one.name for one in roster.members.values() if one.name in gone)
