"""Agent keys of a rehearsal, which everybody can draw from the run's seed: they keep no secret.

In process and in Flower's simulation one machine is the server and every site. The exchanges are
those of real sites, so that their bytes, failures and results can be seen beforehand.
"""

from __future__ import annotations

from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric import ec

from grandrounds.wire.masks.keys import Identity, derived
from grandrounds.wire.masks.roster import Member, Roster


@lru_cache(maxsize=512)
def identity_of(seed: int, site: int) -> Identity:
    """Return the agent key of a site in a rehearsal."""
    number = int.from_bytes(derived(seed.to_bytes(8), b"rehearsal" + site.to_bytes(4)))
    return ec.derive_private_key(number + 1, ec.SECP384R1())


@lru_cache(maxsize=2)
def roster_of_run(seed: int, num_partitions: int) -> Roster:
    """Return the roster of a rehearsal."""
    members = {
        site: Member(f"site {site}", identity_of(seed, site).public_key())
        for site in range(num_partitions)
    }
    return Roster("rehearsal", 0, members)
