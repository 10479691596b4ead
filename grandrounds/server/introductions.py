"""What a site says of itself at the roll call, and how two introductions are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType

from grandrounds.config.words import counted
from grandrounds.errors import ApprovalError, EngineError, ReplyError
from grandrounds.wire import guarantee, messages
from grandrounds.wire.names import MOST_OF_A_TEXT, NAME, clean_name, names_of, one_line
from grandrounds.wire.told import (
    BASE,
    COUNTS,
    DATA_TAG,
    OF_TEXTS,
    SAME_IF_TOLD,
    TRUNCATED,
    in_custody,
    rounded_count,
)

NODE_UNAVAILABLE = 5
"""Flower's error code where a node's heartbeat is missing."""

MUST_AGREE = (
    ("version", "version of grandrounds"),
    ("base", "base model"),
    (BASE, "base model, whose files differ,"),  # sites in their own custody only
    ("prompt", "prompt"),
)
"""Facts that must be the same at all sites, and what they are."""

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


def is_unreachable(reply: Message) -> bool:
    """Whether Flower replies in place of a node that it has not heard of for too long."""
    return reply.has_error() and reply.error.code == NODE_UNAVAILABLE


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
        for name in guarantee.NUMBERS:
            if name in record:
                messages.real_number(facts, name, 0.0, messages.MANY)
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


def remembered(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a site's earlier introduction is kept beside a later one."""
    kept = {
        name: before[name]
        for name in ("train-examples", guarantee.BUDGET_SPENT, guarantee.EPSILON_FELL)
        if name in before
    }
    most = before.get(guarantee.EPSILON)
    told = now.get(guarantee.EPSILON, most)
    if most is not None and told is not None:
        kept[guarantee.EPSILON] = max(most, told)
        if told < most * (1 - EPSILON_TOLERANCE):
            kept[guarantee.EPSILON_FELL] = told
    return kept


EPSILON_TOLERANCE = 1e-6
"""Relative difference of two ε that are the same, computed by two processes."""


def has_changed(fact: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a fact differs between two introductions of a site.

    What a real site tells in only one of them cannot be compared, and counts only rounded: in runs
    of before they are exact, and have no tag of the data. Nor can a tag of texts and one of tokens,
    and a site with such a tag does not know its truncated answers.
    """
    is_told = fact in before and fact in now
    if fact == DATA_TAG and is_told:
        of_texts = [str(facts[fact]).startswith(OF_TEXTS) for facts in (before, now)]
        return of_texts[0] == of_texts[1] and bool(before[fact] != now[fact])
    if fact in (DATA_TAG, *SAME_IF_TOLD):
        return is_told and bool(before[fact] != now[fact])
    if fact == TRUNCATED and not is_told:
        return False
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


def odd_ones(cards: Mapping[int, SiteCard]) -> dict[int, str]:
    """Return the sites that differ from the majority in version, base or prompt, each with how.

    The server has no base and no tokenizer of its own to compare with.

    Raises
    ------
    EngineError
        If no more than half of the sites are the same; all groups are named.
    """
    odd: dict[int, str] = {}
    names = names_of(card.facts for card in cards.values())
    for fact, meaning in MUST_AGREE:
        groups: dict[str, list[int]] = {}
        for site, card in cards.items():
            if fact in card.facts and site not in odd:
                groups.setdefault(one_line(str(card.facts[fact]), 100), []).append(site)
        count = sum(map(len, groups.values()))
        value, most = max(groups.items(), key=lambda group: len(group[1]), default=("", []))
        if groups and 2 * len(most) <= count:
            told = "; ".join(
                f"{told} at {', '.join(map(names.with_number, sites))}"
                for told, sites in groups.items()
            )
            raise EngineError(
                f"The sites do not have the same {meaning}, and no majority decides: {told}. Use "
                "the same one at all sites."
            )
        for told, sites in groups.items():
            how = f"its {meaning} is {told}, that of {len(most)} of {count} sites {value}"
            odd |= dict.fromkeys(sites, how) if told != value else {}
    return odd


def check_agrees(facts: Mapping[str, Any], cards: Mapping[int, SiteCard]) -> None:
    """Raise `EngineError` if a site differs in version, base or prompt from the others."""
    for fact, meaning in MUST_AGREE:
        told = {card.facts[fact] for card in cards.values() if fact in card.facts}
        if fact in facts and told and facts[fact] not in told:
            raise EngineError(
                f"its {meaning} is {facts[fact]}, that of the others {', '.join(map(str, told))}: "
                "use the same one there"
            )
