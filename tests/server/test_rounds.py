"""A round against small hand-written sites: who is selected, what is used, what is counted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from grandrounds.config.recipes import notes, of_before, resolve
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.errors import ReplyError, RoundError
from grandrounds.server import judging, rounds
from grandrounds.server.aggregation.make import filled_in, make_rule
from grandrounds.server.exchange import Tally
from grandrounds.server.introductions import SiteCard
from grandrounds.server.judging import examiners_of
from grandrounds.server.listeners.plain import disagreement_text, limit_lines
from grandrounds.server.listeners.start_rows import recipe_rows
from grandrounds.server.run import Run, State
from grandrounds.server.weights import claimed_examples
from grandrounds.wire import messages, told
from grandrounds.wire.adapter import Adapter
from grandrounds.wire.names import SiteNames
from grandrounds.wire.told import MEDIAN_LOSS
from grandrounds.wire.traffic import message_of, plan_config
from tests.listening import Telling
from tests.server.hand_written import (
    OF_A_VISIT,
    SHAPES,
    START,
    Behaviour,
    Silent,
    Sites,
    cards_of,
    changed,
    crash,
    grid_of,
    refuse,
    run_over,
)

BYTES = message_of(SHAPES, None).tensor_bytes
NAME_BYTES = 2 * len("m.lora_A.weight")

Heard = list[tuple[int, str | None]]


def listener_to(heard: Heard) -> Telling:
    return Telling(lambda event, data: heard.append((data["partition"], data["failure"])))


def train(run: Run, cohort: Iterable[int], *, measure: bool = False) -> tuple[Adapter, Tally, Any]:
    """Train a cohort in round 3; return the adapter, what came back, and what was measured."""
    now = rounds.Round(3, 0.5, list(cohort), {}, saves=measure, started=0.0, trained=0.0)
    return rounds.train(run, now)


def play(sites: Sites, cohort: Iterable[int], **settings: Any) -> tuple[Adapter, Tally, Any]:
    return train(run_over(grid_of(sites, 4), **settings), cohort)


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
    adapter, _, _ = play(Sites(), [0, 1, 3], **{"strategy.weighting": "equal"})
    assert np.array_equal(adapter["m.lora_A.weight"], np.full((2, 3), 10 / 3, np.float32))


def test_the_product_error_of_a_round_is_measured_where_asked() -> None:
    """A and B become 2 and 2 at site 0 (10), 3 and 3 at site 1 (20). All entries are alike, so B A
    is as 2 * 2 = 4 and 3 * 3 = 9: mean (40 + 180) / 30 = 22/3; mean A and B (20 + 60) / 30 = 8/3,
    product 64/9; the error is (66 - 64) / 66 = 1/33, and of the update from 1 it is
    (2/9) / (19/3) = 2/57."""
    measured = train(run_over(grid_of(Sites(), 4)), [0, 1], measure=True)[2]
    assert measured["product-error"] == pytest.approx(1 / 33, rel=1e-9)
    assert measured["product-error-of-update"] == pytest.approx(2 / 57, rel=1e-9)


def test_each_site_receives_its_own_instruction_and_the_round() -> None:
    sites = Sites()
    run = run_over(grid_of(sites, 4))
    run.state.cursors = {1: 10, 2: 20}
    train(run, [1, 2])
    assert sites.seen == [
        (
            "train",
            site,
            {
                **{"round": 3, "run": "0", "codec": "none", "rank": 2},
                **{"learning-rate": 0.5, "cursor": 10 * site},
                **{"threads": 1, "cpu-matmul": "default"},
            },
        )
        for site in (1, 2)
    ]


def test_replies_are_reported_as_they_arrive() -> None:
    heard: Heard = []
    play(Sites({("train", 1): refuse}), [0, 1, 2], listener=listener_to(heard))
    assert heard == [(0, None), (1, "site 1 has no rows"), (2, None)]


def with_tensors(values: float, dtype: Any = np.float32) -> Behaviour:
    def answer(message: Message, site: int) -> Message:
        record = ArrayRecord({n: Array(np.full(s, values, dtype)) for n, s in SHAPES.items()})
        return Message(
            messages.content(arrays=record, metrics={**OF_A_VISIT, "num-examples": 10}),
            reply_to=message,
        )

    return answer


def without_tensors(message: Message, site: int) -> Message:
    return Message(messages.content(metrics={**OF_A_VISIT, "num-examples": 10}), reply_to=message)


def without_metrics(message: Message, site: int) -> Message:
    return Message(messages.content(arrays=messages.to_arrays(START)), reply_to=message)


def claiming(examples: Any) -> Behaviour:
    def answer(message: Message, site: int) -> Message:
        content = messages.content(arrays=messages.to_arrays(START))
        content["metrics"] = MetricRecord({**OF_A_VISIT, "num-examples": examples})
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
    assert claimed_examples({"num-examples": 10**9}, 20) == 20
    assert claimed_examples({"num-examples": 7}, 20) == 7


def test_a_claim_is_limited_by_the_cohort_and_shown() -> None:
    """Site 3 introduced 2^24 examples: among 10, 20 and 30 it has 40, twice the lower median and 2
    of 2 + 3 of the total. Without the limit it had all: the adapter moved by its 4."""

    def claims(message: Message, site: int) -> Message:
        return changed(message, site, examples=2**24)

    run = run_over(grid_of(Sites({("train", 3): claims}), 4), **{"strategy.largest-weight": 2.0})
    run.roster.cards[3] = SiteCard(4, {"train-examples": 2**24, "threads": 1})
    adapter, tally, measured = train(run, range(4))
    assert measured["weights"] == {"0": 10, "1": 20, "2": 30, "3": 40}
    moved = (10 * 1 + 20 * 2 + 30 * 3 + 40 * 4) / 100
    assert np.allclose(adapter["m.lora_A.weight"], 1 + moved)
    now = rounds.Round(3, 0.5, [0, 1, 2, 3], {}, saves=False, started=0.0, trained=0.0)
    run.state.round = 3
    record = {**rounds.training_record(run, now, tally), **measured}
    assert record["weights-limited"] == {"3": 2**24}
    names = run.roster.names
    assert limit_lines(record, names) == [
        "  weight limited (strategy.largest-weight): site 3 at 40 of 16,777,216 examples"
    ]
    assert limit_lines({**record, "weights-limited": {}}, names) == []


def test_two_of_seven_that_answer_with_an_error_do_not_end_a_run_of_multi_krum() -> None:
    """Sites 0 to 4 change by 1 to 5. Among five, one hostile is tolerated, and the other four are
    averaged by their examples: (1 + 4 + 9 + 16) / 10 = 3. All seven were needed before."""
    of_rule = {"strategy.name": "multikrum", "strategy.num-malicious-nodes": 2}
    everybody = {"data.num-partitions": 7, "data.partitioner": "iid", "strategy.fraction-train": 1}
    sites = Sites({("train", p): refuse for p in (5, 6)})
    run = run_over(grid_of(sites, 7), **of_rule, **everybody)
    run.roster.cards = cards_of(7)
    adapter, tally, measured = train(run, range(7))
    assert measured["hostile-tolerated"] == 1
    assert np.allclose(adapter["m.lora_A.weight"], 1 + 3)
    record = {"failed": tally.failed, "good": sorted(tally.good), **measured}
    assert limit_lines(record, run.roster.names) == [
        "  the rule tolerates 1 hostile update among these 5"
    ]
    rows = dict(recipe_rows(run.config))
    assert rows["rounds"].endswith("multikrum, mu 0.01, at least 4 updates a round")


# --- The bound on norms ---------------------------------------------------------------------------


def long(message: Message, site: int) -> Message:
    return with_tensors(2e14)(message, site)


def test_a_huge_update_is_scaled_down_to_the_median_of_the_last_rounds() -> None:
    """16 values of 2e14 have a norm of 8e14; three times the median, 24, is a norm of 6s. It was
    accepted as it is, saved, and repeated by every resume."""
    run = run_over(grid_of(Sites({("train", 2): long}), 4), **{"defence.largest-norm": 3.0})
    run.state.norms = [[8.0, 8.0], [7.0, 9.0, 1e14]]
    adapter, _, measured = train(run, [0, 1, 2])
    assert measured["norm-bound"] == 24.0
    assert measured["updates-bounded"] == 1
    assert measured["update-norms"]["2"] == pytest.approx(8e14)
    assert np.allclose(adapter["m.lora_A.weight"], 1 + (10 * 1 + 20 * 2 + 10 * 6) / 40)


def test_in_the_first_round_the_median_is_of_its_own_updates() -> None:
    """Norms 4, 8 and 8e14: at most 3 * 8. All arrive before any is added, and the listener hears
    of each as it arrives."""
    heard: Heard = []
    sites = Sites({("train", 2): long, ("train", 3): refuse})
    run = run_over(grid_of(sites, 4), listener_to(heard), **{"defence.largest-norm": 3.0})
    adapter, tally, measured = train(run, [0, 1, 2, 3])
    assert heard == [(0, None), (1, None), (2, None), (3, "site 3 has no rows")]
    assert measured["norm-bound"] == 24.0
    assert np.allclose(adapter["m.lora_A.weight"], 1 + (10 * 1 + 20 * 2 + 10 * 6) / 40)
    run.state.note_norms([measured["update-norms"][str(p)] for p in tally.good])
    assert run.state.earlier_norms == pytest.approx([4.0, 8.0, 8e14])


def test_norms_within_the_bound_change_no_bit_and_survive_a_resume() -> None:
    free = train(run_over(grid_of(Sites(), 4)), range(4))[0]
    run = run_over(grid_of(Sites(), 4), **{"defence.largest-norm": 3.0})
    for norms in ([], [[8.0]]):
        run.state.norms = norms
        run.rule = make_rule(filled_in(run.config))
        bounded = train(run, range(4))[0]
        assert all(bounded[name].tobytes() == free[name].tobytes() for name in SHAPES)
    for number in range(9):
        run.state.note_norms([0.1 * number, 0.3])
    run.state.note_norms([0.0])  # a round at a learning rate of 0
    again = State.from_json({}, json.loads(json.dumps(run.state.to_json({}))))
    assert again.norms == run.state.norms
    assert len(again.norms) == 5


def test_the_bound_is_on_by_default_and_off_where_visits_are_epochs() -> None:
    epochs = {"train.training-arguments.max-steps": -1}
    assert resolve().defence.largest_norm == 3.0
    assert resolve(epochs).defence.largest_norm == 0
    assert any("defence.largest-norm = 0.0: its default" in said for said in notes(epochs))
    assert of_before({"resume-from": ""})["defence.largest-norm"] == 0


def test_every_message_is_counted_those_of_failed_sites_too() -> None:
    """Three go down. Up come the good one and the one with numbers that are not finite; the site
    that crashed sent nothing."""
    sites = Sites({("train", 1): crash, ("train", 2): with_tensors(float("inf"))})
    run = run_over(grid_of(sites, 4), **{"strategy.min-reply-fraction": 0.3})
    train(run, [0, 1, 2])
    ledger = run.state.ledger
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
        play(sites, range(cohort), **{"strategy.min-reply-fraction": fraction})
        return
    words = rf"^Round 3: {cohort - failing} of {cohort} sites returned .*site 0: site 0 has no"
    with pytest.raises(RoundError, match=words):
        play(sites, range(cohort), **{"strategy.min-reply-fraction": fraction})


def test_a_site_that_does_not_answer_in_time_is_a_failed_reply() -> None:
    run = run_over(Silent(Sites(), 4, {2}), timeout_seconds=0.2)
    adapter, tally, _ = train(run, [0, 1])
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
        return Message(
            messages.content(
                arrays=messages.to_arrays(change), metrics={**OF_A_VISIT, "num-examples": 7 + site}
            ),
            reply_to=message,
        )

    sites = Sites({("train", p): noisy for p in range(4)})
    forwards, _, _ = train(run_over(grid_of(sites, 4)), range(4))
    backwards, _, _ = train(run_over(Backwards(sites, {}, 4)), range(4))
    assert [site for _, site, _ in sites.seen] == [0, 1, 2, 3, 3, 2, 1, 0]
    for name in SHAPES:
        assert forwards[name].tobytes() == backwards[name].tobytes()


def test_a_site_that_is_not_connected_counts_as_failed() -> None:
    heard: Heard = []
    _, tally, _ = play(Sites(), [0, 1, 5], listener=listener_to(heard))
    assert tally.failed == {5: "not connected"}
    assert (5, "not connected") in heard
    with pytest.raises(RoundError, match="2 of 3 sites returned a valid update, but at least 3"):
        play(Sites(), [0, 1, 5], **{"strategy.min-reply-fraction": 1.0})


def test_a_reply_that_comes_after_its_round_is_left_out_and_counted() -> None:
    grid = Silent(Sites(), 4, {2})
    run = run_over(grid, timeout_seconds=0.2)
    _, tally, _ = train(run, [0, 1])
    assert list(tally.good) == [0]
    assert len(run.exchange.late) == 1
    assert run.exchange.count_late() == 0
    grid.silent = set()
    assert run.exchange.count_late() == 1
    assert run.state.ledger.totals["late.up"].messages == 1
    assert not run.exchange.late


# --- Held-out loss and the formulary's questions --------------------------------------------------


def evaluate(sites: Sites, cohort: list[int]) -> tuple[float | None, Tally, Run]:
    run = run_over(grid_of(sites, 4))
    run.evaluation_cohort = cohort
    return *judging.evaluate(run), run


def test_held_out_loss_is_the_mean_over_tokens() -> None:
    """Sites 0 and 2: 6 nats over 1 token and 9 over 3: 15 / 4 = 3.75."""
    sites = Sites(
        {
            ("evaluate", 0): lambda m, _: Message(
                messages.content(metrics={"nll-sum": 6.0, "tokens": 1}), reply_to=m
            )
        }
    )
    loss, tally, run = evaluate(sites, [0, 2])
    assert loss == 3.75
    assert sorted(tally.good) == [0, 2]
    assert run.state.ledger.tensor_bytes == 2 * BYTES
    assert list(run.state.ledger.totals) == ["evaluate.down"]


def test_held_out_loss_goes_on_without_a_site_that_fails() -> None:
    loss, tally, _ = evaluate(Sites({("evaluate", 0): crash}), [0, 2])
    assert loss == 3.0
    assert list(tally.failed) == [0]


def test_held_out_loss_of_nobody_is_none() -> None:
    loss, tally, _ = evaluate(Sites({("evaluate", 0): crash}), [0])
    assert loss is None
    assert list(tally.failed) == [0]


def test_an_evaluation_without_its_numbers_is_a_failed_reply() -> None:
    sites = Sites(
        {("evaluate", 0): lambda m, _: Message(messages.content(metrics={"other": 1}), reply_to=m)}
    )
    loss, tally, _ = evaluate(sites, [0, 2])
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
            ("evaluate.formulary", 1): lambda m, _: Message(
                messages.content(metrics=SCORES), reply_to=m
            ),
        }
    )
    run = run_over(grid_of(sites, 4))
    scores, by_site = judging.examine_formulary(run)
    each = {"correct": 3, "n": 4}
    both = {"base": each, "tuned": each}
    assert (scores, by_site) == ({"public": both, "private": both}, {})
    assert run.state.failed_replies == 1
    assert [site for _, site, _ in sites.seen] == [0, 1]
    assert run.state.ledger.totals["formulary.down"].messages == 2


class Separate(InProcessGrid):
    """A grid whose sites are not all one process."""

    in_one_process = False


def answering(correct: int, n: int = 4) -> Behaviour:
    scores = {name: n if name.endswith("-n") else correct for name in SCORES}
    return lambda m, _: Message(messages.content(metrics=scores), reply_to=m)


def test_an_exam_at_three_sites_is_planned_as_that() -> None:
    one, three = (
        plan_config(resolve({"data.num-partitions": 5}), SHAPES, examiners).ledger.totals
        for examiners in (1, examiners_of(Separate(Sites(), {}, 4)))
    )
    assert three["formulary.down"].messages == 3 * one["formulary.down"].messages == 3
    assert examiners_of(grid_of(Sites(), 4)) == 1


def test_the_exams_result_is_the_median_of_three_sites_that_answer() -> None:
    """One site that claims all of them had set the result: the first that answered."""
    told = [answering(300, 300), refuse, answering(99, 300), answering(101, 300)]
    sites = Sites({("evaluate.formulary", p): answer for p, answer in enumerate(told)})
    scores, by_site = judging.examine_formulary(run_over(Separate(sites, {}, 4)))
    assert scores is not None
    assert scores["private"]["tuned"] == {"correct": 101, "n": 300}
    assert [site for _, site, _ in sites.seen] == [0, 1, 2, 3]
    assert {p: result["private"]["tuned"]["correct"] for p, result in by_site.items()} == {
        "0": 300,
        "2": 99,
        "3": 101,
    }
    said = disagreement_text({"formulary_by_site": by_site})
    assert "site 0: 300 private and 300 public facts; site 2: 99" in said
    assert disagreement_text({}) == ""


def test_more_correct_answers_than_questions_are_a_failed_reply() -> None:
    sites = Sites({("evaluate.formulary", p): answering(5, 4) for p in range(4)})
    assert judging.examine_formulary(run_over(grid_of(sites, 4))) == (None, {})


def losing(loss: float, tokens: int) -> Behaviour:
    told = {"nll-sum": loss * tokens, "tokens": tokens}
    return lambda m, _: Message(messages.content(metrics=told), reply_to=m)


@pytest.mark.parametrize("loss", [5.6e-14, 1000.0])
def test_one_sites_held_out_loss_neither_outweighs_the_others_nor_chooses_the_best(
    loss: float,
) -> None:
    """Site 0 has 10 examples of at most 512 tokens, and claimed 2^33: the mean was its loss."""
    sites = Sites({("evaluate", 0): losing(loss, 2**33)})
    mean, tally, run = evaluate(sites, [0, 1, 2, 3])
    tokens = 10 * run.config.train.seq_length
    assert mean == pytest.approx((loss * tokens + 6 + 9 + 12) / (tokens + 9))
    losses = told.site_losses(tally.good)
    assert losses == pytest.approx({0: loss, 1: 3.0, 2: 3.0, 3: 3.0})
    record = {"held-out-losses": {str(p): v for p, v in losses.items()}, MEDIAN_LOSS: 3.0}
    [line] = limit_lines(record, run.roster.names)
    assert line == f"  held-out losses far from their median, 3: {loss:.3g} at site 0"
    assert limit_lines({"held-out-losses": {"0": 1, "1": 9}, MEDIAN_LOSS: 5}, SiteNames()) == []


@pytest.mark.parametrize(
    ("told_of", "said"),
    [
        ({"tokens": 11}, "its pairs are 11, and it holds out 10"),
        ({"preferred": 5}, "preferred is 5, of 4 pairs"),
        ({"ranked": 9}, "ranked is 9, of 4 pairs"),
        ({"margin-sum": -1e16}, "the metric 'margin-sum' is -1e+16, not from -1e+15 to 1e+15"),
    ],
)
def test_figures_of_pairs_that_cannot_be_are_refused(told_of: dict[str, Any], said: str) -> None:
    good = {"nll-sum": 2.0, "tokens": 4, "margin-sum": 1.0, "preferred": 3, "ranked": 4}
    content = messages.content(metrics={**good, **told_of})

    def use(metrics: RecordDict) -> None:
        reply = Message(metrics, dst_node_id=1, message_type="evaluate")
        judging.check_pairs(messages.metrics_of(reply, messages.PAIR_METRICS), 10)

    use(messages.content(metrics=good))  # type: ignore[arg-type]
    with pytest.raises(ReplyError) as error:
        use(content)
    assert str(error.value) == said


def test_a_loss_that_no_model_has_is_a_failed_reply() -> None:
    mean, tally, _ = evaluate(Sites({("evaluate", 0): losing(1.2e13, 3)}), [0, 2])
    assert mean == 3.0
    assert "held-out loss is 1.2e+13 nats per token" in tally.failed[0]


def test_a_real_site_needs_to_tell_nothing_but_its_weight() -> None:
    """In process all figures are required; a real site's cursor stays its own."""

    def silent(message: Message, site: int) -> Message:
        reply = changed(message, site)
        reply.content[messages.METRICS] = MetricRecord({"num-examples": 10})
        return reply

    def kept(message: Message, site: int) -> Message:
        return Message(messages.content(metrics={}), reply_to=message)

    sites = Sites({("train", 0): silent, ("evaluate", 0): kept, ("train", 1): silent})
    run = run_over(grid_of(sites, 4))
    run.roster.cards[0] = SiteCard(1, {**run.roster.cards[0].facts, "base-content": "sha"})
    adapter, tally, _ = train(run, [0, 1])
    assert tally.good == {0: {"num-examples": 10}}
    assert "the reply lacks base-loads, coverage" in tally.failed[1]
    assert np.array_equal(adapter["m.lora_A.weight"], START["m.lora_A.weight"] + 1)
    assert [("cursor" in said) for kind, _, said in sites.seen if kind == "train"] == [False, True]
    run.evaluation_cohort = [0, 1]
    loss, tally = judging.evaluate(run)
    assert (loss, sorted(tally.good)) == (None, [0, 1])  # site 1 gives no weight here


def test_the_formularys_questions_without_any_answer_are_none() -> None:
    sites = Sites({("evaluate.formulary", p): refuse for p in range(4)})
    assert judging.examine_formulary(run_over(grid_of(sites, 4))) == (None, {})


def test_every_site_that_fails_the_formularys_questions_is_counted() -> None:
    sites = Sites({("evaluate.formulary", p): refuse for p in range(4)})
    run = run_over(grid_of(sites, 4))
    judging.examine_formulary(run)
    assert run.state.failed_replies == 4
