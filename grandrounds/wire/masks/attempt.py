"""One attempt at a masked sum, and the texts that keys, masks and signatures are bound to.

An attempt has five exchanges: `keys`, `shares`, `masked`, `confirm`, `unmask`. Four sets of sites
shrink along them: those whose keys are listed, those whose shares reached the others, the survivors
whose masked updates are in the sum, and the signers that confirmed these survivors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

KEYS, SHARES, MASKED, CONFIRM, UNMASK = EXCHANGES = (
    *("keys", "shares", "masked", "confirm", "unmask"),
)
"""The exchanges of an attempt, in their order."""

KIND_OF = {exchange: f"train.{exchange}" for exchange in EXCHANGES}
"""Exchange → kind of its message."""

MASKED_KIND = KIND_OF[MASKED]
"""The one of them with which a site trains."""

RIDES = {CONFIRM: KEYS, UNMASK: SHARES}
"""Exchange → that of the next round which rides on it: a message with both parts, and a reply with
both. A site answers each part as it would alone."""

FIRST_ATTEMPT = 0
"""Number of a round's first attempt, the only one whose keys and shares ride."""

LEAST_COHORT = 3
"""Sites in the smallest sum: of two, each would know the other's update."""

MOST_SITES = 256
"""Sites in the largest cohort: every site has a key and a share for every other one."""

MOST_ATTEMPTS = 20
"""Attempts at one round, each with fresh keys."""

KEY_BYTES = 32
"""Of secrets, of public keys on Curve25519, and of everything derived from them."""

TAG_BYTES = 16
"""What a box adds to its content."""

SIGNATURE_BYTES = 96
"""r and s on P-384, of 48 bytes each: DER's length would vary."""

MASKS = "masks"
"""Record of the boxes, beside the adapter; and kind of the other four exchanges in the ledger."""

DOMAIN = "grandrounds masks 1"
"""Begins every text that is bound or signed: nothing else that a key signs begins so."""


@dataclass(frozen=True)
class Attempt:
    """Which sum it is about. Nothing of one attempt is valid in another."""

    run: str
    """The run's key."""
    round: int
    """From 1."""
    number: int
    """From 0; a round whose sum failed before `unmask` is attempted again with fresh keys."""
    roster: bytes
    """SHA-256 of the roster that this end has accepted."""

    def bind(self, purpose: str, *parts: bytes | int | Sequence[int]) -> bytes:
        """Return a text that is different for every purpose, attempt and sequence of parts.

        Every part is preceded by its kind and length, so that no two sequences run together.
        """
        fields = [DOMAIN.encode(), purpose.encode(), self.run.encode(), self.roster]
        whole = b"".join(len(one).to_bytes(4) + one for one in fields)
        for part in (self.round, self.number, *parts):
            if isinstance(part, bytes):
                whole += b"b" + len(part).to_bytes(4) + part
            elif isinstance(part, int):
                whole += b"i" + part.to_bytes(8)
            else:
                whole += b"s" + len(part).to_bytes(4) + b"".join(n.to_bytes(4) for n in part)
        return whole

    def digest(self, purpose: str, *parts: bytes | int | Sequence[int]) -> bytes:
        """Return the SHA-256 of a bound text."""
        return hashlib.sha256(self.bind(purpose, *parts)).digest()


def threshold(sites: int) -> int:
    """Return how many shares recover a secret of a cohort: more than two thirds of its sites.

    Both ends compute it; it is never sent. With fewer, a server that shows one set of survivors to
    some sites and another one to others could recover both masks of a site (Bonawitz et al. 2017,
    section 6.2).
    """
    return 2 * sites // 3 + 1


def given_up(sites: int) -> int:
    """Return how many sites of a cohort must have gone on until an attempt has no sum left.

    A site that has begun a later attempt opens nothing of an earlier one. With so many gone on,
    fewer than the threshold are left to open, even if less than a third of the cohort does both.
    """
    colluding = (sites - 1) // 3
    return sites - threshold(sites) + colluding + 1
