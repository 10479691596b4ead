"""A run in progress at the server: its parts, its state and its summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grandrounds
from grandrounds.config.keys import Config
from grandrounds.model.lora import LoraSpec
from grandrounds.model.targets import Targets
from grandrounds.server import budgets
from grandrounds.server.aggregation.rule import Rule
from grandrounds.server.described import leaderboard_differences
from grandrounds.server.directory import RunDirectory
from grandrounds.server.exchange import Exchange, Tally
from grandrounds.server.listeners import Listener
from grandrounds.server.masks.attempts import Masks
from grandrounds.server.roll_call import Roster
from grandrounds.server.unfinished import TRAIN, Attempt, failures_of, traffic_of
from grandrounds.wire.adapter import Adapter, Shapes, is_magnitude
from grandrounds.wire.downlink import Parcel, Sender
from grandrounds.wire.guarantee import EPSILON
from grandrounds.wire.ledger import Ledger
from grandrounds.wire.told import (
    MARGIN,
    PREFERENCES,
    RANKING,
    deciding_loss,
    in_custody,
    total_of_sites,
)
from grandrounds.wire.traffic import Plan

NORM_ROUNDS = 5
"""Rounds over whose updates the median norm is taken (`defence.largest-norm`): enough for small
cohorts, few enough to follow the learning rate down."""


@dataclass
class State:
    """The state of a run after a round: exactly what a resume needs."""

    round: int
    """The last finished round; 0 before training."""
    adapter: Adapter
    """The global adapter after it."""
    run: str
    """The run's key, under which sites keep their state; a resume keeps it."""
    ledger: Ledger = field(default_factory=Ledger)
    """The traffic so far."""
    cursors: dict[int, int] = field(default_factory=dict)
    """Partition id → examples given to it, up to its last reply that was used. Sent with each
    visit: examples of unused replies, and those after the resumed round, are repeated. A real site
    keeps its own."""
    coverage: dict[int, float] = field(default_factory=dict)
    """Partition id → share of its training examples seen at least once, where it tells it."""
    base_loads: dict[str, int] = field(default_factory=dict)
    """Process → number of times it loaded a base model."""
    failed_replies: int = 0
    """Replies that were not used."""
    late_replies: int = 0
    """Those of them that came after their round had ended."""
    norms: list[list[float]] = field(default_factory=list)
    """L2 norms of the updates used in each of the last `NORM_ROUNDS` rounds, before any bound."""
    seconds: float = 0.0
    """Wall-clock time of all finished rounds."""
    start_holders: set[int] = field(default_factory=set)
    """Sites that have received the saved adapter from which the run goes on."""

    def note_loads(self, tally: Tally) -> None:
        """Record how often the replying processes have loaded a base model."""
        for metrics in tally.good.values():
            if {"process-id", "base-loads"} <= metrics.keys():
                self.base_loads[str(metrics["process-id"])] = int(metrics["base-loads"])

    def count_on(self, unfinished: Iterable[Mapping[str, Any]]) -> None:
        """Add what was sent, and what failed, in rounds that did not finish."""
        for line in unfinished:
            self.ledger.include(traffic_of(line))
            self.failed_replies += failures_of(line)

    @property
    def earlier_norms(self) -> list[float]:
        """The norms of all these rounds together."""
        return [norm for norms in self.norms for norm in norms]

    def note_norms(self, norms: Iterable[float]) -> None:
        """Record the norms of a round's updates; a round that changed nothing has none."""
        if used := sorted(norm for norm in norms if norm > 0):
            self.norms = [*self.norms, used][-NORM_ROUNDS:]

    def to_json(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything but the adapter, with the round's metrics."""
        return {
            "round": self.round,
            "run": self.run,
            "ledger": self.ledger.as_dict(),
            "cursors": self.cursors,
            "coverage": self.coverage,
            "base-loads": self.base_loads,
            "failed-replies": self.failed_replies,
            "late-replies": self.late_replies,
            "norms": self.norms,
            "seconds": self.seconds,
            "record": record,
            **({"start-holders": sorted(self.start_holders)} if self.start_holders else {}),
        }

    @classmethod
    def from_json(cls, adapter: Adapter, data: Mapping[str, Any]) -> State:
        """Return the state that `to_json` wrote.

        Raises
        ------
        KeyError, TypeError, ValueError, AttributeError
            If it is not what `to_json` writes.
        """
        return cls(
            round=int(data["round"]),
            adapter=adapter,
            run=str(data.get("run", "0")),
            ledger=Ledger.from_dict(data["ledger"]),
            cursors={int(p): int(c) for p, c in data["cursors"].items()},
            coverage={int(p): float(c) for p, c in data["coverage"].items()},
            base_loads={str(p): int(c) for p, c in data["base-loads"].items()},
            failed_replies=int(data["failed-replies"]),
            late_replies=int(data.get("late-replies", 0)),
            norms=[[float(n) for n in norms] for norms in data.get("norms", [])],
            seconds=float(data["seconds"]),
            start_holders={int(p) for p in data.get("start-holders", ())},
        )


@dataclass
class Run:
    """A run in progress."""

    config: Config
    directory: RunDirectory
    is_new: bool
    """Whether this process created the directory."""
    plan: Plan
    """The planned traffic."""
    lora: LoraSpec
    """The adapter that a site trains, with the configured target modules."""
    targets: Targets
    """The adapted modules, resolved."""
    state: State
    rule: Rule
    """How client updates become the next adapter."""
    sender: Sender
    """How the adapter is sent to the sites."""
    exchange: Exchange
    """How messages are exchanged with the sites."""
    roster: Roster
    """The sites that take part."""
    listener: Listener
    evaluation_cohort: list[int]
    """The sites that evaluate the held-out loss."""
    continued: Adapter | None = None
    """The saved adapter from which training goes on; None if it was drawn from the seed."""
    shapes: Shapes = field(default_factory=dict)
    """Shapes of the adapter's tensors at the configured rank, in the model's order."""
    started_by: Sequence[int] = ()
    """The sites that told where DoRA's magnitudes start, if they were asked in this process."""
    attempt: Attempt = field(default_factory=Attempt)
    """What was done since the last finished round."""
    masks: Masks | None = None
    """Attempts at masked sums, from the first masked round on."""

    @property
    def magnitudes(self) -> Shapes:
        """Shapes of DoRA's magnitudes by name; none without DoRA."""
        return {name: shape for name, shape in self.shapes.items() if is_magnitude(name)}

    @property
    def adapter_spec(self) -> LoraSpec:
        """The specification of the current adapter; a stacked one has its own rank.

        What B A is scaled by stays the same.
        """
        return self.lora.at_rank(self.sender.ranks.of_adapter(self.state.adapter))

    def note_reply(self, kind: str, site: int, failure: str | None) -> None:
        """Count a reply, or the lack of one.

        Parameters
        ----------
        kind : str
            One of `KINDS` of `server.unfinished`.
        """
        self.attempt.note(kind, site, failure)
        self.state.failed_replies += failure is not None
        if kind == TRAIN:
            self.listener.on_reply(site, failure)

    def write_sites(self) -> bool:
        """Write sites.json if an introduction is new; return whether one is."""
        is_new = self.roster.note_introductions()
        if is_new:
            self.directory.write_json("sites.json", list(self.roster.introduced.values()))
        return is_new

    def beside(self, parcel: Parcel, site: int, rounds: int) -> Parcel:
        """Return a message with the run's saved start beside it, if the site needs it.

        Parameters
        ----------
        rounds : int
            Rounds in which the adapter of the message has been trained.
        """
        if self.continued is None or not rounds or site in self.state.start_holders:
            return parcel
        return replace(parcel, start=self.sender.exact(self.continued).arrays)

    def settle(self, parcels: Mapping[int, Parcel], good: Mapping[int, object]) -> None:
        """Record which sites replied well, and so hold what they were sent.

        Parameters
        ----------
        good
            Partition id → metrics of its reply. A site that tells nothing of an evaluation has not
            looked at the adapter, and keeps nothing of it.
        """
        self.sender.settle(parcels, good)
        if self.continued is not None:
            self.state.start_holders |= {p for p in parcels if good.get(p)}
            self.state.start_holders -= parcels.keys() - good.keys()

    def accept(self, round_number: int, adapter: Adapter, tally: Tally) -> None:
        """Make a round's result the state of the run."""
        state = self.state
        state.round, state.adapter = round_number, adapter
        for site, metrics in tally.good.items():
            if "cursor" in metrics:
                state.cursors[site] = int(metrics["cursor"])
            if "coverage" in metrics:
                state.coverage[site] = float(metrics["coverage"])
        state.note_loads(tally)
        self.roster.suspected = set(tally.failed)
        budgets.note(self.roster, tally)
        if any(EPSILON in metrics for metrics in tally.good.values()) or tally.spent:
            self.write_sites()


IN_SUMMARY = (
    *("train-examples", "held-out-examples"),
    *("rows", "empty-rows", "duplicate-rows", "truncated", "unlearnable"),
)
"""The counts in summary.json; null where a site does not tell one."""


def ends(values: Sequence[float]) -> dict[str, float] | None:
    """Return the first and the last value; None if there is none."""
    return {"first": values[0], "last": values[-1]} if values else None


def preference_ends(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first and last figures of held-out pairs; empty without preferences."""
    found = {}
    for name in (MARGIN, PREFERENCES, RANKING):
        if values := ends([m[name] for m in metrics if name in m]):
            found[name.replace("-", "_")] = values
    return {"preferences": found} if found else {}


def summary_of(run: Run, status: str) -> dict[str, Any]:
    """Return summary.json without the formulary; also for a run that ended before its roll call."""
    config, state = run.config, run.state
    metrics = run.directory.read_metrics()
    sites = list(run.roster.introduced.values())
    private = budgets.summary_of(config, sites, run.roster.spent)
    checkpoints = [m for m in metrics if "checkpoint" in m]
    judged = [(loss, m) for m in checkpoints if (loss := deciding_loss(m)) is not None]
    best = min(judged, key=lambda pair: pair[0])[1] if judged else None
    trained = [m for m in metrics if "train-loss" in m]
    errors = [m for m in metrics if "product-error" in m]
    of_update = [m["product-error-of-update"] for m in errors]
    held_out = [m["held-out-loss"] for m in metrics if m.get("held-out-loss") is not None]
    first = sites[0] if sites else {}
    reasons = leaderboard_differences(config, sites)
    earlier = config.federation.earlier_schedules
    tells_loads = bool(state.base_loads) or not any(map(in_custody, sites))
    return {
        "status": status,
        "rounds": metrics[-1]["round"] if metrics else 0,
        **({"earlier_schedules": earlier} if earlier else {}),
        "seconds": round(state.seconds, 3),
        "communication_mib": state.ledger.mib,
        "communication_rule": state.ledger.as_dict()["rule"],
        "planned_mib": run.plan.as_dict()["total-mib"],
        "adapter": checkpoints[-1]["checkpoint"] if checkpoints else None,
        "best_adapter": best
        and {
            "adapter": best["checkpoint"],
            "round": best["round"],
            "held_out_loss": best["held-out-loss"],
        },
        "train_loss": ends([m["train-loss"] for m in trained if m["train-loss"] is not None]),
        "held_out_loss": ends(held_out),
        **preference_ends(metrics),
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
            name.replace("-", "_"): ends(values)
            for name in (
                "truncation-error",
                "correction-error",
                "rank",
                "site-rank",
                "server-learning-rate",
            )
            if (values := [m[name] for m in trained if name in m])
        },
        "coverage": trained[-1]["coverage"] if trained else 0.0,
        "failed_replies": state.failed_replies,
        "late_replies": state.late_replies,
        "base_loads": sum(state.base_loads.values()) if tells_loads else None,
        "processes": len(state.base_loads) if tells_loads else None,
        "device": first.get("device"),
        "precision": first.get("precision"),
        "data": {
            "sites": len(sites),
            **{name: total_of_sites(sites, name) for name in IN_SUMMARY},
        },
        **({"privacy": private} if private else {}),
        "comparable_with_leaderboard": not reasons,
        "not_comparable_because": reasons,
        "seed": config.federation.seed,
        "version": grandrounds.__version__,
    }
