"""The roll call: every site introduces itself, and differences are reported before training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from grandrounds.config.words import counted
from grandrounds.errors import ApprovalError, EngineError, GrandRoundsError, ReplyError
from grandrounds.server.exchange import Exchange, pause
from grandrounds.wire import messages
from grandrounds.wire.names import MOST_OF_A_TEXT, NAME, SiteNames, clean_name, names_of, one_line
from grandrounds.wire.told import BASE, COUNTS, DATA_TAG, in_custody, rounded_count

_log = logging.getLogger("grandrounds")

APPROVAL_SECONDS, LONGEST_APPROVAL_SECONDS = 15.0, 120.0
"""First wait before a site that waits for its operator's approval is asked again, and the longest;
each is twice the one before it, since a site reads few messages of a run that it refuses."""

REFRESH_SECONDS = 60.0
"""Maximum wait before a round for introductions of new or returning sites."""

SAME_IN_A_RUN = (
    *("rows", "train-examples", "held-out-examples", "truncated", "unlearnable"),
    *("base", "prompt", DATA_TAG),
)
"""Facts that must not change when a site returns or a run is resumed, where it tells them."""

COMPUTED_BEFORE = "computed-before"
"""Fact added here: how a site computed before a resume, if differently."""


@dataclass(frozen=True)
class SiteCard:
    """A site that may take part."""

    node_id: int
    """Flower's id of the node, drawn at random."""
    facts: Mapping[str, Any]
    """The introduction: partition-id, counts of rows and examples, versions, hashes."""

    @property
    def in_custody(self) -> bool:
        """Whether the site is in its own custody: it decides which figures it tells."""
        return in_custody(self.facts)

    @property
    def arithmetic(self) -> dict[str, int | str]:
        """What the bits of the site's updates depend on; it is told to keep to it."""
        return arithmetic_of(self.facts)


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
    refused: dict[int, str] = field(default_factory=dict)
    """Node → reason why it was refused at the roll call."""

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

        Raises
        ------
        EngineError
            If there are fewer than `min_sites` after `seconds`, or more nodes than sites.
        """
        least = self.min_sites or self.num_sites
        started = time.monotonic()
        while len(nodes := sorted(self._connected(grid))) < self.num_sites:
            if (waited := time.monotonic() - started) > seconds:
                break
            time.sleep(pause(waited))
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
        approval_seconds: float = 0.0,
    ) -> None:
        """Ask every node to introduce itself within `seconds`; fill `cards` and `refused`.

        Parameters
        ----------
        approval_seconds : float
            How long sites are waited for whose operator has not approved the recipe yet.

        Raises
        ------
        GrandRoundsError
            The first error of a site or of its introduction, if too few sites are left;
            `EngineError` if two sites differ in what must be the same, or a site does not reply.
        """
        least, admitted, names = self.min_sites, self.admitted(), self.admitted_names()
        cards, refused = dict[int, SiteCard](), dict[int, str]()
        for node, reply in self._answers(exchange, nodes, seconds, approval_seconds):
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
        check_same(cards)
        self.cards, self.refused = dict(sorted(cards.items())), refused

    def _answers(
        self, exchange: Exchange, nodes: Sequence[int], seconds: float, approval_seconds: float
    ) -> Iterator[tuple[int, Message]]:
        """Yield (node, reply); a site that waits for its operator's approval is asked again."""
        started, asked, pause_seconds = time.monotonic(), list(nodes), APPROVAL_SECONDS
        while asked:
            waiting = []
            for node, reply in exchange.replies(self._questions(asked, exchange), seconds, set()):
                left = approval_seconds - (time.monotonic() - started)
                if left > 0 and waits_for_approval(reply):
                    waiting.append(node)
                else:
                    yield node, reply
            if waiting:
                if pause_seconds == APPROVAL_SECONDS:
                    _log.warning(
                        "%s waiting for approval by the site's operator, for %.0f s at most",
                        counted(len(waiting), "site"),
                        approval_seconds,
                    )
                time.sleep(max(0.0, min(pause_seconds, left)))
                pause_seconds = min(2 * pause_seconds, LONGEST_APPROVAL_SECONDS)
            asked = waiting

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
        asked = sorted(n for n in connected if n not in known or known[n] in self.suspected)
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
        return refused

    def examples_of(self, partition: int) -> int:
        """Return the training examples of a site: of its admission, else of its first roll call."""
        facts = self.introduced.get(partition) or self.cards[partition].facts
        return self.admitted_examples().get(partition, int(facts["train-examples"]))

    @property
    def names(self) -> SiteNames:
        """How the sites are called."""
        known = {p: {"partition-id": p, NAME: name} for p, name in self.admitted_names().items()}
        return names_of({**known, **self.introduced, **self._facts()}.values())

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

        Sites that leave stay listed. A site's training examples remain those of its first one.
        """
        first = {p: facts["train-examples"] for p, facts in self.introduced.items()}
        now = self._facts()
        for partition in now.keys() & first.keys():
            now[partition]["train-examples"] = first[partition]
        known = self.introduced | now
        is_new = known != self.introduced
        self.introduced = dict(sorted(known.items()))
        return is_new

    def _check_still_same(self, partition: int, facts: Mapping[str, Any]) -> None:
        """Raise `EngineError` if a returning site has changed, or differs from the others."""
        before = self.introduced.get(partition, facts)
        for fact in ("version", *SAME_IN_A_RUN):
            if has_changed(fact, before, facts):
                raise EngineError(
                    f"it came back with another {fact}: {facts.get(fact)}, was {before.get(fact)}. "
                    "Restore it, or start a new run."
                )
        check_same({**self.cards, partition: SiteCard(-1, facts)})


def questions(
    nodes: Sequence[int],
    run: str,
    arithmetic: Callable[[int], Mapping[str, int | str]] = lambda _: {},
) -> dict[int, Message]:
    """Return the message that asks each node to introduce itself.

    Parameters
    ----------
    arithmetic
        Node → the arithmetic that it should keep to; empty where it may choose.
    """
    config: dict[str, int | str] = {"round": 0, messages.RUN: run}
    return {
        node: Message(
            messages.content(config={**config, **arithmetic(node)}),
            node,
            MessageType.QUERY,
            group_id="0",
        )
        for node in nodes
    }


def arithmetic_of(facts: Mapping[str, Any]) -> dict[str, int | str]:
    """Return what the bits of a site's updates depend on, from its introduction.

    Introductions of version 0.1.0 and before lack the library of products: it was the default one.
    """
    library = facts.get(messages.CPU_MATMUL, "default")
    return {messages.THREADS: int(facts[messages.THREADS]), messages.CPU_MATMUL: str(library)}


def waits_for_approval(reply: Message) -> bool:
    """Whether a site refuses only because its operator has not approved the recipe yet."""
    said = {} if reply.has_error() else messages.instruction_of(reply.content)
    return said.get("error-type") == ApprovalError.__name__


def mistaken(partition: int, node: int, admitted: Mapping[int, int]) -> str:
    """Return why a node cannot be the site that it claims to be; empty if it can."""
    own = admitted.get(partition, node)
    if own != node:
        return f"node {node} claims to be site {partition}, which was admitted as node {own}"
    for other, its_node in admitted.items():
        if its_node == node and other != partition:
            return f"node {node} claims to be site {partition}, but was admitted as site {other}"
    return ""


def introduction_of(node: int, reply: Message, num_sites: int) -> dict[str, Any]:
    """Return the facts of a site's introduction that are read, cleaned.

    Raises
    ------
    EngineError
        If it is incomplete or invalid.
    """
    told = reply.content.config_records.get(messages.CONFIG) or ConfigRecord()
    record = {name: value for name, value in told.items() if name in messages.FACTS}
    required = messages.INTRODUCTION
    if in_custody(record):
        required = messages.INTRODUCTION_IN_CUSTODY
    if missing := [fact for fact in required if fact not in record]:
        raise EngineError(
            f"The introduction of node {node} lacks {', '.join(missing)}: is another version of "
            "grandrounds installed there? Install the same one everywhere."
        )
    for name, value in record.items():
        is_short = not isinstance(value, str) or len(value) <= MOST_OF_A_TEXT
        if not isinstance(value, bool | int | float | str) or not is_short:
            raise EngineError(
                f"The introduction of node {node} is invalid: {name!r} is neither a number "
                f"nor a string of at most {MOST_OF_A_TEXT} characters."
            )
    facts = ConfigRecord(record)
    try:
        messages.whole_number(facts, "partition-id", 0, num_sites - 1)
        messages.whole_number(facts, "train-examples", 1)
        for name in (*COUNTS, messages.THREADS):
            if name in record:
                messages.whole_number(facts, name)
    except ReplyError as error:
        raise EngineError(f"The introduction of node {node} is invalid: {error}.") from error
    return {
        name: one_line(value) if isinstance(value, str) else value for name, value in record.items()
    }


def named(facts: Mapping[str, Any], admitted_names: Mapping[int, str]) -> dict[str, Any]:
    """Return an introduction under the name of the admission, else the one it gives itself."""
    name = clean_name(admitted_names.get(int(facts["partition-id"]), facts.get(NAME)))
    others = {key: value for key, value in facts.items() if key != NAME}
    return {**others, NAME: name} if name else others


def has_changed(fact: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a fact differs between two introductions of a site.

    What a real site tells in only one of them cannot be compared, and counts only rounded: in runs
    of before they are exact, and have no tag of the data.
    """
    is_told = fact in before and fact in now
    if fact == DATA_TAG:
        return is_told and bool(before[fact] != now[fact])
    if not in_custody(now) or fact not in COUNTS:
        return bool(before.get(fact) != now.get(fact))
    if not is_told:
        return False
    return rounded_count(int(before[fact])) != rounded_count(int(now[fact]))


def arithmetic_text(arithmetic: Mapping[str, int | str]) -> str:
    """Return an arithmetic in words: `2 threads, products by onednn`."""
    library = str(arithmetic[messages.CPU_MATMUL])
    by = "" if library == "default" else f", products by {library}"
    return counted(int(arithmetic[messages.THREADS]), "thread") + by


def check_same(cards: Mapping[int, SiteCard]) -> None:
    """Raise `EngineError` if sites differ in version, base or prompt."""
    for fact, meaning in (
        ("version", "version of grandrounds"),
        ("base", "base model"),
        (BASE, "base model, whose files differ"),
        ("prompt", "prompt"),
    ):
        those = {
            p: card for p, card in cards.items() if fact in card.facts
        }  # base-content: agents only
        if not those:
            continue
        first = min(those)
        expected = those[first].facts[fact]
        other = [p for p, card in those.items() if card.facts[fact] != expected]
        if other:
            names = names_of(card.facts for card in cards.values())
            raise EngineError(
                f"The sites do not have the same {meaning}: {names.with_number(first)} has "
                f"{expected}, {names.with_number(other[0])} has {cards[other[0]].facts[fact]} "
                f"({len(other)} of {len(cards)} sites differ). Use the same one at all sites."
            )
