"""A run from the server's side: begin or resume, play the rounds, finish; everything written down.

The story itself is `server_app.federate`; here are its steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from grandrounds import messages, protocol, roll_call, rounds, sampling, schedules
from grandrounds.aggregation.make import make_rule, rule_settings
from grandrounds.aggregation.rule import Rule
from grandrounds.codecs import codec_named
from grandrounds.config import Config, share_of
from grandrounds.downlink import Sender
from grandrounds.drawing import drawn_adapter
from grandrounds.environment import environment
from grandrounds.errors import DataError, RoundError
from grandrounds.formulary import BASE_NAME as FORMULARY
from grandrounds.model import LoraSpec, adapter_layout, peft_config
from grandrounds.model_card import model_card
from grandrounds.planning import Plan, plan_config
from grandrounds.resuming import check_resumable, check_same_sites
from grandrounds.roll_call import SiteCard
from grandrounds.rounds import Tally
from grandrounds.run_directory import RunDirectory
from grandrounds.run_state import State, summarize
from grandrounds.strategies import STRATEGIES
from grandrounds.updates import Terms, claimed_examples

Listener = Callable[[str, Mapping[str, Any]], None]
"""Called with (event, data): plan, roll-call, reply, round, checkpoint, finished."""


@dataclass
class Run:
    """A run in progress."""

    config: Config
    directory: RunDirectory
    is_new: bool
    """Whether the directory was made by this process."""
    plan: Plan
    lora: LoraSpec
    """The adapter that a site trains, with the targets that were asked for."""
    targets: list[str]
    """The modules that it is on."""
    state: State
    rule: Rule
    """How replies become the next adapter."""
    sender: Sender
    """How the adapter comes to the sites."""
    listener: Listener
    cards: dict[int, SiteCard] = field(default_factory=dict)
    """The sites, after the roll call."""
    evaluation_cohort: list[int] = field(default_factory=list)
    """Who answers held-out loss."""


def default_run_directory(config: Config) -> Path:
    """Return `runs/<date>-<time>-<model>` below the current folder."""
    model = config.model.name.rstrip("/").rpartition("/")[2]
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{model}"


def begin(config: Config, listener: Listener) -> Run:
    """Open the run directory, and make or load the adapter; no base model is loaded.

    Raises
    ------
    RunDirectoryError
        If the place cannot be written, holds another run, or a resume asks for another config.
    ModelError
        If the base's configuration is not there, or a target module matches nothing.
    """
    federation = config.federation
    directory = RunDirectory.open(Path(federation.resume_from)) if federation.resume_from else None
    if directory is not None:
        check_resumable(directory, config)
    lora = config.lora
    spec = LoraSpec(lora.peft_lora_r, lora.peft_lora_alpha, lora.target_modules, lora.dropout)
    shapes, targets = adapter_layout(config.model.name, spec)
    evaluated = share_of(config.strategy.fraction_evaluate, config.data.num_partitions)
    plan = plan_config(config, shapes)
    is_new = directory is None
    if directory is None:
        path = Path(federation.run_directory or default_run_directory(config))
        directory = RunDirectory.create(path, config)
    directory.write_json("environment.json", environment())
    described = {**plan.as_dict(), "target-modules": targets}
    directory.write_json("plan.json", described)
    saved = directory.load_state()
    start = drawn_adapter(shapes, federation.seed)
    rule = make_rule(rule_settings(config))
    if saved is None:
        state = State(0, start)
    else:
        state = State.from_json(*saved)
        rule.restore(directory.load_rule_state())
        state.adapter = {name: state.adapter[name] for name in shapes}  # safetensors sorts
        directory.rewind(state.round, saved[1]["record"])
        directory.remove("summary.json")  # of the part that ended
    run = Run(
        config,
        directory,
        is_new,
        plan,
        spec,
        targets,
        state,
        rule,
        Sender(
            config.strategy.name, config.communication, start, federation.seed, config.site_ranks
        ),
        listener,
        evaluation_cohort=sampling.evaluation_cohort(
            federation.seed, config.data.num_partitions, evaluated
        ),
    )
    listener(
        "plan",
        {
            **described,
            "directory": str(directory.path),
            "resumed-after": state.round if saved else None,
        },
    )
    return run


def open_session(run: Run, grid: Grid) -> None:
    """Wait for the sites and call the roll; write down and tell who is there."""
    nodes = roll_call.wait_for_nodes(grid, run.config.data.num_partitions)
    timeout_seconds = run.config.strategy.round_timeout_seconds
    run.cards = roll_call.roll_call(grid, nodes, timeout_seconds, messages.INTRODUCTION)
    sites = [dict(card.facts) for card in run.cards.values()]
    check_same_sites(run.directory.read_json("sites.json"), sites)
    judges = run.evaluation_cohort
    if judges and not any(int(run.cards[p].facts["held-out-examples"]) for p in judges):
        raise DataError(
            f"None of the sites drawn for held-out loss ({', '.join(map(str, judges))}) holds an "
            "example out: their data are too few. Raise data.held-out-fraction, give more data, or "
            "set strategy.fraction-evaluate = 0."
        )
    run.directory.write_json("sites.json", sites)
    run.listener("roll-call", {"sites": sites})


def play_round(run: Run, grid: Grid) -> None:
    """Play the next round: train, evaluate, write down."""
    config, state = run.config, run.state
    started = time.perf_counter()
    number = state.round + 1
    total = config.federation.num_server_rounds
    learning_rate = schedules.round_learning_rate(
        number, total, config.train.learning_rate_max, config.train.learning_rate_min
    )
    cohort = sampling.training_cohort(
        config.federation.seed,
        number,
        config.data.num_partitions,
        config.cohort_size,
        config.strategy.cohorts == "balanced",
    )
    instructions: dict[int, dict[str, float | int]] = {
        p: {"learning-rate": learning_rate, "cursor": state.cursors.get(p, 0)} for p in cohort
    }

    def on_reply(partition: int, failure: str | None) -> None:
        state.failed_replies += failure is not None
        run.listener("reply", {"round": number, "partition": partition, "failure": failure})

    saves = number % config.train.save_every_round == 0 or number == total
    state.adapter, tally, measured = rounds.train_round(
        grid,
        number,
        state.adapter,
        instructions,
        run.cards,
        state.ledger,
        rule=run.rule,
        sender=run.sender,
        uplink_codec=codec_named(config.communication.uplink_codec, config.communication),
        terms=Terms(
            min_reply_fraction=config.strategy.min_reply_fraction,
            equal_weights=config.strategy.weighting == "equal",
            update_norm_bound=config.defence.update_norm_bound,
            min_cosine=config.defence.min_cosine,
        ),
        timeout_seconds=config.strategy.round_timeout_seconds,
        on_reply=on_reply,
        measure_product_error=STRATEGIES[config.strategy.name].mean_of_factors
        and (saves or number == 1),
        required_metrics=messages.TRAIN_METRICS,
    )
    trained = time.perf_counter()
    state.round = number
    remember_cursors(state, tally)
    remember_loads(state, tally)
    record = training_record(run, number, learning_rate, cohort, tally)
    record |= measured
    judge_and_write(run, grid, record, started, trained, saves)


def remember_cursors(state: State, tally: Tally) -> None:
    """Take over how far the sites of a training round have come in their examples."""
    for partition, metrics in tally.good.items():
        state.cursors[partition] = int(metrics["cursor"])
        state.coverage[partition] = float(metrics["coverage"])


def remember_loads(state: State, tally: Tally) -> None:
    """Take over how often the processes behind the replies have loaded a base."""
    for metrics in tally.good.values():
        if {"process-id", "base-loads"} <= metrics.keys():
            state.base_loads[str(metrics["process-id"])] = int(metrics["base-loads"])


def training_record(
    run: Run, number: int, learning_rate: float, cohort: list[int], tally: Tally
) -> dict[str, Any]:
    """Return one line of metrics.jsonl, as far as training goes."""
    good, sites = tally.good.values(), run.cards
    weights = {p: claimed_examples(m, sites[p]) for p, m in tally.good.items()}

    def mean(name: str) -> float:
        weighted = sum(float(m[name]) * weights[p] for p, m in tally.good.items())
        return weighted / sum(weights.values())

    everything = sum(card.num_examples for card in sites.values())
    covered = sum(c * sites[p].num_examples for p, c in run.state.coverage.items())
    return {
        "round": number,
        "learning-rate": learning_rate,
        "cohort": cohort,
        "good": sorted(tally.good),
        "failed": {str(p): why for p, why in sorted(tally.failed.items())},
        "train-loss": mean("train-loss"),
        "proximal-penalty": mean("proximal-penalty"),
        "coverage": covered / everything,
        "site-coverage": {str(p): run.state.coverage[p] for p in sorted(tally.good)},
        **{
            name: sum(int(m[name]) for m in good)
            for name in ("examples", "tokens", "padding-tokens")
        },
        "visit-seconds": sum(float(m["seconds"]) for m in good),
    }


def judge_and_write(
    run: Run, grid: Grid, record: dict[str, Any], started: float, trained: float, saves: bool
) -> None:
    """Ask the held-out loss of the adapter as it is, then write the round down."""
    state = run.state
    if run.evaluation_cohort:
        loss, tally = rounds.evaluate_round(
            grid,
            state.round,
            state.adapter,
            run.evaluation_cohort,
            run.cards,
            state.ledger,
            run.sender,
            run.config.strategy.round_timeout_seconds,
        )
        remember_loads(state, tally)
        state.failed_replies += len(tally.failed)
        if state.round == 0 and tally.failed and not tally.good:
            reasons = "; ".join(f"site {p}: {why}" for p, why in sorted(tally.failed.items()))
            raise RoundError(f"No site could judge the untrained adapter. {reasons}")
        record["held-out-loss"] = loss
        record["evaluated"] = sorted(tally.good)
        record["evaluate-failed"] = {str(p): why for p, why in sorted(tally.failed.items())}
    evaluated = time.perf_counter()
    if saves:
        loss = record.get("held-out-loss")
        card = model_card(run.config, sorted(run.targets), state.round, loss, state.ledger.mib)
        described = peft_config(spec_of(run), run.targets, run.config.model.name)
        folder = run.directory.save_checkpoint(state.round, state.adapter, described, card)
        run.listener("checkpoint", {"round": state.round, "path": str(folder)})
        record["checkpoint"] = folder.name
    now = time.perf_counter()
    state.seconds += now - started
    record |= {
        "communication-mib": state.ledger.mib,
        "seconds": now - started,
        "train-seconds": trained - started,
        "evaluate-seconds": evaluated - trained,
    }
    run.directory.save_state(state.round, state.adapter, state.to_json(record), run.rule.state())
    run.directory.append_metrics(record)
    run.directory.write_json("ledger.json", state.ledger.as_dict())
    run.listener("round", record)


def spec_of(run: Run) -> LoraSpec:
    """Return the specification of the adapter as it is: `flora`'s has a rank of its own.

    The factor alpha / r stays the same.
    """
    rank = protocol.rank_of(protocol.shapes_of(run.state.adapter))
    alpha = run.lora.alpha * rank / run.lora.rank
    return dataclasses.replace(run.lora, rank=rank, alpha=alpha)


def record_start(run: Run, grid: Grid) -> None:
    """Write down line 0: the untrained adapter, which is the base."""
    now = time.perf_counter()
    judge_and_write(run, grid, {"round": 0}, now, now, saves=False)


def finish(run: Run, grid: Grid) -> dict[str, Any]:
    """Ask the formulary's questions where they were trained, and write the summary."""
    state, config = run.state, run.config
    scores = None
    if config.static.name == FORMULARY:
        scores, tally = rounds.examine_formulary(
            grid,
            state.adapter,
            run.cards,
            state.ledger,
            run.sender,
            config.strategy.round_timeout_seconds,
        )
        state.failed_replies += len(tally.failed)
    run.directory.write_json("ledger.json", state.ledger.as_dict())
    summary = summary_of(run, "completed")
    if config.static.name == FORMULARY:
        summary["formulary"] = scores
    run.directory.write_json("summary.json", summary)
    run.listener("finished", {**summary, "directory": str(run.directory.path)})
    return summary


def fail(run: Run, status: str, reason: str) -> str:
    """Write the summary of a run that ended early, and return what is kept, in words.

    Finished rounds and checkpoints stay. A new run that ended before anything was measured leaves
    no directory behind.
    """
    if run.is_new and not run.directory.read_metrics():
        run.directory.discard()
        return "nothing was finished yet, nothing is left behind"
    run.directory.write_json("summary.json", {**summary_of(run, status), "reason": reason})
    return f"finished rounds are kept; grandrounds run --resume {run.directory.path}"


def summary_of(run: Run, status: str) -> dict[str, Any]:
    """Return the summary of a run as it stands."""
    sites = [card.facts for card in run.cards.values()] or run.directory.read_json("sites.json")
    metrics = run.directory.read_metrics()
    return summarize(run.config, run.state, run.plan, sites or [], metrics, status)
