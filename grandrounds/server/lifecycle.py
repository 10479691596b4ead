"""A run from the server's side: begin or resume, play the rounds, finish; everything written down.

The story itself is `server_app.federate`; here are its steps.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from grandrounds.config import recipes
from grandrounds.config.keys import Config, share_of
from grandrounds.config.strategies import STRATEGIES
from grandrounds.data.formulary import FORMULARY
from grandrounds.errors import DataError, RoundError, RunDirectoryError
from grandrounds.model.lora import LoraSpec, adapter_layout, peft_config
from grandrounds.server import roll_call, rounds
from grandrounds.server.admitted import admitted_nodes
from grandrounds.server.aggregation.make import make_rule, rule_settings
from grandrounds.server.directory import RunDirectory, environment
from grandrounds.server.model_card import Findings, have_own_data, model_card
from grandrounds.server.run import (
    Listener,
    Run,
    State,
    remember_cursors,
    remember_loads,
    remember_sites,
    spec_of,
    stragglers,
    summarize,
    training_record,
)
from grandrounds.server.updates import Terms
from grandrounds.wire import messages
from grandrounds.wire import schedule as sampling
from grandrounds.wire.codecs import codec_named
from grandrounds.wire.downlink import Sender
from grandrounds.wire.drawing import drawn_adapter
from grandrounds.wire.traffic import plan_config


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
    directory.hold()
    directory.write_json("environment.json", environment())
    described = {**plan.as_dict(), "target-modules": targets}
    directory.write_json("plan.json", described)
    saved = directory.load_state()
    start = drawn_adapter(shapes, federation.seed)
    rule = make_rule(rule_settings(config))
    if saved is None:
        state = State(0, start, secrets.token_hex(8))
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
            config.strategy.name,
            config.communication,
            start,
            federation.seed,
            config.site_ranks,
            state.run,
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
    strategy, num_sites = run.config.strategy, run.config.data.num_partitions
    site_nodes = admitted_nodes(run.config.federation)
    nodes = roll_call.wait_for_nodes(
        grid,
        num_sites,
        strategy.connect_timeout_seconds,
        strategy.min_sites or num_sites,
        site_nodes,
    )
    refused: dict[int, str] = {}
    run.cards = roll_call.roll_call(
        grid,
        nodes,
        strategy.round_timeout_seconds,
        messages.INTRODUCTION,
        num_sites=num_sites,
        run=run.state.run,
        least=strategy.min_sites or None,
        refused=refused,
        site_nodes=site_nodes,
    )
    run.flower_run = grid.run.run_id
    sites = [dict(card.facts) for card in run.cards.values()]
    before = run.directory.read_json("sites.json") or []
    check_same_sites(before, sites)
    judges = run.evaluation_cohort
    there = [run.cards[p].facts for p in judges if p in run.cards]
    if there and not any(int(facts["held-out-examples"]) for facts in there):
        raise DataError(
            f"None of the sites drawn for held-out loss ({', '.join(map(str, judges))}) holds an "
            "example out: their data are too few. Raise data.held-out-fraction, give more data, or "
            "set strategy.fraction-evaluate = 0."
        )
    run.introduced = {site["partition-id"]: site for site in before}
    remember_sites(run)
    run.refused = {f"node {node}": why for node, why in refused.items()}
    run.listener("roll-call", {"sites": sites})


def play_round(run: Run, grid: Grid) -> None:
    """Play the next round: train, evaluate, write down."""
    config, state = run.config, run.state
    started = time.perf_counter()
    refused = roll_call.refresh(
        grid,
        run.cards,
        config.data.num_partitions,
        run.suspected,
        config.strategy.round_timeout_seconds,
        state.run,
        messages.INTRODUCTION,
        introduced=run.introduced,
        site_nodes=admitted_nodes(config.federation),
    )
    remember_sites(run)
    number = state.round + 1
    total = config.federation.num_server_rounds
    learning_rate = sampling.round_learning_rate(
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
        late=run.late,
    )
    run.suspected = set(tally.failed)
    trained = time.perf_counter()
    state.round = number
    remember_cursors(state, tally)
    remember_loads(state, tally)
    record = training_record(run, number, learning_rate, cohort, tally)
    record |= measured
    record |= stragglers(run, grid)
    if refused:
        record["refused"] = {f"site {p}": why for p, why in sorted(refused.items())}
    judge_and_write(run, grid, record, started, trained, saves)


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
        found = Findings(own_data=have_own_data(card.facts for card in run.cards.values()))
        card = model_card(
            run.config, sorted(run.targets), state.round, loss, state.ledger.mib, found
        )
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


def record_start(run: Run, grid: Grid) -> None:
    """Write down line 0: the untrained adapter, which is the base."""
    now = time.perf_counter()
    record = {"round": 0, **({"refused": run.refused} if run.refused else {})}
    judge_and_write(run, grid, record, now, now, saves=False)


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
        remember_loads(state, tally)
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
    sites = list(run.introduced.values()) or run.directory.read_json("sites.json")
    metrics = run.directory.read_metrics()
    return summarize(run.config, run.state, run.plan, sites or [], metrics, status)


SAME_ON_RESUME = (
    "rows",
    "train-examples",
    "held-out-examples",
    "truncated",
    "unlearnable",
    "base",
    "prompt",
)
"""What a site says at roll call that must not change within a run."""


def check_resumable(directory: RunDirectory, config: Config) -> None:
    """Raise `RunDirectoryError` if the run is over, or was started with another configuration."""
    summary = directory.read_json("summary.json")
    if summary and summary["status"] == "completed":
        raise RunDirectoryError(
            f"{directory.path} is a completed run of {summary['rounds']} rounds; there is nothing "
            "to resume. Start a new run for more rounds."
        )
    started_with = recipes.resolve(recipes.load_recipe(directory.path / "config.toml"))
    if changes := recipes.differences(started_with, config):
        raise RunDirectoryError(
            f"{directory.path} was started with another configuration: {'; '.join(changes)}. "
            "Resume without these changes, or start a new run with them."
        )


def check_same_sites(
    before: Sequence[Mapping[str, Any]] | None, now: Sequence[Mapping[str, Any]]
) -> None:
    """Raise `RunDirectoryError` if a resumed run would go on with other data, base or prompt."""
    earlier = {site["partition-id"]: site for site in before or ()}
    for new in now:
        if (old := earlier.get(new["partition-id"])) is None:
            continue
        for fact in SAME_ON_RESUME:
            if old[fact] != new[fact]:
                raise RunDirectoryError(
                    f"Site {new['partition-id']} is not what it was when the run started: its "
                    f"{fact} was {old[fact]} and is {new[fact]}. Restore it to resume, or start a "
                    "new run."
                )
