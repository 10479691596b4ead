"""Privacy: masks, the guarantee of a run by site, what it does not cover, and its audit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grandrounds.server.guarantees import (
    SYNTHETIC,
    audit_line,
    guarantee_rows,
    is_rehearsed,
    not_covered,
    text_of,
    unit_of,
    verdict,
)
from grandrounds.server.masks.told import masks_text, still_told
from grandrounds.study.audit.words import table as audit_table
from grandrounds.study.plan.privacy import meaning
from grandrounds.study.report.charts import line_chart
from grandrounds.study.report.figures import Figure, Section, Tile, some
from grandrounds.study.report.learning import curve
from grandrounds.study.report.read import RunFiles
from grandrounds.study.report.svg import Axis
from grandrounds.study.tables import Table, is_number


def section(run: RunFiles) -> Section:
    """Return masks, guarantee and audit; empty for a run that has none of them."""
    notes: list[str] = []
    tables = [Table(("item", "value"), rows, "Masks")] if (rows := mask_rows(run)) else []
    if private := guarantee_of(run):
        tables.append(Table(("item", "value"), guarantee_rows(private, _named(run)), "Guarantee"))
        covered = [(line,) for line in not_covered(private, _named(run))]
        tables.append(Table(("the guarantee leaves open",), covered, "Not covered"))
        epsilon, delta = private.get("epsilon"), private.get("delta")
        if is_number(epsilon) and is_number(delta):
            notes.append(_sentence(meaning(unit_of(private), epsilon, delta)))
    if run.audit:
        tables.append(audit_table(run.audit))
        notes += [f"Audit: {audit_line(run.audit)}.", _sentence(verdict(run.audit))]
        notes.append(f"The audit was {SYNTHETIC}.")
    return Section("privacy", "Privacy", notes, some(spent_figure(run)), tables)


def mask_rows(run: RunFiles) -> list[tuple[str, ...]]:
    """Return how updates were summed, and what the server got all the same."""
    if not run.config.is_masked:
        return []
    return [
        ("updates", masks_text(run.config, run.sites)),
        ("the server still gets of each site", still_told(run.config)),
    ]


def guarantee_of(run: RunFiles) -> Mapping[str, Any]:
    """Return `privacy` of summary.json; empty without a guarantee, and until the run ends."""
    found = run.summary.get("privacy")
    return found if isinstance(found, dict) else {}


def _named(run: RunFiles) -> Any:
    return lambda site: run.names[int(site)] if site.isdigit() else site


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def spent_figure(run: RunFiles) -> Figure | None:
    """Return the largest ε of any site by round; None if no site told one."""
    values = []
    for line in run.trained:
        told = [v for v in (line.get("epsilon") or {}).values() if is_number(v)]
        if told:
            values.append((line["round"], max(told)))
    if not values:
        return None
    title = "Epsilon spent, the most of any site"
    axis = Axis("epsilon", from_zero=True)
    svg = line_chart(title, [curve("", values, "epsilon")], axis, run.last_shown)
    note = "It rises with each visit to a site, and never falls."
    rows = [(str(number), text_of(value)) for number, value in values]
    return Figure("epsilon", title, svg, note, Table(("round", "epsilon"), rows))


def tile(run: RunFiles) -> list[Tile]:
    """Return the tile of the headline; none for a run without a guarantee."""
    if not (private := guarantee_of(run)):
        return []
    delta = private.get("delta")
    at = f", delta {delta:g}" if is_number(delta) else ""
    how = "a rehearsal in one process" if is_rehearsed(private) else "enforced by the sites"
    note = f"of one {unit_of(private)} at most{at}; {how}"
    return [Tile("epsilon", text_of(private.get("epsilon")), note)]
