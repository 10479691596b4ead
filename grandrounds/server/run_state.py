"""Where a run stands after a round, and the summary of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grandrounds
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.wire.adapter import Adapter
from grandrounds.wire.ledger import Ledger
from grandrounds.wire.traffic import Plan


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
