"""Client updates and their aggregation: norms, cosines, aggregation error."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grandrounds.config.words import counted
from grandrounds.server.masks.told import SUM_ONLY
from grandrounds.study.report.charts import Point, Series, line_chart
from grandrounds.study.report.figures import Figure, Section, some
from grandrounds.study.report.learning import curve
from grandrounds.study.report.read import RunFiles
from grandrounds.study.report.svg import Axis, shortened
from grandrounds.study.tables import Table, decimals_of, fixed, is_number, number, percent
from grandrounds.wire.names import SiteNames, one_line

FAR = 2.0
"""An outlier's norm is above `FAR` times the round's median, or below 1 / `FAR` of it."""

MOST_FLAGS = 8
"""Number of outliers with a label; the others only have a ring."""


def section(run: RunFiles) -> Section:
    """Return norms and cosines of the updates, and what the strategy reports."""
    error = aggregation_figure(run)
    notes = []
    if run.trained and run.config.is_masked:
        notes.append(
            f"{SUM_ONLY} So there are neither norms nor cosines, nor an aggregation error."
        )
        notes += [cut_text(run), *skipped_rounds(run)]
    elif run.trained and not error:
        notes.append(
            "This strategy has no aggregation error to measure: it does not average the LoRA "
            "factors separately."
        )
    figures = [*update_figures(run), *some(error, penalty_figure(run)), *rule_figures(run)]
    return Section("updates", "Client updates and aggregation", notes, figures)


def cut_text(run: RunFiles) -> str:
    """Return how many values the sites cut to the range of the masked sum, all together."""
    sums = [line.get("masked-sum") or {} for line in run.trained]
    cut = sum(int(one["values-cut"]) for one in sums if is_number(one.get("values-cut")))
    return f"Values that sites cut to the range of the sum: {cut:,}. The count travels in the mask."


def skipped_rounds(run: RunFiles) -> list[str]:
    """Return the rounds whose masked sum was lost, with the reason."""
    lost = [(line["round"], str(line["skipped"])) for line in run.trained if "skipped" in line]
    return [
        f"Round {number} was skipped, and the adapter stayed as it was: {one_line(why, 300)}"
        for number, why in lost[:MOST_FLAGS]
    ]


# --- Outliers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """A value measured on one site's update in one round."""

    round: int
    site: int
    value: float
    median: float
    """Of all updates of the round."""
    cohort: int
    """Number of updates of the round."""
    is_used: bool = True
    """Whether it was aggregated, not rejected by a screen."""

    @property
    def norm_ratio(self) -> float:
        """How many times above or below the round's median a norm is, at least 1.

        A round of fewer than three updates has no outliers.
        """
        if self.cohort < 3 or self.value <= 0 or self.median <= 0:
            return 1.0
        return max(self.value / self.median, self.median / self.value)


def measured(run: RunFiles, key: str) -> list[Update]:
    """Return every value that metrics.jsonl holds by site under a key."""
    found = []
    for line in run.trained:
        values = {int(s): float(v) for s, v in (line.get(key) or {}).items() if is_number(v)}
        if values:
            median = statistics.median(values.values())
            found += [
                Update(line["round"], s, v, median, len(values), str(s) not in line["failed"])
                for s, v in values.items()
            ]
    return found


def _scatter(
    updates: Sequence[Update], what: str, outliers: Sequence[Update], names: SiteNames
) -> list[Series]:
    """Return the medians by round and all updates, the outliers with a ring."""
    flagged, ringed = set(outliers[:MOST_FLAGS]), set(outliers)
    points = [
        Point(
            u.round,
            u.value,
            f"{names[u.site]}, round {u.round}: {what} {number(u.value, 3)}",
            flag=shortened(names[u.site], 20) if u in flagged else " " if u in ringed else "",
        )
        for u in updates
    ]
    medians = [Point(r, v, "") for r, v in {u.round: u.median for u in updates}.items()]
    return [
        Series("median of the round", medians, 1, "rule"),
        Series("client update", points, 0, "dot"),
    ]


def _listed(
    updates: Sequence[Update],
    outliers: Sequence[Update],
    describe: Callable[[Update], str],
    names: SiteNames,
) -> str:
    """Return the outliers and the rejected updates, five of each."""
    rejected = [u for u in updates if not u.is_used]
    said = []
    for what, listed in (("Outliers", outliers), ("Rejected by the screen", rejected)):
        each = "; ".join(f"{names[u.site]} in round {u.round} ({describe(u)})" for u in listed[:5])
        more = f"; and {len(listed) - 5:,} more" if len(listed) > 5 else ""
        said += [f"{what}: {each}{more}."] if listed else []
    return " ".join(said) or "No outliers."


def _ringed(updates: Sequence[Update], outliers: Sequence[Update]) -> list[Update]:
    return list(dict.fromkeys([*outliers, *(u for u in updates if not u.is_used)]))


def update_figures(run: RunFiles) -> list[Figure]:
    """Return the norms of all updates and their cosines to the mean, if measured."""
    figures, names = [], run.names
    if norms := measured(run, "update-norms"):
        outliers = [u for u in norms if u.norm_ratio > FAR]
        outliers.sort(key=lambda u: u.norm_ratio, reverse=True)
        note = _listed(
            norms, outliers, lambda u: f"{number(u.value / u.median, 2)} times the median", names
        )
        note += f" Ringed: more than {FAR:g} times the round's median, or less than half of it"
        note += ", or rejected." if any(not u.is_used for u in norms) else "."
        if bound := run.config.defence.update_norm_bound:
            note += f" Norms above {bound:g} were clipped to it."
        counts = [line.get("updates-bounded") for line in run.trained if not bound]
        if scaled := sum(int(count) for count in counts if is_number(count)):
            note += f" Scaled down by defence.largest-norm: {counted(scaled, 'update')}."
        title = "Norm of each client update"
        series = _scatter(norms, "norm", _ringed(norms, outliers), names)
        svg = line_chart(title, series, Axis("L2 norm", log=True), run.last_shown)
        figures.append(Figure("update-norms", title, svg, note, _by_site(norms, "norm", names)))
    if cosines := measured(run, "update-cosines"):
        outliers = sorted((u for u in cosines if u.value < 0), key=lambda u: u.value)
        note = _listed(cosines, outliers, lambda u: f"cosine {number(u.value, 2)}", names)
        note += " Ringed: below 0, opposed to the mean of the updates used"
        note += ", or rejected." if any(not u.is_used for u in cosines) else "."
        title = "Cosine similarity of each client update to the mean"
        series = _scatter(cosines, "cosine", _ringed(cosines, outliers), names)
        svg = line_chart(title, series, Axis("cosine to the mean", from_zero=True), run.last_shown)
        figures.append(
            Figure("update-cosines", title, svg, note, _by_site(cosines, "cosine", names))
        )
    return figures


def _by_site(updates: Sequence[Update], what: str, names: SiteNames) -> Table:
    values = [u.value for u in updates if u.value]
    decimals = decimals_of([min(values, key=abs)], 2, least=2) if values else 0
    rows = []
    for site in sorted({u.site for u in updates}):
        of_site = [u for u in updates if u.site == site]
        values = [u.value for u in of_site]
        shown = [fixed(v, decimals) for v in (statistics.median(values), min(values), max(values))]
        rounds = ", ".join(str(u.round) for u in of_site[:30])
        rows.append((names.cell(site), *shown, rounds + (" …" if len(of_site) > 30 else "")))
    return Table(("site", f"median {what}", "minimum", "maximum", "rounds"), rows)


# --- Aggregation ----------------------------------------------------------------------------------

ERRORS = {
    "product-error-of-update": "relative to the round's update",
    "product-error": "relative to the adapter",
    "truncation-error": "rank truncation",
    "correction-error": "left by the correction, relative to the round's update",
}
"""Key of metrics.jsonl → its name in the figure."""


def aggregation_figure(run: RunFiles) -> Figure | None:
    """Return the aggregation error by round; None if there is none."""
    found = {key: values for key in ERRORS if (values := run.values(key))}
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
            "Error from averaging the LoRA factors A and B separately instead of their products, "
            "measured at checkpoints on a sample of modules."
        )
    if "truncation-error" in found:
        notes.append(
            "The sum of the updates has a higher rank than the adapter: the part truncated."
        )
    if "correction-error" in found:
        notes.append(
            "What remains between the mean of the sites' models and the next adapter, whose B is "
            "corrected for the mean A."
        )
    rounds = sorted({r for values in found.values() for r, _ in values})
    rows = [
        (str(r), *(percent(dict(values).get(r), 2) for values in found.values())) for r in rounds
    ]
    svg = line_chart(title, series, Axis("%", from_zero=True), run.last_shown)
    columns = ("round", *(ERRORS[key] for key in found))
    return Figure("aggregation-error", title, svg, " ".join(notes), Table(columns, rows))


RULE_VALUES = {
    "rank": ("Adapter rank", "rank"),
    "server-learning-rate": ("Server learning rate", "server learning rate"),
}
"""Key of metrics.jsonl that some strategies write → (title, name)."""


def rule_figures(run: RunFiles) -> list[Figure]:
    """Return the values that the strategy reports and that change over the rounds."""
    figures = []
    for key, (title, what) in RULE_VALUES.items():
        values = run.values(key)
        if len({v for _, v in values}) > 1:
            svg = line_chart(
                title, [curve("", values, what)], Axis(what, from_zero=True), run.last_shown
            )
            places = 0 if all(v.is_integer() for _, v in values) else 4
            rows = [(str(r), fixed(v, places)) for r, v in values]
            note = f"Computed by {run.config.strategy.name}."
            figures.append(Figure(key, title, svg, note, Table(("round", what), rows)))
    return figures


def penalty_figure(run: RunFiles) -> Figure | None:
    """Return the proximal penalty by round; None if the run has none."""
    values = [(r, v) for r, v in run.values("proximal-penalty") if v > 0]
    if not values:
        return None
    title = "Proximal penalty"
    y_axis = Axis("nats, added to the loss", log=True)
    svg = line_chart(title, [curve("", values, "penalty")], y_axis, run.last_shown)
    mu = run.config.strategy.proximal_mu
    note = f"mu / 2 times the squared distance from the received adapter; mu = {mu:g}."
    decimals = decimals_of([min(v for _, v in values)], 2)
    rows = [(str(r), fixed(v, decimals)) for r, v in values]
    return Figure("proximal-penalty", title, svg, note, Table(("round", "penalty"), rows))
