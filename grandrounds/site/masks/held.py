"""What a site holds of an attempt between its exchanges, and where it is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from flwr.app import ConfigRecord, RecordDict

from grandrounds.errors import PolicyError
from grandrounds.wire.masks import packed
from grandrounds.wire.masks.attempt import MASKED, UNMASK, Attempt

_NAME = "grandrounds-masks"
"""Record of a node's state."""

NO_ATTEMPT = -1
"""Before the first attempt at a round."""

_TEXTS = ("box_secret", "mask_secret", "seed", "key_list", "received")


@dataclass(frozen=True)
class Held:
    """One attempt at a site. Secrets are erased as soon as nothing needs them any more."""

    attempt: Attempt
    stage: str
    """The last exchange that was answered."""
    box_secret: bytes = b""
    mask_secret: bytes = b""
    seed: bytes = b""
    """Until the vector is masked."""
    key_list: bytes = b""
    """As received."""
    shares: Mapping[int, bytes] = field(default_factory=dict)
    """Sender → its shares for this site, of its seed and its masks' secret; until `unmask`."""
    linked: tuple[int, ...] = ()
    """Sites whose boxes this site has, and itself."""
    received: bytes = b""
    """Hash of the adapter and the instruction that it trained with."""
    survivors: tuple[int, ...] = ()
    earlier: tuple[tuple[int, ...], ...] = ()
    """Cohorts of the earlier attempts at this round for which this site has sent its vector."""
    asked: Mapping[str, bytes] = field(default_factory=dict)
    """Exchange → SHA-256 of its request."""
    said: Mapping[str, bytes] = field(default_factory=dict)
    """Exchange → reply; that of `masked` is kept by the store."""

    def packed(self) -> bytes:
        """Return it as JSON."""
        plain = dataclasses.asdict(self)
        return json.dumps(plain, default=bytes.hex).encode()


def held_of(data: bytes) -> Held:
    """Return what `Held.packed` has written."""
    found = json.loads(data)
    whole: dict[str, Any] = {"stage": found["stage"]}
    whole |= {name: bytes.fromhex(found[name]) for name in _TEXTS}
    whole |= {name: tuple(found[name]) for name in ("linked", "survivors")}
    # attempts of an earlier version do not say
    whole["earlier"] = tuple(tuple(cohort) for cohort in found.get("earlier", ()))
    whole["shares"] = {int(site): bytes.fromhex(share) for site, share in found["shares"].items()}
    for name in ("asked", "said"):
        whole[name] = {exchange: bytes.fromhex(text) for exchange, text in found[name].items()}
    roster = bytes.fromhex(found["attempt"]["roster"])
    return Held(Attempt(**{**found["attempt"], "roster": roster}), **whole)


@dataclass(frozen=True)
class Kept:
    """How far a run's attempts have come at a site: they only go on.

    Two rounds are open at a time: the keys of the next one ride on the exchanges of the last.
    """

    roster: bytes
    """SHA-256 of the roster that the run began with."""
    round: int
    number: int
    """The newest attempt of the newest round."""
    summed: int = 0
    """The last round of which this site has answered `unmask`; 0: none."""
    before: int = NO_ATTEMPT
    """The newest attempt at the round before."""

    def packed(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(dataclasses.asdict(self), default=bytes.hex).encode()

    def newest(self, round_number: int) -> int:
        """Return the newest attempt at one of the two open rounds, or at one not begun."""
        if round_number == self.round - 1:
            return self.before
        return self.number if round_number == self.round else NO_ATTEMPT


def kept_of(data: bytes) -> Kept:
    """Return what `Kept.packed` has written."""
    found = json.loads(data)
    return Kept(**{**found, "roster": bytes.fromhex(found["roster"])})


def begun(kept: Kept | None, attempt: Attempt) -> Kept:
    """Return how far a run has come with a new attempt.

    Raises
    ------
    PolicyError
        If the run began with another roster, the attempt is not newer than the last one at its
        round, the round is older than the two open ones, or its sum was answered.
    """
    if kept is None:
        return Kept(attempt.roster, attempt.round, attempt.number)
    if kept.roster != attempt.roster:
        raise PolicyError(
            "The roster has changed since this run began, and a run keeps to its first one: start "
            "a new run."
        )
    if attempt.round <= kept.summed:
        raise PolicyError(
            f"This site has answered for one sum of round {attempt.round}, or forgotten the run "
            "since it began, and answers for no other: skip the round."
        )
    if attempt.round < kept.round - 1 or attempt.number <= kept.newest(attempt.round):
        raise PolicyError(
            f"Attempt {attempt.number} at round {attempt.round} is over: this site was asked for "
            f"attempt {kept.number} at round {kept.round} since."
        )
    if attempt.round < kept.round:
        return replace(kept, before=attempt.number)
    before = kept.before if attempt.round == kept.round else kept.newest(attempt.round - 1)
    return replace(kept, round=attempt.round, number=attempt.number, before=before)


def summed(kept: Kept | None, attempt: Attempt) -> Kept:
    """Return how far a run has come with a round's one sum.

    Raises
    ------
    PolicyError
        If the attempt is not the newest one at its round, or the sum of this round or of a later
        one was answered.
    """
    if kept is None or attempt.number != kept.newest(attempt.round):
        raise PolicyError("This attempt is over: a later one has begun.")
    if attempt.round <= kept.summed:
        raise PolicyError(f"This site has answered for a sum of round {kept.summed} already.")
    return replace(kept, summed=attempt.round)


def is_over(held: Held, attempt: Attempt) -> bool:
    """Whether nothing more is kept of an attempt once another one begins.

    What a server that lost its last state asks for again is kept: the round before, and the one
    before that if its sum was answered, since the next round's keys come before this round's sum.
    """
    behind = attempt.round - held.attempt.round
    return behind == 0 or behind > (2 if held.stage == UNMASK else 1)


def with_earlier(held: Held, before: Iterable[Held]) -> Held:
    """Return a new attempt that knows in which ones before, at its round, the vector was sent."""
    cohorts = list(held.earlier)
    for one in before:
        if one.attempt.round == held.attempt.round:
            sent = [tuple(packed.key_list(one.key_list))] if MASKED in one.asked else []
            cohorts += [*one.earlier, *sent]
    return replace(held, earlier=tuple(cohorts))


class Store(Protocol):
    """Where a site keeps its attempts: everything is on disk before an answer leaves."""

    def begin(self, held: Held) -> None:
        """Keep a new attempt, if `begun` allows it; those that are over are erased."""

    def read(self, attempt: Attempt) -> Held | None:
        """Return an attempt; None if there is none under this roster."""

    def replace(self, held: Held, before: str, vector: bytes = b"") -> None:
        """Replace what is kept of an attempt, if `summed` allows it where its stage is `unmask`.

        Parameters
        ----------
        before : str
            Its stage until now.
        vector : bytes
            The reply of `masked`.

        Raises
        ------
        PolicyError
            If its stage is another one by now.
        """

    def vector(self, attempt: Attempt) -> bytes | None:
        """Return an attempt's masked vector; None if it is not kept."""


class RehearsalStore:
    """Keeps attempts in the state that Flower keeps for a node; of no use against anybody.

    Masked vectors are not kept, for their size.
    """

    def __init__(self, state: RecordDict) -> None:
        if _NAME not in state:
            state[_NAME] = ConfigRecord()
        self._record = state.config_records[_NAME]

    def begin(self, held: Held) -> None:
        """Keep a new attempt."""
        self._keep(begun(self._kept(held.attempt), held.attempt), held)
        names = [name for name in self._record if name.startswith(f"{held.attempt.run}/")]
        before = {name: held_of(self._bytes(name)) for name in names}
        for name, one in before.items():
            if is_over(one, held.attempt):
                del self._record[name]
        self._record[_place(held.attempt)] = with_earlier(held, before.values()).packed()

    def read(self, attempt: Attempt) -> Held | None:
        """Return an attempt."""
        place = _place(attempt)
        held = held_of(self._bytes(place)) if place in self._record else None
        return held if held and held.attempt == attempt else None

    def replace(self, held: Held, before: str, vector: bytes = b"") -> None:
        """Replace what is kept of an attempt."""
        known = self.read(held.attempt)
        if known is None or known.stage != before:
            raise PolicyError(f"This attempt is not at the exchange {before!r} any more.")
        if held.stage == UNMASK:
            self._keep(summed(self._kept(held.attempt), held.attempt), held)
        self._record[_place(held.attempt)] = held.packed()

    def vector(self, attempt: Attempt) -> bytes | None:
        """Return None."""
        return None

    def _kept(self, attempt: Attempt) -> Kept | None:
        return kept_of(self._bytes(attempt.run)) if attempt.run in self._record else None

    def _keep(self, kept: Kept, held: Held) -> None:
        self._record[held.attempt.run] = kept.packed()

    def _bytes(self, name: str) -> bytes:
        found = self._record[name]
        assert isinstance(found, bytes)
        return found


def _place(attempt: Attempt) -> str:
    return f"{attempt.run}/{attempt.round}/{attempt.number}"
