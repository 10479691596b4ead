"""Figures of the messages after the last round: personal adapters, and losses by subgroup."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.check_figures.raw import Raw
from scripts.check_figures.sheet import Cell, Sheet

LOSSES = ("federated", "personal")

NONE = "-"
"""A cell without a value."""

FEWEST = 10
"""Held-out examples of the smallest subgroup that is told."""


def personal(sheet: Sheet, raw: Raw) -> None:
    """Check the section on personal adapters; means and worst site anew from the sites."""
    told = raw.summary.get("personal") or {}
    if not told:
        return
    sites, failed = told["sites"], told["failed"]
    notes: list[Sequence[float]] = [[len(sites), len(sites) + len(failed)]]
    both = {int(k): of for k, of in sites.items() if all(name in of for name in LOSSES)}
    if both:
        by = {name: [of[name] for of in both.values()] for name in LOSSES}
        gains = [of["federated"] - of["personal"] for of in both.values()]
        worst = max(both, key=lambda site: float(both[site]["personal"]))
        notes.append(
            [
                *(statistics.fmean(by[name]) for name in LOSSES),
                *(statistics.pstdev(by[name]) for name in LOSSES),
                *(sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)),
                *raw.who(worst),
                *(both[worst][name] for name in LOSSES),
            ]
        )
    notes += [raw.who(int(site)) for site in failed]
    for i, numbers in enumerate(notes):
        sheet.want(f"note/personal/{i}", numbers)
    keys = (*LOSSES, "weight", "held-out-examples")
    rows = [
        [raw.who(int(site)), *(_cell(of, key) for key in keys)] for site, of in sites.items() if of
    ]
    if rows:
        sheet.table("table/personal/Personal adapters by site", rows)


def subgroups(sheet: Sheet, raw: Raw) -> None:
    """Check the section on subgroups; the differences anew from the losses."""
    told = raw.summary.get("subgroups") or {}
    if not told:
        return
    silent = [[len(told["silent"])]] if told["silent"] else []
    notes = [[FEWEST], *silent, *(raw.who(int(site)) for site in told["failed"])]
    for i, numbers in enumerate(notes):
        sheet.want(f"note/subgroups/{i}", numbers)
    judged = raw.series("held-out-loss")
    rows = [
        [
            name,
            [of["held-out-loss"]],
            [of["held-out-loss"] - judged[-1][1]] if judged else NONE,
            [of["held-out-examples"]],
            [len(of["sites"])],
        ]
        for name, of in told["groups"].items()
    ]
    if rows:
        sheet.table("table/subgroups/Subgroups", rows)


def _cell(of: Mapping[str, Any], key: str) -> Cell:
    return [of[key]] if key in of else NONE
