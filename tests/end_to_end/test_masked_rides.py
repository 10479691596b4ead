"""The next round's keys ride on a round, attempts follow one another, and lost rounds are skipped.

Sites train nothing here: each sends a change of its own that it can draw from its number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from typer.testing import CliRunner

from grandrounds import client_app
from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.errors import RoundError
from grandrounds.server.exchange import Exchange
from grandrounds.server.listeners.plain import PlainReporter
from grandrounds.site.visit import Visit
from grandrounds.wire import messages
from grandrounds.wire.adapter import Adapter
from grandrounds.wire.masks.carried import NEXT
from tests.runs import (
    GOOD_SITES,
    Settings,
    Sites,
    grid_of,
    metrics_of,
    play,
    read_json,
)


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(visit: Visit) -> tuple[Adapter, dict[str, float | int]]:
        arrays = visit.content.array_records[messages.ARRAYS]
        value = np.float32(1e-6 * (1 + visit.site.partition_id))
        change = {name: np.full(array.shape, value, np.float32) for name, array in arrays.items()}
        return change, {"cursor": 0, "base-loads": 0, "process-id": 1}

    monkeypatch.setattr(client_app, "trained", trained)


@pytest.fixture
def five(settings: Settings) -> Settings:
    """Settings of two masked rounds of five sites."""
    return {
        **settings,
        "data.num-partitions": 5,
        "secure-aggregation": "masked32",
        "strategy.name": "fedavg",
        "strategy.fraction-train": 1.0,
        "strategy.fraction-evaluate": 0.0,
        "num-server-rounds": 2,
        "train.save-every-round": 9,
    }


def asked(message: Message) -> tuple[str, int, int]:
    """Return the exchange, round and attempt of a message."""
    said = messages.instruction_of(message.content)
    return message.metadata.message_type, int(said["round"]), int(said.get("attempt", 0))  # type: ignore[arg-type]


def crashing(partitions: Collection[int], *when: tuple[str, int, int]) -> Sites:
    """Return sites of which some crash at these exchanges, rounds and attempts."""

    def sites(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] in partitions and asked(message) in when:
            raise RuntimeError("disk broke")
        return GOOD_SITES(message, context)

    return sites


def changing(partitions: Collection[int], kind: str, change: Callable[[RecordDict], Any]) -> Sites:
    """Return sites of which some change their replies to one kind of message in round 1."""

    def sites(message: Message, context: Context) -> Message:
        reply = GOOD_SITES(message, context)
        if context.node_config["partition-id"] in partitions and asked(message) == (kind, 1, 0):
            change(reply.content)
        return reply

    return sites


def noting(heard: list[tuple[str, int, int]], sites: Sites = GOOD_SITES) -> Sites:
    """Return sites whose messages are noted."""

    def noted(message: Message, context: Context) -> Message:
        heard.append(asked(message) if message.metadata.message_type != "query" else ("", 0, 0))
        return sites(message, context)

    return noted


def sums(run: Path) -> list[dict[str, Any]]:
    return [record["masked-sum"] for record in metrics_of(run)[1:]]


def rounds_of(run: Path, key: str) -> list[Any]:
    return [found.get(key) for found in sums(run)]


# --- Rides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites_of_round", [3, 5])
def test_a_steady_round_has_three_exchanges_and_the_bytes_planned(
    five: Settings, sites_of_round: int
) -> None:
    """Cohorts of 3 of 5 change from round to round: some sites are asked by themselves."""
    heard: list[tuple[str, int, int]] = []
    settings = {**five, "num-server-rounds": 4, "strategy.fraction-train": sites_of_round / 5}
    run = play(settings, noting(heard))
    assert rounds_of(run, "exchanges") == [5, 3, 3, 3]
    assert rounds_of(run, "sites") == [sites_of_round] * 4
    assert read_json(run / "plan.json")["totals"] == read_json(run / "ledger.json")["totals"]
    alone = {(kind, number) for kind, number, _ in heard if kind in ("train.keys", "train.shares")}
    later = {(kind, number) for kind in ("train.keys", "train.shares") for number in (2, 3, 4)}
    assert alone - later == {("train.keys", 1), ("train.shares", 1)}
    assert (later <= alone) == (sites_of_round == 3)


def test_a_site_that_missed_the_ride_sits_one_round_out(five: Settings) -> None:
    settings = {**five, "num-server-rounds": 3}
    run = play(settings, crashing([2], ("train.confirm", 1, 0)))
    assert rounds_of(run, "sites") == [5, 4, 5]
    assert rounds_of(run, "exchanges") == [5, 3, 3]
    assert "disk broke" in sums(run)[0]["not-aboard"]["2"]
    assert "was not there when this round's keys" in metrics_of(run)[2]["failed"]["2"]


def test_a_silent_site_is_not_waited_for_in_a_ride_and_comes_back_with_a_further_attempt(
    five: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Site 4 is silent in round 1, and so not aboard in round 2; that round's attempt is lost."""
    replies = Exchange.replies

    def without_one(self: Exchange, outgoing: Any, *args: Any) -> Any:
        for node, reply in replies(self, outgoing, *args):
            if not (node == 5 and asked(outgoing[node]) == ("train.masked", 1, 0)):
                yield node, reply

    monkeypatch.setattr(Exchange, "replies", without_one)
    heard: list[tuple[str, int, int]] = []
    run = play(five, noting(heard, crashing([0, 1], ("train.masked", 2, 0))))
    assert sums(run)[0]["not-aboard"] == {"4": "did not answer in the round before"}
    assert heard.count(("train.shares", 2, 0)) == 0
    assert heard.count(("train.keys", 2, 0)) == 0
    # of the lost attempt's four sites three must go on: without 0 and 1 there would be two
    assert rounds_of(run, "sites") == [4, 5]
    assert rounds_of(run, "attempts") == [1, 2]


def refused(content: RecordDict) -> None:
    """Make a site's reply one whose part for the next round was refused."""
    del content[NEXT]
    content["config"] = messages.content(config={NEXT: "not of my roster\n"})["config"]


def test_a_refused_ride_does_not_touch_the_round_that_it_rides_on(five: Settings) -> None:
    run = play(five, changing([0, 1], "train.unmask", refused))
    assert rounds_of(run, "sites") == [5, 5]
    assert rounds_of(run, "exchanges") == [5, 5]
    assert sums(run)[0]["not-aboard"] == dict.fromkeys("01", "not of my roster")
    assert rounds_of(run, "attempts") == [1, 1]


def garbled(content: RecordDict) -> None:
    data = content.array_records[NEXT]["keys"].numpy()
    content[NEXT] = messages.to_payload("keys", data[::-1].copy())


def test_false_keys_on_a_ride_cost_their_site_the_next_round_only(five: Settings) -> None:
    run = play(five, changing([4], "train.confirm", garbled))
    assert rounds_of(run, "sites") == [5, 4]
    assert rounds_of(run, "exchanges") == [5, 3]


# --- Attempts -------------------------------------------------------------------------------------


def test_a_round_without_enough_shares_is_tried_again_with_those_that_are_left(
    five: Settings,
) -> None:
    """Of five sites four must send shares; the other three are a cohort of their own."""
    run = play(five, crashing([1, 3], ("train.shares", 1, 0)))
    assert rounds_of(run, "sites") == [3, 5]
    assert rounds_of(run, "attempts") == [2, 1]
    assert rounds_of(run, "exchanges") == [7, 3]
    assert list(metrics_of(run)[1]["failed"]) == ["1", "3"]


def test_a_round_without_enough_vectors_is_tried_again_with_all_if_all_are_needed(
    five: Settings,
) -> None:
    run = play(five, crashing([0, 1, 2], ("train.masked", 2, 0)))
    assert rounds_of(run, "sites") == [5, 5]
    assert rounds_of(run, "attempts") == [1, 2]
    assert rounds_of(run, "exchanges") == [5, 6]


def test_a_round_is_tried_three_times_and_then_the_run_ends_and_can_go_on(five: Settings) -> None:
    sites = crashing([0, 1, 2], *(("train.confirm", 2, number) for number in range(3)))
    with pytest.raises(RoundError, match=r"2 sites sent their confirmations.*disk broke.*resume"):
        play(five, sites)
    run = play({**five, "resume-from": five["run-directory"]})
    assert rounds_of(run, "sites") == [5, 5]


# --- Skipped rounds -------------------------------------------------------------------------------


def test_a_round_whose_sum_is_lost_after_unmask_is_skipped_and_its_number_burned(
    five: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[tuple[str, int, int]] = []
    settings = {**five, "num-server-rounds": 3}
    sites = noting(heard, crashing([1, 2], ("train.unmask", 2, 0)))
    run = play(settings, sites, PlainReporter(recipes.resolve(settings)))
    skipped = metrics_of(run)[2]
    told = capsys.readouterr().out
    assert "skipped, the adapter stays: Round 2: 3 sites sent their opened shares" in told
    assert "site 0 failed: the round's masked sum was lost" in told
    assert "site 1 failed: the site failed (Flower's code 2): RuntimeError: disk broke" in told
    assert "3 sites sent their opened shares" in skipped["skipped"]
    assert skipped["good"] == []
    assert skipped["coverage"] is None
    assert len(skipped["failed"]) == 5
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0
    assert rounds_of(run, "sites") == [5, 0, 5]
    assert rounds_of(run, "exchanges") == [5, 3, 5]
    assert {attempt for kind, number, attempt in heard if kind and number == 2} == {0}


def test_two_skipped_rounds_in_a_row_end_the_run(five: Settings) -> None:
    sites = crashing([1, 2], ("train.unmask", 1, 0), ("train.unmask", 2, 0), ("train.unmask", 2, 1))
    with pytest.raises(RoundError, match="Rounds 1 and 2 both lost their masked sums"):
        play({**five, "num-server-rounds": 3}, sites)
    run = play({**five, "num-server-rounds": 3, "resume-from": five["run-directory"]})
    assert rounds_of(run, "sites") == [0, 0, 5]


# --- A server that dies within a round ------------------------------------------------------------


def killed_once(*when: tuple[str, int, int]) -> Sites:
    """Return sites whose server is killed before the first of them answers at some place."""
    left = list(when)

    def sites(message: Message, context: Context) -> Message:
        if asked(message) in left:
            left.remove(asked(message))
            raise KeyboardInterrupt
        return GOOD_SITES(message, context)

    return sites


@pytest.mark.parametrize(
    ("place", "sites", "attempts"),
    [
        (("train.shares", 1, 0), [5, 5], [1, 1]),
        (("train.masked", 2, 0), [5, 5], [1, 1]),
        (("train.confirm", 2, 0), [5, 5], [1, 2]),
        (("train.unmask", 2, 0), [5, 0], [1, 1]),
    ],
)
def test_a_resume_replays_the_last_attempt_and_makes_another_only_before_unmask(
    five: Settings, place: tuple[str, int, int], sites: list[int], attempts: list[int]
) -> None:
    """The sites' states outlive the server; a rehearsal's site does not keep its masked vector."""
    grid = grid_of(recipes.resolve(five), killed_once(place))
    with pytest.raises(KeyboardInterrupt):
        play(five, grid=grid)
    run = play({**five, "resume-from": five["run-directory"]}, grid=grid)
    assert rounds_of(run, "sites") == sites
    assert rounds_of(run, "attempts") == attempts


def test_sites_that_lost_their_state_get_fresh_keys(five: Settings) -> None:
    """Agents start anew between the rounds, and nothing is left of what rode."""

    def forgetful(message: Message, context: Context) -> Message:
        if asked(message) == ("train.masked", 2, 0):
            context.state.clear()
        return GOOD_SITES(message, context)

    run = play(five, forgetful)
    assert rounds_of(run, "sites") == [5, 5]
    assert rounds_of(run, "attempts") == [1, 2]
    assert rounds_of(run, "exchanges") == [5, 6]
