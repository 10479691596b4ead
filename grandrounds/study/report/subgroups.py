"""The section on subgroups: the held-out loss by values of the columns that the run names."""

from __future__ import annotations

from grandrounds.config.words import counted
from grandrounds.study.report.figures import Section
from grandrounds.study.report.read import RunFiles
from grandrounds.study.tables import NONE, Table, fixed


def section(run: RunFiles) -> Section:
    """Return losses by subgroup; empty for a run without."""
    found = run.summary.get("subgroups") or {}
    if not found:
        return Section("subgroups", "Subgroups")
    groups, silent = found["groups"], found["silent"]
    overall = (run.summary.get("held_out_loss") or {}).get("last")
    notes = [
        "Held-out loss of the last adapter in nats per answer token, by the values of "
        f"{', '.join(found['columns'])}. Each site tells subgroups of at least 10 held-out "
        "examples, and none from which fewer could be told apart by one subtraction."
    ]
    if silent:
        notes.append(
            f"{counted(len(silent), 'site')} told none: too few examples, or not in their policy."
        )
    notes += [f"{run.names[int(site)]} failed: {why}." for site, why in found["failed"].items()]
    rows = [
        (
            name,
            fixed(of["held-out-loss"], 4),
            NONE if overall is None else fixed(of["held-out-loss"] - overall, 4, sign=True),
            f"{of['held-out-examples']:,}",
            str(len(of["sites"])),
        )
        for name, of in groups.items()
    ]
    columns = ("subgroup", "held-out loss", "against all", "held-out examples", "sites")
    tables = [Table(columns, rows, "Subgroups")] if rows else []
    return Section("subgroups", "Subgroups", notes, tables=tables)
