"""The life of a run: begin or resume, open the session, finish or fail."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from grandrounds.config.keys import Config
from grandrounds.config.words import command
from grandrounds.errors import DataError, GrandRoundsError, RunDirectoryError
from grandrounds.model.architectures import unmatched
from grandrounds.model.base import stored_bits
from grandrounds.model.lora import LoraSpec, adapter_layout
from grandrounds.server import saved_start
from grandrounds.server.admitted import (
    admitted_examples,
    admitted_names,
    admitted_nodes,
    revoked_nodes,
)
from grandrounds.server.aggregation.make import filled_in, make_rule
from grandrounds.server.described import named_start
from grandrounds.server.directory import (
    KEPT,
    NONE_FINISHED,
    RESUME_WITH,
    RunDirectory,
    default_run_directory,
    environment,
)
from grandrounds.server.exchange import Exchange
from grandrounds.server.introductions import has_changed
from grandrounds.server.judging import examine_formulary, examiners_of
from grandrounds.server.listeners import Listener
from grandrounds.server.magnitudes import ask_for_magnitudes
from grandrounds.server.masks.rosters import check_roster, keep_roster
from grandrounds.server.packages import PACKAGES, installed
from grandrounds.server.personal import personalise
from grandrounds.server.resumption import Resumption, examine, restore
from grandrounds.server.roll_call import Roster
from grandrounds.server.run import Run, State, summary_of
from grandrounds.server.subgroups import tell_subgroups
from grandrounds.server.unfinished import EXAM, Attempt, unfinished_of
from grandrounds.wire.adapter import (
    Adapter,
    Ranks,
    is_magnitude,
    magnitudes_of,
    of_factors,
    started_adapter,
)
from grandrounds.wire.downlink import Sender
from grandrounds.wire.guarantee import BUDGET_SPENT, is_private
from grandrounds.wire.schedule import evaluation_cohort_of
from grandrounds.wire.told import SAME_IF_TOLD, SAME_IN_A_RUN, in_custody
from grandrounds.wire.traffic import plan_config


def begin(grid: Grid, config: Config, listener: Listener) -> Run:
    """Open the run directory, and draw or load the adapter; loads no base model.

    If that fails, or is interrupted, a new directory is removed again.

    Raises
    ------
    RunDirectoryError
        If the directory cannot be written, holds another run, or was started with another config.
    ModelError
        If the base's configuration is missing, or a target module matches nothing.
    """
    with ExitStack() as undo:
        run = _begun(grid, config, listener, undo)
        undo.pop_all()
    return run


def _begun(grid: Grid, config: Config, listener: Listener, undo: ExitStack) -> Run:
    federation, strategy = config.federation, config.strategy
    check_roster(config)
    directory = RunDirectory.open(Path(federation.resume_from)) if federation.resume_from else None
    resumed = held_for_resume(directory, config) if directory else None
    if directory is not None:
        undo.callback(directory.release)
    spec = LoraSpec.of(config)
    shapes, targets = adapter_layout(config.model.source, spec)
    plan = plan_config(config, shapes, examiners_of(grid))
    ranks = Ranks.of(config)
    if ranks.stays:  # the server never has more than what travels
        shapes = of_factors(shapes, ranks.strategy.sends)
    is_new, continued = directory is None, None
    if config.lora.is_continued and resumed is None:
        continued = saved_start.start_of(config, shapes, targets)
        config = saved_start.with_hash(config, continued)
    if directory is None:
        path = Path(federation.run_directory or default_run_directory(config))
        directory = RunDirectory.create(path, config)
        undo.callback(directory.discard)
    if is_new:
        directory.hold()
    keep_roster(config, directory.path)
    if continued is not None:
        saved_start.keep(directory.path, continued)
    elif config.lora.is_continued:
        continued = saved_start.kept(directory.path, config, shapes)
    start = started_adapter(shapes, federation.seed, {}) if continued is None else continued
    rule = make_rule(filled_in(config))
    if resumed is None:
        state = State(0, start, secrets.token_hex(8))
        before = directory.read_json("sites.json") or []
        state.count_on(unfinished_of(directory.path)[0])
    else:
        state, before = resumed.state, list(resumed.sites)
        state.adapter = in_order(state.adapter, shapes, resumed.saved.folder)
        began = in_order(resumed.saved.start, filter(is_magnitude, shapes), resumed.saved.folder)
        if continued is None:
            start = started_adapter(shapes, federation.seed, began)
        rule.restore(resumed.saved.rule)
        restore(directory, resumed)
    begun = {"from-adapter-sha256": config.lora.from_adapter_sha256} if continued else {}
    directory.write_json("environment.json", {**environment(), **begun})
    directory.write_json(PACKAGES, {"packages": installed()})
    described = {**plan.as_dict(), "target-modules": list(targets.modules)}
    if targets.frozen:
        described["frozen-modules"] = list(targets.frozen)
    if bits := stored_bits(config.model.source):
        described["stored-bits"] = bits
    if missing := unmatched(spec.target_modules, targets.modules):
        described["target-modules-without-match"] = missing
    if continued:
        described["from-adapter"] = named_start(config)
    directory.write_json("plan.json", described)
    run = Run(
        config=config,
        directory=directory,
        is_new=is_new,
        plan=plan,
        lora=spec,
        targets=targets,
        state=state,
        rule=rule,
        sender=Sender(ranks, config.communication, start, federation.seed, rule.ranks()),
        exchange=Exchange(grid, state.ledger, state.run, strategy.round_timeout_seconds),
        roster=Roster(
            config.data.num_partitions,
            strategy.min_sites,
            admitted=lambda: admitted_nodes(federation),
            admitted_names=lambda: admitted_names(federation),
            admitted_examples=lambda: admitted_examples(federation),
            revoked=lambda: revoked_nodes(federation),
            introduced={site["partition-id"]: site for site in before},
            spent={site["partition-id"] for site in before if site.get(BUDGET_SPENT)},
        ),
        listener=listener,
        evaluation_cohort=evaluation_cohort_of(config),
        continued=continued,
        shapes=shapes,
    )
    resumed_after = state.round if resumed else None
    run.attempt = Attempt.begin(resumed_after, state.ledger)
    place = {"directory": str(directory.path), "resumed-after": resumed_after}
    listener.on_plan({**described, **place, "run": state.run})
    return run


def held_for_resume(directory: RunDirectory, config: Config) -> Resumption | None:
    """Lock the directory of a run that is resumed, and read what it goes on from.

    The lock is released if that is an error.
    """
    directory.hold()
    try:
        return examine(directory, config)
    except GrandRoundsError:
        directory.release()
        raise


def in_order(adapter: Adapter, wanted: Iterable[str], folder: Path) -> Adapter:
    """Return an adapter with its names in the model's order, since safetensors sorts them."""
    names = list(wanted)
    if adapter.keys() != set(names):
        raise RunDirectoryError(
            f"{folder} is of another adapter: its tensors are not those of the base and the target "
            "modules of this run. Restore the state from a copy, or start a new run."
        )
    return {name: adapter[name] for name in names}


def open_session(run: Run) -> None:
    """Wait for the sites, call the roll, and record who is present.

    Raises
    ------
    EngineError
        If too few sites are present, or two differ in what must be the same.
    RunDirectoryError
        If a resumed run would continue with other data, another base or another prompt.
    DataError
        If no site of the evaluation cohort has held-out examples.
    """
    roster, judges = run.roster, run.evaluation_cohort
    roster.open(run.exchange, run.config.strategy.connect_timeout_seconds)
    check_same_sites(roster)
    roster.note_arithmetic()
    start_magnitudes(run)
    there = [roster.cards[p].facts for p in judges if p in roster.cards]
    tells = any(int(facts.get("held-out-examples", 0)) for facts in there)
    if there and not tells and all(map(is_private, there)):
        run.evaluation_cohort = []  # nobody is asked for what nobody tells
    elif there and not tells:
        kept = " or keep their loss to themselves" if any(map(in_custody, there)) else ""
        raise DataError(
            f"None of the sites selected for held-out loss ({roster.names.listed(judges)}) has "
            f"held-out examples: they have too few different questions{kept}. Raise "
            "data.held-out-fraction, use more data, or set strategy.fraction-evaluate = 0."
        )
    run.write_sites()
    run.listener.on_roll_call([dict(card.facts) for card in roster.cards.values()])


def start_magnitudes(run: Run) -> None:
    """With DoRA, make the sites' norms the start of the magnitudes; a resume has them already."""
    if not run.magnitudes or magnitudes_of(run.sender.start):
        return
    start = started_adapter(run.shapes, run.config.federation.seed, ask_for_magnitudes(run))
    run.sender = replace(run.sender, start=start)
    run.state.adapter = start


def finish(run: Run) -> dict[str, Any]:
    """Let sites make personal adapters, hold the formulary's exam if the run trained on it, and
    write the summary."""
    personal = personalise(run) if run.config.is_personal else {}
    told = tell_subgroups(run) if run.config.subgroup_columns else {}
    is_formulary = run.config.is_on_formulary and not run.sender.ranks.stays
    scores, by_site = examine_formulary(run) if is_formulary else (None, {})
    run.directory.write_json("ledger.json", run.state.ledger.as_dict())
    summary = summary_of(run, "completed")
    if personal:
        summary["personal"] = personal
    if told:
        summary["subgroups"] = told
    if is_formulary:
        summary["formulary"] = scores
    if by_site:
        summary["formulary_by_site"] = by_site
    if failed := run.attempt.failures(EXAM):
        summary["formulary_failed"] = failed
    run.directory.write_json("summary.json", summary)
    return summary


def fail(run: Run, status: str, reason: str) -> str:
    """Write ledger and summary of a run that ended early; return a note of what is kept.

    Finished rounds and checkpoints are kept. A new run that ended before any measurement leaves no
    directory behind.
    """
    if run.is_new and not run.directory.read_metrics():
        run.directory.discard()
        return "no round was finished, and nothing is left behind"
    run.directory.write_json("ledger.json", run.state.ledger.as_dict())
    if line := run.attempt.record(run.state.ledger, status, reason):
        run.directory.append_unfinished(line)
        run.listener.on_unfinished(line)
    run.directory.write_json("summary.json", {**summary_of(run, status), "reason": reason})
    kept = KEPT if run.state.round else NONE_FINISHED
    return f"{kept}{RESUME_WITH}{command('grandrounds', 'run', '--resume', run.directory.path)}"


def check_same_sites(roster: Roster) -> None:
    """Leave out the sites whose data, base or prompt have changed since the start of the run.

    Raises
    ------
    RunDirectoryError
        If the run needs them: fewer than `strategy.min-sites` are left.
    """
    changed: dict[int, str] = {}
    for site, card in roster.cards.items():
        before = roster.introduced.get(site, card.facts)
        for fact in (*SAME_IN_A_RUN, *SAME_IF_TOLD):
            if has_changed(fact, before, card.facts):
                changed[site] = (
                    f"its {fact} was {before.get(fact)} and is now {card.facts.get(fact)}"
                )
    if changed and not roster.leave_out(changed):
        site, how = next(iter(changed.items()))
        raise RunDirectoryError(
            f"{roster.names.with_number(site)} has changed since the run started: {how}. Restore "
            "it to resume, or start a new run."
        )
