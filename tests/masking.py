"""Plays masked sums between sites and a server without a network."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import RecordDict

from grandrounds.engines.deployment import keys
from grandrounds.server.masks.masked_sum import MaskedSum
from grandrounds.site.custody.agent_key import IDENTITY
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.masks.end import SiteEnd
from grandrounds.site.masks.held import RehearsalStore, Store
from grandrounds.wire.masks.attempt import Attempt
from grandrounds.wire.masks.fixed_point import FixedPoint
from grandrounds.wire.masks.keys import Identity
from grandrounds.wire.masks.prg import Vector
from grandrounds.wire.masks.roster import Member, Roster

RECEIVED = bytes(range(32))
"""Hash of what every site received."""


@cache
def identity(number: int) -> Identity:
    """Return a site's agent key, the same in every test."""
    return ec.derive_private_key(number + 1, ec.SECP384R1())


@cache
def roster_of_sites(count: int) -> Roster:
    """Return the roster of sites 0, 1, ..."""
    members = {i: Member(f"site-{i}", identity(i).public_key()) for i in range(count)}
    return Roster("rounds", 1, members)


def end_of(site: int, count: int, store: Store | None = None, min_cohort: int = 3) -> SiteEnd:
    """Return a site's end, with a store of its own unless one is given."""
    kept = RehearsalStore(RecordDict()) if store is None else store
    return SiteEnd(site, identity(site), roster_of_sites(count), min_cohort, kept)


def attempt_at(count: int, run: str = "ab", round_number: int = 1, number: int = 0) -> Attempt:
    """Return an attempt under the roster of some sites."""
    return Attempt(run, round_number, number, roster_of_sites(count).digest)


@dataclass
class Rounds:
    """A cohort of sites and their server, exchange by exchange."""

    count: int
    values: int = 50
    codec: str = "masked32"
    attempt: Attempt = field(init=False)
    ends: dict[int, SiteEnd] = field(init=False)
    server: MaskedSum = field(init=False)
    numbers: FixedPoint = field(init=False)
    vectors: dict[int, Vector] = field(init=False)
    """What each site sends, before it is masked."""

    def __post_init__(self) -> None:
        self.ends = {site: end_of(site, self.count) for site in range(self.count)}
        generator = np.random.default_rng(self.count)
        numbers = FixedPoint(self.codec, self.count, self.values, 1.0, 1000)
        self.vectors = {
            site: numbers.encode(
                generator.uniform(-1, 1, self.values).astype(np.float32), 1 + 37 * site, bytes(32)
            )
            for site in self.ends
        }
        self.begin(attempt_at(self.count))

    def begin(self, attempt: Attempt) -> None:
        """Begin another attempt."""
        self.attempt = attempt
        numbers = FixedPoint(self.codec, self.count, self.values, 1.0, 1000)
        self.server = MaskedSum(attempt, roster_of_sites(self.count))
        self.numbers = numbers

    def keys(self, sites: Collection[int] | None = None) -> bytes:
        """Let sites send their keys; return the list of keys."""
        for site in self.ends if sites is None else sites:
            self.server.take_keys(site, self.ends[site].keys(self.attempt))
        return self.server.key_list()

    def shares(self, sites: Collection[int] | None = None) -> list[int]:
        """Let sites send their shares; return those that train."""
        listed = self.server.key_list()
        for site in self.ends if sites is None else sites:
            self.server.take_shares(site, self.ends[site].shares(self.attempt, listed))
        self.server.expect(self.numbers, RECEIVED)
        return self.server.linked()

    def masked(self, sites: Collection[int] | None = None) -> bytes:
        """Let sites send their masked vectors; return the survivors."""
        for site in self.server.linked() if sites is None else sites:
            self.server.take_masked(site, np.frombuffer(self.vector(site), np.uint8))
        return self.server.survivors()

    def vector(self, site: int, received: bytes = RECEIVED) -> bytes:
        """Return a site's masked vector."""
        end, boxes = self.ends[site], self.server.boxes(site)
        known = end.received(self.attempt, boxes, received)
        vector = self.vectors[site].copy()
        return known or end.masked(self.attempt, boxes, received, vector)

    def confirm(self, sites: Collection[int]) -> bytes:
        """Let sites confirm the survivors; return their signatures."""
        survivors = self.server.survivors()
        for site in sites:
            self.server.take_signature(site, self.ends[site].confirm(self.attempt, survivors))
        return self.server.signatures()

    def unmask(self, sites: Collection[int]) -> Vector:
        """Let sites open their shares; return the sum."""
        signatures = self.server.signatures()
        for site in sites:
            self.server.take_opened(site, self.ends[site].unmask(self.attempt, signatures))
        return self.server.total()

    def plain(self, sites: Collection[int]) -> Vector:
        """Return the sum of some sites' vectors, without any mask."""
        first = next(iter(self.vectors.values()))
        return sum((self.vectors[site] for site in sites), np.zeros_like(first))

    def play(self, lost: Mapping[str, Collection[int]] | None = None) -> Vector:
        """Play all exchanges; return the sum.

        Parameters
        ----------
        lost
            Exchange → sites that no longer answer from it on.
        """
        gone: set[int] = set()

        def left(exchange: str) -> list[int]:
            gone.update((lost or {}).get(exchange, ()))
            return [site for site in self.ends if site not in gone]

        self.keys(left("keys"))
        self.shares(left("shares"))
        self.masked(left("masked"))
        self.confirm(left("confirm"))
        return self.unmask(left("unmask"))


def after_masked(count: int = 5) -> Rounds:
    """Return a cohort whose sites have all sent their masked vectors."""
    rounds = Rounds(count)
    rounds.keys()
    rounds.shares()
    rounds.masked()
    return rounds


# --- In custody -----------------------------------------------------------------------------------


def give_keys(site: SiteFile, roster: Roster, own: Identity) -> None:
    """Give a site its agent key, and a roster as if its operator had accepted it."""
    keys.write_private_key(site.path.parent / IDENTITY, own)
    entries = [
        {
            "partition-id": number,
            "name": one.name,
            "agent-key": keys.public_text(one.key, one.name),
        }
        for number, one in roster.members.items()
    ]
    content = {"consortium": roster.consortium, "serial": roster.serial, "sites": entries}
    site.place(site.secure.roster).write_text(json.dumps({"content": content}))


def chi_square_of(vector: bytes) -> float:
    """Return how far the bytes of a vector are from uniform, in standard deviations.

    Pearson's statistic of 256 cells has mean 255 and variance 510.
    """
    counts = np.bincount(np.frombuffer(vector, np.uint8), minlength=256)
    mean = len(vector) / 256
    return float(((counts - mean) ** 2 / mean).sum() - 255) / math.sqrt(510)
