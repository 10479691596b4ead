"""How good an adapter is, as sites tell it: held-out loss, and the formulary's exam."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from grandrounds.config.words import beyond
from grandrounds.errors import ReplyError
from grandrounds.server.exchange import OnReply, Tally
from grandrounds.server.parcels import NOT_THERE, addressed, parcels_for
from grandrounds.server.run import Run
from grandrounds.server.unfinished import EVALUATE, EXAM
from grandrounds.wire import messages, told
from grandrounds.wire.traffic import EXAMINERS

ExamResults = dict[str, dict[str, dict[str, int]]]
"""Kind of facts → base or tuned → correct answers and questions, as in summary.json."""


def evaluate(run: Run) -> tuple[float | None, Tally]:
    """Return the held-out loss in nats per answer token; None if no site told one.

    The sites evaluate the adapter as they receive it.
    """
    number, cohort = run.state.round, run.evaluation_cohort
    on_pairs = run.config.is_on_pairs
    per = "nats per pair" if on_pairs else "nats per token"
    parcels = parcels_for(run, number, cohort, trains=False)

    def use(site: int, reply: Message) -> messages.Metrics:
        required = () if run.roster.cards[site].in_custody else messages.EVALUATE_METRICS
        metrics = messages.metrics_of(reply, messages.PAIR_METRICS if on_pairs else required)
        examples = run.roster.held_out_of(site)
        if on_pairs:
            check_pairs(metrics, examples)
        told_of = told.within(metrics, examples * run.config.train.seq_length, examples)
        loss, most = told.site_losses({site: told_of}).get(site, 0.0), told.HIGHEST_LOSS
        if loss > most:
            raise ReplyError(f"its held-out loss is {beyond(loss, most)} {per}, above {most:g}")
        return told_of

    outgoing, tell = addressed(run, MessageType.EVALUATE, number, parcels), noting(run, EVALUATE)
    tally = run.exchange.ask("evaluate", outgoing, use, tell)
    run.settle(parcels, tally.good)
    for site in sorted(set(cohort) - parcels.keys()):
        tally.failed[site] = NOT_THERE
        tell(site, NOT_THERE)
    run.state.note_loads(tally)
    return told.held_out_loss(tally.good.values()), tally


def check_pairs(metrics: messages.Metrics, examples: int) -> None:
    """Raise `ReplyError` if there are more pairs than held-out examples, or more are preferred or
    ranked than there are."""
    pairs = metrics["tokens"]
    if pairs > examples:
        raise ReplyError(f"its pairs are {pairs}, and it holds out {examples}")
    for name in (told.PREFERRED, told.RANKED):
        if metrics[name] > pairs:
            raise ReplyError(f"{name} is {metrics[name]}, of {pairs} pairs")


def examine_formulary(run: Run) -> tuple[ExamResults | None, dict[str, ExamResults]]:
    """Return the results of the formulary's exam, with and without the adapter.

    The server has no base model: each count is the median of `EXAMINERS` sites. Where all sites are
    this process, their answers are the same, and one is asked. The adapter is sent in float32, so
    that the exam is of exactly what the checkpoint holds.

    Returns
    -------
    tuple
        The medians, None if no site answered; and if sites disagree, what each answered.
    """
    parcel, waiting = run.sender.exact(run.state.adapter), list(run.roster.cards)
    wanted = examiners_of(run.exchange.grid)
    good: dict[int, messages.Metrics] = {}
    while waiting and (count := wanted - len(good)) > 0:
        asked, waiting = waiting[:count], waiting[count:]
        tally = run.exchange.ask(
            "formulary",
            addressed(run, f"{MessageType.EVALUATE}.formulary", 0, dict.fromkeys(asked, parcel)),
            lambda _, reply: exam_results(messages.metrics_of(reply, messages.FORMULARY_METRICS)),
            noting(run, EXAM),
        )
        run.state.note_loads(tally)
        good |= tally.good
    if not good:
        return None, {}
    names = messages.FORMULARY_METRICS
    median = {n: statistics.median_low(int(scores[n]) for scores in good.values()) for n in names}
    disagree = any(scores[n] != median[n] for scores in good.values() for n in names)
    return by_kind(median), {str(p): by_kind(good[p]) for p in sorted(good) if disagree}


def noting(run: Run, kind: str) -> OnReply:
    """Return what counts the replies of one kind."""
    return lambda site, failure: run.note_reply(kind, site, failure)


def examiners_of(grid: Grid) -> int:
    """Return how many sites hold the formulary's exam; see `examine_formulary`."""
    return 1 if getattr(grid, "in_one_process", False) else EXAMINERS


def exam_results(scores: messages.Metrics) -> messages.Metrics:
    """Return the results of an exam; raise `ReplyError` if more answers are correct than asked."""
    for name in messages.FORMULARY_METRICS:
        n = (
            scores[f"{name.removesuffix('-correct')}-n"]
            if name.endswith("-correct")
            else messages.MANY
        )
        if scores[name] > n:
            raise ReplyError(f"{name} is {scores[name]}, of {n} questions")
    return scores


def by_kind(scores: Mapping[str, float | int]) -> ExamResults:
    """Return the counts of an exam as in summary.json."""
    return {
        kind: {
            which: {count: int(scores[f"{kind}-{which}-{count}"]) for count in ("correct", "n")}
            for which in ("base", "tuned")
        }
        for kind in ("public", "private")
    }
