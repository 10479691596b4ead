"""Every figure on the page of one run, recomputed from its raw files."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from scripts.check_figures.last_rules import personal, subgroups
from scripts.check_figures.page import Texts
from scripts.check_figures.privacy_rules import privacy
from scripts.check_figures.provenance_rules import provenance
from scripts.check_figures.raw import MIB, Raw
from scripts.check_figures.scores import figures, losses, pairs, row_of
from scripts.check_figures.sheet import Cell, Sheet
from scripts.check_figures.shown import of_duration

FAR = 2.0
"""A norm is an outlier above this many times the median of its round, or below its inverse."""


def check_run_page(texts: Texts, raw: Raw) -> Sheet:
    """Check a run's page; the sheet holds what was found."""
    sheet = Sheet(texts, raw.names)
    for rule in (
        *(headline, failures, loss, accuracy, communication, messages, seconds),
        *(participation, coverage, updates, rule_values, personal, subgroups, privacy, provenance),
    ):
        rule(sheet, raw)
    sheet.ticks()
    sheet.rest()
    return sheet


# --- Headline -------------------------------------------------------------------------------------


def headline(sheet: Sheet, raw: Raw) -> None:
    sites = len(raw.sites)
    sheet.want("title", [sites])
    sheet.want("head/subtitle", [sites])
    ended = raw.summary.get("status") == "completed"
    sheet.want("head/status", [raw.rounds] if ended else [raw.rounds, raw.planned])
    judged = raw.series("held-out-loss")
    said: list[list[float]] = []
    if len(judged) > 1:
        first, last = judged[0][1], judged[-1][1]
        said.append([first, last] if f"{first:.3f}" != f"{last:.3f}" else [last])
    forgot: list[float] = []
    asked = pairs(raw)
    for i, (name, base, tuned) in enumerate(asked):
        drop = base.percent - tuned.percent if base else 0.0
        if base and name == "public facts" and raw.config["model.name"] == "formulary":
            forgot = [drop] if drop > 0 else []
        elif base:
            said.append([base.percent, tuned.percent])
        if i < 4:
            ends = [base.percent] if base else []
            sheet.want(f"tile/{name}/value", [*ends, tuned.percent])
            interval = [95, *tuned.interval] if tuned.interval else []
            lost = [drop] if drop > 0.05 else []
            sheet.want(f"tile/{name}/note", [*lost, *tuned.counts, *interval])
    if said:
        sheet.want("head/outcome", [raw.rounds, *(v for part in said[:2] for v in part), *forgot])
    if judged:
        sheet.want("tile/held-out loss/value", [judged[0][1], judged[-1][1]])
        sheet.want("tile/held-out loss/note", [judged[0][0], judged[-1][0]])
    sheet.want("tile/communication/value", [raw.sent()])
    sheet.want("tile/communication/note", [raw.plan["total-mib"]])
    if covered := raw.series("coverage"):
        sheet.want("tile/coverage/value", [100 * covered[-1][1]])
    every = [*raw.trained, *raw.lost]
    asked = sum(len(line.get("cohort") or ()) for line in every)
    used = sum(len(line["good"]) for line in raw.trained)
    failed = sum(len(line.get("failed") or ()) for line in every)
    sheet.want("tile/visits used/value", [used, asked])
    dropped = asked - used - failed
    sheet.want("tile/visits used/note", [failed, dropped] if dropped else [failed])
    took = sum(line["seconds"] for line in raw.lines)
    sheet.want("tile/wall-clock time/value", of_duration(took))
    if lost_seconds := sum(line["seconds"] for line in raw.lost):
        sheet.want("tile/wall-clock time/note", of_duration(lost_seconds))
    for place in sheet.under("story/"):
        sheet.among(place, [raw.rounds, raw.rounds + 1])


def failures(sheet: Sheet, raw: Raw) -> None:
    kinds = ("magnitudes-failed", "failed", "evaluate-failed", "formulary-failed")
    wanted: list[list[float]] = []

    def add(line: dict[str, Any], number: int) -> None:
        wanted.extend([number, *raw.who(int(s))] for kind in kinds for s in line.get(kind) or ())

    for line in (line for line in raw.lost if line["after-round"] is None):
        add(line, 0)
    for line in raw.lines:
        add(line, line["round"])
        for lost in raw.lost:
            if lost["after-round"] == line["round"]:
                add(lost, line["round"] + (line["round"] < raw.planned))
    wanted += [raw.who(int(site)) for site in raw.summary.get("formulary_failed") or ()]
    for i, numbers in enumerate(wanted[:50]):
        sheet.want(f"failure/{i}", numbers)
    if len(wanted) > 50:
        sheet.want("failure/50", [len(wanted) - 50])


# --- Results --------------------------------------------------------------------------------------


def cells(value: float | None, factor: float = 1.0) -> Cell:
    return "-" if value is None else [factor * value]


def by_round(series: Sequence[Sequence[tuple[int, float]]]) -> list[list[Cell]]:
    """Return the rows of a table of several values by round."""
    columns = [dict(values) for values in series]
    rounds = sorted({r for column in columns for r in column})
    return [[[r], *(cells(column.get(r)) for column in columns)] for r in rounds]


def loss(sheet: Sheet, raw: Raw) -> None:
    judged, trained = raw.series("held-out-loss"), raw.series("train-loss")
    if judged or trained:
        sheet.marks("loss", [*judged, *trained])
        sheet.table("figure/loss", by_round([judged, trained]))
        judges = max(len(line.get("evaluated") or ()) for line in raw.lines)
        starts = [0] if judged and judged[0][0] == 0 else []
        sheet.want("figure/loss/note", [*starts, *([judges] if judged else [])])


def accuracy(sheet: Sheet, raw: Raw) -> None:
    kept = [int(f.name[5:]) for f in raw.path.glob("peft_*")]
    for number, drawn in enumerate(figures(raw), 1):
        key = f"accuracy-{number}"
        tuned = [score for score in drawn if score.round is not None]
        sheet.marks(key, [[*score.digits, *score.shown] for score in tuned])
        sheet.table(f"figure/{key}", [row_of(score) for score in drawn])
        sheet.among(f"figure/{key}/note", [95, 25, raw.rounds, *kept, *losses(raw)])
        sheet.labels(key, [value for score in drawn for value in score.shown])


# --- Cost -----------------------------------------------------------------------------------------


def uploads(raw: Raw) -> list[tuple[int, float]]:
    """Return cumulative MiB sent up: recorded, else the ledger's by the replies of each round."""
    recorded = raw.series("communication-up-mib")
    if len(recorded) == len(raw.series("communication-mib")):
        return recorded
    replies = [len(line.get("update-norms") or line.get("good") or ()) for line in raw.lines]
    total = raw.sent(".up")
    return [
        (line["round"], total * sum(replies[: i + 1]) / sum(replies))
        for i, line in enumerate(raw.lines)
        if sum(replies)
    ]


def communication(sheet: Sheet, raw: Raw) -> None:
    total, up = raw.series("communication-mib"), uploads(raw)
    down = [(r, dict(total)[r] - v) for r, v in up]
    sheet.marks("communication", [*total, *down, *up])
    totals, n = raw.plan["totals"], raw.planned
    trained, judged = (
        sum(t["tensor_bytes"] for k, t in totals.items() if k.startswith(kinds)) / MIB
        for kinds in (("train.", "masks."), ("evaluate.",))
    )
    plan = {r: trained * r / n + judged * (r + 1) / (n + 1) for r in range(n + 1)}
    rows: list[list[Cell]] = [
        [[r], cells(dict(down).get(r)), cells(dict(up).get(r)), [v], cells(plan.get(r))]
        for r, v in total
    ]
    sheet.table("figure/communication", rows)
    sheet.want("figure/communication/note", [])


def messages(sheet: Sheet, raw: Raw) -> None:
    sent, plan = raw.ledger.get("totals") or {}, raw.plan["totals"]
    rows: list[list[Cell]] = []
    for kind in sorted({*sent, *plan}):
        row: list[Cell] = [kind]
        for t in (sent.get(kind), plan.get(kind)):
            row += [[t["messages"]], [t["tensor_bytes"] / MIB]] if t else [[0], [0]]
        rows.append(row)
    sheet.table("table/cost/Messages by kind", rows)
    if raw.lost:
        lost: list[list[Cell]] = []
        for line in raw.lost:
            after = line["after-round"]
            bytes_sent = sum(t["tensor_bytes"] for t in line["totals"].values())
            kinds = ("magnitudes-failed", "failed", "evaluate-failed", "formulary-failed")
            count = sum(len(line.get(kind) or ()) for kind in kinds)
            first: Cell = "none" if after is None else [after]
            lost.append([first, [bytes_sent / MIB], [count], [line["seconds"]], line["reason"]])
        sheet.table("table/cost/Rounds that did not finish", lost)


def seconds(sheet: Sheet, raw: Raw) -> None:
    phases: list[tuple[float, ...]] = []
    for line in raw.lines:
        train, judge = line["train-seconds"], line["evaluate-seconds"]
        phases.append((train, judge, max(0.0, line["seconds"] - train - judge)))
    rounds = [line["round"] for line in raw.lines]
    rows = [[r, *parts] for r, parts in zip(rounds, phases, strict=True)]
    sheet.marks("seconds", rows)
    sheet.table("figure/seconds", [[[value] for value in row] for row in rows])
    totals = [sum(of_phase) for of_phase in zip(*phases, strict=True)]
    sheet.want("figure/seconds/note", [part for total in totals for part in of_duration(total)])


# --- Sites ----------------------------------------------------------------------------------------


def site_numbers(raw: Raw) -> list[int]:
    return sorted(site["partition-id"] for site in raw.sites)


def participation(sheet: Sheet, raw: Raw) -> None:
    sites = site_numbers(raw)
    lost = Counter(int(s) for line in raw.lost for s in line.get("failed") or ())
    took = Counter(s for line in raw.trained for s in line["good"])
    failed = Counter(int(s) for line in raw.trained for s in line["failed"])
    if raw.trained or raw.lost:
        marks = [[*raw.who(s), line["round"]] for line in raw.trained for s in line["cohort"]]
        last = [
            line for line in raw.lost if line["after-round"] == (raw.rounds if raw.lines else None)
        ]
        if last and raw.summary.get("status") != "completed" and raw.rounds < raw.planned:
            marks += [[*raw.who(int(s)), raw.rounds + 1] for s in last[-1].get("failed") or ()]
        sheet.marks("participation", marks)
        of = {site["partition-id"]: site for site in raw.sites}
        rows: list[list[Cell]] = [
            [
                raw.name_of(s) or [s],
                [of[s]["train-examples"]],
                [of[s]["held-out-examples"]],
                [took[s]],
                [failed[s] + lost[s]],
            ]
            for s in sites
        ]
        sheet.table("figure/participation", rows)
        total = failed.total() + lost.total()
        note = [took.total(), total, lost.total()] if lost else [took.total(), total]
        sheet.want("figure/participation/note", note)


def coverage(sheet: Sheet, raw: Raw) -> None:
    if not any(line["site-coverage"] for line in raw.trained):  # under masks nobody tells one
        return
    told: dict[int, float] = dict.fromkeys(site_numbers(raw), 0.0)
    for line in raw.trained:
        told |= {int(s): share for s, share in line["site-coverage"].items()}
    percents = {s: 100 * share for s, share in told.items()}
    sheet.marks("coverage", [[*raw.who(s), share] for s, share in percents.items()])
    rows: list[list[Cell]] = [
        [[s] if raw.who(s) else [], [v] if v else "-"] for s, v in percents.items()
    ]
    sheet.table("figure/coverage", rows)
    never = [s for s, share in percents.items() if not share and raw.who(s)]
    sheet.want("figure/coverage/note", [100 * raw.series("coverage")[-1][1], *never[:20]])
    sheet.labels("coverage", [*percents, *percents.values()])


# --- Updates --------------------------------------------------------------------------------------


def updates(sheet: Sheet, raw: Raw) -> None:
    sums = [line["masked-sum"] for line in raw.trained if "masked-sum" in line]
    if sums:
        sheet.want("note/updates/1", [sum(one["values-cut"] for one in sums)])
    for key, what in (("update-norms", "norm"), ("update-cosines", "cosine")):
        rounds = {line["round"]: line for line in raw.trained if line.get(key)}
        if not rounds:
            continue
        found = [(int(s), r, v) for r, line in rounds.items() for s, v in line[key].items()]
        sheet.marks(key, [[*raw.who(s), r, v] for s, r, v in found])
        rows: list[list[Cell]] = []
        for site in sorted({s for s, _, _ in found}):
            values = [v for s, _, v in found if s == site]
            at = [r for s, r, _ in found if s == site]
            first: Cell = [site] if raw.who(site) else []
            ends = [[statistics.median(values)], [min(values)], [max(values)]]
            rows.append([first, *ends, at[:30]])
        sheet.table(f"figure/{key}", rows)
        rejected = [(s, r, v) for s, r, v in found if str(s) in rounds[r]["failed"]]
        median = {r: statistics.median(line[key].values()) for r, line in rounds.items()}
        if what == "norm":
            ratio = {
                (s, r): v / median[r]
                for s, r, v in found
                if len(rounds[r][key]) >= 3 and v > 0 and median[r] > 0
            }
            far = {at: max(q, 1 / q) for at, q in ratio.items() if max(q, 1 / q) > FAR}
            out = [(s, r, ratio[s, r]) for s, r in sorted(far, key=lambda at: -far[at])]
            rejected = [(s, r, v / median[r]) for s, r, v in rejected]
            ends = [FAR]
            if bound := raw.config.get("defence.update-norm-bound"):
                ends.append(bound)
            else:
                scaled = sum(line.get("updates-bounded") or 0 for line in raw.trained)
                ends += [scaled] if scaled else []
        else:
            out = sorted(((s, r, v) for s, r, v in found if v < 0), key=lambda each: each[2])
            ends = [0]
        note: list[float] = []
        for listed in (out, rejected):
            note += [part for s, r, v in listed[:5] for part in (*raw.who(s), r, v)]
            note += [len(listed) - 5] if len(listed) > 5 else []
        sheet.want(f"figure/{key}/note", [*note, *ends])
        sheet.labels(key, [s for s, _, _ in found])


def rule_values(sheet: Sheet, raw: Raw) -> None:
    errors = [
        [(r, 100 * v) for r, v in values]
        for key in ("product-error-of-update", "product-error", "truncation-error")
        if (values := raw.series(key))
    ]
    if errors:
        sheet.marks("aggregation-error", [pair for values in errors for pair in values])
        sheet.table("figure/aggregation-error", by_round(errors))
    for key in ("rank", "server-learning-rate", "proximal-penalty"):
        values = raw.series(key)
        if key == "proximal-penalty":
            values = [(r, v) for r, v in values if v > 0]
        is_drawn = bool(values) if key == "proximal-penalty" else len({v for _, v in values}) > 1
        if is_drawn:
            sheet.marks(key, values)
            sheet.table(f"figure/{key}", by_round([values]))
            if key == "proximal-penalty":
                sheet.want(f"figure/{key}/note", [2, raw.config["strategy.proximal-mu"]])
