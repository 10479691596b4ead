"""A round: cohort, send, receive, aggregate, record."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from flwr.app import Message, MessageType

from grandrounds.errors import RoundError
from grandrounds.model.licence import licence_of
from grandrounds.model.lora import peft_config
from grandrounds.server import budgets
from grandrounds.server.aggregation.fedexp import Extrapolation
from grandrounds.server.aggregation.product_error import ProductError, measured_modules
from grandrounds.server.exchange import Tally
from grandrounds.server.judging import evaluate, noting
from grandrounds.server.masks.attempts import Asked, Masks
from grandrounds.server.masks.exchanges import MASKED_KIND
from grandrounds.server.model_card import Findings, model_card
from grandrounds.server.parcels import NOT_THERE, continues_at, parcels_for
from grandrounds.server.run import Run
from grandrounds.server.unfinished import MAGNITUDES, TRAIN, Attempt
from grandrounds.server.updates import Updates
from grandrounds.server.weights import claimed_examples, limited
from grandrounds.wire import messages, told
from grandrounds.wire.adapter import Adapter, magnitudes_of, shapes_of, unflatten
from grandrounds.wire.codecs.codec import codec_named
from grandrounds.wire.codecs.finite import all_finite
from grandrounds.wire.downlink import Parcel
from grandrounds.wire.guarantee import EPSILON
from grandrounds.wire.schedule import cohort_of, round_learning_rate_of

LOST = "the round's masked sum was lost, and its update with it"


@dataclass
class Round:
    """A round of training in progress."""

    number: int
    """From 1."""
    learning_rate: float
    """At the sites, after their warm-up."""
    cohort: list[int]
    """The selected sites."""
    refused: dict[int, str]
    """New or returning sites that cannot take part, and why."""
    saves: bool
    """Whether a checkpoint is saved after it."""
    started: float
    """`time.perf_counter()` at its start."""
    trained: float
    """The same once the next adapter was ready."""


def play_round(run: Run) -> None:
    """Play the next round."""
    now = select_cohort(run)
    adapter, tally, measured = train(run, now)
    now.trained = time.perf_counter()
    run.accept(now.number, adapter, tally)
    now.saves = now.saves or not budgets.are_enough(run.roster)  # the last one
    if "update-norms" in measured:
        run.state.note_norms([measured["update-norms"][str(p)] for p in tally.good])
    record = {**training_record(run, now, tally), **measured}
    if late := run.exchange.count_late():
        run.state.late_replies += late
        record["late-replies"] = late
    if now.refused:
        record["refused"] = {f"site {p}": why for p, why in sorted(now.refused.items())}
    record |= budget_record(run)
    evaluate_and_record(run, now, record)
    check_skipped(run)


def check_skipped(run: Run) -> None:
    """Raise `RoundError` if this round and the one before were skipped; a resume goes on."""
    last = [record for record in run.directory.read_metrics() if record["round"]][-2:]
    if len(last) == 2 and all("skipped" in record for record in last):
        raise RoundError(
            f"Rounds {last[0]['round']} and {last[1]['round']} both lost their masked sums: "
            f"{last[1]['skipped']} Look at the sites named, and resume."
        )


def train(run: Run, now: Round) -> tuple[Adapter, Tally, dict[str, Any]]:
    """Send the adapter, receive the cohort's updates and aggregate them.

    Returns
    -------
    tuple
        The next adapter, the outcome at each site, and measurements of the updates.
    """
    parcels = parcels_for(run, now.number, now.cohort, trains=True)
    if run.config.is_masked:
        return train_masked(run, now, parcels)
    updates, product_error = collector(run, now, parcels)
    tally = receive(run, now, updates, product_error)
    adapter, measured = aggregate(run, now, tally)
    run.sender.pruned = run.rule.ranks()
    return adapter, tally, {**measured, **updates.report(), **product_error.report()}


def train_masked(
    run: Run, now: Round, parcels: dict[int, Parcel]
) -> tuple[Adapter, Tally, dict[str, Any]]:
    """Let the cohort train under masks; aggregate the mean of its changes as one update.

    Nothing is measured of single updates, since the server has none. A round whose one sum is lost
    is skipped: the adapter stays.
    """
    config, limits = run.config, limits_of(run, now)
    most = 1 if config.strategy.weighting == "equal" else max(limits.values(), default=1)
    ranks, known = run.sender.ranks, dict(shapes_of(run.sender.start))
    shapes = ranks.shapes_up(known, now.number, ranks.of_adapter(run.state.adapter))

    tell = noting(run, TRAIN)
    if not parcels:
        raise RoundError(f"Round {now.number}: no site of the cohort is connected.")
    asked = Asked(
        number=now.number,
        messages=lambda said: training_messages(run, now, parcels, MASKED_KIND, said),
        learning_rate=now.learning_rate,
        shapes=shapes,
        most_weight=most,
        least=fewest(run, now, set()),
        following=next_cohort(run, now.number + 1),
    )
    run.masks = run.masks or Masks(config, run.exchange, run.directory)
    outcome = run.masks.summed(asked, tell, run.roster.names)
    tally, found = outcome.tally, outcome.sum
    for site in now.cohort:
        if site not in parcels:
            tally.failed[site] = NOT_THERE
            tell(site, NOT_THERE)
    if found is None and not outcome.is_burned:
        run.roster.spent |= tally.spent
        left = [site for site in now.cohort if site not in run.roster.spent]
        budgets.check(run.roster, now.number, left)
        raise RoundError(outcome.lost)
    run.settle(parcels, tally.good)
    if found is None:
        budgets.note(run.roster, tally)
        run.state.failed_replies += len(tally.good)
        tally.failed |= {site: outcome.silent.get(site, LOST) for site in tally.good}
        tally.good = {}
        return run.state.adapter, tally, outcome.record
    examples = run.roster.examples()
    for site, metrics in tally.good.items():
        metrics.setdefault("num-examples", examples[site])
    run.rule.begin(now.number, run.state.adapter)
    start = ranks.start_of(
        next(iter(parcels.values())).received, known, config.federation.seed, now.number
    )
    mean = unflatten(found.mean, shapes)
    if isinstance(run.rule, Extrapolation):
        run.rule.add_mean(mean, found.square, found.squared_shares)
    else:
        run.rule.add(0, start, mean, 1)
    adapter, measured = aggregate(run, now, tally)
    return adapter, tally, {**measured, **outcome.record}


def next_cohort(run: Run, number: int) -> dict[int, int]:
    """Return partition id → node of a cohort's known sites; empty after the last round."""
    if number > run.config.federation.num_server_rounds:
        return {}
    cards, spent = run.roster.cards, run.roster.spent
    return {
        p: cards[p].node_id for p in cohort_of(run.config, number) if p in cards and p not in spent
    }


def record_start(run: Run) -> None:
    """Evaluate the adapter before training, and write line 0; a drawn one equals the base."""
    refused = run.roster.refusals()
    record = {"round": 0, **({"refused": refused} if refused else {})}
    if run.started_by:
        record["magnitudes-from"] = list(run.started_by)
    if failed := run.attempt.failures(MAGNITUDES):
        record[MAGNITUDES] = failed
    started = time.perf_counter()
    now = Round(0, 0.0, [], {}, saves=False, started=started, trained=started)
    evaluate_and_record(run, now, record)


# --- Cohort ---------------------------------------------------------------------------------------


def select_cohort(run: Run) -> Round:
    """Update the roster, then draw the next round's cohort by seed."""
    started = time.perf_counter()
    refused = run.roster.refresh(run.exchange)
    if run.write_sites():
        run.listener.on_roll_call(list(run.roster.introduced.values()))
    number, total = run.state.round + 1, run.config.federation.num_server_rounds
    cohort = [p for p in cohort_of(run.config, number) if p not in run.roster.spent]
    budgets.check(run.roster, number, cohort)
    run.attempt.cohort = cohort
    return Round(
        number=number,
        learning_rate=round_learning_rate_of(run.config, number),
        cohort=cohort,
        refused=refused,
        saves=number % run.config.train.save_every_round == 0 or number == total,
        started=started,
        trained=started,
    )


# --- Receive and aggregate ------------------------------------------------------------------------


def collector(run: Run, now: Round, parcels: dict[int, Parcel]) -> tuple[Updates, ProductError]:
    """Return the collector of a round's updates, and the measure of the factor-averaging error."""
    config, how = run.config, run.config.communication
    updates = Updates(
        now.number,
        parcels,
        limits_of(run, now),
        run.sender,
        config.strategy,
        config.defence,
        codec_named(how.uplink_codec, how),
        run.state.earlier_norms,
    )
    averages_factors = run.sender.ranks.strategy.mean_of_factors
    names = list(shapes_of(run.state.adapter))
    measures = averages_factors and (now.saves or now.number == 1)
    modules = measured_modules(names, len(parcels)) if measures else []
    return updates, ProductError(run.state.adapter, modules)


def limits_of(run: Run, now: Round) -> dict[int, int]:
    """Return the most that each connected site of a cohort may weigh, in examples."""
    examples = {p: n for p, n in run.roster.examples().items() if p in now.cohort}
    return limited(examples, run.config.strategy.largest_weight)


def receive(run: Run, now: Round, updates: Updates, product_error: ProductError) -> Tally:
    """Let the cohort train; check each client update and aggregate it as it arrives."""
    parcels, cards, state = updates.parcels, run.roster.cards, run.state
    outgoing = training_messages(run, now, parcels)
    run.rule.begin(now.number, state.adapter)

    def add(site: int, change: Adapter, weight: int) -> None:
        run.rule.add(site, updates.start_of(site), change, weight)
        product_error.add(change, weight)

    def use(site: int, reply: Message) -> messages.Metrics:
        required = messages.TRAIN_METRICS
        if cards[site].in_custody or run.config.is_private:
            required = messages.TRAIN_METRICS_IN_CUSTODY
        metrics = messages.metrics_of(reply, required)
        if (update := updates.admit(site, reply, metrics)) is not None:
            add(site, *update)
        return metrics

    tell = noting(run, TRAIN)
    tally = run.exchange.ask(
        "train", outgoing, use, lambda p, why: None if updates.waits(p) else tell(p, why)
    )
    for site in now.cohort:
        if site not in parcels:
            tally.failed[site] = NOT_THERE
            tell(site, NOT_THERE)
    for site, update in updates.screened(tally.failed, tell):
        add(site, *update)
    for site in tally.failed:
        tally.good.pop(site, None)
    run.settle(parcels, tally.good)
    return tally


def training_messages(
    run: Run,
    now: Round,
    parcels: Mapping[int, Parcel],
    kind: str = MessageType.TRAIN,
    said: Mapping[str, int | str] = MappingProxyType({}),
) -> dict[int, Message]:
    """Return the messages that let sites train.

    Parameters
    ----------
    said
        What the instruction says besides, for a masked sum.
    """
    cards = run.roster.cards
    return {
        p: run.exchange.message(
            cards[p].node_id,
            kind,
            now.number,
            parcel,
            {
                "learning-rate": now.learning_rate,
                **continues_at(run, p),
                **cards[p].arithmetic,
                **said,
            },
        )
        for p, parcel in parcels.items()
    }


def fewest(run: Run, now: Round, spent: Collection[int]) -> int:
    """Return how many updates a round needs, without sites whose budget turned out to be spent."""
    asked = len(now.cohort) - len(spent)
    return math.ceil(run.config.strategy.min_reply_fraction * asked - 1e-9)


def aggregate(run: Run, now: Round, tally: Tally) -> tuple[Adapter, dict[str, Any]]:
    """Return the next adapter, and what the rule reports about it.

    Raises
    ------
    RoundError
        If fewer than `strategy.min-reply-fraction` of the cohort sent a usable update (all failures
        are listed), or the aggregate is not finite.
    """
    needed = fewest(run, now, tally.spent)
    if not tally.good:
        run.roster.spent |= tally.spent
        budgets.check(run.roster, now.number, [])
    if len(tally.good) < needed:
        raise RoundError(
            f"Round {now.number}: {len(tally.good)} of {len(now.cohort)} sites returned a valid "
            f"update, but at least {needed} are required (strategy.min-reply-fraction = "
            f"{run.config.strategy.min_reply_fraction:g}). {tally.reasons(run.roster.names)}"
        )
    adapter = run.rule.result()
    if not all(map(all_finite, (*adapter.values(), *run.rule.state().values()))):
        raise RoundError(
            f"Round {now.number}: {run.config.strategy.name} aggregated finite updates to values "
            "that are not finite. Lower the learning rates, or set defence.update-norm-bound; the "
            "round is dropped."
        )
    return adapter, run.rule.report()


# --- Record ---------------------------------------------------------------------------------------


def training_record(run: Run, now: Round, tally: Tally) -> dict[str, Any]:
    """Return the training part of a line of metrics.jsonl; what no site tells is null.

    Means are over the sites that tell the figure, sums need all of them.
    """
    good, state, limits = tally.good.values(), run.state, limits_of(run, now)
    weights = {p: claimed_examples(m, limits[p]) for p, m in tally.good.items()}
    is_weighted = run.config.strategy.weighting == "examples"
    lowered = {
        str(p): examples
        for p, examples in run.roster.examples().items()
        if is_weighted and p in tally.good and examples > limits[p]
    }
    introduced = run.roster.introduced
    known = {p: int(facts["train-examples"]) for p, facts in introduced.items()}
    covered = sum(share * known[p] for p, share in state.coverage.items() if p in known)
    tells_coverage = tally.good and not tally.good.keys() - state.coverage.keys()
    seconds = [m.get("seconds") for m in good]
    return {
        "round": now.number,
        "flower-run": str(run.exchange.grid.run.run_id),
        "learning-rate": now.learning_rate,
        "cohort": now.cohort,
        "good": sorted(tally.good),
        "failed": {str(p): why for p, why in sorted(tally.failed.items())},
        "train-loss": told.mean(tally.good, "train-loss", weights),
        **budgets.loss_noise(tally.good, introduced, weights),
        "proximal-penalty": told.mean(tally.good, "proximal-penalty", weights),
        "coverage": covered / sum(known.values()) if tells_coverage else None,
        "site-coverage": {
            str(p): state.coverage[p] for p in sorted(tally.good) if p in state.coverage
        },
        **{name: told.total(good, name) for name in ("examples", "tokens", "padding-tokens")},
        **({"weights-limited": lowered} if lowered else {}),
        "visit-seconds": None if None in seconds else sum(float(s) for s in seconds if s),
    }


def budget_record(run: Run) -> dict[str, Any]:
    """Return the part of a line of metrics.jsonl on privacy budgets; empty without a guarantee."""
    roster = run.roster
    told = [facts for facts in roster.introduced.values() if EPSILON in facts]
    fell = {str(p): list(pair) for p, pair in budgets.fallen(told).items()}
    return {
        **({"epsilon": {str(f["partition-id"]): f[EPSILON] for f in told}} if told else {}),
        **({"budget-spent": sorted(roster.spent)} if roster.spent else {}),
        **({"epsilon-fell": fell} if fell else {}),
    }


def evaluate_and_record(run: Run, now: Round, record: dict[str, Any]) -> None:
    """Measure the held-out loss of the current adapter, then write the round to disk."""
    state = run.state
    if run.evaluation_cohort:
        loss, tally = evaluate(run)
        if now.number == 0 and tally.failed and not tally.good:
            why = tally.reasons(run.roster.names)
            raise RoundError(f"No site could evaluate the adapter before training. {why}")
        record["held-out-loss"] = loss
        if run.config.is_on_pairs:
            record |= told.pair_figures(tally.good.values())
        losses = told.site_losses(tally.good)
        record[told.MEDIAN_LOSS] = statistics.median(losses.values()) if losses else None
        record["held-out-losses"] = {str(p): value for p, value in losses.items()}
        record["evaluated"] = sorted(tally.good)
        record["evaluate-failed"] = {str(p): why for p, why in sorted(tally.failed.items())}
    evaluated = time.perf_counter()
    if now.saves:
        record["checkpoint"] = save_checkpoint(run, record)
    ended = time.perf_counter()
    state.seconds += ended - now.started
    record |= {
        "communication-mib": state.ledger.mib,
        "communication-up-mib": state.ledger.mib_of("up"),
        "seconds": ended - now.started,
        "train-seconds": now.trained - now.started,
        "evaluate-seconds": evaluated - now.trained,
    }
    sites = list(run.roster.introduced.values())
    start = magnitudes_of(run.sender.start)
    run.directory.save_state(state.adapter, state.to_json(record), run.rule.state(), sites, start)
    run.attempt = Attempt.begin(now.number, state.ledger)
    run.directory.append_metrics(record)
    run.directory.write_json("ledger.json", state.ledger.as_dict())
    run.listener.on_round(record)


def save_checkpoint(run: Run, record: Mapping[str, Any]) -> str:
    """Save a PEFT checkpoint with its model card; return the name of its folder.

    Parameters
    ----------
    record
        The round's line of metrics.jsonl, with what was evaluated.
    """
    state = run.state
    sites = list(run.roster.introduced.values())
    found = Findings(
        sites=sites,
        plan=run.directory.read_json("plan.json") or {},
        lora=run.adapter_spec,
        licence=licence_of(run.config.model.source),
        failed_replies=state.failed_replies,
        pairs=told.pairs_in(record),
        privacy=budgets.summary_of(run.config, sites, run.roster.spent),
    )
    loss, mib = record.get("held-out-loss"), state.ledger.mib
    card = model_card(run.config, sorted(run.targets.modules), state.round, loss, mib, found)
    described = peft_config(run.adapter_spec, run.targets, run.config.model.name)
    described.revision = run.config.model.revision or None
    folder = run.directory.save_checkpoint(state.round, state.adapter, described, card)
    run.listener.on_checkpoint(state.round, str(folder))
    return folder.name
