"""What is kept of a played cell: its figures, bytes and seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grandrounds import storage
from grandrounds.server.directory import RunDirectory
from grandrounds.study.comparison.results import EVERYWHERE, LOSS

Json = Mapping[str, Any]


def of_run(folder: Path) -> dict[str, Any]:
    """Return `figures`, `bytes` and `seconds` of a completed run.

    Figures are losses in nats per answer token and shares from 0 to 1; `forgotten` is the share of
    public facts that were answered before training less that after it.
    """
    directory = RunDirectory(folder)
    summary = directory.read_json("summary.json") or {}
    figures: dict[str, float] = {}
    for key, name in (("held_out_loss", LOSS), ("train_loss", "train-loss")):
        if summary.get(key):
            figures[name] = summary[key]["last"]
    for kind, scores in (summary.get("formulary") or {}).items():
        share = {which: found["correct"] / found["n"] for which, found in scores.items()}
        figures[kind] = share["tuned"]
        if kind == "public":
            figures["forgotten"] = share["base"] - share["tuned"]
    return {"figures": figures, "bytes": bytes_of(folder), "seconds": summary["seconds"]}


def of_arm(folder: Path, content: Json, arm: str, seed: int) -> dict[str, Any]:
    """Return `figures`, `bytes` and `seconds` of an arm of a comparison.

    `everywhere-...` differs from the figure without it where each site has a model of its own;
    `worst-...` is the site that is served worst, on its own part.
    """
    found = content["arms"][arm]["seeds"][str(seed)]
    figures: dict[str, float] = {LOSS: found[LOSS], **found["accuracy"]}
    everywhere = found[EVERYWHERE]
    for name, value in ((LOSS, everywhere[LOSS]), *everywhere["accuracy"].items()):
        figures[f"everywhere-{name}"] = value
    sites = list(found["sites"].values())
    figures[f"worst-{LOSS}"] = max(site[LOSS] for site in sites)
    for exam in sites[0]["accuracy"]:
        figures[f"worst-{exam}"] = min(site["accuracy"][exam] for site in sites)
    run = folder / found["run"] if found["run"] else None
    return {
        "figures": figures,
        "bytes": bytes_of(run) if run else {},
        "seconds": found["seconds"],
    }


def bytes_of(run: Path) -> dict[str, int]:
    """Return a run's training bytes `up` and `down`, by its ledger (FlowerTune's rule)."""
    totals = storage.read_json(run / "ledger.json")["totals"]
    return {
        way: int(totals.get(f"train.{way}", {}).get("tensor_bytes", 0)) for way in ("up", "down")
    }
