"""Figures of single updates, of aggregation and of time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grandrounds.study.report.charts import Point, Series, column_chart, line_chart
from grandrounds.study.report.figures import (
    Figure,
    Table,
    decimals_of,
    duration,
    fixed,
    is_number,
    number,
    percent,
)
from grandrounds.study.report.learning import curve, shown_rounds
from grandrounds.study.report.read import RunFiles

FAR = 2.0
"""An update stands out if its norm is so many times the median of its round, or so many times
smaller."""

MOST_FLAGS = 8
"""Marks that get a word beside them; more stand out by their ring."""


@dataclass(frozen=True)
class Update:
    """What was measured of one site's update in one round."""

    round: int
    site: int
    value: float
    median: float
    """Of all updates of the round."""
    cohort: int
    """Updates of the round."""


def measured(run: RunFiles, key: str) -> list[Update]:
    """Return every value that metrics.jsonl holds by site under a key."""
    found = []
    for line in run.trained:
        values = {int(s): float(v) for s, v in (line.get(key) or {}).items() if is_number(v)}
        if values:
            median = statistics.median(values.values())
            found += [Update(line["round"], s, v, median, len(values)) for s, v in values.items()]
    return found


def far_from_median(update: Update) -> float:
    """Return how many times longer or shorter than its round's median an update is, 1 at least.

    Of fewer than three updates none stands out.
    """
    if update.cohort < 3 or update.value <= 0 or update.median <= 0:
        return 1.0
    return max(update.value / update.median, update.median / update.value)


def against_the_mean(update: Update) -> float:
    """Return how far an update points away from the mean: its cosine below 0, else 0."""
    return max(0.0, -update.value)


def _scatter(
    updates: Sequence[Update], what: str, strangeness: Callable[[Update], float], least: float
) -> tuple[Series, list[Update]]:
    strange = sorted((u for u in updates if strangeness(u) > least), key=strangeness, reverse=True)
    named = set(strange[:MOST_FLAGS])
    points = [
        Point(
            u.round,
            u.value,
            f"site {u.site}, round {u.round}: {what} {number(u.value, 3)}",
            flag=f"site {u.site}" if u in named else " " if u in strange else "",
        )
        for u in updates
    ]
    return Series("one site's update", points, 0, line=False), strange


def _told(strange: Sequence[Update], ends: Callable[[Update], str]) -> str:
    """Return the updates that stand out, in words."""
    if not strange:
        return "None stands out."
    listed = "; ".join(f"site {u.site} in round {u.round} ({ends(u)})" for u in strange[:5])
    more = f"; and {len(strange) - 5:,} more" if len(strange) > 5 else ""
    return f"Stands out: {listed}{more}."


def update_figures(run: RunFiles) -> list[Figure]:
    """Return the norms of all updates, and their cosines to the mean, as far as measured."""
    figures = []
    ends = (0, shown_rounds(run))
    if norms := measured(run, "update-norms"):
        series, strange = _scatter(norms, "norm", far_from_median, FAR)
        medians = list({u.round: u.median for u in norms}.items())
        line = Series("median of the round", [Point(r, v, "") for r, v in medians], 1, marks=False)
        title = "Length of each site's update"
        bound = run.config.defence.update_norm_bound
        note = _told(strange, lambda u: f"{number(u.value / u.median, 2)} times the median")
        note += f" Ringed: more than {FAR:g} times the round's median, or less than half of it."
        if bound:
            note += f" Longer ones than {bound:g} were scaled down to it."
        svg = line_chart(title, [line, series], y_label="L2 norm", log=True, x_range=ends)
        figures.append(Figure("update-norms", title, svg, note, _by_site(norms, "norm")))
    if cosines := measured(run, "update-cosines"):
        series, strange = _scatter(cosines, "cosine", against_the_mean, 0.0)
        medians = list({u.round: u.median for u in cosines}.items())
        line = Series("median of the round", [Point(r, v, "") for r, v in medians], 1, marks=False)
        title = "Direction of each site's update"
        note = _told(strange, lambda u: f"cosine {number(u.value, 2)}")
        note += " Ringed: below 0, so against what the cohort learned."
        svg = line_chart(
            title, [line, series], y_label="cosine to the mean", from_zero=True, x_range=ends
        )
        figures.append(Figure("update-cosines", title, svg, note, _by_site(cosines, "cosine")))
    return figures


def _by_site(updates: Sequence[Update], what: str) -> Table:
    values = [u.value for u in updates if u.value]
    decimals = decimals_of([min(values, key=abs)], 2, least=2) if values else 0
    rows = []
    for site in sorted({u.site for u in updates}):
        of_site = [u for u in updates if u.site == site]
        values = [u.value for u in of_site]
        shown = [fixed(v, decimals) for v in (statistics.median(values), min(values), max(values))]
        rounds = ", ".join(str(u.round) for u in of_site[:30])
        rows.append((str(site), *shown, rounds + (" …" if len(of_site) > 30 else "")))
    return Table(("site", f"median {what}", "smallest", "largest", "rounds"), rows)


# --- Aggregation ----------------------------------------------------------------------------------

ERRORS = {
    "product-error-of-update": "of the round's update",
    "product-error": "of the adapter",
    "truncation-error": "cut back to the rank",
}
"""Key of metrics.jsonl → its name in the figure."""


def aggregation_figure(run: RunFiles) -> Figure | None:
    """Return what aggregation lost, by round."""
    found = {key: run.values(key) for key in ERRORS}
    found = {key: values for key, values in found.items() if values}
    if not found:
        return None
    title = "Aggregation error"
    series = [
        curve(ERRORS[key], [(r, 100 * v) for r, v in values], f"{ERRORS[key]}, %", i)
        for i, (key, values) in enumerate(found.items())
    ]
    notes = []
    if "product-error" in found:
        notes.append(
            "Averaging A and B apart is not averaging what they do: the difference, measured at "
            "checkpoints on some modules."
        )
    if "truncation-error" in found:
        notes.append("The sum of the updates has a higher rank than the adapter: what was cut.")
    rounds = sorted({r for values in found.values() for r, _ in values})
    rows = [
        (str(r), *(percent(dict(values).get(r), 2) for values in found.values())) for r in rounds
    ]
    svg = line_chart(title, series, y_label="%", from_zero=True, x_range=(0, shown_rounds(run)))
    columns = ("round", *(ERRORS[key] for key in found))
    return Figure("aggregation-error", title, svg, " ".join(notes), Table(columns, rows))


RULE_VALUES = {
    "rank": ("Rank of the adapter", "rank"),
    "server-learning-rate": ("Step of the server", "server learning rate"),
}
"""Key of metrics.jsonl that some rules write → (title, what it is)."""


def rule_figures(run: RunFiles) -> list[Figure]:
    """Return what a rule says of itself where that changes over the rounds."""
    figures = []
    for key, (title, what) in RULE_VALUES.items():
        values = run.values(key)
        if len({v for _, v in values}) > 1:
            series = [curve("", values, what)]
            svg = line_chart(
                title, series, y_label=what, from_zero=True, x_range=(0, shown_rounds(run))
            )
            places = 0 if all(v.is_integer() for _, v in values) else 4
            rows = [(str(r), fixed(v, places)) for r, v in values]
            note = f"As {run.config.strategy.name} chose it."
            figures.append(Figure(key, title, svg, note, Table(("round", what), rows)))
    return figures


def penalty_figure(run: RunFiles) -> Figure | None:
    """Return the proximal penalty; None where the run has none."""
    values = [(r, v) for r, v in run.values("proximal-penalty") if v > 0]
    if not values:
        return None
    title = "Proximal penalty"
    series = [curve("", values, "penalty")]
    svg = line_chart(
        title, series, y_label="nats, added to the loss", log=True, x_range=(0, shown_rounds(run))
    )
    mu = run.config.strategy.proximal_mu
    note = f"mu / 2 times the squared distance from the adapter received; mu = {mu:g}."
    decimals = decimals_of([min(v for _, v in values)], 2)
    rows = [(str(r), fixed(v, decimals)) for r, v in values]
    return Figure("proximal-penalty", title, svg, note, Table(("round", "penalty"), rows))


# --- Time -----------------------------------------------------------------------------------------

PHASES = ("training", "held-out loss", "writing down")


def seconds_figure(run: RunFiles) -> Figure | None:
    """Return wall-clock seconds of each round by phase."""
    timed = [m for m in run.metrics if is_number(m.get("seconds"))]
    if not timed:
        return None
    phases: list[list[float]] = [[], [], []]
    columns, rows = [], []
    for line in timed:
        train, judge = (float(line.get(f"{p}-seconds") or 0) for p in ("train", "evaluate"))
        parts = [train, judge, max(0.0, float(line["seconds"]) - train - judge)]
        for phase, value in zip(phases, parts, strict=True):
            phase.append(value)
        said = ", ".join(f"{p} {v:.2f} s" for p, v in zip(PHASES, parts, strict=True))
        columns.append((float(line["round"]), f"round {line['round']}: {said}"))
        rows.append((str(line["round"]), *(f"{v:.2f}" for v in parts)))
    title = "Seconds of each round"
    totals = [
        f"{name} {duration(sum(values))}" for name, values in zip(PHASES, phases, strict=True)
    ]
    svg = column_chart(
        title,
        columns,
        list(zip(PHASES, phases, strict=True)),
        x_label="round",
        y_label="wall-clock seconds",
    )
    note = f"In all: {', '.join(totals)}."
    return Figure("seconds", title, svg, note, Table(("round", *PHASES), rows))
