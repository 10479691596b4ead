"""Figures of what was learned, sent, and by whom."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grandrounds.study.report.charts import Point, Reference, Series, column_chart, line_chart
from grandrounds.study.report.figures import (
    NONE,
    Figure,
    Table,
    decimals_of,
    fixed,
    is_number,
    number,
    percent,
    percent_range,
)
from grandrounds.study.report.read import RunFiles, checkpoints
from grandrounds.study.report.row_charts import Cell, grid_chart

MIB = 2**20

MEANING = {
    "private": "private facts, known to single sites only",
    "public": "public facts, known to the base",
}


def curve(name: str, values: Sequence[tuple[int, float]], what: str, style: int = 0) -> Series:
    """Return (round, value) as a series whose marks say round and value."""
    points = [Point(r, v, f"round {r}: {what} {number(v)}") for r, v in values]
    return Series(name, points, style)


# --- Loss -----------------------------------------------------------------------------------------


def loss_figure(run: RunFiles) -> Figure | None:
    """Return training and held-out loss by round."""
    trained, judged = run.values("train-loss"), run.values("held-out-loss")
    if not trained and not judged:
        return None
    series = [
        curve("held-out loss", judged, "held-out loss", 0),
        curve("training loss", trained, "training loss", 1),
    ]
    title = "Loss by round"
    by_round = {r: (dict(judged).get(r), dict(trained).get(r)) for r, _ in [*judged, *trained]}
    places = decimals_of((v for pair in by_round.values() for v in pair), 4, least=3)
    rows = [(str(r), fixed(h, places), fixed(t, places)) for r, (h, t) in sorted(by_round.items())]
    judges = max((len(m.get("evaluated") or ()) for m in run.metrics), default=0)
    note = "Round 0 is the base, untrained. Training loss is of the cohort, while it trains."
    if judged:
        note += f" Held-out loss: on examples that {judges} sites never train on."
    return Figure(
        "loss",
        title,
        line_chart(title, series, y_label="nats per answer token", x_range=(0, shown_rounds(run))),
        note,
        Table(("round", "held-out loss", "training loss"), rows),
    )


def shown_rounds(run: RunFiles) -> int:
    """Return the end of the axis of rounds: what was asked for while a run can still go on."""
    return run.rounds if run.status == "completed" else max(run.planned_rounds, run.rounds)


# --- Accuracy -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Right answers of one model to one benchmark, or to a group of its questions."""

    protocol: str
    benchmark: str
    group: str
    """Empty where a benchmark has no groups."""
    model: str
    correct: int
    n: int
    accuracy: float
    interval: tuple[float, float]

    @property
    def round(self) -> int | None:
        """Return the round of a checkpoint; None for the base or another adapter."""
        number_of_round = self.model.removeprefix("peft_")
        return int(number_of_round) if number_of_round.isdigit() else None

    @property
    def words(self) -> str:
        """Return the counts, the share and its interval."""
        shown = percent(self.accuracy)
        return f"{shown} ({self.correct:,}/{self.n:,}; {percent_range(self.interval)})"


def scores(run: RunFiles) -> list[Score]:
    """Return the accuracies of a run: its evaluations', else those that it measured at its end."""
    found: dict[tuple[str, ...], Score] = {}
    for evaluation in run.evaluations:
        for row in evaluation["rows"]:
            for part in row.get("groups") or [row]:
                low, high = part["interval"]
                score = Score(
                    str(evaluation["protocol"]),
                    str(row["title"]),
                    str(part.get("group", "")),
                    str(row["model"]),
                    int(part["correct"]),
                    int(part["n"]),
                    float(part["accuracy"]),
                    (float(low), float(high)),
                )
                key = (score.protocol, score.benchmark, score.group, score.model)
                found.setdefault(key, score)
    return list(found.values()) or _formulary_scores(run)


def _formulary_scores(run: RunFiles) -> list[Score]:
    """Return what the run itself asked at its end."""
    from grandrounds.statistics import wilson_interval

    asked: Mapping[str, Any] = run.summary.get("formulary") or {}
    found = []
    for group, models in asked.items():
        for model, counts in models.items():
            name = "base" if model == "base" else f"peft_{run.rounds}"
            correct, n = int(counts["correct"]), int(counts["n"])
            interval = wilson_interval(correct, n)
            title = "Formulary (fictional)"
            found.append(Score("likelihood", title, group, name, correct, n, correct / n, interval))
    return found


def accuracy_figures(run: RunFiles) -> list[Figure]:
    """Return one figure for each benchmark and protocol: accuracy by checkpoint, base across."""
    all_scores = scores(run)
    pairs = dict.fromkeys((s.protocol, s.benchmark) for s in all_scores)
    figures = []
    for i, (protocol, benchmark) in enumerate(pairs):
        chosen = [s for s in all_scores if (s.protocol, s.benchmark) == (protocol, benchmark)]
        figures.append(_accuracy_figure(run, i, protocol, benchmark, chosen))
    return figures


def _accuracy_figure(
    run: RunFiles, place: int, protocol: str, benchmark: str, chosen: Sequence[Score]
) -> Figure:
    series, references = [], []
    for style, group in enumerate(dict.fromkeys(s.group for s in chosen)):
        of_group = [s for s in chosen if s.group == group]
        points = sorted(
            (_point(s, s.round) for s in of_group if s.round is not None), key=lambda p: p.x
        )
        series.append(Series(group or "tuned", points, style))
        for base in (s for s in of_group if s.model == "base"):
            low, high = (100 * end for end in base.interval)
            name = f"{group} base".strip()
            references.append(Reference(name, 100 * base.accuracy, style, low, high))
    title = f"Accuracy by checkpoint: {benchmark}"
    rows = [
        (
            MEANING.get(s.group, s.group or "all"),
            s.model,
            f"{s.correct:,}/{s.n:,}",
            percent(s.accuracy),
            percent_range(s.interval),
        )
        for s in chosen
    ]
    note = f"Protocol {protocol}. Whiskers and bands: 95 % intervals (Wilson). Lines across: base."
    if any(s.group == "private" for s in chosen):
        note += " Guessing gets 25 %."
    note += _asked_only(run, chosen)
    svg = line_chart(
        title,
        series,
        y_label="right answers, %",
        references=references,
        x_range=(0, shown_rounds(run)),
        from_zero=True,
    )
    columns = ("questions", "model", "correct", "accuracy", "95 % interval")
    return Figure(f"accuracy-{place + 1}", title, svg, note, Table(columns, rows))


def _asked_only(run: RunFiles, chosen: Sequence[Score]) -> str:
    """Return which checkpoint was asked where it is a single one, and how to ask another."""
    asked = {s.round: s.model for s in chosen if s.round is not None}
    if len(asked) != 1:
        return ""
    [(number_of_round, model)] = asked.items()
    kept = [folder for r, folder in checkpoints(run.path) if r != number_of_round]
    said = f" Only the checkpoint after round {number_of_round} ({model}) was asked"
    if not kept:
        return f"{said}; the run directory holds no other."
    command = shlex.join(["grandrounds", "evaluate", str(kept[-1])])
    return f"{said}. To ask another one: {command}"


def _point(score: Score, round_number: int | None) -> Point:
    low, high = (100 * end for end in score.interval)
    words = f"{score.model}, {score.group or score.benchmark}: {score.words}"
    return Point(round_number or 0, 100 * score.accuracy, words, low, high)


# --- Communication --------------------------------------------------------------------------------


def traffic(content: Mapping[str, Any], way: str) -> int:
    """Return the bytes of one way, `up` or `down`, in a ledger or a plan."""
    totals = content.get("totals") or {}
    return sum(int(t["tensor_bytes"]) for kind, t in totals.items() if kind.endswith(f".{way}"))


def uploaded(run: RunFiles) -> list[tuple[int, float]]:
    """Return MiB sent up until each round: as recorded, else the ledger's total by replies."""
    if recorded := run.values("communication-up-mib"):
        return recorded
    replies, so_far = 0, []
    for line in run.metrics:
        replies += len(line.get("update-norms") or line.get("good") or ())
        so_far.append((line["round"], replies))
    total = traffic(run.ledger, "up") / MIB
    return [(r, total * n / replies) for r, n in so_far] if replies else []


def planned(run: RunFiles) -> list[tuple[int, float]]:
    """Return MiB that the plan allows until each round, its totals spread evenly."""
    totals = run.plan.get("totals") or {}
    rounds = run.planned_rounds
    by_kind = {
        kind: sum(t["tensor_bytes"] for k, t in totals.items() if k.startswith(kind)) / MIB
        for kind in ("train", "evaluate")
    }
    if not totals:
        return []
    return [
        (r, by_kind["train"] * r / rounds + by_kind["evaluate"] * (r + 1) / (rounds + 1))
        for r in range(rounds + 1)
    ]


def communication_figure(run: RunFiles) -> Figure | None:
    """Return MiB sent until each round, both ways, beside the plan."""
    total = run.values("communication-mib")
    if not total:
        return None
    up = uploaded(run)
    down = [(r, dict(total)[r] - v) for r, v in up if r in dict(total)]
    plan = planned(run)
    series = [
        curve("both ways", total, "both ways, MiB", 0),
        curve("down, to the sites", down, "down, MiB", 1),
        curve("up, from the sites", up, "up, MiB", 2),
        Series("plan, both ways", [Point(r, v, "") for r, v in plan], 5, marks=False, wide=True),
    ]
    title = "Communication so far"
    ups, downs, plans = dict(up), dict(down), dict(plan)
    rows = [
        (str(r), *(fixed(mib, 2) for mib in (downs.get(r), ups.get(r), v, plans.get(r))))
        for r, v in total
    ]
    note = (
        "MiB by FlowerTune's counting rule. The wide pale line is the plan, its total spread "
        "evenly over the rounds; where all went as planned it lies around that of both ways."
    )
    if up and not run.values("communication-up-mib"):
        note += " Up and down: the ledger's totals, divided by the replies of each round."
    return Figure(
        "communication",
        title,
        line_chart(title, series, y_label="MiB", from_zero=True, x_range=(0, shown_rounds(run))),
        note,
        Table(("round", "down", "up", "both", "plan"), rows),
    )


def ledger_table(run: RunFiles) -> Table | None:
    """Return messages and MiB by kind of message, beside the plan."""
    sent, plan = run.ledger.get("totals") or {}, run.plan.get("totals") or {}
    if not sent and not plan:
        return None
    rows = []
    for kind in sorted({*sent, *plan}):
        done, meant = sent.get(kind, {}), plan.get(kind, {})
        cells = [
            text
            for t in (done, meant)
            for text in (f"{t.get('messages', 0):,}", f"{t.get('tensor_bytes', 0) / MIB:,.2f}")
        ]
        rows.append((kind, *cells))
    columns = ("messages of", "sent", "MiB", "planned", "MiB")
    return Table(columns, rows, "By kind of message")


# --- Participation --------------------------------------------------------------------------------


def site_numbers(run: RunFiles) -> list[int]:
    """Return the partition ids of all sites."""
    named = [int(s["partition-id"]) for s in run.sites if is_number(s.get("partition-id"))]
    return sorted(named) or list(range(run.config.data.num_partitions))


def participation_figure(run: RunFiles) -> Figure | None:
    """Return which site trained in which round, and which failed to."""
    sites, rounds = site_numbers(run), list(range(1, shown_rounds(run) + 1))
    if not run.trained or not rounds:
        return None
    place = {site: i for i, site in enumerate(sites)}
    cells, took, failures = [], dict.fromkeys(sites, 0), dict.fromkeys(sites, 0)
    for line in run.trained:
        failed: Mapping[str, str] = line.get("failed") or {}
        for site in line.get("cohort") or ():
            if site not in place:
                continue
            why = failed.get(str(site))
            words = f"site {site}, round {line['round']}: " + (
                "took part" if why is None else f"failed: {why[:200]}"
            )
            cells.append(Cell(place[site], line["round"] - 1, int(why is not None), words))
            took[site] += why is None
            failures[site] += why is not None
    title = "Who took part when"
    kinds = [("took part", "took"), ("failed", "failed"), ("not drawn", "ground")]
    svg = grid_chart(
        title,
        [str(s) for s in sites],
        rounds,
        cells,
        kinds,
        x_label="round",
        y_label="site",
        done=run.rounds,
    )
    held = {int(s["partition-id"]): s for s in run.sites if is_number(s.get("partition-id"))}
    rows = [
        (
            str(s),
            number(held.get(s, {}).get("train-examples")),
            number(held.get(s, {}).get("held-out-examples")),
            str(took[s]),
            str(failures[s]),
        )
        for s in sites
    ]
    columns = ("site", "examples to train on", "held out", "rounds", "failed")
    note = f"{sum(took.values()):,} visits were used, {sum(failures.values()):,} were not."
    return Figure("participation", title, svg, note, Table(columns, rows))


def coverage_figure(run: RunFiles) -> Figure | None:
    """Return the share of each site's examples that was trained on."""
    last: dict[int, float] = dict.fromkeys(site_numbers(run), 0.0)
    for line in run.trained:
        found = line.get("site-coverage") or {}
        last |= {int(s): float(share) for s, share in found.items() if is_number(share)}
    if not run.trained:
        return None
    title = "Coverage of each site"
    columns = [(s, f"site {s}: {percent(share)} of its examples") for s, share in last.items()]
    svg = column_chart(
        title,
        columns,
        [("", [100 * share for share in last.values()])],
        x_label="site",
        y_label="% of its examples trained on",
        top_value=100,
    )
    overall = run.values("coverage")
    note = f"All together: {percent(overall[-1][1])}." if overall else ""
    never = [s for s, share in last.items() if not share]
    if never:
        named = ", ".join(map(str, never[:20])) + (" and more" if len(never) > 20 else "")
        note += f" Not yet visited: {named}."
    rows = [(str(s), percent(share) if share else NONE) for s, share in last.items()]
    return Figure("coverage", title, svg, note, Table(("site", "coverage"), rows))
