"""The masked sums of a run: which attempts a round gets, and when it is skipped.

Before `unmask` is asked an attempt costs nothing but time, and another one with fresh keys may
follow. Once it is asked, sites that answered have given the round's one sum, and answer for no
other: if that one cannot be had, the round is skipped. `masks.json` in the run directory says which
attempt has come how far, for a server that dies between.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message

from grandrounds.config.digest import recipe_sha256
from grandrounds.config.keys import Config
from grandrounds.errors import RoundError
from grandrounds.server.directory import RunDirectory
from grandrounds.server.exchange import Exchange, OnReply, Tally
from grandrounds.server.masks.exchanges import NOT_ABOARD, Play
from grandrounds.server.masks.masked_sum import MaskedSum
from grandrounds.server.masks.ride import Ride
from grandrounds.server.masks.rosters import roster_for
from grandrounds.wire.adapter import Shapes, count_parameters
from grandrounds.wire.masks.attempt import FIRST_ATTEMPT, LEAST_COHORT, Attempt, given_up
from grandrounds.wire.masks.carried import ATTEMPT, MOST_WEIGHT, RECIPE
from grandrounds.wire.masks.fixed_point import Sum, numbers_of
from grandrounds.wire.names import SiteNames

MOST_TRIES = 3
"""Attempts at a round without a break; after them the run ends, and can be resumed."""

JOURNAL = "masks.json"


@dataclass(frozen=True)
class Asked:
    """A round's request to train, and what its sum is made of."""

    number: int
    """The round."""
    messages: Callable[[Mapping[str, int | str]], dict[int, Message]]
    """Instructions more → partition id → message with adapter and instruction."""
    learning_rate: float
    shapes: Shapes
    """The tensors of a change."""
    most_weight: int
    """Largest weight of a site."""
    least: int
    """Fewest sites whose sum the run can use."""
    following: Mapping[int, int]
    """Partition id → node, of the next round's cohort; empty in the last round."""


@dataclass
class Outcome:
    """What came of a round."""

    tally: Tally = field(default_factory=Tally)
    silent: dict[int, str] = field(default_factory=dict)
    """Survivors that did not answer to the end → why."""
    sum: Sum | None = None
    lost: str = ""
    """Why there is no sum."""
    is_burned: bool = False
    """Whether sites may have answered for the lost sum: they answer for no other."""
    attempts: int = 0
    exchanges: int = 0
    """Waits for messages, in all attempts."""
    not_aboard: dict[int, str] = field(default_factory=dict)
    """Sites of the next cohort without keys and shares for the next round → why."""

    @property
    def record(self) -> dict[str, Any]:
        """The part of a line of metrics.jsonl."""
        found = self.sum
        out: dict[str, Any] = {
            "sites": len(self.tally.good),
            "weight": found.weight if found else 0,
            "values-cut": found.clipped if found else 0,
            "attempts": self.attempts,
            "exchanges": self.exchanges,
        }
        if self.not_aboard:
            out["not-aboard"] = {str(site): why for site, why in sorted(self.not_aboard.items())}
        return {"masked-sum": out, **({"skipped": self.lost} if self.lost else {})}


@dataclass
class Masks:
    """The masked sums of a run at its server."""

    config: Config
    exchange: Exchange
    directory: RunDirectory
    ride: Ride | None = None
    """What rode on the last round, for the next one."""
    given: list[set[int]] = field(default_factory=list)
    """Cohorts of the round's attempts that failed once sites had trained for them."""

    def summed(self, asked: Asked, on_reply: OnReply, names: SiteNames) -> Outcome:
        """Let the sites of a round train and add up, in as many attempts as it takes.

        Sites that fail before their vectors are in the sum have failed; later ones are survivors.
        The next attempt goes on without those that failed, unless they are needed.
        """
        outcome, failed, told = Outcome(), dict[int, str](), set[int]()
        self.given = []

        def tell(site: int, failure: str | None) -> None:
            told.add(site)
            on_reply(site, failure)

        before = self._before(asked.number)
        for number, aboard in self._tries(asked, before):
            play = self._begin(asked, number, aboard, outcome.tally.spent, failed)
            if before is not None and before["unmask-asked"]:
                play.keep_to(before["sites"])
            try:
                tally = self._until_confirmed(asked, play, aboard is not None, tell)
            except RoundError as error:
                outcome.lost = f"{error} {Tally(failed=play.failed).reasons(names)}".rstrip()
                failed |= {p: why for p, why in play.failed.items() if why != NOT_ABOARD}
                if play.collected.received:  # the sites were asked to train
                    self.given.append(set(play.collected.listed))
            else:
                self._note(play, unmask_asked=True)
                outcome.tally.good, outcome.is_burned, outcome.lost = tally.good, True, ""
                failed |= tally.failed
                try:
                    outcome.sum = play.unmask()
                except RoundError as error:
                    outcome.lost = f"{error} {Tally(failed=play.failed).reasons(names)}".rstrip()
            finally:
                outcome.tally.spent |= play.spent
                outcome.attempts += play.waits > 0
                outcome.exchanges += play.waits
            if outcome.is_burned:
                outcome.silent = {p: why for p, why in play.failed.items() if p not in failed}
                self.ride, outcome.not_aboard = play.ride, play.ride.failed
                break
        outcome.is_burned |= before is not None and before["unmask-asked"]
        good = outcome.tally.good
        outcome.tally.failed = {site: why for site, why in failed.items() if site not in good}
        for site in outcome.tally.failed.keys() - told:
            on_reply(site, failed[site])
        return outcome

    def _until_confirmed(
        self, asked: Asked, play: Play, is_aboard: bool, on_reply: OnReply
    ) -> Tally:
        """Play an attempt as far as it can be given up without loss."""
        if is_aboard:
            play.board()
        else:
            if play.collected.attempt.number != FIRST_ATTEMPT:
                self._note(play, unmask_asked=False)
            play.agree()
        values = count_parameters(asked.shapes)
        numbers = numbers_of(
            self.config, asked.learning_rate, len(play.outgoing), values, asked.most_weight
        )
        tally = play.train(numbers, on_reply)
        play.confirm()
        return tally

    def _begin(
        self,
        asked: Asked,
        number: int,
        aboard: MaskedSum | None,
        spent: Collection[int],
        failed: Collection[int],
    ) -> Play:
        """Return an attempt, without the sites that failed unless too few would be left.

        So few also that sites refuse, since an earlier attempt could still have a sum.
        """
        instruction: dict[str, int | str] = {ATTEMPT: number, MOST_WEIGHT: asked.most_weight}
        instruction[RECIPE] = recipe_sha256(self.config)
        there = {s: m for s, m in asked.messages(instruction).items() if s not in spent}
        left = {site: message for site, message in there.items() if site not in failed}
        enough = len(left) >= max(LEAST_COHORT, asked.least) and all(
            len(cohort & left.keys()) >= given_up(len(cohort)) for cohort in self.given
        )
        roster = roster_for(self.config, self.directory.path)
        following = Attempt(self.exchange.run, asked.number + 1, FIRST_ATTEMPT, roster.digest)
        return Play(
            self.exchange,
            aboard or MaskedSum(replace(following, round=asked.number, number=number), roster),
            left if enough else there,
            asked.least,
            Ride(MaskedSum(following, roster), asked.following),
        )

    # --- Which attempts -------------------------------------------------------------------------

    def _tries(
        self, asked: Asked, before: dict[str, Any] | None
    ) -> Iterator[tuple[int, MaskedSum | None]]:
        """Yield the numbers of a round's attempts, with the sum that is aboard already, if any.

        A server that died within the round plays its last attempt again: sites give the same
        answers to the same requests, and to others none.
        """
        ride, self.ride = self.ride, None
        if before is not None:
            first = int(before["attempt"])
            tries = 1 if before["unmask-asked"] else MOST_TRIES
        else:
            first, tries = FIRST_ATTEMPT, MOST_TRIES
            if ride is not None and ride.nodes and ride.following.attempt.round == asked.number:
                yield FIRST_ATTEMPT, ride.following
                first, tries = FIRST_ATTEMPT + 1, MOST_TRIES - 1
        for number in range(first, first + tries):
            yield number, None

    def _before(self, number: int) -> dict[str, Any] | None:
        """Return how far a round has come in a process before this one; None if not at all."""
        found = self.directory.read_json(JOURNAL)
        return found if found is not None and found["round"] == number else None

    def _note(self, play: Play, *, unmask_asked: bool) -> None:
        """Write how far a round has come, before the sites are asked."""
        attempt = play.collected.attempt
        self.directory.write_json(
            JOURNAL,
            {
                "round": attempt.round,
                "attempt": attempt.number,
                "unmask-asked": unmask_asked,
                **({"sites": play.collected.listed} if unmask_asked else {}),
            },
        )
