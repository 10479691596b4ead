"""The section on personal adapters: what each site's own does at that site."""

from __future__ import annotations

from grandrounds.config.words import counted
from grandrounds.study.report.figures import Section
from grandrounds.study.report.read import RunFiles
from grandrounds.study.tables import NONE, Table, fixed
from grandrounds.wire.names import names_of


def section(run: RunFiles) -> Section:
    """Return losses of federated and personal adapters by site; empty for a run without them."""
    personal = run.summary.get("personal") or {}
    if not personal:
        return Section("personal", "Personal adapters")
    names, sites = names_of(run.sites), personal["sites"]
    made, failed = len(sites), personal["failed"]
    notes = [
        f"{made} of {counted(made + len(failed), 'site')} made an adapter of their own "
        f"({personal['name']}), which stays there. A loss is of that site's held-out examples on "
        "which no weight was chosen, in nats per answer token."
    ]
    if mean := personal.get("mean"):
        worst, spread = personal["worst"], personal["spread"]
        notes.append(
            f"Mean of the sites {mean['federated']:.4f} → {mean['personal']:.4f}, standard "
            f"deviation over sites {spread['federated']:.4f} → {spread['personal']:.4f}; lower at "
            f"{personal['better']} and higher at {personal['worse']} sites. Worst site: "
            f"{names[worst['site']]}, {worst['federated']:.4f} → {worst['personal']:.4f}."
        )
    notes += [f"{names[int(site)]} has none: {why}." for site, why in failed.items()]
    rows = [
        (
            names.cell(int(site)),
            *(
                fixed(float(told[name]), decimals) if name in told else NONE
                for name, decimals in (("federated", 4), ("personal", 4), ("weight", 2))
            ),
            str(told.get("held-out-examples", NONE)),
        )
        for site, told in sites.items()
        if told
    ]
    columns = ("site", "federated loss", "personal loss", "weight", "held-out examples")
    tables = [Table(columns, rows, "Personal adapters by site")] if rows else []
    return Section("personal", "Personal adapters", notes, tables=tables)
