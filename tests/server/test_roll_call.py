"""The roll call: who may take part, who is refused, who may come back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message

from grandrounds.config.recipes import resolve
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.errors import (
    ConfigError,
    DataError,
    EngineError,
    GrandRoundsError,
    ReplyError,
    RunDirectoryError,
)
from grandrounds.server import roll_call
from grandrounds.server.admitted import admitted_names
from grandrounds.server.introductions import SiteCard, has_changed
from grandrounds.server.lifecycle import check_same_sites
from grandrounds.server.roll_call import Roster
from grandrounds.wire import messages
from grandrounds.wire.told import SAME_IF_TOLD, SAME_IN_A_RUN
from tests.server.hand_written import (
    Silent,
    Sites,
    crash,
    exchange_of,
    grid_of,
    introduce,
    refuse,
)


def called(
    grid: InProcessGrid,
    nodes: Sequence[int],
    seconds: float = 10.0,
    *,
    min_sites: int = 0,
    admitted: Mapping[int, int] | None = None,
) -> Roster:
    """Call the roll of some nodes of a grid."""
    roster = Roster(len(nodes), min_sites, admitted=lambda: admitted or {})
    roster.call(exchange_of(grid), nodes, seconds)
    roster.note_introductions()
    return roster


def refreshed(roster: Roster, grid: InProcessGrid) -> dict[int, str]:
    return roster.refresh(exchange_of(grid))


def nodes_of(roster: Roster) -> dict[int, int]:
    return {p: card.node_id for p, card in roster.cards.items()}


def test_too_few_and_too_many_nodes_are_an_error_that_says_how_many() -> None:
    grid = grid_of(Sites(), 3)
    assert Roster(3).wait(grid, 0) == [1, 2, 3]
    with pytest.raises(EngineError, match=r"^3 nodes are connected, but .* = 4"):
        Roster(4).wait(grid, 0)
    with pytest.raises(EngineError, match=r"^3 nodes are connected, but .* = 2"):
        Roster(2).wait(grid, 0)
    known = {0: 1, 1: 77, 2: 2, 3: 78}
    with pytest.raises(EngineError, match=r"= 4\. Missing: St E \(site 1\), site 3; start"):
        Roster(4, admitted=lambda: known, admitted_names=lambda: {1: "St E"}).wait(grid, 0)


def test_the_roll_call_returns_the_sites_by_partition() -> None:
    """The nodes' ids are in another order than the partitions: site 2 answers as node 1."""
    swapped = {
        ("query", 0): lambda m, _: introduce(m, 2),
        ("query", 2): lambda m, _: introduce(m, 0),
    }
    cards = called(grid_of(Sites(swapped), 3), [1, 2, 3]).cards
    assert list(cards) == [0, 1, 2]
    assert [card.node_id for card in cards.values()] == [3, 2, 1]
    assert [card.facts["train-examples"] for card in cards.values()] == [10, 20, 30]


@pytest.mark.parametrize(
    ("fact", "meaning"),
    [("version", "version of grandrounds"), ("base", "base model"), ("prompt", "prompt")],
)
@pytest.mark.parametrize("odd", [0, 2])
def test_a_site_that_differs_is_named_before_anybody_trains(
    fact: str, meaning: str, odd: int
) -> None:
    """Also site 0, whose facts the others were once compared with: they were blamed."""
    sites = Sites({("query", odd): lambda m, s: introduce(m, s, name="St E", **{fact: "other"})})
    how = f"its {meaning} is other, that of 2 of 3 sites"
    with pytest.raises(EngineError, match=rf"St E \(site {odd}\): {how} .*min-sites = 2"):
        called(grid_of(sites, 3), [1, 2, 3])
    assert {kind for kind, _, _ in sites.seen} == {"query"}
    roster = called(grid_of(sites, 3), [1, 2, 3], min_sites=2)
    assert list(roster.cards) == [p for p in range(3) if p != odd]
    [(who, why)] = roster.refusals().items()
    assert (who, roster.names[odd]) == (f"site {odd}", "St E")
    assert why.startswith(how)


def differing(facts: Mapping[int, Any], message: Message, site: int) -> Message:
    return introduce(message, site, **facts[site])


def test_where_no_majority_decides_all_groups_are_named() -> None:
    for odd, told in (({2, 3}, r"p at site 0, site 1; q at"), ({1, 2, 3}, r"; q3 at site 3\. Use")):
        own = {p: {"prompt": f"q{p if len(odd) > 2 else ''}"} for p in odd}
        sites = Sites({("query", p): partial(differing, own) for p in odd})
        with pytest.raises(EngineError, match=rf"same prompt, and no majority decides: .*{told}"):
            called(grid_of(sites, 4), [1, 2, 3, 4], min_sites=1)


@pytest.mark.parametrize("value", [b"x", "x" * 1001, [1]])
def test_a_fact_that_could_not_be_written_down_is_the_sites_own_fault(value: Any) -> None:
    sites = Sites({("query", 1): lambda m, s: introduce(m, s, device=value)})
    with pytest.raises(EngineError, match="introduction of node 2 is invalid: 'device' is neither"):
        called(grid_of(sites, 2), [1, 2])


def test_facts_that_nobody_reads_are_dropped_and_the_others_cleaned() -> None:
    """20,000 facts made sites.json 20 MB."""
    more: dict[str, Any] = {f"fact-{i}": "x" * 900 for i in range(2000)}
    more |= {"device": "\u202eUPG\x1b[2J\n  site 0 failed"}
    sites = Sites({("query", 1): lambda m, s: introduce(m, s, **more)})
    roster = called(grid_of(sites, 2), [1, 2])
    assert set(roster.introduced[1]) == set(roster.introduced[0])
    assert roster.introduced[1]["device"] == "UPG[2J site 0 failed"


def test_reasons_of_refusals_are_cut_and_cleaned() -> None:
    def say(message: Message, site: int) -> Message:
        return Message(messages.failure(DataError("no\n\x1b[31m" + "x" * 10**6)), reply_to=message)

    roster = called(grid_of(Sites({("query", 1): say}), 3), [1, 2, 3], min_sites=2)
    assert roster.refused[2].startswith("no [31mxxx")
    assert len(roster.refused[2]) == 1000


def test_two_nodes_of_one_site_are_an_error() -> None:
    sites = Sites({("query", 1): lambda m, _: introduce(m, 0)})
    with pytest.raises(EngineError, match="Two nodes claim to be site 0"):
        called(grid_of(sites, 2), [1, 2])


def test_a_node_is_no_other_site_than_it_was_admitted_as() -> None:
    sites = Sites({("query", 1): lambda m, _: introduce(m, 0)})
    for admitted, told in (
        ({0: 1}, "^Node 2 claims to be site 0, which was admitted as node 1"),
        ({1: 2}, "^Node 2 claims to be site 0, but was admitted as site 1"),
    ):
        grid = grid_of(sites, 2)
        with pytest.raises(EngineError, match=told):
            called(grid, [1, 2], admitted=admitted)
        roster = called(grid, [2, 1], min_sites=1, admitted=admitted)
        assert nodes_of(roster) == {0: 1}
        assert list(roster.refused) == [2]
    known = called(grid_of(Sites(), 2), [1, 2], admitted={0: 1, 1: 2})
    assert list(known.cards) == [0, 1]


def test_a_site_that_cannot_take_part_is_told_with_its_own_error() -> None:
    with pytest.raises(DataError, match="site 1 has no rows"):
        called(grid_of(Sites({("query", 1): refuse}), 2), [1, 2])


def test_a_site_that_crashes_at_roll_call_is_told() -> None:
    with pytest.raises(ReplyError, match="RuntimeError: site 1 is on fire"):
        called(grid_of(Sites({("query", 1): crash}), 2), [1, 2])


def test_a_site_that_says_nothing_of_itself_is_an_error_of_ours() -> None:
    sites = Sites(
        {("query", 1): lambda m, _: Message(messages.content(config={"hello": 1}), reply_to=m)}
    )
    with pytest.raises((ReplyError, EngineError)):
        called(grid_of(sites, 2), [1, 2])


def test_a_node_that_does_not_answer_the_roll_call_is_named() -> None:
    with pytest.raises(EngineError, match=r"1 of 3 nodes did not answer .*\[2\]"):
        called(Silent(Sites(), 3, {2}), [1, 2, 3], 0.2)


def test_the_first_answer_may_take_longer_than_a_round() -> None:
    for round_seconds, connect_seconds in ((0.1, 0.3), (0.3, 0.1)):
        with pytest.raises(EngineError, match=r"1 of 3 nodes did not answer .* within 0.3 s"):
            Roster(3).open(exchange_of(Silent(Sites(), 3, {2}), round_seconds), connect_seconds)


def unreachable(message: Message, site: int) -> Message:
    return Message(Error(5, "no heartbeat"), reply_to=message)


@pytest.mark.parametrize("kind", ["no heartbeat", "no id"])
def test_a_node_that_is_not_back_yet_is_asked_again(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart of the SuperLink a node counts as connected, and its messages fail until its
    next heartbeat; one such reply ended a resumed run at its roll call."""
    monkeypatch.setattr(roll_call, "RETURN_SECONDS", 0.01)
    absences = [True, True]

    class Returning(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            outgoing = list(messages)
            is_absent = kind == "no id" and any(absences) and absences.pop()
            gone = 2 if is_absent else 0
            ids = iter(super().push_messages(m for m in outgoing if m.metadata.dst_node_id != gone))
            return ["" if m.metadata.dst_node_id == gone else next(ids) for m in outgoing]

    def back(message: Message, site: int) -> Message:
        is_absent = kind == "no heartbeat" and any(absences) and absences.pop()
        return (unreachable if is_absent else introduce)(message, site)

    sites = Sites({("query", 1): back})
    roster = Roster(3)
    roster.open(exchange_of(Returning(sites, {}, 3)), 5.0)
    assert [*roster.cards] == [0, 1, 2]
    assert [site for _, site, _ in sites.seen].count(0) == 1  # who has answered is left in peace
    absences[:] = [True] * 1000
    said = "no heartbeat" if kind == "no heartbeat" else r"1 of 3 nodes did not answer .*\[2\]"
    with pytest.raises(GrandRoundsError, match=said):
        Roster(3).open(exchange_of(Returning(sites, {}, 3), 0.01), 0.1)


def test_a_run_may_begin_without_some_sites() -> None:
    grid = grid_of(Sites(), 3)
    assert Roster(5, 3).wait(grid, 0) == [1, 2, 3]
    with pytest.raises(EngineError, match=r"^3 nodes .* = 5 \(strategy\.min-sites = 4\)"):
        Roster(5, 4).wait(grid, 0)


def test_a_site_that_refuses_or_keeps_silent_is_left_out_where_the_others_suffice() -> None:
    grid = Silent(Sites({("query", 1): refuse}), 4, {4})
    roster = called(grid, [1, 2, 3, 4], 0.2, min_sites=2)
    assert list(roster.cards) == [0, 2]
    assert roster.refused == {2: "site 1 has no rows", 4: "no answer within 0.2 s"}
    with pytest.raises(DataError):
        called(grid_of(Sites({("query", 1): refuse}), 4), [1, 2, 3, 4], min_sites=4)


# --- Sites that come and go -----------------------------------------------------------------------


def introduced(
    sites: Sites, count: int, admitted: Mapping[int, int] | None = None
) -> tuple[InProcessGrid, Roster]:
    """Return a grid, and the roster of its sites but the last."""
    grid = grid_of(sites, count)
    roster = called(grid, list(range(1, count)), admitted=admitted)
    roster.num_sites = count
    return grid, roster


def test_a_node_whose_key_was_revoked_is_not_called_and_loses_its_place() -> None:
    """A node of a site whose admission was removed could take part as any site without one."""
    sites = Sites()
    grid, roster = introduced(sites, 3)
    roster.revoked = lambda: {1: "the key of 'St E' was revoked"}
    assert refreshed(roster, grid) == {0: "the key of 'St E' was revoked"}
    assert nodes_of(roster) == {1: 2, 2: 3}
    asked = len(sites.seen)
    assert refreshed(roster, grid) == {}
    assert len(sites.seen) == asked
    with pytest.raises(EngineError, match=r"^2 nodes .*, beside 1 whose key was revoked"):
        roster.wait(grid, 0)


def test_the_name_of_an_admission_replaces_what_a_site_calls_itself() -> None:
    """And both are cleaned before they are written."""
    claims = {0: "St Elsewhere", 1: "\u202eWard\n B", 2: "\u200b"}
    sites = Sites({("query", p): lambda m, s: introduce(m, s, name=claims[s]) for p in claims})
    roster = Roster(4, admitted_names=lambda: {0: "Charity\x1b[31m", 3: "Mercy"})
    roster.call(exchange_of(grid_of(sites, 4)), [1, 2, 3, 4], 10.0)
    roster.note_introductions()
    written = [site.get("name") for site in roster.introduced.values()]
    assert written == ["Charity[31m", "Ward B", None, "Mercy"]
    assert [roster.names[p] for p in range(4)] == ["Charity[31m", "Ward B", "site 2", "Mercy"]


def test_a_site_that_comes_later_is_introduced_before_the_next_round() -> None:
    sites = Sites()
    grid, roster = introduced(sites, 3)
    assert list(roster.cards) == [0, 1]
    assert refreshed(roster, grid) == {}
    assert list(roster.cards) == [0, 1, 2]
    asked = len(sites.seen)
    assert refreshed(roster, grid) == {}
    assert len(sites.seen) == asked  # nobody new, nobody asked


def test_a_site_that_comes_back_as_another_node_gets_a_new_card() -> None:
    sites = Sites({("query", 2): lambda m, _: introduce(m, 1)})
    grid, roster = introduced(sites, 3)
    grid._contexts.pop(2)
    assert refreshed(roster, grid) == {}
    assert nodes_of(roster) == {0: 1, 1: 3}


def test_a_simulation_with_too_few_nodes_is_refused_before_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`flwr run .` with two nodes, Flower's default; they are registered one after another."""

    class InMemoryGrid(InProcessGrid):
        polls = 0

        def get_node_ids(self) -> Iterable[int]:
            self.polls += 1
            return list(range(1, min(self.polls, 2) + 1))

    monkeypatch.setattr(roll_call, "SETTLED_SECONDS", 0.05)
    advice = "2 nodes are connected, .*--federation-config 'num-supernodes=20'"
    with pytest.raises(EngineError, match=advice):
        Roster(20).wait(InMemoryGrid(Sites(), {}, 2), 600)


def test_a_node_cannot_take_the_place_of_a_site_that_is_connected() -> None:
    sites = Sites({("query", 2): lambda m, _: introduce(m, 1)})
    grid, roster = introduced(sites, 3)
    refused = refreshed(roster, grid)
    assert "node 3 claims to be site 1, but so does node 2, which is connected" in refused[-1]
    assert nodes_of(roster) == {0: 1, 1: 2}


def test_a_node_cannot_take_the_place_of_a_site_that_is_away() -> None:
    """Where it is known which node the site was admitted as; the site keeps its card."""
    sites = Sites({("query", 2): lambda m, _: introduce(m, 1)})
    grid, roster = introduced(sites, 3)
    grid._contexts.pop(2)
    roster.admitted = lambda: {1: 2}
    refused = refreshed(roster, grid)
    assert refused == {-1: "node 3 claims to be site 1, which was admitted as node 2"}
    assert nodes_of(roster) == {0: 1, 1: 2}


def test_a_site_that_comes_back_changed_is_refused_in_every_round() -> None:
    said: dict[str, Any] = {}
    sites = Sites({("query", 1): lambda m, s: introduce(m, s, **said)})
    grid = grid_of(sites, 2)
    roster = called(grid, [1, 2])
    said["train-examples"] = 999
    for suspected in ({1}, set[int]()):
        roster.suspected = suspected
        refused = refreshed(roster, grid)
        assert "it came back with another train-examples" in refused[1]
        assert list(roster.cards) == [0]
    said.clear()
    assert refreshed(roster, grid) == {}
    assert sorted(roster.cards) == [0, 1]


@pytest.mark.parametrize("fact", ["version", *SAME_IN_A_RUN])
def test_a_site_that_comes_back_changed_takes_no_part_and_is_named(fact: str) -> None:
    said: dict[str, Any] = {}
    sites = Sites({("query", 1): lambda m, s: introduce(m, s, **said)})
    grid = grid_of(sites, 2)
    roster = called(grid, [1, 2])
    said[fact] = 999 if fact not in ("version", "base", "prompt", "data-tag") else "other"
    roster.suspected = {1}
    refused = refreshed(roster, grid)
    assert list(roster.cards) == [0]
    assert f"it came back with another {fact}" in refused[1]


def test_a_suspected_site_that_is_gone_keeps_its_card_and_is_not_waited_for() -> None:
    grid, roster = introduced(Sites(), 3)
    gone = SiteCard(77, {"train-examples": 5, "threads": 1})
    roster.cards[2] = gone
    roster.suspected = {2}
    grid._contexts.pop(3)
    assert refreshed(roster, grid) == {}
    assert roster.cards[2] is gone


def asked_of(sites: Sites) -> list[tuple[object, object]]:
    """Return the arithmetic named in each question, in order of the sites."""
    asked = sorted((site, config) for kind, site, config in sites.seen if kind == "query")
    return [(config.get("threads"), config.get("cpu-matmul")) for _, config in asked]


def resumed(before: Mapping[int, Mapping[str, Any]], sites: Sites) -> Roster:
    """Call the roll of a resumed run with these facts of two sites in its sites.json."""
    facts = {p: {"partition-id": p, **facts} for p, facts in before.items()}
    roster = Roster(2, introduced=facts)
    grid = grid_of(sites, 2)
    roster.call(exchange_of(grid), [1, 2], 10.0)
    roster.note_arithmetic()
    return roster


def test_a_resumed_run_asks_its_sites_to_compute_as_before() -> None:
    """Introductions of earlier versions lack the library of products: it was the default one."""
    new, old = Sites(), Sites()
    called(grid_of(new, 2), [1, 2])
    assert asked_of(new) == [(None, None), (None, None)]
    roster = resumed({0: {"threads": 1}, 1: {"threads": 1, "cpu-matmul": "default"}}, old)
    assert asked_of(old) == [(1, "default"), (1, "default")]
    assert all("computed-before" not in card.facts for card in roster.cards.values())


def test_a_site_that_cannot_compute_as_before_is_noted() -> None:
    before = {0: {"threads": 8, "cpu-matmul": "onednn"}, 1: {"threads": 1}}
    sites = Sites()
    cards = resumed(before, sites).cards
    assert asked_of(sites) == [(None, None), (None, None)]  # not known which node is which site
    assert cards[0].facts["computed-before"] == "8 threads, products by onednn"
    assert "computed-before" not in cards[1].facts


@pytest.mark.parametrize("text", ["{}", '{"content": {"partition-id": 0}}', '{"content": [1]}'])
def test_a_damaged_admission_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "admissions").mkdir()
    (tmp_path / "admissions" / "st-e.json").write_text(text)
    federation = resolve({"consortium": str(tmp_path)}).federation
    with pytest.raises(ConfigError, match=r"st-e\.json: the admission is damaged"):
        admitted_names(federation)


def test_a_sites_weight_is_of_its_admission_else_of_its_first_roll_call() -> None:
    """A real site may come back with any number that rounds the same: 1,799 for 1,500."""
    said: dict[str, Any] = {"train-examples": 1500}
    sites = Sites({("query", 1): lambda m, s: introduce_in_custody(m, s, **said)})
    grid = grid_of(sites, 2)
    roster = called(grid, [1, 2])
    said["train-examples"] = 1700
    roster.suspected = {1}
    assert refreshed(roster, grid) == {}
    roster.note_introductions()
    assert roster.cards[1].facts["train-examples"] == 1700
    assert roster.introduced[1]["train-examples"] == 1500
    assert roster.examples() == {0: 10, 1: 1500}
    roster.admitted_examples = lambda: {1: 700}
    assert roster.examples() == {0: 10, 1: 700}


def test_a_newcomer_that_differs_is_refused_and_nobody_else() -> None:
    sites = Sites({("query", 2): lambda m, s: introduce(m, s, prompt="q")})
    grid, roster = introduced(sites, 3)
    assert refreshed(roster, grid) == {
        2: "its prompt is q, that of the others p: use the same one there"
    }
    assert list(roster.cards) == [0, 1]


def test_a_resumed_run_goes_on_without_a_site_that_has_changed_where_it_may() -> None:
    sites = Sites({("query", 0): lambda m, s: introduce(m, s, rows=7)})
    for min_sites in (0, 3, 2):
        roster = called(grid_of(Sites(), 3), [1, 2, 3], min_sites=min_sites)
        roster.call(exchange_of(grid_of(sites, 3)), [1, 2, 3], 10.0)
        if min_sites == 2:
            check_same_sites(roster)
            assert list(roster.cards) == [1, 2]
            assert roster.refusals() == {"site 0": "its rows was 1 and is now 7"}
        else:
            with pytest.raises(RunDirectoryError, match="site 0 has changed since the run"):
                check_same_sites(roster)


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ({"data-tag": "0a", "truncated": 3}, {"data-tag": "tff"}, []),
        ({"data-tag": "tff"}, {"data-tag": "0a", "truncated": 3}, []),
        ({"data-tag": "tff"}, {"data-tag": "tfe"}, ["data-tag"]),
        ({"truncated": 3}, {"truncated": 4}, ["truncated"]),
    ],
    ids=["whole, then in parts", "in parts, then whole", "other texts", "other tokens"],
)
def test_a_site_may_tokenise_at_once_or_when_asked(
    before: dict[str, Any], now: dict[str, Any], changed: list[str]
) -> None:
    assert [fact for fact in ("data-tag", "truncated") if has_changed(fact, before, now)] == changed


# --- Real sites -----------------------------------------------------------------------------------

ROUNDED = {"train-examples": 1500, "data-tag": "ab"}


def introduce_in_custody(message: Message, site: int, **facts: Any) -> Message:
    """Return the introduction of a real site, without what it keeps."""
    said = {**dict.fromkeys(messages.INTRODUCTION_IN_CUSTODY, 1), "base-content": "sha", **ROUNDED}
    told = {"version": "1", "base": "b", "prompt": "p", "partition-id": site, **facts}
    return Message(messages.content(config={**said, **told}), reply_to=message)


def test_only_a_real_site_may_keep_its_counts() -> None:
    alone = Sites({("query", 0): introduce_in_custody})
    roster = called(grid_of(alone, 1), [1])
    assert roster.cards[0].in_custody
    assert roster.examples() == {0: 1500}
    bare = dict.fromkeys(messages.INTRODUCTION_IN_CUSTODY, 1)

    def lacking(message: Message, site: int) -> Message:
        return Message(messages.content(config=bare), reply_to=message)

    with pytest.raises(EngineError, match=r"lacks rows, empty-rows, .*device"):
        called(grid_of(Sites({("query", 0): lacking}), 1), [1])


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        (ROUNDED, ROUNDED, ""),
        ({"train-examples": 1425, "rows": 1500, "held-out-examples": 75}, ROUNDED, ""),
        ({"train-examples": 900}, ROUNDED, "train-examples"),
        (ROUNDED, {**ROUNDED, "data-tag": "cd"}, "data-tag"),
        ({**ROUNDED, "held-out-examples": 70}, ROUNDED, ""),
    ],
    ids=["the same", "exact counts of a run of before", "fewer", "other data", "loss kept now"],
)
def test_a_real_site_is_compared_by_what_it_tells(
    before: dict[str, Any], now: dict[str, Any], changed: str
) -> None:
    real = {"base-content": "sha"}
    for fact in SAME_IF_TOLD:
        assert not has_changed(fact, {}, {fact: "a" * 40})
        assert has_changed(fact, {fact: "b" * 40}, {fact: "a" * 40})
    differing = [f for f in SAME_IN_A_RUN if has_changed(f, {**real, **before}, {**real, **now})]
    assert differing == [changed] * bool(changed)
