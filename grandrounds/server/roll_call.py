"""The roll call: every site introduces itself, and differences are reported before training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from grandrounds.config.words import counted
from grandrounds.errors import EngineError, GrandRoundsError
from grandrounds.server.exchange import Exchange, pause
from grandrounds.server.introductions import (
    COMPUTED_BEFORE,
    SiteCard,
    arithmetic_of,
    arithmetic_text,
    check_agrees,
    has_changed,
    introduction_of,
    is_unreachable,
    mistaken,
    named,
    odd_ones,
    questions,
    remembered,
    waits_for_approval,
)
from grandrounds.wire import messages
from grandrounds.wire.guarantee import BUDGET_SPENT
from grandrounds.wire.names import NAME, SiteNames, names_of, one_line
from grandrounds.wire.told import SAME_IF_TOLD, SAME_IN_A_RUN

_log = logging.getLogger("grandrounds")

APPROVAL_SECONDS, LONGEST_APPROVAL_SECONDS = 15.0, 120.0
"""First wait before a site that waits for its operator's approval is asked again, and the longest;
each is twice the one before it, since a site reads few messages of a run that it refuses."""

RETURN_SECONDS = 2.0
"""Wait before a node is asked again that Flower lists as connected but cannot reach: after the
SuperLink has been restarted, until the node's next heartbeat."""

REFRESH_SECONDS = 60.0
"""Maximum wait before a round for introductions of new or returning sites."""

SETTLED_SECONDS = 3.0
"""After so long without a new node, all nodes of a simulation are there."""


def is_simulated(grid: Grid) -> bool:
    """Whether a grid is that of Flower's simulation, whose module has moved between releases."""
    return type(grid).__name__ == "InMemoryGrid"


@dataclass
class Roster:
    """The sites of a run: those that may take part, ever took part, or were refused."""

    num_sites: int
    """Sites of the run, `data.num-partitions`."""
    min_sites: int = 0
    """Minimum number of sites to start, `strategy.min-sites`; 0: all."""
    admitted: Callable[[], Mapping[int, int]] = dict
    """Returns partition id → node of the admitted sites, where the node is known."""
    admitted_names: Callable[[], Mapping[int, str]] = dict
    """Returns partition id → name in its admission, which replaces what a site calls itself."""
    admitted_examples: Callable[[], Mapping[int, int]] = dict
    """Returns partition id → number of training examples in its admission, where it has one."""
    revoked: Callable[[], Mapping[int, str]] = dict
    """Returns node → reason, for the nodes whose key was revoked: they are not called."""
    introduced: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Partition id → introduction of every site that ever took part."""
    cards: dict[int, SiteCard] = field(default_factory=dict)
    """Partition id → site, for the sites that may take part."""
    suspected: set[int] = field(default_factory=set)
    """Sites whose last reply failed."""
    spent: set[int] = field(default_factory=set)
    """Sites whose privacy budget is spent: they train no more."""
    refused: dict[int, str] = field(default_factory=dict)
    """Node → reason why it was refused at the roll call."""
    left_out: dict[int, SiteCard] = field(default_factory=dict)
    """Partition id → site, for those of these that differ from the others, or from before."""

    def open(self, exchange: Exchange, connect_timeout_seconds: float) -> None:
        """Wait for the sites and call the roll.

        The first answer may take a site longer than a visit: its processes start, and its data are
        read. It gets `connect_timeout_seconds` where that is longer than a round's.
        """
        self.admitted()  # a damaged admission is an error before the wait
        nodes = self.wait(exchange.grid, connect_timeout_seconds)
        patience = max(connect_timeout_seconds, exchange.timeout_seconds)
        self.call(exchange, nodes, patience, connect_timeout_seconds)

    def wait(self, grid: Grid, seconds: float) -> list[int]:
        """Return the ids of the connected nodes, once there is one for each site.

        Flower's simulation registers all its nodes at once: more will not come.

        Raises
        ------
        EngineError
            If there are fewer than `min_sites` after `seconds`, or more nodes than sites.
        """
        least = self.min_sites or self.num_sites
        started = grown = time.monotonic()
        count = 0
        while len(nodes := sorted(self._connected(grid))) < self.num_sites:
            now = time.monotonic()
            if len(nodes) > count:
                count, grown = len(nodes), now
            if now - started > seconds:
                break
            if count and is_simulated(grid) and now - grown > SETTLED_SECONDS:
                break
            time.sleep(pause(now - started))
        if least <= len(nodes) <= self.num_sites:
            return nodes
        fewer = f" (strategy.min-sites = {least})" if least < self.num_sites else ""
        found = (
            f"{len(nodes)} nodes are connected, but data.num-partitions = {self.num_sites}{fewer}"
        )
        advice = (
            "start their SuperNodes, wait longer (strategy.connect-timeout-seconds), or allow the "
            "run to start without some (strategy.min-sites)."
        )
        if turned_away := set(self.revoked()) & set(grid.get_node_ids()):
            found += f", beside {len(turned_away)} whose key was revoked"
        if missing := [p for p, node in self.admitted().items() if node not in nodes]:
            named = ", ".join(map(self.names.with_number, missing))
            raise EngineError(f"{found}. Missing: {named}; {advice}")
        raise EngineError(
            f"{found}. With flwr run, add --federation-config 'num-supernodes={self.num_sites}', "
            f"or set data.num-partitions = {len(nodes)}. Real sites: {advice}"
        )

    def _connected(self, grid: Grid) -> set[int]:
        """Return the connected nodes, without those whose key was revoked."""
        return set(grid.get_node_ids()) - set(self.revoked())

    def call(
        self,
        exchange: Exchange,
        nodes: Sequence[int],
        seconds: float,
        absence_seconds: float = 0.0,
    ) -> None:
        """Ask every node to introduce itself within `seconds`; fill `cards` and `refused`.

        Parameters
        ----------
        absence_seconds : float
            How long sites are waited for that Flower cannot reach, or whose operator has not
            approved the recipe yet.

        Raises
        ------
        GrandRoundsError
            The first error of a site or of its introduction, if too few sites are left;
            `EngineError` if sites differ in what must be the same and the run needs them all, or no
            majority decides, or a site does not reply.
        """
        least, admitted, names = self.min_sites, self.admitted(), self.admitted_names()
        cards, refused = dict[int, SiteCard](), dict[int, str]()
        for node, reply in self._answers(exchange, nodes, seconds, absence_seconds):
            try:
                messages.raise_failure(reply)
                facts = introduction_of(node, reply, self.num_sites)
                partition = facts["partition-id"]
                if objection := mistaken(partition, node, admitted):
                    raise EngineError(f"{objection[0].upper()}{objection[1:]}.")
                if partition in cards:
                    raise EngineError(
                        f"Two nodes claim to be site {partition}; each needs its own partition-id."
                    )
            except GrandRoundsError as error:
                refused[node] = one_line(str(error))
                if not least or len(nodes) - len(refused) < least:
                    raise
                continue
            cards[partition] = SiteCard(node, named(facts, names))
        silent = set(nodes) - refused.keys() - {card.node_id for card in cards.values()}
        if silent and not (least and len(cards) >= least):
            raise EngineError(
                f"{len(silent)} of {len(nodes)} nodes did not answer the roll call within "
                f"{seconds:g} s: {sorted(silent)[:5]}. Check their logs, then start again."
            )
        refused |= dict.fromkeys(silent, f"no answer within {seconds:g} s")
        self.cards, self.refused, self.left_out = dict(sorted(cards.items())), refused, {}
        odd = odd_ones(self.cards)
        if odd and not self.leave_out(odd):
            told = "; ".join(f"{self.names.with_number(p)}: {how}" for p, how in odd.items())
            raise EngineError(
                f"The sites are not the same. {told}. Use the same one at all sites, or let the "
                f"run start without (strategy.min-sites = {len(cards) - len(odd)})."
            )

    def leave_out(self, odd: Mapping[int, str]) -> bool:
        """Refuse sites, each for its reason, if `min_sites` are left; return whether they are."""
        if not self.min_sites or len(self.cards) - len(odd) < self.min_sites:
            return False
        for partition, why in odd.items():
            card = self.left_out[partition] = self.cards.pop(partition)
            self.refused[card.node_id] = why
        return True

    def refusals(self) -> dict[str, str]:
        """Return who was refused at the roll call, `site 3` or else `node 7`, and why."""
        who = {card.node_id: f"site {partition}" for partition, card in self.left_out.items()}
        return {who.get(node, f"node {node}"): why for node, why in self.refused.items()}

    def _answers(
        self, exchange: Exchange, nodes: Sequence[int], seconds: float, absence_seconds: float
    ) -> Iterator[tuple[int, Message]]:
        """Yield (node, reply); sites that are absent or wait for approval are asked again."""
        started, asked, approval_pause = time.monotonic(), list(nodes), APPROVAL_SECONDS

        def left() -> float:
            return absence_seconds - (time.monotonic() - started)

        while asked:
            silent, postponed = set(asked), dict[int, Message]()
            for node, reply in exchange.replies(self._questions(asked, exchange), seconds, set()):
                silent.discard(node)
                if waits_for_approval(reply) or is_unreachable(reply):
                    postponed[node] = reply
                else:
                    yield node, reply
            if left() <= 0:
                yield from postponed.items()
                return
            asked = sorted(silent | postponed.keys())
            if waiting := sum(map(waits_for_approval, postponed.values())):
                if approval_pause == APPROVAL_SECONDS:
                    _log.warning(
                        "%s waiting for approval by the site's operator, for %.0f s at most",
                        counted(waiting, "site"),
                        absence_seconds,
                    )
                time.sleep(min(approval_pause, max(0.0, left())))
                approval_pause = min(2 * approval_pause, LONGEST_APPROVAL_SECONDS)
            elif asked:
                time.sleep(min(RETURN_SECONDS, max(0.0, left())))

    def refresh(self, exchange: Exchange) -> dict[int, str]:
        """Ask new sites and those whose last reply failed for an introduction; update `cards`.

        A site that has changed loses its card.

        Returns
        -------
        dict
            Partition id, or -1 if unknown → reason why the site cannot take part.
        """
        cards, admitted, names = self.cards, self.admitted(), self.admitted_names()
        known = {card.node_id: partition for partition, card in cards.items()}
        connected = self._connected(exchange.grid)
        revoked = self.revoked()
        refused = {p: revoked[node] for node, p in known.items() if node in revoked}
        for partition in refused:
            del cards[partition]
        doubtful = self.suspected - self.spent
        asked = sorted(n for n in connected if n not in known or known[n] in doubtful)
        seconds = min(exchange.timeout_seconds, REFRESH_SECONDS)
        for node, reply in exchange.replies(self._questions(asked, exchange), seconds, set()):
            partition = known.get(node, -1)
            try:
                messages.raise_failure(reply)
            except GrandRoundsError as error:  # it may reply to the next message
                refused[partition] = one_line(str(error))
                continue
            try:
                facts = introduction_of(node, reply, self.num_sites)
                partition = int(facts["partition-id"])
                if objection := mistaken(partition, node, admitted):
                    refused[-1] = objection
                    continue
                holder = cards[partition].node_id if partition in cards else node
                if holder != node and holder in connected:
                    refused[-1] = (
                        f"node {node} claims to be site {partition}, but so does node {holder}, "
                        "which is connected; each needs its own partition-id"
                    )
                    continue
                self._check_still_same(partition, facts)
            except GrandRoundsError as error:
                refused[partition] = one_line(str(error))
                cards.pop(partition, None)
                continue
            cards[partition] = SiteCard(node, named(facts, names))
            self.left_out.pop(partition, None)
        return refused

    def examples(self) -> dict[int, int]:
        """Return partition id → training examples, of its admission or else its first roll call."""
        admitted = self.admitted_examples()
        facts = {p: self.introduced.get(p) or card.facts for p, card in self.cards.items()}
        return {p: admitted.get(p, int(told["train-examples"])) for p, told in facts.items()}

    def held_out_of(self, partition: int) -> int:
        """Return the held-out examples that a site introduced, else its training examples."""
        facts = self.introduced.get(partition) or self.cards[partition].facts
        return int(facts.get("held-out-examples", facts["train-examples"]))

    @property
    def names(self) -> SiteNames:
        """How the sites are called."""
        left_out = {p: card.facts for p, card in self.left_out.items()}
        known = {p: {"partition-id": p, NAME: name} for p, name in self.admitted_names().items()}
        return names_of({**left_out, **known, **self.introduced, **self._facts()}.values())

    def _questions(self, nodes: Sequence[int], exchange: Exchange) -> dict[int, Message]:
        """Return the question to each node, with the arithmetic of its last introduction.

        Where it is not known which site a node is, it gets the arithmetic that all sites share.
        """
        partition_of = {node: p for p, node in self.admitted().items()}
        partition_of |= {card.node_id: p for p, card in self.cards.items()}
        recorded = {p: arithmetic_of(facts) for p, facts in self.introduced.items()}
        distinct = [dict(pairs) for pairs in {tuple(a.items()) for a in recorded.values()}]
        shared = distinct[0] if len(distinct) == 1 else {}
        return questions(
            nodes, exchange.run, lambda node: recorded.get(partition_of.get(node, -1), shared)
        )

    def note_arithmetic(self) -> None:
        """Note at each site that computes differently than before the resume; see sites.json."""
        for partition, card in self.cards.items():
            before = self.introduced.get(partition, card.facts)
            if (was := arithmetic_of(before)) != card.arithmetic:
                noted = {**card.facts, COMPUTED_BEFORE: arithmetic_text(was)}
                self.cards[partition] = replace(card, facts=noted)

    def _facts(self) -> dict[int, dict[str, Any]]:
        return {p: dict(card.facts) for p, card in self.cards.items()}

    def note_introductions(self) -> bool:
        """Merge the introductions of `cards` into `introduced`; return whether any is new.

        Sites that leave stay listed. A site's training examples remain those of its first one, and
        its ε is the largest that it told.
        """
        now = self._facts()
        for partition, facts in self.introduced.items():
            if partition in now:
                now[partition] |= remembered(facts, now[partition])
        for partition in self.spent & now.keys():
            now[partition][BUDGET_SPENT] = True
        known = self.introduced | now
        is_new = known != self.introduced
        self.introduced = dict(sorted(known.items()))
        return is_new

    def _check_still_same(self, partition: int, facts: Mapping[str, Any]) -> None:
        """Raise `EngineError` if a returning site has changed, or differs from the others."""
        before = self.introduced.get(partition, facts)
        for fact in ("version", *SAME_IN_A_RUN, *SAME_IF_TOLD):
            if has_changed(fact, before, facts):
                raise EngineError(
                    f"it came back with another {fact}: {facts.get(fact)}, was {before.get(fact)}. "
                    "Restore it, or start a new run."
                )
        check_agrees(facts, {p: card for p, card in self.cards.items() if p != partition})
