"""Sites whose privacy budget is told, falls or is spent, as the server sees them."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Message

from grandrounds.errors import BudgetError
from grandrounds.server import budgets, rounds
from grandrounds.server.exchange import Tally
from grandrounds.server.introductions import SiteCard
from grandrounds.server.listeners.plain import failure_lines, privacy_text
from grandrounds.server.run import Run
from grandrounds.wire import guarantee, messages
from grandrounds.wire.guarantee import EPSILON, EPSILON_FELL
from grandrounds.wire.names import SiteNames
from grandrounds.wire.told import BASE
from tests.server.hand_written import Sites, cards_of, changed, grid_of, run_over

PRIVATE = {
    **dict.fromkeys(guarantee.NUMBERS, 1.0),
    guarantee.UNIT: "patient",
    guarantee.ACCOUNTANT: "dp-accounting 0.6.0, PLD",
}


def spent(message: Message, site: int) -> Message:
    error = BudgetError("The privacy budget of this site for this run is spent: 2 visits.")
    return Message(messages.failure(error), reply_to=message)


def private_run(special: dict[Any, Any], min_sites: int = 2) -> Run:
    run = run_over(grid_of(Sites(special), 4), **{"strategy.min-reply-fraction": 1.0})
    run.roster.min_sites = min_sites
    for site, card in cards_of(4).items():
        facts = {**card.facts, **PRIVATE, "partition-id": site, BASE: "b", EPSILON: 0.0}
        run.roster.cards[site] = SiteCard(card.node_id, facts)
    run.roster.note_introductions()
    return run


def train(run: Run, number: int) -> Tally:
    now = rounds.Round(number, 0.5, [0, 1, 2, 3], {}, saves=False, started=0.0, trained=0.0)
    _, tally, _ = rounds.train(run, now)
    budgets.note(run.roster, tally)
    run.roster.note_introductions()
    return tally


def test_a_site_whose_budget_ends_is_no_failed_reply_of_the_round() -> None:
    """All three others are enough for a fraction of 1, and the next cohort is without it."""
    run = private_run({("train", 2): spent})
    assert sorted(train(run, 3).good) == [0, 1, 3]
    assert run.roster.spent == {2}
    assert run.roster.introduced[2][guarantee.BUDGET_SPENT] is True
    assert budgets.are_enough(run.roster)
    budgets.check(run.roster, 4, [0, 1, 3])


def test_too_few_sites_with_a_budget_end_the_run_with_a_line_that_says_so() -> None:
    run = private_run({("train", 2): spent}, min_sites=0)
    train(run, 3)
    assert not budgets.are_enough(run.roster)
    with pytest.raises(
        BudgetError, match=r"privacy budget of site 2 is spent: round 4 has 3 sites"
    ) as told:
        budgets.check(run.roster, 4, [0, 1, 3])
    assert told.value.exit_code == 3


def test_a_round_in_which_every_budget_is_spent_ends_the_run() -> None:
    run = private_run({("train", site): spent for site in range(4)})
    with pytest.raises(BudgetError, match="round 3 has 0 sites of at least 2 left"):
        train(run, 3)


def test_a_site_that_has_no_visit_left_is_not_asked_for_one() -> None:
    def last(message: Message, site: int) -> Message:
        reply = changed(message, site)
        reply.content.metric_records["metrics"].update({"visits-left": 0, EPSILON: 2.5})
        return reply

    run = private_run({("train", 1): last})
    train(run, 3)
    assert run.roster.spent == {1}
    assert run.roster.introduced[1][EPSILON] == 2.5


def test_a_smaller_epsilon_than_before_is_flagged_and_the_larger_one_counts() -> None:
    told = iter((2.0, 1.0, 1.5))

    def some(message: Message, site: int) -> Message:
        reply = changed(message, site)
        reply.content.metric_records["metrics"].update({"visits-left": 3, EPSILON: next(told)})
        return reply

    run = private_run({("train", 0): some})
    train(run, 3)
    assert EPSILON_FELL not in run.roster.introduced[0]
    train(run, 4)
    assert (run.roster.introduced[0][EPSILON], run.roster.introduced[0][EPSILON_FELL]) == (2.0, 1.0)
    train(run, 5)
    assert budgets.fallen(run.roster.introduced.values()) == {0: (2.0, 1.5)}
    line = {"epsilon-fell": {"0": [2.0, 1.5]}, "budget-spent": [3]}
    assert failure_lines(line, SiteNames()) == [
        "  site 3 trains no more: its privacy budget is spent",
        "  site 0 told epsilon 1.5 after 2: was its budget restored from a backup? The larger one "
        "counts",
    ]


def test_weights_are_declared() -> None:
    """A reply weighs what its site declared at the roll call, whatever it claims later."""
    run = private_run({("train", 1): lambda message, site: changed(message, site, 10**6)})
    now = rounds.Round(3, 0.5, [0, 1], {}, saves=False, started=0.0, trained=0.0)
    _, _, measured = rounds.train(run, now)
    assert measured["weights"] == {"0": 10, "1": 20}


def test_the_summary_has_the_guarantee_of_each_site() -> None:
    run = private_run({})
    run.roster.spent.add(3)
    sites = list(run.roster.introduced.values())
    sites[0] |= {EPSILON: 3.5, guarantee.DELTA: 1e-5}
    found = budgets.summary_of(run.config, sites, run.roster.spent)
    assert found is not None
    assert (found["mode"], found["unit"], found["delta"]) == ("enforced", "patient", None)
    assert (found["epsilon"], found["budget_spent"]) == (3.5, ["3"])
    assert found["sites"]["0"]["accountant"] == "dp-accounting 0.6.0, PLD"
    assert found["sites"]["3"]["budget_spent"] is True
    assert "epsilon 3.5 at most for one patient" in privacy_text(found)
    assert "the budget of 1 site is spent" in privacy_text(found)
    plain = [{"partition-id": 0, "train-examples": 10}]
    assert budgets.summary_of(run.config, plain, ()) is None
