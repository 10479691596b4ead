"""What two ends derive alike in an attempt: contexts, keys of boxes, masks, signed texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from grandrounds.wire.masks import keys
from grandrounds.wire.masks.attempt import Attempt
from grandrounds.wire.masks.keys import Secret
from grandrounds.wire.masks.packed import SignedKeys


def keys_text(attempt: Attempt, site: int, box: bytes, mask: bytes) -> bytes:
    """Return what a site signs of its keys: their attempt, its partition id, and the keys."""
    return attempt.bind("signed keys", site, box, mask)


def commitment(attempt: Attempt, site: int, seed: bytes) -> bytes:
    """Return a site's commitment to its seed of 256 random bits; it says nothing about the seed."""
    return attempt.digest("commitment", site, seed)


@dataclass(frozen=True)
class Agreement:
    """The list of keys that the sites of an attempt have received."""

    attempt: Attempt
    key_list: bytes
    """As sent."""

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the list."""
        return hashlib.sha256(self.key_list).digest()

    def box_text(self, sender: int, receiver: int) -> bytes:
        """Return what a box is bound to: each direction has a key of its own."""
        return self.attempt.bind("box", self.digest, sender, receiver)

    def box_key(self, secret: Secret, other: SignedKeys, sender: int, receiver: int) -> bytes:
        """Return the key of the box that a sender seals for a receiver."""
        return keys.agreed(secret, other.box, self.box_text(sender, receiver))

    def pair_mask(
        self, secret: Secret, other: SignedKeys, pair: tuple[int, int], received: bytes
    ) -> bytes:
        """Return the key of the mask between two sites.

        Parameters
        ----------
        secret
            The masks' secret of one of the two.
        other
            The signed keys of the other one.
        pair
            Both partition ids.
        received : bytes
            Hash of the adapter and the instruction that a site has received. Between two sites that
            received different ones, masks do not cancel (Pasquini, Francati and Ateniese 2022).
        """
        info = self.attempt.bind("pair mask", self.digest, received, sorted(pair))
        return keys.agreed(secret, other.mask, info)

    def own_mask(self, seed: bytes, site: int, received: bytes) -> bytes:
        """Return the key of the mask that a site draws by itself."""
        return keys.derived(seed, self.attempt.bind("own mask", self.digest, received, site))

    def survivors_text(
        self, received: bytes, linked: Sequence[int], survivors: Sequence[int]
    ) -> bytes:
        """Return what a site signs of the survivors.

        Parameters
        ----------
        received : bytes
            As in `pair_mask`.
        linked
            Sites whose boxes the signer had, and itself.
        survivors
            Those of them whose masked vectors are in the sum.
        """
        return self.attempt.bind("survivors", self.digest, received, linked, survivors)


def sign_of(site: int, other: int) -> int:
    """Return the sign with which a site adds its mask with another one: they cancel in a sum."""
    return 1 if site < other else -1
