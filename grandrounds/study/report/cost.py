"""What a run costs: communication and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grandrounds.server.unfinished import AFTER, failures_of
from grandrounds.study.report.charts import Point, Series, column_chart, line_chart
from grandrounds.study.report.figures import Figure, Section, some
from grandrounds.study.report.learning import curve
from grandrounds.study.report.read import RunFiles
from grandrounds.study.report.svg import Axis
from grandrounds.study.tables import MIB, Table, duration, fixed, in_mib, is_number
from grandrounds.wire.names import one_line


def section(run: RunFiles) -> Section:
    """Return communication against the plan, time by phase, and messages by kind."""
    tables = [table for table in (ledger_table(run), unfinished_table(run)) if table]
    figures = some(communication_figure(run), seconds_figure(run))
    return Section("cost", "Cost", figures=figures, tables=tables)


# --- Communication --------------------------------------------------------------------------------


def traffic(content: Mapping[str, Any], way: str) -> int:
    """Return the bytes of one direction, `up` or `down`, in a ledger or a plan."""
    totals = content.get("totals") or {}
    return sum(int(t["tensor_bytes"]) for kind, t in totals.items() if kind.endswith(f".{way}"))


def uploaded(run: RunFiles) -> list[tuple[int, float]]:
    """Return cumulative MiB sent up: as recorded, else the ledger's total divided by replies."""
    if is_recorded(run):
        return run.values("communication-up-mib")
    replies, so_far = 0, []
    for line in run.metrics:
        replies += len(line.get("update-norms") or line.get("good") or ())
        so_far.append((line["round"], replies))
    total = traffic(run.ledger, "up") / MIB
    return [(r, total * n / replies) for r, n in so_far] if replies else []


def is_recorded(run: RunFiles) -> bool:
    """Whether every round recorded what was sent up; earlier versions did not."""
    return len(run.values("communication-up-mib")) == len(run.values("communication-mib"))


def planned(run: RunFiles) -> list[tuple[int, float]]:
    """Return cumulative MiB of the plan, its totals spread evenly over the rounds."""
    totals = run.plan.get("totals") or {}
    rounds = run.planned_rounds
    trained, judged = (
        sum(t["tensor_bytes"] for kind, t in totals.items() if kind.startswith(kinds)) / MIB
        for kinds in (("train.", "masks."), ("evaluate.",))
    )
    if not totals:
        return []
    return [(r, trained * r / rounds + judged * (r + 1) / (rounds + 1)) for r in range(rounds + 1)]


def communication_figure(run: RunFiles) -> Figure | None:
    """Return cumulative communication, by direction, beside the plan."""
    total = run.values("communication-mib")
    if not total:
        return None
    up = uploaded(run)
    down = [(r, dict(total)[r] - v) for r, v in up if r in dict(total)]
    plan = planned(run)
    series = [
        curve("total", total, "total, MiB", 0),
        curve("down, to the sites", down, "down, MiB", 1),
        curve("up, from the sites", up, "up, MiB", 2),
        Series("planned total", [Point(r, v, "") for r, v in plan], 5, "wide"),
    ]
    title = "Cumulative communication"
    ups, downs, plans = dict(up), dict(down), dict(plan)
    rows = [
        (str(r), *(fixed(mib, 2) for mib in (downs.get(r), ups.get(r), v, plans.get(r))))
        for r, v in total
    ]
    last = "a final exam"
    if run.config.is_personal:
        last += ", the adapter for personal ones"
    if run.config.subgroup_columns:
        last += ", the adapter for losses by subgroup"
    note = (
        "MiB by FlowerTune's counting rule. Wide pale line: the planned total, spread evenly over "
        f"the rounds; a run on plan stays inside it. What follows the last round ({last}) is not "
        "shown."
    )
    if run.unfinished:
        note += " Messages of unfinished rounds are in the next finished one."
    if up and not is_recorded(run):
        note += " Up and down: the ledger's totals, divided by the replies of each round."
    svg = line_chart(title, series, Axis("MiB", from_zero=True), run.last_shown)
    columns = ("round", "down", "up", "total", "planned total")
    return Figure("communication", title, svg, note, Table(columns, rows))


def ledger_table(run: RunFiles) -> Table | None:
    """Return messages and MiB by kind of message, beside the plan."""
    sent, plan = run.ledger.get("totals") or {}, run.plan.get("totals") or {}
    if not sent and not plan:
        return None
    rows = []
    for kind in sorted({*sent, *plan}):
        cells = [
            text
            for t in (sent.get(kind, {}), plan.get(kind, {}))
            for text in (f"{t.get('messages', 0):,}", in_mib(t.get("tensor_bytes", 0)))
        ]
        rows.append((kind, *cells))
    return Table(("kind", "sent", "MiB", "planned", "MiB"), rows, "Messages by kind")


def unfinished_table(run: RunFiles) -> Table | None:
    """Return what was sent in rounds that did not finish."""
    if not run.unfinished:
        return None
    rows = []
    for line in run.unfinished:
        after = line[AFTER]
        rows.append(
            (
                "none" if after is None else str(after),
                fixed(line["communication-mib"], 2),
                str(failures_of(line)),
                f"{line['seconds']:.2f}",
                one_line(line["reason"]),
            )
        )
    columns = ("after round", "MiB", "failed replies", "seconds", "reason")
    return Table(columns, rows, "Rounds that did not finish")


# --- Time -----------------------------------------------------------------------------------------

PHASES = ("training", "held-out loss", "I/O")


def seconds_figure(run: RunFiles) -> Figure | None:
    """Return the wall-clock seconds of each round, by phase."""
    timed = [m for m in run.metrics if is_number(m.get("seconds"))]
    if not timed:
        return None
    columns, rows, by_round = [], [], []
    for line in timed:
        train, judge = (float(line.get(f"{p}-seconds") or 0) for p in ("train", "evaluate"))
        parts = (train, judge, max(0.0, float(line["seconds"]) - train - judge))
        said = ", ".join(f"{p} {v:.2f} s" for p, v in zip(PHASES, parts, strict=True))
        columns.append((float(line["round"]), f"round {line['round']}: {said}"))
        rows.append((str(line["round"]), *(f"{v:.2f}" for v in parts)))
        by_round.append(parts)
    stacks = list(zip(PHASES, zip(*by_round, strict=True), strict=True))
    title = "Wall-clock time by round"
    svg = column_chart(title, columns, stacks, x_label="round", y_label="seconds")
    totals = ", ".join(f"{name} {duration(sum(values))}" for name, values in stacks)
    return Figure("seconds", title, svg, f"Total: {totals}.", Table(("round", *PHASES), rows))
