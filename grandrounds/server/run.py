"""A run in progress at the server, and what is remembered of each round."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.serverapp import Grid

import grandrounds
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.model.lora import LoraSpec
from grandrounds.server.aggregation.rule import Rule
from grandrounds.server.directory import RunDirectory
from grandrounds.server.exchange import replies_that_came_late
from grandrounds.server.roll_call import SiteCard
from grandrounds.server.rounds import Tally
from grandrounds.server.updates import claimed_examples
from grandrounds.wire import messages, protocol
from grandrounds.wire.adapter import Adapter
from grandrounds.wire.downlink import Sender
from grandrounds.wire.ledger import Ledger
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


@dataclass
class State:
    """Where a run stands after a round; what a resume needs, and nothing else."""

    round: int
    """The last finished round; 0 before training."""
    adapter: Adapter
    """The global adapter after it."""
    run: str
    """The run's key, which sites keep what they remember under; the same when it is resumed."""
    ledger: Ledger = field(default_factory=Ledger)
    """Bytes so far."""
    cursors: dict[int, int] = field(default_factory=dict)
    """Partition id → examples it has been given, up to its last reply that was used. It is told at
    each visit: what it trained on in vain, or before a resume, comes again."""
    coverage: dict[int, float] = field(default_factory=dict)
    """Partition id → share of its examples that it has trained on."""
    base_loads: dict[str, int] = field(default_factory=dict)
    """Process → base models loaded in it."""
    failed_replies: int = 0
    """Replies that were not used."""
    late_replies: int = 0
    """Of these, replies that came after their round had ended."""
    seconds: float = 0.0
    """Wall-clock time of all finished rounds."""

    def to_json(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything but the adapter, and the round's metrics."""
        return {
            "round": self.round,
            "run": self.run,
            "ledger": self.ledger.as_dict(),
            "cursors": self.cursors,
            "coverage": self.coverage,
            "base-loads": self.base_loads,
            "failed-replies": self.failed_replies,
            "late-replies": self.late_replies,
            "seconds": self.seconds,
            "record": record,
        }

    @classmethod
    def from_json(cls, adapter: Adapter, data: Mapping[str, Any]) -> State:
        """Return the state that `to_json` wrote."""
        cursors = {int(p): c for p, c in data["cursors"].items()}
        return cls(
            round=data["round"],
            adapter=adapter,
            run=data.get("run", "0"),
            ledger=Ledger.from_dict(data["ledger"]),
            cursors=cursors,
            coverage={int(p): c for p, c in data["coverage"].items()},
            base_loads=data["base-loads"],
            failed_replies=data["failed-replies"],
            late_replies=data.get("late-replies", 0),
            seconds=data["seconds"],
        )


def summarize(
    config: Config,
    state: State,
    plan: Plan,
    sites: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    status: str,
) -> dict[str, Any]:
    """Return summary.json without the formulary.

    Parameters
    ----------
    sites
        What the sites said at roll call; empty if the run ended before it.
    metrics
        The lines of metrics.jsonl.
    """
    checkpoints = [m for m in metrics if "checkpoint" in m]
    judged = [m for m in checkpoints if m.get("held-out-loss") is not None]
    best = min(judged, key=lambda m: m["held-out-loss"]) if judged else None
    trained = [m for m in metrics if "train-loss" in m]
    errors = [m for m in metrics if "product-error" in m]
    of_update = [m["product-error-of-update"] for m in errors]
    held_out = [m["held-out-loss"] for m in metrics if m.get("held-out-loss") is not None]
    first = sites[0] if sites else {}
    reasons = recipes.leaderboard_differences(config)
    counted = ("rows", "empty-rows", "duplicate-rows", "truncated", "unlearnable")
    return {
        "status": status,
        "rounds": metrics[-1]["round"] if metrics else 0,
        "seconds": round(state.seconds, 3),
        "communication_mib": state.ledger.mib,
        "communication_rule": state.ledger.as_dict()["rule"],
        "planned_mib": plan.as_dict()["total-mib"],
        "adapter": checkpoints[-1]["checkpoint"] if checkpoints else None,
        "best_adapter": best
        and {
            "adapter": best["checkpoint"],
            "round": best["round"],
            "held_out_loss": best["held-out-loss"],
        },
        "train_loss": {"first": trained[0]["train-loss"], "last": trained[-1]["train-loss"]}
        if trained
        else None,
        "held_out_loss": {"first": held_out[0], "last": held_out[-1]} if held_out else None,
        "proximal_penalty": trained[-1]["proximal-penalty"] if trained else None,
        "product_error": errors[-1]["product-error"] if errors else None,
        "product_error_of_update": {
            "first": of_update[0],
            "largest": max(of_update),
            "last": of_update[-1],
        }
        if errors
        else None,
        "aggregation": {
            name.replace("-", "_"): {"first": values[0], "last": values[-1]}
            for name in ("truncation-error", "rank", "server-learning-rate")
            if (values := [m[name] for m in trained if name in m])
        },
        "coverage": trained[-1]["coverage"] if trained else 0.0,
        "failed_replies": state.failed_replies,
        "late_replies": state.late_replies,
        "base_loads": sum(state.base_loads.values()),
        "processes": len(state.base_loads),
        "device": first.get("device"),
        "precision": first.get("precision"),
        "data": {
            "sites": len(sites),
            "train-examples": sum(int(s["train-examples"]) for s in sites),
            "held-out-examples": sum(int(s["held-out-examples"]) for s in sites),
            **{name: sum(int(s[name]) for s in sites) for name in counted},
        },
        "comparable_with_leaderboard": not reasons,
        "not_comparable_because": reasons,
        "seed": config.federation.seed,
        "version": grandrounds.__version__,
    }
