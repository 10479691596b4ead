"""The roster: the agent keys of a consortium's sites, which every site has accepted beforehand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grandrounds.errors import ConfigError
from grandrounds.wire.masks.attempt import LEAST_COHORT, MOST_SITES
from grandrounds.wire.masks.keys import Public, public_bytes, read_public

FILE = "roster.json"
"""Name of the signed file, at a consortium and at a site."""


@dataclass(frozen=True)
class Member:
    """A site of a roster."""

    name: str
    key: Public
    """Its agent key."""


@dataclass(frozen=True)
class Roster:
    """Who may take part in a masked sum."""

    consortium: str
    serial: int
    """Grows with every file that the authority signs."""
    members: Mapping[int, Member]
    """Partition id → site."""

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the keys and their partition ids; every signature of a run is bound to it."""
        content = [
            [site, one.name, public_bytes(one.key).hex()]
            for site, one in sorted(self.members.items())
        ]
        whole = json.dumps([self.consortium, self.serial, content], separators=(",", ":"))
        return hashlib.sha256(whole.encode()).digest()

    def name(self, site: int) -> str:
        """Return a site's name, for errors."""
        return repr(self.members[site].name) if site in self.members else f"site {site}"


def roster_of(content: object, where: str) -> Roster:
    """Return the roster of a file's content, whatever that is.

    Parameters
    ----------
    where : str
        The file, for errors.

    Raises
    ------
    ConfigError
        If something is missing, or a key or a partition id occurs twice.
    """
    found = content if isinstance(content, dict) else {}
    entries, serial, name = (found.get(word) for word in ("sites", "serial", "consortium"))
    if not (isinstance(entries, list) and type(serial) is int and isinstance(name, str)):
        raise ConfigError(
            f"{where} is not a roster: it must hold consortium, serial and sites. Ask the "
            "consortium for it again."
        )
    if not LEAST_COHORT <= len(entries) <= MOST_SITES:
        raise ConfigError(
            f"{where} lists {len(entries)} sites; a masked sum needs {LEAST_COHORT} to "
            f"{MOST_SITES}."
        )
    members = {}
    for entry in entries:
        site, member = _member(entry, where)
        members[site] = member
    if len(members) < len(entries):
        raise ConfigError(f"{where} lists a partition id twice. Ask the consortium for another.")
    if len({public_bytes(one.key) for one in members.values()}) < len(members):
        raise ConfigError(f"{where} lists an agent key twice. Ask the consortium for another.")
    return Roster(name, serial, members)


def _member(entry: Any, where: str) -> tuple[int, Member]:
    found = entry if isinstance(entry, dict) else {}
    site, name, key = (found.get(word) for word in ("partition-id", "name", "agent-key"))
    public = read_public(key) if isinstance(key, str) else None
    if type(site) is int and 0 <= site < 2**16 and isinstance(name, str) and public is not None:
        return site, Member(name, public)
    raise ConfigError(
        f"{where}: {str(entry)[:60]!r} is not a site with name, partition-id and agent-key (ECDSA "
        "on P-384, in OpenSSH format)."
    )
