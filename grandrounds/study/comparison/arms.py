"""The arms of a comparison: each trains one adapter with the same visits, on different data.

Federations are whole runs (`server_app.federate`). Centralised and local training make the visits
of `grandrounds.site.visit` in sequence.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict
from safetensors.numpy import load_file

from grandrounds import client_app, server_app
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.config.values import Scalar
from grandrounds.data.rows import Joined
from grandrounds.engines.in_process import ClientAppCall, InProcessGrid
from grandrounds.model import machine
from grandrounds.model.lora import LoraSpec, adapter_layout
from grandrounds.model.resident import Resident, resident_model, set_adapter
from grandrounds.model.saved import lora_spec, read_adapter
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.server.directory import RunDirectory
from grandrounds.server.listeners import Facts, Listener
from grandrounds.server.resumed_files import newest
from grandrounds.server.saved_start import start_of
from grandrounds.site import personal
from grandrounds.site import visit as visits
from grandrounds.site.local_data import Site, site_of
from grandrounds.site.personal import halves
from grandrounds.site.personal_files import FACTS, FOLDER, site_folder
from grandrounds.site.preferences import figures_of, ratios_and_margins
from grandrounds.site.visit import Visit
from grandrounds.study.comparison.budget import local_examples, local_visits, pooled_visits
from grandrounds.study.comparison.exams import Exam, pair_answers, sit
from grandrounds.study.comparison.units import (
    BASE,
    CENTRALISED,
    FEDERATED,
    FEDERATIONS,
    LEAVE_ONE_OUT,
    LOCAL,
    PERSONAL,
    PRIVATE,
    Unit,
)
from grandrounds.wire import messages
from grandrounds.wire.adapter import (
    Adapter,
    Ranks,
    assemble,
    factor_of,
    rank_of,
    started_adapter,
)
from grandrounds.wire.personal import WEIGHT
from grandrounds.wire.schedule import cohorts_of, examples_of_a_visit, round_learning_rate_of

Found = dict[str, Any]
OnVisits = Callable[[int], None]
"""Called with the number of example visits just made."""

WITHOUT_PRIVACY: dict[str, Scalar] = {
    "privacy.unit-guarantee": "none",
    "privacy.target-epsilon": 0.0,
    "privacy.noise-multiplier": 0.0,
    "privacy.sampling-rate": 0.0,
    "privacy.declared-units": 0,
    "privacy.unit-column": "",
}
"""Settings of the same training without a guarantee."""

ORDINARY: dict[str, Scalar] = {
    **WITHOUT_PRIVACY,
    "secure-aggregation": "none",
    "strategy.name": "fedavg",
    "strategy.proximal-mu": 0.0,
    "strategy.site-ranks": "",
    "strategy.outer-nesterov": False,
    "communication.uplink-codec": "none",
    "communication.downlink-codec": "none",
    "communication.downlink": "complete",
    "defence.update-norm-bound": 0.0,
    "defence.largest-norm": 0.0,
    "defence.min-cosine": -1.0,
    "defence.largest-spread": 0.0,
    "defence.preset": "none",
    "personalisation.name": "none",
}
"""Settings of training without a federation: no aggregation strategy, codec, masks or defence."""


def run_unit(
    unit: Unit, config: Config, exams: Sequence[Exam], run_path: Path, on_visits: OnVisits
) -> Found:
    """Train and evaluate one unit; return the content of its file.

    Parameters
    ----------
    config : Config
        Of the comparison; the unit's seed replaces its own.
    run_path : Path
        Run directory of a federation; a run that was stopped there is resumed.
    """
    started = time.perf_counter()
    config = recipes.resolve(config.flat(), {"seed": unit.seed})
    weights = config.weights if config.is_personal else ()
    if unit.arm != PERSONAL:
        config = recipes.resolve(config.flat(), {"personalisation.name": "none"})
    trained = _ARMS[unit.arm](unit, config, run_path, on_visits)
    adapter = trained.pop("adapter", None)
    plain = config if adapter is not None else recipes.resolve(config.flat(), ORDINARY)
    resident = machine.prepare_model(plain)
    if (lora := trained.pop("lora", None)) is not None:
        resident = resident_model(resident.base_spec, lora)
    if adapter is not None:
        shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
        set_adapter(resident, assemble(shapes, (adapter, 0)))
    seconds = trained.pop("seconds-before", 0.0)
    sites = [site_of(config, k) for k in range(config.data.num_partitions)]
    sites = [
        dataclasses.replace(site, held_out=halves(site.held_out, weights)[1]) for site in sites
    ]
    return {
        **({"held-out-part": REPORTED} if len(weights) > 1 else {}),
        "arm": unit.arm,
        "seed": unit.seed,
        "site": unit.site,
        "num-sites": config.data.num_partitions,
        "run": f"runs/{unit.name}" if unit.arm in FEDERATIONS else None,
        **({ROUNDS: config.federation.num_server_rounds} if unit.arm == PERSONAL else {}),
        **trained,
        **judge(resident, plain, sites, exams),
        "seconds": seconds + time.perf_counter() - started,
    }


def judge(
    resident: Resident, config: Config, sites: Sequence[Site], exams: Sequence[Exam]
) -> Found:
    """Return the held-out loss by site and the answers to every exam."""
    tokenizer = run_tokenizer(config)
    held_out: Found = {}
    ratios, margins = list[float](), list[float]()
    for k, site in enumerate(sites):
        if config.is_on_pairs:
            found = ratios_and_margins(resident, site.held_out, config)
            judged = figures_of(*found)
            ratios += found[0].tolist()
            margins += found[1].tolist()
        else:
            judged = visits.evaluate(resident, site, config)
        held_out[str(k)] = {name: judged[name] for name in ("nll-sum", "tokens")}
    return {
        "held-out": held_out,
        "answers": (pair_answers(ratios, margins) if config.is_on_pairs else {})
        | {exam.name: sit(exam, resident.model, tokenizer, config.data.prompt) for exam in exams},
    }


ROUNDS = "rounds"
"""Rounds of the federation before a personal adapter."""

REPORTED = "reported"
"""Part of the held-out examples on which units are judged where personal adapters have a weight
chosen on the rest."""


# --- Without a federation -------------------------------------------------------------------------


def _untrained(unit: Unit, config: Config, run_path: Path, on_visits: OnVisits) -> Found:
    """Put the initial adapter on the base, which changes no output."""
    _start(recipes.resolve(config.flat(), ORDINARY), untrained=True)
    return {"example-visits": 0, "train-loss": None}


def _pool(unit: Unit, config: Config, run_path: Path, on_visits: OnVisits) -> Found:
    """Train on the training examples of all sites, each round on as many as its cohort sees."""
    sites = [site_of(config, k) for k in range(config.data.num_partitions)]
    examples = Joined([site.train for site in sites])
    # A partition id of its own, so that it is not shuffled like any site.
    pool = Site(len(sites), examples, (), {})
    plan = pooled_visits(config, examples_of_visits(config))
    ordinary = recipes.resolve(config.flat(), ORDINARY, {"train.dynamic-data-seed": True})
    return _visit_in_turn(pool, ordinary, plan, on_visits)


def _alone(unit: Unit, config: Config, run_path: Path, on_visits: OnVisits) -> Found:
    """Train on the examples of one site only."""
    k = unit.site or 0
    site, each = site_of(config, k), examples_of_visits(config)
    plan = local_visits(config, local_examples(config, each)[k], each[k])
    return _visit_in_turn(site, recipes.resolve(config.flat(), ORDINARY), plan, on_visits)


def examples_of_visits(config: Config) -> list[int]:
    """Return the examples of one visit to each site."""
    sites = (site_of(config, k) for k in range(config.data.num_partitions))
    return [examples_of_a_visit(config, len(site.train)) for site in sites]


def _start(config: Config, *, untrained: bool = False) -> Resident:
    """Return the resident model with the adapter from which an arm starts.

    Parameters
    ----------
    untrained : bool
        Whether it is the initial adapter of this seed although the recipe goes on from a saved one.
    """
    resident = machine.prepare_model(config)
    shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
    start = started_adapter(shapes, config.federation.seed, resident.magnitudes)
    if config.lora.is_continued and not untrained:
        targets = adapter_layout(config.model.source, LoraSpec.of(config))[1]
        start = start_of(config, shapes, targets)
    set_adapter(resident, start)
    return resident


def _visit_in_turn(
    site: Site, config: Config, plan: Sequence[tuple[int, int]], on_visits: OnVisits
) -> Found:
    """Make visits to one set of examples, each continuing where the last one ended.

    Parameters
    ----------
    plan : sequence of (int, int)
        The round that sets the learning rate, and the examples, of each visit.
    """
    resident = _start(config)
    cursor, loss = 0, 0.0
    for number, count in plan:
        rate = round_learning_rate_of(config, number)
        asked = messages.content(config={"round": number, "learning-rate": rate, "cursor": cursor})
        visit = Visit(asked, RecordDict(), _of_length(config, count, len(site.train)), site)
        result = visits.train(visit, resident, visits.next_batches(visit))
        cursor = visit.cursor_after
        loss = result.train_loss
        on_visits(result.examples)
    return {"example-visits": cursor, "train-loss": loss}


def _of_length(config: Config, count: int, num_examples: int) -> Config:
    """Return the configuration with visits of `count` examples."""
    steps, rest = divmod(count, config.examples_per_step)
    if rest:  # epochs are rounded up to whole examples: half an example less rounds exactly
        changes: dict[str, Any] = {
            "max_steps": -1,
            "num_train_epochs": (count - 0.5) / num_examples,
        }
    else:
        changes = {"max_steps": steps}
    return dataclasses.replace(config, arguments=dataclasses.replace(config.arguments, **changes))


# --- Federations ----------------------------------------------------------------------------------


def _federation(unit: Unit, config: Config, run_path: Path, on_visits: OnVisits) -> Found:
    """Run the federation as configured, but without noise."""
    if not config.is_private:
        return _run(config, config, client_app.app, run_path, on_visits)
    plain = recipes.resolve(config.flat(), WITHOUT_PRIVACY)
    return _run(plain, plain, on_the_sites_of(config), run_path, on_visits)


def _privately(unit: Unit, config: Config, run_path: Path, on_visits: OnVisits) -> Found:
    """Run the federation as configured, with its guarantee; a rehearsal, in this process."""
    found = _run(config, config, client_app.app, run_path, on_visits)
    told = RunDirectory(run_path).read_json("summary.json") or {}
    return {**found, "epsilon": (told.get("privacy") or {}).get("epsilon")}


def on_the_sites_of(private: Config) -> ClientAppCall:
    """Return the client app on the sites of a private recipe, without its noise.

    The sites of a private recipe are split by units; so all arms hold out the same examples.
    """

    @messages.answering
    def call(message: Message, context: Context) -> Message:
        visit = Visit.here(message.content, context)
        site = site_of(private, visit.site.partition_id)
        function = inspect.unwrap(client_app.VISITS[message.metadata.message_type])
        answer = function(dataclasses.replace(visit, site=site))
        return Message(answer, reply_to=message)

    return call


def _personally(unit: Unit, config: Config, run_path: Path, on_visits: OnVisits) -> Found:
    """Make a site's personal adapter after the federation of the same seed.

    That federation is the one of `federated`, which is trained once: what personal adapters need
    travels in no round. With equal visits it has fewer rounds, and is one of their own.
    """
    if config.keeps_a_part:
        return _kept_at_the_site(unit, config, run_path, on_visits)
    plain = recipes.resolve(config.flat(), {"personalisation.name": "none"})
    found = _run(plain, plain, client_app.app, run_path, on_visits)
    number = unit.site or 0
    site, rounds = site_of(config, number), config.federation.num_server_rounds
    after = examples_of_a_visit(config, len(site.train)) * sum(
        number in cohort for cohort in cohorts_of(config)
    )
    made = personal.personalised(
        Visit(_sent(found["adapter"], config, rounds, after), RecordDict(), config, site)
    )
    on_visits(config.personalisation.steps * config.examples_per_step)
    return {
        "adapter": made.adapter,
        "lora": made.lora,
        "example-visits": _share(config, found["example-visits"], number),
        "train-loss": found["train-loss"],
        "weight": made.facts[WEIGHT],
    }


def _kept_at_the_site(unit: Unit, config: Config, run_path: Path, on_visits: OnVisits) -> Found:
    """Run the federation with what its sites keep, once; return the adapter that a site made."""
    at_sites = recipes.resolve(config.flat(), {"run-directory": str(run_path)})
    found = _run(config, at_sites, client_app.app, run_path, on_visits)
    number = unit.site or 0
    folder = site_folder(run_path / FOLDER, number)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return {
        "adapter": read_adapter(folder),
        "lora": lora_spec(folder),
        "example-visits": _share(config, found["example-visits"], number),
        "train-loss": found["train-loss"],
        "weight": facts[WEIGHT],
    }


def _share(config: Config, visits_before: int, site: int) -> int:
    """Return a site's share of the example visits of a federation, with those of its own after."""
    count = config.data.num_partitions
    share = visits_before * (site + 1) // count - visits_before * site // count
    return share + config.personalisation.steps * config.examples_per_step


def _sent(adapter: Adapter, config: Config, number: int, cursor: int) -> RecordDict:
    """Return what the server sends a site for its personal adapter."""
    names = Ranks.of(config).strategy.sends
    sent = {n: tensor for n, tensor in adapter.items() if factor_of(n) in names}
    said: dict[str, int | str] = {
        "round": number,
        "cursor": cursor,
        "codec": "none",
        "rank": rank_of(sent),
    }
    return messages.content(arrays=messages.to_arrays(sent), config=said)


def _without_one(unit: Unit, config: Config, run_path: Path, on_visits: OnVisits) -> Found:
    """Run the federation of all sites but one, with cohorts of the same size.

    Its updates travel plain: sites without a number have no place in a roster, and a masked sum
    differs from a plain one by rounding only.
    """
    left_out, count = unit.site or 0, config.data.num_partitions
    ranks = [
        config.site_ranks[k % len(config.site_ranks)] for k in range(count) if config.site_ranks
    ]
    config = recipes.resolve(config.flat(), {"secure-aggregation": "none"})
    server = recipes.resolve(
        config.flat(),
        {
            "data.num-partitions": count - 1,
            "strategy.fraction-train": min(1.0, config.cohort_size / (count - 1)),
            "strategy.fraction-evaluate": 0.0,
            "strategy.site-ranks": ",".join(str(r) for k, r in enumerate(ranks) if k != left_out),
            "train.save-every-round": config.federation.num_server_rounds,
        },
    )
    return _run(server, config, numbered_without(left_out, count), run_path, on_visits)


def numbered_without(left_out: int, num_sites: int) -> ClientAppCall:
    """Return the client app of all sites but one, renumbered from 0 to `num_sites` - 2.

    Each site keeps the examples that it has among all sites.
    """

    def call(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        own = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config={
                **context.node_config,
                "partition-id": number + (number >= left_out),
                "num-partitions": num_sites,
            },
            state=context.state,
            run_config=context.run_config,
        )
        reply = client_app.app(message, own)
        if message.metadata.message_type == MessageType.QUERY and not reply.has_error():
            record = reply.content.config_records[messages.CONFIG]
            if "partition-id" in record:
                record["partition-id"] = number
        return reply

    return call


class _Visits(Listener):
    """Passes on how many examples each round visited."""

    def __init__(self, on_visits: OnVisits, expected: int) -> None:
        self._on_visits, self._expected = on_visits, expected

    def on_round(self, record: Facts) -> None:
        """Pass on a round's examples."""
        self._on_visits(record.get("examples") or self._expected * len(record.get("good", ())))


def _run(
    server: Config, sites: Config, app: ClientAppCall, path: Path, on_visits: OnVisits
) -> Found:
    """Run a federation, or resume one that was stopped, and return its last adapter.

    Parameters
    ----------
    server, sites : Config
        The configuration of the server, and of the sites.
    """
    expected = examples_of_a_visit(sites, 1)  # where a private visit does not tell how many it drew
    saved, _ = newest(path)
    before = float(saved.data["seconds"]) if saved else 0.0
    summary = completed(server, sites, app, path, _Visits(on_visits, expected))
    metrics = [m for m in RunDirectory(path).read_metrics() if "train-loss" in m]
    return {
        "adapter": load_file(path / summary["adapter"] / "adapter_model.safetensors"),
        "example-visits": sum(m["examples"] or expected * len(m["good"]) for m in metrics),
        "train-loss": metrics[-1]["train-loss"],
        "failed-replies": summary["failed_replies"],
        "seconds-before": before,
    }


def completed(
    server: Config, sites: Config, app: ClientAppCall, path: Path, listener: Listener
) -> Found:
    """Return the summary of a run in a directory: play it, resume it, or find it completed."""
    summary: Found | None = RunDirectory(path).read_json("summary.json")
    if summary and summary["status"] == "completed":
        return summary
    place = {"run-directory": str(path), "resume-from": ""}
    if newest(path)[0]:
        place = {"run-directory": "", "resume-from": str(path)}
    elif path.exists():  # stopped before the first checkpoint
        shutil.rmtree(path)
    where = {**sites.flat(), **place}  # sites keep personal adapters there
    grid = InProcessGrid(app, where, server.data.num_partitions)
    played: Found = server_app.federate(grid, recipes.resolve(server.flat(), place), listener)
    return played


_ARMS: dict[str, Callable[[Unit, Config, Path, OnVisits], Found]] = {
    BASE: _untrained,
    FEDERATED: _federation,
    PERSONAL: _personally,
    PRIVATE: _privately,
    CENTRALISED: _pool,
    LOCAL: _alone,
    LEAVE_ONE_OUT: _without_one,
}
