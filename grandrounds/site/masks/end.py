"""A site's answers in the five exchanges of a masked sum, each step checked by the site itself.

The server is not trusted: it may send anything, to each site something else, in any order, and be
in league with less than a third of a cohort. As long as these checks hold, what it learns of honest
sites is the sum of their updates, over one set of survivors in each round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from grandrounds.errors import PolicyError
from grandrounds.site.masks.held import Held, Store
from grandrounds.wire.masks import keys, packed, shamir
from grandrounds.wire.masks.agreement import Agreement, commitment, keys_text, sign_of
from grandrounds.wire.masks.attempt import (
    CONFIRM,
    EXCHANGES,
    KEYS,
    LEAST_COHORT,
    MASKED,
    MOST_ATTEMPTS,
    SHARES,
    UNMASK,
    Attempt,
    given_up,
    threshold,
)
from grandrounds.wire.masks.packed import SignedKeys
from grandrounds.wire.masks.prg import Vector, add_mask
from grandrounds.wire.masks.roster import Roster


@dataclass(frozen=True)
class SiteEnd:
    """A site in masked sums."""

    site: int
    """Its partition id."""
    identity: keys.Identity
    """Its agent key."""
    roster: Roster
    """The roster that its operator has accepted."""
    min_cohort: int
    """Fewest sites in a sum."""
    store: Store

    def attempt(self, run: str, round_number: int, number: int) -> Attempt:
        """Return an attempt under this site's roster.

        Raises
        ------
        PolicyError
            If the site is not in it, with the key that it has, or there can be no such attempt.
        """
        own = self.roster.members.get(self.site)
        mine = keys.public_bytes(self.identity.public_key())
        if own is None or keys.public_bytes(own.key) != mine:
            raise PolicyError(
                f"The roster that this site has accepted (serial {self.roster.serial}) does not "
                f"list its agent key as site {self.site}: ask the consortium for a new one, and "
                "accept it with grandrounds site accept-roster."
            )
        if round_number < 1 or not 0 <= number < MOST_ATTEMPTS:
            raise PolicyError(
                f"Attempt {number} at round {round_number} is not possible: rounds are counted "
                f"from 1, attempts from 0, and after {MOST_ATTEMPTS} of them a round is skipped."
            )
        return Attempt(run, round_number, number, self.roster.digest)

    # --- The five exchanges -----------------------------------------------------------------------

    def keys(self, attempt: Attempt) -> bytes:
        """Answer `keys`: fresh public keys, signed.

        Raises
        ------
        PolicyError
            If the store takes no such attempt.
        """
        if (known := self.store.read(attempt)) is not None:
            return known.said[KEYS]
        box, mask, seed = (keys.new_secret() for _ in range(3))
        publics = keys.public_of(box), keys.public_of(mask)
        signature = keys.sign(self.identity, keys_text(attempt, self.site, *publics))
        reply = SignedKeys(*publics, signature).packed()
        held = Held(attempt, KEYS, box, mask, seed, said={KEYS: reply}, asked={KEYS: b""})
        self.store.begin(held)
        return reply

    def shares(self, attempt: Attempt, request: bytes) -> bytes:
        """Answer `shares`: for each other site a box with shares of this site's two secrets.

        Raises
        ------
        ReplyError, PolicyError
            If the list of keys is malformed, too short, lacks this site's own keys, has keys that
            a site of the roster did not sign for this attempt, or lacks so many sites of an earlier
            attempt that they could still give its sum.
        """
        held, answered = self._at(attempt, SHARES, request)
        if answered is not None:
            return answered
        listed = packed.key_list(request)
        self._check_count("list of keys", listed, LEAST_COHORT)
        self._check_keys(held, listed)
        self._check_given_up(held, listed)
        agreement = Agreement(attempt, request)
        points, least = [site + 1 for site in listed], threshold(len(listed))
        seeds = shamir.split(held.seed, least, points)
        masks = shamir.split(held.mask_secret, least, points)
        shares = {site: a + b for site, a, b in zip(listed, seeds, masks, strict=True)}
        secret = keys.opened(held.box_secret)
        boxes = {
            other: keys.seal(
                agreement.box_key(secret, listed[other], self.site, other),
                content,
                agreement.box_text(self.site, other),
            )
            for other, content in shares.items()
            if other != self.site
        }
        reply = packed.Dealt(commitment(attempt, self.site, held.seed), boxes).packed()
        own = {self.site: shares[self.site]}
        self._said(held, SHARES, request, reply, key_list=request, shares=own)
        return reply

    def received(self, attempt: Attempt, request: bytes, received: bytes) -> bytes | None:
        """Check a request for `masked` before the site trains for it.

        Parameters
        ----------
        request : bytes
            The boxes of the other sites.
        received : bytes
            Hash of the adapter and of the instruction, those parts that every site receives alike.

        Returns
        -------
        bytes, optional
            The masked vector, if the same request was answered before.

        Raises
        ------
        ReplyError, PolicyError
            If the boxes are malformed, too few, from sites without keys, or do not open.
        """
        held, answered = self._at(attempt, MASKED, request + received)
        if answered is None:
            self._opened(held, request)
        return answered

    def masked(self, attempt: Attempt, request: bytes, received: bytes, vector: Vector) -> bytes:
        """Answer `masked`: the site's vector, masked in place.

        Parameters
        ----------
        request, received
            As in `received`.
        vector
            Fixed-point numbers (`FixedPoint.encode`).
        """
        held, answered = self._at(attempt, MASKED, request + received)
        if answered is not None:
            return answered
        shares = self._opened(held, request)
        linked = tuple(sorted(shares))
        agreement, listed = Agreement(attempt, held.key_list), packed.key_list(held.key_list)
        secret = keys.opened(held.mask_secret)
        add_mask(vector, agreement.own_mask(held.seed, self.site, received), 1)
        for other in linked:
            if other != self.site:
                pair = (self.site, other)
                key = agreement.pair_mask(secret, listed[other], pair, received)
                add_mask(vector, key, sign_of(*pair))
        reply = vector.tobytes()
        after = replace(held, box_secret=b"", mask_secret=b"", seed=b"")
        self._said(
            after,
            MASKED,
            request + received,
            reply,
            shares=shares,
            linked=linked,
            received=received,
        )
        return reply

    def confirm(self, attempt: Attempt, request: bytes) -> bytes:
        """Answer `confirm`: this site's signature over the survivors.

        Raises
        ------
        ReplyError, PolicyError
            If the survivors are malformed, too few, strangers, or without this site.
        """
        held, answered = self._at(attempt, CONFIRM, request)
        if answered is not None:
            return answered
        survivors = packed.sites(request)
        self._check_count("set of survivors", survivors, self._least(held))
        if strangers := sorted(set(survivors) - set(held.linked)):
            raise PolicyError(
                f"The survivors include {self.roster.name(strangers[0])}, whose shares this site "
                "does not have."
            )
        if self.site not in survivors:
            raise PolicyError("The survivors do not include this site, which has sent its vector.")
        text = Agreement(attempt, held.key_list).survivors_text(
            held.received, held.linked, survivors
        )
        reply = keys.sign(self.identity, text)
        self._said(held, CONFIRM, request, reply, survivors=survivors)
        return reply

    def unmask(self, attempt: Attempt, request: bytes) -> bytes:
        """Answer `unmask`: a share of each survivor's seed, and of each lost site's masks.

        Never both of one site. The survivors are on disk as the round's one sum before this
        returns.

        Raises
        ------
        ReplyError, PolicyError
            If fewer than the threshold have signed these survivors, or somebody else has.
        """
        held, answered = self._at(attempt, UNMASK, request)
        if answered is not None:
            return answered
        signed = packed.signatures(request)
        least = threshold(len(packed.key_list(held.key_list)))
        if len(signed) < least:
            raise PolicyError(
                f"Only {len(signed)} sites have signed the survivors; this site needs {least}."
            )
        text = Agreement(attempt, held.key_list).survivors_text(
            held.received, held.linked, held.survivors
        )
        for site, signature in signed.items():
            if site not in held.survivors:
                raise PolicyError(f"{self.roster.name(site)} has signed, but is no survivor.")
            if not keys.is_signed(self.roster.members[site].key, text, signature):
                raise PolicyError(
                    f"{self.roster.name(site)} has not signed the survivors that this site has, "
                    "for the adapter and instruction that it has trained with."
                )
        cut = shamir.SHARE_BYTES
        reply = b"".join(
            share[:cut] if site in held.survivors else share[cut:]
            for site, share in sorted(held.shares.items())
        )
        self._said(held, UNMASK, request, reply, shares={})
        return reply

    def cohort(self, attempt: Attempt) -> int:
        """Return the number of sites in the list of keys of an attempt.

        Raises
        ------
        PolicyError
            If the site has not received it.
        """
        held = self.store.read(attempt)
        if held is None or not held.key_list:
            raise PolicyError("This site has no list of keys for this attempt.")
        return len(packed.key_list(held.key_list))

    # --- Checks -----------------------------------------------------------------------------------

    def _at(self, attempt: Attempt, exchange: str, request: bytes) -> tuple[Held, bytes | None]:
        """Return what is held of an attempt, and the reply that this request got before, if any.

        Raises
        ------
        PolicyError
            If the exchange is not the next one, or was answered for another request.
        """
        held = self.store.read(attempt)
        if held is None:
            raise PolicyError(
                f"This site has no keys for attempt {attempt.number} at round {attempt.round} of "
                "this run: begin with another attempt."
            )
        if exchange in held.asked:
            if held.asked[exchange] != hashlib.sha256(request).digest():
                raise PolicyError(
                    f"This site has answered the exchange {exchange!r} of this attempt for another "
                    "request, and answers it once only."
                )
            kept = self.store.vector(attempt) if exchange == MASKED else held.said[exchange]
            if kept is None:
                raise PolicyError("The masked vector of this attempt is no longer kept here.")
            return held, kept
        following = EXCHANGES[EXCHANGES.index(held.stage) + 1]
        if exchange != following:
            raise PolicyError(
                f"The exchange {exchange!r} does not follow {held.stage!r}: this site expects "
                f"{following!r}."
            )
        return held, None

    def _said(
        self, held: Held, exchange: str, request: bytes, reply: bytes, **learned: object
    ) -> None:
        """Keep the answer to an exchange, and what the site learned in it."""
        asked = {**held.asked, exchange: hashlib.sha256(request).digest()}
        vector = reply if exchange == MASKED else b""
        said = {**held.said, exchange: b"" if vector else reply}
        after = replace(held, stage=exchange, asked=asked, said=said, **learned)  # type: ignore[arg-type]
        self.store.replace(after, held.stage, vector)

    def _least(self, held: Held) -> int:
        """Return the fewest sites in every later set of an attempt."""
        return max(threshold(len(packed.key_list(held.key_list))), self.min_cohort)

    def _check_count(self, what: str, sites: Collection[int], least: int) -> None:
        least = max(least, self.min_cohort)
        if len(sites) < least:
            raise PolicyError(
                f"The {what} has {len(sites)} sites; this site takes part in sums of at least "
                f"{least} (min-cohort {self.min_cohort}, and more than two thirds of the cohort)."
            )

    def _check_keys(self, held: Held, listed: dict[int, SignedKeys]) -> None:
        """Raise `PolicyError` unless the listed keys are of this attempt, and of this roster."""
        own = listed.get(self.site)
        if own is None or own.packed() != held.said[KEYS]:
            raise PolicyError("The list of keys does not have the keys that this site has sent.")
        publics = [one for keys_of in listed.values() for one in (keys_of.box, keys_of.mask)]
        if len(set(publics)) < len(publics):
            raise PolicyError("The list of keys has the same key twice.")
        for site, one in listed.items():
            if site not in self.roster.members:
                raise PolicyError(f"Site {site} is not in the roster that this site has accepted.")
            text = keys_text(held.attempt, site, one.box, one.mask)
            if not keys.is_signed(self.roster.members[site].key, text, one.signature):
                raise PolicyError(
                    f"The keys of {self.roster.name(site)} are not signed by its agent key for "
                    "this attempt."
                )

    def _check_given_up(self, held: Held, listed: Collection[int]) -> None:
        """Raise `PolicyError` if an earlier attempt with this site's vector may still have a sum.

        Otherwise a server could let one part of a cohort open the sum of an attempt, and the rest
        that of another one: two sums of one round with the same update.
        """
        for cohort in held.earlier:
            gone_on = len(set(cohort) & set(listed))
            if gone_on < (least := given_up(len(cohort))):
                raise PolicyError(
                    f"This site has sent its vector in an earlier attempt at round "
                    f"{held.attempt.round}, of {len(cohort)} sites, of which the list of keys has "
                    f"{gone_on}: with fewer than {least} of them the earlier sum could still be "
                    "had, and this would be a second one."
                )

    def _opened(self, held: Held, request: bytes) -> dict[int, bytes]:
        """Return sender → its shares for this site, this site's own among them."""
        boxes = packed.boxes(request)
        listed = packed.key_list(held.key_list)
        self._check_senders(held, sorted(boxes), listed)
        agreement = Agreement(held.attempt, held.key_list)
        shares, secret = dict(held.shares), keys.opened(held.box_secret)
        for sender, box in boxes.items():
            key = agreement.box_key(secret, listed[sender], sender, self.site)
            content = keys.unseal(key, box, agreement.box_text(sender, self.site))
            if content is None:
                raise PolicyError(
                    f"The box of {self.roster.name(sender)} does not open: it is not what that "
                    "site has sealed for this one."
                )
            shares[sender] = content
        return shares

    def _check_senders(
        self, held: Held, senders: Sequence[int], listed: dict[int, SignedKeys]
    ) -> None:
        if strangers := [site for site in senders if site == self.site or site not in listed]:
            raise PolicyError(
                f"There is a box of {self.roster.name(strangers[0])}, which is this site or not in "
                "the list of keys."
            )
        self._check_count("set of boxes", [*senders, self.site], self._least(held))
