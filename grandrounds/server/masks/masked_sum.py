"""A masked sum at the server: replies are added as they arrive, and the masks removed at the end.

A site may stop answering anywhere. Without its shares it counts nowhere; without its vector its
masks with the survivors are recovered from the others' shares; without its signature, or its shares
of others, it is a survivor all the same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from grandrounds.errors import ReplyError, RoundError
from grandrounds.wire.masks import keys, packed, shamir
from grandrounds.wire.masks.agreement import Agreement, commitment, keys_text, sign_of
from grandrounds.wire.masks.attempt import KEY_BYTES, LEAST_COHORT, Attempt, threshold
from grandrounds.wire.masks.fixed_point import FixedPoint
from grandrounds.wire.masks.prg import Vector, add_mask
from grandrounds.wire.masks.roster import Roster


@dataclass
class MaskedSum:
    """One attempt at the server: `take_…` for each reply, the other methods between exchanges."""

    attempt: Attempt
    roster: Roster
    received: bytes = b""
    """Hash of the adapter and the instruction that the sites get, once they are known."""
    _numbers: FixedPoint | None = None
    _keys: dict[int, packed.SignedKeys] = field(default_factory=dict)
    _dealt: dict[int, packed.Dealt] = field(default_factory=dict)
    _survivors: set[int] = field(default_factory=set)
    _signatures: dict[int, bytes] = field(default_factory=dict)
    _opened: dict[int, dict[int, bytes]] = field(default_factory=dict)
    _total: Vector | None = None

    # --- Keys -------------------------------------------------------------------------------------

    def take_keys(self, site: int, reply: bytes) -> None:
        """Take a site's signed keys.

        Raises
        ------
        ReplyError
            If the site is not in the roster or has not signed them, or if no other site could use
            them: one site's keys would spoil the attempt of all.
        """
        found = packed.signed_keys(reply)
        member = self.roster.members.get(site)
        text = keys_text(self.attempt, site, found.box, found.mask)
        if member is None or not keys.is_signed(member.key, text, found.signature):
            raise ReplyError(
                "its keys are not signed by the agent key that the roster has of it; has it "
                f"accepted this roster (serial {self.roster.serial})?"
            )
        others = [one for other, one in self._keys.items() if other != site]
        known = {key for one in others for key in (one.box, one.mask)}
        if found.box == found.mask or {found.box, found.mask} & known:
            raise ReplyError("it has sent the same key twice, or that of another site")
        for key in (found.box, found.mask):
            keys.agreed(keys.new_secret(), key, b"")  # raises if it is of low order
        self._keys[site] = found

    def key_list(self, least: int = LEAST_COHORT) -> bytes:
        """Return what `shares` sends to every site; raise `RoundError` if too few sent keys."""
        self._check_count("keys", self._keys, max(least, LEAST_COHORT))
        return packed.pack_key_list(self._keys)

    @property
    def listed(self) -> list[int]:
        """The sites in the list of keys."""
        return sorted(self._keys)

    # --- Shares -----------------------------------------------------------------------------------

    def take_shares(self, site: int, reply: bytes) -> None:
        """Take a site's boxes; raise `ReplyError` if their number is not that of the others."""
        self._dealt[site] = packed.dealt(reply, self._keys.keys() - {site})

    def leave_out(self, sites: Collection[int]) -> None:
        """Leave out sites whose shares no other one has received yet: they count nowhere."""
        for site in sites:
            self._dealt.pop(site, None)

    def linked(self, least: int = LEAST_COHORT) -> list[int]:
        """Return the sites that train; raise `RoundError` if too few sent their shares."""
        self._check_count("shares", self._dealt, max(least, self._least))
        return sorted(self._dealt)

    def expect(self, numbers: FixedPoint, received: bytes) -> None:
        """Set what the vectors are made of, before the sites train."""
        self._numbers = replace(numbers, sites=len(self._keys))  # as the sites count them
        self.received = received

    @property
    def numbers(self) -> FixedPoint:
        """Of the vectors."""
        assert self._numbers is not None
        return self._numbers

    def boxes(self, site: int) -> bytes:
        """Return what `masked` sends to a site: the boxes that the others have sealed for it."""
        return packed.pack_boxes(
            {sender: one.boxes[site] for sender, one in self._dealt.items() if sender != site}
        )

    # --- Masked vectors ---------------------------------------------------------------------------

    def take_masked(self, site: int, reply: NDArray[np.uint8]) -> None:
        """Add a site's masked vector to the sum; raise `ReplyError` if it has another length."""
        if len(reply) != self.numbers.size_bytes:
            raise ReplyError(
                f"its masked vector has {len(reply)} bytes, not {self.numbers.size_bytes}"
            )
        vector = np.frombuffer(reply, dtype=self.numbers.dtype)
        if self._total is None:
            self._total = np.zeros(self.numbers.length, dtype=self.numbers.dtype)
        self._total += vector
        self._survivors.add(site)

    def survivors(self, least: int = LEAST_COHORT) -> bytes:
        """Return what `confirm` sends; raise `RoundError` if too few sent their vectors."""
        self._check_count("masked vectors", self._survivors, max(least, self._least))
        return packed.pack_sites(self._survivors)

    # --- Confirmation and shares of the survivors -------------------------------------------------

    def take_signature(self, site: int, reply: bytes) -> None:
        """Take a site's confirmation; raise `ReplyError` if it has not signed these survivors."""
        text = self._agreement.survivors_text(
            self.received, sorted(self._dealt), sorted(self._survivors)
        )
        if not keys.is_signed(self.roster.members[site].key, text, reply):
            raise ReplyError("it has not signed the survivors of this round")
        self._signatures[site] = reply

    def signatures(self) -> bytes:
        """Return what `unmask` sends; raise `RoundError` if too few have confirmed."""
        self._check_count("confirmations", self._signatures, self._least)
        return packed.pack_signatures(self._signatures)

    def take_opened(self, site: int, reply: bytes) -> None:
        """Take a site's shares of the others; raise `ReplyError` if their number is another."""
        self._opened[site] = packed.opened(reply, sorted(self._dealt))

    def total(self) -> Vector:
        """Return the sum of the survivors' vectors, without masks.

        Raises
        ------
        RoundError
            If too few sites opened their shares, or those of a site are not of its secret.
        """
        self._check_count("opened shares", self._opened, self._least)
        assert self._total is not None
        tellers = sorted(self._opened)[: self._least]
        weights = shamir.weights_at_zero([site + 1 for site in tellers])
        total = self._total.copy()
        for owner in sorted(self._dealt):
            shares = {teller + 1: self._opened[teller][owner] for teller in tellers}
            secret = shamir.combine(shares, weights) or b""
            if owner in self._survivors:
                self._remove_own(total, owner, secret)
            else:
                self._remove_pairs(total, owner, secret)
        return total

    def _remove_own(self, total: Vector, owner: int, seed: bytes) -> None:
        """Remove the mask that a survivor drew by itself."""
        if commitment(self.attempt, owner, seed) != self._dealt[owner].commitment:
            raise self._wrong_shares(owner)
        add_mask(total, self._agreement.own_mask(seed, owner, self.received), -1)

    def _remove_pairs(self, total: Vector, owner: int, secret: bytes) -> None:
        """Remove the survivors' masks with a lost site, which nothing cancels."""
        if len(secret) != KEY_BYTES or keys.public_of(secret) != self._keys[owner].mask:
            raise self._wrong_shares(owner)
        agreement, opened = self._agreement, keys.opened(secret)
        for site in sorted(self._survivors):
            key = agreement.pair_mask(opened, self._keys[site], (owner, site), self.received)
            add_mask(total, key, -sign_of(site, owner))

    # --- Helpers ----------------------------------------------------------------------------------

    @property
    def _agreement(self) -> Agreement:
        return Agreement(self.attempt, packed.pack_key_list(self._keys))

    @property
    def _least(self) -> int:
        return threshold(len(self._keys))

    def _check_count(self, what: str, sites: Collection[int], least: int) -> None:
        if len(sites) < least:
            raise RoundError(
                f"Round {self.attempt.round}: {len(sites)} sites sent their {what}, but a masked "
                f"sum of {len(self._keys)} sites needs {least}."
            )

    def _wrong_shares(self, owner: int) -> RoundError:
        return RoundError(
            f"Round {self.attempt.round}: the shares of {self.roster.name(owner)} are not those of "
            "its secret: it, or a site that opened its share, has sent something else. The masks "
            "stay, and the round is lost."
        )
