"""The round loop against small hand-written sites: who is asked, what is used, what is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict

from grandrounds.config.recipes import resolve
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.errors import DataError, EngineError, ReplyError, RoundError
from grandrounds.server import exchange, roll_call, rounds
from grandrounds.server.aggregation.make import make_rule, rule_settings
from grandrounds.server.roll_call import SiteCard
from grandrounds.server.updates import Terms, claimed_examples
from grandrounds.wire import messages
from grandrounds.wire.codecs import codec_named
from grandrounds.wire.downlink import Sender
from grandrounds.wire.ledger import Ledger, message_bytes

Behaviour = Callable[[Message, int], Message]

SHAPES = {"m.lora_A.weight": (2, 3), "m.lora_B.weight": (5, 2)}
START = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
BYTES = message_bytes(SHAPES)
CONFIG = resolve({"strategy.name": "fedprox"})
NONE = codec_named("none", CONFIG.communication)
NAME_BYTES = 2 * len("m.lora_A.weight")


class Sites:
    """A ClientApp by hand: site p has 10 (p + 1) examples and changes every number by p + 1."""

    def __init__(self, special: Mapping[tuple[str, int], Behaviour] | None = None) -> None:
        self.special = dict(special or {})
        self.seen: list[tuple[str, int, dict[str, Any]]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        site = int(context.node_config["partition-id"])
        config = message.content.config_records.get(messages.CONFIG)
        self.seen.append((kind, site, dict(config) if config is not None else {}))
        if (kind, site) in self.special:
            return self.special[kind, site](message, site)
        if kind == "query":
            return introduce(message, site)
        if kind == "train":
            return changed(message, site)
        return messages.reply(message, metrics={"nll-sum": 3.0 * (site + 1), "tokens": site + 1})


def introduce(message: Message, site: int, **facts: Any) -> Message:
    said: dict[str, int | str] = {
        "partition-id": site,
        "train-examples": 10 * (site + 1),
        "version": "1",
        "base": "b",
        "prompt": "p",
    }
    return messages.reply(message, config={**said, **facts})


def changed(message: Message, site: int, examples: int | None = None) -> Message:
    change = {name: np.full(shape, site + 1, np.float32) for name, shape in SHAPES.items()}
    count = 10 * (site + 1) if examples is None else examples
    return messages.reply(
        message, arrays=messages.to_arrays(change), metrics={"num-examples": count}
    )


def crash(message: Message, site: int) -> Message:
    raise RuntimeError(f"site {site} is on fire")


def refuse(message: Message, site: int) -> Message:
    return Message(messages.failure(DataError(f"site {site} has no rows")), reply_to=message)


def grid_of(sites: Callable[[Message, Context], Message], count: int) -> InProcessGrid:
    return InProcessGrid(sites, {}, count)


def cards_of(count: int) -> dict[int, SiteCard]:
    return {p: SiteCard(p + 1, {"train-examples": 10 * (p + 1)}) for p in range(count)}


def sender() -> Sender:
    return Sender("fedavg", CONFIG.communication, START, seed=0)


def play(
    sites: Sites,
    cohort: Iterable[int],
    *,
    grid: InProcessGrid | None = None,
    ledger: Ledger | None = None,
    min_reply_fraction: float = 0.5,
    timeout_seconds: float = 10.0,
    heard: list[tuple[int, str | None]] | None = None,
    measure: bool = False,
    **terms: Any,
) -> tuple[Any, rounds.Tally, dict[str, Any]]:
    heard = [] if heard is None else heard
    return rounds.train_round(
        grid or grid_of(sites, 4),
        3,
        START,
        {p: {"learning-rate": 0.5} for p in cohort},
        cards_of(4),
        ledger if ledger is not None else Ledger(),
        rule=make_rule(rule_settings(CONFIG)),
        sender=sender(),
        uplink_codec=NONE,
        terms=Terms(min_reply_fraction, **terms),
        timeout_seconds=timeout_seconds,
        on_reply=lambda p, failure: heard.append((p, failure)),
        measure_product_error=measure,
    )


# --- Connecting and roll call ---------------------------------------------------------------------


def test_too_few_and_too_many_nodes_are_an_error_that_says_how_many() -> None:
    grid = grid_of(Sites(), 3)
    assert roll_call.wait_for_nodes(grid, 3) == [1, 2, 3]
    with pytest.raises(EngineError, match=r"^3 nodes are connected, but .* = 4"):
        roll_call.wait_for_nodes(grid, 4, seconds=0)
    with pytest.raises(EngineError, match=r"^3 nodes are connected, but .* = 2"):
        roll_call.wait_for_nodes(grid, 2, seconds=0)
    known = {0: 1, 1: 77, 2: 2, 3: 78}
    with pytest.raises(EngineError, match=r"= 4\. Not there: sites 1, 3; start their SuperNodes"):
        roll_call.wait_for_nodes(grid, 4, seconds=0, site_nodes=known)


def test_the_roll_call_returns_the_sites_by_partition() -> None:
    """The nodes' ids are in another order than the partitions: site 2 answers as node 1."""
    swapped = {
        ("query", 0): lambda m, _: introduce(m, 2),
        ("query", 2): lambda m, _: introduce(m, 0),
    }
    cards = roll_call.roll_call(grid_of(Sites(swapped), 3), [1, 2, 3], 10)
    assert list(cards) == [0, 1, 2]
    assert [card.node_id for card in cards.values()] == [3, 2, 1]
    assert [card.num_examples for card in cards.values()] == [10, 20, 30]


@pytest.mark.parametrize(
    ("fact", "meaning"),
    [("version", "version of grandrounds"), ("base", "base model"), ("prompt", "prompt")],
)
def test_a_site_that_differs_is_named_before_anybody_trains(fact: str, meaning: str) -> None:
    sites = Sites({("query", 2): lambda m, s: introduce(m, s, **{fact: "other"})})
    with pytest.raises(EngineError, match=rf"same {meaning}: .*site 2 has other \(1 of 3"):
        roll_call.roll_call(grid_of(sites, 3), [1, 2, 3], 10)
    assert {kind for kind, _, _ in sites.seen} == {"query"}


@pytest.mark.parametrize("value", [b"x", "x" * 1001, [1]])
def test_a_fact_that_could_not_be_written_down_is_the_sites_own_fault(value: Any) -> None:
    sites = Sites({("query", 1): lambda m, s: introduce(m, s, device=value)})
    with pytest.raises(EngineError, match="Node 2 introduces itself wrongly: its 'device' is no"):
        roll_call.roll_call(grid_of(sites, 2), [1, 2], 10)


def test_two_nodes_of_one_site_are_an_error() -> None:
    sites = Sites({("query", 1): lambda m, _: introduce(m, 0)})
    with pytest.raises(EngineError, match="Two nodes say that they are site 0"):
        roll_call.roll_call(grid_of(sites, 2), [1, 2], 10)


def test_a_node_is_no_other_site_than_it_was_admitted_as() -> None:
    sites = Sites({("query", 1): lambda m, _: introduce(m, 0)})
    for site_nodes, told in (
        ({0: 1}, "^Node 2 says that it is site 0, which node 1 was admitted as"),
        ({1: 2}, "^Node 2 says that it is site 0, and was admitted as site 1"),
    ):
        grid = grid_of(sites, 2)
        refused: dict[int, str] = {}
        with pytest.raises(EngineError, match=told):
            roll_call.roll_call(grid, [1, 2], 10, site_nodes=site_nodes)
        cards = roll_call.roll_call(
            grid, [2, 1], 10, least=1, refused=refused, site_nodes=site_nodes
        )
        assert {p: card.node_id for p, card in cards.items()} == {0: 1}
        assert list(refused) == [2]
    known = roll_call.roll_call(grid_of(Sites(), 2), [1, 2], 10, site_nodes={0: 1, 1: 2})
    assert list(known) == [0, 1]


def test_a_site_that_cannot_take_part_is_told_with_its_own_error() -> None:
    with pytest.raises(DataError, match="site 1 has no rows"):
        roll_call.roll_call(grid_of(Sites({("query", 1): refuse}), 2), [1, 2], 10)


def test_a_site_that_crashes_at_roll_call_is_told() -> None:
    with pytest.raises(ReplyError, match="RuntimeError: site 1 is on fire"):
        roll_call.roll_call(grid_of(Sites({("query", 1): crash}), 2), [1, 2], 10)


def test_a_site_that_says_nothing_of_itself_is_an_error_of_ours() -> None:
    sites = Sites({("query", 1): lambda m, _: messages.reply(m, config={"hello": 1})})
    with pytest.raises((ReplyError, EngineError)):
        roll_call.roll_call(grid_of(sites, 2), [1, 2], 10)


class Silent(InProcessGrid):
    """A grid of which some nodes never answer."""

    def __init__(self, sites: Sites, count: int, silent: set[int]) -> None:
        super().__init__(sites, {}, count)
        self._silent = silent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages(
            i
            for i in message_ids
            if i not in self._pending or self._pending[i].metadata.dst_node_id not in self._silent
        )


def test_a_node_that_does_not_answer_the_roll_call_is_named() -> None:
    with pytest.raises(EngineError, match=r"1 of 3 nodes did not answer .*\[2\]"):
        roll_call.roll_call(Silent(Sites(), 3, {2}), [1, 2, 3], 0.2)


def test_a_run_may_begin_without_some_sites() -> None:
    grid = grid_of(Sites(), 3)
    assert roll_call.wait_for_nodes(grid, 5, seconds=0, least=3) == [1, 2, 3]
    with pytest.raises(EngineError, match=r"^3 nodes .* = 5 \(strategy\.min-sites = 4\)"):
        roll_call.wait_for_nodes(grid, 5, seconds=0, least=4)


def test_a_site_that_refuses_or_keeps_silent_is_left_out_where_the_others_suffice() -> None:
    refused: dict[int, str] = {}
    grid = Silent(Sites({("query", 1): refuse}), 4, {4})
    cards = roll_call.roll_call(grid, [1, 2, 3, 4], 0.2, least=2, refused=refused)
    assert list(cards) == [0, 2]
    assert refused == {2: "site 1 has no rows", 4: "no answer within 0.2 s"}
    with pytest.raises(DataError):
        roll_call.roll_call(grid_of(Sites({("query", 1): refuse}), 4), [1, 2, 3, 4], 10, least=4)


# --- Sites that come and go -----------------------------------------------------------------------


def introduced(sites: Sites, count: int) -> tuple[InProcessGrid, dict[int, SiteCard]]:
    """Return a grid, and the cards of its sites but the last."""
    grid = grid_of(sites, count)
    return grid, roll_call.roll_call(grid, list(range(1, count)), 10, num_sites=count)


def test_a_site_that_comes_later_is_introduced_before_the_next_round() -> None:
    sites = Sites()
    grid, cards = introduced(sites, 3)
    assert list(cards) == [0, 1]
    assert roll_call.refresh(grid, cards, 3, (), 10, "ab") == {}
    assert list(cards) == [0, 1, 2]
    asked = len(sites.seen)
    assert roll_call.refresh(grid, cards, 3, (), 10, "ab") == {}
    assert len(sites.seen) == asked  # nobody new, nobody asked


def test_a_site_that_comes_back_as_another_node_gets_a_new_card() -> None:
    sites = Sites({("query", 2): lambda m, _: introduce(m, 1)})
    grid, cards = introduced(sites, 3)
    grid._contexts.pop(2)
    assert roll_call.refresh(grid, cards, 2, (), 10, "ab") == {}
    assert {p: card.node_id for p, card in cards.items()} == {0: 1, 1: 3}


def test_a_node_cannot_take_the_place_of_a_site_that_is_connected() -> None:
    sites = Sites({("query", 2): lambda m, _: introduce(m, 1)})
    grid, cards = introduced(sites, 3)
    refused = roll_call.refresh(grid, cards, 2, (), 10, "ab")
    assert "node 3 says that it is site 1, and so does node 2, which is connected" in refused[-1]
    assert {p: card.node_id for p, card in cards.items()} == {0: 1, 1: 2}


def test_a_node_cannot_take_the_place_of_a_site_that_is_away() -> None:
    """Where it is known which node the site was admitted as; the site keeps its card."""
    sites = Sites({("query", 2): lambda m, _: introduce(m, 1)})
    grid, cards = introduced(sites, 3)
    grid._contexts.pop(2)
    refused = roll_call.refresh(grid, cards, 2, (), 10, "ab", site_nodes={1: 2})
    assert refused == {-1: "node 3 says that it is site 1, which node 2 was admitted as"}
    assert {p: card.node_id for p, card in cards.items()} == {0: 1, 1: 2}


def test_a_site_that_comes_back_changed_is_refused_in_every_round() -> None:
    said: dict[str, Any] = {}
    sites = Sites({("query", 1): lambda m, s: introduce(m, s, **said)})
    grid = grid_of(sites, 2)
    cards = roll_call.roll_call(grid, [1, 2], 10)
    was = {p: card.facts for p, card in cards.items()}
    said["train-examples"] = 999
    for suspected in ({1}, set()):
        refused = roll_call.refresh(grid, cards, 2, suspected, 10, "ab", introduced=was)
        assert "it came back with another train-examples" in refused[1]
        assert list(cards) == [0]
    said.clear()
    assert roll_call.refresh(grid, cards, 2, (), 10, "ab", introduced=was) == {}
    assert sorted(cards) == [0, 1]


@pytest.mark.parametrize("fact", ["base", "version", "prompt", "train-examples"])
def test_a_site_that_comes_back_changed_takes_no_part_and_is_named(fact: str) -> None:
    said: dict[str, Any] = {}
    sites = Sites({("query", 1): lambda m, s: introduce(m, s, **said)})
    grid = grid_of(sites, 2)
    cards = roll_call.roll_call(grid, [1, 2], 10)
    said[fact] = 999 if fact == "train-examples" else "other"
    refused = roll_call.refresh(grid, cards, 2, {1}, 10, "ab")
    assert list(cards) == [0]
    assert f"it came back with another {fact}" in refused[1]


def test_a_suspected_site_that_is_gone_keeps_its_card_and_is_not_waited_for() -> None:
    grid, cards = introduced(Sites(), 3)
    gone = SiteCard(77, {"train-examples": 5})
    cards[2] = gone
    grid._contexts.pop(3)
    assert roll_call.refresh(grid, cards, 3, {2}, 10, "ab") == {}
    assert cards[2] is gone


def test_a_site_without_a_card_counts_as_failed() -> None:
    heard: list[tuple[int, str | None]] = []
    _, tally, _ = play(Sites(), [0, 1, 5], heard=heard, min_reply_fraction=0.5)
    assert tally.failed == {5: "not connected"}
    assert (5, "not connected") in heard
    with pytest.raises(RoundError, match="2 of 3 sites replied well, at least 3"):
        play(Sites(), [0, 1, 5], min_reply_fraction=1.0)


def test_a_reply_that_comes_after_its_round_is_left_out_and_counted() -> None:
    grid, late = Silent(Sites(), 4, {2}), set[str]()
    replies = dict(exchange.exchange(grid, questions_to([1, 2]), 0.2, late))
    assert list(replies) == [1]
    assert len(late) == 1
    assert list(exchange.replies_that_came_late(grid, late)) == []
    grid._silent = set()
    [reply] = exchange.replies_that_came_late(grid, late)
    assert reply.metadata.src_node_id == 2
    assert not late


def questions_to(nodes: list[int]) -> dict[int, Message]:
    return roll_call.questions(nodes, "ab")


# --- A round of training --------------------------------------------------------------------------


def test_a_round_is_the_weighted_mean_of_the_changes() -> None:
    """Sites 0, 1, 3 have 10, 20, 40 examples and change by 1, 2, 4: (10 + 40 + 160) / 70 = 3; from
    1 to 4."""
    adapter, tally, measured = play(Sites(), [0, 1, 3])
    for name, shape in SHAPES.items():
        assert np.array_equal(adapter[name], np.full(shape, 4.0, np.float32))
    assert sorted(tally.good) == [0, 1, 3]
    assert tally.failed == {}
    assert "product-error" not in measured


def test_replies_weigh_the_same_where_wanted() -> None:
    """Sites 0, 1, 3 change by 1, 2, 4: 7 / 3 in the mean, whatever they hold."""
    adapter, _, _ = play(Sites(), [0, 1, 3], equal_weights=True)
    assert np.array_equal(adapter["m.lora_A.weight"], np.full((2, 3), 10 / 3, np.float32))


def test_the_product_error_of_a_round_is_measured_where_asked() -> None:
    """A and B become 2 and 2 at site 0 (10), 3 and 3 at site 1 (20). All entries are alike, so B A
    is as 2 * 2 = 4 and 3 * 3 = 9: mean (40 + 180) / 30 = 22/3; mean A and B (20 + 60) / 30 = 8/3,
    product 64/9; the error is (66 - 64) / 66 = 1/33, and of the update from 1 it is
    (2/9) / (19/3) = 2/57."""
    measured = play(Sites(), [0, 1], measure=True)[2]
    assert measured["product-error"] == pytest.approx(1 / 33, rel=1e-9)
    assert measured["product-error-of-update"] == pytest.approx(2 / 57, rel=1e-9)


def test_each_site_receives_its_own_instruction_and_the_round() -> None:
    sites = Sites()
    play(sites, [1, 2])
    assert sites.seen == [
        ("train", 1, {"round": 3, "run": "0", "codec": "none", "rank": 2, "learning-rate": 0.5}),
        ("train", 2, {"round": 3, "run": "0", "codec": "none", "rank": 2, "learning-rate": 0.5}),
    ]


def test_replies_are_reported_as_they_arrive() -> None:
    heard: list[tuple[int, str | None]] = []
    play(Sites({("train", 1): refuse}), [0, 1, 2], heard=heard)
    assert heard == [(0, None), (1, "site 1 has no rows"), (2, None)]


def with_tensors(values: float, dtype: Any = np.float32) -> Behaviour:
    def answer(message: Message, site: int) -> Message:
        record = ArrayRecord({n: Array(np.full(s, values, dtype)) for n, s in SHAPES.items()})
        return messages.reply(message, arrays=record, metrics={"num-examples": 10})

    return answer


def without_tensors(message: Message, site: int) -> Message:
    return messages.reply(message, metrics={"num-examples": 10})


def without_metrics(message: Message, site: int) -> Message:
    return messages.reply(message, arrays=messages.to_arrays(START))


def claiming(examples: Any) -> Behaviour:
    def answer(message: Message, site: int) -> Message:
        content = messages.content(arrays=messages.to_arrays(START))
        content["metrics"] = MetricRecord({"num-examples": examples})
        return Message(content, reply_to=message)

    return answer


BAD: dict[str, tuple[Behaviour, str]] = {
    "crash": (crash, "RuntimeError: site 1 is on fire"),
    "refusal": (refuse, "site 1 has no rows"),
    "nan": (with_tensors(float("nan")), "not finite"),
    "float64": (with_tensors(1.0, np.float64), "got float64"),
    "no tensors": (without_tensors, "the reply has no tensors"),
    "no metrics": (without_metrics, "the reply has no metrics"),
    "empty": (lambda m, _: Message(RecordDict(), reply_to=m), "no metrics"),
    "no examples": (claiming(0), "num-examples is 0"),
    "less than none": (claiming(-5), "num-examples is -5"),
    "half an example": (claiming(1.5), "num-examples is 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_left_out_named_and_counted(case: str) -> None:
    """Without site 1: sites 0 and 2 have 10 and 30 examples: (10 * 1 + 30 * 3) / 40 = 2.5."""
    behaviour, reason = BAD[case]
    adapter, tally, _ = play(Sites({("train", 1): behaviour}), [0, 1, 2])
    assert np.array_equal(adapter["m.lora_A.weight"], np.full((2, 3), 3.5, np.float32))
    assert sorted(tally.good) == [0, 2]
    assert list(tally.failed) == [1]
    assert reason in tally.failed[1]


def test_a_site_cannot_claim_more_examples_than_at_roll_call() -> None:
    """Site 1 claims 10^9 examples and has 20: (10 * 1 + 20 * 2) / 30 = 5/3."""
    sites = Sites({("train", 1): lambda m, s: changed(m, s, examples=10**9)})
    adapter, _, _ = play(sites, [0, 1])
    assert np.array_equal(adapter["m.lora_B.weight"], np.full((5, 2), 8 / 3, np.float32))
    assert claimed_examples({"num-examples": 10**9}, cards_of(2)[1]) == 20
    assert claimed_examples({"num-examples": 7}, cards_of(2)[1]) == 7


def test_every_message_is_counted_those_of_failed_sites_too() -> None:
    """Three go down. Up come the good one and the one with numbers that are not finite; the site
    that crashed sent nothing."""
    ledger = Ledger()
    sites = Sites({("train", 1): crash, ("train", 2): with_tensors(float("inf"))})
    play(sites, [0, 1, 2], ledger=ledger, min_reply_fraction=0.3)
    assert ledger.totals["train.down"].messages == 3
    assert ledger.totals["train.down"].tensor_bytes == 3 * BYTES
    assert ledger.totals["train.down"].key_bytes == 3 * NAME_BYTES
    assert ledger.totals["train.up"].messages == 2
    assert ledger.totals["train.up"].tensor_bytes == 2 * BYTES


@pytest.mark.parametrize(
    ("cohort", "failing", "fraction", "ends"),
    [
        (3, 1, 0.5, False),  # 2 good, ceil(1.5) = 2 needed
        (3, 2, 0.5, True),  # 1 good
        (4, 2, 0.5, False),  # 2 good, 2 needed
        (4, 3, 0.5, True),
        (3, 1, 1.0, True),
        (3, 2, 0.3, False),  # 1 good, ceil(0.9) = 1 needed
        (1, 1, 0.1, True),  # at least one, always
    ],
)
def test_a_round_needs_its_share_of_good_replies_rounded_up(
    cohort: int, failing: int, fraction: float, ends: bool
) -> None:
    sites = Sites({("train", p): refuse for p in range(failing)})
    if not ends:
        play(sites, range(cohort), min_reply_fraction=fraction)
        return
    words = rf"^Round 3: {cohort - failing} of {cohort} sites replied well.*site 0: site 0 has no"
    with pytest.raises(RoundError, match=words):
        play(sites, range(cohort), min_reply_fraction=fraction)


def test_a_site_that_does_not_answer_in_time_is_a_failed_reply() -> None:
    sites, heard = Sites(), list[tuple[int, str | None]]()
    grid = Silent(sites, 4, {2})
    adapter, tally, _ = play(sites, [0, 1], grid=grid, timeout_seconds=0.2, heard=heard)
    assert tally.failed == {1: "no reply within 0.2 s"}
    assert np.array_equal(adapter["m.lora_A.weight"], np.full((2, 3), 2.0, np.float32))


class Backwards(InProcessGrid):
    """A grid whose sites answer in the opposite order."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        last = next(reversed(self._pending), None)
        return super().pull_messages(i for i in message_ids if i == last)


def test_the_order_of_replies_changes_no_bit() -> None:
    def noisy(message: Message, site: int) -> Message:
        rng = np.random.default_rng(site)
        change = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
        return messages.reply(
            message, arrays=messages.to_arrays(change), metrics={"num-examples": 7 + site}
        )

    sites = Sites({("train", p): noisy for p in range(4)})
    forwards, _, _ = play(sites, range(4), grid=grid_of(sites, 4))
    backwards, _, _ = play(sites, range(4), grid=Backwards(sites, {}, 4))
    assert [site for _, site, _ in sites.seen] == [0, 1, 2, 3, 3, 2, 1, 0]
    for name in SHAPES:
        assert forwards[name].tobytes() == backwards[name].tobytes()


# --- Held-out loss and the formulary's questions --------------------------------------------------


def evaluate(sites: Sites, cohort: list[int], ledger: Ledger) -> tuple[float | None, rounds.Tally]:
    return rounds.evaluate_round(
        grid_of(sites, 4), 2, START, cohort, cards_of(4), ledger, sender(), 10
    )


def test_held_out_loss_is_the_mean_over_tokens() -> None:
    """Sites 0 and 2: 6 nats over 1 token and 9 over 3: 15 / 4 = 3.75."""
    sites = Sites(
        {("evaluate", 0): lambda m, _: messages.reply(m, metrics={"nll-sum": 6.0, "tokens": 1})}
    )
    ledger = Ledger()
    loss, tally = evaluate(sites, [0, 2], ledger)
    assert loss == 3.75
    assert sorted(tally.good) == [0, 2]
    assert ledger.tensor_bytes == 2 * BYTES
    assert list(ledger.totals) == ["evaluate.down"]


def test_held_out_loss_goes_on_without_a_site_that_fails() -> None:
    loss, tally = evaluate(Sites({("evaluate", 0): crash}), [0, 2], Ledger())
    assert loss == 3.0
    assert list(tally.failed) == [0]


def test_held_out_loss_of_nobody_is_none() -> None:
    loss, tally = evaluate(Sites({("evaluate", 0): crash}), [0], Ledger())
    assert loss is None
    assert list(tally.failed) == [0]


def test_an_evaluation_without_its_numbers_is_a_failed_reply() -> None:
    sites = Sites({("evaluate", 0): lambda m, _: messages.reply(m, metrics={"other": 1})})
    loss, tally = evaluate(sites, [0, 2], Ledger())
    assert loss == 3.0
    assert list(tally.failed) == [0]


SCORES = {
    f"{kind}-{which}-{count}": number
    for kind in ("public", "private")
    for which in ("base", "tuned")
    for count, number in (("correct", 3), ("n", 4))
}


def test_the_first_site_that_answers_the_formularys_questions_is_enough() -> None:
    sites = Sites(
        {
            ("evaluate.formulary", 0): crash,
            ("evaluate.formulary", 1): lambda m, _: messages.reply(m, metrics=SCORES),
        }
    )
    ledger = Ledger()
    scores, tally = rounds.examine_formulary(
        grid_of(sites, 4), START, cards_of(4), ledger, sender(), 10
    )
    each = {"correct": 3, "n": 4}
    both = {"base": each, "tuned": each}
    assert scores == {"public": both, "private": both}
    assert list(tally.good) == [1]
    assert [site for _, site, _ in sites.seen] == [0, 1]
    assert ledger.totals["formulary.down"].messages == 2


def test_the_formularys_questions_without_any_answer_are_none() -> None:
    sites = Sites({("evaluate.formulary", p): refuse for p in range(4)})
    scores, _ = rounds.examine_formulary(
        grid_of(sites, 4), START, cards_of(4), Ledger(), sender(), 10
    )
    assert scores is None


def test_every_site_that_fails_the_formularys_questions_is_counted() -> None:
    sites = Sites({("evaluate.formulary", p): refuse for p in range(4)})
    _, tally = rounds.examine_formulary(
        grid_of(sites, 4), START, cards_of(4), Ledger(), sender(), 10
    )
    assert sorted(tally.failed) == [0, 1, 2, 3]
