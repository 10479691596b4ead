"""A run in progress at the server, and what is remembered of each round."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.serverapp import Grid

from grandrounds.config.keys import Config
from grandrounds.model.lora import LoraSpec
from grandrounds.server.aggregation.rule import Rule
from grandrounds.server.directory import RunDirectory
from grandrounds.server.exchange import replies_that_came_late
from grandrounds.server.roll_call import SiteCard
from grandrounds.server.rounds import Tally
from grandrounds.server.run_state import State
from grandrounds.server.updates import claimed_examples
from grandrounds.wire import messages, protocol
from grandrounds.wire.downlink import Sender
from grandrounds.wire.traffic import Plan

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
    """The sites that may take part, after the roll call."""
    introduced: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Partition id → what a site said of itself, of every site that was ever there."""
    evaluation_cohort: list[int] = field(default_factory=list)
    """Who answers held-out loss."""
    suspected: set[int] = field(default_factory=set)
    """Sites whose last reply failed."""
    late: set[str] = field(default_factory=set)
    """Messages whose replies had not come when their round ended."""
    refused: dict[str, str] = field(default_factory=dict)
    """Nodes that could take no part at roll call, and why."""
    flower_run: int = 0
    """Flower's number of this run; another one after each resume."""


def stragglers(run: Run, grid: Grid) -> dict[str, int]:
    """Take what came after its round had ended, count it, and leave it out."""
    came = 0
    for reply in replies_that_came_late(grid, run.late):
        came += not reply.has_error()
        run.state.ledger.count("late.up", messages.tensor_sizes(reply))
    run.state.late_replies += came
    return {"late-replies": came} if came else {}


def remember_sites(run: Run) -> None:
    """Take over and write down what the sites said; one that goes is not forgotten."""
    known = run.introduced | {p: dict(card.facts) for p, card in run.cards.items()}
    if known != run.introduced:
        run.introduced = dict(sorted(known.items()))
        run.directory.write_json("sites.json", list(run.introduced.values()))


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

    known = {p: int(facts["train-examples"]) for p, facts in run.introduced.items()}
    covered = sum(c * known[p] for p, c in run.state.coverage.items() if p in known)
    return {
        "round": number,
        "flower-run": str(run.flower_run),
        "learning-rate": learning_rate,
        "cohort": cohort,
        "good": sorted(tally.good),
        "failed": {str(p): why for p, why in sorted(tally.failed.items())},
        "train-loss": mean("train-loss"),
        "proximal-penalty": mean("proximal-penalty"),
        "coverage": covered / sum(known.values()),
        "site-coverage": {str(p): run.state.coverage[p] for p in sorted(tally.good)},
        **{
            name: sum(int(m[name]) for m in good)
            for name in ("examples", "tokens", "padding-tokens")
        },
        "visit-seconds": sum(float(m["seconds"]) for m in good),
    }


def spec_of(run: Run) -> LoraSpec:
    """Return the specification of the adapter as it is: `flora`'s has a rank of its own.

    The factor alpha / r stays the same.
    """
    rank = protocol.rank_of(protocol.shapes_of(run.state.adapter))
    alpha = run.lora.alpha * rank / run.lora.rank
    return dataclasses.replace(run.lora, rank=rank, alpha=alpha)
