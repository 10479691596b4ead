"""Which sites took part, and how much of their data was seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from grandrounds.config.words import NOT_TOLD, counted
from grandrounds.server.masks.told import SUM_ONLY
from grandrounds.server.unfinished import TRAIN
from grandrounds.study.report.charts import column_chart
from grandrounds.study.report.figures import Figure, Section, some
from grandrounds.study.report.read import RunFiles
from grandrounds.study.report.row_charts import Cell, Dot, Row, grid_chart, interval_chart
from grandrounds.study.report.svg import Axis
from grandrounds.study.tables import NONE, Table, is_number, number, percent
from grandrounds.wire.names import one_line
from grandrounds.wire.told import in_custody

MOST_ROWS = 40
"""With more sites than this, coverage has a column for each, by number."""


def section(run: RunFiles) -> Section:
    """Return participation by site and round, and coverage by site."""
    figures = some(participation_figure(run), coverage_figure(run))
    notes = []
    if run.config.is_masked and run.trained:
        notes.append(f"{SUM_ONLY} So nobody knows how much of its data each site has used.")
    return Section("sites", "Participation", notes, figures)


def site_numbers(run: RunFiles) -> list[int]:
    """Return the partition ids of all sites."""
    named = [int(s["partition-id"]) for s in run.sites if is_number(s.get("partition-id"))]
    return sorted(named) or list(range(run.config.data.num_partitions))


def participation_figure(run: RunFiles) -> Figure | None:
    """Return which sites trained in which round, and which failed."""
    sites, rounds, names = site_numbers(run), run.last_shown, run.names
    if not (run.trained or run.unfinished) or not rounds:
        return None
    cells = []
    for line in run.trained:
        failed: Mapping[str, str] = line.get(TRAIN) or {}
        for site in line.get("cohort") or ():
            if site in sites:
                why = failed.get(str(site))
                outcome = "took part" if why is None else f"failed: {one_line(why, 200)}"
                label = f"{names[site]}, round {line['round']}: {outcome}"
                kind = "took" if why is None else "failed"
                cells.append(Cell(site, line["round"], kind, label))
    lost = Counter(int(site) for line in run.unfinished for site in line.get(TRAIN) or ())
    cells += _lost_cells(run, sites)
    title = "Participation by site and round"
    svg = grid_chart(title, {s: names.cell(s) for s in sites}, rounds, cells, run.rounds)
    counts = Counter((cell.site, cell.kind) for cell in cells)
    used = sum(cell.kind == "took" for cell in cells)
    unused = sum(len(line.get(TRAIN) or ()) for line in run.trained)
    held = {int(s["partition-id"]): s for s in run.sites if is_number(s.get("partition-id"))}
    rows = [
        (
            names.cell(s),
            _count(held.get(s), "train-examples"),
            _count(held.get(s), "held-out-examples"),
            str(counts[s, "took"]),
            str(sum(str(s) in (line.get(TRAIN) or ()) for line in run.trained) + lost[s]),
        )
        for s in sites
    ]
    columns = ("site", "training examples", "held-out examples", "rounds", "failed")
    note = f"{counted(used, 'client update')} used, {unused + lost.total():,} failed"
    note += f", {lost.total():,} of them in rounds that did not finish." if lost else "."
    if any(map(in_custody, run.sites)):
        note += " Real sites round their examples."
    return Figure("participation", title, svg, note, Table(columns, rows))


def _lost_cells(run: RunFiles, sites: Sequence[int]) -> list[Cell]:
    """Return the failed visits of the round that ended the run, if it did not finish."""
    number = run.rounds + 1
    attempts = run.lost_after(run.rounds if run.metrics else None)
    if not attempts or number > run.last_shown:
        return []
    failed: Mapping[str, str] = attempts[-1].get(TRAIN) or {}
    return [
        Cell(
            int(site),
            number,
            "failed",
            f"{run.names[int(site)]}, round {number}: failed: {one_line(why, 200)}",
        )
        for site, why in failed.items()
        if int(site) in sites
    ]


def _count(site: Mapping[str, Any] | None, name: str) -> str:
    """Return a count of a site; a real one may keep it to itself."""
    if site is not None and in_custody(site) and name not in site:
        return NOT_TOLD
    return number((site or {}).get(name))


def coverage_figure(run: RunFiles) -> Figure | None:
    """Return the share of each site's training examples seen at least once, where sites tell it."""
    told: dict[int, float] = {}
    for line in run.trained:
        found = line.get("site-coverage") or {}
        told |= {int(s): float(share) for s, share in found.items() if is_number(share)}
    if not told:
        return None
    real = {int(s["partition-id"]) for s in run.sites if in_custody(s)}
    silent = real if not real & told.keys() else set()
    last = {s: told.get(s, 0.0) for s in site_numbers(run) if s not in silent}
    title = "Coverage by site"
    names = run.names
    said = {s: f"{names[s]}: {percent(share)} of its examples" for s, share in last.items()}
    if names and len(last) <= MOST_ROWS:
        rows_of_sites = [
            Row(names[s], [Dot(100 * share, said[s])], value=percent(share))
            for s, share in last.items()
        ]
        axis = Axis("% of training examples seen", from_zero=True)
        svg = interval_chart(title, rows_of_sites, axis)
    else:
        svg = column_chart(
            title,
            list(said.items()),
            [("", [100 * share for share in last.values()])],
            x_label="site",
            y_label="% of training examples seen",
            top_value=100,
        )
    note = "Share of the training examples seen at least once."
    if overall := run.values("coverage"):
        note += f" Overall: {percent(overall[-1][1])}."
    never = [s for s, share in last.items() if not share]
    if never:
        named = ", ".join(map(names.cell, never[:20])) + (" and more" if len(never) > 20 else "")
        note += f" Not visited yet: {named}."
    rows = [(names.cell(s), percent(share) if share else NONE) for s, share in last.items()]
    return Figure("coverage", title, svg, note, Table(("site", "coverage"), rows))
