"""Run directories and comparisons as the product writes them, without training anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grandrounds.config import recipes

TENSOR_BYTES = 2**19
"""Of one message: half a MiB."""


def write_run(
    path: Path,
    *,
    rounds: int = 4,
    planned: int | None = None,
    sites: int = 6,
    cohort: int = 3,
    status: str | None = "completed",
    reason: str = "",
    **settings: Any,
) -> Path:
    """Write a run directory; `status` None is a run that still goes on."""
    path.mkdir(parents=True)
    planned = planned or rounds
    named = {key.replace("_", "-").replace("--", "."): value for key, value in settings.items()}
    config = recipes.resolve(
        {
            "num-server-rounds": planned,
            "strategy.name": "fedprox",
            "data.num-partitions": sites,
            "strategy.fraction-train": cohort / sites,
            **named,
        }
    )
    (path / "config.toml").write_text(recipes.to_toml(config.recipe()))
    lines = [line(r, sites, cohort) for r in range(rounds + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    write(path / "plan.json", {"total-mib": totals_mib(planned, cohort)} | totals(planned, cohort))
    sent = {"communication_mib": totals_mib(rounds, cohort), **totals(rounds, cohort)}
    write(path / "ledger.json", sent)
    write(path / "sites.json", [site(s) for s in range(sites)])
    packages = {"torch": "2.13.0", "bitsandbytes": None}
    surroundings = {"grandrounds": "0.1.0", "python": "3.11", "packages": packages}
    write(path / "environment.json", surroundings)
    checkpoint = path / f"peft_{rounds}"
    checkpoint.mkdir()
    (checkpoint / "adapter_model.safetensors").write_bytes(b"weights")
    if status:
        summary = {"status": status, "rounds": rounds, "device": "CPU"}
        write(path / "summary.json", {**summary, "reason": reason} if reason else summary)
    return path


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def line(number: int, sites: int, cohort: int) -> dict[str, Any]:
    """Return a line of metrics.jsonl; site 1 fails in round 2."""
    common = {
        "round": number,
        "held-out-loss": 2.0 / (1 + number),
        "evaluated": [0, 1],
        "communication-mib": (2 * cohort * number + 2 * (number + 1)) / 2,
        "seconds": 2.5,
        "train-seconds": 2.0 * (number > 0),
        "evaluate-seconds": 0.25,
    }
    if not number:
        return common
    drawn = [(number * cohort + k) % sites for k in range(cohort)]
    failed = {str(p): "no reply within 5 s" for p in drawn if (number, p) == (2, 1)}
    good = [p for p in drawn if str(p) not in failed]
    return {
        **common,
        "cohort": drawn,
        "good": good,
        "failed": failed,
        "train-loss": 1.5 / number,
        "proximal-penalty": 0.1 / number,
        "coverage": min(1.0, number * cohort / sites),
        "site-coverage": {str(p): 1.0 for p in good},
        "update-norms": {str(p): 1.0 + 0.01 * p for p in good},
        "update-cosines": {str(p): 0.5 for p in good},
        "product-error-of-update": 0.1 / number,
    }


def totals(rounds: int, cohort: int) -> dict[str, Any]:
    """Return `totals` of a ledger or plan: two sites judge, also before round 1."""
    messages = {
        "train.down": rounds * cohort,
        "train.up": rounds * cohort,
        "evaluate.down": 2 * (rounds + 1),
    }
    return {
        "totals": {
            kind: {"messages": n, "tensor_bytes": n * TENSOR_BYTES, "key_bytes": 0}
            for kind, n in messages.items()
        }
    }


def totals_mib(rounds: int, cohort: int) -> float:
    found = totals(rounds, cohort)["totals"]
    return float(sum(t["tensor_bytes"] for t in found.values()) / 2**20)


def site(number: int) -> dict[str, Any]:
    return {
        "partition-id": number,
        "train-examples": 70 + number,
        "held-out-examples": 4,
        "base": "2e56fa25ddb7668c",
        "prompt": "baab0d8c6769f11e",
        "device": "CPU",
        "version": "0.1.0",
    }


def evaluation(model: str = "peft_4", correct: int = 60) -> dict[str, Any]:
    """Return an evaluation.json: private questions, 50 of 100 by the base."""

    def row(name: str, right: int) -> dict[str, Any]:
        share = right / 100
        part = {"n": 100, "correct": right, "accuracy": share}
        part |= {"interval": [share - 0.1, min(1.0, share + 0.1)]}
        whole = {"model": name, "title": "Formulary (fictional)", **part}
        return {**whole, "groups": [{"group": "private", **part}]}

    return {"protocol": "likelihood", "rows": [row("base", 50), row(model, correct)]}


def estimate(mean: float, seeds: int = 2) -> dict[str, Any]:
    return {"mean": mean, "interval": [mean - 0.1, mean + 0.1], "n": seeds}


def comparison() -> dict[str, Any]:
    """Return a comparison.json of two seeds and three sites, as docs/compare.md describes it."""

    def arm(loss: float, private: float) -> dict[str, Any]:
        everywhere = {"held-out-loss": estimate(1.5), "accuracy": {"private": estimate(0.3)}}
        of_site = {"held-out-loss": estimate(loss), "accuracy": {"private": estimate(private)}}
        of_site["everywhere"] = everywhere
        measured = {"held-out-loss": loss, "example-visits": 640, "seconds": 10.0}
        return {
            "seeds": {"42": measured, "43": measured},
            "held-out-loss": estimate(loss),
            "accuracy": {"private": estimate(private), "public": estimate(0.9)},
            "everywhere": everywhere,
            "sites": {str(s): of_site for s in range(3)},
        }

    gained = {"mean": 0.25, "interval": [0.1, 0.4], "n": 2, "p": 0.01}
    own = {"held-out-loss": gained, "accuracy": {"private": gained}}
    questions = {"n": 300, "only-federated": 90, "only-rival": 15, "gain": 0.25, "p": 1e-9}
    return {
        "format": 1,
        "version": "0.1.0",
        "status": "complete",
        "units": {"done": 10, "planned": 10},
        "seconds": 100.0,
        "command": "grandrounds compare --seeds 2 --out wards",
        "arms-asked": ["federated", "local"],
        "seeds": [42, 43],
        "config": recipes.resolve().flat(),
        "environment": {"python": "3.11", "packages": {"torch": "2.13.0"}},
        "budget": {"rounds": 24, "cohort": 4, "sites": 3},
        "sites": [
            {"site": s, "train-examples": {"42": 57}, "held-out-examples": {"42": 3}}
            for s in range(3)
        ],
        "exams": {
            "private": {"title": "private facts", "chance": 0.25, "measures": "learned"}
            | {"by-site": True},
            "public": {"title": "public facts", "chance": 0.25, "measures": "kept"}
            | {"by-site": False},
        },
        "arms": {"base": arm(2.0, 0.25), "federated": arm(0.5, 0.8), "local": arm(0.75, 0.55)},
        "without": {},
        "gains": [
            {
                "over": "local",
                "measure": "private",
                "where": "own",
                "over-seeds": gained,
                "over-sites": {**gained, "n": 3, "better": 2, "worse": 1, "equal": 0},
                "over-questions": {"42": {**questions, "interval": [0.18, 0.32]}},
            }
        ],
        "joining": [
            {"site": s, "instead-of": "local", "own": own, "everywhere": own, "others": None}
            for s in range(3)
        ],
    }
